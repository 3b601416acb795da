"""Targets, the machine's profile, cost on paper, and the measuring protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call, create_autospec

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from yolov8_nas.device import counters, gpu, profile
from yolov8_nas.device.counters import NoCounterError, NvmlEnergy, NvmlPower, Rapl, open_counter, why_not
from yolov8_nas.errors import InputError
from yolov8_nas.measure import benchmark, nms
from yolov8_nas.measure.benchmark import Measurement, Visit, energy_of_runs, level, measure, median_interval, timed_runs
from yolov8_nas.measure.memory import peak_memory
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.target import resolve
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.topology import model_yaml

QUICK = Protocol(warmup=1, repetitions=3, min_rounds=3, max_rounds=4, precision=0.5, leg=2)


def write_network(path: Path, channels: int, shape: tuple[int | str, ...] = (1, 3, 32, 32)) -> Path:
    """One convolution, 3 channels in, `channels` out."""
    weight = numpy_helper.from_array(np.ones((channels, 3, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "w"], ["y"], pads=[1] * 4)],
        "one convolution",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def architectures() -> Iterator[tuple[str, int, Architecture]]:
    """Networks of two spaces, with few classes and with many, without attention and with it."""
    for name in ("tiny", "yolov8n"):
        space = SearchSpace.load(name)
        rng = np.random.default_rng(3)
        yield name, 80, space.stock
        yield name, 3, space.smallest()
        for attention in (0, 2):
            yield name, int(rng.choice([1, 20, 200])), replace(space.sample(rng), attention=attention)


# Targets -------------------------------------------------------------------------------------------------------------


def test_names_of_the_cpu_lead_to_the_same_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "available_cores", lambda: 2)
    assert resolve("auto") == resolve("cpu") == resolve("CPU-2t")
    assert resolve("cpu-1t").threads == 1
    assert resolve("cpu-1t", precision="int8").id.endswith("-1t")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cpu-8t",), ["8 threads", "may use 2 cores", "cpu-2t"]),
        (("cpu-0t",), ["0 threads"]),
        (("NVIDIA_T4",), ["'NVIDIA_T4': this machine has none", "use auto, cpu"]),
        (("NVIDIA_T5",), ["'NVIDIA_T5' is unknown", "t4", "use auto, cpu"]),
        (("cpu-2",), ["unknown", "cpu-2t"]),
        (("cpu", "tensorrt"), ["tensorrt", "GPUs only", "onnxruntime"]),
        (("cpu", "torch", "best"), ["torch", "use fp32"]),
        (("cpu", "no-such"), ["'no-such'", "onnxruntime", "torch"]),
        (("cpu", "onnxruntime", "fp16"), ["fp16", "int8 or best"]),
    ],
)
def test_unusable_targets_are_told_with_the_remedy(
    arguments: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "available_cores", lambda: 2)
    monkeypatch.setattr(gpu, "gpu_names", list)
    with pytest.raises(InputError) as error:
        resolve(*arguments)
    assert [word for word in words if word not in str(error.value)] == []


# Profile -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("AMD EPYC 9354 32-Core Processor", "amd-epyc-9354"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "intel-xeon-platinum-8375c-2-90ghz"),
        ("13th Gen Intel(R) Core(TM) i7-1370P", "13th-gen-intel-core-i7-1370p"),
        ("???", "unknown"),
    ],
)
def test_hardware_ids_are_slugs(model: str, slug: str) -> None:
    assert profile.slug(model) == slug


def test_the_profile_survives_json_and_knows_what_latency_depends_on() -> None:
    here = profile.cpu_profile("cpu-1t", 1)
    plain = json.loads(json.dumps(here.to_dict()))
    assert plain["id"].startswith("cpu-") and plain["id"].endswith("-1t")
    assert plain["cores"] >= 1 and plain["memory_gb"] > 0.1
    assert plain["runtime"]["name"] == "onnxruntime"
    assert {"id", "instructions", "runtime", "threads"} <= set(here.key)
    assert "memory_gb" not in here.key


def test_a_containers_quota_counts_as_cores(tmp_path: Path) -> None:
    assert profile._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert profile._cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert profile._cgroup_quota(tmp_path) is None


def test_computing_leaves_cores_to_others_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "available_cores", lambda: 4)
    for told, threads in (("", 4), ("3", 3), ("64", 4)):
        monkeypatch.setenv(profile.THREADS_VARIABLE, told)
        assert profile.computing_threads() == threads
    monkeypatch.delenv(profile.THREADS_VARIABLE)
    assert profile.computing_threads() == 4
    for told in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(profile.THREADS_VARIABLE, told)
        with pytest.raises(InputError, match=f"YOLOV8_NAS_THREADS = '{told}': give a number of threads"):
            profile.computing_threads()


def test_the_regime_is_what_the_machine_tells(tmp_path: Path) -> None:
    nothing = profile.regime(tmp_path, tmp_path / "cpuinfo")
    assert nothing == {"governor": None, "boost": None, "mhz": None, "throttled": None}
    for core in sorted(os.sched_getaffinity(0)):
        for name, text in (("cpufreq/scaling_governor", "performance"), ("thermal_throttle/core_throttle_count", "2")):
            (tmp_path / f"cpu{core}" / name).parent.mkdir(parents=True)
            (tmp_path / f"cpu{core}" / name).write_text(f"{text}\n")
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "boost").write_text("0\n")
    (tmp_path / "cpuinfo").write_text("cpu MHz\t: 2400.0\nx : y\ncpu MHz\t: 2600.0\n")
    told = profile.regime(tmp_path, tmp_path / "cpuinfo")
    throttled = 2 * len(os.sched_getaffinity(0))
    assert told == {"governor": "performance", "boost": False, "mhz": 2500, "throttled": throttled}


# Cost ----------------------------------------------------------------------------------------------------------------


def test_cost_agrees_exactly_with_the_model_that_ultralytics_builds() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from ultralytics.nn.tasks import DetectionModel

    torch.set_num_threads(1)
    for name, num_classes, architecture in architectures():
        model = DetectionModel(model_yaml(architecture, num_classes), verbose=False).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        others = 4 * architecture.head.reg_max * (8**2 + 4**2 + 2**2)  # sums over bins
        if architecture.head.classes == "dwsep3":  # a row on P5 that nobody reads
            switch = model.model[-2]
            others += (switch.cv1.conv.weight.numel() + switch.cv2.conv.weight.numel()) * 2**2
        found = cost(architecture, num_classes, 64)
        assert found.params == sum(p.numel() for p in model.parameters()), (name, architecture)
        assert found.macs == counter.get_total_flops() // 2 - others, (name, architecture)


def test_stock_yolov8n_costs_what_is_quoted_for_it() -> None:
    stock = cost(SearchSpace.load("yolov8n").stock, 80, 640)
    assert stock.params == 3_157_200
    assert stock.gflops == pytest.approx(8.7, abs=0.05)


# Measuring -----------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_median_covers_it() -> None:
    rng = np.random.default_rng(0)
    covered = np.mean(
        [low <= 1 <= high for low, high in (median_interval(rng.lognormal(0, 1, 9)) for _ in range(4000))]
    )
    assert 0.95 <= covered <= 0.975
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


class FakeMachine:
    """Visits with known latencies; in those of `disturbed` networks are slower by `load`, the reference by `seen`."""

    def __init__(
        self, milliseconds: dict[str, float], disturbed: Container[int] = (), load: float = 2.0, seen: float = 2.0
    ) -> None:
        self.milliseconds = milliseconds
        self.disturbed = disturbed
        self.load = load
        self.seen = seen
        self.visits: list[str] = []

    def __call__(self, file: Path, threads: int, protocol: Protocol, *_: object) -> Visit:
        rng = np.random.default_rng(len(self.visits))
        load, seen = (self.load, self.seen) if len(self.visits) in self.disturbed else (1.0, 1.0)
        self.visits.append(file.name)
        latency = self.milliseconds[file.name] * load
        latencies = (latency * (1 + 0.01 * rng.random(protocol.repetitions))).tolist()
        return Visit(latencies, 3.0 * seen, 10 * latency, 10.0)

    def measure(self, protocol: Protocol) -> list[Measurement]:
        return measure([Path(name) for name in self.milliseconds], threads=1, protocol=protocol)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeMachine]:
    """Makes the machine that is measured."""

    def make(*args: Any, **kwargs: Any) -> FakeMachine:
        made = FakeMachine(*args, **kwargs)
        monkeypatch.setattr(benchmark, "_visit", made)
        return made

    monkeypatch.setattr(benchmark, "peak_memory", lambda files, *_: [1.0] * len(files))
    monkeypatch.setattr(benchmark, "_open", lambda *_: SimpleNamespace(run=None))
    return make


def test_a_disturbed_visit_is_repeated_and_does_not_count(machine: Callable[..., FakeMachine]) -> None:
    truth = {f"{i}.onnx": 1.0 + i for i in range(6)}
    disturbed = machine(truth, disturbed=range(9, 22))
    for name, measurement in zip(truth, disturbed.measure(Protocol(min_rounds=6, leg=3)), strict=True):
        assert measurement.latency_ms.p50 == pytest.approx(truth[name], rel=0.011)
        assert measurement.latency_ms.p99 < 1.02 * truth[name]
        assert measurement.energy_mj == pytest.approx(10 * truth[name])
        assert len(measurement.rounds) >= 6 and not measurement.disturbed
    assert len(disturbed.visits) >= 6 * 6 + 13


def test_what_slows_the_reference_too_is_corrected_and_nothing_else(machine: Callable[..., FakeMachine]) -> None:
    truth, protocol = {f"{i}.onnx": 1.0 + i for i in range(6)}, Protocol(min_rounds=9, max_rounds=9)
    moments = set(np.random.default_rng(0).permutation(54)[:20].tolist())

    def spread(*found: Measurement) -> float:
        return max(float(np.ptp(one.rounds) / one.latency_ms.p50) for one in found)

    both = machine(truth, moments, load=1.15, seen=1.15).measure(protocol)
    assert spread(*both) < 0.012
    assert both[0].latency_ms.p99 > 1.14 * both[0].latency_ms.p50  # as it was timed
    alone = machine(truth, moments, load=1.0, seen=1.15).measure(protocol)
    assert spread(*alone) < 0.012
    assert alone[5].latency_ms.p50 == pytest.approx(truth["5.onnx"], rel=0.011)
    unseen = machine(truth, moments, load=1.15, seen=1.0).measure(protocol)
    assert spread(*unseen) > 0.14


def test_measurements_of_another_hour_are_brought_to_one_level(machine: Callable[..., FakeMachine]) -> None:
    truth = {f"{i}.onnx": 1.0 + i for i in range(6)}
    slower = machine(truth, range(1000), load=1.05, seen=1.05).measure(QUICK)
    for ms, found in zip(truth.values(), slower, strict=True):
        levelled = found.at_level(3.0)
        assert found.reference_ms == 3.15 and levelled.reference_ms == 3.0
        assert found.latency_ms.p50 / levelled.latency_ms.p50 == pytest.approx(1.05, rel=1e-3)
        assert levelled.latency_ms.p50 == pytest.approx(ms, rel=0.011)
        assert levelled.interval_ms[0] <= levelled.latency_ms.p50 <= levelled.interval_ms[1]
        assert levelled.memory_mb == found.memory_mb
    assert level(slower) == 3.15
    assert level([replace(slower[0], reference_ms=None), slower[0]]) is None
    assert slower[0].at_level(None) is slower[0]


def test_a_network_takes_turns_with_the_reference() -> None:
    turns: list[str] = []

    def network() -> None:
        turns.append("n")

    def reference() -> None:
        turns.append("r")
        time.sleep(0.001)

    visit = timed_runs(network, Protocol(warmup=2, repetitions=5, turn=3), reference)
    assert "".join(turns) == "nn" + "rrrr" + "nnnn" + "rrrr" + "nnn" + "rrrr"
    assert len(visit.latencies) == 5
    assert max(visit.latencies) < 1.0 <= visit.reference


def test_rounds_end_when_the_interval_is_narrow_and_are_bounded_when_it_is_not(
    machine: Callable[..., FakeMachine],
) -> None:
    truth = {"a": 1.0, "b": 2.0}
    calm = machine(truth)
    calm.measure(Protocol(min_rounds=6, max_rounds=20, precision=0.02))
    assert calm.visits.count("b") == 6
    wild = machine(truth, disturbed=range(0, 10_000, 3), load=1.09, seen=1.0)
    (_, b) = wild.measure(Protocol(min_rounds=6, max_rounds=9, precision=0.0001))
    assert wild.visits.count("b") == 9
    assert b.interval_ms[0] < b.latency_ms.p50 < b.interval_ms[1]


def test_a_killed_measurement_goes_on_from_its_last_leg(
    machine: Callable[..., FakeMachine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truth = {f"{i}.onnx": 1.0 + i for i in range(5)}
    files = [Path(name) for name in truth]
    whole = machine(truth)
    whole.measure(QUICK)

    class Killed(FakeMachine):
        def __call__(self, file: Path, threads: int, protocol: Protocol, *_: object) -> Visit:
            if len(self.visits) == 10:
                raise KeyboardInterrupt
            return super().__call__(file, threads, protocol)

    monkeypatch.setattr(benchmark, "_visit", Killed(truth))
    with pytest.raises(KeyboardInterrupt):
        measure(files, threads=1, protocol=QUICK, checkpoint=tmp_path / "legs.jsonl")
    second = machine(truth)
    done: list[float] = []
    measured = measure(
        files,
        threads=1,
        protocol=QUICK,
        checkpoint=tmp_path / "legs.jsonl",
        progress=lambda share, total: done.append(share / total),
    )
    assert len(second.visits) < len(whole.visits)
    assert all(len(m.rounds) >= QUICK.min_rounds for m in measured)
    assert done == sorted(done) and done[-1] == 1.0
    assert [Measurement.from_dict(json.loads(json.dumps(m.to_dict()))) for m in measured] == measured


def test_real_networks_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "RAPL", tmp_path / "none")
    files = [write_network(tmp_path / f"{channels}.onnx", channels, (1, 3, 128, 128)) for channels in (8, 512)]
    small, large = measure(files, threads=1, protocol=QUICK)
    assert small.latency_ms.p50 * 4 < large.latency_ms.p50
    for m in (small, large):
        assert 0 < m.latency_ms.p50 <= m.latency_ms.p90 <= m.latency_ms.p99
        assert m.interval_ms[0] <= m.latency_ms.p50 <= m.interval_ms[1]
        assert m.repetitions == len(m.rounds) * QUICK.repetitions
        assert m.energy_mj is None and m.power_w is None
        assert json.loads(json.dumps(m.to_dict()))["latency_ms"]["p50"] == m.latency_ms.p50
    # 512 channels of 128 x 128 FP32 pixels are 32 MiB
    assert 32 + small.memory_mb < large.memory_mb < 160
    assert 0 < small.memory_mb < 32


def test_memory_is_measured_without_torch() -> None:
    code = "import sys, yolov8_nas.measure.memory; print([m for m in ('torch', 'ultralytics') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    dynamic = write_network(tmp_path / "dynamic.onnx", 4, ("batch", 3, 32, 32))
    (told,) = peak_memory([broken], 1)
    assert isinstance(told, str) and "broken.onnx" in told
    with pytest.raises(InputError, match=r"broken\.onnx: ONNX Runtime .* cannot open it"):
        measure([broken], threads=1, protocol=QUICK)
    with pytest.raises(InputError, match="static shape"):
        measure([dynamic], threads=1, protocol=QUICK)


# Energy --------------------------------------------------------------------------------------------------------------


def write_zone(root: Path, zone: str, name: str, microjoules: int) -> Path:
    """A RAPL zone as Linux shows it, with a small range."""
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    return folder / "energy_uj"


def test_rapl_sums_packages_and_memory_and_goes_on_after_it_began_again(tmp_path: Path) -> None:
    package = write_zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    core = write_zone(tmp_path, "intel-rapl:0:0", "core", 0)
    memory = write_zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    platform = write_zone(tmp_path, "intel-rapl:1", "psys", 0)
    write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    counter = Rapl.open(tmp_path)
    assert counter.name == "RAPL package-0, dram"
    counter.start()
    package.write_text("500000\n")
    memory.write_text("250100\n")
    core.write_text("700000\n")
    platform.write_text("800000\n")
    assert counter.stop() == pytest.approx(1.5 + 0.25)
    counter.start()
    assert counter.stop() == 0


def test_why_a_cpu_counts_no_energy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "RAPL", tmp_path)
    assert "no RAPL zone" in (why_not("cpu") or "")
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    assert why_not("cpu") is None

    def denied(path: Path, *_: object) -> str:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    original = Path.read_text
    monkeypatch.setattr(Path, "read_text", denied)
    assert "energy_uj: cannot be read (Permission denied); Linux lets only root read it" in (why_not("cpu") or "")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """NVML's functions with their true signatures, and nothing behind them."""
    import pynvml

    module = create_autospec(pynvml)
    module.NVMLError = pynvml.NVMLError
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_gpus_energy_is_asked_for_in_the_order_that_nvml_wants(nvml: Mock) -> None:
    nvml.nvmlDeviceGetTotalEnergyConsumption.side_effect = [5_000, 5_000, 6_000, 8_500]
    counter = open_counter("gpu", index=1)
    assert isinstance(counter, NvmlEnergy)
    asked = [one for one in nvml.mock_calls if one[0].startswith("nvml")]
    assert asked[:3] == [
        call.nvmlInit(),
        call.nvmlDeviceGetHandleByIndex(1),
        call.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex.return_value),
    ]
    counter.start()
    assert counter.stop() == 2.5


def test_energy_is_that_of_the_gpu_that_cuda_uses(nvml: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.nvmlDeviceGetTotalEnergyConsumption.return_value = 1
    monkeypatch.setattr(counters, "cuda_uuid", lambda: "00000000-0000-0000-0000-000000000001")
    open_counter("gpu")
    nvml.nvmlDeviceGetHandleByUUID.assert_called_once_with("GPU-00000000-0000-0000-0000-000000000001")
    nvml.nvmlDeviceGetHandleByIndex.assert_not_called()
    nvml.nvmlDeviceGetHandleByUUID.side_effect = nvml.NVMLError(6)
    with pytest.raises(NoCounterError, match="nothing of the GPU that CUDA numbers 0"):
        open_counter("gpu")


def test_a_gpu_without_the_counter_has_its_power_sampled(nvml: Mock) -> None:
    nvml.nvmlDeviceGetTotalEnergyConsumption.side_effect = nvml.NVMLError(3)
    nvml.nvmlDeviceGetPowerUsage.return_value = 70_000
    counter = open_counter("gpu")
    assert isinstance(counter, NvmlPower)
    counter.start()
    begin = time.perf_counter()
    time.sleep(0.1)
    joules = counter.stop()
    assert 7.0 <= joules <= 70 * (time.perf_counter() - begin + 0.05)
    nvml.nvmlDeviceGetPowerUsage.side_effect = nvml.NVMLError(3)
    with pytest.raises(NoCounterError, match="neither energy nor power"):
        open_counter("gpu")


def test_without_a_driver_nvml_is_no_counter(nvml: Mock) -> None:
    nvml.nvmlInit.side_effect = nvml.NVMLError(12)
    assert "install NVIDIA's driver" in (why_not("gpu") or "")


class Meter:
    """Counts one joule a run."""

    name = "meter"

    def __init__(self, shortest_s: float) -> None:
        self.shortest_s = shortest_s
        self.runs = 0
        self.before = 0

    def run(self) -> None:
        time.sleep(0.001)
        self.runs += 1

    def start(self) -> None:
        self.before = self.runs

    def stop(self) -> float:
        return float(self.runs - self.before)


def test_energy_is_that_of_the_counted_runs_and_an_image() -> None:
    meter = Meter(shortest_s=0.0)
    energy, power = energy_of_runs(meter.run, meter, 10, images=4)
    assert meter.runs == 10
    assert energy == 250.0
    assert 0 < power <= 10 / (10 * 0.001)  # each run takes a millisecond at least


def test_energy_is_counted_for_as_long_as_the_counter_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, now = Meter(shortest_s=0.05), 0

    def run() -> None:
        nonlocal now
        now += 10_000_000
        meter.runs += 1

    monkeypatch.setattr(benchmark.time, "perf_counter_ns", lambda: now)
    assert energy_of_runs(run, meter, 3, images=1) == (1000.0, 100.0)
    assert meter.runs == 5


# Non-maximum suppression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("imgsz", "objects"), [(64, 8), (320, 20)])
def test_a_made_up_output_holds_what_it_says(imgsz: int, objects: int) -> None:
    load = nms.Load(20, 10)
    output = nms.made_up_output(load, num_classes=3, imgsz=imgsz, batch=2)
    assert output.shape == (2, 7, sum((imgsz // stride) ** 2 for stride in (8, 16, 32)))
    above = (output[:, 4:].max(axis=1) > nms.CONFIDENCE).sum(axis=1)
    assert above.tolist() == [10 * objects] * 2
    for found in nms.suppress(output):
        assert objects * 0.8 <= len(found) <= objects * 1.2
    assert (nms.made_up_output(load, num_classes=3, imgsz=imgsz, batch=2) == output).all()


def test_nms_is_timed_on_each_load_of_the_networks_exact_shape() -> None:
    found = nms.time_nms(num_classes=3, imgsz=64, batch=2, protocol=QUICK)
    told = found.timed
    assert told is not None
    assert told.shape == (2, 7, 84)
    assert list(told.loads) == ["few", "typical", "crowded"]
    assert found.latency_ms == told.loads[told.load].latency_ms
    for load in told.loads.values():
        assert load.boxes > load.detections > 0
        assert 0 < load.latency_ms.p50 <= load.latency_ms.p99
        assert load.repetitions == len(load.rounds) * QUICK.repetitions
    assert (told.confidence, told.iou, told.max_detections) == (0.25, 0.7, 300)


def test_frames_are_what_predict_gives_to_a_network(tmp_path: Path) -> None:
    import cv2

    for i, (height, width) in enumerate([(20, 40), (64, 64), (40, 20)]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((height, width, 3), (0, 0, 255), np.uint8))
    batches = nms.frames(sorted(tmp_path.iterdir()), imgsz=64, batch=2)
    assert [batch.shape for batch in batches] == [(2, 3, 64, 64)] * 2
    assert batches[0].dtype == np.float32
    assert batches[0][0, :, 32, 32].tolist() == [1.0, 0.0, 0.0]
    assert batches[0][0, :, 0, 0] == pytest.approx([114 / 255] * 3)
    assert (batches[1][1] == batches[0][0]).all()  # fills the last batch
    assert len(nms.frames(sorted(tmp_path.iterdir()), imgsz=64, batch=1, count=2)) == 2


def test_networks_are_timed_with_nms_on_images_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Slice", ["images", "starts", "ends", "axes"], ["corner"]),
            helper.make_node("Reshape", ["corner", "shape"], ["output0"]),
        ],
        "six values for each of 84 anchors, straight from the image",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 64, 64))],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, (1, 6, 84))],
        [
            numpy_helper.from_array(np.array(values, np.int64), name)
            for name, values in {
                "starts": [0, 0, 0], "ends": [3, 12, 14], "axes": [1, 2, 3], "shape": [1, 6, 84],
            }.items()
        ],
    )  # fmt: skip
    file = tmp_path / "network.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    dark, bright = (np.full((1, 3, 64, 64), value, np.float32) for value in (0.0, 1.0))
    seen: list[float] = []
    suppress = nms.suppress
    monkeypatch.setattr(nms, "suppress", lambda output: seen.append(float(output.mean())) or suppress(output))
    (timing,) = nms.measure_with_nms([file], [dark, bright], threads=1, protocol=QUICK)
    warm_up, reference, network = [0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    assert seen[:9] == warm_up + reference + network
    assert timing.repetitions == len(timing.rounds) * QUICK.repetitions
    assert timing.energy_mj is None
    assert nms.boxes(file, [dark, bright], threads=1) == {"boxes": 42.0, "detections": 0.5}
