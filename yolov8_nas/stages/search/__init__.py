"""search: networks that keep the limits on one device, each exported and measured there."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.search import settings


def _run(ctx: StageContext[settings.SearchSettings]) -> None:
    from yolov8_nas.stages.search.run import run

    run(ctx)


STAGE = Stage("search", 9, settings.settings, _run)
