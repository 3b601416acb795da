"""How well latency is predicted on this machine, and how well measurements repeat.

    python benchmarks/latency_model.py --space tiny --imgsz 128 --networks 60 --holdout 12

Runs the hw-probe stage twice in folders of its own, the second time timing the same files again, and tells the error on
held-out networks, the share of them under the upper bound, and by how much p50 of a network differs between the runs.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.config import RunConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import StageError
from yolov8_nas.files import read_json
from yolov8_nas.measure.latency_model import CONFIDENCE
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.hw_probe import STAGE


def main() -> None:
    """Parse arguments, probe twice, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--networks", type=int, default=60)
    parser.add_argument("--holdout", type=int, default=12)
    parser.add_argument("--hardware", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int8"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--once", action="store_true", help="do not measure again")
    arguments = parser.parse_args()
    target = {"hardware": arguments.hardware, "precision": arguments.precision, "constraints": ["latency<=100%stock"]}
    probe = {"networks": arguments.networks, "holdout": arguments.holdout, "max_mape": 1.0}
    config = RunConfig.parse(
        {
            "space": arguments.space,
            "imgsz": arguments.imgsz,
            "seed": arguments.seed,
            "probe": probe,
            "targets": [target],
        },
        "the arguments",
    )
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        _run(config, first)
        _tell_fit(read_json(first / "out" / "latency_model.json"), read_json(first / "out" / "stock.json"))
        if arguments.once:
            return
        shutil.copytree(first / "partial" / "networks", second / "partial" / "networks")
        _run(config, second)
        _tell_spread(*(_p50(read_json(run / "out" / "latency_table.json")["rows"]) for run in (first, second)))


def _run(config: RunConfig, folder: Path) -> None:
    """Run the stage in `folder`, without the store."""
    for name in ("out", "partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = STAGE.whole(config, config.targets[0], {"num_classes": 3})
    start = time.perf_counter()
    try:
        STAGE.run(StageContext(settings, {}, folder / "out", folder / "partial", Progress("hw-probe"), HostLock()))
    except StageError as error:
        print(f"the stage failed: {error}")
    print(f"{folder.name} probe: {time.perf_counter() - start:.1f} s")


def _tell_fit(model: dict[str, Any], stock: dict[str, Any]) -> None:
    as_c2f = stock["as_ultralytics_exports_it"]["latency_ms"]["p50"]
    checked = model["cross_validation"]
    print(f"stock p50 {stock['latency_ms']['p50']:.3f} ms ({as_c2f:.3f} ms as C2f), {stock['memory_mb']:.1f} MiB")
    print(f"half-width of the 95% interval of p50, median of the networks: {model['scatter']:.2%}")
    print(f"correction: {model['smoothness']}")
    print(f"{model['networks']} networks, each predicted from the others: ", end="")
    print(f"MAPE {checked['mape']:.2%}, Spearman {checked['spearman']:.3f}")
    print(f"{model['holdout']} held out: MAPE {model['mape']:.2%}, Spearman {model['spearman']:.3f}, ", end="")
    print(f"{model['coverage']:.0%} under the upper bound (+{model['margin']:.1%}, meant for {CONFIDENCE:.0%})")


def _p50(rows: list[dict[str, Any]]) -> NDArray[np.float64]:
    return np.array([row["latency_ms"]["p50"] for row in rows])


def _tell_spread(first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    difference = second / first - 1
    drift = np.median(difference)
    spread = np.quantile(abs(difference - drift), 0.9)
    print(f"p50 measured again: {drift:+.2%} in the median, 90% of networks within {spread:.2%} of that")


if __name__ == "__main__":
    main()
