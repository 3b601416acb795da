"""Training of stand-alone networks: fine-tuning, quantization-aware training, and the stock baseline.

This is Ultralytics' own trainer, with what it leaves open pinned down. The network is trained as it is given, instead
of being rebuilt from its yaml. Each epoch is seeded anew from (seed, epoch), so that a checkpoint needs no random
states. Checkpoints are in full precision, where stock ones hold a halved EMA and FP16 moments. So a training that was
killed and goes on ends, on a CPU with as many threads, with the same bits as an undisturbed one.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from yolov8_nas.checkpoint.archive import read_plain
from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import PROTOCOL, DetectionImages, ProtocolValidator
from yolov8_nas.files import keep, read_kept
from yolov8_nas.supernet.learner import distillation

CHECKPOINT: Final = "checkpoint.pt"

WINDOW: Final = 3
"""Epochs over which scores are averaged at most: one epoch's score on few images is luck by half."""

_JOINING: Final = ("mosaic", "mixup", "cutmix")
"""Augmentation that joins several images, which a training without mosaic does not have at all."""

_FUSED: Final = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that have one kernel for all that a step does."""

Report = Callable[[float, float], None]
"""Told epochs done, with a fraction for the one in progress, and the best mAP50-95 so far, over a few epochs."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: Passes over the train split.
        batch: Images per step. Every step updates the weights: small data sets have too few steps to accumulate.
        lr: Peak learning rate of AdamW; it falls linearly to a hundredth.
        imgsz: Side of the square input in pixels.
        seed: Seed of order and augmentation.
        mosaic: Whether four images are joined to one, but for the last epochs.
        options: Further settings under Ultralytics' names, in the place of what is told here and of `_Trainer`'s.
    """

    epochs: int
    batch: int
    lr: float
    imgsz: int
    seed: int
    mosaic: bool = True
    options: tuple[tuple[str, str | float | bool], ...] = ()

    @property
    def closing(self) -> int:
        """Epochs at the end without mosaic."""
        return min(10, math.ceil(self.epochs / 4)) if self.mosaic else 0

    @property
    def window(self) -> int:
        """Epochs over which scores are averaged: a quarter of the training at most, since scores rise until its end.

        In a training of five epochs the one before the last tells nothing: eight candidates for one limit (BCCD at
        160 px) scored 17 to 42 there, and 41 to 46 in the end.
        """
        return max(1, min(WINDOW, self.epochs // 4))


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        network: The EMA weights of the epoch up to which the mean over `Recipe.window` epochs is best on the yaml's
            `val` split: the last one, unless a training has gone past its best.
        epoch: That epoch, from 1.
        curves: One row per epoch: epoch, seconds, box, cls, dfl (mean training losses), val_box, val_cls, val_dfl, lr,
            map50, map50_95. With an NMS-free head losses and scores are those of its one-to-one branch.
    """

    network: DetectionModel
    epoch: int
    curves: list[dict[str, float]]

    @property
    def score(self) -> float:
        """mAP50-95 of the epoch whose weights were kept."""
        return self.curves[self.epoch - 1]["map50_95"]

    @property
    def seconds(self) -> float:
        """Duration of all epochs."""
        return sum(row["seconds"] for row in self.curves)


def average(curves: Sequence[Mapping[str, float]], epochs: int) -> float:
    """Mean mAP50-95 of the last epochs of a training so far."""
    scores = [row["map50_95"] for row in curves[-epochs:]]
    return math.fsum(scores) / len(scores)


def train(
    network: DetectionModel,
    data: Path,
    recipe: Recipe,
    *,
    work: Path,
    teacher: DetectionModel | None = None,
    report: Report = lambda epochs, best: None,
    device: str = "cpu",
) -> Trained:
    """Train a network, or go on where an interrupted training of the same network in the same folder stopped.

    Args:
        network: The network at the start, with fake quantization for quantization-aware training; it is left as it is.
        data: Ultralytics data yaml. The epoch that is kept is chosen on its `val` split, so this must not be the split
            of final figures.
        recipe: How to train.
        work: The training's own folder; the checkpoint stays in it.
        teacher: A network whose predictions on the same images are learnt beside the labels; it is left as it is.
        report: Told of progress.
        device: Torch device.

    Raises:
        StageError: The loss became infinite.
    """
    work.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(deepcopy(network), data, recipe, work, report, device)
    trainer.add_callback("on_train_start", partial(_set_loss, teacher=teacher))
    if trainer.epochs_done < recipe.epochs:
        trainer.train()
    best = deepcopy(network)
    best.load_state_dict(trainer.best["state"])
    return Trained(best.eval(), trainer.best["epoch"], trainer.curves)


class _TaughtLoss:
    """Ultralytics' loss, and how far predictions are from those of a teacher.

    With an NMS-free head each branch learns from the teacher's own, by the weight that Ultralytics' loss gives it.

    Args:
        plain: Ultralytics' loss.
        student: The network in training; it tells the gains.
        teacher: The other one, with as many branches, on the same device.
    """

    def __init__(self, plain: v8DetectionLoss | E2ELoss, student: DetectionModel, teacher: DetectionModel) -> None:
        self.plain = plain
        self.gains = student.args.cls, student.args.dfl
        self.teacher = teacher

    def __call__(self, preds: dict[str, Any], batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = self.plain(preds, batch)
        with torch.no_grad():
            _, taught = self.teacher(batch["img"])
        if isinstance(self.plain, E2ELoss):
            weights = {"one2many": self.plain.o2m, "one2one": self.plain.o2o}
            distances = [w * distillation(preds[name], taught[name], *self.gains) for name, w in weights.items()]
            distance = torch.stack(distances).sum()
        else:
            distance = distillation(preds, taught, *self.gains)
        return torch.cat([loss, distance[None]]), parts

    def update(self) -> None:
        """What Ultralytics' trainer calls after each epoch: the weights of two branches change."""
        if isinstance(self.plain, E2ELoss):
            self.plain.update()


def _set_loss(trainer: _Trainer, teacher: DetectionModel | None) -> None:
    """Give a network its loss, as it stands after the epochs done; not its average, validated by a plain one."""
    network = trainer.model
    loss = network.init_criterion()
    if isinstance(loss, E2ELoss):
        for _ in range(trainer.epochs_done):
            loss.update()
    if teacher:
        device = next(network.parameters()).device
        loss = _TaughtLoss(loss, network, deepcopy(teacher).eval().to(device))
    network.criterion = loss


class _Trainer(DetectionTrainer):  # type: ignore[misc]
    """Ultralytics' trainer for one given network."""

    def __init__(
        self, network: DetectionModel, data: Path, recipe: Recipe, work: Path, report: Report, device: str
    ) -> None:
        threads = torch.get_num_threads()
        super().__init__(
            overrides={
                "task": "detect",
                "mode": "train",
                "model": "network.yaml",  # never read: the network is set below
                "data": str(data),
                "save_dir": str(work / "ultralytics"),
                "device": device,
                "workers": 0 if device == "cpu" else 8,
                "cache": "ram",
                "epochs": recipe.epochs,
                "patience": 0,
                "batch": recipe.batch,
                "nbs": recipe.batch,
                "imgsz": recipe.imgsz,
                "optimizer": "AdamW",
                "lr0": recipe.lr,
                "lrf": 0.01,
                "momentum": 0.9,
                "warmup_epochs": min(3.0, 0.1 * recipe.epochs),
                "warmup_bias_lr": 0.0,  # stock 0.1 is meant for SGD
                "mosaic": float(recipe.mosaic),
                "close_mosaic": 0,  # closed in `_begin_epoch`: stock code draws from the generator when it closes it
                "amp": False,
                "seed": recipe.seed,
                "deterministic": True,
                "plots": False,
                "verbose": False,
                "conf": PROTOCOL["conf"],
                "iou": PROTOCOL["iou"],
                "max_det": PROTOCOL["max_det"],
                "nms": False if network.end2end else None,  # the branch that is validated
                **{name: value for name, value in recipe.options if recipe.mosaic or name not in _JOINING},
            }
        )
        torch.set_num_threads(threads)  # choosing the CPU, Ultralytics has just set a number of its own
        self.callbacks: dict[str, list[Any]] = defaultdict(list)  # no logging integrations
        self.add_callback("on_train_epoch_start", _Trainer._begin_epoch)
        self.add_callback("on_train_batch_end", _Trainer._tell)
        self.model = network.to(memory_format=torch.channels_last)  # as the supernet is trained
        self.recipe = recipe
        self.report = report
        self.checkpoint = work / CHECKPOINT
        self.state: dict[str, Any] | None
        self.best: dict[str, Any] = {"epoch": 0, "map50_95": -1.0, "state": {}}
        self.curves: list[dict[str, float]] = []
        self.state = read_kept(self.checkpoint, read_plain)
        if self.state is not None:
            self.best, self.curves = self.state["best"], self.state["curves"]

    @property
    def epochs_done(self) -> int:
        return len(self.curves)

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> DetectionImages:
        return DetectionImages(
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=False,
            cache=self.args.cache,
            stride=32,
            pad=0.0 if mode == "train" else 0.5,
            task="detect",
            data=self.data,
        )

    def build_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().build_optimizer(*args, **kwargs)
        for group in optimizer.param_groups if isinstance(optimizer, _FUSED) else ():
            group["fused"] = True  # one kernel instead of one for each operation of each tensor
        return optimizer

    def get_validator(self) -> ProtocolValidator:
        return ProtocolValidator(
            self.test_loader, save_dir=self.save_dir, args=copy(self.args), _callbacks=self.callbacks
        )

    def resume_training(self, ckpt: None) -> None:
        if self.state is None:
            return
        self.model.load_state_dict(self.state["model"])
        self.ema.ema.load_state_dict(self.state["ema"])
        self.ema.updates = self.state["updates"]
        self.optimizer.load_state_dict(self.state["optimizer"])
        self.start_epoch = self.epochs_done
        self.state = None

    def save_model(self) -> bool:
        row = {
            "epoch": self.epoch + 1,
            "seconds": round(time.time() - self.epoch_time_start, 3),
            **{name.removesuffix("_loss"): round(float(loss), 5) for name, loss in self.tloss.items()},
            **{f"val_{name.removesuffix('_loss')}": self.metrics[f"val/{name}"] for name in self.tloss},
            "lr": self.lr["lr/pg0"],
            "map50": self.metrics["metrics/mAP50(B)"],
            "map50_95": self.metrics["metrics/mAP50-95(B)"],
        }
        self.curves.append(row)
        smooth = average(self.curves, self.recipe.window)
        if smooth >= self.best["map50_95"]:
            state = {name: tensor.clone() for name, tensor in self.ema.ema.state_dict().items()}
            self.best = {"epoch": row["epoch"], "map50_95": smooth, "state": state}
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "curves": self.curves,
        }
        keep(self.checkpoint, partial(torch.save, state))
        self.report(self.epochs_done, self.best["map50_95"])
        return True

    def final_eval(self) -> None:
        """Nothing: the artifact is scored, not the checkpoint of the trainer."""

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Nothing: the curves are in the checkpoint."""

    def _handle_nan_recovery(self, epoch: int) -> bool:
        if not self.loss.isfinite():
            raise StageError(
                f"the loss became {self.loss.item()} in epoch {epoch + 1}: lower finetune.lr = {self.recipe.lr}"
            )
        return False

    def _begin_epoch(self) -> None:
        if self.epoch >= self.recipe.epochs - self.recipe.closing:
            self._close_dataloader_mosaic()
        python, numpy_, torch_, order = map(
            int, np.random.SeedSequence((self.recipe.seed, self.epoch)).generate_state(4)
        )
        random.seed(python)
        np.random.seed(numpy_)  # noqa: NPY002  # Ultralytics' augmentation draws from the global generators
        torch.manual_seed(torch_)
        self.train_loader.generator.manual_seed(order)
        self.train_loader.reset()
        self.step = 0

    def _tell(self) -> None:
        self.step += 1
        self.report(self.epochs_done + self.step / (len(self.train_loader) + 1), self.best["map50_95"])
