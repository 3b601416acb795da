"""How long a GPU itself takes, by its own clock.

It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def event_times(launch: Callable[[], object], stream: torch.cuda.Stream, repetitions: int) -> list[float]:
    """Milliseconds of each of some repetitions, by CUDA events.

    Args:
        launch: Puts the work on the stream, which is the current one meanwhile.
        stream: Where it runs.
        repetitions: How often.
    """
    import torch

    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        for _ in range(repetitions)
    ]
    with torch.cuda.stream(stream):
        for start, end in events:
            start.record()
            launch()
            end.record()
    stream.synchronize()
    return [float(start.elapsed_time(end)) for start, end in events]
