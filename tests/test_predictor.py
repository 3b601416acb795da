"""Near a limit, score and capacity tell together; what trainings teach is judged by networks that were left out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau
from toys import TINY

from yolov8_nas.search.evolution import Trial
from yolov8_nas.search.predictor import FEATURES, Predictor
from yolov8_nas.space.cost import cost


def trials(count: int, seed: int = 0, noise: float = 1.0) -> tuple[list[Trial], dict]:
    """Networks whose truth is a sum of capacity and something that scores know, but for noise."""
    rng = np.random.default_rng(seed)
    networks = list(dict.fromkeys(TINY.sample(rng) for _ in range(count)))
    macs = np.log([cost(network, 2, 64).macs for network in networks])
    known = rng.normal(size=len(networks))
    truth = (macs - macs.mean()) / macs.std() + known
    scores = 0.4 + 0.01 * (known + noise * rng.normal(size=len(networks)))
    found = [Trial(a, float(s), 0, "seed") for a, s in zip(networks, scores, strict=True)]
    return found, {a: 0.5 + 0.01 * float(t) for a, t in zip(networks, truth, strict=True)}


def fitted(found: list[Trial]) -> Predictor:
    return Predictor.fit(TINY, found, num_classes=2, imgsz=64)


def tau(predicted: np.ndarray, truth: dict) -> float:
    return float(kendalltau(predicted, list(truth.values())).statistic)


def test_score_and_capacity_rank_better_than_either() -> None:
    gains = []
    for seed in range(5):
        found, truth = trials(120, seed)
        predictor = fitted(found)
        features = predictor.features(found)
        alone = [tau(features[:, FEATURES.index(name)], truth) for name in ("score", "macs")]
        gains.append(tau(predictor(found), truth) - max(alone))
    assert np.mean(gains) > 0.1 and min(gains) > 0


def test_where_all_networks_score_alike_capacity_decides() -> None:
    found, _ = trials(30)
    flat = [Trial(trial.architecture, 0.0, 0, "seed") for trial in found]
    macs = [cost(trial.architecture, 2, 64).macs for trial in flat]
    assert np.argsort(fitted(flat)(flat)).tolist() == np.argsort(macs).tolist()


def test_weights_are_learned_from_trainings_and_judged_by_networks_left_out() -> None:
    found, _ = trials(60, noise=0.2)
    truth = {trial.architecture: trial.map50_95 for trial in found}  # capacity is worth nothing here
    plain = fitted(found)
    learned, left_out = plain.calibrated(found, dict(list(truth.items())[:20]))
    assert tau(learned(found), truth) > tau(plain(found), truth) + 0.1
    assert left_out > 0.5
    noise = {
        trial.architecture: float(x) for trial, x in zip(found, np.random.default_rng(1).normal(size=60), strict=True)
    }
    taus = []
    for start in range(0, 60, 12):
        some = dict(list(noise.items())[start : start + 12])
        taus.append(plain.calibrated(found, some)[1])
    assert np.mean(taus) < 0.3, "what is fitted to noise must not look as if it knew something"


def test_few_trainings_change_little() -> None:
    found, truth = trials(40)
    plain = fitted(found)
    learned, _ = plain.calibrated(found, dict(list(truth.items())[:3]))
    own, changed = plain.weights / np.linalg.norm(plain.weights), learned.weights / np.linalg.norm(learned.weights)
    assert float(own @ changed) == pytest.approx(1, abs=0.25)
