"""The exported files: written, verified, measured and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolov8_nas.deploy.job import Job
from yolov8_nas.deploy.sources import sources, write
from yolov8_nas.evaluation import Evaluation
from yolov8_nas.export import artifact
from yolov8_nas.files import copy_file
from yolov8_nas.measure.benchmark import Measurement, Timing
from yolov8_nas.runner.results import Rival, TunedCandidate
from yolov8_nas.space import Architecture


@dataclass(frozen=True)
class Exported:
    """One exported file, of a candidate or of a stock network.

    Attributes:
        precision: `fp32` or `int8`.
        folder: Where its checkpoints lie.
        onnx: The file.
        runs: What the target's runtime opens: the file, or the checkpoint that it was exported from.
        row: What qat-finetune tells of the network.
    """

    precision: str
    folder: Path
    onnx: Path
    runs: Path
    row: TunedCandidate | Rival

    @property
    def name(self) -> str:
        """Name of the file, without its suffix."""
        return self.onnx.stem

    @property
    def candidate(self) -> int | None:
        """Index of the candidate; nothing of stock."""
        return self.row.index if isinstance(self.row, TunedCandidate) else None

    @property
    def architecture(self) -> Architecture:
        """The network's architecture."""
        return self.row.architecture


@dataclass(frozen=True)
class Timed(Exported):
    """One exported file and what the device tells of it.

    Attributes:
        measurement: Of the network alone.
        frame: Of the network and non-maximum suppression, on real images; nothing of a device elsewhere.
        found: Boxes above the threshold and detections, the mean of these images.
    """

    measurement: Measurement
    frame: Timing | None
    found: dict[str, float]


@dataclass(frozen=True)
class Scored(Timed):
    """One exported file, measured and scored.

    Attributes:
        search: Its score on the search split.
        val: Its score on the val split.
    """

    search: Evaluation
    val: Evaluation


def export_files(job: Job) -> list[Exported]:
    """Export every tuned network in every precision that may ship, or take over what was built before the device.

    Raises:
        StageError: A checkpoint is of another head or recipe, or its file computes something else.
    """
    found = sources(job.tuned, job.runtimes)
    if job.build_ahead:
        job.build_ahead(found)
    files = []
    for source in found:
        runtime = job.runtimes[source.precision]
        onnx = job.work / f"{source.name}.onnx"
        runs = onnx.with_suffix(runtime.suffix)
        if not job.build_ahead:
            write(source, onnx, runtime, job.form)
            if runtime.suffix == ".pt":
                copy_file(source.checkpoint, runs)
            elif runs != onnx:
                artifact.build_engine(onnx, runs, runtime)
        files.append(Exported(source.precision, source.folder, onnx, runs, source.row))
    return files


def score(job: Job, timed: Sequence[Timed]) -> list[Scored]:
    """Score files on the search split and on the val split."""
    search, val = job.evaluator("search"), job.evaluator("val")
    files = []
    for one in timed:
        scored = Scored(
            **vars(one),
            search=job.evaluate(search, f"{one.runs.stem}-search", one.runs),
            val=job.evaluate(val, f"{one.runs.stem}-val", one.runs),
        )
        scored.val.save(job.out / "evaluation" / f"{scored.name}.npz")
        files.append(scored)
        job.step(f"scored {scored.name}", map50_95=scored.val.map50_95)
    return files
