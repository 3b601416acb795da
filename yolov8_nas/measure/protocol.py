"""How networks are timed, and the two protocols by which they are; `measure.benchmark` carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Protocol:
    """How networks are timed.

    Attributes:
        warmup: Runs before the timed ones in each visit.
        repetitions: Timed runs in each visit.
        turn: Timed runs of a network in a row, before it is the reference's turn.
        min_rounds: Undisturbed visits that every network gets. Six is the least for which the interval from the
            smallest to the largest round holds the median with 95% probability.
        max_rounds: Visits after which a network is not visited again.
        precision: Half-width of the 95% interval of p50, as a share of p50, at which a network is finished.
        disturbance: Excess of the reference over its median, as a share, from which a visit counts as disturbed.
        leg: Visits after which a checkpoint is written; also between two timings of a reference that takes no turns.
        seed: Seed of the order and of the input.
    """

    warmup: int = 4
    repetitions: int = 12
    turn: int = 3
    min_rounds: int = 6
    max_rounds: int = 12
    precision: float = 0.03
    disturbance: float = 0.25
    leg: int = 8
    seed: int = 0


PROBE: Final = Protocol(min_rounds=12, max_rounds=18)
"""For the many networks that a latency model is fitted to."""

VERIFY: Final = Protocol(warmup=10, repetitions=50, turn=5, min_rounds=8, max_rounds=20, precision=0.01, leg=3)
"""For the few networks of which a verdict is told: at least 400 runs each, so that p99 means something."""
