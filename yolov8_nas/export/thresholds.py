"""What a change of files does to confidences: whether INT8 squeezes them, and which threshold replaces an old one.

mAP asks only for the order of detections. Who has set an alarm at 0.6 asks for more: in INT8 the same detection may
have another confidence, and then the same limit lets through more false alarms, or fewer objects. So two things are
told of a file against the one it replaces, from what both find in the same images:

* how widely confidences spread, since a file whose scores are drawn together has no place left for a threshold;
* for each old threshold, the new one that gives the same precision. Of those that do, it is the one that lets through
  as many detections: where nothing is wrong above some confidence, precision alone would send every threshold there.

A detection is right where it covers a box of its class by an IoU of 0.5. All classes are counted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.evaluation import Evaluation

THRESHOLDS: Final = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""The old thresholds of a table."""

ENOUGH: Final = 10
"""Detections above a threshold from which on its precision says something."""

SQUEEZED: Final = 0.8
"""Share of the old spread below which confidences count as squeezed."""

_SMALLEST: Final = 0.01
"""Confidences below are no detections to anyone."""


@dataclass(frozen=True)
class Spread:
    """How confidences of right detections lie.

    Attributes:
        detections: How many there are.
        p10: Confidence that 10% of them stay below.
        p50: Their median.
        p90: Confidence that 10% of them exceed.
        highest: The highest.
        levels: Different confidences among all detections, rounded to six digits.
    """

    detections: int
    p10: float
    p50: float
    p90: float
    highest: float
    levels: int


@dataclass(frozen=True)
class Row:
    """One threshold carried over.

    Attributes:
        old: The threshold.
        new: What replaces it; nothing where too few detections tell, or no threshold is as precise.
        precision: Precision above the old one; nothing where it lets through nothing.
        new_precision: Precision of the new file above the new one.
        recall: Share of the boxes that the old one finds.
        new_recall: Share of the boxes that the new one finds.
        detections: Detections above the old one.
        why_not: Why there is no new one.
    """

    old: float
    new: float | None
    precision: float | None
    new_precision: float | None
    recall: float
    new_recall: float | None
    detections: int
    why_not: str = ""


@dataclass(frozen=True)
class Confidences:
    """What a file's confidences are against those of the one it replaces.

    Attributes:
        old: How the old ones spread.
        new: How the new ones do.
        spread: New spread (p90 - p10) as a share of the old one; nothing where the old one has none.
        squeezed: Whether that is less than `SQUEEZED`.
        table: The thresholds, rising.
    """

    old: Spread
    new: Spread
    spread: float | None
    squeezed: bool
    table: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "table": [asdict(row) for row in self.table]}


@dataclass(frozen=True)
class _Curve:
    """Detections from the most confident on, at the places where a threshold can lie: between different confidences.

    Attributes:
        conf: The confidences, falling.
        precision: Share of right ones down to there.
        recall: Share of boxes that they are.
        count: How many there are down to there.
    """

    conf: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    count: NDArray[np.int64]

    def above(self, threshold: float) -> int:
        """The last place whose confidence is at least a threshold; -1 where there is none."""
        return int(np.searchsorted(-self.conf, -threshold, side="right")) - 1


def confidences(old: Evaluation, new: Evaluation, thresholds: Sequence[float] = THRESHOLDS) -> Confidences:
    """Compare the confidences of two files.

    Args:
        old: What the file that is replaced finds.
        new: What the one in its place finds, in the same images.
        thresholds: Old thresholds to carry over, rising.

    Raises:
        ValueError: The two were not scored on the same images.
    """
    if [image.name for image in old.images] != [image.name for image in new.images]:
        raise ValueError("the two evaluations are of different images: score both on the same split")
    before, after = _spread(old), _spread(new)
    width = before.p90 - before.p10
    share = (after.p90 - after.p10) / width if before.detections and after.detections and width > 0 else None
    return Confidences(before, after, share, share is not None and share < SQUEEZED, _table(old, new, thresholds))


def _table(old: Evaluation, new: Evaluation, thresholds: Sequence[float]) -> tuple[Row, ...]:
    was, now = _curve(old), _curve(new)
    rows: list[Row] = []
    lowest = 0.0
    for threshold in thresholds:
        at = was.above(threshold)
        count = int(was.count[at]) if at >= 0 else 0
        precision = float(was.precision[at]) if at >= 0 else None
        recall = float(was.recall[at]) if at >= 0 else 0.0
        if precision is None or count < ENOUGH:
            why = f"{count} detections above it, and {ENOUGH} are needed to tell its precision"
            rows.append(Row(threshold, None, precision, None, recall, None, count, why))
            continue
        # As precise as half a detection can tell, and not below what a lower threshold was replaced with.
        enough = (now.precision >= precision - 0.5 / count) & (now.conf >= lowest) & (now.count >= ENOUGH)
        places = np.flatnonzero(enough)
        if not len(places):
            why = f"at no threshold is the new file as precise on {ENOUGH} detections or more"
            rows.append(Row(threshold, None, precision, None, recall, None, count, why))
            continue
        place = places[np.argmin(np.abs(now.count[places] - count))]
        lowest = float(now.conf[place])
        found, found_recall = float(now.precision[place]), float(now.recall[place])
        rows.append(Row(threshold, lowest, precision, found, recall, found_recall, count))
    return tuple(rows)


def _curve(evaluation: Evaluation) -> _Curve:
    conf, right = _detections(evaluation)
    boxes = sum(len(image.target_cls) for image in evaluation.images)
    order = np.argsort(-conf, kind="stable")
    conf, right = conf[order], right[order]
    hits, count = np.cumsum(right), np.arange(1, len(conf) + 1)
    ends = np.flatnonzero(np.append(conf[:-1] > conf[1:], True)) if len(conf) else np.empty(0, dtype=np.int64)
    return _Curve(conf[ends], hits[ends] / count[ends], hits[ends] / max(1, boxes), count[ends])


def _spread(evaluation: Evaluation) -> Spread:
    conf, right = _detections(evaluation)
    if not right.any():
        return Spread(0, 0.0, 0.0, 0.0, 0.0, len(np.unique(conf.round(6))))
    p10, p50, p90 = np.percentile(conf[right], [10, 50, 90])
    levels = len(np.unique(conf.round(6)))
    return Spread(int(right.sum()), float(p10), float(p50), float(p90), float(conf[right].max()), levels)


def _detections(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidence of each detection that anyone would see, and whether it is right at an IoU of 0.5."""
    if not evaluation.images:
        return np.empty(0), np.empty(0, dtype=np.bool_)
    conf = np.concatenate([image.conf for image in evaluation.images]).astype(np.float64)
    right = np.concatenate([image.tp[:, 0] for image in evaluation.images]).astype(np.bool_)
    seen = conf >= _SMALLEST
    return conf[seen], right[seen]
