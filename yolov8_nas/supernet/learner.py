"""One step of training: several networks backward on the same images, then one change of the shared weights.

The sandwich rule (largest network, smallest, some at random; Yu & Huang, arXiv:1903.05134) with one backward pass per
network, so that only one graph is alive at a time and the memory is that of the largest network alone. The smaller
networks learn from the labels and, in place, from the largest one's predictions. BigNAS (arXiv:2003.11142) drops the
labels for them; a detector's teacher says "nothing here" everywhere until it has learnt, so in a short training that
would cost the small networks their first epochs.

The images of a step may be cut into shards, for several processes (`distributed`) and for parts that a process works
through one after the other. Ultralytics' loss is a sum over the images of a shard, divided by what its objects weigh;
each shard's is brought to the size that a whole batch would have, and the gradient is the mean over the shards. It
differs from that of the undivided batch in two things: objects weigh as much as the shard that they are in, and
BatchNorm normalises with the statistics of the shard alone. All processes draw the same networks.

AdamW, because its steps do not depend on the size of the gradient, which differs between the weights that all networks
share and those that few of them use. The gradient is clipped to Ultralytics' norm, which, being that of a sum over the
batch, it exceeds nearly always: so its size does not count at all, and it need not follow the number of images.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.utils.loss import v8DetectionLoss

from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.supernet.derive import build
from yolov8_nas.supernet.distributed import Processes
from yolov8_nas.supernet.elastic import first_bins
from yolov8_nas.supernet.images import settings
from yolov8_nas.supernet.loading import Batch
from yolov8_nas.supernet.supernet import Supernet

WEIGHT_DECAY: Final = 0.01
GRADIENT_NORM: Final = 10.0

NEAR: Final = (0.85, 1.05)
"""Shares of what is searched around between which a network counts as near it."""

DRAWS: Final = 24
"""Random networks of which the one that is nearest to what is searched around is trained."""

REFERENCE_SIZE: Final = 320
"""Side of the images in pixels for which shares of multiply-accumulates are reckoned; they hardly depend on it."""

Anchor = Literal["largest", "stock"]
"""Which networks are trained in every step: the largest and the smallest, or stock."""

LOSSES: Final = ("box", "cls", "dfl", "distill")

Outputs = dict[str, Any]
"""What the head gives: `boxes` (B, 4 * bins, A), `scores` (B, classes, A), `feats`."""


class Learner:
    """The weights, and everything that changes with them.

    Args:
        supernet: The weights; they are trained in place.
        processes: Those that train together.
        imgsz: Side of the square input in pixels.
        accumulate: Shards of a step that this process works through.
        amp: Whether networks compute in half precision; `auto` on GPUs.

    Attributes:
        average: Exponential moving average of the weights, which reaches back over about a tenth of the steps so far,
            at most ten thousand of them.
        criterion: Ultralytics' detection loss.
        precision: Type in which networks compute where it is not float32.
        lr: Learning rate of the last step.
    """

    def __init__(
        self, supernet: Supernet, processes: Processes, *, imgsz: int, accumulate: int, amp: bool | Literal["auto"]
    ) -> None:
        self.supernet = supernet.to(memory_format=torch.channels_last).train()
        self.processes = processes
        self.accumulate = accumulate
        self.average = copy.deepcopy(supernet).requires_grad_(False).eval()
        self.precision = _precision(amp, processes.device)
        self.lr = 0.0
        self._weights: list[nn.Parameter] = list(supernet.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self.criterion = DetectionLoss(supernet, imgsz)
        self._optimizer = _optimizer(self._weights)
        device = processes.device.type
        self._scaler = torch.amp.GradScaler(device, enabled=self.precision is torch.float16)  # else it does nothing

    def backward(self, batch: Batch, networks: Sequence[Architecture], batch_size: int) -> Tensor:
        """Add the gradients of a shard, by one backward pass for each network of the step.

        Args:
            batch: Images and boxes on the device.
            networks: The networks, the largest one first: it teaches the others.
            batch_size: Images of the whole batch.

        Returns:
            The `LOSSES` per image: the largest network's by part, and the other networks' mean distillation loss.
        """
        largest, *others = networks
        # So that the gradient's size, and with it the clipping, is that of one network on the whole batch.
        share = batch_size / len(batch["img"]) / self.accumulate / len(networks)
        teacher = self._outputs(largest, batch["img"])
        loss, parts = self.criterion(teacher, batch)
        self._scaler.scale(loss.sum() * share).backward()
        teacher = {name: teacher[name].detach() for name in ("boxes", "scores")}
        distill = torch.zeros((), device=loss.device)
        for architecture in others:
            student = self._outputs(architecture, batch["img"])
            distilled = distillation(student, teacher, self.criterion.hyp.cls, self.criterion.hyp.dfl)
            labelled = self.criterion(student, batch)[0].sum()
            self._scaler.scale((labelled + distilled) * share).backward()
            distill += distilled.detach() / len(others) / len(batch["img"])
        return torch.stack([*(parts[f"{name}_loss"] for name in LOSSES[:3]), distill])

    def update(self, step: int, lr: float) -> bool:
        """Change the weights by the gradients of all processes.

        Args:
            step: Number of the step, from 0.
            lr: Learning rate.

        Returns:
            Whether the gradients are finite. With scaled gradients, some that are not are part of finding the scale,
            and the step is left out; only where no scale helps they count.
        """
        self.lr = lr
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.processes.average_gradients(self._weights)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._weights, GRADIENT_NORM)
        finite = bool(torch.isfinite(norm)) or (self._scaler.is_enabled() and self._scaler.get_scale() >= 1)
        if finite:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            decay = min(0.9999, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._averages, list(self._weights), 1 - decay)
        self._optimizer.zero_grad(set_to_none=True)
        if self.processes.device.type == "cpu":
            _return_free_memory()
        return finite

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later process needs to go on: weights in float32, average, optimizer, scale."""
        return {
            "supernet": self.supernet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.supernet.load_state_dict(state["supernet"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self._scaler.is_enabled():  # the checkpoint may come from a device that needs none
            self._scaler.load_state_dict(state["scaler"])

    def _outputs(self, architecture: Architecture, x_BCHW: Tensor) -> Outputs:
        """Raw head outputs of a network, in float32: the loss needs it."""
        self.supernet.activate(architecture)
        with torch.autocast(x_BCHW.device.type, self.precision, enabled=self.precision is not None):
            outputs = self.supernet(x_BCHW)
        # Of the maps the loss reads the size, and from their type that of its anchors.
        feats = [torch.empty(1, 1, *f_BCHW.shape[2:], device=f_BCHW.device) for f_BCHW in outputs["feats"]]
        return {"boxes": outputs["boxes"].float(), "scores": outputs["scores"].float(), "feats": feats}


def draw(
    supernet: Supernet,
    random_networks: int,
    rng: np.random.Generator,
    *,
    anchor: Anchor = "largest",
    near: float | None = None,
) -> list[Architecture]:
    """The networks of a step, the one that teaches the others first.

    The sandwich rule trains the largest and the smallest network in every step. A supernet that starts from a trained
    stock network is anchored there instead: stock keeps what it has learned, and teaches it, while the largest network,
    with its random outer channels, would teach noise and cost the most.

    Args:
        supernet: The weights.
        random_networks: Networks drawn at random.
        rng: Source of randomness.
        anchor: Which networks are trained in every step: the `largest` and the smallest, or `stock`.
        near: Share of stock's multiply-accumulates that is searched around. Every other random network then lies within
            `NEAR` of it: that is where scores decide, and uniform draws hardly ever get there.
    """
    space = supernet.space
    first = [space.stock] if anchor == "stock" else [space.largest(), space.smallest()]
    drawn = [_near(supernet, near, rng) if near and i % 2 == 0 else space.sample(rng) for i in range(random_networks)]
    return [*first, *drawn]


def _near(supernet: Supernet, share: float, rng: np.random.Generator) -> Architecture:
    """A random network with about this share of stock's multiply-accumulates; the nearest of `DRAWS`, where none is."""
    low, high = (share * bound for bound in NEAR)
    networks = [supernet.space.sample(rng) for _ in range(DRAWS)]
    stock = cost(supernet.space.stock, supernet.num_classes, REFERENCE_SIZE).macs
    shares = [cost(network, supernet.num_classes, REFERENCE_SIZE).macs / stock for network in networks]
    away = [max(low - own, own - high, 0.0) for own in shares]
    return networks[int(np.argmin(away))]


def distillation(student: Outputs, teacher: Outputs, cls_gain: float, box_gain: float) -> Tensor:
    """How far the student's predictions are from the teacher's, times the number of images (as Ultralytics' loss).

    Kullback-Leibler divergence of the class probabilities everywhere, and of the distributions of the box sides
    (localisation distillation, arXiv:2102.12252) in proportion to the teacher's confidence, so that boxes around
    nothing are not copied.

    Args:
        student: Head outputs with `boxes` (B, 4 * bins, A) and `scores` (B, classes, A).
        teacher: The same of the teacher, detached; it may have another number of bins.
        cls_gain: Weight of the class part.
        box_gain: Weight of the box part.
    """
    probabilities: Tensor = teacher["scores"].sigmoid()
    confidence_BA = probabilities.amax(1)
    total = confidence_BA.sum().clamp(min=1)
    cross_entropy = F.binary_cross_entropy_with_logits(student["scores"], probabilities, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(teacher["scores"], probabilities, reduction="sum")

    students_BSRA, teachers_BSRA = (
        outputs["boxes"].view(len(confidence_BA), 4, -1, outputs["boxes"].shape[2]) for outputs in (student, teacher)
    )
    bins = min(students_BSRA.shape[2], teachers_BSRA.shape[2])
    found, wanted = (first_bins(sides, bins).log_softmax(2) for sides in (students_BSRA, teachers_BSRA))
    divergence = F.kl_div(found, wanted, reduction="none", log_target=True)
    box = (divergence.sum(2).mean(1) * confidence_BA).sum()
    loss: Tensor = (cls_gain * (cross_entropy - entropy) + box_gain * box) / total
    return len(confidence_BA) * loss


class DetectionLoss:
    """Ultralytics' loss for all networks of a space.

    It reads strides, classes, bins and gains off a network: stock tells them, with as many bins as predictions have.

    Args:
        supernet: The networks.
        imgsz: Side of the square input in pixels.

    Attributes:
        hyp: The gains.
    """

    def __init__(self, supernet: Supernet, imgsz: int) -> None:
        self._supernet = supernet
        self._by_bins: dict[int, v8DetectionLoss] = {}
        self.hyp = settings(imgsz)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The loss by parts, times the number of images, and its parts by name."""
        bins = outputs["boxes"].shape[1] // 4
        if bins not in self._by_bins:
            stock = self._supernet.space.stock
            with torch.random.fork_rng(devices=[]):
                network = build(replace(stock, head=replace(stock.head, reg_max=bins)), self._supernet.num_classes)
            network.to(next(self._supernet.parameters()).device).args = self.hyp
            self._by_bins[bins] = v8DetectionLoss(network)
        return self._by_bins[bins](outputs, batch)  # type: ignore[no-any-return]


def _optimizer(weights: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW, with decay on the weights of convolutions only (not on biases and BatchNorm)."""
    kernels = [p for p in weights if p.ndim > 1]
    rest = [p for p in weights if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def _return_free_memory() -> None:
    """Give the system what is free inside the C library's heap.

    Networks of ever other sizes leave holes there, which glibc keeps: a training on a CPU would grow with every step,
    though it holds no more than it did.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # only glibc has it
        trim(0)


def _precision(amp: bool | Literal["auto"], device: torch.device) -> torch.dtype | None:
    """The type in which networks compute, or nothing for float32."""
    cuda = device.type == "cuda"
    if not (cuda if amp == "auto" else amp):
        return None
    return torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
