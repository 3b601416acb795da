"""The search: limits are kept, nothing is scored twice, an interruption changes nothing, and it beats blind luck."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import detection
import fabricated
import numpy as np
import pytest
import torch

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError, WaitingError
from yolov8_nas.export import artifact
from yolov8_nas.files import write_json
from yolov8_nas.measure import benchmark, bundle, engine_file
from yolov8_nas.measure import tensorrt_rtx as rtx
from yolov8_nas.measure.benchmark import Measurement, Percentiles
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import LatencyTable, NmsResult, ResolvedLimit
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search import baseline, candidates, measuring, objective
from yolov8_nas.search.baseline import mac_ranking, random_networks
from yolov8_nas.search.candidates import ATTEMPTS, choose, near_the_limits
from yolov8_nas.search.evolution import (
    SPARE,
    Trial,
    evolve,
    first_generation,
    option_effects,
    pareto_front,
    repair,
    select,
    to_the_limit,
    utility,
)
from yolov8_nas.search.memo import Memo
from yolov8_nas.search.objective import CostModel, Estimate, MemoryModel
from yolov8_nas.search.plan import Plan
from yolov8_nas.search.preference import Preference
from yolov8_nas.search.searcher import Searcher
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages.search import STAGE
from yolov8_nas.stages.search import run as search
from yolov8_nas.stages.search.settings import SearchSettings
from yolov8_nas.supernet.derive import build
from yolov8_nas.supernet.supernet import Supernet

SPACE = SearchSpace.load("tiny")
MARGIN = 1.05

PROFILE = fabricated.PROFILE | {"threads": 1}

WRITE_NETWORK = artifact.write_network
"""The real one, which most tests of the stage do without."""


class Interrupted(Exception):
    """Stands for a SIGKILL."""


def shares(space: SearchSpace, architectures: Sequence[Architecture]) -> np.ndarray:
    """Genes as shares of their range, from 0 for the smallest option to 1: (n, dimensions)."""
    options = np.array([len(d.options) for d in space.dimensions])
    genes = np.array([space.encode(a) for a in architectures]).reshape(-1, len(options))
    return genes / np.maximum(options - 1, 1)


@dataclass
class Landscape:
    """A search problem that can be computed: what a network costs, what it scores, and what was asked."""

    space: SearchSpace = SPACE
    limit: float = 4.0
    seed: int = 0
    scored: list[Architecture] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        n = len(self.space.dimensions)
        self.expense = rng.gamma(1.0, size=n) * 8 / n
        self.value = rng.gamma(1.0, size=n)
        self.pairs = rng.permutation(n)

    def latency(self, architectures: Sequence[Architecture]) -> np.ndarray:
        return 1 + shares(self.space, architectures) @ self.expense

    def accuracy(self, architecture: Architecture) -> float:
        (x,) = shares(self.space, [architecture])
        return float((np.sqrt(x) @ self.value + (x * x[self.pairs]) @ self.value) / (2 * self.value.sum()))

    def price(self, architectures: Sequence[Architecture]) -> Estimate:
        limit = Constraint.parse(f"latency<={self.limit}ms")
        latency = self.latency(architectures)
        values = latency[:, None]
        return Estimate((limit,), latency, MARGIN * latency, values, limit.violation(values))

    def score(self, architectures: Sequence[Architecture]) -> list[float]:
        self.scored += architectures
        return [self.accuracy(a) for a in architectures]

    def evolve(self, generations: int = 6, population: int = 12, seed: int = 0, **callbacks: Any) -> list[Trial]:
        score = callbacks.pop("score", self.score)
        return evolve(
            self.space, self.price, score, population=population, generations=generations, seed=seed, **callbacks
        )


@pytest.mark.parametrize(("limit", "seed"), [(1.5, 0), (3.0, 1), (6.0, 2)])
def test_every_scored_network_keeps_the_limit_and_none_is_scored_twice(limit: float, seed: int) -> None:
    landscape = Landscape(limit=limit)
    trials = landscape.evolve(seed=seed)
    latency = landscape.latency(landscape.scored)
    assert latency.max() <= limit
    assert np.median(latency) > 0.95 * limit or latency.max() == landscape.latency([SPACE.largest()])
    assert len(set(landscape.scored)) == len(landscape.scored) == len(trials) == 6 * 12
    assert [t.generation for t in trials] == sorted(t.generation for t in trials)
    rescaled = [a for a in SPACE.rescaled() if landscape.latency([a]) <= limit]
    seeds = [t for t in trials if t.generation == 0]
    assert {t.source for t in seeds} == {"seed", "rescaled"} if rescaled else {"seed"}
    assert [t.architecture for t in seeds if t.source == "rescaled"] == rescaled[-1:]
    assert {t.source for t in trials if t.generation} == {"evolution"}


def test_the_first_generation_holds_the_widest_rescaled_stock_within_the_limits_and_uses_them() -> None:
    roomy = Landscape(limit=1e3)
    networks = first_generation(SPACE, roomy.price, 24, np.random.default_rng(0))
    assert networks[SPACE.stock] == "rescaled" and SPACE.largest() in networks
    tight = Landscape(limit=6.0)
    networks = first_generation(SPACE, tight.price, 24, np.random.default_rng(0))
    rescaled = [a for a in SPACE.rescaled() if tight.latency([a]) <= 6.0]
    assert networks.pop(rescaled[-1]) == "rescaled" and SPACE.stock not in networks
    assert (1 - tight.latency(list(networks)) / 6.0 <= SPARE).mean() > 0.9
    smallest = Landscape(limit=1.001)
    assert set(first_generation(SPACE, smallest.price, 1, np.random.default_rng(0))) == {SPACE.smallest()}


def test_the_first_generation_holds_informed_networks_repaired_and_tells_them_apart() -> None:
    landscape = Landscape(limit=4.0)
    price = landscape.price
    drawn = random_networks(SPACE, price, 3, seed=[1])
    informed = {drawn[0]: "exact", SPACE.largest(): "prior", drawn[1]: "prior"}
    first = first_generation(SPACE, price, 12, np.random.default_rng(0), informed)
    assert len(first) == 12 and price(list(first)).feasible.all()
    assert sorted(first.values()) == ["exact", "prior", "prior", "rescaled", *["seed"] * 8]
    assert SPACE.largest() not in first
    (exact,) = (a for a, source in first.items() if source == "exact")
    same = np.array(SPACE.encode(exact)) >= SPACE.encode(drawn[0])
    assert same.all(), "an informed network within the limits only grows"


def test_what_the_solver_proposes_is_scored_once_and_learns_from_the_scores() -> None:
    landscape = Landscape(small_space(), limit=1e3)
    asked = []

    def propose(effects: Any) -> list[Architecture]:
        best = landscape.space.decode([int(np.argmax(effect)) for effect in effects])
        asked.append(best)
        return [best]

    trials = landscape.evolve(generations=5, population=6, propose=propose)
    exact = [t.architecture for t in trials if t.source == "exact"]
    assert len(asked) == 4 and len(set(asked)) >= 1
    assert set(exact) <= set(asked) and len(exact) == len(set(exact))
    assert set(asked) <= {t.architecture for t in trials}
    assert max(t.map50_95 for t in trials) == max(
        landscape.accuracy(landscape.space.decode(g))
        for g in np.ndindex(*(len(d.options) for d in landscape.space.dimensions))
    )


def test_the_effects_of_options_are_those_of_an_additive_score() -> None:
    rng = np.random.default_rng(0)
    truth = [rng.normal(size=len(d.options)) for d in SPACE.dimensions]
    networks = [SPACE.sample(rng) for _ in range(400)]
    history = [Trial(a, float(utility(SPACE, truth, [a])[0]), 0, "seed") for a in networks]
    effects = option_effects(SPACE, history)
    for learned, true in zip(map(np.array, effects), truth, strict=True):
        assert learned - learned.mean() == pytest.approx(true - true.mean(), abs=0.2)


def test_weights_of_accuracy_and_latency_decide_where_they_are_given() -> None:
    landscape = Landscape(limit=1e3)
    networks = [SPACE.sample(np.random.default_rng(seed)) for seed in range(30)]
    estimate = landscape.price(networks)
    scores = np.array([landscape.accuracy(a) for a in networks])
    wanted = Preference(accuracy=2.0, latency=0.5, stock_ms=4.0)
    loss = 2 * (1 - scores) + 0.5 * estimate.latency_ms / 4
    assert select(scores, estimate, 5, wanted) == np.argsort(loss)[:5].tolist()
    # Weighted, a search ends where the loss is smaller than where accuracy alone counts.
    lost = [
        min(
            wanted.loss(t.map50_95, float(landscape.latency([t.architecture])[0]))
            for t in Landscape(limit=1e3).evolve(generations=6, population=8, **options)
        )
        for options in ({"preference": wanted}, {})
    ]
    assert lost[0] < lost[1]


def test_an_impossible_limit_ends_after_a_bounded_number_of_predictions() -> None:
    landscape = Landscape(limit=0.9)
    asked = 0

    def price(architectures: Sequence[Architecture]) -> Estimate:
        nonlocal asked
        asked += len(architectures)
        return landscape.price(architectures)

    with pytest.raises(StageError, match=r"latency_p50<=0\.9ms \(nearest: 1 ms\)"):
        evolve(SPACE, price, landscape.score, population=4, generations=3, seed=0)
    assert not landscape.scored
    assert asked < 200_000


def test_it_ends_where_all_networks_within_the_limits_are_scored() -> None:
    landscape = Landscape(small_space(), limit=1e3)
    trials = landscape.evolve(generations=100, population=32)
    assert 0.9 * landscape.space.size < len(trials) <= landscape.space.size
    assert trials[-1].generation is not None and trials[-1].generation < 99


def small_space() -> SearchSpace:
    """The tiny space with all but a few dimensions held at stock."""
    free = {"backbone_p3.depth", "backbone_p4.operator", "backbone_p5.width", "topdown_p4.operator", "sppf.width"}
    content = SPACE.to_dict()
    stock = SPACE.stock.to_dict()
    for name, width in stock["convs"].items():
        content["convs"][name] = [width]
    for name, block in stock["blocks"].items():
        for part, value in block.items():
            if f"{name}.{part}" not in free:
                content["blocks"][name][part] = [value]
    content["sppf"]["kernel"] = [stock["sppf"]["kernel"]]
    content["detect"] = {part: [value] for part, value in stock["detect"].items()}
    return SearchSpace.from_dict(content)


@pytest.mark.parametrize("last", [1, 9, 10, 27])
def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path: Path, last: int) -> None:
    undisturbed = Landscape().evolve(generations=4, population=10)
    landscape = Landscape()
    path = tmp_path / "scores.jsonl"

    def scorer(stop_after: float) -> Callable[[Sequence[Architecture]], list[float]]:
        memo = Memo(path)

        def score(architectures: Sequence[Architecture]) -> list[float]:
            for architecture in architectures:
                if architecture not in memo:
                    if len(landscape.scored) >= stop_after:
                        raise Interrupted
                    memo.add(architecture, *landscape.score([architecture]))
            return [memo[architecture] for architecture in architectures]

        return score

    with pytest.raises(Interrupted):
        landscape.evolve(generations=4, population=10, score=scorer(last))
    path.write_text(path.read_text() + '{"architecture": {"convs": {"st')  # torn by the kill
    assert landscape.evolve(generations=4, population=10, score=scorer(np.inf)) == undisturbed
    assert len(landscape.scored) == len(set(landscape.scored)) == 40


def test_memo_drops_a_torn_line_only(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo.jsonl")
    memo.add(SPACE.stock, 0.25)
    memo.add(SPACE.smallest(), 1.5)
    whole = memo.path.read_bytes()
    memo.path.write_bytes(whole[:-1])
    again = Memo(memo.path)
    assert SPACE.stock in again and again[SPACE.stock] == 0.25
    assert SPACE.smallest() not in again
    again.add(SPACE.smallest(), 1.5)
    assert memo.path.read_bytes() == whole


def test_a_refitted_cost_model_is_obeyed_at_once() -> None:
    landscape = Landscape(limit=5.0)

    def tighten(generation: int, history: Sequence[Trial]) -> None:
        if generation == 1:
            landscape.limit = 2.5

    trials = landscape.evolve(generations=5, population=10, after_generation=tighten)
    latency = landscape.latency([t.architecture for t in trials])
    late = np.array([t.generation >= 2 for t in trials])
    assert latency[~late].max() > 2.5
    assert latency[late].max() <= 2.5
    assert len({t.architecture for t in trials}) == len(trials)


def test_it_beats_random_search_with_equal_evaluations() -> None:
    # A search that is no better than random wins at least seven of eight with a probability of 3.5%.
    wins = 0
    for seed in range(8):
        landscape = Landscape(limit=4.0, seed=seed)
        found = max(t.map50_95 for t in landscape.evolve(generations=8, population=8, seed=seed))
        drawn = random_networks(SPACE, landscape.price, 8 * 8, seed=[seed])
        assert len(drawn) == 8 * 8
        wins += found > max(map(landscape.accuracy, drawn))
    assert wins >= 7


def test_it_finds_the_optimum_of_a_small_landscape_with_few_evaluations() -> None:
    space = small_space()
    every = [space.decode(g) for g in np.ndindex(*(len(d.options) for d in space.dimensions))]
    landscape = Landscape(space, limit=1 + 0.6 * 1.05 * (Landscape(space).latency([space.largest()])[0] - 1))
    feasible = landscape.price(every).feasible
    best = max(landscape.accuracy(a) for a, ok in zip(every, feasible, strict=True) if ok)
    assert feasible.sum() > 60
    trials = landscape.evolve(generations=6, population=8)
    assert max(t.map50_95 for t in trials) == best


def test_repair_keeps_what_is_feasible_and_mends_the_rest() -> None:
    landscape = Landscape(limit=2.5)
    rng = np.random.default_rng(0)
    options = np.array([len(d.options) for d in SPACE.dimensions])
    before = rng.integers(0, options, size=(30, len(options)))
    before[0] = SPACE.encode(SPACE.smallest())
    after, worst = repair(SPACE, landscape.price, before, rng)
    assert (worst <= 0).all()
    assert (after[0] == before[0]).all()
    assert ((after >= 0) & (after < options)).all()


def test_random_networks_are_feasible_different_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    landscape = Landscape(limit=4.0)
    first = random_networks(SPACE, landscape.price, 5, seed=[3])
    assert len(set(first)) == 5
    assert landscape.price(first).feasible.all()
    assert first == random_networks(SPACE, landscape.price, 5, seed=[3])
    assert not set(first) & set(random_networks(SPACE, landscape.price, 5, seed=[4]))
    monkeypatch.setattr(baseline, "DRAWS", 1000)
    assert random_networks(SPACE, Landscape(limit=0.5).price, 5, seed=[3]) == []


def test_the_mac_ranking_holds_the_largest_of_many_random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "MAC_SAMPLE", 40)
    landscape = Landscape(limit=4.0)
    ranked = mac_ranking(SPACE, landscape.price, 7, num_classes=2, imgsz=64, seed=[1])
    macs = [cost(a, 2, 64).macs for a in random_networks(SPACE, landscape.price, 40, seed=[1])]
    assert [cost(a, 2, 64).macs for a in ranked] == sorted(macs, reverse=True)[:7]


def test_pareto_front() -> None:
    assert pareto_front([0.1, 0.3, 0.2, 0.3, 0.3], [1.0, 3.0, 2.0, 3.0, 4.0]) == [0, 2, 1]
    assert pareto_front([], []) == []


class Fixed:
    """A latency model that knows each network's latency."""

    def __init__(self, latency: Callable[[Sequence[Architecture]], np.ndarray]) -> None:
        self.latency = latency

    def predict(self, architectures: Sequence[Architecture]) -> tuple[np.ndarray, np.ndarray]:
        return self.latency(architectures), MARGIN * self.latency(architectures)


def cost_model(*limits: str, landscape: Landscape | None = None, batch: int = 1) -> CostModel:
    latency: Any = Fixed((landscape or Landscape()).latency)
    networks = [SPACE.sample(np.random.default_rng(seed)) for seed in range(12)]
    rows = []
    for i, network in enumerate(networks):
        paper = cost(network, 2, 64)
        percentiles = fabricated.latency(2.0, 2.2, 2.5 if i else 100.0)
        memory = 30 + 8e-6 * paper.params + 2e-7 * paper.bytes
        rows.append(fabricated.probed(network, 2.0, latency_ms=percentiles, memory_mb=memory))
    parsed = [Constraint.parse(limit) for limit in limits]
    return CostModel.from_probe(parsed, latency, rows, num_classes=2, imgsz=64, batch=batch)


def test_limits_are_held_against_the_expectation_the_usual_tail_and_exact_costs() -> None:
    networks = [SPACE.smallest(), SPACE.stock, SPACE.largest()]
    paper = [cost(network, 2, 64) for network in networks]
    model = cost_model(
        "latency<=3ms", "latency_p99<=3ms", "throughput>=900fps", "params<=2M", "flops<=1G", "memory<=60MiB", batch=4
    )
    estimate = model(networks)
    expected = Landscape().latency(networks)
    assert estimate.latency_ms == pytest.approx(expected) and estimate.upper_ms == pytest.approx(MARGIN * expected)
    assert estimate.values[:, 0] == pytest.approx(expected)
    assert estimate.values[:, 1] == pytest.approx(1.25 * expected)  # one burst does not decide
    assert estimate.values[:, 2] == pytest.approx(4000 / expected)
    assert estimate.values[:, 3] == pytest.approx([c.params / 1e6 for c in paper])
    assert estimate.values[:, 4] == pytest.approx([c.gflops for c in paper])
    assert estimate.values[:, 5] == pytest.approx([30 + 8e-6 * c.params + 2e-7 * c.bytes for c in paper])
    for i, limit in enumerate(model.limits):
        assert [limit.met(v) for v in estimate.values[:, i]] == (estimate.violation[:, i] <= 0).tolist()
    assert estimate.feasible.tolist() == (estimate.violation <= 0).all(axis=1).tolist()


def test_memory_is_bounded_from_above_on_the_networks_it_was_fitted_to() -> None:
    rng = np.random.default_rng(0)
    costs = [cost(SPACE.sample(rng), 2, 64) for _ in range(20)]
    memory = [40 + 1e-5 * c.params + rng.normal() for c in costs]
    upper = MemoryModel.fit(costs, memory).upper(costs)
    assert (upper >= np.array(memory) - 1e-9).all()
    assert (upper - memory).max() < 6


def device(latency: Callable[[Architecture], float], log: list[list[Architecture]]) -> Any:
    """Measures networks as `latency` says."""

    def measure(architectures: Sequence[Architecture]) -> list[Measurement]:
        log.append(list(architectures))
        return [
            Measurement(Percentiles(ms, 1.1 * ms, 1.2 * ms), (ms, ms), (ms,), 1, False, memory_mb=30.0)
            for ms in map(latency, architectures)
        ]

    return measure


@pytest.fixture(scope="module")
def scored() -> tuple[Landscape, list[Trial]]:
    landscape = Landscape(limit=4.0)
    return landscape, landscape.evolve(generations=3)


def expect(trials: Sequence[Trial]) -> np.ndarray:
    """Expects what was scored."""
    return np.array([trial.map50_95 for trial in trials])


def true(landscape: Landscape, factor: float = 1.0) -> Callable[[Architecture], float]:
    return lambda architecture: factor * float(landscape.latency([architecture])[0])


def test_candidates_are_promising_different_and_hold_rescaled_stock(scored: tuple[Landscape, list[Trial]]) -> None:
    landscape, trials = scored
    costs, log = cost_model("latency<=4ms", landscape=landscape), []
    met, missed = choose(SPACE, trials, costs, device(true(landscape), log), count=6, expect=expect)
    assert not missed and len(log) == 1 and len(met) == 6
    assert [c.slack for c in met] == pytest.approx([1 - true(landscape)(c.trial.architecture) / 4 for c in met])
    assert all(json.loads(json.dumps(c.to_result().plain()))["met"] for c in met)
    near = near_the_limits(trials, costs([t.architecture for t in trials]))
    best = max(near, key=lambda t: t.map50_95)
    assert best in [c.trial for c in met]
    assert [c.trial.source for c in met].count("rescaled") == 1
    genes = [np.array(SPACE.encode(c.trial.architecture)) for c in met]
    assert min((a != b).sum() for i, a in enumerate(genes) for b in genes[:i]) >= candidates.APART
    ranks = sorted(-trial.map50_95 for trial in near)
    assert max(ranks.index(-c.trial.map50_95) for c in met if c.trial in near) > 6, (
        "one of them is there to be different"
    )
    assert expect([c.trial for c in met]).tolist() == sorted(expect([c.trial for c in met]), reverse=True)


def test_networks_are_brought_to_the_limit_as_measured(scored: tuple[Landscape, list[Trial]]) -> None:
    landscape, trials = scored
    costs, log = cost_model("latency<=4ms", landscape=landscape), []
    asked: list[tuple[Architecture, float]] = []

    def adjust(architecture: Architecture, factors: np.ndarray) -> Trial | None:
        asked.append((architecture, float(factors[0])))
        genes, worst = to_the_limit(
            SPACE,
            replace(landscape, limit=4 / factors[0]).price,
            np.array([SPACE.encode(architecture)]),
            np.random.default_rng(0),
        )
        return Trial(SPACE.decode(genes[0].tolist()), 0.5, 3, "filled") if worst[0] <= 0 else None

    for factor in (1.2, 0.8):
        log.clear(), asked.clear()
        met, missed = choose(
            SPACE, trials, costs, device(true(landscape, factor), log), count=4, expect=expect, adjust=adjust
        )
        assert asked and all(f == pytest.approx(factor) for _, f in asked)
        filled = [c for c in met if c.trial.source == "filled"]
        assert len(filled) >= 3 and all(0 <= c.slack <= SPARE for c in filled)
        left = {c.trial.architecture for c in (*met, *missed)}
        assert factor > 1 or not left & {a for a, _ in asked}, "the fuller network takes the place of the other"
        assert sum(map(len, log)) <= ATTEMPTS * 4 + 4


def test_weighted_candidates_are_those_of_the_smallest_loss_as_measured(
    scored: tuple[Landscape, list[Trial]],
) -> None:
    landscape, trials = scored
    costs = cost_model("latency<=4ms", "params<=100M", landscape=landscape)
    wanted = Preference(accuracy=1.0, latency=2.0, stock_ms=4.0)
    latency = true(landscape)
    met, _ = choose(SPACE, trials, costs, device(latency, []), count=3, expect=expect, preference=wanted)
    loss = [wanted.loss(t.map50_95, latency(t.architecture)) for t in trials]
    assert met[0].trial is trials[int(np.argmin(loss))]
    assert [c.trial for c in met] == sorted(
        (c.trial for c in met), key=lambda t: wanted.loss(t.map50_95, latency(t.architecture))
    )
    assert {c.to_result().tightest for c in met} == {"latency_p50<=4ms"}


def test_on_a_slower_device_the_next_candidates_are_those_that_are_still_expected_to_hold(
    scored: tuple[Landscape, list[Trial]],
) -> None:
    landscape, trials = scored
    costs, log = cost_model("latency<=4ms", landscape=landscape), []
    promised, _ = choose(SPACE, trials, costs, device(true(landscape), []), count=3, expect=expect)
    longest = max(true(landscape)(candidate.trial.architecture) for candidate in promised)
    slower = true(landscape, 1.001 * 4 / longest)
    met, missed = choose(SPACE, trials, costs, device(slower, log), count=3, expect=expect)
    assert len(met) == 3
    assert missed
    assert [len(networks) for networks in log] == [3, len(missed)]  # every network of the second round holds
    assert all(slower(c.trial.architecture) <= 4 for c in met)


def test_without_a_candidate_the_limit_and_the_fastest_are_named_after_a_bounded_number_of_measurements(
    scored: tuple[Landscape, list[Trial]],
) -> None:
    landscape, trials = scored
    costs, log = cost_model("latency<=4ms", landscape=landscape), []
    with pytest.raises(StageError, match=r"none of 8 networks .* keeps latency_p50<=4ms; the fastest takes 9 ms"):
        choose(SPACE, trials, costs, device(lambda architecture: 9.0, log), count=2, expect=expect)
    assert sum(map(len, log)) == ATTEMPTS * 2


def test_where_a_refitted_model_holds_nothing_possible_the_nearest_are_measured_all_the_same(
    scored: tuple[Landscape, list[Trial]],
) -> None:
    landscape, trials = scored
    costs, log = cost_model("latency<=0.5ms", landscape=landscape), []
    estimate = costs([t.architecture for t in trials])
    assert not estimate.feasible.any()
    met, _ = choose(SPACE, trials, costs, device(lambda architecture: 0.4, log), count=2, expect=expect)
    assert {c.trial for c in met} == {trials[i] for i in np.argsort(estimate.worst, kind="stable")[:2]}


def test_fewer_candidates_than_wanted_are_handed_on_where_fewer_hold(scored: tuple[Landscape, list[Trial]]) -> None:
    trials = scored[1][:4]
    met, missed = choose(
        SPACE,
        trials,
        cost_model("latency<=4ms"),
        device(lambda a: 9.0 if a == trials[0].architecture else 3.0, []),
        count=9,
        expect=expect,
    )
    assert len(met) == 3
    assert [c.trial for c in missed] == [trials[0]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the stages before the search write, of an untrained supernet and an invented device."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("data-prep", "supernet-train", "hw-probe")}
    detection.make_dataset(folders["data-prep"], train=8, search=4, val=4)
    torch.manual_seed(0)
    Supernet(SPACE, 2, detection.CLASSES).save(folders["supernet-train"], {"imgsz": 64})
    networks = [SPACE.stock, *(SPACE.sample(np.random.default_rng(seed)) for seed in range(30))]
    latency = [1 + 80 * cost(network, 2, 64).gflops for network in networks]
    rows = [fabricated.probed(a, ms) for a, ms in zip(networks, latency, strict=True)]
    probe = folders["hw-probe"]
    write_json(probe / "profile.json", PROFILE)
    fabricated.stock_result(latency[0], SPACE.stock).write(probe)
    NmsResult(latency_ms=fabricated.latency(0.3, 0.4, 0.5)).write(probe)
    fabricated.table(rows).write(probe)
    fabricated.fitted(LatencyModel.fit(SPACE, 2, 64, networks, latency).to_result()).write(probe)
    ResolvedLimit.write_all(probe, fabricated.resolved(Constraint.parse("latency<=5ms")))
    return folders


def context(folder: Path, inputs: dict[str, Path], **options: Any) -> StageContext[SearchSettings]:
    options = {"generations": 3, "population": 4, "candidates": 1, "measure_every": 2, "bn_images": 16} | options
    config = RunConfig.parse(
        {
            "imgsz": 64,
            "space": "tiny",
            "search": {"prior_steps": 0, "exact": False} | options,
            "finetune": {"candidates": 1},
            "targets": [{"constraints": ["latency<=80%stock"]}],
        },
        "test",
    )
    shutil.rmtree(folder / "out", ignore_errors=True)
    for name in ("out", "partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        settings=STAGE.settings(config, config.targets[0]),
        inputs=inputs,
        out=folder / "out",
        partial=folder / "partial",
        progress=Progress.silent(),
        host=HostLock(folder / "lock"),
    )


@dataclass
class Scored:
    """Counts what the stage asks for, and stops it on demand.

    Attributes:
        networks: The networks scored so far.
        measured: The number of networks of each measurement.
        stop_after: Questions after which the next one is interrupted.
    """

    networks: list[Architecture] = field(default_factory=list)
    measured: list[int] = field(default_factory=list)
    stop_after: float = np.inf

    def _ask(self) -> None:
        if len(self.networks) + len(self.measured) >= self.stop_after:
            raise Interrupted

    def score(self, architecture: Architecture) -> float:
        self._ask()
        self.networks.append(architecture)
        return Landscape().accuracy(architecture)

    def measure(self, files: Sequence[Path], **_: Any) -> list[Measurement]:
        self._ask()
        assert all(file.exists() for file in files)
        self.measured.append(len(files))
        ms = 4 + 0.01 * len(self.measured)  # never twice the same: what was measured must be remembered
        return [Measurement(Percentiles(ms, ms, ms), (ms, ms), (ms,), 1, False, memory_mb=30.0) for _ in files]


@pytest.fixture
def scored_by_stage(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """Lets the stage run in a landscape: nothing is exported, measured or scored but in thought."""

    def exported(model: Any, path: Path, **_: Any) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a network")
        return path

    counted = Scored()
    monkeypatch.setattr(artifact, "write_network", exported)
    monkeypatch.setattr(benchmark, "measure", counted.measure)
    monkeypatch.setattr(objective.Scorer, "__call__", counted.score)
    monkeypatch.setattr(objective.Scorer, "network", lambda scorer, architecture: torch.nn.Identity())
    monkeypatch.setattr(baseline, "DRAWS", 2000)
    monkeypatch.setattr(baseline, "MAC_SAMPLE", 20)
    return counted


def written(folder: Path, name: str) -> Any:
    text = (folder / "out" / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def test_the_stage_goes_on_after_an_interruption_and_writes_the_same(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored
) -> None:
    options = {"random": 2, "random_seeds": 2, "mac_ranking": 1}
    search.run(context(tmp_path / "whole", inputs, **options))
    count = 3 * 4 + 2 * (2 + 1) + 1  # and stock
    assert len(scored_by_stage.networks) == len(set(scored_by_stage.networks)) == count
    assert len(scored_by_stage.measured) == 3  # the front after the second and the last generation, one candidate

    scored_by_stage.networks.clear()
    scored_by_stage.measured.clear()
    for scored_by_stage.stop_after in (8, 13):
        with pytest.raises(Interrupted):
            search.run(context(tmp_path / "parts", inputs, **options))
    scored_by_stage.stop_after = np.inf
    search.run(context(tmp_path / "parts", inputs, **options))
    assert len(scored_by_stage.networks) == len(set(scored_by_stage.networks)) == count
    assert len(scored_by_stage.measured) == 3
    for name in ("history.jsonl", "front.json", "candidates.json"):
        assert written(tmp_path / "whole", name) == written(tmp_path / "parts", name)


def test_the_candidates_of_a_device_elsewhere_wait_for_it(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(tmp_path, inputs)
    elsewhere = TargetConfig(hardware="cpu-1t", constraints=("latency<=5ms",), far="line-3.json")
    ctx = replace(ctx, settings=ctx.settings.model_copy(update={"elsewhere": elsewhere}))
    asked: list[tuple[str, ...]] = []

    def wait(files: Sequence[Path], *, target: TargetConfig, **request: Any) -> list[Measurement]:
        asked.append((target.hardware, request["bundle"].name, *(file.suffix for file in files)))
        if len(asked) == 1:
            raise WaitingError("they are packed")
        return [Measurement(Percentiles(4, 4, 4), (4, 4), (4,), 1, False, memory_mb=30.0) for _ in files]

    monkeypatch.setattr(bundle, "measured_there", wait)
    with pytest.raises(WaitingError):
        search.run(ctx)
    scored = len(scored_by_stage.networks)
    search.run(ctx)
    assert asked == [("cpu-1t", "bundle.tar", ".onnx")] * 2
    assert not scored_by_stage.measured, "this machine is not the device"
    assert len(scored_by_stage.networks) == scored, "what was scored before the wait is scored again"


def test_stock_is_not_rescaled_for_a_device_elsewhere() -> None:
    target = {"constraints": ["latency<=5ms"], "far": "line-3.json"}
    config = RunConfig.parse({"finetune": {"baseline": "rescaled"}, "targets": [target]}, "test")
    with pytest.raises(InputError, match=r"finetune\.baseline = rescaled .* is elsewhere; use stock or none"):
        STAGE.settings(config, config.targets[0])


def test_the_stage_writes_what_others_read(inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored) -> None:
    search.run(context(tmp_path, inputs, random="equal", random_seeds=2, mac_ranking=3))
    rows = written(tmp_path, "history.jsonl")
    compared = [("random", 12), ("macs", 3)] * 2
    assert [row["source"] for row in rows] == (
        ["rescaled"] + ["seed"] * 3 + ["evolution"] * 8 + [source for source, count in compared for _ in range(count)]
    )
    assert [row["repetition"] for row in rows] == [None] * 12 + [0] * 15 + [1] * 15
    assert all(SPACE.decode(row["genes"]).to_dict() == row["architecture"] for row in rows)
    assert any(row["measured_ms"] for row in rows[:8])  # the front after the second generation
    (candidate,) = written(tmp_path, "candidates.json")
    assert candidate["slack"] == pytest.approx(1 - candidate["measured"]["latency_ms"]["p50"] / 5)
    assert candidate["source"] in ("rescaled", "seed", "evolution")
    summary = written(tmp_path, "search.json")
    assert summary["counts"].items() >= {"rescaled": 1, "seed": 3, "evolution": 8, "random": 24, "macs": 6}.items()
    assert summary["budget"]["used"] == pytest.approx(1 - candidate["slack"])
    drawn = summary["comparisons"]["random"]
    assert drawn["evaluations"] == [12, 12] and drawn["search_evaluations"] == 12
    assert drawn["interval"][0] < np.mean(drawn["best"]) == drawn["mean"] < drawn["interval"][1]
    assert summary["objective"] is None
    options = sum(len(d.options) for d in SPACE.dimensions)
    assert written(tmp_path, "rules.json") == {"options": {"space": options, "searched": options}, "rules": []}


def test_hardware_rules_narrow_what_is_searched_and_nothing_else(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_file, "told_of", lambda engine: {"name": "a compiler", "version": "1", "layers": 1}
    )  # there is no engine
    probe = shutil.copytree(inputs["hw-probe"], tmp_path / "probe")
    write_json(probe / "profile.json", fabricated.GPU_PROFILE)

    def searched(name: str, **options: Any) -> Path:
        ctx = context(tmp_path / name, {**inputs, "hw-probe": probe}, **options)
        search.run(replace(ctx, settings=ctx.settings.model_copy(update={"precision": "int8"})))
        return tmp_path / name

    on = searched("on", exact=True, prior_steps=1, generations=2, random=4)
    told = written(on, "rules.json")
    (rule,) = (row for row in told["rules"] if row["removed"])
    removed = rule["removed"]
    assert (rule["rule"], rule["on"]) == ("tensor_core_channels", True)
    assert told["options"]["space"] - told["options"]["searched"] == sum(map(len, removed.values())) > 0
    assert rule["evidence"]["networks"] == 31

    rows = written(on, "history.jsonl")
    assert {"exact", "random"} <= {row["source"] for row in rows}
    for row in rows:
        assert SPACE.decode(row["genes"]).to_dict() == row["architecture"], "genes are those of the supernet's space"
        chosen = {d.name: d.options[gene] for d, gene in zip(SPACE.dimensions, row["genes"], strict=True)}
        assert not any(chosen[name] in options for name, options in removed.items())
    left = {d["name"]: d["options"] for d in written(on, "prior.json")["dimensions"]}
    assert {d.name: [o for o in d.options if o not in removed.get(d.name, ())] for d in SPACE.dimensions} == left

    off = written(searched("off", generations=1, rules={"tensor_core_channels": False}), "rules.json")
    assert off["options"]["searched"] == off["options"]["space"]
    assert [row["rule"] for row in off["rules"] if not row["on"]] == ["tensor_core_channels"]


@pytest.mark.skipif(bool(rtx.missing_to_build()), reason=" and ".join(rtx.missing_to_build()) or "it is here")
def test_what_nvidias_compiler_tells_of_each_measured_network_stands_beside_it(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are really built, for a card that is here in name only; how fast they are is made up."""

    def random_weights(scorer: objective.Scorer, architecture: Architecture) -> torch.nn.Module:
        return build(architecture, 2, detection.CLASSES).eval()

    monkeypatch.setattr(artifact, "write_network", WRITE_NETWORK)
    monkeypatch.setattr(artifact, "capability_here", lambda: "8.9")
    monkeypatch.setattr(objective.Scorer, "network", random_weights)
    probe = shutil.copytree(inputs["hw-probe"], tmp_path / "probe")
    runtime = {"name": rtx.RUNTIME, "version": rtx.compiler().__version__}
    write_json(probe / "profile.json", fabricated.GPU_PROFILE | {"model": "NVIDIA L4", "runtime": runtime})
    ctx = context(tmp_path, {**inputs, "hw-probe": probe}, generations=1, candidates=2)
    search.run(replace(ctx, settings=ctx.settings.model_copy(update={"precision": "fp16"})))
    rows = [*written(tmp_path, "candidates.json"), *written(tmp_path, "search.json")["missed"]]
    assert len(rows) >= 2
    for row in rows:
        told = row["compiler"]
        paper = cost(Architecture.from_dict(row["architecture"]), 2, 64)
        assert (told["name"], told["version"]) == (engine_file.RTX, runtime["version"])
        assert told["parsed_layers"] > told["fused_layers"] >= 1
        assert told["weight_bytes"] == pytest.approx(2 * paper.params, rel=0.25), "two bytes a weight"
        assert told["activation_bytes"] > 0 and told["plan_bytes"] > told["weight_bytes"]


def test_the_prior_and_the_solver_seed_the_first_generation(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored
) -> None:
    search.run(context(tmp_path, inputs, exact=True, prior_steps=3, population=16, generations=2))
    rows = written(tmp_path, "history.jsonl")
    first = [row["source"] for row in rows if row["generation"] == 0]
    assert sorted(set(first)) == ["exact", "prior", "rescaled", "seed"]
    assert first.count("exact") == 2 and 1 <= first.count("prior") <= 4 and len(first) == 16
    assert sum(row["source"] == "exact" for row in rows if row["generation"] == 1) == 1
    prior = written(tmp_path, "prior.json")
    assert [step["step"] for step in prior["trajectory"]] == [1, 2, 3]
    assert prior["trajectory"][-1]["expected_ms"] <= 1.001 * prior["limit_ms"]
    for dimension, probabilities in zip(prior["dimensions"], prior["trajectory"][-1]["probabilities"], strict=True):
        assert len(dimension["options"]) == len(probabilities)


def test_an_impossible_limit_is_told_before_images_are_spent(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored
) -> None:
    probe = shutil.copytree(inputs["hw-probe"], tmp_path / "probe")
    ResolvedLimit.write_all(probe, fabricated.resolved(Constraint.parse("latency<=0.5ms")))
    for exact in (False, True):
        with pytest.raises(StageError, match=r"latency_p50<=0\.5ms"):
            search.run(context(tmp_path / "run", {**inputs, "hw-probe": probe}, exact=exact, prior_steps=9))
    assert not scored_by_stage.networks


def test_stock_is_rescaled_to_the_candidate_as_measured(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = context(tmp_path, inputs, candidates=2, population=8)
    asked = dataclasses.replace(asked, settings=asked.settings.model_copy(update={"rescaled": True}))
    rescaled: list[str] = []
    by_hand = {network.digest for network in SPACE.rescaled()}

    def measured(files: Sequence[Path], *, checkpoint: Path, **_: Any) -> list[Measurement]:
        times = [3.0 if file.stem in by_hand else 4.0 for file in files]
        if checkpoint.name.startswith("rescaled"):
            rescaled.append(files[0].stem)
            times = [[4.4, 4.04][len(rescaled) - 1], 4.0]  # at first it is slower than the latency model knew
        return [Measurement(Percentiles(ms, ms, ms), (ms, ms), (ms,), 1, False, memory_mb=30.0) for ms in times]

    monkeypatch.setattr(benchmark, "measure", measured)
    search.run(asked)
    found = {row["for"]: row for row in written(tmp_path, "rescaled.json")}
    rows = written(tmp_path, "candidates.json")
    assert set(found) == {Architecture.from_dict(row["architecture"]).digest for row in rows}
    (other,) = (row for row in rows if row["source"] != "rescaled")
    content = found[Architecture.from_dict(other["architecture"]).digest]
    assert (content["latency_ms"], content["candidate_ms"]) == (4.04, 4.0)
    network = Architecture.from_dict(content["architecture"])
    assert len(rescaled) == 2 and rescaled[1] == network.digest != rescaled[0]


def test_a_candidate_that_is_rescaled_stock_is_its_own_rival() -> None:
    by_work: Any = Fixed(lambda networks: np.array([1 + 80 * cost(a, 2, 64).gflops for a in networks]))
    costs = replace(cost_model("latency<=4ms"), latency=by_work)
    asked: list[Sequence[Architecture]] = []

    def measure(architectures: Sequence[Architecture], *_: Any) -> list[Measurement]:
        asked.append(architectures)
        return device(lambda network: float(by_work.latency([network])[0]), [])(architectures)

    supernet: Any = None
    searcher = Searcher(supernet, Path(), SPACE, costs, Plan(), lambda network: 0.5, measure, 64, Path())
    network = SPACE.rescaled()[1]
    (timing,) = measure([network])
    candidate = candidates.Candidate(Trial(network, 0.5, 0, "rescaled"), 1.0, 1.0, timing, 0.1, costs.limits[0])
    asked.clear()
    (rival,) = searcher._rescaling.to_each([candidate])
    assert (rival.architecture, rival.candidate) == (network, network) and rival.latency_ms == rival.candidate_ms
    assert not asked, "a file is not measured beside itself"


def test_what_is_measured_is_held_against_the_hour_of_the_probe(
    inputs: dict[str, Path], tmp_path: Path, scored_by_stage: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = LatencyTable.read(inputs["hw-probe"])
    probe = shutil.copytree(inputs["hw-probe"], tmp_path / "probe")
    fabricated.table([row.model_copy(update={"reference_ms": 2.0}) for row in table.rows]).write(probe)
    stock_ms: list[float] = []  # what stock takes in each measurement; in the end it stays at the last
    names: list[str] = []
    notes: list[str] = []

    def measured(files: Sequence[Path], *, checkpoint: Path, **_: Any) -> list[Measurement]:
        assert not checkpoint.exists(), "what a disturbed device has shown is read again"
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text("{}\n")
        now = stock_ms[min(len(names), len(stock_ms) - 1)]
        names.append(checkpoint.name.split(".")[0].split("-")[0])
        ms = 2 * now
        return [
            Measurement(Percentiles(ms, ms, ms), (ms, ms), (ms,), 1, False, reference_ms=now, memory_mb=30.0)
            for _ in files
        ]

    def run(folder: Path, *levels: float) -> None:
        stock_ms[:], names[:], notes[:] = levels, [], []
        ctx = context(folder, {**inputs, "hw-probe": probe})
        monkeypatch.setattr(ctx.progress, "note", notes.append)
        search.run(ctx)

    monkeypatch.setattr(benchmark, "measure", measured)
    run(tmp_path / "run", 2.1, 9.0, 1.9, 2.2)
    assert names == ["front", "front", "front", "candidates"]
    told = "the device is 4.5 times as slow as when it was probed (stock takes 9 instead of 2 ms)"
    assert [note for note in notes if "slow" in note] == [f"{told}: something else computes on it; measuring again"]
    (candidate,) = written(tmp_path / "run", "candidates.json")
    assert candidate["measured"]["latency_ms"]["p50"] == 4.4, "a limit is kept as measured"
    fitted = {row["measured_ms"] for row in written(tmp_path / "run", "history.jsonl")} - {None}
    assert fitted == {4.4, 4.0}, "the model is of the hour of the probe"

    with pytest.raises(StageError, match="none of 4 networks measured on the device keeps"):
        run(tmp_path / "slow", 2.0, 2.0, 9.0)
    assert names == ["front"] * 2 + ["candidates"] * 4 * (1 + measuring.AGAIN)
    assert f"{told}; if it is to stay so, the limits and the latency model are of another device" in notes


def test_an_empty_search_split_is_told_first(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = detection.make_dataset(tmp_path / "data", train=2, search=0, val=2)
    with pytest.raises(InputError, match="the search split has no images"):
        search.run(context(tmp_path / "run", {"data-prep": data}))


def test_a_network_to_score_depends_on_its_architecture_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    supernet = Supernet.load(inputs["supernet-train"])
    data = data_yaml(inputs["data-prep"], tmp_path, validate_on="search")
    scorer = objective.Scorer(supernet, data, imgsz=64, batch=4, bn_images=8, seed=0, work=tmp_path)
    first = scorer.network(SPACE.stock).state_dict()
    scorer.network(SPACE.largest())
    second = scorer.network(SPACE.stock).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    moved = [value for name, value in first.items() if name.endswith("running_mean")]
    assert all(value.abs().max() > 0 for value in moved)
    assert 0 <= scorer(SPACE.smallest()) <= 1


def test_networks_of_an_int8_target_are_scored_as_int8_computes_them(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_yaml(inputs["data-prep"], tmp_path, validate_on="search")
    supernet = Supernet.load(inputs["supernet-train"])
    scorer = objective.Scorer(supernet, data, imgsz=64, batch=4, bn_images=8, seed=0, work=tmp_path, int8=True)
    scored: list[Any] = []
    monkeypatch.setattr(scorer.evaluator, "evaluate", lambda network: scored.append(network) or Mock(map50_95=0.5))
    assert scorer(SPACE.smallest()) == 0.5
    ranges = [value for name, value in scored[0].state_dict().items() if name.endswith("quantizer._amax")]
    assert ranges and all(value.min() > 0 for value in ranges)
    on = {name for name, module in scored[0].named_modules() if getattr(module, "is_enabled", False)}
    assert any(name.endswith("conv.output_quantizer") for name in on), "folding BatchNorm must not lose what it held"
    assert not any(name.endswith("_amax") for name in scorer.network(SPACE.smallest()).state_dict())


def test_the_stage_scores_and_exports_as_its_target_asks(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain = context(tmp_path, inputs)
    aware = plain.settings.search.model_copy(update={"int8_aware": True})
    asked = {"precision": "int8", "search": aware, "keep_float": ("stem",)}
    for changes, int8 in (({}, False), (asked, True)):
        stage = search._Search(replace(plain, settings=plain.settings.model_copy(update=changes)))
        assert stage.scorer.int8 is int8
        assert tuple(stage.scorer.keep_float) == changes.get("keep_float", ())


def test_only_int8_targets_are_scored_so() -> None:
    for precision, aware, expected in (("int8", True, True), ("int8", False, False), ("best", True, False)):
        content = {"targets": [{"hardware": "cpu", "precision": precision, "constraints": ["latency<=5ms"]}]}
        config = RunConfig.parse({**content, "search": {"int8_aware": aware}}, "test")
        found = STAGE.settings(config, config.targets[0])
        assert isinstance(found, SearchSettings) and found.search.int8_aware is expected
