"""Detectors from anywhere: what their files tell, and the files that a runtime opens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_input_shape_fixed
from ultralytics.nn.tasks import yaml_model_load

from yolov8_nas.checkpoint.network import Loaded, load
from yolov8_nas.errors import InputError
from yolov8_nas.export import packaging
from yolov8_nas.export.artifact import build_engine, write_network
from yolov8_nas.export.onnx_file import are_names, are_sides, check_one_file, plain_value
from yolov8_nas.measure.runtime import RUNTIMES, Runtime
from yolov8_nas.names import shown

_ROW: Final = re.compile(r"(?:^|[/.@])model\.(\d+)(?=[./]|$)")
_STOCK: Final = re.compile(r"Ultralytics (YOLO\S+) model")
_TOLD: Final = 4
"""Rows of a detector's output before the classes: the sides of a box."""


@dataclass(frozen=True)
class Detector:
    """What the file of a detector tells.

    Attributes:
        file: The file.
        imgsz: Side of the square input in pixels.
        batch: Images per run that the file is fixed to; nothing where it leaves them open.
        classes: Number of classes.
        precision: `fp32`, `fp16` or `int8` where that lies in the file; a checkpoint in floating point has none.
        nms_free: Whether its output needs no non-maximum suppression.
        two_heads: Whether a checkpoint has an NMS-free head as well, which Ultralytics leaves out unless asked for it.
        head: Row of the head; nothing where that is not known.
        backbone: Rows of the backbone; nothing where that is not known.
    """

    file: Path
    imgsz: int
    batch: int | None
    classes: int
    precision: str | None
    nms_free: bool
    two_heads: bool
    head: int | None
    backbone: int | None

    def section(self, row: int | None) -> str:
        """The part of the network that a row belongs to, one of `figures.SECTIONS`."""
        if row is None or self.head is None:
            return "no row"
        if row >= self.head:
            return "head"
        if self.backbone is None:
            return "backbone and neck"
        return "backbone" if row < self.backbone else "neck"


def row_of(name: str) -> int | None:
    """The yaml row that a layer's name (`/model.22/cv2.0/conv/Conv`, `model.22.cv2`) tells, if any."""
    found = _ROW.search(name)
    return int(found[1]) if found else None


def read(file: Path, imgsz: int | None = None, rows_of: Path | None = None) -> Detector:
    """Read the file of a detector.

    Args:
        file: An Ultralytics checkpoint, or an ONNX file of one.
        imgsz: Side of the square input in pixels; the file's own unless given.
        rows_of: A checkpoint of the same network, which tells the backbone from the neck where an ONNX file does not.

    Raises:
        InputError: The file is missing or damaged, is no detector, or is fixed to another size.
    """
    if imgsz is not None and (imgsz < 32 or imgsz % 32):
        raise InputError(f"--imgsz {imgsz}: give the side of a square in pixels, a multiple of 32")
    if file.suffix == ".pt":
        return _read_checkpoint(file, imgsz)
    if file.suffix != ".onnx":
        raise InputError(f"{file}: give an Ultralytics checkpoint (.pt) or an ONNX file (.onnx) of a detector")
    return _read_onnx(file, imgsz, _read_checkpoint(rows_of, None) if rows_of else None)


def _read_checkpoint(file: Path, imgsz: int | None) -> Detector:
    found: Loaded = load(file, quantized=False)
    network: Any = found.network
    head = network.model[-1]
    rows = network.yaml.get("backbone")
    return Detector(
        file=file,
        imgsz=packaging.side_of(found.imgsz, file, imgsz),
        batch=None,
        classes=head.nc,
        precision="int8" if found.quantized else None,
        nms_free=bool(head.end2end),
        two_heads=not head.end2end and getattr(head, "one2one_cv2", None) is not None,
        head=len(network.model) - 1,
        backbone=len(rows) if rows else None,
    )


def _read_onnx(file: Path, imgsz: int | None, checkpoint: Detector | None) -> Detector:
    graph = load_onnx(file)
    told = {entry.key: entry.value for entry in graph.metadata_props}
    inputs, outputs = _inputs(graph), list(graph.graph.output)
    shape = _shape(inputs[0]) if len(inputs) == 1 else []
    output = _shape(outputs[0]) if len(outputs) == 1 else []
    if told.get("task", "detect") != "detect" or len(shape) != 4 or shape[1] != 3 or len(output) != 3:
        what = f"task {told['task']}" if "task" in told else f"inputs {shape}, outputs {output}"
        raise InputError(f"{file}: not a YOLO detector with one image tensor in and one of boxes out ({what})")
    height, width = shape[2:]
    if isinstance(height, int) and (height != width or imgsz not in (None, height)):
        asked = f"--imgsz {imgsz}" if imgsz else "square images are measured"
        raise InputError(f"{file}: fixed to {width} x {height} pixels ({asked}); export it anew from the .pt")
    own = plain_value(told["imgsz"]) if "imgsz" in told else (640, 640)
    if not are_sides(own):
        raise InputError(f"{file}: its metadata have imgsz = {shown(told['imgsz'][:80])}; export it anew from the .pt")
    side = height if isinstance(height, int) else imgsz or max(own)
    nms_free = output[2] == 6
    rows = {row for node in graph.graph.node if (row := row_of(node.name)) is not None}
    last = max(rows, default=None)
    return Detector(
        file=file,
        imgsz=int(side),
        batch=shape[0] if isinstance(shape[0], int) else None,
        classes=_classes(told, output, nms_free, file),
        precision=_precision(graph),
        nms_free=nms_free,
        two_heads=False,
        head=last,
        backbone=_backbone(told, last, checkpoint),
    )


def load_onnx(file: Path) -> onnx.ModelProto:
    """An ONNX file with the shapes of all tensors that follow from its inputs.

    Raises:
        InputError: It is missing or damaged.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the path of a detector (.pt or .onnx)")
    try:
        graph = onnx.load(file, load_external_data=False)
        check_one_file(file, graph)
        onnx.checker.check_model(graph)
        return onnx.shape_inference.infer_shapes(graph)
    except InputError:
        raise
    except Exception as error:  # of protobuf, onnx and the system; a damaged file can cause any
        why = str(error).strip().splitlines()
        raise InputError(
            f"{file}: not an ONNX file that can be read ({why[0] if why else type(error).__name__}); export it anew"
        ) from None


def _inputs(graph: onnx.ModelProto) -> list[Any]:
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [value for value in graph.graph.input if value.name not in weights]


def _shape(value: Any) -> list[Any]:
    """Sizes of a tensor; a name or nothing where one is open."""
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    ]


def _classes(told: dict[str, str], output: list[Any], nms_free: bool, file: Path) -> int:
    if "names" in told:
        classes = plain_value(told["names"])
        if not are_names(classes):
            raise InputError(f"{file}: its metadata have names = {shown(told['names'][:80])}; export it anew")
        return len(classes)
    if nms_free or not isinstance(output[1], int):
        raise InputError(f"{file}: its metadata name no classes; export it with Ultralytics or yolov8-nas export")
    return int(output[1]) - _TOLD


def _precision(graph: onnx.ModelProto) -> str:
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        return "int8"
    half = sum(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    return "fp16" if 2 * half > len(graph.graph.initializer) else "fp32"


def _backbone(told: dict[str, str], last: int | None, checkpoint: Detector | None) -> int | None:
    """Rows of the backbone: of the checkpoint, or of the stock network that the metadata name."""
    if checkpoint:
        if checkpoint.head != last:
            raise InputError(
                f"--rows-of {checkpoint.file}: another network: it has {(checkpoint.head or 0) + 1} rows, "
                f"and the ONNX file {'none' if last is None else last + 1}"
            )
        return checkpoint.backbone
    stock = _STOCK.search(told.get("description", ""))
    if not stock:
        return None
    try:
        described = yaml_model_load(f"{stock[1].lower()}.yaml")
    except FileNotFoundError:  # the name of somebody's own file
        return None
    rows = len(described["backbone"]) + len(described["head"])
    return len(described["backbone"]) if last is not None and rows == last + 1 else None


def files(detector: Detector, runtime: Runtime, batches: Sequence[int], folder: Path) -> dict[int, Path]:
    """The files that a runtime opens, one for each number of images.

    INT8 is made of a checkpoint in floating point with ranges of random images: right for times, wrong for boxes.

    Args:
        detector: The detector.
        runtime: What will run it.
        batches: Images per run.
        folder: Where files are written.

    Raises:
        InputError: The runtime does not run such files, or not in this precision.
        StageError: TensorRT cannot build an engine.
    """
    _check(detector, runtime)
    if detector.file.suffix == ".pt":
        return {batch: _from_checkpoint(detector, runtime, batch, folder) for batch in batches}
    found = {}
    for batch in batches:
        file = detector.file if detector.batch else _fixed(detector, batch, folder)
        found[batch] = (
            file if runtime.suffix == ".onnx" else build_engine(file, folder / f"batch{batch}.engine", runtime)
        )
    return found


def _check(detector: Detector, runtime: Runtime) -> None:
    if detector.file.suffix == ".onnx" and runtime.suffix == ".pt":
        others = " or ".join(name for name, known in RUNTIMES.items() if known.suffix != ".pt")
        raise InputError(f"{detector.file}: runtime {runtime.name!r} runs checkpoints (.pt); use {others}")
    if detector.precision and detector.precision != runtime.precision:
        raise InputError(
            f"{detector.file}: computes in {detector.precision}, and {runtime.precision} is asked for; "
            f"use --precision {detector.precision}, or give a checkpoint (.pt) in floating point"
        )


def _from_checkpoint(detector: Detector, runtime: Runtime, batch: int, folder: Path) -> Path:
    if detector.precision == "int8":
        if runtime.suffix != ".onnx" or runtime.kind != "cpu":
            raise InputError(f"{detector.file}: quantized; it is analysed with runtime onnxruntime on a CPU only")
        return packaging.export(detector.file, folder / f"batch{batch}.onnx", imgsz=detector.imgsz, batch=batch)
    file = folder / f"batch{batch}{runtime.suffix}"
    network = load(detector.file, quantized=False).network
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(4, 3, detector.imgsz, detector.imgsz, generator=generator)]
    calibration = images if runtime.precision == "int8" else []
    return write_network(network, file, runtime=runtime, imgsz=detector.imgsz, batch=batch, calibration=calibration)


def _fixed(detector: Detector, batch: int, folder: Path) -> Path:
    """A copy of an ONNX file with its open sizes fixed."""
    graph = load_onnx(detector.file)
    make_input_shape_fixed(graph.graph, _inputs(graph)[0].name, [batch, 3, detector.imgsz, detector.imgsz])
    fix_output_shapes(graph)
    file = folder / f"batch{batch}.onnx"
    onnx.save(graph, file)
    return file


def pictures(width: int, height: int, count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Pictures of random pixels (height, width, 3), as a camera of that size would give them."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
