"""Attacks by whoever may write to a bucket, a store's folder, a registry or an archive: a table, and what must hold.

Each row is an attack of its own kind. Nothing may come to lie outside of the folder that is meant, nothing that was
altered may be used, and whoever is attacked is told in one line; a traceback is a row that does not hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from memory_bucket import MemoryBucket

from yolov8_nas import names, remote_store, s3
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.registry import spool
from yolov8_nas.stages.stage import Stage, StageContext, open_store, run_stage
from yolov8_nas.store import ArchiveError, Store, read_json, write_json

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

        stage = Stage("search", 1, lambda config, target: {"x": 1}, work)
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
