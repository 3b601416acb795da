"""What training and scoring take on this machine: a few real steps on images of the dataset, in about a minute.

The steps are those of the supernet's training and of fine-tuning, with their losses, optimizers and augmentation.
Where a whole batch would take too long, fewer images are taken at once; on a CPU a step takes time in proportion to
them. Images come from a small part of the dataset that is kept in memory, as a training keeps them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import v8DetectionLoss

from yolov8_nas.evaluation import Evaluator
from yolov8_nas.files import read_json
from yolov8_nas.measure.benchmark import median_interval
from yolov8_nas.runner.results import Rate
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet import loading
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.derive import build
from yolov8_nas.supernet.distributed import Processes
from yolov8_nas.supernet.images import settings, train_split
from yolov8_nas.supernet.learner import GRADIENT_NORM, WEIGHT_DECAY, Learner, draw
from yolov8_nas.supernet.loading import Batch
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.training import CPU_BATCH, Recipe

BUDGET_S: Final = 60.0
"""Seconds that all steps together are to take, about."""

IMAGES: Final = 64
"""Images of the train split that the steps are taken on."""

SCORED: Final = 32
"""Images of the search split that are scored."""

_KINDS: Final = 5
_ENOUGH: Final = 0.05
_LEAST, _MOST = 3, 30


@dataclass(frozen=True)
class Rates:
    """What each kind of work takes; see `runner.results.TrainingRates`."""

    device: str
    supernet: Rate
    teacher: Rate
    single: Rate
    score: Rate
    recalibration: Rate


def measure(
    dataset: Path, work: Path, space: SearchSpace, recipe: Recipe, batch: int, *, budget_s: float = BUDGET_S
) -> Rates:
    """Take a few steps of each kind.

    Args:
        dataset: Folder of a dataset in its normal form, with `dataset.json`.
        work: Folder for what is made on the way.
        space: The search space.
        recipe: How the supernet is trained.
        batch: Images per step of fine-tuning.
        budget_s: Seconds that all steps together are to take, about.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, names = _few(dataset, work)
    images = train_split(data, recipe.imgsz, augment=True)
    processes = Processes(device)
    most = max(2, min(len(images), CPU_BATCH if recipe.batch == "auto" else recipe.batch))
    how = loading.prepare(images, most, processes)

    def batches(count: int) -> Iterator[Batch]:
        shards = loading.Shards(len(images), count, rank=0, processes=1, parts=1, seed=0, epochs=range(10_000))
        return (loading.to_device(one, device) for one in loading.batches(images, how, shards, 10_000))

    share = budget_s / _KINDS
    stock = build(space.stock, len(names), names).to(device)
    supernet = _supernet_step(space, names, recipe, device)
    single = _single_step(stock, recipe.imgsz, device)

    def timed(step: Callable[[Batch], None], largest: int) -> Rate:
        return _timed(lambda count: _stepper(step, batches(count)), largest, share)

    def pass_through(one: Batch) -> None:
        recalibrate(stock, [one["img"]])

    evaluator = Evaluator(data, imgsz=recipe.imgsz, batch=min(16, SCORED), work=work / "scored", device=str(device))
    scored = len([*(data.parent / "images" / "val").iterdir()])

    def score() -> None:
        evaluator.evaluate(copy.deepcopy(stock).eval())

    score()  # reads the images
    return Rates(
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        supernet=timed(lambda one: supernet(one, alone=False), most),
        teacher=timed(lambda one: supernet(one, alone=True), most),
        single=timed(single, max(2, min(batch, len(images)))),
        recalibration=timed(pass_through, most),
        score=_repeated(score, scored, share),
    )


def _few(dataset: Path, work: Path) -> tuple[Path, list[str]]:
    """A data yaml of a part of the dataset's images, and its class names."""
    names = list(read_json(dataset / "dataset.json")["classes"])
    root = work.absolute() / "few"
    content: dict[str, object] = {"path": str(root), "names": dict(enumerate(names))}
    for split, key, most in (("train", "train", IMAGES), ("search", "val", SCORED)):
        found = sorted((dataset / "dataset" / "images" / split).iterdir())
        chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]
        for image in chosen:
            label = f"{image.stem}.txt"
            _link(root / "images" / key / image.name, image)
            _link(root / "labels" / key / label, dataset / "dataset" / "labels" / split / label)
        content[key] = str(root / "images" / key)
    (root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return root / "data.yaml", names


def _link(link: Path, file: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(file.resolve())


def _supernet_step(
    space: SearchSpace, names: Sequence[str], recipe: Recipe, device: torch.device
) -> Callable[..., None]:
    """A step of the supernet's training, with all of its networks or with the teacher alone."""
    supernet = Supernet(space, len(names), names).to(device)
    learner = Learner(supernet, Processes(device), imgsz=recipe.imgsz, accumulate=1, amp=recipe.amp)
    rng = np.random.default_rng(0)

    def step(one: Batch, *, alone: bool) -> None:
        networks = draw(supernet, recipe.random_networks, rng, anchor=recipe.anchor, near=recipe.near)
        learner.backward(one, networks[:1] if alone else networks, len(one["img"]))
        learner.update(1000, 1e-6)

    return step


def _single_step(network: DetectionModel, imgsz: int, device: torch.device) -> Callable[[Batch], None]:
    """A step of one network, as fine-tuning takes it: in full precision, with a moving average."""
    network = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last).train()
    network.args = settings(imgsz)
    criterion = v8DetectionLoss(network)
    average = copy.deepcopy(network).requires_grad_(False)
    weights: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    averages: list[Tensor] = [
        p for p, q in zip(average.parameters(), network.parameters(), strict=True) if q.requires_grad
    ]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=WEIGHT_DECAY, fused=True)

    def step(one: Batch) -> None:
        criterion(network(one["img"]), one)[0].sum().backward()
        nn.utils.clip_grad_norm_(weights, GRADIENT_NORM).item()  # waits for the device
        optimizer.step()
        torch._foreach_lerp_(averages, weights, 1e-3)
        optimizer.zero_grad(set_to_none=True)

    return step


def _stepper(step: Callable[[Batch], None], batches: Iterator[Batch]) -> Callable[[], None]:
    return lambda: step(next(batches))


def _timed(make: Callable[[int], Callable[[], None]], largest: int, budget_s: float) -> Rate:
    """Seconds that a step takes for one image.

    Args:
        make: Makes a step that takes so many images.
        largest: Images that a step takes in training.
        budget_s: Seconds to spend, about.
    """
    count = min(2, largest)
    step = make(count)
    step()
    start = time.perf_counter()
    step()
    affordable = int(budget_s / (_LEAST + 1) / max((time.perf_counter() - start) / count, 1e-9))
    count = max(count, min(largest, affordable))
    step = make(count)
    step()
    return _repeated(step, count, budget_s)


def _repeated(step: Callable[[], None], count: int, budget_s: float) -> Rate:
    """Seconds for one image of a step that takes `count` of them, repeated until the median is known well enough."""
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < _MOST:
        start = time.perf_counter()
        step()
        seconds.append((time.perf_counter() - start) / count)
        low, high = median_interval(seconds)
        if len(seconds) >= 2 * _LEAST and (high - low) / 2 <= _ENOUGH * float(np.median(seconds)):
            break
        if len(seconds) >= _LEAST and time.perf_counter() - begun > budget_s:
            break
    low, high = median_interval(seconds)
    return Rate(seconds=float(np.median(seconds)), low=low, high=high, images=count, repetitions=len(seconds))
