"""hw-probe: what the target device is, how fast networks of the space run on it, and what relative limits mean there.

Latency depends on a network's shapes and not on its weights, so the networks have fresh weights: the stage needs
neither a dataset nor a supernet. (Fresh weights do shrink activations from layer to layer, to some 1e-17 in the deepest
networks; that is far from the denormal numbers below 1e-38 which would be slow.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.search.constraint import Constraint
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.stages.stage import Settings, Stage, StageContext
from yolov8_nas.store import write_json

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.hardware.benchmark import Measurement
    from yolov8_nas.hardware.latency_model import LatencyModel

_TIMING = 2.0
"""What timing a network counts in progress; exporting one counts 1."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the measurements depend on; the number of classes comes as a parameter.

    Raises:
        InputError: The target cannot be used here, a limit cannot be measured, or the space has too few networks.
    """
    from yolov8_nas.hardware.target import resolve

    assert target is not None
    device = resolve(target.hardware, target.runtime, target.precision)
    for limit in target.limits:
        if limit.scope != "engine":
            raise InputError(
                f"constraint {str(limit)!r}: latency with non-maximum suppression is not measured yet; "
                f"write {limit.metric} without (with_nms)"
            )
    space = SearchSpace.load(config.space)
    if space.size < 2 * (config.probe.networks + config.probe.holdout):
        raise InputError(
            f"space {space.name}: {space.size} networks are too few to measure {config.probe.networks} of them and "
            f"{config.probe.holdout} more to check the latency model; give it more options or lower probe.networks"
        )
    return {
        "device": device.profile.key,
        "name": device.name,
        "space": space.to_dict(),
        "imgsz": config.imgsz,
        "batch": target.batch,
        # `best` searches in FP32; what ships is decided by measuring both.
        "precision": "int8" if target.precision == "int8" else "fp32",
        "networks": config.probe.networks,
        "holdout": config.probe.holdout,
        "max_mape": config.probe.max_mape,
        "constraints": [str(limit) for limit in target.limits],
        "seed": config.seed,
    }


def run(ctx: StageContext) -> None:
    """Write `profile.json`, `latency_table.json`, `latency_model.json`, `stock.json` and `constraints.json`.

    Raises:
        StageError: No network of the space keeps a limit, or latency is predicted too badly.
    """
    _Probe(ctx).run()


STAGE = Stage(name="hw-probe", version=1, settings=settings, run=run)


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


class _Probe:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx = ctx
        self.space = SearchSpace.from_dict(ctx.settings["space"])
        self.num_classes: int = ctx.settings["num_classes"]
        self.imgsz: int = ctx.settings["imgsz"]
        self.threads: int = ctx.settings["device"]["threads"]
        self.samples = sample(self.space, ctx.settings["networks"], ctx.settings["holdout"], ctx.settings["seed"])
        self.c2f = ctx.partial / "networks" / "stock-as-c2f.onnx"
        self.measured: dict[Architecture, Measurement] = {}

    def run(self) -> None:
        """Export, measure, fit, write, judge."""
        from yolov8_nas.hardware.profile import cpu_profile

        # The name is the settings' own: on another machine with the same key it means the same.
        write_json(self.ctx.out / "profile.json", cpu_profile(self.ctx.settings["name"], self.threads).to_dict())
        with self.ctx.host.computing():
            files = self._export()
        with self.ctx.host.measuring():
            *measurements, c2f = self._measure(files, "legs.json")
            self.measured = {s.architecture: m for s, m in zip(self.samples, measurements, strict=True)}
            self._write_stock(c2f)
            model = self._fit()
            limits = self._resolve()
            # Written before they are judged: a probe that fails leaves the evidence.
            mape = self._write(model, limits)
            missed = self._missed(limits)
            if any(limit.metric in ("latency", "throughput") for limit in missed):
                self._measure_fastest(model)
                self._write(model, limits)
                missed = self._missed(limits)
        if missed:
            raise StageError(self._unreachable(missed))
        if mape > self.ctx.settings["max_mape"]:
            raise StageError(self._poor_fit(mape))

    def _export(self) -> list[Path]:
        """The networks as files, in the order of `samples`, and stock in Ultralytics' own form after them."""
        import torch

        torch.set_num_threads(1)  # tracing computes next to nothing, and threads would only wait for each other
        torch.manual_seed(self.ctx.settings["seed"])
        files = [self._file(s.architecture) for s in self.samples]
        total = (1 + _TIMING) * (len(files) + 1)
        for i, (s, file) in enumerate(zip(self.samples, files, strict=True)):
            self._export_one(s.architecture, file)
            self.ctx.progress.update(i + 1, total, f"exporting network {i + 1} of {len(files)}")
        if not self.c2f.exists():
            from ultralytics.nn.tasks import DetectionModel

            self._write_onnx(
                DetectionModel(f"yolov8{self.space.scale}.yaml", nc=self.num_classes, verbose=False), self.c2f
            )
        return [*files, self.c2f]

    def _file(self, architecture: Architecture) -> Path:
        return self.ctx.partial / "networks" / f"{architecture.digest}.onnx"

    def _export_one(self, architecture: Architecture, file: Path) -> None:
        from yolov8_nas.supernet.derive import build

        if not file.exists():
            self._write_onnx(build(architecture, self.num_classes), file)

    def _write_onnx(self, model: DetectionModel, file: Path) -> None:
        from yolov8_nas.deploy.onnx import export_int8_ptq, export_onnx

        shape = {"imgsz": self.imgsz, "batch": self.ctx.settings["batch"]}
        if self.ctx.settings["precision"] == "int8":
            import torch

            # Ranges have no influence on speed, so random images will do.
            export_int8_ptq(model.eval(), file, calibration=[torch.rand(2, 3, self.imgsz, self.imgsz)], **shape)
        else:
            export_onnx(model.eval(), file, **shape)

    def _measure(self, files: Sequence[Path], checkpoint: str) -> list[Measurement]:
        from yolov8_nas.hardware.benchmark import PROBE, measure

        count = len(self.samples) + 1

        def progress(done: float, total: float) -> None:
            self.ctx.progress.update(
                count * (1 + _TIMING * done / total), count * (1 + _TIMING), f"timing {len(files)} networks"
            )

        return measure(
            files,
            threads=self.threads,
            protocol=PROBE,
            reference=self._file(self.space.stock),
            progress=progress,
            checkpoint=self.ctx.partial / checkpoint,
        )

    def _fit(self) -> LatencyModel:
        from yolov8_nas.hardware.latency_model import LatencyModel

        fitted = [s.architecture for s in self.samples if s.role != "holdout"]
        latencies = [self.measured[architecture].latency_ms.p50 for architecture in fitted]
        return LatencyModel.fit(
            self.space, self.num_classes, self.imgsz, fitted, latencies, seed=self.ctx.settings["seed"]
        )

    def _resolve(self) -> list[Constraint]:
        stock = self._values(self.space.stock)
        limits = map(Constraint.parse, self.ctx.settings["constraints"])
        return [limit.resolve(stock[limit.quantity]) for limit in limits]

    def _values(self, architecture: Architecture) -> Mapping[str, float]:
        """What limits are about, of a measured network, in the limits' units."""
        from yolov8_nas.hardware.cost import cost

        measured, paper = self.measured[architecture], cost(architecture, self.num_classes, self.imgsz)
        return {
            **{f"latency_{statistic}": value for statistic, value in asdict(measured.latency_ms).items()},
            "throughput": 1000 * self.ctx.settings["batch"] / measured.latency_ms.p50,
            "memory": measured.memory_mb,
            "params": paper.params / 1e6,
            "flops": paper.gflops,
        }

    def _missed(self, limits: Sequence[Constraint]) -> list[Constraint]:
        """The limits that no measured network keeps."""
        values = [self._values(architecture) for architecture in self.measured]
        return [limit for limit in limits if not any(limit.met(v[limit.quantity]) for v in values)]

    def _measure_fastest(self, model: LatencyModel) -> None:
        """Measure the network that is predicted to be the fastest of the space, unless it is measured already."""
        fastest = fastest_predicted(model, list(self.measured))
        if fastest in self.measured:
            return
        self.ctx.progress.note("no measured network keeps the limit; measuring the one predicted to be the fastest")
        self._export_one(fastest, self._file(fastest))
        self.samples.append(Sample(fastest, "fastest"))
        (self.measured[fastest],) = self._measure([self._file(fastest)], "fastest-legs.json")

    def _write_stock(self, c2f: Measurement) -> None:
        from yolov8_nas.hardware.cost import cost

        paper = cost(self.space.stock, self.num_classes, self.imgsz)
        stock = self.measured[self.space.stock]
        content = {
            "scale": self.space.scale,
            "architecture": self.space.stock.to_dict(),
            "latency_ms": asdict(stock.latency_ms),
            "memory_mb": stock.memory_mb,
            "params": paper.params,
            "gflops": paper.gflops,
            "as_ultralytics_exports_it": {"latency_ms": asdict(c2f.latency_ms), "memory_mb": c2f.memory_mb},
        }
        write_json(self.ctx.out / "stock.json", content)

    def _write(self, model: LatencyModel, limits: Sequence[Constraint]) -> float:
        """Write table, model and limits.

        Returns:
            The model's mean absolute percentage error on the held-out networks, as a share.
        """
        from yolov8_nas.hardware.benchmark import PROBE
        from yolov8_nas.hardware.latency_model import accuracy

        rows = [
            {
                "architecture": s.architecture.to_dict(),
                "genes": list(self.space.encode(s.architecture)),
                "role": s.role,
                **self.measured[s.architecture].to_dict(),
            }
            for s in self.samples
        ]
        protocol = {**asdict(PROBE), "threads": self.threads, "runtime": self.ctx.settings["device"]["runtime"]}
        write_json(self.ctx.out / "latency_table.json", {"protocol": protocol, "rows": rows})

        held_out = [s.architecture for s in self.samples if s.role == "holdout"]
        measured = np.array([self.measured[architecture].latency_ms.p50 for architecture in held_out])
        predicted, upper = model.predict(held_out)
        errors = accuracy(predicted, measured)
        figures = {
            **errors,
            "networks": len(model.architectures),
            "holdout": len(held_out),
            "coverage": float(np.mean(measured <= upper)),
            "scatter": self._scatter(),
        }
        write_json(self.ctx.out / "latency_model.json", {**model.to_dict(), **figures})
        rows = [
            {
                "metric": limit.metric,
                "statistic": limit.statistic,
                "scope": limit.scope,
                "limit": limit.limit,
                "unit": limit.unit,
                "text": text,
            }
            for limit, text in zip(limits, self.ctx.settings["constraints"], strict=True)
        ]
        write_json(self.ctx.out / "constraints.json", rows)
        return errors["mape"]

    def _scatter(self) -> float:
        """Half-width of the 95% interval of p50, as a share of it: the median over the networks."""
        halves = [(m.interval_ms[1] - m.interval_ms[0]) / 2 / m.latency_ms.p50 for m in self.measured.values()]
        return float(np.median(halves))

    def _unreachable(self, missed: Sequence[Constraint]) -> str:
        told = []
        for limit in missed:
            best = min(
                (self._values(architecture)[limit.quantity] for architecture in self.measured), key=limit.violation
            )
            told.append(f"{limit} cannot be kept: the best that is achievable is {best:.4g} {limit.unit}")
        return (
            f"{'; '.join(told)} (measured on {self.ctx.settings['device']['id']} at {self.imgsz} px, the best of "
            f"{len(self.measured)} networks of space {self.space.name}); change the limit, the space or imgsz"
        )

    def _poor_fit(self, mape: float) -> str:
        return (
            f"latency is predicted with a mean error of {mape:.1%} on {self.ctx.settings['holdout']} held-out networks,"
            f" more than probe.max_mape = {self.ctx.settings['max_mape']:.1%}; the measurements themselves scatter by "
            f"{self._scatter():.1%}. On a busy machine make it quiet and run again; otherwise raise probe.networks "
            f"(now {self.ctx.settings['networks']})"
        )


def fastest_predicted(model: LatencyModel, starts: Sequence[Architecture]) -> Architecture:
    """The network of the space with the lowest predicted latency that coordinate descent finds.

    Args:
        model: Predicts latencies.
        starts: Architectures of which the fastest is where it starts.
    """
    space = model.space
    best = starts[int(np.argmin(model.predict(starts)[0]))]
    while True:
        genes = list(space.encode(best))
        neighbours = [
            space.decode([*genes[:i], option, *genes[i + 1 :]])
            for i, dimension in enumerate(space.dimensions)
            for option in range(len(dimension.options))
        ]  # the network itself is among them
        found = neighbours[int(np.argmin(model.predict(neighbours)[0]))]
        if model.predict([found])[0] >= model.predict([best])[0]:
            return best
        best = found
