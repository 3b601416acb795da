"""What is told before a run is paid for: stock sizes against the limits, what a search may gain, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from yolov8_nas.runner.results.form import Result, ResultFile
from yolov8_nas.runner.results.probe import Measured

Outcome = Literal["keeps", "misses", "too close to tell", "not measured"]
"""What is known of a network and the limits."""

Basis = Literal["measured", "predicted", "extrapolated"]
"""Where a latency is from: a measurement; the latency model, among the latencies that it was fitted to; or its physical
part alone, outside of them."""

Kind = Literal["stock", "quantize", "search"]
"""What is recommended."""


class MeasuredSize(Measured):
    """The measurement of a stock size.

    Attributes:
        scale: Its size: `n`, `s`, `m` or `l`.
        precision: `fp32`, `fp16` or `int8`.
    """

    scale: str
    precision: str


class MeasuredSizes(ResultFile):
    """The measurements of stock sizes beside the one that hw-probe measures.

    Attributes:
        rows: The sizes.
        failed: Why others could not be built or measured, by `size-precision`.
    """

    FILE = "stock_sizes.json"

    rows: tuple[MeasuredSize, ...]
    failed: Mapping[str, str]


class StockSize(Result):
    """A stock size against the limits.

    Attributes:
        scale: Its size: `n`, `s`, `m` or `l`.
        precision: `fp32`, `fp16` or `int8`.
        latency_ms: Median latency.
        interval_ms: Of a measured one the 95% interval; of a predicted one the prediction less and plus the margin that
            measured networks keep with the model's confidence. Nothing where it is extrapolated.
        basis: Where the latency is from.
        outcome: What is known of it and the limits.
        used: Share of the tightest limit that it uses: above 1, it misses the limit by the rest. Nothing where that is
            not known.
        limit: The tightest limit.
    """

    scale: str
    precision: str
    latency_ms: float
    interval_ms: tuple[float, float] | None
    basis: Basis
    outcome: Outcome
    used: float | None
    limit: str


class Recorded(Result):
    """A gain that this project has measured, and where that is recorded.

    Attributes:
        data: The dataset.
        limit: The limit, as a share of stock's latency.
        start: What the networks began with.
        against: What the network found is compared with.
        difference: Points of mAP50-95.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        word: `ahead`, `undecided` or `behind`.
        source: The page and its section.
    """

    data: str
    limit: float
    start: str
    against: str
    difference: float
    low: float
    high: float
    word: str
    source: str


class Rate(Result):
    """What something takes for one image, in seconds.

    Attributes:
        seconds: The median.
        low: Lower end of the median's 95% interval.
        high: Upper end.
        images: Images at once.
        repetitions: How often it was timed.
    """

    seconds: float
    low: float
    high: float
    images: int
    repetitions: int


class TrainingRates(ResultFile):
    """What training and scoring take on this machine, by a few real steps on images of the dataset.

    Attributes:
        device: What they ran on.
        alone: Whether the machine had no other work, as far as the host's lock and its load tell.
        supernet: A step of the supernet with all of its networks.
        teacher: A step of it in which the teacher trains alone.
        single: A step of stock alone, as fine-tuning takes it.
        score: Scoring stock, with non-maximum suppression.
        recalibration: BatchNorm's statistics of stock.
        took: Seconds that all of it took.
    """

    FILE = "rates.json"

    device: str
    alone: bool
    supernet: Rate
    teacher: Rate
    single: Rate
    score: Rate
    recalibration: Rate
    took: float


class StageCost(Result):
    """What a stage will take.

    Attributes:
        stage: The stage.
        seconds: Expected seconds; nothing where they are not known.
        low: Lower end of what the rates' intervals make of them.
        high: Upper end.
        source: Where that is from, or why it is not known.
    """

    stage: str
    seconds: float | None
    low: float | None = None
    high: float | None = None
    source: str


class Advice(ResultFile):
    """What is told of one target after it was probed and before anything is trained for it.

    Attributes:
        target: Label of the target.
        precision: Precision in which the device was probed.
        limits: The limits, absolute ones.
        sizes: The stock sizes, from small to large.
        space: Name of the search space.
        scale: Size of its stock network.
        gains: What searches of ours have gained where networks began as they will here; none without such figures.
        costs: What the stages will take.
        rates: What `costs` follow from; nothing where no step was taken.
        kind: What is recommended.
        size: The stock size that is recommended; nothing where it is to search.
        recommendation: The same as a sentence, with the reason.
    """

    FILE = "advice.json"

    target: str
    precision: str
    limits: tuple[str, ...]
    sizes: tuple[StockSize, ...]
    space: str
    scale: str
    gains: tuple[Recorded, ...]
    costs: tuple[StageCost, ...]
    rates: TrainingRates | None
    kind: Kind
    size: str | None
    recommendation: str
