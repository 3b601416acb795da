"""COCO's layout of a dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from yolov8_nas.data.faults import Faults
from yolov8_nas.data.sample import IMAGE_SUFFIXES, SPLITS, Box, Listing, Sample, clipped
from yolov8_nas.data.text import checked_names, shown
from yolov8_nas.errors import InputError
from yolov8_nas.reading import read_json

PIXEL_TOLERANCE: Final = 1.0
"""How far a COCO box may reach out of its image, in pixels: boxes that count their last pixel or not, clipped."""


_BYTES: Final = (8 * 2**20, 256 * 2**10)
_VALUES: Final = (1_000_000, 20_000)
"""Bytes and values of a file of annotations: so many in any case, and so many more for each image that there is."""


@dataclass
class CocoReader:
    """Reads COCO's layout: annotations in JSON, and folders of images."""

    root: Path
    faults: Faults
    warnings: list[str] = field(default_factory=list)

    def read(self) -> Listing | None:
        """The listing, or nothing where the faults leave nothing to read."""
        files = {split: self._file(split) for split in SPLITS}
        contents = {split: self._content(file) for split, file in files.items() if file}
        if len(contents) < len(SPLITS) or None in contents.values():
            return None
        train = contents["train"]
        assert train is not None
        categories = self._categories(train, files["train"])
        if not categories:
            return None
        samples = {}
        for split, content in contents.items():
            file = files[split]
            assert content is not None and file is not None
            if self._categories(content, file) != categories:
                self.faults.add(
                    shown(file, self.root), "categories differ from train's", "use the same ids and names in both"
                )
                return None
            samples[split] = self._samples(split, file, content, {c: i for i, c in enumerate(sorted(categories))})
        return Listing(tuple(categories[c] for c in sorted(categories)), samples, tuple(self.warnings))

    def _file(self, split: str) -> Path | None:
        """The annotations of a split: the JSON whose name holds the split's, `instances_*` before others."""
        files = sorted(path for path in (self.root / "annotations").glob("*.json") if split in path.stem.lower())
        instances = [path for path in files if path.stem.lower().startswith("instances")]
        files = instances or files
        if len(files) == 1:
            return files[0]
        what = f"several for {split}: {', '.join(path.name for path in files)}" if files else f"none for {split}"
        self.faults.add("annotations", what, f"keep one file instances_{split}.json")
        return None

    def _content(self, file: Path) -> dict[str, Any] | None:
        where_file = shown(file, self.root)
        try:
            bytes_, values = self._bounds(file)
            content = read_json(file, most_bytes=bytes_, most_values=values)
        except InputError as error:
            self.faults.add(where_file, str(error).removeprefix(f"{file}: "), "correct it or export it again")
            return None
        except OSError as error:
            self.faults.add(where_file, f"cannot be read ({error.strerror})", "make it readable")
            return None
        for key in ("images", "annotations", "categories"):
            part = content.get(key) if isinstance(content, dict) else None
            if not isinstance(part, list) or not all(isinstance(item, dict) for item in part):
                self.faults.add(where_file, f"no list {key!r}", "give it COCO's images, annotations and categories")
                return None
        return dict(content)

    def _bounds(self, file: Path) -> tuple[int, int]:
        """Most bytes and values of a file: annotations grow with the images, and a bomb has none."""
        images = 0
        if file.stat().st_size > _VALUES[0]:  # a value has a byte at least, so that most files are not worth a count
            images = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in self.root.rglob("*"))
        return _BYTES[0] + images * _BYTES[1], _VALUES[0] + images * _VALUES[1]

    def _categories(self, content: dict[str, Any], file: Path | None) -> dict[int, str]:
        assert file is not None
        categories = {c["id"]: str(c.get("name", "")) for c in content["categories"] if isinstance(c.get("id"), int)}
        if not categories or len(categories) != len(content["categories"]):
            self.faults.add(shown(file, self.root), "categories without an id of their own", "give each an id and name")
            return {}
        before = self.faults.count
        checked_names(list(categories.values()), shown(file, self.root), self.faults)
        return categories if self.faults.count == before else {}

    def _samples(self, split: str, file: Path, content: dict[str, Any], labels: dict[int, int]) -> list[Sample]:
        where_file = shown(file, self.root)
        folders = self._folders(split, file)
        boxes: dict[Any, list[Box]] = {}
        images: dict[Any, tuple[str, Path, int, int]] = {}
        for image in content["images"]:
            where = f"{where_file}, image {image.get('id')!r}"
            if not isinstance(image.get("id"), int | str) or image["id"] in boxes:
                self.faults.add(where, f"id = {image.get('id')!r}", "give every image an id of its own")
                continue
            boxes[image["id"]] = []
            name, width, height = image.get("file_name"), image.get("width"), image.get("height")
            if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                self.faults.add(where, f"file_name = {name!r}", "give the image's path below the images folder")
                continue
            if not isinstance(width, int) or not isinstance(height, int) or width <= 0 or height <= 0:
                self.faults.add(where, f"width = {width!r}, height = {height!r}", "give its size in pixels")
                continue
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is None:
                looked = ", ".join(shown(folder, self.root) for folder in folders)
                self.faults.add(where, f"{name!r} is not in {looked}", "add the image or take it out of the file")
                continue
            images[image["id"]] = (name, path, width, height)
        crowds = empty = 0
        for annotation in content["annotations"]:
            image_id = annotation.get("image_id")
            where = f"{where_file}, annotation {annotation.get('id')!r}"
            if not isinstance(image_id, int | str) or image_id not in boxes:
                self.faults.add(where, f"image_id = {image_id!r} is no image of the file", "correct it or take it out")
            elif image_id in images and annotation.get("iscrowd"):
                crowds += 1
            elif image_id in images:
                _, _, width, height = images[image_id]
                try:
                    box = _coco_box(annotation, labels, width, height)
                except InputError as error:
                    what, _, remedy = str(error).partition("; ")
                    self.faults.add(where, what, remedy)
                    continue
                if box is None:
                    empty += 1
                elif box not in boxes[image_id]:
                    boxes[image_id].append(box)
        for count, what in ((crowds, "crowd regions"), (empty, "boxes without a size")):
            if count:
                self.warnings.append(f"{where_file}: {count} {what} left out")
        if not content["images"]:
            empty_split = "the validation split is empty" if split == "val" else "no images"
            self.faults.add(where_file, empty_split, "add images to it")
        return [
            Sample(path, shown(path, self.root), tuple(boxes[i]), (width, height))
            for i, (_, path, width, height) in sorted(images.items(), key=lambda item: item[1][0])
        ]

    def _folders(self, split: str, file: Path) -> list[Path]:
        """Where a split's images may lie: `images/train`, `images/train2017`, `train2017`, `images`, or the root."""
        names = dict.fromkeys((split, file.stem.rpartition("_")[2]))
        folders = [self.root / "images" / name for name in names] + [self.root / name for name in names]
        return [folder for folder in [*folders, self.root / "images", self.root] if folder.is_dir()]


def _coco_box(annotation: dict[str, Any], labels: dict[int, int], width: int, height: int) -> Box | None:
    """A COCO annotation as a box, or nothing where it has no size (the published COCO files hold a few)."""
    category, corners = annotation.get("category_id"), annotation.get("bbox")
    if not isinstance(category, int) or category not in labels:
        raise InputError(f"category_id = {category!r} is no category of the file; correct it or add the category")
    if (
        not isinstance(corners, list)
        or len(corners) != 4
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in corners)
    ):
        raise InputError(f"bbox = {corners!r}; give four finite numbers: left, top, width, height in pixels")
    left, top, box_width, box_height = corners
    if box_width <= 0 or box_height <= 0:
        return None
    return clipped(
        labels[category],
        (left + box_width / 2) / width,
        (top + box_height / 2) / height,
        box_width / width,
        box_height / height,
        (PIXEL_TOLERANCE / width, PIXEL_TOLERANCE / height),
        f"{corners}",
    )
