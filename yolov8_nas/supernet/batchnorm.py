"""BatchNorm statistics of one network: what has to be filled in before a network of the supernet is evaluated.

A supernet's weights serve many networks, and each sees other activations; so each has its own statistics, computed
from a few hundred training images when the network is wanted (BigNAS, arXiv:2003.11142, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from yolov8_nas.errors import InputError
from yolov8_nas.supernet.images import train_split


def recalibrate(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Reset the running statistics of every BatchNorm layer and refill them with their average over `images`.

    Args:
        model: A derived network, or a supernet with one network active. Its mode and momenta stay as they were.
        images: Batches BCHW, RGB in 0..1, of more than one image each.

    Raises:
        InputError: There is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.track_running_stats) for norm in norms]
    training = model.training
    for norm in norms:
        norm.track_running_stats = True
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's sign for the cumulative average: every batch counts the same
    parameter = next(model.parameters())
    batches = 0
    model.train()
    with torch.no_grad():
        for batches, x_BCHW in enumerate(images, 1):  # noqa: B007
            model(x_BCHW.to(parameter))
    model.train(training)
    for norm, (momentum, track) in zip(norms, before, strict=True):
        norm.momentum, norm.track_running_stats = momentum, track
    if not batches:
        raise InputError("no images to recalibrate BatchNorm on; give at least one batch")


def calibration_batches(data_yaml: Path, imgsz: int, n_images: int, batch: int, seed: int) -> list[Tensor]:
    """Training images as a network sees them in evaluation: resized and padded to a square, not augmented.

    Args:
        data_yaml: Ultralytics data yaml with absolute paths; its train split is drawn from.
        imgsz: Side of the square in pixels.
        n_images: How many images, drawn without repetition; all of them where there are fewer.
        batch: Images per batch at most; batches differ in size by one image at most.
        seed: Seed of the draw.

    Returns:
        Float tensors (batch, 3, imgsz, imgsz), RGB in 0..1.
    """
    images = train_split(data_yaml, imgsz, augment=False)
    drawn = np.random.default_rng(seed).permutation(len(images))[:n_images]
    parts = np.array_split(drawn, math.ceil(len(drawn) / batch))
    return [torch.stack([images[int(i)]["img"] for i in part]).float() / 255 for part in parts]
