"""Where a search begins: networks that the prior and the exact solver propose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from yolov8_nas.runner.results import PriorStep, Source
from yolov8_nas.search import exact
from yolov8_nas.search.differentiable import Prior, PriorRecipe, learn_prior
from yolov8_nas.search.evolution import Price, Utility, first_generation
from yolov8_nas.search.linear_cost import LinearCost
from yolov8_nas.search.objective import CostModel
from yolov8_nas.search.plan import LEARNING, Plan
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.supernet.supernet import Supernet

EXACT: Final = 8
"""One in so many networks of the first generation is an exact solution under the prior."""

SAMPLED: Final = 4
"""One in so many networks of the first generation is a sample of the prior."""

CUTS: Final = 10
"""Networks that the exact solver excludes at most for a solution; see `exact.solve`."""

APART: Final = 3
"""Choices in which exact solutions differ at least: the second best is most often the best with one small change."""


@dataclass(frozen=True)
class Beginning:
    """What a search begins with, by one cost model.

    Attributes:
        supernet: The trained supernet.
        data: Ultralytics data yaml, with the search split as `val`.
        space: The space that is searched.
        costs: Predicts what networks cost, and holds the limits.
        linear: The linear part of its latency model.
        plan: How much may be spent.
        imgsz: Side of the square input in pixels.
        work: Folder for checkpoints of the prior.
        progress: Told work done and a message.
    """

    supernet: Supernet
    data: Path
    space: SearchSpace
    costs: CostModel
    linear: LinearCost
    plan: Plan
    imgsz: int
    work: Path
    progress: Callable[[float, str], None]

    def networks(self, price: Price, limit_ms: float | None) -> tuple[dict[Architecture, Source], Prior | None]:
        """Networks for the first generation: the best within the limits by the prior, and samples of it.

        An eighth and a quarter of the generation. The prior knows what each option is worth around the networks that it
        drew, not what two options are worth together, and relatives of stock have proved a good start: so most of the
        generation does not depend on it.

        Raises:
            StageError: No network keeps the limits; told here, before images are spent.
        """
        rng = np.random.default_rng([self.plan.seed, 0, 0])  # another stream than any generation's
        if self.plan.exact:
            self.solve([[0.0] * len(d.options) for d in self.space.dimensions], solutions=1)
        else:
            first_generation(self.space, price, 1, rng)
        if not self.plan.prior_steps:
            return {}, None
        prior = self._learn_prior(limit_ms)
        informed: dict[Architecture, Source] = {}
        if self.plan.exact:
            count = max(1, self.plan.population // EXACT)
            informed |= dict.fromkeys(self.solve(prior.logits, solutions=count), "exact")
        samples = [prior.sample(self.space, rng) for _ in range(self.plan.population // SAMPLED - 1)]
        for architecture in (prior.most_likely(self.space), *samples):
            informed.setdefault(architecture, "prior")
        return informed, prior

    def _learn_prior(self, limit_ms: float | None) -> Prior:
        steps = self.plan.prior_steps

        def progress(step: PriorStep) -> None:
            message = f"learning where to look, step {step.step} of {steps}: {step.expected_ms:.3g} ms expected"
            self.progress(LEARNING * step.step, message)

        return learn_prior(
            self.supernet,
            self.data,
            self.linear,
            limit_ms,
            recipe=PriorRecipe(steps=steps, imgsz=self.imgsz, seed=self.plan.seed),
            partial=self.work / "prior",
            progress=progress,
        )

    def solve(self, worth: Utility, *, solutions: int) -> list[Architecture]:
        """The networks of the highest worth within the limits, which differ in `APART` choices at least.

        They are the best, or nearly: no time is spent on a proof, since scores decide.

        Raises:
            StageError: There are none; the limit that binds is named.
        """
        found = exact.solve(self.space, worth, self.costs, self.linear, solutions=solutions, distance=APART, cuts=CUTS)
        return [solution.architecture for solution in found]
