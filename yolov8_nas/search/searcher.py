"""The search for one device: from a supernet, a latency model and limits to networks that keep them as measured.

    narrow      the hardware rules have done that: the space may be a part of the supernet's
    learn       architecture parameters learn by gradient which options are worth their latency: the prior
    solve       an exact solver turns the prior into the best networks within the limits
    evolve      from these, from rescaled stock and its relatives, networks at the limits are bred and scored; every few
                generations the best are measured on the device and the latency model is refitted
    choose      the networks of which score and capacity together promise most, each different from the others, are
                exported and measured, and brought to the limits where they miss them or leave something unused
    rescale     for each of them, stock rescaled to its latency: what real trainings will compare it with

Everything that takes time goes through two callables, one that scores a network and one that measures networks; both
remember what they found. So an interrupted search is run again from its start, in a blink as far as that reaches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from typing import Protocol as Interface

import numpy as np

from yolov8_nas.errors import StageError
from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.measure.protocol import PROBE, VERIFY, Protocol
from yolov8_nas.runner.results import Source
from yolov8_nas.search.baseline import mac_ranking, random_networks
from yolov8_nas.search.beginning import Beginning
from yolov8_nas.search.candidates import Candidate, choose, near_the_limits
from yolov8_nas.search.differentiable import Prior
from yolov8_nas.search.evolution import (
    Trial,
    Utility,
    evolve,
    to_the_limit,
)
from yolov8_nas.search.linear_cost import LinearCost
from yolov8_nas.search.objective import CostModel, Estimate, Floats
from yolov8_nas.search.plan import LEARNING, MEASURING, Plan
from yolov8_nas.search.predictor import Predictor
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.search.rescaling import Rescaled, Rescaling
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.supernet.supernet import Supernet

FRONT: Final = 8
"""Networks measured at most when the latency model is refitted."""

ROUNDS: Final = 12
"""Rounds in which candidates are measured at most; the verdict on what ships takes more where it needs them."""


class Measure(Interface):
    """Exports networks as they ship and measures them on the device, all in the same rounds."""

    def __call__(
        self,
        architectures: Sequence[Architecture],
        protocol: Protocol,
        name: str,
        progress: Callable[[float, float], None],
    ) -> list[Measurement]:
        """Measure networks, or remember what was measured of them under the name."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        trials: Every network that the search scored, in order.
        compared: Networks that were scored for comparison.
        met: The candidates, the most promising first: they keep the limits as measured.
        missed: Networks that were measured and missed a limit.
        rescaled: Stock at the candidates' latencies.
        stock_score: Stock's mAP50-95 with the supernet's weights.
        prior: The prior, where one was learned.
        limit_ms: What the linear part of the latency model could come to when it was learned.
        costs: The cost model after the last refit.
        measured_ms: Median latencies of all measured networks.
        seconds_comparing: What was spent on networks that are there for comparison only.
    """

    trials: Sequence[Trial]
    compared: Sequence[Trial]
    met: Sequence[Candidate]
    missed: Sequence[Candidate]
    rescaled: Sequence[Rescaled]
    stock_score: float
    prior: Prior | None
    limit_ms: float | None
    costs: CostModel
    measured_ms: Mapping[Architecture, float]
    seconds_comparing: float


def silent(done: float, message: str, best: tuple[float, float] | None) -> None:
    """Progress that nobody wants."""


@dataclass
class Searcher:
    """One search. Call `run`, once.

    Attributes:
        supernet: The trained supernet.
        data: Ultralytics data yaml, with the search split as `val`.
        space: The space that is searched: the supernet's, or a part of it.
        costs: Predicts what networks cost, and holds the limits.
        plan: How much may be spent.
        score: mAP50-95 of a network with the supernet's weights; cheap for a network that was scored before.
        measure: Measures networks on the device.
        imgsz: Side of the square input in pixels.
        work: Folder for checkpoints of the prior.
        probed_ms: Level of the hour in which the device was probed: what stock took then.
        preference: What is wanted of the networks within the limits.
        progress: Told work done (of `plan.work`), a message, and the best network so far: its mAP50-95, and its
            latency in ms with the sign turned.
        note: Told what goes on.
    """

    supernet: Supernet
    data: Path
    space: SearchSpace
    costs: CostModel
    plan: Plan
    score: Callable[[Architecture], float]
    measure: Measure
    imgsz: int
    work: Path
    probed_ms: float | None = None
    preference: Preference = MOST_ACCURATE
    progress: Callable[[float, str, tuple[float, float] | None], None] = silent
    note: Callable[[str], None] = lambda message: None
    measured_ms: dict[Architecture, float] = field(default_factory=dict, init=False)
    _tables: LinearCost | None = field(default=None, init=False)
    _best: tuple[float, float] | None = field(default=None, init=False)
    _done: float = field(default=0.0, init=False)
    _scored: int = field(default=0, init=False)

    def run(self) -> Found:
        """Search.

        Raises:
            StageError: No network keeps the limits, by prediction or as measured.
        """
        limit_ms = affordable_ms(self.costs, self._linear(), self.space.stock)
        informed, prior = self._beginning.networks(self.price, limit_ms)
        self._done = LEARNING * (self.plan.prior_steps if prior else 0)
        trials = evolve(
            self.space,
            self.price,
            self._score,
            population=self.plan.population,
            generations=self.plan.generations,
            seed=self.plan.seed,
            informed=informed,
            propose=self._propose if self.plan.exact else None,
            preference=self.preference,
            after_generation=self._refit,
        )
        if not any(trial.map50_95 for trial in trials):
            self.note("every network scores 0: the supernet needs more epochs to tell networks apart")
        start = time.monotonic()
        compared = self._compare(len(trials))
        comparing = time.monotonic() - start
        stock_score = self.score(self.space.stock)
        met, missed = choose(
            self.space,
            trials,
            self.costs,
            self._measure_candidates,
            count=self.plan.candidates,
            expect=self._predictor(trials),
            adjust=self._adjust if self.plan.measure_every else None,
            preference=self.preference,
        )
        trials += [c.trial for c in (*met, *missed) if c.trial.source == "filled"]
        start = time.monotonic()
        rescaled = self._rescaling.to_each(met) if self.plan.rescaled else []
        comparing += time.monotonic() - start
        return Found(
            trials,
            compared,
            met,
            missed,
            rescaled,
            stock_score,
            prior,
            limit_ms,
            self.costs,
            self.measured_ms,
            comparing,
        )

    def price(self, architectures: Sequence[Architecture]) -> Estimate:
        """What networks cost by the cost model as it stands."""
        return self.costs(architectures)

    @property
    def _beginning(self) -> Beginning:
        return Beginning(
            self.supernet,
            self.data,
            self.space,
            self.costs,
            self._linear(),
            self.plan,
            self.imgsz,
            self.work,
            lambda done, message: self.progress(done, message, self._best),
        )

    def _linear(self) -> LinearCost:
        """The linear part of the latency model as it stands."""
        if self._tables is None:
            self._tables = LinearCost.of_latency(self.costs.latency)
        return self._tables

    def _propose(self, effects: Utility) -> list[Architecture]:
        """The best network within the limits by what the scores so far make of each option."""
        try:
            return self._beginning.solve(effects, solutions=1)
        except StageError as error:  # evolution may know one that the refitted model still allows
            self.note(str(error))
            return []

    # Scoring ----------------------------------------------------------------------------------------------------------

    def _score(self, architectures: Sequence[Architecture]) -> list[float]:
        """Score networks, with progress."""
        if not architectures:
            return []
        scores = []
        for architecture, latency in zip(architectures, self.price(architectures).latency_ms, strict=True):
            scores.append(self.score(architecture))
            self._done += 1
            self._scored += 1
            found = scores[-1], -float(latency)
            self._best = max(self._best or found, found)
            generation = (self._scored - 1) // self.plan.population + 1
            step = f"generation {generation}" if generation <= self.plan.generations else "for comparison"
            self._tell(self._done, f"{step}, network {self._scored} of {self.plan.to_score}")
        return scores

    def _compare(self, searched: int) -> list[Trial]:
        """Score random networks and the largest within the limits, drawn by the latency model as it stands in the end.

        They are drawn with no regard to what the search has scored, and none of them is handed on: a comparison in
        which the search may take over what beats it would always come out well.

        Args:
            searched: Networks that the search itself has scored.
        """
        wanted = searched if self.plan.random == "equal" else self.plan.random
        trials: list[Trial] = []
        for repetition in range(self.plan.random_seeds):
            stream = [self.plan.seed, repetition]
            drawn = random_networks(self.space, self.price, wanted, seed=[*stream, 1])
            largest = mac_ranking(
                self.space,
                self.price,
                self.plan.mac_ranking,
                num_classes=self.supernet.num_classes,
                imgsz=self.imgsz,
                seed=[*stream, 2],
            )
            if len(drawn) < wanted:
                self.note(f"only {len(drawn)} random networks keep the limits; they are scored")
            networks: Sequence[Architecture]
            source: Source
            for source, networks in (("random", drawn), ("macs", largest)):
                scores = self._score(networks)
                trials += [Trial(a, s, None, source, repetition) for a, s in zip(networks, scores, strict=True)]
        return trials

    def _predictor(self, trials: Sequence[Trial]) -> Predictor:
        """What to expect of networks near the limits once they are trained."""
        near = near_the_limits(trials, self.price([trial.architecture for trial in trials]))
        return Predictor.fit(self.space, near, num_classes=self.supernet.num_classes, imgsz=self.imgsz)

    # Measuring --------------------------------------------------------------------------------------------------------

    def _refit(self, generation: int, history: Sequence[Trial]) -> None:
        """Every few generations and after the last, measure the best networks and refit the latency model.

        The model is of the hour in which the device was probed, and so is what it is refitted to: as it would have been
        at the level at which stock was then. Whether candidates keep the limits is told by how fast they are now.
        """
        number = generation + 1
        if not self.plan.measure_every:
            return
        if number % self.plan.measure_every and number < self.plan.generations:
            return
        fresh = [trial for trial in history if trial.architecture not in self.measured_ms]
        near = near_the_limits(fresh, self.price([t.architecture for t in fresh])) if fresh else []
        if not near:
            return
        expected = self._predictor(history)(near)
        chosen = [near[i].architecture for i in np.argsort(-expected, kind="stable")[:FRONT]]
        found = self._measure(chosen, PROBE, f"front-{number}")
        latencies = [one.at_level(self.probed_ms).latency_ms.p50 for one in found]
        self.measured_ms |= zip(chosen, latencies, strict=True)
        self.costs = self.costs.refit(chosen, latencies)
        self._tables = None

    def _measure_candidates(self, architectures: Sequence[Architecture]) -> list[Measurement]:
        """Measure networks nearly as precisely as the verdict on what ships will be."""
        self._done = max(self._done, LEARNING * self.plan.prior_steps + self.plan.to_score)
        protocol, name = replace(VERIFY, max_rounds=ROUNDS), f"candidates-{architectures[0].digest}"
        measurements = self._measure(architectures, protocol, name, weight=MEASURING * len(architectures))
        for architecture, measurement in zip(architectures, measurements, strict=True):
            self.measured_ms[architecture] = measurement.latency_ms.p50
        return measurements

    def _adjust(self, architecture: Architecture, factors: Floats) -> Trial | None:
        """A measured network brought to the limits, where what it takes is corrected by what was measured of it."""

        def price(architectures: Sequence[Architecture]) -> Estimate:
            estimate = self.price(architectures)
            values = estimate.values * np.where(np.isnan(factors), 1.0, factors)
            return replace(estimate, values=values, violation=self.costs.violation(values))

        genes = np.array([self.space.encode(architecture)])
        rng = np.random.default_rng([self.plan.seed, int(architecture.digest[:8], 16)])
        (near,), (worst,) = to_the_limit(self.space, price, genes, rng)
        network = self.space.decode(near.tolist())
        if worst > 0 or network == architecture:
            return None
        return Trial(network, self.score(network), self.plan.generations, "filled")

    @property
    def _rescaling(self) -> Rescaling:
        return Rescaling(
            self.space.scale,
            lambda architecture: float(self.price([architecture]).latency_ms[0]),
            lambda architectures, name: self._measure(architectures, PROBE, name),
        )

    def _measure(
        self, architectures: Sequence[Architecture], protocol: Protocol, name: str, *, weight: int = 0
    ) -> list[Measurement]:
        def progress(share: float, total: float) -> None:
            self._tell(self._done + weight * share / total, f"measuring {len(architectures)} networks on the device")

        measurements = self.measure(architectures, protocol, name, progress)
        self._done += weight
        return measurements

    def _tell(self, done: float, message: str) -> None:
        self.progress(min(done, self.plan.work), message, self._best)


def affordable_ms(costs: CostModel, linear: LinearCost, stock: Architecture) -> float | None:
    """What the linear part of the latency model may come to, as far as limits speak of latency; else nothing.

    A limit on a percentile, on throughput or with NMS becomes one on the linear part by their ratio in stock.

    Args:
        costs: Predicts what networks cost, and holds the limits.
        linear: The linear part of its latency model.
        stock: Stock YOLOv8.
    """
    (expected,) = linear([stock])
    (values,) = costs([stock]).values
    return min(
        (
            expected * (limit.limit / value if limit.metric == "latency" else value / limit.limit)
            for limit, value in zip(costs.limits, values.tolist(), strict=True)
            if limit.metric in ("latency", "throughput")
        ),
        default=None,
    )
