"""trt-export: the file that ships, exported, verified, timed and scored on the target."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.trt_export import settings


def _run(ctx: StageContext[settings.ExportSettings]) -> None:
    from yolov8_nas.stages.trt_export.run import run

    run(ctx)


def _build_ahead(ctx: StageContext[settings.ExportSettings]) -> None:
    from yolov8_nas.stages.trt_export.ahead import run

    run(ctx)


STAGE = Stage("trt-export", 13, settings.settings, _run)

AHEAD = Stage("build-ahead", 1, settings.settings, _build_ahead, always_run=True)
"""What of the export needs no device, for a CPU node: engines of TensorRT for RTX, left in the store. Not one of the
seven stages: nothing waits for its result, and where it is not made the export does it."""
