"""What validation images can decide: held against sets of images that are really drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from yolov8_nas.evaluation import Evaluation, ImageStats, TrainingSpread, compare, mean_average_precision
from yolov8_nas.power import POINT, classes_told, power_of
from yolov8_nas.report import wording
from yolov8_nas.runner.results import ClassEvidence, DecidedBy


def detector(seed: int, images: int, right: float, classes: int = 2) -> Evaluation:
    """Statistics of a detector that finds the one box of an image so often."""
    rng, targets = np.random.default_rng(seed), np.random.default_rng(7)
    stats = []
    for i in range(images):
        box = targets.integers(0, classes, 1).astype(np.int32)
        tp = np.broadcast_to(rng.random((1, 1)) < right, (1, 10))
        stats.append(ImageStats(f"{i}.png", tp, rng.random(1).astype(np.float32), box, box))
    return scored(stats)


def scored(stats: list[ImageStats]) -> Evaluation:
    score = float(mean_average_precision(stats, np.ones((1, len(stats)), dtype=int))[0])
    return Evaluation(score, score, {}, tuple(stats))


def drawn(evaluation: Evaluation, which: np.ndarray) -> Evaluation:
    return replace(
        evaluation, images=tuple(replace(evaluation.images[i], name=str(n)) for n, i in enumerate(which.tolist()))
    )


def test_so_many_images_decide_so_often() -> None:
    first, second = detector(1, 3000, 0.62), detector(2, 3000, 0.5)
    true = float(first.map50_95 - second.map50_95)
    assert 0.05 < true < 0.3
    few = np.random.default_rng(5).choice(3000, 60, replace=False)
    told = power_of(drawn(first, few), drawn(second, few), difference=true)
    assert told.images == 60 and told.images_needed is not None and told.smallest > true
    rng, words = np.random.default_rng(6), []
    for seed in range(60):
        which = rng.choice(3000, told.images_needed)
        words.append(compare(drawn(first, which), drawn(second, which), resamples=200, seed=seed).word)
    assert 0.6 < words.count("ahead") / 60 < 0.95  # 0.8, from 60 images that are a sample themselves
    which = rng.choice(3000, told.images_needed)
    there = power_of(drawn(first, which), drawn(second, which), difference=true)
    assert there.smallest == pytest.approx(true, rel=0.25)


def test_the_smaller_the_difference_the_more_images() -> None:
    first, second = detector(1, 80, 0.6), detector(2, 80, 0.5)
    one, two = (power_of(first, second, difference=d).images_needed for d in (0.01, 0.02))
    assert one and two and 3 < one / two < 5
    assert power_of(first, second, power=0.9).smallest > power_of(first, second, power=0.5).smallest


def test_trainings_that_lie_apart_take_more_trainings_and_not_images_alone() -> None:
    first, second = detector(1, 80, 0.6), detector(2, 80, 0.5)
    close, far, files = (
        power_of(first, second, spread=spread)
        for spread in (TrainingSpread(0.001, 1e6, "here"), TrainingSpread(0.009, 4.0, "here"), None)
    )
    assert files == far.model_copy(update={"smallest_trained": None, "trainings": None, "images_trained": None})
    assert close.trainings == 1
    # 2 * 0.9^2 * (1.96 + 0.84)^2 / k is half of one point squared at k = 25.4; that the spread is estimated adds one.
    assert far.trainings == 27
    for told in (close, far):
        assert told.images_trained and files.images_needed and told.smallest_trained
        assert told.images_trained > files.images_needed
        assert told.smallest_trained > told.smallest
    assert power_of(first, second, spread=TrainingSpread(1.0, 4.0, "here")).trainings is None


def test_files_that_find_the_same_are_decided_by_no_images() -> None:
    first = detector(1, 20, 0.6)
    told = power_of(first, first)
    assert (told.smallest, told.images_needed) == (0, None)
    assert "more of the same decide nothing" in wording.decided_by_sentence(told)


def test_different_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different images"):
        power_of(detector(1, 5, 0.5), detector(1, 6, 0.5))


def test_classes_that_are_too_rare() -> None:
    images = list(detector(3, 400, 0.7, classes=1).images)
    images[:15] = [replace(image, target_cls=np.array([1]), pred_cls=np.array([1])) for image in images[:15]]
    images[15:20] = [replace(image, target_cls=np.array([2, 2]), pred_cls=np.array([2])) for image in images[15:20]]
    common, wide, few, none = classes_told(scored(images), ["scratch", "dent", "hole", "rust"])
    assert (common.images, common.boxes, common.why_not) == (380, 380, None)
    assert common.low is not None and common.map50_95 is not None and common.high is not None
    assert common.low < common.map50_95 < common.high
    assert (wide.images, wide.why_not) == (15, "wide interval") and wide.low is not None and wide.high is not None
    assert (few.images, few.boxes, few.why_not, few.low) == (5, 10, "few images", None)
    assert few.map50_95 is not None
    assert none == ClassEvidence(name="rust", images=0, boxes=0, map50_95=None, low=None, high=None, why_not="no box")
    rows = [common, wide, few, none]
    assert wording.rare_sentence(rows) == (
        "Too rare in the validation images to say anything about: dent (in 15 images, and its interval is wide), "
        "hole (in 5 images), rust (no box)."
    )
    assert wording.rare_sentence(rows[:1]) == ""
    assert [wording.class_interval(row) for row in rows[2:]] == ["too rare", "too rare"]
    assert wording.class_interval(rows[1]).endswith(", too rare")


def test_the_words() -> None:
    files = DecidedBy(difference=POINT, power=0.8, images=80, smallest=0.0568, images_needed=2581)
    told = files.model_copy(update={"smallest_trained": 0.0681, "trainings": 13, "images_trained": 5131})
    assert wording.decided_by_sentence(told).replace("\N{NO-BREAK SPACE}", " ") == (
        "These 80 validation images decide a difference of 5.7 points between two files (80 % of the time); 1 point "
        "would take about 2,600 images. Between two networks, each trained once, they decide 6.8 points; 1 point would "
        "take 13 trainings of each and about 5,200 images."
    )
    apart = told.model_copy(update={"trainings": None, "images_trained": None})
    assert "however many images" in wording.decided_by_sentence(apart)
    assert wording.decided_by_sentence(files).endswith("2,600 images.")
    assert wording.decided_by_sentence(None) == ""
