"""The text files of a dataset, read with their faults named."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from yolov8_nas.data.faults import Faults
from yolov8_nas.data.json_lists import Items, read_lists
from yolov8_nas.errors import InputError
from yolov8_nas.yaml_text import MOST_BYTES, parse_yaml

MOST_CLASSES: Final = 10_000
MOST_LABELS: Final = 8 * 2**20
"""Bytes of the label file of an image."""

MOST_LISTED: Final = 32 * 2**20
"""Bytes of a text file that lists images."""


def shown(path: str | Path, root: Path) -> str:
    """How messages call a file: by its path in the dataset, printable whatever its bytes."""
    text, above = os.fspath(path), os.fspath(root)
    name = text[len(above) + 1 :] or "." if text == above or text.startswith(above + os.sep) else text
    return name.encode("utf-8", "backslashreplace").decode()


def decoded(data: bytes) -> str:
    """Text as editors write it: UTF-8, with or without a mark at its beginning, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def lines(file: str | Path, where: str, faults: Faults, most: int = MOST_LABELS) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold something, with their numbers.

    Args:
        file: The file.
        where: How messages call it.
        faults: Takes what is wrong.
        most: How many bytes it may have.
    """
    try:
        data = _within(file, most)
        text = decoded(data)
    except InputError as error:
        faults.add(where, str(error), "take out what does not belong to it")
        return
    except UnicodeDecodeError:
        faults.add(where, "not UTF-8 text", "write it again as plain text")
        return
    except OSError as error:
        faults.add(where, f"cannot be read ({error.strerror})", "make it readable")
        return
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if line.strip():
            yield number, line


def description(file: Path, where: str, faults: Faults) -> dict[str, Any] | None:
    """A YAML file as a mapping whose values are text as it is written.

    So a class can be called `on`, `null` or `1.0`. What is nothing becomes an empty text.
    """
    try:
        text = decoded(_within(file, MOST_BYTES))
        data = parse_yaml(text, where, as_written=True)
    except UnicodeDecodeError as error:
        faults.add(where, f"not YAML ({error.reason} at byte {error.start:,})", "save it as UTF-8")
        return None
    except InputError as error:
        what, _, remedy = str(error).removeprefix(f"{where}: ").partition("; ")
        faults.add(where, what, remedy or "correct the file")
        return None
    except OSError as error:
        faults.add(where, f"cannot be read ({error.strerror})", "make it readable")
        return None
    if not isinstance(data, dict):
        faults.add(where, f"holds {data!r:.200}", "give it the keys train, val and names")
        return None
    for key, line in _twice(yaml.compose(text, Loader=yaml.CBaseLoader)):
        faults.add(f"{where}, line {line}", f"key {key!r} stands there twice", "take out one of the two")
    return data


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys of a mapping, and of the mappings in it, that stand there more than once, and their lines."""
    known: set[str] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if isinstance(key, yaml.ScalarNode):
            if key.value in known:
                yield key.value, key.start_mark.line + 1
            known.add(key.value)
        yield from _twice(value)


def json_lists(
    file: Path,
    where: str,
    faults: Faults,
    lists: Mapping[str, Callable[[], Items]],
    most_bytes: int,
    most_values: int,
) -> dict[str, Any]:
    """What a JSON file holds, or nothing where it can't be read, breaks a bound or is no object.

    Args:
        file: The file.
        where: How messages call it.
        faults: Takes what is wrong.
        lists: What takes the items of its lists.
        most_bytes: Bytes that it may have.
        most_values: Values that it may hold.
    """
    try:
        return read_lists(file, where, lists, most_bytes=most_bytes, most_values=most_values) or {}
    except InputError as error:
        what, _, remedy = str(error).removeprefix(f"{where}: ").partition("; ")
        faults.add(where, what, remedy or "correct it or export it again")
    except OSError as error:
        faults.add(where, f"cannot be read ({error.strerror})", "make it readable")
    return {}


def _within(file: str | Path, most: int) -> bytes:
    with open(file, "rb") as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise InputError(f"more than {most:,} bytes")
    return data


def checked_names(names: list[str], where: str, faults: Faults) -> tuple[str, ...]:
    """Class names, after a look whether each is there and its own."""
    if len(names) > MOST_CLASSES:
        faults.add(where, f"{len(names):,} classes, more than {MOST_CLASSES:,}", "take out those that no box has")
        return tuple(names)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
        if not name.strip():
            faults.add(where, f"class {i} has an empty name", "name it")
    for name, found in sorted(places.items()):
        if len(found) > 1:
            faults.add(where, f"class name {name!r} stands for {found}", "give every class its own name")
    return tuple(names)
