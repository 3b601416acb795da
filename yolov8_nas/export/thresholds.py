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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.evaluation import Evaluation
from yolov8_nas.runner.results import Confidences, ConfidenceSpread, Threshold

THRESHOLDS: Final = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""The old thresholds of a table."""

ENOUGH: Final = 10
"""Detections above a threshold from which on its precision says something."""

SQUEEZED: Final = 0.8
"""Share of the old spread below which confidences count as squeezed."""

_SMALLEST: Final = 0.01
"""Confidences below are no detections to anyone."""


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
    return Confidences(
        old=before,
        new=after,
        spread=share,
        squeezed=share is not None and share < SQUEEZED,
        table=tuple(_table(old, new, thresholds)),
    )


def _table(old: Evaluation, new: Evaluation, thresholds: Sequence[float]) -> Iterator[Threshold]:
    was, now = _curve(old), _curve(new)
    lowest = 0.0
    for threshold in thresholds:
        at = was.above(threshold)
        count = int(was.count[at]) if at >= 0 else 0
        precision = float(was.precision[at]) if at >= 0 else None
        recall = float(was.recall[at]) if at >= 0 else 0.0
        if precision is None or count < ENOUGH:
            why = f"{count} detections above it, and {ENOUGH} are needed to tell its precision"
            yield Threshold(old=threshold, precision=precision, recall=recall, detections=count, why_not=why)
            continue
        # As precise as half a detection can tell, and not below what a lower threshold was replaced with.
        enough = (now.precision >= precision - 0.5 / count) & (now.conf >= lowest) & (now.count >= ENOUGH)
        places = np.flatnonzero(enough)
        if not len(places):
            why = f"at no threshold is the new file as precise on {ENOUGH} detections or more"
            yield Threshold(old=threshold, precision=precision, recall=recall, detections=count, why_not=why)
            continue
        place = places[np.argmin(np.abs(now.count[places] - count))]
        lowest = float(now.conf[place])
        yield Threshold(
            old=threshold,
            new=lowest,
            precision=precision,
            new_precision=float(now.precision[place]),
            recall=recall,
            new_recall=float(now.recall[place]),
            detections=count,
        )


def _curve(evaluation: Evaluation) -> _Curve:
    conf, right = _detections(evaluation)
    boxes = sum(len(image.target_cls) for image in evaluation.images)
    order = np.argsort(-conf, kind="stable")
    conf, right = conf[order], right[order]
    hits, count = np.cumsum(right), np.arange(1, len(conf) + 1)
    ends = np.flatnonzero(np.append(conf[:-1] > conf[1:], True)) if len(conf) else np.empty(0, dtype=np.int64)
    return _Curve(conf[ends], hits[ends] / count[ends], hits[ends] / max(1, boxes), count[ends])


def _spread(evaluation: Evaluation) -> ConfidenceSpread:
    conf, right = _detections(evaluation)
    levels = len(np.unique(conf.round(6)))
    if not right.any():
        return ConfidenceSpread(detections=0, p10=0.0, p50=0.0, p90=0.0, highest=0.0, levels=levels)
    p10, p50, p90 = np.percentile(conf[right], [10, 50, 90]).tolist()
    count, highest = int(right.sum()), float(conf[right].max())
    return ConfidenceSpread(detections=count, p10=p10, p50=p50, p90=p90, highest=highest, levels=levels)


def _detections(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidence of each detection that anyone would see, and whether it is right at an IoU of 0.5."""
    if not evaluation.images:
        return np.empty(0), np.empty(0, dtype=np.bool_)
    conf = np.concatenate([image.conf for image in evaluation.images]).astype(np.float64)
    right = np.concatenate([image.tp[:, 0] for image in evaluation.images]).astype(np.bool_)
    seen = conf >= _SMALLEST
    return conf[seen], right[seen]
