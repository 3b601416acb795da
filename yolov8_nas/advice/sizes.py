"""Stock sizes against the limits of a probed device: measured where they were, and predicted by its latency model.

A size that was not measured and lies outside of the networks that the model was fitted to is *extrapolated*: the
model's correction, which was learnt inside, is left out, and no interval is told. What holds of it nevertheless follows
from the networks that were measured: what is slower than the slowest of them misses what that one misses, and what is
faster than the fastest keeps what that one keeps. The same goes for stock sizes, each of which is a part of the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import (
    LatencyFit,
    LatencyTable,
    MeasuredSize,
    NmsResult,
    ProbedNetwork,
    ResolvedLimit,
    StockSize,
)
from yolov8_nas.runner.results.advice import Basis, Outcome
from yolov8_nas.search.objective import CostModel, figures, with_nms
from yolov8_nas.space import SCALES, Architecture, stock_architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint

HOPELESS: Final = 4.0
"""Share of a limit from which a size is not measured: INT8 computes a quarter of the bytes of FP32, and no more than
that is gained."""


@dataclass(frozen=True)
class Probed:
    """What hw-probe found out of a device.

    Attributes:
        limits: The limits, absolute ones.
        model: The latency model.
        rows: The measured networks.
        nms_ms: What non-maximum suppression takes, by percentile; nothing where it was not measured.
        batch: Images per inference.
        precision: Precision of the measured networks.
    """

    limits: tuple[Constraint, ...]
    model: LatencyModel
    rows: tuple[ProbedNetwork, ...]
    nms_ms: Mapping[str, float] | None
    batch: int
    precision: str

    @classmethod
    def read(cls, folder: Path, batch: int, precision: str) -> Probed:
        """Read the result of hw-probe.

        Args:
            folder: Its folder.
            batch: Images per inference.
            precision: Precision of the measured networks.

        Raises:
            InputError: A file of it is not of its form.
        """
        nms_ms = NmsResult.read(folder).latency_ms
        return cls(
            limits=tuple(row.constraint for row in ResolvedLimit.read_all(folder)),
            model=LatencyModel.of(LatencyFit.read(folder)),
            rows=LatencyTable.read(folder).rows,
            nms_ms=dict(nms_ms) if nms_ms else None,
            batch=batch,
            precision=precision,
        )

    @property
    def costs(self) -> CostModel:
        """Predicts what networks cost, and holds that against the limits."""
        model = self.model
        return CostModel.from_probe(
            self.limits,
            model,
            self.rows,
            num_classes=model.num_classes,
            imgsz=model.imgsz,
            batch=self.batch,
            nms_ms=self.nms_ms,
        )


def stock_sizes(probed: Probed, measured: Sequence[MeasuredSize] = ()) -> tuple[StockSize, ...]:
    """The stock sizes against the limits, from small to large, those in INT8 after those in the probe's precision.

    Args:
        probed: What is known of the device.
        measured: Sizes that were measured beside hw-probe's table, brought to its level.
    """
    known = {row.architecture: Measurement.from_dict(row.plain()) for row in probed.rows}
    beside = {(row.scale, row.precision): Measurement.from_dict(row.plain()) for row in measured}
    sizes = []
    for scale in SCALES:
        architecture = stock_architecture(scale)
        found = known.get(architecture) or beside.get((scale, probed.precision))
        if found:
            sizes.append(_measured(probed, scale, probed.precision, architecture, found))
        else:
            sizes.append(_predicted(probed, scale, architecture))
    sizes = _in_order(sizes)
    if probed.precision != "int8":
        in_int8 = {scale: beside[scale, "int8"] for scale in SCALES if (scale, "int8") in beside}
        sizes += [_measured(probed, scale, "int8", stock_architecture(scale), m) for scale, m in in_int8.items()]
    return tuple(sizes)


def _in_order(sizes: Sequence[StockSize]) -> list[StockSize]:
    """Sizes of one precision, where what is not measured of one follows from another: each is a part of the next."""
    told = []
    for i, size in enumerate(sizes):
        if size.basis == "extrapolated" and size.outcome == "not measured":
            smaller = {other.outcome for other in sizes[:i] if other.basis != "extrapolated"}
            larger = {other.outcome for other in sizes[i + 1 :] if other.basis != "extrapolated"}
            known: Outcome = "misses" if "misses" in smaller else "keeps" if "keeps" in larger else size.outcome
            size = size.model_copy(update={"outcome": known})
        told.append(size)
    return told


def worth_measuring(sizes: Sequence[StockSize], *, int8: bool) -> list[tuple[str, str]]:
    """The sizes that are to be measured as well, each with its precision.

    Args:
        sizes: What is known of the sizes without.
        int8: Whether the device computes in INT8.
    """
    wanted = [(size.scale, size.precision) for size in sizes if size.basis != "measured" and _near(size)]
    if int8 and all(size.precision != "int8" for size in sizes):
        wanted += [(size.scale, "int8") for size in sizes if size.outcome != "keeps" and _near(size)]
    return wanted


def _near(size: StockSize) -> bool:
    return size.used is None or size.used < HOPELESS


def _measured(
    probed: Probed, scale: str, precision: str, architecture: Architecture, measurement: Measurement
) -> StockSize:
    """A size that was measured, or another network in its place."""
    model, latency_ms = probed.model, asdict(measurement.latency_ms)
    timed = with_nms(latency_ms, probed.nms_ms) if probed.nms_ms else None
    paper = cost(architecture, model.num_classes, model.imgsz)
    known = figures(measurement, paper, batch=probed.batch, with_nms_ms=timed)
    values = [known.value(limit) for limit in probed.limits]
    low, high = measurement.interval_ms
    return _held(probed, StockSize(
        scale=scale, precision=precision, latency_ms=latency_ms["p50"], interval_ms=(low, high), basis="measured",
        outcome="not measured", used=None, limit="",
    ), values, doubt=(high - low) / 2 / latency_ms["p50"])  # fmt: skip


def _predicted(probed: Probed, scale: str, architecture: Architecture) -> StockSize:
    """A size that was not measured."""
    model = probed.model
    expected, physical = float(model.predict([architecture])[0][0]), float(model.physical([architecture])[0])
    slower, faster = physical > max(model.latencies), physical < min(model.latencies)
    basis: Basis = "extrapolated" if slower or faster else "predicted"
    size = StockSize(
        scale=scale,
        precision=probed.precision,
        latency_ms=expected if basis == "predicted" else physical,
        interval_ms=(expected * (1 - model.margin), expected * (1 + model.margin)) if basis == "predicted" else None,
        basis=basis,
        outcome="not measured",
        used=None,
        limit="",
    )
    if basis == "extrapolated":
        return _beyond(probed, size, slower=slower)
    return _held(probed, size, [float(value) for value in probed.costs([architecture]).values[0]], doubt=model.margin)


def _beyond(probed: Probed, size: StockSize, *, slower: bool) -> StockSize:
    """An extrapolated size, judged by the end of the measured networks that it lies beyond.

    Args:
        probed: What is known of the device.
        size: The size, not held against the limits yet.
        slower: Whether it lies beyond the slowest measured network; beyond the fastest otherwise.
    """
    rows = sorted(probed.rows, key=lambda row: row.latency_ms.p50)
    end = rows[-1 if slower else 0]
    held = _measured(probed, size.scale, size.precision, end.architecture, Measurement.from_dict(end.plain()))
    told: Outcome = "misses" if slower else "keeps"
    by_time = all(limit.metric in ("latency", "throughput") for limit in probed.limits)
    used = held.used * size.latency_ms / end.latency_ms.p50 if held.used is not None and by_time else None
    outcome: Outcome = told if held.outcome == told else "not measured"
    return size.model_copy(update={"outcome": outcome, "used": used, "limit": held.limit})


def _held(probed: Probed, size: StockSize, values: Sequence[float], doubt: float) -> StockSize:
    """A size held against the limits.

    Args:
        probed: What is known of the device.
        size: The size.
        values: What each limit is about; NaN where that is not known.
        doubt: Share by which a value may be wrong. What is counted on paper is exact, and so is what stock uses of a
            limit that is a share of stock.
    """
    shares = np.array([1 + limit.violation(value) for limit, value in zip(probed.limits, values, strict=True)])
    own = size.basis == "measured" and (size.scale, size.precision) == (probed.model.space.scale, probed.precision)
    exact = [limit.metric in ("params", "flops") or (own and limit.share is not None) for limit in probed.limits]
    doubts = np.where(exact, 0.0, doubt)
    unknown = np.isnan(shares)
    worst = int(np.argmax(np.where(unknown, -math.inf, shares)))
    outcome: Outcome = "too close to tell"
    if (shares * (1 - doubts) > 1).any():
        outcome = "misses"
    elif unknown.any():
        outcome = "not measured"
    elif (shares * (1 + doubts) <= 1).all():
        outcome = "keeps"
    used = None if unknown[worst] else float(shares[worst])
    return size.model_copy(update={"outcome": outcome, "used": used, "limit": str(probed.limits[worst])})
