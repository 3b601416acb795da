"""What a frame costs after the network: non-maximum suppression (NMS) on the host, as a pipeline would run it.

Boxes are decoded in the graph, so what is left is Ultralytics' `non_max_suppression`, at the thresholds of its
`predict`: confidence 0.25, IoU 0.7, at most 300 boxes. They are what a deployed `best.pt` or `model.onnx` runs with
unless somebody sets others; validation's confidence of 0.001 would time hundreds of boxes that no pipeline ever sees.
It runs on one thread: it has too little work for more, and a second pool of threads would only disturb the network's.

How long it takes follows from how many boxes pass the threshold, and so from the images and the training, not from the
architecture. A probed network has fresh weights and detects nothing. So the probe times NMS apart, on outputs of the
network's exact shape that hold a stated number of objects, and adds it to the network's latency. Percentiles are added
to percentiles: for p90 and p99 as if slow runs of both always fell together, which as a rule is too pessimistic. What
ships is measured as a whole, on real images, and that decides.

An NMS-free head gives detections. What is left of it all is the confidence threshold, and that is what is timed then.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
import torchvision  # noqa: F401 - with it, non_max_suppression takes torchvision's kernel, else a loop in Python
from numpy.typing import NDArray
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from yolov8_nas.measure.benchmark import Timed, Timing, named, time_in_rounds, timed_runs
from yolov8_nas.measure.protocol import VERIFY, Protocol
from yolov8_nas.measure.runtime import DEFAULT, Runtime
from yolov8_nas.runner.results import Latency, NmsResult, SuppressionSettings, SuppressionTimed, TimedLoad

CONFIDENCE: Final = 0.25
IOU: Final = 0.7
MAX_DETECTIONS: Final = 300

SETTINGS: Final = SuppressionSettings(confidence=CONFIDENCE, iou=IOU, max_detections=MAX_DETECTIONS, threads=1)
"""How NMS is run, for the record."""

NMS_FREE: Final = SuppressionSettings(confidence=CONFIDENCE, max_detections=MAX_DETECTIONS, threads=1, nms_free=True)
"""The same behind an NMS-free head."""

Images = NDArray[np.float32]
"""A batch as networks take it: (batch, 3, imgsz, imgsz), RGB in 0..1."""


@dataclass(frozen=True)
class Load:
    """What a made-up output holds in each image.

    Attributes:
        objects: Objects at random places, of random classes.
        boxes: Boxes above the confidence threshold on each object; they overlap so much that one of them stays.
    """

    objects: int
    boxes: int


LOADS: Final[Mapping[str, Load]] = {"few": Load(5, 10), "typical": Load(20, 10), "crowded": Load(100, 10)}
"""A trained YOLOv8 fires around each object in several neighbouring cells; `typical` is what limits are held against
until there is a trained network."""


def suppress(output: NDArray[np.float32]) -> list[torch.Tensor]:
    """Detections (n, 6) of each image from a network's output.

    Args:
        output: (batch, 4 + classes, anchors); or (batch, detections, 6), which are only held against the threshold.
    """
    found: list[torch.Tensor] = non_max_suppression(torch.from_numpy(output), CONFIDENCE, IOU, max_det=MAX_DETECTIONS)
    return found


def made_up_output(load: Load, *, num_classes: int, imgsz: int, batch: int, seed: int = 0) -> NDArray[np.float32]:
    """An output of a network's exact shape with a stated load; with fewer objects where the network has few anchors.

    Args:
        load: What each image holds.
        num_classes: Classes of the network.
        imgsz: Side of its square input in pixels.
        batch: Images.
        seed: Seed of places, sizes, classes and scores.
    """
    rng = np.random.default_rng(seed)
    anchors = _anchors(imgsz)
    objects = min(load.objects, anchors // load.boxes)
    output = rng.uniform(0, 0.1, (batch, 4 + num_classes, anchors))
    output[:, :4] *= 10 * imgsz
    for image in output:
        sides = np.repeat(rng.uniform(0.05, 0.2, (objects, 2)), load.boxes, axis=0) * imgsz
        centres = np.repeat(rng.uniform(0.1, 0.9, (objects, 2)), load.boxes, axis=0) * imgsz
        cells = rng.permutation(anchors)[: objects * load.boxes]
        image[:2, cells] = (centres + sides * rng.uniform(-0.02, 0.02, sides.shape)).T
        image[2:4, cells] = (sides * rng.uniform(0.98, 1.02, sides.shape)).T
        classes = np.repeat(rng.integers(num_classes, size=objects), load.boxes)
        image[4 + classes, cells] = rng.uniform(CONFIDENCE + 0.05, 0.95, len(cells))
    return output.astype(np.float32)


def made_up_detections(load: Load, *, num_classes: int, imgsz: int, batch: int, seed: int = 0) -> NDArray[np.float32]:
    """The same of a network with an NMS-free head, which finds each object once: (batch, detections, 6).

    Args:
        load: What each image holds.
        num_classes: Classes of the network.
        imgsz: Side of its square input in pixels.
        batch: Images.
        seed: Seed of places, classes and scores.
    """
    rng = np.random.default_rng(seed)
    rows = min(MAX_DETECTIONS, _anchors(imgsz))
    objects = min(load.objects, rows)
    output = rng.uniform(0, imgsz, (batch, rows, 6))
    scores = rng.uniform(0, 0.1, (batch, rows))
    scores[:, :objects] = rng.uniform(CONFIDENCE + 0.05, 0.95, (batch, objects))
    output[:, :, 4] = -np.sort(-scores)
    output[:, :, 5] = rng.integers(num_classes, size=(batch, rows))
    return output.astype(np.float32)


def _anchors(imgsz: int) -> int:
    """Cells of the head's three levels, each of which gives a box."""
    return sum((imgsz // stride) ** 2 for stride in (8, 16, 32))


def time_nms(
    *, num_classes: int, imgsz: int, batch: int, nms_free: bool = False, protocol: Protocol = VERIFY
) -> NmsResult:
    """Time NMS alone on each of `LOADS`; the caller holds the host for measuring.

    Args:
        num_classes: Classes of the network.
        imgsz: Side of its square input in pixels.
        batch: Images.
        nms_free: Whether its head is NMS-free, so that the threshold alone is timed.
        protocol: How to measure.
    """
    made_up = made_up_detections if nms_free else made_up_output
    outputs = {name: made_up(load, num_classes=num_classes, imgsz=imgsz, batch=batch) for name, load in LOADS.items()}
    visits: dict[str, Timed] = {
        name: partial(timed_runs, partial(suppress, output), protocol) for name, output in outputs.items()
    }
    with _one_thread():
        timings = dict(zip(visits, time_in_rounds(visits, protocol=protocol, around=visits["typical"]), strict=True))
        loads = {name: _load(timings[name], **_counts([output])) for name, output in outputs.items()}
    timed = SuppressionTimed(
        **dict(NMS_FREE if nms_free else SETTINGS),
        shape=next(iter(outputs.values())).shape,
        loads=loads,
        load="typical",
    )
    return NmsResult(latency_ms=loads["typical"].latency_ms, timed=timed)


def frames(files: Sequence[Path], *, imgsz: int, batch: int, count: int = 32) -> list[Images]:
    """Images as Ultralytics' `predict` prepares them: resized, padded to a square, RGB in 0..1.

    Args:
        files: Image files.
        imgsz: Side of the square in pixels.
        batch: Images per batch; the first images come again where the last batch would not be full.
        count: How many images, evenly spread over `files`; all of them where there are fewer.
    """
    chosen = np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int))
    pictures: list[Any] = [cv2.imread(str(files[i])) for i in chosen]
    endless = itertools.cycle(pictures)
    return [prepare([next(endless) for _ in range(batch)], imgsz) for _ in range(-(-len(pictures) // batch))]


def prepare(pictures: Sequence[NDArray[np.uint8]], imgsz: int) -> Images:
    """A batch as networks take it from pictures (height, width, 3) in BGR, as cameras and OpenCV give them.

    Args:
        pictures: The pictures, of any sizes.
        imgsz: Side of the square in pixels.
    """
    square = LetterBox((imgsz, imgsz), auto=False)
    images = [square(image=picture)[..., ::-1].transpose(2, 0, 1) for picture in pictures]
    return np.stack(images).astype(np.float32) / np.float32(255)


def measure_with_nms(
    files: Sequence[Path],
    images: Sequence[Images],
    *,
    threads: int,
    runtime: Runtime = DEFAULT,
    protocol: Protocol = VERIFY,
    reference: Path | None = None,
    progress: Callable[[float, float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Timing]:
    """Time networks together with NMS on real images, in one loop; the caller holds the host for measuring.

    One run is one batch of `images`, which come in turn. Everything else is as in `benchmark.measure`.

    Args:
        files: Networks whose batch is that of the images, or open, under different file names.
        images: Batches.
        threads: Threads of each network on a CPU.
        runtime: What runs them.
        protocol: How to measure.
        reference: The reference network; the first of `files` unless said otherwise.
        progress: Called with the share done and 1.0.
        checkpoint: File of JSON lines in which finished legs are kept.

    Raises:
        InputError: A file cannot be opened.
        ValueError: Two files have the same name.
    """
    if not files:
        return []
    with _one_thread():
        beside = _frame(reference or files[0], images, threads, runtime)
        return time_in_rounds(
            named(files, lambda file: lambda: timed_runs(_frame(file, images, threads, runtime), protocol, beside)),
            protocol=protocol,
            progress=progress,
            checkpoint=checkpoint,
        )


def boxes(file: Path, images: Sequence[Images], *, threads: int, runtime: Runtime = DEFAULT) -> dict[str, float]:
    """What a network finds in images: mean `boxes` above the threshold, and mean `detections` left by NMS, an image."""
    runner = runtime.open(file, threads, len(images[0]))
    (taken,) = runner.get_inputs()
    return _counts([runner.run(None, {taken.name: x_BCHW})[0] for x_BCHW in images])


def detect(
    file: Path,
    pictures: Sequence[NDArray[np.uint8]],
    *,
    imgsz: int,
    batch: int,
    threads: int,
    runtime: Runtime = DEFAULT,
) -> list[NDArray[np.float32]]:
    """What a network finds in pictures, at the thresholds of `predict`.

    Args:
        file: The network.
        pictures: (height, width, 3) in BGR, of any sizes.
        imgsz: Side of the network's square input in pixels.
        batch: Images per inference; the last batch is filled up with its last picture.
        threads: Threads of the network on a CPU.
        runtime: What runs it.

    Returns:
        Of each picture the detections from the most confident on, in pixels of the picture: (n, 6), as left, top,
        right, bottom, confidence, class.
    """
    runner = runtime.open(file, threads, batch)
    (taken,) = runner.get_inputs()
    found = []
    for start in range(0, len(pictures), batch):
        some = [*pictures[start : start + batch]]
        full = some + [some[-1]] * (batch - len(some))
        output = runner.run(None, {taken.name: prepare(full, imgsz)})[0]
        for picture, rows in zip(some, suppress(output), strict=False):  # the filling is not asked for
            scale_boxes((imgsz, imgsz), rows[:, :4], picture.shape)
            found.append(rows[:, :6].numpy().astype(np.float32))
    return found


def _frame(file: Path, images: Sequence[Images], threads: int, runtime: Runtime) -> Callable[[], None]:
    """What takes the next batch of images to detections, by a network that is opened for it."""
    runner = runtime.open(file, threads, len(images[0]))
    (taken,) = runner.get_inputs()
    feeds = itertools.cycle([{taken.name: x_BCHW} for x_BCHW in images])

    def frame() -> None:
        output = runner.run(None, next(feeds))[0]
        if torch.get_num_threads() != 1:  # a network that PyTorch runs has set its own
            torch.set_num_threads(1)
        suppress(output)

    return frame


def _counts(outputs: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    scores = [image[:, 4] if image.shape[-1] == 6 else image[4:].max(axis=0) for output in outputs for image in output]
    above = [(of_image > CONFIDENCE).sum() for of_image in scores]
    kept = [len(found) for output in outputs for found in suppress(output)]
    return {"boxes": float(np.mean(above)), "detections": float(np.mean(kept))}


def _load(timing: Timing, *, boxes: float, detections: float) -> TimedLoad:
    """What of a timing says something of NMS, which no device counts energy for and which is its own reference."""
    return TimedLoad(
        latency_ms=Latency(**asdict(timing.latency_ms)),
        interval_ms=timing.interval_ms,
        rounds=timing.rounds,
        repetitions=timing.repetitions,
        disturbed=timing.disturbed,
        boxes=boxes,
        detections=detections,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
