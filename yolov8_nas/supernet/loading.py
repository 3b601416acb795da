"""Images on their way to the device: where they are kept, who reads ahead, and which of them a step sees.

What a step sees depends on the seed, the epoch and the step alone: every image is augmented with random numbers of its
own place in the epoch, and a mosaic draws from the whole split. So the number of processes, of workers and the place
where images are kept change the speed, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from ultralytics.data.augment import Mosaic

from yolov8_nas.device.profile import available_cores
from yolov8_nas.evaluation import DetectionImages
from yolov8_nas.supernet.distributed import Processes
from yolov8_nas.supernet.images import settings

RAM_SHARE: Final = 0.5
"""Share of the free memory that kept images may take."""

DISK_SHARE: Final = 0.5
"""Share of the free disk that kept images may take."""

MOST_WORKERS: Final = 8

PREFETCH: Final = 2
"""Batches that a worker holds ready."""

_SAMPLE: Final = 30
"""Images that are decoded to learn how large the decoded split is."""

Batch = dict[str, Any]
"""A batch as Ultralytics collates it: `img` (B, 3, H, W) as bytes, `cls`, `bboxes`, `batch_idx` and names."""


@dataclass(frozen=True)
class Loading:
    """How images are loaded.

    Attributes:
        cache: Where decoded images are kept: in memory, resized; on disk, in full size; or nowhere.
        workers: Processes that read ahead for each training process.
        pinned: Whether batches are copied to the device from pinned memory, while the device works.
    """

    cache: Literal["ram", "disk", "none"]
    workers: int
    pinned: bool


def prepare(images: DetectionImages, batch: int, processes: Processes) -> Loading:
    """Choose how to load, and fill the cache.

    On a CPU the network takes all cores, so there is nobody to read ahead.

    Args:
        images: A split that keeps no images yet; what is chosen is kept in it.
        batch: Images that a process takes at once.
        processes: Those that train, each with images of its own.
    """
    cuda = processes.device.type == "cuda"
    workers = 0
    if cuda:
        workers = max(1, min(MOST_WORKERS, available_cores() // processes.local_size))
        # Batches come through shared memory, of which a container may have 64 MB: better slow than a bus error.
        room = shutil.disk_usage("/dev/shm").free // (2 * processes.local_size)
        workers = min(workers, room // (PREFETCH * batch * 3 * images.imgsz**2))
    cache = processes.agree(_place(images, processes.local_size))
    if cache != "none":
        images.cache = cache
        with processes.first_alone() if cache == "disk" else contextlib.nullcontext():
            images.cache_images()
    return Loading(cache, workers, pinned=cuda)


def _place(images: DetectionImages, copies: int) -> Literal["ram", "disk", "none"]:
    """Where the decoded split has its place."""
    sample = np.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).astype(int)
    decoded = [images.load_image(int(i)) for i in sample]
    resized = len(images) * float(np.mean([image.nbytes for image, _, _ in decoded]))
    full = len(images) * float(np.mean([3 * height * width for _, (height, width), _ in decoded]))
    if resized * copies <= RAM_SHARE * free_memory():
        return "ram"
    folder = Path(images.im_files[0]).parent
    if os.access(folder, os.W_OK) and full <= DISK_SHARE * shutil.disk_usage(folder).free:
        return "disk"
    return "none"


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be taken: the machine's, or what the container's limit leaves, where that is less."""
    free = int(psutil.virtual_memory().available)
    for folder, limit, used, cached in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            taken = int((folder / used).read_text()) - _statistic(folder / "memory.stat", cached)
            return min(free, max(0, int((folder / limit).read_text()) - taken))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free


def _statistic(file: Path, name: str) -> int:
    """A line of a cgroup's statistics; what counts as used and is only a cache of files can be had back."""
    return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[0] == name), 0)


def seeds(seed: int, epoch: int, use: Literal["order", "image", "networks"], place: int = 0) -> np.random.SeedSequence:
    """Seeds for one use of random numbers in an epoch, independent of those for every other."""
    return np.random.SeedSequence((seed, epoch), spawn_key=(("order", "image", "networks").index(use), place))


class _Augmented(Dataset[Batch]):
    """Images by (epoch, place in the epoch, index), each augmented with random numbers of its own."""

    def __init__(self, images: DetectionImages, seed: int, mosaic_epochs: int) -> None:
        self.images = images
        self.seed = seed
        self.mosaic_epochs = mosaic_epochs
        self.transforms = {mosaic: self._transforms(mosaic) for mosaic in (True, False)}

    def _transforms(self, mosaic: bool) -> Any:
        transforms = self.images.build_transforms(settings(self.images.imgsz, mosaic=mosaic))
        joining: Mosaic = transforms.transforms[0].transforms[0]
        joining.buffer_enabled = False  # else, without images in memory, it would draw from those that were read last
        return transforms

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, place, index = key
        self.images.transforms = self.transforms[epoch < self.mosaic_epochs]
        # Ultralytics' augmentation draws from the global generators of python and numpy.
        python, numpy_ = seeds(self.seed, epoch, "image", place).generate_state(2)
        random.seed(int(python))
        np.random.seed(int(numpy_))  # noqa: NPY002
        sample: Batch = self.images[index]
        return sample


@dataclass(frozen=True)
class Shards:
    """Which images a process sees: a shard after the other, each as keys of `_Augmented`.

    The images of a step are cut into `processes * parts` shards. Which process sees a shard, and when, makes no
    difference to the images in it. Images that don't fill a last step are left out, others in each epoch.

    Attributes:
        images: Images of the split.
        batch: Images of a step, all processes and parts together: a multiple of their number.
        rank: Number of the process.
        processes: Number of processes.
        parts: Shards of a process in a step.
        seed: Seed of the order.
        epochs: The epochs, as they are numbered.
    """

    images: int
    batch: int
    rank: int
    processes: int
    parts: int
    seed: int
    epochs: range

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        size = self.batch // (self.processes * self.parts)
        for epoch in self.epochs:
            order = np.random.default_rng(seeds(self.seed, epoch, "order")).permutation(self.images)
            for step in range(self.images // self.batch):
                for part in range(self.parts):
                    start = step * self.batch + (self.rank * self.parts + part) * size
                    yield [(epoch, place, int(order[place])) for place in range(start, start + size)]


def batches(images: DetectionImages, loading: Loading, shards: Shards, mosaic_epochs: int) -> Iterator[Batch]:
    """What a process sees in all epochs, one after the other: readers ahead go on while the network is validated.

    Args:
        images: The train split.
        loading: As `prepare` chose.
        shards: Which images.
        mosaic_epochs: Epochs, from the first on, in which four images are joined to one.
    """
    loader: DataLoader[Batch] = DataLoader(
        _Augmented(images, shards.seed, mosaic_epochs),
        batch_sampler=shards,
        num_workers=loading.workers,
        prefetch_factor=PREFETCH if loading.workers else None,
        pin_memory=loading.pinned,
        collate_fn=images.collate_fn,
    )
    return iter(loader)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, images as floats in 0..1, channels last in memory: they travel as bytes."""
    moved = {name: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for name, v in batch.items()}
    moved["img"] = (moved["img"].float() / 255).contiguous(memory_format=torch.channels_last)
    return moved
