"""The result of data-prep: the dataset."""

from __future__ import annotations

from collections.abc import Mapping

from yolov8_nas.runner.results.form import Result, ResultFile


class Tallied(Result):
    """Files, labels or boxes of a dataset that ended alike.

    Attributes:
        count: How many.
        examples: Names of the first of them, where they were skipped.
    """

    count: int
    examples: tuple[str, ...]


Tallies = Mapping[str, Mapping[str, Mapping[str, Tallied]]]
"""Every file, label and box of a dataset, by split, kind (`files`, `labels`, `boxes`) and what became of it."""


class DatasetResult(ResultFile):
    """A dataset in its normal form.

    Attributes:
        digest: SHA-256 of class names, images, labels and split: two datasets with one digest are the same.
        source: Name of what it was made from.
        classes: Class names.
        images: Number of images per split (`train`, `search`, `val`).
        boxes: Number of boxes per split and class name.
        image_sides: Smallest, median and largest width and height in pixels, over all images.
        box_sides: Quantiles 5, 25, 50, 75 and 95 % of the square root of a box's share of its image's area.
        warnings: What was mended or left out.
        ledger: What became of every file, label and box of the source.
        converted: What was converted and how, and how many images.
    """

    FILE = "dataset.json"

    digest: str
    source: str
    classes: tuple[str, ...]
    images: Mapping[str, int]
    boxes: Mapping[str, Mapping[str, int]]
    image_sides: Mapping[str, tuple[int, ...]]
    box_sides: tuple[float, ...]
    warnings: tuple[str, ...]
    ledger: Tallies
    converted: Mapping[str, int]
