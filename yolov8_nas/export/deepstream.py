"""A detector's output in the form that a parser of DeepStream's own reads.

Of the parsers that come with DeepStream (`libnvds_infercustomparser.so`) none takes YOLOv8's (batch, 4 + classes,
anchors). `NvDsInferParseCustomTfSSD` comes closest: it takes three outputs of 32-bit floats by their names, each with a
row per box, keeps what is above the threshold of its class, and leaves the suppression of overlapping boxes to nvinfer
(NVIDIA/DeepStream 9.1, src/utils/nvdsinfer_customparser/nvdsinfer_custombboxparser.cpp). A few standard operators make
these outputs, so no library has to be built. They do so of an NMS-free head's detections, too.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PARSER: Final = "NvDsInferParseCustomTfSSD"
LIBRARY: Final = "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser.so"

BOXES, SCORES, CLASSES = "detection_boxes", "detection_scores", "detection_classes"
"""What the parser calls its inputs."""

OLDEST_OPSET: Final = 13
"""From which on `Split` and `Squeeze` take what they take here."""


_Node: TypeAlias = tuple[str, list[str], list[str], dict[str, Any]]
"""Operator, inputs, outputs and attributes."""

_TURNED: Final[tuple[_Node, ...]] = (
    ("Gather", ["ds/corners", "ds/yxyx"], ["ds/turned"], {"axis": 2}),
    ("Mul", ["ds/turned", "ds/shares"], [BOXES], {}),
    ("Squeeze", ["ds/score", "ds/last"], [SCORES], {}),
    ("Squeeze", ["ds/class", "ds/last"], ["ds/index"], {}),
    ("Cast", ["ds/index"], [CLASSES], {"to": TensorProto.FLOAT}),
)
"""From corners, scores and classes to what the parser takes."""


def _corners(output: str, *, nms_free: bool) -> list[_Node]:
    """From a detector's output to corners in pixels, scores and classes."""
    if nms_free:
        return [("Split", [output, "ds/sizes"], ["ds/corners", "ds/score", "ds/class"], {"axis": 2})]
    return [
        ("Transpose", [output], ["ds/rows"], {"perm": [0, 2, 1]}),
        ("Split", ["ds/rows", "ds/sizes"], ["ds/centre", "ds/size", "ds/probabilities"], {"axis": 2}),
        ("Mul", ["ds/size", "ds/half"], ["ds/reach"], {}),
        ("Sub", ["ds/centre", "ds/reach"], ["ds/low"], {}),
        ("Add", ["ds/centre", "ds/reach"], ["ds/high"], {}),
        ("Concat", ["ds/low", "ds/high"], ["ds/corners"], {"axis": 2}),
        ("TopK", ["ds/probabilities", "ds/one"], ["ds/score", "ds/class"], {"axis": 2}),
    ]


def parsed_by_deepstream(
    model: onnx.ModelProto, height: int, width: int, *, classes: int, nms_free: bool = False
) -> onnx.ModelProto:
    """Turn a detector's output into what `PARSER` takes.

    Boxes are computed element by element: a product with a matrix would be one operator, and TensorRT would compute it
    with the ten bits of TF32.

    Args:
        model: A network of FP32 images whose one output is (batch, 4 + classes, anchors), boxes as centre and size in
            pixels, or with an NMS-free head (batch, anchors, 6); of opset 13 or later. It is left as it is.
        height: Height of the images in pixels, to which the network is bound then.
        width: Width of the images in pixels.
        classes: Number of classes.
        nms_free: Whether the head is NMS-free.

    Returns:
        A network with the outputs `BOXES` (batch, anchors, 4): top, left, bottom and right as shares of the image's
        sides; `SCORES` (batch, anchors): the highest of the classes; `CLASSES` (batch, anchors): which one that is, as
        a float.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    (images,), (output,) = graph.input, graph.output
    sides = images.type.tensor_type.shape.dim[2:]
    sides[0].dim_value, sides[1].dim_value = height, width
    batch, *others = (size.dim_param or size.dim_value for size in output.type.tensor_type.shape.dim)
    anchors = others[0 if nms_free else 1]
    constants = {
        "ds/sizes": np.array([4, 1, 1] if nms_free else [2, 2, classes]),
        "ds/half": np.array(0.5, np.float32),
        "ds/yxyx": np.array([1, 0, 3, 2]),
        "ds/shares": np.array([1 / height, 1 / width] * 2, np.float32),
        "ds/one": np.array([1]),
        "ds/last": np.array([2]),
    }
    nodes = [*_corners(output.name, nms_free=nms_free), *_TURNED]
    used = {name for _, inputs, _, _ in nodes for name in inputs}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items() if name in used)
    graph.node.extend(
        helper.make_node(operator, taken, given, name=f"/ds/{given[0]}", **attributes)
        for operator, taken, given, attributes in nodes
    )
    shapes = {BOXES: [batch, anchors, 4], SCORES: [batch, anchors], CLASSES: [batch, anchors]}
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    onnx.checker.check_model(changed)
    return changed
