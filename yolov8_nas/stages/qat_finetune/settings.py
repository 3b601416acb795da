"""What the trainings of candidates and stock depend on."""

from __future__ import annotations

from typing import Final

from yolov8_nas.config import FinetuneConfig, RunConfig, Start, TargetConfig
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.stages.supernet_train.settings import Weights, start_weights

VERSION: Final = 8
"""Version of the stage, and of the trainings that it shares."""

QAT_COST: Final = 3
"""What an epoch with fake quantization counts in progress; one without counts 1."""


class SupernetStart(StageSettings):
    """What trainings take from the supernet's own.

    Attributes:
        epochs: Its epochs.
        lr: Its peak learning rate.
        weights: What it started from; nothing for from scratch.
    """

    epochs: int
    lr: float
    weights: Weights | None


class FinetuneSettings(StageSettings):
    """Settings of the trainings.

    Attributes:
        finetune: How candidates and stock are trained.
        start: What the trainings begin with.
        supernet: What they take from the supernet's training.
        int8: Whether networks are trained for INT8 as well.
        keep_float: Parts that stay in floating point then.
        imgsz: Side of the square network input in pixels.
        seed: Seed of everything random.
    """

    finetune: FinetuneConfig
    start: Start
    supernet: SupernetStart
    int8: bool
    keep_float: tuple[str, ...]
    imgsz: int
    seed: int


def settings(config: RunConfig, target: TargetConfig | None) -> FinetuneSettings:
    """The settings of the trainings of a run and a target.

    Raises:
        InputError: There are no such weights to start from.
    """
    assert target is not None
    int8, supernet = target.precision in ("int8", "best"), config.supernet
    return FinetuneSettings(
        finetune=config.finetune.model_copy(update={"start": config.start}),
        start=config.start,
        supernet=SupernetStart(epochs=supernet.epochs, lr=supernet.lr, weights=start_weights(supernet)),
        int8=int8,
        keep_float=config.quantization.floats(int8=int8),
        imgsz=config.imgsz,
        seed=config.seed,
    )
