"""Every kind of ONNX file that the project exports, of networks with fresh weights, for a compiler to read."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.export.gpu_int8 import int8_for_gpu
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.space import Architecture, Head, SearchSpace
from yolov8_nas.supernet.derive import add_one_to_one, build
from yolov8_nas.train.quantization import quantize

SIDE = 64
"""Pixels: smallest that all levels have cells at, so that a build takes a second."""

SPACES = ("tiny", *(f"yolov8{scale}{kind}" for scale in "nsml" for kind in ("", "-mixed")))


@dataclass(frozen=True)
class Kind:
    """What is exported.

    Attributes:
        space: The space whose smallest widths and depths the network has.
        shift: Which of its operators a block has: the first block the one of this number, the next one the next, ...
        precision: `fp32`, `fp16` or `int8` (for GPUs).
        classes: Number of classes.
        batch: Images.
        dynamic: Whether shapes are open.
        nms_free: Whether the head is NMS-free.
        keep_float: Parts that stay in floating point in INT8.
    """

    space: str = "tiny"
    shift: int = 0
    precision: str = "fp32"
    classes: int = 3
    batch: int = 1
    dynamic: bool = False
    nms_free: bool = False
    keep_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        flags = [name for name in ("dynamic", "nms_free") if getattr(self, name)] + list(self.keep_float)
        return "-".join(
            [self.space, f"operators{self.shift}", self.precision, f"{self.classes}c", f"b{self.batch}", *flags]
        )

    @property
    def architecture(self) -> Architecture:
        """The smallest network of the space, its operators and heads in turn, with the most attention that it has."""
        space = SearchSpace.load(self.space)
        options = {dimension.name: dimension.options for dimension in space.dimensions}
        smallest = space.smallest()
        blocks = []
        for index, (name, block) in enumerate(zip(space.to_dict()["blocks"], smallest.blocks, strict=True)):
            operators = options[f"{name}.operator"]
            blocks.append(replace(block, operator=operators[(index + self.shift) % len(operators)]))
        classes, bins = (options[f"detect.{part}"] for part in ("classes", "reg_max"))
        head = Head(classes[self.shift % len(classes)], bins[self.shift % len(bins)])
        return replace(smallest, blocks=tuple(blocks), attention=max(options["attention"]), head=head)


KINDS = (
    *(Kind(space, shift, precision) for space in SPACES for shift, precision in enumerate(("fp32", "fp16"))),
    # What a quantized file takes to be written and built is five seconds; a large space's operators are a small one's.
    *(Kind(space, 2, "int8") for space in ("tiny", "yolov8n-mixed", "yolov8l-mixed")),
    *(Kind(shift=shift, classes=classes) for shift, classes in enumerate((1, 80, 300))),
    *(Kind(dynamic=True, precision=precision) for precision in ("fp32", "fp16")),
    *(Kind(nms_free=True, dynamic=dynamic, precision=p) for dynamic in (False, True) for p in ("fp32", "fp16")),
    Kind("tiny", 3, "int8", dynamic=True, nms_free=True),
    Kind("tiny", 1, "int8", classes=80, batch=4, keep_float=("stem", "backbone_p3", "detect_boxes")),
)


class Exports:
    """Files of kinds, each written once.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.networks: dict[tuple[str, int, int, bool], DetectionModel] = {}

    def file(self, kind: Kind) -> Path:
        """The file of a kind."""
        path = self.folder / f"{kind}.onnx"
        if path.exists():
            return path
        network = self.network(kind)
        if kind.precision == "int8":
            images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
            network = quantize(deepcopy(network), [images], kind.keep_float)
        export_onnx(network, path, imgsz=SIDE, batch=kind.batch, dynamic=kind.dynamic, half=kind.precision == "fp16")
        if kind.precision == "int8":
            int8_for_gpu(path, path)
        return path

    def network(self, kind: Kind) -> DetectionModel:
        """The network that a kind is exported from."""
        key = (kind.space, kind.shift, kind.classes, kind.nms_free)
        if key not in self.networks:
            torch.manual_seed(0)
            network = build(kind.architecture, kind.classes).eval()
            self.networks[key] = add_one_to_one(network) if kind.nms_free else network
        return self.networks[key]
