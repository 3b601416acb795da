"""Pictures of the report: which images are shown, which boxes count as right, and what the page makes of them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from yolov8_nas.deploy import pictures
from yolov8_nas.evaluation import ImageStats


def found_in(name: str, boxes: int, *, right: int, wrong: int = 0, unsure: int = 0) -> ImageStats:
    """An image with true boxes of one class, of which some are found, some of these with little confidence."""
    tp = np.array([[True] * 10] * (right + unsure) + [[False] * 10] * wrong).reshape(-1, 10)
    conf = np.array([0.9] * right + [0.1] * unsure + [0.8] * wrong, dtype=np.float32)
    return ImageStats(name, tp, conf, np.zeros(len(conf), np.int32), np.zeros(boxes, np.int32))


def test_images_in_which_both_miss_the_most_come_first() -> None:
    ours = [
        found_in("good", 3, right=3),
        found_in("ours misses two", 3, right=1),
        found_in("both miss one", 3, right=2, wrong=1),
        found_in("both are unsure of three", 3, right=0, unsure=3),
        found_in("stock alone has three wrong", 1, right=1),
    ]
    stock = [
        found_in("good", 3, right=3),
        found_in("ours misses two", 3, right=3),
        found_in("both miss one", 3, right=2),
        found_in("both are unsure of three", 3, right=0, unsure=3),
        found_in("stock alone has three wrong", 1, right=1, wrong=3),
    ]
    ranked = pictures.worst(ours, stock)
    assert ranked == [
        "both are unsure of three",
        "both miss one",
        "ours misses two",
        "stock alone has three wrong",
        "good",
    ]
    assert pictures.worst(ours, stock, count=2) == ranked[:2]
    assert pictures.worst(stock, ours) == ranked  # neither network is favoured by the choice


def test_a_true_box_is_found_once_by_a_detection_of_its_class() -> None:
    true = np.array([[0, 0, 10, 10, 0], [50, 50, 60, 60, 1], [80, 0, 90, 10, 0]], dtype=np.float32)
    found = np.array(
        [
            [0, 0, 10, 9, 0.9, 0],  # on the first
            [1, 1, 10, 10, 0.8, 0],  # on the first again
            [50, 50, 60, 60, 0.7, 0],  # on the second, of another class
            [83, 0, 93, 10, 0.6, 0],  # on the third, by 7 of 13
            [80, 6, 90, 16, 0.5, 0],  # by 4 of 16
        ],
        dtype=np.float32,
    )
    told = pictures.drawn(found, true)
    assert [box.right for box in told.found] == [True, False, False, True, False]
    assert [(box.box, box.label) for box in told.missed] == [((50.0, 50.0, 60.0, 60.0), 1)]
    nothing = pictures.drawn(found[:0], true)
    assert (len(nothing.found), len(nothing.missed)) == (0, 3)
    background = pictures.drawn(found, true[:0])
    assert not any(box.right for box in background.found) and not background.missed


@pytest.mark.parametrize(("shape", "copy"), [((60, 100, 3), (60, 100)), ((2000, 960, 3), (480, 230))])
def test_copies_are_small(shape: tuple[int, int, int], copy: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    content = pictures._copy(image)
    assert len(content) < 200_000
    assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape[:2] == copy
