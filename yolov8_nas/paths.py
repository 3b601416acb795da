"""Files and folders that people name: whether they can be written, and what is wrong with them.

Whatever the system has against a path that somebody gave becomes an `InputError` of one line, here and nowhere else.
"""

from __future__ import annotations

import codecs
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from yolov8_nas.errors import InputError, NoRoomError

_REMEDIES: Final = {
    errno.ENAMETOOLONG: "use a shorter name or path",
    errno.EACCES: "give this user the right to it, or choose another place",
    errno.EPERM: "give this user the right to it, or choose another place",
    errno.EROFS: "choose another place, or mount this one for writing",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "a part of this path is a file: correct the path",
    errno.EISDIR: "this is a folder: give the path of a file",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ENOTEMPTY: "choose another name, or empty the folder",
    errno.ELOOP: "its links lead round in a circle: correct them",
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, ask for a larger quota, or choose another place",
    errno.EFBIG: "choose a place that takes large files",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs: this machine has too many files open",
    errno.EIO: "the disk or the network behind it is at fault: choose another place",
    errno.ESTALE: "the network folder is gone: mount it again",
    errno.ETXTBSY: "something runs this file: stop it first",
    errno.ENXIO: "this is no regular file: give the path of one",
    errno.ENODEV: "this is no regular file: give the path of one",
    errno.EINVAL: "this place does not take such a name: choose another",
}

_WITHOUT_A_PATH: Final = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
"""Errors that are the machine's, whether or not they name a path."""

_NAME_MAX: Final = 255  # bytes of one name, of every file system that Linux has
_PATH_MAX: Final = 4096 - 512  # bytes of a path, less what is written below it

_MARKS: Final = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def told(error: OSError) -> InputError | None:
    """What the system has against a path, in one line with a remedy.

    Returns:
        The error to raise instead; nothing where it is not about a path, and so a fault of ours or of a server.
    """
    if isinstance(error, ConnectionError | TimeoutError) and error.filename is None:
        return InputError(str(error)) if error.errno is None and str(error) else None
    if error.errno is None or (error.filename is None and error.errno not in _WITHOUT_A_PATH):
        return None
    remedy = _REMEDIES.get(error.errno, "correct the path or choose another place")
    said = os.strerror(error.errno)
    said = said[:1].lower() + said[1:]
    if error.filename is None:
        return InputError(f"{said}; {remedy}")
    name = error.filename2 if error.errno == errno.EEXIST and error.filename2 is not None else error.filename
    return InputError(f"{_shown(name)}: {said}; {remedy}")


def _shown(name: Any) -> str:
    """A path for a message: on one line, and of a very long one its beginning and its end."""
    text = os.fsdecode(name) if isinstance(name, bytes | str | os.PathLike) else str(name)
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"


def expanded(path: str | Path) -> Path:
    """A path with `~` as the home folder.

    Raises:
        InputError: Nobody knows where that is: `HOME` is not set, or there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: the home folder is unknown; set HOME, or write the whole path") from None


def decoded(raw: bytes, source: str) -> str:
    """Bytes as text in UTF-8; `source` names them in errors.

    Raises:
        InputError: They are in another encoding; the line is named.
    """
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            raise InputError(f"{source}: is in {encoding}; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        if raw.count(0) > len(raw) // 4:
            raise InputError(f"{source}: is in UTF-16 or no text; save it as UTF-8") from None
        raise InputError(
            f"{source}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}; perhaps Latin-1 or Windows-1252); "
            "save the file as UTF-8"
        ) from None


def check_writable(folder: Path, what: str, remedy: str) -> None:
    """Check by writing that a folder can be made or written to; nothing is left behind, not even the folder.

    Args:
        folder: The folder, which need not exist.
        what: What it is, for people.
        remedy: What to do otherwise.

    Raises:
        InputError: It cannot.
        NoRoomError: The disk is full.
    """
    there = folder.absolute()
    while True:
        try:
            os.lstat(there)
            break
        except (FileNotFoundError, NotADirectoryError):
            there = there.parent
        except OSError as error:
            raise InputError(f"{what} {_shown(folder)}: {_why(error)}; {remedy}") from None
    longest = max(len(os.fsencode(part)) for part in folder.absolute().parts)
    if longest > _NAME_MAX or len(os.fsencode(folder.absolute())) > _PATH_MAX:
        raise InputError(f"{what} {_shown(folder)}: {os.strerror(errno.ENAMETOOLONG)}; {remedy}")
    if not there.exists():
        raise InputError(f"{what} {_shown(folder)}: {_shown(there)} is a link that leads nowhere; {remedy}")
    if not there.is_dir():
        raise InputError(f"{what} {_shown(folder)}: {_shown(there)} is a file; {remedy}")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError(
                f"{what} {_shown(folder)}: no room on the disk for 1 byte ({shutil.disk_usage(there).free:,} bytes are "
                "free); free some space, and the same command goes on"
            ) from None
        raise InputError(
            f"{what} {_shown(folder)}: {_shown(there)} is not writable ({_why(error)}); {remedy}"
        ) from None


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
