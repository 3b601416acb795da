"""Images are built on what is pinned, and named by digest once they are pushed; docker is a stand-in here."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))  # scripts, not a package

import audit
import bill
import build
import debian

from components.images import IMAGES, by_digest

DIGEST = "sha256:" + "0123456789abcdef" * 4
DOCKER = f"""#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case "$1 $2" in
  "image inspect") echo '["registry.example.com:5000/vision/cpu@{DIGEST}", "python@{DIGEST}"]' ;;
  "create "*) echo container ;;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker that writes down how it was called, and files of its own for pins and digests."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent), prepend=":")
    monkeypatch.setattr(build, "PINS", tmp_path / "pins.json")
    monkeypatch.setattr(build, "DIGESTS", tmp_path / "digests.json")
    monkeypatch.setattr(build, "TENSORRT_LOCK", tmp_path / "tensorrt.txt")
    monkeypatch.setattr(build, "APT_ARCHIVE", tmp_path / "apt-archive.txt")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    return docker.with_name("calls")


def pinned(reference: str) -> None:
    build.PINS.write_text(json.dumps({"python": reference}))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    build.main()


def test_every_kind_that_the_pipeline_names_is_built() -> None:
    assert IMAGES.keys() < build.DOCKERFILES.keys()
    for image, file in build.DOCKERFILES.items():
        assert f" AS {image}\n" in (build.HERE / file).read_text()


def test_a_tag_is_not_built_on(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned("python:3.11")
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "cpu")
    assert "has no digest yet; make images-pin looks it up" in capsys.readouterr().err
    assert "build" not in calls.read_text()


def test_nvidias_compiler_is_in_images_that_are_to_have_it(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(f"python:3.11@{DIGEST}")
    call(monkeypatch, "cpu")
    assert "RTX" not in calls.read_text()
    call(monkeypatch, "--rtx", "cpu", "mlflow")
    built = [line for line in calls.read_text().splitlines() if line.startswith("build ")][1:]
    assert ["--build-arg RTX=1" in line for line in built] == [True, False]
    dockerfile = (build.HERE / "Dockerfile").read_text()
    assert 'if [ -n "${RTX}" ]' in dockerfile and "--require-hashes -r /locks/rtx.txt" in dockerfile


def test_what_is_pushed_is_named_by_digest(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(f"python:3.11@{DIGEST}")
    call(monkeypatch, "--registry", "registry.example.com:5000/vision", "cpu")
    named = json.loads(build.DIGESTS.read_text())
    assert named == {"cpu": f"registry.example.com:5000/vision/cpu:1.2.3@{DIGEST}"}
    assert by_digest(named["cpu"])
    assert f"--build-arg BASE=python:3.11@{DIGEST}" in calls.read_text()
    assert "APT_LOCKED" not in calls.read_text(), "what is pushed has the packages of the lock"


def test_what_is_needed_to_install_is_in_an_image_of_its_own(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "--base", "stand-in:base", "--build-base", "stand-in:build", "mlflow")
    assert "--build-arg BASE=stand-in:base" in calls.read_text()
    assert "--build-arg BUILD_BASE=stand-in:build" in calls.read_text()
    assert "--build-arg APT_LOCKED=no" in calls.read_text(), "a stand-in may be of another release"
    for file in set(build.DOCKERFILES.values()):
        first, *others = (line for line in (build.HERE / file).read_text().splitlines() if line.startswith("FROM $"))
        assert first == "FROM ${BUILD_BASE} AS build" and others and not any("BUILD_BASE" in line for line in others)


def test_what_stays_here_gets_no_digest(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "--base", "stand-in:bookworm", "cpu")
    assert not build.DIGESTS.exists()
    assert "push" not in calls.read_text()


def test_target_waits_for_tensorrt(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--base", "stand-in:bookworm", "target")
    assert "make images-pin writes it" in capsys.readouterr().err


def test_tensorrt_has_no_index_of_its_own(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(build.INDEX_VARIABLE, raising=False)
    build.TENSORRT_LOCK.write_text("")
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "--base", "stand-in:bookworm", "target")
    assert "set TENSORRT_INDEX to the package index" in capsys.readouterr().err
    monkeypatch.setenv(build.INDEX_VARIABLE, "https://packages.example.com")
    call(monkeypatch, "--base", "stand-in:bookworm", "target")
    assert "--build-arg TENSORRT_INDEX=https://packages.example.com" in calls.read_text()


def test_docker_is_asked_by_the_name_that_it_uses(calls: Path) -> None:
    assert build.digest_of("python:3.11") == f"python:3.11@{DIGEST}"
    with pytest.raises(SystemExit, match="2"):
        build.digest_of("registry.example.com/other:1")


def test_a_machine_without_docker_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch)
    assert "docker is not installed" in capsys.readouterr().err


URIS = (
    "'http://mirror.example/pool/libg/libgl1_1.7.0-1%2bb2_amd64.deb' libgl1_1.7.0-1+b2_amd64.deb 91000 SHA256:{0}\n"
    "'http://mirror.example/pool/libx/libxcb1_1.17_amd64.deb' libxcb1_1.17_amd64.deb 144000 {1}{0}\n"
)


def test_packages_of_debian_are_pinned_by_digest(capsys: pytest.CaptureFixture[str]) -> None:
    digest = "ab" * 32
    lock = build.apt_lock("Reading package lists...\n" + URIS.format(digest, "SHA256:"))
    assert lock.splitlines() == [f"{digest}  libgl1_1.7.0-1+b2_amd64.deb", f"{digest}  libxcb1_1.17_amd64.deb"]
    for told in (URIS.format(digest, "MD5Sum:"), "E: Unable to locate package\n"):
        with pytest.raises(SystemExit, match="2"):
            build.apt_lock(told)
    assert "without SHA-256" in capsys.readouterr().err
    text = (build.HERE / "Dockerfile").read_text()
    assert f'ARG APT_PACKAGES="{" ".join(build.APT_PACKAGES)}"' in text
    assert text.index("--download-only") < text.index("check-debs.sh /var") < text.index("--no-download")
    assert "Acquire::ForceHash=SHA256" in build.PRINT_URIS, "apt names the MD5 sum unless it is told so"


def test_the_lock_of_debian_names_what_is_installed() -> None:
    head, *rows = build.APT_LOCK.read_text().splitlines()
    assert re.fullmatch(rf"# Debian {debian.SUITE}, as of [0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}; .*", head)
    assert debian.SUITE in json.loads((build.HERE / "pins.json").read_text())["python"]
    assert all(re.fullmatch(r"[0-9a-f]{64}  [a-z0-9.+-]+_[A-Za-z0-9.+~%-]+_(amd64|all)\.deb", row) for row in rows)
    named = {row.split("  ")[1].partition("_")[0] for row in rows}
    assert {name.removesuffix("t64") for name in named} >= set(build.APT_PACKAGES)


APT = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
for last in "$@"; do :; done
for part in "$@"; do
  case "$part" in Dir=*) cat "${part#Dir=}/etc/apt/sources.list" >> "$(dirname "$0")/calls" ;; esac
done
[ "$last" = update ] || printf '%s' "$TOLD"
"""


def test_packages_of_debian_are_pinned_without_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(APT)
    apt.chmod(0o755)
    keys, archive = tmp_path / "keys.gpg", tmp_path / "apt-archive.txt"
    keys.write_text("")
    monkeypatch.setenv("PATH", str(apt.parent), prepend=":")
    monkeypatch.setenv("TOLD", URIS.format("cd" * 32, "SHA256:"))
    monkeypatch.setattr(debian, "KEYS", keys)
    monkeypatch.setattr(build, "APT_LOCK", tmp_path / "apt.txt")
    monkeypatch.setattr(build, "APT_ARCHIVE", archive)
    archive.write_text("https://archive.example.com/another\n")
    debian.main(["http://mirror.example/debian", "http://mirror.example/debian-security"])
    head, *rows = (tmp_path / "apt.txt").read_text().splitlines()
    assert head.startswith("# Debian trixie") and len(rows) == 2 and rows[0].startswith("cd" * 32)
    assert not archive.exists(), "no mirror of today is an archive"
    calls = apt.with_name("calls").read_text()
    assert f"deb [signed-by={keys}] http://mirror.example/debian trixie-updates main" in calls
    assert f"deb [signed-by={keys}] http://mirror.example/debian-security trixie-security main" in calls
    assert "Acquire::ForceHash=SHA256" in calls and "AllowUnauthenticated" not in calls
    dated = "https://archive.example.com/debian/20260101T000000Z"
    debian.main([dated])
    assert archive.read_text() == f"{dated}\n"
    assert f"check-valid-until=no] {dated} trixie main" in apt.with_name("calls").read_text()
    for address in ("file:///etc", "http://x/$(id)"):
        with pytest.raises(SystemExit, match="2"):
            debian.main([address])
    keys.unlink()
    with pytest.raises(SystemExit, match="2"):
        debian.main([dated])


def test_what_is_not_in_the_lock_is_not_installed(tmp_path: Path) -> None:
    folder, lock = tmp_path / "archives", tmp_path / "apt.txt"
    folder.mkdir()
    contents = {name: f"the package {name}".encode() for name in ("a_1.deb", "b_1%3a2.deb")}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    lock.write_text(
        f"# a comment {digests['b_1%3a2.deb']}  x\n{digests['a_1.deb']}  a_1.deb\n{'0' * 64}  of_the_base.deb\n"
    )

    def check() -> subprocess.CompletedProcess[str]:
        command = ["sh", str(build.HERE / "check-debs.sh"), str(folder), str(lock)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert check().returncode == 0, "where all is in the base there is nothing to check"
    (folder / "a_1.deb").write_bytes(contents["a_1.deb"])
    assert check().returncode == 0, "what the base has already is not downloaded"
    (folder / "b_1%3a2.deb").write_bytes(contents["b_1%3a2.deb"])
    refused = check()
    assert refused.returncode == 1 and f"b_1%3a2.deb has SHA-256 {digests['b_1%3a2.deb']}" in refused.stderr
    (folder / "b_1%3a2.deb").unlink()
    (folder / "a_1.deb").write_bytes(b"something else")
    assert check().returncode == 1


def test_what_the_dockerfiles_copy_is_sent_to_the_engine() -> None:
    """A file that .dockerignore leaves out ends a build."""
    ignored = (build.HERE.parent / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignored if line.startswith("!")]
    for file in set(build.DOCKERFILES.values()):
        for line in re.findall(r"^COPY (?!--)(.*) \S+$", (build.HERE / file).read_text(), re.MULTILINE):
            for source in line.split():
                path = source.replace("[t]", "t")
                assert any(fnmatch.fnmatch(path, pattern) for pattern in sent), f"{file}: {path}"
                assert "[" in source or path == "images/tensorrt.txt" or (build.HERE.parent / path).exists()


def test_debian_is_taken_from_a_dated_archive(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dated = "https://archive.example.com/debian/20260101T000000Z"
    call(monkeypatch, "--base", "stand-in:bookworm", "cpu")
    assert build.ARCHIVE_VARIABLE not in calls.read_text(), "the mirrors of the image, unless an archive was pinned"
    build.APT_ARCHIVE.write_text(dated + "\n")
    call(monkeypatch, "--base", "stand-in:bookworm", "cpu")
    assert f"--build-arg APT_ARCHIVE={dated}" in calls.read_text()
    text = (build.HERE / "Dockerfile").read_text()
    assert text.index("deb [check-valid-until=no] ${APT_ARCHIVE}") < text.index("apt-get update")
    assert dated in build.from_archive(dated) and build.from_archive("") == ""
    for archive in ('https://x/"; touch ran; "', "file:///etc", "https://x/$(id)", "https://x y"):
        with pytest.raises(SystemExit, match="2"):
            build.from_archive(archive)
    assert "is no address of an archive" in capsys.readouterr().err


def test_the_bill_of_materials_has_both_kinds_of_packages() -> None:
    bill = {"bomFormat": "CycloneDX", "components": [{"name": "numpy"}]}
    both = build.with_debian(bill, "libc6\t2.41-12\tamd64\nzlib1g\t1:1.3\tamd64\n")
    assert [part["name"] for part in both["components"]] == ["numpy", "libc6", "zlib1g"]
    assert both["components"][2]["purl"] == "pkg:deb/debian/zlib1g@1:1.3?arch=amd64"
    for file in set(build.DOCKERFILES.values()):
        assert "> /debian.tsv" in (build.HERE / file).read_text()


def test_the_python_package_has_a_bill_of_materials(tmp_path: Path) -> None:
    bill.main([str(tmp_path / "bill.json")])
    content = json.loads((tmp_path / "bill.json").read_text())
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.5")
    found = {(part["name"].lower(), part["version"]): part for part in content["components"]}
    assert set(found) == set(audit.pins([bill.ROOT / bill.LOCK])) and len(found) > 100
    lock = (bill.ROOT / bill.LOCK).read_text()
    digests = [file["hashes"][0]["content"] for part in found.values() for file in part["externalReferences"]]
    assert sorted(digests) == sorted(re.findall("sha256:([0-9a-f]{64})", lock))
    assert content["metadata"]["component"]["licenses"] == [{"license": {"id": "AGPL-3.0-only"}}]
    assert len({part["bom-ref"] for part in found.values()}) == len(found)
    bill.main([str(tmp_path / "again.json")])
    assert (tmp_path / "again.json").read_text() == (tmp_path / "bill.json").read_text(), "the same lock, the same bill"
    for lock in ("numpy==1.0\n", "numpy>=1.0 \\\n    --hash=sha256:" + "0" * 64):
        with pytest.raises(ValueError, match=r"without a SHA-256|are understood"):
            bill.packages(lock)


def test_locks_are_held_against_advisories(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"vulns": [{"id": "A-1"}]} if query["package"]["name"] == "numpy" else {} for query in queries]

    def away(_: list[dict[str, Any]]) -> list[dict[str, Any]]:
        raise OSError("no route to host")

    packages = audit.pins(audit.ROOT / lock for lock in audit.LOCKS)
    assert len(packages) > 150
    assert {"numpy", "torch", "mlflow"} <= {name for name, _ in packages}
    assert audit.main(ask) == 1
    assert "A-1" in capsys.readouterr().err
    monkeypatch.setitem(audit.ACCEPTED, "A-1", "does not apply: a test")
    assert audit.main(ask) == 0
    assert audit.main(away) == 0
    assert re.search(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}: [0-9]+ pinned packages NOT audited", capsys.readouterr().out, re.M)
