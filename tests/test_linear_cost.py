"""Costs as sums of tables: exact for every network, and exact in expectation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from toys import TINY, fitted, gflops, networks, toy

from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import PredictionErrors, Smoothness
from yolov8_nas.search.linear_cost import LinearCost, interactions
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost

SMOOTH = [
    Smoothness(curved=curved, length=length, noise=noise)
    for curved, length, noise in ((0.0, 1.0, 0.01), (0.5, 2.0, 0.1), (1.0, 1.0, 0.01))
]


@pytest.mark.parametrize("name", ["tiny", "yolov8n", "yolov8l", "yolov8n-mixed"])
def test_tables_add_up_to_the_physical_latency_of_every_network(name: str) -> None:
    space = SearchSpace.load(name)
    model = fitted(space)
    tables = LinearCost.of_latency(model)
    fresh = [*networks(space, 100, seed=2), space.smallest(), space.largest(), space.stock]
    np.testing.assert_allclose(tables(fresh), model.physical(fresh), rtol=1e-9)
    assert np.ptp(tables(fresh)) > 0.1 * tables.constant
    assert sum(table.values.size for table in tables.tables) < 5000


@pytest.mark.parametrize("figure", ["params", "gflops", "bytes"])
def test_tables_add_up_to_what_a_network_costs_on_paper(figure: str) -> None:
    def price(architectures: list[Architecture]) -> np.ndarray:
        return np.array([getattr(cost(a, 120, 128), figure) for a in architectures], dtype=float)

    space = SearchSpace.load("yolov8s")  # P3 widths below and above the number of classes: the head's width bends
    fresh = networks(space, 50, seed=3)
    np.testing.assert_allclose(LinearCost.tabulate(space, price)(fresh), price(fresh), rtol=1e-9)


def test_a_cost_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="no sum over the interactions"):
        LinearCost.tabulate(TINY, lambda architectures: gflops(architectures) ** 2)


def test_expectation_is_the_mean_over_all_networks_of_a_toy_space() -> None:
    space = toy(
        {
            "down_p4": [64, 128],
            "backbone_p4.depth": [1, 2],
            "backbone_p4.width": [64, 96, 128],
            "backbone_p4.operator": ["dwsep3", "conv3"],
            "topdown_p3.width": [32, 64],
            "bottomup_p4.width": [64, 128],
            "sppf.kernel": [3, 5],
        }
    )
    rng = np.random.default_rng(4)
    probabilities = [rng.dirichlet(np.ones(len(d.options))) for d in space.dimensions]
    genes = list(itertools.product(*(range(len(d.options)) for d in space.dimensions)))
    chance = [np.prod([p[g] for p, g in zip(probabilities, row, strict=True)]) for row in genes]
    wanted = np.dot(chance, gflops([space.decode(row) for row in genes]))
    tables = LinearCost.tabulate(space, gflops)
    assert float(tables.expected([torch.tensor(p) for p in probabilities])) == pytest.approx(wanted, rel=1e-9)
    assert {len(group) for group in interactions(space)} == {1, 2, 3}


def test_expectation_is_the_mean_over_samples_and_has_a_gradient() -> None:
    tables = LinearCost.tabulate(TINY, gflops)
    uniform = [
        torch.full((len(d.options),), 1 / len(d.options), dtype=torch.float64, requires_grad=True)
        for d in TINY.dimensions
    ]
    expected = tables.expected(uniform)
    drawn = tables(networks(TINY, 4000, seed=5))
    assert abs(expected.item() - drawn.mean()) < 4 * drawn.std() / 4000**0.5
    expected.backward()
    width = next(i for i, d in enumerate(TINY.dimensions) if d.name == "backbone_p3.width")
    assert torch.all(uniform[width].grad.diff() > 0)  # every wider option costs more


def test_the_correction_is_within_its_linear_part_and_its_bound() -> None:
    fresh = networks(TINY, 500, seed=6)
    known = networks(TINY, 60, seed=1)
    latency = [sum(layer.macs**0.8 / 1e6 + 0.01 for layer in cost(a, 3, 128).layers) for a in known]
    for smoothness in SMOOTH:
        model = LatencyModel(
            TINY, 3, 128, tuple(known), tuple(latency), smoothness, 0.05, PredictionErrors(mape=0.0, spearman=1.0)
        )
        linear = LinearCost.tabulate(TINY, model.linear_correction)
        rest = np.log(model.predict(fresh)[0] / model.physical(fresh)) - linear(fresh)
        assert np.abs(rest).max() <= model.curvature + 1e-12
        assert (model.curvature > 1e-3) == (np.abs(rest).max() > 1e-4) == (smoothness.curved > 0)


@pytest.mark.parametrize("smoothness", SMOOTH)
def test_the_tangent_is_the_prediction_to_first_order(smoothness: Smoothness) -> None:
    known = networks(TINY, 60, seed=1)
    latency = [sum(layer.macs**0.8 / 1e6 + 0.01 for layer in cost(a, 3, 128).layers) for a in known]
    model = LatencyModel(
        TINY, 3, 128, tuple(known), tuple(latency), smoothness, 0.05, PredictionErrors(mape=0.0, spearman=1.0)
    )
    at = known[7]
    tables = LinearCost.tabulate(TINY, lambda architectures: model.tangent(at, architectures))
    genes = TINY.encode(at)
    beside = [TINY.decode((*genes[:i], g, *genes[i + 1 :])) for i, d in enumerate(TINY.dimensions)
              for g in range(len(d.options)) if g != genes[i]]  # fmt: skip
    truth = np.log(model.predict([at, *beside])[0])
    assert tables([at])[0] == pytest.approx(truth[0])
    change, error = truth[1:] - truth[0], tables(beside) - truth[1:]
    assert np.mean(error**2) < 0.1 * np.mean(change**2)
