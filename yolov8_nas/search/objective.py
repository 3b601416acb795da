"""What a network of the space costs and what it scores: the two questions that a search asks.

Cost is predicted, for thousands of networks a second; a score is measured on images, for one or two. So the search
asks for the cost first, and only of networks that are predicted to keep every limit for the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.evaluation import Evaluator
from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import ProbedNetwork
from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import Cost, cost
from yolov8_nas.space.limits import COUNTED, STATISTICS, Constraint, Figures, Value
from yolov8_nas.supernet.batchnorm import StatisticsCache, calibration_batches
from yolov8_nas.supernet.derive import derive
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.train.quantization import fold, quantize

Floats: TypeAlias = NDArray[np.float64]

RANGE_IMAGES: Final = 128
"""Images from which the ranges of INT8 come where a network is only scored, of those for BatchNorm's statistics."""

_MEMORY_ROWS: Final = 8
"""Networks with measured memory that it takes to fit memory's three coefficients."""


@dataclass(frozen=True)
class Estimate:
    """What n networks are predicted to cost.

    Attributes:
        limits: The limits that they are held against.
        latency_ms: Expected median latency in milliseconds: (n,).
        upper_ms: Upper confidence bound of it: (n,).
        values: What each limit is about, as expected: (n, limits).
        violation: How far each value misses its limit, as a share of the limit; 0 or less keeps it: (n, limits).
    """

    limits: tuple[Constraint, ...]
    latency_ms: Floats
    upper_ms: Floats
    values: Floats
    violation: Floats

    @property
    def worst(self) -> Floats:
        """The largest violation of each network: (n,)."""
        worst: Floats = self.violation.max(axis=1)
        return worst

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Whether each network is predicted to keep every limit: (n,)."""
        feasible: NDArray[np.bool_] = self.worst <= 0
        return feasible


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory as a runtime's base plus shares of weights and of all tensor traffic, none of them negative.

    Attributes:
        base_mb: What the runtime takes without a network, in MiB.
        per_param: MiB per parameter.
        per_byte: MiB per byte that the network's layers read and write.
        margin_mb: By how much the network that was worst predicted exceeded its prediction.
    """

    base_mb: float
    per_param: float
    per_byte: float
    margin_mb: float

    @classmethod
    def fit(cls, costs: Sequence[Cost], memory_mb: Sequence[float]) -> MemoryModel:
        """Non-negative least squares on measured networks."""
        features = _memory_features(costs)
        scale = features.max(axis=0)
        solution, _ = nnls(features / scale, np.array(memory_mb))
        base, per_param, per_byte = (float(c) for c in solution / scale)
        model = cls(base, per_param, per_byte, margin_mb=0.0)
        return replace(model, margin_mb=max(0.0, float((np.array(memory_mb) - model.upper(costs)).max())))

    def upper(self, costs: Sequence[Cost]) -> Floats:
        """Peak memory in MiB that none of the measured networks would have exceeded: (n,)."""
        predicted: Floats = _memory_features(costs) @ np.array([self.base_mb, self.per_param, self.per_byte])
        return predicted + self.margin_mb


def _memory_features(costs: Sequence[Cost]) -> Floats:
    return np.array([[1.0, c.params, c.bytes] for c in costs])


def figures(
    measurement: Measurement, paper: Cost, *, batch: int, with_nms_ms: Mapping[str, float] | None = None
) -> Figures[float]:
    """What limits are held against, of a measured network; NaN where nothing was measured.

    Args:
        measurement: What was measured of it.
        paper: What it costs on paper.
        batch: Images per inference.
        with_nms_ms: Its latency with non-maximum suppression in ms, by percentile.
    """
    return Figures(
        batch=batch,
        latency_ms=asdict(measurement.latency_ms),
        latency_with_nms_ms=with_nms_ms or dict.fromkeys(STATISTICS, math.nan),
        memory_mb=measurement.memory_mb,
        power_w=math.nan if measurement.power_w is None else measurement.power_w,
        energy_mj=math.nan if measurement.energy_mj is None else measurement.energy_mj,
        params=float(paper.params),
        gflops=paper.gflops,
    )


def with_nms(latency_ms: Mapping[str, Value], nms_ms: Mapping[str, float]) -> dict[str, Value]:
    """Latency with non-maximum suppression by percentile, both timed apart; see `measure.nms` on adding them."""
    return {statistic: latency + nms_ms[statistic] for statistic, latency in latency_ms.items()}


@dataclass(frozen=True)
class CostModel:
    """Predicts cost and keeps the limits in sight; call it with architectures for an `Estimate`.

    Latency is held against its limit as expected, not by its upper bound: a search that keeps a margin leaves as much
    of the limit unused, and the measurement of the candidates decides in any case. A percentile above the median is the
    expectation times the ratio of the percentile to the median, by the median over the measured networks: the tail
    belongs to the device and its disturbances rather than to a network, and a burst during one measurement must not
    decide. With non-maximum suppression, what that took in the probe is added. Energy is predicted by a model of the
    same kind, power from both. The number of parameters and operations is exact. What cannot be predicted (memory or
    energy, where the probe measured none) is left to the measurement of the candidates.

    Attributes:
        limits: Absolute limits, at least one.
        latency: The device's latency model.
        tail: Ratio of each latency percentile to the median.
        memory: Model of peak memory, if there is one.
        energy: Model of energy per image in mJ, if there is one and a limit asks for it.
        nms_ms: Latency of non-maximum suppression alone in ms, by percentile.
        num_classes: Number of classes of the detection head.
        imgsz: Side of the square input in pixels.
        batch: Images per inference.
        stock_ms: Median latency of stock when the device was probed: what shares of stock in `limits` go by.
    """

    limits: tuple[Constraint, ...]
    latency: LatencyModel
    tail: Mapping[str, float]
    memory: MemoryModel | None
    energy: LatencyModel | None
    nms_ms: Mapping[str, float]
    num_classes: int
    imgsz: int
    batch: int
    stock_ms: float | None = None

    @classmethod
    def from_probe(
        cls,
        limits: Sequence[Constraint],
        latency: LatencyModel,
        rows: Sequence[ProbedNetwork],
        *,
        num_classes: int,
        imgsz: int,
        batch: int,
        nms_ms: Mapping[str, float] | None = None,
    ) -> CostModel:
        """The cost model of a probed device.

        Args:
            limits: Absolute limits.
            latency: The fitted latency model.
            rows: The measured networks.
            num_classes: Number of classes of the detection head.
            imgsz: Side of the square input in pixels.
            batch: Images per inference.
            nms_ms: What NMS takes, by percentile; without it limits with NMS are left to measurement.
        """
        memory = None
        if len(rows) >= _MEMORY_ROWS:
            costs = [cost(row.architecture, num_classes, imgsz) for row in rows]
            memory = MemoryModel.fit(costs, [row.memory_mb for row in rows])
        energy = None
        counted = {row.architecture: row.energy_mj for row in rows if row.energy_mj is not None}
        if counted and any(limit.metric in COUNTED for limit in limits):
            energy = LatencyModel.fit(latency.space, num_classes, imgsz, list(counted), list(counted.values()))
        tail = {
            percentile: float(np.median([dict(row.latency_ms)[percentile] / row.latency_ms.p50 for row in rows]))
            for percentile in STATISTICS
        }
        unknown = dict.fromkeys(STATISTICS, math.nan)
        stock_ms = next((row.latency_ms.p50 for row in rows if row.role == "stock"), None)
        unit = num_classes, imgsz, batch
        return cls(tuple(limits), latency, tail, memory, energy, nms_ms or unknown, *unit, stock_ms)

    def __call__(self, architectures: Sequence[Architecture]) -> Estimate:
        """Predict what networks cost."""
        latency, upper = self.latency.predict(architectures)
        costs = self._costs(architectures)
        unknown = np.full(len(architectures), np.nan)
        energy = self.energy.predict(architectures)[0] if self.energy else unknown
        latency_ms = {percentile: latency * ratio for percentile, ratio in self.tail.items()}
        predicted = Figures(
            batch=self.batch,
            latency_ms=latency_ms,
            latency_with_nms_ms=with_nms(latency_ms, self.nms_ms),
            memory_mb=self.memory.upper(costs) if self.memory and costs else unknown,
            power_w=energy * self.batch / latency,  # mJ per ms
            energy_mj=energy,
            params=np.array([c.params for c in costs], dtype=float) if costs else unknown,
            gflops=np.array([c.gflops for c in costs], dtype=float) if costs else unknown,
        )
        values = np.stack([predicted.value(limit) for limit in self.limits], axis=1)
        return Estimate(self.limits, latency, upper, values, self.violation(values))

    def measured(self, architecture: Architecture, measurement: Measurement) -> Floats:
        """What each limit is about, as measured of one network: (limits,). NMS is that of the probe.

        Where a limit is a share of stock, times are brought to the level of the probe, by stock's time in the same
        rounds: then their ratio to the limit is that of both as measured now.
        """

        def known(measurement: Measurement) -> Figures[float]:
            return figures(
                measurement,
                cost(architecture, self.num_classes, self.imgsz),
                batch=self.batch,
                with_nms_ms=with_nms(asdict(measurement.latency_ms), self.nms_ms),
            )

        now, then = known(measurement), known(measurement.at_level(self.stock_ms))
        return np.array([(now if limit.share is None else then).value(limit) for limit in self.limits])

    def violation(self, values: Floats) -> Floats:
        """How far values miss their limits, as shares of the limits; 0 where a value is unknown: (n, limits)."""
        missed = np.stack([limit.violation(values[:, i]) for i, limit in enumerate(self.limits)], axis=1)
        return np.where(np.isnan(values), 0.0, missed)

    def refit(self, architectures: Sequence[Architecture], latency_ms: Sequence[float]) -> CostModel:
        """This model after more networks were measured.

        Args:
            architectures: The measured networks.
            latency_ms: Their median latencies in milliseconds.
        """
        return replace(self, latency=self.latency.refit(architectures, latency_ms))

    def _costs(self, architectures: Sequence[Architecture]) -> list[Cost]:
        """Exact costs, where a limit asks for them: they take longer than the prediction of latency."""
        if not any(limit.metric in ("memory", "params", "flops") for limit in self.limits):
            return []
        return [cost(architecture, self.num_classes, self.imgsz) for architecture in architectures]


class Scorer:
    """Scores networks with the supernet's weights on the search split.

    A network is derived as a stock model, gets BatchNorm statistics of its own (the supernet's belong to all networks
    at once and fit none) and is scored under the one evaluation protocol: in floating point, or with the fake
    quantization that it would ship with, whose ranges are calibrated after the statistics. The result depends on the
    network alone, not on those scored before it. Images are read once, for all networks.

    Args:
        supernet: The trained supernet, on the device on which its networks are scored.
        data: Ultralytics data yaml, train split for calibration and search split as `val`.
        imgsz: Side of the square input in pixels.
        batch: Images at once.
        bn_images: Train images for BatchNorm statistics.
        seed: Seed of their choice.
        work: Folder for whatever is written on the way.
        int8: Whether networks are scored as INT8 would compute them.
        keep_float: Parts that then stay in floating point, see `quantize`.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: Path,
        *,
        imgsz: int,
        batch: int,
        bn_images: int,
        seed: int,
        work: Path,
        int8: bool = False,
        keep_float: Sequence[str] = (),
    ) -> None:
        self.supernet = supernet
        self.int8 = int8
        self.keep_float = keep_float
        self.calibration = calibration_batches(data, imgsz, bn_images, batch, seed)
        self.range_batches = math.ceil(RANGE_IMAGES / batch)
        self.statistics = StatisticsCache(work / "batchnorm", supernet, self.calibration)
        device = str(next(supernet.parameters()).device)
        self.evaluator = Evaluator(data, imgsz=imgsz, batch=batch, work=work, device=device)

    def network(self, architecture: Architecture) -> DetectionModel:
        """The stand-alone network with the supernet's weights, ready for inference."""
        model = derive(self.supernet, architecture)
        self.statistics.fill(model, architecture)
        return model.eval()

    def __call__(self, architecture: Architecture) -> float:
        """mAP50-95 of a network on the search split, from 0 to 1."""
        network = self.network(architecture)
        if self.int8:
            quantize(network, self.calibration[: self.range_batches], self.keep_float)
        return self.evaluator.evaluate(fold(network)).map50_95
