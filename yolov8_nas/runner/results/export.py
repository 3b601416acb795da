"""Results of trt-export: the verdict, and the engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import JsonValue

from yolov8_nas.config import Start
from yolov8_nas.runner.results.form import Latency, Network, Result, ResultFile
from yolov8_nas.runner.results.probe import LimitRow, SuppressionSettings
from yolov8_nas.runner.results.search import Compiled

if TYPE_CHECKING:
    from yolov8_nas.evaluation import Comparison, TrainingSpread


class HeldLimit(LimitRow):
    """A limit, and what was measured of a file; `stock` is of the same rounds.

    Attributes:
        measured: The file's value; nothing where it could not be measured.
        met: Whether the limit is kept.
    """

    measured: float | None
    met: bool


class TrainingCost(Result):
    """Start and cost of a network's training.

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
    """Figures of an exported file.

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


class DecidedBy(Result):
    """The differences in mAP50-95 that validation images decide, `power` of the time.

    Attributes:
        difference: The difference that is asked about, in mAP from 0 to 1.
        power: How often it is to be decided, from 0 to 1.
        images: Images at hand.
        smallest: The smallest difference between two files that these images decide.
        images_needed: Images that decide `difference` between two files; nothing where the two files find the same in
            every image, so that no image tells.
        smallest_trained: The smallest difference between two networks, each trained once, that these images decide;
            nothing where files are compared.
        trainings: Trainings of each network, with several seeds, that decide `difference` between the two on
            `images_trained` images; likewise, and where more than a thousand would be needed.
        images_trained: Images that it takes then.
    """

    difference: float
    power: float
    images: int
    smallest: float
    images_needed: int | None
    smallest_trained: float | None = None
    trainings: int | None = None
    images_trained: int | None = None


class ClassEvidence(Result):
    """What the validation images tell of one class.

    Attributes:
        name: The class.
        images: Images with a box of it.
        boxes: Its boxes.
        map50_95: Its AP50-95; nothing without a box.
        low: Lower end of the 95% interval over images; nothing where there are too few of them.
        high: Upper end; likewise.
        why_not: Why nothing can be said of it; nothing where something can.
    """

    name: str
    images: int
    boxes: int
    map50_95: float | None = None
    low: float | None = None
    high: float | None = None
    why_not: Literal["no box", "few images", "wide interval"] | None = None


class AgainstStock(Difference):
    """A file against stock's.

    Attributes:
        trainings: How far apart trainings lie, which the interval allows for.
        subject: Whose file it is, in words.
        what: What is compared, in words.
        against: What it is compared with.
        decided_by: What would decide a difference of one point; nothing where the images decide.
    """

    trainings: Spread
    subject: str
    what: str
    against: str
    decided_by: DecidedBy | None = None


class Choice(Shipped):
    """A file to choose from beside the one that ships: of another candidate or precision, and it keeps the limits.

    Attributes:
        IN: Folder in which each has a folder of its own.
        folder: Name of that.
        comparison: It against stock in its own precision; nothing without stock.
    """

    IN: ClassVar[str] = "choices"

    folder: str
    comparison: AgainstStock | None


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


class Suppression(SuppressionSettings):
    """How non-maximum suppression was timed.

    Attributes:
        images: Images that it was timed on.
        split: Their split.
    """

    images: int
    split: str


class ConfidenceSpread(Result):
    """How confidences of right detections lie.

    Attributes:
        detections: How many there are.
        p10: Confidence that 10% of them stay below.
        p50: Their median.
        p90: Confidence that 10% of them exceed.
        highest: The highest.
        levels: Different confidences among all detections, rounded to six digits.
    """

    detections: int
    p10: float
    p50: float
    p90: float
    highest: float
    levels: int


class Threshold(Result):
    """A threshold carried over from one file to the one that replaces it.

    Attributes:
        old: The threshold.
        new: What replaces it; nothing where too few detections tell, or no threshold is as precise.
        precision: Precision above the old one; nothing where it lets through nothing.
        new_precision: Precision of the new file above the new one.
        recall: Share of the boxes that the old one finds.
        new_recall: Share of the boxes that the new one finds.
        detections: Detections above the old one.
        why_not: Why there is no new one.
    """

    old: float
    new: float | None = None
    precision: float | None
    new_precision: float | None = None
    recall: float
    new_recall: float | None = None
    detections: int
    why_not: str = ""


class Confidences(Result):
    """The confidences of a file against those of the one it replaces; see `export.thresholds`.

    Attributes:
        old: How the old ones spread.
        new: How the new ones do.
        spread: New spread (p90 - p10) as a share of the old one; nothing where the old one has none.
        squeezed: Whether that is less than `thresholds.SQUEEZED`.
        table: The thresholds, rising.
    """

    old: ConfidenceSpread
    new: ConfidenceSpread
    spread: float | None
    squeezed: bool
    table: tuple[Threshold, ...]


class Confidence(Confidences):
    """The change of confidences from floating point to INT8.

    Attributes:
        of: The file in floating point that they are held against.
        images: Images that they were told on.
        split: Their split.
    """

    of: str
    images: int
    split: str


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
        classes: What the validation images tell of each class.
        choices: What can be chosen in its place: all other files in a precision asked for that keep the limits.
        quantization: FP32 and INT8 side by side; nothing where INT8 was not asked for.
        checkpoint_map50_95: Score of the checkpoint of what ships.
        confidence: The change of confidences; nothing where a file in floating point ships.
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
    classes: tuple[ClassEvidence, ...] = ()
    choices: tuple[Choice, ...] = ()
    quantization: Quantized | None
    checkpoint_map50_95: float | None
    confidence: Confidence | None
    nms: Suppression


class DrawnBox(Result):
    """A box of a picture.

    Attributes:
        box: Left, top, right and bottom in pixels of the original image.
        label: Index of its class.
        confidence: Of a detection; nothing of a true box.
        right: Whether a detection lies on a true box of its class, or a true box has such a detection.
    """

    box: tuple[float, float, float, float]
    label: int
    confidence: float | None
    right: bool


class Drawn(Result):
    """What one network makes of an image.

    Attributes:
        found: Its detections, from the most confident on.
        missed: The true boxes that it does not find.
    """

    found: tuple[DrawnBox, ...]
    missed: tuple[DrawnBox, ...]


class Picture(Result):
    """An image of the val split with what two networks make of it.

    Attributes:
        name: File name of the image in the dataset's normal form.
        file: Name of its copy, made smaller, in `pictures/`.
        width: Of the original image, in pixels.
        height: Of the original image, in pixels.
        boxes: Its true boxes.
        ours: What the network that ships makes of it.
        stock: What stock makes of it.
    """

    name: str
    file: str
    width: int
    height: int
    boxes: int
    ours: Drawn
    stock: Drawn


class PicturesResult(ResultFile):
    """Images of the val split in which the network that ships and stock together miss the most.

    Attributes:
        confidence: Confidence from which a detection counts.
        iou: Overlap from which a detection is right.
        ours: File of the network that ships, in words.
        stock: File of the stock network, in words.
        classes: Names of the classes.
        images: The images, the worst first.
        of: How many images the split has.
    """

    FILE = "pictures.json"

    confidence: float
    iou: float
    ours: str
    stock: str
    classes: tuple[str, ...]
    images: tuple[Picture, ...]
    of: int


class EngineResult(ResultFile):
    """The TensorRT engine of what ships.

    Attributes:
        built: Whether there is one.
        reason: Why there is none.
        compiler: What built it.
        version: Version of that.
        built_on: The GPU that it was built on.
        built_for: Compute capabilities that an engine built ahead of time is for.
        precision: The lowest precision in it.
        layers: Its compiler's account of it; see `measure.engine_file.EngineManifest`.
        compiled_just_in_time_s: Seconds that compiling its kernels took; nothing where none were compiled then.
    """

    FILE = "engine.json"

    built: bool
    reason: str | None = None
    compiler: str | None = None
    version: str | None = None
    built_on: str | None = None
    built_for: tuple[str, ...] = ()
    precision: str | None = None
    layers: Mapping[str, JsonValue] | None = None
    compiled_just_in_time_s: float | None = None


class BuiltAhead(Compiled):
    """The compiler's account of an engine that it built without a device; see `export.tensorrt_rtx.Revealed`.

    Attributes:
        seconds: What the build took.
        plan_bytes: Size of the engine.
    """

    seconds: float
    plan_bytes: int


class AheadResult(ResultFile):
    """Engines that were built before the device is asked.

    Attributes:
        built: Whether they were built.
        reason: Why they were not.
        engines: The compiler's account of each, by the name of its files.
    """

    FILE = "ahead.json"

    built: bool
    reason: str | None
    engines: Mapping[str, BuiltAhead]
