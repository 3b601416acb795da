"""trt-export: the file that ships, exported, verified, timed and scored on the target."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.trt_export import settings


def _run(ctx: StageContext[settings.ExportSettings]) -> None:
    from yolov8_nas.stages.trt_export.run import run

    run(ctx)


STAGE = Stage("trt-export", 11, settings.settings, _run)
