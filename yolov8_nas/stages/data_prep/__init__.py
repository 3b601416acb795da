"""data-prep: a dataset as people have it becomes a checked one in train, search and val splits."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.data_prep import settings


def _run(context: StageContext[settings.DataSettings]) -> None:
    from yolov8_nas.stages.data_prep.run import run

    run(context)


STAGE = Stage("data-prep", 2, settings.settings, _run)
