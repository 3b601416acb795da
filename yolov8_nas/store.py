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
import hashlib
import json
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import yolov8_nas.names as names
import yolov8_nas.signing as signing
from yolov8_nas.errors import InputError, Said, StageError
from yolov8_nas.files import append_line as append_line
from yolov8_nas.files import atomic_write as atomic_write
from yolov8_nas.files import read_json as read_json
from yolov8_nas.files import read_lines as read_lines
from yolov8_nas.files import room, set_aside, tell
from yolov8_nas.files import write_json as write_json

SIGNATURE: Final = "signature"
"""Key of a record's signature, beside its content."""

MAX_BYTES: Final = 256 * 2**30
MAX_FILES: Final = 5_000_000
MAX_RATIO: Final = 200
RATIO_FROM: Final = 128 * 2**20
"""A ratio of compression above `MAX_RATIO` is a decompression bomb once this many bytes have come out."""

MEMBER_BYTES: Final = 8192
"""What a member counts for beside its content: each costs time and a place on the disk, and a bomb may be many."""

_LONGEST_LINK: Final = 4096
_LONGEST_HEADER: Final = 64 * 2**10
"""Bytes of what a tar says of a member in a header of its own: a long name, or PAX records."""

_MOST_GLOBAL: Final = 2**20
"""Bytes of PAX records that hold for all members; they are kept while the archive is read."""

_CHUNK: Final = 2**20


class ArchiveError(Said, ValueError):
    """An archive that cannot be unpacked safely; the message names the archive, the member and the remedy."""


def canonical_digest(content: Any) -> str:
    """SHA-256 of plain data in its one canonical JSON form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative POSIX name, in sorted order."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(files.items()))


def tree_digest(folder: Path) -> str:
    """One SHA-256 for names and bytes of all files below a folder."""
    return canonical_digest({name: file_sha256(path) for name, path in tree_files(folder).items()})


def pack(folder: Path, tar_path: Path) -> str:
    """Pack a folder's files into a plain tar that depends on names and bytes only.

    Members are sorted; time, owner and mode are the same for all. Empty folders are left out.

    Returns:
        SHA-256 of the tar.
    """
    tar_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = tar_path.with_name(f".{tar_path.name}.{os.getpid()}")
    files = tree_files(folder)
    try:
        wanted = sum(path.stat().st_size for path in files.values())
        with room(tar_path, wanted), tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, path in files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = path.stat().st_size, 0o644, 0
                with path.open("rb") as file:
                    tar.addfile(member, file)
        digest = file_sha256(temporary)
        temporary.replace(tar_path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


@dataclass(frozen=True)
class _Member:
    name: str
    is_folder: bool = False
    link: str | None = None
    open: Callable[[], IO[bytes] | None] | None = None
    size: int | None = None


def extract(archive: Path, into: Path, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
    """Unpack a tar, compressed tar or zip that may come from anywhere.

    Only files and folders are made, with plain modes; a link to a file of the archive becomes that file. Where
    anything is wrong, nothing is left behind.

    Args:
        archive: The archive, told by its content, not by its name.
        into: Folder to unpack into; made if missing, must be empty.
        max_bytes: Most bytes that may come out.
        max_files: Most members that may come out.

    Raises:
        ArchiveError: Not an archive or damaged; a member would leave the folder (`..`, absolute, link) or is a device;
            or it is a decompression bomb.
    """
    if into.exists() and any(into.iterdir()):
        raise ArchiveError(f"{into}: not empty, so {archive.name} is not unpacked into it; empty it first")
    into.mkdir(parents=True, exist_ok=True)
    try:
        _Extraction(archive, into, max_bytes, max_files).run()
    except ArchiveError:
        shutil.rmtree(into, ignore_errors=True)
        raise
    except _DAMAGED as error:
        shutil.rmtree(into, ignore_errors=True)
        raise ArchiveError(f"{archive}: damaged or encrypted ({error}); make or download it again") from None
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        shutil.rmtree(into, ignore_errors=True)
        raise ArchiveError(f"{archive}: a member is both a file and a folder ({error}); pack it again") from None
    except OSError as error:
        shutil.rmtree(into, ignore_errors=True)
        if error.errno is not None:
            raise
        raise ArchiveError(f"{archive}: damaged ({error}); make or download it again") from None  # gzip's and bz2's
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise


_DAMAGED: Final = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError,
    OverflowError, IndexError,
)  # fmt: skip
"""What the readers of archives raise, with their decompressors, when the bytes are not what they should be."""


class _Header(tarfile.TarInfo):
    """A header of a tar; what it says of a name or in PAX records is bounded before it is read."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX):
            archive = os.fsdecode(tar.name or "")
            if self.size > _LONGEST_HEADER:
                raise ArchiveError(f"{archive}: a name or a record of {self.size:,} bytes; give another archive")
            kept = sum(len(key) + len(value) for key, value in tar.pax_headers.items())
            if self.type == tarfile.XGLTYPE and kept > _MOST_GLOBAL:
                raise ArchiveError(f"{archive}: more than {_MOST_GLOBAL:,} bytes of records; give another archive")
        processed: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return processed


_PAX: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class _Extraction:
    """One archive on its way out, with what has come out so far."""

    def __init__(self, archive: Path, into: Path, max_bytes: int, max_files: int) -> None:
        self.archive = archive
        self.into = into
        self.max_bytes = max_bytes
        self.max_files = max_files
        self.archive_bytes = archive.stat().st_size
        self.bytes = 0
        self.files = 0

    def run(self) -> None:
        links: list[tuple[Path, Path, _Member]] = []
        for member in self._members():
            target = self._inside(member, member.name)
            self.files += 1
            if self.files > self.max_files:
                raise self._error(member, f"more than {self.max_files:,} members", "split the dataset")
            self._count(member, MEMBER_BYTES)
            if target == self.into:
                continue
            if member.is_folder:
                target.mkdir(parents=True, exist_ok=True)
            elif member.link is not None:
                links.append((target, self._inside(member, member.link, linked=True), member))
            else:
                self._write(member, target)
        # A link may stand before the file it names, so links come last. No link is ever made, hence none is followed.
        for target, source, member in links:
            if not source.is_file():
                raise self._error(member, f"a link to {member.link}, which is no file of the archive", "pack the file")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.hardlink_to(source)

    def _members(self) -> Iterator[_Member]:
        # Not zipfile.is_zipfile, which looks at the end only: a tar of PyTorch checkpoints ends like a zip.
        with self.archive.open("rb") as start:
            is_zip = start.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
        if is_zip:
            with zipfile.ZipFile(self.archive) as file:
                for info in file.infolist():
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    if kind == stat.S_IFLNK:
                        with file.open(info) as content:
                            named = content.read(_LONGEST_LINK + 1)
                        if len(named) > _LONGEST_LINK:
                            raise self._error(_Member(info.filename), "a link to no path", "pack the file")
                        link = PurePosixPath(info.filename).parent / named.decode(errors="replace")
                        yield _Member(info.filename, link=str(link))
                    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                        raise self._error(_Member(info.filename), "a device", "pack files and folders only")
                    else:
                        yield _Member(info.filename, info.is_dir(), None, partial(file.open, info), info.file_size)
            return
        try:
            tar = tarfile.open(self.archive, tarinfo=_Header)  # noqa: SIM115 - entered below, once it is known to be one
        except tarfile.ReadError:
            raise ArchiveError(f"{self.archive}: neither tar, compressed tar nor zip; give one of them") from None
        with tar:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
                if entry.issym():
                    yield _Member(entry.name, link=str(PurePosixPath(entry.name).parent / entry.linkname))
                elif entry.islnk():
                    yield _Member(entry.name, link=entry.linkname)
                elif entry.isdir() or entry.isreg():
                    yield _Member(entry.name, entry.isdir(), None, partial(tar.extractfile, entry), entry.size)
                else:
                    raise self._error(_Member(entry.name), "a device or a pipe", "pack files and folders only")

    def _inside(self, member: _Member, name: str, linked: bool = False) -> Path:
        what = "a link that leaves the folder" if linked else "would be written outside the folder"
        written = name.replace("\\", "/")  # by an archiver of Windows
        parts: list[str] = []
        for part in written.split("/")[written.startswith("/") :]:
            if part == ".." and linked and parts and parts[-1] != "..":
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        if not parts and not written.startswith("/"):
            return self.into  # the folder itself
        shortest = "/".join([*([""] if written.startswith("/") else []), *parts])
        if why := names.fault(shortest):
            raise self._error(member, f"{what} ({why})", "pack with relative paths, without '..'")
        return self.into.joinpath(*parts)

    def _write(self, member: _Member, target: Path) -> None:
        stream = member.open() if member.open else None
        if stream is None:
            raise self._error(member, "has no content", "pack it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        with stream as source, room(target, member.size), target.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                self._count(member, len(chunk))
                sink.write(chunk)

    def _count(self, member: _Member, size: int) -> None:
        self.bytes += size
        if self.bytes > self.max_bytes:
            raise self._error(member, f"more than {self.max_bytes:,} bytes come out", "split the dataset")
        if self.bytes > RATIO_FROM and self.bytes > MAX_RATIO * self.archive_bytes:
            raise self._error(
                member,
                f"a decompression bomb: {self.bytes:,} bytes from an archive of {self.archive_bytes:,}",
                "give an archive that you trust, or the unpacked folder",
            )

    def _error(self, member: _Member, fault: str, remedy: str) -> ArchiveError:
        return ArchiveError(f"{self.archive}: member {names.shown(member.name)}: {fault}; {remedy}")


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
