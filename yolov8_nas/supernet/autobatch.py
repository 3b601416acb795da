"""The batch that a GPU's memory has room for, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from yolov8_nas.errors import InputError
from yolov8_nas.supernet.learner import Learner, draw
from yolov8_nas.supernet.loading import Batch, to_device

MEMORY_SHARE: Final = 0.8
"""Share of a GPU's free memory that a step may take."""


def most_that_fit(learner: Learner, imgsz: int, boxes: int, most: int) -> int:
    """How many images a process can take at once on its GPU: tried out, in powers of two.

    Ultralytics fits a line to such trials. Here they end at `most`, which is small, so they can be had themselves.

    Args:
        learner: Before its first step.
        imgsz: Side of the square images in pixels.
        boxes: Boxes in an image at most; assigning them to predictions takes memory too.
        most: Images that are wanted.

    Raises:
        InputError: Not even one fits.
    """
    device = learner.processes.device
    networks = draw(learner.supernet, 0, np.random.default_rng(0))  # one graph at a time: the largest network decides
    states = 2 * sum(p.nbytes for p in learner.supernet.parameters())  # of the optimizer, which has none yet
    budget = MEMORY_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) - states

    def fits(size: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            learner.backward(invented_batch(size, imgsz, boxes, device), networks, size)
        except torch.cuda.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_allocated(device) <= budget

    size = largest_power(most, fits)
    learner.supernet.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    if not size:
        raise InputError(
            f"not one image of {imgsz} pixels fits into the memory of {torch.cuda.get_device_name(device)}; take a "
            "smaller imgsz or space, or end what else runs on the device"
        )
    return size


def largest_power(most: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two up to `most` that fits; 0 where not even one does."""
    size, larger = 0, 1
    while larger <= most and fits(larger):
        size, larger = larger, 2 * larger
    return size


def invented_batch(size: int, imgsz: int, boxes: int, device: torch.device) -> Batch:
    """A batch of noise, with so many boxes in each image, for measurements of memory and time."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "img": torch.randint(256, (size, 3, imgsz, imgsz), generator=generator, dtype=torch.uint8),
        "cls": torch.zeros(size * boxes, 1),
        "bboxes": torch.rand(size * boxes, 4, generator=generator) * 0.4 + 0.1,
        "batch_idx": torch.arange(size).repeat_interleave(boxes).float(),
    }
    return to_device(batch, device)
