"""Results that took time, kept so that an interrupted search never asks for them again."""

from __future__ import annotations

from pathlib import Path

from yolov8_nas.files import append_line, read_lines
from yolov8_nas.space import Architecture


class Memo:
    """One number per architecture, in a file of JSON lines that is whole again after a SIGKILL.

    Each number is on disk when `add` returns. A last line that was torn is dropped, and its network is asked for again.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, float] = {
            Architecture.from_dict(record["architecture"]).digest: record["value"] for record in read_lines(path)
        }

    def __contains__(self, architecture: Architecture) -> bool:
        return architecture.digest in self._values

    def __getitem__(self, architecture: Architecture) -> float:
        return self._values[architecture.digest]

    def add(self, architecture: Architecture, value: float) -> None:
        """Remember the number of a network."""
        append_line(self.path, {"architecture": architecture.to_dict(), "value": value})
        self._values[architecture.digest] = value
