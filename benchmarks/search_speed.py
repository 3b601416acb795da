"""How fast the search asks its two questions on this machine: what a network costs, and what it scores.

    python benchmarks/search_speed.py --space tiny --imgsz 128 --bn-images 64
    python benchmarks/search_speed.py --run runs/demo

Predicts the cost of random networks with a latency model fitted to invented latencies (prediction takes as long with
measured ones) and scores some with the weights of an untrained supernet on the search split of the demo data. With
`--run`, tells what the search of a finished run took beside its trainings. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from setting import machine

from yolov8_nas.data import dataset
from yolov8_nas.data.check import checked
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import available_cores
from yolov8_nas.errors import InputError
from yolov8_nas.files import read_json
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import Latency, ProbedNetwork
from yolov8_nas.search.objective import CostModel, Scorer
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint
from yolov8_nas.store.store import Manifest
from yolov8_nas.supernet.supernet import Supernet


def main() -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--bn-images", type=int, default=64)
    parser.add_argument("--networks", type=int, default=20, help="networks to score")
    parser.add_argument("--predictions", type=int, default=5000, help="networks to predict the cost of")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads that score a network")
    parser.add_argument("--run", type=Path, help="work folder of a finished run: tell its costs instead")
    arguments = parser.parse_args()
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    if arguments.run:
        print(costs_of_run(arguments.run))
        return
    torch.set_num_threads(arguments.threads)
    space = SearchSpace.load(arguments.space)
    with tempfile.TemporaryDirectory() as folder, HostLock().measuring():
        with checked(None) as source:
            prepared = Path(folder) / "data"
            data = dataset.write(source, prepared)
        rng = np.random.default_rng(0)
        networks = [space.sample(rng) for _ in range(arguments.predictions)]
        rate = predictions_a_second(space, networks, len(data.classes), arguments.imgsz)
        scorer = Scorer(
            Supernet(space, len(data.classes), data.classes),
            dataset.data_yaml(prepared, Path(folder), validate_on="search"),
            imgsz=arguments.imgsz,
            batch=16,
            bn_images=arguments.bn_images,
            seed=0,
            work=Path(folder) / "work",
        )
        scores = scores_a_minute(scorer, networks[: arguments.networks])
    print(f"{machine(arguments.threads)}; space {space.name}\n")
    print("| | |\n|---|---|")
    print(f"| costs predicted a second, of {len(networks)} random networks | {rate:,.0f} |")
    print(
        f"| networks scored a minute: BatchNorm on {arguments.bn_images} images, mAP on {data.images['search']}, "
        f"{arguments.imgsz} px | {scores:.0f} |"
    )


def predictions_a_second(space: SearchSpace, networks: list[Architecture], classes: int, imgsz: int) -> float:
    """How many networks the cost model is asked for in a second, under a limit on latency."""
    rng = np.random.default_rng(1)
    measured = [space.sample(rng) for _ in range(60)]
    invented = [1 + cost(network, classes, imgsz).gflops for network in measured]
    rows = [
        ProbedNetwork(
            architecture=network, genes=space.encode(network), role="train",
            latency_ms=Latency(p50=ms, p90=ms, p99=ms), interval_ms=(ms, ms), rounds=(ms,), repetitions=1,
            disturbed=False, memory_mb=0.0, energy_mj=None, power_w=None,
        )
        for network, ms in zip(measured, invented, strict=True)
    ]  # fmt: skip
    costs = CostModel.from_probe(
        [Constraint.parse("latency<=2ms")],
        LatencyModel.fit(space, classes, imgsz, measured, invented),
        rows,
        num_classes=classes,
        imgsz=imgsz,
        batch=1,
    )
    start = time.perf_counter()
    costs(networks)
    return len(networks) / (time.perf_counter() - start)


def scores_a_minute(scorer: Scorer, networks: list[Architecture]) -> float:
    """How many networks are scored in a minute."""
    scorer(scorer.supernet.space.stock)  # reads the images
    start = time.perf_counter()
    for network in networks:
        scorer(network)
    return 60 * len(networks) / (time.perf_counter() - start)


def costs_of_run(workdir: Path) -> str:
    """What the stages of a finished run took when their results were made, and how many networks the search scored.

    Raises:
        InputError: The folder holds no finished run, or its results are not in its own store.
    """
    run, store = workdir / "run.json", workdir / "store"
    if not run.exists() or not store.is_dir():
        raise InputError(f"{workdir}: no run with a store of its own; give the --workdir of a finished run")
    records = [read_json(file) for file in sorted((store / "runs" / read_json(run)["run_id"]).glob("*.*.json"))]
    made: list[tuple[dict[str, Any], Manifest]] = []
    for record in records:
        manifest = store / record["stage"] / record["key"] / "manifest.json"
        if manifest.exists():
            made.append((record, Manifest(**read_json(manifest))))
    made.sort(key=lambda pair: -pair[1].seconds)
    total = sum(manifest.seconds for _, manifest in made)
    lines = ["| stage | target | seconds | share |", "|---|---|---|---|"]
    for record, manifest in made:
        target = record["target"] or "all"
        lines.append(f"| {record['stage']} | {target} | {manifest.seconds:.0f} | {manifest.seconds / total:.0%} |")
    for record, manifest in made:
        if record["stage"] == "search":
            history = store / "search" / record["key"] / "outputs" / "history.jsonl"
            scored = len(history.read_text().splitlines())
            lines.append(
                f"\nThe search for {record['target']} scored {scored} networks, "
                f"{60 * scored / manifest.seconds:.0f} a minute, all else of the stage included."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
