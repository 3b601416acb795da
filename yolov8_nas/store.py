"""The stage store: finished results under the digest of everything that made them.

    STORE/<stage>/<key>/manifest.json   written last and atomically: a key that has one is done
                        outputs/        what the stage wrote
                        partial/        checkpoints of a stage that is not done; found again by the next try
                        scratch/        unpacked inputs and the like, only while the stage runs
                        lock            held (flock) by whoever works on the key
    STORE/runs/<run>/                   what each run did, a small file per stage and target

What travels between stages is one plain deterministic tar: the same files give the same bytes and so the same digest.
This module knows nothing of detectors and imports no sibling.
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
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

MAX_BYTES: Final = 256 * 2**30
MAX_FILES: Final = 5_000_000
MAX_RATIO: Final = 200
RATIO_FROM: Final = 256 * 2**20
"""A ratio of compression above `MAX_RATIO` is a decompression bomb once this many bytes have come out."""

_CHUNK: Final = 2**20


class ArchiveError(ValueError):
    """An archive that cannot be unpacked safely; the message names the archive, the member and the remedy."""


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, also after a SIGKILL or a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write plain data as indented JSON, atomically.

    Raises:
        ValueError: The data holds a NaN or an infinity, which JSON has not.
    """
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: The file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def append_line(path: Path, content: Any) -> None:
    """Add plain data to a file of JSON lines; it is on disk when this returns.

    Raises:
        ValueError: The data holds a NaN or an infinity, which JSON has not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(content, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Any]:
    """Read a file of JSON lines, which need not exist; a last line that was torn by a SIGKILL is taken out of it."""
    if not path.exists():
        return []
    whole, newline, torn = path.read_text(errors="replace").rpartition("\n")
    if torn:
        atomic_write(path, whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


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
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, path in tree_files(folder).items():
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
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        shutil.rmtree(into, ignore_errors=True)
        raise ArchiveError(f"{archive}: damaged or encrypted ({error}); make or download it again") from None
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        shutil.rmtree(into, ignore_errors=True)
        raise ArchiveError(f"{archive}: a member is both a file and a folder ({error}); pack it again") from None
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise


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
                        link = PurePosixPath(info.filename).parent / file.read(info).decode(errors="replace")
                        yield _Member(info.filename, link=str(link))
                    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                        raise self._error(_Member(info.filename), "a device", "pack files and folders only")
                    else:
                        yield _Member(info.filename, info.is_dir(), open=partial(file.open, info))
            return
        try:
            tar = tarfile.open(self.archive)  # noqa: SIM115 - entered below, once it is known to be one
        except tarfile.ReadError:
            raise ArchiveError(f"{self.archive}: neither tar, compressed tar nor zip; give one of them") from None
        with tar:
            for entry in tar:
                if entry.issym():
                    yield _Member(entry.name, link=str(PurePosixPath(entry.name).parent / entry.linkname))
                elif entry.islnk():
                    yield _Member(entry.name, link=entry.linkname)
                elif entry.isdir() or entry.isreg():
                    yield _Member(entry.name, entry.isdir(), open=partial(tar.extractfile, entry))
                else:
                    raise self._error(_Member(entry.name), "a device or a pipe", "pack files and folders only")

    def _inside(self, member: _Member, name: str, linked: bool = False) -> Path:
        what = "a link that leaves" if linked else "would be written outside"
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or (path.parts and path.parts[0].endswith(":")):
            raise self._error(member, f"{what} the folder (absolute path)", "pack with relative paths")
        parts: list[str] = []
        for part in path.parts:
            if part != "..":
                parts.append(part)
            elif parts and linked:
                parts.pop()
            else:
                raise self._error(member, f"{what} the folder ('..' in its path)", "pack without '..'")
        return self.into.joinpath(*parts)

    def _write(self, member: _Member, target: Path) -> None:
        stream = member.open() if member.open else None
        if stream is None:
            raise self._error(member, "has no content", "pack it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        with stream as source, target.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                self.bytes += len(chunk)
                if self.bytes > self.max_bytes:
                    raise self._error(member, f"more than {self.max_bytes:,} bytes come out", "split the dataset")
                if self.bytes > RATIO_FROM and self.bytes > MAX_RATIO * self.archive_bytes:
                    raise self._error(
                        member,
                        f"a decompression bomb: {self.bytes:,} bytes from an archive of {self.archive_bytes:,}",
                        "give an archive that you trust, or the unpacked folder",
                    )
                sink.write(chunk)

    def _error(self, member: _Member, fault: str, remedy: str) -> ArchiveError:
        return ArchiveError(f"{self.archive}: member {member.name!r}: {fault}; {remedy}")


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


class Entry:
    """The folder of one key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = folder / "outputs"
        self.partial = folder / "partial"
        self.scratch = folder / "scratch"
        self.manifest_file = folder / "manifest.json"

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
    def manifest(self) -> Manifest | None:
        """The manifest, or nothing where the key is not done (or its manifest is unreadable)."""
        try:
            return Manifest(**read_json(self.manifest_file))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def damage(self, manifest: Manifest) -> str | None:
        """What is wrong with the outputs of a finished key, or nothing."""
        files = tree_files(self.outputs)
        for name, digest in manifest.outputs.items():
            if name not in files:
                return f"{name} is missing"
            if file_sha256(files[name]) != digest:
                return f"{name} has changed since it was written"
        extra = files.keys() - manifest.outputs.keys()
        return f"{min(extra)} does not belong to it" if extra else None

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

    def check(self) -> None:
        """Look whether the store can be reached; a folder is made when it is needed."""

    def entry(self, stage: str, key: str) -> Entry:
        """The folder of a key, which need not exist."""
        return Entry(self.root / stage / key)

    def result(self, stage: str, key: str, only: Sequence[str] = ()) -> Entry:
        """The entry of a key that a run has worked on, to read what it came to.

        Args:
            stage: Name of the stage.
            key: The key.
            only: Names of the files that are wanted, where not all are.
        """
        return self.entry(stage, key)

    def runs(self) -> list[str]:
        """Names of the runs that have records, the one with the newest first."""
        folders = [path for path in (self.root / "runs").glob("*") if path.is_dir()]
        return [path.name for path in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)]

    def run_folder(self, run_id: str) -> Path:
        """The folder of a run's records, to read them."""
        return self.root / "runs" / run_id

    def record(self, run_id: str, name: str, content: Any) -> None:
        """Write one of a run's records, as JSON."""
        write_json(self.run_folder(run_id) / name, content)

    def lay(self, folder: str, last: str) -> None:
        """Make a folder that was written below `root` part of the store; the file `last` says that it is whole."""

    def bring(self, folder: str) -> None:
        """Bring a folder below `root`, as it is in the store."""

    def remove(self, folder: str) -> None:
        """Remove a folder below `root` from the store."""
        shutil.rmtree(self.root / folder)
