"""Stock YOLOv8 at another latency: what a searched network of that latency has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from yolov8_nas.space import Architecture, stock_architecture

TOLERANCE: Final = 0.02
"""Share within which two latencies count as equal."""

WIDEST: Final = 4.0
"""Largest factor on stock's widths: YOLOv8n times four is as wide as YOLOv8l."""

_SHIFTS: Final = tuple(i / 8 for i in range(8))
"""Part of a step of 8 channels by which a width may fall short of a multiple before it is rounded up to the next."""


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


def _scaled_networks(stock: Architecture, shift: float) -> list[Architecture]:
    """Every network that a factor on stock's widths gives, from narrow to wide."""
    widths = {*stock.convs, *(block.width for block in stock.blocks), stock.sppf_width}
    # The largest factor of each number of channels: a little more, and a width takes its next step.
    factors = {8 * (step + shift) / width for width in widths for step in range(1, int(WIDEST * width / 8) + 1)}
    return list(dict.fromkeys(_scaled(stock, factor, shift) for factor in sorted(factors)))


def _scaled(stock: Architecture, factor: float, shift: float) -> Architecture:
    def width(channels: int) -> int:
        steps = round(channels * factor / 8 - shift, 9)  # a product of floats may lie just above a whole number
        return 8 * max(1, math.ceil(steps))

    return replace(
        stock,
        convs=tuple(width(channels) for channels in stock.convs),
        blocks=tuple(replace(block, width=width(block.width)) for block in stock.blocks),
        sppf_width=width(stock.sppf_width),
    )


def _distance(a: float, b: float) -> float:
    return abs(math.log(a / b))
