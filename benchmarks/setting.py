"""What the benchmarks of accuracy have in common: pictures enough to decide, and a line that tells the machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from yolov8_nas.data.demo import make_demo
from yolov8_nas.hardware.profile import available_cores, cpu_model


def inspection_pictures(folder: Path, *, train: int, val: int) -> Path:
    """The demo's inspection pictures in a larger number, made once.

    Args:
        folder: Where they are, or are to be.
        train: Number of training pictures; the search split is cut from them.
        val: Number of validation pictures.

    Returns:
        `folder`, a YOLO dataset.
    """
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_demo(unfinished, images=train + val, val_share=val / (train + val))
        unfinished.rename(folder)
    return folder


def machine(threads: int) -> str:
    """This machine in a few words."""
    return f"{cpu_model()}, {available_cores()} cores, {threads} thread{'s' if threads > 1 else ''}"
