"""The verdict as a table for the terminal, at the end of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from yolov8_nas.report import wording
from yolov8_nas.runner.results import StockFile
from yolov8_nas.runner.results.summary import Baseline, Model, Summary, Target

_OUTCOMES: Final = {True: ("kept", "green"), False: ("missed", "red"), None: ("not measured", "yellow")}


def verdict(summary: Summary) -> RenderableType:
    """What a run came to, target by target: the limits as measured, and searched beside stock."""
    retraining = summary.run.retraining
    if retraining and not retraining.new:
        return Text(f"\n{retraining.says}")
    if not summary.targets:
        failed = [row.name for row in summary.stages if row.status == "failed"]
        return Text(f"No target was reached: {', '.join(failed) or 'no stage'} failed.", style="bold red")
    parts: list[RenderableType] = [Text(f"\n{retraining.says}")] if retraining else []
    for target in summary.targets:
        parts += [_heading(target), *_limits(target), _networks(target)]
        if compared := target.comparison:
            other = wording.stock_name(compared.against)
            parts.append(Text(wording.comparison_sentence(compared, "The shipped network", other)))
            parts += _told(wording.decided_by_sentence(compared.decided_by))
        parts += _told(wording.rare_sentence(target.classes))
        parts += _told(wording.choose_sentence(target.registry, target.hardware.name))
        if target.gate:
            parts.append(Text(wording.gate(target.gate)))
    return Group(*parts)


def next_steps(summary: Summary, workdir: Path) -> list[str]:
    """What to do after a run, in three lines at most, each with a command or a file.

    Args:
        summary: What the run came to.
        workdir: The work folder of the run.
    """
    folder = shlex.quote(str(workdir))
    if summary.run.retraining and not summary.run.retraining.new:
        return []
    if not summary.targets:
        return [f"correct what failed, and give the same command again: what is done is kept in {folder}"]
    shipped = [target for target in summary.targets if target.model]
    if not shipped:
        return [
            f"see in {workdir / 'report.html'} how far each candidate is from the limits (Candidates walked)",
            "raise the limit, or tune more networks (--set finetune.candidates=4), and give the command again:",
            "  supernet, latency tables and trainings that stay the same are not made again",
        ]
    steps = [f"look at what both networks miss: {workdir / 'report.html'}"]
    if entry := next((target.registry for target in shipped if target.registry), None):
        model = shlex.quote(f"{entry.model}/{entry.version}")
        steps.append(f"before it is released: yolov8-nas models show {model} --workdir {folder}")
    if len(shipped) == 1:
        steps.append(f"serve it: yolov8-nas package {folder} --out serving")
    else:
        steps.append(f"serve one: yolov8-nas package {workdir / 'models' / 'TARGET' / 'model.onnx'} --out serving")
    return steps


def _told(sentence: str) -> list[Text]:
    return [Text(sentence)] if sentence else []


def _heading(target: Target) -> Text:
    named = [target.hardware.model, target.hardware.name, target.runtime.name]
    return Text("\n" + ", ".join(part for part in named if part), style="bold")


def _limits(target: Target) -> list[Text]:
    lines = [
        Text.assemble(
            f"{wording.quantity(row)} {wording.with_unit(row.measured, row.unit)}, limit {wording.bound(row)}: ",
            _OUTCOMES[row.met],
        )
        for row in target.constraints
    ]
    return lines + ([Text(target.error, style="red")] if target.error else [])


def _networks(target: Target) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("network")
    for heading in ("mAP50-95", "p50, ms", "p90, ms", "p99, ms", "memory, MiB"):
        table.add_column(heading, justify="right")
    rows: list[tuple[str, Model | StockFile | Baseline]] = []
    if target.model:
        rows.append((f"searched, {wording.precision(target.precision_shipped)} (shipped)", target.model))
    for stock in target.baselines:
        named = wording.stock_name(stock.name)
        rows.append((f"{named}, {stock.form}" if isinstance(stock, StockFile) else named, stock))
    for name, row in rows:
        table.add_row(
            Text(name),
            wording.score(row.map50_95),
            *(wording.number(value) for _, value in row.latency_ms),
            wording.ABSENT if isinstance(row, Baseline) else wording.whole(row.memory_mb),
        )
    return table
