"""Attacks by whoever may write to a bucket, a store's folder, a registry or an archive: a table, and what must hold.

Each row is an attack of its own kind. Nothing may come to lie outside of the folder that is meant, nothing that was
altered may be used, and whoever is attacked is told in one line; a traceback is a row that does not hold.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import os
import shutil
import sqlite3
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fabricated import CONFIG as FABRICATED
from memory_bucket import MemoryBucket
from onnx import TensorProto, helper
from plain_settings import Plain
from registering import Branch, made_up_scores
from typer.testing import CliRunner

from yolov8_nas import names, signing
from yolov8_nas.commands import main as cli
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.onnx_file import read_onnx
from yolov8_nas.files import read_json, write_json
from yolov8_nas.registry import champions, compare, promote, pull, query, register, spool, tracking
from yolov8_nas.run import local, retraining
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import Stage, StageContext, open_store, run_stage
from yolov8_nas.store import remote as remote_store
from yolov8_nas.store import s3
from yolov8_nas.store.archive import ArchiveError, extract, pack
from yolov8_nas.store.store import Manifest, Store

EVIL = b"EVIL " * 40
CONFIG = RunConfig(targets=(TargetConfig(hardware="cpu-1t", constraints=("params<=9M",)),))
ADDRESS = "s3://bucket/store"
KEY = "k" * 8


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    Attributes:
        name: What is tried.
        attempt: Tries it; returns what the attacked process came to, or raises what it was told.
        told: What the message has, be it an error's or a line of the output.
        refused: Whether it ends in a refusal; else the process goes on without what the attacker wrote.
    """

    name: str
    attempt: Callable[[Scene], object]
    told: str
    refused: bool = True


@dataclass
class Scene:
    """A machine with a store, another machine's folder that must stay as it is, and a bucket."""

    folder: Path
    bucket: MemoryBucket
    ran: list[str] = field(default_factory=list)

    @property
    def local(self) -> Store:
        return Store(self.folder / "store")

    @property
    def remote(self) -> Store:
        return open_store(ADDRESS)

    def put(self, name: str, content: Any) -> None:
        """Write an object, as plain data or as bytes."""
        self.bucket.objects[f"store/{name}"] = content if isinstance(content, bytes) else json.dumps(content).encode()

    def get(self, name: str) -> Any:
        return json.loads(self.bucket.objects[f"store/{name}"])

    def run(self, store: str | Path, run_id: str = "r") -> bytes:
        """What a stage of one file comes to, from the store or computed."""

        def work(ctx: StageContext) -> None:
            self.ran.append(run_id)
            kept = ctx.partial / "checkpoint"
            (ctx.out / "result").write_bytes(b"right" + (kept.read_bytes() if kept.exists() else b""))

        stage = Stage("search", 1, lambda config, target: Plain(x=1), work)
        tar = self.folder / "out.tar"
        run_stage(stage, config=CONFIG, target="cpu-1t-fp32", inputs={}, output=tar, store=store, run_id=run_id)
        with tarfile.open(tar) as file:
            names = file.getnames()
            assert names == ["result"], names
            found = file.extractfile("result")
            assert found is not None
            return found.read()

    def finished(self, store: str | Path) -> tuple[str, Path]:
        """Key and folder of a result that a stage has come to honestly."""
        assert self.run(store) == b"right"
        record = read_json(open_store(store).run_folder("r") / "cpu-1t-fp32.search.json")
        self.ran.clear()
        return record["key"], open_store(store).root / "search" / record["key"]

    def again(self, store: str | Path) -> None:
        """Run the stage once more; the right result must come of it, computed anew."""
        assert self.run(store, "again") == b"right"
        assert self.ran == ["again"], "a result that was altered was used"

    def another_machine(self) -> None:
        """Forget what this machine has of the bucket."""
        os.environ[remote_store.CACHE_VARIABLE] = str(self.folder / f"cache-{len(list(self.folder.iterdir()))}")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    bucket = MemoryBucket()
    monkeypatch.setattr(s3, "connect", lambda *_: bucket)
    monkeypatch.setenv(remote_store.CACHE_VARIABLE, str(tmp_path / "machine" / "deep" / "cache"))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("as it was")
    yield Scene(tmp_path / "machine" / "deep", bucket)


def hold(attack: Attack, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Try an attack, and see what must hold of each."""
    scene.folder.mkdir(parents=True, exist_ok=True)
    try:
        attack.attempt(scene)
        told = None
    except (InputError, StageError, ArchiveError) as error:
        told = str(error)
    assert (told is not None) == attack.refused, f"{attack.name}: {told}"
    said = " ".join([told or "", *capsys.readouterr()])
    assert attack.told in said, said
    assert "Traceback" not in said
    assert told is None or "\n" not in told
    assert (tmp_path / "victim" / "precious").read_text() == "as it was"
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and scene.folder not in path.parents]
    assert [path.name for path in outside] == ["precious"], outside


# Names ----------------------------------------------------------------------------------------------------------------

NAMES: list[tuple[str, object, str]] = [
    ("up", "../x", "'..'"),
    ("up in the middle", "a/../../x", "'..'"),
    ("up at the end", "a/..", "'..'"),
    ("up alone", "..", "'..'"),
    ("up that comes back", "a/../b", "'..'"),
    ("two dots of one character", "‥/x", "'..'"),
    ("wide full stops", "\uff0e\uff0e/x", "'..'"),
    ("a wide slash behind two dots", "..\uff0fx", "'..'"),
    ("absolute", "/etc/passwd", "absolute"),
    ("two slashes first", "//host/share", "absolute"),
    ("a drive", "C:/x", "absolute"),
    ("a place on a drive", "c:x", "absolute"),
    ("backslashes up", "..\\x", "backslash"),
    ("a share", "\\\\host\\share", "backslash"),
    ("a backslash among slashes", "a/b\\..\\c", "backslash"),
    ("a NUL", "best.pt\0.txt", "NUL"),
    ("a NUL alone", "\0", "NUL"),
    ("the folder itself", ".", "'.'"),
    ("a dot between", "a/./b", "'.'"),
    ("two slashes between", "a//b", "empty part"),
    ("a slash last", "a/", "empty part"),
    ("nothing", "", "not a name"),
    ("no text", 7, "not a name"),
    ("none", None, "not a name"),
    ("a list", ["a"], "not a name"),
    ("bytes", b"a", "not a name"),
    ("half a character", "\ud800", "no text"),
    ("a part of 256 bytes", "a" * 256, "too long"),
    ("a part of 130 characters of two bytes", "é" * 130, "too long"),
    ("many parts", "/".join(["ab"] * 400), "too long"),
]
"""What is tried, the name, and why it is refused."""

FINE = [
    "a",
    "a/b.txt",
    ".hidden",
    "a..b",
    "...",
    "~/x",
    "a b",
    "Ärger.jpg",
    "ab:c",
    "图像/一.png",
    "-rf",
    "$HOME",
    "a" * 255,
]
DIGEST = "0f" * 32
DIGESTS: list[tuple[str, object]] = [
    ("63 digits", DIGEST[1:]),
    ("65 digits", DIGEST + "0"),
    ("upper case, another name of the same object", DIGEST.upper()),
    ("a way out", "../" + DIGEST[3:]),
    ("a line break behind", DIGEST + "\n"),
    ("wide digits", "\uff10" * 64),
    ("Arabic digits", "٠" * 64),
    ("letters that are no digits", "g" * 64),
    ("nothing", ""),
    ("a number", int("1" * 64)),
    ("none", None),
    ("SHA-1", "a" * 40),
    ("a prefix", "sha256:" + DIGEST[:57]),
]


@pytest.mark.parametrize(("what", "name", "why"), NAMES, ids=[row[0] for row in NAMES])
def test_a_name_that_leads_out_is_refused_everywhere(what: str, name: object, why: str, tmp_path: Path) -> None:
    assert why in (names.fault(name) or ""), what
    for refuse in (
        lambda: names.below(tmp_path, name, "a list"),
        lambda: names.part(name, "a list"),
        lambda: names.files({name: DIGEST} if name.__hash__ else name, "a list"),
    ):
        with pytest.raises(names.UnsafeNameError) as caught:
            refuse()
        assert str(caught.value).isascii() and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", FINE)
def test_names_that_people_have_are_taken(name: str, tmp_path: Path) -> None:
    assert names.below(tmp_path, name, "a list") == tmp_path / name
    assert names.below(tmp_path, name, "a list").resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(("what", "text"), DIGESTS, ids=[row[0] for row in DIGESTS])
def test_what_is_no_digest_is_refused(what: str, text: object) -> None:
    with pytest.raises(names.UnsafeNameError, match="no SHA-256"):
        names.digest(text, what)
    with pytest.raises(names.UnsafeNameError, match="no SHA-256"):
        names.files({"model.onnx": text}, "a list")


def test_composed_and_decomposed_names_stay_two() -> None:
    """A file system that takes them for one lets the second lie over the first, whose digest then does not fit."""
    both = {unicodedata.normalize(form, "é"): DIGEST for form in ("NFC", "NFD")}
    assert len(names.files(both, "a list")) == 2


# What lies in a store -------------------------------------------------------------------------------------------------


def _listed(name: str, digest: object) -> Callable[[Scene], object]:
    """A manifest in the bucket that lists a file."""

    def attempt(scene: Scene) -> object:
        key, _ = scene.finished(ADDRESS)
        manifest = scene.get(f"search/{key}/manifest.json")
        scene.put(f"search/{key}/objects/{hashlib.sha256(EVIL).hexdigest()}", EVIL)
        scene.put(f"search/{key}/manifest.json", {**manifest, "outputs": {**manifest["outputs"], name: digest}})
        scene.another_machine()
        scene.again(ADDRESS)
        return None

    return attempt


def _changed_manifest(change: Callable[[dict[str, Any]], object], where: str = "bucket") -> Callable[[Scene], object]:
    """A manifest that was changed, of a finished result."""

    def attempt(scene: Scene) -> object:
        if where == "bucket":
            key, _ = scene.finished(ADDRESS)
            scene.put(f"search/{key}/manifest.json", change(scene.get(f"search/{key}/manifest.json")))
            scene.another_machine()
            scene.again(ADDRESS)
        else:
            _, folder = scene.finished(scene.folder / "store")
            changed = change(read_json(folder / "manifest.json"))
            (folder / "manifest.json").write_text(json.dumps(changed))
            scene.again(scene.folder / "store")
        return None

    return attempt


def _checkpoint(content: Any, objects: dict[str, bytes] | None = None) -> Callable[[Scene], object]:
    """A list of checkpoints in the bucket, before a key is done."""

    def attempt(scene: Scene) -> object:
        key, _ = scene.finished(ADDRESS)
        scene.bucket.objects.clear()
        scene.put(f"search/{key}/partial.json", content)
        for name, data in (objects or {}).items():
            scene.put(f"search/{key}/objects/{name}", data)
        scene.another_machine()
        scene.again(ADDRESS)
        return None

    return attempt


def _planted(name: str) -> Callable[[Scene], object]:
    """A file among the checkpoints that libraries of others trust where each machine makes it for itself."""

    def attempt(scene: Scene) -> object:
        _checkpoint({"files": {name: EVIL_DIGEST}}, {EVIL_DIGEST: EVIL})(scene)
        assert not [path for path in scene.folder.rglob("*") if path.name == name.rpartition("/")[2]]
        return None

    return attempt


def _failed(content: Any) -> Callable[[Scene], object]:
    """A list of what a failure left, in the bucket."""

    def attempt(scene: Scene) -> object:
        key, _ = scene.finished(ADDRESS)
        scene.bucket.objects.clear()
        scene.put(f"search/{key}/failed.json", content)
        scene.put(f"search/{key}/objects/{hashlib.sha256(EVIL).hexdigest()}", EVIL)
        scene.another_machine()
        scene.remote.result("search", key)
        scene.again(ADDRESS)
        return None

    return attempt


def _record(name: str, content: Any = None) -> Callable[[Scene], object]:
    """An object among the records of a run."""

    def attempt(scene: Scene) -> object:
        scene.put(f"runs/r/{name}", content or EVIL)
        scene.put("runs/r/config.json", {"fine": True})
        assert read_json(scene.remote.run_folder("r") / "config.json") == {"fine": True}
        return None

    return attempt


def _brought(objects: dict[str, bytes]) -> Callable[[Scene], object]:
    """Objects below `spool/`, which every register stage and `models sync` bring."""

    def attempt(scene: Scene) -> object:
        for name, content in objects.items():
            scene.put(name, content)
        assert spool.waiting(scene.remote) == []
        return None

    return attempt


def _altered(change: Callable[[Path], object], read: bool = False) -> Callable[[Scene], object]:
    """A finished result in a folder that somebody changes; then it is read, or the stage runs again."""

    def attempt(scene: Scene) -> object:
        key, folder = scene.finished(scene.folder / "store")
        change(folder)
        if read:
            return scene.local.result("search", key)
        return scene.again(scene.folder / "store")

    return attempt


def _altered_object(change: Callable[[bytes], bytes | None], only: tuple[str, ...] | None) -> Callable[[Scene], object]:
    """An object of a finished result that the bucket's writer changes; `only` as for `result`, or the stage again."""

    def attempt(scene: Scene) -> object:
        key, _ = scene.finished(ADDRESS)
        name = f"store/search/{key}/objects/{hashlib.sha256(b'right').hexdigest()}"
        if (changed := change(scene.bucket.objects.pop(name))) is not None:
            scene.bucket.objects[name] = changed
        scene.another_machine()
        return scene.again(ADDRESS) if only is None else scene.remote.result("search", key, only)

    return attempt


def _moved(scene: Scene) -> None:
    """The honest result of another key, with its manifest, laid where this key's belongs."""
    _, folder = scene.finished(scene.folder / "store")
    other = Store(scene.folder / "store").entry("search", "f" * 64)
    other.outputs.mkdir(parents=True)
    (other.outputs / "result").write_bytes(EVIL)
    digest = hashlib.sha256(EVIL).hexdigest()
    manifest = {**read_json(folder / "manifest.json"), "key": "f" * 64, "outputs": {"result": digest}}
    (folder / "outputs" / "result").write_bytes(EVIL)
    write_json(folder / "manifest.json", manifest)
    scene.again(scene.folder / "store")


def _link_to_a_secret(folder: Path) -> None:
    victim = folder.parents[4] / "victim" / "precious"
    (folder / "outputs" / "result").unlink()
    (folder / "outputs" / "result").symlink_to(victim)


def _linked_folder(folder: Path) -> None:
    (folder / "outputs" / "more").symlink_to(folder.parents[4] / "victim", target_is_directory=True)


def _same_content_through_a_link(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.write_bytes(b"right")
    (folder / "outputs" / "result").unlink()
    (folder / "outputs" / "result").symlink_to(elsewhere)


EVIL_DIGEST = hashlib.sha256(EVIL).hexdigest()

STORE = [
    # A bucket's listing.
    Attack("record that leads up", _record("../../../../victim/precious"), "left alone: '..'", False),
    Attack("record with an absolute name", _record("/victim/precious"), "left alone: an absolute", False),
    Attack("record with a backslash", _record("..\\..\\precious"), "left alone: a backslash", False),
    Attack("record with a name of 300 bytes", _record("a" * 300), "left alone: too long", False),
    Attack("record that is file and folder", _record("config.json/x"), "its folder is an object", False),
    Attack("spool entry that leads up", _brought({"spool/../../../x/entry.json": EVIL}), "left alone: '..'", False),
    Attack("spool entry that is named like the lock", _brought({"spool/.lock": EVIL}), "", False),
    Attack("spool that is a file", _brought({"spool/x": EVIL, "spool/x/entry.json": EVIL}), "is an object", False),
    Attack("run that is named ..", lambda scene: scene.remote.run_folder(".."), "'..'"),
    Attack("run that is named by a path", lambda scene: scene.remote.run_folder("a/../../b"), "'..'"),
    Attack("run with a slash", lambda scene: scene.local.run_folder("a/b"), "a slash in it"),
    # A manifest.
    Attack("manifest: a file up", _listed("../../../../victim/precious", EVIL_DIGEST), "'..'", False),
    Attack("manifest: an absolute file", _listed("/tmp/evil", EVIL_DIGEST), "absolute", False),
    Attack("manifest: a digest that leads up", _listed("result2", "../../runs/r/config.json"), "no SHA-256", False),
    Attack("manifest: a digest in upper case", _listed("result2", EVIL_DIGEST.upper()), "no SHA-256", False),
    Attack("manifest: a digest that is a list", _listed("result2", [EVIL_DIGEST]), "no SHA-256", False),
    Attack("manifest: a file in a file", _listed("result/x", EVIL_DIGEST), "both a file and a folder", False),
    Attack("manifest: outputs are a list", _changed_manifest(lambda m: {**m, "outputs": ["a"]}), "outputs", False),
    Attack("manifest: no object", _changed_manifest(lambda m: [m]), "not a manifest", False),
    Attack("manifest: a key more", _changed_manifest(lambda m: {**m, "__class__": 1}), "__class__", False),
    Attack("manifest: a key less", _changed_manifest(lambda m: {k: m[k] for k in m if k != "digest"}), "digest", False),
    Attack("manifest: version is true", _changed_manifest(lambda m: {**m, "version": True}), "version", False),
    Attack("manifest: of another key", _changed_manifest(lambda m: {**m, "key": "0" * 64}), "another result", False),
    Attack("manifest: of another stage", _changed_manifest(lambda m: {**m, "stage": "x"}), "another result", False),
    Attack("manifest: seconds without end", _changed_manifest(lambda m: {**m, "seconds": 1e999}), "no number", False),
    Attack("manifest: seconds that are none", _changed_manifest(lambda m: {**m, "seconds": 0 * 1e999}), "NaN", False),
    Attack("manifest: nesting", _changed_manifest(lambda m: json.loads("[" * 900 + "]" * 900)), "nested deeper", False),
    Attack(
        "local manifest: a file up",
        _changed_manifest(lambda m: {**m, "outputs": {"../x": DIGEST}}, "here"),
        "'..'",
        False,
    ),
    Attack("local manifest: empty", _altered(lambda f: (f / "manifest.json").write_bytes(b"")), "not JSON", False),
    Attack(
        "local manifest: no text",
        _altered(lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{")),
        "not JSON",
        False,
    ),
    Attack(
        "local manifest: nesting",
        _altered(lambda f: (f / "manifest.json").write_text("[" * 10**5)),
        "nested deeper",
        False,
    ),
    Attack("a manifest laid over another key's", _moved, "another result", False),
    # Lists of checkpoints and of what a failure left.
    Attack(
        "checkpoints: a file up", _checkpoint({"files": {"../../x": EVIL_DIGEST}}, {EVIL_DIGEST: EVIL}), "'..'", False
    ),
    Attack("checkpoints: no files", _checkpoint({"files": None}), "no list of files", False),
    Attack("checkpoints: a list", _checkpoint([1, 2]), "no list of files", False),
    Attack("checkpoints: no JSON", _checkpoint(b"{"), "not JSON", False),
    Attack(
        "checkpoints: other bytes",
        _checkpoint({"files": {"checkpoint": DIGEST}}, {DIGEST: EVIL}),
        "another SHA-256",
        False,
    ),
    Attack("checkpoints: no bytes", _checkpoint({"files": {"checkpoint": DIGEST}}), "damaged; beginning anew", False),
    Attack("checkpoints: a digest up", _checkpoint({"files": {"checkpoint": "../../../x"}}), "no SHA-256", False),
    Attack(
        "checkpoints: a cache of labels, which is a pickle", _planted(".data-train-val/0.cache"), "no machine", False
    ),
    Attack("checkpoints: a view of the data", _planted(".data-train-val/data.yaml"), "no machine sends", False),
    Attack("checkpoints: a file with a dot", _planted("networks/.hidden"), "no machine sends", False),
    Attack("failure: a file up", _failed({"files": {"../../../../x": EVIL_DIGEST}}), "'..'", False),
    Attack("failure: absolute", _failed({"files": {"/tmp/evil": EVIL_DIGEST}}), "absolute", False),
    Attack("failure: a number", _failed(7), "no list of files", False),
    # Bytes.
    Attack("result: other bytes", _altered(lambda f: (f / "outputs/result").write_bytes(b"wrong")), "changed", False),
    Attack("result: more bytes", _altered(lambda f: (f / "outputs/result").write_bytes(b"right!")), "changed", False),
    Attack("result: cut off", _altered(lambda f: (f / "outputs/result").write_bytes(b"")), "changed", False),
    Attack("result: gone", _altered(lambda f: (f / "outputs/result").unlink()), "missing", False),
    Attack("result: one file more", _altered(lambda f: (f / "outputs/x").write_bytes(EVIL)), "does not belong", False),
    Attack("result: a link to a secret", _altered(_link_to_a_secret), "is a link", False),
    Attack("result: a link to a folder", _altered(_linked_folder), "is a link", False),
    Attack("result: the same through a link", _altered(_same_content_through_a_link), "is a link", False),
    Attack("result: a pipe more", _altered(lambda f: os.mkfifo(f / "outputs/pipe")), "is no plain file", False),
    Attack("read: other bytes", _altered(lambda f: (f / "outputs/result").write_bytes(b"wrong"), True), "changed"),
    Attack("read: gone", _altered(lambda f: (f / "outputs/result").unlink(), True), "missing"),
    Attack("read: a link", _altered(_link_to_a_secret, True), "is a link"),
    Attack("read: no manifest", _altered(lambda f: (f / "manifest.json").write_bytes(b"{"), True), "cannot be used"),
    Attack("object: other bytes", _altered_object(lambda b: b"wrong", None), "another SHA-256", False),
    Attack("object: more bytes", _altered_object(lambda b: b + EVIL, None), "another SHA-256", False),
    Attack("object: gone", _altered_object(lambda b: None, None), "missing", False),
    Attack("object read alone: other bytes", _altered_object(lambda b: b"wrong", ("result",)), "not what its manifest"),
    Attack("object read alone: gone", _altered_object(lambda b: None, ("result",)), "not what its manifest"),
    Attack("object read whole: other bytes", _altered_object(lambda b: b"wrong", ()), "missing"),
    Attack("a record that is too long", _record("x", b" " * (64 * 2**20 + 1)), "no record of a store has"),
    # Paths that records name.
    Attack("record: a stage that leads up", lambda scene: scene.local.result("../../victim", KEY), "'..'"),
    Attack("record: a key that leads up", lambda scene: scene.remote.result("search", "../../../victim"), "'..'"),
    Attack("record: a key that is a number", lambda scene: scene.local.result("search", 7), "not a name"),  # type: ignore[arg-type]
    Attack("record: a name that leads up", lambda scene: scene.local.record("r", "../../x.json", {}), "'..'"),
]


@pytest.mark.parametrize("attack", STORE, ids=lambda attack: attack.name)
def test_a_writer_of_the_store(
    attack: Attack, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(attack, scene, tmp_path, capsys)


# Archives, files handed between steps, what a folder of a run says ----------------------------------------------------


def _tar(*members: tuple[str, bytes | str | int]) -> Callable[[Scene], object]:
    """A tar of members by name: bytes are a file, a text is a link to it, a number is the type of a device."""

    def attempt(scene: Scene) -> object:
        archive = scene.folder / "x.tar"
        with tarfile.open(archive, "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                    continue
                info.type = tarfile.SYMTYPE if isinstance(content, str) else content.to_bytes(1, "big")
                info.linkname = content if isinstance(content, str) else ""
                tar.addfile(info)
        return extract(archive, scene.folder / "out")

    return attempt


HOLES = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 11}


def _pax(records: dict[str, str], kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> Callable[[Scene], object]:
    """A tar of one member, of which records say something else than its header."""

    def attempt(scene: Scene) -> object:
        info = tarfile.TarInfo("a")
        info.type, info.linkname, info.pax_headers, info.mode = (
            kind,
            "b" if kind != tarfile.REGTYPE else "",
            records,
            mode,
        )
        info.size = 1 if kind == tarfile.REGTYPE else 0
        with tarfile.open(scene.folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info, io.BytesIO(b"1"))
        return extract(scene.folder / "x.tar", scene.folder / "out")

    return attempt


def _plain_modes(mode: int) -> Callable[[Scene], object]:
    def attempt(scene: Scene) -> object:
        _pax({}, mode=mode)(scene)
        assert (scene.folder / "out" / "a").stat().st_mode & 0o7022 == 0
        return None

    return attempt


def _twice(make: Callable[[Scene], object], content: bytes) -> Callable[[Scene], object]:
    """An archive of which one file, `a`, has to have this content, as `tar` would have it."""

    def attempt(scene: Scene) -> object:
        make(scene)
        assert (scene.folder / "out" / "a").read_bytes() == content
        return None

    return attempt


def _renamed(place: int) -> Callable[[Scene], object]:
    """A zip in which a member has another name in its own header, or in the list at the end."""

    def attempt(scene: Scene) -> object:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("aaaaaaa", EVIL)
        parts = buffer.getvalue().split(b"aaaaaaa")
        names = [b"aaaaaaa", b"aaaaaaa"]
        names[place] = b"../evil"
        (scene.folder / "x.zip").write_bytes(parts[0] + names[0] + parts[1] + names[1] + parts[2])
        return extract(scene.folder / "x.zip", scene.folder / "out")

    return attempt


def _zip(name: str, mode: int = 0o100644, content: bytes = EVIL) -> Callable[[Scene], object]:
    def attempt(scene: Scene) -> object:
        info = zipfile.ZipInfo("x")
        info.filename, info.external_attr = name, mode << 16
        with zipfile.ZipFile(scene.folder / "x.zip", "w") as file:
            file.writestr(info, content)
        return extract(scene.folder / "x.zip", scene.folder / "out")

    return attempt


def _handed_on(change: Callable[[Path], object]) -> Callable[[Scene], object]:
    """The tar of a stage that somebody changes before the next one takes it."""

    def attempt(scene: Scene) -> object:
        (scene.folder / "made").mkdir()
        (scene.folder / "made" / "result").write_bytes(b"right")
        tar = scene.folder / "data-prep.tar"
        digest = pack(scene.folder / "made", tar)
        change(tar)
        stage = Stage("search", 1, lambda config, target: StageSettings(), lambda ctx: None)
        done = run_stage(
            stage,
            config=CONFIG,
            target="cpu-1t-fp32",
            inputs={"data-prep": tar},
            digests={"data-prep": digest},
            output=scene.folder / "out.tar",
            store=scene.folder / "store",
            run_id="r",
        )
        raise StageError(str(done.error))

    return attempt


def _with_status(tar: Path) -> None:
    """A failure that nobody had, in a tar that arrives in the place of a result."""
    folder = tar.parent / "failed"
    write_json(folder / "status.json", {"stage": "data-prep", "error": "EVIL", "run_id": "r", "kind": "StageError"})
    pack(folder, tar)


def _status(content: bytes) -> Callable[[Scene], object]:
    """A failure that somebody else has laid where a key's own would lie, before it is done."""

    def attempt(scene: Scene) -> object:
        _, folder = scene.finished(scene.folder / "store")
        (folder / "manifest.json").unlink()
        (folder / "outputs" / "status.json").write_bytes(content)
        return scene.again(scene.folder / "store")

    return attempt


def _onnx(location: str | None, where: str) -> Callable[[Scene], object]:
    """A network that keeps a tensor in another file."""

    def attempt(scene: Scene) -> object:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        if location is not None:
            tensor.external_data.add(key="location", value=location)
        value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
        fine = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [value], [tensor])
        constant = helper.make_node("Constant", [], ["y"], value=tensor)
        inner = helper.make_graph([constant], "g", [], [value])
        graphs = {
            "initializer": fine,
            "attribute": inner,
            "branch": helper.make_graph(
                [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
                "g",
                [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
                [value],
            ),
        }
        file = scene.folder / "model.onnx"
        file.write_bytes(helper.make_model(graphs[where]).SerializeToString())
        return read_onnx(file)

    return attempt


def _last_run(content: bytes) -> Callable[[Scene], object]:
    """What a work folder says of its last run."""

    def attempt(scene: Scene) -> object:
        (scene.folder / local.LAST_RUN).write_bytes(content)
        run_id = local._run_id(CONFIG, scene.folder)
        assert names.fault(run_id) is None and run_id != "EVIL"
        return None

    return attempt


LAST = {"config": CONFIG.digest, "store": "store", "finished": False, "host": []}

FILES = [
    Attack("tar: a file up", _tar(("../evil", EVIL)), "'..'"),
    Attack("tar: a file up below a folder", _tar(("a/b/../../../evil", EVIL)), "'..'"),
    Attack("tar: an absolute file", _tar(("/tmp/evil", EVIL)), "absolute"),
    Attack("tar: a drive", _tar(("C:\\evil", EVIL)), "absolute"),
    Attack("tar: backslashes up", _tar(("..\\evil", EVIL)), "'..'"),
    Attack("tar: two dots of one character", _tar(("‥/evil", EVIL)), "'..'"),
    Attack("tar: a link up, then a file through it", _tar(("a", ".."), ("a/evil", EVIL)), "link that leaves"),
    Attack("tar: a link to a link up", _tar(("a", "b/../.."), ("b", "..")), "link that leaves"),
    Attack("tar: an absolute link", _tar(("a", "/etc/passwd")), "link that leaves"),
    Attack("tar: a link into nothing", _tar(("a", "b")), "no file of the archive"),
    Attack("tar: a link to itself", _tar(("a", "a")), "no file of the archive"),
    Attack("tar: a block device", _tar(("a", tarfile.BLKTYPE[0])), "a device or a pipe"),
    Attack("tar: a character device", _tar(("a", tarfile.CHRTYPE[0])), "a device or a pipe"),
    Attack("tar: a pipe", _tar(("a", tarfile.FIFOTYPE[0])), "a device or a pipe"),
    Attack("tar: a file that is a folder, too", _tar(("a", EVIL), ("a/b", EVIL)), "both a file and a folder"),
    Attack("tar: a name of 300 bytes", _tar(("a" * 300, EVIL)), "too long"),
    Attack("tar: a link in the place of a folder", _tar(("x", EVIL), ("a/b", EVIL), ("a", "x")), "file and a folder"),
    Attack("tar: a file below a file through a link", _tar(("x", EVIL), ("x/b", "../x")), "both a file and a folder"),
    Attack("tar: a name in a record that leads up", _pax({"path": "../evil"}), "'..'"),
    Attack("tar: a NUL in a record", _pax({"path": "a\0b"}), "a NUL"),
    Attack("tar: a link in a record that leads up", _pax({"linkpath": "../../evil"}, tarfile.SYMTYPE), "leaves"),
    Attack("tar: a hard link in a record", _pax({"linkpath": "/etc/passwd"}, tarfile.LNKTYPE), "leaves"),
    Attack("tar: a file of holes", _pax({"GNU.sparse.size": "9" * 11, "GNU.sparse.map": "0,1"}), "bomb"),
    Attack("tar: a file of holes under another name", _pax({**HOLES, "GNU.sparse.name": "../evil"}), "damaged"),
    Attack("tar: a size of a petabyte", _pax({"size": "9" * 15}), "damaged"),
    Attack("tar: two members of a name", _twice(_tar(("a", b"right"), ("a", EVIL)), EVIL), "", False),
    Attack("tar: two names that differ in case", _twice(_tar(("A", EVIL), ("a", b"right")), b"right"), "", False),
    Attack("tar: a mode for everybody's rights", _plain_modes(0o6777), "", False),
    Attack("zip: a name inside that is another", _renamed(0), "damaged"),
    Attack("zip: a name outside that is another", _renamed(-1), "'..'"),
    Attack("zip: a file up", _zip("../../evil"), "'..'"),
    Attack("zip: a NUL", _zip("a\0b/../../evil"), "", False),
    Attack("zip: a link up", _zip("a", 0o120777, b"../../victim/precious"), "link that leaves"),
    Attack("zip: a socket", _zip("a", 0o140777), "a device"),
    Attack("handed on: other bytes", _handed_on(lambda tar: tar.write_bytes(EVIL * 40)), "arrived with SHA-256"),
    Attack(
        "handed on: cut off", _handed_on(lambda tar: tar.write_bytes(tar.read_bytes()[:512])), "arrived with SHA-256"
    ),
    Attack(
        "handed on: one byte more", _handed_on(lambda tar: tar.write_bytes(tar.read_bytes() + b"\0")), "arrived with"
    ),
    Attack("handed on: a failure that nobody had", _handed_on(_with_status), "arrived with SHA-256"),
    Attack("status: no JSON", _status(b"{"), "set aside", False),
    Attack("status: a list", _status(b"[]"), "set aside", False),
    Attack("status: without a run", _status(b'{"status": "failed"}'), "set aside", False),
    Attack("ONNX: weights of another user", _onnx("../../victim/precious", "initializer"), "in another file"),
    Attack("ONNX: an absolute file", _onnx("/etc/shadow", "initializer"), "in another file"),
    Attack("ONNX: a file beside", _onnx("weights.bin", "initializer"), "in another file"),
    Attack("ONNX: no file named", _onnx(None, "initializer"), "in another file (unnamed)"),
    Attack("ONNX: in a node's attribute", _onnx("../x", "attribute"), "in another file"),
    Attack("ONNX: in a branch", _onnx("../x", "branch"), "in another file"),
    Attack("last run: one that leads up", _last_run(json.dumps({**LAST, "run_id": "../../x"}).encode()), "'..'", False),
    Attack("last run: a number", _last_run(json.dumps({**LAST, "run_id": 7}).encode()), "not a name", False),
    Attack("last run: a list", _last_run(b"[]"), "set aside", False),
    Attack("last run: without a store", _last_run(b'{"run_id": "x"}'), "set aside", False),
]


@pytest.mark.parametrize("attack", FILES, ids=lambda attack: attack.name)
def test_a_maker_of_archives_and_files(
    attack: Attack, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(attack, scene, tmp_path, capsys)


# The spool ------------------------------------------------------------------------------------------------------------

SERVER = "http://127.0.0.1:9"  # where nothing answers


def _kept(scene: Scene) -> Path:
    """An honest entry that waits: the end of a run that was killed."""
    spool.keep_killed(scene.local, SERVER, "e", "r", 1, ConnectionError("away"))
    (folder,) = (path for path in (scene.folder / "store" / "spool").iterdir() if not path.name.startswith("."))
    return folder


def _entry(change: Callable[[dict[str, Any]], Any], file: bytes | None = None) -> Callable[[Scene], object]:
    """An entry of the spool that somebody has changed; then what waits is sent."""

    def attempt(scene: Scene) -> object:
        folder = _kept(scene)
        changed = change(read_json(folder / "entry.json"))
        content = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (folder / "entry.json").write_bytes(content)
        if file is not None:
            (folder / "files").mkdir()
            (folder / "files" / "x").write_bytes(file)
        for entry in spool.waiting(scene.local):
            spool._send(entry, SERVER)
        return None

    return attempt


def _branch(content: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda entry: {**entry, "kind": "branch", "content": content}


def _foreign_server(scene: Scene) -> None:
    """An entry in a bucket for the attacker's server, which would get this machine's credentials."""
    entry = {"kind": "killed", "what": "x", "tracking_uri": "http://evil.example", "why": "", "since": "", "files": {}}
    scene.put("spool/0000/entry.json", {**entry, "content": {"experiment": "e", "run_id": "r", "killed_at": 1}})
    done = spool.send_everywhere(scene.remote)
    assert not done.sent
    print(done.waiting[0].why)


def _foreign_database(scene: Scene) -> None:
    """The same for a database, which would be made wherever the attacker likes."""
    uri = f"sqlite:///{scene.folder.parents[1]}/victim/evil.db"
    entry = {"kind": "killed", "what": "x", "tracking_uri": uri, "why": "", "since": "", "files": {}}
    scene.put("spool/0000/entry.json", {**entry, "content": {"experiment": "e", "run_id": "r", "killed_at": 1}})
    print(spool.send_everywhere(scene.remote).waiting[0].why)


def _in_the_way(scene: Scene) -> None:
    """Something else under the name that an honest entry gets, so that it would not be kept."""
    folder = _kept(scene)
    (folder / "entry.json").write_text(json.dumps({**read_json(folder / "entry.json"), "content": {"evil": 1}}))
    assert _kept(scene) == folder
    assert read_json(folder / "entry.json")["content"]["run_id"] == "r"


SPOOL = [
    Attack("spool: a file up", _entry(lambda e: {**e, "files": {"../../x": DIGEST}}), "'..'", False),
    Attack("spool: an absolute file", _entry(lambda e: {**e, "files": {"/etc/passwd": DIGEST}}), "absolute", False),
    Attack("spool: a digest that is none", _entry(lambda e: {**e, "files": {"x": "0"}}), "no SHA-256", False),
    Attack("spool: no files", _entry(lambda e: {**e, "files": None}), "no list of files", False),
    Attack("spool: no entry", _entry(lambda e: [e]), "not an entry", False),
    Attack("spool: a kind of its own", _entry(lambda e: {**e, "kind": "os.system"}), "not an entry", False),
    Attack("spool: no JSON", _entry(lambda e: b"{"), "not JSON", False),
    Attack("spool: a file more", _entry(lambda e: e, EVIL), "does not belong"),
    Attack(
        "spool: a file with other bytes", _entry(lambda e: {**e, "files": {"x": DIGEST}}, EVIL), "missing or damaged"
    ),
    Attack("spool: a killed run without a name", _entry(lambda e: {**e, "content": {}}), "not of the form"),
    Attack("spool: a branch of nothing", _entry(_branch({})), "not of the form"),
    Attack(
        "spool: a branch with a field more", _entry(_branch({"deployable": {"limits": []}, "x": 1})), "not of the form"
    ),
    Attack("spool: a closing of nothing", _entry(lambda e: {**e, "kind": "closing", "content": {}}), "not of the form"),
    Attack("spool: for the attacker's server", _foreign_server, "is not called unless", False),
    Attack("spool: for a database elsewhere", _foreign_database, "is not called unless", False),
    Attack("spool: something in an entry's place", _in_the_way, "", False),
]


@pytest.mark.parametrize("attack", SPOOL, ids=lambda attack: attack.name)
def test_a_writer_of_the_spool(
    attack: Attack, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    hold(attack, scene, tmp_path, capsys)


# Signed evidence in a store -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with keys: ours, the attacker's, and shared secrets."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        signing.make_keys(folder / name)
    for name in ("secret", "another-secret"):
        signing.make_keys(folder / name, shared_secret=True)
    return {path.name: path for path in folder.iterdir()}


def _key(folder: Path) -> str:
    """The id of the key in a folder."""
    return next(folder.glob("*.pub")).stem


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch, made: dict[str, Path]) -> Callable[..., None]:
    """Sets the keys of this process: what it signs with, and whose signatures it trusts."""

    def use(private: str | None, trusted: str | None) -> None:
        for variable, path in (
            (signing.KEY_VARIABLE, private and made[private] / "signing.key"),
            (signing.TRUSTED_VARIABLE, trusted and made[trusted]),
        ):
            monkeypatch.delenv(variable, raising=False)
            if path:
                monkeypatch.setenv(variable, str(path))

    return use


def _forged(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A manifest of other bytes, whose hashes fit: what hashes alone let pass."""

    def forge(manifest: dict[str, Any]) -> dict[str, Any]:
        return change({**manifest, "outputs": {"result": EVIL_DIGEST}})

    return forge


def _sign_with(private: str, made: dict[str, Path], manifest: dict[str, Any]) -> dict[str, Any]:
    os.environ[signing.KEY_VARIABLE] = str(made[private] / "signing.key")
    unsigned = Manifest(**{**manifest, "signature": None})
    return asdict(unsigned.signed())


def _code(manifest: dict[str, Any]) -> str:
    return str(manifest["signature"]["signature"])


def _half(manifest: dict[str, Any]) -> str:
    return base64.b64encode(base64.b64decode(_code(manifest))[:32]).decode()


ALTERED: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("other bytes under an honest signature", lambda m: m, "altered"),
    ("no signature", lambda m: {**m, "signature": None}, "not signed"),
    ("no field for one", lambda m: {k: m[k] for k in m if k != "signature"}, "not signed"),
    ("an empty one", lambda m: {**m, "signature": {}}, "signature is none"),
    ("a text", lambda m: {**m, "signature": "yes"}, "signature is none"),
    ("no Base64", lambda m: {**m, "signature": {**m["signature"], "signature": "?"}}, "altered"),
    ("a number", lambda m: {**m, "signature": {**m["signature"], "signature": 1}}, "altered"),
    ("a key that is a list", lambda m: {**m, "signature": {**m["signature"], "key": ["x"]}}, "none of"),
    ("a key that nobody trusts", lambda m: {**m, "signature": {**m["signature"], "key": "0" * 16}}, "none of"),
    ("an algorithm of its own", lambda m: {**m, "signature": {**m["signature"], "algorithm": "none"}}, "altered"),
    ("settings alone", lambda m: {**m, "settings": {"x": 2}}, "altered"),
    ("inputs alone", lambda m: {**m, "inputs": {"data-prep": "0" * 64}}, "altered"),
    ("inputs in another place", lambda m: {**m, "inputs": {"x": m["inputs"]}}, "altered"),
    (
        "the signature of a part",
        lambda m: {**m, "signature": {"key": m["signature"]["key"], "signature": ""}},
        "altered",
    ),
    ("half a signature", lambda m: {**m, "signature": {**m["signature"], "signature": _half(m)}}, "altered"),
    (
        "a signature with spaces",
        lambda m: {**m, "signature": {**m["signature"], "signature": " " + _code(m)}},
        "altered",
    ),
    ("a number as a text", lambda m: {**m, "seed": "0"}, "altered"),
]


@pytest.mark.parametrize("where", ["folder", "bucket"])
@pytest.mark.parametrize(("what", "change", "told"), ALTERED, ids=[row[0] for row in ALTERED])
def test_a_cached_result_that_no_trusted_key_signed_is_computed_anew(
    what: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    told: str,
    where: str,
    scene: Scene,
    signed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    signed("ours", "ours")
    scene.folder.mkdir(parents=True)
    address = ADDRESS if where == "bucket" else scene.folder / "store"
    key, folder = scene.finished(address)
    assert scene.run(address, "cached") == b"right" and not scene.ran, "what is signed is used"
    forge = _forged(change)
    if where == "bucket":
        scene.put(f"search/{key}/objects/{EVIL_DIGEST}", EVIL)
        scene.put(f"search/{key}/manifest.json", forge(scene.get(f"search/{key}/manifest.json")))
        scene.another_machine()
    else:
        (folder / "outputs" / "result").write_bytes(EVIL)
        (folder / "manifest.json").write_text(json.dumps(forge(read_json(folder / "manifest.json"))))
    scene.again(address)
    assert told in "".join(capsys.readouterr())
    scene.ran.clear()
    scene.another_machine()
    assert scene.run(address, "cached again") == b"right" and not scene.ran, "the new one is signed, and is used"


FORGERS = [("theirs", "ours"), ("another-secret", "secret"), ("theirs", "secret"), ("secret", "ours")]
"""Whose key is used, and whose is trusted."""


@pytest.mark.parametrize(("forger", "trusted"), FORGERS)
def test_a_signature_with_another_key_does_not_count(
    forger: str, trusted: str, scene: Scene, signed: Callable[..., None], made: dict[str, Path]
) -> None:
    signed(trusted, trusted)
    scene.folder.mkdir(parents=True)
    key, folder = scene.finished(scene.folder / "store")
    honest = read_json(folder / "manifest.json")
    forged = _sign_with(forger, made, _forged(lambda m: m)(honest))
    claimed = {**forged, "signature": {**forged["signature"], "key": honest["signature"]["key"]}}
    signed(trusted, trusted)
    for manifest in (forged, claimed):
        scene.ran.clear()
        (folder / "outputs" / "result").write_bytes(EVIL)
        write_json(folder / "manifest.json", manifest)
        with pytest.raises(StageError, match="its manifest cannot be used"):
            scene.local.result("search", key)
        scene.again(scene.folder / "store")


def test_a_public_key_that_is_used_as_a_secret_signs_nothing(
    scene: Scene, signed: Callable[..., None], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The old trick of algorithms that a message chooses: an HMAC with the public key, which everybody has."""
    signed("ours", "ours")
    scene.folder.mkdir(parents=True)
    key, folder = scene.finished(scene.folder / "store")
    honest = read_json(folder / "manifest.json")
    public = next(made["ours"].glob("*.pub")).read_bytes()
    forged = _forged(lambda m: {**m, "signature": None})(honest)
    message = signing._message("manifest", {k: forged[k] for k in forged if k != "signature"})
    for secret in (public, public.split(b"\n")[1], b""):
        code = base64.b64encode(hmac.digest(secret or b"\0", message, "sha256")).decode()
        write_json(folder / "manifest.json", {**forged, "signature": {"key": _key(made["ours"]), "signature": code}})
        with pytest.raises(StageError, match="its manifest cannot be used"):
            scene.local.result("search", key)


def test_a_checkpoint_of_the_buckets_writer_is_not_gone_on_from(scene: Scene, signed: Callable[..., None]) -> None:
    signed("ours", "ours")
    scene.folder.mkdir(parents=True)
    _checkpoint({"files": {"checkpoint": EVIL_DIGEST}}, {EVIL_DIGEST: EVIL})(scene)
    signed(None, None)  # where nobody asks for signatures, hashes are all there is
    with pytest.raises(AssertionError):
        _checkpoint({"files": {"checkpoint": EVIL_DIGEST}}, {EVIL_DIGEST: EVIL})(scene)


def test_a_signature_says_nothing_of_another_place(scene: Scene, signed: Callable[..., None]) -> None:
    """A list of one key's checkpoints, honestly signed, in the place of another's; and a kind for another kind."""
    signed("ours", "ours")
    keys = signing.keys()
    statement = ["search", "k", "partial.json", {}]
    signature = keys.sign("list", statement)
    assert keys.fault("list", statement, signature) is None
    assert keys.fault("list", ["search", "other", "partial.json", {}], signature)
    assert keys.fault("list", ["search", "k", "failed.json", {}], signature)
    assert keys.fault("manifest", statement, signature)


@pytest.mark.parametrize("store", ["folder", "bucket"])
def test_records_of_a_run_that_were_altered_are_refused(store: str, scene: Scene, signed: Callable[..., None]) -> None:
    """A record names the tracking server, which gets this machine's credentials."""
    signed("ours", "ours")
    opened = scene.local if store == "folder" else scene.remote
    opened.record("r", "run.json", {"tracking_uri": "http://ours"})
    opened.record("another", "run.json", {"tracking_uri": "http://ours"})
    assert read_json(opened.run_folder("r") / "run.json")["tracking_uri"] == "http://ours"

    def write(run: str, name: str, content: Any) -> None:
        if store == "bucket":
            scene.put(f"runs/{run}/{name}", content)
        else:
            (opened.root / "runs" / run / name).write_text(json.dumps(content))

    honest = read_json(opened.root / "runs" / "r" / "run.json")
    for name, content in (
        ("run.json", {**honest, "tracking_uri": "http://evil"}),
        ("run.json", {"tracking_uri": "http://evil"}),
        ("another.json", honest),
        ("run.json", []),
    ):
        write("r", name, content)
        with pytest.raises(StageError, match="the run is not gone on with"):
            opened.run_folder("r")
        write("r", name, honest)
    write("another", "run.json", honest)
    with pytest.raises(StageError, match="the run is not gone on with"):
        opened.run_folder("another")


def test_an_entry_of_the_spool_that_nobody_signed_is_not_sent(scene: Scene, signed: Callable[..., None]) -> None:
    scene.folder.mkdir(parents=True)
    _kept(scene)
    signed("ours", "ours")
    (entry,) = spool.waiting(scene.local)
    with pytest.raises(StageError, match="it is not signed"):
        spool._send(entry, SERVER)
    _kept(scene)  # the honest run keeps the same again, signed
    (entry,) = spool.waiting(scene.local)
    kept = read_json(entry.folder / "entry.json")
    assert signing.keys().fault("spool", spool._statement(kept), kept["signature"]) is None


# Keys -----------------------------------------------------------------------------------------------------------------


def test_one_key_takes_the_place_of_another(
    scene: Scene, signed: Callable[..., None], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers trust both, then makers sign with the new one, then readers trust the new one alone."""
    scene.folder.mkdir(parents=True)
    store = scene.folder / "store"
    signed("ours", "ours")
    scene.finished(store)
    both = scene.folder / "trusted"
    both.mkdir()
    for name in ("ours", "theirs"):
        public = next(made[name].glob("*.pub"))
        (both / public.name).write_bytes(public.read_bytes())
    signed("theirs", "theirs")
    monkeypatch.setenv(signing.TRUSTED_VARIABLE, str(both))
    assert scene.run(store, "both") == b"right" and not scene.ran
    (both / f"{_key(made['ours'])}.pub").unlink()
    scene.again(store)  # the old key is worth nothing: computed, and signed with the new one
    signed(None, "theirs")
    key = read_json(Store(store).run_folder("again") / "cpu-1t-fp32.search.json")["key"]
    assert Store(store).result("search", key).manifest is not None


def test_who_only_reads_has_no_key_to_sign_with(scene: Scene, signed: Callable[..., None]) -> None:
    """Someone who trusts keys and has none would compute what nobody takes: that is told before."""
    signed(None, "ours")
    scene.folder.mkdir(parents=True)
    stage = Stage("data-prep", 1, lambda config, target: StageSettings(), lambda ctx: None)
    with pytest.raises(InputError, match="there is no key to sign with"):
        run_stage(
            stage,
            config=CONFIG,
            target=None,
            inputs={},
            output=scene.folder / "out.tar",
            store=scene.folder / "store",
            run_id="r",
        )


def test_a_run_configuration_cannot_take_a_machines_keys_away(
    signed: Callable[..., None], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    signed(None, "ours")
    signing.adopt(str(made["theirs"] / "signing.key"), str(made["theirs"]))
    assert list(signing.keys().trusted) == [_key(made["ours"])] and signing.keys().signing is None
    signed(None, None)
    monkeypatch.setenv(signing.KEY_VARIABLE, "")  # so that what follows is undone
    monkeypatch.delenv(signing.KEY_VARIABLE)
    monkeypatch.setenv(signing.TRUSTED_VARIABLE, "")
    monkeypatch.delenv(signing.TRUSTED_VARIABLE)
    signing.adopt(str(made["ours"] / "signing.key"), None)
    assert list(signing.keys().trusted) == [_key(made["ours"])]


def test_all_processes_of_a_run_get_the_keys_of_its_configuration(
    signed: Callable[..., None], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"key": str(made["ours"] / "signing.key"), "trusted": str(made["ours"])}
    config = RunConfig.parse({**CONFIG.model_dump(mode="json"), "signing": named}, "c")
    signed(None, None)
    assert local.keys_of(CONFIG) == {}
    assert local.keys_of(config) == {signing.KEY_VARIABLE: named["key"], signing.TRUSTED_VARIABLE: named["trusted"]}
    assert "PRIVATE" not in config.to_json()
    signed(None, "theirs")
    assert local.keys_of(config) == {}, "a configuration does not take a machine's keys away"


def test_the_commands_of_keys(attacked: Registry, signed: Callable[..., None], tmp_path: Path) -> None:
    def run(*asked: str) -> Any:
        return CliRunner().invoke(cli.app, ["models", *asked])

    assert run("make-key", str(tmp_path / "new")).exit_code == 0
    assert sorted(file.suffix for file in (tmp_path / "new").iterdir()) == [".key", ".pub"]
    assert run("make-key", str(tmp_path / "new")).exit_code == 2
    signed(None, "theirs")
    for refused in (
        run("pull", attacked.model, str(tmp_path / "pulled"), "--tracking", attacked.uri),
        run("promote", attacked.model, "--tracking", attacked.uri),
    ):
        assert refused.exit_code == 1 and "is refused" in refused.output, refused.output
    assert "NOT TRUSTED" in run("show", attacked.model, "--tracking", attacked.uri).output
    signed("theirs", "theirs")
    assert run("sign", attacked.model, "--tracking", attacked.uri).exit_code == 0
    assert run("pull", attacked.model, str(tmp_path / "pulled"), "--tracking", attacked.uri).exit_code == 0


NO_KEYS: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "holds no key"),
    ("no PEM", b"\x00\xff", "holds no key"),
    ("a short secret", b"hmac-sha256:00", "64 hexadecimal digits"),
    ("a secret with no digits", b"hmac-sha256:" + b"g" * 64, "64 hexadecimal digits"),
]


@pytest.mark.parametrize(("what", "content", "told"), NO_KEYS, ids=[row[0] for row in NO_KEYS])
def test_a_file_that_holds_no_key_is_told(
    what: str, content: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    for variable in (signing.KEY_VARIABLE, signing.TRUSTED_VARIABLE):
        monkeypatch.delenv(signing.KEY_VARIABLE, raising=False)
        monkeypatch.delenv(signing.TRUSTED_VARIABLE, raising=False)
        monkeypatch.setenv(variable, str(file))
        with pytest.raises(InputError, match=told) as caught:
            signing.keys()
        assert "\n" not in str(caught.value)


def test_keys_of_other_kinds_and_none_at_all_are_told(
    tmp_path: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    monkeypatch.delenv(signing.KEY_VARIABLE, raising=False)
    other = ec.generate_private_key(ec.SECP256R1())
    public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "p256.pub").write_bytes(public)
    monkeypatch.setenv(signing.TRUSTED_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match="holds no key of Ed25519"):
        signing.keys()
    (tmp_path / "p256.pub").unlink()
    with pytest.raises(InputError, match="has no public key"):
        signing.keys()
    monkeypatch.setenv(signing.TRUSTED_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(InputError, match="cannot be read"):
        signing.keys()
    assert (made["ours"] / "signing.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="is there already"):
        signing.make_keys(made["ours"])


# The registry ---------------------------------------------------------------------------------------------------------


@dataclass
class Registry:
    """An MLflow on SQLite with one version that is signed with our key, and its writer's way to everything in it."""

    uri: str
    folder: Path
    model: str = "attacked"

    @property
    def client(self) -> Any:
        return tracking.connect(self.uri)

    @property
    def files(self) -> Path:
        """Where the version's files lie."""
        return Path(query.find(self.uri, f"{self.model}/1").artifacts.removeprefix("file://"))

    def tag(self, name: str, value: str) -> None:
        self.client.set_model_version_tag(self.model, "1", name, value)

    def untag(self, name: str) -> None:
        self.client.delete_model_version_tag(self.model, "1", name)

    def metric(self, name: str, value: float) -> None:
        model_id = query.find(self.uri, f"{self.model}/1").tags["model_id"]
        from mlflow.entities import Metric

        run = query.find(self.uri, f"{self.model}/1").run_id
        self.client.log_batch(run, metrics=[Metric(name, value, 2**41, 1, model_id=model_id)])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Path]) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(signing.KEY_VARIABLE, str(made["ours"] / "signing.key"))
        patch.setenv(signing.TRUSTED_VARIABLE, str(made["ours"]))
        registry = Registry(tracking.resolve_uri(None, folder / "store"), folder)
        Branch(registry.uri, registry.model, folder / "branch").register(scores=made_up_scores(0.5))
    yield registry


def _hashes_fit(registry: Registry) -> None:
    """What hashes alone let pass: other bytes, and every tag that speaks of them set anew."""
    version = query.find(registry.uri, f"{registry.model}/1")
    (registry.files / "best.pt").write_bytes(EVIL)
    files = {**version.files, "best.pt": EVIL_DIGEST}
    registry.tag("sha256.best.pt", EVIL_DIGEST)
    registry.tag("content", register.content_digest(files, version.tag("hardware_id"), version.limits))


def _more_files(registry: Registry) -> None:
    """The same for a file more, under a name that leads up."""
    version = query.find(registry.uri, f"{registry.model}/1")
    files = {**version.files, "../../../evil": EVIL_DIGEST}
    content = register.content_digest(dict(sorted(files.items())), version.tag("hardware_id"), version.limits)
    registry.tag("content", content)
    with closing(sqlite3.connect(registry.folder / "mlflow" / "mlflow.db")) as database, database:  # MLflow refuses it
        database.execute(
            "INSERT INTO model_version_tags (workspace, name, version, key, value) VALUES ('default', ?, 1, ?, ?)",
            (registry.model, "sha256.../../../evil", EVIL_DIGEST),
        )


REGISTRY: list[tuple[str, Callable[[Registry], object], str, bool]] = [
    ("a file with other bytes", lambda r: (r.files / "best.pt").write_bytes(EVIL), "has SHA-256", False),
    ("a file that is cut off", lambda r: (r.files / "model.onnx").write_bytes(b""), "has SHA-256", False),
    ("other bytes, all hashes set anew", _hashes_fit, "altered", True),
    ("one hash alone", lambda r: r.tag("sha256.best.pt", EVIL_DIGEST), "somebody changed them", False),
    ("a hash that is none", lambda r: r.tag("sha256.best.pt", "../../x"), "changed them", False),
    ("a file more that leads up", _more_files, "'..' in its path", False),
    ("a signed version's file more", _more_files, "altered", True),
    ("the device", lambda r: r.tag("hardware_id", "another"), "somebody changed them", False),
    ("the limits", lambda r: r.tag("limits", "[]"), "somebody changed them", False),
    ("limits that are no JSON", lambda r: r.tag("limits", "{"), "not JSON", False),
    ("the dataset", lambda r: r.tag("dataset", "0" * 64), "altered", True),
    ("the supernet to retrain from", lambda r: r.tag("supernet", "0" * 64), "altered", True),
    ("what runs on the device", lambda r: r.tag("file", "best.pt"), "altered", True),
    ("the purpose", lambda r: r.tag("purpose", "x"), "altered", True),
    ("the accuracy", lambda r: r.metric("map50_95", 0.99), "altered", True),
    ("a signed tag that is gone", lambda r: r.untag("runtime"), "which is not there", True),
    ("the signature gone", lambda r: r.untag("signature"), "not signed", True),
    ("a signature that is none", lambda r: r.tag("signature", "yes"), "signature is none", True),
    ("a signature that covers nothing", lambda r: r.tag("signature", _covering(r, {})), "which is not there", True),
    (
        "a signature that covers less",
        lambda r: r.tag("signature", _covering(r, {"tags": [], "params": [], "metrics": []})),
        "altered",
        True,
    ),
]
"""What is tried, how, what is told, and whether a signature is what tells it."""


def _covering(registry: Registry, covers: Any) -> str:
    signature = json.loads(query.find(registry.uri, f"{registry.model}/1").tags["signature"])
    return json.dumps({**signature, "covers": covers})


@pytest.fixture
def attacked(registry: Registry, tmp_path: Path) -> Iterator[Registry]:
    """The registry, which is as it was afterwards."""
    folder, before = registry.folder / "mlflow", tmp_path / "before"
    shutil.copytree(folder / "artifacts", before / "artifacts")

    def copy(source: Path, target: Path) -> None:  # by SQLite itself, as MLflow has the file open
        with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as write:
            read.backup(write)

    copy(folder / "mlflow.db", before / "mlflow.db")
    yield registry
    copy(before / "mlflow.db", folder / "mlflow.db")
    shutil.rmtree(folder / "artifacts")
    shutil.copytree(before / "artifacts", folder / "artifacts")


@pytest.mark.parametrize(("what", "attack", "told", "by_signature"), REGISTRY, ids=[row[0] for row in REGISTRY])
def test_a_writer_of_the_registry(
    what: str,
    attack: Callable[[Registry], object],
    told: str,
    by_signature: bool,
    attacked: Registry,
    signed: Callable[..., None],
    tmp_path: Path,
) -> None:
    signed(None, "ours" if by_signature else None)
    reference = f"{attacked.model}/1"
    attack(attacked)
    for refuse in (
        lambda: pull.pull(attacked.uri, reference, tmp_path / "pulled"),
        lambda: promote.copy(attacked.uri, reference, tracking.resolve_uri(None, tmp_path / "there" / "store")),
        lambda: promote.promote(attacked.uri, reference) if by_signature else pull.pull(attacked.uri, reference),
    ):
        with pytest.raises((StageError, InputError), match=told) as caught:
            refuse()
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "pulled").exists() and not list(tmp_path.rglob("evil"))


def test_a_signature_of_another_version_is_worth_nothing(
    attacked: Registry, signed: Callable[..., None], tmp_path: Path
) -> None:
    """Tags, files, figures and signature of an honest version, laid under another name: each is what was signed."""
    signed(None, "ours")
    honest, client = query.find(attacked.uri, f"{attacked.model}/1"), attacked.client
    client.create_registered_model("another")
    client.create_model_version("another", honest.artifacts, tags=dict(honest.tags), model_id=honest.tags["model_id"])
    copied = query.find(attacked.uri, "another/1")
    assert (copied.files, copied.metrics, copied.tags["signature"]) == (
        honest.files, honest.metrics, honest.tags["signature"],
    )  # fmt: skip
    with pytest.raises(StageError, match="altered, or is another's"):
        pull.pull(attacked.uri, "another/1", tmp_path / "pulled")
    with pytest.raises(StageError, match="altered, or is another's"):
        promote.promote(attacked.uri, "another/1")


@pytest.mark.parametrize("described", [None, "[]", "{}", "x", '{"convs": {}, "blocks": []}', "9" * 30])
def test_an_architecture_that_is_none_is_told(described: str | None, registry: Registry) -> None:
    version = query.find(registry.uri, registry.model)
    params = {key: value for key, value in version.params.items() if key != "architecture"}
    altered = replace(version, params={**params, **({"architecture": described} if described else {})})
    with pytest.raises(InputError, match="its parameter architecture is none"):
        list(compare._architecture(version, altered))


def test_limits_in_another_order_are_others(attacked: Registry, signed: Callable[..., None], tmp_path: Path) -> None:
    signed(None, "ours")
    limits = json.loads(query.find(attacked.uri, f"{attacked.model}/1").tags["limits"])
    attacked.tag("limits", json.dumps([dict(reversed(limit.items())) for limit in reversed(limits)]))
    with pytest.raises(StageError, match="altered"):
        pull.pull(attacked.uri, attacked.model, tmp_path / "pulled")


def test_who_holds_the_public_key_takes_what_is_signed(
    registry: Registry, signed: Callable[..., None], tmp_path: Path
) -> None:
    signed(None, "ours")
    version, folder = pull.pull(registry.uri, registry.model, tmp_path / "pulled")
    assert version.seal_fault() is None and (folder / "model.onnx").is_file()
    assert promote.promote(registry.uri, registry.model)["promoted"]
    there = tracking.resolve_uri(None, tmp_path / "there" / "store")
    tracking.connect(there)
    promote.copy(registry.uri, registry.model, there)  # the signature goes along, without the private key
    assert query.find(there, registry.model).trusted().files == version.files
    signed(None, "theirs")
    with pytest.raises(StageError, match="none of"):
        pull.pull(there, registry.model, tmp_path / "again")


def test_tags_that_nobody_signed_are_not_seen(attacked: Registry, signed: Callable[..., None]) -> None:
    signed(None, "ours")
    attacked.tag("supernet_other", "0" * 64)
    attacked.tag("sha256.evil", EVIL_DIGEST)
    version = query.find(attacked.uri, attacked.model)
    assert "evil" in version.files
    assert "evil" not in version.trusted().files and "supernet_other" not in version.trusted().tags


def test_a_version_from_before_there_was_a_key_is_signed_by_who_may(
    attacked: Registry, signed: Callable[..., None], tmp_path: Path
) -> None:
    """And so does a new key take the place of another."""
    signed(None, "theirs")
    with pytest.raises(InputError, match="no key to sign with"):
        promote.sign(attacked.uri, attacked.model)
    signed("theirs", "theirs")
    with pytest.raises(StageError, match="none of"):
        pull.pull(attacked.uri, attacked.model, tmp_path / "pulled")
    version, key = promote.sign(attacked.uri, attacked.model)
    assert key != _key_of_ours(signed)
    signed(None, "theirs")
    assert pull.pull(attacked.uri, attacked.model, tmp_path / "pulled")[0].files == version.files


def _key_of_ours(signed: Callable[..., None]) -> str:
    signed("ours", "ours")
    key = signing.keys().signing
    assert key is not None
    return key.id


def test_nobody_signs_what_somebody_else_has_registered_before(
    attacked: Registry, signed: Callable[..., None], tmp_path: Path
) -> None:
    """A version of the same content, laid there by the registry's writer with tags of their own."""
    signed("ours", "ours")
    attacked.untag("signature")
    attacked.tag("dataset", "0" * 64)
    with pytest.raises(StageError, match=r"has the same files, .* not signed"):
        Branch(attacked.uri, attacked.model, tmp_path / "branch").register()


def test_a_champion_that_nobody_signed_does_not_decide(
    attacked: Registry, signed: Callable[..., None], tmp_path: Path
) -> None:
    signed("ours", "ours")
    attacked.metric("map50_95", 0.999)
    entry = Branch(attacked.uri, attacked.model, tmp_path / "branch").register(map50_95=0.5)
    assert entry["role"] == "challenger" and "is not to be compared with" in entry["reason"]


def test_a_retraining_starts_from_what_is_signed_alone(
    attacked: Registry, signed: Callable[..., None], tmp_path: Path
) -> None:
    signed("ours", "ours")
    config = RunConfig.parse({**FABRICATED.model_dump(mode="json"), "name": attacked.model, "retrain": {}}, "c")
    origin = retraining.check(config, attacked.uri, ("scratch", "dent"))
    store = Store(tmp_path / "store")
    artifacts = Path(attacked.client.get_run(origin.run).info.artifact_uri.removeprefix("file://")) / "supernet"
    details = (artifacts / "supernet.json").read_text()
    (artifacts / "supernet.json").write_text(details.replace("tiny", "evil"))
    with pytest.raises(StageError, match=r"supernet\.json has SHA-256"):
        retraining.check(config, attacked.uri, ())
    with pytest.raises(StageError, match=r"supernet\.json has SHA-256"):
        retraining._keep(store, origin, attacked.uri)
    (artifacts / "supernet.json").write_text(details)
    (artifacts / "supernet.safetensors").write_bytes(EVIL)
    with pytest.raises(StageError, match=r"supernet\.safetensors has SHA-256"):
        retraining._keep(store, origin, attacked.uri)
    assert not store.entry("supernets", origin.sha256).outputs.exists()
    attacked.tag("supernet", EVIL_DIGEST)
    with pytest.raises(StageError, match="altered"):
        retraining.check(config, attacked.uri, ())


def test_tags_of_the_registry_that_are_none_of_ours_are_told(attacked: Registry) -> None:
    attacked.client.set_registered_model_tag(attacked.model, "champion-change.0", "{")
    with pytest.raises(InputError, match="no record of a change of champion"):
        champions.history(attacked.client, attacked.model)
    attacked.client.delete_registered_model_tag(attacked.model, "champion-change.0")
    attacked.untag("model_id")
    assert query.list_models(attacked.uri) == []


def test_security_md_tells_how_many_attacks_there_are() -> None:
    tables = (NAMES, DIGESTS, STORE, FILES, SPOOL, ALTERED, ALTERED, FORGERS, NO_KEYS, REGISTRY)  # in folder and bucket
    rows = sum(map(len, tables))
    lines = (Path(__file__).parents[1] / "SECURITY.md").read_text().splitlines()
    (line,) = (line for line in lines if f"`tests/{Path(__file__).name}`" in line)
    assert line.endswith(f"| {rows} | {rows} |"), rows
