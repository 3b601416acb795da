"""Files that are there whole or not at all, also after a SIGKILL, a power cut, or with a disk that is full.

What is written goes to a file beside, which is brought to the disk and then takes the name; the folder is brought to
the disk, too, since the name is in it. A file that is torn all the same, by a disk that lost what it had confirmed, is
told and set aside, and the one before it is taken.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from yolov8_nas.errors import NoRoomError
from yolov8_nas.reading import parse_json
from yolov8_nas.reading import read_json as read_json  # what reads belongs to what writes

T = TypeVar("T")

_SEAL: Final = b"\nsha256 "

_NO_ROOM: Final = {
    errno.ENOSPC: "no room on the disk",
    errno.EDQUOT: "the quota on the disk leaves no room",
    errno.EFBIG: "the largest file that this process may write leaves no room",
}
_MACHINE: Final = (
    *(errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOENT),
    *_NO_ROOM,
)
_NO_ROOM_IN_WORDS: Final = ("no space left on device", "disk quota exceeded", "disk is full", "failed writing file")
"""What libraries that do not raise an OSError say of a full disk: Rust's and SQLite's words, and PyTorch's."""


def no_room(error: BaseException, path: Path | None = None, wanted: int | None = None) -> NoRoomError | None:
    """An error as one line on a full disk; nothing where it is about something else.

    Args:
        error: What was raised, by whatever library.
        path: What was to be written, unless the error knows better.
        wanted: Bytes that were to be written there, where they are known.
    """
    cause: BaseException | None = error
    why = None
    while cause is not None and why is None:
        if isinstance(cause, NoRoomError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            why = _NO_ROOM[cause.errno]
            if path is None and isinstance(cause.filename, str):
                path = Path(cause.filename)
        elif any(words in str(cause).lower() for words in _NO_ROOM_IN_WORDS):
            why = _NO_ROOM[errno.ENOSPC]
        cause = cause.__cause__ or cause.__context__
    if why is None:
        return None
    amount = f"{wanted:,} bytes" if wanted is not None else "what was to be written"
    return NoRoomError(
        f"{path or 'a file'}: {why} for {amount} ({_free(path)}); free some space, and the same command goes on"
    )


def _free(path: Path | None) -> str:
    """What a disk has left, in words."""
    place = (path or Path.cwd()).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return f"{shutil.disk_usage(place).free:,} bytes are free"
    except OSError:
        return "how much is free is not known"


@contextmanager
def room(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Tell in one line when there is no room for a file.

    Args:
        path: What is written within the context.
        wanted: Bytes that it takes, where they are known.

    Raises:
        NoRoomError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        told = no_room(error, path, wanted)
        if told is None:
            raise
        raise told from None


def check_room(folder: Path, wanted: int = 2**20) -> None:
    """Write some bytes and remove them again, where something went wrong for reasons that nobody could write down.

    Raises:
        NoRoomError: They cannot be written.
    """
    probe = folder / f".room.{os.getpid()}"
    try:
        atomic_write(probe, bytes(wanted))
    finally:
        probe.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, also after a SIGKILL or a power cut.

    Raises:
        NoRoomError: The disk is full; the file is as it was.
    """
    content = data.encode() if isinstance(data, str) else data
    with room(path, len(content)):
        _fresh(path, content).replace(path)
        sync_folder(path.parent)


def _fresh(path: Path, content: bytes) -> Path:
    """A file with this content beside one that it is to replace, on the disk; where that fails, it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def replace(temporary: Path, path: Path) -> None:
    """Give a file that is written the name that it is for, once it is on the disk.

    Raises:
        NoRoomError: The disk is full; the file is as it was.
    """
    with room(path, temporary.stat().st_size):
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system knows how."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring all files below a folder, and their names, to the disk."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            sync_folder(path)
        elif path.is_file():
            sync(path)
    sync_folder(folder)


def keep(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a checkpoint; the one before it stays as `previous_of` names it.

    Behind the content stands its SHA-256: what a power cut leaves can have the right length and blocks of zeros in it,
    and PyTorch, which does not mind the line, would take them for weights.

    Args:
        path: The file.
        write: Writes its content to what it is given; `torch.save` with what is to be saved, say.

    Raises:
        NoRoomError: The disk is full; both files are as they were.
    """
    buffer = io.BytesIO()
    write(buffer)
    content = buffer.getvalue()
    sealed = content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"
    with room(path, len(sealed)):
        fresh = _fresh(path, sealed)
        if path.is_file():
            path.replace(previous_of(path))
        fresh.replace(path)
        sync_folder(path.parent)


def previous_of(path: Path) -> Path:
    """Where `keep` leaves the file before the newest."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_kept(path: Path, read: Callable[[Path], T], note: Callable[[str], None] | None = None) -> T | None:
    """The newest of what `keep` or `atomic_write` wrote that can be read.

    One that is torn is told and set aside, so that the next try does not find it.

    Args:
        path: The file; it need not exist.
        read: Reads it, and raises where it is not whole.
        note: Is told of a torn file; `tell` unless given.

    Returns:
        What `read` gave; nothing where there is no whole file, and a fresh start is all that is left.

    Raises:
        OSError: The disk does not let a file be read; that says nothing of what is in it.
    """
    for file in (path, previous_of(path)):
        try:
            if file.is_file():
                _check_seal(file)
                return read(file)
        except Exception as error:  # of many classes: whatever a reader makes of half a file
            if _of_the_machine(error):
                raise
            rest = "the one before it is taken" if file == path and previous_of(path).is_file() else "beginning anew"
            (note or tell)(f"{set_aside(file, error)}; {rest}")
    return None


def _of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing of what is in a file: of the disk, of rights, of memory, a GPU's included."""
    if isinstance(error, OSError):
        return error.errno in _MACHINE
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _check_seal(path: Path) -> None:
    """Hold a file of `keep` against the digest that stands behind its content.

    Raises:
        ValueError: It is another one.
    """
    length = len(_SEAL) + 65
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - length))
        seal = file.read()
        if not seal.startswith(_SEAL):  # written otherwise, or cut off, which whoever reads it finds out
            return
        file.seek(0)
        digest, left = hashlib.sha256(), size - length
        while left and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
    if digest.hexdigest().encode() != seal[len(_SEAL) : -1]:
        raise ValueError("its content has another SHA-256 than stands behind it")


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file of a result, which counts when its manifest is there; it need not be whole before.

    Raises:
        NoRoomError: The disk is full.
    """
    content = data.encode() if isinstance(data, str) else data
    with room(path, len(content)):
        path.write_bytes(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, as `write_file` writes.

    Raises:
        NoRoomError: The disk is full.
    """
    with room(target, source.stat().st_size):
        shutil.copyfile(source, target)


def tell(message: str) -> None:
    """Say something by the way: on standard error, since what a command prints may be JSON."""
    print(message, file=sys.stderr, flush=True)


def set_aside(path: Path, why: object) -> str:
    """Give a file or folder that is torn a name under which nothing looks for it; what became of it, in words."""
    aside = path.with_name(f".{path.name[:200]}.torn")
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    path.replace(aside)
    reason = " ".join(str(why).split())[:200] or type(why).__name__
    return f"{path}: torn or damaged ({reason}); it is set aside as {aside.name}"


def write_json(path: Path, content: Any) -> None:
    """Write plain data as indented JSON, atomically.

    Raises:
        ValueError: The data holds a NaN or an infinity, which JSON has not.
        NoRoomError: The disk is full.
    """
    atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def append_line(path: Path, content: Any) -> None:
    """Add plain data to a file of JSON lines; it is on disk when this returns.

    Raises:
        ValueError: The data holds a NaN or an infinity, which JSON has not.
        NoRoomError: The disk is full.
    """
    line = json.dumps(content, allow_nan=False) + "\n"
    with room(path, len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync_folder(path.parent)


def read_lines(path: Path) -> list[Any]:
    """Read a file of JSON lines, which need not exist; from the first line on that is torn it is cut off."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    whole: list[Any] = []
    length = 0
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                break
            whole.append(parse_json(line, str(path)))
        except ValueError:
            break
        length += len(line)
    if length < len(text):
        atomic_write(path, text[:length])
    return whole


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
