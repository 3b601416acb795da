"""How much work a run has, stage by stage, and what it takes by measured rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.measure.protocol import VERIFY
from yolov8_nas.runner.results import Rate, StageCost, TrainingRates
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.stages.qat_finetune.settings import QAT_COST
from yolov8_nas.train.halving import Rung, epochs_of, schedule

UNITS: Final[Mapping[str, str]] = {
    "data-prep": "dataset",
    "supernet-train": "epoch of a network",
    "hw-probe": "network",
    "search": "network",
    "qat-finetune": "epoch",
    "trt-export": "network",
    "register": "model",
}
"""What a stage's work is counted in."""

_STOCK: Final = {"none": 0, "stock": 1, "rescaled": 1, "both": 2}

_CALIBRATED: Final = 512
"""Images from which BatchNorm's statistics come where the supernet is validated (`supernet.training`)."""


@dataclass(frozen=True)
class Look:
    """What a machine can tell of a run for which nothing was probed or trained yet.

    Attributes:
        images: Images of the splits `train`, `search` and `val`.
        classes: Number of classes.
        rates: What training takes here; nothing where it was not asked for.
        probing: Of targets that are here: seconds to export and time one network, and stock's median latency in ms.
    """

    images: Mapping[str, int]
    classes: int
    rates: TrainingRates | None
    probing: Mapping[str, tuple[float, float]]


def units(stage: str, config: RunConfig, target: TargetConfig | None) -> int:
    """How much work a stage has, in its unit."""
    match stage:
        case "supernet-train":
            return config.supernet.epochs * (2 + config.supernet.random_networks)
        case "hw-probe":
            return config.probe.networks + config.probe.holdout
        case "search":
            return config.search.generations * config.search.population
        case "qat-finetune":
            return _epochs(config, target)
        case "trt-export":
            return config.finetune.candidates + _STOCK[config.finetune.baseline]
        case _:
            return 1


def _epochs(config: RunConfig, target: TargetConfig | None) -> int:
    """Epochs of all trainings of qat-finetune."""
    tuning = config.finetune
    int8 = target is not None and target.precision in ("int8", "best")
    quantized = QAT_COST * tuning.qat_epochs if int8 else 0
    whole = config.supernet.epochs + tuning.epochs
    rivals = tuning.epochs if config.start == "weights" else whole
    short: Sequence[Rung] | Literal["auto"] = "auto"
    if tuning.rungs != "auto":
        short = [Rung(rung.networks, rung.epochs) for rung in tuning.rungs]

    def rungs(epochs: int) -> tuple[Rung, ...]:
        return schedule(config.search.candidates, tuning.candidates, epochs, short)

    candidates = rungs(whole if config.start == "scratch" else tuning.epochs)
    work = epochs_of(candidates) + candidates[-1].networks * quantized
    if tuning.baseline in ("stock", "both"):
        work += candidates[-1].networks * rivals + quantized
    elif tuning.distill:
        work += rivals
    if tuning.baseline in ("rescaled", "both"):
        work += epochs_of(rungs(rivals)) + quantized
    return work


def by_rates(
    stage: str,
    config: RunConfig,
    target: TargetConfig | None,
    images: Mapping[str, int],
    rates: TrainingRates,
    stock_ms: float | None = None,
) -> StageCost:
    """What a stage will take on the machine where the rates were measured.

    Args:
        stage: The stage.
        config: The run's configuration.
        target: The target; nothing for a stage that serves all of them.
        images: Images of the splits `train`, `search` and `val`.
        rates: The rates.
        stock_ms: Median latency of stock on the target; nothing where it is not known.
    """
    if (per_image := _PER_IMAGE.get(stage)) is not None:
        work = per_image(config, target, images, rates)
        quiet = "" if rates.alone else ", beside other work"
        return StageCost(
            stage=stage,
            seconds=math.fsum(rate.seconds * count for rate, count in work),
            low=math.fsum(rate.low * count for rate, count in work),
            high=math.fsum(rate.high * count for rate, count in work),
            source=f"steps measured here ({rates.device}{quiet})",
        )
    if stage == "trt-export" and stock_ms is not None:
        files = units(stage, config, target)
        runs = VERIFY.min_rounds * (VERIFY.warmup + 2 * VERIFY.repetitions) * 2
        seconds = files * (runs + images["search"] + images["val"]) * stock_ms / 1000
        return StageCost(
            stage=stage, seconds=seconds, source="stock's latency, times the runs that a verdict takes; no builds"
        )
    return StageCost(stage=stage, seconds=None, source="takes no training")


def at_peak(
    stage: str, config: RunConfig, target: TargetConfig | None, images: Mapping[str, int], classes: int, tops: float
) -> float | None:
    """Seconds that a stage takes on a device of which only the maker's figure is known, and which reached that.

    Every network counts as stock, a training pass as three forward passes, and nothing else counts; a stage that is not
    made of these gives nothing.

    Args:
        stage: The stage.
        config: The run's configuration.
        target: The target; nothing for a stage that serves all of them.
        images: Images of the splits `train`, `search` and `val`.
        classes: Classes of the dataset.
        tops: Its 10^12 operations per second, a multiply-accumulate counted as two.
    """
    work = units(stage, config, target)
    passes = {
        "supernet-train": 3 * work * images["train"],
        "qat-finetune": work * (3 * images["train"] + images["search"]),
        "search": work * images["search"],
    }
    if stage not in passes:
        return None
    stock = cost(SearchSpace.load(config.space).stock, classes, config.imgsz)
    return passes[stage] * stock.gflops / (1e3 * tops)


Work = list[tuple[Rate, float]]


def _supernet(config: RunConfig, target: TargetConfig | None, images: Mapping[str, int], rates: TrainingRates) -> Work:
    epochs = config.supernet.epochs
    alone = math.floor(epochs * config.supernet.alone)
    scored = 2 * math.ceil(epochs / max(1, min(10, math.ceil(epochs / 3))))
    calibrated = min(_CALIBRATED, images["train"])
    return [
        (rates.teacher, alone * images["train"]),
        (rates.supernet, (epochs - alone) * images["train"]),
        (rates.score, scored * images["search"]),
        (rates.recalibration, scored * calibrated),
    ]


def _search(config: RunConfig, target: TargetConfig | None, images: Mapping[str, int], rates: TrainingRates) -> Work:
    networks = units("search", config, target)
    calibrated = min(config.search.bn_images, images["train"])
    return [(rates.score, networks * images["search"]), (rates.recalibration, networks * calibrated)]


def _finetune(config: RunConfig, target: TargetConfig | None, images: Mapping[str, int], rates: TrainingRates) -> Work:
    epochs = units("qat-finetune", config, target)
    return [(rates.single, epochs * images["train"]), (rates.score, epochs * images["search"])]


_PER_IMAGE: Final[Mapping[str, Callable[[RunConfig, TargetConfig | None, Mapping[str, int], TrainingRates], Work]]] = {
    "supernet-train": _supernet,
    "search": _search,
    "qat-finetune": _finetune,
}
"""The stages that take a time in proportion to images: how many of each kind of work."""
