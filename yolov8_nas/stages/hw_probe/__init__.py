"""hw-probe: what the target device is, how fast networks run on it, and what the limits mean there."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.hw_probe import settings


def _run(ctx: StageContext[settings.ProbeSettings]) -> None:
    from yolov8_nas.stages.hw_probe.run import run

    run(ctx)


STAGE = Stage("hw-probe", 7, settings.settings, _run, settings.ProbeSettings)
