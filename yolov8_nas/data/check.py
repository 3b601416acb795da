"""Checks of a dataset before any work is done with it: what can be found in seconds is not found after hours."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from yolov8_nas.data import demo, images, layout, ledger, remote
from yolov8_nas.data.faults import Faults
from yolov8_nas.data.images import Facts
from yolov8_nas.data.known import Known, state
from yolov8_nas.data.ledger import listed
from yolov8_nas.data.sample import Boxes, Listing, Sample
from yolov8_nas.data.source import is_archive, local_path, opened, source_name
from yolov8_nas.data.splits import search_split, val_split
from yolov8_nas.data.yolo_layout import label_file
from yolov8_nas.errors import InputError
from yolov8_nas.runner.results import Tallies

SPLITS: Final = ("train", "search", "val")

FETCHED: Final = ".fetched"
"""Folder of a dataset that was downloaded, in the `scratch` of `checked`; of no use on another machine."""

_QUICK = 2000  # up to so many images are opened even where labels are at fault already, to name everything at once
_TOLD_EVERY = 64  # images: telling takes longer than looking one up
_AHEAD = 32  # images that are read or decoded ahead of the one that is looked at

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image that can be used.

    Attributes:
        path: Where its file lies.
        boxes: Its boxes, inside the image.
        facts: What opening it told.
    """

    path: str
    boxes: Boxes
    facts: Facts

    @property
    def file(self) -> Path:
        """Where its file lies."""
        return Path(self.path)

    @property
    def sha256(self) -> str:
        """Digest of its file's bytes."""
        return self.facts.sha256

    @property
    def width(self) -> int:
        """Width in pixels, as it is to be shown (EXIF orientation applied)."""
        return self.facts.width

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.facts.height


@dataclass(frozen=True)
class CheckedDataset:
    """A dataset that can be used.

    Attributes:
        source: Its name.
        names: Class names.
        splits: The images of `train`, `search` and `val`, each image once. Their files are there as long as the
            source is open: those of an archive are gone once `check_source` has returned.
        warnings: What was mended or left out, and what may surprise later.
        ledger: What became of every file, label and box (`Ledger.told`); `train` is the user's, before the search
            split is cut from it.
        remarks: What is converted and how, and how many images.
        ranges: The range of values that becomes black to white, for images of more than eight bits.
    """

    source: str
    names: tuple[str, ...]
    splits: Mapping[str, Sequence[CheckedImage]]
    warnings: tuple[str, ...]
    ledger: Tallies = field(default_factory=dict)
    remarks: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def images(self) -> dict[str, int]:
        """Number of images per split."""
        return {split: len(images) for split, images in self.splits.items()}

    @property
    def boxes(self) -> dict[str, dict[str, int]]:
        """Number of boxes per split and class name."""
        counts = {}
        for split, several in self.splits.items():
            counted = Counter(box.label for image in several for box in image.boxes)
            counts[split] = {name: counted[i] for i, name in enumerate(self.names)}
        return counts


def check_source(source: str | Path | None, progress: Told | None = None) -> CheckedDataset:
    """Check a dataset without keeping anything of it.

    Args:
        source: A folder, a data.yaml, an archive or the address of one (which is downloaded), in YOLO's layout or
            COCO's; nothing for the demo data, which is only named: its pictures are made when the run needs them.
        progress: As for `checked`.

    Raises:
        InputError: It cannot be used; the message names every fault, or the first ten and their number.
    """
    if source is None:
        return CheckedDataset("demo", demo.CLASSES, {}, ())
    try:
        with checked(source, progress=progress) as dataset:
            return dataset
    except ConnectionError as error:  # nobody tries again here
        raise InputError(str(error)) from None


@contextmanager
def checked(
    source: str | Path | None,
    *,
    scratch: Path | None = None,
    progress: Told | None = None,
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
        with tempfile.TemporaryDirectory(dir=scratch, prefix="demo-") as drawn:
            demo.make_demo(Path(drawn), progress=partial(progress, "drawing images") if progress else None)
            yield _check(Path(drawn), "demo", "demo", True, progress)
        return
    with ExitStack() as stack:
        if foreign := remote.is_address(source):
            scratch = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dataset-")))
            path = remote.fetch(str(source), scratch / FETCHED, expected=digest, progress=progress)
        else:
            path = local_path(source)
        folder = stack.enter_context(opened(path, scratch, shown=str(source)))
        confined = foreign or folder != path
        yield _check(folder, str(source), source_name(path), confined, progress, None if confined else path)


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
    if is_archive(path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with opened(path) as folder, Known.of(path) as known:
        faults = Faults()
        listing = _read(folder, str(source), faults, known, confined=False)
        faults.raise_any(str(source))
        assert listing is not None
        digest = hashlib.sha256(repr(listing.names).encode())
        for split, samples in listing.samples.items():
            for sample in samples:
                try:
                    facts = known.facts(sample.image, state(sample.image))
                    content = facts.sha256 if facts else _sha256(sample.image)
                except OSError as error:
                    raise InputError(f"{source}: {sample.name}: cannot be read ({error.strerror})") from None
                boxes = [tuple(box) for box in sample.boxes]
                digest.update(repr((split, sample.name, content, boxes)).encode(errors="backslashreplace"))
        return digest.hexdigest()


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path, source: str, faults: Faults, known: Known, *, confined: bool) -> Listing | None:
    try:
        return layout.read(folder, faults, confined=confined, known=known)
    except OSError as error:  # no rights, a name too long for the file system, a disk that fails
        raise InputError(f"{source}: cannot be read ({error}); make its files and folders readable") from None


def _check(
    folder: Path, source: str, name: str, confined: bool, progress: Told | None, remembered: Path | None = None
) -> CheckedDataset:
    faults = Faults()
    with Known.of(remembered) as known:
        listing = _read(folder, source, faults, known, confined=confined)
        if listing is None or (faults.count and sum(map(len, listing.samples.values())) > _QUICK):
            faults.raise_any(source)
            raise AssertionError("a reader gave nothing and no reason")
        found = _inspect(listing, faults, known, progress)
    _judge(listing, faults, folder)
    faults.raise_any(source)

    book, warnings = listing.ledger, list(listing.warnings)
    found = {split: _once(split, images, book, warnings) for split, images in found.items()}
    train = found["train"]
    if "val" in found:
        train, val = _apart(train, found["val"], book, warnings)
    else:
        chosen = val_split({image.sha256: bool(image.boxes) for _, image in train}, source)
        val = [pair for pair in train if pair[1].sha256 in chosen]
        train = [pair for pair in train if pair[1].sha256 not in chosen]
    for split, pairs in (("train", train), ("val", val)):
        seen = split if split in found else "train"  # what was cut from train was seen there
        for sample, image in pairs:
            outcome = ledger.WITH_BOXES if image.boxes else ledger.BACKGROUND if sample.labelled else ledger.UNLABELLED
            book.add(seen, "files", outcome, "" if image.boxes else sample.name)
    book.balance()
    try:
        chosen = search_split({image.sha256: bool(image.boxes) for _, image in train})
    except InputError as error:
        left = " once those that are in val too are left out" if book.count("train", "files", ledger.IN_VAL) else ""
        raise InputError(f"{source}: {error}{left}") from None
    splits = {
        "train": [image for _, image in train if image.sha256 not in chosen],
        "search": [image for _, image in train if image.sha256 in chosen],
        "val": [image for _, image in val],
    }
    facts = [image.facts for several in splits.values() for image in several]
    ranges, remarks = images.ranges(facts), Counter(remark for fact in facts for remark in fact.remarks)
    for kind, (low, high) in ranges.items():
        count = sum(fact.depth == kind for fact in facts)
        remarks[f"{kind} converted to 8 bits: {low:.6g} becomes black, {high:.6g} white, in all images alike"] = count
        warnings.append(
            f"{count} image(s) of {kind} values are converted to 8 bits: {low:.6g} becomes black, {high:.6g} white; a "
            "deployed model needs its images converted alike"
        )
    dataset = CheckedDataset(name, listing.names, splits, ())
    warnings += book.warnings()
    warnings += [
        f"{split} holds no box of {listed([name for name, count in counts.items() if not count])}"
        for split, counts in dataset.boxes.items()
        if not all(counts.values())
    ]
    return CheckedDataset(
        name, listing.names, splits, tuple(warnings), book.told(), dict(sorted(remarks.items())), ranges
    )


def _judge(listing: Listing, faults: Faults, folder: Path) -> None:
    """What is wrong with a dataset as a whole, where each part of it can be read."""
    if faults.count:
        return
    train = listing.samples["train"]
    left = listing.ledger.count("train", "labels", "skipped: without an image")
    if not any(sample.boxes for sample in train):
        expected = label_file(Path(train[0].name))
        seen = f" ({left} label files belong to no image)" if left else f" (seen: {layout.seen(folder)})"
        faults.add("train", f"no boxes in any image{seen}", f"put labels where they are looked for ({expected}, ...)")
    elif "val" in listing.samples and not any(sample.boxes for sample in listing.samples["val"]):
        faults.add("val", "no boxes in any image, so nothing can be scored", "label the validation images")


_Pairs = list[tuple[Sample, CheckedImage]]


def _inspect(listing: Listing, faults: Faults, known: Known, progress: Told | None) -> dict[str, _Pairs]:
    """Open every image; what cannot be used becomes a fault."""
    total, done = sum(map(len, listing.samples.values())), 0
    pairs: dict[str, _Pairs] = {split: [] for split in listing.samples}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders work outside the interpreter's lock
        for split, samples in listing.samples.items():
            waiting = iter(samples)
            coming = deque((sample, _start(pool, sample, known)) for sample in islice(waiting, _AHEAD))
            while coming:
                sample, result = coming.popleft()
                if (following := next(waiting, None)) is not None:
                    coming.append((following, _start(pool, following, known)))
                outcome, mark = result()
                if isinstance(outcome, Facts):
                    if mark is not None:
                        known.keep(sample.image, mark, outcome)
                    outcome = _fitting(sample, outcome)
                if isinstance(outcome, Facts):
                    pairs[split].append((sample, CheckedImage(sample.image, sample.boxes, outcome)))
                else:
                    faults.add(sample.name, *outcome)
                done += 1
                if progress and (done % _TOLD_EVERY == 0 or done == total):
                    progress("checking images", done, total)
    return pairs


class _Budget:
    """Pixels that are decoded at once: as many as `most`, or those of one image that has more."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._spent = 0
        self._changed = threading.Condition()

    @contextmanager
    def spend(self, pixels: int) -> Iterator[None]:
        """Wait until so many more may be decoded."""
        with self._changed:
            self._changed.wait_for(lambda: self._spent == 0 or self._spent + pixels <= self._most)
            self._spent += pixels
        try:
            yield
        finally:
            with self._changed:
                self._spent -= pixels
                self._changed.notify_all()


_budget = _Budget(images.SAFE_PIXELS)
_Outcome = tuple[Facts | tuple[str, str], str | None]
"""An image's facts or what is wrong with it and what to do; and the state of its file, where it was opened."""


def _start(pool: ThreadPoolExecutor, sample: Sample, known: Known) -> Callable[[], _Outcome]:
    """Look an image up, or begin to open it."""
    try:
        mark = state(sample.image)
        if facts := known.facts(sample.image, mark):
            return lambda: (facts, None)
    except OSError:
        mark = ""
    return pool.submit(_open, sample, mark).result


def _open(sample: Sample, mark: str) -> _Outcome:
    try:
        size = Path(sample.image).stat().st_size
        if size > images.MOST_BYTES:
            return (f"{size:,} bytes, more than {images.MOST_BYTES:,}", "save it smaller"), None
        return images.look(Path(sample.image).read_bytes(), _budget.spend), mark
    except OSError as error:
        return (f"cannot be read ({error.strerror})", "make it readable, or take it out"), None
    except InputError as error:
        what, _, remedy = str(error).partition("; ")
        return (what, remedy), None


def _fitting(sample: Sample, facts: Facts) -> Facts | tuple[str, str]:
    """Whether an image is as large as its annotation says."""
    if sample.pixels in (None, (facts.width, facts.height)):
        return facts
    what = f"{facts.width} x {facts.height} pixels, but its annotation says {sample.pixels}"
    if sample.pixels == (facts.height, facts.width):
        return what, "correct the annotation (is its file turned, by EXIF or by a tool, since its boxes were drawn?)"
    return what, "correct the annotation"


def _once(split: str, pairs: _Pairs, book: ledger.Ledger, warnings: list[str]) -> _Pairs:
    """Each image once: of those with the same bytes one that has boxes, and of these the first by name."""
    kept: dict[str, int] = {}
    chosen: list[tuple[Sample, CheckedImage]] = []
    for pair in pairs:
        place = kept.setdefault(pair[1].sha256, len(chosen))
        if place == len(chosen):
            chosen.append(pair)
        elif pair[1].boxes and not chosen[place][1].boxes:
            chosen[place] = pair
    doubles = []
    for sample, image in pairs:
        stays = chosen[kept[image.sha256]][0]
        if stays is not sample:
            doubles.append(f"{sample.name} = {stays.name}{_difference(sample, stays)}")
            book.add(split, "files", ledger.COPY, doubles[-1])
    if doubles:
        doubles.sort(key=lambda text: not text.endswith(")"))  # conflicts first
        warnings.append(f"{len(doubles)} image(s) of {split} are there twice and count once: {listed(doubles)}")
    return chosen


def _apart(train: _Pairs, val: _Pairs, book: ledger.Ledger, warnings: list[str]) -> tuple[_Pairs, _Pairs]:
    """Each image in one split: in val, unless only train has boxes for it."""
    of_train = {image.sha256: (sample, image) for sample, image in train}
    of_val = {image.sha256: (sample, image) for sample, image in val}
    both = of_train.keys() & of_val.keys()
    in_train = {sha256 for sha256 in both if of_train[sha256][1].boxes and not of_val[sha256][1].boxes}
    for split, out, other, outcome, gone in (
        ("train", of_train, of_val, ledger.IN_VAL, both - in_train),
        ("val", of_val, of_train, ledger.IN_TRAIN, in_train),
    ):
        pairs = []
        for sha256, (sample, _) in out.items():
            if sha256 in gone:
                stays = other[sha256][0]
                pairs.append(f"{sample.name} = {stays.name}{_difference(sample, stays)}")
                book.add(split, "files", outcome, pairs[-1])
        if pairs:
            why = "" if split == "train" else " without boxes"
            kept = "val" if split == "train" else "train"
            pairs.sort(key=lambda text: not text.endswith(")"))
            warnings.append(
                f"{len(pairs)} image(s) of {split}{why} are in {kept} too and are left out of {split}: {listed(pairs)}"
            )
    return (
        [pair for pair in train if pair[1].sha256 not in both - in_train],
        [pair for pair in val if pair[1].sha256 not in in_train],
    )


def _difference(one: Sample, other: Sample) -> str:
    """That two equal images are labelled differently."""
    return "" if one.boxes == other.boxes else " (with other labels)"
