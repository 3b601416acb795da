"""The normalised dataset that every later stage reads: written once, described by `dataset.json`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from yolov8_nas.data.check import SPLITS, CheckedDataset, CheckedImage
from yolov8_nas.data.images import normal
from yolov8_nas.data.sample import Box
from yolov8_nas.files import atomic_write, canonical_digest, file_sha256, tree_files, write_file
from yolov8_nas.runner.results import DatasetResult


def write(checked: CheckedDataset, folder: Path, progress: Callable[[int, int], None] | None = None) -> DatasetResult:
    """Write a checked dataset in its normal form.

    The same images, labels and class names give the same bytes, wherever they came from.

    Args:
        checked: The dataset, its source still open.
        folder: Where to write `dataset/` and `dataset.json`.
        progress: Is told how many images of how many have been written.
    """
    root = folder / "dataset"
    total, done = sum(checked.images.values()), 0
    for split in SPLITS:
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for image in checked.splits[split]:
            name = _name(image)
            data = normal(image.file.read_bytes(), image.facts, checked.ranges)
            write_file(images / f"{name}{image.facts.suffix}", data)
            write_file(labels / f"{name}.txt", "".join(format_row(box) for box in image.boxes))
            done += 1
            if progress:
                progress(done, total)
    everything = [image for images in checked.splits.values() for image in images]
    sides = np.array([(image.width, image.height) for image in everything])
    boxes = np.sqrt([box.width * box.height for image in everything for box in image.boxes])
    described = DatasetResult(
        digest=_digest(root, checked.names),
        source=checked.source,
        classes=checked.names,
        images=checked.images,
        boxes=checked.boxes,
        image_sides={
            "smallest": sides.min(axis=0).tolist(),
            "median": np.median(sides, axis=0).astype(int).tolist(),
            "largest": sides.max(axis=0).tolist(),
        },
        box_sides=tuple(round(float(q), 4) for q in np.quantile(boxes, (0.05, 0.25, 0.5, 0.75, 0.95))),
        warnings=checked.warnings,
        ledger=checked.ledger,
        converted=checked.remarks,
    )
    described.write(folder)
    return described


def load(folder: Path) -> DatasetResult:
    """Read `dataset.json` in a folder.

    Raises:
        InputError: It describes no dataset.
    """
    return DatasetResult.read(folder)


def data_yaml(
    dataset_dir: Path,
    into: Path,
    validate_on: Literal["search", "val"],
    train_on: Sequence[Literal["train", "search"]] = ("train",),
    held_out: tuple[int, int] | None = None,
) -> Path:
    """Make a view of the dataset that Ultralytics can train and validate on.

    Ultralytics writes its label caches beside the labels it was pointed at, and repairs images in place. The dataset
    is a stage's verified output and must not change, so the view is a tree of links, and the caches land in it. It is
    made once and used again as long as it shows the same dataset.

    Args:
        dataset_dir: The folder that holds `dataset.json`.
        into: The caller's own folder; views with other splits have folders of their own in it.
        validate_on: The split that becomes the view's `val`.
        train_on: The splits that together become its `train`.
        held_out: A fold of the images to train on, and the number of folds, from 0: those images become part of the
            view's `val` instead.

    Returns:
        The path of the view's `data.yaml`, absolute, as are the paths in it.
    """
    # With a dot: checkpoints in the same folder may travel to another machine, links may not.
    fold = f"-fold-{held_out[0]}-of-{held_out[1]}" if held_out else ""
    view = into.absolute() / f".data-{'-'.join(train_on)}-{validate_on}{fold}"
    source = dataset_dir.resolve() / "dataset"
    dataset = load(dataset_dir)
    description = {
        "path": str(view),
        "train": str(view / "images" / "train"),
        "val": str(view / "images" / "val"),
        "names": dict(enumerate(dataset.classes)),
        "made_from": {"folder": str(source), "digest": dataset.digest},
    }
    text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
    path = view / "data.yaml"  # written last: where it is, the view is whole
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return path
    if view.exists():
        shutil.rmtree(view)
    for kind in ("images", "labels"):
        for name in ("train", "val"):
            (view / kind / name).mkdir(parents=True)
        for split in dict.fromkeys((*train_on, validate_on)):
            kept_back = _fold(source / "labels" / split, *held_out) if held_out and split in train_on else frozenset()
            for file in sorted((source / kind / split).iterdir()):
                names = ["val"] if file.stem in kept_back else ["train"] * (split in train_on)
                names += ["val"] * (split == validate_on and "val" not in names)
                for name in names:
                    (view / kind / name / file.name).symlink_to(file)
    atomic_write(path, text)
    return path


def _fold(labels: Path, fold: int, folds: int) -> frozenset[str]:
    """The images of one fold of a split, as evenly among those with boxes as among those without.

    In the order of their content's digests, so that neither names nor order of a data set tell which they are. Of a
    kind of which there are fewer than folds all stay to be trained on.
    """
    chosen: set[str] = set()
    files = sorted(labels.iterdir(), key=lambda file: file.stem[-12:])
    for with_boxes in (True, False):
        kind = [file.stem for file in files if (file.stat().st_size > 0) == with_boxes]
        if len(kind) >= folds:
            chosen.update(kind[fold::folds])
    return frozenset(chosen)


def format_row(box: Box) -> str:
    """A box as a row of a YOLO label file; reading it gives the same box to nine digits."""
    return f"{box.label} {box.x:.9g} {box.y:.9g} {box.width:.9g} {box.height:.9g}\n"


def _name(image: CheckedImage) -> str:
    """A file name for people and machines: what is plain in the old one, made unique by content."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", image.file.stem)[:48].strip("_")
    return f"{plain or 'image'}-{image.sha256[:12]}"


def _digest(root: Path, names: Sequence[str]) -> str:
    files = {name: file_sha256(path) for name, path in tree_files(root).items()}
    return canonical_digest({"classes": list(names), "files": files})
