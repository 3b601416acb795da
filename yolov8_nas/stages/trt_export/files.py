"""The exported files: written, verified, measured and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import Evaluation
from yolov8_nas.export import artifact
from yolov8_nas.export.verification import verify_onnx
from yolov8_nas.files import copy_file
from yolov8_nas.measure.benchmark import Measurement, Timing
from yolov8_nas.runner.results import Rival, TunedCandidate
from yolov8_nas.space import Architecture
from yolov8_nas.stages.trt_export.job import Job
from yolov8_nas.train.quantization import load_network, require_recipe

STOCK: Final = "stock"
"""Name of the files of stock."""

CHECKPOINTS: Final = {"fp32": "best.pt", "fp16": "best.pt", "int8": "qat.pt"}
"""What a file of each precision is exported from."""


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
        """What the network is."""
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
    """Export every tuned network in every precision that may ship.

    Raises:
        StageError: A checkpoint is of another head or recipe, or its file computes something else.
    """
    tuned = job.summary
    rows: list[tuple[str, Path, TunedCandidate | Rival]] = [
        (f"candidate-{row.index}", job.tuned / "candidates" / str(row.index), row) for row in tuned.candidates
    ]
    for stem, folder, rival in ((STOCK, "baseline", tuned.baseline), ("rescaled", "rescaled", tuned.rescaled)):
        if rival:
            rows.append((stem, job.tuned / folder, rival))
    files = []
    for stem, place, row in rows:
        for precision, runtime in job.runtimes.items():
            checkpoint = place / CHECKPOINTS[precision]
            if not checkpoint.exists():
                continue
            network = load_network(checkpoint)
            if network.end2end != job.nms_free:
                raise StageError(
                    f"{checkpoint}: its head is {'' if network.end2end else 'not '}NMS-free, and finetune.nms_free "
                    f"is {job.nms_free}; train it again with this configuration"
                )
            if precision == "int8":
                require_recipe(network, job.keep_float, checkpoint)
            onnx = job.ctx.partial / f"{stem}-{precision}.onnx"
            artifact.write_onnx(network, onnx, runtime=runtime, imgsz=job.imgsz, batch=job.batch)
            if precision != "int8":
                verify_onnx(network, onnx, imgsz=job.imgsz, batch=job.batch, half=precision == "fp16")
            runs = onnx.with_suffix(runtime.suffix)
            if runtime.suffix == ".pt":
                copy_file(checkpoint, runs)
            elif runs != onnx:
                artifact.build_engine(onnx, runs, runtime)
            files.append(Exported(precision, place, onnx, runs, row))
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
        scored.val.save(job.ctx.out / "evaluation" / f"{scored.name}.npz")
        files.append(scored)
        job.step(f"scored {scored.name}", map50_95=scored.val.map50_95)
    return files
