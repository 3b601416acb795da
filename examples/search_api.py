"""The search as a library: a supernet, a probed device, limits and data; no pipeline, no store.

    python examples/search_api.py --supernet SUPERNET --probe PROBE --data data.yaml --limit "latency<=5ms"

`SUPERNET` is a folder with `supernet.safetensors` and `supernet.json`, `PROBE` one with what hw-probe writes
(`profile.json`, `latency_table.json`, `latency_model.json`), and `data.yaml` an Ultralytics data yaml whose `val` is
the images that the search may look at. Networks are scored with the supernet's weights and measured on this machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile
from yolov8_nas.export.artifact import write_network
from yolov8_nas.measure.benchmark import level
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.measure.runtime import of_profile
from yolov8_nas.runner.results import LatencyFit, LatencyTable
from yolov8_nas.search.measuring import Bench
from yolov8_nas.search.objective import CostModel, Scorer
from yolov8_nas.search.plan import Plan
from yolov8_nas.search.searcher import Searcher
from yolov8_nas.space import Architecture
from yolov8_nas.space.limits import Constraint
from yolov8_nas.supernet.supernet import Supernet


def main() -> None:
    """Search, and print the candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", required=True, help='for example "latency<=5ms"')
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--population", type=int, default=16)
    arguments = parser.parse_args()

    supernet = Supernet.load(arguments.supernet)
    profile = Profile.read(arguments.probe)
    rows, runtime = LatencyTable.read(arguments.probe).rows, of_profile(profile, "fp32")
    costs = CostModel.from_probe(
        [Constraint.parse(arguments.limit)],
        LatencyModel.of(LatencyFit.read(arguments.probe)),
        rows,
        num_classes=supernet.num_classes,
        imgsz=arguments.imgsz,
        batch=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scorer = Scorer(supernet, arguments.data, imgsz=arguments.imgsz, batch=16, bn_images=64, seed=0, work=work)

        def export(network: Architecture) -> Path:
            file = work / "networks" / f"{network.digest}{runtime.suffix}"
            if not file.exists():
                write_network(scorer.network(network), file, runtime=runtime, imgsz=arguments.imgsz, batch=1)
            return file

        bench = Bench(
            work,
            export=export,
            reference=supernet.space.stock,
            runtime=runtime,
            threads=profile.threads,
            batch=1,
            probed_ms=level(rows),
            elsewhere=None,
            host=HostLock(),
            note=print,
        )
        plan = Plan(arguments.generations, arguments.population, candidates=3, prior_steps=0, rescaled=False)
        searcher = Searcher(
            supernet,
            arguments.data,
            supernet.space,
            costs,
            plan,
            scorer,
            bench.measure,
            imgsz=arguments.imgsz,
            work=work,
        )
        for candidate in searcher.run().met:
            latency_ms = candidate.measurement.latency_ms.p50
            print(f"{candidate.trial.map50_95:.3f} at {latency_ms:.2f} ms: {candidate.trial.architecture.digest}")


if __name__ == "__main__":
    main()
