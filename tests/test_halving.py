"""Successive halving: who is trained for how long, and who is judged the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from yolov8_nas.train.halving import Result, Rung, Standing, epochs_of, halve, schedule


def run(rungs: Sequence[Rung], scores: Sequence[Sequence[float]]) -> tuple[list[Standing], list[tuple[int, int]]]:
    """A halving on scores that are known: one row per entrant, one column per rung."""
    asked: list[tuple[int, int]] = []

    def train(entrant: int, rung: int) -> Result:
        asked.append((entrant, rung))
        return Result(scores[entrant][rung], seconds=1.0)

    return halve(len(scores), rungs, train), asked


@pytest.mark.parametrize(
    ("entrants", "finalists", "epochs", "expected"),
    [
        (12, 2, 30, [(12, 3), (4, 10), (2, 30)]),
        (14, 2, 30, [(14, 3), (5, 10), (2, 30)]),
        (9, 1, 27, [(9, 3), (3, 9), (1, 27)]),
        (3, 1, 12, [(3, 4), (1, 12)]),
        (2, 1, 2, [(2, 1), (1, 2)]),
        (2, 2, 30, [(2, 30)]),
        (1, 3, 30, [(1, 30)]),
    ],
)
def test_a_third_goes_on_for_three_times_as_long(
    entrants: int, finalists: int, epochs: int, expected: list[tuple[int, int]]
) -> None:
    rungs = schedule(entrants, finalists, epochs)
    assert [(rung.networks, rung.epochs) for rung in rungs] == expected
    assert epochs_of(rungs) == sum(networks * epochs for networks, epochs in expected)


def test_rungs_as_asked_for_have_no_more_networks_than_there_are() -> None:
    asked = [Rung(12, 3), Rung(4, 8)]
    assert schedule(20, 2, 30, asked) == (Rung(12, 3), Rung(4, 8), Rung(2, 30))
    assert schedule(3, 2, 30, asked) == (Rung(3, 3), Rung(3, 8), Rung(2, 30))
    assert schedule(2, 2, 30, asked) == (Rung(2, 30),)
    assert schedule(6, 2, 30, []) == (Rung(2, 30),)


def test_every_rung_leaves_the_weakest_behind_and_all_are_ranked() -> None:
    scores = [[0.1, 0, 0], [0.4, 0.5, 0.6], [0.3, 0.1, 0], [0.5, 0.5, 0.5], [0.2, 0, 0], [0.0, 0, 0]]
    ranking, asked = run([Rung(6, 3), Rung(3, 8), Rung(2, 30)], scores)
    assert asked == [(i, 0) for i in range(6)] + [(3, 1), (1, 1), (2, 1)] + [(3, 2), (1, 2)]
    assert [(one.entrant, one.rungs) for one in ranking] == [(1, 3), (3, 3), (2, 2), (4, 1), (0, 1), (5, 1)]
    assert [result.score for result in ranking[0].results] == scores[1]
    assert ranking[0].expected == pytest.approx(0.55 + ranking[0].lead)


def test_what_shorter_rungs_told_counts_by_their_epochs() -> None:
    rungs = [Rung(3, 10), Rung(2, 30)]
    # In the end the second is ahead by a hair, the first was by far.
    (first, second, _), _ = run(rungs, [[0.50, 0.600], [0.40, 0.601], [0.10, 0.0]])
    assert (first.entrant, second.entrant) == (0, 1)
    assert first.lead == pytest.approx((10 * 0.05 - 30 * 0.0005) / 40)
    assert first.expected > first.results[-1].score > 0
    (first, *_), _ = run(rungs, [[0.50, 0.60], [0.40, 0.65], [0.10, 0.0]])
    assert first.entrant == 1


@pytest.mark.parametrize(
    ("reserve", "last", "order"),
    [
        (frozenset(), 2, [0, 1, 2, 3]),
        ({1}, 2, [0, 1, 2, 3]),
        ({2, 3}, 2, [0, 2, 1, 3]),  # the better one of them
        ({3}, 1, [0, 1, 2, 3]),  # one network is trained to the end: the best
    ],
)
def test_one_of_the_reserve_is_among_the_last(reserve: frozenset[int], last: int, order: list[int]) -> None:
    scores = [[0.5, 0.5], [0.4, 0.4], [0.3, 0.3], [0.2, 0.2]]
    ranking = halve(4, [Rung(4, 1), Rung(last, 3)], lambda i, rung: Result(scores[i][rung]), reserve)
    assert [one.entrant for one in ranking] == order
    assert [one.rungs for one in ranking] == [2] * last + [1] * (4 - last)


def test_equals_keep_the_order_in_which_they_came() -> None:
    ranking, _ = run([Rung(5, 1), Rung(2, 3)], [[0.1 + 0.2, 0.3]] + [[0.3, 0.1 + 0.2]] * 4)
    assert [one.entrant for one in ranking] == [0, 1, 2, 3, 4]


def test_no_more_enter_than_the_first_rung_has_room_for() -> None:
    _, asked = run([Rung(2, 1), Rung(1, 3)], [[0.1, 0.1], [0.2, 0.2], [0.9, 0.9]])
    assert asked == [(0, 0), (1, 0), (1, 1)]


def test_of_noisy_rungs_all_together_choose_better_than_the_last_alone() -> None:
    """Differences of half a point, with the noise that a training and a hundred images have."""
    rng = np.random.default_rng(0)
    rungs = schedule(12, 3, 30)
    chosen, last = [], []
    for _ in range(400):
        worth = rng.normal(0.5, 0.01, 12)
        scores = worth[:, None] + rng.normal(0, [0.012, 0.010, 0.008], (12, 3))
        ranking, _ = run(rungs, scores.tolist())
        finalists = [one for one in ranking if one.rungs == 3]
        chosen.append(worth[finalists[0].entrant])
        last.append(worth[max(finalists, key=lambda one: one.results[-1].score).entrant])
    assert np.mean(chosen) > np.mean(last) > 0.5 + 0.5 * 0.01
    assert math.isfinite(float(np.mean(chosen)))


def test_nothing_to_train_is_told() -> None:
    with pytest.raises(ValueError, match="needs networks and a rung"):
        halve(0, [Rung(1, 1)], lambda entrant, rung: Result(0.0))
