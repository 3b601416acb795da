"""Evolution under hard limits, on the genes of a search space, with a cheap guess before each costly score.

What is wanted is the most accurate network within the limits, and a limit is there to be used: being faster than it
asks is worth nothing. So there is one objective, accuracy, and every child is brought to the limit from either side
before anything is spent on it: repaired, gene by gene, where it is predicted to miss a limit, and filled up with larger
options where it leaves more than `SPARE` of the limit unused.

The state of the search is its history. A generation follows from the networks scored before it, the cost model and
its own number: its parents are the best among *all* networks scored so far, and its random numbers are seeded with the
seed and that number. So an interrupted search is continued by running it again with its scores remembered, and a cost
model that was refitted in between re-ranks every network, not only the living ones.

Images are not spent on the least promising children: many more are bred than scored, and those are scored that a linear
model of the scores so far expects most of. Without that guess, a few generations are hardly better than random search.
The same model, given to an exact solver, proposes a network of its own to each generation.

Source: Lu et al., "NSGANetV2: evolutionary multi-objective surrogate-assisted neural architecture search", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.errors import StageError
from yolov8_nas.runner.results import Source
from yolov8_nas.search.objective import Estimate, Floats
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.space import Architecture, SearchSpace

Genes: TypeAlias = NDArray[np.int64]

SEARCHED: Final[tuple[Source, ...]] = ("seed", "rescaled", "prior", "exact", "evolution", "filled")
"""Where the networks of the search itself come from; the others are scored for comparison only."""

_ENTRY: Final[tuple[Source, ...]] = ("exact", "prior", "rescaled", "seed")
"""The order in which networks enter the first generation."""

Informed: TypeAlias = Mapping[Architecture, Source]
"""Networks for the first generation that are more than a guess, and where they come from."""

Price: TypeAlias = Callable[[Sequence[Architecture]], Estimate]
"""Predicts what networks cost; cheap."""

Score: TypeAlias = Callable[[Sequence[Architecture]], Sequence[float]]
"""Measures mAP50-95 of the networks of a generation; what a search spends its time on."""

Utility: TypeAlias = Sequence[Sequence[float]]
"""What each option is worth, by dimension of the space: the worth of a network is the sum over its options."""

Propose: TypeAlias = Callable[[Utility], Sequence[Architecture]]
"""Finds the networks of the highest utility among those that keep the limits."""

CROSSOVER: Final = 0.9
"""Share of children with two parents."""

MUTATIONS: Final = 1.5
"""Genes of a child that change at random, on average."""

BROOD: Final = 10
"""Children bred for each one that is scored."""

RIDGE: Final = 1.0
"""Weight of the ridge penalty in the linear model of the scores: that of one observation."""

SPARE: Final = 0.03
"""Share of its tightest limit that a network may leave unused before it is filled up."""

TRIES: Final = 5
"""Rounds in which a generation is filled; a round makes as many networks as are missing."""

NEIGHBOURS: Final = 8
"""Changes of one gene that a step of a repair, or of filling up, looks at."""


@dataclass(frozen=True)
class Trial:
    """A network that was scored.

    Attributes:
        architecture: The network.
        map50_95: Its mAP50-95 on the search split with the supernet's weights.
        generation: The generation that it belongs to, from 0; nothing for a network that is no part of the search.
        source: `exact` where the exact solver proposed it, `prior` for a sample of the prior, `rescaled` for stock
            uniformly rescaled, `seed` for the rest of the first generation, `evolution` for the rest of the others;
            `filled` for a network that was brought to the limit after it was measured; `random` and `macs` for what
            the search is compared with.
        repetition: The comparison that it belongs to, from 0; nothing for a network of the search.
    """

    architecture: Architecture
    map50_95: float
    generation: int | None
    source: Source
    repetition: int | None = None


def evolve(
    space: SearchSpace,
    price: Price,
    score: Score,
    *,
    population: int,
    generations: int,
    seed: int,
    informed: Informed = MappingProxyType({}),
    propose: Propose | None = None,
    preference: Preference = MOST_ACCURATE,
    after_generation: Callable[[int, Sequence[Trial]], None] | None = None,
) -> list[Trial]:
    """Search for the most accurate networks within the limits.

    The same arguments give the same search, as far as `price` and `score` answer the same.

    Args:
        space: The search space.
        price: Predicts what networks cost and by how much they miss the limits.
        score: Measures the networks of a generation. It never sees a network twice, nor one that misses a limit.
        population: Networks per generation, and most parents of the next.
        generations: Number of generations, the first one included.
        seed: Seed of everything random.
        informed: Networks of the first generation; those that would miss a limit are repaired.
        propose: Asked in each later generation, with what the scores so far make of each option.
        preference: What is wanted of the networks within the limits.
        after_generation: Called with the number of the generation and all networks scored so far.

    Returns:
        Every scored network, in order. They are fewer than `population * generations` where fewer keep the limits.

    Raises:
        StageError: No network was found that keeps the limits.
    """
    history: list[Trial] = []
    for generation in range(generations):
        rng = np.random.default_rng([seed, generation])
        seen = {trial.architecture for trial in history}
        children: dict[Architecture, Source]
        if parents := survivors(history, price, population, preference):
            effects = option_effects(space, history)
            solved = propose(effects) if propose else []
            brood = _breed(space, parents, price, BROOD * population, preference, seen=seen, rng=rng)
            chosen = select(utility(space, effects, brood), price(brood), population, preference)
            children = {a: "exact" for a in solved if a not in seen}
            for child in (brood[i] for i in chosen[: population - len(children)]):
                children.setdefault(child, "evolution")
        else:
            first = first_generation(space, price, population, rng, informed, preference)
            children = {a: source for a, source in first.items() if a not in seen}
        if not children:
            break  # every network that keeps the limits has been scored, as far as a few rounds can tell
        scores = score(list(children))
        history += [Trial(a, s, generation, source) for (a, source), s in zip(children.items(), scores, strict=True)]
        if after_generation:
            after_generation(generation, history)
    return history


def first_generation(
    space: SearchSpace,
    price: Price,
    count: int,
    rng: np.random.Generator,
    informed: Informed = MappingProxyType({}),
    preference: Preference = MOST_ACCURATE,
) -> dict[Architecture, Source]:
    """Networks to start from: informed ones, stock uniformly rescaled, relatives of stock, random ones.

    The widest rescaled stock network within the limits enters as it is: it is what people do by hand, and what a search
    has to beat. All others are brought to the limits. Half of the remaining places go to stock YOLOv8, brought to the
    limits in another random way each time: a network designed by people is a better guess than a random one, and many
    ways of making it faster tell which of its parts can be spared. The random ones are there because no guess need be
    right, and because the linear model of the scores learns nothing of an option that no network has.

    Args:
        space: The search space.
        price: Predicts what networks cost.
        count: Networks wanted; there are fewer where fewer were found.
        rng: Source of randomness.
        informed: Networks that come first, the most important ones first.
        preference: What is wanted of the networks.

    Returns:
        The networks, and where each comes from.

    Raises:
        StageError: No network was found that keeps the limits.
    """
    bring = repair if preference.weighs_latency else to_the_limit
    rescaled = space.rescaled()
    within = [network for network, ok in zip(rescaled, price(rescaled).feasible, strict=True) if ok]
    found: dict[Architecture, Source] = dict.fromkeys(within[-1:], "rescaled")
    options = np.array([len(d.options) for d in space.dimensions])
    starts = [*informed, space.smallest(), space.largest(), *rescaled]
    relatives = [space.stock] * max(0, (count - len(starts)) // 2)
    known = np.array([space.encode(network) for network in (*starts, *relatives)])
    sources = list(informed.values())
    nearest: tuple[float, Architecture] | None = None
    for _ in range(TRIES):
        missing = max(count - len(found), 0)
        wanted = np.concatenate([known, rng.integers(0, options, size=(max(missing - len(known), 0), len(options)))])
        genes, worst = bring(space, price, wanted, rng)
        networks = [space.decode(g) for g in genes.tolist()]
        for i, network in enumerate(networks):
            if worst[i] <= 0:
                found.setdefault(network, sources[i] if i < len(sources) else "seed")
        if len(networks) and (nearest is None or worst.min() < nearest[0]):
            nearest = float(worst.min()), networks[int(worst.argmin())]
        if len(found) >= count:
            break
        known, sources = known[:0], []
    if not found and nearest:
        raise StageError(_impossible(space, price, nearest[1]))
    ranked = sorted(found.items(), key=lambda item: _ENTRY.index(item[1]))
    return dict(ranked[:count])


def survivors(history: Sequence[Trial], price: Price, count: int, preference: Preference) -> list[Architecture]:
    """The parents of the next generation: the scored networks that `select` takes, the best first."""
    if not history:
        return []
    estimate = price([t.architecture for t in history])
    scores = np.array([t.map50_95 for t in history])
    return [history[i].architecture for i in select(scores, estimate, count, preference)]


def select(scores: Floats, estimate: Estimate, count: int, preference: Preference) -> list[int]:
    """The best of the networks that are predicted to keep the limits.

    Args:
        scores: mAP of n networks, known or expected; expected ones may all be too high or too low by the same amount.
        estimate: What they cost.
        count: Networks wanted.
        preference: What is wanted of them.

    Returns:
        Indices of at most `count` networks, the best first.
    """
    living = np.flatnonzero(estimate.feasible)
    loss = preference.loss(scores[living], estimate.latency_ms[living])
    by_loss: list[int] = living[np.argsort(loss, kind="stable")].tolist()
    return by_loss[:count]


def option_effects(space: SearchSpace, history: Sequence[Trial]) -> list[list[float]]:
    """What each option adds to the mAP50-95 of a network, by dimension: ridge regression on which options it has.

    Args:
        space: The search space.
        history: Scored networks, at least one.
    """
    known = _one_hot(space, [t.architecture for t in history])
    scores = np.array([t.map50_95 for t in history])
    effects = np.linalg.solve(known.T @ known + RIDGE * np.eye(known.shape[1]), known.T @ (scores - scores.mean()))
    return [part.tolist() for part in np.split(effects, np.cumsum([len(d.options) for d in space.dimensions])[:-1])]


def utility(space: SearchSpace, effects: Utility, architectures: Sequence[Architecture]) -> Floats:
    """Sum of the effects of each network's options: (n,)."""
    total: Floats = _one_hot(space, architectures) @ np.concatenate(effects)
    return total


def _one_hot(space: SearchSpace, architectures: Sequence[Architecture]) -> Floats:
    """Which options networks have: (n, options of all dimensions)."""
    genes = np.array([space.encode(a) for a in architectures], dtype=np.int64).reshape(-1, len(space.dimensions))
    return np.concatenate([np.eye(len(d.options))[genes[:, i]] for i, d in enumerate(space.dimensions)], axis=1)


def pareto_front(scores: Sequence[float], latency_ms: Sequence[float] | Floats) -> list[int]:
    """Indices of the networks that no other one beats in both accuracy and latency, from fast to slow.

    Of networks that are alike in both, the first one stays.
    """
    front: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (float(latency_ms[i]), -scores[i])):
        if not front or scores[i] > scores[front[-1]]:
            front.append(i)
    return front


def repair(space: SearchSpace, price: Price, genes: Genes, rng: np.random.Generator) -> tuple[Genes, Floats]:
    """Walk networks into the limits: by one gene at a time, to a random neighbour that misses them by less.

    Nothing is assumed of which option is cheap: on some devices a depthwise convolution is slower than a full one.

    Args:
        space: The search space.
        price: Predicts what networks cost.
        genes: The networks: (n, dimensions).
        rng: Source of randomness.

    Returns:
        The networks, and by how much each misses its worst limit: (n, dimensions), (n,). It is 0 or less but for those
        that the bounded number of steps, two per dimension, did not mend.
    """
    genes = genes.copy()
    worst = _worst(space, price, genes)
    for _ in range(2 * genes.shape[1]):
        broken = np.flatnonzero(worst > 0)
        if not len(broken) or space.size == 1:
            break
        near = _neighbours(space, np.repeat(genes[broken], NEIGHBOURS, axis=0), rng)
        near_worst = _worst(space, price, near).reshape(len(broken), NEIGHBOURS)
        better = near_worst < worst[broken, None]
        pick = better.argmax(axis=1)
        moved = better.any(axis=1)
        rows = np.arange(len(broken))
        genes[broken[moved]] = near.reshape(len(broken), NEIGHBOURS, -1)[rows, pick][moved]
        worst[broken[moved]] = near_worst[rows, pick][moved]
    return genes, worst


def fill_up(space: SearchSpace, price: Price, genes: Genes, rng: np.random.Generator) -> tuple[Genes, Floats]:
    """Walk networks up to the limits: by one gene at a time, to a random larger option that uses more of them.

    Args:
        space: The search space; options of a dimension lie in the order of their size.
        price: Predicts what networks cost.
        genes: The networks: (n, dimensions).
        rng: Source of randomness.

    Returns:
        The networks, and by how much each misses its worst limit: (n, dimensions), (n,). Those that miss one already
        stay as they are; the others leave at most `SPARE` of a limit unused, if the bounded number of steps, four per
        dimension, leads there.
    """
    genes = genes.copy()
    worst = _worst(space, price, genes)
    last = np.array([len(d.options) - 1 for d in space.dimensions])
    for _ in range(4 * genes.shape[1]):
        spare = np.flatnonzero((worst < -SPARE) & (genes < last).any(axis=1))
        if not len(spare):
            break
        near = np.repeat(genes[spare], NEIGHBOURS, axis=0)
        free = near < last
        column = (rng.random(near.shape) * free).argmax(axis=1)
        near[np.arange(len(near)), column] += 1
        near_worst = _worst(space, price, near).reshape(len(spare), NEIGHBOURS)
        fuller = (near_worst <= 0) & (near_worst > worst[spare, None])
        pick = fuller.argmax(axis=1)
        moved = fuller.any(axis=1)
        rows = np.arange(len(spare))
        genes[spare[moved]] = near.reshape(len(spare), NEIGHBOURS, -1)[rows, pick][moved]
        worst[spare[moved]] = near_worst[rows, pick][moved]
    return genes, worst


def to_the_limit(space: SearchSpace, price: Price, genes: Genes, rng: np.random.Generator) -> tuple[Genes, Floats]:
    """Networks brought to the limits from either side; see `repair` and `fill_up`.

    Where the largest network of the space keeps the limits with room to spare, there is nothing to fill up to.
    """
    repaired, worst = repair(space, price, genes, rng)
    roomy = price([space.largest()]).worst[0] < -SPARE
    return (repaired, worst) if roomy else fill_up(space, price, repaired, rng)


def _breed(
    space: SearchSpace,
    parents: Sequence[Architecture],
    price: Price,
    count: int,
    preference: Preference,
    *,
    seen: Set[Architecture],
    rng: np.random.Generator,
) -> list[Architecture]:
    """New networks within the limits that descend from `parents`, the best of which come first.

    They are filled up to the limits, unless latency has a weight of its own.
    """
    bring = repair if preference.weighs_latency else to_the_limit
    pool = np.array([space.encode(parent) for parent in parents])
    found: dict[Architecture, None] = {}
    for _ in range(TRIES):
        missing = count - len(found)
        if not missing:
            break
        # The pool is sorted, so the winner of a binary tournament is the lower of two indices.
        mother, father = rng.integers(0, len(pool), size=(2, missing, 2)).min(axis=2)
        from_father = (rng.random((missing, pool.shape[1])) < 0.5) & (rng.random((missing, 1)) < CROSSOVER)
        children = _mutate(space, np.where(from_father, pool[father], pool[mother]), rng)
        children, worst = bring(space, price, children, rng)
        networks = [space.decode(genes) for genes in children.tolist()]
        found |= dict.fromkeys(a for a, w in zip(networks, worst, strict=True) if w <= 0 and a not in seen)
    return list(found)


def _mutate(space: SearchSpace, genes: Genes, rng: np.random.Generator) -> Genes:
    """Each gene replaced, with a probability that makes it `MUTATIONS` a network, by another of its options."""
    options = np.array([len(d.options) for d in space.dimensions])
    rate = MUTATIONS / max(1, int((options > 1).sum()))
    shift = rng.integers(1, np.maximum(options, 2), size=genes.shape)
    changed: Genes = np.where(rng.random(genes.shape) < rate, (genes + shift) % options, genes)
    return changed


def _neighbours(space: SearchSpace, genes: Genes, rng: np.random.Generator) -> Genes:
    """Each network with one of its genes replaced by another option."""
    options = np.array([len(d.options) for d in space.dimensions])
    rows = np.arange(len(genes))
    columns = rng.choice(np.flatnonzero(options > 1), size=len(genes))
    near = genes.copy()
    near[rows, columns] = (near[rows, columns] + rng.integers(1, options[columns])) % options[columns]
    return near


def _worst(space: SearchSpace, price: Price, genes: Genes) -> Floats:
    return price([space.decode(g) for g in genes.tolist()]).worst


def _impossible(space: SearchSpace, price: Price, nearest: Architecture) -> str:
    estimate = price([nearest])
    missed = [
        f"{limit} (nearest: {value:.4g} {limit.unit})"
        for limit, value, violation in zip(estimate.limits, estimate.values[0], estimate.violation[0], strict=True)
        if violation > 0
    ]
    return (
        f"no network of space {space.name!r} is predicted to keep {' and '.join(missed)}; its expected latency is "
        f"{estimate.latency_ms[0]:.4g} ms, {estimate.upper_ms[0]:.4g} ms at the upper bound: "
        "raise the limit or take a smaller space or input size"
    )
