"""Which of the networks that keep the limits is wanted most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

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

    def to_dict(self) -> dict[str, Any] | None:
        """The objective as it stands in `search.json`; nothing where the most accurate network is wanted."""
        if not self.weighs_latency:
            return None
        return {"accuracy": self.accuracy, "latency": self.latency, "stock_ms": self.stock_ms}


MOST_ACCURATE: Final = Preference()
"""What is wanted unless something else is asked for."""
