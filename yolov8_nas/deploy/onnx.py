"""ONNX files: floating point, and INT8 with explicit Q/DQ.

The exporter is called directly instead of through Ultralytics': the search exports hundreds of networks, a file's bytes
must depend on nothing but the network, and what is timed during the search must be what ships. So there is one graph
for everything: BatchNorm folded, static shape, no simplification beyond the exporter's own (ONNX Runtime and TensorRT
optimise graphs themselves). Its metadata are those that stock `YOLO("model.onnx")` reads.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Final

import onnx
import torch
from ultralytics.nn.modules import C2f, Detect
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.store import atomic_write

OPSET: Final = 18
"""The newest opset for which ONNX Runtime has kernels of every operator used here on every provider."""


def export_onnx(
    model: DetectionModel, path: Path, *, imgsz: int, batch: int = 1, names: Sequence[str] | None = None
) -> Path:
    """Write a network as ONNX: input `images` (batch, 3, imgsz, imgsz) in 0..1, output `output0`.

    The output is (batch, 4 + classes, anchors): boxes as centre and size in pixels, class probabilities. The network
    itself is left as it is, and the same network gives the same bytes. With fake quantization in it (a QAT
    checkpoint), the graph carries Q/DQ nodes.

    Args:
        model: An Ultralytics detection network.
        path: File to write; missing parents are made.
        imgsz: Side of the square input in pixels.
        batch: Images per inference; the shape is static.
        names: Class names; the network's own unless given.
    """
    network = _inference_copy(model)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is called deprecated and warns of each constant it folds. It is three times faster
        # than the other one, and the only one that ModelOpt's fake quantization goes through.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(batch, 3, imgsz, imgsz),),
            buffer,  # type: ignore[arg-type]  # taken as well, though not in the annotation
            opset_version=OPSET,
            input_names=["images"],
            output_names=["output0"],
            dynamo=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    classes = dict(enumerate(names)) if names is not None else dict(network.names)
    metadata = {
        "description": "YOLOv8-style detector",
        "license": "AGPL-3.0",
        "task": "detect",
        "head": "Detect",
        "stride": int(network.stride.max()),
        "batch": batch,
        "imgsz": [imgsz, imgsz],
        "names": classes,
        "channels": 3,
        "end2end": False,
        "args": {"batch": batch, "dynamic": False, "nms": None},
    }
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=str(value))
    onnx.checker.check_model(graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, graph.SerializeToString(deterministic=True))
    return path


def _inference_copy(model: DetectionModel) -> DetectionModel:
    """A copy in the form that runs on a device: FP32 on the CPU, BatchNorm folded, the head in export mode."""
    network = deepcopy(model).cpu().float().eval().requires_grad_(False).fuse(verbose=False)
    for module in network.modules():
        if isinstance(module, Detect):
            module.export, module.format, module.dynamic, module.shape = True, "onnx", False, None
        elif isinstance(module, C2f):
            module.forward = module.forward_split  # `chunk` becomes an awkward graph; `split` computes the same
    return network
