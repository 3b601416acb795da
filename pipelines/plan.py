"""What a run will take before it is started: its steps, the hours of each pool from measured rates, and their price.

The rate of a stage is the time of one unit of its work (`UNITS`), as runs in a stage store have taken or as somebody
says. A stage that nothing is known of stays unknown, and every sum that it belongs to is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from components.placement import is_gpu, pool_name
from pipelines.request import Request
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json
from yolov8_nas.run.summary import RUN_FILE
from yolov8_nas.runner.stage import STAGES, open_store, target_labels
from yolov8_nas.stages.qat_finetune.settings import QAT_COST
from yolov8_nas.store.store import Store
from yolov8_nas.train.halving import Rung, epochs_of, schedule
from yolov8_nas.yaml_text import read_yaml

TRAINING: Final = "training"
LIGHT: Final = "light"
SHARED: Final = ("data-prep", "supernet-train")
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


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        stage: The stage.
        target: Label of the target, or nothing.
        pool: Where it runs.
        gpus: GPUs that it holds meanwhile.
        units: Its work, in the stage's unit.
        seconds_per_unit: Its rate; nothing where it is unknown.
        source: Where the rate is from.
    """

    stage: str
    target: str | None
    pool: str
    gpus: int
    units: int
    seconds_per_unit: float | None
    source: str

    @property
    def hours(self) -> float | None:
        """How long it takes; nothing where that is unknown."""
        return None if self.seconds_per_unit is None else self.units * self.seconds_per_unit / 3600


@dataclass(frozen=True)
class Pool:
    """What a run takes of one pool, as far as it is known.

    Attributes:
        name: The pool.
        hours: Hours of its steps, one after the other.
        gpu_hours: The same times the GPUs that they hold.
        complete: Whether every step of it is known; otherwise all figures are lower bounds.
        price: Per hour of a step; nothing where it is not given.
        cost: In the currency of the price.
    """

    name: str
    hours: float
    gpu_hours: float
    complete: bool
    price: float | None
    cost: float | None


def steps(request: Request, rates: Rates) -> list[Step]:
    """The steps of a run that have work in them, in the order of the pipeline."""
    config = request.config.retrained_from(None)
    training_gpus = int(request.training.gpus)
    placed = {branch.label: branch for branch in request.branches}
    found = []
    for label, target in [(None, None), *zip(target_labels(config), config.targets, strict=True)]:
        for stage in STAGES:
            if (stage in SHARED) != (target is None):
                continue
            pool = pool_of(stage, target)
            gpus = training_gpus if pool == TRAINING else int(placed[label].gpus) if label and pool != LIGHT else 0
            rate, source = rates.find(stage, config, target)
            found.append(Step(stage, label, pool, gpus, units(stage, config, target), rate, source))
    return found


def pool_of(stage: str, target: TargetConfig | None) -> str:
    """The pool that a stage runs in."""
    if stage in ("supernet-train", "qat-finetune"):
        return TRAINING
    return LIGHT if target is None or stage == "register" else pool_name(target)


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
        case "trt-export":
            return config.finetune.candidates + _STOCK[config.finetune.baseline]
        case _:
            return 1


def pools(found: Sequence[Step], prices: Mapping[str, float]) -> list[Pool]:
    """What a run takes of each pool.

    Raises:
        InputError: A price is for a pool that the run does not use.
    """
    names = list(dict.fromkeys(step.pool for step in found))
    for name in prices.keys() - set(names):
        raise InputError(f"--price {name}: no step runs there; the pools are {', '.join(names)}")
    result = []
    for name in names:
        own = [step for step in found if step.pool == name]
        known = [(step.hours, step.gpus) for step in own if step.hours is not None]
        hours = sum(hours for hours, _ in known)
        gpu_hours = sum(hours * gpus for hours, gpus in known)
        price = prices.get(name)
        cost = None if price is None else hours * price
        result.append(Pool(name, hours, gpu_hours, len(known) == len(own), price, cost))
    return result


class Rates:
    """Rates of stages, from a file and from the runs in a stage store.

    The file goes before the store, and newer runs before older ones. A run counts where it computed the stage in the
    same space at the same input size and, for what runs on the target, on the same hardware with the same runtime.

    Args:
        given: Seconds per unit by stage, or by stage and pool.
        store: The stage store; nothing for none.
    """

    def __init__(self, given: Mapping[str, Any], store: Store | None) -> None:
        self.given = given
        self.runs: list[tuple[Path, RunConfig]] = []
        if store is None:
            return
        for run_id in store.runs():
            try:
                records = store.run_folder(run_id)
                self.runs.append((records, RunConfig.parse(read_json(records / RUN_FILE)["config"], run_id)))
            except (FileNotFoundError, InputError, StageError):
                continue  # never opened, of another version of this software, or not signed

    @classmethod
    def load(cls, file: Path | None, store: str | None) -> Rates:
        """Read what is known.

        Raises:
            InputError: The file is missing, not YAML, or has something else in it; the store is not there.
        """
        given: Any = {}
        if file is not None:
            given = read_yaml(file, "a file of rates")
            _check(given, file)
        if store is None:
            return cls(given, None)
        if "://" not in store and not Path(store).is_dir():
            raise InputError(f"--store {store}: no such folder; give that of a stage store with runs in it")
        opened = open_store(store)
        opened.check()
        return cls(given, opened)

    def find(self, stage: str, config: RunConfig, target: TargetConfig | None) -> tuple[float | None, str]:
        """Seconds per unit of a stage, and where they are from."""
        given = self.given.get(stage)
        if isinstance(given, Mapping):
            given = given.get(pool_of(stage, target))
        if given is not None:
            return float(given), "as given"
        for records, earlier in self.runs:
            if (earlier.space, earlier.imgsz) != (config.space, config.imgsz):
                continue
            for label, other in _targets(earlier, stage, target):
                if seconds := _seconds(records / f"{label or 'all'}.{stage}.json"):
                    return seconds / units(stage, earlier, other), f"run {records.name}"
        return None, "unknown"


def _seconds(record: Path) -> float | None:
    """How long a run computed a stage, or would have without the parts that it found in the store.

    Nothing where it took over the whole of what another one had computed.
    """
    found = read_json(record) if record.is_file() else {}
    return float(found["seconds"]) + found.get("seconds_spared", 0.0) if found.get("status") == "done" else None


def _targets(
    earlier: RunConfig, stage: str, target: TargetConfig | None
) -> list[tuple[str | None, TargetConfig | None]]:
    """The targets of an earlier run that a rate may be taken from."""
    if target is None:
        return [(None, None)]
    elsewhere = pool_of(stage, target) in (TRAINING, LIGHT)
    return [
        (label, other)
        for label, other in zip(target_labels(earlier), earlier.targets, strict=True)
        if elsewhere or (pool_name(other), other.runtime) == (pool_name(target), target.runtime)
    ]


def _check(given: Any, file: Path) -> None:
    known = ", ".join(UNITS)
    if not isinstance(given, dict) or given.keys() - UNITS.keys():
        raise InputError(f"{file}: expected seconds per unit by stage ({known})")
    for stage, rate in given.items():
        for value in rate.values() if isinstance(rate, dict) else [rate]:
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise InputError(f"{file}: {stage} = {value!r}: give seconds per {UNITS[stage]}, or that by pool")


def assumptions(request: Request, found: Sequence[Step]) -> list[str]:
    """What a plan takes for granted, in sentences."""
    lines = [
        "Every stage is computed. What the stage store has already costs seconds instead.",
        "A step takes its units times its rate; targets run side by side, and waiting for nodes is not in it.",
        "A supernet's epoch is counted by the networks trained in it, fine-tuning's by plain epochs: one with fake "
        f"quantization counts {QAT_COST}.",
    ]
    if (nodes := request.training.nodes) > 1:
        lines.append(f"The supernet is trained on one node: how much faster {nodes} are has not been measured.")
    if request.config.retrain is not None:
        lines.append("The dataset is a new one: without anything new, a retraining ends after its first step.")
    runs = sorted({step.source for step in found if step.source.startswith("run ")})
    if runs:
        lines.append(
            f"Rates of {', '.join(runs)} hold for a dataset of that size, and for as many GPUs of the kind that those "
            "steps had: the store does not tell which a training ran on. An interrupted step counts with its last try."
        )
    if any(is_gpu(target) for target in request.config.targets):
        lines.append("A price is for an hour of a step, whatever else its node does meanwhile.")
    return lines
