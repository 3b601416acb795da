"""The demo's pictures: reproducible, with exact boxes, of the stated kind and number."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov8_nas.data import demo
from yolov8_nas.data.demo import CLASSES, make_demo, render
from yolov8_nas.errors import InputError
from yolov8_nas.files import tree_digest


def test_same_seed_same_bytes_other_seed_other_pictures(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_demo(tmp_path / name, images=4, size=64, seed=seed)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")
    assert tree_digest(tmp_path / "a") != tree_digest(tmp_path / "c")


def test_a_larger_demo_contains_the_smaller(tmp_path: Path) -> None:
    make_demo(tmp_path / "small", images=4, size=64)
    make_demo(tmp_path / "large", images=6, size=64)
    for picture in (tmp_path / "small").rglob("*.png"):
        twin = tmp_path / "large" / picture.relative_to(tmp_path / "small")
        assert twin.read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(("images", "share", "val"), [(2, 0.5, 1), (8, 0.25, 2), (10, 0.3, 3)])
def test_val_share(tmp_path: Path, images: int, share: float, val: int) -> None:
    make_demo(tmp_path, images=images, size=64, val_share=share)
    assert len(list((tmp_path / "images/val").iterdir())) == val
    assert len(list((tmp_path / "images/train").iterdir())) == images - val
    for picture in (tmp_path / "images").rglob("*.png"):
        assert cv2.imread(str(picture)).shape == (64, 64, 3)


def test_every_class_is_there_and_boxes_keep_to_the_stated_sizes() -> None:
    counts: Counter[int] = Counter()
    for i in range(40):
        picture, defects = render(160, np.random.default_rng((0, i)))
        assert picture.shape == (160, 160, 3) and picture.dtype == np.uint8
        assert 60 < picture.mean() < 220 and picture.std() > 5, "too dark, too bright or without texture"
        counts.update(d.label for d in defects)
        for d in defects:
            assert 0 <= d.left < d.right <= 160 and 0 <= d.top < d.bottom <= 160
            assert min(d.right - d.left, d.bottom - d.top) >= 0.1 * 160
            assert max(d.right - d.left, d.bottom - d.top) <= 0.55 * 160
        for i, a in enumerate(defects):
            for b in defects[:i]:
                assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top, "overlap"
    assert set(counts) == set(range(len(CLASSES)))
    assert min(counts.values()) >= 8


@pytest.mark.parametrize("label", range(len(CLASSES)))
@pytest.mark.parametrize("metal", [True, False])
def test_boxes_are_tight_around_what_drawing_changed(label: int, metal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a plain surface without light and noise, a box holds every visible pixel of its defect and no empty border."""
    surface = np.full((160, 160, 3), 140, np.float32)
    drawn = []

    def paint(picture: np.ndarray, *rest: object) -> np.ndarray:
        drawn.append((picture, original(picture, *rest)))
        return drawn[-1][1]

    original = demo._PAINTERS[label]
    monkeypatch.setattr(demo, "_PAINTERS", (paint,) * len(CLASSES))
    monkeypatch.setattr(demo, "_metal", lambda *_: surface)
    monkeypatch.setattr(demo, "_fabric", lambda *_: surface)
    monkeypatch.setattr(demo, "_DEFECTS_PER_IMAGE", (0, 1, 0, 0, 0))
    seen = 0
    for seed in range(8):
        drawn.clear()
        _, defects = render(160, np.random.default_rng((seed, label, metal)))
        for d in defects:
            before, after = drawn[-1]
            rows, columns = np.nonzero(np.abs(after - before).max(axis=2) > 8)
            assert (d.left, d.top, d.right, d.bottom) == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )
            seen += 1
    assert seen >= 4


@pytest.mark.parametrize("arguments", [{"images": 1}, {"size": 20}, {"val_share": 0.0}, {"val_share": 1.0}])
def test_arguments_that_make_no_dataset(tmp_path: Path, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give at least"):
        make_demo(tmp_path / "demo", **arguments)
    assert not (tmp_path / "demo").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("somebody's")
    with pytest.raises(InputError, match="give a new or an empty folder"):
        make_demo(tmp_path, images=2, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["data.yaml"]
