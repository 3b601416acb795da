"""The result of supernet-train: what the supernet is, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ConfigDict, JsonValue

from yolov8_nas.runner.results.form import Result, ResultFile, ResultRow
from yolov8_nas.runner.settings import Space


class SupernetTraining(Result):
    """How a supernet was trained.

    Attributes:
        imgsz: Side of the square input in pixels.
        epochs: Passes over the train split.
        seconds: Duration of the training.
        training: Device, batch, workers and so on; see `supernet.training.CONDITIONS`.
        warm_start: What it started from, with the SHA-256 of that; see `supernet.warmstart.WarmStart`. Nothing where it
            started from random weights.
    """

    imgsz: int
    epochs: int
    seconds: float
    training: Mapping[str, JsonValue]
    warm_start: Mapping[str, JsonValue] | None


class SupernetNetwork(ResultFile):
    """What network a supernet is; how it was trained is left out.

    Attributes:
        space: The space whose networks it holds.
        num_classes: Number of classes.
        names: Names of the classes.
    """

    FILE = "supernet.json"

    model_config = ConfigDict(extra="ignore")

    space: Space
    num_classes: int
    names: tuple[str, ...]


class SupernetResult(SupernetNetwork, SupernetTraining):
    """The supernet that a stage trained."""


class SupernetEpoch(ResultRow):
    """Figures of an epoch of the supernet's training, by name: losses, learning rate, durations in seconds, scores.

    Attributes:
        epoch: Number of the epoch, from 1.
    """

    FILE = "curves.json"

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    epoch: int
