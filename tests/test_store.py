"""The stage store: digests, tars, what a damaged result is, and archives that must not be unpacked."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from yolov8_nas.files import atomic_write, file_sha256, tree_digest, tree_files, write_json
from yolov8_nas.store import archive
from yolov8_nas.store.archive import ArchiveError, extract, pack
from yolov8_nas.store.store import Entry, Manifest, Store


def _tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "sub" / "a.txt").write_text("a")
    return folder


def test_the_tar_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    first = _tree(tmp_path / "first")
    second = tmp_path / "second"
    (second / "sub").mkdir(parents=True)
    (second / "sub" / "a.txt").write_text("a")
    (second / "b.txt").write_text("b")
    os.utime(second / "b.txt", (1, 1))
    (second / "b.txt").chmod(0o600)
    assert pack(first, tmp_path / "1.tar") == pack(second, tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    assert tree_digest(first) == tree_digest(second)
    (second / "b.txt").write_text("c")
    assert pack(second, tmp_path / "2.tar") != file_sha256(tmp_path / "1.tar")
    assert tree_digest(first) != tree_digest(second)


def test_what_is_packed_comes_out_again(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "folder")
    pack(folder, tmp_path / "x.tar")
    extract(tmp_path / "x.tar", tmp_path / "out")
    assert {name: path.read_bytes() for name, path in tree_files(tmp_path / "out").items()} == {
        "b.txt": b"b",
        "sub/a.txt": b"a",
    }


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    atomic_write(file, "old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"x": float("nan")})


def _manifest(entry: Entry) -> Manifest:
    files = {name: file_sha256(path) for name, path in tree_files(entry.outputs).items()}
    return Manifest("search", 1, "k", {}, {}, files, "d", 1.0)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda outputs: (outputs / "b.txt").write_text("x"), "b.txt has changed"),
        (lambda outputs: (outputs / "b.txt").unlink(), "b.txt is missing"),
        (lambda outputs: (outputs / "c.txt").write_text("c"), "c.txt does not belong"),
    ],
)
def test_damage_is_seen(tmp_path: Path, harm: Callable[[Path], object], told: str) -> None:
    entry = Store(tmp_path).entry("search", "k")
    _tree(entry.outputs)
    entry.partial.mkdir()
    entry.commit(_manifest(entry))
    assert not entry.partial.exists()
    manifest = entry.manifest
    assert manifest is not None
    assert entry.damage(manifest) is None
    harm(entry.outputs)
    assert told in (entry.damage(manifest) or "")


def test_half_a_manifest_is_none(tmp_path: Path) -> None:
    entry = Store(tmp_path).entry("search", "k")
    entry.folder.mkdir(parents=True)
    assert entry.manifest is None
    entry.manifest_file.write_text('{"stage": "sea')
    assert entry.manifest is None


def test_a_key_is_held_by_one(tmp_path: Path) -> None:
    entry = Store(tmp_path).entry("search", "k")
    waited, order = threading.Event(), []

    def second() -> None:
        with Store(tmp_path).entry("search", "k").lock(waited.set):
            order.append("second")

    with entry.lock(lambda: pytest.fail("nobody else holds it")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(5)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def _tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def _special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def _zip(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def _zip_link(path: Path, target: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, target)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parent in tar": (lambda p: _tar(p, ("../evil", b"x")), "'..' in its path"),
    "parent further in": (lambda p: _tar(p, ("a/../../evil", b"x")), "'..' in its path"),
    "absolute in tar": (lambda p: _tar(p, ("/evil", b"x")), "absolute path"),
    "parent in tar.gz": (lambda p: _tar(p, ("../evil", b"x"), mode="w:gz"), "'..' in its path"),
    "parent in zip": (lambda p: _zip(p, **{"../evil": "x"}), "'..' in its path"),
    "backslashes in zip": (lambda p: _zip(p, **{"..\\evil": "x"}), "'..' in its path"),
    "drive in zip": (lambda p: _zip(p, **{"C:/evil": "x"}), "absolute path"),
    "link out": (lambda p: _tar(p, _special("l", tarfile.SYMTYPE, "../evil")), "a link that leaves"),
    "absolute link": (lambda p: _tar(p, _special("l", tarfile.SYMTYPE, "/etc/passwd")), "a link that leaves"),
    "hard link out": (lambda p: _tar(p, _special("l", tarfile.LNKTYPE, "../evil")), "a link that leaves"),
    "link out in zip": (lambda p: _zip_link(p, "../../evil"), "a link that leaves"),
    "through a link": (lambda p: _tar(p, _special("l", tarfile.SYMTYPE, "."), ("l/x", b"x")), "a link to"),
    "device": (lambda p: _tar(p, _special("d", tarfile.CHRTYPE)), "a device"),
    "pipe": (lambda p: _tar(p, _special("d", tarfile.FIFOTYPE)), "a device"),
    "file and folder": (lambda p: _tar(p, ("a", b"x"), ("a/b", b"x")), "both a file and a folder"),
    "no archive": (lambda p: (p.write_text("hello") and p) or p, "neither tar"),
    "cut off": (lambda p: _cut(_tar(p, ("a", os.urandom(100_000)), mode="w:gz")), "damaged"),
}


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:50_000])
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_leave_nothing(tmp_path: Path, case: str) -> None:
    make, told = HOSTILE[case]
    archive = make(tmp_path / "archive")
    with pytest.raises(ArchiveError) as caught:
        extract(archive, tmp_path / "deep" / "out")
    assert told in str(caught.value)
    assert str(archive) in str(caught.value)
    assert not (tmp_path / "deep" / "out").exists()
    assert not list(tmp_path.rglob("evil"))


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = _tar(tmp_path / "bomb.tgz", ("zeros", bytes(4 * 2**20)), mode="w:gz")
    monkeypatch.setattr(archive, "RATIO_FROM", 2**20)
    with pytest.raises(ArchiveError, match="'zeros': a decompression bomb"):
        extract(bomb, tmp_path / "out")
    plain = _tar(tmp_path / "plain.tar", ("zeros", bytes(4 * 2**20)))
    extract(plain, tmp_path / "plain")  # the same bytes, honestly stored
    with pytest.raises(ArchiveError, match="bytes come out"):
        extract(plain, tmp_path / "out", max_bytes=2**20)
    many = _tar(tmp_path / "many.tar", *((f"{i}", b"") for i in range(20)))
    with pytest.raises(ArchiveError, match="more than 10 members"):
        extract(many, tmp_path / "out", max_files=10)


def test_links_inside_become_files(tmp_path: Path) -> None:
    archive = _tar(
        tmp_path / "x.tar",
        _special("images/link.png", tarfile.SYMTYPE, "../real.png"),
        _special("hard.png", tarfile.LNKTYPE, "real.png"),
        ("real.png", b"pixels"),
    )
    extract(archive, tmp_path / "out")
    for name in ("images/link.png", "hard.png", "real.png"):
        assert (tmp_path / "out" / name).read_bytes() == b"pixels"
        assert not (tmp_path / "out" / name).is_symlink()


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    """PyTorch's checkpoints are zips."""
    inner = _zip(tmp_path / "best.pt", weights="x")
    archive = _tar(tmp_path / "x.tar", ("a.json", b"{}"), ("best.pt", inner.read_bytes()))
    assert zipfile.is_zipfile(archive)
    extract(archive, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "best.pt"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.tar", ("a", b"x"))
    out = _tree(tmp_path / "out")
    with pytest.raises(ArchiveError, match="not empty"):
        extract(archive, out)
    assert (out / "b.txt").read_text() == "b"
