"""Non-maximum suppression inside an engine, by the plugin `EfficientNMS_TRT` that comes with TensorRT.

What the plugin takes and gives is told in its README (NVIDIA/TensorRT, plugin/efficientNMSPlugin): boxes (batch,
anchors, 4) and scores (batch, anchors, classes) in; the number of detections, boxes as corners, scores and classes out,
cleared where nothing was found. Its four outputs are joined to the one of (batch, boxes, 6) that Ultralytics' own
exports with NMS have, so that stock `YOLO("model.engine")` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx
from onnx import TensorProto, helper

DOMAIN: Final = "TRT"
"""The parser looks a plugin up by its name alone; with a domain of its own the file passes `onnx.checker`."""

_OUTPUT: Final = "output0"


@dataclass(frozen=True)
class EfficientNms:
    """Options of the plugin.

    Attributes:
        score: Detections with a lower score are dropped. Below 0.007 the plugin takes a much slower way.
        iou: Of two boxes of a class that overlap by as much, the one with the lower score is dropped.
        boxes: Most detections per image.
    """

    score: float = 0.25
    iou: float = 0.7
    boxes: int = 300


def add_efficient_nms(model: onnx.ModelProto, options: EfficientNms) -> onnx.ModelProto:
    """Append the plugin to a detector.

    Args:
        model: A network whose output `output0` is (batch, 4 + classes, anchors), boxes as centre and size; it is left
            as it is.
        options: Options of the plugin.

    Returns:
        A network whose output `output0` is (batch, boxes, 6): corners in pixels, score, class; rows without a
        detection are zero.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    (output,) = graph.output
    kind = output.type.tensor_type.elem_type
    batch, channels, _ = output.type.tensor_type.shape.dim
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["nms/raw" if name == _OUTPUT else name for name in names]
    graph.initializer.append(helper.make_tensor("nms/sizes", TensorProto.INT64, [2], [4, channels.dim_value - 4]))
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
            helper.make_node("Transpose", ["nms/raw"], ["nms/rows"], name="/nms/Transpose", perm=[0, 2, 1]),
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
    first = batch.dim_param or batch.dim_value
    output.CopyFrom(helper.make_tensor_value_info(_OUTPUT, kind, [first, options.boxes, 6]))
    changed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(changed)
    return changed
