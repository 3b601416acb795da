"""Stock YOLOv8 rescaled to another latency."""

from __future__ import annotations

import math

import pytest

from yolov8_nas.search.baseline import TOLERANCE, rescaled_stock, rescalings
from yolov8_nas.space import SCALES, Architecture, stock_architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.supernet.derive import build


def price(architecture: Architecture) -> float:
    return 1 + cost(architecture, 3, 128).gflops


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("share", [0.4, 0.8, 1.3, 2.5])
def test_comes_within_the_tolerance_with_all_widths_on_one_scale(scale: str, share: float) -> None:
    stock = stock_architecture(scale)
    network = rescaled_stock(scale, price, 1 + share * cost(stock, 3, 128).gflops)
    assert price(network) == pytest.approx(1 + share * cost(stock, 3, 128).gflops, rel=1.01 * TOLERANCE)
    assert [b.depth for b in network.blocks] == [b.depth for b in stock.blocks]
    factors = [
        (a - 8, a, b)
        for a, b in zip(
            [*network.convs, *(b.width for b in network.blocks), network.sppf_width],
            [*stock.convs, *(b.width for b in stock.blocks), stock.sppf_width],
            strict=True,
        )
    ]
    # One factor, rounded by less than two steps of 8, gives every width.
    assert max(low / b for low, _, b in factors) <= min((a + 8) / b for _, a, b in factors)


@pytest.mark.parametrize("scale", SCALES)
def test_stock_rescaled_to_its_own_latency_is_stock(scale: str) -> None:
    stock = stock_architecture(scale)
    assert rescaled_stock(scale, price, price(stock)) == stock


def test_a_rescaled_network_can_be_built() -> None:
    network = rescaled_stock("n", price, 0.7 * price(stock_architecture("n")))
    params = sum(p.numel() for p in build(network, 3).parameters())
    assert params == cost(network, 3, 128).params


def test_the_nearest_is_given_where_none_is_near() -> None:
    assert set(rescaled_stock("n", price, 1e-3).convs) == {8}


def test_roundings_of_one_latency_are_different_networks_with_the_nearest_first() -> None:
    def channels(network: Architecture) -> float:
        return float(sum(network.convs) + sum(block.width for block in network.blocks))

    latency = 0.7 * channels(stock_architecture("s"))
    found = rescalings("s", channels, latency)
    away = [abs(math.log(channels(network) / latency)) for network in found]
    assert away == sorted(away) and away[-1] <= math.log(1 + TOLERANCE)
    assert len(set(found)) == len(found) > 2
    assert rescaled_stock("s", channels, latency) in found
    assert rescalings("s", channels, 1e-3) == []
