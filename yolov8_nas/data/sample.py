"""Images with their boxes, as a reader gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from yolov8_nas.errors import InputError

IMAGE_SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SPLITS: Final = ("train", "val")

ROUNDING: Final = 1e-9
"""How far a box may reach out because its numbers are rounded to nine digits."""


class Box(NamedTuple):
    """A box with its class; centre and size are shares of the image's width and height, 0 to 1."""

    label: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Sample:
    """An image and its boxes.

    Attributes:
        image: The image's file.
        name: How messages call it: its path in the dataset.
        boxes: Its boxes, inside the image.
        pixels: Width and height that the annotation states, where it states them.
    """

    image: Path
    name: str
    boxes: tuple[Box, ...]
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True)
class Listing:
    """A dataset as it was read; the images themselves have not been opened.

    Attributes:
        names: Class names.
        samples: The samples of `train` and of `val`.
        warnings: What was mended or left out on the way.
    """

    names: tuple[str, ...]
    samples: Mapping[str, Sequence[Sample]]
    warnings: tuple[str, ...] = ()


def clipped(
    label: int, x: float, y: float, width: float, height: float, tolerance: tuple[float, float], shown: str
) -> Box:
    if width <= 0 or height <= 0:
        raise InputError(f"box {shown} has no size; take it out or give it a width and a height above 0")
    edges: list[float] = []
    for centre, side, slack in ((x, width, tolerance[0]), (y, height, tolerance[1])):
        centre, side = written(centre), written(side)
        low, high = centre - side / 2, centre + side / 2
        if low < -slack or high > 1 + slack:
            pixels = max(x, y, width, height) > 2
            remedy = (
                "divide x and width by the image's width, y and height by its height"
                if pixels
                else "clip it to the image or take it out"
            )
            raise InputError(f"box {shown} reaches out of the image; {remedy}")
        # What is inside stays as it was written, and so does what reaches out by the rounding of its last digit alone:
        # normalising a normalised dataset changes nothing.
        inside = low >= -ROUNDING and high <= 1 + ROUNDING
        edges += [centre, side] if inside else _middle(max(low, 0.0), min(high, 1.0))
    x, width, y, height = edges
    if width <= 0 or height <= 0:
        raise InputError(f"box {shown} has no size inside the image; take it out")
    return Box(label, x, y, width, height)


def _middle(low: float, high: float) -> list[float]:
    return [written((low + high) / 2), written(high - low)]


def written(value: float) -> float:
    """A number with the nine digits that it has in a label file."""
    return float(f"{value:.9g}")
