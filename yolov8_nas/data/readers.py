"""Reading of datasets as people have them: a folder or an archive, in YOLO's layout or in COCO's.

A reader gathers what is wrong instead of stopping at the first fault, so that one message can name them all.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import yaml

from yolov8_nas import store
from yolov8_nas.errors import InputError

IMAGE_SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
SPLITS: Final = ("train", "val")

TOLERANCE: Final = 1e-3
"""How far a YOLO box may reach out of its image, as a share of the side: rounding of written coordinates, clipped."""

PIXEL_TOLERANCE: Final = 1.0
"""How far a COCO box may reach out of its image, in pixels: boxes that count their last pixel or not, clipped."""

ROUNDING: Final = 1e-9
"""How far a box may reach out because its numbers are rounded to nine digits."""

_SHOWN = 10


class Box(NamedTuple):
    """A box with its class; centre and size are shares of the image's width and height, 0 to 1."""

    label: int
    x: float
    y: float
    width: float
    height: float


class Faults:
    """What is wrong with a dataset: the first faults in full, and how many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, where: str, what: str, remedy: str) -> None:
        """Note a fault: file (and line), value, and what to do about it."""
        self.count += 1
        if self.count <= _SHOWN:
            self._shown.append(f"{where}: {what}; {remedy}")

    def raise_any(self, source: str) -> None:
        """Raise what was noted.

        Raises:
            InputError: There was at least one fault.
        """
        if self.count == 1:
            raise InputError(f"{source}: {self._shown[0]}")
        if self.count:
            more = [f"... and {self.count - _SHOWN} more"] if self.count > _SHOWN else []
            raise InputError("\n  ".join([f"{source}: {self.count} faults", *self._shown, *more]))


@dataclass(frozen=True)
class Sample:
    """An image and its boxes.

    Attributes:
        image: The image's file.
        name: How messages call it: its path in the dataset.
        boxes: Its boxes, inside the image.
        pixels: Width and height that the annotation states, where it states them.
    """

    image: Path
    name: str
    boxes: tuple[Box, ...]
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True)
class Listing:
    """A dataset as it was read; the images themselves have not been opened.

    Attributes:
        names: Class names.
        samples: The samples of `train` and of `val`.
        warnings: What was mended or left out on the way.
    """

    names: tuple[str, ...]
    samples: Mapping[str, Sequence[Sample]]
    warnings: tuple[str, ...] = ()


def local_path(source: str | Path) -> Path:
    """The absolute path of a source."""
    return Path(source).expanduser().absolute()


def source_name(source: Path) -> str:
    """The name of a dataset: its file's or folder's, without what an archive adds."""
    name = source.resolve().name
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return source.resolve().parent.name if source.suffix in {".yaml", ".yml"} else name


@contextmanager
def opened(source: Path, scratch: Path | None = None, shown: str | None = None) -> Iterator[Path]:
    """The folder (or data.yaml) to read: the source itself, or its content where it is an archive.

    Args:
        source: A folder, a data.yaml or an archive.
        scratch: Where an archive is unpacked to, in a folder that goes away again.
        shown: How messages call the source, where not by its path.

    Raises:
        InputError: There is nothing at `source`, or it is an archive that is damaged or unsafe.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; give the dataset's folder, its data.yaml or its archive")
    if source.is_dir() or source.suffix in {".yaml", ".yml"}:
        yield source
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="unpacked-") as folder:
        try:
            store.extract(source, Path(folder))
        except store.ArchiveError as error:
            raise InputError(str(error).replace(str(source), shown or str(source))) from None
        except OSError as error:
            raise InputError(
                f"{shown or source}: cannot be unpacked ({error}); free some space or unpack it yourself"
            ) from None
        yield Path(folder)


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
        return _YoloReader(folder, folder.parent, faults, confined).read()
    for root in _roots(folder):
        descriptions = _descriptions(root)
        if len(descriptions) > 1:
            found = ", ".join(path.name for path in descriptions)
            faults.add(found, "more than one description of a dataset", "give the path of the one that is meant")
            return None
        if descriptions:
            return _YoloReader(descriptions[0], root, faults, confined).read()
        if any((root / "annotations").glob("*.json")):
            return _CocoReader(root, faults).read()
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


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


# YOLO ----------------------------------------------------------------------------------------------------------------


@dataclass
class _YoloReader:
    description: Path
    root: Path
    faults: Faults
    confined: bool
    warnings: list[str] = field(default_factory=list)

    def read(self) -> Listing | None:
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
            data = yaml.safe_load(self.description.read_text(encoding="utf-8-sig"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.faults.add(self.description.name, f"not YAML ({' '.join(str(error).split())})", "correct it")
            return None
        except OSError as error:
            self.faults.add(self.description.name, f"cannot be read ({error.strerror})", "make it readable")
            return None
        if not isinstance(data, dict):
            self.faults.add(self.description.name, f"holds {data!r}", "give it the keys train, val and names")
            return None
        return data

    def _names(self, data: dict[str, Any]) -> tuple[str, ...]:
        where, names, count = self.description.name, data.get("names"), data.get("nc")
        if isinstance(names, dict):
            wanted = list(range(len(names)))
            if sorted(names, key=str) != sorted(wanted, key=str):
                self.faults.add(where, f"names has the keys {list(names)}", "number the classes from 0, without gaps")
                return ()
            names = [names[i] for i in wanted]
        if names is None and isinstance(count, int) and count > 0:
            names = [f"class_{i}" for i in range(count)]
            self.warnings.append(f"{where}: no names; the {count} classes are called class_0, class_1, ...")
        if not isinstance(names, list) or not names:
            self.faults.add(where, f"names = {names!r}", "list the class names")
            return ()
        if isinstance(count, int) and count != len(names):
            self.faults.add(
                where, f"nc = {count}, but there are {len(names)} names", "make them agree, or leave out nc"
            )
        return _checked_names([str(name) for name in names], where, self.faults)

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
        for number, line in _lines(file, _shown(file, self.root), self.faults):
            name = line.strip()
            candidates = [file.parent / name, base / name]
            path = next((path for path in candidates if path.is_file()), None)
            where = f"{_shown(file, self.root)}, line {number}"
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
            shown = _shown(labels, self.root)
            for number, line in _lines(labels, shown, self.faults):
                try:
                    boxes[parse_row(line, classes)] = None
                except InputError as error:
                    what, _, remedy = str(error).partition("; ")
                    self.faults.add(f"{shown}, line {number}", what, remedy)
        return Sample(image, _shown(image, self.root), tuple(boxes))


def label_file(image: Path) -> Path:
    """Where YOLO's layout keeps an image's labels: the last folder `images` of the path read as `labels`."""
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts) / f"{image.stem}.txt"


def parse_row(line: str, classes: int) -> Box:
    """Read a row `class x y width height` of a label file.

    Args:
        line: The row.
        classes: Number of classes.

    Returns:
        The box, clipped where it reaches out of the image by no more than rounding.

    Raises:
        InputError: What is wrong with the row and, after a semicolon, what to do about it.
    """
    columns = line.split()
    if len(columns) != 5:
        polygon = " (polygons are not read: write their bounding boxes)" if len(columns) > 6 else ""
        raise InputError(f"{len(columns)} columns; write five: class x y width height{polygon}")
    try:
        label, *numbers = (float(column) for column in columns)
    except ValueError:
        raise InputError(f"{line.strip()!r} holds something that is no number; write class x y width height") from None
    if not all(map(math.isfinite, (label, *numbers))):
        raise InputError(f"{line.strip()!r} holds a value that is not finite; correct the box or take it out")
    if label != int(label) or not 0 <= label < classes:
        raise InputError(
            f"class {columns[0]} is out of range (there are {classes} classes, 0 to {classes - 1}); "
            "correct it or add its name to names"
        )
    x, y, width, height = numbers
    return _clipped(int(label), x, y, width, height, (TOLERANCE, TOLERANCE), line.strip())


def _clipped(
    label: int, x: float, y: float, width: float, height: float, tolerance: tuple[float, float], shown: str
) -> Box:
    if width <= 0 or height <= 0:
        raise InputError(f"box {shown} has no size; take it out or give it a width and a height above 0")
    edges: list[float] = []
    for centre, side, slack in ((x, width, tolerance[0]), (y, height, tolerance[1])):
        centre, side = _written(centre), _written(side)
        low, high = centre - side / 2, centre + side / 2
        if low < -slack or high > 1 + slack:
            pixels = max(x, y, width, height) > 2
            remedy = (
                "divide x and width by the image's width, y and height by its height"
                if pixels
                else "clip it to the image or take it out"
            )
            raise InputError(f"box {shown} reaches out of the image; {remedy}")
        # What is inside stays as it was written, and so does what reaches out by the rounding of its last digit alone:
        # normalising a normalised dataset changes nothing.
        inside = low >= -ROUNDING and high <= 1 + ROUNDING
        edges += [centre, side] if inside else _middle(max(low, 0.0), min(high, 1.0))
    x, width, y, height = edges
    if width <= 0 or height <= 0:
        raise InputError(f"box {shown} has no size inside the image; take it out")
    return Box(label, x, y, width, height)


def _middle(low: float, high: float) -> list[float]:
    return [_written((low + high) / 2), _written(high - low)]


def _written(value: float) -> float:
    """A number with the nine digits that it has in a label file."""
    return float(f"{value:.9g}")


def _lines(file: Path, shown: str, faults: Faults) -> Iterator[tuple[int, str]]:
    """The lines of a text file that hold something, with their numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        faults.add(shown, "not UTF-8 text", "write it again as plain text")
        return
    except OSError as error:
        faults.add(shown, f"cannot be read ({error.strerror})", "make it readable")
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _checked_names(names: list[str], where: str, faults: Faults) -> tuple[str, ...]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        places = [i for i, other in enumerate(names) if other == name]
        faults.add(where, f"class name {name!r} stands for {places}", "give every class its own name")
    for i, name in enumerate(names):
        if not name.strip():
            faults.add(where, f"class {i} has an empty name", "name it")
    return tuple(names)


# COCO ----------------------------------------------------------------------------------------------------------------


@dataclass
class _CocoReader:
    root: Path
    faults: Faults
    warnings: list[str] = field(default_factory=list)

    def read(self) -> Listing | None:
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
                    _shown(file, self.root), "categories differ from train's", "use the same ids and names in both"
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
        shown = _shown(file, self.root)
        try:
            content = json.loads(file.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            self.faults.add(shown, f"not JSON ({error})", "correct it or export it again")
            return None
        except OSError as error:
            self.faults.add(shown, f"cannot be read ({error.strerror})", "make it readable")
            return None
        for key in ("images", "annotations", "categories"):
            part = content.get(key) if isinstance(content, dict) else None
            if not isinstance(part, list) or not all(isinstance(item, dict) for item in part):
                self.faults.add(shown, f"no list {key!r}", "give it COCO's images, annotations and categories")
                return None
        return dict(content)

    def _categories(self, content: dict[str, Any], file: Path | None) -> dict[int, str]:
        assert file is not None
        categories = {c["id"]: str(c.get("name", "")) for c in content["categories"] if isinstance(c.get("id"), int)}
        if not categories or len(categories) != len(content["categories"]):
            self.faults.add(
                _shown(file, self.root), "categories without an id of their own", "give each an id and name"
            )
            return {}
        before = self.faults.count
        _checked_names(list(categories.values()), _shown(file, self.root), self.faults)
        return categories if self.faults.count == before else {}

    def _samples(self, split: str, file: Path, content: dict[str, Any], labels: dict[int, int]) -> list[Sample]:
        shown = _shown(file, self.root)
        folders = self._folders(split, file)
        boxes: dict[Any, list[Box]] = {}
        images: dict[Any, tuple[str, Path, int, int]] = {}
        for image in content["images"]:
            where = f"{shown}, image {image.get('id')!r}"
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
                looked = ", ".join(_shown(folder, self.root) for folder in folders)
                self.faults.add(where, f"{name!r} is not in {looked}", "add the image or take it out of the file")
                continue
            images[image["id"]] = (name, path, width, height)
        crowds = empty = 0
        for annotation in content["annotations"]:
            image_id = annotation.get("image_id")
            where = f"{shown}, annotation {annotation.get('id')!r}"
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
                self.warnings.append(f"{shown}: {count} {what} left out")
        if not content["images"]:
            empty_split = "the validation split is empty" if split == "val" else "no images"
            self.faults.add(shown, empty_split, "add images to it")
        return [
            Sample(path, _shown(path, self.root), tuple(boxes[i]), (width, height))
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
    return _clipped(
        labels[category],
        (left + box_width / 2) / width,
        (top + box_height / 2) / height,
        box_width / width,
        box_height / height,
        (PIXEL_TOLERANCE / width, PIXEL_TOLERANCE / height),
        f"{corners}",
    )
