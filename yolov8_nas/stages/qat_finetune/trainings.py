"""Single trainings of the stage: short ones, whole ones, and stock's, which targets and runs share."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import is_qat

from yolov8_nas.config import Start
from yolov8_nas.data import dataset
from yolov8_nas.files import write_json
from yolov8_nas.runner.results import ShortTraining, StockTrainingResult, TrainingRecipe
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.qat_finetune.given import Arm, Entrant, Given
from yolov8_nas.stages.qat_finetune.settings import QAT_COST, VERSION, FinetuneSettings
from yolov8_nas.supernet.derive import add_one_to_one, save_checkpoint
from yolov8_nas.train import finetune
from yolov8_nas.train.finetune import CHECKPOINT, Recipe, Trained, average
from yolov8_nas.train.halving import Result
from yolov8_nas.train.quantization import load_network
from yolov8_nas.train.starting import Begun

STOCK: Final = "stock-trainings"
"""Folder of the store with the trainings of stock that targets and runs share."""

FOLDS: Final = 4
"""Folds of the train split; a short training leaves one of them out."""

RUNG_SEED: Final = 1000
"""By how much the seeds of one rung and the next lie apart: their luck shall not be the same."""


class StockTraining(StageSettings):
    """What a shared training of stock depends on.

    Attributes:
        dataset: Digest of the dataset.
        architecture: Digest of stock.
        start: What it begins with.
        sha256: Digest of the weights that it begins with; nothing where it begins otherwise.
        recipe: How it is trained.
        nms_free: Whether it has the head that needs no non-maximum suppression.
    """

    dataset: str
    architecture: str
    start: Start
    sha256: str | None
    recipe: Recipe
    nms_free: bool


class Trainings:
    """Trains networks, each in a folder of its own, and tells how far all of them together have come.

    Args:
        ctx: The context of the stage.
        given: What all trainings have in common.

    Attributes:
        total: Epochs of all trainings; with fake quantization one counts `QAT_COST`.
        begun: What each whole training began with.
    """

    def __init__(self, ctx: StageContext[FinetuneSettings], given: Given) -> None:
        self.ctx = ctx
        self.given = given
        self.done = 0.0
        self.total = 0.0
        self.begun: dict[str, Begun] = {}

    def short(self, arm: Arm, i: int, rung: int, folder: Path) -> Result:
        """Train a network for a while, without a fold of the images; the score is that of the fold and the rest.

        Args:
            arm: Whose network it is.
            i: Which of them.
            rung: Number of the rung.
            folder: Where what is told of it is written.
        """
        entrant = arm.entrants[i]
        recipe = replace(arm.recipe, epochs=arm.rungs[rung].epochs, seed=entrant.seed + RUNG_SEED * (rung + 1))
        name = f"rung {rung + 1}, {entrant.name}"
        work = self._work(name)
        if (work / ShortTraining.FILE).exists():
            told = ShortTraining.read(work)
            self.done += recipe.epochs
        else:
            data = dataset.data_yaml(
                self.ctx.inputs["data-prep"], self.ctx.partial, validate_on="search", held_out=(rung % FOLDS, FOLDS)
            )
            network, begun = self.start(arm, entrant)
            trained = self.carry_out(name, self.headed(network), recipe, data=data)
            told = ShortTraining(
                index=i,
                architecture=entrant.architecture,
                start=begun.start,
                begun_with=begun.told,
                recipe=TrainingRecipe(**asdict(recipe)),
                score=average(trained.curves, recipe.window),
                seconds=round(trained.seconds, 1),
                curves=tuple(trained.curves),
            )
            told.write(work)
            (work / CHECKPOINT).unlink(missing_ok=True)  # all that is asked of it is known
        write_json(folder / "rungs" / str(rung + 1) / f"{i}.json", told.plain())
        return Result(told.score, told.seconds)

    def start(self, arm: Arm, entrant: Entrant) -> tuple[DetectionModel, Begun]:
        """A network at the start of a training, the same in every rung; and what it begins with."""
        return self.given.starts.network(entrant.architecture, entrant.seed, candidate=arm.kind == "candidates")

    def headed(self, network: DetectionModel) -> DetectionModel:
        """A network with the head that was asked for."""
        if self.given.options.nms_free:
            add_one_to_one(network)
        return network

    def shared(self, name: str, network: DetectionModel, recipe: Recipe, *, teacher: None = None) -> Trained:
        """Train stock in floating point, or find it trained; nothing teaches it."""
        weights = self.ctx.settings.supernet.weights
        begun = self.begun[name].start
        settings = StockTraining(
            dataset=dataset.load(self.ctx.inputs["data-prep"]).digest,
            architecture=self.given.supernet.space.stock.digest,
            start=begun,
            sha256=weights.sha256 if weights and begun == "weights" else None,
            recipe=recipe,
            nms_free=self.given.options.nms_free,
        )

        def make(part: StageContext[StockTraining]) -> None:
            trained = self.carry_out(name, network, recipe, partial=part.partial)
            save_checkpoint(trained.network, part.out / "best.pt", names=self.given.names, imgsz=self.given.imgsz)
            StockTrainingResult(epoch=trained.epoch, curves=tuple(trained.curves)).write(part.out)

        found = self.ctx.partial / f".{self._work(name).name}"
        found.mkdir(exist_ok=True)
        done = self.done + recipe.epochs
        replace(self.ctx, out=found).share(STOCK, VERSION, settings, make)
        self.done = done
        training = StockTrainingResult.read(found)
        network.load_state_dict(load_network(found / "best.pt").state_dict())
        return Trained(network.eval(), training.epoch, [dict(row) for row in training.curves])

    def carry_out(
        self,
        name: str,
        network: DetectionModel,
        recipe: Recipe,
        *,
        data: Path | None = None,
        teacher: DetectionModel | None = None,
        partial: Path | None = None,
    ) -> Trained:
        """Train a network, with its checkpoints in the stage's `partial` or another one."""

        weight = QAT_COST if is_qat(network) else 1

        def report(epochs: float, best: float) -> None:
            figures = {"map50_95": best} if best >= 0 else {}
            message = f"{name}: epoch {min(int(epochs) + 1, recipe.epochs)} of {recipe.epochs}"
            self.ctx.progress.update(self.done + weight * epochs, self.total, message, **figures)

        work = self._work(name, partial)
        data = data or self.given.data
        trained = finetune.train(
            network, data, recipe, work=work, teacher=teacher, report=report, device=self.given.device
        )
        self.done += weight * recipe.epochs
        return trained

    def _work(self, name: str, partial: Path | None = None) -> Path:
        """The folder of a training."""
        return (partial or self.ctx.partial) / "trainings" / name.replace(", ", "-").replace(" ", "-").lower()
