"""The hw-probe stage, on a made-up device unless a test is marked slow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device import counters
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import available_cores
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json, tree_digest
from yolov8_nas.measure import benchmark, nms
from yolov8_nas.measure.benchmark import Failed, Measurement, Percentiles
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.sampling import Sample, sample
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import Latency, LatencyFit, LatencyTable, NmsResult, ResolvedLimit
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search.nearest import closest_predicted
from yolov8_nas.search.objective import CostModel
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.hw_probe import STAGE, bench, limits
from yolov8_nas.stages.hw_probe.run import run
from yolov8_nas.stages.hw_probe.settings import ProbeSettings
from yolov8_nas.store.store import Store

SPACE = SearchSpace.load("tiny")
QUICK = Protocol(warmup=1, repetitions=4, min_rounds=3, max_rounds=4)
NMS_MS = {"p50": 0.5, "p90": 0.6, "p99": 0.9}


def config(**changes: Any) -> RunConfig:
    target = {"hardware": "cpu-1t", "constraints": changes.pop("constraints", ["latency<=80%stock"])}
    target |= {name: changes.pop(name) for name in ("runtime", "precision", "batch") if name in changes}
    probe = {"networks": 40, "holdout": 10} | changes.pop("probe", {})
    return RunConfig.parse({"space": "tiny", "imgsz": 64, **changes, "probe": probe, "targets": [target]}, "test")


def context(
    folder: Path, run_config: RunConfig, store: Store | None = None, **changes: Any
) -> StageContext[ProbeSettings]:
    for name in ("out", "partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = STAGE.whole(run_config, run_config.targets[0], {"num_classes": 3, **changes})
    return StageContext(
        settings, {}, folder / "out", folder / "partial", Progress.silent(), HostLock(folder / "host.lock"), store
    )


class Device:
    """Exports architectures as names and measures them by their cost; `noise` makes it unpredictable."""

    def __init__(self, noise: float = 0.0, counts_energy: bool = False) -> None:
        self.noise = noise
        self.counts_energy = counts_energy
        self.known: dict[str, Architecture] = {}
        self.exported: list[str] = []
        self.measured: list[str] = []

    def write(self, model: Any, file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("network")
        self.exported.append(file.stem)

    def measure(self, files: Sequence[Path], *, threads: int, reference: Path, **_: Any) -> list[Measurement]:
        assert reference.stem == SPACE.stock.digest and threads == 1
        assert all(file.exists() for file in files)
        self.measured += [file.stem for file in files]
        return [self.one(self.known.get(file.stem, SPACE.stock)) for file in files]

    def one(self, architecture: Architecture) -> Measurement:
        paper = cost(architecture, 3, 64)
        rng = np.random.default_rng(int(architecture.digest, 16))
        p50 = (paper.macs / 4e7 + len(paper.layers) * 0.01) * float(np.exp(rng.normal(0, self.noise)))
        memory, energy = paper.params * 8 / 2**20, paper.macs / 1e6 if self.counts_energy else None
        power = energy / p50 if energy else None
        latency = Percentiles(p50, 1.1 * p50, 1.3 * p50)
        return Measurement(latency, (p50, p50), (p50,), 12, False, energy, power, memory_mb=memory)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made_up = Device()

    def build(architecture: Architecture, num_classes: int) -> None:
        made_up.known[architecture.digest] = architecture

    monkeypatch.setattr("yolov8_nas.supernet.derive.build", build)
    monkeypatch.setattr("ultralytics.nn.tasks.DetectionModel", lambda *_, **__: None)
    monkeypatch.setattr(bench.Bench, "write", lambda _, model, file: made_up.write(model, file))
    monkeypatch.setattr(benchmark, "measure_what_can_be", made_up.measure)
    monkeypatch.setattr(nms, "time_nms", lambda **_: NmsResult(latency_ms=Latency(**NMS_MS)))
    monkeypatch.setattr(counters, "RAPL", Path("/there is no such folder"))
    return made_up


def test_the_sample_holds_what_tells_most() -> None:
    samples = sample(SPACE, 60, 12, seed=0)
    architectures = [s.architecture for s in samples]
    assert len(set(architectures)) == len(samples) == 72
    assert samples[0] == Sample(SPACE.stock, "stock")
    assert {SPACE.largest(), SPACE.smallest()} <= set(architectures[:60])
    assert Counter(s.role for s in samples) == {"stock": 1, "train": 40, "swap": 19, "holdout": 12}
    for s in samples:
        differing = {
            d.name.split(".")[0]
            for d, a, b in zip(SPACE.dimensions, SPACE.encode(s.architecture), SPACE.encode(SPACE.stock), strict=True)
            if a != b
        }
        assert s.role != "swap" or len(differing) == 1
    whole = np.array([SPACE.encode(s.architecture) for s in samples if s.role == "train"])
    for column, dimension in zip(whole.T, SPACE.dimensions, strict=True):
        counts = np.bincount(column, minlength=len(dimension.options))
        assert counts.min() >= 0.5 * len(whole) // len(dimension.options), dimension
    assert sample(SPACE, 60, 12, seed=0) == samples
    assert sample(SPACE, 60, 12, seed=1) != samples


def test_settings_tell_what_measurements_depend_on() -> None:
    plain = STAGE.settings(config(), config().targets[0])
    assert type(plain).model_validate(json.loads(json.dumps(plain.plain()))) == plain
    best = config(precision="best")
    assert STAGE.settings(best, best.targets[0]) == plain
    other = config(precision="int8")
    assert STAGE.settings(other, other.targets[0]).precision == "int8"
    named = plain.device
    assert named.id.startswith("cpu-") and named.threads == 1 and named.runtime.version


@pytest.mark.parametrize("stage", ["hw-probe", "search", "qat-finetune", "trt-export"])
def test_a_device_has_one_result_whatever_it_is_called(stage: str) -> None:
    names = ["cpu", "auto", f"cpu-{available_cores()}t"]
    targets = [TargetConfig(hardware=name, constraints=("latency<=4ms",)) for name in names]
    first, *others = [find_stage(stage).settings(config(), target) for target in targets]
    assert others == [first, first]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"constraints": ["energy<=4mJ"]}, r"'energy<=4mJ' on cpu-1t: energy cannot be measured here, because .* RAPL"),
        ({"constraints": ["latency<=4ms", "power<=90%stock"]}, "'power<=90%stock' .* or leave this limit out"),
        ({"precision": "fp16"}, "fp16"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_anything_is_built(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counters, "RAPL", tmp_path)
    refused = config(**changes)
    with pytest.raises(InputError, match=words):
        STAGE.settings(refused, refused.targets[0])


def test_a_space_with_too_few_networks_is_refused(tmp_path: Path) -> None:
    narrow = SPACE.to_dict()
    stock = dict(zip((d.name for d in SPACE.dimensions), SPACE.encode(SPACE.stock), strict=True))
    only = {d.name: [d.options[stock[d.name]]] for d in SPACE.dimensions}
    narrow["convs"] = {name: only[name] for name in narrow["convs"]}
    narrow["blocks"] = {
        name: {part: only[f"{name}.{part}"] for part in parts} for name, parts in narrow["blocks"].items()
    }
    narrow["detect"] = {part: only[f"detect.{part}"] for part in narrow["detect"]}
    (tmp_path / "narrow.yaml").write_text(json.dumps(narrow))
    refused = config(space=str(tmp_path / "narrow.yaml"))
    with pytest.raises(InputError, match=r"6 networks are too few to measure 40 .* lower probe\.networks"):
        STAGE.settings(refused, refused.targets[0])


def test_a_probe_writes_table_model_stock_and_absolute_limits(tmp_path: Path, device: Device) -> None:
    limits = ["latency<=80%stock", "latency_p99<=90%stock", "params<=2.5M", "memory<=100%stock", "throughput>=1fps"]
    ctx = context(tmp_path, config(constraints=limits))
    run(ctx)

    rows = read_json(ctx.out / "latency_table.json")["rows"]
    assert Counter(row["role"] for row in rows) == {"stock": 1, "train": 27, "swap": 12, "holdout": 10}
    stock = read_json(ctx.out / "stock.json")
    assert stock["latency_ms"] == rows[0]["latency_ms"]
    assert Architecture.from_dict(stock["architecture"]) == SPACE.stock
    assert stock["params"] == cost(SPACE.stock, 3, 64).params
    assert stock["as_ultralytics_exports_it"]["latency_ms"]["p50"] > 0
    resolved = {row["text"]: row for row in read_json(ctx.out / "constraints.json")}
    assert resolved["latency_p50<=80%stock"]["limit"] == pytest.approx(0.8 * stock["latency_ms"]["p50"])
    assert resolved["latency_p99<=90%stock"]["limit"] == pytest.approx(0.9 * stock["latency_ms"]["p99"])
    assert resolved["memory<=100%stock"]["unit"] == "MiB"
    assert resolved["params<=2.5M"]["limit"] == 2.5
    assert all(Constraint.parse(text) for text in resolved)

    fitted = read_json(ctx.out / "latency_model.json")
    assert fitted["networks"] == 40 and fitted["holdout"] == 10
    assert fitted["mape"] < 0.05 and fitted["spearman"] > 0.9
    held_out = [row for row in rows if row["role"] == "holdout"]
    predicted, _ = LatencyModel.of(LatencyFit.read(ctx.out)).predict(
        [Architecture.from_dict(r["architecture"]) for r in held_out]
    )
    measured = np.array([row["latency_ms"]["p50"] for row in held_out])
    assert np.mean(abs(predicted / measured - 1)) == pytest.approx(fitted["mape"])
    assert {tuple(g) for g in fitted["genes"]}.isdisjoint(tuple(row["genes"]) for row in held_out)

    profile = read_json(ctx.out / "profile.json")
    assert profile["threads"] == 1 and profile["kind"] == "cpu"


def test_a_network_that_fails_is_recorded_and_left_out(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    architectures = [s.architecture for s in sample(SPACE, 40, 10, 0)]
    unbuilt, too_large, stock = architectures[3], architectures[45], architectures[0]
    failing = {too_large}
    write, one = device.write, device.one

    def build(model: Any, file: Path) -> None:
        if file.stem == unbuilt.digest:
            raise RuntimeError("no kernel image is available")
        write(model, file)

    def measured(architecture: Architecture) -> Any:
        return Failed("CUDA out of memory") if architecture in failing else one(architecture)

    monkeypatch.setattr(device, "write", build)
    monkeypatch.setattr(device, "one", measured)
    ctx = context(tmp_path / "two", config())
    run(ctx)
    table = read_json(ctx.out / "latency_table.json")
    assert [(row["architecture"], row["reason"]) for row in table["failed"]] == [
        (unbuilt.to_dict(), "no kernel image is available"),
        (too_large.to_dict(), "CUDA out of memory"),
    ]
    assert len(table["rows"]) == 48
    fitted = read_json(ctx.out / "latency_model.json")
    assert (fitted["networks"], fitted["holdout"]) == (39, 9)

    failing |= set(architectures[10:14])
    with pytest.raises(
        StageError, match="6 of 50 networks could not be built or measured, the first because no kernel"
    ):
        run(context(tmp_path / "six", config()))
    failing.clear()
    failing.add(stock)
    with pytest.raises(StageError, match="stock YOLOv8 cannot be measured: CUDA out of memory"):
        run(context(tmp_path / "stock", config()))


def test_a_killed_probe_exports_only_what_is_missing(tmp_path: Path, device: Device) -> None:
    ctx = context(tmp_path, config())
    run(ctx)
    first = list(device.exported)
    assert len(first) == 51
    lost = ctx.partial / "networks" / f"{first[20]}.onnx"
    lost.unlink()
    device.exported.clear()
    run(ctx)
    assert device.exported == [first[20]]


def test_an_impossible_limit_names_the_fastest_measured_network(tmp_path: Path, device: Device) -> None:
    ctx = context(tmp_path, config(constraints=["latency<=0.01ms"]))
    with pytest.raises(
        StageError, match=r"latency_p50<=0\.01ms cannot be kept: the best that is achievable is"
    ) as error:
        run(ctx)
    rows = read_json(ctx.out / "latency_table.json")["rows"]
    fastest = min(row["latency_ms"]["p50"] for row in rows)
    assert f"achievable is {fastest:.4g} ms" in str(error.value)
    assert fastest <= device.one(SPACE.smallest()).latency_ms.p50
    assert any(row["role"] == "fastest" for row in rows)
    assert (ctx.out / "constraints.json").exists()


def test_a_limit_that_no_measured_network_keeps_is_tried_with_the_one_predicted_to_come_closest(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = min(sample(SPACE, 40, 10, 0), key=lambda s: device.one(s.architecture).latency_ms.p50)
    limit = 0.99 * device.one(hidden.architecture).latency_ms.p50
    monkeypatch.setattr(limits, "closest_predicted", lambda *_: SPACE.sample(np.random.default_rng(99)))
    monkeypatch.setattr(device, "one", _with_one_fast(device.one, limit / 2))
    ctx = context(tmp_path, config(constraints=[f"latency<={limit}ms"], probe={"max_mape": 1.0}))
    run(ctx)
    assert read_json(ctx.out / "latency_table.json")["rows"][-1]["role"] == "fastest"


def _with_one_fast(one: Any, milliseconds: float) -> Any:
    fast = SPACE.sample(np.random.default_rng(99))

    def measured(architecture: Architecture) -> Measurement:
        if architecture != fast:
            return one(architecture)
        latency = Percentiles(milliseconds, milliseconds, milliseconds)
        return Measurement(latency, (milliseconds, milliseconds), (milliseconds,), 12, False, memory_mb=1.0)

    return measured


def test_the_fastest_network_is_held_against_the_hour_of_the_table(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, one, level = SPACE.sample(np.random.default_rng(99)), device.one, [2.0, 2.2]

    def measured(architecture: Architecture) -> Measurement:
        now = level[architecture == fast]
        return replace(one(architecture), reference_ms=now, latency_ms=Percentiles(now, now, now))

    monkeypatch.setattr(device, "one", measured)
    monkeypatch.setattr(limits, "closest_predicted", lambda *_: fast)
    ctx = context(tmp_path, config(constraints=["latency<=1.9ms"], probe={"max_mape": 1.0}))
    with pytest.raises(StageError, match="the best that is achievable is 2 ms"):
        run(ctx)
    assert read_json(ctx.out / "latency_table.json")["rows"][-1]["reference_ms"] == 2.0


def test_the_closest_predicted_network_is_the_fastest_where_latency_is_limited() -> None:
    made_up = Device()
    fitted = [s.architecture for s in sample(SPACE, 40, 0, 0)]
    model = LatencyModel.fit(SPACE, 3, 64, fitted, [made_up.one(a).latency_ms.p50 for a in fitted])
    rows = [fabricated.probed(SPACE.stock, 1.0, latency_ms=fabricated.latency(1.0, 1.1, 1.3))]
    costs = CostModel.from_probe([Constraint.parse("latency<=0.001ms")], model, rows, num_classes=3, imgsz=64, batch=1)
    found = closest_predicted(costs, SPACE, SPACE.stock)
    rng = np.random.default_rng(0)
    others = [SPACE.sample(rng) for _ in range(3000)]
    assert model.predict([found])[0] <= model.predict(others)[0].min()


def test_each_limit_that_nothing_keeps_is_told_with_its_best(tmp_path: Path, device: Device) -> None:
    ctx = context(tmp_path, config(constraints=["latency<=0.01ms", "params<=1K", "memory<=1GiB"]))
    with pytest.raises(StageError) as error:
        run(ctx)
    fewest = cost(SPACE.smallest(), 3, 64).params / 1e6
    assert f"params<=0.001M cannot be kept: the best that is achievable is {fewest:.4g} M" in str(error.value)
    assert "latency_p50<=0.01ms cannot be kept" in str(error.value) and "memory<=" not in str(error.value)


def test_limits_that_exclude_each_other_are_told_with_the_one_that_binds(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = device.one

    def slower_with_less_memory(architecture: Architecture) -> Measurement:
        measured = one(architecture)
        return replace(measured, memory_mb=100 / measured.latency_ms.p50)

    monkeypatch.setattr(device, "one", slower_with_less_memory)
    every = sorted(slower_with_less_memory(s.architecture).latency_ms.p50 for s in sample(SPACE, 40, 10, 0))
    limits = [f"latency<={every[5]}ms", f"memory<={100 / every[-5]}MiB"]
    ctx = context(tmp_path, config(constraints=limits))
    words = r"can each be kept, but not together: the network that comes closest has latency_p50 .*, so (\S+)<=.* binds"
    with pytest.raises(StageError, match=words):
        run(ctx)
    assert len(read_json(ctx.out / "constraints.json")) == 2


def test_nms_is_added_to_the_networks_latency(tmp_path: Path, device: Device) -> None:
    limits = ["latency(with_nms)<=90%stock", "latency_p99(with_nms)<=100%stock", "throughput(with_nms)>=50%stock"]
    ctx = context(tmp_path, config(constraints=limits, batch=2))
    run(ctx)
    stock = read_json(ctx.out / "stock.json")["latency_ms"]
    resolved = [row["limit"] for row in read_json(ctx.out / "constraints.json")]
    expected = [0.9 * (stock["p50"] + 0.5), stock["p99"] + 0.9, 0.5 * 2000 / (stock["p50"] + 0.5)]
    assert resolved == pytest.approx(expected)
    assert read_json(ctx.out / "nms.json")["latency_ms"] == NMS_MS


def test_where_energy_is_counted_it_is_limited_and_predicted(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("1\n")
    monkeypatch.setattr(counters, "RAPL", zone.parent)
    device.counts_energy = True
    ctx = context(tmp_path, config(constraints=["energy<=60%stock", "power<=200%stock"]))
    assert ctx.settings.counter == "RAPL package-0"
    run(ctx)
    stock = read_json(ctx.out / "stock.json")
    energy, power = (row.constraint for row in ResolvedLimit.read_all(ctx.out))
    assert energy.limit == pytest.approx(0.6 * stock["energy_mj"])
    assert power.limit == pytest.approx(2 * stock["power_w"])
    fitted = read_json(ctx.out / "latency_model.json")
    assert fitted["energy"]["mape"] < 0.05
    costs = CostModel.from_probe(
        [energy, power],
        LatencyModel.of(LatencyFit.read(ctx.out)),
        LatencyTable.read(ctx.out).rows,
        num_classes=3,
        imgsz=64,
        batch=1,
    )
    estimate = costs([SPACE.smallest(), SPACE.largest()])
    exact = [device.one(a).energy_mj for a in (SPACE.smallest(), SPACE.largest())]
    assert estimate.values[:, 0] == pytest.approx(exact, rel=0.1)
    assert estimate.feasible.tolist() == [True, False]
    assert costs.measured(SPACE.stock, device.one(SPACE.stock)) == pytest.approx([energy.limit / 0.6, power.limit / 2])


def test_other_limits_on_the_same_device_measure_nothing(tmp_path: Path, device: Device) -> None:
    store = Store(tmp_path / "store")
    first = context(tmp_path / "first", config(), store)
    run(first)
    assert device.measured
    device.measured.clear()
    device.exported.clear()
    other = context(tmp_path / "other", config(constraints=["latency<=90%stock", "params<=2M"]), store)
    run(other)
    assert not device.measured and not device.exported
    assert len(read_json(other.out / "constraints.json")) == 2
    for ctx in (first, other):
        (ctx.out / "constraints.json").unlink()
    assert tree_digest(first.out) == tree_digest(other.out)


class Measuring(Exception):
    """A measurement was about to begin."""


def test_what_changes_the_measurements_has_a_table_of_its_own(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    run(context(tmp_path / "first", config(), store))
    others = [config(**changes) for changes in ({"imgsz": 96}, {"batch": 2}, {"precision": "int8"}, {"seed": 1})]
    contexts = [context(tmp_path / str(i), other, store) for i, other in enumerate(others)]
    newer = context(tmp_path / "newer", config(), store)
    device_99 = newer.settings.device.model_copy(
        update={"runtime": newer.settings.device.runtime.model_copy(update={"version": "99.0"})}
    )
    newer = replace(newer, settings=newer.settings.model_copy(update={"device": device_99}))
    monkeypatch.setattr(benchmark, "measure_what_can_be", raiser(Measuring))
    run(context(tmp_path / "same", config(), store))
    for ctx in (*contexts, newer):
        with pytest.raises(Measuring):
            run(ctx)


def raiser(error: type[Exception]) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_poor_table_is_not_shared(tmp_path: Path, device: Device) -> None:
    store = Store(tmp_path / "store")
    device.noise = 0.5
    noisy = context(tmp_path / "noisy", config(), store)
    with pytest.raises(StageError, match="mean error"):
        run(noisy)
    assert read_json(noisy.out / "latency_model.json")["mape"] > 0.1
    device.noise = 0.0
    quiet = context(tmp_path / "quiet", config(), store)
    run(quiet)
    assert read_json(quiet.out / "latency_model.json")["mape"] < 0.05


def test_a_poor_fit_fails_with_the_numbers(tmp_path: Path, device: Device) -> None:
    device.noise = 0.5
    ctx = context(tmp_path, config())
    with pytest.raises(StageError, match=r"mean error of \d+\.\d% on 10 held-out networks, more than .* = 10\.0%"):
        run(ctx)
    assert read_json(ctx.out / "latency_model.json")["mape"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("torch", "fp32")]
)
def test_real_networks_are_probed(tmp_path: Path, runtime: str, precision: str) -> None:
    limits = ["latency<=300%stock"]  # of seven networks timed on a busy machine, some may all be slow
    probed = config(runtime=runtime, precision=precision, probe={"max_mape": 10.0}, constraints=limits)
    ctx = context(tmp_path, probed, networks=4, holdout=2, protocol=QUICK)
    run(ctx)
    rows = read_json(ctx.out / "latency_table.json")["rows"]
    by_role = {row["role"]: row for row in rows}
    assert len([row for row in rows if row["role"] != "fastest"]) == 6  # that one too where a disturbance asks for it
    assert by_role["stock"]["memory_mb"] > 5
    assert read_json(ctx.out / "profile.json")["runtime"]["name"] == runtime
    suffix = ".pt" if runtime == "torch" else ".onnx"
    assert {file.suffix for file in (ctx.partial / "networks").iterdir()} == {suffix}
    measured = [Architecture.from_dict(row["architecture"]) for row in rows]
    assert SPACE.largest() in measured and SPACE.smallest() in measured
    assert all(0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"] for row in rows)
