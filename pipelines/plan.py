"""What a run will take before it is started: its steps, the hours of each pool from measured rates, and their price.

The rate of a stage is the time of one unit of its work (`UNITS`), as runs in a stage store have taken or as somebody
says. Where neither knows, this machine measures what it can stand in for, and of a GPU elsewhere the maker's figure is
taken (`measure_here`). A stage that nothing is known of stays unknown, and every sum that it belongs to is a lower
bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from components.placement import PRODUCT, is_gpu, pool_name
from pipelines.request import Request
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device import catalogue, gpu
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json
from yolov8_nas.measure.target import resolve
from yolov8_nas.run import local
from yolov8_nas.run.effort import UNITS, Look, at_peak, by_rates, units
from yolov8_nas.run.summary import RUN_FILE, read_advice
from yolov8_nas.runner import process
from yolov8_nas.runner.results import Advice, StageRecord
from yolov8_nas.runner.stage import STAGES, find_target, open_store, read_record, target_labels
from yolov8_nas.stages.qat_finetune.settings import QAT_COST
from yolov8_nas.store.store import Store
from yolov8_nas.yaml_text import read_yaml

TRAINING: Final = "training"
LIGHT: Final = "light"
SHARED: Final = ("data-prep", "supernet-train")


MEASURABLE: Final = ("supernet-train", "hw-probe", "search", "qat-finetune", "trt-export")
"""The stages whose rates a look at this machine, or a catalogue, can tell."""

CATALOGUE: Final = "catalogue"
"""What the source of a rate begins with that nobody has measured."""


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
        measured = all(step.hours is not None and not step.source.startswith(CATALOGUE) for step in own)
        hours = sum(hours for hours, _ in known)
        gpu_hours = sum(hours * gpus for hours, gpus in known)
        price = prices.get(name)
        cost = None if price is None else hours * price
        result.append(Pool(name, hours, gpu_hours, measured, price, cost))
    return result


def measure_here(request: Request, found: Sequence[Step], log: Path, data: str | None = None) -> tuple[list[Step], str]:
    """Steps of which nothing is known, by what this machine measures and what a catalogue says.

    Args:
        request: The run to be.
        found: Its steps.
        log: File for what the measuring process prints.
        data: Path of the dataset on this machine; that of the configuration unless given.

    Returns:
        The steps; and why nothing could be measured, or nothing.
    """
    unknown = [step for step in found if step.seconds_per_unit is None and step.stage in MEASURABLE]
    config = request.config.retrained_from(None)
    targets = {
        label: find_target(config, label) for label in dict.fromkeys(step.target for step in unknown if step.target)
    }
    here = [label for label, target in targets.items() if _is_here(target)]
    trains = _trains_here(request)
    training = trains and any(step.pool == TRAINING for step in unknown)
    if not unknown:
        return [*found], ""
    try:
        asked = config.model_copy(update={"data": data or config.data})
        seen: Look = process.call(
            "yolov8_nas.run.advising:look",
            log=log,
            environment=local.patience(),
            config=asked,
            training=training or bool(here),
            targets=here,
        )
    except (InputError, StageError) as error:
        return [*found], str(error)
    pools = {*here, *([TRAINING] if trains else [])}
    filled = [_filled(step, request, config, targets.get(str(step.target)), seen, pools) for step in found]
    return filled, ""


def _trains_here(request: Request) -> bool:
    """Whether this machine can stand in for the one that trains: without GPUs, or with one of the same product."""
    if not int(request.training.gpus):
        return True
    product = _product(request)
    return int(request.training.gpus) == 1 and product in [name.replace(" ", "-") for name in gpu.gpu_names()]


def _is_here(target: TargetConfig) -> bool:
    """Whether a target's device is one of this machine."""
    if target.far is not None:
        return False
    try:
        resolve(target.hardware, target.runtime, target.precision)
    except InputError:
        return False
    return True


def _filled(
    step: Step, request: Request, config: RunConfig, target: TargetConfig | None, seen: Look, here: Collection[str]
) -> Step:
    """A step with a rate, where nothing was known of it and something can be.

    Args:
        step: The step.
        request: The run to be.
        config: Its configuration.
        target: The step's target, if it has one.
        seen: What this machine has measured.
        here: Labels of the targets that are here, and `TRAINING` where this machine trains as those nodes do.
    """
    if step.seconds_per_unit is not None or step.stage not in MEASURABLE:
        return step
    if (TRAINING if step.pool == TRAINING else step.target) not in here:
        device = _product(request) if step.pool == TRAINING else target.hardware if target else None
        return _from_catalogue(step, config, target, seen, device)
    if step.stage == "hw-probe":
        seconds: float | None = seen.probing[str(step.target)][0] * step.units
        source = "one network, exported and timed here"
    else:
        assert seen.rates is not None
        stock_ms = seen.probing[str(step.target)][1] if step.target in here else None
        cost = by_rates(step.stage, config, target, seen.images, seen.rates, stock_ms)
        seconds, source = cost.seconds, cost.source
    return step if seconds is None else replace(step, seconds_per_unit=seconds / step.units, source=source)


def _product(request: Request) -> str | None:
    """The GPU of the nodes that train, where their labels name it."""
    name = dict(request.parameters.get("training_labels") or {}).get(PRODUCT)
    return None if name is None else str(name)


def _from_catalogue(step: Step, config: RunConfig, target: TargetConfig | None, seen: Look, device: str | None) -> Step:
    """A step on a device that is not here, by its maker's figure."""
    named = catalogue.find(device) if device else None
    if named is None:
        label = f"name the GPU of its nodes (--param 'training_labels={{{PRODUCT}: NAME}}')"
        return replace(step, source=f"unknown: {f'{device} is not in the catalogue' if device else label}")
    kind = "fp16" if step.stage == "supernet-train" else "fp32"
    tops = max((entry.tops[kind] for entry in named.specifications if kind in entry.tops), default=None)
    if tops is None or named.mig or named.shared:
        return replace(step, source=f"unknown: no figure of a {device} in the catalogue")
    seconds = at_peak(step.stage, config, target, seen.images, seen.classes, tops)
    if seconds is None:
        return replace(step, source=f"unknown: takes a {device}, and no catalogue tells how long it builds and times")
    source = f"{CATALOGUE}: {device} at its peak of {tops:g} TOPS ({kind.upper()}), every network counted as stock"
    return replace(step, seconds_per_unit=seconds / step.units, source=source)


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
                if seconds := _seconds(read_record(records, stage, label)):
                    return seconds / units(stage, earlier, other), f"run {records.name}"
        return None, "unknown"

    def advice(self, config: RunConfig) -> Iterator[Advice]:
        """What was told of the targets in the newest runs with such a target, or by `yolov8-nas advise`."""
        for label, target in zip(target_labels(config), config.targets, strict=True):
            for records, earlier in self.runs:
                alike = (earlier.space, earlier.imgsz, earlier.start) == (config.space, config.imgsz, config.start)
                if not alike or target not in earlier.targets:
                    continue
                known = target_labels(earlier)[earlier.targets.index(target)]
                if given := read_advice(records, known):
                    yield given.model_copy(update={"target": label})
                    break


def _seconds(record: StageRecord | None) -> float | None:
    """How long a run computed a stage, or would have without the parts that it found in the store.

    Nothing where it took over the whole of what another one had computed.
    """
    return record.seconds + record.seconds_spared if record and record.status == "done" else None


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
    if any(step.source.startswith(CATALOGUE) for step in found):
        lines.append(
            "What is known from the catalogue is what a device would take that reached its maker's figure, which none "
            "does: sums with it are lower bounds."
        )
    if any("here" in step.source for step in found):
        lines.append(
            "What was measured here holds for nodes like this machine. It leaves out what a teacher, fake quantization "
            "while scoring and building engines take."
        )
    runs = sorted({step.source for step in found if step.source.startswith("run ")})
    if runs:
        lines.append(
            f"Rates of {', '.join(runs)} hold for a dataset of that size, and for as many GPUs of the kind that those "
            "steps had: the store does not tell which a training ran on. An interrupted step counts with its last try."
        )
    if any(is_gpu(target) for target in request.config.targets):
        lines.append("A price is for an hour of a step, whatever else its node does meanwhile.")
    return lines
