"""The text files of a dataset, read with their faults named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from yolov8_nas.data.faults import Faults

MOST_CLASSES: Final = 10_000
MOST_LABELS: Final = 2**20
"""Bytes of the label file of an image."""


def shown(path: Path, root: Path) -> str:
    """How messages call a file: by its path in the dataset."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def lines(file: Path, where: str, faults: Faults, most: int = MOST_LABELS) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold something, with their numbers.

    Args:
        file: The file.
        where: How messages call it.
        faults: Takes what is wrong.
        most: How many bytes it may have.
    """
    try:
        if (size := file.stat().st_size) > most:
            faults.add(where, f"{size:,} bytes, more than {most:,}", "take out what does not belong to it")
            return
        with file.open(encoding="utf-8-sig") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        faults.add(where, "not UTF-8 text", "write it again as plain text")
    except OSError as error:
        faults.add(where, f"cannot be read ({error.strerror})", "make it readable")


def checked_names(names: list[str], where: str, faults: Faults) -> tuple[str, ...]:
    """Class names, after a look whether each is there and its own."""
    if len(names) > MOST_CLASSES:
        faults.add(where, f"{len(names):,} classes, more than {MOST_CLASSES:,}", "take out those that no box has")
        return tuple(names)
    for name in sorted(name for name, count in Counter(names).items() if count > 1):
        places = [i for i, other in enumerate(names) if other == name]
        faults.add(where, f"class name {name!r} stands for {places}", "give every class its own name")
    for i, name in enumerate(names):
        if not name.strip():
            faults.add(where, f"class {i} has an empty name", "name it")
    return tuple(names)
