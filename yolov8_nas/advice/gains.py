"""What searches of this project have gained, as far as it was measured: the only grounds on which a gain is foretold.

Every figure stands in the page that its source names, and a test holds it against that page. There is none for other
data, other limits or other devices; how far a limit is from those of the figures is told beside them.
"""

from __future__ import annotations

from typing import Final

from yolov8_nas.config import Start
from yolov8_nas.runner.results import Recorded

RESCALED: Final = "stock rescaled to the same latency"
FULL: Final = "full stock"

_FROM_WEIGHTS: Final = "docs/search.md, What it finds"
_FROM_SCRATCH: Final = "docs/results.md, And from scratch?"

RECORDED: Final = (
    Recorded(
        data="BCCD", limit=0.6, start="weights", against=RESCALED,
        difference=0.0, low=-1.4, high=1.4, word="undecided", source=_FROM_WEIGHTS,
    ),
    Recorded(
        data="BCCD", limit=0.6, start="weights", against=FULL,
        difference=-3.3, low=-4.6, high=-2.0, word="behind", source=_FROM_WEIGHTS,
    ),
    Recorded(
        data="BCCD", limit=0.8, start="scratch", against=RESCALED,
        difference=2.2, low=0.7, high=3.8, word="ahead", source=_FROM_SCRATCH,
    ),
    Recorded(
        data="inspection", limit=0.8, start="scratch", against=RESCALED,
        difference=2.9, low=1.8, high=4.3, word="ahead", source=_FROM_SCRATCH,
    ),
    Recorded(
        data="BCCD", limit=0.8, start="scratch", against=FULL,
        difference=-0.6, low=-1.7, high=0.5, word="undecided", source=_FROM_SCRATCH,
    ),
    Recorded(
        data="inspection", limit=0.8, start="scratch", against=FULL,
        difference=-0.2, low=-1.9, high=1.5, word="undecided", source=_FROM_SCRATCH,
    ),
    Recorded(
        data="BCCD", limit=0.8, start="supernet", against=RESCALED,
        difference=0.3, low=-1.6, high=2.4, word="undecided", source=_FROM_SCRATCH,
    ),
    Recorded(
        data="inspection", limit=0.8, start="supernet", against=RESCALED,
        difference=-0.7, low=-2.2, high=0.9, word="undecided", source=_FROM_SCRATCH,
    ),
)  # fmt: skip
"""Differences in points of mAP50-95 between the network found and stock."""

WORTH: Final = 0.935
"""Share of rescaled stock's time at which the network found was as accurate (docs/results.md, from trained weights): so
much of a limit as it leaves is all that a search has been seen to be worth in time."""

LIMIT_USED: Final = 0.985
"""Share of the limit that the network found uses (docs/results.md)."""

INT8_DROP: Final = (0.3, -0.2, 0.9)
"""Points of mAP50-95 that networks gained in INT8 after quantization-aware training, and the 95% interval
(docs/results.md, What does INT8 cost)."""


def recorded(start: Start) -> tuple[Recorded, ...]:
    """What searches have gained whose networks began like this."""
    return tuple(row for row in RECORDED if row.start == start)
