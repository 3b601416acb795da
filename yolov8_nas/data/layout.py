"""Which layout a dataset is in, and where in its folder it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from yolov8_nas.data.coco import CocoReader
from yolov8_nas.data.faults import Faults
from yolov8_nas.data.sample import Listing
from yolov8_nas.data.yolo_layout import YoloReader


def read(folder: Path, faults: Faults, *, confined: bool) -> Listing | None:
    """Read the dataset in a folder, in whichever layout it is.

    Args:
        folder: The dataset, or a folder with the dataset in its only sub-folder, or the path of a data.yaml.
        faults: Takes what is wrong.
        confined: Whether files outside the folder are refused, as for an archive that came from elsewhere.

    Returns:
        The listing, or nothing where the faults leave nothing to read.
    """
    if folder.is_file():
        return YoloReader(folder, folder.parent, faults, confined).read()
    for root in _roots(folder):
        descriptions = _descriptions(root)
        if len(descriptions) > 1:
            found = ", ".join(path.name for path in descriptions)
            faults.add(found, "more than one description of a dataset", "give the path of the one that is meant")
            return None
        if descriptions:
            return YoloReader(descriptions[0], root, faults, confined).read()
        if any((root / "annotations").glob("*.json")):
            return CocoReader(root, faults).read()
    faults.add(
        "data.yaml",
        "missing, and there is no annotations/*.json either",
        "write a data.yaml with train, val and names (YOLO layout), or put COCO annotations beside the images",
    )
    return None


def _roots(folder: Path) -> Iterator[Path]:
    """Where the dataset may lie: in the folder, or in a chain of only sub-folders below."""
    while True:
        yield folder
        below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
        if len(below) != 1:
            return
        folder = below[0]


def _descriptions(root: Path) -> list[Path]:
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (root / name).is_file():
            return [root / name]
    yamls = sorted(path for path in root.iterdir() if path.suffix in {".yaml", ".yml"} and path.is_file())
    return [path for path in yamls if not path.name.startswith(".")]
