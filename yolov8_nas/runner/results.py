"""What stages tell of their results: frozen models, written by the stage and read by everything after it.

Each is the content of one JSON file of a stage's result. A file that is not of its model is a fault of whoever wrote
it, and is told with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, PlainSerializer, PlainValidator, ValidationError

from yolov8_nas.config import Start
from yolov8_nas.errors import InputError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.space import Architecture

if TYPE_CHECKING:
    from yolov8_nas.evaluation import Comparison, TrainingSpread


def _architecture(given: Architecture | Mapping[str, JsonValue]) -> Architecture:
    return given if isinstance(given, Architecture) else Architecture.from_dict(given)


Network = Annotated[Architecture, PlainValidator(_architecture), PlainSerializer(Architecture.to_dict)]
"""An architecture as a field of a result; in JSON its plain description."""


class Result(BaseModel):
    """A part of a stage's result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def plain(self) -> dict[str, JsonValue]:
        """The result as plain JSON values."""
        return self.model_dump(mode="json")


class ResultFile(Result):
    """The content of a JSON file of a stage's result.

    Attributes:
        FILE: Name of the file.
    """

    FILE: ClassVar[str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from the folder of a stage's result.

        Raises:
            InputError: It is not of this form.
        """
        path = folder / cls.FILE
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise InputError(f"{path}: {where}: {fault['msg']}; run the stage that wrote it again") from None

    def write(self, folder: Path) -> None:
        """Write it to the folder of a stage's result."""
        write_json(folder / self.FILE, self.plain())


class Rung(Result):
    """Trainings that were compared with each other.

    Attributes:
        networks: How many networks were trained.
        epochs: How long.
        folds: Folds of the train split, of which each training left one out; nothing for whole trainings.
    """

    networks: int
    epochs: int
    folds: int | None = None


class Ranked(Result):
    """How far a network came in a halving.

    Attributes:
        index: Which of the entrants it is.
        seed: Seed of its whole training.
        architecture: What it is.
        scores: What each rung told, as far as it came.
        lead: By how much it lies above the mean of its last rung.
        expected: mAP50-95 that is expected of it.
        seconds: What its trainings took.
    """

    index: int
    seed: int
    architecture: Network
    scores: tuple[float, ...]
    lead: float
    expected: float
    seconds: float


class Halving(Result):
    """A successive halving, the best network first.

    Attributes:
        rungs: Its rungs; the last one is whole trainings.
        ranking: The networks.
    """

    rungs: tuple[Rung, ...]
    ranking: tuple[Ranked, ...]


class Budget(Result):
    """What a choice takes at most.

    Attributes:
        epochs: Epochs of all trainings.
        stock_trainings: Its computing as a multiple of a training of stock.
        taught_by_stock: Trainings of stock for the sake of teaching.
    """

    epochs: float
    stock_trainings: float
    taught_by_stock: float


class CandidatesHalving(Halving):
    """The halving of the candidates.

    Attributes:
        budget: What it takes at most.
    """

    budget: Budget


class TrainingRecipe(Result):
    """How a network was trained; see `train.finetune.Recipe`."""

    epochs: int
    batch: int
    lr: float
    imgsz: int
    seed: int
    mosaic: bool


class Tuned(Result):
    """A network that was trained to the end.

    Attributes:
        architecture: What it is.
        map50_95: Its score on the search split, by precision.
        average: Mean score of its last epochs.
        best_epoch: The epoch whose weights were kept, by precision.
        start: What it began with.
        begun_with: The same in words.
        computing: Multiply-accumulates of its trainings, by their kind.
        distilled: Whether stock taught it.
        epochs: Epochs of its training in floating point.
        recipe: How it was trained.
        seconds: What that took.
    """

    architecture: Network
    map50_95: Mapping[str, float]
    average: float
    best_epoch: Mapping[str, int]
    start: Start
    begun_with: str
    computing: Mapping[str, float]
    distilled: bool
    epochs: int
    recipe: TrainingRecipe
    seconds: float


class TunedCandidate(Tuned):
    """A candidate that was trained to the end.

    Attributes:
        index: Its index in the search's `candidates.json`.
        expected: mAP50-95 that all of its trainings let expect of it.
    """

    index: int
    expected: float


class EqualLatency(Result):
    """What rescaled stock was made equal to.

    Attributes:
        latency_ms: Median latencies of the rescaled networks.
        candidate: Digest of the candidate.
        candidate_ms: Its median latency; nothing where it was not measured.
    """

    latency_ms: tuple[float, ...]
    candidate: str
    candidate_ms: float | None


class Rival(Tuned):
    """Stock, or rescaled stock, trained to the end.

    Attributes:
        name: What it is called.
        form: Form in which it ships.
        halving: How it was chosen among its trainings.
        equal_latency: What it was rescaled to; nothing for stock.
    """

    name: str
    form: str
    halving: Halving
    equal_latency: EqualLatency | None = None


class FinetuneResult(ResultFile):
    """The result of qat-finetune.

    Attributes:
        candidates: The candidates that were trained to the end, the most promising first.
        baseline: Stock; nothing where it was not asked for.
        rescaled: Stock at the best candidate's latency; likewise.
        qat: How networks were trained for INT8, where they were.
        halving: How the candidates were chosen.
    """

    FILE = "finetune.json"

    candidates: tuple[TunedCandidate, ...]
    baseline: Rival | None
    rescaled: Rival | None
    qat: TrainingRecipe
    halving: CandidatesHalving


class Latency(Result):
    """Percentiles of latency in ms."""

    p50: float
    p90: float
    p99: float


class HeldLimit(Result):
    """A limit, and what was measured of a file.

    Attributes:
        metric: What is limited; see `space.limits.Constraint` for the first five.
        share: Share of stock's value that was asked for; nothing for an absolute limit.
        stock: Stock's value, measured in the same rounds.
        measured: The file's value; nothing where it could not be measured.
        met: Whether the limit is kept.
    """

    metric: str
    statistic: str
    scope: str
    limit: float
    unit: str
    share: float | None = None
    stock: float | None = None
    measured: float | None
    met: bool


class TrainingCost(Result):
    """What a network began with, and how much its training took.

    Attributes:
        start: What it began with.
        begun_with: The same in words.
        epochs: Its epochs.
        computing: Its computing in multiply-accumulates.
    """

    start: Start
    begun_with: str
    epochs: int
    computing: float


class FileFigures(Result):
    """What was measured of an exported file.

    Attributes:
        precision: Its precision.
        latency_ms: Of the network alone.
        latency_interval_ms: 95% interval of its median.
        repetitions: Timed runs.
        disturbed: Whether something else loaded the device meanwhile.
        latency_with_nms_ms: With non-maximum suppression; nothing of a device elsewhere.
        latency_with_nms_interval_ms: 95% interval of its median.
        found: Boxes above the threshold and detections in an image, in the mean.
        memory_mb: Peak memory in MiB; nothing where that cannot be told.
        energy_mj: Energy per image; nothing without a counter.
        power_w: Mean power; likewise.
        map50_95: Score on the val split.
        map50: The same at IoU 0.50.
        per_class: `map50_95` by class.
        map50_95_search: Score on the search split.
        file_mb: Size of the file in MiB.
        params: Parameters.
        gflops: Floating-point operations for one image, in 10^9.
    """

    precision: str
    latency_ms: Latency
    latency_interval_ms: tuple[float, float]
    repetitions: int
    disturbed: bool
    latency_with_nms_ms: Latency | None
    latency_with_nms_interval_ms: tuple[float, float] | None
    found: Mapping[str, float]
    memory_mb: float | None
    energy_mj: float | None
    power_w: float | None
    map50_95: float
    map50: float
    per_class: Mapping[str, float]
    map50_95_search: float
    file_mb: float
    params: float
    gflops: float


class CandidateFile(FileFigures):
    """A candidate's exported file.

    Attributes:
        candidate: Its index in the search's `candidates.json`.
        architecture: What it is.
        constraints: The limits, held against it.
        training: How it was trained.
    """

    candidate: int
    architecture: Network
    constraints: tuple[HeldLimit, ...]
    training: TrainingCost


class Shipped(CandidateFile):
    """The file that ships.

    Attributes:
        file: Its name in `model/`.
    """

    file: str


class Tried(CandidateFile):
    """A file that was tried.

    Attributes:
        outcome: Whether it ships, or why not, in a word or two.
        reason: The same with figures.
    """

    outcome: Literal["shipped", "not asked for", "limit missed", "less accurate", "less wanted"]
    reason: str


class StockFile(FileFigures):
    """Stock's exported file.

    Attributes:
        name: What the network is called.
        form: Form and precision of the file.
        epochs: Epochs of its training.
        training: How it was trained.
    """

    name: str
    form: str
    epochs: int
    training: TrainingCost


class Difference(Result):
    """How one file's mAP50-95 differs from another's; see `evaluation.Comparison`."""

    difference: float
    low: float
    high: float
    word: str

    @classmethod
    def of(cls, compared: Comparison) -> Self:
        """The difference that a comparison found."""
        return cls(difference=compared.difference, low=compared.low, high=compared.high, word=compared.word)


class Spread(Result):
    """How far apart trainings of one network lie; see `evaluation.TrainingSpread`."""

    sd: float
    freedom: float
    source: str

    @classmethod
    def of(cls, spread: TrainingSpread) -> Self:
        """The spread as a part of a result."""
        return cls(sd=spread.sd, freedom=spread.freedom, source=spread.source)


class AgainstStock(Difference):
    """A file against stock's.

    Attributes:
        trainings: How far apart trainings lie, which the interval allows for.
        subject: Whose file it is, in words.
        what: What is compared, in words.
        against: What it is compared with.
    """

    trainings: Spread
    subject: str
    what: str
    against: str


class Accuracy(Result):
    """A score on the val split."""

    map50_95: float
    map50: float
    per_class: Mapping[str, float]


class Quantized(Result):
    """One network in FP32 and in INT8, side by side.

    Attributes:
        candidate: Its index.
        fp32: Its file in floating point.
        int8: Its file in INT8.
        difference: INT8 against FP32.
        ptq: The network in INT8 before it was trained for that: calibrated only.
        ptq_difference: That against FP32.
        keep_float: Parts that stay in floating point.
    """

    candidate: int
    fp32: FileFigures
    int8: FileFigures
    difference: Difference
    ptq: Accuracy
    ptq_difference: Difference
    keep_float: tuple[str, ...]


class Suppression(Result):
    """How non-maximum suppression was timed.

    Attributes:
        confidence: Threshold of confidence.
        iou: Overlap from which a box is suppressed; nothing behind a head that needs no suppression.
        max_detections: Most detections in an image.
        threads: Threads that it ran on.
        images: Images that it was timed on.
        split: Their split.
        nms_free: Whether the head needs no suppression.
    """

    confidence: float
    iou: float | None = None
    max_detections: int
    threads: int
    images: int
    split: str
    nms_free: bool = False


class ConfidenceSpread(Result):
    """How confidences of right detections lie; see `export.thresholds.Spread`."""

    detections: int
    p10: float
    p50: float
    p90: float
    highest: float
    levels: int


class Threshold(Result):
    """A threshold carried over from floating point to INT8; see `export.thresholds.Row`."""

    old: float
    new: float | None
    precision: float | None
    new_precision: float | None
    recall: float
    new_recall: float | None
    detections: int
    why_not: str


class Confidence(Result):
    """What INT8 does to confidences; see `export.thresholds.Confidences`.

    Attributes:
        of: The file in floating point that they are held against.
        images: Images that they were told on.
        split: Their split.
    """

    of: str
    images: int
    split: str
    old: ConfidenceSpread
    new: ConfidenceSpread
    spread: float | None
    squeezed: bool
    table: tuple[Threshold, ...]


class VerdictResult(ResultFile):
    """The result of trt-export.

    Attributes:
        status: Whether a file keeps the limits.
        chosen_on: The images that the choice was made on.
        shipped: The file that ships; nothing where none keeps the limits.
        tried: All files of candidates, the most wanted first.
        baselines: Stock's files.
        comparison: What ships against stock in its own precision.
        comparisons: The same with all that it is compared with.
        quantization: FP32 and INT8 side by side; nothing where INT8 was not asked for.
        checkpoint_map50_95: Score of the checkpoint of what ships.
        confidence: What INT8 does to confidences; nothing where a file in floating point ships.
        nms: How non-maximum suppression was timed.
    """

    FILE = "verdict.json"

    status: Literal["met", "failed"]
    chosen_on: str
    shipped: Shipped | None
    tried: tuple[Tried, ...]
    baselines: tuple[StockFile, ...]
    comparison: AgainstStock | None
    comparisons: tuple[AgainstStock, ...]
    quantization: Quantized | None
    checkpoint_map50_95: float | None
    confidence: Confidence | None
    nms: Suppression
