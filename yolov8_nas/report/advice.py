"""What was told before anything was trained for a target, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from yolov8_nas.advice import words
from yolov8_nas.advice.gains import FULL, LIMIT_USED, RESCALED
from yolov8_nas.report import wording
from yolov8_nas.runner.results import Advice, AgainstStock, VerdictResult
from yolov8_nas.runner.results.summary import Baseline, StageRow, Target
from yolov8_nas.space.limits import LOWER

_NOTHING = "not measured"
_WIDTH = "of its width"  # what the name of rescaled stock says


def view(target: Target, stages: Sequence[StageRow], verdict: VerdictResult | None) -> dict[str, Any]:
    """The advice on a target as the template shows it; without any, why there is none.

    Args:
        target: The target's entry in the summary.
        stages: The stages' rows in the summary.
        verdict: trt-export's verdict; nothing where the target did not come so far.
    """
    advice = target.advice
    if advice is None:
        return {"missing": "No advice was given before this run."}
    own = [row for row in stages if row.target in (None, advice.target)]
    compared = verdict.comparisons if verdict else ()
    return {
        "missing": "",
        "recommendation": advice.recommendation,
        "headings": words.SIZES,
        "sizes": words.size_rows(advice),
        "gap": words.gap(advice),
        "outcomes": [
            *_stock(advice, target),
            _used(target),
            _gained(advice, compared, RESCALED),
            _gained(advice, compared, FULL),
            *_costs(advice, own),
        ],
    }


def _stock(advice: Advice, target: Target) -> list[tuple[str, str, str]]:
    """Stock's latency as foretold, and as it was measured beside what ships."""
    foretold = next((s for s in advice.sizes if s.scale == advice.scale and s.precision == advice.precision), None)
    if foretold is None:
        return []
    same = [row for row in target.baselines if isinstance(row, Baseline) or row.precision == advice.precision]
    measured = next((row.latency_ms.p50 for row in same if _WIDTH not in row.name), None)
    interval = "" if foretold.interval_ms is None else " ({:.3g} to {:.3g})".format(*foretold.interval_ms)
    told = f"{foretold.latency_ms:.3g} ms{interval}, {foretold.basis}"
    came = _NOTHING if measured is None else wording.milliseconds(measured)
    return [(f"latency of stock YOLOv8{advice.scale}, {advice.precision.upper()}", told, came)]


def _used(target: Target) -> tuple[str, str, str]:
    """How much of its tightest limit what ships uses."""
    known = [
        row.limit / row.measured if row.metric in LOWER else row.measured / row.limit
        for row in target.constraints
        if target.model and row.measured and row.limit
    ]
    told = f"{LIMIT_USED:.1%} (docs/results.md)"
    return "of the tightest limit is used", told, f"{max(known):.1%}" if known else _NOTHING


def _gained(advice: Advice, compared: Sequence[AgainstStock], against: str) -> tuple[str, str, str]:
    """What was gained over rescaled or full stock, beside what searches of ours had gained."""
    rows = [row for row in advice.gains if row.against == against]
    told = "; ".join(
        f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f}, {row.word}; {row.data} at {row.limit:.0%})"
        for row in rows
    )
    rescaled = against == RESCALED
    found = [row for row in compared if (_WIDTH in row.against) == rescaled and "YOLOv8" in row.against]
    came = _NOTHING
    if found:
        points = (100 * value for value in (found[0].difference, found[0].low, found[0].high))
        came = "{:+.1f} ({:+.1f} to {:+.1f}, ".format(*points) + f"{found[0].word})"
    return f"points of mAP50-95 against {against}", told or "no figures of ours", came


def _costs(advice: Advice, stages: Sequence[StageRow]) -> list[tuple[str, str, str]]:
    """What stages were to take, and what they took."""
    rows = []
    for cost in advice.costs:
        took = next((row for row in stages if row.name == cost.stage), None)
        came = {"cached": "found in the store", "done": wording.duration(took.seconds)} if took else {}
        rows.append((f"{cost.stage} takes", words.cost(cost), came.get(took.status, _NOTHING) if took else _NOTHING))
    return rows
