"""One sentence of three kinds: take a stock size, quantize one, or search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yolov8_nas.advice.gains import INT8_DROP, RESCALED, WORTH, recorded
from yolov8_nas.config import Start
from yolov8_nas.runner.results import StockSize
from yolov8_nas.runner.results.advice import Kind
from yolov8_nas.space import SCALES, Architecture, SearchSpace, stock_architecture
from yolov8_nas.space.cost import cost


@dataclass(frozen=True)
class Recommendation:
    """What is recommended.

    Attributes:
        kind: Its kind.
        size: The stock size; nothing where it is to search.
        sentence: The same in words, with the reason.
    """

    kind: Kind
    size: str | None
    sentence: str


def recommend(sizes: Sequence[StockSize], *, space: SearchSpace, start: Start) -> Recommendation:
    """What to do about a target.

    Args:
        sizes: The stock sizes against its limits, those in the probe's precision first.
        space: The search space.
        start: What a search's networks would begin with.
    """
    order = [*SCALES]
    kept = [size for size in sizes if size.outcome == "keeps"]
    plain = [size for size in kept if size.precision == sizes[0].precision]
    largest = max(plain, key=lambda size: order.index(size.scale), default=None)
    quantized = [
        size
        for size in kept
        if size.precision == "int8" and (largest is None or order.index(size.scale) > order.index(largest.scale))
    ]
    if sizes[0].precision != "int8" and quantized:
        return _quantize(max(quantized, key=lambda size: order.index(size.scale)), largest)
    if largest is None:
        return Recommendation("search", None, _none_keeps(sizes, start))
    return _beside(largest, sizes, space=space, start=start)


def _quantize(size: StockSize, largest: StockSize | None) -> Recommendation:
    gained, low, high = INT8_DROP
    instead = f"in floating point nothing larger than stock {largest.scale} does" if largest else "none does so without"
    return Recommendation(
        "quantize",
        size.scale,
        f"Quantize {size.scale}: stock YOLOv8{size.scale} in INT8 keeps the limits with {_left(size)} to spare, and "
        f"{instead}. After quantization-aware training INT8 cost no accuracy where we measured it ({gained:+.1f} "
        f"points of mAP50-95, {low:+.1f} to {high:+.1f}; docs/results.md).",
    )


def _beside(largest: StockSize, sizes: Sequence[StockSize], *, space: SearchSpace, start: Start) -> Recommendation:
    """What to do where a stock size keeps the limits."""
    order = [*SCALES]
    keeps = f"stock YOLOv8{largest.scale} keeps the limits with {_left(largest)} to spare"
    above = next((s for s in sizes if order.index(s.scale) > order.index(largest.scale)), None)
    if largest.scale == order[-1]:
        return _take(largest, f"{keeps}, and there is no larger size here to search below.")
    reach = _work(space.largest()) / _work(stock_architecture(largest.scale))
    if largest.used is not None and largest.used * reach < WORTH:
        larger = order[order.index(largest.scale) + 1]
        return _take(
            largest,
            f"{keeps}, and space {space.name} cannot fill the rest: its largest network has {reach:.2g} times the "
            f"multiply-accumulates. What the limits leave could be searched in space yolov8{larger}.",
        )
    if largest.used is not None and largest.used >= WORTH:
        return _take(
            largest,
            f"{keeps}. That is less than a search has been seen to be worth (the accuracy of rescaled stock at {WORTH} "
            "of its time; docs/results.md).",
        )
    missed = f"; YOLOv8{above.scale} {_how(above)}" if above else ""
    return Recommendation("search", None, f"Search: {keeps}{missed}. Between the two lies room. {_expected(start)}")


def _work(architecture: Architecture) -> int:
    """Multiply-accumulates of a network; neither classes nor input size change which of two has more of them."""
    return cost(architecture, 1, 640).macs


def _take(size: StockSize, why: str) -> Recommendation:
    if size.precision == "int8":  # the device was probed in it
        return Recommendation("quantize", size.scale, f"Quantize {size.scale}: in INT8 {why}")
    return Recommendation("stock", size.scale, f"Take stock {size.scale}: {why}")


def _none_keeps(sizes: Sequence[StockSize], start: Start) -> str:
    smallest = sizes[0]
    return (
        f"Search: no stock size is known to keep the limits, the smallest, YOLOv8{smallest.scale}, {_how(smallest)}. "
        f"{_expected(start)}"
    )


def _expected(start: Start) -> str:
    """What a search is known to win over what people do by hand."""
    rows = [row for row in recorded(start) if row.against == RESCALED]
    if not rows:
        return f"What a search gains from a start like this ({start}) we have not measured."
    told = "; ".join(
        f"{row.difference:+.1f} points ({row.low:+.1f} to {row.high:+.1f}, {row.word}) on {row.data} at "
        f"{row.limit:.0%} of stock"
        for row in rows
    )
    word = "is to be expected" if all(row.low > 0 for row in rows) else "is not to be counted on"
    return f"A gain over stock rescaled by hand {word}: ours was {told}."


def _left(size: StockSize) -> str:
    return "an unknown part of it" if size.used is None else f"{1 - size.used:.0%} of {size.limit}"


def _how(size: StockSize) -> str:
    """How a size stands to the limits."""
    match size.outcome:
        case "misses" if size.used is not None:
            return f"misses {size.limit} by {size.used - 1:.0%}"
        case "too close to tell":
            return f"is too close to {size.limit} to tell"
        case "misses":
            return f"misses {size.limit}"
        case "keeps":
            return f"keeps {size.limit}"
    return f"was not measured against {size.limit}"
