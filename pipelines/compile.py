"""Compile the pipeline to YAML for a Kubeflow server: `python -m pipelines.compile OUT.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

from kfp import compiler

from pipelines.pipeline import yolov8_nas


def compile_pipeline(out: Path) -> None:
    """Write the compiled pipeline to a file."""
    compiler.Compiler().compile(yolov8_nas, str(out))


if __name__ == "__main__":
    compile_pipeline(Path(sys.argv[1]))
