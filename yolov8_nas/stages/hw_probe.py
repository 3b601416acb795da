"""hw-probe: what the target device is, how fast networks of the space run on it, and what the limits mean there.

The measurements are a part of their own in the store, found again by every run on the same device, space, runtime and
recipe, whatever its limits are. Holding limits against them is what is left to each run, and measures only where no
network of the table keeps a limit.

Latency depends on a network's shapes and not on its weights, so the networks have fresh weights: the stage needs
neither a dataset nor a supernet. (Fresh weights do shrink activations from layer to layer, to some 1e-17 in the deepest
networks; that is far from the denormal numbers below 1e-38 which would be slow.)

A network that cannot be built or run (it has no room in memory, say) is recorded with the reason and left out. Where
that happens to stock, or to more than a share of `FAILURES`, there is something wrong with more than a network.

A device elsewhere is measured through a bundle (`measure.bundle`): the same networks, packed by `write_bundle`, whose
results `import_results` takes in. What came back is part of the settings, so nothing is measured when the stage runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import Settings, Stage, StageContext, find_target, open_store
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.limits import COUNTED, Constraint, Figures

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.measure.benchmark import Failed, Measurement
    from yolov8_nas.measure.latency_model import Floats, LatencyModel
    from yolov8_nas.search.objective import CostModel

TABLES: Final = "tables"
"""Folder of the store with the measurements that runs share."""

TABLE_VERSION: Final = 2
"""Raised when the same settings would be measured in another way."""

FAILURES: Final = 0.1
"""Share of the networks that may fail before the probe does."""

_TIMING: Final = 2.0
"""What timing a network counts in progress; exporting one counts 1."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the measurements and the limits depend on; the number of classes comes as a parameter.

    Raises:
        InputError: The target cannot be used here, a limit cannot be measured, or the space has too few networks.
    """
    from yolov8_nas.device.counters import NoCounterError, open_counter
    from yolov8_nas.measure.target import resolve

    assert target is not None
    if target.far is not None:
        return _settings_elsewhere(config, target)
    device = resolve(target.hardware, target.runtime, target.precision)
    _require_one_precision(target, device.kind)
    try:
        counter, no_counter = open_counter(device.kind).name, None
    except NoCounterError as error:
        counter, no_counter = None, str(error)
    _require_counter(target, no_counter)
    return {
        "device": device.profile.key,
        "kind": device.kind,
        "name": device.name,
        "counter": counter,
        **recipe(config, target),
        "max_mape": config.probe.max_mape,
        "constraints": [str(limit) for limit in target.limits],
    }


def recipe(config: RunConfig, target: TargetConfig) -> Settings:
    """What is measured, apart from where and of how many classes.

    Raises:
        InputError: The space has too few networks.
    """
    from yolov8_nas.measure.benchmark import PROBE

    space = SearchSpace.load(config.space)
    if space.size < 2 * (config.probe.networks + config.probe.holdout):
        raise InputError(
            f"space {space.name}: {space.size} networks are too few to measure {config.probe.networks} of them and "
            f"{config.probe.holdout} more to check the latency model; give it more options or lower probe.networks"
        )
    return {
        "protocol": asdict(PROBE),
        "space": space.to_dict(),
        "imgsz": config.imgsz,
        "batch": target.batch,
        # `best` searches in FP32; what ships is decided by measuring both.
        "precision": "fp32" if target.precision == "best" else target.precision,
        "networks": config.probe.networks,
        "holdout": config.probe.holdout,
        "seed": config.seed,
        **config.quantization.settings(int8=target.precision == "int8"),
        **config.finetune.head(),
    }


def _differences(results: Mapping[str, Any], asked: Settings) -> list[str]:
    """Names of what was measured elsewhere by another recipe than is asked for."""
    from yolov8_nas.measure.bundle import differences

    # A recipe in which no part stays in floating point, or with YOLOv8's own head, does not say so.
    return differences(results, {"keep_float": None, "nms_free": None, **asked})


def _settings_elsewhere(config: RunConfig, target: TargetConfig) -> Settings:
    """The settings of a device elsewhere, with all that was measured there.

    Raises:
        InputError: Nothing was measured there yet, or by another recipe; or a limit cannot be measured there.
    """
    from yolov8_nas.measure.bundle import place, read_kept

    asked = recipe(config, target)
    if any(limit.scope == "with_nms" for limit in target.limits):
        raise InputError(
            f"target {target.hardware} elsewhere: non-maximum suppression is not measured there; "
            "limit the network alone (latency<=...), with room for it"
        )
    _require_one_precision(target, place(target).kind)
    table = read_kept(target).table
    if differing := _differences(table, asked):
        raise InputError(
            f"{target.far}: measured with another {' and '.join(differing)} than the configuration has; measure anew "
            "(yolov8-nas probe CONFIG --bundle FILE.tar), or set the configuration back"
        )
    _require_counter(target, None if table["counter"] else table["no_counter"] or "it counts none")
    return {
        "device": table["key"],
        "kind": table["profile"]["kind"],
        "name": table["profile"]["name"],
        "counter": table["counter"],
        **asked,
        "max_mape": config.probe.max_mape,
        "constraints": [str(limit) for limit in target.limits],
        "elsewhere": dict(table),
    }


def _require_one_precision(target: TargetConfig, kind: str) -> None:
    """`best` compares with FP32, which nobody would ship on a GPU."""
    if kind == "gpu" and target.precision == "best":
        raise InputError(f"precision 'best' on {target.hardware}, a GPU: name one; use fp16 or int8")


def _require_counter(target: TargetConfig, no_counter: str | None) -> None:
    for limit in target.limits:
        if no_counter and limit.metric in COUNTED:
            raise InputError(
                f"constraint {str(limit)!r} on {target.hardware}: {limit.metric} cannot be measured here, because "
                f"{no_counter}; or leave this limit out"
            )


def run(ctx: StageContext) -> None:
    """Write the table's files (see `measure_table`) and `constraints.json`, the limits as absolute ones.

    A relative limit keeps its share of stock (`share`): whoever measures networks later measures stock beside them, and
    holds them against that.

    Raises:
        StageError: No network of the space keeps the limits, or latency is predicted too badly.
    """
    table = {name: value for name, value in ctx.settings.items() if name != "constraints"}
    ctx.share(TABLES, TABLE_VERSION, table, measure_table)
    _Limits(ctx).run()


def measure_table(ctx: StageContext) -> None:
    """Write `profile.json`, `latency_table.json`, `latency_model.json`, `stock.json` and `nms.json`.

    Raises:
        StageError: Latency is predicted too badly.
    """
    _Table(ctx).run()


STAGE = Stage(name="hw-probe", version=5, settings=settings, run=run)


def write_bundle(config: RunConfig, label: str, num_classes: int, path: Path, work: Path) -> None:
    """Pack the networks that a device elsewhere is to be measured with.

    Args:
        config: The run's configuration.
        label: The target's label.
        num_classes: Classes of the dataset.
        path: The tar to write.
        work: Folder for what is made on the way.

    Raises:
        InputError: The target is no device elsewhere, or cannot be measured through a bundle.
        StageError: Stock cannot be built.
    """
    from yolov8_nas.measure import bundle
    from yolov8_nas.measure.benchmark import PROBE

    target = find_target(config, label)
    runtime = bundle.runtime_there(target)
    settings = {
        **recipe(config, target),
        "num_classes": num_classes,
        "kind": runtime.kind,
        "device": {"threads": bundle.place(target).threads, "runtime": runtime.to_dict()},
    }
    host = HostLock()
    table = _Table(StageContext(settings, {}, work, work, Progress.from_environment("hw-probe", label), host))
    with host.computing():
        files = [*table.export().values(), table.bench.export_as_c2f()]
    failed = {architecture.digest: reason for architecture, reason in table.failed.items()}
    bundle.write_bundle(
        path,
        files,
        target=target,
        purpose=bundle.TABLE,
        protocol=PROBE,
        reference=table.bench.export(table.space.stock),
        recipe={**recipe(config, target), "num_classes": num_classes, "failed": failed},
    )


def import_results(config: RunConfig, label: str, results: Path, store: str) -> None:
    """Take in what was measured on a device elsewhere, and fit its latency model.

    Args:
        config: The run's configuration.
        label: The target's label.
        results: What the measuring program wrote.
        store: The stage store.

    Raises:
        InputError: The results are damaged, incomplete or not the target's.
        StageError: Too much failed there, or latency is predicted too badly.
    """
    from yolov8_nas.measure import bundle

    target = find_target(config, label)
    read = bundle.read_results(results, target)
    if read["bundle"]["purpose"] != bundle.TABLE:
        bundle.keep(read, target)
        return
    if differing := _differences(read, recipe(config, target)):
        raise InputError(
            f"{results}: measured with another {' and '.join(differing)} than the configuration has; pack a bundle "
            "with this configuration and measure that (yolov8-nas probe CONFIG --bundle FILE.tar)"
        )
    bundle.keep(read, target)
    table = {**settings(config, target), "num_classes": read["bundle"]["recipe"]["num_classes"]}
    del table["constraints"]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        progress = Progress.from_environment("hw-probe", label)
        ctx = StageContext(table, {}, folder, folder, progress, HostLock(), open_store(store))
        ctx.share(TABLES, TABLE_VERSION, table, measure_table)


@dataclass(frozen=True)
class Sample:
    """A network to measure.

    Attributes:
        architecture: The network.
        role: `stock`, `train` (a whole network), `swap` (stock with one part changed) or `holdout` (a whole network
            on which the latency model is only checked).
    """

    architecture: Architecture
    role: str


def sample(space: SearchSpace, networks: int, holdout: int, seed: int) -> list[Sample]:
    """The networks to measure, all different, stock first.

    To fit: stock, the largest and the smallest network, and of the rest a third with one part of stock changed, which
    tells what a part costs, and two thirds whole networks, which tell how costs add up. Every option occurs equally
    often in these. To check: `holdout` whole networks drawn independently.
    """
    rng = np.random.default_rng(seed)
    samples = {space.stock: "stock"}
    for extreme in (space.largest(), space.smallest()):
        samples.setdefault(extreme, "train")
    whole = _balanced(space, networks, rng)
    parts = sorted({d.name.split(".")[0] for d in space.dimensions if len(d.options) > 1})
    swaps = (networks - len(samples)) // 3
    for i in range(100 * swaps):
        if len(samples) >= networks or sum(role == "swap" for role in samples.values()) >= swaps:
            break
        samples.setdefault(_swap(space, parts[i % len(parts)], rng), "swap")
    for architecture in whole:
        if len(samples) < networks:
            samples.setdefault(architecture, "train")
    for size, role in ((networks, "train"), (networks + holdout, "holdout")):
        while len(samples) < size:
            samples.setdefault(space.sample(rng), role)
    return [Sample(architecture, role) for architecture, role in samples.items()]


def _balanced(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """Random networks among which the options of every dimension occur equally often."""
    genes = [rng.permutation(np.arange(count) % len(d.options)) for d in space.dimensions]
    return [space.decode([int(column[i]) for column in genes]) for i in range(count)]


def _swap(space: SearchSpace, part: str, rng: np.random.Generator) -> Architecture:
    """Stock with the options of one part drawn anew."""
    genes = [
        int(rng.integers(len(dimension.options))) if dimension.name.split(".")[0] == part else gene
        for gene, dimension in zip(space.encode(space.stock), space.dimensions, strict=True)
    ]
    return space.decode(genes)


class _Bench:
    """Exports networks with fresh weights and measures them on the device."""

    def __init__(self, ctx: StageContext) -> None:
        from yolov8_nas.measure.runtime import find

        self.ctx = ctx
        self.space = SearchSpace.from_dict(ctx.settings["space"])
        self.num_classes: int = ctx.settings["num_classes"]
        self.imgsz: int = ctx.settings["imgsz"]
        self.batch: int = ctx.settings["batch"]
        self.nms_free: bool = ctx.settings.get("nms_free", False)
        self.threads: int = ctx.settings["device"]["threads"]
        self.runtime = find(ctx.settings["device"]["runtime"]["name"], ctx.settings["kind"], ctx.settings["precision"])

    def export(self, architecture: Architecture) -> Path:
        """The network's file, written where it is missing."""
        from yolov8_nas.supernet.derive import build

        file = self.file(architecture.digest)
        if not file.exists():
            self.write(build(architecture, self.num_classes), file)
        return file

    def export_as_c2f(self) -> Path:
        """Stock in the form that Ultralytics exports it."""
        from ultralytics.nn.tasks import DetectionModel

        file = self.file("stock-as-c2f")
        if not file.exists():
            self.write(DetectionModel(f"yolov8{self.space.scale}.yaml", nc=self.num_classes, verbose=False), file)
        return file

    def file(self, name: str) -> Path:
        """Where the file of a network lies."""
        return self.ctx.partial / "networks" / f"{name}{self.runtime.suffix}"

    def write(self, model: DetectionModel, file: Path) -> None:
        """Write a network in the form and precision that is measured."""
        import torch

        from yolov8_nas.export.artifact import write_network

        images = [torch.rand(2, 3, self.imgsz, self.imgsz)]  # ranges have no influence on speed
        write_network(
            model.eval(),
            file,
            runtime=self.runtime,
            imgsz=self.imgsz,
            batch=self.batch,
            calibration=images,
            keep_float=self.ctx.settings.get("keep_float", ()),
            nms_free=self.nms_free,
        )

    def measure(self, files: Sequence[Path], checkpoint: str) -> list[Measurement | Failed]:
        """Measure files in the same rounds, with stock as the reference network."""
        from yolov8_nas.measure.benchmark import PROBE, measure_what_can_be

        count = len(files)

        def progress(done: float, total: float) -> None:
            self.ctx.progress.update(
                count * (1 + _TIMING * done / total), count * (1 + _TIMING), f"timing {count} networks"
            )

        return measure_what_can_be(
            files,
            threads=self.threads,
            runtime=self.runtime,
            batch=self.batch,
            protocol=PROBE,
            reference=self.export(self.space.stock),
            progress=progress,
            checkpoint=self.ctx.partial / checkpoint,
        )

    def row(self, sample: Sample, measurement: Measurement) -> dict[str, Any]:
        """A network as it stands in the table."""
        return {
            "architecture": sample.architecture.to_dict(),
            "genes": list(self.space.encode(sample.architecture)),
            "role": sample.role,
            **measurement.to_dict(),
        }


class _Table:
    """What is measured whatever the limits are."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx = ctx
        self.bench = _Bench(ctx)
        self.space = self.bench.space
        self.samples = sample(self.space, ctx.settings["networks"], ctx.settings["holdout"], ctx.settings["seed"])
        self.measured: dict[Architecture, Measurement] = {}
        self.failed: dict[Architecture, str] = {}

    def run(self) -> None:
        """Export, measure, fit, write, judge."""
        if "elsewhere" in self.ctx.settings:
            self.take_in_results(self.ctx.settings["elsewhere"])
            return
        from yolov8_nas.device.counters import why_not
        from yolov8_nas.measure.nms import time_nms
        from yolov8_nas.measure.target import Target

        runtime = self.bench.runtime
        # The name is the settings' own: on another machine with the same key it means the same.
        device = Target(self.ctx.settings["name"], runtime.kind, runtime.name, runtime.precision, self.bench.threads)
        profile, regime = device.profile, device.regime
        write_json(self.ctx.out / "profile.json", profile.to_dict())
        with self.ctx.host.computing():
            files = self.export()
        with self.ctx.host.measuring():
            before = regime()
            *found, c2f = self.bench.measure([*files.values(), self.bench.export_as_c2f()], "legs.jsonl")
            nms = time_nms(
                num_classes=self.bench.num_classes,
                imgsz=self.bench.imgsz,
                batch=self.bench.batch,
                nms_free=self.bench.nms_free,
            )
            after = regime()
        conditions = {
            "threads": self.bench.threads,
            "runtime": self.ctx.settings["device"]["runtime"],
            "counter": self.ctx.settings["counter"],
            "no_counter": why_not(profile.kind),
            "regime": {"before": before, "after": after},
        }
        write_json(self.ctx.out / "nms.json", nms)
        self.take_in(dict(zip(files, found, strict=True)), c2f, conditions)

    def take_in(
        self, found: Mapping[Architecture, Measurement | Failed], c2f: Measurement | Failed, conditions: Settings
    ) -> None:
        """Make the table and the model of what was measured.

        Args:
            found: By network.
            c2f: Of stock in Ultralytics' own form.
            conditions: How it was measured, for the record.

        Raises:
            StageError: Too much failed, or latency is predicted too badly.
        """
        from yolov8_nas.measure.benchmark import Failed, Measurement

        self.measured = {a: one for a, one in found.items() if isinstance(one, Measurement)}
        self.failed |= {a: one.reason for a, one in found.items() if isinstance(one, Failed)}
        self._judge_failures(c2f)
        assert isinstance(c2f, Measurement)
        write_json(self.ctx.out / "stock.json", self._stock(c2f))
        rows = [self.bench.row(s, self.measured[s.architecture]) for s in self.samples if self._was_measured(s)]
        failed = [
            {"architecture": s.architecture.to_dict(), "role": s.role, "reason": self.failed[s.architecture]}
            for s in self.samples
            if not self._was_measured(s)
        ]
        protocol = {**self.ctx.settings["protocol"], **conditions}
        write_json(self.ctx.out / "latency_table.json", {"protocol": protocol, "rows": rows, "failed": failed})
        # Written before it is judged: a probe that fails leaves the evidence.
        mape = self._write_model()
        if mape > self.ctx.settings["max_mape"]:
            raise StageError(self._poor_fit(mape))

    def take_in_results(self, results: Mapping[str, Any]) -> None:
        """Make the table and the model of what was measured elsewhere.

        Raises:
            InputError: It was measured for another number of classes.
            StageError: As `take_in`.
        """
        from yolov8_nas.measure.benchmark import Failed, Measurement

        packed = results["bundle"]["recipe"]
        if packed["num_classes"] != self.bench.num_classes:
            raise InputError(
                f"the device elsewhere was measured with networks of {packed['num_classes']} classes, and the dataset "
                f"has {self.bench.num_classes}; pack a bundle for this dataset (yolov8-nas probe CONFIG --bundle FILE)"
            )
        measured = {
            Path(name).stem: Failed(one["failed"]) if "failed" in one else Measurement.from_dict(one)
            for name, one in results["measured"].items()
        }
        self.failed = {s.architecture: packed["failed"].get(s.architecture.digest, "") for s in self.samples}
        self.failed = {architecture: reason for architecture, reason in self.failed.items() if reason}
        write_json(self.ctx.out / "profile.json", results["profile"])
        write_json(self.ctx.out / "nms.json", {"latency_ms": None, "reason": "not measured on a device elsewhere"})
        conditions = {
            "threads": self.bench.threads,
            "runtime": results["profile"]["runtime"],
            "counter": results["counter"],
            "no_counter": results["no_counter"],
            "regime": results["regime"],
            "bundle": results["bundle"]["digest"],
        }
        found = {
            s.architecture: measured[s.architecture.digest] for s in self.samples if s.architecture not in self.failed
        }
        self.take_in(found, measured["stock-as-c2f"], conditions)

    def export(self) -> dict[Architecture, Path]:
        """The networks as files, in the order of `samples`; those that cannot be built are noted and left out."""
        import torch

        torch.set_num_threads(1)  # tracing computes next to nothing, and threads would only wait for each other
        torch.manual_seed(self.ctx.settings["seed"])
        total = (1 + _TIMING) * (len(self.samples) + 1)
        files = {}
        for i, s in enumerate(self.samples, 1):
            try:
                files[s.architecture] = self.bench.export(s.architecture)
            except (InputError, StageError, MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
                if s.role == "stock":
                    raise StageError(f"stock YOLOv8 cannot be built: {error}") from None
                self.failed[s.architecture] = str(error)
            self.ctx.progress.update(i, total, f"exporting network {i} of {len(self.samples)}")
        return files

    def _was_measured(self, s: Sample) -> bool:
        return s.architecture in self.measured

    def _judge_failures(self, c2f: Measurement | Failed) -> None:
        """Say what failed.

        Raises:
            StageError: It is stock, or too much.
        """
        from yolov8_nas.measure.benchmark import Failed

        stock = self.failed.get(self.space.stock) or (c2f.reason if isinstance(c2f, Failed) else None)
        if stock:
            raise StageError(f"stock YOLOv8 cannot be measured: {stock}")
        if not self.failed:
            return
        told = (
            f"{len(self.failed)} of {len(self.samples)} networks could not be built or measured, the first because "
            f"{next(iter(self.failed.values()))}"
        )
        if len(self.failed) > FAILURES * len(self.samples):
            raise StageError(f"{told}; at most {FAILURES:.0%} may fail: free memory, or take a smaller space or batch")
        self.ctx.progress.note(f"{told}; left out")

    def _stock(self, c2f: Measurement) -> dict[str, Any]:
        from yolov8_nas.space.cost import cost

        paper = cost(self.space.stock, self.bench.num_classes, self.bench.imgsz)
        stock = self.measured[self.space.stock]
        return {
            "scale": self.space.scale,
            "architecture": self.space.stock.to_dict(),
            "latency_ms": asdict(stock.latency_ms),
            "memory_mb": stock.memory_mb,
            "energy_mj": stock.energy_mj,
            "power_w": stock.power_w,
            "params": paper.params,
            "gflops": paper.gflops,
            "as_ultralytics_exports_it": {"latency_ms": asdict(c2f.latency_ms), "memory_mb": c2f.memory_mb},
        }

    def _write_model(self) -> float:
        """Fit and write the latency model with its errors.

        Returns:
            Its mean absolute percentage error on the held-out networks, as a share.
        """
        latency = {a: m.latency_ms.p50 for a, m in self.measured.items()}
        model, errors, upper = self._fit(latency)
        counted = {a: m.energy_mj for a, m in self.measured.items() if m.energy_mj is not None}
        held_out = self._held_out
        content = {
            **model.to_dict(),
            **errors,
            "networks": len(model.architectures),
            "holdout": len(held_out),
            "coverage": float(np.mean([latency[a] for a in held_out] <= upper)),
            "scatter": self._scatter(),
            "energy": self._fit(counted)[1] if len(counted) == len(self.measured) else None,
        }
        write_json(self.ctx.out / "latency_model.json", content)
        return errors["mape"]

    def _fit(self, values: Mapping[Architecture, float]) -> tuple[LatencyModel, dict[str, float], Floats]:
        """A model of latencies (or energies), its errors on the held-out networks, and their upper bounds."""
        from yolov8_nas.measure.latency_model import LatencyModel, accuracy

        fitted = [s.architecture for s in self.samples if s.role != "holdout" and self._was_measured(s)]
        model = LatencyModel.fit(
            self.space,
            self.bench.num_classes,
            self.bench.imgsz,
            fitted,
            [values[architecture] for architecture in fitted],
            seed=self.ctx.settings["seed"],
        )
        predicted, upper = model.predict(self._held_out)
        return model, accuracy(predicted, np.array([values[a] for a in self._held_out])), upper

    @cached_property
    def _held_out(self) -> list[Architecture]:
        return [s.architecture for s in self.samples if s.role == "holdout" and self._was_measured(s)]

    def _scatter(self) -> float:
        """Half-width of the 95% interval of p50, as a share of it: the median over the networks."""
        halves = [(m.interval_ms[1] - m.interval_ms[0]) / 2 / m.latency_ms.p50 for m in self.measured.values()]
        return float(np.median(halves))

    def _poor_fit(self, mape: float) -> str:
        return (
            f"latency is predicted with a mean error of {mape:.1%} on {self.ctx.settings['holdout']} held-out networks,"
            f" more than probe.max_mape = {self.ctx.settings['max_mape']:.1%}; the measurements themselves scatter by "
            f"{self._scatter():.1%}. On a busy machine make it quiet and run again; otherwise raise probe.networks "
            f"(now {self.ctx.settings['networks']})"
        )


class _Limits:
    """The limits, held against the table's networks."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx = ctx
        self.bench = _Bench(ctx)
        self.table: dict[str, Any] = read_json(ctx.out / "latency_table.json")
        self.nms_ms: dict[str, float] | None = read_json(ctx.out / "nms.json")["latency_ms"]
        self.figures = {Architecture.from_dict(row["architecture"]): self._figures(row) for row in self.table["rows"]}
        asked = map(Constraint.parse, ctx.settings["constraints"])
        stock = self.figures[self.bench.space.stock]
        self.limits = [limit.resolve(stock.value(limit)) for limit in asked]

    def run(self) -> None:
        """Write the limits, and see that some network keeps each of them, and all of them together.

        Raises:
            StageError: None was found that does.
        """
        texts = self.ctx.settings["constraints"]
        rows = [{**limit.to_row(), "text": text} for limit, text in zip(self.limits, texts, strict=True)]
        write_json(self.ctx.out / "constraints.json", rows)
        alone = [limit for limit in self.limits if not self._kept([limit])]
        if alone:
            raise StageError(self._unreachable(alone))
        if not self._kept(self.limits):
            raise StageError(self._incompatible())

    def _figures(self, row: Mapping[str, Any]) -> Figures[float]:
        from yolov8_nas.measure.benchmark import Measurement
        from yolov8_nas.search.objective import figures, with_nms
        from yolov8_nas.space.cost import cost

        paper = cost(Architecture.from_dict(row["architecture"]), self.bench.num_classes, self.bench.imgsz)
        timed = with_nms(row["latency_ms"], self.nms_ms) if self.nms_ms else None
        return figures(Measurement.from_dict(row), paper, batch=self.bench.batch, with_nms_ms=timed)

    def _kept(self, limits: Sequence[Constraint]) -> bool:
        """Whether some measured network keeps the limits; one that comes closest by prediction is measured as well."""
        if self._closest(limits)[1] > 0 and "elsewhere" not in self.ctx.settings:
            self._measure_closest(limits)
        return self._closest(limits)[1] <= 0

    def _closest(self, limits: Sequence[Constraint]) -> tuple[Architecture, float]:
        """The measured network that misses the limits least, and its worst miss as a share of the limit."""
        missed = {a: max(limit.violation(f.value(limit)) for limit in limits) for a, f in self.figures.items()}
        closest = min(missed, key=lambda architecture: missed[architecture])
        return closest, missed[closest]

    def _measure_closest(self, limits: Sequence[Constraint]) -> None:
        """Measure the network that is predicted to come closest to the limits, unless it is measured already."""
        from yolov8_nas.measure.benchmark import Failed, level
        from yolov8_nas.measure.latency_model import LatencyModel
        from yolov8_nas.search.objective import CostModel

        costs = CostModel.from_probe(
            limits,
            LatencyModel.from_dict(read_json(self.ctx.out / "latency_model.json")),
            self.table["rows"],
            num_classes=self.bench.num_classes,
            imgsz=self.bench.imgsz,
            batch=self.bench.batch,
            nms_ms=self.nms_ms,
        )
        closest = closest_predicted(costs, self.bench.space, self._closest(limits)[0])
        if closest in self.figures:
            return
        self.ctx.progress.note(
            f"no measured network keeps {' and '.join(map(str, limits))}; measuring the one predicted to come closest"
        )
        with self.ctx.host.computing():
            file = self.bench.export(closest)
            with self.ctx.host.measuring():
                (measurement,) = self.bench.measure([file], f"{closest.digest}-legs.jsonl")
        if isinstance(measurement, Failed):
            self.ctx.progress.note(f"it could not be measured: {measurement.reason}")
            return
        row = self.bench.row(Sample(closest, "fastest"), measurement.at_level(level(self.table["rows"])))
        self.table["rows"].append(row)
        self.figures[closest] = self._figures(row)
        write_json(self.ctx.out / "latency_table.json", self.table)

    def _unreachable(self, missed: Sequence[Constraint]) -> str:
        told = []
        for limit in missed:
            best = self.figures[self._closest([limit])[0]].value(limit)
            told.append(f"{limit} cannot be kept: the best that is achievable is {best:.4g} {limit.unit}")
        return f"{'; '.join(told)} {self._where()}"

    def _incompatible(self) -> str:
        closest = self.figures[self._closest(self.limits)[0]]
        values = ", ".join(f"{limit.quantity} {closest.value(limit):.4g} {limit.unit}" for limit in self.limits)
        binding = max(self.limits, key=lambda limit: limit.violation(closest.value(limit)))
        return (
            f"{' and '.join(map(str, self.limits))} can each be kept, but not together: the network that comes closest "
            f"has {values}, so {binding} binds {self._where()}"
        )

    def _where(self) -> str:
        return (
            f"(measured on {self.ctx.settings['device']['id']} at {self.bench.imgsz} px, the best of "
            f"{len(self.figures)} networks of space {self.bench.space.name}); change the limit, the space or imgsz"
        )


def closest_predicted(costs: CostModel, space: SearchSpace, start: Architecture) -> Architecture:
    """The network of a space that misses the limits least by prediction, as far as coordinate descent finds it.

    Args:
        costs: Predicts costs and holds the limits.
        space: The space.
        start: The network to start from.
    """
    best, missed = start, float(costs([start]).worst[0])
    while True:
        neighbours = list(_neighbours(space, best))
        worst = costs(neighbours).worst
        if worst.min() >= missed:
            return best
        best, missed = neighbours[int(worst.argmin())], float(worst.min())


def _neighbours(space: SearchSpace, architecture: Architecture) -> Iterator[Architecture]:
    """The networks with one gene changed."""
    genes = list(space.encode(architecture))
    for i, dimension in enumerate(space.dimensions):
        for option in range(len(dimension.options)):
            if option != genes[i]:
                yield space.decode([*genes[:i], option, *genes[i + 1 :]])
