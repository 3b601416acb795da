"""Non-maximum suppression inside a file: by ONNX's own operators, or by the plugin that comes with TensorRT.

Either makes of boxes and scores the one output of (batch, boxes, 6) that Ultralytics' own exports with NMS have, so
that stock `YOLO("model.onnx")` and `YOLO("model.engine")` read it. As in Ultralytics' validation, and unlike in its
prediction, a box may be found as several classes.

What the plugin `EfficientNMS_TRT` takes and gives is told in its README (NVIDIA/TensorRT, plugin/efficientNMSPlugin):
boxes (batch, anchors, 4) and scores (batch, anchors, classes) in; the number of detections, boxes as corners, scores
and classes out, cleared where nothing was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx
import onnx.parser
from onnx import TensorProto, helper

DOMAIN: Final = "TRT"
"""The parser looks a plugin up by its name alone; with a domain of its own the file passes `onnx.checker`."""

_OUTPUT: Final = "output0"
_RAW: Final = "nms_raw"


@dataclass(frozen=True)
class NmsOptions:
    """What is kept.

    Attributes:
        score: Detections with a lower score are dropped. Below 0.007 the plugin takes a much slower way.
        iou: Of two boxes of a class that overlap by as much, the one with the lower score is dropped.
        boxes: Most detections per image.
    """

    score: float = 0.25
    iou: float = 0.7
    boxes: int = 300


def add_nms(model: onnx.ModelProto, options: NmsOptions) -> onnx.ModelProto:
    """Append suppression by ONNX's own operators to a detector.

    `NonMaxSuppression` gives as many detections as it finds. They are put back to where their scores came from, among
    zeros, and the best of each image are taken from there: so the output has one shape.

    Args:
        model: A network whose output `output0` is (batch, 4 + classes, anchors), boxes as centre and size; it is left
            as it is.
        options: What is kept.

    Returns:
        A network whose output `output0` is (batch, boxes, 6), the best first: corners in pixels, score, class; rows
        without a detection are zero.
    """
    changed, channels = _opened(model)
    # B: batch, C: classes, A: anchors, N: detections in all images, M: `boxes`.
    suppression = onnx.parser.parse_graph(f"""
        nms (float[B, {channels}, A] {_RAW}) => (float[B, M, 6] {_OUTPUT}) {{
            nms_sizes = Constant <value_ints = [4, {channels - 4}]> ()
            nms_boxes_B4A, nms_scores_BCA = Split <axis = 1> ({_RAW}, nms_sizes)
            nms_boxes_BA4 = Transpose <perm = [0, 2, 1]> (nms_boxes_B4A)
            nms_most = Constant <value_ints = [{options.boxes}]> ()
            nms_iou = Constant <value_floats = [{float(options.iou)}]> ()
            nms_least = Constant <value_floats = [{float(options.score)}]> ()
            nms_found_N3 = NonMaxSuppression <center_point_box = 1>
                (nms_boxes_BA4, nms_scores_BCA, nms_most, nms_iou, nms_least)

            nms_found_N = GatherND (nms_scores_BCA, nms_found_N3)
            nms_shape = Shape (nms_scores_BCA)
            nms_zeros_BCA = ConstantOfShape (nms_shape)
            nms_kept_BCA = ScatterND (nms_zeros_BCA, nms_found_N3, nms_found_N)
            nms_kept_BX = Flatten <axis = 1> (nms_kept_BCA)
            nms_padding = Constant <value_ints = [0, 0, 0, {options.boxes}]> ()
            nms_padded_BX = Pad (nms_kept_BX, nms_padding)
            nms_scores_BM, nms_places_BM = TopK <axis = 1> (nms_padded_BX, nms_most)

            nms_anchors = Shape <start = 2, end = 3> (nms_scores_BCA)
            nms_classes_BM = Div (nms_places_BM, nms_anchors)
            nms_anchors_BM = Mod (nms_places_BM, nms_anchors)
            nms_last = Constant <value_ints = [2]> ()
            nms_four = Constant <value_ints = [1, 1, 4]> ()
            nms_anchors_BM1 = Unsqueeze (nms_anchors_BM, nms_last)
            nms_anchors_BM4 = Expand (nms_anchors_BM1, nms_four)
            nms_boxes_BM4 = GatherElements <axis = 1> (nms_boxes_BA4, nms_anchors_BM4)
            nms_centre_BM2, nms_size_BM2 = Split <axis = 2, num_outputs = 2> (nms_boxes_BM4)
            nms_two = Constant <value_float = 2.0> ()
            nms_half_BM2 = Div (nms_size_BM2, nms_two)
            nms_low_BM2 = Sub (nms_centre_BM2, nms_half_BM2)
            nms_high_BM2 = Add (nms_centre_BM2, nms_half_BM2)
            nms_scores_BM1 = Unsqueeze (nms_scores_BM, nms_last)
            nms_classes_BM1 = Unsqueeze (nms_classes_BM, nms_last)
            nms_classes = Cast <to = {TensorProto.FLOAT}> (nms_classes_BM1)
            nms_rows_BM6 = Concat <axis = 2> (nms_low_BM2, nms_high_BM2, nms_scores_BM1, nms_classes)
            nms_signs_BM1 = Sign (nms_scores_BM1)
            {_OUTPUT} = Mul (nms_rows_BM6, nms_signs_BM1)
        }}
    """)
    changed.graph.node.extend(suppression.node)
    return _closed(changed, options)


def add_efficient_nms(model: onnx.ModelProto, options: NmsOptions) -> onnx.ModelProto:
    """Append the plugin to a detector.

    Args:
        model: A network whose output `output0` is (batch, 4 + classes, anchors), boxes as centre and size; it is left
            as it is.
        options: What is kept.

    Returns:
        A network whose output `output0` is (batch, boxes, 6): corners in pixels, score, class; rows without a
        detection are zero.
    """
    changed, channels = _opened(model)
    graph = changed.graph
    kind = graph.output[0].type.tensor_type.elem_type
    graph.initializer.append(helper.make_tensor("nms/sizes", TensorProto.INT64, [2], [4, channels - 4]))
    graph.initializer.append(helper.make_tensor("nms/last", TensorProto.INT64, [1], [2]))
    plugin = helper.make_node(
        "EfficientNMS_TRT",
        ["nms/boxes_in", "nms/scores_in"],
        ["nms/count", "nms/boxes", "nms/scores", "nms/classes"],
        name="/nms/EfficientNMS_TRT",
        domain=DOMAIN,
        plugin_version="1",
        score_threshold=float(options.score),
        iou_threshold=float(options.iou),
        max_output_boxes=options.boxes,
        background_class=-1,
        score_activation=0,
        class_agnostic=0,
        box_coding=1,
    )
    graph.node.extend(
        [
            helper.make_node("Transpose", [_RAW], ["nms/rows"], name="/nms/Transpose", perm=[0, 2, 1]),
            helper.make_node(
                "Split", ["nms/rows", "nms/sizes"], ["nms/boxes_in", "nms/scores_in"], name="/nms/Split", axis=2
            ),
            plugin,
            helper.make_node("Cast", ["nms/classes"], ["nms/classes_float"], name="/nms/Cast", to=kind),
            helper.make_node("Unsqueeze", ["nms/scores", "nms/last"], ["nms/score"], name="/nms/Unsqueeze"),
            helper.make_node("Unsqueeze", ["nms/classes_float", "nms/last"], ["nms/class"], name="/nms/Unsqueeze_1"),
            helper.make_node("Concat", ["nms/boxes", "nms/score", "nms/class"], [_OUTPUT], name="/nms/Concat", axis=2),
        ]
    )
    changed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return _closed(changed, options)


def _opened(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy in which what was the output is called `_RAW`, and how many channels that has."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    (output,) = changed.graph.output
    for node in changed.graph.node:
        for names in (node.input, node.output):
            names[:] = [_RAW if name == _OUTPUT else name for name in names]
    return changed, int(output.type.tensor_type.shape.dim[1].dim_value)


def _closed(changed: onnx.ModelProto, options: NmsOptions) -> onnx.ModelProto:
    """The copy with the shape of its new output, checked."""
    (output,) = changed.graph.output
    batch = output.type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value, options.boxes, 6]
    output.CopyFrom(helper.make_tensor_value_info(_OUTPUT, output.type.tensor_type.elem_type, shape))
    onnx.checker.check_model(changed)
    return changed
