"""Advice in words: the rows of its tables, and lines of plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from yolov8_nas.runner.progress import duration
from yolov8_nas.runner.results import Advice, Recorded, StageCost, StockSize

SIZES = ("stock network", "p50, ms", "interval, ms", "known from", "limits", "uses")
"""Headings of the table of stock sizes."""


def size_rows(advice: Advice) -> list[tuple[str, ...]]:
    """The rows of the table of stock sizes."""
    return [_size(size, named=len(advice.limits) > 1) for size in advice.sizes]


def _size(size: StockSize, *, named: bool) -> tuple[str, ...]:
    interval = "not known" if size.interval_ms is None else "{:.3g} to {:.3g}".format(*size.interval_ms)
    used = "not known" if size.used is None else f"{size.used:.0%}{f' of {size.limit}' if named else ''}"
    name = f"YOLOv8{size.scale}, {size.precision.upper()}"
    return name, f"{size.latency_ms:.3g}", interval, size.basis, size.outcome, used


def gain(row: Recorded) -> str:
    """A recorded gain as a sentence."""
    return (
        f"{row.difference:+.1f} points of mAP50-95 ({row.low:+.1f} to {row.high:+.1f}, {row.word}) against "
        f"{row.against}, on {row.data} at {row.limit:.0%} of stock's latency ({row.source})"
    )


def gap(advice: Advice) -> str:
    """How far apart the stock sizes lie around the limits."""
    plain = [size for size in advice.sizes if size.precision == advice.precision]
    kept = [size for size in plain if size.outcome == "keeps"]
    missed = [size for size in plain if size.outcome == "misses"]
    if not kept and not missed:
        return "No stock size is known to keep or to miss the limits."
    if not kept:
        first = missed[0]
        share = "" if first.used is None else f": they are {1 / first.used:.0%} of what it takes"
        return f"No stock size is known to keep the limits; YOLOv8{first.scale} misses them{_by(first)}{share}."
    below = kept[-1]
    above = next((size for size in missed if plain.index(size) > plain.index(below)), None)
    if above is None:
        return f"YOLOv8{below.scale} keeps the limits; no larger size is known to miss them."
    apart = above.latency_ms / below.latency_ms
    how = "" if {below.basis, above.basis} == {"measured"} else ", as predicted"
    share = "" if above.used is None else f" The limits are {1 / above.used:.0%} of what YOLOv8{above.scale} takes."
    return (
        f"The limits lie between YOLOv8{below.scale}, which leaves {_spare(below)} unused, and YOLOv8{above.scale}, "
        f"which misses them{_by(above)}: {apart:.2g} times the latency lies between the two{how}.{share}"
    )


def _by(size: StockSize) -> str:
    return "" if size.used is None else f" by {size.used - 1:.0%}"


def _spare(size: StockSize) -> str:
    return "an unknown share" if size.used is None else f"{1 - size.used:.0%}"


def cost(row: StageCost) -> str:
    """How long a stage will take."""
    if row.seconds is None:
        return "not measured"
    if row.low is None or row.high is None:
        return f"about {duration(row.seconds)}"
    return f"{duration(row.seconds)} ({duration(row.low)} to {duration(row.high)})"


def total(costs: Sequence[StageCost]) -> str:
    """How long all stages will take together, at least where one of them is not known."""
    known = math.fsum(row.seconds for row in costs if row.seconds is not None)
    if not known:
        return "not measured"
    least = "" if all(row.seconds is not None for row in costs) else "at least "
    return f"{least}{duration(known)}"


def lines(advice: Advice) -> Iterator[str]:
    """The advice as lines of plain text, the recommendation last."""
    yield f"limits: {' and '.join(advice.limits)}"
    for name, p50, interval, basis, outcome, used in size_rows(advice):
        yield f"{name}: {p50} ms ({interval}; {basis}): {outcome}; uses {used}"
    yield gap(advice)
    for row in advice.gains:
        yield f"a search of ours: {gain(row)}"
    if not advice.gains:
        yield "what a search gains from such a start: no figures of ours"
    for stage in advice.costs:
        yield f"{stage.stage}: {cost(stage)}, {stage.source}"
    yield f"the run from here: {total(advice.costs)}"
    yield advice.recommendation
