"""From scored networks to candidates: networks that keep the limits as measured on the device, not as predicted.

Scores rank networks of like latency only weakly, and real trainings decide among the candidates in the end. So the
candidates are not the same network a few times over: most of them are those that are expected to be the most accurate,
each different from those before it in some choices; every third one is the network near the limit that differs most
from those before it; and the widest rescaled stock network within the limits is always among them, so that what ships
is never worse than what people do by hand.

The search goes by expected latency, so about half of what is measured first misses a limit by a little, or leaves
something of it unused. What was measured tells by how much, and each such network is brought to the limit once more and
measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from yolov8_nas.errors import StageError
from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.runner.results import CandidateResult, Compiled, Measured, Predicted
from yolov8_nas.search.evolution import SPARE, Trial
from yolov8_nas.search.objective import CostModel, Estimate, Floats
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.limits import Constraint

Measure: TypeAlias = Callable[[Sequence[Architecture]], Sequence[Measurement]]
"""Exports networks as they ship and measures them on the device, all in the same rounds."""

Expect: TypeAlias = Callable[[Sequence[Trial]], Floats]
"""Expected accuracy of networks once they are trained, comparable among themselves."""

Adjust: TypeAlias = Callable[[Architecture, Floats], Trial | None]
"""Brings a network to the limits under a cost model whose values are corrected by factors (limits,), and scores it."""

ATTEMPTS: Final = 4
"""Networks measured at most, as a multiple of the candidates wanted."""

APART: Final = 3
"""Choices in which a candidate differs from every one before it at least."""

EXPLORE: Final = 3
"""One in so many candidates is chosen for being different."""

NEAR: Final = 0.1
"""Share of a limit that a network may leave unused and still count as near it."""


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

    def to_result(self, compiler: Compiled | None = None) -> CandidateResult:
        """The candidate as a part of the stage's result, with what the compiler told of its engine."""
        return CandidateResult(
            architecture=self.trial.architecture,
            map50_95_search=self.trial.map50_95,
            source=self.trial.source,
            predicted=Predicted(latency_ms=self.latency_ms, upper_ms=self.upper_ms),
            measured=Measured(**self.measurement.to_dict()),
            met=self.met,
            slack=self.slack,
            tightest=str(self.tightest),
            compiler=compiler,
        )


def choose(
    space: SearchSpace,
    trials: Sequence[Trial],
    costs: CostModel,
    measure: Measure,
    *,
    count: int,
    expect: Expect,
    adjust: Adjust | None = None,
    preference: Preference = MOST_ACCURATE,
) -> tuple[list[Candidate], list[Candidate]]:
    """Find the networks that are handed on.

    As many are measured as are missing; those that miss a limit make room for the next, up to `ATTEMPTS * count` in
    all. A device may have changed since it was probed: what the measured networks took more than predicted, the next
    are expected to take as well, and whichever would so miss a limit has to wait.

    Args:
        space: The space.
        trials: Scored networks of the search. What it is compared with stays out: a random network that was handed on
            would make the comparison one of the search with itself.
        costs: Predicts what networks cost, and holds the limits.
        measure: Exports and measures networks.
        count: Candidates wanted; there are fewer where fewer keep the limits.
        expect: Tells what to expect of networks once they are trained.
        adjust: Brings a measured network to the limit; without it, networks stay as they were scored.
        preference: What is wanted of them.

    Returns:
        The candidates, the most wanted first, and the measured networks that missed a limit.

    Raises:
        StageError: None of the measured networks keeps the limits.
    """
    waiting = _by_promise(space, trials, costs([t.architecture for t in trials]), expect, preference)
    measured: dict[Architecture, Candidate] = {}
    drift: list[Floats] = []  # of each measured network: measured over predicted, by limit

    def meet(batch: Sequence[Trial]) -> list[Candidate]:
        found, factors = _met(batch, costs, measure)
        drift.extend(factors)
        measured.update((candidate.trial.architecture, candidate) for candidate in found)
        return found

    while waiting:
        missing = count - sum(candidate.met for candidate in measured.values())
        if not (batch := waiting[: max(0, min(missing, ATTEMPTS * count - len(drift)))]):
            break
        waiting = waiting[len(batch) :]
        found = meet(batch)
        if adjust is not None and not preference.weighs_latency:
            fuller = _fuller(found, drift[-len(found) :], adjust, measured)
            for candidate in meet([trial for trial, _ in fuller.values()]) if fuller else ():
                before = fuller[candidate.trial.architecture][1]
                if candidate.met and before.met:
                    del measured[before.trial.architecture]
        waiting = _late_last(waiting, costs, np.median(drift, axis=0))
    if not (met := [candidate for candidate in measured.values() if candidate.met]):
        raise StageError(_none_holds(list(measured.values()), costs))
    return _with_rescaled(_most_wanted(met, expect, preference), count), [c for c in measured.values() if not c.met]


def _met(batch: Sequence[Trial], costs: CostModel, measure: Measure) -> tuple[list[Candidate], list[Floats]]:
    """Networks held against the limits, with what was measured of each limit over what was predicted."""
    networks = [trial.architecture for trial in batch]
    estimate = costs(networks)
    found, drift = [], []
    for i, (trial, measurement) in enumerate(zip(batch, measure(networks), strict=True)):
        values = costs.measured(trial.architecture, measurement)
        (violation,) = np.where(np.isnan(values), -np.inf, costs.violation(values[None]))
        tightest = int(violation.argmax())
        predicted = float(estimate.latency_ms[i]), float(estimate.upper_ms[i])
        found.append(Candidate(trial, *predicted, measurement, -float(violation[tightest]), costs.limits[tightest]))
        drift.append(values / estimate.values[i])
    return found, drift


def _fuller(
    found: Sequence[Candidate], drift: Sequence[Floats], adjust: Adjust, measured: Mapping[Architecture, Candidate]
) -> dict[Architecture, tuple[Trial, Candidate]]:
    """Networks brought to the limits, with the one that each comes from; none for those that are at the limits."""
    fuller: dict[Architecture, tuple[Trial, Candidate]] = {}
    for candidate, factors in zip(found, drift, strict=True):
        if -SPARE <= -candidate.slack <= 0 or candidate.trial.source == "rescaled":
            continue
        trial = adjust(candidate.trial.architecture, factors)
        if trial is not None and trial.architecture not in measured:
            fuller.setdefault(trial.architecture, (trial, candidate))
    return fuller


def _late_last(waiting: Sequence[Trial], costs: CostModel, drift: Floats) -> list[Trial]:
    """Networks in their order, but those last that would miss a limit by as much as was measured over predicted."""
    if not waiting:
        return []
    expected = costs.violation(costs([t.architecture for t in waiting]).values * drift).max(axis=1)
    return [waiting[i] for i in np.argsort(expected > 0, kind="stable")]


def _most_wanted(met: Sequence[Candidate], expect: Expect, preference: Preference) -> list[Candidate]:
    """The candidates, the most wanted first."""
    if preference.weighs_latency:
        wanted = [preference.loss(c.trial.map50_95, c.measurement.latency_ms.p50) for c in met]
    else:
        wanted = (-expect([c.trial for c in met])).tolist()
    return [met[i] for i in np.argsort(wanted, kind="stable")]


def near_the_limits(trials: Sequence[Trial], estimate: Estimate) -> list[Trial]:
    """The networks within the limits that leave at most `NEAR` of the tightest unused; all within, where none does."""
    within = [trial for trial, worst in zip(trials, estimate.worst, strict=True) if worst <= 0]
    near = [trial for trial, worst in zip(trials, estimate.worst, strict=True) if -NEAR <= worst <= 0]
    return near or within or list(trials)


def _by_promise(
    space: SearchSpace, trials: Sequence[Trial], estimate: Estimate, expect: Expect, preference: Preference
) -> list[Trial]:
    """All networks within the limits, in the order in which they are worth measuring; see the module.

    All kept the limits by the model that they were scored under. Where none does by a model that was refitted since,
    they come in the order of how far they miss them: the measurement decides.
    """
    feasible = [trial for trial, ok in zip(trials, estimate.feasible, strict=True) if ok]
    if not feasible:
        return [trials[i] for i in np.argsort(estimate.worst, kind="stable")]
    if preference.weighs_latency:
        loss = preference.loss(np.array([t.map50_95 for t in trials]), estimate.latency_ms)
        return [trials[i] for i in np.argsort(loss, kind="stable") if estimate.feasible[i]]
    near = near_the_limits(trials, estimate)
    rescaled = [trial for trial in feasible if trial.source == "rescaled"]
    promising = [near[i] for i in np.argsort(-expect(near), kind="stable")]
    order = [*rescaled, *(trial for trial in promising if trial not in rescaled)]
    genes = np.array([space.encode(trial.architecture) for trial in order])
    chosen = list(range(len(rescaled)))
    distance = np.full(len(order), len(space.dimensions))  # of each network from those that are chosen
    left = np.ones(len(order), dtype=bool)
    for i in chosen:
        distance, left[i] = np.minimum(distance, (genes != genes[i]).sum(axis=1)), False
    while (apart := np.flatnonzero(left & (distance >= APART))).size:
        explore = len(chosen) % EXPLORE == EXPLORE - 1
        i = int(apart[distance[apart].argmax()] if explore else apart[0])
        chosen.append(i)
        distance, left[i] = np.minimum(distance, (genes != genes[i]).sum(axis=1)), False
    first = [order[i] for i in (*chosen, *np.flatnonzero(left))]
    known = {trial.architecture for trial in first}
    rest = [trial for trial in feasible if trial.architecture not in known]
    return first + sorted(rest, key=lambda trial: -trial.map50_95)


def _with_rescaled(met: Sequence[Candidate], count: int) -> list[Candidate]:
    """The first `count` candidates, with the rescaled stock network in the last place where it would be left out."""
    kept, left = list(met[:count]), met[count:]
    rescaled = next((candidate for candidate in left if candidate.trial.source == "rescaled"), None)
    return [*kept[:-1], rescaled] if rescaled is not None and count > 1 else kept


def _none_holds(measured: Sequence[Candidate], costs: CostModel) -> str:
    limits = " and ".join(map(str, costs.limits))
    fastest = min(measured, key=lambda candidate: candidate.measurement.latency_ms.p50)
    latency = fastest.measurement.latency_ms
    return (
        f"none of {len(measured)} networks measured on the device keeps {limits}; the fastest takes "
        f"{latency.p50:.4g} ms (p90 {latency.p90:.4g}, p99 {latency.p99:.4g}): "
        "raise the limit, or probe the device again when nothing else runs on it"
    )
