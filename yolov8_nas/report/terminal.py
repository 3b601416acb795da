"""The verdict as a table for the terminal, at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from yolov8_nas.report import wording
from yolov8_nas.report.evidence import mapping, pick, records


def verdict(summary: Mapping[str, Any]) -> RenderableType:
    """What a run came to, target by target: the limits as measured, and searched beside stock.

    Args:
        summary: The content of `summary.json`.
    """
    targets, retraining = records(summary.get("targets")), mapping(pick(summary, "run", "retraining"))
    if retraining and not retraining.get("new"):
        return Text(f"\n{retraining.get('says')}")
    if not targets:
        failed = [str(row.get("name")) for row in records(summary.get("stages")) if row.get("status") == "failed"]
        return Text(f"No target was reached: {', '.join(failed) or 'no stage'} failed.", style="bold red")
    parts: list[RenderableType] = [Text(f"\n{retraining['says']}")] if retraining else []
    for target in targets:
        parts += [_heading(target), *_limits(target), _networks(target)]
        comparison = mapping(target.get("comparison"))
        if wording.is_number(comparison.get("difference")):
            other = wording.stock_name(comparison.get("against") or pick(target.get("baselines"), 0, "name"))
            parts.append(Text(wording.comparison_sentence(comparison, "The shipped network", other)))
        if gate := mapping(target.get("gate")):
            parts.append(Text(wording.gate(gate)))
    return Group(*parts)


def _heading(target: Mapping[str, Any]) -> Text:
    hardware = mapping(target.get("hardware"))
    named = [hardware.get("model"), hardware.get("name"), pick(target, "runtime", "name")]
    return Text("\n" + (", ".join(str(part) for part in named if part) or "unknown device"), style="bold")


def _limits(target: Mapping[str, Any]) -> list[Text]:
    lines = []
    for row in records(target.get("constraints")):
        match row.get("met"):
            case True:
                outcome = ("kept", "green")
            case False:
                outcome = ("missed", "red")
            case _:
                outcome = ("not measured", "yellow")
        measured = wording.with_unit(row.get("measured"), str(row.get("unit", "")))
        lines.append(Text.assemble(f"{wording.quantity(row)} {measured}, limit {wording.limit(row)}: ", outcome))
    if target.get("error"):
        lines.append(Text(str(target["error"]), style="red"))
    return lines


def _networks(target: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("network")
    for heading in ("mAP50-95", "p50, ms", "p90, ms", "p99, ms", "memory, MiB"):
        table.add_column(heading, justify="right")
    model = mapping(target.get("model"))
    shipped = f"searched, {wording.precision(target.get('precision_shipped'))} (shipped)"
    rows = [(shipped, model)] if model else []
    for row in records(target.get("baselines")):
        named = wording.stock_name(row.get("name"))
        rows.append((f"{named}, {row['form']}" if row.get("form") else named, row))
    for name, row in rows:
        latency = mapping(row.get("latency_ms"))
        table.add_row(
            Text(name),
            wording.score(row.get("map50_95")),
            *(wording.number(latency.get(key)) for key in ("p50", "p90", "p99")),
            wording.whole(row.get("memory_mb")),
        )
    return table
