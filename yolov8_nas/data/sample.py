"""Images with their boxes, as a reader gives them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, overload

from yolov8_nas.data.ledger import Ledger
from yolov8_nas.errors import InputError

SPLITS: Final = ("train", "val")

ROUNDING: Final = 1e-9
"""How far a box may reach out because its numbers are rounded to nine digits."""

CLIPPED: Final = "clipped to their image"
EMPTY: Final = "left out: without a size"
TWICE: Final = "left out: there twice"
"""What may become of a box."""


class Box(NamedTuple):
    """A box with its class; centre and size are shares of the image's width and height, 0 to 1."""

    label: int
    x: float
    y: float
    width: float
    height: float


class Boxes(Sequence[Box]):
    """The boxes of an image, packed: a dataset holds millions of them."""

    __slots__ = ("_packed",)

    def __init__(self, boxes: Iterable[Box] = ()) -> None:
        self._packed = array("d", [value for box in boxes for value in box])

    @classmethod
    def unpacked(cls, packed: bytes) -> Boxes:
        """What `packed` gave.

        Raises:
            ValueError: It is torn.
        """
        boxes = cls()
        boxes._packed.frombytes(packed)
        if len(boxes._packed) % 5:
            raise ValueError(f"{len(packed)} bytes are no boxes")
        return boxes

    def packed(self) -> bytes:
        """The boxes as bytes, for this machine alone."""
        return self._packed.tobytes()

    def __len__(self) -> int:
        return len(self._packed) // 5

    @overload
    def __getitem__(self, index: int) -> Box: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Box]: ...
    def __getitem__(self, index: int | slice) -> Box | Sequence[Box]:
        if isinstance(index, slice):
            return list(self)[index]
        place = range(len(self))[index] * 5
        label, *rest = self._packed[place : place + 5]
        return Box(int(label), *rest)

    def __iter__(self) -> Iterator[Box]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether the same boxes are there, in whatever order."""
        return isinstance(other, Boxes) and (self._packed == other._packed or sorted(self) == sorted(other))

    def __hash__(self) -> int:
        return hash(tuple(sorted(self)))


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its boxes.

    Attributes:
        image: Path of the image's file.
        name: How messages call it: its path in the dataset.
        boxes: Its boxes, inside the image.
        labelled: Whether there is a label file or an annotation's entry for it, be it without boxes.
        pixels: Width and height that the annotation states, where it states them.
    """

    image: str
    name: str
    boxes: Boxes
    labelled: bool = True
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True)
class Listing:
    """A dataset as it was read; the images themselves have not been opened.

    Attributes:
        names: Class names.
        samples: The samples of `train` and of `val`; of `train` alone where `val` is to be cut from it.
        ledger: What became of each file, label and box so far.
        warnings: What was mended on the way and may surprise later.
    """

    names: tuple[str, ...]
    samples: Mapping[str, Sequence[Sample]]
    ledger: Ledger
    warnings: tuple[str, ...] = ()


def cut_off(where: str, instead: str) -> str:
    """The warning that a dataset names no validation images, and that some are taken from those it has."""
    return (
        f"{where}: no validation images; a fifth of the images is taken for it, chosen by their content ({instead} to "
        "choose them yourself, above all where images are frames of one video: final figures need pictures that "
        "training never saw)"
    )


def fit(
    label: int, x: float, y: float, width: float, height: float, tolerance: tuple[float, float]
) -> tuple[Box | None, str | None]:
    """A box, clipped to its image.

    Args:
        label: Its class.
        x: Its centre, as a share of the image's width.
        y: Its centre, as a share of the image's height.
        width: Its width, as a share of the image's.
        height: Its height, as a share of the image's.
        tolerance: How far it may reach out, in width and height, without a word: rounding.

    Returns:
        The box, or nothing where nothing of it is left; and what became of it, where that is worth a word.

    Raises:
        InputError: It lies outside its image altogether.
    """
    if width <= 0 or height <= 0:
        return None, EMPTY
    edges: list[float] = []
    outcome = None
    for centre, side, slack in ((x, width, tolerance[0]), (y, height, tolerance[1])):
        centre, side = written(centre), written(side)
        low, high = centre - side / 2, centre + side / 2
        if low >= 1 + slack or high <= -slack:
            raise InputError("lies outside its image; correct it or take it out")
        if low >= 1 or high <= 0:
            return None, EMPTY
        if low < -slack or high > 1 + slack:
            outcome = CLIPPED
        # What is inside stays as it was written, and so does what reaches out by the rounding of its last digit alone:
        # normalising a normalised dataset changes nothing.
        inside = low >= -ROUNDING and high <= 1 + ROUNDING
        edges += [centre, side] if inside else _middle(max(low, 0.0), min(high, 1.0))
    x, width, y, height = edges
    if width <= 0 or height <= 0:
        return None, EMPTY
    return Box(label, x, y, width, height), outcome


def _middle(low: float, high: float) -> list[float]:
    return [written((low + high) / 2), written(high - low)]


def written(value: float) -> float:
    """A number with the nine digits that it has in a label file."""
    return float(f"{value:.9g}")
