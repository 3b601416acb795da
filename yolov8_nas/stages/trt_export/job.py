"""One export: what the stages before tell of it, and how files are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from yolov8_nas.data import dataset
from yolov8_nas.device.profile import Profile
from yolov8_nas.evaluation import Evaluation, Evaluator
from yolov8_nas.files import read_kept
from yolov8_nas.measure.runtime import RUNTIMES, find
from yolov8_nas.runner.results import FinetuneResult, ResolvedLimit, SearchResult
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import Cost, cost
from yolov8_nas.stages.trt_export.settings import WANTED, ExportSettings

BATCH: Final = 16
"""Images at once when a checkpoint is scored; an exported file has its own batch."""


class Job:
    """One export.

    Args:
        ctx: The context of the stage.
    """

    def __init__(self, ctx: StageContext[ExportSettings]) -> None:
        self.ctx = ctx
        self.imgsz = ctx.settings.imgsz
        self.batch = ctx.settings.batch
        self.wanted = WANTED[ctx.settings.precision]
        self.keep_float = ctx.settings.keep_float
        self.nms_free = ctx.settings.nms_free
        self.tuned = ctx.inputs["qat-finetune"]
        self.summary = FinetuneResult.read(self.tuned)
        self.classes = list(dataset.load(ctx.inputs["data-prep"]).classes)
        self.limits = [row.constraint for row in ResolvedLimit.read_all(ctx.inputs["hw-probe"])]
        self.profile = Profile.read(ctx.inputs["hw-probe"])
        self.threads = self.profile.threads
        kind, name = self.profile.kind, self.profile.runtime_name
        # FP32 always on a CPU: it is what INT8 is compared with. On a GPU precision may be the runtime's own setting.
        precisions = ("fp32", "int8") if kind == "cpu" else self.wanted
        self.runtimes = {p: find(name, kind, p) for p in precisions if p in RUNTIMES[name].precisions[kind]}
        self.runtime = next(iter(self.runtimes.values()))
        objective = SearchResult.read(ctx.inputs["search"]).objective
        self.preference = Preference(**dict(objective)) if objective else MOST_ACCURATE
        self.scale = ctx.settings.scale
        self.evaluators: dict[str, Evaluator] = {}
        self.steps = 0
        self.total = 1

    def step(self, message: str, steps: int = 1, **figures: float) -> None:
        """Tell how far the export has come."""
        self.steps += steps
        self.ctx.progress.update(self.steps, self.total, message, **figures)

    def evaluator(self, split: Literal["search", "val"]) -> Evaluator:
        """Scores on a split; one for all files, since it reads the images."""
        if split not in self.evaluators:
            data = dataset.data_yaml(self.ctx.inputs["data-prep"], self.ctx.partial, validate_on=split)
            self.evaluators[split] = Evaluator(data, imgsz=self.imgsz, batch=BATCH, work=self.ctx.partial / "work")
        return self.evaluators[split]

    def evaluate(self, evaluator: Evaluator, name: str, model: Path) -> Evaluation:
        """The score of a model, or the one that is kept under the name."""
        kept = self.ctx.partial / "evaluation" / f"{name}.npz"
        if (before := read_kept(kept, Evaluation.load)) is not None:
            return before
        evaluation = evaluator.evaluate(model)
        evaluation.save(kept)
        return evaluation

    def cost(self, architecture: Architecture) -> Cost:
        """What a network costs on paper."""
        return cost(architecture, len(self.classes), self.imgsz)
