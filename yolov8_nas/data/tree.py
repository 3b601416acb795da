"""The files of a folder, links followed, and files that a description names in its own way."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Walk:
    """What lies below a folder.

    Attributes:
        files: Paths of the files, in the order of their names.
        hidden: Files and folders that are hidden, or belong to a system or a tool.
        unusable: What is neither file nor folder: links that lead nowhere or in a circle, pipes; and why.
    """

    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that people don't see, or that a system made for itself."""
    return name.startswith((".", "@")) or name in ("__MACOSX", "$RECYCLE.BIN", "System Volume Information")


def walk(folder: str | Path) -> Walk:
    """List everything below a folder; linked folders are entered, but not in circles.

    Raises:
        OSError: A folder can't be read.
    """
    found = Walk()
    _enter(os.fspath(folder), found, ())
    return found


def _enter(folder: str, found: Walk, above: tuple[tuple[int, int], ...]) -> None:
    state = os.stat(folder)
    here = (state.st_dev, state.st_ino)
    if here in above:
        found.unusable[folder] = "a link to a folder above it"
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith(".") or (is_hidden(entry.name) and entry.is_dir()):
            found.hidden.append(entry.path)
        elif entry.is_dir():
            _enter(entry.path, found, (*above, here))
        elif entry.is_file():
            found.files.append(entry.path)
        else:
            found.unusable[entry.path] = "a link that leads nowhere" if entry.is_symlink() else "no file"


def folders(root: Path, depth: int) -> Iterator[list[Path]]:
    """The folders below one, level by level."""
    level = [root]
    for _ in range(depth + 1):
        yield level
        level = [
            path
            for folder in level
            for path in sorted(folder.iterdir())
            if path.is_dir() and not is_hidden(path.name) and not path.is_symlink()
        ]


class Places:
    """Finds files that a description names: with another machine's folders before them, or in another spelling.

    Args:
        files: Paths of the files that may be meant.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = {}
        for path in files:
            self._by_name.setdefault(_spelled(os.path.basename(path)), []).append(path)

    def find(self, name: str, folders: Sequence[str | Path]) -> str | None:
        """The file that a name means, below one of some folders or else anywhere; nothing where that is not clear."""
        parts = parts_of(name)
        for start in range(len(parts)):
            for folder in folders:
                path = os.path.join(folder, *parts[start:])
                if os.path.isfile(path):
                    return path
        for spelled in dict.fromkeys((name, unquote(name))):
            parts = [_spelled(part) for part in parts_of(spelled)]
            if not parts:
                continue
            close: dict[int, list[str]] = {}
            for path in self._by_name.get(parts[-1], []):
                close.setdefault(_in_common(parts, [_spelled(part) for part in path.split(os.sep)]), []).append(path)
            if close and len(closest := close[max(close)]) == 1:
                return closest[0]
        return None


def parts_of(name: str) -> list[str]:
    """The parts of a path as any system or tool writes it, without what leads out of a folder."""
    name = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]+://[^/]*/|^[A-Za-z]:(?=[\\/])", "", name.strip())
    return [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..")]


def _spelled(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _in_common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
