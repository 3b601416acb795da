"""Checks of a dataset before any work is done with it: what can be found in seconds is not found after hours."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from PIL import Image

from yolov8_nas.data import demo, layout, remote
from yolov8_nas.data import sample as samples_of
from yolov8_nas.data.faults import Faults
from yolov8_nas.data.sample import Box, Listing, Sample
from yolov8_nas.data.source import local_path, opened, source_name
from yolov8_nas.data.splits import search_split
from yolov8_nas.data.yolo_layout import label_file
from yolov8_nas.errors import InputError

SPLITS: Final = ("train", "search", "val")

FETCHED: Final = ".fetched"
"""Folder of a dataset that was downloaded, in the `scratch` of `checked`; of no use on another machine."""

_LEAST_SIDE = 10  # pixels; Ultralytics drops smaller images
_FORMATS = frozenset({"BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP"})
_MOST_BYTES: Final = 256 * 2**20  # of a file
_PIXELS: Final = 32_000_000  # of an image in any case: decoded, they take 128 MB
_PIXELS_A_BYTE: Final = 50  # of a larger image's file: photographs have fewer than 20, a bomb has hundreds
_LARGE: Final = 4_000_000  # pixels of an image that is decoded while no other large one is
_NAMED = 10  # images that one warning names
_QUICK = 2000  # up to so many images are opened even where labels are at fault already, to name everything at once


@dataclass(frozen=True)
class CheckedImage:
    """An image that can be used.

    Attributes:
        file: Where it lies.
        sha256: Digest of its bytes.
        width: Width in pixels, as it is to be shown (EXIF orientation applied).
        height: Height in pixels.
        boxes: Its boxes, inside the image.
    """

    file: Path
    sha256: str
    width: int
    height: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset that can be used.

    Attributes:
        source: Its name.
        names: Class names.
        splits: The images of `train`, `search` and `val`, each image once. Their files are there as long as the
            source is open: those of an archive are gone once `check_source` has returned.
        warnings: What was mended or left out, and what may surprise later.
    """

    source: str
    names: tuple[str, ...]
    splits: Mapping[str, Sequence[CheckedImage]]
    warnings: tuple[str, ...]

    @property
    def images(self) -> dict[str, int]:
        """Number of images per split."""
        return {split: len(images) for split, images in self.splits.items()}

    @property
    def boxes(self) -> dict[str, dict[str, int]]:
        """Number of boxes per split and class name."""
        counts = {}
        for split, images in self.splits.items():
            counted = Counter(box.label for image in images for box in image.boxes)
            counts[split] = {name: counted[i] for i, name in enumerate(self.names)}
        return counts


def check_source(source: str | Path | None) -> CheckedDataset:
    """Check a dataset without keeping anything of it.

    Args:
        source: A folder, a data.yaml, an archive or the address of one (which is downloaded), in YOLO's layout or
            COCO's; nothing for the demo data, which is only named: its pictures are made when the run needs them.

    Raises:
        InputError: It cannot be used; the message names every fault, or the first ten and their number.
    """
    if source is None:
        return CheckedDataset("demo", demo.CLASSES, {}, ())
    try:
        with checked(source) as dataset:
            return dataset
    except ConnectionError as error:  # nobody tries again here
        raise InputError(str(error)) from None


@contextmanager
def checked(
    source: str | Path | None,
    *,
    scratch: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    digest: str | None = None,
) -> Iterator[CheckedDataset]:
    """Open and check a dataset; its files are there until the context ends.

    Args:
        source: As for `check_source`.
        scratch: Folder for what is unpacked or made on the way. What is downloaded stays there, in `FETCHED`.
        progress: Is told what is being done, and with how many images (or MiB) of how many.
        digest: What `source_digest` said of an address: the content that is meant.

    Raises:
        InputError: As for `check_source`.
        ConnectionError: The dataset is at an address, and nothing answers there.
    """
    if source is None:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="demo-") as folder:
            demo.make_demo(Path(folder), progress=partial(progress, "drawing images") if progress else None)
            yield _check(Path(folder), "demo", "demo", True, progress)
        return
    with ExitStack() as stack:
        if foreign := remote.is_address(source):
            scratch = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dataset-")))
            path = remote.fetch(str(source), scratch / FETCHED, expected=digest, progress=progress)
        else:
            path = local_path(source)
        folder = stack.enter_context(opened(path, scratch, shown=str(source)))
        yield _check(folder, str(source), source_name(path), foreign or folder != path, progress)


def source_digest(source: str | Path) -> str:
    """SHA-256 of what a dataset says: an archive's bytes, or class names, images and labels of a folder.

    Other files of the folder, and where it lies, do not count. At an address it is the digest of what the server says
    of the files there, all of them; none is downloaded.

    Raises:
        InputError: There is nothing to read, or its labels are at fault.
        ConnectionError: The dataset is at an address, and nothing answers there.
    """
    if remote.is_address(source):
        return remote.look(str(source)).digest
    path = local_path(source)
    if path.is_file() and path.suffix not in {".yaml", ".yml"}:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with opened(path) as folder:
        faults = Faults()
        listing = _read(folder, str(source), faults, confined=False)
        faults.raise_any(str(source))
        assert listing is not None
        digest = hashlib.sha256(repr(listing.names).encode())
        for split in samples_of.SPLITS:
            for sample in listing.samples[split]:
                with sample.image.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(repr((split, sample.name, content, [tuple(box) for box in sample.boxes])).encode())
        return digest.hexdigest()


def _read(folder: Path, source: str, faults: Faults, *, confined: bool) -> Listing | None:
    try:
        return layout.read(folder, faults, confined=confined)
    except OSError as error:  # no rights, a name too long for the file system, a disk that fails
        raise InputError(f"{source}: cannot be read ({error}); make its files and folders readable") from None


def _check(
    folder: Path, source: str, name: str, confined: bool, progress: Callable[[str, int, int], None] | None
) -> CheckedDataset:
    faults = Faults()
    listing = _read(folder, source, faults, confined=confined)
    if listing is None or (faults.count and sum(map(len, listing.samples.values())) > _QUICK):
        faults.raise_any(source)
        raise AssertionError("a reader gave nothing and no reason")
    warnings = list(listing.warnings)
    train, val = _inspect(listing, faults, progress)
    if not faults.count and not any(sample.boxes for sample in listing.samples["train"]):
        expected = label_file(Path(listing.samples["train"][0].name))
        faults.add("train", "no boxes in any image", f"put labels where they are looked for ({expected}, ...)")
    if not faults.count and not any(sample.boxes for sample in listing.samples["val"]):
        faults.add("val", "no boxes in any image, so nothing can be scored", "label the validation images")
    faults.raise_any(source)

    train, val = _once("train", train, warnings), _once("val", val, warnings)
    val_names = {image.sha256: sample.name for sample, image in val}
    both = [(sample, image) for sample, image in train if image.sha256 in val_names]
    if both:
        pairs = [f"{sample.name} = {val_names[image.sha256]}" for sample, image in both]
        warnings.append(f"{len(both)} image(s) of train are in val too and are left out of train: {_listed(pairs)}")
        train = [(sample, image) for sample, image in train if image.sha256 not in val_names]
    try:
        chosen = search_split({image.sha256: bool(image.boxes) for _, image in train})
    except InputError as error:
        left = " once those that are in val too are left out" if both else ""
        raise InputError(f"{source}: {error}{left}") from None
    dataset = CheckedDataset(
        name,
        listing.names,
        {
            "train": [image for _, image in train if image.sha256 not in chosen],
            "search": [image for _, image in train if image.sha256 in chosen],
            "val": [image for _, image in val],
        },
        tuple(warnings),
    )
    absent = [
        f"{split} holds no box of {_listed([name for name, count in counts.items() if not count])}"
        for split, counts in dataset.boxes.items()
        if not all(counts.values())
    ]
    return CheckedDataset(dataset.source, dataset.names, dataset.splits, (*warnings, *absent))


_one_large = threading.Lock()
_Pairs = list[tuple[Sample, CheckedImage]]


def _inspect(
    listing: Listing, faults: Faults, progress: Callable[[str, int, int], None] | None
) -> tuple[_Pairs, _Pairs]:
    """Open every image; what cannot be used becomes a fault."""
    samples = [(split, sample) for split in samples_of.SPLITS for sample in listing.samples[split]]
    pairs: dict[str, _Pairs] = {split: [] for split in samples_of.SPLITS}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders work outside the interpreter's lock
        found = pool.map(lambda item: _open(item[1]), samples)
        for done, ((split, sample), image) in enumerate(zip(samples, found, strict=True), 1):
            if isinstance(image, CheckedImage):
                pairs[split].append((sample, image))
            else:
                faults.add(sample.name, *image)
            if progress:
                progress("checking images", done, len(samples))
    return pairs["train"], pairs["val"]


def _open(sample: Sample) -> CheckedImage | tuple[str, str]:
    """Decode an image as a whole: the image, or what is wrong with it and what to do about it."""
    try:
        size = sample.image.stat().st_size
        if size > _MOST_BYTES:
            return f"{size:,} bytes, more than {_MOST_BYTES:,}", "save it smaller"
        with sample.image.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with Image.open(file) as image:
                if image.format not in _FORMATS:
                    return f"is a {image.format} image", f"save it as one of {', '.join(sorted(_FORMATS))}"
                width, height = image.size
                if width * height > max(_PIXELS, min(Image.MAX_IMAGE_PIXELS or 0, size * _PIXELS_A_BYTE)):
                    return f"{width} x {height} pixels in {size:,} bytes", "save it smaller"
                with _one_large if width * height > _LARGE else nullcontext():
                    image.load()
                if image.getexif().get(0x0112) in {5, 6, 7, 8}:  # EXIF orientation: turned by a quarter
                    width, height = height, width
    except Image.DecompressionBombError:
        return "has more pixels than any image is to have", "save it smaller"
    except Exception as error:  # decoders raise whatever they meet in a damaged file
        return f"unreadable or truncated image ({error or type(error).__name__})", "replace it or take it out"
    if min(width, height) < _LEAST_SIDE:
        return f"{width} x {height} pixels", f"give images of at least {_LEAST_SIDE} pixels a side"
    if sample.pixels not in (None, (width, height)):
        return f"{width} x {height} pixels, but its annotation says {sample.pixels}", "correct the annotation"
    return CheckedImage(sample.image, digest, width, height, sample.boxes)


def _once(split: str, pairs: _Pairs, warnings: list[str]) -> _Pairs:
    """Each image once: the first by name of those with the same bytes."""
    kept: dict[str, tuple[Sample, CheckedImage]] = {}
    doubles = []
    for sample, image in pairs:
        first, _ = kept.setdefault(image.sha256, (sample, image))
        if first is not sample:
            labels = "" if first.boxes == sample.boxes else " (with other labels)"
            doubles.append(f"{sample.name} = {first.name}{labels}")
    if doubles:
        warnings.append(f"{len(doubles)} image(s) of {split} are there twice and count once: {_listed(doubles)}")
    return list(kept.values())


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more
