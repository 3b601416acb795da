"""Single trainings of the stage, short ones and whole ones; targets and runs share them, whatever their limits are."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import is_qat

from yolov8_nas.config import Start
from yolov8_nas.data import dataset
from yolov8_nas.files import file_sha256, write_json
from yolov8_nas.runner.results import ShortTraining, TrainingRecipe, WholeTraining
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture
from yolov8_nas.stages.qat_finetune.given import Arm, Entrant, Given
from yolov8_nas.stages.qat_finetune.settings import QAT_COST, VERSION, FinetuneSettings
from yolov8_nas.supernet.derive import add_one_to_one, save_checkpoint
from yolov8_nas.train import finetune
from yolov8_nas.train.finetune import CHECKPOINT, Recipe, Trained, average
from yolov8_nas.train.halving import Result
from yolov8_nas.train.quantization import load_network, save_qat_checkpoint
from yolov8_nas.train.starting import Begun

STOCK: Final = "stock-trainings"
"""Folder of the store with the trainings of stock that targets and runs share."""

NETWORKS: Final = "trainings"
"""The same with the trainings of candidates and of rescaled stock."""

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


class SharedTraining(StockTraining):
    """What a shared training of another network depends on; `sha256` may be that of the supernet.

    Attributes:
        seed: Seed of the run, by which the images are chosen that a network is fitted to.
        held_out: Fold that it does not see, and how many there are; nothing for whole trainings.
        taught_by: Digest of what teaches it; nothing where nothing does.
        keep_float: Parts in floating point, of a training for INT8 that begins with its teacher; nothing of others.
    """

    seed: int
    held_out: tuple[int, int] | None = None
    taught_by: str | None = None
    keep_float: tuple[str, ...] | None = None


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
        entrant, fold = arm.entrants[i], (rung % FOLDS, FOLDS)
        recipe = replace(arm.recipe, epochs=arm.rungs[rung].epochs, seed=entrant.seed + RUNG_SEED * (rung + 1))
        name = f"rung {rung + 1}, {entrant.name}"

        def make(part: StageContext[SharedTraining]) -> None:
            data = dataset.data_yaml(
                self.ctx.inputs["data-prep"], self.ctx.partial, validate_on="search", held_out=fold
            )
            network, begun = self.start(arm, entrant)
            trained = self.carry_out(name, self.headed(network), recipe, data=data, partial=part.partial)
            ShortTraining(
                index=i,
                architecture=entrant.architecture,
                start=begun.start,
                begun_with=begun.told,
                recipe=TrainingRecipe(**asdict(recipe)),
                score=average(trained.curves, recipe.window),
                seconds=round(trained.seconds, 1),
                curves=tuple(trained.curves),
            ).write(part.out)

        work, done = self._work(name), self.done + recipe.epochs
        if not (work / ShortTraining.FILE).exists():
            start = self.given.starts.kind(entrant.architecture, candidate=arm.kind == "candidates")
            settings = self._settings(entrant.architecture, start, recipe, held_out=fold)
            work.mkdir(parents=True, exist_ok=True)
            replace(self.ctx, out=work).share(NETWORKS, VERSION, settings, make)
            (work / CHECKPOINT).unlink(missing_ok=True)  # all that is asked of it is known
        self.done = done
        told = ShortTraining.read(work).model_copy(update={"index": i})
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

    def shared(
        self, arm: Arm, entrant: Entrant, network: DetectionModel, recipe: Recipe, teacher: DetectionModel | None = None
    ) -> Trained:
        """Train a network to the end in floating point, or find it trained.

        Args:
            arm: Whose network it is.
            entrant: Which of them.
            network: It at the start of its training.
            recipe: How it is trained.
            teacher: What teaches it; nothing teaches stock.
        """
        start = self.begun[entrant.name].start
        taught_by = _digest(teacher) if teacher else None
        settings = self._settings(entrant.architecture, start, recipe, taught_by=taught_by)
        if arm.kind == "baseline":
            of_stock = StockTraining(**{name: getattr(settings, name) for name in StockTraining.model_fields})
            found, trained = self._found(STOCK, of_stock, entrant.name, "best.pt", network, teacher)
        else:
            found, trained = self._found(NETWORKS, settings, entrant.name, "best.pt", network, teacher)
        network.load_state_dict(load_network(found / "best.pt").state_dict())
        return replace(trained, network=network.eval())

    def for_int8(self, entrant: Entrant, observed: DetectionModel, recipe: Recipe, teacher: DetectionModel) -> Trained:
        """Train a network with fake quantization, or find it trained.

        Args:
            entrant: Whose network it is.
            observed: The network, calibrated.
            recipe: How it is trained.
            teacher: The same network in floating point.
        """
        settings = self._settings(entrant.architecture, "scratch", recipe, taught_by=_digest(teacher)).model_copy(
            update={"keep_float": self.ctx.settings.keep_float}
        )
        found, trained = self._found(NETWORKS, settings, f"{entrant.name}, INT8", "qat.pt", observed, teacher)
        return replace(trained, network=load_network(found / "qat.pt"))

    def _settings(
        self,
        architecture: Architecture,
        start: Start,
        recipe: Recipe,
        *,
        held_out: tuple[int, int] | None = None,
        taught_by: str | None = None,
    ) -> SharedTraining:
        """All that a training of a network depends on."""
        weights, sha256 = self.ctx.settings.supernet.weights, None
        if start == "supernet":
            sha256 = self._supernet_sha256
        elif start == "weights" and weights:
            sha256 = weights.sha256
        return SharedTraining(
            dataset=dataset.load(self.ctx.inputs["data-prep"]).digest,
            architecture=architecture.digest,
            start=start,
            sha256=sha256,
            recipe=recipe,
            nms_free=self.given.options.nms_free,
            seed=self.given.seed,
            held_out=held_out,
            taught_by=taught_by,
        )

    @cached_property
    def _supernet_sha256(self) -> str:
        return file_sha256(self.ctx.inputs["supernet-train"] / "supernet.safetensors")

    def _found(
        self,
        part: str,
        settings: StockTraining,
        name: str,
        file: str,
        network: DetectionModel,
        teacher: DetectionModel | None,
    ) -> tuple[Path, Trained]:
        """The folder with the checkpoint of a whole training, of this run or of an earlier one, and what is told."""
        save = save_qat_checkpoint if is_qat(network) else save_checkpoint
        recipe, weight = settings.recipe, QAT_COST if is_qat(network) else 1

        def make(own: StageContext[StockTraining]) -> None:
            trained = self.carry_out(name, network, recipe, teacher=teacher, partial=own.partial)
            save(trained.network, own.out / file, names=self.given.names, imgsz=self.given.imgsz)
            WholeTraining(epoch=trained.epoch, curves=tuple(trained.curves)).write(own.out)

        found = self.ctx.partial / f".{self._work(name).name}"
        found.mkdir(exist_ok=True)
        done = self.done + weight * recipe.epochs
        replace(self.ctx, out=found).share(part, VERSION, settings, make)
        self.done = done
        training = WholeTraining.read(found)
        return found, Trained(network, training.epoch, [dict(row) for row in training.curves])

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


def _digest(network: DetectionModel) -> str:
    """Digest of a network's weights and statistics."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
