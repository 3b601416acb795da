"""Exported detectors as servers have to know them: ONNX files and engines, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto

from yolov8_nas.errors import InputError
from yolov8_nas.export.onnx_file import dimensions, precision, read_metadata, read_onnx
from yolov8_nas.files import file_sha256
from yolov8_nas.measure.engine_file import RTX, EngineManifest, read_manifest, split_header

TYPES: Final = {TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16"}
"""Types that images and outputs may have, as Triton names them."""


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: Its name.
        type: `FP32` or `FP16`.
        shape: Its sizes, the batch among them; -1 where they are open.
    """

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Servable:
    """An exported detector.

    Attributes:
        file: The file that it was read from.
        data: The bytes that a server loads: an ONNX file, or an engine without Ultralytics' header.
        metadata: Ultralytics' metadata.
        names: Classes.
        images: The input.
        output: The output: (batch, 4 + classes, anchors), or (batch, boxes, 6) with non-maximum suppression inside or
            an NMS-free head.
        precision: `fp32`, `fp16` or `int8`.
        largest: Most images at once, where the batch is open and the file sets a limit.
        engine: What is known of an engine; nothing of an ONNX file.
        graph: The ONNX graph: of an engine, that of the file it was built from, if that is beside it.
    """

    file: Path
    data: bytes
    metadata: Mapping[str, Any]
    names: tuple[str, ...]
    images: Tensor
    output: Tensor
    precision: str
    largest: int | None
    engine: EngineManifest | None
    graph: onnx.ModelProto | None

    @property
    def batch(self) -> int | None:
        """Images at once; nothing where that is open."""
        batch = self.images.shape[0]
        return batch if batch > 0 else None

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the images in pixels; where they are open, those that the file was exported for."""
        height, width = self.images.shape[2:]
        if height > 0 and width > 0:
            return height, width
        height, width = self.metadata["imgsz"]
        return int(height), int(width)


def read_servable(file: Path) -> Servable:
    """Read an exported detector.

    Args:
        file: An ONNX file with Ultralytics' metadata, or an engine of ours with its manifest beside it.

    Raises:
        InputError: It is no such file, damaged, or no detector with YOLOv8's output.
    """
    if file.suffix == ".onnx":
        return _checked(_read_onnx(file))
    if file.suffix == ".engine":
        return _checked(_read_engine(file))
    raise InputError(
        f"{file}: give an .onnx or .engine file (yolov8-nas export makes one), or the work folder of a run"
    )


def nms_inside(metadata: Mapping[str, Any]) -> bool:
    """Whether Ultralytics' metadata say that non-maximum suppression is part of the file."""
    arguments = metadata.get("args")
    return isinstance(arguments, Mapping) and bool(arguments.get("nms"))


def nms_free(metadata: Mapping[str, Any]) -> bool:
    """Whether Ultralytics' metadata say that the head is NMS-free."""
    return bool(metadata.get("end2end"))


def _read_onnx(file: Path) -> Servable:
    data, graph = read_onnx(file)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.graph.initializer):
        raise InputError(f"{file}: its weights lie in another file; export it as one file")
    metadata = read_metadata(file, graph)
    values = (*graph.graph.input, *graph.graph.output)
    if len(graph.graph.input) != 1 or len(graph.graph.output) != 1:
        raise InputError(
            f"{file}: one input and one output are expected, it has {', '.join(value.name for value in values)}; "
            "export a detector"
        )
    tensors = []
    for value in values:
        kind = value.type.tensor_type.elem_type
        if kind not in TYPES:
            known = " or ".join(TYPES.values())
            raise InputError(
                f"{file}: {value.name!r} is {TensorProto.DataType.Name(kind)}, not {known}; export it again"
            )
        tensors.append(Tensor(value.name, TYPES[kind], tuple(dimensions(value))))
    return Servable(
        file=file,
        data=data,
        metadata=metadata,
        names=_names(file, metadata),
        images=tensors[0],
        output=tensors[1],
        precision=precision(graph),
        largest=None,
        engine=None,
        graph=graph,
    )


def _read_engine(file: Path) -> Servable:
    manifest = read_manifest(file)
    if manifest.built_on.compiler == RTX:
        raise InputError(
            f"{file}: an engine of {RTX}, which neither Triton nor DeepStream opens; give the file that it was built "
            f"from, {manifest.source}"
        )
    metadata, plan = split_header(file)
    ((name, shapes),) = manifest.inputs.items()
    ((output, shape),) = manifest.outputs.items()
    low, high = shapes["min"], shapes["max"]
    sizes = tuple(least if least == most else -1 for least, most in zip(low, high, strict=True))
    return Servable(
        file=file,
        data=plan,
        metadata=metadata,
        names=_names(file, metadata),
        # Whatever an engine computes in, its images and outputs are FP32, as those of the ONNX files are.
        images=Tensor(name, "FP32", sizes),
        output=Tensor(output, "FP32", tuple(shape)),
        precision=manifest.precision,
        largest=high[0],
        engine=manifest,
        graph=_built_from(file, manifest),
    )


def _built_from(engine: Path, manifest: EngineManifest) -> onnx.ModelProto | None:
    """The graph that an engine was built from, if its file is beside the engine, under whichever of the two names."""
    for source in (engine.with_suffix(".onnx"), engine.with_name(manifest.source)):
        if source.is_file() and file_sha256(source) == manifest.source_sha256:
            return read_onnx(source)[1]
    return None


def _names(file: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Classes in order; the header of an engine, being JSON, has their numbers as text."""
    names = metadata.get("names")
    if not isinstance(names, Mapping) or not names or not all(str(number).isdecimal() for number in names):
        raise InputError(f"{file}: its metadata name no classes (names = {names!r}); export it again")
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _checked(model: Servable) -> Servable:
    """Refuse what is no detector as the rest of this package exports it."""
    task = model.metadata.get("task")
    if task != "detect":
        raise InputError(f"{model.file}: its task is {task!r}; only detectors are packaged")
    images, output, rows = model.images.shape, model.output.shape, 4 + len(model.names)
    if len(images) != 4 or images[1] != 3:
        raise InputError(f"{model.file}: its input is {images}, and (batch, 3, height, width) is expected")
    final = nms_inside(model.metadata) or nms_free(model.metadata)
    if len(output) != 3 or not (output[2] == 6 if final else output[1] in (rows, -1)):
        raise InputError(
            f"{model.file}: its output is {output}, and (batch, {rows}, anchors) is expected for {len(model.names)} "
            "classes; export a YOLOv8 detector"
        )
    sides = model.metadata.get("imgsz")
    if -1 in images[2:] and not (isinstance(sides, list | tuple) and len(sides) == 2):
        raise InputError(f"{model.file}: takes images of any size, and its metadata name none (imgsz); export it again")
    return model
