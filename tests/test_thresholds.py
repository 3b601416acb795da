"""Thresholds: what INT8 does to confidences, and what an old limit becomes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from yolov8_nas.evaluation import Evaluation, ImageStats
from yolov8_nas.export.thresholds import ENOUGH, THRESHOLDS, confidences
from yolov8_nas.report.wording import confidence_sentence

Change = Callable[[NDArray[np.float64]], NDArray[np.float64]]

IMAGES, EACH = 40, 10


def found(change: Change = lambda conf: conf, *, detections: int = EACH, names: str = "") -> Evaluation:
    """A detector that is right the more often the more confident it is, with its confidences changed."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(IMAGES):
        conf = rng.uniform(0.02, 0.98, EACH)[:detections]
        right = rng.uniform(size=EACH)[:detections] < conf
        order = np.argsort(-conf)
        images.append(
            ImageStats(
                f"{names}{index}.png",
                np.repeat(right[order, None], 10, axis=1),
                change(conf[order]).astype(np.float32),
                np.zeros(len(conf), np.int32),
                np.zeros(6, np.int32),
            )
        )
    return Evaluation(0.5, 0.6, {"scratch": 0.5}, tuple(images))


@pytest.mark.parametrize(
    ("change", "squeezed"),
    [
        (lambda conf: conf, False),
        (lambda conf: 0.9 * conf, False),
        (lambda conf: 0.4 + 0.2 * conf, True),
        (lambda conf: np.minimum(conf, 0.5), True),
    ],
    ids=["the same", "lower", "drawn together", "cut off"],
)
def test_squeezed_confidences_are_told(change: Change, squeezed: bool) -> None:
    told = confidences(found(), found(change))
    assert told.squeezed is squeezed
    assert told.spread is not None and (told.spread < 0.8) is squeezed
    assert told.new.detections == told.old.detections


@pytest.mark.parametrize(
    "change", [lambda conf: conf, lambda conf: conf**2, lambda conf: 0.4 + 0.2 * conf, lambda conf: np.sqrt(conf)]
)
def test_a_threshold_becomes_the_one_of_equal_precision(change: Change) -> None:
    """Where confidences were only moved, in the same order, the new threshold is the old one moved likewise."""
    told = confidences(found(), found(change))
    assert [row.old for row in told.table] == list(THRESHOLDS)
    kept = [row for row in told.table if row.new is not None]
    assert len(kept) >= 15
    for row in kept:
        assert row.new is not None and row.precision is not None and row.new_precision is not None
        # The next detection's confidence stands for the threshold, so the two differ by a gap between detections.
        assert row.new == pytest.approx(float(change(np.array(row.old))), abs=0.03)
        assert row.new_precision == pytest.approx(row.precision, abs=0.03)
        assert row.new_recall == pytest.approx(row.recall, abs=0.03)
    assert [row.new for row in kept] == sorted(row.new for row in kept if row.new is not None)


def test_false_alarms_that_came_up_are_cut_off_again() -> None:
    """A file that is surer of its mistakes than the old one was needs a higher threshold for the same precision."""
    old, rng = found(), np.random.default_rng(1)
    images = []
    for image in old.images:
        conf = np.where(image.tp[:, 0], image.conf, np.minimum(image.conf + rng.uniform(0, 0.3, len(image.conf)), 0.99))
        order = np.argsort(-conf)
        images.append(ImageStats(image.name, image.tp[order], conf[order].astype(np.float32), image.pred_cls,
                                 image.target_cls))  # fmt: skip
    told = confidences(old, Evaluation(0.4, 0.5, {}, tuple(images)))
    rows = [row for row in told.table if row.new is not None]
    assert rows
    assert all(row.new > row.old and row.new_precision >= row.precision - 0.01 for row in rows)  # type: ignore[operator]
    # What the new file is never as precise as is not promised.
    assert any(row.new is None and "as precise" in row.why_not for row in told.table)


def test_a_file_without_mistakes_keeps_each_threshold() -> None:
    """Where precision is 1 everywhere it tells no thresholds apart, and the number of detections does."""
    right = found()
    images = [ImageStats(i.name, np.ones_like(i.tp), i.conf, i.pred_cls, i.target_cls) for i in right.images]
    perfect = Evaluation(1.0, 1.0, {}, tuple(images))
    for row in confidences(perfect, perfect).table:
        if row.new is not None:
            assert row.new == pytest.approx(row.old, abs=0.03)


def test_too_few_detections_tell_nothing() -> None:
    few = confidences(found(detections=0), found(detections=0))
    assert (few.spread, few.squeezed, few.old.detections) == (None, False, 0)
    assert all(row.new is None and f"{ENOUGH} are needed" in row.why_not for row in few.table)
    high = confidences(found(lambda conf: conf * 0.5), found()).table[-1]
    assert (high.old, high.new, high.precision, high.detections) == (0.95, None, None, 0)


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="different images"):
        confidences(found(), found(names="other"))


def test_the_report_tells_it_in_words() -> None:
    sentence = confidence_sentence(confidences(found(), found(lambda conf: 0.4 + 0.2 * conf)))
    assert "squeezed." in sentence and "not squeezed" not in sentence
    assert "A threshold of 0.50 becomes 0.50; thresholds.json" in sentence
    assert confidence_sentence(confidences(found(detections=0), found(detections=0))) == ""
