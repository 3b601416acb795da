"""Which file ships: every tuned network is exported, verified, measured and scored, and the first that holds ships.

Every network is exported in every precision that may ship. What the target's runtime opens is measured and scored: the
ONNX files, or with PyTorch the checkpoints, of which the ONNX files are then portable copies. All are measured in the
same alternating rounds, with the stock network among them: alone, and together with non-maximum suppression on images
of the search split. Which one ships is decided by what all trainings of its network let expect (`finetune.json`), and
what its file gains or loses on the search split; the figures told are of the val split, which has chosen nothing.

This is callable without a stage: all that is needed is a `Job`.
"""

from __future__ import annotations

from yolov8_nas.deploy.files import export_files, score
from yolov8_nas.deploy.job import Job
from yolov8_nas.deploy.measuring import Measuring
from yolov8_nas.deploy.pictures import write_pictures
from yolov8_nas.deploy.verdict import Decided, Verdict


def export(job: Job) -> Decided:
    """Export, measure and score, and decide which file ships: it lies in `model/` of `job.out` then.

    What each file finds in the images of the val split lies in `evaluation/`; `pictures/` has some of these images, and
    `pictures.json` what the file that ships and stock find there. What can be chosen
    in its place, since it keeps the limits too, lies in `choices/`.

    Raises:
        StageError: A checkpoint is of another head or recipe, or its file computes something else.
        WaitingError: The files have to be measured on a device elsewhere first.
    """
    with job.host.computing():
        exported = export_files(job)
        job.total = 3 * len(exported) + 2
        job.step("exported")
        timed, nms = Measuring(job).run(exported)
        decided = Verdict(job, score(job, timed), nms).decide()
        if decided.beside:
            write_pictures(job, *decided.beside)
        return decided
