"""YOLO's layout of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from yolov8_nas.data.faults import Faults
from yolov8_nas.data.sample import IMAGE_SUFFIXES, SPLITS, Box, Listing, Sample
from yolov8_nas.data.text import MOST_CLASSES, checked_names, lines, shown
from yolov8_nas.data.yolo_rows import parse_row
from yolov8_nas.errors import InputError
from yolov8_nas.yaml_text import read_yaml

_LISTS: Final = 32 * 2**20
"""Bytes of a text file that lists images."""


@dataclass
class YoloReader:
    """Reads YOLO's layout: a description, usually `data.yaml`, folders of images, and a label file for each image."""

    description: Path
    root: Path
    faults: Faults
    confined: bool
    warnings: list[str] = field(default_factory=list)

    def read(self) -> Listing | None:
        """The listing, or nothing where the faults leave nothing to read."""
        data = self._description()
        if data is None:
            return None
        names = self._names(data)
        base = self._base(data)
        samples: dict[str, Sequence[Sample]] = {}
        for split in SPLITS:
            value = data.get(split)
            if split == "val" and value is None:
                value = data.get("validation")
            if value is None or value == [] or value == "":
                self.faults.add(
                    self.description.name,
                    f"{split} is missing",
                    f"add a line such as `{split}: images/{split}`"
                    + (" (final figures need images that training never saw)" if split == "val" else ""),
                )
                continue
            images = self._images(split, value, base)
            if images is not None and names:
                samples[split] = [self._sample(image, len(names)) for image in images]
        return Listing(names, samples, tuple(self.warnings)) if names and len(samples) == len(SPLITS) else None

    def _description(self) -> dict[str, Any] | None:
        try:
            data = read_yaml(self.description, "a dataset's description")
        except InputError as error:
            self.faults.add(self.description.name, str(error).removeprefix(f"{self.description}: "), "correct the file")
            return None
        if not isinstance(data, dict):
            self.faults.add(self.description.name, f"holds {data!r:.200}", "give it the keys train, val and names")
            return None
        return data

    def _names(self, data: dict[str, Any]) -> tuple[str, ...]:
        where, names, count = self.description.name, data.get("names"), data.get("nc")
        if isinstance(names, dict):
            wanted = list(range(len(names)))
            if sorted(names, key=str) != sorted(wanted, key=str):
                self.faults.add(
                    where, f"names has the keys {list(names)!s:.200}", "number the classes from 0, without gaps"
                )
                return ()
            names = [names[i] for i in wanted]
        if names is None and isinstance(count, int) and 0 < count <= MOST_CLASSES:
            names = [f"class_{i}" for i in range(count)]
            self.warnings.append(f"{where}: no names; the {count} classes are called class_0, class_1, ...")
        if not isinstance(names, list) or not names:
            self.faults.add(where, f"names = {names!r:.200}", "list the class names")
            return ()
        if isinstance(count, int) and count != len(names):
            self.faults.add(
                where, f"nc = {count}, but there are {len(names)} names", "make them agree, or leave out nc"
            )
        return checked_names([str(name) for name in names], where, self.faults)

    def _base(self, data: dict[str, Any]) -> Path:
        """The folder that train and val are relative to: `path` where it leads somewhere, else the description's."""
        path = data.get("path")
        if isinstance(path, str) and path and (self.root / path).is_dir() and not self._outside(self.root / path):
            return self.root / path
        return self.root

    def _outside(self, path: Path) -> bool:
        return self.confined and not path.resolve().is_relative_to(self.root.resolve())

    def _images(self, split: str, value: Any, base: Path) -> list[Path] | None:
        where = self.description.name
        entries = value if isinstance(value, list) else [value]
        faults_before = self.faults.count
        images: dict[Path, None] = {}  # a set that keeps its order
        for entry in entries:
            if not isinstance(entry, str):
                self.faults.add(where, f"{split} = {entry!r}", "give a folder of images or a text file that lists them")
                return None
            place = base / entry
            # Some tools write `../train/images` for a folder that lies beside the description.
            if not place.exists() and entry.startswith("../") and (base / entry[3:]).exists():
                place = base / entry[3:]
            if self._outside(place):
                self.faults.add(where, f"{split}: {entry} lies outside the dataset", "put the images into the archive")
                return None
            if place.is_dir():
                found = [path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")]
                images.update(dict.fromkeys(sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES)))
            elif place.is_file() and place.suffix.lower() in IMAGE_SUFFIXES:
                images[place] = None
            elif place.is_file():
                images.update(dict.fromkeys(self._listed(place, base)))
            else:
                self.faults.add(where, f"{split}: {entry} does not exist", "correct the path or add the folder")
                return None
        if not images and self.faults.count == faults_before:
            kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            empty = "the validation split is empty" if split == "val" else "no images"
            self.faults.add(f"{where}, {split}: {value}", empty, f"put images there ({kinds})")
        return list(images) or None

    def _listed(self, file: Path, base: Path) -> Iterator[Path]:
        """The images that a text file names, one a line: absolute, or relative to the file or to the dataset."""
        for number, line in lines(file, shown(file, self.root), self.faults, _LISTS):
            name = line.strip()
            candidates = [file.parent / name, base / name]
            path = next((path for path in candidates if path.is_file()), None)
            where = f"{shown(file, self.root)}, line {number}"
            if path is None:
                self.faults.add(where, f"{name!r} does not exist", "correct the path or take out the line")
            elif self._outside(path):
                self.faults.add(where, f"{name!r} lies outside the dataset", "put the image into the archive")
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                self.faults.add(where, f"{name!r} is not an image", "take out the line")
            else:
                yield path

    def _sample(self, image: Path, classes: int) -> Sample:
        labels = label_file(image)
        boxes: dict[Box, None] = {}  # a row that stands there twice counts once
        if labels.is_file() and not self._outside(labels):
            where = shown(labels, self.root)
            for number, line in lines(labels, where, self.faults):
                try:
                    boxes[parse_row(line, classes)] = None
                except InputError as error:
                    what, _, remedy = str(error).partition("; ")
                    self.faults.add(f"{where}, line {number}", what, remedy)
        return Sample(image, shown(image, self.root), tuple(boxes))


def label_file(image: Path) -> Path:
    """Where YOLO's layout keeps an image's labels: the last folder `images` of the path read as `labels`."""
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts) / f"{image.stem}.txt"
