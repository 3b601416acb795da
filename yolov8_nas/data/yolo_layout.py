"""YOLO's layout of a dataset: a description (`data.yaml`), folders of images, and a label file for each image."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from yolov8_nas.data import images, ledger
from yolov8_nas.data.faults import Faults
from yolov8_nas.data.known import Known, state
from yolov8_nas.data.ledger import Ledger
from yolov8_nas.data.sample import CLIPPED, SPLITS, TWICE, Box, Boxes, Listing, Sample, cut_off
from yolov8_nas.data.text import MOST_CLASSES, MOST_LISTED, checked_names, description, lines, shown
from yolov8_nas.data.tree import Places, is_hidden, parts_of, walk
from yolov8_nas.data.yolo_rows import ORIENTED, parse_row
from yolov8_nas.data.yolo_rows import VERSION as ROWS
from yolov8_nas.errors import InputError

NO_LABELS: Final = 0.2
"""Share of a split's images without a label file above which a person is warned, where others have boxes."""

MANY_CLIPPED: Final = 0.2
"""Share of boxes that reach out of their images above which something else than boxes may have been written."""

USED: Final = "used"
"""What becomes of a box that is taken as it is written."""

_LISTS = frozenset(
    f"{name}.txt"
    for name in ("classes", "labels", "names", "notes", "requirements", "train", "val", "valid", "test", "trainval")
)
_LABEL_FOLDERS = ("labels", "Labels", "label")
_KEYS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
_NOTHING: Final[tuple[object, ...]] = ("", "null", "~", [])  # what stands for nothing where a path is asked for
_CLASSES = ("classes.txt", "labels/classes.txt")


def stand_in(root: Path) -> Path | None:
    """What can stand for a description that a folder lacks: Darknet's, or a list of classes beside images."""
    for file in sorted(path for path in root.glob("*.data") if path.is_file() and not is_hidden(path.name)):
        if {"train", "names"} <= _darknet(file).keys():
            return file
    found = next((root / name for name in _CLASSES if (root / name).is_file()), None)
    return found if (root / "images").is_dir() else None


def _darknet(file: Path) -> dict[str, Any]:
    """Darknet's description: lines such as `names = data/obj.names`."""
    pairs = (line.partition("=") for _, line in lines(file, "", Faults()))
    return {key.strip().lower(): value.strip() for key, _, value in pairs if value.strip()}


def fits(data: object) -> bool:
    """Whether what a YAML file holds is the description of a dataset."""
    return isinstance(data, dict) and len({"train", "val", "names", "nc"} & data.keys()) >= 2


@dataclass
class _Labels:
    """The label files of a dataset; see `YoloReader`.

    Attributes:
        root: Folder of the dataset.
        faults: Takes what is wrong.
        ledger: Takes what became of files, rows and boxes.
        warnings: Takes what is remarkable.
        known: What an earlier check found.
        outside: Whether a path is refused for lying outside the dataset.
        lists: Text files that list images, and are no labels.
        shared: Pairs of images that have the same label file, in words.
    """

    root: Path
    faults: Faults
    ledger: Ledger
    warnings: list[str]
    known: Known
    outside: Callable[[str | Path], bool]
    lists: set[str] = field(default_factory=set)
    shared: list[str] = field(default_factory=list)
    _folders: dict[str, _LabelFolder] = field(default_factory=dict)
    _image_of: dict[str, str] = field(default_factory=dict)

    def samples(
        self, split: str, paths: Sequence[str], names: tuple[str, ...], keypoints: tuple[int, int] | None
    ) -> list[Sample]:
        rows = _Rows({name: i for i, name in enumerate(names)}, len(names), keypoints)
        samples = [self._sample(split, path, rows) for path in paths]
        bare = [sample.name for sample in samples if not sample.labelled]
        if len(bare) > NO_LABELS * len(samples) and any(sample.boxes for sample in samples):
            expected = os.path.relpath(label_file(Path(next(s.image for s in samples if not s.labelled))), self.root)
            self.warnings.append(
                f"{len(bare)} of {len(samples)} images of {split} have no label file and count as background: "
                f"{ledger.listed(bare)}; if they show objects, put their labels where they are looked for "
                f"({expected}, ...)"
            )
        total = self.ledger.count(split, "boxes")
        clipped = self.ledger.count(split, "boxes", CLIPPED)
        if clipped > MANY_CLIPPED * max(total, 5):
            self.warnings.append(
                f"{clipped} of {total} boxes of {split} reach out of their images and are clipped; "
                "see that they are class, centre and size, not corners"
            )
        if oriented := self.ledger.count(split, "boxes", ORIENTED):
            self.warnings.append(
                f"{oriented} rows of {split} have four corners, as oriented boxes have; "
                "the upright boxes around them are taken"
            )
        return samples

    def _sample(self, split: str, image: str, rows: _Rows) -> Sample:
        boxes = Boxes()
        file = self.of(image)
        if file is not None:
            where = shown(file, self.root)
            if self._image_of.setdefault(file, image) != image:
                self.shared.append(f"{shown(image, self.root)} and {shown(self._image_of[file], self.root)}")
            boxes = self._boxes(split, file, where, rows)
        return Sample(image, shown(image, self.root), boxes, file is not None)

    def _boxes(self, split: str, file: str, where: str, rows: _Rows) -> Boxes:
        """The boxes of a label file: known ones, where it has not changed since nothing in it was to be remarked on."""
        mark = rows.state(file)  # before it is read: what changes meanwhile is read again by the next check
        if boxes := self._known_boxes(file, mark):
            self.ledger.add(split, "boxes", USED, count=len(boxes))
            self.ledger.add(split, "labels", "read, with rows")
            return boxes
        return self._read_boxes(split, file, mark, where, rows)

    def _known_boxes(self, file: str, mark: str) -> Boxes | None:
        packed = self.known.boxes(file, mark)
        try:
            return Boxes.unpacked(packed) if packed else None
        except ValueError:
            return None

    def _read_boxes(self, split: str, file: str, mark: str, where: str, rows: _Rows) -> Boxes:
        found: dict[Box, None] = {}
        count, faults = 0, self.faults.count
        remarks = False
        for number, line in lines(file, where, self.faults):
            count += 1
            try:
                box, outcome, what = parse_row(line, rows.classes, keypoints=rows.keypoints, names=rows.names)
            except InputError as error:
                fault, _, remedy = str(error).partition("; ")
                self.faults.add(f"{where}, line {number}", fault, remedy)
                continue
            if box is not None and box in found:
                outcome = TWICE
            elif box is not None:
                found[box] = None
            remarks = remarks or bool(outcome or what)
            self.ledger.add(split, "boxes", outcome or what or USED, f"{where}, line {number}" if outcome else "")
        self.ledger.add(split, "labels", "read, with rows" if count else "read, empty")
        boxes = Boxes(found)
        if boxes and not remarks and self.faults.count == faults:
            self.known.keep_boxes(file, mark, boxes.packed())
        return boxes

    def of(self, image: str) -> str | None:
        """The label file of an image, where there is one."""
        folder = os.path.dirname(image)
        if folder not in self._folders:
            self._folders[folder] = _LabelFolder.of(folder, self.root)
        file = self._folders[folder].take(os.path.basename(image))
        return None if file is None or self.outside(file) else file

    def leftovers(self, found: Mapping[str, Sequence[str]]) -> None:
        """Account for label files that belong to no image of train or val."""
        taken = {path for folder in self._folders.values() for path in folder.taken}
        looked = {*taken, *self.lists}
        stems: dict[str, set[str]] = {}
        for split, paths in found.items():
            folders = {os.path.dirname(path) for path in paths}
            places = {os.path.dirname(label_file(Path(folder) / "x")) for folder in folders}
            places |= {os.path.dirname(path) for folder in folders for path in self._folders[folder].taken}
            for place in sorted(places | folders):
                for path in walk(place).files if os.path.isdir(place) else []:
                    if path.lower().endswith(".txt") and path not in looked:
                        looked.add(path)
                        self._leftover(split, path, stems)

    def _leftover(self, split: str, path: str, stems: dict[str, set[str]]) -> None:
        folder, name = os.path.split(path)
        if name.lower() in _LISTS or name.lower().startswith("readme"):
            outcome, alarm = "skipped: lists and notes", ""
        elif folder in self._folders and os.path.splitext(name)[0] in _stems(folder, stems):
            outcome, alarm = "skipped: beside an image whose labels are elsewhere", ""
        elif any(os.path.splitext(name)[0] in _stems(place, stems) for place in (folder, _image_folder(folder))):
            outcome, alarm = "skipped: of images outside train and val", ""
        else:
            outcome, alarm = "skipped: without an image", "give each the name of its image, or take them out"
        self.ledger.add(split, "labels", outcome, shown(path, self.root), alarm=alarm)


@dataclass
class YoloReader:
    """Reads a dataset.

    Attributes:
        description: Its description.
        root: Its folder.
        faults: Takes what is wrong.
        confined: Whether files outside the folder are refused.
        top: The folder above in which it was found: a description may lie in a folder of its own.
        known: What an earlier check found in its label files.
    """

    description: Path
    root: Path
    faults: Faults
    confined: bool
    top: Path | None = None
    known: Known = field(default_factory=lambda: Known(None))
    ledger: Ledger = field(default_factory=Ledger)
    warnings: list[str] = field(default_factory=list)
    _accounted: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._labels = _Labels(self.root, self.faults, self.ledger, self.warnings, self.known, self._outside)

    @property
    def where(self) -> str:
        """How messages call the description."""
        return self.description.name

    def read(self) -> Listing | None:
        """The listing, or nothing where the faults leave nothing to read."""
        data = _described(self.description, self.root, self.faults)
        if data is None:
            return None
        # Label Studio and CVAT export images without splits.
        whole = not any(key in data for key in _KEYS["val"]) and self.description.suffix in (".txt", ".data")
        names = self._names(data)
        keypoints = _keypoint_shape(data.get("kpt_shape"))
        base = self._base(data)
        found: dict[str, list[str]] = {}
        splits = SPLITS[:1] if whole else SPLITS
        for split in splits:
            value = next((data[key] for key in _KEYS[split] if data.get(key, "") not in _NOTHING), None)
            if value is None:
                self.faults.add(
                    self.where,
                    f"{split} is missing",
                    f"add a line such as `{split}: images/{split}`"
                    + (" (final figures need images that training never saw)" if split == "val" else ""),
                )
                continue
            listed = self._images(split, value, base)
            if listed is not None and names:
                found[split] = listed
        if not names or len(found) < len(splits):
            return None
        samples = {split: self._labels.samples(split, found[split], names, keypoints) for split in splits}
        if whole:
            self.warnings.append(cut_off(self.where, "give a data.yaml with train, val and names"))
        if self._labels.shared:
            pairs = ledger.listed(self._labels.shared)
            self.warnings.append(
                f"{len(self._labels.shared)} image(s) share their labels with another: {pairs}; keep one of two"
            )
        self._labels.leftovers(found)
        return Listing(names, samples, self.ledger, tuple(self.warnings))

    # Description ---------------------------------------------------------------------------------------------------

    def _names(self, data: dict[str, Any]) -> tuple[str, ...]:
        names, count = data.get("names"), _whole(data.get("nc"))
        if isinstance(names, list) and names and all(isinstance(name, dict) and len(name) == 1 for name in names):
            names = {key: value for name in names for key, value in name.items()}
        if isinstance(names, dict):
            keyed = {_whole(key): name for key, name in names.items()}
            if len(keyed) < len(names) or set(keyed) != set(range(len(names))):
                keys = [key if (number := _whole(key)) is None else number for key in names]
                self.faults.add(
                    self.where, f"names has the keys {keys!s:.200}", "number the classes from 0, without gaps"
                )
                return ()
            names = [keyed[i] for i in range(len(names))]
        elif isinstance(names, str) and names and (file := self.root / names).is_file() and not self._outside(file):
            names = [line.strip() for _, line in lines(file, shown(file, self.root), self.faults)]
        if not names and count is not None and 0 < count <= MOST_CLASSES:
            names = [f"class_{i}" for i in range(count)]
            self.warnings.append(f"{self.where}: no names; the {count} classes are called class_0, class_1, ...")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            self.faults.add(self.where, f"names = {names!r:.200}", "list the class names")
            return ()
        if data.get("nc") and count != len(names):
            self.faults.add(
                self.where,
                f"nc = {data['nc']}, but there are {len(names)} names",
                "make them agree, or leave out nc",
            )
        return checked_names([name.strip() for name in names], self.where, self.faults)

    def _base(self, data: dict[str, Any]) -> Path:
        """The folder that train and val are relative to: `path` where it leads somewhere, else the description's."""
        path = data.get("path")
        if isinstance(path, str) and path and (self.root / path).is_dir() and not self._outside(self.root / path):
            return self.root / path
        return self.root

    def _outside(self, path: str | Path) -> bool:
        return self.confined and not Path(path).resolve().is_relative_to((self.top or self.root).resolve())

    # Images --------------------------------------------------------------------------------------------------------

    def _images(self, split: str, value: Any, base: Path) -> list[str] | None:
        entries = value if isinstance(value, list) else [value]
        before = self.faults.count
        found: dict[str, None] = {}  # a set that keeps its order
        for entry in entries:
            if not isinstance(entry, str) or not entry:
                self.faults.add(
                    self.where, f"{split} = {entry!r:.200}", "give a folder of images or a text file that lists them"
                )
                return None
            place = self._place(split, entry, base)
            if place is None:
                return None
            if place.is_dir():
                paths = self._folder(split, place)
            elif place.suffix.lower() in images.IMAGE_SUFFIXES:
                paths = iter([os.fspath(place)])
            else:
                paths = self._listed(place, base)
            for path in paths:
                self.ledger.see(split, path not in found)
                found[path] = None
        if not found and self.faults.count == before:
            empty = "the validation split is empty" if split == "val" else "no images"
            kinds = ", ".join(sorted(suffix[1:] for suffix in images.IMAGE_SUFFIXES))
            tallied = self.ledger.told().get(split, {})
            skipped = "; ".join(f"{kind} {outcome}" for kind, tallies in tallied.items() for outcome in tallies)
            self.faults.add(
                f"{self.where}, {split}: {value}",
                empty + (f" ({skipped})" if skipped else ""),
                f"put images there ({kinds})",
            )
        return list(found) or None

    def _place(self, split: str, entry: str, base: Path) -> Path | None:
        """Where an entry of the description leads, as it was written or in this dataset's own folder."""
        place = base / entry
        if not place.exists():
            parts = parts_of(entry)
            above = [folder for folder in self.root.parents if self.top and folder.is_relative_to(self.top)]
            near = [base, self.root, *above]
            tails = [Path(*parts[start:]) for start in range(len(parts))]
            instead = next((path for tail in tails for folder in near if (path := folder / tail).exists()), None)
            if instead is None:
                self.faults.add(self.where, f"{split}: {entry} does not exist", "correct the path or add the folder")
                return None
            # Some tools write `../train/images` for a folder that lies beside the description.
            if instead.parts[-len(parts) :] != tuple(parts) or Path(entry).is_absolute():
                taken = shown(instead, self.root)
                self.warnings.append(f"{self.where}: {split}: {entry} does not exist; {taken} of the dataset is taken")
            place = instead
        if self._outside(place):
            self.faults.add(self.where, f"{split}: {entry} lies outside the dataset", "put the images into the archive")
            return None
        return place

    def _folder(self, split: str, folder: Path) -> Iterator[str]:
        """The images below a folder; everything else there is accounted for."""
        found = walk(folder)
        for path in found.hidden:
            self._skip(split, ledger.HIDDEN, path)
        for path, why in found.unusable.items():
            if Path(path).suffix.lower() in images.IMAGE_SUFFIXES and self._labels.of(path):
                self.faults.add(
                    shown(path, self.root), f"{why}, but it has labels", "put the image there, or take both out"
                )
            self._skip(split, f"skipped: {why}", path, "put the file or folder there, or take the link out")
        for path in found.files:
            name = os.path.basename(path)
            suffix = os.path.splitext(name)[1].lower()
            if suffix in images.IMAGE_SUFFIXES:
                yield path
            elif suffix == ".txt":
                continue  # perhaps a label; the ledger of labels has it
            elif suffix in images.UNREAD_SUFFIXES:
                what = images.UNREAD_SUFFIXES[suffix]
                if suffix != ".npy" and self._labels.of(path):  # Ultralytics keeps images beside their files as .npy
                    self.faults.add(
                        shown(path, self.root),
                        f"has labels, but {what} ({suffix}) are not read",
                        "save it as JPEG or PNG",
                    )
                self._skip(
                    split,
                    f"skipped: {what} ({suffix})",
                    path,
                    "" if suffix == ".npy" else "save them, or frames of them, as JPEG or PNG",
                )
            elif self._labels.of(path) and _begins_as_image(path):
                yield path
            elif _begins_as_image(path):
                self._skip(
                    split, "skipped: images by content, but not by name", path, "give their names an image's ending"
                )
            else:
                self._skip(split, f"skipped: no images ({suffix or 'without an ending'})", path)

    def _skip(self, split: str, outcome: str, path: str, alarm: str = "") -> None:
        if (split, path) in self._accounted:
            return
        self._accounted.add((split, path))
        self.ledger.see(split, 1)
        self.ledger.add(split, "files", outcome, shown(path, self.root), alarm=alarm)

    @cached_property
    def _places(self) -> Places:
        return Places(walk(self.root).files)

    def _listed(self, file: Path, base: Path) -> Iterator[str]:
        """The images that a text file names, one a line: absolute, or relative to the file or to the dataset."""
        self._labels.lists.add(os.fspath(file))
        for number, line in lines(file, shown(file, self.root), self.faults, MOST_LISTED):
            name = line.strip()
            candidates = [file.parent / name, base / name]
            path = next((os.fspath(path) for path in candidates if path.is_file()), None)
            where = f"{shown(file, self.root)}, line {number}"
            if path is not None and self._outside(path):
                self.faults.add(where, f"{name!r} lies outside the dataset", "put the image into the archive")
                continue
            path = path or self._places.find(name, (file.parent, base, self.root))
            if path is None:
                self.faults.add(where, f"{name!r} does not exist", "correct the path or take out the line")
            elif Path(path).suffix.lower() not in images.IMAGE_SUFFIXES and not _begins_as_image(path):
                self.faults.add(where, f"{name!r} is not an image", "take out the line")
            else:
                yield os.path.normpath(path)


def _described(given: Path, root: Path, faults: Faults) -> dict[str, Any] | None:
    """The content of a description, by lower-case names; nothing where it cannot be read, which is a fault."""
    if given.suffix == ".data":
        written = _darknet(given)
        return {key: _of_dataset(written[key], root) for key in ("names", "train", "valid") if key in written}
    if given.suffix != ".txt":
        data = description(given, given.name, faults)
        return None if data is None else {str(key).lower(): value for key, value in data.items()}
    folders = {
        split: [name for name in (split, *_KEYS[split]) if (root / "images" / name).is_dir()] for split in SPLITS
    }
    if not all(folders.values()):
        return {"names": os.path.relpath(given, root), "train": "images"}
    return {
        "names": os.path.relpath(given, root),
        **{split: f"images/{names[0]}" for split, names in folders.items()},
    }


def _of_dataset(name: str, root: Path) -> str:
    """A path of Darknet's description, which is relative to Darknet's own folder, as one of this dataset."""
    parts = parts_of(name)
    tails = (os.path.join(*parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if (root / tail).exists()), name)


@dataclass(frozen=True)
class _Rows:
    """What rows of label files mean in a dataset.

    Attributes:
        names: Classes by name.
        classes: How many there are.
        keypoints: How many keypoints a pose has and how many numbers each, where the dataset says so.
    """

    names: Mapping[str, int]
    classes: int
    keypoints: tuple[int, int] | None

    def state(self, file: str) -> str:
        """What changes when the rows of a file are to be read anew; empty for one that has just changed or is gone."""
        try:
            mark = state(file)
        except OSError:
            return ""
        return f"{mark} {ROWS} {self.classes} {self.keypoints}" if mark else ""


@dataclass
class _LabelFolder:
    """The label files that images of one folder may have: in the folder that YOLO's layout says, or in a near one.

    Attributes:
        places: Folders, and what their label files are called by what their images may be called.
        taken: The label files that were asked for.
    """

    places: Sequence[tuple[str, Mapping[str, str]]]
    taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: str, root: Path) -> _LabelFolder:
        """Look where the labels of a folder's images are: in the first place that has any of them, or beside them."""
        stems = {key for name in os.listdir(folder) for key in _keys_of(name)} if os.path.isdir(folder) else set()
        beside = (folder, _label_files(folder))
        for place in _near(folder, root):
            if place != folder and (files := _label_files(place)) and not stems.isdisjoint(files):
                return cls(((place, files), beside))
        return cls((beside,))

    def take(self, image: str) -> str | None:
        """The label file of an image."""
        for folder, files in self.places:
            for key in _keys_of(image):
                if (name := files.get(key)) is not None:
                    self.taken.add(path := os.path.join(folder, name))
                    return path
        return None


def _near(folder: str, root: Path) -> Iterator[str]:
    """Where labels of a folder's images may be, the most likely place first."""
    yield os.path.dirname(label_file(Path(folder) / "x"))
    parts = Path(folder).parts
    top = len(root.parts) if Path(folder).is_relative_to(root) else len(parts)
    for i in reversed(range(top, len(parts))):  # `train/Images` and `train/labels`
        for name in _LABEL_FOLDERS:
            yield os.path.join(*parts[:i], name, *parts[i + 1 :])
    for i in reversed(range(top, len(parts) + 1)):  # `train` and `labels/train`
        for name in _LABEL_FOLDERS:
            yield os.path.join(*parts[:i], name, *parts[i:])
    for i in reversed(range(top, len(parts))):  # `images/train` and `labels`
        for name in _LABEL_FOLDERS:
            yield os.path.join(*parts[:i], name)


def _label_files(folder: str) -> dict[str, str]:
    """What the text files of a folder are called, by their stems, as they are and in small letters."""
    if not os.path.isdir(folder):
        return {}
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(".txt") and not is_hidden(name))
    found = {name[:-4]: name for name in names}
    for name in names:
        found.setdefault(name[:-4].casefold(), name)
    return found


def _keys_of(image: str) -> tuple[str, ...]:
    """What the stem of an image's label file may be: `a`, or `a.jpg`."""
    stem = os.path.splitext(image)[0]
    return tuple(dict.fromkeys((stem, image, stem.casefold(), image.casefold())))


def _stems(folder: str, known: dict[str, set[str]]) -> set[str]:
    """Stems of the files of a folder that are no text."""
    if folder not in known:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        known[folder] = {os.path.splitext(name)[0] for name in names if not name.lower().endswith(".txt")}
    return known[folder]


def _image_folder(folder: str) -> str:
    """The folder of the images whose labels are in a folder: the last `labels` of the path read as `images`."""
    parts = folder.split(os.sep)
    if "labels" in parts:
        parts[len(parts) - 1 - parts[::-1].index("labels")] = "images"
    return os.sep.join(parts)


def label_file(image: Path) -> Path:
    """Where YOLO's layout keeps an image's labels: the last folder `images` of the path read as `labels`."""
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts) / f"{image.stem}.txt"


def _begins_as_image(path: str) -> bool:
    with open(path, "rb") as file:
        return images.is_image(file.read(64))


def _whole(value: object) -> int | None:
    """A whole number that is written as text."""
    return int(float(value)) if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.0*)?\s*", value, re.ASCII) else None


def _keypoint_shape(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2:
        count, each = _whole(value[0]), _whole(value[1])
        if count and each in (2, 3):
            return count, each
    return None
