"""BatchNorm statistics of one network: what has to be filled in before a network of the supernet is evaluated.

A supernet's weights serve many networks, and each sees other activations; so each has its own statistics, computed
from a few hundred training images when the network is wanted (BigNAS, arXiv:2003.11142, section 3.4).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write
from yolov8_nas.space import Architecture
from yolov8_nas.supernet.images import train_split
from yolov8_nas.supernet.supernet import Supernet


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


@torch.no_grad()
def restore_statistics(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Give every BatchNorm layer the statistics of its input, and factors and offsets so that it computes what it did.

    Of a network whose BatchNorms were folded away and put back (`checkpoint.stock.unfused`), factor and offset then say
    again how large a channel is; before, they are estimates.

    Args:
        model: In evaluation mode; its outputs stay the same.
        images: Batches BCHW, RGB in 0..1.

    Raises:
        InputError: There is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = {norm: torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms}
    counts = dict.fromkeys(norms, 0)

    def add(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        x_BCHW = inputs[0].double()
        sums[norm] += torch.stack([x_BCHW.sum((0, 2, 3)), (x_BCHW**2).sum((0, 2, 3))]).cpu()
        counts[norm] += x_BCHW.numel() // x_BCHW.shape[1]

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    parameter = next(model.parameters())
    try:
        for x_BCHW in images:
            model(x_BCHW.to(parameter))
    finally:
        for hook in hooks:
            hook.remove()
    if not all(counts.values()):
        raise InputError("no images to measure BatchNorm's inputs on; give at least one batch")
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, square = sums[norm] / counts[norm]
        variance = (square - mean**2).clamp(min=0)
        factor = norm.weight.double().cpu() / (norm.running_var.double().cpu() + norm.eps).sqrt()
        offset = norm.bias.double().cpu() - factor * norm.running_mean.double().cpu()
        norm.weight.copy_(factor * (variance + norm.eps).sqrt())
        norm.bias.copy_(offset + factor * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


class ImageBatches(Sequence[Tensor]):
    """Batches of images that are held as bytes: a quarter of what they take as the floats that they are read as.

    Args:
        parts: Batches BCHW of bytes.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> ImageBatches: ...
    def __getitem__(self, index: int | slice) -> Tensor | ImageBatches:
        """A batch as floats in 0..1, made anew each time; of a slice, the batches in it."""
        if isinstance(index, slice):
            return ImageBatches(self.parts[index])
        return self.parts[index].float() / 255


def calibration_batches(data_yaml: Path, imgsz: int, n_images: int, batch: int, seed: int) -> ImageBatches:
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
    return ImageBatches([torch.stack([images[int(i)]["img"] for i in part]) for part in parts])


class StatisticsCache:
    """BatchNorm statistics of a supernet's networks, computed when they are first wanted.

    They lie in a folder, a file for each network, under the digest of weights and images: with other weights, other
    images or another number of them, nothing is found.

    Args:
        folder: Where the files lie; for networks of YOLOv8n's size some 100 kB each.
        supernet: The trained supernet; its weights must not change any more.
        images: The images to compute statistics on.
    """

    def __init__(self, folder: Path, supernet: Supernet, images: ImageBatches) -> None:
        self._folder = folder / _digest([*supernet.state_dict().values(), *images.parts])
        self._images = images

    def fill(self, network: nn.Module, architecture: Architecture) -> None:
        """Give the network that was derived for an architecture its statistics."""
        file = self._folder / f"{architecture.digest}.safetensors"
        buffers = dict(network.named_buffers())
        try:
            known = load_file(file)
            if {name: t.shape for name, t in known.items()} != {name: t.shape for name, t in buffers.items()}:
                raise SafetensorError("the statistics of another network")
        except (FileNotFoundError, SafetensorError):  # there is none, or it was damaged
            recalibrate(network, self._images)
            atomic_write(file, save({name: buffer.contiguous() for name, buffer in buffers.items()}))
        else:
            for name, buffer in buffers.items():
                buffer.copy_(known[name])


def _digest(tensors: Iterable[Tensor]) -> str:
    """32 hexadecimal digits that name the shapes and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]
