"""A network that is open on a device: what every runtime gives.

This module needs NumPy only: it is part of what measures on devices where nothing else is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray


class Runner(Protocol):
    """A network that is open on a device."""

    def get_inputs(self) -> Sequence[Any]:
        """The inputs: each has `name`, `shape` and `type`, the latter as ONNX Runtime writes it."""

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, NDArray[Any]], /
    ) -> Sequence[NDArray[Any]]:
        """The outputs asked for (all of them where there is nothing), given an array for each input."""


@runtime_checkable
class EventTimed(Protocol):
    """A runner that can time the network alone on a GPU, without the copies from and to the host's memory."""

    def gpu_times(self, repetitions: int) -> list[float]:
        """Milliseconds of so many runs, by CUDA events."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output, as ONNX Runtime describes it.

    Attributes:
        name: Name of the tensor.
        shape: Its sizes.
        type: `tensor(float)` and the like.
    """

    name: str
    shape: list[int]
    type: str
