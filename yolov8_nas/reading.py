"""Reading what came from outside, within bounds: a few bytes must not become gigabytes, nor a traceback.

Everything is looked at before it is built. JSON is held against bounds on its bytes, its values, how many lists and
objects stand in how much text, how deep they nest and how long its integers are. `yaml_text` does the same for YAML.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from yolov8_nas.errors import InputError

MOST_BYTES: Final = 256 * 2**20
"""Bytes of a file of JSON that this software has written: a manifest names each image of a large dataset."""

MOST_VALUES: Final = 12_000_000
DEEPEST: Final = 64
"""How deep lists and objects may nest."""

LONGEST_INTEGER: Final = 19
"""Digits of an integer: 64 bits."""

_FREE: Final = 100_000
_SPARSE: Final = 16
"""Lists and objects beyond `_FREE` need so many bytes of text each: an empty one takes 60 bytes of memory."""

_SHAPE: Final = bytes(sorted(set(range(256)) - set(b'[]{},"')))
_STEP: Final = [1 if byte in b"[{" else -1 if byte in b"]}" else 0 for byte in range(256)]


def read_bytes(path: Path, most: int, what: str) -> bytes:
    """The bytes of a file, or of what behaves like one.

    Args:
        path: The file.
        most: How many bytes it may have.
        what: What it should be, for people.

    Raises:
        InputError: It can't be read or is larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of {what}") from None
    except ValueError as error:  # a NUL in the path
        raise InputError(f"{str(path)!r}: no path ({error}); give the path of {what}") from None
    if len(data) > most:
        raise InputError(f"{path}: more than {most:,} bytes, too much for {what}; give another file")
    return data


def parse_json(data: bytes | str, source: str, *, most_bytes: int = MOST_BYTES, most_values: int = MOST_VALUES) -> Any:
    """The content of JSON.

    Args:
        data: The JSON, in UTF-8.
        source: What it is, for messages.
        most_bytes: Bytes that it may have.
        most_values: Numbers, texts, lists and objects that it may hold.

    Raises:
        InputError: It is no JSON or breaks a bound. (It is a `ValueError`, as that of `json` is.)
    """
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if len(raw) > most_bytes:
        raise InputError(f"{source}: {len(raw):,} bytes of JSON, more than {most_bytes:,}; make it smaller")
    depth, containers, values = _shape(raw)
    if depth > DEEPEST:
        raise InputError(f"{source}: lists and objects are nested deeper than {DEEPEST} times; flatten it")
    if values > most_values:
        raise InputError(f"{source}: {values:,} values, more than {most_values:,}; make it smaller")
    if containers > _FREE + len(raw) // _SPARSE:
        raise InputError(
            f"{source}: {containers:,} lists and objects in {len(raw):,} bytes hold nothing; write it anew"
        )
    try:
        text = raw.decode("utf-8-sig")
        # What the decoder is asked for itself makes it slower, so only where there is something to look for.
        long = re.search(rb"[0-9]{%d}" % (LONGEST_INTEGER + 1), raw)
        return json.loads(text, parse_int=_integer) if long else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON ({error})") from None


def read_json(path: Path, *, most_bytes: int = MOST_BYTES, most_values: int = MOST_VALUES) -> Any:
    """Read a file of JSON.

    Args:
        path: The file.
        most_bytes: As for `parse_json`.
        most_values: As for `parse_json`.

    Raises:
        InputError: As `parse_json` does.
        InputError: It is a pipe, which would be waited for, or a device, which may have no end.
        OSError: The file can't be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise InputError(f"{path}: a pipe or a device in the place of a file; remove it")
    with os.fdopen(handle, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise InputError(f"{path}: {size:,} bytes of JSON, more than {most_bytes:,}; make it smaller")
        data = file.read(most_bytes + 1)
    return parse_json(data, str(path), most_bytes=most_bytes, most_values=most_values)


def _shape(raw: bytes) -> tuple[int, int, int]:
    """How deep JSON nests, how many lists and objects and how many values it has at most."""
    if b"\\" in raw:
        raw = re.sub(rb"\\.", b"", raw, flags=re.DOTALL)
    kept = re.sub(rb'"[^"]*"?', b"", raw.translate(None, _SHAPE))
    commas = kept.count(b",")
    brackets = kept.replace(b",", b"") if commas else kept
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    containers = brackets.count(b"[") + brackets.count(b"{")
    return depth, containers, containers + commas + 1


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits.lstrip('-')):,} digits")
    return int(digits)
