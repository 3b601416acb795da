"""An analysis as one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from yolov8_nas.analysis import tables
from yolov8_nas.analysis.figures import NETWORK, Analysis, Speed
from yolov8_nas.files import atomic_write
from yolov8_nas.foreign import html
from yolov8_nas.report import plots
from yolov8_nas.report.plots import Figure, Plot, axes
from yolov8_nas.report.wording import number, shown

_OWN: Final = Path(__file__).parent
_STYLE: Final = Path(plots.__file__).parent / "templates"
_COLOURS: Final = ("@series-1", "@series-2", "@series-4", "@series-3", "@series-5", "@series-6", "@muted", "@faint")
_POINTS: Final = 30
"""Operators in the plot of the roofline."""


def write_page(analysis: Analysis, file: Path) -> None:
    """Write an analysis as a page; it makes no request, and its content security policy forbids any."""
    environment = Environment(
        loader=FileSystemLoader(_OWN),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    figures = {"frame": _frame(analysis), "roofline": _roofline(analysis), "sweep": _sweep(analysis)}
    content = environment.get_template("page.html").render(
        analysis=analysis,
        name=Path(analysis.model["file"]).name,
        heading=tables.heading(analysis),
        recommendation=tables.recommendation(analysis),
        frame=tables.frame(analysis),
        network=tables.all_tables(analysis)[1:-1],
        sweep=tables.sweep(analysis),
        plots=figures,
        style=Markup((_STYLE / "report.css").read_text()),
        script=Markup((_STYLE / "report.js").read_text()),
        plotly=Markup(get_plotlyjs()),
    )
    atomic_write(file, content)


def _frame(analysis: Analysis) -> Plot:
    """One bar of a frame, inference cut into parts of the network."""
    pieces: list[tuple[str, float]] = []
    for part in analysis.frame.parts:
        if part.name == NETWORK and analysis.sections:
            pieces += [(section.name, section.ms) for section in analysis.sections]
        elif part.timing:
            pieces.append((part.name, part.timing.latency_ms.p50))
    total = sum(ms for _, ms in pieces)
    data: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [ms],
            "y": [""],
            "marker": {"color": _COLOURS[place % len(_COLOURS)]},
            "text": f"{ms / total:.0%}",
            "textposition": "inside",
            "insidetextanchor": "middle",
            "hovertemplate": f"{name}: {number(ms)} ms<extra></extra>",
        }
        for place, (name, ms) in enumerate(pieces)
    ]
    layout = axes("ms", "") | {"barmode": "stack"}
    layout["yaxis"] |= {"showticklabels": False}
    layout["legend"] |= {"traceorder": "normal"}
    label = ", ".join(f"{name} {number(ms)} ms ({ms / total:.0%})" for name, ms in pieces)
    return Plot(
        "plot-frame", "One run, part by part", f"A stacked bar: {label}.", {"data": data, "layout": layout}, height=170
    )


def _roofline(analysis: Analysis) -> Plot | None:
    """Parts of the network and its heaviest operators under the two lines of what the device can do."""
    roofline, roof = analysis.roofline, analysis.roof
    if roofline is None:
        return None
    heavy = sorted(analysis.operators, key=lambda operator: -operator.ms)[:_POINTS]
    parts = _reached((section.name, section.speed) for section in analysis.sections)
    layers = _reached((operator.layer, analysis.speed([operator])) for operator in heavy)
    if not parts and not layers:
        return None
    reach = [x for _, x, _ in parts + layers]
    low, high = min([*reach, roofline.ridge(roof)]) / 3, max([*reach, roofline.ridge(roof)]) * 3
    corner = roofline.ridge(roof)
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "attainable",
            "x": [low, corner, high],
            "y": [1000 * roofline.attainable(roof, x) for x in (low, corner, high)],
            "line": {"width": 2, "color": "@muted"},
            "hovertemplate": "%{x:.3g} FLOP/byte: %{y:.3g} GFLOP/s",
        },
        _dots("operators", layers, {"size": 7, "color": "@faint"}),
        _dots("parts", parts, {"size": 12, "color": "@series-1", "symbol": "diamond"}),
    ]
    layout = axes("operations per byte", "GFLOP/s")
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"type": "log", "dtick": 1, "exponentformat": "none"}
    told = "; ".join(f"{name} {number(y)} GFLOP/s at {number(x)} operations per byte" for name, x, y in parts)
    return Plot(
        "plot-roofline",
        "Roofline",
        f"Both axes are logarithmic. {told}.",
        {"data": [trace for trace in data if trace["x"]], "layout": layout},
        "Under the slope memory is the limit, under the flat line arithmetic. What stays in the caches can lie above.",
    )


def _reached(named: Iterable[tuple[str, Speed]]) -> list[tuple[str, float, float]]:
    """Name, operations per byte and GFLOP/s of what has both."""
    return [(name, s.intensity, 1000 * s.tops) for name, s in named if s.intensity and s.tops]


def _dots(name: str, points: Sequence[tuple[str, float, float]], marker: Mapping[str, Any]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for _, x, _ in points],
        "y": [y for _, _, y in points],
        "text": [html(label) for label, _, _ in points],
        "marker": dict(marker),
        "hovertemplate": "%{text}<br>%{x:.3g} FLOP/byte, %{y:.3g} GFLOP/s<extra></extra>",
    }


def _sweep(analysis: Analysis) -> Plot | None:
    """Latency against throughput, a line for each number of streams."""
    if len(analysis.settings) < 2:
        return None
    layout = axes("p50 from pictures to boxes (ms)", "images per second")
    layout["yaxis"]["rangemode"] = layout["xaxis"]["rangemode"] = "tozero"
    data = list(_lines(analysis))
    if chosen := analysis.recommendation:
        best = [s for s in analysis.settings if (s.batch, s.streams) == (chosen.batch, chosen.streams)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "recommended",
                "x": [s.timing.latency_ms.p50 for s in best],
                "y": [s.images_per_s for s in best],
                "marker": {"size": 17, "color": "@series-4", "symbol": "circle-open", "line": {"width": 3}},
                "hoverinfo": "skip",
            }
        )
    return Plot(
        "plot-sweep", "Latency and throughput", tables.recommendation(analysis), {"data": data, "layout": layout}
    )


def _lines(analysis: Analysis) -> Iterator[Figure]:
    for place, streams in enumerate(sorted({setting.streams for setting in analysis.settings})):
        same = [setting for setting in analysis.settings if setting.streams == streams]
        yield {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"{streams} stream{'s' * (streams != 1)}",
            "x": [setting.timing.latency_ms.p50 for setting in same],
            "y": [setting.images_per_s for setting in same],
            "text": [f"batch {setting.batch}" for setting in same],
            "line": {"width": 2, "color": _COLOURS[place % len(_COLOURS)]},
            "marker": {"size": 8, "color": _COLOURS[place % len(_COLOURS)]},
            "hovertemplate": "%{text}: %{x:.3g} ms, %{y:.3g} images/s",
        }
