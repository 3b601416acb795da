"""INT8 files for GPUs: the same integers, in the form that TensorRT takes, and FP16 in the place of FP32.

`export_int8` writes files for ONNX Runtime on a CPU: activations unsigned with 128 for zero, floating-point layers in
FP32. TensorRT reads signed integers around zero only, and runs what lies between the quantized layers twice as fast in
FP16; a strongly typed engine takes types as they stand in the file. What is computed in integers stays the same, bit by
bit.

As with `export_onnx(half=True)`, images, outputs and the arithmetic that makes boxes stay in FP32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.onnx_file import read_graph
from yolov8_nas.files import atomic_write

OPSET: Final = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take FP16."""

_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear")

_SMALLEST: Final = float(np.finfo(np.float16).smallest_normal)


def int8_for_gpu(source: Path, path: Path, *, half: bool = True) -> Path:
    """Write an INT8 file for TensorRT.

    With FP16 scales become FP16 too. One below FP16's normal numbers, which belongs to weights or activations that are
    all but zero, is raised to the smallest of them, and weights are rounded anew.

    Compare what it writes with ONNX Runtime's optimizations switched off: with them, ONNX Runtime on a CPU computes
    FP16 Q/DQ graphs far less exactly (seen with 1.31).

    Args:
        source: A file of `export_int8` or `export_int8_ptq`.
        path: File to write.
        half: Whether floating-point layers become FP16; else they stay FP32 and the result is the same in every bit.

    Raises:
        InputError: The file has no Q/DQ nodes.
        StageError: A weight or a scale is beyond what FP16 can hold.
    """
    model = onnx.shape_inference.infer_shapes(read_graph(source), strict_mode=True)
    graph = model.graph
    if not any(node.op_type == "QuantizeLinear" for node in graph.node):
        raise InputError(f"{source}: it is not quantized; export it with half=True for FP16")
    known = (*graph.value_info, *graph.input)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    del graph.value_info[:]
    _constants_to_initializers(graph)
    _signed(graph)
    if half:
        _raise_scales(graph)
        _halve(graph, floats, source)
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = max(entry.version, OPSET)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, model.SerializeToString(deterministic=True))
    return path


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes to initializers, so that there is one kind of constant."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        (attribute,) = node.attribute
        value = numpy_helper.to_array(helper.get_attribute_value(attribute))
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        graph.node.remove(node)


def _signed(graph: onnx.GraphProto) -> None:
    """Make unsigned activations with 128 for zero signed ones with 0: from 0..255 to -128..127, the same 256 steps."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _QUANTIZERS:
            zero = constants[node.input[2]]
            if zero.data_type == TensorProto.UINT8:
                values = numpy_helper.to_array(zero).astype(np.int16) - 128
                zero.CopyFrom(numpy_helper.from_array(values.astype(np.int8), zero.name))


def _raise_scales(graph: onnx.GraphProto) -> None:
    """Raise scales below FP16's normal numbers, and round the weights that they belong to anew.

    A scale of activations so small belongs to a tensor that is all but zero. In FP16 it would become zero itself, which
    TensorRT refuses; raised, what it rounds is wrong by at most half of it.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    raised: dict[str, NDArray[Any]] = {}
    for node in graph.node:
        if node.op_type not in _QUANTIZERS:
            continue
        scale = constants[node.input[1]]
        if scale.name not in raised:
            before = numpy_helper.to_array(scale)
            after = np.maximum(before, np.float32(_SMALLEST))
            raised[scale.name] = before / after
            scale.CopyFrom(numpy_helper.from_array(after, scale.name))
        if weight := constants.get(node.input[0]):
            integers = numpy_helper.to_array(weight)
            ratio = raised[scale.name].reshape(-1, *[1] * (integers.ndim - 1))
            weight.CopyFrom(numpy_helper.from_array(np.rint(integers * ratio).astype(np.int8), weight.name))


def _halve(graph: onnx.GraphProto, floats: set[str], source: Path) -> None:
    """Make everything up to the head's output convolutions FP16.

    Args:
        graph: The graph.
        floats: Its tensors of FP32 that are no constants.
        source: The file, for messages.
    """
    inside = _up_to_the_head(graph)
    made_inside = {name for node in inside for name in node.output if name in floats}
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    halves: dict[str, str] = {}
    casts: list[onnx.NodeProto] = []
    for node in inside:
        if node.op_type == "Cast" and node.output[0] in made_inside:
            node.attribute[0].i = TensorProto.FLOAT16
        for index, name in enumerate(node.input):
            if node.op_type == "Resize" and index > 0:
                continue  # its scales are FP32 in every opset
            if name in constants:
                if name not in halves:
                    halves[name] = f"{name}/fp16"
                    values = _to_half(numpy_helper.to_array(constants[name]), name, source)
                    graph.initializer.append(numpy_helper.from_array(values, halves[name]))
                node.input[index] = halves[name]
            elif name in floats and name not in made_inside:
                if name not in halves:
                    halves[name] = f"{name}/fp16"
                    casts.append(_cast(name, halves[name], TensorProto.FLOAT16))
                node.input[index] = halves[name]
    ours = {id(node) for node in inside}
    wide: dict[str, str] = {}
    for node in graph.node:
        if id(node) in ours:
            continue
        for index, name in enumerate(node.input):
            if name in made_inside:
                wide[name] = f"{name}/fp32"
                node.input[index] = wide[name]
    nodes = list(casts)
    for node in graph.node:
        nodes.append(node)
        nodes += [_cast(name, wide[name], TensorProto.FLOAT) for name in node.output if name in wide]
    _replace(graph.node, nodes)
    used = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def _up_to_the_head(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that lead to the head's output convolutions, and these.

    They are the convolutions after which no other comes but DFL's, which is a weighted mean in the form of one.
    """
    followed: set[str] = set()  # tensors from which a convolution is reached
    ends: set[str] = set()  # tensors that lead to an output convolution, or come from it
    inside = []
    for node in reversed(graph.node):
        convolution = node.op_type == "Conv" and "/dfl/" not in node.name
        onward = any(name in followed for name in node.output)
        if (convolution and not onward) or any(name in ends for name in node.output):
            inside.append(node)
            ends.update(node.input)
        if convolution or onward:
            followed.update(node.input)
    return inside[::-1]


def _to_half(values: NDArray[Any], name: str, source: Path) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise StageError(
            f"{source}: {name!r} goes up to {np.abs(values).max():.3g}, beyond FP16; ship FP32 or INT8 as is"
        )
    return half


def _cast(name: str, to: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [to], name=f"{to}/Cast", to=kind)


def _replace(field: Any, values: list[Any]) -> None:
    """Put values in the place of a repeated field's."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)
