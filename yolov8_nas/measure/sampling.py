"""Which networks of a space are measured so that a latency model can be fitted to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yolov8_nas.runner.results.probe import Role
from yolov8_nas.space import Architecture, SearchSpace


@dataclass(frozen=True)
class Sample:
    """A network to measure.

    Attributes:
        architecture: The network.
        role: `stock`, `train` (a whole network), `swap` (stock with one part changed) or `holdout` (a whole network
            on which the latency model is only checked); `fastest` for one that is predicted to keep limits that no
            other network keeps.
    """

    architecture: Architecture
    role: Role


def sample(space: SearchSpace, networks: int, holdout: int, seed: int) -> list[Sample]:
    """The networks to measure, all different, stock first.

    To fit: stock, the largest and the smallest network, and of the rest a third with one part of stock changed, which
    tells what a part costs, and two thirds whole networks, which tell how costs add up. Every option occurs equally
    often in these. To check: `holdout` whole networks drawn independently.
    """
    rng = np.random.default_rng(seed)
    samples: dict[Architecture, Role] = {space.stock: "stock"}
    for extreme in (space.largest(), space.smallest()):
        samples.setdefault(extreme, "train")
    whole = _balanced(space, networks, rng)
    parts = sorted({d.name.split(".")[0] for d in space.dimensions if len(d.options) > 1})
    swaps = (networks - len(samples)) // 3
    for i in range(100 * swaps):
        if len(samples) >= networks or sum(role == "swap" for role in samples.values()) >= swaps:
            break
        samples.setdefault(_swap(space, parts[i % len(parts)], rng), "swap")
    for architecture in whole:
        if len(samples) < networks:
            samples.setdefault(architecture, "train")
    while len(samples) < networks:
        samples.setdefault(space.sample(rng), "train")
    while len(samples) < networks + holdout:
        samples.setdefault(space.sample(rng), "holdout")
    return [Sample(architecture, role) for architecture, role in samples.items()]


def _balanced(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """Random networks among which the options of every dimension occur equally often."""
    genes = [rng.permutation(np.arange(count) % len(d.options)) for d in space.dimensions]
    return [space.decode([int(column[i]) for column in genes]) for i in range(count)]


def _swap(space: SearchSpace, part: str, rng: np.random.Generator) -> Architecture:
    """Stock with the options of one part drawn anew."""
    genes = [
        int(rng.integers(len(dimension.options))) if dimension.name.split(".")[0] == part else gene
        for gene, dimension in zip(space.encode(space.stock), space.dimensions, strict=True)
    ]
    return space.decode(genes)
