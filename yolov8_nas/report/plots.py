"""The report's plots, as Plotly figures in plain JSON.

Colours are names of the page's CSS variables with an `@` in front (`@series-1`): the page's script fills them in, so
that one figure serves light and dark. A plot is written by a dictionary because Plotly's Python objects would refuse
such a colour; the tests check every figure against Plotly's schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from yolov8_nas.foreign import html
from yolov8_nas.report.wording import is_number, milliseconds, number, percent, score
from yolov8_nas.runner.results import PredictionErrors

Figure = dict[str, Any]

_LOSSES: Final = {"box": "box", "cls": "class", "dfl": "DFL", "distill": "distillation"}
COMPARED: Final = ("random", "macs")
"""Sources of networks that the search is compared with."""

_COLUMNS: Final = 60
"""Steps that a heat map shows at most, or nearly so."""

_SURE: Final = 0.9
"""Probability from which a choice counts as settled."""

_SERIES: Final = ("@series-1", "@series-2", "@series-4", "@series-3", "@series-5", "@series-6")


@dataclass(frozen=True)
class Plot:
    """One plot of the page.

    Attributes:
        identity: Unique within the page.
        title: Caption.
        label: What a reader who cannot see the plot should know.
        figure: The Plotly figure, `data` and `layout`.
        note: What to bear in mind when reading it.
        height: In pixels, where it is not the usual one.
    """

    identity: str
    title: str
    label: str
    figure: Figure
    note: str = ""
    height: int | None = None


@dataclass(frozen=True)
class Network:
    """One network that the search evaluated.

    Attributes:
        name: Short digest of its architecture.
        score: mAP50-95 on the search split, with the supernet's weights.
        predicted_ms: Predicted p50 latency.
        measured_ms: Measured p50 latency, where it was measured.
        source: Where it comes from; see `search.evolution.Trial`.
        generation: Generation in which it was evaluated.
    """

    name: str
    score: float
    predicted_ms: float
    measured_ms: float | None = None
    source: str = "evolution"
    generation: int | None = None

    @property
    def latency_ms(self) -> float:
        """Measured p50 latency where it was measured, else the prediction."""
        return self.predicted_ms if self.measured_ms is None else self.measured_ms

    @property
    def searched(self) -> bool:
        """Whether the search found it; the others are there for comparison."""
        return self.source not in COMPARED


@dataclass(frozen=True)
class Front:
    """What the Pareto plot shows.

    Attributes:
        networks: Every evaluated network.
        stock: The stock network, where the search evaluated it.
        shipped: The network that ships.
        limit_ms: Upper limit on p50 latency, where there is one.
        candidates: Networks that were exported and measured.
    """

    networks: Sequence[Network]
    stock: Network | None = None
    shipped: Network | None = None
    limit_ms: float | None = None
    candidates: Sequence[Network] = field(default=())


def pareto_front(networks: Iterable[Network]) -> list[Network]:
    """The networks that no other one beats in both predicted latency and score, from the fastest to the slowest."""
    front: list[Network] = []
    for network in sorted(networks, key=lambda n: (n.predicted_ms, -n.score)):
        if not front or network.score > front[-1].score:
            front.append(network)
    return front


def pareto(identity: str, front: Front) -> Plot:
    """Predicted latency against mAP50-95 on the search split, with the limit, stock and the shipped network."""
    best = pareto_front(n for n in front.networks if n.searched)
    compared = sum(not n.searched for n in front.networks)

    def of(*sources: str) -> list[Network]:
        return [n for n in front.networks if n.source in sources]

    data = [
        _scatter(
            "evaluated",
            [n for n in front.networks if n.searched and n.source not in ("prior", "exact")],
            {"size": 6, "color": "@faint", "opacity": 0.75},
        ),
        _scatter("from the prior", of("prior"), {"size": 7, "color": "@series-6", "symbol": "triangle-up"}),
        _scatter("exact solver", of("exact"), {"size": 8, "color": "@series-5", "symbol": "pentagon"}),
        _scatter("random search", of("random"), _thin_cross("@series-3", "x-thin")),
        _scatter("largest by MACs", of("macs"), _thin_cross("@series-3", "cross-thin")),
        _scatter("front", best, {"size": 8, "color": "@series-1"}, line={"width": 1.5, "color": "@series-1"}),
        _measured(front.candidates),
    ]
    if front.stock:
        marker = {"size": 13, "color": "@series-2", "symbol": "diamond", "line": {"width": 1, "color": "@panel"}}
        data.append(_scatter(f"stock, {_basis(front.stock)}", [front.stock], marker))
    if front.shipped:
        marker = {"size": 17, "color": "@series-4", "symbol": "star", "line": {"width": 1, "color": "@panel"}}
        data.append(_scatter(f"shipped, {_basis(front.shipped)}", [front.shipped], marker))
    layout = axes("latency p50 (ms), predicted unless said otherwise", "mAP50-95, search split")
    if front.limit_ms is not None:
        layout |= _vertical(front.limit_ms, f"limit {milliseconds(front.limit_ms)}")
    return Plot(
        identity,
        "Latency against accuracy of every evaluated network",
        _pareto_label(front, len(best), compared),
        {"data": [trace for trace in data if trace["x"]], "layout": layout},
        "Accuracy is that of the supernet's weights on the search split, before fine-tuning: it ranks networks and is "
        "not the accuracy that ships. Latency is the latency model's prediction, except where the legend says "
        "measured: a hollow square stands at the measurement of a network, and a thin line leads from it to its "
        "prediction.",
    )


Kind = Literal["candidate", "shipped", "stock", "equal"]


@dataclass(frozen=True)
class File:
    """One exported file, measured and scored.

    Attributes:
        name: What it is called.
        kind: `candidate`, `shipped`, `stock`, or `equal` for stock of the latency of what ships.
        latency_ms: Its measured p50 latency.
        interval_ms: 95% interval of that.
        score: Its mAP50-95 on the val split.
    """

    name: str
    kind: Kind
    latency_ms: float
    score: float
    interval_ms: tuple[float, float]


_FILE_MARKERS: Final[Mapping[str, Figure]] = {
    "candidate": {"size": 10, "color": "@series-1", "symbol": "circle"},
    "stock": {"size": 13, "color": "@series-2", "symbol": "diamond"},
    "equal": {"size": 13, "color": "@series-3", "symbol": "diamond"},
    "shipped": {"size": 17, "color": "@series-4", "symbol": "star", "line": {"width": 1, "color": "@panel"}},
}


def exported(identity: str, files: Sequence[File], limit_ms: float | None) -> Plot:
    """Measured latency against accuracy of the exported files: candidates with their front, stock, and what ships."""
    ours = [file for file in files if file.kind in ("candidate", "shipped")]
    front: list[File] = []
    for file in sorted(ours, key=lambda f: (f.latency_ms, -f.score)):
        if not front or file.score > front[-1].score:
            front.append(file)
    data: list[Figure] = []
    if len(front) > 1:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "front of the candidates",
                "x": [_figure(f.latency_ms) for f in front],
                "y": [_figure(f.score) for f in front],
                "line": {"width": 1.5, "color": "@series-1"},
                "hoverinfo": "skip",
            }
        )
    candidates = [file for file in files if file.kind == "candidate"]
    groups = [("candidate", candidates)] if candidates else []
    groups += [(file.name, [file]) for kind in ("stock", "equal", "shipped") for file in files if file.kind == kind]
    shades = {"stock": 0, "equal": 0}
    for name, group in groups:
        kind = group[0].kind
        marker = {**_FILE_MARKERS[kind]}
        if kind in shades:  # precisions and widths of stock are told apart by their shapes
            marker["symbol"] = ("diamond", "square", "diamond-open", "square-open")[shades[kind] % 4]
            shades[kind] += 1
        data.append(_files(name, group, marker))
    layout = axes("latency p50, measured (ms)", "mAP50-95, val split")
    if limit_ms is not None:
        layout |= _vertical(limit_ms, f"limit {milliseconds(limit_ms)}")
    told = "; ".join(f"{f.name} {milliseconds(f.latency_ms)}, mAP50-95 {score(f.score)}" for f in files)
    return Plot(
        identity,
        "The exported files: latency as measured, accuracy after training",
        f"Scatter plot of {len(files)} exported files. {told}.",
        {"data": data, "layout": layout},
        "All files were measured in the same alternating rounds on this device; bars are 95 % intervals of the median. "
        "Accuracy is that of one training each: the comparisons above tell how sure a difference is.",
    )


def _files(name: str, files: Sequence[File], marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html(name),
        "x": [_figure(f.latency_ms) for f in files],
        "y": [_figure(f.score) for f in files],
        "text": [html(f.name) for f in files],
        "marker": marker,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_figure(max(0.0, f.interval_ms[1] - f.latency_ms)) for f in files],
            "arrayminus": [_figure(max(0.0, f.latency_ms - f.interval_ms[0])) for f in files],
            "thickness": 1,
            "width": 3,
            "color": "@muted",
        },
        "hovertemplate": "<b>%{text}</b><br>%{x:.3g} ms measured<br>mAP50-95 %{y:.3f}<extra></extra>",
    }


def _basis(network: Network) -> str:
    """Where the latency of a network comes from, in a word."""
    return "predicted" if network.measured_ms is None else "measured"


@dataclass(frozen=True)
class Choice:
    """One choice of the space, as the architecture parameters went through it.

    Attributes:
        name: What is chosen.
        options: The options as text.
        probabilities: Of the options, by step.
    """

    name: str
    options: Sequence[str]
    probabilities: Sequence[Sequence[float]]

    @property
    def likeliest(self) -> int:
        """Index of the option that is the most probable in the end."""
        last = self.probabilities[-1]
        return max(range(len(last)), key=last.__getitem__)


def prior_choices(identity: str, steps: Sequence[int], choices: Sequence[Choice]) -> Plot:
    """How sure the architecture parameters became of each choice: the probability of what they preferred in the end."""
    shown = range(0, len(steps), max(1, len(steps) // _COLUMNS))
    columns = sorted({*shown, len(steps) - 1})
    sure = sum(c.probabilities[-1][c.likeliest] >= _SURE for c in choices)
    heat = {
        "x": [steps[i] for i in columns],
        "z": [[_figure(c.probabilities[i][c.likeliest]) for i in columns] for c in choices],
        "text": [[f"{c.options[c.likeliest]}"] * len(columns) for c in choices],
        "hovertemplate": "step %{x}: %{text} with %{z:.2f}<extra>%{y}</extra>",
    }
    return _heatmap(
        identity,
        "What the architecture parameters settled on",
        f"Heat map of the probability of the finally preferred option, for {len(choices)} choices over "
        f"{steps[-1]} steps; {sure} of them ended above {percent(_SURE, 0)}.",
        choices,
        heat,
        "step",
    )


def prior_probabilities(identity: str, choices: Sequence[Choice]) -> Plot:
    """The probabilities of all options in the end."""
    most = max(len(c.options) for c in choices)
    told = "; ".join(f"{c.name} {c.options[c.likeliest]} ({c.probabilities[-1][c.likeliest]:.2f})" for c in choices)
    heat = {
        "x": [str(i + 1) for i in range(most)],
        "z": [_padded([_figure(p) for p in c.probabilities[-1]], most, None) for c in choices],
        "text": [_padded([html(option) for option in c.options], most, "") for c in choices],
        "texttemplate": "%{text}",
        "textfont": {"size": 10},
        "hovertemplate": "%{text}: %{z:.2f}<extra>%{y}</extra>",
        "xgap": 2,
        "ygap": 2,
    }
    label = f"Heat map of the final probability of each option. The likeliest: {told}."
    return _heatmap(identity, "Probability of each option in the end", label, choices, heat, "option")


def prior_latency(
    identity: str, steps: Sequence[int], expected_ms: Sequence[float | None], limit_ms: float | None
) -> Plot | None:
    """The latency that networks drawn by the architecture parameters are expected to have, step by step."""
    points = [(float(step), ms) for step, ms in zip(steps, expected_ms, strict=True) if is_number(ms)]
    plot = _lines(identity, "Expected latency of what the parameters draw", "ms", {"expected": points}, x="step")
    if plot and is_number(limit_ms):
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit_ms, "y1": limit_ms}
        plot.figure["layout"]["shapes"] = [line | {"line": _dashed("@bad")}]
        return replace(plot, label=f"{plot.label} The limit is {milliseconds(limit_ms)}, dashed.")
    return plot


def prior_loss(identity: str, steps: Sequence[int], loss: Sequence[float | None]) -> Plot | None:
    """The detection loss of networks drawn by the architecture parameters, on the search split."""
    points = [(float(step), value) for step, value in zip(steps, loss, strict=True) if is_number(value)]
    return _lines(identity, "Loss on the search split", "loss", {"loss": points}, x="step")


def _heatmap(identity: str, title: str, label: str, choices: Sequence[Choice], heat: Figure, x: str) -> Plot:
    trace = {
        "type": "heatmap",
        "y": [html(choice.name) for choice in choices],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "@panel"], [1, "@series-1"]],
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11, "color": "@muted"}},
        **heat,
    }
    layout = axes(x, "")
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "tickfont": {"size": 10, "color": "@muted"}}
    layout["xaxis"] |= {"showgrid": False}
    return Plot(identity, title, label, {"data": [trace], "layout": layout}, height=110 + 17 * len(choices))


def _padded(row: list[Any], length: int, filler: Any) -> list[Any]:
    return row + [filler] * (length - len(row))


@dataclass(frozen=True)
class Timing:
    """One network that was measured and predicted.

    Attributes:
        measured_ms: Measured p50 latency.
        predicted_ms: The latency model's prediction.
        role: `train`, `swap`, `holdout`, `stock`, or `fastest`: measured after the fit, as no other kept the limit.
    """

    measured_ms: float
    predicted_ms: float
    role: str


def latency_model(identity: str, timings: Sequence[Timing], errors: PredictionErrors) -> Plot:
    """Measured against predicted latency, the networks that the model did not see marked."""
    kinds = (
        ("fitted on", ("train", "swap"), {"size": 6, "color": "@faint", "opacity": 0.8}),
        ("held out", ("holdout",), {"size": 9, "color": "@series-1"}),
        ("stock", ("stock",), {"size": 13, "color": "@series-2", "symbol": "diamond"}),
        ("fastest predicted", ("fastest",), {"size": 11, "color": "@series-3", "symbol": "triangle-left"}),
    )
    data = []
    for name, roles, marker in kinds:
        points = [t for t in timings if t.role in roles]
        if points:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [_figure(t.measured_ms) for t in points],
                    "y": [_figure(t.predicted_ms) for t in points],
                    "marker": marker,
                    "hovertemplate": "measured %{x:.3g} ms<br>predicted %{y:.3g} ms",
                }
            )
    reach = [value for t in timings for value in (t.measured_ms, t.predicted_ms)]
    layout = axes("measured p50 (ms)", "predicted p50 (ms)")
    low, high = 0.96 * min(reach), 1.04 * max(reach)
    layout["shapes"] = [
        {"type": "line", "layer": "below", "x0": low, "y0": low, "x1": high, "y1": high, "line": _dashed("@muted")}
    ]
    layout["xaxis"]["range"] = layout["yaxis"]["range"] = [low, high]
    held_out = sum(t.role == "holdout" for t in timings)
    told = (
        f"Mean absolute error {percent(errors.mape)}, Spearman correlation {number(errors.spearman)} "
        f"on {held_out} held-out networks."
    )
    return Plot(
        identity,
        "Latency model against measurement",
        f"Scatter plot of predicted against measured latency of {len(timings)} networks. {told}",
        {"data": data, "layout": layout},
        "On the dashed line prediction equals measurement. The held-out networks took no part in the fit.",
    )


def losses(identity: str, title: str, curves: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Training losses by epoch; nothing where none was recorded."""
    return _lines(identity, title, "loss", {name: _points(curves, key) for key, name in _LOSSES.items()})


def scores(identity: str, title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot | None:
    """mAP50-95 by epoch, a line for each training; a supernet's training has one for each network followed.

    Returns:
        Nothing where no training recorded a score.
    """
    lines = {}
    for training, points in curves.items():
        for key in sorted({key for point in points for key in point if key.startswith("map50_95")}):
            followed = key.removeprefix("map50_95").strip("_").replace("_", " ")
            lines[f"{training}, {followed}" if followed else training] = _points(points, key)
    return _lines(identity, title, "mAP50-95, search split", lines)


def _points(curves: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(p.get("epoch", i), p[key]) for i, p in enumerate(curves) if is_number(p.get(key))]


def _lines(
    identity: str, title: str, quantity: str, lines: Mapping[str, list[tuple[float, float]]], *, x: str = "epoch"
) -> Plot | None:
    drawn = {name: points for name, points in lines.items() if points}
    if not drawn:
        return None
    data = []
    for i, (name, points) in enumerate(drawn.items()):
        colour = _SERIES[i % len(_SERIES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(points) <= 40 else "lines",
                "name": html(name),
                "x": [epoch for epoch, _ in points],
                "y": [_figure(value) for _, value in points],
                "line": {"width": 2, "color": colour, "dash": "solid" if i < len(_SERIES) else "dash"},
                "marker": {"size": 5, "color": colour},
                "hovertemplate": f"{x} %{{x}}<br>%{{y:.4g}}",
            }
        )
    layout = axes(x, quantity)
    layout["yaxis"]["rangemode"] = "tozero"
    ends = [f"{name} from {number(points[0][1])} to {number(points[-1][1])}" for name, points in drawn.items()]
    label = f"{title}, {quantity} by {x}: {'; '.join(ends)}."
    return Plot(identity, title, label, {"data": data, "layout": layout})


def _scatter(name: str, networks: Sequence[Network], marker: Figure, line: Figure | None = None) -> Figure:
    trace: Figure = {
        "type": "scatter",
        "mode": "lines+markers" if line else "markers",
        "name": name,
        "x": [_figure(n.predicted_ms if line else n.latency_ms) for n in networks],
        "y": [_figure(n.score) for n in networks],
        "text": [_hover(n) for n in networks],
        "marker": marker,
        "hovertemplate": "%{text}",
    }
    return trace | {"line": line} if line else trace


def _measured(candidates: Sequence[Network]) -> Figure:
    """The candidates where they were measured, each joined to its prediction (a null ends a line)."""
    points: list[tuple[float | None, float | None, str]] = []
    for network in candidates:
        if network.measured_ms is not None:
            text = _hover(network)
            points += [(network.measured_ms, network.score, text), (network.predicted_ms, network.score, text)]
            points.append((None, None, ""))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "measured",
        "x": [_figure(x) for x, _, _ in points],
        "y": [_figure(y) for _, y, _ in points],
        "text": [text for _, _, text in points],
        "line": {"width": 1, "color": "@ink"},
        "marker": {
            "size": [11, 0, 0] * (len(points) // 3),
            "color": "@ink",
            "symbol": "square-open",
            "line": {"width": 1.5},
        },
        "hovertemplate": "%{text}",
    }


def _hover(network: Network) -> str:
    lines = [f"<b>{html(network.name)}</b> ({html(network.source)})", f"mAP50-95 {score(network.score)}"]
    lines.append(f"predicted {milliseconds(network.predicted_ms)}")
    if network.measured_ms is not None:
        lines.append(f"measured {milliseconds(network.measured_ms)}")
    if network.generation is not None:
        lines.append(f"generation {network.generation}")
    return "<br>".join(lines)


def _thin_cross(colour: str, symbol: str) -> Figure:
    return {"size": 7, "color": colour, "symbol": symbol, "line": {"width": 1.5, "color": colour}}


def _pareto_label(front: Front, best: int, compared: int) -> str:
    latencies = [n.predicted_ms for n in front.networks]
    found = [n.score for n in front.networks]
    told = [
        f"Scatter plot of {len(front.networks)} evaluated networks ({compared} of them for comparison, "
        f"{best} on the front): predicted latency {number(min(latencies))} to {milliseconds(max(latencies))}, "
        f"mAP50-95 {score(min(found))} to {score(max(found))}."
    ]
    if front.limit_ms is not None:
        told.append(f"The limit is {milliseconds(front.limit_ms)}.")
    for name, network in (("Stock", front.stock), ("Shipped", front.shipped)):
        if network:
            told.append(
                f"{name}: {milliseconds(network.latency_ms)} {_basis(network)}, mAP50-95 {score(network.score)}."
            )
    return " ".join(told)


def axes(x: str, y: str) -> Figure:
    """The layout that all plots share, with titles of the two axes."""
    axis = {
        "gridcolor": "@line",
        "linecolor": "@line",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 12, "color": "@muted"},
    }
    return {
        "font": {"size": 13, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 14, "t": 10, "b": 46},
        "hovermode": "closest",
        "showlegend": True,
        "hoverlabel": {"bgcolor": "@panel", "bordercolor": "@line", "font": {"color": "@ink"}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "xaxis": axis | {"title": {"text": x, "standoff": 8, "font": {"size": 12, "color": "@muted"}}},
        "yaxis": axis | {"title": {"text": y, "standoff": 8, "font": {"size": 12, "color": "@muted"}}},
    }


def _vertical(x: float, text: str) -> Figure:
    return {
        "shapes": [{"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": _dashed("@bad")}],
        "annotations": [
            {
                "x": x,
                "yref": "paper",
                "y": 0,
                "xanchor": "left",
                "yanchor": "bottom",
                "text": text,
                "showarrow": False,
                "font": {"size": 12, "color": "@bad"},
            }
        ],
    }


def _dashed(colour: str) -> Figure:
    return {"width": 1.5, "dash": "dash", "color": colour}


def _figure(value: float | None) -> float | None:
    """Six significant digits: enough for any screen, and a third of the bytes."""
    return None if value is None else float(f"{value:.6g}")
