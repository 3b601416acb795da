"""The rows of a COCO file, kept in a few bytes each: a dataset has millions of annotations.

A row of the common kind (whole numbers as ids, four numbers as a box) is packed. Whatever differs is kept as it was
read, so that messages can show it; of outlines only the box around them is.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

Id = int | str

_NAME_KEYS: Final = ("file_name", "path", "filename", "coco_url")
"""Where tools write the name of an image; the first that is there counts."""

_LARGEST: Final = 2**53  # a whole number beyond it may not survive as a float
_CROWD, _ATTRIBUTES, _OUTLINED = 1, 2, 4
_WHOLE: Final = (8, 16, 32, 64)
"""Marks of a packed row: its flags, and which numbers of its box were written without a point."""


class Annotation(NamedTuple):
    """An annotation as the file has it; what is missing is `None`.

    Attributes:
        id: Its id.
        image: The id of its image.
        category: The id of its category.
        corners: Left, top, width and height in pixels.
        crowd: Whether it is of a crowd.
        ignored: Whether it is marked to be ignored.
        attributes: Whether it has attributes, as CVAT and Datumaro write them.
        rotation: By how many degrees its box is turned.
        outlined: Whether the box is the one around its outline.
    """

    id: Any
    image: Any
    category: Any
    corners: Any
    crowd: bool = False
    ignored: bool = False
    attributes: bool = False
    rotation: float | None = None
    outlined: bool = False

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Annotation:
        """An annotation of an entry of a file."""
        corners, outlined = entry.get("bbox"), False
        if not corners and (points := _outline(entry.get("segmentation"))):
            xs, ys = points[::2], points[1::2]
            corners, outlined = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], True
        attributes = entry.get("attributes")
        return cls(
            entry.get("id"),
            entry.get("image_id"),
            entry.get("category_id"),
            corners,
            bool(whole(entry.get("iscrowd"))),
            bool(whole(entry.get("ignore"))),
            "attributes" in entry,
            number(attributes.get("rotation")) if isinstance(attributes, dict) else None,
            outlined,
        )


class Annotations:
    """The annotations of a file, in their order.

    Attributes:
        sound: Whether all entries of the list are objects.
    """

    def __init__(self) -> None:
        self.sound = True
        self.first_has_category = False
        self.clear()

    def clear(self) -> None:
        """Forget them all, once their boxes are taken."""
        self._ids = array("q")  # the annotation's own, its image's, its category's
        self._corners = array("d")
        self._marks = array("B")
        self._odd: dict[int, Annotation] = {}

    def append(self, entry: Any) -> None:
        """Take the next entry of the list."""
        if not isinstance(entry, dict):
            self.sound, entry = False, {}
        if not len(self):
            self.first_has_category = "category_id" in entry
        annotation = Annotation.of(entry)
        ids, corners = annotation[:3], annotation.corners
        marks = annotation.crowd * _CROWD | annotation.attributes * _ATTRIBUTES | annotation.outlined * _OUTLINED
        if annotation.ignored or annotation.rotation or not _are_common(ids, corners):
            self._odd[len(self)] = annotation
            ids, corners = (0, 0, 0), (0, 0, 0, 0)
        self._ids.extend(ids)
        self._corners.extend(corners)
        self._marks.append(marks | sum(mark for mark, value in zip(_WHOLE, corners, strict=True) if type(value) is int))

    def __len__(self) -> int:
        return len(self._marks)

    def __getitem__(self, index: int) -> Annotation:
        if (odd := self._odd.get(index)) is not None:
            return odd
        marks, corners = self._marks[index], self._corners[4 * index : 4 * index + 4].tolist()
        if marks >= _WHOLE[0]:
            corners = [int(v) if marks & mark else v for mark, v in zip(_WHOLE, corners, strict=True)]
        own, image, category = self._ids[3 * index : 3 * index + 3]
        return Annotation(
            own,
            image,
            category,
            corners,
            bool(marks & _CROWD),
            False,
            bool(marks & _ATTRIBUTES),
            None,
            bool(marks & _OUTLINED),
        )

    def __iter__(self) -> Iterator[Annotation]:
        return map(self.__getitem__, range(len(self)))

    def images(self) -> Iterator[Id | None]:
        """The id of each annotation's image, in one form."""
        return self._column(1)

    def categories(self) -> Counter[Id | None]:
        """How many annotations each category has, by its id in one form."""
        return Counter(self._column(2))

    def crowds(self) -> int:
        """How many are of crowds."""
        return sum(mark & _CROWD for mark in self._marks)

    def _column(self, place: int) -> Iterator[Id | None]:
        packed = iter(self._ids[place::3])
        if not self._odd:
            return packed
        return (one_id(self._odd[i][place]) if i in self._odd else value for i, value in enumerate(packed))


class Image(NamedTuple):
    """An image as the file has it; what is missing is `None`.

    Attributes:
        id: Its id.
        name: Where it lies, under whichever key.
        width: Its width in pixels.
        height: Its height in pixels.
    """

    id: Any
    name: Any
    width: Any
    height: Any


class Images(list[Image]):
    """The images of a file.

    Attributes:
        sound: Whether all entries of the list are objects.
    """

    sound = True

    def append(self, entry: Any) -> None:
        """Take the next entry of the list."""
        if not isinstance(entry, dict):
            self.sound, entry = False, {}
        name = next((entry[key] for key in _NAME_KEYS if entry.get(key)), entry.get(_NAME_KEYS[0]))
        super().append(Image(entry.get("id"), name, entry.get("width"), entry.get("height")))


def one_id(value: object) -> Id | None:
    """An id in one form: `7`, `7.0`, `"7"` and `"7.0"` are one."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text.partition(".")[0]) if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})(\.0+)?", text) else text
    return None


def whole(value: object) -> int | None:
    """A whole number, also as a float, a text or a truth value."""
    found = one_id(int(value) if isinstance(value, bool) else value)
    return found if isinstance(found, int) else None


def number(value: object) -> float | None:
    """A finite number, also as a text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _are_common(ids: tuple[Any, ...], corners: object) -> bool:
    return (
        all(type(value) is int and -_LARGEST < value < _LARGEST for value in ids)
        and isinstance(corners, list)
        and len(corners) == 4
        and all(type(value) in (int, float) and -_LARGEST < value < _LARGEST for value in corners)
    )


def _outline(segmentation: object) -> list[float]:
    """The corners of polygons, one behind the other."""
    polygons = segmentation if isinstance(segmentation, list) else []
    numbers = [number(value) for polygon in polygons if isinstance(polygon, list) for value in polygon]
    found = [value for value in numbers if value is not None]
    return found if len(found) == len(numbers) and len(found) >= 4 and not len(found) % 2 else []
