"""Latency of a network from its architecture, learned from networks that were measured.

Two parts are fitted, both to relative errors. The first is physical: latency is a sum of multiply-accumulates, bytes
and numbers of layers of each kind, each with a price that is not negative (non-negative least squares),
so that a search is not led to networks that seem faster for having more to do. The second is a factor close to one that
follows from the work and the layers of each part of the network: a Gaussian process on its logarithm, with a kernel
that is linear plus squared exponential (Rasmussen and Williams, Gaussian Processes for Machine Learning, chapter 2).
How much it corrects, and how smoothly, is chosen by cross-validation; with few or noisy measurements that is nothing.

The upper bound adds a quantile of the cross-validated relative errors (split-conformal prediction; Vovk et al.,
Algorithmic Learning in a Random World; Barber et al., Predictive inference with the jackknife+, 2021). It holds for
networks like those whose errors were taken, so what differs from another measured network in a single part, and is
predicted the better for it, does not count: a search asks for networks that have no such neighbour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr

from yolov8_nas.runner.results.probe import FittedModel, PredictionErrors, Smoothness
from yolov8_nas.space import BLOCKS, CONVS, LEVELS, Architecture, SearchSpace
from yolov8_nas.space.cost import KINDS, Attention, Layer, cost

Floats: TypeAlias = NDArray[np.float64]

CONFIDENCE: Final = 0.9
"""Probability with which a network's measured latency is at most its upper bound."""

SOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "stem": (),
    "down_p2": ("stem",),
    "backbone_p2": ("down_p2",),
    "down_p3": ("backbone_p2",),
    "backbone_p3": ("down_p3",),
    "down_p4": ("backbone_p3",),
    "backbone_p4": ("down_p4",),
    "down_p5": ("backbone_p4",),
    "backbone_p5": ("down_p5",),
    "sppf": ("backbone_p5",),
    "attention": ("sppf",),
    "topdown_p4": ("sppf", "backbone_p4"),
    "topdown_p3": ("topdown_p4", "backbone_p3"),
    "neck_down_p4": ("topdown_p3",),
    "bottomup_p4": ("neck_down_p4", "topdown_p4"),
    "neck_down_p5": ("bottomup_p4",),
    "bottomup_p5": ("neck_down_p5", "sppf"),
    "detect": LEVELS,
}
"""The parts of a network, and those whose outputs each of them reads: with its own options they settle its cost."""

_WORK: Final = 1 + 3 * len(KINDS) + 1
"""Features of the physical part: one for the network; three of each kind of layer; pooling."""

_FOLDS: Final = 10


class Features:
    """Features of architectures, with those of every part of a network remembered: it is asked for many networks."""

    def __init__(self, num_classes: int, imgsz: int) -> None:
        self.num_classes = num_classes
        self.imgsz = imgsz
        self._index: dict[Hashable, int] = {}
        self._rows: list[Floats] = []

    def __call__(self, architectures: Sequence[Architecture]) -> tuple[Floats, Floats]:
        """Features of n networks.

        Returns:
            Work of the whole network: (n, `_WORK`); multiply-accumulates and layers of each part: (n, 2 parts).
        """
        index = np.array([self._parts(architecture) for architecture in architectures], dtype=np.intp)
        if not len(index):
            return np.empty((0, _WORK)), np.empty((0, 2 * len(SOURCES)))
        rows = np.stack(self._rows)[index]  # (n, parts, features)
        whole = np.ones((len(index), 1))
        work = np.concatenate([whole, rows[..., :-2].sum(axis=1)], axis=1)
        return work, rows[..., -2:].reshape(len(index), -1)

    def _parts(self, architecture: Architecture) -> list[int]:
        """Where the rows of an architecture's parts lie."""
        keys = _keys(architecture)
        try:
            return [self._index[key] for key in keys]
        except KeyError:
            layers = cost(architecture, self.num_classes, self.imgsz).layers
            for part, key in zip(SOURCES, keys, strict=True):
                if key not in self._index:
                    own = [layer for layer in layers if layer.name.split(".")[0] == part]
                    self._index[key] = len(self._rows)
                    self._rows.append(_row(own, architecture.sppf_kernel if part == "sppf" else 0))
            return [self._index[key] for key in keys]


def _keys(architecture: Architecture) -> list[Hashable]:
    """What settles the cost of each part of a network."""
    widths = dict(zip(CONVS, architecture.convs, strict=True))
    options: dict[str, Hashable] = dict(widths)
    for name, block in zip(BLOCKS, architecture.blocks, strict=True):
        widths[name] = block.width
        options[name] = (block.depth, block.width, block.expansion, block.operator)
    widths["sppf"] = architecture.sppf_width
    options["sppf"] = (architecture.sppf_width, architecture.sppf_kernel)
    options["attention"] = architecture.attention
    options["detect"] = architecture.head
    return [(name, options.get(name), *[widths[s] for s in sources]) for name, sources in SOURCES.items()]


def _row(layers: Sequence[Layer | Attention], pooling: int) -> Floats:
    """Features of a part: MACs (10^6), bytes (10^6) and number of layers by kind; pooling (10^6); MACs and layers."""
    row: list[float] = []
    for kind in KINDS:
        alike = [layer for layer in layers if layer.kind == kind]
        row += [sum(x.macs for x in alike) / 1e6, sum(x.bytes for x in alike) / 1e6, len(alike)]
    row.append(3 * pooling**2 * layers[0].outputs * layers[0].size ** 2 / 1e6 if pooling else 0.0)
    row += [sum(x.macs for x in layers) / 1e6, len(layers)]
    return np.array(row)


def _kernel(curved: float, length: float, a: Floats, b: Floats) -> Floats:
    """Covariance of standardised features (see `Smoothness`): (n, d), (m, d) to (n, m)."""
    dims = max(1, a.shape[1])
    products = a @ b.T / dims
    squares = (a**2).sum(axis=1)[:, None] / dims + (b**2).sum(axis=1)[None] / dims - 2 * products
    smooth: Floats = np.exp(-squares / (2 * length**2))
    covariance: Floats = curved * smooth + (1 - curved) * products
    return covariance


_NO_CORRECTION: Final = 1e6
_CANDIDATES: Final = tuple(
    Smoothness(curved=curved, length=length, noise=noise)
    for curved, length in ((0.0, 1.0), *itertools.product((0.5, 1.0), (1.0, 2.0, 4.0)))
    for noise in (*(float(x) for x in np.logspace(-2.5, 2, 10)), _NO_CORRECTION)
)
"""What cross-validation chooses from; variances from a third of a per cent of the kernel's to no correction at all."""


@dataclass(frozen=True)
class _Fit:
    """A model fitted to measurements; see the module."""

    prices: Floats
    centre: Floats
    scale: Floats
    anchors: Floats
    weights: Floats
    smoothness: Smoothness

    def predict(self, work: Floats, parts: Floats) -> Floats:
        """Latency in ms: (n,)."""
        standardised = (parts - self.centre) / self.scale
        correction = _kernel(self.smoothness.curved, self.smoothness.length, standardised, self.anchors) @ self.weights
        latency: Floats = work @ self.prices * np.exp(correction)
        return latency

    def linear(self, parts: Floats) -> Floats:
        """What the linear part of the kernel contributes to the correction's logarithm: (n,)."""
        slope = (1 - self.smoothness.curved) * (self.anchors.T @ self.weights) / max(1, parts.shape[1])
        correction: Floats = (parts - self.centre) / self.scale @ slope
        return correction

    def tangent(self, work: Floats, parts: Floats, at: tuple[Floats, Floats]) -> Floats:
        """The logarithm of the prediction to first order at one network (1, ...): (n,)."""
        away = self.anchors - (at[1] - self.centre) / self.scale
        dims = max(1, away.shape[1])
        near = np.exp(-(away**2).sum(axis=1) / (2 * self.smoothness.length**2 * dims)) / self.smoothness.length**2
        curved, linear = self.smoothness.curved * (near * self.weights) @ away, self.anchors.T @ self.weights
        slope = (curved + (1 - self.smoothness.curved) * linear) / dims
        value = np.log(self.predict(*at)) + (work - at[0]) @ self.prices / (at[0] @ self.prices)
        tangent: Floats = value + (parts - at[1]) / self.scale @ slope
        return tangent

    @property
    def curvature(self) -> float:
        """What the curved part contributes at most: the norm of a function bounds it, as |f(x)|^2 <= |f|^2 k(x, x)."""
        kernel = _kernel(1.0, self.smoothness.length, self.anchors, self.anchors)
        squared = float(self.weights @ kernel @ self.weights)
        return self.smoothness.curved * math.sqrt(max(squared, 0.0))


def _fits(work: Floats, parts: Floats, latency: Floats, choices: Sequence[Smoothness]) -> Iterator[_Fit]:
    """The fit of each choice of smoothness."""
    size = np.maximum(work.max(axis=0), 1e-12)
    solution, _ = nnls(work / size / latency[:, None], np.ones(len(latency)), maxiter=100 * work.shape[1])
    prices = solution / size
    residual = np.log(latency / (work @ prices))
    centre, spread = parts.mean(axis=0), parts.std(axis=0)
    scale = np.where(spread > 1e-9 * (1 + abs(centre)), spread, np.inf)  # what never varied says nothing
    anchors = (parts - centre) / scale

    @cache
    def decomposed(curved: float, length: float) -> tuple[Floats, Floats]:
        values, vectors = np.linalg.eigh(_kernel(curved, length, anchors, anchors))
        return values, vectors

    for choice in choices:
        values, vectors = decomposed(choice.curved, choice.length)
        weights = vectors @ ((vectors.T @ residual) / (np.maximum(values, 0) + choice.noise))
        yield _Fit(prices, centre, scale, anchors, weights, choice)


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the median latency of a space's networks on the device where the others were measured.

    Attributes:
        space: The space.
        num_classes: Classes of the Detect head.
        imgsz: Side of the square input in pixels.
        architectures: The measured networks.
        latencies: Their median latencies in ms.
        smoothness: The form of the correction that cross-validation chose.
        margin: Upper bound over prediction, less one.
        cross_validation: Errors of networks predicted from the others.
    """

    space: SearchSpace
    num_classes: int
    imgsz: int
    architectures: tuple[Architecture, ...]
    latencies: tuple[float, ...]
    smoothness: Smoothness
    margin: float
    cross_validation: PredictionErrors
    _features: Features = field(init=False, repr=False, compare=False)
    _fit: _Fit = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        features = Features(self.num_classes, self.imgsz)
        (fit,) = _fits(*features(self.architectures), np.array(self.latencies), [self.smoothness])
        object.__setattr__(self, "_features", features)
        object.__setattr__(self, "_fit", fit)

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        num_classes: int,
        imgsz: int,
        architectures: Sequence[Architecture],
        latencies: Sequence[float],
        *,
        seed: int = 0,
    ) -> LatencyModel:
        """Fit a model.

        Args:
            space: The space.
            num_classes: Classes of the Detect head.
            imgsz: Side of the square input in pixels.
            architectures: The measured networks, at least four of them different.
            latencies: Their median latencies in ms. Of a network measured more than once the last one counts.
            seed: Seed of the folds of cross-validation.

        Raises:
            ValueError: Too few networks, or a latency that is not positive.
        """
        known = dict(zip(architectures, map(float, latencies), strict=True))
        if len(known) < 4 or not all(0 < value < math.inf for value in known.values()):
            raise ValueError(f"a latency model needs four networks and positive latencies, got {len(known)} networks")
        measured = np.array(list(known.values()))
        work, parts = Features(num_classes, imgsz)(list(known))
        fold = np.random.default_rng(seed).permutation(len(measured)) % _FOLDS
        predicted = np.empty((len(_CANDIDATES), len(measured)))
        for k in range(min(_FOLDS, len(measured))):
            rest, left = fold != k, fold == k
            for i, fit in enumerate(_fits(work[rest], parts[rest], measured[rest], _CANDIDATES)):
                predicted[i, left] = fit.predict(work[left], parts[left])
        error = measured / predicted - 1
        # By absolute and not by squared errors, so that one disturbed measurement does not choose.
        best = int(np.argmin(np.mean(np.abs(error), axis=1)))
        telling = np.sort(error[best][_has_no_neighbour(list(known))])
        margin = float(telling[min(math.ceil((len(telling) + 1) * CONFIDENCE), len(telling)) - 1])
        figures = accuracy(predicted[best], measured)
        return cls(
            space, num_classes, imgsz, tuple(known), tuple(known.values()), _CANDIDATES[best], max(0.0, margin), figures
        )

    def predict(self, architectures: Sequence[Architecture]) -> tuple[Floats, Floats]:
        """Expected median latency of n networks, and its upper bound with probability `CONFIDENCE`, in ms: (n,), (n,).

        The networks need not be of the space.
        """
        expected = self._fit.predict(*self._features(architectures))
        return expected, expected * (1 + self.margin)

    def physical(self, architectures: Sequence[Architecture]) -> Floats:
        """The part of the prediction that adds up over the layers of a network, in ms: (n,).

        A prediction is `physical * exp(linear_correction + rest)`, with a rest of at most `curvature` in size.
        """
        work, _ = self._features(architectures)
        latency: Floats = work @ self._fit.prices
        return latency

    def tangent(self, at: Architecture, architectures: Sequence[Architecture]) -> Floats:
        """The logarithm of the prediction to first order at a network, which adds up over layers as well: (n,)."""
        return self._fit.tangent(*self._features(architectures), self._features([at]))

    def linear_correction(self, architectures: Sequence[Architecture]) -> Floats:
        """The part of the correction's logarithm that adds up over the layers of a network: (n,)."""
        _, parts = self._features(architectures)
        return self._fit.linear(parts)

    @property
    def curvature(self) -> float:
        """Bound of the rest of the correction's logarithm, for any network whatever."""
        return self._fit.curvature

    def refit(self, architectures: Sequence[Architecture], latencies: Sequence[float]) -> LatencyModel:
        """A model of the same measurements and these, which replace earlier ones of the same networks."""
        return LatencyModel.fit(
            self.space,
            self.num_classes,
            self.imgsz,
            [*self.architectures, *architectures],
            [*self.latencies, *latencies],
        )

    def to_result(self) -> FittedModel:
        """The measurements and what was chosen, from which the rest follows."""
        return FittedModel(
            space=self.space,
            num_classes=self.num_classes,
            imgsz=self.imgsz,
            genes=tuple(self.space.encode(architecture) for architecture in self.architectures),
            latency_ms=self.latencies,
            smoothness=self.smoothness,
            margin=self.margin,
            confidence=CONFIDENCE,
            cross_validation=self.cross_validation,
        )

    @classmethod
    def of(cls, fitted: FittedModel) -> LatencyModel:
        """The model that `to_result` described."""
        return cls(
            space=fitted.space,
            num_classes=fitted.num_classes,
            imgsz=fitted.imgsz,
            architectures=tuple(fitted.space.decode(genes) for genes in fitted.genes),
            latencies=fitted.latency_ms,
            smoothness=fitted.smoothness,
            margin=fitted.margin,
            cross_validation=fitted.cross_validation,
        )


def _has_no_neighbour(architectures: Sequence[Architecture]) -> NDArray[np.bool_]:
    """Which networks differ from each of the others in more than one part: (n,); all where these are less than half."""
    parts = [[*a.convs, *a.blocks, (a.sppf_width, a.sppf_kernel), a.attention, a.head] for a in architectures]
    alone = np.ones(len(parts), dtype=bool)
    for (i, one), (j, other) in itertools.combinations(enumerate(parts), 2):
        if sum(x != y for x, y in zip(one, other, strict=True)) < 2:
            alone[[i, j]] = False
    return alone if 2 * alone.sum() >= len(alone) else np.ones_like(alone)


def accuracy(predicted: Floats, measured: Floats) -> PredictionErrors:
    """How well latencies were predicted: mean absolute percentage error (as a share) and Spearman's rank correlation.

    The correlation of latencies that are all alike is 0.
    """
    alike = np.ptp(predicted) == 0 or np.ptp(measured) == 0
    return PredictionErrors(
        mape=float(np.mean(np.abs(predicted / measured - 1))),
        spearman=0.0 if alike else float(spearmanr(predicted, measured).statistic),
    )
