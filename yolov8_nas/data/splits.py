"""The search split: cut from the user's train split by image content.

The user's validation split is for final figures and gates only. Early stopping and the search see the search split
instead. Whether an image belongs to it depends on the image's bytes alone, so it never changes sides when the dataset
grows, is renamed or is shuffled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from yolov8_nas.errors import InputError

SHARE: Final = 0.2
LEAST: Final = 8
"""Fewest images with boxes in the search split, where a quarter of the train split's are as many."""


def position(sha256: str) -> float:
    """Where an image stands between 0 and 1: uniform over images, always the same for one image's bytes."""
    return int(sha256[:13], 16) / 16**13  # 52 bits, which a float holds exactly


def search_split(images: Mapping[str, bool], share: float = SHARE) -> frozenset[str]:
    """Choose the images of the search split.

    Every image whose position is below `share` is chosen. Only where that leaves a very small set without `LEAST`
    images with boxes (a quarter of them, if that is less), those of the lowest positions are added.

    Args:
        images: The train split's images by SHA-256 of their bytes, and whether they have boxes.
        share: Expected share of the images that is chosen.

    Returns:
        The chosen images; some with boxes are among them and some stay behind.

    Raises:
        InputError: Fewer than two images have boxes, so that they cannot be told apart.
    """
    with_boxes = sorted((sha256 for sha256, boxes in images.items() if boxes), key=position)
    if len(with_boxes) < 2:
        raise InputError(
            f"train has {len(with_boxes)} distinct image(s) with boxes, but two splits are cut from it; label more"
        )
    chosen = {sha256 for sha256 in images if position(sha256) < share}
    chosen.update(with_boxes[: max(1, min(LEAST, len(with_boxes) // 4))])
    if chosen.issuperset(with_boxes):
        chosen.remove(with_boxes[-1])
    return frozenset(chosen)


def val_split(images: Mapping[str, bool], source: str, share: float = SHARE) -> frozenset[str]:
    """Choose validation images where the user has chosen none, by other digits of their bytes' SHA-256 than `position`.

    Args:
        images: All images by SHA-256 of their bytes, and whether they have boxes.
        source: How messages call the dataset.
        share: Expected share of the images that is chosen.

    Returns:
        The chosen images; some with boxes are among them.

    Raises:
        InputError: Too few images have boxes.
    """
    with_boxes = sorted((sha256 for sha256, boxes in images.items() if boxes), key=_other_position)
    if len(with_boxes) < 3:
        raise InputError(
            f"{source}: {len(with_boxes)} distinct image(s) with boxes, but three splits are cut from them; label more"
        )
    chosen = {sha256 for sha256 in images if _other_position(sha256) < share}
    chosen.update(with_boxes[: max(1, min(LEAST, len(with_boxes) // 4))])
    chosen.difference_update(with_boxes[-2:])
    return frozenset(chosen)


def _other_position(sha256: str) -> float:
    return position(sha256[13:])
