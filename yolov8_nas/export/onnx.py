"""ONNX files: floating point, and INT8 with explicit Q/DQ.

The exporter is called directly instead of through Ultralytics': the search exports hundreds of networks, a file's bytes
must depend on nothing but the network, and what is timed during the search must be what ships. So there is one graph
for everything: BatchNorm folded, no simplification beyond the exporter's own (ONNX Runtime and TensorRT optimise graphs
themselves). Shapes are static unless asked otherwise, as what is measured must be. Its metadata are those that stock
`YOLO("model.onnx")` reads.

Precision lies in the graph, because TensorRT 11 takes it from nowhere else. In FP16 everything up to the head's output
convolutions is FP16, weights and arithmetic. Images and outputs stay FP32, so that whoever feeds the file need not
know, and so does the arithmetic that makes boxes: in pixels, FP16 has steps of half a pixel from 512 on.
"""

from __future__ import annotations

import ast
import io
import warnings
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules import C2f, Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import is_qat

from yolov8_nas.errors import InputError
from yolov8_nas.export.nms_in_graph import NmsOptions, add_nms
from yolov8_nas.export.onnx_file import read_graph
from yolov8_nas.files import atomic_write
from yolov8_nas.train.quantization import fold, load_network, quantize

OPSET: Final = 18
"""The newest opset for which ONNX Runtime has kernels of every operator used here on every provider."""


def export_onnx(
    model: DetectionModel,
    path: Path,
    *,
    imgsz: int,
    batch: int = 1,
    names: Sequence[str] | None = None,
    dynamic: bool = False,
    half: bool = False,
) -> Path:
    """Write a network as ONNX: input `images` (batch, 3, imgsz, imgsz) in 0..1, output `output0`.

    The output is (batch, 4 + classes, anchors): boxes as centre and size in pixels, class probabilities. With an
    NMS-free head (`model.end2end`) it is (batch, detections, 6), the best first: corners in pixels, score, class; 300
    detections, or as many as there are anchors. The network itself is left as it is, and the same network gives the
    same bytes. Fake quantization becomes Q/DQ nodes.

    Args:
        model: An Ultralytics detection network.
        path: File to write; missing parents are made.
        imgsz: Side of the square input in pixels.
        batch: Images per inference.
        names: Class names; the network's own unless given.
        dynamic: Whether the file takes any number of images and any height and width that are multiples of 32;
            `imgsz` and `batch` are then only what it names as its own, and there are 300 detections in any case, some
            of score zero where an image has too few. Otherwise the shape is fixed.
        half: Whether it computes in FP16.

    Raises:
        InputError: `half` is asked of a network with fake quantization.
    """
    if half and is_qat(model):
        raise InputError(f"{path.name}: the network is quantized to INT8, and half asks for FP16; choose one of them")
    network = _inference_copy(model, dynamic)
    head: Detect = network.model[-1]
    graph = _traced(_Half(network) if half else network, head, (batch, 3, imgsz, imgsz), dynamic)
    if is_qat(network):
        _store_integers(graph.graph)
    classes = dict(enumerate(names)) if names is not None else dict(network.names)
    args = {"batch": batch, "dynamic": dynamic, "nms": False if head.end2end else None}
    args |= {"quantize": 16} if half else {}
    for key, value in {
        "description": "YOLOv8-style detector",
        "license": "AGPL-3.0",
        "task": "detect",
        "head": "Detect",
        "stride": int(network.stride.max()),
        "batch": batch,
        "imgsz": [imgsz, imgsz],
        "names": classes,
        "channels": 3,
        "end2end": bool(head.end2end),
        "args": args,
    }.items():
        graph.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, graph.SerializeToString(deterministic=True))
    return path


def _traced(network: nn.Module, head: Detect, shape: tuple[int, ...], dynamic: bool) -> onnx.ModelProto:
    """The graph of a network with this head, for images of a shape; that of a dynamic one only begins with it."""
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch"}}
    if not head.end2end:
        axes["output0"][2] = "anchors"
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is called deprecated and warns of each constant it folds. It is three times faster
        # than the other one, and the only one that ModelOpt's fake quantization goes through.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(shape),),
            buffer,  # type: ignore[arg-type]  # taken as well, though not in the annotation
            opset_version=OPSET,
            input_names=["images"],
            output_names=["output0"],
            dynamic_axes=axes if dynamic else None,
            dynamo=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    if dynamic:  # the exporter calls the other sizes unknown as well
        sizes = graph.graph.output[0].type.tensor_type.shape.dim
        for axis, size in {1: head.max_det, 2: 6}.items() if head.end2end else {1: 4 + head.nc}.items():
            sizes[axis].dim_value = size
    return graph


def put_nms(file: Path, options: NmsOptions) -> Path:
    """Put non-maximum suppression into a file of `export_onnx`, whose output is then (batch, boxes, 6).

    Args:
        file: The file, of a network with YOLOv8's head; it is changed.
        options: What is kept, see `nms_in_graph.add_nms`.
    """
    graph = add_nms(read_graph(file), options)
    (args,) = (entry for entry in graph.metadata_props if entry.key == "args")
    args.value = str({**ast.literal_eval(args.value), "nms": True})
    atomic_write(file, graph.SerializeToString(deterministic=True))
    return file


def export_int8(checkpoint: Path, path: Path, *, imgsz: int, batch: int = 1) -> Path:
    """Write the network of a QAT checkpoint as ONNX with explicit Q/DQ, see `export_onnx`."""
    return export_onnx(load_network(checkpoint), path, imgsz=imgsz, batch=batch)


def export_int8_ptq(
    model: DetectionModel,
    path: Path,
    *,
    imgsz: int,
    batch: int = 1,
    calibration: Sequence[Tensor],
    keep_float: Sequence[str] = (),
) -> Path:
    """Write a network as INT8 without training: the graph is the one that ships, its weights have not adapted.

    Args:
        model: A network without fake quantization; it is left as it is.
        path: File to write.
        imgsz: Side of the square input in pixels.
        batch: Images per inference.
        calibration: Batches BCHW, RGB in 0..1, from which the ranges come.
        keep_float: Parts that stay in floating point, see `quantize`.
    """
    return export_onnx(quantize(deepcopy(model), calibration, keep_float), path, imgsz=imgsz, batch=batch)


class _Half(nn.Module):
    """A network that computes in FP16 from the images on and in FP32 from the head's outputs on.

    Args:
        network: As `_inference_copy` gives it; it is changed.
    """

    def __init__(self, network: DetectionModel) -> None:
        super().__init__()
        self.network = network.half()
        self.detect: Detect = network.model[-1]
        self.detect.dfl.float()
        self.detect._inference = self._inference

    def forward(self, images_BCHW: Tensor) -> Tensor:
        outputs: Tensor = self.network(images_BCHW.half())
        return outputs

    def _inference(self, outputs: dict[str, Any]) -> Tensor:
        """Boxes and scores from the outputs of the head's convolutions, in FP32."""
        single = {name: outputs[name].float() for name in ("boxes", "scores")}
        # The feature maps only tell shape and type.
        maps = [features.float() for features in outputs["feats"]]
        inferred: Tensor = Detect._inference(self.detect, {**single, "feats": maps})
        return inferred


def _inference_copy(model: DetectionModel, dynamic: bool) -> DetectionModel:
    """A copy in the form that runs on a device: FP32 on the CPU, BatchNorm folded, the head in export mode."""
    network = fold(deepcopy(model).cpu().float().eval().requires_grad_(False))
    for module in network.modules():
        if isinstance(module, Detect):
            module.export, module.format, module.dynamic, module.shape = True, "onnx", dynamic, None
            if dynamic and module.end2end:
                module.postprocess = partial(_padded_detections, module)
        elif isinstance(module, C2f):
            module.forward = module.forward_split  # `chunk` becomes an awkward graph; `split` computes the same
    return network


def _padded_detections(head: Detect, y_BAC: Tensor) -> Tensor:
    """Detections of an NMS-free head; of score zero where there are too few anchors, since TopK takes a fixed number.

    Args:
        head: The head.
        y_BAC: Boxes and class probabilities of each anchor.
    """
    padded: Tensor = Detect.postprocess(head, F.pad(y_BAC, (0, 0, 0, head.max_det)))
    return padded


def _store_integers(graph: onnx.GraphProto) -> None:
    """Make a graph with fake quantization one that holds integers and runs on them; what it computes stays the same.

    Weights are stored quantized, a quarter of the size. Activations become unsigned, with 128 for zero: ONNX Runtime
    has integer convolutions of unsigned activations only on x86, and runs signed ones in floating point.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    half = numpy_helper.from_array(np.array(128, np.uint8), "activation_zero")
    graph.initializer.append(half)
    weights: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            weights[node.output[0]] = node
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not {node.input[0], node.output[0]} & set(
            weights
        ):
            assert not numpy_helper.to_array(constants[node.input[2]]).any(), "symmetric quantization has zero at zero"
            node.input[2] = half.name
    for name, node in weights.items():
        weight, scale = (numpy_helper.to_array(constants[i]) for i in node.input[:2])
        shape = (-1, *[1] * (weight.ndim - 1))
        integers = np.clip(np.rint(weight / scale.reshape(shape)), -128, 127).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(integers, name))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in used]:
        graph.node.remove(node)
