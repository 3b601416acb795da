"""The text files of a dataset, read with their faults named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from yolov8_nas.data.faults import Faults


def shown(path: Path, root: Path) -> str:
    """How messages call a file: by its path in the dataset."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def lines(file: Path, where: str, faults: Faults) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold something, with their numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        faults.add(where, "not UTF-8 text", "write it again as plain text")
        return
    except OSError as error:
        faults.add(where, f"cannot be read ({error.strerror})", "make it readable")
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def checked_names(names: list[str], where: str, faults: Faults) -> tuple[str, ...]:
    """Class names, after a look whether each is there and its own."""
    for name in sorted({name for name in names if names.count(name) > 1}):
        places = [i for i, other in enumerate(names) if other == name]
        faults.add(where, f"class name {name!r} stands for {places}", "give every class its own name")
    for i, name in enumerate(names):
        if not name.strip():
            faults.add(where, f"class {i} has an empty name", "name it")
    return tuple(names)
