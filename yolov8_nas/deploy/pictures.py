"""Images of the val split with the boxes of what ships and of stock: those in which both together miss the most.

Which images that are is told by both networks alike, so that neither looks better for the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov8_nas.deploy.files import Scored
from yolov8_nas.deploy.job import Job
from yolov8_nas.evaluation import ImageStats
from yolov8_nas.files import write_file
from yolov8_nas.measure import nms
from yolov8_nas.measure.runtime import DEFAULT
from yolov8_nas.runner.results import Drawn, DrawnBox, Picture, PicturesResult, Rival

COUNT: Final = 8
"""Images that are shown."""

FOLDER: Final = "pictures"
"""Folder of the copies."""

IOU: Final = 0.5
"""Overlap with a true box of its class from which a detection is right."""

_SIDE: Final = 480
"""Longer side of a copy in pixels."""

_QUALITY: Final = 80
"""Quality of a copy, as JPEG counts it."""

Boxes = NDArray[np.float32]


def write_pictures(job: Job, shipped: Scored, stock: Scored) -> None:
    """Write `pictures.json` and copies of its images to the output of an export.

    Args:
        job: The export.
        shipped: The file that ships.
        stock: The file of stock that it is compared with first.
    """
    assert isinstance(stock.row, Rival)
    names = worst(shipped.val.images, stock.val.images)
    files = [job.data / "dataset" / "images" / "val" / name for name in names]
    read: list[Any] = [cv2.imread(str(file)) for file in files]
    found = [_detect(job, one, read) for one in (shipped, stock)]
    (job.out / FOLDER).mkdir()
    pictures = []
    for file, image, ours, theirs in zip(files, read, *found, strict=True):
        height, width = image.shape[:2]
        true = _true_boxes(job.data / "dataset" / "labels" / "val" / f"{file.stem}.txt", width, height)
        pictures.append(
            Picture(
                name=file.name,
                file=f"{file.stem}.jpg",
                width=width,
                height=height,
                boxes=len(true),
                ours=drawn(ours, true),
                stock=drawn(theirs, true),
            )
        )
        write_file(job.out / FOLDER / f"{file.stem}.jpg", _copy(image))
    PicturesResult(
        confidence=nms.CONFIDENCE,
        iou=IOU,
        ours=f"searched, {shipped.precision.upper()}",
        stock=f"stock {stock.row.name}, {stock.precision.upper()}",
        classes=tuple(job.classes),
        images=tuple(sorted(pictures, key=_faults)),
        of=len(shipped.val.images),
    ).write(job.out)


def worst(ours: Sequence[ImageStats], theirs: Sequence[ImageStats], count: int = COUNT) -> list[str]:
    """File names of the images in which two networks together miss the most boxes, the worst first.

    Where they miss as many, the one with more wrong detections goes first.

    Args:
        ours: What one network finds in the images of a split.
        theirs: What the other finds in the same.
        count: How many names to give; all where there are fewer.
    """

    def faults(image: ImageStats) -> tuple[int, int]:
        sure = image.conf >= nms.CONFIDENCE
        right = int((image.tp[:, 0] & sure).sum())  # its first threshold is IOU
        return len(image.target_cls) - right, int(sure.sum()) - right

    ranked = []
    for one, other in zip(ours, theirs, strict=True):
        missed, wrong = (sum(pair) for pair in zip(faults(one), faults(other), strict=True))
        ranked.append((-missed, -wrong, one.name))
    return [name for *_, name in sorted(ranked)[:count]]


def drawn(found: Boxes, true: Boxes) -> Drawn:
    """Detections and true boxes, told which are right, wrong and missed.

    From the most confident on, a detection takes the true box of its class that it overlaps most, if by `IOU`, and that
    none has taken before.

    Args:
        found: Detections, from the most confident on: (n, 6), as left, top, right, bottom, confidence, class.
        true: True boxes: (m, 5), as left, top, right, bottom, class.
    """
    free = np.ones(len(true), dtype=bool)
    rows = []
    for row in found:
        overlaps = np.where(free & (true[:, 4] == row[5]), _overlaps(row[:4], true[:, :4]), 0.0)
        right = bool(len(true)) and float(overlaps.max()) >= IOU
        if right:
            free[int(overlaps.argmax())] = False
        rows.append(DrawnBox(box=_pixels(row), label=int(row[5]), confidence=round(float(row[4]), 3), right=right))
    missed = [DrawnBox(box=_pixels(row), label=int(row[4]), confidence=None, right=False) for row in true[free]]
    return Drawn(found=tuple(rows), missed=tuple(missed))


def _faults(picture: Picture) -> tuple[int, int, str]:
    """Sorts the worst picture first, by what is drawn."""
    both = (picture.ours, picture.stock)
    wrong = sum(not box.right for one in both for box in one.found)
    return -sum(len(one.missed) for one in both), -wrong, picture.name


def _detect(job: Job, file: Scored, pictures: Sequence[NDArray[np.uint8]]) -> list[Boxes]:
    """The detections of a file in pictures; of one whose device is elsewhere, those of its ONNX file here."""
    there = job.elsewhere is not None
    return nms.detect(
        file.onnx if there else file.runs,
        pictures,
        imgsz=job.form.imgsz,
        batch=job.form.batch,
        threads=1 if there else job.threads,
        runtime=DEFAULT if there else job.runtime,
    )


def _true_boxes(labels: Path, width: int, height: int) -> Boxes:
    """The boxes of a label file in pixels: (m, 5), as left, top, right, bottom, class."""
    rows = np.array([line.split() for line in labels.read_text().splitlines()], dtype=np.float32).reshape(-1, 5)
    sides = np.array([width, height], dtype=np.float32)
    centres, halves = rows[:, 1:3] * sides, rows[:, 3:5] * sides / 2
    return np.concatenate([centres - halves, centres + halves, rows[:, :1]], axis=1)


def _overlaps(box: Boxes, others: Boxes) -> NDArray[np.float32]:
    """Intersection over union of a box (4,) with others (m, 4)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    both = np.clip(sides, 0, None).prod(axis=1)
    areas = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1)
    overlaps: NDArray[np.float32] = both / np.maximum(areas - both, 1e-9)
    return overlaps


def _pixels(row: Boxes) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(float(value), 1) for value in row[:4])
    return left, top, right, bottom


def _copy(image: NDArray[np.uint8]) -> bytes:
    """An image as JPEG, made smaller where it is larger than a report needs."""
    scale = _SIDE / max(image.shape[:2])
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    done, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert done
    return bytes(data)
