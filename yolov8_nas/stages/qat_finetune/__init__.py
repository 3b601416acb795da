"""qat-finetune: real trainings choose among the candidates, and train the chosen ones and stock to the end."""

from __future__ import annotations

from yolov8_nas.runner.stage import Stage, StageContext
from yolov8_nas.stages.qat_finetune import settings


def _run(ctx: StageContext[settings.FinetuneSettings]) -> None:
    from yolov8_nas.stages.qat_finetune.run import run

    run(ctx)


STAGE = Stage("qat-finetune", settings.VERSION, settings.settings, _run, watched=True)
