"""Progress: JSON lines for the display, plain lines for people, and nothing that can stop a stage."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from yolov8_nas.runner.display import Display
from yolov8_nas.runner.progress import FILE_VARIABLE, Progress, duration


def _events(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_events_hold_what_a_display_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.jsonl"
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    progress = Progress.from_environment("search", "cpu-fp32")
    progress.started()
    progress.update(1, 4, "generation 1 of 4", map50_95=0.25, latency_ms=math.nan)
    progress.update(4, 4, "generation 4 of 4")
    progress.note("the front was measured")
    progress.finished("failed", 3.0, "no network keeps the limit")
    started, first, last, note, finished = _events(file)
    assert (started["stage"], started["target"]) == ("search", "cpu-fp32")
    assert first["figures"] == {"map50_95": 0.25}, "a figure that is no number is left out"
    assert (first["eta"], last["eta"]) == (None, 0)
    assert note["message"] == "the front was measured"
    assert (finished["status"], finished["error"]) == ("failed", "no network keeps the limit")


def test_lines_are_throttled(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("search")
    for i in range(100):
        progress.update(i, 100, f"step {i}")
    progress.update(100, 100, "step 100")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["[search]   0%, step 0", "[search] 100%, step 100"]


def test_trouble_with_the_file_stops_nothing(tmp_path: Path) -> None:
    progress = Progress("search", file=tmp_path / "missing" / "progress.jsonl", lines=False)
    progress.update(1, 0)
    progress.note("fine")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (12.4, "12 s"), (185, "3 min 05 s"), (59.7, "60 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_display_tells_each_stage_in_lines(tmp_path: Path) -> None:
    file, out = tmp_path / "progress.jsonl", io.StringIO()
    stages = [("data-prep", None), ("hw-probe", "cpu-fp32"), ("search", "cpu-fp32")]
    with Display(file, stages, Console(file=out, width=120)) as display:
        prep = Progress("data-prep", file=file, lines=False)
        prep.started()
        prep.update(1, 2, "320 images")
        display.poll()
        prep.finished("done", 2.0)
        probe = Progress("hw-probe", "cpu-fp32", file=file, lines=False)
        probe.started()
        probe.finished("failed", 1.0, "the fit is poor")
        probe.started()  # stands twice in the pipeline
        probe.finished("cached", 0.1)
        with file.open("a") as half:
            half.write('{"stage": "sea')
    text = out.getvalue()
    assert "data-prep: done in 2.0 s" in text
    assert "hw-probe (cpu-fp32): failed in 1.0 s: the fit is poor" in text
    assert "cached" not in text
    table = Console(width=120, record=True, file=io.StringIO())
    table.print(display.render())
    assert "the fit is poor" in table.export_text()
