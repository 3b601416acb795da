"""Names that come from outside: of objects in a bucket, of files in a manifest, an archive, a registry.

Whatever reads such a name and makes a path of it asks here first. A name that passes is one of a file below the folder
that it is meant for, on every system, and there is one way to write it.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from yolov8_nas.errors import InputError

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_LONGEST: Final = 1024  # bytes, as a key in S3
_LONGEST_PART: Final = 255  # bytes, as a name in most file systems


class UnsafeNameError(InputError):
    """A name that would lead out of its folder, or a digest that is none."""


def fault(name: object) -> str | None:
    """Why something is not the name of a file below a folder; nothing where it is one.

    Args:
        name: What was read: a relative POSIX path in its shortest form, if all is well.
    """
    if not isinstance(name, str) or not name:
        return "not a name"
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return "no text that a file system takes"
    if "\0" in name:
        return "a NUL in it"
    if "\\" in name:
        return "a backslash in it"
    if name.startswith("/") or _DRIVE.match(name):
        return "an absolute path"
    # Some file systems write a look-alike as what it looks like: the two dots of U+2025, say, as '..'.
    parts, alike = name.split("/"), unicodedata.normalize("NFKC", name).replace("\\", "/").split("/")
    if ".." in parts or ".." in alike:
        return "'..' in its path"
    if "" in parts or "." in parts:
        return "an empty part or a '.' in its path"
    if len(encoded) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_PART for part in parts):
        return "too long"
    return None


def checked(name: Any, source: str) -> str:
    """A name that may become a path below a folder.

    Args:
        name: What was read.
        source: Where it was read, for the message.

    Raises:
        UnsafeNameError: It may not.
    """
    if why := fault(name):
        raise UnsafeNameError(f"{source}: the name {shown(name)} is refused: {why}")
    return str(name)


def part(name: Any, source: str) -> str:
    """A name that may become one part of a path: of a stage, a run, a key.

    Raises:
        UnsafeNameError: It may not.
    """
    if "/" in checked(name, source):
        raise UnsafeNameError(f"{source}: the name {shown(name)} is refused: a slash in it")
    return str(name)


def below(folder: Path, name: Any, source: str) -> Path:
    """The path of a name below a folder.

    Raises:
        UnsafeNameError: It would not lie there.
    """
    return folder / checked(name, source)


def digest(text: Any, source: str) -> str:
    """A SHA-256 as 64 hexadecimal digits, in lower case.

    Raises:
        UnsafeNameError: It is none.
    """
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise UnsafeNameError(f"{source}: {shown(text)} is no SHA-256 of 64 hexadecimal digits")
    return text


def files(listed: Any, source: str) -> dict[str, str]:
    """SHA-256 of files by name, as a manifest or another list has them.

    Raises:
        UnsafeNameError: It is no such list; a name or a digest is refused; or a name is both a file and a folder.
    """
    if not isinstance(listed, Mapping):
        raise UnsafeNameError(f"{source}: no list of files with their SHA-256")
    found = {checked(name, source): digest(value, f"{source}: {shown(name)}") for name, value in listed.items()}
    for name in found:
        steps = name.split("/")[:-1]
        for length in range(1, len(steps) + 1):
            if (folder := "/".join(steps[:length])) in found:
                raise UnsafeNameError(f"{source}: {shown(folder)} is both a file and a folder")
    return found


def shown(name: object) -> str:
    """A name from outside as one short piece of a message, with nothing in it that a terminal obeys."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"
