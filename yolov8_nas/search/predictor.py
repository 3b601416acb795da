"""What networks near a limit can be expected to score once they are trained.

A score with shared weights ranks weakly where a search has to choose, among networks of like latency, and it overlooks
what capacity is worth to a network that learns for itself. Both together rank better than either, so the expectation is
a weighted sum of standardised features of a network:

    score     its score with the supernet's weights
    options   what a linear model of all scores expects of its options, which averages the noise of single scores out
    macs      logarithm of its multiply-accumulates
    params    logarithm of its parameters

Standardised among networks near the limit: over a whole space the features mostly tell large networks from small ones,
and the limit has decided that already. Where real trainings of some networks are known, the weights are learned from
them, drawn to the default ones (ridge regression towards a prior mean; Hoerl and Kennard, 1970), and judged by
leave-one-out predictions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.stats import kendalltau

from yolov8_nas.search.evolution import Trial, option_effects, utility
from yolov8_nas.search.objective import Floats
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost

FEATURES: Final = ("score", "options", "macs", "params")

WEIGHTS: Final[Mapping[str, float]] = {"score": 0.5, "options": 0.5, "macs": 1.0, "params": 0.0}
"""Weights without trainings to learn from: score and multiply-accumulates count alike (docs/ranking.md)."""

PULL: Final = 4.0
"""Trainings that the default weights count as where weights are learned."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """Expected accuracy of a space's networks, up to an offset and a factor.

    Attributes:
        space: The space.
        num_classes: Classes of the Detect head.
        imgsz: Side of the square input in pixels.
        effects: What each option adds to a score, by dimension.
        centre: Mean of each feature among the networks near the limit: (features,).
        spread: Standard deviation of each feature there; infinite where it does not vary: (features,).
        weights: Weight of each standardised feature: (features,).
    """

    space: SearchSpace
    num_classes: int
    imgsz: int
    effects: Sequence[Sequence[float]]
    centre: Floats
    spread: Floats
    weights: Floats

    @classmethod
    def fit(cls, space: SearchSpace, trials: Sequence[Trial], *, num_classes: int, imgsz: int) -> Predictor:
        """A predictor with the default weights.

        Args:
            space: The space.
            trials: Scored networks near the limit, at least one.
            num_classes: Classes of the Detect head.
            imgsz: Side of the square input in pixels.
        """
        weights = np.array([WEIGHTS[name] for name in FEATURES])
        zeros, ones = np.zeros(len(weights)), np.ones(len(weights))
        plain = cls(space, num_classes, imgsz, option_effects(space, trials), zeros, ones, weights)
        features = plain.features(trials)
        spread = features.std(axis=0)
        varies = spread > 1e-9 * (1 + np.abs(features.mean(axis=0)))
        return replace(plain, centre=features.mean(axis=0), spread=np.where(varies, spread, np.inf))

    def features(self, trials: Sequence[Trial]) -> Floats:
        """Standardised features of n networks: (n, features)."""
        networks = [trial.architecture for trial in trials]
        papers = [cost(network, self.num_classes, self.imgsz) for network in networks]
        columns = [
            np.array([trial.map50_95 for trial in trials]),
            utility(self.space, self.effects, networks),
            np.log([paper.macs for paper in papers]),
            np.log([paper.params for paper in papers]),
        ]
        standardised: Floats = (np.stack(columns, axis=1) - self.centre) / self.spread
        return standardised

    def __call__(self, trials: Sequence[Trial]) -> Floats:
        """Expected accuracy of n networks, comparable among themselves: (n,)."""
        expected: Floats = self.features(trials) @ self.weights
        return expected

    def calibrated(self, trials: Sequence[Trial], trained: Mapping[Architecture, float]) -> tuple[Predictor, float]:
        """The predictor with weights learned from real trainings of networks near the limit.

        Args:
            trials: Scored networks, among them all trained ones.
            trained: mAP50-95 after training, of at least three networks.

        Returns:
            The predictor, and Kendall's tau of leave-one-out predictions with the trainings: each network is predicted
            by weights that were learned from the others.
        """
        known = [trial for trial in trials if trial.architecture in trained]
        features = self.features(known)
        target = np.array([trained[trial.architecture] for trial in known])

        def weights(rows: Floats, values: Floats) -> Floats:
            """Ridge towards the default weights, scaled to the spread of the trainings."""
            prior = self.weights * values.std() / max(float(np.linalg.norm(self.weights)), 1e-9)
            centred = rows - rows.mean(axis=0)
            residual = values - values.mean() - centred @ prior
            system = centred.T @ centred + PULL * np.eye(rows.shape[1])
            learned: Floats = prior + np.linalg.solve(system, centred.T @ residual)
            return learned

        left_out = np.array(
            [
                float(features[i] @ weights(np.delete(features, i, axis=0), np.delete(target, i)))
                for i in range(len(known))
            ]
        )
        return replace(self, weights=weights(features, target)), float(kendalltau(left_out, target).statistic)
