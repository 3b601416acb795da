"""From scored networks to candidates: networks that keep the limits as measured on the device, not as predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from yolov8_nas.errors import StageError
from yolov8_nas.hardware.benchmark import Measurement
from yolov8_nas.search.constraint import Constraint
from yolov8_nas.search.evolution import Trial, pareto_front
from yolov8_nas.search.objective import CostModel, Estimate, Floats
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.space import Architecture

Measure: TypeAlias = Callable[[Sequence[Architecture]], Sequence[Measurement]]
"""Exports networks as they ship and measures them on the device, all in the same rounds."""

ATTEMPTS: Final = 4
"""Networks measured at most, as a multiple of the candidates wanted."""


@dataclass(frozen=True)
class Candidate:
    """A network that was exported and measured.

    Attributes:
        trial: The network and its score.
        latency_ms: Predicted median latency in milliseconds.
        upper_ms: Upper confidence bound of it.
        measurement: What was measured.
        slack: Share of the tightest limit that is left unused; below 0 it was missed.
        tightest: That limit.
    """

    trial: Trial
    latency_ms: float
    upper_ms: float
    measurement: Measurement
    slack: float
    tightest: Constraint

    @property
    def met(self) -> bool:
        """Whether every limit was kept as measured."""
        return self.slack >= 0

    def to_dict(self) -> dict[str, Any]:
        """The entry of `candidates.json`."""
        return {
            "architecture": self.trial.architecture.to_dict(),
            "map50_95_search": self.trial.map50_95,
            "source": self.trial.source,
            "predicted": {"latency_ms": self.latency_ms, "upper_ms": self.upper_ms},
            "measured": self.measurement.to_dict(),
            "met": self.met,
            "slack": self.slack,
            "tightest": str(self.tightest),
        }


def choose(
    trials: Sequence[Trial], costs: CostModel, measure: Measure, *, count: int, preference: Preference = MOST_ACCURATE
) -> tuple[list[Candidate], list[Candidate]]:
    """Find the networks that are handed on.

    The front comes first and then the other networks, both by preference: the accurate ones first, unless accuracy and
    latency have weights. As many are measured as are missing; those that miss a limit make room for the next, up to
    `ATTEMPTS * count` in all. A device may have changed since it was probed: what the measured networks took more than
    predicted, the next are expected to take as well, and whichever would so miss a limit has to wait.

    Args:
        trials: Scored networks of the search. What it is compared with stays out: a random network that was handed on
            would make the comparison one of the search with itself.
        costs: Predicts what networks cost, and holds the limits.
        measure: Exports and measures networks.
        count: Candidates wanted; there are fewer where fewer keep the limits.
        preference: What is wanted of them.

    Returns:
        The candidates, the most wanted first, and the measured networks that missed a limit.

    Raises:
        StageError: None of the measured networks keeps the limits.
    """
    estimate = costs([t.architecture for t in trials])
    waiting = _by_promise(trials, estimate, preference)
    measured: list[Candidate] = []
    drift: list[Floats] = []  # of each measured network: measured over predicted, by limit
    while waiting:
        missing = count - sum(candidate.met for candidate in measured)
        batch = waiting[: min(missing, ATTEMPTS * count - len(measured))]
        if not batch:
            break
        for i, measurement in zip(batch, measure([trials[i].architecture for i in batch]), strict=True):
            values = costs.measured(trials[i].architecture, measurement)
            (violation,) = np.where(np.isnan(values), -np.inf, costs.violation(values[None]))
            tightest = int(violation.argmax())
            slack = -float(violation[tightest])
            predicted = float(estimate.latency_ms[i]), float(estimate.upper_ms[i])
            measured.append(Candidate(trials[i], *predicted, measurement, slack, costs.limits[tightest]))
            drift.append(values / estimate.values[i])
        expected = costs.violation(estimate.values * np.median(drift, axis=0)).max(axis=1)
        waiting = sorted(waiting[len(batch) :], key=lambda i: expected[i] > 0)
    met = sorted(
        (c for c in measured if c.met),
        key=lambda c: preference.loss(c.trial.map50_95, c.measurement.latency_ms.p50),
    )
    if not met:
        raise StageError(_none_holds(measured, costs))
    return met, [c for c in measured if not c.met]


def _by_promise(trials: Sequence[Trial], estimate: Estimate, preference: Preference) -> list[int]:
    """Indices of the networks within the limits: those of the front by preference, then the others likewise.

    All kept the limits by the model that they were scored under. Where none does by a model that was refitted since,
    they come in the order of how far they miss them: the measurement decides.
    """
    feasible: list[int] = np.flatnonzero(estimate.feasible).tolist()
    if not feasible:
        return np.argsort(estimate.worst, kind="stable").tolist()  # type: ignore[no-any-return]
    front = pareto_front([trials[i].map50_95 for i in feasible], estimate.latency_ms[feasible])
    on_front = {feasible[i] for i in front}

    def rank(i: int) -> tuple[bool, float, float]:
        latency = float(estimate.latency_ms[i])
        return i not in on_front, preference.loss(trials[i].map50_95, latency), latency

    return sorted(feasible, key=rank)


def _none_holds(measured: Sequence[Candidate], costs: CostModel) -> str:
    limits = " and ".join(map(str, costs.limits))
    fastest = min(measured, key=lambda candidate: candidate.measurement.latency_ms.p50)
    latency = fastest.measurement.latency_ms
    return (
        f"none of {len(measured)} networks measured on the device keeps {limits}; the fastest takes "
        f"{latency.p50:.4g} ms (p90 {latency.p90:.4g}, p99 {latency.p99:.4g}): "
        "raise the limit, or probe the device again when nothing else runs on it"
    )
