"""register: the verified detector of one target becomes a version in the model registry."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.register import settings


def _run(ctx: StageContext[settings.RegisterSettings]) -> None:
    from yolov8_nas.stages.register.run import run

    run(ctx)


STAGE = Stage("register", 3, settings.settings, _run, settings.RegisterSettings, always_run=True)
