"""The one way in which this software scores a detector, and how two scores are compared.

Square letterboxed input (`rect=False`), confidence from 0.001, IoU 0.7 in non-maximum suppression: only under one
protocol do a checkpoint and its static ONNX file agree. With an NMS-free head the detections are scored as they are,
from the same confidence, and at most as many. Scoring is Ultralytics' own validator; what it knows of each image is
kept, so that a difference between two detectors comes with an interval.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t
from torch import nn
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.nms import non_max_suppression

from yolov8_nas.checkpoint import network
from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write

PROTOCOL: Final = {"rect": False, "conf": 0.001, "iou": 0.7, "max_det": 300, "split": "val"}
"""What every evaluation has in common, in Ultralytics' terms."""

_RECALL_GRID: Final = np.linspace(0, 1, 101)
_EPS: Final = 1e-16
_BLOCK: Final = 4_000_000
"""Curve points that a bootstrap holds at once (32 MB an array)."""


@dataclass(frozen=True)
class ImageStats:
    """What the validator found on one image, after non-maximum suppression.

    Attributes:
        name: File name of the image.
        tp: Whether a detection is right, by IoU threshold 0.50, 0.55, ... 0.95: (detections, 10).
        conf: Confidence of the detections, from high to low: (detections,).
        pred_cls: Class of the detections: (detections,).
        target_cls: Class of the true boxes: (boxes,).
    """

    name: str
    tp: NDArray[np.bool_]
    conf: NDArray[np.float32]
    pred_cls: NDArray[np.int32]
    target_cls: NDArray[np.int32]


@dataclass(frozen=True)
class Evaluation:
    """The score of one detector on one split.

    Attributes:
        map50_95: Mean average precision over IoU 0.50 to 0.95, from 0 to 1.
        map50: Mean average precision at IoU 0.50.
        per_class: `map50_95` of each class that has boxes in the split.
        images: Statistics of each image, in the order of the split.
    """

    map50_95: float
    map50: float
    per_class: dict[str, float]
    images: tuple[ImageStats, ...]

    def save(self, path: Path) -> None:
        """Write everything to an `.npz` file of plain arrays, atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            scores=np.array([self.map50_95, self.map50]),
            classes=np.array(list(self.per_class), dtype=np.str_),
            class_scores=np.array(list(self.per_class.values())),
            names=np.array([image.name for image in self.images], dtype=np.str_),
            detections=np.array([len(image.conf) for image in self.images]),
            boxes=np.array([len(image.target_cls) for image in self.images]),
            tp=np.concatenate([image.tp for image in self.images]),
            conf=np.concatenate([image.conf for image in self.images]),
            pred_cls=np.concatenate([image.pred_cls for image in self.images]),
            target_cls=np.concatenate([image.target_cls for image in self.images]),
        )
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote; nothing is unpickled, and nothing is unpacked that takes memory out of proportion.

        Raises:
            InputError: The file is damaged or has another content.
        """
        try:
            _check_size(path)
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in _KINDS}
            _check_arrays(data)
        except _DAMAGE as error:
            raise InputError(f"{path}: not the scores of a detector ({error}); score it again") from None
        detections, boxes = np.cumsum(data["detections"])[:-1], np.cumsum(data["boxes"])[:-1]
        parts = (np.split(data[part], detections) for part in ("tp", "conf", "pred_cls"))
        images = zip(data["names"].tolist(), *parts, np.split(data["target_cls"], boxes), strict=True)
        return cls(
            map50_95=float(data["scores"][0]),
            map50=float(data["scores"][1]),
            per_class=dict(zip(data["classes"].tolist(), data["class_scores"].tolist(), strict=True)),
            images=tuple(ImageStats(*image) for image in images),
        )


_KINDS: Final[Mapping[str, str]] = {
    "scores": "iuf",
    "classes": "U",
    "class_scores": "iuf",
    "names": "U",
    "detections": "iu",
    "boxes": "iu",
    "tp": "b",
    "conf": "f",
    "pred_cls": "iuf",
    "target_cls": "iuf",
}
"""The arrays of an `Evaluation`'s file, each with the kinds of numbers that NumPy may have for it."""

_FREE_BYTES: Final = 64 * 2**20
_MOST_TIMES: Final = 200
"""How many times its size a file may unpack to, from `_FREE_BYTES` on."""

_DAMAGE: Final = (
    *(EOFError, KeyError, ValueError, TypeError, OverflowError, MemoryError),
    *(RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile make of a file that is damaged. An error of the system says nothing of what is in it."""


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_FREE_BYTES, _MOST_TIMES * path.stat().st_size):
        raise ValueError(f"{unpacked:,} bytes unpacked, more than {_MOST_TIMES} times its size")


def _check_arrays(data: Mapping[str, NDArray[Any]]) -> None:
    for name, kinds in _KINDS.items():
        if data[name].dtype.kind not in kinds or data[name].ndim != (2 if name == "tp" else 1):
            raise ValueError(f"{name} is an array of {data[name].dtype} in {data[name].ndim} dimensions")
    if min(data["detections"].min(initial=0), data["boxes"].min(initial=0)) < 0:
        raise ValueError("a number of boxes below zero")
    sides = {name: array.shape for name, array in data.items()}
    found, true = int(data["detections"].sum()), int(data["boxes"].sum())
    expected = {
        "scores": (2,),
        "class_scores": sides["classes"],
        "detections": sides["names"],
        "boxes": sides["names"],
        "tp": (found, 10),
        "conf": (found,),
        "pred_cls": (found,),
        "target_cls": (true,),
    }
    for name, shape in expected.items():
        if sides[name] != shape:
            raise ValueError(f"{name} has the shape {sides[name]}, and {shape} is expected")


@dataclass(frozen=True)
class Comparison:
    """How one detector's mAP50-95 differs from another's on the same images.

    Attributes:
        difference: First minus second, in mAP from -1 to 1.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        word: `ahead`, `undecided` or `behind`, said of the first.
    """

    difference: float
    low: float
    high: float
    word: str


@dataclass(frozen=True)
class TrainingSpread:
    """How far apart mAP50-95 of one network lies, trained with one seed and another.

    Attributes:
        sd: Standard deviation, in mAP from 0 to 1.
        freedom: Degrees of freedom of the estimate.
        source: Where it comes from, in words.
    """

    sd: float
    freedom: float
    source: str

    def draw_differences(self, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
        """Differences between two trainings, with the doubt about `sd` in them."""
        return math.sqrt(2) * self.sd * rng.standard_t(self.freedom, size=shape)

    def updated(self, trainings: Sequence[Sequence[float]], source: str) -> TrainingSpread:
        """This estimate together with what further trainings tell.

        Args:
            trainings: Scores of trainings that differ in nothing but the seed, a group for each network.
            source: Where they come from, in words.
        """
        groups = [np.array(group) for group in trainings if len(group) > 1]
        if not groups:
            return self
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        more = sum(len(group) - 1 for group in groups)
        freedom = self.freedom + more
        variance = (self.freedom * self.sd**2 + squares) / freedom
        return TrainingSpread(math.sqrt(variance), freedom, f"{self.source}, and {source}")


TYPICAL_SPREAD: Final = TrainingSpread(0.009, 4.0, "trainings of one network with several seeds (docs/verdicts.md)")
"""Spread of trainings of a few hundred images, where nothing is known of those at hand; worth four degrees of freedom,
since another data set may be another matter."""

_TRAININGS: Final = 16
"""Draws of trainings for each draw of images: they cost nothing."""


class DetectionImages(YOLODataset):  # type: ignore[misc]
    """Ultralytics' dataset, with its cache of parsed labels beside the data yaml instead of beside the labels.

    A stage's inputs are shared and stay as they are; the yaml lies in a folder of the reader's own.
    """

    def _load_or_scan_cache(self, cache_path: Path, cache_hash: str) -> tuple[dict[str, Any], bool]:
        folder = Path(self.data["yaml_file"]).parent
        found: tuple[dict[str, Any], bool] = super()._load_or_scan_cache(folder / f"{cache_hash}.cache", cache_hash)
        return found


class Evaluator:
    """Scores many detectors on one split: the images are read once.

    Args:
        data: Ultralytics data yaml; its `val` split is used.
        imgsz: Side of the square input in pixels.
        batch: Images at once; a static ONNX file uses its own batch.
        work: Folder for whatever is written on the way.
        device: Torch device of networks that are not ONNX files.
    """

    def __init__(self, data: Path, *, imgsz: int, batch: int, work: Path, device: str = "cpu") -> None:
        self.work = work
        self.imgsz = imgsz
        self._args = {
            **PROTOCOL,
            "task": "detect",
            "mode": "val",
            "data": str(data),
            "imgsz": imgsz,
            "batch": batch,
            "device": device,
            "workers": 0,
            "cache": "ram",
            "plots": False,
            "verbose": False,
        }
        self._images: DetectionImages | None = None

    def evaluate(self, model: nn.Module | Path) -> Evaluation:
        """Score a network; the network itself is left as it is.

        Args:
            model: An Ultralytics network, or the path of a `.pt` or `.onnx` file.

        Raises:
            InputError: An ONNX file has another input size.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        if isinstance(model, Path) and model.suffix == ".pt":
            model = network.load(model).network
        # Ultralytics asks this setting for the branch of a network that has two, and not the network.
        nms_free = {"nms": False} if getattr(model, "end2end", False) else {}
        validator = _Validator(self, {**self._args, **nms_free})
        results = validator(model=str(model) if isinstance(model, Path) else model)
        metrics = validator.metrics
        return Evaluation(
            map50_95=float(results["metrics/mAP50-95(B)"]),
            map50=float(results["metrics/mAP50(B)"]),
            per_class={
                metrics.names[c]: float(ap) for c, ap in zip(metrics.box.ap_class_index, metrics.box.ap, strict=True)
            },
            images=validator.images,
        )

    def dataset(self, path: str, validator: DetectionValidator) -> DetectionImages:
        """The split's images, built on the first call."""
        if self._images is None:
            self._images = DetectionImages(
                img_path=path,
                imgsz=self.imgsz,
                augment=False,
                hyp=validator.args,
                rect=False,
                cache="ram",
                stride=32,
                pad=0.5,
                task="detect",
                data=validator.data,
            )
        return self._images


def evaluate(
    model: nn.Module | Path, data: Path, *, imgsz: int, batch: int, work: Path, device: str = "cpu"
) -> Evaluation:
    """Score one network, see `Evaluator`."""
    return Evaluator(data, imgsz=imgsz, batch=batch, work=work, device=device).evaluate(model)


class ProtocolValidator(DetectionValidator):  # type: ignore[misc]
    """Ultralytics' validator without its time limit.

    Stock code gives up on non-maximum suppression after 2 s + 0.05 s an image and scores what is left as empty, so that
    a busy machine would change a score. Here nothing but the network decides.
    """

    def postprocess(self, preds: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        outputs = non_max_suppression(
            preds, self.args.conf, self.args.iou, multi_label=True, max_det=self.args.max_det, max_time_img=3600.0
        )
        return [{"bboxes": x[:, :4], "conf": x[:, 4], "cls": x[:, 5], "extra": x[:, 6:]} for x in outputs]


class _Validator(ProtocolValidator):
    """The validator that keeps the statistics of each image and takes its images from an `Evaluator`."""

    images: tuple[ImageStats, ...]

    def __init__(self, owner: Evaluator, args: dict[str, Any]) -> None:
        super().__init__(save_dir=owner.work, args=args)
        self.owner = owner
        self.threads = torch.get_num_threads()

    def init_metrics(self, model: nn.Module) -> None:
        torch.set_num_threads(self.threads)  # choosing the CPU, Ultralytics has just set a number of its own
        super().init_metrics(model)

    def build_dataset(self, img_path: str, mode: str = "val", batch: int | None = None) -> DetectionImages:
        size = self.args.imgsz if isinstance(self.args.imgsz, list) else [self.args.imgsz] * 2
        if size != [self.owner.imgsz] * 2:
            raise InputError(
                f"the network takes {size[0]}x{size[1]} images, the evaluation has {self.owner.imgsz} pixels: "
                "evaluate it at its own size, or export it again"
            )
        return self.owner.dataset(img_path, self)

    def get_stats(self) -> dict[str, Any]:
        stats, names = self.metrics.stats, [Path(file).name for file in self.dataloader.dataset.im_files]
        self.images = tuple(
            ImageStats(
                name,
                tp.astype(np.bool_),
                conf.astype(np.float32),
                pred.astype(np.int32),
                target.astype(np.int32),
            )
            for name, tp, conf, pred, target in zip(
                names, stats["tp"], stats["conf"], stats["pred_cls"], stats["target_cls"], strict=True
            )
        )
        results: dict[str, Any] = super().get_stats()
        return results


def compare(
    first: Evaluation,
    second: Evaluation,
    resamples: int = 1000,
    seed: int = 0,
    *,
    spread: TrainingSpread | None = None,
) -> Comparison:
    """Compare two detectors by a paired bootstrap over images.

    Each resample draws as many images as there are, with replacement, and scores both detectors on the same draw; the
    interval is that of the percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    That is the word on two files. Where it shall be one on what was trained (an architecture, a recipe) and each was
    trained once, another seed would have given another file: with `spread`, each resample is moved by a draw of what
    two trainings differ by.

    Args:
        first: The one that is spoken of.
        second: The one it is compared with.
        resamples: Draws.
        seed: Seed of the draws.
        spread: How far apart trainings of one network are; nothing where the files themselves are compared.

    Raises:
        ValueError: The two were not scored on the same images.
    """
    if [image.name for image in first.images] != [image.name for image in second.images]:
        raise ValueError("the two evaluations are of different images: score both on the same split")
    n = len(first.images)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    weights = np.concatenate([np.ones((1, n), dtype=draws.dtype), draws])
    differences = mean_average_precision(first.images, weights) - mean_average_precision(second.images, weights)
    drawn = differences[1:]
    if spread is not None:
        drawn = (drawn[:, None] + spread.draw_differences((resamples, _TRAININGS), rng)).ravel()
    low, high = np.percentile(drawn, [2.5, 97.5])
    return _worded(float(differences[0]), float(low), float(high))


def over_trainings(differences: NDArray[np.float64]) -> Comparison:
    """The mean difference in mAP over trainings of both with several seeds, with its 95% interval.

    Student's t for the seeds, and the images' share of the variance from a bootstrap, added; the degrees of freedom are
    those of Welch and Satterthwaite. Chance within a seed's images is in both, so the interval errs on the wide side.

    Args:
        differences: One row for each seed: of all images, then of each draw of images: (seeds, 1 + draws). All seeds
            have the same draws.

    Raises:
        ValueError: There are fewer than two seeds, from which no spread can be told.
    """
    seeds = len(differences)
    if seeds < 2:
        raise ValueError("one seed tells no spread: train with at least two, better five")
    mean = float(differences[:, 0].mean())
    between = float(differences[:, 0].var(ddof=1)) / seeds
    images = float(differences[:, 1:].mean(axis=0).var(ddof=1)) if differences.shape[1] > 2 else 0.0
    total = between + images
    # What comes of images is known from thousands of draws; what comes of seeds from few.
    freedom = (seeds - 1) * (total / between) ** 2 if between else math.inf
    reach = float(t.ppf(0.975, freedom)) * math.sqrt(total)
    return _worded(mean, mean - reach, mean + reach)


def _worded(difference: float, low: float, high: float) -> Comparison:
    word = "ahead" if low > 0 else "behind" if high < 0 else "undecided"
    return Comparison(difference, low, high, word)


def mean_average_precision(images: Sequence[ImageStats], weights: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """mAP50-95 of weighted images: Ultralytics' definition, with each image counted as often as its weight says.

    Args:
        images: Statistics of the images.
        weights: How often each image counts, one row per result: (results, images).

    Returns:
        mAP50-95 by row of `weights`: (results,).
    """
    _, scores = class_average_precision(images, weights)
    present = ~np.isnan(scores)
    mean: NDArray[np.float64] = np.where(present, scores, 0.0).sum(1) / np.maximum(present.sum(1), 1)
    return mean


def class_average_precision(
    images: Sequence[ImageStats], weights: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """AP50-95 of each class over weighted images; see `mean_average_precision`.

    Precision only matters where recall grows. So the detections of a class shrink to those that are right at some IoU
    threshold, each with the number of wrong ones before it: a few hundred points instead of tens of thousands.

    Args:
        images: Statistics of the images.
        weights: How often each image counts, one row per result: (results, images).

    Returns:
        The classes that have boxes, rising: (classes,), and AP50-95 by row of `weights`, NaN where a row has no box of
        the class: (results, classes).
    """
    owner = np.concatenate([np.full(len(image.conf), i) for i, image in enumerate(images)])
    order = np.argsort(-np.concatenate([image.conf for image in images]))
    owner = owner[order]
    tp = np.concatenate([image.tp for image in images])[order]
    predicted = np.concatenate([image.pred_cls for image in images])[order]
    targets = np.concatenate([image.target_cls for image in images])
    target_owner = np.concatenate([np.full(len(image.target_cls), i) for i, image in enumerate(images)])

    labels = np.unique(targets)
    scores = np.full((len(weights), len(labels)), np.nan)
    for column, c in enumerate(labels):
        boxes = weights @ np.bincount(target_owner[targets == c], minlength=len(images))
        mine = predicted == c
        scores[:, column] = _average_precision(tp[mine], owner[mine], weights, boxes)
    return labels, scores


def _average_precision(
    tp: NDArray[np.bool_], owner: NDArray[np.integer[Any]], weights: NDArray[np.integer[Any]], boxes: NDArray[Any]
) -> NDArray[np.float64]:
    """AP50-95 of one class by row of `weights`; NaN where a row has no box of the class.

    Args:
        tp: The class's detections from the most confident on: (detections, 10).
        owner: Index of each detection's image: (detections,).
        weights: (results, images).
        boxes: True boxes of the class by row: (results,).
    """
    right = np.flatnonzero(tp.any(1))
    if not len(right):
        return np.where(boxes > 0, 0.0, np.nan)
    wrong_before = np.zeros((len(right), weights.shape[1]), dtype=weights.dtype)
    group = np.searchsorted(right, np.arange(len(tp)))  # of a wrong detection: the next right one
    wrong = (group < len(right)) & ~tp.any(1)
    np.add.at(wrong_before, (group[wrong], owner[wrong]), 1)

    result = np.full(len(weights), np.nan)
    thresholds, points = tp.shape[1], 2 * len(right)
    rows = max(1, _BLOCK // max(1, thresholds * points))
    for start in range(0, len(weights), rows):
        w = weights[start : start + rows]
        total = boxes[start : start + rows]
        # Detections by (row, threshold, point): a group of wrong ones, then the right one, in turn.
        hits = np.zeros((len(w), thresholds, points))
        misses = np.zeros_like(hits)
        own = w[:, owner[right]]
        hits[:, :, 1::2] = own[:, None, :] * tp[right].T
        misses[:, :, ::2] = (w @ wrong_before.T)[:, None, :]
        misses[:, :, 1::2] = own[:, None, :] * ~tp[right].T
        hits, misses = hits.cumsum(2), misses.cumsum(2)
        recall = hits / (total[:, None, None] + _EPS)
        seen = hits + misses
        precision = np.where(seen > 0, hits / np.maximum(seen, 1), 1.0)
        ap = _area(recall.reshape(-1, points), precision.reshape(-1, points)).reshape(len(w), thresholds).mean(1)
        result[start : start + rows] = np.where(total > 0, ap, np.nan)
    return result


def _area(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area under precision-recall curves at 101 recalls, as Ultralytics' `compute_ap` has it, many curves at once.

    Args:
        recall: Ascending along the second axis: (curves, points).
        precision: Of the same shape.
    """
    curves = len(recall)
    ends = np.ones((curves, 1))
    x = np.concatenate([0 * ends, recall, recall[:, -1:], ends], axis=1)
    y = np.concatenate([ends, precision, 0 * ends, 0 * ends], axis=1)
    y = np.maximum.accumulate(y[:, ::-1], axis=1)[:, ::-1]
    # Index of the last point at or before each of the 101 recalls, by counting points into the grid's bins.
    bins = np.searchsorted(_RECALL_GRID, x.ravel()).reshape(x.shape) + 102 * np.arange(curves)[:, None]
    before = np.bincount(bins.ravel(), minlength=102 * curves).reshape(curves, 102).cumsum(1)[:, :101] - 1
    after = np.minimum(before + 1, x.shape[1] - 1)
    x0, x1 = np.take_along_axis(x, before, 1), np.take_along_axis(x, after, 1)
    y0, y1 = np.take_along_axis(y, before, 1), np.take_along_axis(y, after, 1)
    share = np.divide(_RECALL_GRID - x0, x1 - x0, out=np.zeros_like(x0), where=x1 > x0)
    area: NDArray[np.float64] = np.trapezoid(y0 + share * (y1 - y0), _RECALL_GRID, axis=1)
    return area
