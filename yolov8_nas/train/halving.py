"""Successive halving: short trainings of many networks, longer ones of the best of them, whole ones of the last.

Jamieson and Talwalkar, arXiv:1502.07943. Nothing here trains: what does is handed in, so that the decisions can be
tested, and replayed on stored scores.

Each rung is a training of its own, from the same start and with a schedule of its own (warm-up, decay, closing epochs),
and not a longer one cut off: the learning rate has come down where networks are compared, as it will have in the end.
A later rung begins again at the start. Going on would give its networks epochs that what they are compared with never
had; and images that a rung held out would be training images of the next one, so that nothing fresh could be asked.

A network is judged by all rungs that it has been through. A rung tells by how much it lies above the mean of those that
are still there, and a rung counts as much as it has epochs: the longer training says more about the end, the shorter
one says it of other images and another order, whose luck is not the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final, Literal

ETA: Final = 3
"""From rung to rung the networks become a third as many, and their epochs three times as many."""


@dataclass(frozen=True)
class Rung:
    """Trainings that are compared with each other.

    Attributes:
        networks: How many networks are trained.
        epochs: How long.
    """

    networks: int
    epochs: int


@dataclass(frozen=True)
class Result:
    """The outcome of a network's training in a rung.

    Attributes:
        score: Expected accuracy, mAP50-95 from 0 to 1.
        seconds: Its duration.
    """

    score: float
    seconds: float = 0.0


Train = Callable[[int, int], Result]
"""Trains an entrant (its index) in a rung (its index). Asked again, it gives the same answer, at no cost."""


@dataclass(frozen=True)
class Standing:
    """Where an entrant has come to.

    Attributes:
        entrant: Its index.
        results: What each rung told, as far as it came.
        lead: By how much its score lies above the mean of the networks of its last rung, over all rungs that it has
            been through.
        expected: Expected accuracy after a training as long as its last rung's: the mean of that rung, plus `lead`.
    """

    entrant: int
    results: tuple[Result, ...]
    lead: float
    expected: float

    @property
    def rungs(self) -> int:
        """Rungs that it has been through."""
        return len(self.results)


def schedule(
    entrants: int, finalists: int, epochs: int, short: Sequence[Rung] | Literal["auto"] = "auto"
) -> tuple[Rung, ...]:
    """The rungs of a halving, the last of which are whole trainings.

    Args:
        entrants: Networks that enter.
        finalists: Networks that are trained to the end at most.
        epochs: Epochs of a whole training.
        short: The rungs before that; `auto` for as many as a third each time leads to the finalists, with all entrants
            in the first one. None where there is nothing to choose: the first entrants are trained to the end.

    Returns:
        At least one rung; none has more networks than the one before.
    """
    finalists = min(finalists, entrants)
    if short == "auto":
        steps = math.ceil(round(math.log(entrants / finalists, ETA), 9))
        short = [Rung(math.ceil(entrants / ETA**i), max(1, round(epochs / ETA ** (steps - i)))) for i in range(steps)]
    rungs: list[Rung] = []
    for rung in short if entrants > finalists else ():
        left = rungs[-1].networks if rungs else entrants
        rungs.append(Rung(max(finalists, min(rung.networks, left)), rung.epochs))
    return (*rungs, Rung(finalists, epochs))


def epochs_of(rungs: Sequence[Rung]) -> int:
    """Epochs that a halving takes in all."""
    return sum(rung.networks * rung.epochs for rung in rungs)


def halve(entrants: int, rungs: Sequence[Rung], train: Train, reserve: Set[int] = frozenset()) -> list[Standing]:
    """Train networks rung by rung, and rank them.

    Args:
        entrants: How many enter. The first of them enter a rung that has less room: their order is the expectation with
            which they come, and decides between equals.
        rungs: The rungs, none with more networks than the one before.
        train: Trains a network.
        reserve: Entrants one of which is to be among the last, where these are several: the best of them takes the last
            place if none of them has one by its score.

    Returns:
        All that were trained, the best first: those of the last rung, then those that the rung before it left behind.
    """
    if not entrants or not rungs:
        raise ValueError("a halving needs networks and a rung")
    results: dict[int, list[Result]] = {}
    alive = list(range(min(entrants, rungs[0].networks)))
    behind: list[Standing] = []
    for number, rung in enumerate(rungs):
        alive = alive[: rung.networks]
        for entrant in alive:
            results.setdefault(entrant, []).append(train(entrant, number))
        ranked = _rank(alive, results, rungs)
        left = rungs[number + 1].networks if number + 1 < len(rungs) else len(ranked)
        kept = ranked[:left]
        spare = next((standing for standing in ranked if standing.entrant in reserve), None)
        if spare is not None and spare not in kept and left > 1:
            kept[-1] = spare
        behind[:0] = [standing for standing in ranked if standing not in kept]
        alive = [standing.entrant for standing in kept]
    return [*ranked, *behind]


def _rank(alive: Sequence[int], results: Mapping[int, Sequence[Result]], rungs: Sequence[Rung]) -> list[Standing]:
    """The networks of a rung by all that is known of them."""
    scores = {entrant: [result.score for result in results[entrant]] for entrant in alive}
    through = len(scores[alive[0]])
    means = [math.fsum(scores[entrant][i] for entrant in alive) / len(alive) for i in range(through)]
    weights = [rung.epochs for rung in rungs[:through]]
    standings = []
    for entrant in alive:
        leads = [score - mean for score, mean in zip(scores[entrant], means, strict=True)]
        lead = math.fsum(w * x for w, x in zip(weights, leads, strict=True)) / sum(weights)
        standings.append(Standing(entrant, tuple(results[entrant]), lead, means[-1] + lead))
    # To nine digits, so that the order of equals does not hang on the last bit of a sum.
    return sorted(standings, key=lambda standing: (-round(standing.lead, 9), standing.entrant))
