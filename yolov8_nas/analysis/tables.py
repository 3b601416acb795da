"""The figures of an analysis as rows of text, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from yolov8_nas.analysis.figures import NETWORK, Analysis, Speed
from yolov8_nas.report.wording import ABSENT, is_number, number, whole

HEAVIEST: Final = 12
"""Operators that are listed."""


@dataclass(frozen=True)
class Figures:
    """A table.

    Attributes:
        title: What it is about.
        columns: Headings; the first `words` columns hold words, the others numbers.
        rows: Cells, as many as there are columns.
        words: How many columns hold words.
        note: What to bear in mind.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    note: str = ""


def heading(analysis: Analysis) -> str:
    """What was analysed, in one line."""
    device, runtime, model = analysis.device, analysis.device["runtime"], analysis.model
    return (
        f"{device['name']} ({device['model']}), {runtime['name']} {runtime['version']}, {model['precision']}, "
        f"{model['imgsz']} px, {images(analysis.frame.batch)} per run; pictures: {model['pictures']}"
    )


def images(count: int) -> str:
    """A number of images."""
    return f"{count} image{'s' * (count != 1)}"


def all_tables(analysis: Analysis) -> list[Figures]:
    """Every table there is something for, in reading order."""
    tables = [frame(analysis)]
    if analysis.trace:
        tables += [sections(analysis), operators(analysis)]
    return [*tables, sweep(analysis)]


def frame(analysis: Analysis) -> Figures:
    """Where the time of a frame goes."""
    way, rows = analysis.frame, []
    for part in way.parts:
        timing = part.timing
        latency = timing and timing.latency_ms
        figures = [number(latency.p50), number(latency.p90), _share(way.share(part.name))] if latency else []
        rows.append([part.name, *(figures or [ABSENT] * 3), part.note])
        if part.name == NETWORK and len(analysis.sections) > 1:
            rows += [
                [f"  {section.name}", number(section.ms), "", _share(section.share * way.share(NETWORK)), ""]
                for section in analysis.sections
            ]
    rows.append(
        ["all in one loop", number(way.whole.latency_ms.p50), number(way.whole.latency_ms.p90), "", _busy(analysis)]
    )
    low, high = way.whole.interval_ms
    note = (
        f"{way.whole.repetitions} runs in {len(way.whole.rounds)} rounds, 95% interval of the loop's p50 "
        f"{number(low)} to {number(high)} ms; parts are timed alone, so they need not add up to it."
    )
    if analysis.trace:
        note += " Inference is split by operator times under the profiler."
    columns = ["one frame" if way.batch == 1 else f"{way.batch} frames", "p50, ms", "p90, ms", "share", ""]
    return Figures("Where the time goes", columns, rows, note=note)


def _busy(analysis: Analysis) -> str:
    busy = analysis.frame.busy
    return "" if busy is None else f"device busy {_share(busy)} of it"


def sections(analysis: Analysis) -> Figures:
    """Parts of the network."""
    trace = analysis.trace
    assert trace
    rows = [
        [
            section.name,
            _share(section.share),
            _share(section.flops_share),
            whole(section.launches),
            *_speed(section.speed),
        ]
        for section in analysis.sections
    ]
    everything = analysis.operators
    rows.append(["all", "", "", whole(trace.launches), *_speed(analysis.speed(everything))])
    columns = ["part", "time", "FLOPs", trace.launched, *_SPEED]
    return Figures("Parts of the network", columns, rows, note=_limits(analysis))


def operators(analysis: Analysis) -> Figures:
    """The operators that take the longest."""
    found = sorted(analysis.operators, key=lambda operator: -operator.ms)
    total = sum(operator.ms for operator in found)
    rows = [
        [
            operator.layer,
            operator.kind,
            number(operator.ms),
            _share(operator.ms / total, 1),
            *_speed(analysis.speed([operator])),
        ]
        for operator in found[:HEAVIEST]
    ]
    return Figures("Heaviest operators", ["layer", "operator", "ms", "share", *_SPEED], rows, words=2)


def sweep(analysis: Analysis) -> Figures:
    """Images per run and networks at once."""
    chosen = analysis.recommendation
    rows = []
    for setting in analysis.settings:
        latency = setting.timing.latency_ms
        best = chosen and (setting.batch, setting.streams) == (chosen.batch, chosen.streams)
        rows.append(
            [
                "recommended" if best else "",
                whole(setting.batch),
                whole(setting.streams),
                whole(setting.threads),
                number(latency.p50),
                number(latency.p90),
                number(setting.images_per_s),
                whole(setting.memory_mb),
            ]
        )
    columns = ["", "batch", "streams", "threads each", "p50, ms", "p90, ms", "images/s", "MiB"]
    note = (
        "From pictures to boxes, each stream with a network and a thread of its own; memory is that of one network as "
        "measured, times the streams."
    )
    return Figures("Batches and streams", columns, rows, note=note)


def recommendation(analysis: Analysis) -> str:
    """The setting to use, in words."""
    chosen = analysis.recommendation
    if chosen is None:
        return "No setting was measured to leave 20% of the memory free."
    if chosen.videos:
        takes = f"takes {chosen.videos} video stream{'s' * (chosen.videos != 1)} of {chosen.fps:g} frames per second"
    else:
        takes = f"does not keep up with a video stream of {chosen.fps:g} frames per second"
    at_once = f"{chosen.streams} stream{'s' * (chosen.streams != 1)}"
    return f"Recommended: batch {chosen.batch} in {at_once}, which {takes}: {chosen.reason}."


_SPEED: Final = ("GFLOP/s", "GB/s", "FLOP/byte", "of roof")


def _speed(found: Speed) -> list[str]:
    tops = found.tops and 1000 * found.tops
    return [number(tops), number(found.gbs), number(found.intensity), _share(found.share)]


def _share(value: float | None, decimals: int = 0) -> str:
    return f"{value:.{decimals}%}" if is_number(value) else ABSENT


def _limits(analysis: Analysis) -> str:
    roofline = analysis.roofline
    if roofline is None:
        return "What the device can do at most was not measured."
    return (
        f"Measured limits of the device: {number(1000 * roofline.tops[analysis.roof])} GFLOP/s in "
        f"{analysis.roof.upper()}, {number(roofline.bandwidth_gbs)} GB/s; "
        "the roof at so many operations per byte is the lower of the two. What stays in the caches can exceed it."
    )
