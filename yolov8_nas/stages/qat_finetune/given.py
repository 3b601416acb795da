"""What all trainings of the stage have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from yolov8_nas.data import dataset
from yolov8_nas.device.profile import computing_threads
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.stages.qat_finetune.settings import FinetuneSettings
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.train.finetune import Recipe
from yolov8_nas.train.halving import Rung
from yolov8_nas.train.starting import Starts

CALIBRATION_IMAGES: Final = 256
"""Training images from which BatchNorm statistics and INT8 ranges come."""


@dataclass(frozen=True)
class Entrant:
    """A network that is trained.

    Attributes:
        name: Of its trainings.
        architecture: What it is.
        seed: Of its whole training; those of short ones follow from it.
    """

    name: str
    architecture: Architecture
    seed: int


@dataclass(frozen=True)
class Arm:
    """Networks that are trained alike, and among which one is chosen.

    Attributes:
        kind: Whose they are.
        entrants: The networks.
        rungs: Of their halving; the last one is whole trainings.
        recipe: Of whole trainings, but for the seed.
    """

    kind: Literal["candidates", "baseline", "rescaled"]
    entrants: tuple[Entrant, ...]
    rungs: tuple[Rung, ...]
    recipe: Recipe


class Given:
    """The supernet, the data and the start of the trainings.

    Args:
        ctx: The context of the stage.

    Attributes:
        names: Class names.
        data: Ultralytics data yaml, with the search split as `val`.
        calibration: Batches BCHW of training images, for fits, BatchNorm statistics and INT8 ranges.
        starts: Networks at the start of their trainings.
        images: Images of the train split.
    """

    def __init__(self, ctx: StageContext[FinetuneSettings]) -> None:
        self.options = ctx.settings.finetune
        self.imgsz = ctx.settings.imgsz
        self.seed = ctx.settings.seed
        torch.set_num_threads(computing_threads())  # what importing Ultralytics left is one, or depends on the order
        self.device = "0" if torch.cuda.is_available() else "cpu"
        self.supernet = Supernet.load(ctx.inputs["supernet-train"])
        self.names = list(self.supernet.names)
        self.data = dataset.data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
        self.calibration = calibration_batches(self.data, self.imgsz, CALIBRATION_IMAGES, self.options.batch, self.seed)
        weights = ctx.settings.supernet.weights
        self.starts = Starts(
            ctx.settings.start,
            self.supernet,
            Path(weights.path) if weights else None,
            self.calibration,
            ctx.partial / "starts",
        )
        self.images = dataset.load(ctx.inputs["data-prep"]).images["train"]

    def recipe(self, epochs: int, lr: float, *, mosaic: bool = True) -> Recipe:
        """How networks are trained for so many epochs, at such a peak learning rate."""
        return Recipe(epochs, self.options.batch, lr, self.imgsz, self.seed, mosaic, self.options.train.given)

    def macs(self, architecture: Architecture) -> float:
        """Multiply-accumulates of a network for one image."""
        return cost(architecture, len(self.names), self.imgsz).macs
