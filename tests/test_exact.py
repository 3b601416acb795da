"""The integer program finds what enumeration finds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from toys import TINY, fitted, networks, toy

from yolov8_nas.errors import StageError
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import PredictionErrors, Smoothness
from yolov8_nas.search.exact import solve
from yolov8_nas.search.linear_cost import LinearCost
from yolov8_nas.search.objective import CostModel, MemoryModel
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint

TOY = toy(
    {
        "down_p4": [64, 128],
        "backbone_p4.depth": [1, 2],
        "backbone_p4.width": [64, 96, 128],
        "backbone_p4.operator": ["dwsep3", "conv3"],
        "topdown_p3.width": [32, 64],
        "sppf.kernel": [3, 5],
    }
)
ALL = [TOY.decode(genes) for genes in itertools.product(*(range(len(d.options)) for d in TOY.dimensions))]

NONE = Smoothness(curved=1.0, length=1.0, noise=1e6)
"""No correction."""

LINEAR = Smoothness(curved=0.0, length=1.0, noise=0.1)
"""A correction that the program knows but for the logarithm."""

STRONG = Smoothness(curved=1.0, length=2.0, noise=0.1)
"""A correction of which the program knows nothing but a bound."""


def model(smoothness: Smoothness, seed: int = 1) -> LatencyModel:
    """A latency model of a made-up device on which some networks are slower than their layers, by up to a fifth."""
    known = networks(TINY, 50, seed)
    latency = [sum(layer.macs for layer in cost(a, 3, 128).layers) / 1e8 for a in known]
    slower = np.array(latency) * np.random.default_rng(seed).uniform(0.9, 1.1, len(known))
    return LatencyModel(
        TOY, 3, 128, tuple(known), tuple(slower), smoothness, 0.05, PredictionErrors(mape=0.0, spearman=1.0)
    )


def costs(limits: Sequence[str], latency: LatencyModel, **changes: Any) -> CostModel:
    parts: dict[str, Any] = {
        "limits": tuple(map(Constraint.parse, limits)),
        "latency": latency,
        "tail": {"p50": 1.0, "p90": 1.1, "p99": 1.3},
        "memory": MemoryModel(10.0, 1e-5, 1e-6, 1.0),
        "energy": None,
        "nms_ms": {"p50": 0.2, "p90": 0.3, "p99": 0.4},
        "num_classes": 3,
        "imgsz": 128,
        "batch": 2,
    }
    return CostModel(**{**parts, **changes})


def worths(space: SearchSpace, seed: int) -> list[list[float]]:
    """More of everything is better, by random steps."""
    rng = np.random.default_rng(seed)
    return [rng.gamma(1.0, size=len(d.options)).cumsum().tolist() for d in space.dimensions]


def worth(space: SearchSpace, utility: Sequence[Sequence[float]], architecture: Architecture) -> float:
    return sum(values[gene] for values, gene in zip(utility, space.encode(architecture), strict=True))


def middle(quantity: str, latency: LatencyModel, share: float = 0.4, **changes: Any) -> str:
    """A limit that about this share of the toy space keeps."""
    relation, unit = (">=", "img/s") if quantity.startswith("throughput") else ("<=", None)
    unit = unit or {"lat": "ms", "mem": "MiB", "ene": "mJ", "pow": "W", "par": "M", "flo": "G"}[quantity[:3]]
    values = costs([f"{quantity}{relation}1{unit}"], latency, **changes)(ALL).values[:, 0]
    return f"{quantity}{relation}{np.quantile(values, 1 - share if relation == '>=' else share):.6f}{unit}"


@pytest.mark.parametrize(
    ("quantities", "smoothness", "seed"),
    [
        (["latency"], NONE, 0),
        (["energy"], NONE, 2),  # HiGHS' presolve loses the optimum of this one
        (["throughput(with_nms)", "flops", "memory"], NONE, 1),
        (["latency_p99(with_nms)", "params"], LINEAR, 0),
        (["throughput"], LINEAR, 1),
        (["latency"], STRONG, 0),
        (["energy", "power"], STRONG, 2),
    ],
)
def test_it_finds_what_enumeration_finds(quantities: list[str], smoothness: Smoothness, seed: int) -> None:
    latency = model(smoothness)
    energy = model(smoothness, seed=2)
    limits = [middle(q, latency, 0.6 if len(quantities) > 1 else 0.4, energy=energy) for q in quantities]
    prices, utility = costs(limits, latency, energy=energy), worths(TOY, seed)
    (found,) = solve(TOY, utility, prices, LinearCost.of_latency(latency), cuts=len(ALL))
    feasible = prices(ALL).feasible
    best = max(worth(TOY, utility, a) for a, ok in zip(ALL, feasible, strict=True) if ok)
    assert 0.02 * len(ALL) < feasible.sum() < 0.8 * len(ALL)
    assert found.proven and found.utility == pytest.approx(best) == found.bound
    assert found.utility == pytest.approx(worth(TOY, utility, found.architecture))
    assert prices([found.architecture]).feasible.all()


def test_without_enough_cuts_it_says_how_far_the_best_can_be() -> None:
    latency = model(STRONG)
    unproven = 0
    for seed in range(3):
        prices, utility = costs([middle("latency", latency)], latency), worths(TOY, seed)
        linear = LinearCost.of_latency(latency)
        (few,), (many,) = (solve(TOY, utility, prices, linear, cuts=cuts) for cuts in (0, len(ALL)))
        assert prices([few.architecture]).feasible.all()
        assert few.utility <= many.utility <= few.bound and many.proven
        assert few.proven == (few.utility == few.bound)
        assert (many.cuts > 0) == (not few.proven)
        unproven += not few.proven
    assert unproven


def test_several_solutions_are_as_far_apart_as_asked() -> None:
    latency = model(STRONG)
    prices, utility = costs([middle("latency", latency)], latency), worths(TOY, 0)
    found = solve(TOY, utility, prices, LinearCost.of_latency(latency), solutions=3, distance=3, cuts=len(ALL))
    left = [a for a, ok in zip(ALL, prices(ALL).feasible, strict=True) if ok]
    for solution in found:
        best = max(left, key=lambda a: worth(TOY, utility, a))
        assert solution.proven and solution.utility == pytest.approx(worth(TOY, utility, best))
        genes = TOY.encode(solution.architecture)
        left = [a for a in left if sum(g != h for g, h in zip(genes, TOY.encode(a), strict=True)) >= 3]
    assert len(found) == 3


@pytest.mark.parametrize("smoothness", [NONE, STRONG])
def test_the_limit_that_nothing_keeps_is_named(smoothness: Smoothness) -> None:
    latency = model(smoothness)
    prices = costs(["flops<=1G", "latency<=0.1ms", "params<=100M"], latency)
    nearest = prices(ALL).values[:, 1].min()
    with pytest.raises(
        StageError, match=r"keep latency_p50<=0.1ms \(nearest: (?P<value>[\d.]+) ms\): loosen"
    ) as raised:
        solve(TOY, worths(TOY, 0), prices, LinearCost.of_latency(latency))
    assert float(str(raised.value).split("nearest: ")[1].split()[0]) == pytest.approx(nearest, rel=0.1)


def test_the_pair_that_nothing_keeps_is_named() -> None:
    latency = model(LINEAR)
    # Of a device that needs the less energy the longer it takes, so that power and latency can't both be low.
    energies = tuple(30 / value for value in latency.latencies)
    energy = LatencyModel(
        TOY, 3, 128, latency.architectures, energies, latency.smoothness, 0.0, PredictionErrors(mape=0.0, spearman=1.0)
    )
    slow, fast = (middle("latency", latency, share) for share in (0.9, 0.15))
    power = middle("power", latency, 0.15, energy=energy)
    linear = LinearCost.of_latency(latency)
    assert solve(TOY, worths(TOY, 0), costs(["params<=100M", slow], latency, energy=energy), linear)
    with pytest.raises(StageError, match=r"keep both (latency|power).* and (latency|power).*\(nearest to the first"):
        solve(TOY, worths(TOY, 0), costs(["params<=100M", fast, power], latency, energy=energy), linear)


@pytest.mark.parametrize("name", ["tiny", pytest.param("yolov8m", marks=pytest.mark.slow)])
def test_whole_spaces_are_solved(name: str) -> None:
    space = SearchSpace.load(name)
    latency = fitted(space)
    drawn = networks(space, 1000)
    limits = [
        f"latency<={np.median(latency.predict(drawn)[0])}ms",
        f"params<={cost(space.stock, 3, 128).params / 1e6}M",
    ]
    prices, utility = costs(limits, latency), worths(space, 0)
    (found,) = solve(space, utility, prices, LinearCost.of_latency(latency), cuts=1)
    feasible = [a for a, ok in zip(drawn, prices(drawn).feasible, strict=True) if ok]
    assert prices([found.architecture]).feasible.all()
    assert max(worth(space, utility, a) for a in feasible) < found.utility <= found.bound
