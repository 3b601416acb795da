"""trt-export: the file that ships, exported, verified, timed and scored on the target.

Every tuned network is exported in every precision that may ship. What the target's runtime opens is measured and
scored: the ONNX files, or with PyTorch the checkpoints, of which the ONNX files are then portable copies. All are
measured in the same alternating rounds, with the stock network among them: alone, and together with non-maximum
suppression on images of the search split. Which one ships is decided by what all trainings of its network let expect
(`finetune.json`), and what its file gains or loses on the search split; the figures told are of the val split, which
has chosen nothing.
"""

from __future__ import annotations

from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.trt_export.files import export_files, score
from yolov8_nas.stages.trt_export.job import Job
from yolov8_nas.stages.trt_export.measuring import Measuring
from yolov8_nas.stages.trt_export.settings import ExportSettings
from yolov8_nas.stages.trt_export.verdict import Verdict


def run(ctx: StageContext[ExportSettings]) -> None:
    """Write `verdict.json`, `engine.json`, `evaluation/*.npz`, and `model/` where a file keeps the limits.

    Raises:
        StageError: None does; the verdict with the table of what was tried is written all the same.
    """
    job = Job(ctx)
    with ctx.host.computing():
        exported = export_files(job)
        job.total = 3 * len(exported) + 2
        job.step("exported")
        timed, nms = Measuring(job).run(exported)
        Verdict(job, score(job, timed), nms).decide()
