"""What a search has to answer for: whether it did better than chance, and whether it used what it was allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from yolov8_nas.runner.results import Compared, Larger, LimitUsed
from yolov8_nas.search.candidates import Candidate
from yolov8_nas.search.evolution import Trial, pareto_front
from yolov8_nas.search.objective import CostModel


def comparison(costs: CostModel, searched: Sequence[Trial], compared: Sequence[Trial]) -> Compared:
    """The best network within the limits of a search, and of each repetition of what it is compared with.

    Both are judged by the same cost model: a network that was scored before a refit and would miss a limit by what is
    known now does not count. The scores are the supernet's, before any training; they tell who found what the supernet
    likes best.

    Args:
        costs: Predicts what networks cost, and holds the limits.
        searched: Networks that the search scored.
        compared: Networks that it is compared with, of one kind.

    Returns:
        The comparison; its interval is Student's t over repetitions.
    """
    repetitions = [[t for t in compared if t.repetition == r] for r in sorted({t.repetition or 0 for t in compared})]
    best = [best_score(costs, trials) for trials in repetitions]
    known = [score for score in best if score is not None]
    interval = None
    if len(known) > 1:
        half = student.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known))
        interval = float(np.mean(known) - half), float(np.mean(known) + half)
    return Compared(
        search=best_score(costs, searched),
        search_evaluations=len(searched),
        best=tuple(best),
        evaluations=tuple(len(trials) for trials in repetitions),
        mean=float(np.mean(known)) if known else None,
        interval=interval,
    )


def best_score(costs: CostModel, trials: Sequence[Trial]) -> float | None:
    """The highest mAP50-95 among the networks that are predicted to keep the limits."""
    feasible = costs([trial.architecture for trial in trials]).feasible
    return max((trial.map50_95 for trial, ok in zip(trials, feasible, strict=True) if ok), default=None)


def front(costs: CostModel, trials: Sequence[Trial]) -> list[Trial]:
    """The networks within the limits that no other one beats in both accuracy and latency, from fast to slow."""
    estimate = costs([trial.architecture for trial in trials])
    feasible = [trial for trial, ok in zip(trials, estimate.feasible, strict=True) if ok]
    latency = estimate.latency_ms[estimate.feasible]
    return [feasible[i] for i in pareto_front([trial.map50_95 for trial in feasible], latency)]


def budget(costs: CostModel, trials: Sequence[Trial], best: Candidate) -> LimitUsed:
    """How much of its tightest limit the best candidate uses, and what is known of networks that use more.

    Args:
        costs: Predicts what networks cost, and holds the limits.
        trials: Networks that the search scored.
        best: The first candidate.
    """
    column = costs.limits.index(best.tightest)
    estimate = costs([best.trial.architecture, costs.latency.space.largest(), *[t.architecture for t in trials]])
    own, _, *used = (1 + estimate.violation[:, column]).tolist()
    larger = [t.map50_95 for t, u, ok in zip(trials, used, estimate.feasible[2:], strict=True) if ok and u > own]
    return LimitUsed(
        map50_95=best.trial.map50_95,
        limit=str(best.tightest),
        used=1 - best.slack,
        used_predicted=own,
        reserve=best.upper_ms / best.latency_ms - 1,
        largest_keeps_it=bool(estimate.feasible[1]),
        larger=Larger(scored=len(larger), best_map50_95=max(larger, default=None)),
    )
