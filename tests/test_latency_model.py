"""The latency model on made-up devices whose latencies are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from yolov8_nas.measure.latency_model import CONFIDENCE, Features, LatencyModel, accuracy
from yolov8_nas.measure.sampling import sample
from yolov8_nas.runner.results import FittedModel
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost

SPACE = SearchSpace.load("tiny")
PRICES = {"conv1": 0.5, "conv3": 0.3, "conv5": 0.35, "stride2": 0.5, "dilated": 0.8, "depthwise": 2.0}
"""Nanoseconds per thousand multiply-accumulates of the made-up device."""


def truth(architecture: Architecture) -> float:
    """Milliseconds on a device that also takes 4 us a layer, and a fifth more for weights that leave its cache."""
    layers = cost(architecture, 3, 128).layers
    return sum(
        (PRICES[layer.kind] * layer.macs / 1e9 * 20 + 0.004) * (1.2 if layer.weights > 100_000 else 1.0)
        for layer in layers
    )


def measured(architectures: list[Architecture], seed: int, noise: float = 0.01) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([truth(a) for a in architectures]) * rng.normal(1, noise, len(architectures))


def networks(count: int, seed: int) -> list[Architecture]:
    rng = np.random.default_rng(seed)
    return [SPACE.sample(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    fitted = networks(100, 1)
    return LatencyModel.fit(SPACE, 3, 128, fitted, measured(fitted, 2))


def test_latencies_of_unseen_networks_are_predicted_in_their_order(model: LatencyModel) -> None:
    unseen = networks(200, 3)
    found = accuracy(model.predict(unseen)[0], measured(unseen, 4))
    assert found.mape < 0.02
    assert found.spearman > 0.98
    macs = np.array([cost(a, 3, 128).macs for a in unseen], dtype=float)
    assert found.spearman > accuracy(macs, measured(unseen, 4)).spearman + 0.01


def test_few_networks_do_not_mislead_it() -> None:
    fitted, unseen = networks(15, 5), networks(200, 6)
    found = LatencyModel.fit(SPACE, 3, 128, fitted, measured(fitted, 7))
    assert accuracy(found.predict(unseen)[0], measured(unseen, 8)).mape < 0.06


def test_the_upper_bound_holds_as_often_as_it_says() -> None:
    unseen = networks(300, 9)
    shares = []
    for seed in range(5):
        fitted = networks(50, 100 + seed)
        _, upper = LatencyModel.fit(SPACE, 3, 128, fitted, measured(fitted, seed, noise=0.03)).predict(unseen)
        shares.append(np.mean(measured(unseen, 50 + seed, noise=0.03) <= upper))
    assert CONFIDENCE - 0.06 < np.mean(shares) < 0.99


def test_networks_that_are_nearly_measured_ones_do_not_narrow_the_bound() -> None:
    unseen = networks(300, 9)
    shares = []
    for seed in range(5):
        sampled = [one for one in sample(SPACE, 80, 4, seed) if one.role != "holdout"]
        drawn = [one.architecture for one in sampled if one.role == "train"]
        near = [one.architecture for one in sampled if one.role != "train"]  # stock, and stock with one part changed
        latency = [*measured(drawn, seed, noise=0.03), *measured(near, seed, noise=0.001)]
        _, upper = LatencyModel.fit(SPACE, 3, 128, [*drawn, *near], latency).predict(unseen)
        shares.append(np.mean(measured(unseen, 50 + seed, noise=0.03) <= upper))
    assert CONFIDENCE - 0.04 < np.mean(shares) < 0.99


def test_pure_noise_is_not_learned() -> None:
    fitted, unseen = networks(60, 10), networks(200, 11)
    noisy = LatencyModel.fit(SPACE, 3, 128, fitted, np.random.default_rng(0).normal(5.0, 0.5, 60))
    predicted, upper = noisy.predict(unseen)
    assert np.std(predicted) < 0.4
    assert np.median(upper / predicted) > 1.08


def test_features_do_not_depend_on_what_was_asked_before() -> None:
    remembered = Features(3, 128)
    for architecture in networks(60, 13):
        alone = Features(3, 128)([architecture])
        for found, wanted in zip(remembered([architecture]), alone, strict=True):
            np.testing.assert_array_equal(found, wanted)
    work, parts = remembered(networks(2, 14))
    paper = cost(networks(2, 14)[0], 3, 128)
    assert work[0, 1:-1].reshape(-1, 3).sum(axis=0) == pytest.approx(
        [paper.macs / 1e6, paper.bytes / 1e6, len(paper.layers)]
    )
    assert parts[0].reshape(-1, 2).sum(axis=0) == pytest.approx([paper.macs / 1e6, len(paper.layers)])
    assert [len(rows) for rows in remembered([])] == [0, 0]


def test_it_survives_json(model: LatencyModel) -> None:
    again = LatencyModel.of(FittedModel.model_validate(json.loads(json.dumps(model.to_result().plain()))))
    for found, wanted in zip(again.predict(networks(50, 15)), model.predict(networks(50, 15)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_a_refit_counts_new_measurements_and_forgets_none(model: LatencyModel) -> None:
    new = networks(30, 16)
    slower = model.refit([*new, model.architectures[0]], [*(1.2 * measured(new, 17)), 3.0])
    assert len(slower.architectures) == len(model.architectures) + 30
    assert dict(zip(slower.architectures, slower.latencies, strict=True))[model.architectures[0]] == 3.0
    assert slower.margin > model.margin
    better = model.refit(new, measured(new, 17))
    assert np.mean(better.predict(new)[0]) < np.mean(slower.predict(new)[0])


@pytest.mark.parametrize("latencies", [[1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, float("nan")], [1.0, 2.0, 3.0]])
def test_what_cannot_be_fitted_is_refused(latencies: list[float]) -> None:
    with pytest.raises(ValueError, match="four networks and positive latencies"):
        LatencyModel.fit(SPACE, 3, 128, networks(len(latencies), 18), latencies)
