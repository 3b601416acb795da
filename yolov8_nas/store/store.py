"""The stage store: finished results under the digest of everything that made them.

    STORE/<stage>/<key>/manifest.json   written last and atomically: a key that has one is done
                        outputs/        what the stage wrote
                        partial/        checkpoints of a stage that is not done; found again by the next try
                        scratch/        unpacked inputs and the like, only while the stage runs
                        lock            held (flock) by whoever works on the key
    STORE/runs/<run>/                   what each run did, a small file per stage and target

What travels between stages is one plain deterministic tar: the same files give the same bytes and so the same digest.
This module knows nothing of detectors.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from yolov8_nas import names, signing
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import (
    file_sha256,
    read_json,
    set_aside,
    tell,
    tree_files,
    write_json,
)

SIGNATURE: Final = "signature"
"""Key of a record's signature, beside its content."""


@dataclass(frozen=True)
class Manifest:
    """What made a finished result, and the digests that prove it whole.

    Attributes:
        stage: Name of the stage.
        version: Version of the stage's code.
        key: Key in the store: digest of stage, version, settings and inputs.
        settings: Settings that went into the key.
        inputs: Digest of each input.
        outputs: SHA-256 of each output file.
        digest: SHA-256 of the outputs as a tar.
        tools: Versions of what computed it.
        seed: Seed of everything random in it.
        seconds: How long the try that finished it took.
        peak_rss_mib: Peak resident memory of the process, in MiB.
        peak_rss_child_mib: Peak resident memory of its largest child process, in MiB.
        signature: Of everything else in it, where whoever made the result had a key (`signing`).
    """

    stage: str
    version: int
    key: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    digest: str
    seconds: float
    tools: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    peak_rss_mib: float = 0.0
    peak_rss_child_mib: float = 0.0
    signature: Mapping[str, str] | None = None

    def signed(self) -> Manifest:
        """The manifest with a signature, where this process has a key to sign with."""
        if self.signature is not None:  # another machine's, which was faster
            return self
        return replace(self, signature=signing.keys().sign(_KIND, self._statement()))

    def _statement(self) -> dict[str, Any]:
        content = asdict(self)
        del content["signature"]
        return content

    @classmethod
    def parse(cls, content: Any, stage: str, key: str, source: str) -> Manifest:
        """A manifest that was read, checked: whoever may write to the store may have written it.

        Args:
            content: Plain data.
            stage: The stage whose result it should be of; a manifest of another place vouches for nothing here.
            key: The key, likewise.
            source: Where it was read, for the message.

        Raises:
            InputError: It is of another form or of another result, a name or a digest in it is refused, or it is not
                signed with a trusted key where signatures are asked for.
        """
        if not isinstance(content, Mapping):
            raise InputError(f"{source}: not a manifest")
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        if other := sorted(set(content) - set(known)):
            raise InputError(f"{source}: not a manifest of this release ({names.shown(other[0])} in it)")
        for name, kind in _MANIFEST_FORM.items():
            if not isinstance(known.get(name), kind) or isinstance(known[name], bool):
                raise InputError(f"{source}: not a manifest ({name} is missing or of another form)")
        if (known["stage"], known["key"]) != (stage, key):
            raise InputError(f"{source}: the manifest of another result, {names.shown(known['key'])}")
        names.files(known["outputs"], source)
        manifest = cls(**known)
        if why := signing.keys().fault(_KIND, manifest._statement(), manifest.signature):
            raise InputError(f"{source}: {why}")
        return manifest


_KIND: Final = "manifest"
_MANIFEST_FORM: Final[dict[str, Any]] = {
    "stage": str,
    "version": int,
    "key": str,
    "settings": dict,
    "inputs": dict,
    "outputs": dict,
    "digest": str,
    "seconds": int | float,
}


class Entry:
    """The folder of one key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = folder / "outputs"
        self.partial = folder / "partial"
        self.scratch = folder / "scratch"
        self.manifest_file = folder / "manifest.json"
        self._told_so_far: set[str] = set()

    @contextlib.contextmanager
    def lock(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the key alone; `waiting` is called once when somebody else holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.folder.parent.name

    @property
    def key(self) -> str:
        """The key."""
        return self.folder.name

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, or nothing where the key is not done (or its manifest cannot be used, which is told)."""
        try:
            return self._read(self.manifest_file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self._tell(f"{error}; the result does not count")
            return None

    def _read(self, file: Path) -> Manifest:
        """A manifest that is on this machine.

        Raises:
            ValueError: It cannot be used.
            FileNotFoundError: There is none.
        """
        return Manifest.parse(read_json(file), self.stage, self.key, str(file))

    def _tell(self, message: str) -> None:
        """Print something once."""
        if message not in self._told_so_far:
            self._told_so_far.add(message)
            tell(message)

    def damage(self, manifest: Manifest, only: Sequence[str] = ()) -> str | None:
        """What is wrong with the outputs of a finished key, or nothing.

        Args:
            manifest: What they should be.
            only: Names of the files that are wanted, where not all are.
        """
        for path in self.outputs.rglob("*"):
            if path.is_symlink():
                return f"{path.relative_to(self.outputs)} is a link, which no result has"
            if not path.is_dir() and not path.is_file():
                return f"{path.relative_to(self.outputs)} is no plain file, as all of a result are"
        files = tree_files(self.outputs)
        for name, digest in manifest.outputs.items():
            if only and name not in only:
                continue
            if name not in files:
                return f"{name} is missing"
            if file_sha256(files[name]) != digest:
                return f"{name} has changed since it was written"
        extra = files.keys() - manifest.outputs.keys()
        return f"{min(extra)} does not belong to it" if extra else None

    def require_whole(self, only: Sequence[str] = ()) -> None:
        """See that what a finished key holds is what its manifest says. One that is not done has nothing to be held to.

        Args:
            only: Names of the files that are wanted, where not all are.

        Raises:
            StageError: It is not, or the manifest cannot be used.
        """
        manifest = self.manifest
        if manifest is not None:
            fault = self.damage(manifest, only)
        else:
            fault = "its manifest cannot be used" if self.manifest_file.exists() else None
        if fault:
            raise StageError(
                f"{self.folder}: {fault}, so it is not used; run the same again, which computes it anew, or restore "
                "the store"
            )

    def clear(self, *, partial: bool) -> None:
        """Remove what a try left behind; `partial` says whether its checkpoints go too."""
        self.manifest_file.unlink(missing_ok=True)
        for folder in (self.outputs, self.scratch, *((self.partial,) if partial else ())):
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, manifest: Manifest) -> Manifest:
        """Declare the key done: the manifest goes last, then what only an unfinished key needs is removed.

        Returns:
            The manifest that stands: where a store is shared with other machines, one of them may have been faster.
        """
        manifest = manifest.signed()
        write_json(self.manifest_file, asdict(manifest))
        shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return manifest

    def fail(self, *, partial: bool) -> None:
        """End a try that failed: what it had written stays as evidence; `partial` says whether its checkpoints go."""
        for folder in (self.scratch, *((self.partial,) if partial else ())):
            shutil.rmtree(folder, ignore_errors=True)


class Store:
    """A stage store in a folder.

    Attributes:
        root: The folder.
        address: What people call the store.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.address = str(self.root)

    def check(self, *, writing: bool = False) -> None:
        """Look whether the store can be reached and, if asked, written; a folder is made when it is needed."""

    def entry(self, stage: str, key: str) -> Entry:
        """The folder of a key, which need not exist."""
        return Entry(self.place(stage, key))

    def place(self, stage: str, key: str) -> Path:
        """The folder of a key on this machine.

        Raises:
            InputError: The names come from a record that somebody else wrote, and would lead out of the store.
        """
        return self.root / names.part(stage, "a stage") / names.part(key, "a key")

    def result(self, stage: str, key: str, only: Sequence[str] = ()) -> Entry:
        """The entry of a key that a run has worked on, to read what it came to; of a finished one, checked.

        Args:
            stage: Name of the stage.
            key: The key.
            only: Names of the files that are wanted, where not all are.

        Raises:
            StageError: The result is not what its manifest says.
        """
        entry = self.entry(stage, key)
        entry.require_whole(only)
        return entry

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a key as it is in the store; nothing where the key is not done, or it cannot be used."""
        return self.entry(stage, key).manifest

    def runs(self) -> list[str]:
        """Names of the runs that have records, the one with the newest first."""
        folders = [path for path in (self.root / "runs").glob("*") if path.is_dir()]
        return [path.name for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)]

    def run_folder(self, run_id: str) -> Path:
        """The folder of a run's records, to read them.

        Raises:
            StageError: One of them is not signed with a trusted key, where signatures are asked for.
        """
        folder = self._records(run_id)
        if known := signing.keys():
            for file in sorted(folder.glob("*.json")):
                self._require_signed(known, run_id, file)
        return folder

    def _records(self, run_id: str) -> Path:
        """The folder of a run's records on this machine."""
        return self.root / "runs" / names.part(run_id, "a run")

    def _require_signed(self, known: signing.Keys, run_id: str, file: Path) -> None:
        try:
            content = read_json(file)
        except ValueError as error:
            raise StageError(f"{error}; remove the record, or restore the store") from None
        signature = content.pop(SIGNATURE, None) if isinstance(content, dict) else None
        if why := known.fault("record", [run_id, file.name, content], signature):
            raise StageError(f"{file}: {why}; the run is not gone on with: start a new one")

    def record(self, run_id: str, name: str, content: Mapping[str, Any]) -> None:
        """Write one of a run's records, as JSON; `SIGNATURE` is added to it where there is a key."""
        file = names.below(self._records(run_id), name, "a record")
        if signature := signing.keys().sign("record", [run_id, name, content]):
            content = {**content, SIGNATURE: signature}
        write_json(file, content)

    def lay(self, folder: str, last: str) -> None:
        """Make a folder that was written below `root` part of the store; the file `last` says that it is whole."""

    def bring(self, folder: str) -> None:
        """Bring a folder below `root`, as it is in the store."""

    def remove(self, folder: str) -> None:
        """Remove a folder below `root` from the store."""
        shutil.rmtree(self.root / folder)

    def lose(self, folder: str) -> None:
        """Set a folder below `root` aside that is torn; whatever its content is, it is not looked for again."""
        tell(set_aside(self.root / folder, "the file that says what it is cannot be read"))
