"""Training of the supernet: our own short loop over Ultralytics' dataset, augmentation and loss.

Each step trains several networks on the same images by the sandwich rule (largest, smallest, some at random; Yu &
Huang, arXiv:1903.05134), with one backward pass per network, so that only one graph is alive at a time and the memory
is that of the largest network alone. The smaller networks learn from the labels and, in place, from the largest one's
predictions. BigNAS (arXiv:2003.11142) drops the labels for them; a detector's teacher says "nothing here" everywhere
until it has learnt, so in a short training that would cost the small networks their first epochs.

Running BatchNorm statistics are not kept (see `elastic.ElasticBatchNorm`): before a network is evaluated, it is
derived and its statistics are recalibrated.

Everything random is seeded anew before each epoch from (seed, epoch), so a checkpoint holds no random states, and a
training that was killed and resumed ends, on a CPU with as many threads, with the same bits as an undisturbed one.
"""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from ultralytics.utils.loss import v8DetectionLoss

from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import DetectionImages, Evaluator
from yolov8_nas.progress import Progress
from yolov8_nas.space import Architecture
from yolov8_nas.supernet.batchnorm import calibration_batches, recalibrate
from yolov8_nas.supernet.derive import build, derive
from yolov8_nas.supernet.elastic import REG_MAX
from yolov8_nas.supernet.images import settings, train_split
from yolov8_nas.supernet.supernet import Supernet

CHECKPOINT: Final = "checkpoint.pt"
CALIBRATION_IMAGES: Final = 512
WEIGHT_DECAY: Final = 0.01
GRADIENT_NORM: Final = 10.0

Outputs = dict[str, Any]
"""What the head gives: `boxes` (B, 64, A), `scores` (B, classes, A), `feats`."""


@dataclass(frozen=True)
class Recipe:
    """How a supernet is trained.

    Attributes:
        imgsz: Side of the square input in pixels.
        epochs: Passes over the train split.
        batch: Images per step.
        lr: Peak learning rate of AdamW.
        random_networks: Networks drawn at random in each step, beside the largest and the smallest.
        seed: Seed of weights, order, augmentation and drawn networks.
    """

    imgsz: int
    epochs: int
    batch: int
    lr: float
    random_networks: int
    seed: int

    @property
    def validation_interval(self) -> int:
        """Epochs between two validations: ten, or a third of a short training."""
        return max(1, min(10, math.ceil(self.epochs / 3)))

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
    supernet: Supernet, data_yaml: Path, recipe: Recipe, partial: Path, progress: Progress
) -> tuple[Supernet, list[dict[str, float]]]:
    """Train a supernet, going on from the checkpoint in `partial` where there is one.

    Args:
        supernet: Freshly initialised; it is trained in place, on the device where it is, channels last in memory:
            convolutions on a CPU take three quarters of the time so.
        data_yaml: Ultralytics data yaml with absolute paths, in a writable folder; `train` is trained on, `val` is
            validated on.
        recipe: How to train.
        partial: Folder for the checkpoint, which is written after every epoch; it is made where it is missing.
        progress: Told after every step.

    Returns:
        The exponential moving average of the weights, and a curve point per epoch: `epoch`, `seconds`, `data_seconds`
        (spent waiting for images), the largest network's `box`, `cls` and `dfl` losses, the other networks' `distill`
        loss, `lr`, and where it was validated `map50_95_largest` and `map50_95_smallest`.

    Raises:
        StageError: The gradient is not finite any more.
    """
    partial.mkdir(parents=True, exist_ok=True)
    supernet.to(memory_format=torch.channels_last)
    device = next(supernet.parameters()).device
    images = train_split(data_yaml, recipe.imgsz, augment=True)
    optimizer = _optimizer(supernet, recipe)
    average = copy.deepcopy(supernet).requires_grad_(False).eval()
    weights: list[Tensor] = list(supernet.parameters())
    averages: list[Tensor] = list(average.parameters())
    criterion = _criterion(supernet, recipe)
    validation = _Validation(data_yaml, recipe, partial / "validation", device)
    steps_per_epoch = max(1, len(images) // recipe.batch)
    steps = recipe.epochs * steps_per_epoch

    first = 0
    curves: list[dict[str, float]] = []
    checkpoint = partial / CHECKPOINT
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        supernet.load_state_dict(saved["supernet"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first, curves = saved["epoch"], saved["curves"]
        progress.note(f"going on after epoch {first} of {recipe.epochs}")

    supernet.train()
    for epoch in range(first, recipe.epochs):
        start = time.perf_counter()
        rng = seed_everything(recipe.seed, epoch)
        waited, losses = 0.0, dict.fromkeys(("box", "cls", "dfl", "distill"), 0.0)
        batches = _batches(images, recipe, epoch, rng)
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i
            asked = time.perf_counter()
            batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in next(batches).items()}
            batch["img"] = (batch["img"].float() / 255).contiguous(memory_format=torch.channels_last)
            waited += time.perf_counter() - asked

            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step, steps)
            optimizer.zero_grad(set_to_none=True)
            for name, value in _sandwich(supernet, batch, criterion, recipe.random_networks, rng).items():
                losses[name] += value / steps_per_epoch
            norm = nn.utils.clip_grad_norm_(weights, GRADIENT_NORM)
            if not torch.isfinite(norm):
                raise StageError(
                    f"epoch {epoch + 1}: the gradient is not finite; train the supernet with a learning rate below "
                    f"supernet.lr = {recipe.lr}"
                )
            optimizer.step()
            # The average reaches back over about a tenth of the steps so far, at most ten thousand of them.
            decay = min(0.9999, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, weights, 1 - decay)

            figures = {"loss": sum(losses[part] for part in ("box", "cls", "dfl")) * steps_per_epoch / (i + 1)}
            scores = [point["map50_95_largest"] for point in curves if "map50_95_largest" in point]
            figures |= {"map": scores[-1]} if scores else {}
            progress.update(step + 1, steps, f"epoch {epoch + 1} of {recipe.epochs}", **figures)

        point = {"epoch": epoch + 1, **losses, "lr": optimizer.param_groups[0]["lr"], "data_seconds": waited}
        if (epoch + 1) % recipe.validation_interval == 0 or epoch + 1 == recipe.epochs:
            point |= validation.run(average)
        point["seconds"] = time.perf_counter() - start
        curves.append(point)
        progress.note(_line(point, recipe.epochs))
        saved = {
            "epoch": epoch + 1,
            "supernet": supernet.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curves": curves,
        }
        fresh = checkpoint.with_suffix(".tmp")
        torch.save(saved, fresh)
        fresh.replace(checkpoint)
    return average, curves


def _sandwich(
    supernet: Supernet,
    batch: dict[str, Any],
    criterion: v8DetectionLoss,
    random_networks: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """One backward pass for each network of the step; gradients add up in the shared weights.

    Returns:
        Losses per image: the largest network's by part, and the other networks' mean distillation loss.
    """
    space = supernet.space
    others = [space.smallest(), *(space.sample(rng) for _ in range(random_networks))]
    share = 1 / (1 + len(others))  # so that the gradient's size, and with it the clipping, is that of one network

    supernet.activate(space.largest())
    teacher = supernet(batch["img"])
    loss, parts = criterion(teacher, batch)
    (loss.sum() * share).backward()
    teacher = {name: teacher[name].detach() for name in ("boxes", "scores")}
    losses = {name.removesuffix("_loss"): float(value) for name, value in parts.items()} | {"distill": 0.0}

    for architecture in others:
        supernet.activate(architecture)
        student = supernet(batch["img"])
        distilled = distillation(student, teacher, criterion.hyp.cls, criterion.hyp.dfl)
        ((criterion(student, batch)[0].sum() + distilled) * share).backward()
        losses["distill"] += float(distilled.detach()) / len(others) / len(batch["img"])
    return losses


def distillation(student: Outputs, teacher: Outputs, cls_gain: float, box_gain: float) -> Tensor:
    """How far the student's predictions are from the teacher's, times the number of images (as Ultralytics' loss).

    Kullback-Leibler divergence of the class probabilities everywhere, and of the distributions of the box sides
    (localisation distillation, arXiv:2102.12252) in proportion to the teacher's confidence, so that boxes around
    nothing are not copied.

    Args:
        student: Head outputs with `boxes` (B, 64, A) and `scores` (B, classes, A).
        teacher: The same of the teacher, detached.
        cls_gain: Weight of the class part.
        box_gain: Weight of the box part.
    """
    probabilities: Tensor = teacher["scores"].sigmoid()
    confidence_BA = probabilities.amax(1)
    total = confidence_BA.sum().clamp(min=1)
    cross_entropy = F.binary_cross_entropy_with_logits(student["scores"], probabilities, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(teacher["scores"], probabilities, reduction="sum")

    def sides(boxes: Tensor) -> Tensor:
        return boxes.view(len(boxes), 4, REG_MAX, -1).log_softmax(2)

    divergence = F.kl_div(sides(student["boxes"]), sides(teacher["boxes"]), reduction="none", log_target=True)
    box = (divergence.sum(2).mean(1) * confidence_BA).sum()
    loss: Tensor = (cls_gain * (cross_entropy - entropy) + box_gain * box) / total
    return len(confidence_BA) * loss


def seed_everything(seed: int, epoch: int) -> np.random.Generator:
    """Seed python, numpy and torch for an epoch, and give a generator of its own for drawing networks."""
    python, numpy_, torch_, own = np.random.SeedSequence((seed, epoch)).generate_state(4)
    random.seed(int(python))
    np.random.seed(int(numpy_))  # noqa: NPY002  Ultralytics' augmentation draws from the global generators
    torch.manual_seed(int(torch_))
    return np.random.default_rng(int(own))


def _batches(images: DetectionImages, recipe: Recipe, epoch: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The batches of an epoch; what they hold depends on the seed and the epoch alone."""
    images.transforms = images.build_transforms(settings(recipe.imgsz, mosaic=epoch < recipe.mosaic_epochs))
    if images.cache != "ram":  # where images don't fit into memory, mosaic draws from those read last: forget them
        images.buffer.clear()
        images.ims = [None] * images.ni
    loader: DataLoader[dict[str, Any]] = DataLoader(
        images,
        batch_size=min(recipe.batch, len(images)),
        shuffle=True,
        drop_last=True,
        # On a CPU the cores are busy with the network anyway.
        num_workers=min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0,
        collate_fn=images.collate_fn,
        generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
    )
    return iter(loader)


def _criterion(supernet: Supernet, recipe: Recipe) -> v8DetectionLoss:
    """Ultralytics' loss. It reads strides, classes and gains off a network; any one of the space tells them."""
    network = build(supernet.space.stock, supernet.num_classes).to(next(supernet.parameters()).device)
    network.args = settings(recipe.imgsz)
    return v8DetectionLoss(network)


def _optimizer(supernet: Supernet, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, with decay on the weights of convolutions only (not on biases and BatchNorm)."""
    kernels = [p for p in supernet.parameters() if p.ndim > 1]
    rest = [p for p in supernet.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)


class _Validation:
    """Scores the ends of the space: what lies between them is scored by the search."""

    def __init__(self, data_yaml: Path, recipe: Recipe, work: Path, device: torch.device) -> None:
        self._batches = calibration_batches(data_yaml, recipe.imgsz, CALIBRATION_IMAGES, recipe.batch, recipe.seed)
        self._evaluator = Evaluator(data_yaml, imgsz=recipe.imgsz, batch=recipe.batch, work=work, device=str(device))

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
    figures = " ".join(f"{name} {point[name]:.3f}" for name in ("box", "cls", "dfl", "distill"))
    line = (
        f"epoch {point['epoch']:.0f} of {epochs}: {figures}, "
        f"{point['seconds']:.1f} s ({point['data_seconds']:.1f} s waiting for images)"
    )
    if "map50_95_largest" in point:
        line += f", mAP50-95 largest {point['map50_95_largest']:.3f} smallest {point['map50_95_smallest']:.3f}"
    return line
