"""Figures as people read them, and the words for a comparison: one place, so that report and terminal agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeGuard

from yolov8_nas import foreign
from yolov8_nas.runner.results import (
    AgainstStock,
    ClassEvidence,
    Compared,
    Confidences,
    DecidedBy,
    Difference,
    LimitRow,
    LimitUsed,
    RuleEvidence,
)
from yolov8_nas.runner.results.summary import Gate, Registry
from yolov8_nas.space.limits import LOWER

ABSENT: Final = "–"
"""Stands where a value was not measured. A missing value is never printed as zero."""

SOURCES: Final = {
    "seed": "relatives of stock, and of all sizes",
    "prior": "samples of the prior",
    "exact": "exact solver",
    "evolution": "evolution",
    "random": "random search",
    "macs": "largest by MACs",
}
"""Where scored networks come from."""

UNUSED: Final = 0.1
"""Share of its tightest limit from which a network that leaves it unused has to be explained."""

_MINUS: Final = "\N{MINUS SIGN}"
_NBSP: Final = "\N{NO-BREAK SPACE}"
_RARE_SHOWN: Final = 8
_WHY_NOT: Final = {
    "no box": "no box",
    "few images": "in {images} images",
    "wide interval": "in {images} images, and its interval is wide",
}
"""Why nothing can be said of a class, by `results.ClassEvidence.why_not`."""
_QUANTITIES: Final = {"params": "parameters", "flops": "FLOPs"}


STARTS: Final = {"weights": "weights", "supernet": "supernet", "scratch": "random"}
"""What a training began with, in a word."""


def shown(value: Any) -> Any:
    """A value of a page on its way there: text of others commands nothing, and is escaped after this."""
    return foreign.lines(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number; stages write `null` for what they could not measure."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, never in exponent form, large ones with separators."""
    if not is_number(value):
        return ABSENT
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(decimals, 9)}f}".replace("-", _MINUS)


def with_unit(value: Any, unit: str, digits: int = 3) -> str:
    """A number and its unit, held together by a no-break space."""
    return f"{number(value, digits)}\N{NO-BREAK SPACE}{unit}" if is_number(value) else ABSENT


def milliseconds(value: Any) -> str:
    """A latency in ms."""
    return with_unit(value, "ms")


def score(value: Any) -> str:
    """An mAP between 0 and 1, to three decimals."""
    return f"{value:.3f}" if is_number(value) else ABSENT


def signed(value: Any) -> str:
    """A difference in mAP with its sign, to three decimals."""
    return f"{value:+.3f}".replace("-", _MINUS) if is_number(value) else ABSENT


def percent(value: Any, decimals: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{decimals}f}\N{NO-BREAK SPACE}%" if is_number(value) else ABSENT


def change(value: Any) -> str:
    """A relative change as a percentage with its sign."""
    return f"{100 * value:+.1f}{_NBSP}%".replace("-", _MINUS) if is_number(value) else ABSENT


def ratio(value: Any) -> str:
    """A speed ratio, e.g. 1.27×."""
    return f"{value:.2f}×" if is_number(value) else ABSENT


def millions(value: Any) -> str:
    """A count of parameters in millions."""
    return with_unit(value / 1e6, "M") if is_number(value) else ABSENT


def whole(value: Any) -> str:
    """A count."""
    return f"{value:,.0f}" if is_number(value) else ABSENT


def duration(seconds: Any) -> str:
    """A time span in the two units that matter."""
    if not is_number(seconds):
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (amount, _) in enumerate(parts) if amount), 2)
    return " ".join(f"{amount}\N{NO-BREAK SPACE}{unit}" for amount, unit in parts[first : first + 2])


def quantity(limit: LimitRow) -> str:
    """What a limit limits, e.g. `latency p50` or `latency p99 with NMS`."""
    words = [_QUANTITIES.get(limit.metric, limit.metric)]
    if limit.metric == "latency":
        words.append(limit.statistic)
    if limit.scope == "with_nms":
        words.append("with NMS")
    return " ".join(words)


def bound(limit: LimitRow) -> str:
    """The bound of a limit, e.g. `≤ 3.91 ms`, or `≤ 2.39 ms (80% of stock's 2.99 ms)`."""
    relation = "≥" if limit.metric in LOWER else "≤"
    told = f"{relation}\N{NO-BREAK SPACE}{with_unit(limit.limit, limit.unit)}"
    if limit.share is None:
        return told
    return f"{told} ({percent(limit.share, 0)} of stock's {with_unit(limit.stock, limit.unit)})"


def stock_name(name: str) -> str:
    """A baseline's name, marked as a stock network's."""
    return name if name.startswith("stock") else f"stock {name}"


def precision(name: str | None) -> str:
    """A precision as it is written in prose."""
    return name.upper() if name in ("fp32", "fp16", "int8") else name or ABSENT


def interval(comparison: Difference) -> str:
    """A difference in mAP50-95 with its 95 % interval."""
    low, high = signed(comparison.low), signed(comparison.high)
    return f"{signed(comparison.difference)} (95\N{NO-BREAK SPACE}% interval {low} to {high})"


def search_sentence(compared: Compared, source: str) -> str:
    """How the best of a search stands against the best of what it was compared with, before any training.

    Args:
        compared: The comparison.
        source: What the search was compared with.
    """
    best = [value for value in compared.best if is_number(value)]
    name = SOURCES.get(source, source)
    if not best or not is_number(compared.search):
        return f"The search against {name}: no figure was recorded."
    each = " and ".join(dict.fromkeys(map(whole, compared.evaluations)))
    told = f"Compared with {name}: {each} networks score {score(max(best))} at best"
    if len(best) > 1:
        low, high = compared.interval or (None, None)
        told = (
            f"Compared with {name}, {len(best)} times {each} networks: their best score "
            f"{score(compared.mean)} on average (95{_NBSP}% interval {score(low)} to {score(high)})"
        )
    searched = f"{whole(compared.search_evaluations)} of the search score {score(compared.search)} at best"
    return f"{told}; {searched}. These are scores with the supernet's weights, before any training."


def evidence_sentence(evidence: RuleEvidence) -> str:
    """The evidence of a latency table on the options that a hardware rule takes out, in words."""
    low, high = evidence.interval
    return (
        f"at equal multiply-accumulates, each of these options changes latency by {change(evidence.extra)} "
        f"(95{_NBSP}% interval {change(low)} to {change(high)}; {whole(evidence.with_option)} of "
        f"{whole(evidence.networks)} networks have any)"
    )


def budget_sentence(budget: LimitUsed) -> str:
    """How much of its tightest limit the best candidate uses and, where that is little, why."""
    told = [f"The best candidate uses {percent(budget.used, 0)} of the limit {budget.limit} as measured."]
    if budget.used < 1 - UNUSED:
        if budget.largest_keeps_it:
            told.append("The largest network of the space keeps the limit as well: there is little left to use it for.")
        if budget.used_predicted > budget.used:
            told.append(
                f"It was predicted to use {percent(budget.used_predicted, 0)} of it; the latency model's upper bound "
                f"lies {percent(budget.reserve)} above its prediction."
            )
        if budget.larger.scored:
            told.append(
                f"{whole(budget.larger.scored)} scored networks use more of it; the best of them scores "
                f"{score(budget.larger.best_map50_95)} on the search split, this one {score(budget.map50_95)}."
            )
        elif not budget.largest_keeps_it:
            told.append("No scored network within the limits is predicted to use more.")
    return " ".join(told)


def comparison_sentence(comparison: Difference, one: str, other: str) -> str:
    """The outcome of a comparison in mAP50-95, never without its interval.

    Args:
        comparison: The comparison; one with stock tells how far apart trainings lie.
        one: What is compared.
        other: What it is compared with.
    """
    figures = f"mAP50-95 differs by {interval(comparison)}"
    allowed = ""
    if isinstance(comparison, AgainstStock):
        spread = score(comparison.trainings.sd)
        allowed = f" The interval allows for trainings that lie {spread} apart from seed to seed."
    match comparison.word:
        case "ahead":
            return f"{one} is ahead of {other} on these validation images: {figures}.{allowed}"
        case "behind":
            return f"{one} is behind {other} on these validation images: {figures}.{allowed}"
        case "undecided":
            return f"{one} against {other} is undecided: {figures}, and the interval holds zero.{allowed}"
    return f"{one} against {other}: {figures}.{allowed}"


def decided_by_sentence(decided: DecidedBy | None) -> str:
    """What the validation images decide, and what would decide one point; empty where nothing is told."""
    if decided is None:
        return ""
    images, asked = whole(decided.images), points(decided.difference)
    if decided.images_needed is None:
        return f"The two files find the same in all {images} validation images: more of the same decide nothing."
    told = (
        f"These {images} validation images decide a difference of {points(decided.smallest)} between two files "
        f"({percent(decided.power, 0)} of the time); {asked} would take about {rounded_up(decided.images_needed)}."
    )
    if decided.smallest_trained is None:
        return told
    told += f" Between two networks, each trained once, they decide {points(decided.smallest_trained)}; "
    if decided.trainings is None or decided.images_trained is None:
        return f"{told}for {asked} trainings lie too far apart, however many images there are."
    more = rounded_up(decided.images_trained)
    return f"{told}{asked} would take {whole(decided.trainings)} trainings of each and about {more}."


def choose_sentence(entry: Registry | None, hardware: str) -> str:
    """How to take another registered version than the one that ships; empty where there is none."""
    if entry is None or not entry.choices:
        return ""
    versions = ", ".join(str(choice.version) for choice in entry.choices)
    return (
        f"To choose from without another run: versions {versions} of {entry.model} keep the limits, too. "
        f"yolov8-nas models best --hardware {hardware} --model {entry.model} --max-latency MS picks the most accurate "
        "within another limit."
    )


def rare_sentence(classes: Sequence[ClassEvidence]) -> str:
    """Which classes are too rare in the validation images to say anything about; empty where none is."""
    rare = [row for row in classes if row.why_not]
    if not rare:
        return ""
    each = ", ".join(
        f"{row.name} ({_WHY_NOT[row.why_not].format(images=whole(row.images))})"
        for row in rare[:_RARE_SHOWN]
        if row.why_not
    )
    more = f" and {len(rare) - _RARE_SHOWN} more" if len(rare) > _RARE_SHOWN else ""
    return f"Too rare in the validation images to say anything about: {each}{more}."


def class_interval(row: ClassEvidence | None) -> str:
    """The 95% interval of a class's AP50-95, or why there is none."""
    if row is None:
        return ABSENT
    interval = ABSENT if row.low is None else f"{score(row.low)} to {score(row.high)}"
    if row.why_not is None:
        return interval
    return "too rare" if row.low is None else f"{interval}, too rare"


def points(difference: float) -> str:
    """A difference in mAP (0 to 1) as points without a sign."""
    shown = number(100 * difference, 2).removesuffix(".0")
    return f"{shown}{_NBSP}point{'s' * (shown != '1')}"


def rounded_up(images: int) -> str:
    """A number of images that is an estimate, in two digits, and never too few."""
    step = 10 ** max(0, len(str(images)) - 2)
    return f"{whole(math.ceil(images / step) * step)} images"


def confidence_sentence(confidence: Confidences) -> str:
    """What INT8 does to confidences, and what the threshold in the middle becomes; empty where nothing is told."""
    if confidence.spread is None:
        return ""
    kept = [(row.old, row.new) for row in confidence.table if row.new is not None]
    middle = min(kept, key=lambda pair: abs(pair[0] - 0.5), default=None)
    carried = "A threshold of {:.2f} becomes {:.2f}".format(*middle) if middle else "No threshold carries over"
    squeezed = "squeezed" if confidence.squeezed else "not squeezed"
    return (
        f"In INT8 confidences of right detections spread over {confidence.spread:.2f} of floating point's range: "
        f"{squeezed}. {carried}; thresholds.json has the others."
    )


def recipe(keep_float: Sequence[str]) -> str:
    """What of an INT8 network is in floating point, in a sentence.

    Args:
        keep_float: The parts that a run's configuration names.
    """
    always = "the head's output convolutions and DFL"
    if not keep_float:
        return f"In INT8, {always} stay in floating point."
    return f"In INT8, {', '.join(keep_float)} (quantization.keep_float), {always} stay in floating point."


def gate(said: Gate) -> str:
    """What the promotion gate said of a new version, in a sentence."""
    outcome = "is champion" if said.promoted else "is not made champion"
    who = said.version or "nothing that is registered"
    return f"Promotion gate: {who} {outcome}: {'; '.join(said.reasons)}"
