"""A tiny detection problem that a tiny network learns in seconds: bright squares and dark discs on grey."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.space import Head, SearchSpace
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.derive import build

CLASSES = ["square", "disc"]


def make_dataset(folder: Path, *, train: int, search: int, val: int, size: int = 64) -> Path:
    """Write what data-prep writes: `folder/dataset/{images,labels}/<split>` and `folder/dataset.json`."""
    rng = np.random.default_rng(0)
    counts = {"train": train, "search": search, "val": val}
    for split, count in counts.items():
        images, labels = (folder / "dataset" / kind / split for kind in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(count):
            picture, rows = _picture(rng, size)
            cv2.imwrite(str(images / f"{split}{i:03d}.png"), picture)
            (labels / f"{split}{i:03d}.txt").write_text("".join(rows))
    details = {
        "digest": hashlib.sha256(str(counts).encode()).hexdigest(),
        "images": counts,
        "classes": CLASSES,
        "source": "made by the tests",
        "boxes": {},
        "image_sides": {},
        "box_sides": [],
        "warnings": [],
        "ledger": {},
        "converted": {},
    }
    (folder / "dataset.json").write_text(json.dumps(details))
    return folder


def lively(side: int, seed: int = 0, *, gain: float = 1.2, shift: float = 0.1) -> DetectionModel:
    """A small network whose activations are neither zero nor all alike, as those of fresh weights are."""
    torch.manual_seed(seed)
    smallest = replace(SearchSpace.load("tiny").smallest(), head=Head())
    network = build(smallest, len(CLASSES), CLASSES)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, gain)
            torch.nn.init.uniform_(module.bias, -shift, shift)
    recalibrate(network, [torch.rand(8, 3, side, side)])
    return network.eval()


def _picture(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[str]]:
    picture = rng.integers(110, 130, (size, size, 3)).astype(np.uint8)
    rows = []
    for column in range(2):
        side = int(rng.integers(14, 24))
        x = size // 2 * column + int(rng.integers(0, size // 2 - side))
        y = int(rng.integers(0, size - side))
        kind = int(rng.integers(2))
        if kind == 0:
            cv2.rectangle(picture, (x, y), (x + side, y + side), (230, 230, 230), -1)
        else:
            cv2.circle(picture, (x + side // 2, y + side // 2), side // 2, (20, 20, 20), -1)
        rows.append(
            f"{kind} {(x + side / 2) / size:.5f} {(y + side / 2) / size:.5f} {side / size:.5f} {side / size:.5f}\n"
        )
    return picture, rows
