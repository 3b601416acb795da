"""Rows of YOLO's label files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from yolov8_nas.data.sample import Box, fit
from yolov8_nas.errors import InputError

VERSION: Final = 1
"""Of what `parse_row` makes of a row: boxes that another version found are not used."""

TOLERANCE: Final = 1e-3
"""How far a box may reach out of its image without a word, as a share of the side: rounding of written coordinates."""

POLYGON: Final = "read from polygons, as the boxes around them"
ORIENTED: Final = "read from four corners (oriented boxes or polygons), as the upright boxes around them"
POSE: Final = "read from poses, without their keypoints"
"""What a row may be but a box."""

_FARTHEST = 2.0  # no coordinate that is a share of a side is larger, however carelessly a box was drawn
_FINITE = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(rf"{_FINITE}|[+-]?(?:nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_PLAIN = re.compile(r"(\d{1,5})" + r" (\d?\.\d{1,12})" * 4 + r"\s*", re.ASCII)
"""Rows as nearly all are: they need no closer look at each of their numbers."""


def parse_row(
    line: str, classes: int, *, keypoints: tuple[int, int] | None = None, names: Mapping[str, int] | None = None
) -> tuple[Box | None, str | None, str | None]:
    """Read a row of a label file: `class x y width height`, a polygon `class x1 y1 x2 y2 ...`, or a pose.

    Args:
        line: The row.
        classes: Number of classes.
        keypoints: How many keypoints a pose has and how many numbers each, where the dataset says so.
        names: The classes by name, to help where a name stands in place of a number.

    Returns:
        The box, clipped to the image, or nothing where nothing of it is left; what became of it, where that is worth a
        word; and what the row is, where it is more than a box.

    Raises:
        InputError: What is wrong with the row and, after a semicolon, what to do about it.
    """
    if (plain := _PLAIN.fullmatch(line)) and (label := int(plain[1])) < classes:
        x, y, width, height = map(float, plain.groups()[1:])
        if max(x, y, width, height) <= _FARTHEST:
            return *_fitted(label, x, y, width, height, line), None
    columns = line.split()
    if len(columns) in (9, 10) and not _NUMBER.fullmatch(columns[8]) and all(map(_NUMBER.fullmatch, columns[:8])):
        raise InputError(
            f"{line.strip()!r} is an oriented box as DOTA has it, four corners and a name; "
            "export it in YOLO's layout: class x y width height, or class and four corners as shares of the sides"
        )
    label, numbers = _label(columns[0], classes, names or {}), [_number(column, line) for column in columns[1:]]
    what = _what(columns, numbers, keypoints)
    if what is None or what == POSE:
        x, y, width, height = numbers[:4]
        if width < 0 or height < 0:
            raise InputError(f"box {line.strip()} has no size; take it out or give it a width and a height above 0")
    else:
        x, y, width, height = _around(numbers)
    if max(abs(value) for value in (x, y, width, height)) > _FARTHEST:
        raise InputError(
            f"box {line.strip()} reaches out of the image as if it were in pixels; "
            "divide x and width by the image's width, y and height by its height"
        )
    return *_fitted(label, x, y, width, height, line), what


def _fitted(label: int, x: float, y: float, width: float, height: float, line: str) -> tuple[Box | None, str | None]:
    try:
        return fit(label, x, y, width, height, (TOLERANCE, TOLERANCE))
    except InputError as error:
        raise InputError(f"box {line.strip()} {error}") from None


def _label(column: str, classes: int, names: Mapping[str, int]) -> int:
    if column in names and not _NUMBER.fullmatch(column):
        raise InputError(f"class {column!r} is a name; write its number, {names[column]}")
    value = _number(column, column)
    if value != int(value) or not 0 <= value < classes:
        raise InputError(
            f"class {column} is out of range (there are {classes} classes, 0 to {classes - 1}); "
            "correct it or add its name to names"
        )
    return int(value)


def _number(column: str, line: str) -> float:
    """A number as label files have it; Python's own reading would take `1_0` and digits of other scripts, too."""
    if not _NUMBER.fullmatch(column):
        remedy = "write class x y width height"
        if "," in column or ";" in column:
            remedy = "write blanks between the numbers and a point before their decimals"
        elif not column.isascii():
            remedy = "write it with the digits 0 to 9"
        raise InputError(f"{line.strip()!r} holds something that is no number ({column!r}); {remedy}")
    value = float(column)
    if not math.isfinite(value):
        raise InputError(f"{line.strip()!r} holds a value that is not finite; correct the box or take it out")
    return value


def _what(columns: Sequence[str], numbers: Sequence[float], keypoints: tuple[int, int] | None) -> str | None:
    """What a row is: a box (nothing), a polygon, or a pose."""
    count = len(columns)
    if count == 5:
        return None
    if keypoints is not None and count == 5 + keypoints[0] * keypoints[1]:
        return POSE
    points = _keypoints(numbers) if count > 7 else None
    if points:
        raise InputError(
            f"{count} columns, as a pose of {points[0]} keypoints has; "
            f"add `kpt_shape: [{points[0]}, {points[1]}]` to the description, and the boxes are taken"
        )
    if count == 9:
        return ORIENTED
    if count >= 7 and count % 2:
        return POLYGON
    if count == 6:
        raise InputError(
            "6 columns; write five: class x y width height (leave out a confidence, or the number of a track)"
        )
    raise InputError(f"{count} columns; write five: class x y width height, or a polygon: class x1 y1 x2 y2 x3 y3 ...")


def _keypoints(numbers: Sequence[float]) -> tuple[int, int] | None:
    """How many keypoints follow a box, where all of them lie in it: a polygon's corners hardly do by chance."""
    x, y, width, height = numbers[:4]
    rest = numbers[4:]
    for each in (3, 2):
        if len(rest) % each or len(rest) < 2 * each or min(width, height) <= 0:
            continue
        points = [rest[i : i + each] for i in range(0, len(rest), each)]
        if each == 3 and not all(point[2] in (0, 1, 2) for point in points):
            continue
        seen = [point for point in points if point[0] or point[1]]
        if seen and all(
            abs(p[0] - x) <= width * 0.55 + TOLERANCE and abs(p[1] - y) <= height * 0.55 + TOLERANCE for p in seen
        ):
            return len(points), each
    return None


def _around(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """The box around a polygon, as centre and size; what sticks out of the image is left to be clipped."""
    xs, ys = numbers[::2], numbers[1::2]
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
