"""Small search spaces and made-up devices whose answers can be enumerated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost

TINY = SearchSpace.load("tiny")


def networks(space: SearchSpace, count: int, seed: int = 0) -> list[Architecture]:
    rng = np.random.default_rng(seed)
    return [space.sample(rng) for _ in range(count)]


def fitted(space: SearchSpace) -> LatencyModel:
    """A latency model with prices of every kind, of a made-up device on which few wide layers are fast."""
    known = networks(space, 60, seed=1)
    latency = [sum(layer.macs**0.8 / 1e6 + 0.01 for layer in cost(a, 3, 128).layers) for a in known]
    return LatencyModel.fit(space, 3, 128, known, latency)


def gflops(architectures: Sequence[Architecture]) -> np.ndarray:
    return np.array([cost(a, 3, 128).gflops for a in architectures])


def toy(free: Mapping[str, Sequence[Any]]) -> SearchSpace:
    """The tiny space with a choice in these dimensions only."""
    data = TINY.to_dict()
    stock = {d.name: [d.options[g]] for d, g in zip(TINY.dimensions, TINY.encode(TINY.stock), strict=True)}
    options = {**stock, **free}
    for part in (*data["convs"], "attention"):
        (data["convs"] if part in data["convs"] else data)[part] = options[part]
    for name, choices in (*data["blocks"].items(), ("sppf", data["sppf"]), ("detect", data["detect"])):
        choices |= {part: options[f"{name}.{part}"] for part in choices}
    return SearchSpace.from_dict(data)
