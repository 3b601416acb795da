"""What the benchmarks of accuracy have in common: pictures enough to decide, and a line that tells the machine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.data import dataset
from yolov8_nas.data.check import checked
from yolov8_nas.data.demo import make_demo
from yolov8_nas.device.profile import available_cores, cpu_model
from yolov8_nas.space import Architecture
from yolov8_nas.supernet.derive import build
from yolov8_nas.supernet.slicing import sliced
from yolov8_nas.supernet.warmstart import read_stock


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


def prepared(workdir: Path, data: str | None, *, train: int, val: int) -> Path:
    """A checked dataset with its three splits, made once.

    Args:
        workdir: Where it is, or is to be.
        data: A folder or an archive; nothing for inspection pictures.
        train: Number of training pictures of these.
        val: Number of validation pictures of these.

    Returns:
        The folder with `dataset.json`.
    """
    folder = workdir / "data"
    if not (folder / "dataset.json").exists():
        source = Path(data) if data else inspection_pictures(workdir / "pictures", train=train, val=val)
        with checked(source) as found:
            dataset.write(found, folder)
    return folder


def begun(
    architecture: Architecture, weights: Path | None, names: Sequence[str], calibration: Sequence[Tensor], seed: int
) -> DetectionModel:
    """What a training starts from: a network cut out of a stock checkpoint, or one of random numbers.

    Args:
        architecture: What the network is.
        weights: A stock checkpoint; nothing for random numbers.
        names: Names of the classes.
        calibration: Images to which what was cut is fitted.
        seed: Seed of what is random.
    """
    torch.manual_seed(seed)
    if weights is None:
        return build(architecture, len(names), list(names))
    network, _ = sliced(read_stock(weights), architecture, names, calibration)
    return network
