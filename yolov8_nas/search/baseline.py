"""What a search has to beat: random networks, the largest that keep the limits, stock YOLOv8 of the same latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from yolov8_nas.search.evolution import Price
from yolov8_nas.space import Architecture, SearchSpace, rescale, stock_architecture
from yolov8_nas.space.cost import cost

DRAWS: Final = 20_000
"""Networks drawn at most in search of random ones that keep the limits."""

MAC_SAMPLE: Final = 2_000
"""Random networks within the limits from which those with the most multiply-accumulates are taken."""

TOLERANCE: Final = 0.02
"""Share within which two latencies count as equal."""

WIDEST: Final = 4.0
"""Largest factor on stock's widths: YOLOv8n times four is as wide as YOLOv8l."""

_SHIFTS: Final = tuple(i / 8 for i in range(8))
"""Part of a step of 8 channels by which a width may fall short of a multiple before it is rounded up to the next."""


def random_networks(space: SearchSpace, price: Price, count: int, *, seed: Sequence[int]) -> list[Architecture]:
    """Networks drawn uniformly from those that keep the limits: the baseline that a search has to beat.

    They are drawn from the whole space and thrown away where they miss a limit, never repaired, which would favour the
    neighbourhood of the limit.

    Args:
        space: The search space.
        price: Predicts what networks cost.
        count: Networks wanted, all different; there are fewer where `DRAWS` draws don't hold as many.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(list(seed))
    found: dict[Architecture, None] = {}
    batch = 500
    for _ in range(0, DRAWS, batch):
        if len(found) >= count:
            break
        drawn = [space.sample(rng) for _ in range(batch)]
        found |= dict.fromkeys(a for a, ok in zip(drawn, price(drawn).feasible, strict=True) if ok)
    return list(found)[:count]


def mac_ranking(
    space: SearchSpace, price: Price, count: int, *, num_classes: int, imgsz: int, seed: Sequence[int]
) -> list[Architecture]:
    """The networks with the most multiply-accumulates among `MAC_SAMPLE` random ones that keep the limits.

    More work is more accuracy, says the simplest of all predictors, and on wide ranges it is hard to beat.

    Args:
        space: The search space.
        price: Predicts what networks cost.
        count: Networks wanted.
        num_classes: Classes of the Detect head.
        imgsz: Side of the square input in pixels.
        seed: Seed of the draws.

    Returns:
        At most `count` networks, the one with the most first.
    """
    drawn = random_networks(space, price, MAC_SAMPLE, seed=seed)
    return sorted(drawn, key=lambda network: -cost(network, num_classes, imgsz).macs)[:count]


def rescaled_stock(scale: str, price: Callable[[Architecture], float], latency_ms: float) -> Architecture:
    """Stock YOLOv8 with all widths multiplied by one factor, for a latency that is given.

    This is what people do who need another latency than a stock size has. Widths are rounded up to a multiple of 8, as
    they are in Ultralytics' own sizes. So narrow layers change in large steps, and where no factor comes within
    `TOLERANCE`, the rounding is shifted, as far as nearly down. Latency neither rises evenly nor always with the width,
    so every network that a factor up to `WIDEST` gives is looked at. It need not be of any search space.

    Args:
        scale: Size that is rescaled: `n`, `s`, `m` or `l`. Depth stays its own.
        price: Median latency of a network in milliseconds, measured or predicted.
        latency_ms: Latency to come close to, in milliseconds.

    Returns:
        The nearest network; where even that is not within `TOLERANCE`, `price` of it tells.
    """
    stock = stock_architecture(scale)
    nearest = stock
    for shift in _SHIFTS:
        found = min(_scaled_networks(stock, shift), key=lambda network: _distance(price(network), latency_ms))
        nearest = min(nearest, found, key=lambda network: _distance(price(network), latency_ms))
        if _distance(price(nearest), latency_ms) <= math.log(1 + TOLERANCE):
            break
    return nearest


def rescalings(scale: str, price: Callable[[Architecture], float], latency_ms: float) -> list[Architecture]:
    """All networks that `rescaled_stock` looks at within `TOLERANCE` of a latency, the nearest first.

    They differ in how their widths are rounded, and in nothing that anybody chose.

    Args:
        scale: Size that is rescaled: `n`, `s`, `m` or `l`.
        price: Median latency of a network in milliseconds, measured or predicted.
        latency_ms: The latency, in milliseconds.
    """
    stock = stock_architecture(scale)
    networks = dict.fromkeys(network for shift in _SHIFTS for network in _scaled_networks(stock, shift))
    distance = {network: _distance(price(network), latency_ms) for network in networks}
    return sorted((n for n in networks if distance[n] <= math.log(1 + TOLERANCE)), key=lambda n: distance[n])


def _scaled_networks(stock: Architecture, shift: float) -> list[Architecture]:
    """Every network that a factor on stock's widths gives, from narrow to wide."""
    widths = {*stock.convs, *(block.width for block in stock.blocks), stock.sppf_width}
    # The largest factor of each number of channels: a little more, and a width takes its next step.
    factors = {8 * (step + shift) / width for width in widths for step in range(1, int(WIDEST * width / 8) + 1)}
    return list(dict.fromkeys(rescale(stock, factor, shift) for factor in sorted(factors)))


def _distance(a: float, b: float) -> float:
    return abs(math.log(a / b))
