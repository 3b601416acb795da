"""Rows of YOLO's label files."""

from __future__ import annotations

import math
from typing import Final

from yolov8_nas.data.sample import Box, clipped
from yolov8_nas.errors import InputError

TOLERANCE: Final = 1e-3
"""How far a YOLO box may reach out of its image, as a share of the side: rounding of written coordinates, clipped."""


def parse_row(line: str, classes: int) -> Box:
    """Read a row `class x y width height` of a label file.

    Args:
        line: The row.
        classes: Number of classes.

    Returns:
        The box, clipped where it reaches out of the image by no more than rounding.

    Raises:
        InputError: What is wrong with the row and, after a semicolon, what to do about it.
    """
    columns = line.split()
    if len(columns) != 5:
        polygon = " (polygons are not read: write their bounding boxes)" if len(columns) > 6 else ""
        raise InputError(f"{len(columns)} columns; write five: class x y width height{polygon}")
    try:
        label, *numbers = (float(column) for column in columns)
    except ValueError:
        raise InputError(f"{line.strip()!r} holds something that is no number; write class x y width height") from None
    if not all(map(math.isfinite, (label, *numbers))):
        raise InputError(f"{line.strip()!r} holds a value that is not finite; correct the box or take it out")
    if label != int(label) or not 0 <= label < classes:
        raise InputError(
            f"class {columns[0]} is out of range (there are {classes} classes, 0 to {classes - 1}); "
            "correct it or add its name to names"
        )
    x, y, width, height = numbers
    return clipped(int(label), x, y, width, height, (TOLERANCE, TOLERANCE), line.strip())
