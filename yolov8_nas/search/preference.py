"""Which of the networks that keep the limits is wanted most."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.runner.results import Objective

Value = TypeVar("Value", float, NDArray[np.float64])


@dataclass(frozen=True)
class Preference:
    """Weights of accuracy and latency; without a weight of latency, the most accurate network is wanted.

    Attributes:
        accuracy: Weight of 1 - mAP50-95.
        latency: Weight of the median latency as a share of stock YOLOv8's.
        stock_ms: Stock YOLOv8's median latency on the device in milliseconds.
    """

    accuracy: float = 1.0
    latency: float = 0.0
    stock_ms: float = 1.0

    @property
    def weighs_latency(self) -> bool:
        """Whether latency counts beyond its limit."""
        return self.latency > 0

    def loss(self, map50_95: Value, latency_ms: Value) -> Value:
        """`accuracy * (1 - mAP) + latency * latency_ms / stock_ms`, the smaller the better, of one network or many."""
        return self.accuracy * (1 - map50_95) + self.latency * latency_ms / self.stock_ms

    def to_result(self) -> Objective | None:
        """The weights as a part of the stage's result; nothing where the most accurate network is wanted."""
        return Objective(**asdict(self)) if self.weighs_latency else None


MOST_ACCURATE: Final = Preference()
"""What is wanted unless something else is asked for."""
