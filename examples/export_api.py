"""The export as a library: trained networks, a device, limits and data; no pipeline, no store.

    python examples/export_api.py --tuned TUNED --data DATA --probe PROBE --limit "latency<=5ms" --out OUT

`TUNED` is a folder with what qat-finetune writes (`finetune.json` and checkpoints), `DATA` one with what data-prep
writes, and `PROBE` one with hw-probe's `profile.json`. Every network is exported, measured on this machine and scored;
the file that ships lies in `OUT/model` then.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from yolov8_nas.deploy.exporter import export
from yolov8_nas.deploy.job import Job
from yolov8_nas.deploy.sources import Form
from yolov8_nas.device.profile import Profile
from yolov8_nas.space.limits import Constraint


def main() -> None:
    """Export, and print what was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tuned", "data", "probe", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", required=True, help='for example "latency<=5ms"')
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--scale", default="n", help="size of the stock YOLOv8 that the space is made of")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        job = Job(
            tuned=arguments.tuned,
            data=arguments.data,
            profile=Profile.read(arguments.probe),
            limits=[Constraint.parse(arguments.limit)],
            precision="fp32",
            form=Form(imgsz=arguments.imgsz, batch=1, nms_free=False, keep_float=()),
            scale=arguments.scale,
            out=arguments.out,
            work=Path(work),
        )
        decided = export(job)
    for tried in decided.result.tried:
        print(f"candidate {tried.candidate}: {tried.map50_95:.3f} at {tried.latency_ms.p50:.2f} ms, {tried.outcome}")
    if decided.why_none:
        raise SystemExit(decided.why_none)


if __name__ == "__main__":
    main()
