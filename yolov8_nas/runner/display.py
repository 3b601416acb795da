"""Shows the progress of a local run: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from yolov8_nas.runner.progress import describe, duration

_LINE_EVERY: Final = 15.0
_MARKS: Final = {
    "waiting": Text("·", style="dim"),
    "running": Text("▶", style="cyan"),
    "done": Text("✓", style="green"),
    "cached": Text("✓", style="dim green"),
    "failed": Text("✗", style="red"),
}


@dataclass
class _Row:
    """What is known of one stage."""

    stage: str
    target: str | None
    status: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    done: float = 0.0
    total: float = 0.0
    message: str = ""
    eta: float | None = None
    eta_from: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    last_line: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.stage} ({self.target})" if self.target else self.stage


class Display:
    """Follows the progress file of a run.

    Args:
        file: File of JSON lines that the stages write; it need not exist yet.
        stages: The stages and targets to expect, in order.
        console: Where to show them.
    """

    def __init__(self, file: Path, stages: Sequence[tuple[str, str | None]], console: Console) -> None:
        self.file = file
        self.console = console
        self.rows = {pair: _Row(*pair) for pair in stages}
        self._offset = 0
        self._start = time.time()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.poll()
        if self._live:
            self._live.__exit__(None, None, None)

    def poll(self) -> None:
        """Take in what was written since the last call."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take(json.loads(line))

    def render(self) -> Table:
        """The table of all stages, as of now."""
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in self.rows.values():
            running = row.status == "running"
            elapsed = time.time() - row.started if running else row.seconds
            bar = ProgressBar(total=row.total or None, completed=row.done, width=16) if running and row.total else ""
            table.add_row(
                _MARKS[row.status],
                Text(row.name, style="" if row.status != "waiting" else "dim"),
                Text(duration(elapsed) if row.status != "waiting" else "", style="dim"),
                Text(self._detail(row), style="red" if row.status == "failed" else ""),
            )
            if bar:
                table.add_row("", "", "", bar)
        table.add_row("", Text("total", style="dim"), Text(duration(time.time() - self._start), style="dim"), "")
        return table

    def _detail(self, row: _Row) -> str:
        if row.status == "waiting":
            return ""
        if row.status == "cached":
            return "found in the store"
        if row.status != "running" or not row.total:
            return row.message
        eta = None if row.eta is None else max(row.eta - (time.time() - row.eta_from), 0.0)
        return describe(row.done, row.total, row.message, eta, row.figures)

    def _take(self, event: dict[str, Any]) -> None:
        key = (event["stage"], event["target"])
        row = self.rows.setdefault(key, _Row(*key))
        kind = event["event"]
        if kind == "started" and row.status == "waiting":
            row.status, row.started = "running", event["time"]
            self._line(row, "begins")
        elif kind == "progress" and row.status == "running":
            row.done, row.total, row.message = event["done"], event["total"], event["message"]
            row.eta, row.eta_from, row.figures = event["eta"], event["time"], event["figures"]
            if event["time"] - row.last_line >= _LINE_EVERY:
                row.last_line = event["time"]
                self._line(row, describe(row.done, row.total, row.message, row.eta, row.figures))
        elif kind == "note":
            row.message = event["message"]
            self._line(row, event["message"])
        elif kind == "told":
            for line in event["lines"]:
                self.console.print(f"{row.name}: {line}", markup=False, highlight=False, soft_wrap=True)
        elif kind == "finished" and row.status not in ("done", "failed"):
            row.status, row.seconds = event["status"], event["seconds"]
            row.message = event["error"] or _best(row.figures)
            tail = f": {row.message}" if row.message else ""
            self._line(row, f"{row.status} in {duration(row.seconds)}{tail}")

    def _line(self, row: _Row, text: str) -> None:
        if self._live is None:
            elapsed = duration(time.time() - self._start)
            self.console.print(f"[{elapsed:>12}] {row.name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _best(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
