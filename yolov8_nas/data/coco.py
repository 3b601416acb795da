"""COCO's layout of a dataset, in the dialects of the tools that write it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from yolov8_nas.data import coco_rows, images, ledger
from yolov8_nas.data.coco_rows import Annotation, Annotations, Id, Images, one_id
from yolov8_nas.data.faults import Faults
from yolov8_nas.data.ledger import Ledger
from yolov8_nas.data.sample import EMPTY, SPLITS, TWICE, Box, Boxes, Listing, Sample, cut_off, fit
from yolov8_nas.data.text import checked_names, json_lists, shown
from yolov8_nas.data.tree import Places, Walk, is_hidden, parts_of, walk
from yolov8_nas.errors import InputError

PIXEL_TOLERANCE: Final = 1.0
"""How far a box may reach out of its image without a word, in pixels: boxes that count their last pixel or not."""

CROWD: Final = "left out: crowd regions"
IGNORED: Final = "left out: marked to be ignored"
MASK: Final = "used, of masks that are marked as crowds"
ROTATED: Final = "used, upright around rotated ones"
OUTLINE: Final = "used, around outlines without a box"

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "minival"), "val"),
    **dict.fromkeys(("test", "testing", "testdev"), "test"),
}
_BYTES: Final = (8 * 2**20, 256 * 2**10)
_VALUES: Final = (1_000_000, 20_000)
"""Bytes and values of a file of annotations: so many in any case, and so many more for each image that there is."""

_MANY = 50  # JSON files in one folder: a file for each image, as labelme has them, not COCO's
_MOST_CROWDS = 0.5  # COCO's own files mark one box in a hundred as a crowd; tools that mark masks so mark most


def json_files(root: Path) -> list[Path]:
    """JSON files that may be COCO's: in a folder, its `annotations`, and its folders of splits."""
    places = [root, root / "annotations"]
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)):
        if _word(folder.name) or folder.name.lower() in ("annotations", "labels", "json"):
            places += [folder, folder / "annotations", folder / "labels"]
    found: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            names = sorted(name for name in os.listdir(place) if name.lower().endswith(".json") and not is_hidden(name))
            if len(names) <= _MANY:
                found.update(dict.fromkeys(place / name for name in names))
    return [path for path in found if path.is_file()]


def split_of(file: Path, root: Path) -> str | None:
    """The split that a file belongs to: by a word of its own name, or of a folder's."""
    if split := _word(file.stem):
        return split
    stem = file.stem.lower()
    within = {split for word, split in (("train", "train"), ("val", "val"), ("test", "test")) if word in stem}
    if len(within) == 1:
        return within.pop()
    for folder in reversed(file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()):
        if split := _word(folder):
            return split
    return None


def _word(name: str) -> str | None:
    found = {_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in _WORDS}
    return found.pop() if len(found) == 1 else None


@dataclass
class Content:
    """The lists of a JSON file; nothing in the place of one that it lacks."""

    images: Images | None
    annotations: Annotations | None
    categories: list[Any] | None

    def finds_objects(self) -> bool:
        """Whether the annotations are of objects: not captions, and not panoptic segments."""
        if self.categories is None or self.annotations is None:
            return False
        return not len(self.annotations) or self.annotations.first_has_category

    def missing(self) -> str:
        """The first list that is not there, or holds something else than objects."""
        categories = self.categories
        whole = {
            "images": self.images is not None and self.images.sound,
            "annotations": self.annotations is not None and self.annotations.sound,
            "categories": categories is not None and all(isinstance(item, dict) for item in categories),
        }
        return next((key for key, is_whole in whole.items() if not is_whole), "")


@dataclass
class _File:
    """A JSON file.

    Attributes:
        path: Where it lies.
        where: How messages call it.
        images: Its images.
        annotations: Its annotations.
        entries: Its categories as they stand there.
        categories: Their names.
        classes: Its categories, as they are numbered in the dataset.
    """

    path: Path
    where: str
    images: Images
    annotations: Annotations
    entries: Sequence[Mapping[str, Any]]
    categories: dict[Id, str] = field(default_factory=dict)
    classes: dict[Id, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Image:
    """An image as JSON files name it, by however many entries."""

    path: str
    width: int
    height: int
    boxes: Boxes = field(default_factory=Boxes)
    by: tuple[tuple[str, Boxes], ...] = ()  # the boxes that each file has


@dataclass
class _Lists:
    """The JSON files of a dataset, and which split each of them is of; see `CocoReader`."""

    root: Path
    contents: Mapping[Path, Content]
    faults: Faults
    ledger: Ledger
    warnings: list[str]

    def of_splits(self) -> dict[str, list[_File]] | None:
        """The files of each split; those of `train` alone where nothing tells splits apart."""
        found: dict[str | None, list[Path]] = {}
        for path in self.contents:
            found.setdefault(split_of(path, self.root), []).append(path)
        if not any(split in found for split in SPLITS):
            chosen = self._chosen("train", found.get(None, []))
            if chosen:
                names = ", ".join(file.where for file in chosen)
                self.warnings.append(cut_off(names, "keep instances_train.json and instances_val.json"))
            return {"train": chosen} if chosen else None
        files = {split: self._chosen(split, found.get(split, [])) for split in SPLITS}
        return files if all(files.values()) else None

    def _chosen(self, split: str, paths: Sequence[Path]) -> list[_File]:
        """The files of a split that have objects: of several, those named `instances_*` before others."""
        if not paths:
            seen = ", ".join(sorted(shown(path, self.root) for path in self.contents))
            foreign = [shown(path, self.root) for path in json_files(self.root) if path not in self.contents]
            others = f"; without COCO's lists: {', '.join(foreign)}" if foreign else ""
            self.faults.add(
                "annotations", f"none for {split}", f"keep one file instances_{split}.json (there are: {seen}{others})"
            )
            return []
        fitting = [path for path in paths if self.contents[path].finds_objects()]
        if len(fitting) > 1:
            fitting = [path for path in fitting if path.stem.lower().startswith("instances")] or fitting
        for path in fitting or paths[:1]:
            if not self._is_whole(path):
                return []
        if not fitting:
            found = ", ".join(shown(path, self.root) for path in paths)
            self.faults.add(
                found, "no annotation has a category_id", "give the annotations of objects, not captions or segments"
            )
        for path in set(paths) - set(fitting):
            self.ledger.add(
                split, "labels", "skipped: files without objects, or beside instances", shown(path, self.root)
            )
        return [self._file(path) for path in fitting]

    def _is_whole(self, path: Path) -> bool:
        if missing := self.contents[path].missing():
            self.faults.add(
                shown(path, self.root), f"no list {missing!r}", "give it COCO's images, annotations and categories"
            )
        return not missing

    def _file(self, path: Path) -> _File:
        content = self.contents[path]
        return _File(
            path,
            shown(path, self.root),
            content.images or Images(),
            content.annotations or Annotations(),
            content.categories or (),
        )


@dataclass
class _Classes:
    """The classes of a dataset; see `CocoReader`."""

    faults: Faults
    ledger: Ledger

    def of(self, files: Mapping[str, Sequence[_File]]) -> tuple[str, ...]:
        """The class names, in the order of train's ids; other files are matched by name."""
        before = self.faults.count
        used: dict[str, set[str]] = {}
        for split, several in files.items():
            for file in several:
                file.categories = self._categories(file)
                ids = file.annotations.categories()
                used.setdefault(split, set()).update(name for i, name in file.categories.items() if i in ids)
        self._leave_out_root([file for several in files.values() for file in several])
        for several in files.values():
            for file in several:
                checked_names(list(file.categories.values()), file.where, self.faults)
        if self.faults.count > before:
            return ()
        names: dict[str, int] = {}
        for split, several in files.items():
            for file in several:
                for i in sorted(file.categories, key=lambda key: (isinstance(key, str), key)):
                    name = file.categories[i]
                    if split == "val" and name not in names:
                        if name in used[split]:
                            self.faults.add(
                                file.where,
                                f"categories differ from train's: {name!r} is not among them",
                                "use the same names in both",
                            )
                        continue
                    file.classes[i] = names.setdefault(name, len(names))
        return tuple(names) if self.faults.count == before else ()

    def _categories(self, file: _File) -> dict[Id, str]:
        categories: dict[Id, str] = {}
        for category in file.entries:
            i, name = one_id(category.get("id")), str(category.get("name", "")).strip()
            if i is None or categories.get(i, name) != name:
                self.faults.add(file.where, "categories without an id of their own", "give each an id and name")
                return {}
            categories[i] = name
        if not categories:
            self.faults.add(file.where, "categories without an id of their own", "give each an id and name")
        return categories

    def _leave_out_root(self, files: Sequence[_File]) -> None:
        """Leave out the category above all others that Roboflow adds, where no box has it."""
        roots = [(file, root) for file in files if (root := _root_category(file.entries)) is not None]
        if len({file.categories.get(root) for file, root in roots}) != 1:
            return
        if any(root in file.annotations.categories() for file, root in roots):
            return
        for file, root in roots:
            name = file.categories.pop(root, "")
            self.ledger.add("train", "labels", "skipped: the category above all others, without boxes", name)


@dataclass
class CocoReader:
    """Reads a dataset.

    Attributes:
        root: Its folder.
        contents: Its JSON files, and what they hold.
        faults: Takes what is wrong.
    """

    root: Path
    contents: Mapping[Path, Content]
    faults: Faults
    ledger: Ledger = field(default_factory=Ledger)
    warnings: list[str] = field(default_factory=list)

    def read(self) -> Listing | None:
        """The listing, or nothing where the faults leave nothing to read."""
        files = _Lists(self.root, self.contents, self.faults, self.ledger, self.warnings).of_splits()
        if files is None:
            return None
        names = _Classes(self.faults, self.ledger).of(files)
        if not names:
            return None
        tree = walk(self.root)
        places = Places(tree.files)
        samples = {split: self._samples(split, files[split], places) for split in files}
        self._leftover(tree, samples)
        return Listing(names, samples, self.ledger, tuple(self.warnings))

    def _samples(self, split: str, files: Sequence[_File], places: Places) -> list[Sample]:
        found: dict[str, _Image] = {}
        sizeless = 0
        for file in files:
            named, without = self._images(split, file, places)
            sizeless += without
            mine: dict[str, _Image] = {}
            for i, image in named.items():
                if image is not None:
                    named[i] = mine.setdefault(image.path, image)
                    if named[i] is not image:
                        where = shown(image.path, self.root)
                        self.ledger.add(split, "labels", "put together: further entries of an image", where)
            self._boxes(split, file, named)
            file.annotations.clear()
            for path, image in mine.items():
                self._merge(file, found, path, image)
        if sizeless:
            self.warnings.append(
                f"{', '.join(file.where for file in files)}: {sizeless} images without width and height; "
                "those of their files are taken"
            )
        if not any(file.images for file in files):
            empty = "the validation split is empty" if split == "val" else "no images"
            self.faults.add(", ".join(file.where for file in files), empty, "add images to it")
        for what, text in ((CROWD, "crowd regions"), (EMPTY, "boxes without a size"), (IGNORED, "ignored regions")):
            if count := self.ledger.count(split, "boxes", what):
                self.warnings.append(f"{', '.join(file.where for file in files)}: {count} {text} left out")
        self.ledger.see(split, len(found))
        return [
            Sample(path, shown(path, self.root), image.boxes, True, (image.width, image.height))
            for path, image in sorted(found.items())
        ]

    def _images(self, split: str, file: _File, places: Places) -> tuple[dict[Id, _Image | None], int]:
        """The images of a file by id; nothing for one with a fault, so that its boxes are no faults, too."""
        folders = self._folders(split, file)
        found: dict[Id, _Image | None] = {}
        sizeless = 0
        for entry in file.images:
            i, where = one_id(entry.id), f"{file.where}, image {entry.id!r}"
            if i is None or i in found:
                self.faults.add(where, f"id = {entry.id!r}", "give every image an id of its own")
                continue
            found[i] = None
            name = entry.name
            if not isinstance(name, str) or not parts_of(name):
                self.faults.add(where, f"file_name = {name!r}", "give the image's path below the images folder")
                continue
            path = places.find(name, folders)
            if path is None:
                looked = ", ".join(shown(folder, self.root) for folder in folders)
                self.faults.add(
                    where, f"file_name = {name!r} is not in {looked}", "add the image or take it out of the file"
                )
                continue
            sizes = entry.width, entry.height
            width, height = (coco_rows.whole(size) for size in sizes)
            if sizes == (None, None) and (size := images.pixel_size(Path(path).read_bytes())):
                (width, height), sizeless = size, sizeless + 1
            if not width or not height or width < 0 or height < 0:
                self.faults.add(where, f"width = {sizes[0]!r}, height = {sizes[1]!r}", "give its size in pixels")
                continue
            found[i] = _Image(path, width, height)
        return found, sizeless

    def _boxes(self, split: str, file: _File, named: Mapping[Id, _Image | None]) -> None:
        """Give each image its boxes, one image after the other, so that no more than its own are unpacked."""
        annotations = file.annotations
        all_masks = annotations.crowds() > _MOST_CROWDS * len(annotations)
        of_images = [image for image in dict.fromkeys(named.values()) if image is not None]
        numbers = {image: number for number, image in enumerate(of_images)}
        owners = np.full(len(annotations), -1)
        for place, i in enumerate(annotations.images()):
            if i is None or i not in named:
                annotation = annotations[place]
                self.faults.add(
                    f"{file.where}, annotation {annotation.id!r}",
                    f"image_id = {annotation.image!r} is no image of the file",
                    "correct it or take it out",
                )
            elif (image := named[i]) is not None:
                owners[place] = numbers[image]
        order = np.argsort(owners, kind="stable")
        ends = np.searchsorted(owners[order], np.arange(len(of_images) + 1))
        for image, start, end in zip(of_images, ends, ends[1:], strict=False):
            boxes: dict[Box, None] = {}
            for place in order[start:end].tolist():
                self._add(split, file, annotations[place], image, boxes, all_masks)
            image.boxes = Boxes(boxes)

    def _add(
        self, split: str, file: _File, annotation: Annotation, image: _Image, boxes: dict[Box, None], all_masks: bool
    ) -> None:
        """Add the box of an annotation, or note why there is none."""
        where, remark = f"{file.where}, annotation {annotation.id!r}", None
        if annotation.crowd:
            if not all_masks and not annotation.attributes:
                self.ledger.add(split, "boxes", CROWD, where)
                return
            remark = MASK  # CVAT and Datumaro mark every mask as a crowd
        if annotation.ignored:
            self.ledger.add(split, "boxes", IGNORED, where)
            return
        try:
            box, outcome, what = _box(annotation, file.classes, image.width, image.height)
        except InputError as error:
            fault, _, remedy = str(error).partition("; ")
            self.faults.add(where, fault, remedy)
            return
        if box is not None and box in boxes:
            outcome = TWICE
        elif box is not None:
            boxes[box] = None
        self.ledger.add(split, "boxes", outcome or what or remark or "used", where if outcome else "")

    def _merge(self, file: _File, found: dict[str, _Image], path: str, image: _Image) -> None:
        """Add an image that other files may name, too: with the same boxes, none, or those of other classes."""
        known = found.setdefault(path, image)
        mine = image.boxes
        for other, boxes in known.by:
            if boxes and mine and boxes != mine and {b.label for b in boxes} & {b.label for b in mine}:
                self.faults.add(
                    f"{file.where}, {shown(path, self.root)}",
                    f"has other boxes than in {other}",
                    "keep the file that is right, and give the other no split's name",
                )
                break
        if known is not image:
            known.boxes = Boxes(dict.fromkeys([*known.boxes, *mine]))
        known.by = (*known.by, (file.where, mine))

    def _folders(self, split: str, file: _File) -> list[str]:
        """Where a split's images may lie: `images/train`, `images/train2017`, `train2017`, `images`, by the JSON."""
        names = dict.fromkeys((split, file.path.stem.rpartition("_")[2]))
        above = [file.path.parent, file.path.parent.parent]
        bases = [folder for folder in above if folder.is_relative_to(self.root)] or [self.root]
        folders = [self.root / "images" / name for name in names] + [self.root / name for name in names]
        folders += [folder / "images" for folder in bases] + bases
        folders += [self.root / name / "images" for name in names] + [
            self.root / "images",
            self.root / "data",
            self.root,
        ]
        return list(dict.fromkeys(os.fspath(folder) for folder in folders if folder.is_dir()))

    def _leftover(self, tree: Walk, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Account for images that no file names."""
        used = {sample.image for several in samples.values() for sample in several}
        others = [
            parts_of(str(entry.name))[-1:]
            for path, content in self.contents.items()
            if split_of(path, self.root) == "test"
            for entry in content.images or ()
        ]
        tested = {name for names in others for name in names}
        folders = {os.path.dirname(path) for path in used}
        split = next(iter(samples))
        for path in tree.files:
            suffix = os.path.splitext(path)[1].lower()
            if path in used or (suffix not in images.IMAGE_SUFFIXES and os.path.dirname(path) not in folders):
                continue
            parts = Path(path).relative_to(self.root).parts
            place = next((word for part in reversed(parts[:-1]) if (word := _word(part))), None)
            if place == "test" or (place is None and parts[-1] in tested):
                self.ledger.add("test", "files", "skipped: of a split that is not used", shown(path, self.root))
                continue
            owner = place if place is not None and place in samples else split
            self.ledger.see(owner, 1)
            if suffix not in images.IMAGE_SUFFIXES:
                what = images.UNREAD_SUFFIXES.get(suffix, "no images")
                outcome = f"skipped: {what} ({suffix or 'without an ending'})"
                self.ledger.add(owner, "files", outcome, shown(path, self.root))
                continue
            self.ledger.add(
                owner,
                "files",
                "skipped: images that no JSON file names",
                shown(path, self.root),
                alarm="add them to the annotations, or take them out",
            )
        for path in tree.hidden:
            self.ledger.see(split, 1)
            self.ledger.add(split, "files", ledger.HIDDEN, shown(path, self.root))
        for path, why in tree.unusable.items():
            self.ledger.see(split, 1)
            self.ledger.add(
                split, "files", f"skipped: {why}", shown(path, self.root), alarm="put it there, or take it out"
            )


def read_contents(paths: Iterable[Path], root: Path, faults: Faults) -> dict[Path, Content]:
    """What JSON files hold, of those that can be COCO's."""
    contents = {}
    count: int | None = None
    lists = {"images": Images, "annotations": Annotations, "categories": list}
    for path in paths:
        if count is None and path.stat().st_size > _VALUES[0]:  # a value has a byte at least: most files need no count
            count = sum(os.path.splitext(file)[1].lower() in images.IMAGE_SUFFIXES for file in walk(root).files)
        most_bytes, most_values = (least + (count or 0) * each for least, each in (_BYTES, _VALUES))
        found = json_lists(path, shown(path, root), faults, lists, most_bytes, most_values)
        parts = [found.get(key) if isinstance(found.get(key), of) else None for key, of in lists.items()]
        if any(part is not None for part in parts):
            contents[path] = Content(*parts)
    return contents


def _root_category(entries: Sequence[Mapping[str, Any]]) -> Id | None:
    """The id of a category that all others stand below, and which stands below none."""
    for entry in entries:
        name, others = str(entry.get("name", "")).strip(), [other for other in entries if other is not entry]
        if (
            others
            and str(entry.get("supercategory") or "none").strip() == "none"
            and all(str(other.get("supercategory") or "").strip() == name for other in others)
        ):
            return one_id(entry.get("id"))
    return None


def _box(
    annotation: Annotation, classes: Mapping[Id, int], width: int, height: int
) -> tuple[Box | None, str | None, str | None]:
    """An annotation as a box, or nothing where nothing of it is left; what became of it; and what it is of."""
    category = one_id(annotation.category)
    if category is None or category not in classes:
        value = annotation.category
        raise InputError(f"category_id = {value!r} is no category of the file; correct it or add the category")
    corners, what = annotation.corners, OUTLINE if annotation.outlined else None
    numbers = [coco_rows.number(value) for value in corners] if isinstance(corners, list) else []
    if len(numbers) != 4 or None in numbers:
        raise InputError(f"bbox = {corners!r}; give four finite numbers: left, top, width, height in pixels")
    left, top, box_width, box_height = (number for number in numbers if number is not None)
    x, y = left + box_width / 2, top + box_height / 2
    if (turned := annotation.rotation) and turned % 360 and box_width > 0 and box_height > 0:
        cos, sin = abs(math.cos(math.radians(turned))), abs(math.sin(math.radians(turned)))
        box_width, box_height = box_width * cos + box_height * sin, box_width * sin + box_height * cos
        what = ROTATED
    shares = x / width, y / height, box_width / width, box_height / height
    try:
        box, outcome = fit(classes[category], *shares, (PIXEL_TOLERANCE / width, PIXEL_TOLERANCE / height))
    except InputError as error:
        raise InputError(f"box {corners} {error} ({width} x {height} pixels)") from None
    return box, outcome, what
