"""How often *ahead* and *behind* are said of two networks that are equal, and what the intervals cover.

One network is trained with several seeds, from the same start: A/A, since nothing but the seed differs. Every training
is scored on the validation split, and what was found on each image is kept. From that, three things are told:

* the spread of trainings: their standard deviation, with its 95% interval (chi squared). It is what
  `evaluation.TYPICAL_SPREAD` rests on.
* false verdicts: for every pair of trainings, and validation sets of several sizes drawn from the images with
  replacement, how often `evaluation.compare` says *ahead* or *behind*, with and without the spread of trainings.
* coverage, by simulation: sets of images and trainings are drawn from normal distributions with the spreads that were
  measured, around a true difference; how often do the intervals of `compare` (one training each, the spread known from
  as many degrees of freedom as in a run) and of `over_trainings` (three and five seeds) hold it?

The work folder keeps every training: the command may be killed and given again at any time, and with more seeds it
goes on.

    python benchmarks/verdicts.py --data bccd.tar.gz --weights yolov8s.pt --seeds 8
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from setting import begun, machine, prepared

from yolov8_nas.data import dataset
from yolov8_nas.device.host import HostLock
from yolov8_nas.evaluation import (
    TYPICAL_SPREAD,
    Evaluation,
    Evaluator,
    TrainingSpread,
    compare,
    over_trainings,
)
from yolov8_nas.files import atomic_write, read_json, write_json
from yolov8_nas.space import rescale, stock_architecture
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.train import finetune

TOY = {"imgsz": 64, "train": 40, "val": 16, "epochs": 1, "seeds": 3, "draws": 3, "runs": 50}
"""A few images and epochs, whose figures mean nothing."""

SIZES = (80, 250, 1000)
"""Images of the validation sets that are drawn."""

RESAMPLES = 300
"""Draws of a bootstrap; there are thousands of bootstraps."""

Floats = NDArray[np.float64]


def main() -> None:
    """Parse arguments, train, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--data", help="a dataset: folder or archive; nothing for inspection pictures")
    parser.add_argument("--train", type=int, default=300, help="inspection pictures to train on")
    parser.add_argument("--val", type=int, default=400, help="inspection pictures to validate on")
    parser.add_argument("--weights", type=Path, help="stock checkpoint to start from; nothing for random numbers")
    parser.add_argument("--scale", default="s", help="stock size whose width is scaled")
    parser.add_argument("--width", type=float, default=0.5, help="share of its width")
    parser.add_argument("--imgsz", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--draws", type=int, default=30, help="validation sets drawn for each pair and size")
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs for each line of the table of coverage")
    parser.add_argument("--report", action="store_true", help="only tell what is finished")
    parser.add_argument("--toy", action="store_true", help=TOY.__doc__)
    arguments = parser.parse_args()
    if arguments.toy:
        for name, value in TOY.items():
            setattr(arguments, name, value)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    if not arguments.report:
        train(arguments)
    report(arguments)


def train(a: argparse.Namespace) -> None:
    """Train the network with every seed that has no record, and score it."""
    workdir = a.workdir.absolute()
    data = prepared(workdir, a.data, train=a.train, val=a.val)
    names = dataset.load(data).classes
    stock = stock_architecture(a.scale)
    architecture = stock if a.width == 1 else rescale(stock, a.width)
    views = [dataset.data_yaml(data, workdir / "views", validate_on=split) for split in ("search", "val")]
    evaluator = Evaluator(views[1], imgsz=a.imgsz, batch=16, work=workdir / "work")
    recipe = finetune.Recipe(a.epochs, a.batch, a.lr, a.imgsz, seed=0)
    for seed in range(a.seeds):
        record = workdir / "seeds" / f"{seed}.json"
        if record.exists():
            continue
        start = time.monotonic()
        work = workdir / "partial" / str(seed)
        with HostLock().computing():
            calibration = calibration_batches(views[0], a.imgsz, 128, a.batch, 0)
            network = begun(architecture, a.weights, names, calibration, 0)  # the start is the same for all
            trained = finetune.train(network, views[0], replace(recipe, seed=seed), work=work)
            evaluation = evaluator.evaluate(trained.network.fuse(verbose=False))
        evaluation.save(record.with_suffix(".npz"))
        row = {
            "map50_95": evaluation.map50_95,
            "recipe": asdict(replace(recipe, seed=seed)),
            "curve": [point["map50_95"] for point in trained.curves],
            "seconds": round(time.monotonic() - start, 1),
            "machine": machine(torch.get_num_threads()),
        }
        write_json(record, row)
        shutil.rmtree(work)
        print(f"seed {seed}: mAP50-95 {100 * evaluation.map50_95:.1f} in {row['seconds']:.0f} s", flush=True)


def report(a: argparse.Namespace) -> None:
    """Print the tables, and write them with everything behind them."""
    files = sorted((a.workdir / "seeds").glob("*.npz"), key=lambda file: int(file.stem))
    if len(files) < 2:
        print("fewer than two trainings are finished: they tell no spread")
        return
    evaluations = [Evaluation.load(file) for file in files]
    scores = np.array([evaluation.map50_95 for evaluation in evaluations])
    sd, low, high = spread_of(scores)
    told = read_json(files[0].with_suffix(".json"))
    lines = [
        f"{len(scores)} trainings of {told['recipe']['epochs']} epochs at {told['recipe']['imgsz']} px, "
        f"{len(evaluations[0].images)} validation images; {told['machine']}. mAP50-95 "
        f"{100 * scores.mean():.1f} ({100 * scores.min():.1f} to {100 * scores.max():.1f}); standard deviation from "
        f"seed to seed {100 * sd:.2f} points (95% interval {100 * low:.2f} to {100 * high:.2f}).",
        "",
        "| validation images | false verdicts, images alone | with the typical spread | with this run's own as well |",
        "|---|---|---|---|",
    ]
    own = TYPICAL_SPREAD.updated([scores.tolist()], "these trainings")
    false = {
        size: [false_verdicts(evaluations, size, a.draws, spread) for spread in (None, TYPICAL_SPREAD, own)]
        for size in SIZES
    }
    for size, shares in false.items():
        lines.append(f"| {size} | {' | '.join(f'{100 * share:.0f}%' for share in shares)} |")
    lines += [
        "",
        "| interval | seeds | covers the true difference | wrong words where both are equal |",
        "|---|---|---|---|",
    ]
    simulated = coverage(a.runs, sd_training=TYPICAL_SPREAD.sd, sd_images=0.015)
    for row in simulated:
        lines.append(f"| {row['interval']} | {row['seeds']} | {100 * row['covers']:.1f}% | {100 * row['false']:.1f}% |")
    text = "\n".join(lines) + "\n"
    print(text)
    atomic_write(a.workdir / "report.md", text)
    result = {"scores": scores.tolist(), "sd": sd, "interval": [low, high], "false": false, "coverage": simulated}
    write_json(a.workdir / "report.json", result)


def spread_of(scores: Floats) -> tuple[float, float, float]:
    """Standard deviation of trainings, with its 95% interval."""
    freedom = len(scores) - 1
    variance = float(scores.var(ddof=1))
    low, high = (math.sqrt(freedom * variance / chi2.ppf(q, freedom)) for q in (0.975, 0.025))
    return math.sqrt(variance), low, high


def false_verdicts(
    evaluations: Sequence[Evaluation], size: int, draws: int, spread: TrainingSpread | None, seed: int = 0
) -> float:
    """Share of comparisons of two trainings of one network in which one is said to be ahead.

    Args:
        evaluations: Of trainings that differ in nothing but the seed, on the same images.
        size: Images of a validation set; they are drawn with replacement.
        draws: Validation sets for each pair.
        spread: What the comparison knows of trainings.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    wrong, asked = 0, 0
    for first, second in itertools.combinations(evaluations, 2):
        for _ in range(draws):
            chosen = rng.integers(len(first.images), size=size)
            pair = (replace(e, images=tuple(e.images[i] for i in chosen)) for e in (first, second))
            wrong += compare(*pair, resamples=RESAMPLES, seed=asked, spread=spread).word != "undecided"
            asked += 1
    return wrong / asked


def coverage(runs: int, *, sd_training: float, sd_images: float, seed: int = 0) -> list[dict[str, Any]]:
    """What intervals cover in simulated runs, and how often they exclude zero where the true difference is zero.

    The true difference is zero; coverage of any other is the same, as all that is simulated is added to it. Two
    networks differ on a drawn set of images by a normal error that all trainings share, and each training by another.

    Args:
        runs: Simulated runs for each line.
        sd_training: Spread of trainings.
        sd_images: Spread of the difference over sets of images.
        seed: Seed of it all.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for name, seeds, freedom in (
        ("images alone, one training each", 1, 0.0),
        ("images and the spread of trainings, estimated with 4 degrees of freedom", 1, 4.0),
        ("images and the spread of trainings, estimated with 8 degrees of freedom", 1, 8.0),
        ("percentiles of a bootstrap over seeds and images", 3, 0.0),
        ("percentiles of a bootstrap over seeds and images", 5, 0.0),
        ("t over seeds, and images", 3, 0.0),
        ("t over seeds, and images", 5, 0.0),
    ):
        held = 0
        for _ in range(runs):
            images = rng.normal(0, sd_images)
            differences = images + rng.normal(0, math.sqrt(2) * sd_training, seeds)
            drawn = differences[:, None] + rng.normal(0, sd_images, 400)  # a bootstrap over images
            if seeds == 1:
                moved = drawn[0]
                if freedom:
                    estimate = sd_training * math.sqrt(rng.chisquare(freedom) / freedom)
                    moved = moved + TrainingSpread(estimate, freedom, "").draw_differences((400,), rng)
                low, high = np.percentile(moved, [2.5, 97.5])
            elif name.startswith("t "):
                interval = over_trainings(np.concatenate([differences[:, None], drawn], axis=1))
                low, high = interval.low, interval.high
            else:
                chosen = rng.integers(seeds, size=(seeds - 1, drawn.shape[1]))
                low, high = np.percentile(np.take_along_axis(drawn, chosen, axis=0).mean(axis=0), [2.5, 97.5])
            held += bool(low <= 0 <= high)
        rows.append({"interval": name, "seeds": seeds, "covers": held / runs, "false": 1 - held / runs})
    return rows


if __name__ == "__main__":
    main()
