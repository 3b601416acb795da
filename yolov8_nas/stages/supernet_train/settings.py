"""What the supernet depends on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, Literal

from yolov8_nas.config import RunConfig, SupernetConfig, TargetConfig
from yolov8_nas.data import weights
from yolov8_nas.errors import InputError
from yolov8_nas.files import canonical_digest, file_sha256
from yolov8_nas.runner.settings import Space, StageSettings
from yolov8_nas.space import SearchSpace

KEPT: Final = "supernets"
"""Folder of the store with supernets that came from a registry, by the SHA-256 of their weights."""

_KEPT_AT: Final = f"store://{KEPT}/"


class Weights(StageSettings):
    """Weights that a training begins with.

    Attributes:
        path: Where they are.
        sha256: What they are.
    """

    path: str
    sha256: str

    @property
    def kept(self) -> bool:
        """Whether they are a supernet that is kept in the store."""
        return self.path.startswith(_KEPT_AT)


class SupernetSettings(StageSettings):
    """Settings of the supernet's training; those of the recipe are `supernet.training.Recipe`'s.

    Attributes:
        space: The search space.
        processes: Processes that train together.
        weights: What it starts from; nothing for from scratch.
    """

    space: Space
    imgsz: int
    epochs: int
    batch: int | Literal["auto"]
    lr: float
    random_networks: int
    largest_first: float
    anchor: Literal["largest", "stock"]
    near: float | None
    seed: int
    accumulate: int
    amp: bool | Literal["auto"]
    processes: int
    weights: Weights | None


def settings(config: RunConfig, target: TargetConfig | None) -> SupernetSettings:
    """The space and the recipe.

    Raises:
        InputError: There are fewer GPUs than processes, the batch cannot be shared out, or there are no such weights to
            start from.
        SpaceError: The space cannot be used.
    """
    supernet = config.supernet
    processes = _processes(supernet.processes)
    shards = processes * supernet.accumulate
    if supernet.batch != "auto" and supernet.batch % shards:
        raise InputError(
            f"supernet.batch = {supernet.batch} cannot be shared out evenly among {processes} processes with "
            f"supernet.accumulate = {supernet.accumulate}; make it a multiple of {shards}"
        )
    return SupernetSettings(
        space=SearchSpace.load(config.space),
        imgsz=config.imgsz,
        epochs=supernet.epochs,
        batch=supernet.batch,
        lr=supernet.lr,
        random_networks=supernet.random_networks,
        largest_first=supernet.alone,
        anchor=supernet.anchored,
        near=supernet.near,
        seed=config.seed,
        accumulate=supernet.accumulate,
        amp=supernet.amp,
        processes=processes,
        weights=start_weights(supernet),
    )


def kept_at(sha256: str) -> str:
    """What `supernet.weights` calls a supernet that is kept in the store."""
    return f"{_KEPT_AT}{sha256}"


def _processes(asked: int | str) -> int:
    """How many processes train.

    Raises:
        InputError: There are fewer GPUs.
    """
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    gpus = 0
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists():  # else torch need not be loaded to tell
        import torch

        gpus = torch.cuda.device_count()
    if asked == "auto":
        return max(1, gpus)
    if gpus and int(asked) > gpus:
        raise InputError(f"supernet.processes = {asked}, but there are {gpus} GPUs; each process needs one of its own")
    return int(asked)


def start_weights(supernet: SupernetConfig) -> Weights | None:
    """The weights to start from, by content.

    Raises:
        InputError: There are none where they are looked for.
    """
    named = supernet.weights
    if named is None:
        return None
    if kept := re.fullmatch(f"{_KEPT_AT}([0-9a-f]{{64}})", named):
        return Weights(path=named, sha256=kept[1])
    file = weights.local(supernet)
    if file.name == "supernet.safetensors":
        file = file.parent
    files = [file / name for name in ("supernet.json", "supernet.safetensors")] if file.is_dir() else [file]
    for part in files:
        if not part.is_file():
            raise InputError(
                f"supernet.weights = {named!r}: there is no {part}; give a stock YOLOv8 checkpoint (.pt), the folder "
                "of an earlier supernet, or nothing to train from scratch"
            )
    digests = [file_sha256(part) for part in files]
    return Weights(path=str(file), sha256=digests[0] if len(digests) == 1 else canonical_digest(digests))
