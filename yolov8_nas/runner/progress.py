"""How far a stage has come: JSON lines for a display on the same machine, plain lines for everybody else."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from yolov8_nas.credentials import redacted
from yolov8_nas.errors import told
from yolov8_nas.foreign import plain

FILE_VARIABLE: Final = "YOLOV8_NAS_PROGRESS"
"""Environment variable with the file that the command line reads progress from."""

_LINE_EVERY: Final = 10.0
_EVENT_EVERY: Final = 0.2


class Progress:
    """Progress of one stage; whatever goes wrong in telling it never stops the stage.

    Args:
        stage: Name of the stage.
        target: Name of the target, or nothing for a stage that serves all of them.
        file: JSON lines are appended here; nothing for none.
        lines: Whether throttled plain lines go to standard output.
    """

    def __init__(self, stage: str, target: str | None = None, *, file: Path | None = None, lines: bool = True) -> None:
        self.stage = stage
        self.target = target
        self.file = file
        self.lines = lines
        self._first: tuple[float, float] | None = None
        self._last_line = -math.inf
        self._last_event = -math.inf

    @classmethod
    def from_environment(cls, stage: str, target: str | None = None) -> Progress:
        """Progress to the file that `YOLOV8_NAS_PROGRESS` names, if any, and to standard output."""
        name = os.environ.get(FILE_VARIABLE)
        return cls(stage, target, file=Path(name) if name else None)

    @classmethod
    def silent(cls) -> Progress:
        """Progress that nobody is told of, for tests and library use."""
        return cls("", lines=False)

    def update(self, done: float, total: float, message: str = "", **figures: float) -> None:
        """Tell how far the stage has come.

        Args:
            done: Units of work done, of any kind that goes on evenly.
            total: Units of work in all.
            message: The step, for example `epoch 3 of 8`.
            figures: What is worth watching, for example the best mAP so far.
        """
        now, message = time.monotonic(), _one_line(message)
        if self._first is None or done < self._first[1]:
            self._first = (now, done)
        eta = _remaining(now - self._first[0], done - self._first[1], total - done)
        last = done >= total
        if last or now - self._last_event >= _EVENT_EVERY:
            self._last_event = now
            self._event(event="progress", done=done, total=total, message=message, eta=eta, figures=_finite(figures))
        if self.lines and (last or now - self._last_line >= _LINE_EVERY):
            self._last_line = now
            self._print(describe(done, total, message, eta, _finite(figures)))

    def note(self, text: str) -> None:
        """Tell something that happened."""
        text = _one_line(text)
        self._event(event="note", message=text)
        if self.lines:
            self._print(text)

    def tell(self, lines: Iterable[str]) -> None:
        """Tell something that is to stay on the screen, line by line."""
        lines = [_one_line(line) for line in lines]
        self._event(event="told", lines=lines)
        if self.lines:
            for line in lines:
                self._print(line)

    def started(self) -> None:
        """Tell that the stage begins."""
        self._event(event="started")

    def finished(self, status: str, seconds: float, error: str | None = None) -> None:
        """Tell that the stage ended, as `done`, `cached` or `failed`."""
        error = told(error) if error else None
        self._event(event="finished", status=status, seconds=seconds, error=error)
        if self.lines:
            self._print(f"{status} in {duration(seconds)}" + (f": {error}" if error else ""))

    def _event(self, **event: Any) -> None:
        if self.file is None:
            return
        with contextlib.suppress(OSError, TypeError, ValueError):
            line = json.dumps({"time": time.time(), "stage": self.stage, "target": self.target, **event}) + "\n"
            # One write in append mode, so that lines of several stages never mix.
            handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)

    def _print(self, text: str) -> None:
        who = f"{self.stage} ({self.target})" if self.target else self.stage
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"[{who}] {text}\n")
            sys.stdout.flush()


def _one_line(text: str) -> str:
    """Text that may hold text of others: in a log, a line is what a stage has said, and nothing that a name says."""
    return plain(redacted(text))


def describe(done: float, total: float, message: str, eta: float | None, figures: dict[str, float]) -> str:
    """One line of progress, as a person reads it."""
    parts = [f"{100 * min(done / total, 1):3.0f}%" if total > 0 else "  0%"]
    if message:
        parts.append(message)
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()]
    if eta is not None and done < total:
        parts.append(f"{duration(eta)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration as people say it: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _remaining(seconds: float, done: float, left: float) -> float | None:
    return seconds / done * left if done > 0 and seconds > 0 else None


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if math.isfinite(value)}
