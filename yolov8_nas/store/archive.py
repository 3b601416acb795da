"""Archives: the one plain deterministic tar that travels between stages, and safe unpacking of any other."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Final

from yolov8_nas import names
from yolov8_nas.errors import Said
from yolov8_nas.files import file_sha256, room, tree_files

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
