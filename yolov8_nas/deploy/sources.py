"""The checkpoints that files are exported from: of all tuned networks, in every precision that may ship."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from yolov8_nas.errors import StageError
from yolov8_nas.export import artifact
from yolov8_nas.export.verification import verify_onnx
from yolov8_nas.measure.runtime import Runtime
from yolov8_nas.runner.results import FinetuneResult, Rival, TunedCandidate
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.train.quantization import load_network, require_recipe

STOCK: Final = "stock"
"""Name of the files of stock."""

CHECKPOINTS: Final = {"fp32": "best.pt", "fp16": "best.pt", "int8": "qat.pt"}
"""The checkpoint of each precision."""


@dataclass(frozen=True)
class Source:
    """One tuned network in one precision.

    Attributes:
        stem: What its files are called, without their precision.
        precision: `fp32`, `fp16` or `int8`.
        folder: Where its checkpoints lie.
        row: What qat-finetune tells of it.
    """

    stem: str
    precision: str
    folder: Path
    row: TunedCandidate | Rival

    @property
    def name(self) -> str:
        """Name of its files, without their suffix."""
        return f"{self.stem}-{self.precision}"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that its file is exported from."""
        return self.folder / CHECKPOINTS[self.precision]


class Form(StageSettings):
    """The form of all files of an export.

    Attributes:
        imgsz: Side of the square network input in pixels.
        batch: Images per inference.
        nms_free: Whether networks have the head that needs no non-maximum suppression.
        keep_float: Parts that stay in floating point where networks are quantized.
    """

    imgsz: int
    batch: int
    nms_free: bool
    keep_float: tuple[str, ...]


def sources(tuned: Path, precisions: Iterable[str]) -> list[Source]:
    """Everything that is exported: candidates, stock and rescaled stock, in the precisions that they were tuned for.

    Args:
        tuned: The result of qat-finetune.
        precisions: Those that may ship.
    """
    summary = FinetuneResult.read(tuned)
    rows: list[tuple[str, Path, TunedCandidate | Rival]] = [
        (f"candidate-{row.index}", tuned / "candidates" / str(row.index), row) for row in summary.candidates
    ]
    for stem, folder, rival in ((STOCK, "baseline", summary.baseline), ("rescaled", "rescaled", summary.rescaled)):
        if rival:
            rows.append((stem, tuned / folder, rival))
    wanted = tuple(precisions)
    found = [Source(stem, precision, folder, row) for stem, folder, row in rows for precision in wanted]
    return [source for source in found if source.checkpoint.exists()]


def write(source: Source, onnx: Path, runtime: Runtime, form: Form) -> None:
    """Export one network to ONNX, and see that the file computes what the network does.

    Args:
        source: The network.
        onnx: The file to write.
        runtime: What will run it, or what is built of it.
        form: Its form.

    Raises:
        StageError: The checkpoint is of another head or recipe, or the file computes something else.
    """
    network = load_network(source.checkpoint)
    if network.end2end != form.nms_free:
        raise StageError(
            f"{source.checkpoint}: its head is {'' if network.end2end else 'not '}NMS-free, and finetune.nms_free "
            f"is {form.nms_free}; train it again with this configuration"
        )
    if source.precision == "int8":
        require_recipe(network, form.keep_float, source.checkpoint)
    artifact.write_onnx(network, onnx, runtime=runtime, imgsz=form.imgsz, batch=form.batch)
    if source.precision != "int8":
        verify_onnx(network, onnx, imgsz=form.imgsz, batch=form.batch, half=source.precision == "fp16")
