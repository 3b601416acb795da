"""Reading what came from outside, within bounds: a few bytes must not become gigabytes, nor a traceback.

Everything is looked at before it is built. JSON is held against bounds on its bytes, its values, how many lists and
objects stand in how much text, how deep they nest and how long its integers are. `yaml_text` does the same for YAML.
`json_lists` does so while it reads a file that is too large to be held.
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

BLOCK: Final = 2**20
"""Bytes that are looked at in one go."""

_LONG: Final = re.compile(rb"[0-9]{%d}" % (LONGEST_INTEGER + 1))
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


def parse_json(
    data: bytes | str,
    source: str,
    *,
    most_bytes: int = MOST_BYTES,
    most_values: int = MOST_VALUES,
    finite: bool = True,
) -> Any:
    """The content of JSON.

    Args:
        data: The JSON, in UTF-8.
        source: What it is, for messages.
        most_bytes: Bytes that it may have.
        most_values: Numbers, texts, lists and objects that it may hold.
        finite: Whether `NaN` and `Infinity`, which JSON has not, are refused.

    Raises:
        InputError: It is no JSON or breaks a bound. (It is a `ValueError`, as that of `json` is.)
    """
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if len(raw) > most_bytes:
        raise InputError(f"{source}: {len(raw):,} bytes of JSON, more than {most_bytes:,}; make it smaller")
    bounds = Bounds(source, most_bytes, most_values)
    for start in range(0, len(raw), BLOCK):
        bounds.pass_on(raw[start : start + BLOCK])
    try:
        text = raw.decode("utf-8-sig")
        # The decoder is slower where it hands out its integers; of `NaN` and `Infinity` it has to ask in any case.
        constants, integers = _no_number if finite else None, short_integer if bounds.long else None
        return json.loads(text, parse_constant=constants, parse_int=integers)
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


class Bounds:
    """Holds JSON against bounds, block by block, before it is built.

    Attributes:
        long: Whether there are as many digits in a row as no integer may have.
    """

    def __init__(self, source: str, most_bytes: int, most_values: int) -> None:
        """Begin a text.

        Args:
            source: What it is, for messages.
            most_bytes: Bytes that it may have.
            most_values: Numbers, texts, lists and objects that it may hold.
        """
        self.long = False
        self._source, self._most_bytes, self._most_values = source, most_bytes, most_values
        self._bytes = self._containers = self._commas = self._depth = 0
        self._inside = False  # a string that the last block has begun
        self._rest = b""  # a backslash that the last block ended with
        self._tail = b""

    def pass_on(self, block: bytes) -> None:
        """Look at the next block of the text, in UTF-8.

        Raises:
            InputError: The text breaks a bound.
        """
        self._bytes += len(block)
        with_tail = self._tail + block
        self.long = self.long or _LONG.search(with_tail) is not None
        self._tail = with_tail[-LONGEST_INTEGER:]
        brackets = self._brackets(self._rest + block)
        levels = [*accumulate(map(_STEP.__getitem__, brackets), initial=self._depth)]
        self._depth = levels[-1]
        self._containers += brackets.count(b"[") + brackets.count(b"{")
        self._hold(max(levels))

    def _brackets(self, block: bytes) -> bytes:
        """The brackets of a block that stand outside strings; its commas are counted."""
        self._rest = b""
        if b"\\" in block:
            if (len(block) - len(block.rstrip(b"\\"))) % 2:
                block, self._rest = block[:-1], b"\\"
            block = re.sub(rb"\\.", b"", block, flags=re.DOTALL)
        kept = block.translate(None, _SHAPE)
        if self._inside:
            _, end, kept = kept.partition(b'"')
            self._inside = not end
        kept, begun, _ = re.sub(rb'"[^"]*"', b"", kept).partition(b'"')
        self._inside = self._inside or bool(begun)
        commas = kept.count(b",")
        self._commas += commas
        return kept.replace(b",", b"") if commas else kept

    def _hold(self, deepest: int) -> None:
        if self._bytes > self._most_bytes:
            raise InputError(f"{self._source}: more than {self._most_bytes:,} bytes of JSON; make it smaller")
        if deepest > DEEPEST:
            raise InputError(f"{self._source}: lists and objects are nested deeper than {DEEPEST} times; flatten it")
        if (values := self._containers + self._commas + 1) > self._most_values:
            raise InputError(f"{self._source}: {values:,} values, more than {self._most_values:,}; make it smaller")
        if self._containers > _FREE + self._bytes // _SPARSE:
            raise InputError(
                f"{self._source}: {self._containers:,} lists and objects in {self._bytes:,} bytes hold nothing; "
                "write it anew"
            )


def short_integer(digits: str) -> int:
    """An integer of JSON.

    Raises:
        ValueError: It has more digits than 64 bits hold.
    """
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits.lstrip('-')):,} digits")
    return int(digits)


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
