"""What the differentiable prior says options are worth, against what they are worth to networks of the space.

    python benchmarks/prior_worth.py --supernet runs/search_quality/searches/0/supernet --data data.yaml --imgsz 160

The truth is a ridge regression: of the logarithm of the losses of many networks near a share of stock's work on which
options they have, with the supernet's weights on all images of the search split. How well two halves of these networks
agree is the ceiling. Beside it stand, at several lengths,

    slopes      the prior's `worth`: straight-through derivatives at drawn networks (`search.differentiable`), with the
                limit on expected latency taken away;
    exchanges   for drawn networks the change of the loss when one option is put in the place of another, on the same
                images;
    losses      the regression of the truth, of few networks and few images each.

Kendall's tau counts pairs of options of one dimension only: which of two options is better. Seconds are of this
machine, and of one process.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from setting import machine

from yolov8_nas.files import write_json
from yolov8_nas.search.differentiable import PriorRecipe, learn_prior
from yolov8_nas.search.evolution import Trial, option_effects
from yolov8_nas.search.linear_cost import LinearCost
from yolov8_nas.space import Architecture
from yolov8_nas.supernet.images import read_split
from yolov8_nas.supernet.learner import DetectionLoss, draw
from yolov8_nas.supernet.loading import Batch
from yolov8_nas.supernet.supernet import Supernet

Effects = Sequence[Sequence[float]]
BATCH = 16


@dataclass
class Losses:
    """The supernet's loss for one network or another.

    Attributes:
        supernet: The weights; batch statistics normalise.
        imgsz: Side of the input in pixels.
        batches: The images of the search split.
    """

    supernet: Supernet
    imgsz: int
    batches: list[Batch]

    def __post_init__(self) -> None:
        self.criterion = DetectionLoss(self.supernet, self.imgsz)
        self.supernet.train().requires_grad_(False)

    def __call__(self, network: Architecture, batches: Sequence[Batch]) -> float:
        """Logarithm of the loss per image."""
        self.supernet.activate(network)
        total = images = 0.0
        with torch.no_grad():
            for batch in batches:
                x_BCHW = (batch["img"].float() / 255).contiguous(memory_format=torch.channels_last)
                total += float(self.criterion(self.supernet(x_BCHW), batch)[0].sum())
                images += len(x_BCHW)
        return math.log(total / images)


def effects_of(losses: Losses, networks: Sequence[Architecture], batches: Sequence[Sequence[Batch]]) -> Effects:
    """What options save of the logarithm of the loss, by regression."""
    trials = [Trial(network, -losses(network, of), 0, "random") for network, of in zip(networks, batches, strict=True)]
    return option_effects(losses.supernet.space, trials)


def exchanges(losses: Losses, networks: Sequence[Architecture], rng: np.random.Generator, each: int) -> Effects:
    """What options save, by putting one in the place of another in networks as they are drawn."""
    space = losses.supernet.space
    sizes = [len(d.options) for d in space.dimensions]
    varied = [i for i, size in enumerate(sizes) if size > 1]
    sums, counts = ([np.zeros((size, size)) for size in sizes] for _ in range(2))
    for network in networks:
        batch = [losses.batches[int(rng.integers(len(losses.batches)))]]
        base = losses(network, batch)
        genes = space.encode(network)
        for i in rng.choice(varied, size=each).tolist():
            other = int(rng.choice([gene for gene in range(sizes[i]) if gene != genes[i]]))
            changed = space.decode([*genes[:i], other, *genes[i + 1 :]])
            saved = base - losses(changed, batch)
            for a, b, sign in ((other, genes[i], 1), (genes[i], other, -1)):
                sums[i][a, b] += sign * saved
                counts[i][a, b] += 1
    return [_levels(total, count).tolist() for total, count in zip(sums, counts, strict=True)]


def _levels(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """A value for each option from differences between pairs: least squares, drawn to zero where little is known."""
    size = len(sums)
    laplacian = np.diag(counts.sum(axis=1)) - counts
    levels: NDArray[np.float64] = np.linalg.solve(laplacian + 0.5 * np.eye(size), sums.sum(axis=1))
    return levels - levels.mean()


def agreement(one: Effects, other: Effects) -> float:
    """Kendall's tau over pairs of options of the same dimension."""
    signs = [
        np.sign((a[j] - a[k]) * (b[j] - b[k]))
        for a, b in zip(one, other, strict=True)
        for j, k in combinations(range(len(a)), 2)
    ]
    return float(np.mean(signs))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a trained supernet")
    parser.add_argument("--data", type=Path, required=True, help="Ultralytics data yaml, the search split as val")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--near", type=float, default=0.6, help="share of stock's multiply-accumulates")
    parser.add_argument("--networks", type=int, default=240, help="networks of the truth")
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the figures")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    supernet = Supernet.load(asked.supernet)
    images = read_split(asked.data, "val", asked.imgsz, augment=False)
    order = np.random.default_rng(asked.seed).permutation(len(images)).tolist()
    chunks = [order[i : i + BATCH] for i in range(0, len(order) - BATCH // 2, BATCH)]
    losses = Losses(supernet, asked.imgsz, [images.collate_fn([images[i] for i in chunk]) for chunk in chunks])
    rng = np.random.default_rng([asked.seed, 1])

    def drawn(count: int) -> list[Architecture]:
        return [draw(supernet, 1, rng, anchor="stock", near=asked.near)[-1] for _ in range(count)]

    truth_networks = drawn(asked.networks)
    begin = time.perf_counter()
    half = asked.networks // 2
    values = {n: losses(n, losses.batches) for n in truth_networks}
    known = [Trial(n, -v, 0, "random") for n, v in values.items()]
    truth = option_effects(supernet.space, known)
    ceiling = agreement(*(option_effects(supernet.space, part) for part in (known[:half], known[half:])))
    seconds = time.perf_counter() - begin
    print(f"{machine(asked.threads)}; {len(images)} images, {asked.networks} networks near {asked.near:.0%} of stock")
    print(f"truth: {seconds:.0f} s; its halves agree at tau {ceiling:.2f}", flush=True)
    rows = [{"what": "halves of the truth", "tau": ceiling, "seconds": seconds}]

    def tell(what: str, of: Callable[[], Effects]) -> None:
        begin = time.perf_counter()
        tau = agreement(of(), truth)
        rows.append({"what": what, "tau": tau, "seconds": time.perf_counter() - begin})
        print(f"{what:32} tau {tau:5.2f}   {rows[-1]['seconds']:6.1f} s", flush=True)

    # Without a limit its values count for nothing.
    linear = LinearCost.tabulate(supernet.space, lambda networks: np.ones(len(networks)))

    def slopes(steps: int) -> Effects:
        with tempfile.TemporaryDirectory() as folder:
            return learn_prior(
                supernet, asked.data, linear, None, partial=Path(folder),
                recipe=PriorRecipe(steps=steps, imgsz=asked.imgsz, seed=asked.seed), progress=lambda step: None,
            ).worth  # fmt: skip

    for steps in asked.steps:
        tell(f"slopes, {steps} steps", lambda steps=steps: slopes(steps))
        tell(f"exchanges, {steps} x 8", lambda steps=steps: exchanges(losses, drawn(steps), rng, 8))
        few = [[losses.batches[i % len(losses.batches)]] for i in range(8 * steps)]
        tell(f"losses, {8 * steps} networks", lambda few=few: effects_of(losses, drawn(len(few)), few))
    if asked.out:
        write_json(asked.out, {"machine": machine(asked.threads), "rows": rows})


if __name__ == "__main__":
    main()
