"""Write the golden file of the compiled pipeline anew: `python tests/golden/renew.py`. Read the diff."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FILE = Path(__file__).with_name("yolov8-nas.yaml")
IMAGES = {"TRAINING": "1" * 64, "TARGET": "2" * 64, "CPU": "3" * 64}


def compile_with_digests(out: Path) -> None:
    """Compile the pipeline as for a cluster; in a process of its own, since images are named at import."""
    for kind, digest in IMAGES.items():
        os.environ[f"YOLOV8_NAS_IMAGE_{kind}"] = f"registry.example.com/yolov8-nas/{kind.lower()}@sha256:{digest}"
    os.environ.pop("YOLOV8_NAS_QUEUE", None)
    from pipelines.compile import compile_pipeline

    compile_pipeline(out)


if __name__ == "__main__":
    compile_with_digests(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
