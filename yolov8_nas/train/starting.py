"""What trainings begin with: one start for candidates, stock and rescaled stock alike.

- `weights`: every network is sliced from the stock checkpoint that `supernet.weights` names (`supernet.slicing`).
- `supernet`: the candidates begin with the supernet's weights. Stock and rescaled stock begin with what the supernet
  itself began with, or at random where it began so.
- `scratch`: every network begins at random.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint.stock import StockCheckpoint
from yolov8_nas.config import Start
from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write
from yolov8_nas.space import Architecture
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.derive import build, derive
from yolov8_nas.supernet.slicing import sliced
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.warmstart import read

SLICING_IMAGES = 128
"""Training images, at most, to which a sliced network is fitted."""


@dataclass(frozen=True)
class Begun:
    """What a network begins with.

    Attributes:
        start: Its kind.
        told: The same in words: what was taken from where.
    """

    start: Start
    told: str


class Starts:
    """Networks at the start of their trainings; the same one each time that it is asked for.

    Args:
        start: What is asked for.
        supernet: The trained supernet.
        weights: What the supernet began with; nothing where that was random weights.
        calibration: Batches BCHW of training images, for fits and BatchNorm statistics.
        folder: Where sliced networks are kept, since a fit takes its time.

    Raises:
        InputError: `weights` is asked for and there is no stock checkpoint.
    """

    def __init__(
        self, start: Start, supernet: Supernet, weights: Path | None, calibration: Sequence[Tensor], folder: Path
    ) -> None:
        self._start = start
        self._supernet = supernet
        self._calibration = calibration
        self._folder = folder
        self._names = list(supernet.names)
        self._source = read(weights) if weights is not None and start != "scratch" else None
        if start == "weights" and not isinstance(self._source, StockCheckpoint):
            found = "an earlier supernet" if self._source else "nothing"
            raise InputError(
                f"finetune.start = 'weights', but supernet.weights names {found}; let it name a stock YOLOv8 "
                "checkpoint, or take another start"
            )

    def kind(self, architecture: Architecture, *, candidate: bool) -> Start:
        """What a network begins with, in one word."""
        if self._start == "supernet" and not candidate:
            source = self._source
            known = isinstance(source, StockCheckpoint) or (source is not None and architecture in source.space)
            return "weights" if known else "scratch"
        return self._start

    def network(self, architecture: Architecture, seed: int, *, candidate: bool) -> tuple[DetectionModel, Begun]:
        """A network at the start of its training.

        Args:
            architecture: The network.
            seed: Of what starts at random.
            candidate: Whether the search found it; else it is stock, as it is or rescaled.
        """
        kind = self.kind(architecture, candidate=candidate)
        if kind == "scratch":
            torch.manual_seed(seed)
            return build(architecture, len(self._names), self._names), Begun(kind, "random weights")
        if isinstance(self._source, StockCheckpoint) and kind == "weights":
            return self._sliced(self._source, architecture, seed)
        supernet = self._supernet if kind == "supernet" else self._source
        assert isinstance(supernet, Supernet)
        network = derive(supernet, architecture)
        recalibrate(network, self._calibration)
        return network, Begun(kind, "the supernet" if kind == "supernet" else "the supernet's own start")

    def _sliced(self, source: StockCheckpoint, architecture: Architecture, seed: int) -> tuple[DetectionModel, Begun]:
        """The network as it is sliced from a checkpoint, or as it was sliced before."""
        file = self._folder / f"{architecture.digest}-{seed}.safetensors"
        try:
            kept = file.read_bytes()
            told = json.loads(file.with_suffix(".json").read_text())["told"]
            network = build(architecture, len(self._names), self._names)
            network.load_state_dict(load(kept))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):  # none, or torn
            torch.manual_seed(seed)
            images = [batch for i, batch in enumerate(self._calibration) if i * len(batch) < SLICING_IMAGES]
            network, taken = sliced(source, architecture, self._names, images)
            told = str(taken)
            state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            atomic_write(file.with_suffix(".json"), json.dumps({"told": told}).encode())
            atomic_write(file, save(state))
        return network.train(), Begun("weights", told)


def computing(macs: float, images: int, epochs: int, *, taught_by: float = 0.0) -> float:
    """What a training computes: multiply-accumulates, which the load of a machine can't change.

    Forward and backward pass of an image count as three forward passes, a teacher's forward pass as one.

    Args:
        macs: Of a forward pass.
        images: Seen in an epoch.
        epochs: So many.
        taught_by: Multiply-accumulates of a teacher's forward pass.
    """
    return (3 * macs + taught_by) * images * epochs
