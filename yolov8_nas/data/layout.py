"""Which layout a dataset is in, and where in its folder it lies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from yolov8_nas.data import coco, images, yolo_layout
from yolov8_nas.data.coco import CocoReader
from yolov8_nas.data.faults import Faults
from yolov8_nas.data.known import Known
from yolov8_nas.data.sample import Listing
from yolov8_nas.data.text import description, shown
from yolov8_nas.data.tree import folders, is_hidden, walk
from yolov8_nas.data.yolo_layout import YoloReader

_DEPTH: Final = 4
"""How many folders deep a dataset is looked for."""

_DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_FOREIGN: Final = {
    ".xml": "XML files, as Pascal VOC has them",
    ".csv": "CSV files",
    ".tfrecord": "TFRecords",
    ".parquet": "Parquet files",
    ".txt": "text files",
    ".json": "JSON files that are not COCO's",
    ".names": "lists of names, as Darknet has them",
    ".data": "descriptions of Darknet",
    ".zip": "archives that are not unpacked",
    ".tar": "archives that are not unpacked",
}


@dataclass(frozen=True)
class _Found:
    """A dataset that was found: its folder, and its description or its JSON files."""

    root: Path
    description: Path | None
    contents: dict[Path, Any]


def read(source: Path, faults: Faults, *, confined: bool, known: Known | None = None) -> Listing | None:
    """Read a dataset, in whichever layout it is.

    Args:
        source: The dataset, or a folder with the dataset somewhere below, or the path of a data.yaml or of a JSON file.
        faults: Takes what is wrong.
        confined: Whether files outside the folder are refused, as for an archive that came from elsewhere.
        known: What an earlier check found in the dataset's label files.

    Returns:
        The listing, or nothing where the faults leave nothing to read.
    """
    if source.is_file():
        return _read_file(source, faults, confined, known or Known(None))
    unreadable = Faults()
    for level in folders(source, _DEPTH):
        found = [one for root in level for one in _look(root, unreadable)]
        if len(found) > 1:
            names = ", ".join(shown(one.description or one.root, source) for one in found)
            faults.add(names, "more than one dataset", "give the path of the one that is meant")
            return None
        if unreadable.count:  # damaged JSON files, which may be a split's
            faults.take(unreadable)
            return None
        if found:
            return _reader(found[0], faults, confined, source, known or Known(None)).read()
    faults.add(
        "data.yaml",
        f"missing, and there are no COCO annotations either (seen: {seen(source)})",
        "write a data.yaml with train, val and names (YOLO layout), or put COCO annotations beside the images",
    )
    return None


def _read_file(source: Path, faults: Faults, confined: bool, known: Known) -> Listing | None:
    if source.suffix.lower() != ".json":
        return YoloReader(source, source.parent, faults, confined, known=known).read()
    root = source.parent
    if root.name.lower() in ("annotations", "labels", "json"):
        root = root.parent
    if coco.split_of(Path(root.name) / "x", Path()) and not coco.split_of(Path(source.name), Path()):
        root = root.parent  # `train/_annotations.coco.json`: the dataset is what lies beside `train`
    split = coco.split_of(source, root)
    others = [
        path for path in coco.json_files(root) if path != source and coco.split_of(path, root) not in (None, split)
    ]
    contents = coco.read_contents([source, *others], root, faults)
    if faults.count:
        return None
    if source not in contents:
        faults.add(source.name, "no list 'images'", "give it COCO's images, annotations and categories")
        return None
    return CocoReader(root, contents, faults).read()


def _look(root: Path, unreadable: Faults) -> list[_Found]:
    """What a folder holds: descriptions of a dataset, else COCO's annotations."""
    if descriptions := _descriptions(root):
        return [_Found(root, path, {}) for path in descriptions]
    contents = coco.read_contents(coco.json_files(root), root, unreadable)
    if contents:
        return [_Found(root, None, contents)]
    instead = yolo_layout.stand_in(root)
    return [_Found(root, instead, {})] if instead else []


def _reader(found: _Found, faults: Faults, confined: bool, top: Path, known: Known) -> YoloReader | CocoReader:
    if found.description is not None:
        return YoloReader(found.description, found.root, faults, confined, top, known)
    return CocoReader(found.root, found.contents, faults)


def _descriptions(root: Path) -> list[Path]:
    """The description in a folder, or several between which nothing decides."""
    for name in _DESCRIPTIONS:
        if (root / name).is_file():
            return [root / name]
    yamls = sorted(path for path in root.iterdir() if path.suffix.lower() in {".yaml", ".yml"} and path.is_file())
    return [path for path in yamls if not is_hidden(path.name) and yolo_layout.fits(description(path, "", Faults()))]


def seen(folder: Path) -> str:
    """What lies in a folder, in words, to help where no layout fits."""
    found = walk(folder if folder.is_dir() else folder.parent)
    kinds: Counter[str] = Counter()
    places: dict[str, str] = {}
    for path in found.files:
        suffix = Path(path).suffix.lower()
        what = (
            "images"
            if suffix in images.IMAGE_SUFFIXES
            else _FOREIGN.get(suffix, images.UNREAD_SUFFIXES.get(suffix, ""))
        )
        if what:
            kinds[what] += 1
            places.setdefault(what, shown(path, folder))
    if not kinds:
        return f"{len(found.files)} files, none of which is an image or a label" if found.files else "nothing"
    return ", ".join(f"{count} {what} such as {places[what]}" for what, count in kinds.most_common())
