"""What an earlier check found out about images and label files, so that unchanged ones are not opened again.

It lies in the user's cache folder, and is only ever an economy: without it everything is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Final

import cv2
import PIL

from yolov8_nas.data.images import VERSION, Facts

_SETTLED: Final = 2_000_000_000
"""Nanoseconds that a file must have rested: what changes twice within a clock's tick has one time."""

_LASTS: Final = 90 * 24 * 3600  # seconds that what is known of a dataset is kept without being asked for
_TOGETHER: Final = 2000  # images that are written at once, so that a check that is cut off goes on there


def folder() -> Path | None:
    """The cache folder, as the XDG base directories say, or nothing where the user has none."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "yolov8-nas" / "checks"


class Known:
    """Facts about the files of one dataset by path, size and times.

    Args:
        file: The database, or nothing to know nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._database: sqlite3.Connection | None = None
        self._waiting: dict[str, list[tuple[str, str, str | bytes]]] = {"images": [], "labels": []}
        if file is not None and file.is_file():
            self._open(file)

    def _open(self, file: Path) -> None:
        with contextlib.suppress(OSError, sqlite3.Error):
            file.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(file, timeout=5, isolation_level=None)
            database.execute("CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, state TEXT, facts TEXT)")
            database.execute("CREATE TABLE IF NOT EXISTS labels (path TEXT PRIMARY KEY, state TEXT, boxes BLOB)")
            file.touch()
            self._database = database

    @classmethod
    @contextlib.contextmanager
    def of(cls, source: Path | None) -> Iterator[Known]:
        """What is known of a dataset's folder; nothing for one that is gone after the check."""
        place = folder() if source is not None else None
        name = hashlib.sha256(os.fsencode(str(source))).hexdigest()[:24]
        known = cls(place / f"{name}.sqlite" if place else None)
        try:
            yield known
        finally:
            known.close()

    def facts(self, path: str, state: str) -> Facts | None:
        """What is known of an image in a state."""
        try:
            sha256, width, height, suffix, kept, remarks, *rest = json.loads(self._found("images", path, state) or "")
            return Facts(sha256, width, height, suffix, kept, tuple(remarks), *rest)
        except (ValueError, TypeError):
            return None

    def keep(self, path: str, state: str, facts: Facts) -> None:
        """Note what was found out about an image."""
        self._note("images", path, state, json.dumps(astuple(facts)))

    def boxes(self, path: str, state: str) -> bytes | None:
        """The boxes of a label file in a state, as `keep_boxes` got them."""
        found = self._found("labels", path, state)
        return found if isinstance(found, bytes) else None

    def keep_boxes(self, path: str, state: str, boxes: bytes) -> None:
        """Note the boxes of a label file in which there is nothing to remark on."""
        self._note("labels", path, state, boxes)

    def _found(self, table: str, path: str, state: str) -> str | bytes | None:
        if self._database is None:
            return None
        try:
            row = self._database.execute(f"SELECT * FROM {table} WHERE path = ?", (_text(path),)).fetchone()
        except sqlite3.Error:
            return None
        return row[2] if row is not None and row[1] == state else None

    def _note(self, table: str, path: str, state: str, content: str | bytes) -> None:
        if self._file is not None and state:
            self._waiting[table].append((_text(path), state, content))
            if len(self._waiting[table]) >= _TOGETHER:
                self._write()

    def close(self) -> None:
        """Write what waits."""
        if any(self._waiting.values()):
            self._write()
        if self._database is not None:
            self._database.close()
            self._database = None

    def _write(self) -> None:
        assert self._file is not None
        if self._database is None:
            self._open(self._file)
            _forget(self._file.parent)
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("BEGIN")
                for table, rows in self._waiting.items():
                    self._database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", rows)
                self._database.execute("COMMIT")
        for rows in self._waiting.values():
            rows.clear()


def _forget(folder: Path) -> None:
    """Remove what is known of datasets that nobody has checked for long."""
    with contextlib.suppress(OSError):
        for file in folder.glob("*.sqlite"):
            if file.stat().st_mtime < time.time() - _LASTS:
                file.unlink()


def state(path: str) -> str:
    """What changes when a file's content does; empty for one that has changed just now.

    Among it is the time of change of the file's entry, which no program sets.
    """
    found = os.stat(path)
    if max(found.st_mtime_ns, found.st_ctime_ns) > time.time_ns() - _SETTLED:
        return ""
    mark = (
        VERSION,
        cv2.__version__,
        PIL.__version__,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_ino,
    )
    return " ".join(map(str, mark))


def _text(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()
