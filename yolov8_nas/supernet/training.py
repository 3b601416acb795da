"""Training of the supernet: our own short loop over Ultralytics' dataset, augmentation and loss.

What a step does stands in `learner`, which images it sees in `loading`, what several processes do together in
`distributed`. Running BatchNorm statistics are not kept (see `elastic.ElasticBatchNorm`): before a network is
evaluated, it is derived and its statistics are recalibrated.

Everything random comes from (seed, epoch), so a checkpoint holds no random states and nothing of how many processes
wrote it. A training that was killed and resumed ends, on a CPU with as many threads and processes, with the same bits
as an undisturbed one.

The largest network trains alone at first, and the others join when it has learnt something that they can share and be
taught: progressive shrinking's first step (Cai et al., Once-for-All, arXiv:1908.09791), here followed by all sizes at
once. A step of one network costs less than half of one of three or four. On the demo's images, with one seed and about
the same work, stock YOLOv8n's mAP50-95 with the supernet's weights was 0.54 with such a start and 0.38 without.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from yolov8_nas import files
from yolov8_nas.checkpoint.archive import read_plain
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.evaluation import DetectionImages, Evaluator
from yolov8_nas.files import write_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.space import Architecture
from yolov8_nas.supernet import loading
from yolov8_nas.supernet.autobatch import most_that_fit
from yolov8_nas.supernet.batchnorm import calibration_batches, recalibrate
from yolov8_nas.supernet.derive import derive
from yolov8_nas.supernet.distributed import Processes
from yolov8_nas.supernet.images import train_split
from yolov8_nas.supernet.learner import LOSSES, Anchor, Learner, draw
from yolov8_nas.supernet.supernet import Supernet

CHECKPOINT: Final = "checkpoint.pt"
CONDITIONS: Final = "conditions.json"
CALIBRATION_IMAGES: Final = 512
VALIDATION_BATCH: Final = 16
CPU_BATCH: Final = 16
"""Images per step on a CPU where the recipe says `auto`."""

GPU_BATCH: Final = 64
"""Images per step on GPUs at most where the recipe says `auto`: more would be fewer steps, and learn less."""

LEAST_SHARD: Final = 8
"""Images of a process at once that `auto` does not go below for more processes: BatchNorm's statistics need some."""


@dataclass(frozen=True)
class Recipe:
    """How a supernet is trained.

    Attributes:
        imgsz: Side of the square input in pixels.
        epochs: Passes over the train split.
        batch: Images per step, all processes together, or `auto`: on GPUs as many as fit, at most `GPU_BATCH`.
        lr: Peak learning rate of AdamW.
        random_networks: Networks drawn at random in each step, beside the largest and the smallest.
        seed: Seed of weights, order, augmentation and drawn networks.
        largest_first: Share of the epochs in which the teacher (the largest network, or stock) trains alone, before the
            others join.
        accumulate: Parts of its share of a batch that a process works through one after the other.
        anchor: Which networks are trained in every step: the `largest` and the smallest, or `stock` (`learner.draw`).
        near: Share of stock's multiply-accumulates near which every other random network lies; nothing for none.
        amp: Whether networks compute in half precision: bfloat16 where the device has it, else float16 with scaled
            gradients. `auto`: on GPUs.
    """

    imgsz: int
    epochs: int
    batch: int | Literal["auto"]
    lr: float
    random_networks: int
    seed: int
    largest_first: float = 0.4
    accumulate: int = 1
    anchor: Anchor = "largest"
    near: float | None = None
    amp: bool | Literal["auto"] = "auto"

    @property
    def validation_interval(self) -> int:
        """Epochs between two validations: ten, or a third of a short training."""
        return max(1, min(10, math.ceil(self.epochs / 3)))

    @property
    def epochs_alone(self) -> int:
        """Epochs in which the teacher trains alone."""
        return math.floor(self.epochs * self.largest_first)

    @property
    def mosaic_epochs(self) -> int:
        """Epochs with mosaic augmentation; the last tenth sees whole images, as the detector will in use."""
        return self.epochs - math.ceil(self.epochs / 10)

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate of a step out of `steps`: linear warm-up over a twentieth, then half a cosine to 1%."""
        warmup = max(1, steps // 20)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2)


def train(
    supernet: Supernet,
    data_yaml: Path,
    recipe: Recipe,
    partial: Path,
    progress: Progress,
    processes: Processes | None = None,
) -> tuple[Supernet, list[dict[str, float]]]:
    """Train a supernet, going on from the checkpoint in `partial` where there is one.

    Args:
        supernet: Freshly initialised; it is trained in place, on the device where it is, channels last in memory:
            convolutions on a CPU take three quarters of the time so. Processes start with the first one's weights.
        data_yaml: Ultralytics data yaml with absolute paths, in a writable folder; `train` is trained on, `val` is
            validated on.
        recipe: How to train.
        partial: Folder for the checkpoint, which is written after every epoch; it is made where it is missing. All
            processes see the same folder, or those of each machine one with the same checkpoint.
        progress: Told after every step, by the first process.
        processes: Those that train together, as `distributed.join` gives them; nothing for this one alone.

    Returns:
        The exponential moving average of the weights, and a curve point per epoch: `epoch`, `seconds`, `data_seconds`
        (spent waiting for images), the largest network's `box`, `cls` and `dfl` losses, the other networks' `distill`
        loss where there were any, `lr`, and where it was validated `map50_95_largest` and `map50_95_smallest`. Losses
        and waiting are means over the processes. Both are the same on all processes. What was chosen on the way
        (device, batch, workers and so on) is told in `CONDITIONS` in `partial`.

    Raises:
        InputError: The batch does not go with the train split or the processes, or the checkpoint with the recipe.
        StageError: The gradient is not finite any more.
    """
    processes = processes or Processes(next(supernet.parameters()).device)
    training = _Training(supernet, data_yaml, recipe, partial, progress, processes)
    training.run()
    return training.learner.average, training.curves


class _Training:
    """A training as far as it has come; see `train`."""

    def __init__(
        self,
        supernet: Supernet,
        data_yaml: Path,
        recipe: Recipe,
        partial: Path,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self.supernet, self.recipe, self.partial, self.processes = supernet, recipe, partial, processes
        self.progress = progress if processes.first else Progress.silent()
        partial.mkdir(parents=True, exist_ok=True)
        with processes.first_alone():  # it parses the labels
            self.images = train_split(data_yaml, recipe.imgsz, augment=True)
        processes.copy_first(list(supernet.state_dict().values()))
        self.learner = Learner(supernet, processes, imgsz=recipe.imgsz, accumulate=recipe.accumulate, amp=recipe.amp)
        with processes.first_alone():  # a torn one is set aside once
            saved = _checkpoint(partial / CHECKPOINT, recipe, processes.device, self.progress.note)
        self.first: int = saved["epoch"] if saved else 0
        if processes.agree(self.first) != self.first:
            raise RuntimeError(
                f"{partial}: a checkpoint of epoch {self.first}, but the first process has another; start again"
            )
        self.batch: int = saved["batch"] if saved else _batch(recipe, self.learner, self.images)
        self.how = loading.prepare(self.images, _shard(self.batch, recipe, processes, len(self.images)), processes)
        self.validation = None
        if processes.first:
            self.validation = _Validation(data_yaml, recipe, partial / "validation", processes.device)
            self._tell_conditions()
        self.curves: list[dict[str, float]] = []
        if saved:
            self.learner.load_state_dict(saved["learner"])
            self.curves = saved["curves"]
            self.progress.note(f"going on after epoch {self.first} of {recipe.epochs}")
        self.steps_per_epoch = len(self.images) // self.batch
        self.waited = 0.0
        self.batches: Iterator[loading.Batch] = iter(())

    def _tell_conditions(self) -> None:
        conditions = {**_machine(self.learner), "batch": self.batch, "accumulate": self.recipe.accumulate}
        conditions |= asdict(self.how)
        write_json(self.partial / CONDITIONS, conditions)
        self.progress.note(", ".join(f"{name} {value}" for name, value in conditions.items()))

    def run(self) -> None:
        """Train epoch by epoch, and keep a checkpoint of each."""
        recipe, processes = self.recipe, self.processes
        asked = time.perf_counter()
        place = {"rank": processes.rank, "processes": processes.size, "parts": recipe.accumulate}
        epochs = range(self.first, recipe.epochs)
        shards = loading.Shards(len(self.images), self.batch, **place, seed=recipe.seed, epochs=epochs)
        self.batches = loading.batches(self.images, self.how, shards, recipe.mosaic_epochs)
        self.waited = time.perf_counter() - asked
        for epoch in epochs:
            self.curves.append(processes.agree(self._epoch(epoch)))
            self.progress.note(_line(self.curves[-1], recipe.epochs))
            if processes.first:
                state = {"learner": self.learner.state_dict(), "epoch": epoch + 1, "curves": self.curves}
                state |= {"recipe": asdict(recipe), "batch": self.batch}
                files.keep(self.partial / CHECKPOINT, functools.partial(torch.save, state))
        processes.wait()  # for the last checkpoint

    def _epoch(self, epoch: int) -> dict[str, float]:
        """Train for an epoch, from 0; returns its curve point."""
        recipe, start = self.recipe, time.perf_counter()
        rng = np.random.default_rng(loading.seeds(recipe.seed, epoch, "networks"))
        losses = torch.zeros(len(LOSSES), device=self.processes.device)
        for i in range(self.steps_per_epoch):
            self._step(epoch, i, rng, losses)
            figures = {"loss": float(losses[:3].sum()) / (i + 1) / recipe.accumulate}
            scores = [point["map50_95_largest"] for point in self.curves if "map50_95_largest" in point]
            figures |= {"map": scores[-1]} if scores else {}
            done, steps = epoch * self.steps_per_epoch + i + 1, recipe.epochs * self.steps_per_epoch
            self.progress.update(done, steps, f"epoch {epoch + 1} of {recipe.epochs}", **figures)
        means = losses / (self.steps_per_epoch * recipe.accumulate)
        told = dict(zip(LOSSES, means.tolist(), strict=True)) | {"data_seconds": self.waited}
        if epoch < recipe.epochs_alone:
            del told["distill"]  # nobody was taught
        point, self.waited = {"epoch": epoch + 1, **self.processes.mean(told), "lr": self.learner.lr}, 0.0
        if self.validation and ((epoch + 1) % recipe.validation_interval == 0 or epoch + 1 == recipe.epochs):
            point |= self.validation.run(self.learner.average)
        return {**point, "seconds": time.perf_counter() - start}

    def _step(self, epoch: int, i: int, rng: np.random.Generator, losses: Tensor) -> None:
        """One step of the optimizer; adds the losses of the parts of its batch."""
        recipe, step = self.recipe, epoch * self.steps_per_epoch + i
        networks = draw(self.supernet, recipe.random_networks, rng, anchor=recipe.anchor, near=recipe.near)
        if epoch < recipe.epochs_alone:
            networks = networks[:1]
        for _ in range(recipe.accumulate):
            asked = time.perf_counter()
            part = loading.to_device(next(self.batches), self.processes.device)
            self.waited += time.perf_counter() - asked
            losses += self.learner.backward(part, networks, self.batch)
        if not self.learner.update(step, recipe.learning_rate(step, recipe.epochs * self.steps_per_epoch)):
            raise StageError(
                f"epoch {epoch + 1}: the gradient is not finite; train the supernet with a learning rate below "
                f"supernet.lr = {recipe.lr}"
            )


def _checkpoint(file: Path, recipe: Recipe, device: torch.device, note: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint, if there is one. As the number of processes, that of parts may have changed.

    Raises:
        InputError: It is of another recipe.
    """

    def read(kept: Path) -> dict[str, Any]:
        found = read_plain(kept, device)
        missing = {"learner", "epoch", "curves", "batch"} - found.keys()
        if missing:
            raise InputError(f"no {min(missing)} in it")
        return found

    saved = files.read_kept(file, read, note)
    if saved is None:
        return None
    before, now = saved.get("recipe", {}), asdict(recipe)
    if other := [name for name in now if name != "accumulate" and before.get(name) != now[name]]:
        differences = ", ".join(f"{name} {before.get(name)} instead of {now[name]}" for name in other)
        raise InputError(f"{file}: a checkpoint of another training ({differences}); remove it to begin anew")
    return saved


def _batch(recipe: Recipe, learner: Learner, images: DetectionImages) -> int:
    """Images per step: as asked for, or as many as go."""
    if recipe.batch != "auto":
        return recipe.batch
    shards = learner.processes.size * recipe.accumulate
    shard = CPU_BATCH // shards
    if learner.processes.device.type == "cuda":
        boxes = 4 * max(len(label["cls"]) for label in images.labels)  # in a mosaic of the fullest image
        most = max(LEAST_SHARD, GPU_BATCH // shards)
        shard = learner.processes.smallest(most_that_fit(learner, recipe.imgsz, boxes, most))
    return max(1, min(shard, len(images) // shards)) * shards


def _shard(batch: int, recipe: Recipe, processes: Processes, images: int) -> int:
    """Images that a process takes at once.

    Raises:
        InputError: There are too few images, or they can't be shared out evenly.
    """
    if batch > images:
        raise InputError(f"supernet.batch = {batch}, but the train split has {images} images; make the batch smaller")
    shard, rest = divmod(batch, processes.size * recipe.accumulate)
    if rest:
        raise InputError(
            f"supernet.batch = {batch} cannot be shared out evenly among {processes.size} processes with "
            f"supernet.accumulate = {recipe.accumulate}; make it a multiple of {processes.size * recipe.accumulate}"
        )
    return shard


def _machine(learner: Learner) -> dict[str, Any]:
    """What the training runs on."""
    device = learner.processes.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": learner.processes.size,
        "amp": str(learner.precision).removeprefix("torch.") if learner.precision else "off",
    }


class _Validation:
    """Scores the ends of the space: what lies between them is scored by the search."""

    def __init__(self, data_yaml: Path, recipe: Recipe, work: Path, device: torch.device) -> None:
        images = CALIBRATION_IMAGES, VALIDATION_BATCH
        self._batches = calibration_batches(data_yaml, recipe.imgsz, *images, recipe.seed)
        self._evaluator = Evaluator(
            data_yaml, imgsz=recipe.imgsz, batch=VALIDATION_BATCH, work=work, device=str(device)
        )

    def run(self, supernet: Supernet) -> dict[str, float]:
        """mAP50-95 of the largest and the smallest network, with recalibrated BatchNorm."""
        return {
            "map50_95_largest": self._score(supernet, supernet.space.largest()),
            "map50_95_smallest": self._score(supernet, supernet.space.smallest()),
        }

    def _score(self, supernet: Supernet, architecture: Architecture) -> float:
        network = derive(supernet, architecture)
        recalibrate(network, self._batches)
        return self._evaluator.evaluate(network.eval()).map50_95


def _line(point: dict[str, float], epochs: int) -> str:
    """A curve point as one line of the log."""
    figures = " ".join(f"{name} {point[name]:.3f}" for name in LOSSES if name in point)
    line = (
        f"epoch {point['epoch']:.0f} of {epochs}: {figures}, "
        f"{point['seconds']:.1f} s ({point['data_seconds']:.1f} s waiting for images)"
    )
    if "map50_95_largest" in point:
        line += f", mAP50-95 largest {point['map50_95_largest']:.3f} smallest {point['map50_95_smallest']:.3f}"
    return line
