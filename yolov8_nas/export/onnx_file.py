"""What an exported ONNX file says of itself: metadata, shapes, precision."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto, numpy_helper

from yolov8_nas import names
from yolov8_nas.errors import InputError


def read_graph(source: Path) -> onnx.ModelProto:
    """The graph in an ONNX file of ours; ONNX' own reader would fetch what the graph keeps in files beside.

    Raises:
        InputError: It keeps tensors in other files.
        OSError: It cannot be read.
    """
    model = onnx.load_from_string(source.read_bytes())
    check_one_file(source, model)
    return model


def read_onnx(source: Path) -> tuple[bytes, onnx.ModelProto]:
    """The bytes of an ONNX file, and the graph in them.

    Raises:
        InputError: The file cannot be read, or is not valid.
    """
    try:
        data = source.read_bytes()
        model = onnx.load_from_string(data)
        check_one_file(source, model)
        onnx.checker.check_model(model)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); give the path of an ONNX file") from None
    except Exception as error:  # protobuf's DecodeError and the checker's ValidationError have no common base
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: no valid ONNX file: {reason}; export it again") from None
    return data, model


def check_one_file(source: Path, model: onnx.ModelProto) -> None:
    """Refuse a graph that keeps tensors in other files, which could be any file that this process may read.

    No file that this package writes does so, and only the one file is hashed, signed and shipped.

    Raises:
        InputError: A tensor lies elsewhere.
    """
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            raise InputError(
                f"{source}: it keeps tensor {names.shown(tensor.name)} in another file "
                f"({', '.join(map(names.shown, places)) or 'unnamed'}), which is not read; export it as one file"
            )


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model holds, wherever in it."""
    graphs = [model.graph, *(g for info in model.training_info for g in (info.initialization, info.algorithm))]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            sparse = list(graph.sparse_initializer)
            nodes += graph.node
        else:
            sparse = []
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
                graphs += [attribute.g, *attribute.graphs]
        for one in sparse:
            yield from (one.values, one.indices)


_LONGEST_VALUE: Final = 2**20
"""Letters of a value in the metadata: the names of 10,000 classes take a fifth of it."""


def plain_value(text: str) -> Any:
    """A value of the metadata, which Ultralytics writes by Python's `repr`; the text itself where it is none.

    A text that nests or has a list as a key fails in Python's parser in other ways than one that is no literal.
    """
    if len(text) > _LONGEST_VALUE:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def are_names(value: object) -> bool:
    """Whether a value names classes by their numbers; names that people write as numbers are numbers here."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            type(number) is int and number >= 0 and isinstance(name, str | int | float)
            for number, name in value.items()
        )
    )


def are_sides(value: object) -> bool:
    """Whether a value is the size of images: height and width."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


_FORMS: Final[Mapping[str, Callable[[object], bool]]] = {
    "task": lambda value: isinstance(value, str),
    "stride": lambda value: type(value) is int and value > 0,
    "names": are_names,
    "imgsz": are_sides,
    "args": lambda value: isinstance(value, dict),
}


def read_metadata(source: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """Ultralytics' metadata of an ONNX file, as plain values.

    Raises:
        InputError: Task, stride or class names are not among them, or a value is not of its form.
    """
    metadata = {entry.key: plain_value(entry.value) for entry in model.metadata_props}
    for key, fits in _FORMS.items():
        if key in metadata and not fits(metadata[key]):
            told = names.shown(str(metadata[key])[:80])
            raise InputError(f"{source}: its metadata have {key} = {told}; export it with export_onnx")
    if lacking := [key for key in ("task", "stride", "names") if key not in metadata]:
        raise InputError(f"{source}: its metadata have no {', '.join(lacking)}; export it with export_onnx")
    return metadata


def dimensions(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes of a tensor, -1 where they are open."""
    return [size.dim_value if size.HasField("dim_value") else -1 for size in value.type.tensor_type.shape.dim]


def precision(model: onnx.ModelProto) -> str:
    """The lowest precision in a graph: `fp32`, `fp16` or `int8`."""
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return "int8"
    halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "fp16" if halves else "fp32"


def check_zero_points(source: Path, model: onnx.ModelProto) -> None:
    """Refuse zero points that TensorRT does not have: it takes signed integers around zero.

    Raises:
        InputError: The graph has others.
    """
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    for tensor in model.graph.initializer:
        if tensor.name in zeros and (tensor.data_type == TensorProto.UINT8 or numpy_helper.to_array(tensor).any()):
            raise InputError(
                f"{source}: {tensor.name!r}: activations are quantized for ONNX Runtime on a CPU, and TensorRT takes "
                "signed integers around zero only; convert it with int8_for_gpu"
            )
