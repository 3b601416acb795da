"""The description of an export: networks, device, limits and data; and the scores of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from yolov8_nas.config import Precision, TargetConfig
from yolov8_nas.data import dataset
from yolov8_nas.deploy.sources import Form, Source
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile
from yolov8_nas.evaluation import Evaluation, Evaluator
from yolov8_nas.files import read_kept
from yolov8_nas.measure.runtime import RUNTIMES, find
from yolov8_nas.runner.progress import Progress
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import Cost, cost
from yolov8_nas.space.limits import Constraint

BATCH: Final = 16
"""Images at once when a checkpoint is scored; an exported file has its own batch."""

WANTED: Final[Mapping[str, tuple[str, ...]]] = {
    "fp32": ("fp32",),
    "fp16": ("fp16",),
    "int8": ("int8",),
    "best": ("fp32", "int8"),
}
"""Precisions that may ship, by the precision asked for."""


@dataclass
class Job:
    """One export.

    Attributes:
        tuned: The result of qat-finetune: checkpoints and `finetune.json`.
        data: The dataset in its normal form, as data-prep writes it.
        profile: The device.
        limits: Absolute limits. Those that are shares of stock follow stock as it is measured beside the files.
        precision: Precision asked for.
        form: The form of the files.
        scale: Size of the stock YOLOv8 that the space is made of.
        out: Folder for the files that ship, and for the detections of each file.
        work: Folder for files, checkpoints and measurements on the way.
        preference: What is wanted of the files that keep the limits.
        nms_ms: Latency of NMS alone in ms, by percentile; nothing where it is not known.
        elsewhere: The target, where its device is elsewhere.
        build_ahead: Lays the files of networks into `work` where the runtime's are built without the device.
        host: Keeps others from computing while files are measured.
        progress: How far it has come.
    """

    tuned: Path
    data: Path
    profile: Profile
    limits: Sequence[Constraint]
    precision: Precision
    form: Form
    scale: str
    out: Path
    work: Path
    preference: Preference = MOST_ACCURATE
    nms_ms: Mapping[str, float] | None = None
    elsewhere: TargetConfig | None = None
    build_ahead: Callable[[Sequence[Source]], object] | None = None
    host: HostLock = field(default_factory=HostLock)
    progress: Progress = field(default_factory=Progress.silent)

    def __post_init__(self) -> None:
        self.wanted = WANTED[self.precision]
        self.threads = self.profile.threads
        self.classes = list(dataset.load(self.data).classes)
        kind, name = self.profile.kind, self.profile.runtime_name
        # FP32 always on a CPU: it is what INT8 is compared with. On a GPU precision may be the runtime's own setting.
        precisions = ("fp32", "int8") if kind == "cpu" else self.wanted
        self.runtimes = {p: find(name, kind, p) for p in precisions if p in RUNTIMES[name].precisions[kind]}
        self.runtime = next(iter(self.runtimes.values()))
        self.evaluators: dict[str, Evaluator] = {}
        self.steps = 0
        self.total = 1

    def step(self, message: str, steps: int = 1, **figures: float) -> None:
        """Tell how far the export has come."""
        self.steps += steps
        self.progress.update(self.steps, self.total, message, **figures)

    def evaluator(self, split: Literal["search", "val"]) -> Evaluator:
        """Scores on a split; one for all files, since it reads the images."""
        if split not in self.evaluators:
            data = dataset.data_yaml(self.data, self.work, validate_on=split)
            self.evaluators[split] = Evaluator(data, imgsz=self.form.imgsz, batch=BATCH, work=self.work / "work")
        return self.evaluators[split]

    def evaluate(self, evaluator: Evaluator, name: str, model: Path) -> Evaluation:
        """The score of a model, or the one that is kept under the name."""
        kept = self.work / "evaluation" / f"{name}.npz"
        if (before := read_kept(kept, Evaluation.load)) is not None:
            return before
        evaluation = evaluator.evaluate(model)
        evaluation.save(kept)
        return evaluation

    def cost(self, architecture: Architecture) -> Cost:
        """The cost of a network on paper."""
        return cost(architecture, len(self.classes), self.form.imgsz)
