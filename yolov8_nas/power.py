"""Are the validation images enough to tell? How many would decide a difference, and which classes are too rare.

A verdict of *undecided* says nothing of two networks until it is known what the images at hand could have decided. Both
answers come from the per-image scores that a verdict has anyway.

Validation sets of any size are drawn from the images at hand (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 25). How far the differences that two files have on them spread is the standard error of a difference at
that size; a true difference of (1.96 + 0.84) standard errors has a 95% interval without zero 80% of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from yolov8_nas.evaluation import (
    Evaluation,
    ImageStats,
    TrainingSpread,
    class_average_precision,
    mean_average_precision,
)
from yolov8_nas.runner.results import ClassEvidence, DecidedBy

POINT: Final = 0.01
"""The difference in mAP50-95 that is asked about: one point."""

POWER: Final = 0.8
"""How often such a difference is to be decided."""

FEW_IMAGES: Final = 10
"""A class in fewer images has no interval: a bootstrap of them knows nothing of those that are missing."""

WIDE: Final = 0.2
"""Width of a 95% interval of a class's AP50-95 from which on it says nothing: 20 points."""

_DRAWS: Final = 300
"""Their spread is known to 4%."""

_SAME: Final = 1e-9
_MOST_TRAININGS: Final = 1000


def power_of(
    first: Evaluation,
    second: Evaluation,
    *,
    spread: TrainingSpread | None = None,
    difference: float = POINT,
    power: float = POWER,
    draws: int = _DRAWS,
    seed: int = 0,
) -> DecidedBy:
    """What the images of two evaluations decide, and how many would decide a difference.

    Args:
        first: A detector.
        second: Another, scored on the same images.
        spread: How far apart trainings of one network are; nothing where the files themselves are compared.
        difference: The difference that is asked about, in mAP from 0 to 1.
        power: How often it is to be decided.
        draws: Validation sets that are drawn.
        seed: Seed of the draws.

    Raises:
        ValueError: The two were not scored on the same images.
    """
    if [image.name for image in first.images] != [image.name for image in second.images]:
        raise ValueError("the two evaluations are of different images: score both on the same split")
    drawn, images = _Drawn(first, second, power, draws, seed), len(first.images)
    smallest = drawn.smallest(images)
    told = DecidedBy(
        difference=difference,
        power=power,
        images=images,
        smallest=smallest,
        images_needed=drawn.images(difference, smallest),
    )
    if spread is None:
        return told
    trainings = next((k for k in range(1, _MOST_TRAININGS) if _of(spread, k, power) <= difference / math.sqrt(2)), None)
    rest = math.sqrt(difference**2 - _of(spread, trainings, power) ** 2) if trainings else 0.0
    trained = {
        "smallest_trained": math.hypot(smallest, _of(spread, 1, power)),
        "trainings": trainings,
        "images_trained": drawn.images(rest, smallest) if trainings else None,
    }
    return told.model_copy(update=trained)


def _of(spread: TrainingSpread, trainings: int, power: float) -> float:
    """The smallest difference between two networks that so many trainings of each decide, however many images."""
    freedom = spread.freedom + 2 * (trainings - 1)  # they tell the spread as well
    return math.sqrt(2 / trainings) * spread.sd * float(t.ppf(0.975, freedom) + t.ppf(power, freedom))


class _Drawn:
    """Validation sets drawn from the images of two evaluations."""

    def __init__(self, first: Evaluation, second: Evaluation, power: float, draws: int, seed: int) -> None:
        self._pair = (first, second)
        self._power = power
        self._draws = draws
        self._seed = seed

    def smallest(self, images: int) -> float:
        """The smallest difference that sets of so many images decide."""
        n = len(self._pair[0].images)
        weights = np.random.default_rng(self._seed).multinomial(images, np.full(n, 1 / n), size=self._draws)
        first, second = (mean_average_precision(one.images, weights) for one in self._pair)
        return float((norm.ppf(0.975) + norm.ppf(self._power)) * np.std(first - second, ddof=1))

    def images(self, difference: float, at_hand: float) -> int | None:
        """How many images decide a difference; nothing where no image tells the two apart.

        Args:
            difference: The difference.
            at_hand: The smallest one that the images at hand decide.
        """
        if at_hand <= _SAME:
            return None
        # Errors fall with the square root of the images, though not exactly so: what that gives is drawn once more.
        images = _many(len(self._pair[0].images), at_hand, difference)
        return _many(images, self.smallest(images), difference)


def _many(images: int, smallest: float, difference: float) -> int:
    return max(2, math.ceil(images * (smallest / difference) ** 2))


def classes_told(
    evaluation: Evaluation, names: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> tuple[ClassEvidence, ...]:
    """What the validation images tell of each class.

    Args:
        evaluation: A detector's score.
        names: All classes of the dataset, by their number.
        draws: Validation sets that are drawn.
        seed: Seed of the draws.
    """
    n = len(evaluation.images)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = np.concatenate([np.ones((1, n), dtype=drawn.dtype), drawn])
    labels, scores = class_average_precision(evaluation.images, weights)
    columns = {int(label): scores[:, column] for column, label in enumerate(labels)}
    return tuple(_told(name, label, evaluation.images, columns.get(label)) for label, name in enumerate(names))


def _told(name: str, label: int, images: Sequence[ImageStats], scores: NDArray[np.float64] | None) -> ClassEvidence:
    boxes = [int((image.target_cls == label).sum()) for image in images]
    with_it = sum(count > 0 for count in boxes)
    told = ClassEvidence(name=name, images=with_it, boxes=sum(boxes))
    if scores is None:
        return told.model_copy(update={"why_not": "no box"})
    told = told.model_copy(update={"map50_95": float(scores[0])})
    if with_it < FEW_IMAGES:
        return told.model_copy(update={"why_not": "few images"})
    low, high = map(float, np.nanpercentile(scores[1:], [2.5, 97.5]))
    why = "wide interval" if high - low > WIDE else None
    return told.model_copy(update={"low": low, "high": high, "why_not": why})
