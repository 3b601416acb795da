"""What was told before anything was trained for a target, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from yolov8_nas.advice import words
from yolov8_nas.advice.gains import FULL, LIMIT_USED, RESCALED
from yolov8_nas.report import wording
from yolov8_nas.report.evidence import pick, records
from yolov8_nas.runner.results import Advice
from yolov8_nas.space.limits import LOWER

_NOTHING = "not measured"
_WIDTH = "of its width"  # what the name of rescaled stock says


def view(target: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The advice on a target as the template shows it; without any, why there is none.

    Args:
        target: The target's entry in the summary.
        stages: The stages' rows in the summary.
        verdict: trt-export's verdict; empty where the target did not come so far.
    """
    try:
        advice = Advice.model_validate(target.get("advice"))
    except ValidationError:
        return {"missing": "No advice was given before this run."}
    own = [row for row in stages if row.get("target") in (None, advice.target)]
    return {
        "missing": "",
        "recommendation": advice.recommendation,
        "headings": words.SIZES,
        "sizes": words.size_rows(advice),
        "gap": words.gap(advice),
        "outcomes": [
            *_stock(advice, verdict, target),
            _used(target),
            _gained(advice, verdict, RESCALED),
            _gained(advice, verdict, FULL),
            *_costs(advice, own),
        ],
    }


def _stock(advice: Advice, verdict: Mapping[str, Any], target: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Stock's latency as foretold, and as it was measured beside what ships."""
    foretold = next((s for s in advice.sizes if s.scale == advice.scale and s.precision == advice.precision), None)
    if foretold is None:
        return []
    rows = records(verdict.get("baselines")) or records(target.get("baselines"))
    same = [row for row in rows if row.get("precision", advice.precision) == advice.precision]
    measured = next((pick(row, "latency_ms", "p50") for row in same if _WIDTH not in str(row.get("name"))), None)
    interval = "" if foretold.interval_ms is None else " ({:.3g} to {:.3g})".format(*foretold.interval_ms)
    told = f"{foretold.latency_ms:.3g} ms{interval}, {foretold.basis}"
    came = wording.milliseconds(measured) if wording.is_number(measured) else _NOTHING
    return [(f"latency of stock YOLOv8{advice.scale}, {advice.precision.upper()}", told, came)]


def _used(target: Mapping[str, Any]) -> tuple[str, str, str]:
    """How much of its tightest limit what ships uses."""
    shares = [_share(row) for row in records(target.get("constraints")) if target.get("model")]
    known = [share for share in shares if share is not None]
    told = f"{LIMIT_USED:.1%} (docs/results.md)"
    return "of the tightest limit is used", told, f"{max(known):.1%}" if known else _NOTHING


def _share(row: Mapping[str, Any]) -> float | None:
    bound, measured = row.get("limit"), row.get("measured")
    if not (wording.is_number(bound) and wording.is_number(measured)) or not bound or not measured:
        return None
    return bound / measured if row.get("metric") in LOWER else measured / bound


def _gained(advice: Advice, verdict: Mapping[str, Any], against: str) -> tuple[str, str, str]:
    """What was gained over rescaled or full stock, beside what searches of ours had gained."""
    rows = [row for row in advice.gains if row.against == against]
    told = "; ".join(
        f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f}, {row.word}; {row.data} at {row.limit:.0%})"
        for row in rows
    )
    rescaled = against == RESCALED
    found = [
        row
        for row in records(verdict.get("comparisons"))
        if (_WIDTH in str(row.get("against"))) == rescaled and "YOLOv8" in str(row.get("against"))
    ]
    first: Mapping[str, Any] = found[0] if found else {}
    bounds = [100 * first[key] for key in ("difference", "low", "high") if wording.is_number(first.get(key))]
    came = _NOTHING
    if len(bounds) == 3:
        came = "{:+.1f} ({:+.1f} to {:+.1f}, ".format(*bounds) + f"{first.get('word')})"
    return f"points of mAP50-95 against {against}", told or "no figures of ours", came


def _costs(advice: Advice, stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """What stages were to take, and what they took."""
    rows = []
    for cost in advice.costs:
        took = next((row for row in stages if row.get("name") == cost.stage), {})
        came = {"cached": "found in the store", "done": wording.duration(took.get("seconds"))}
        rows.append((f"{cost.stage} takes", words.cost(cost), came.get(str(took.get("status")), _NOTHING)))
    return rows
