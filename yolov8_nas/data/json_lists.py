"""The long lists of a JSON file, one item at a time: annotations of a large dataset take gigabytes as objects.

Python's own decoder reads each item, so that what it accepts, as the `NaN` that many tools write, is accepted here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Final, Protocol

from yolov8_nas.errors import InputError
from yolov8_nas.reading import BLOCK, Bounds, short_integer

LARGEST_ITEM: Final = 64 * 2**20
"""Characters of one item of a list, or of a value beside the lists."""

_TOKEN: Final = 16
"""Characters of the longest literal or escape: an error so close to the end of a block may be for want of the next."""

_SPACE: Final = re.compile(r"[ \t\n\r]*")


class Items(Protocol):
    """Takes the items of a list."""

    def append(self, item: Any, /) -> None:
        """Take the next item."""
        ...


class _Dropped:
    def append(self, item: Any) -> None:
        """Take nothing of it."""


def read_lists(
    path: Path, source: str, lists: Mapping[str, Callable[[], Items]], *, most_bytes: int, most_values: int
) -> dict[str, Any] | None:
    """What an object in a file of JSON holds, each item of its lists handed on as soon as it is read.

    Args:
        path: The file.
        source: What it is, for messages.
        lists: What takes the items of the lists, by the list's key. The items of other lists are dropped.
        most_bytes: Bytes that the file may have.
        most_values: Numbers, texts, lists and objects that it may hold.

    Returns:
        The values by their keys: for a list what took its items. Nothing where the file holds a list: it is read no
        further.

    Raises:
        InputError: It is no JSON or breaks a bound.
        OSError: It can't be read.
    """
    try:
        text = _Text(_blocks(path, Bounds(source, most_bytes, most_values)))
        if text.peek() == "[":
            return None
        if text.peek() != "{":
            text.value()  # raises, or is a single number or text
            return None
        found = dict(_members(text, lists))
        if text.peek():
            raise text.error("Extra data")
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON ({error})") from None
    return found


def _members(text: _Text, lists: Mapping[str, Callable[[], Items]]) -> Iterator[tuple[str, Any]]:
    """The keys and values of the object that begins here."""
    for _ in _parts(text, "{", "}"):
        if text.peek() != '"':
            raise text.error("Expecting property name enclosed in double quotes")
        key = text.value()
        text.take(":")
        if text.peek() != "[":
            yield key, text.value()
            continue
        items = lists.get(key, _Dropped)()
        for _ in _parts(text, "[", "]"):
            items.append(text.value())
        yield key, items


def _parts(text: _Text, begin: str, end: str) -> Iterator[None]:
    """Stop at each part of a list or an object, and take the commas between them."""
    text.take(begin)
    if text.peek() != end:
        yield
        while text.peek() == ",":
            text.take(",")
            yield
    text.take(end)


def _blocks(path: Path, bounds: Bounds) -> Iterator[tuple[str, bool]]:
    """The blocks of a file as text, and whether integers may be too long in what there is so far."""
    with path.open("rb") as file:
        block = file.read(BLOCK)
        wide = block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        decoder = codecs.getincrementaldecoder("utf-16")("replace") if wide else _UTF8()
        while block:
            text = decoder.decode(block)
            bounds.pass_on(text.encode(errors="surrogatepass") if wide else block)
            yield text, bounds.long
            block = file.read(BLOCK)
        yield decoder.decode(b"", final=True), bounds.long


_UTF8: Final = codecs.getincrementaldecoder("utf-8-sig")


class _Text:
    """JSON that is read value by value, and held no longer than it takes."""

    def __init__(self, blocks: Iterator[tuple[str, bool]]) -> None:
        self._blocks, self._text, self._at = blocks, "", 0
        self._before = self._lines = 0  # characters and lines that are read and gone
        self._line_start = 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space; nothing at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go past a character.

        Raises:
            JSONDecodeError: Another one stands there.
        """
        if self.peek() != character:
            raise self.error(f"Expecting {character!r}")
        self._at += 1

    def value(self) -> Any:
        """Read the value that begins here.

        Raises:
            JSONDecodeError: There is none.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _TOKEN >= len(self._text)
                if cut and self._more():
                    continue
                raise self.error(error.msg, error.pos) from None
            if isinstance(value, int | float) and end + _TOKEN >= len(self._text) and self._more():
                continue  # a number may go on, also past a point or an exponent that the text ends with
            self._at = end
            return value

    def error(self, message: str, at: int | None = None) -> JSONDecodeError:
        """What is wrong at a place, which is counted from the file's beginning."""
        at = self._at if at is None else at
        error = JSONDecodeError(message, self._text, at)
        line, column = self._lines + error.lineno, error.colno + (self._before - self._line_start) * (error.lineno == 1)
        error.args = (f"{message}: line {line} column {column} (char {self._before + at})",)
        return error

    def _more(self) -> bool:
        """Add at least as much as there is unread, so that a long value is not begun anew for each block of it.

        Where nothing is left to add, places in the text stay what they are.
        """
        if len(self._text) - self._at > LARGEST_ITEM:
            raise ValueError(f"an entry of more than {LARGEST_ITEM:,} characters at char {self._before + self._at:,}")
        added, wanted = [], max(1, len(self._text) - self._at)
        while wanted > 0 and (block := next(self._blocks, None)) is not None:
            added.append(block[0])
            wanted -= len(block[0])
            if block[1]:  # the decoder is slower where it hands out its integers
                self._decoder = json.JSONDecoder(parse_int=short_integer)
        if not added:
            return False
        read = self._text[: self._at]
        if lines := read.count("\n"):
            self._lines += lines
            self._line_start = self._before + read.rindex("\n") + 1
        self._text = "".join([self._text[self._at :], *added])
        self._before, self._at = self._before + len(read), 0
        return True
