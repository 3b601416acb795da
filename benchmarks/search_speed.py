"""How fast the search asks its two questions on this machine: what a network costs, and what it scores.

    python benchmarks/search_speed.py --space tiny --imgsz 128 --bn-images 64

Predicts the cost of random networks with a latency model fitted to invented latencies (prediction takes as long with
measured ones) and scores some with the weights of an untrained supernet on the search split of the demo data. Run it on
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from yolov8_nas.data import dataset
from yolov8_nas.data.check import checked
from yolov8_nas.hardware.cost import cost
from yolov8_nas.hardware.latency_model import LatencyModel
from yolov8_nas.search.constraint import Constraint
from yolov8_nas.search.objective import CostModel, Scorer
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.supernet import Supernet


def main() -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--bn-images", type=int, default=64)
    parser.add_argument("--networks", type=int, default=20, help="networks to score")
    parser.add_argument("--predictions", type=int, default=5000)
    arguments = parser.parse_args()
    space, rng = SearchSpace.load(arguments.space), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, checked(None) as source:
        data = dataset.write(source, Path(folder) / "data")
        classes = len(data.classes)

        measured = [space.sample(rng) for _ in range(60)]
        invented = [1 + cost(network, classes, arguments.imgsz).gflops for network in measured]
        rows = [
            {"architecture": network.to_dict(), "latency_ms": dict.fromkeys(("p50", "p90", "p99"), ms)}
            for network, ms in zip(measured, invented, strict=True)
        ]
        costs = CostModel.from_probe(
            [Constraint.parse("latency<=2ms")],
            LatencyModel.fit(space, classes, arguments.imgsz, measured, invented),
            rows,
            num_classes=classes,
            imgsz=arguments.imgsz,
            batch=1,
        )
        networks = [space.sample(rng) for _ in range(arguments.predictions)]
        start = time.perf_counter()
        costs(networks)
        rate = len(networks) / (time.perf_counter() - start)
        print(f"{rate:,.0f} costs predicted a second, {len(networks)} random networks of space {space.name}")

        scorer = Scorer(
            Supernet(space, classes, data.classes),
            dataset.data_yaml(data.folder, Path(folder), validate_on="search"),
            imgsz=arguments.imgsz,
            batch=16,
            bn_images=arguments.bn_images,
            seed=0,
            work=Path(folder) / "work",
        )
        scorer(space.stock)  # reads the images
        start = time.perf_counter()
        for network in networks[: arguments.networks]:
            scorer(network)
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{arguments.networks / minutes:.0f} networks scored a minute: BatchNorm on {arguments.bn_images} images, "
            f"mAP on {data.images['search']}, {arguments.imgsz} px"
        )


if __name__ == "__main__":
    main()
