"""Advice on one target, made once it was probed and before anything is trained for it.

What it takes beside hw-probe's result are two measurements, each a part of its own in the stage store: stock sizes on
the device, and a minute of real training steps. So advice that is asked for again costs seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from yolov8_nas.advice import recommending, sizes
from yolov8_nas.advice.gains import recorded
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.data import dataset as datasets
from yolov8_nas.data.check import SPLITS, checked
from yolov8_nas.data.remote import is_address
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile, available_cores, computing_threads, cpu_model
from yolov8_nas.errors import InputError, StageError, told
from yolov8_nas.export.artifact import write_network
from yolov8_nas.files import canonical_digest
from yolov8_nas.measure.benchmark import Measurement, level, measure
from yolov8_nas.measure.protocol import PROBE as PROTOCOL
from yolov8_nas.measure.runtime import RUNTIMES, find
from yolov8_nas.measure.target import resolve
from yolov8_nas.run.effort import Look, by_rates
from yolov8_nas.run.lifecycle import IN_CLUSTER
from yolov8_nas.run.summary import RUN_FILE, advice_file
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import (
    Advice,
    DatasetResult,
    MeasuredSize,
    MeasuredSizes,
    StageCost,
    StockResult,
    TrainingRates,
)
from yolov8_nas.runner.settings import Space, StageSettings
from yolov8_nas.runner.stage import STAGES, StageContext, find_target, open_store, read_record
from yolov8_nas.space import SearchSpace
from yolov8_nas.stages.hw_probe import STAGE as PROBE
from yolov8_nas.stages.hw_probe.settings import TABLES, ProbeSettings
from yolov8_nas.stages.hw_probe.stock_sizes import VERSION as SIZES_VERSION
from yolov8_nas.stages.hw_probe.stock_sizes import SizesSettings
from yolov8_nas.stages.hw_probe.stock_sizes import measure as measure_sizes
from yolov8_nas.stages.supernet_train.run import recipe_of
from yolov8_nas.stages.supernet_train.settings import SupernetSettings
from yolov8_nas.stages.supernet_train.settings import settings as supernet_settings
from yolov8_nas.store.store import Entry
from yolov8_nas.supernet.derive import build
from yolov8_nas.train.rates import IMAGES, SCORED
from yolov8_nas.train.rates import measure as measure_training

RATES: Final = "rates"
"""Folder of the store with what training takes on machines."""

BUSY: Final = 1.25
"""Load for each usable core from which a machine has other work; hw-probe, which goes before, brings it to one."""

_RATES_VERSION: Final = 1
_LOOKS: Final = 2
"""Rounds in which a network is timed to learn how long hw-probe takes for it."""

_PROBED: Final = {"best": "fp32"}
"""Precision in which a target is probed, where it is not the one that is asked for."""


class RateSettings(StageSettings):
    """What training rates depend on.

    Attributes:
        machine: What trains.
        supernet: The supernet's training; of its start and its length nothing depends.
        batch: Images per step of fine-tuning.
        dataset: Digest of the dataset.
        space: The search space.
        busy: Whether the machine had other work: what was measured then is not taken for what it does on its own.
    """

    machine: str
    supernet: SupernetSettings
    batch: int
    dataset: str
    space: Space
    busy: bool


def advise(
    config: RunConfig, label: str, *, store: str, probe: Entry, dataset: Path | None, may_measure: bool = True
) -> Advice:
    """Advice on a target.

    Args:
        config: The run's configuration.
        label: Label of the target.
        store: The stage store, where what is measured for it is kept.
        probe: hw-probe's result for the target.
        dataset: Folder of the dataset in its normal form; nothing where it is not here, or where another machine
            trains. No training step is taken then.
        may_measure: Whether the target's device is here. Otherwise only what was measured before counts.

    Raises:
        InputError: hw-probe's result is not of its form.
    """
    target, folder = find_target(config, label), probe.outputs
    probed = sizes.Probed.read(folder, target.batch, _PROBED.get(target.precision, target.precision))
    progress = Progress.from_environment(PROBE.name, label)
    found = sizes.stock_sizes(probed)
    if target.far is None and (wanted := sizes.worth_measuring(found, int8=_computes_int8(target, folder))):
        settings = _sizes_settings(config, probe, wanted)
        if may_measure or _is_known(store, settings):
            progress.note(f"advice: measuring {len(wanted)} stock networks beside those of the space")
            beside = _beside(settings, store, progress)
            found = sizes.stock_sizes(probed, _at_level(beside.rows, probed))
    rates, why_not = None, "the dataset is not here, or another machine trains"
    if dataset is not None:
        try:
            rates = _rates(config, store, dataset, progress)
        except (InputError, StageError, MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
            why_not = f"no training step could be taken here ({told(error)})"
    space = SearchSpace.load(config.space)
    recommended = recommending.recommend(found, space=space, start=config.start)
    return Advice(
        target=label,
        precision=probed.precision,
        limits=tuple(map(str, probed.limits)),
        sizes=found,
        space=space.name,
        scale=space.scale,
        gains=recorded(config.start),
        costs=_costs(config, target, folder, dataset, rates or why_not),
        rates=rates,
        kind=recommended.kind,
        size=recommended.size,
        recommendation=recommended.sentence,
    )


def advise_and_keep(config: RunConfig, label: str, *, store: str, key: str, dataset: Path) -> Advice:
    """`advise` without a run, kept in the store for whoever plans one: in records of a name of their own."""
    opened, name = open_store(store), f"advice-{config.digest}"
    given = advise(config, label, store=store, probe=opened.result(PROBE.name, key), dataset=dataset)
    opened.record(name, RUN_FILE, {"config": config.model_dump(mode="json")})
    opened.record(name, advice_file(label), given.plain())
    return given


def advise_in_run(config: str, label: str, *, store: str, run_id: str, key: str, may_measure: bool) -> Advice:
    """Advice on a target of a run that goes on, kept among its records.

    Args:
        config: Run configuration as JSON.
        label: Label of the target.
        store: The stage store.
        run_id: Name of the run.
        key: Key of hw-probe's result.
        may_measure: Whether the target's device is here.

    Raises:
        InputError: hw-probe's result is not of its form.
        StageError: It is not what its manifest says.
    """
    asked, opened = RunConfig.parse(json.loads(config), "run configuration"), open_store(store)
    probe = opened.result(PROBE.name, key)
    dataset = None
    record = read_record(opened.run_folder(run_id), "data-prep", None)
    if record and not os.environ.get(IN_CLUSTER):
        found = opened.place("data-prep", record.key) / "outputs"
        dataset = found if (found / "dataset.json").is_file() else None
    given = advise(asked, label, store=store, probe=probe, dataset=dataset, may_measure=may_measure)
    opened.record(run_id, advice_file(label), given.plain())
    return given


def look(config: RunConfig, *, training: bool, targets: Sequence[str]) -> Look:
    """Measure here what a run will take, of which nothing was done yet; nothing of it is kept.

    Args:
        config: The run's configuration.
        training: Whether to take training steps.
        targets: Labels of the targets that are here.

    Raises:
        InputError: The dataset cannot be used or is at an address, from which nothing is fetched; a target is not here.
    """
    if is_address(config.data):
        raise InputError(f"{config.data}: is not fetched to plan a run; give the path of a copy with --data")
    with tempfile.TemporaryDirectory() as work, checked(config.data, scratch=Path(work)) as found:
        rates = None
        if training:
            with_boxes = {name: sorted(found.splits[name], key=lambda image: not image.boxes) for name in SPLITS}
            part = {"train": with_boxes["train"][:IMAGES], "search": with_boxes["search"][:SCORED], "val": ()}
            some = Path(work) / "some"
            datasets.write(replace(found, splits=part), some)
            rates = _look_at_training(config, some, Path(work))
        probing = {label: _look_at(find_target(config, label), config, found.names, Path(work)) for label in targets}
        return Look(found.images, len(found.names), rates, probing)


def _look_at_training(config: RunConfig, dataset: Path, work: Path) -> TrainingRates:
    settings = _rate_settings(config, datasets.load(dataset))
    (out := work / "rates").mkdir()
    ctx = StageContext(settings, {}, out, work / "steps", Progress.silent(), HostLock(), None)
    measure_rates(ctx, dataset)
    return TrainingRates.read(out)


def _look_at(target: TargetConfig, config: RunConfig, names: Sequence[str], work: Path) -> tuple[float, float]:
    """Seconds in which stock is exported and timed as hw-probe does it, and its median latency in ms."""
    device, space = resolve(target.hardware, target.runtime), SearchSpace.load(config.space)
    runtime, begun = find(device.runtime, device.kind), time.perf_counter()
    file = work / f"{device.name}-{target.batch}{runtime.suffix}"
    network = build(space.stock, len(names), names).eval()
    write_network(network, file, runtime=runtime, imgsz=config.imgsz, batch=target.batch)
    exported = time.perf_counter()
    few = replace(PROTOCOL, min_rounds=_LOOKS, max_rounds=_LOOKS)
    with _alone(HostLock()):
        (timed,) = measure([file], threads=device.threads, runtime=runtime, batch=target.batch, protocol=few)
    seconds = exported - begun + (time.perf_counter() - exported) * PROTOCOL.min_rounds / _LOOKS
    return seconds, timed.latency_ms.p50


def _computes_int8(target: TargetConfig, probe: Path) -> bool:
    """Whether the target could run INT8, and was not probed in it."""
    kind = Profile.read(probe).kind
    return target.precision != "int8" and "int8" in RUNTIMES[target.runtime].precisions.get(kind, ())


def _at_level(rows: Sequence[MeasuredSize], probed: sizes.Probed) -> list[MeasuredSize]:
    """Sizes as they would have been in the hour in which the table was measured."""
    now = level(probed.rows)
    moved = [Measurement.from_dict(row.plain()).at_level(now) for row in rows]
    return [
        MeasuredSize(**one.to_dict(), scale=row.scale, precision=row.precision)
        for one, row in zip(moved, rows, strict=True)
    ]


def _sizes_settings(config: RunConfig, probe: Entry, wanted: Sequence[tuple[str, str]]) -> SizesSettings:
    """What the measurement of stock sizes depends on: the device is the one that hw-probe has seen.

    Raises:
        InputError: hw-probe's result has no manifest.
    """
    manifest = probe.manifest
    if manifest is None:
        raise InputError(f"{probe.folder}: hw-probe's result is not whole; run it again")
    asked = ProbeSettings.model_validate(manifest.settings)
    table = asked.table.plain() | {"keep_float": list(config.quantization.keep_float), "sizes": list(wanted)}
    return SizesSettings.model_validate(table)


def _is_known(store: str, settings: SizesSettings) -> bool:
    """Whether sizes were measured already."""
    key = canonical_digest([TABLES, SIZES_VERSION, settings.plain()])  # as `StageContext.share` has it
    return open_store(store).entry(TABLES, key).manifest is not None


def _beside(settings: SizesSettings, store: str, progress: Progress) -> MeasuredSizes:
    """Stock sizes on the device, from the store or measured now."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        ctx = StageContext(settings, {}, folder, folder, progress, HostLock(note=progress.note), open_store(store))
        ctx.share(TABLES, SIZES_VERSION, settings, measure_sizes)
        return MeasuredSizes.read(folder)


def _rates(config: RunConfig, store: str, dataset: Path, progress: Progress) -> TrainingRates:
    """What training takes here, from the store or measured now."""
    settings = _rate_settings(config, datasets.load(dataset))

    def make(ctx: StageContext[RateSettings]) -> None:
        progress.note("advice: taking real training steps for about a minute")
        measure_rates(ctx, dataset)

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        ctx = StageContext(settings, {}, folder, folder, progress, HostLock(note=progress.note), open_store(store))
        ctx.share(RATES, _RATES_VERSION, settings, make)
        return TrainingRates.read(folder)


def _rate_settings(config: RunConfig, dataset: DatasetResult) -> RateSettings:
    supernet = config.supernet.model_copy(update={"weights": None, "processes": 1, "anchor": config.supernet.anchored})
    asked = supernet_settings(config.model_copy(update={"supernet": supernet}), None)
    return RateSettings(
        machine=_machine(),
        supernet=asked.model_copy(update={"epochs": 1, "lr": 1.0, "largest_first": 0.0}),
        batch=config.finetune.batch,
        dataset=dataset.digest,
        space=asked.space,
        busy=os.getloadavg()[0] > BUSY * available_cores(),
    )


def measure_rates(ctx: StageContext[RateSettings], dataset: Path) -> None:
    """Write `rates.json`."""
    torch.set_num_threads(computing_threads())
    begun = time.perf_counter()
    with _alone(ctx.host) as alone:
        found = measure_training(
            dataset, ctx.partial, ctx.settings.space, recipe_of(ctx.settings.supernet), ctx.settings.batch
        )
    alone = alone and not ctx.settings.busy
    TrainingRates(**vars(found), alone=alone, took=time.perf_counter() - begun).write(ctx.out)


@contextlib.contextmanager
def _alone(host: HostLock) -> Iterator[bool]:
    """Hold the host alone where nobody else holds it, and beside the others otherwise; tells which."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(host.measuring(wait=False))
            alone = True
        except BlockingIOError:
            stack.enter_context(host.computing())
            alone = False
        yield alone


def _machine() -> str:
    """What trains on this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {computing_threads()} threads"


def _costs(
    config: RunConfig, target: TargetConfig, probe: Path, dataset: Path | None, rates: TrainingRates | str
) -> tuple[StageCost, ...]:
    """What the stages that are left will take, by rates; or why there are none."""
    left = [stage for stage in STAGES if stage not in ("data-prep", PROBE.name)]
    if dataset is None or isinstance(rates, str):
        return tuple(StageCost(stage=stage, seconds=None, source=rates) for stage in left)
    images, stock_ms = datasets.load(dataset).images, StockResult.read(probe).latency_ms.p50
    return tuple(by_rates(stage, config, target, images, rates, stock_ms) for stage in left)
