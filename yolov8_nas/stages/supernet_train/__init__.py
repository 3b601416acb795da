"""supernet-train: one set of weights for every network of the space."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.supernet_train import settings


def _run(ctx: StageContext[settings.SupernetSettings]) -> None:
    from yolov8_nas.stages.supernet_train.run import run

    run(ctx)


STAGE = Stage("supernet-train", 4, settings.settings, _run, watched=True)
