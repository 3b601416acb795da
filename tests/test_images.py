"""Images are built on what is pinned, and named by digest once they are pushed; docker is a stand-in here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))  # scripts, not a package

import audit
import build

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


def test_what_is_needed_to_install_is_in_an_image_of_its_own(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "--base", "stand-in:base", "--build-base", "stand-in:build", "mlflow")
    assert "--build-arg BASE=stand-in:base" in calls.read_text()
    assert "--build-arg BUILD_BASE=stand-in:build" in calls.read_text()
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
    assert text.index("sha256sum --check --strict") < text.index("--no-download")


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
