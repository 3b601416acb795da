"""Results of hw-probe: the device's measurements, the latency model fitted to them, and the limits as absolute ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from yolov8_nas.runner.results.form import Latency, Network, Result, ResultFile, ResultRow
from yolov8_nas.runner.settings import Space
from yolov8_nas.space.limits import Constraint

Role = Literal["stock", "train", "swap", "holdout", "fastest"]
"""Why a network was measured; see `measure.sampling.Sample`."""

Reading = None | bool | int | float | str | tuple[str, ...] | Mapping[str, int | None]
"""One of the figures that tell how a device is run; see `device.profile.regime` and `device.gpu.regime`."""


class Timed(Result):
    """The timing of something; see `measure.benchmark.Timing`."""

    latency_ms: Latency
    interval_ms: tuple[float, float]
    rounds: tuple[float, ...]
    repetitions: int
    disturbed: bool


class Measured(Timed):
    """The measurement of a network; see `measure.benchmark.Measurement`."""

    memory_mb: float
    energy_mj: float | None
    power_w: float | None
    gpu_ms: float | None = None
    reference_ms: float | None = None


class ProbedNetwork(Measured):
    """A measured network.

    Attributes:
        architecture: The network.
        genes: Its genes in the space of the table.
        role: Why it was measured.
    """

    architecture: Network
    genes: tuple[int, ...]
    role: Role


class FailedNetwork(Result):
    """A network that could not be built or measured.

    Attributes:
        architecture: The network.
        role: Why it was to be measured.
        reason: What went wrong, in words.
    """

    architecture: Network
    role: Role
    reason: str


class Regime(Result):
    """How the device was run before and after the measurements."""

    before: Mapping[str, Reading]
    after: Mapping[str, Reading]


class Conditions(Result):
    """Where and how networks were measured.

    Attributes:
        threads: Threads of each on a CPU.
        runtime: Name and version of what ran them.
        counter: What counted energy; nothing where nothing did.
        no_counter: Why nothing did.
        regime: How the device was run.
        bundle: Digest of the bundle, where the device is elsewhere.
    """

    threads: int
    runtime: Mapping[str, str]
    counter: str | None
    no_counter: str | None
    regime: Regime
    bundle: str | None = None


class LatencyTable(ResultFile):
    """The measured networks.

    Attributes:
        protocol: How they were timed; see `measure.protocol.Protocol`.
        conditions: Where and how they were measured.
        rows: The networks, stock first.
        failed: Those that could not be built or measured.
    """

    FILE = "latency_table.json"

    protocol: Mapping[str, int | float]
    conditions: Conditions
    rows: tuple[ProbedNetwork, ...]
    failed: tuple[FailedNetwork, ...]


class PredictionErrors(Result):
    """How well latencies or energies are predicted.

    Attributes:
        mape: Mean absolute percentage error, as a share.
        spearman: Rank correlation.
    """

    mape: float
    spearman: float


class Smoothness(Result):
    """The form of a latency model's correction.

    Attributes:
        curved: Share of the squared-exponential kernel; the rest is linear.
        length: Its length scale, in standard deviations per feature.
        noise: Variance of the measurement, as a multiple of the kernel's.
    """

    curved: float
    length: float
    noise: float


class FittedModel(Result):
    """A latency model: the measurements, and what was chosen; see `measure.latency_model.LatencyModel`.

    Attributes:
        genes: The networks that it is fitted to.
        latency_ms: Their median latencies in ms.
        confidence: Probability with which a network keeps its upper bound.
    """

    space: Space
    num_classes: int
    imgsz: int
    genes: tuple[tuple[int, ...], ...]
    latency_ms: tuple[float, ...]
    smoothness: Smoothness
    margin: float
    confidence: float
    cross_validation: PredictionErrors


class LatencyFit(FittedModel, PredictionErrors, ResultFile):
    """The latency model of a device, with its errors on networks that it was not fitted to.

    Attributes:
        networks: Networks that it is fitted to.
        holdout: Networks that its errors are told on.
        coverage: Share of these below their upper bound.
        scatter: Half-width of the 95% interval of p50 as a share of it, the median over all networks.
        energy: Errors of the same model of energy; nothing where the device counts none.
    """

    FILE = "latency_model.json"

    networks: int
    holdout: int
    coverage: float
    scatter: float
    energy: PredictionErrors | None


class AsExported(Result):
    """Stock in the form in which Ultralytics exports it, with C2f as one module."""

    latency_ms: Latency
    memory_mb: float


class StockResult(ResultFile):
    """The measurement of stock.

    Attributes:
        scale: Its size: `n`, `s`, `m` or `l`.
        architecture: What it is.
        latency_ms: Its latency.
        memory_mb: Peak memory in MiB.
        energy_mj: Energy per image in mJ; nothing without a counter.
        power_w: Mean power in W; likewise.
        params: Parameters.
        gflops: Floating-point operations for one image, in 10^9.
        as_ultralytics_exports_it: The same network with C2f as one module.
    """

    FILE = "stock.json"

    scale: str
    architecture: Network
    latency_ms: Latency
    memory_mb: float
    energy_mj: float | None
    power_w: float | None
    params: float
    gflops: float
    as_ultralytics_exports_it: AsExported


class TimedLoad(Timed):
    """Non-maximum suppression on made-up outputs of one kind.

    Attributes:
        boxes: Boxes above the threshold, in the mean of the images.
        detections: Detections that are left, likewise.
    """

    boxes: float
    detections: float


class SuppressionSettings(Result):
    """How non-maximum suppression is run.

    Attributes:
        confidence: Threshold of confidence.
        iou: Overlap from which a box is suppressed; nothing behind a head that needs no suppression.
        max_detections: Most detections in an image.
        threads: Threads that it runs on.
        nms_free: Whether the head needs no suppression.
    """

    confidence: float
    iou: float | None = None
    max_detections: int
    threads: int
    nms_free: bool = False


class SuppressionTimed(SuppressionSettings):
    """The timing of non-maximum suppression alone.

    Attributes:
        shape: Shape of the made-up outputs.
        loads: What was timed, by the kind of output.
        load: The kind that limits are held against.
    """

    shape: tuple[int, ...]
    loads: Mapping[str, TimedLoad]
    load: str


class NmsResult(ResultFile):
    """The latency of non-maximum suppression.

    Attributes:
        latency_ms: Added to a network's where limits include it; nothing where it was not measured.
        reason: Why it was not.
        timed: How it was timed, and all that was.
    """

    FILE = "nms.json"

    latency_ms: Latency | None
    reason: str | None = None
    timed: SuppressionTimed | None = None


class LimitRow(Result):
    """An absolute limit.

    Attributes:
        metric: What is limited; see `space.limits.Constraint` for the first five.
        share: Share of stock's value that was asked for; nothing for an absolute limit.
        stock: Stock's value for which it is absolute.
    """

    metric: str
    statistic: str
    scope: str
    limit: float
    unit: str
    share: float | None = None
    stock: float | None = None

    @property
    def constraint(self) -> Constraint:
        """The limit that it tells of."""
        return Constraint(self.metric, self.statistic, self.scope, self.limit, relative=False, share=self.share)


class ResolvedLimit(LimitRow, ResultRow):
    """A limit as an absolute one.

    Attributes:
        text: The limit as it was asked for.
    """

    FILE = "constraints.json"

    text: str
