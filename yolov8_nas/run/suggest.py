"""A run configuration for a dataset and a machine, as a person would begin: for `yolov8-nas init`.

What is suggested follows from what is seen, by rules that stand beside each value in the file. They are a beginning
from experience with small sets (docs/search.md), not the outcome of a search for the best ones.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from yolov8_nas.config import RunConfig
from yolov8_nas.data.check import CheckedDataset
from yolov8_nas.device import catalogue
from yolov8_nas.device.gpu import get_gpu_info
from yolov8_nas.measure.target import names_cpu
from yolov8_nas.space.limits import Constraint
from yolov8_nas.yaml_text import parse_yaml

OBJECT_SIDE: Final = 24
"""Pixels that the side of a small object should have at the network's input: three cells of its finest grid."""

SMALL: Final = 10
"""Percentile of the objects' sides that counts as a small object."""

_STRIDE: Final = 32  # an input is a multiple of it
_LEAST_SIDE: Final = 160
_MANY: Final = 1000  # images


@dataclass(frozen=True)
class Place:
    """Where networks are trained and measured.

    Attributes:
        hardware: Target, as a configuration names it.
        gpu: Whether that is a GPU, which runs TensorRT.
    """

    hardware: str
    gpu: bool = False

    @classmethod
    def named(cls, hardware: str | None) -> Place:
        """The device of a name; without one, this machine's first GPU, or its CPU.

        Raises:
            InputError: There is no such device in the catalogue.
        """
        if hardware is None:
            gpus = get_gpu_info().gpus
            return cls(gpus[0].specification or gpus[0].name, gpu=True) if gpus else cls("cpu")
        if names_cpu(hardware):
            return cls(hardware)
        return cls(catalogue.named(hardware).asked, gpu=True)

    @property
    def largest_side(self) -> int:
        """Side of the largest input that is suggested, in pixels."""
        return 1280 if self.gpu else 640

    @property
    def steps(self) -> int:
        """Steps of a training from weights."""
        return 10_000 if self.gpu else 800


@dataclass(frozen=True)
class Seen:
    """What a dataset tells of the settings that suit it.

    Attributes:
        train: Images to train on.
        val: Images that networks are scored on.
        classes: Number of classes.
        image_side: Median of the images' longer sides, in pixels.
        small_object: Side of a small object, a square of its area, as a share of its image's longer side; nothing where
            there are no boxes.
    """

    train: int
    val: int
    classes: int
    image_side: int
    small_object: float | None

    @classmethod
    def of(cls, dataset: CheckedDataset) -> Seen:
        """Look at a dataset."""
        images = [image for split in dataset.splits.values() for image in split]
        sides = [
            math.sqrt(box.width * image.width * box.height * image.height) / max(image.width, image.height)
            for image in images
            for box in image.boxes
        ]
        return cls(
            train=len(dataset.splits["train"]),
            val=len(dataset.splits["val"]),
            classes=len(dataset.names),
            image_side=int(np.median([max(image.width, image.height) for image in images])),
            small_object=float(np.percentile(sides, SMALL)) if sides else None,
        )


def input_side(seen: Seen, place: Place) -> int:
    """Side of the input in pixels: no larger than the images are, and than small objects need."""
    largest = min(place.largest_side, math.ceil(seen.image_side / _STRIDE) * _STRIDE)
    wanted = OBJECT_SIDE / seen.small_object if seen.small_object else largest
    return max(_LEAST_SIDE, min(largest, math.ceil(wanted / _STRIDE) * _STRIDE))


def configuration(dataset: CheckedDataset, data: str, place: Place, limit: str, name: str | None = None) -> str:
    """A commented configuration as YAML, which `RunConfig` has read once.

    Args:
        dataset: The dataset, checked.
        data: Its path or address, as it stands in the file.
        place: Where networks are trained and measured.
        limit: The hard limit.
        name: Name of the run; without one, made of the dataset's.

    Raises:
        InputError: The limit is none, or the name is no name of a run.
    """
    seen, asked = Seen.of(dataset), Constraint.parse(limit)
    size = "s" if place.gpu else "n"
    batch = 16 if place.gpu or seen.train >= _MANY else 8
    fewest, most = (50, 300) if place.gpu else (20, 100)
    epochs = min(max(math.ceil(place.steps / math.ceil(seen.train / batch)), fewest), most)
    side = input_side(seen, place)
    small = "" if seen.small_object is None else f"; one object in ten has under {seen.small_object * side:.0f} there"
    precision = "fp16" if place.gpu else "best  # of fp32 and int8, whichever scores best within the limits"
    images = f"{seen.train} to train on, {seen.val} to score on, {seen.image_side} pixels"
    near = f"  near: {asked.limit:g}  # the limit's share of stock" if asked.relative else ""
    rows = [
        f"# Images: {images}. Classes: {seen.classes}.",
        "# Every setting can be overridden: yolov8-nas run FILE --set KEY=VALUE",
        f"name: {name or _name(dataset.source)}",
        f"data: {json.dumps(data)}",
        f"space: yolov8{size}  # the stock network that is searched around: n, s, m or l",
        f"imgsz: {side}  # pixels{small}",
        "supernet:",
        f"  weights: yolov8{size}.pt  # trained on COCO; looked for here and in the folder of weights",
        "  download: false  # true lets it be downloaded from Ultralytics",
        f"  epochs: {max(6, epochs // 5)}",
        f"  batch: {batch}",
        "  lr: 0.001",
        near,
        "search: {generations: 4, population: 16, candidates: 12, prior_steps: 0}",
        "finetune:",
        "  start: weights  # of the networks found and of stock alike",
        f"  epochs: {epochs}  # about {place.steps} steps, from {fewest} to {most} epochs",
        f"  batch: {batch}",
        "  lr: 0.001",
        "  candidates: 2  # trained to the end; short trainings choose them",
        "  distill: true  # they learn from trained stock, too",
        "  baseline: both  # what they are compared with: stock, and stock rescaled to their latency",
        "targets:",
        f"  - hardware: {json.dumps(place.hardware)}",
        f"    runtime: {'tensorrt' if place.gpu else 'onnxruntime'}",
        f"    precision: {precision}",
        f"    constraints: [{json.dumps(limit)}]",
    ]
    text = "\n".join(filter(None, rows)) + "\n"
    RunConfig.parse(parse_yaml(text, "what is suggested"), "what is suggested")
    return text


def _name(source: str) -> str:
    """A name of a run that is like the name of its dataset."""
    words = re.sub(r"[^A-Za-z0-9_-]+", "-", source.rstrip("/").rpartition("/")[2].partition(".")[0]).strip("-_")
    return words[:63] or "detector"
