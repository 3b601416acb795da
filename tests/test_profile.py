"""What a machine is: its CPU and GPUs, and what they are measured to do at most.

There is no GPU here: NVML is a double with the signatures of the real module, which refuses what it was not told to
answer, and CUDA's properties have the names of PyTorch's own class.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import pynvml
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from yolov8_nas.commands import doctor
from yolov8_nas.commands.main import app
from yolov8_nas.device import catalogue, gpu, machine, profile, roofline
from yolov8_nas.device.gpu import GpuInfo, get_gpu_info, theoretical_bandwidth
from yolov8_nas.device.host import default_path
from yolov8_nas.device.roofline import Roofline
from yolov8_nas.errors import InputError
from yolov8_nas.measure.target import Target, resolve

T4 = {
    "nvmlDeviceGetName": "Tesla T4",
    "nvmlDeviceGetUUID": "GPU-0000-t4",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=15_843_721_216),
    "nvmlDeviceGetCudaComputeCapability": (7, 5),
    "nvmlDeviceGetMemoryBusWidth": 256,
    "nvmlDeviceGetEccMode": [1, 1],
    "nvmlDeviceGetPowerManagementLimit": 60_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 70_000,
    "nvmlDeviceGetCurrPcieLinkGeneration": 1,
    "nvmlDeviceGetCurrPcieLinkWidth": 8,
    "nvmlDeviceGetMaxPcieLinkGeneration": 3,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetTemperature": 81,
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:01:00.0"),
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap
    | pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
    "nvmlDeviceGetComputeRunningProcesses": [],
    "nvmlSystemGetDriverVersion": "580.65.06",
    "nvmlSystemGetCudaDriverVersion": 13000,
}
T4_CUDA = {
    "uuid": "0000-t4", "major": 7, "minor": 5, "multi_processor_count": 40, "warp_size": 32,
    "max_threads_per_multi_processor": 1024, "shared_memory_per_multiprocessor": 65536, "L2_cache_size": 4 * 2**20,
    "total_memory": 15_843_721_216, "name": "Tesla T4",
}  # fmt: skip


class Nvml:
    """NVML's module: its true names, constants and signatures, and answers to what it was told; all else it refuses."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)
        if isinstance(real, type) or not callable(real):
            return real
        double = create_autospec(real)
        answer = self.answers.get(name, pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
        if callable(answer) or isinstance(answer, Exception):
            double.side_effect = answer
        double.return_value = answer
        setattr(self, name, double)
        return double


def driver(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], gpus: int = 1) -> None:
    """NVML with so many GPUs that all give the same answers."""
    clocks = {pynvml.NVML_CLOCK_SM: (585, 1590), pynvml.NVML_CLOCK_MEM: (5000, 5001)}
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": gpus,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetClockInfo": lambda _, kind: clocks[kind][0],
        "nvmlDeviceGetMaxClockInfo": lambda _, kind: clocks[kind][1],
        **answers,
    }
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(answers))
    monkeypatch.delenv(gpu.LABEL_VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)


def cuda(monkeypatch: pytest.MonkeyPatch, *devices: dict[str, Any]) -> None:
    """PyTorch that sees these GPUs."""
    for device in devices:
        assert set(device) <= set(dir(torch._C._CudaDeviceProperties))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**devices[index]))


# GPUs ----------------------------------------------------------------------------------------------------------------


def test_a_gpu_is_told_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, T4)
    cuda(monkeypatch, {**T4_CUDA, "uuid": "another"}, T4_CUDA)
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "numa_node").write_text("1\n")
    monkeypatch.setattr(gpu, "PCI", tmp_path)
    (info,) = get_gpu_info().gpus
    assert (info.name, info.id, info.specification, info.cuda_index) == ("Tesla T4", "tesla-t4", "t4", 1)
    assert (info.compute_capability, info.tensor_core_types) == ("7.5", ("fp16", "int8"))
    assert (info.sms, info.threads_per_sm, info.warp_size, info.shared_memory_per_sm_kib) == (40, 1024, 32, 64)
    assert (info.l2_mib, info.memory_type, info.ecc) == (4, "GDDR6", True)
    assert info.bandwidth_gbs == pytest.approx(320.1)
    assert (info.driver, info.cuda_driver, info.cuda, info.numa_node) == ("580.65.06", "13.0", torch.version.cuda, 1)
    assert info.throttled == ("power limit reached",)
    assert info.clock_settings == ("clocks set for applications",)
    assert info.clocks_mhz == {"sm": 585, "memory": 5000, "max_sm": 1590, "max_memory": 5001}
    assert info.shared is None and info.mig is None
    assert info.notes == (
        "its PCIe link has 8 lanes of 16",
        "its power limit is set to 60 W, below the default of 70 W",
    )
    plain = json.loads(json.dumps(info.to_dict()))
    assert plain["pcie"] == {"generation": 1, "width": 8, "max_generation": 3, "max_width": 16}


def test_what_latency_depends_on_does_not_change_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(**answers: object) -> dict[str, Any]:
        driver(monkeypatch, {**T4, **answers})
        return get_gpu_info().gpus[0].key

    cuda(monkeypatch, T4_CUDA)
    before = json.loads(json.dumps(key()))
    assert before == key(
        nvmlDeviceGetTemperature=40, nvmlDeviceGetCurrentClocksEventReasons=0, nvmlDeviceGetCurrPcieLinkGeneration=3
    )
    assert before != key(nvmlDeviceGetPowerManagementLimit=70_000)
    assert before != key(nvmlDeviceGetEccMode=[0, 0])
    assert before != key(nvmlSystemGetDriverVersion="590.1")


def test_what_the_driver_does_not_tell_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, {"nvmlDeviceGetName": "NVIDIA Future"})
    cuda(monkeypatch)
    report = get_gpu_info()
    (info,) = report.gpus
    assert str(report) == "GPU 0: NVIDIA Future"
    assert info.id == "nvidia-future"
    kept = {"index", "name", "id", "memory_clock_mhz", "pcie", "clocks_mhz", "peers", "notes"}
    assert not any(value for name, value in info.to_dict().items() if name not in kept)
    assert info.notes == (
        "PyTorch cannot use it, so what belongs to a multiprocessor is not known",
        "the catalogue has no entry for it",
    )


def test_drivers_before_535_name_the_reasons_of_clocks_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {name: value for name, value in T4.items() if "EventReasons" not in name}
    hot = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    driver(monkeypatch, {**answers, "nvmlDeviceGetCurrentClocksThrottleReasons": hot})
    cuda(monkeypatch, T4_CUDA)
    assert get_gpu_info().gpus[0].throttled == ("too hot: slowed down by hardware",)


def test_slices_are_told_from_the_gpu_that_they_are_cut_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(parent: str, index: int) -> str:
        if index == 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"{parent}, slice {index}"

    driver(
        monkeypatch,
        {
            **T4,
            "nvmlDeviceGetMigMode": [1, 1],
            "nvmlDeviceGetMaxMigDeviceCount": 3,
            "nvmlDeviceGetMigDeviceHandleByIndex": handle,
            "nvmlDeviceGetName": "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
            "nvmlDeviceGetUUID": lambda of: f"MIG-{of}",
            "nvmlDeviceGetMemoryInfo": lambda of: SimpleNamespace(total=5e9 if "slice" in of else 42.9e9),
            "nvmlDeviceGetCudaComputeCapability": (8, 0),
        },
    )
    cuda(monkeypatch, {**T4_CUDA, "uuid": "gpu 0, slice 1", "multi_processor_count": 14, "major": 8, "minor": 0})
    first, second = get_gpu_info().gpus
    assert (second.mig, second.sms, second.specification) == ("1g.5gb", 14, "a100-sxm4-40gb")
    assert second.id == "nvidia-a100-sxm4-40gb-mig-1g-5gb"
    assert second.memory_gib == pytest.approx(4.66)
    assert second.bandwidth_gbs is None and first.cuda_index is None
    assert gpu.gpu_names() == ["NVIDIA A100-SXM4-40GB MIG 1g.5gb"] * 2


def test_a_gpu_that_others_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=os.getpid() + 1)]
    driver(monkeypatch, {**T4, "nvmlDeviceGetComputeRunningProcesses": processes})
    cuda(monkeypatch, T4_CUDA)
    assert get_gpu_info().gpus[0].shared == "1 other process on it now"
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/pipe")
    assert "Multi-Process Service" in (get_gpu_info().gpus[0].shared or "")
    monkeypatch.setenv(gpu.LABEL_VARIABLE, "Tesla-T4-SHARED")
    assert "time slicing or MPS" in (get_gpu_info().gpus[0].shared or "")
    (row,) = doctor._gpus()
    assert (
        row.ok and "Tesla T4; target t4; the node's product label" in row.found and "power limit reached" in row.found
    )
    cuda(monkeypatch)
    assert not doctor._gpus()[0].ok


def test_how_gpus_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {**T4, "nvmlDeviceGetTopologyCommonAncestor": pynvml.NVML_TOPOLOGY_SYSTEM}
    cuda(monkeypatch)
    driver(monkeypatch, two, gpus=2)
    assert [info.peers for info in get_gpu_info().gpus] == [
        {1: "through the link between processors"},
        {0: "through the link between processors"},
    ]
    driver(monkeypatch, {**two, "nvmlDeviceGetP2PStatus": pynvml.NVML_P2P_STATUS_OK}, gpus=2)
    assert get_gpu_info().gpus[0].to_dict()["peers"] == {"1": "by NVLink"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "driver is not installed; if this is a container"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "is installed and not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "was updated .* reboot"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML does not start"),
    ],
)
def test_why_there_is_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    driver(monkeypatch, {"nvmlInit": pynvml.NVMLError(code)})
    report = get_gpu_info()
    assert report.gpus == () and re.search(words, str(report))
    assert str(report).startswith("no NVIDIA GPU: ")
    assert doctor._gpus()[0].ok
    driver(monkeypatch, {}, gpus=0)
    assert "give it one" in str(get_gpu_info())


def test_a_jetson_without_nvml_is_known_by_its_device_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver(monkeypatch, {"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)})
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    monkeypatch.setattr(gpu, "DEVICE_TREE", tmp_path / "model")
    cuda(monkeypatch, {**T4_CUDA, "name": "Orin", "major": 8, "minor": 7, "total_memory": 7_990_000_000})
    (info,) = get_gpu_info().gpus
    assert (info.specification, info.id) == ("jetson-orin-nano-8gb", "nvidia-jetson-orin-nano-8gb")
    assert (info.bandwidth_gbs, info.memory_type, info.compute_capability) == (68, "LPDDR5", "8.7")
    assert gpu.gpu_names() == ["NVIDIA Jetson Orin Nano Developer Kit"]


@pytest.mark.parametrize(
    ("key", "clock_mhz", "bus_bits"),
    [
        ("v100-sxm2-16gb", 877, 4096),
        ("t4", 5001, 256),
        ("a10", 6251, 384),
        ("a100-sxm4-40gb", 1215, 5120),
        ("a100-sxm4-80gb", 1593, 5120),
        ("rtx3090", 9751, 384),
        ("rtx4090", 10501, 384),
        ("l4", 6251, 192),
        ("h100-sxm5", 2619, 5120),
        ("h200", 3201, 6144),
        ("rtx5090", 14001, 512),
    ],
)
def test_twice_the_clock_that_nvml_tells_is_the_data_rate_of_every_type_of_memory(
    key: str, clock_mhz: int, bus_bits: int
) -> None:
    assert theoretical_bandwidth(clock_mhz, bus_bits) == pytest.approx(
        catalogue.catalogue()[key].bandwidth_gbs, rel=0.03
    )


def test_a_gpu_is_a_target_with_the_runtimes_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, T4)
    cuda(monkeypatch, T4_CUDA)
    found = resolve("NVIDIA_T4", "torch", "fp16")
    assert (found.name, found.kind, found.runtime, found.threads) == ("tesla-t4", "gpu", "torch", 1)
    described = found.profile
    assert described.key["gpu"]["power_limit_w"] == 60
    assert described.key["runtime"]["name"] == "torch"
    assert json.loads(json.dumps(described.to_dict()))["caches"] == {"L2": 4096}
    assert found.regime()["throttled"] == ["power limit reached"]
    with pytest.raises(
        InputError, match=r"runtime 'onnxruntime' on hardware 'NVIDIA_T4': ONNX Runtime .* is built without"
    ):
        resolve("NVIDIA_T4")
    cuda(monkeypatch, {**T4_CUDA, "uuid": "another", "name": "NVIDIA L4"}, T4_CUDA)
    with pytest.raises(InputError, match="the GPU that CUDA numbers 0, which is none; set CUDA_VISIBLE_DEVICES"):
        resolve("NVIDIA_T4", "torch", "fp16")
    with pytest.raises(InputError, match="tesla-t4 is not the GPU that CUDA numbers 0 here"):
        _ = Target("tesla-t4", "gpu", "torch", "fp16", 1).profile


def test_a_cpus_profile_has_nothing_of_a_gpu() -> None:
    here = profile.cpu_profile("cpu-1t", 1)
    assert "gpu" not in here.to_dict() and "gpu" not in here.key


# CPU -----------------------------------------------------------------------------------------------------------------


def test_cores_are_counted_by_affinity_quota_and_without_smt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    for core, (siblings, socket) in {0: ("0,4", 0), 1: ("1,5", 1), 4: ("0,4", 0), 5: ("1,5", 1)}.items():
        folder = tmp_path / "cpu" / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
        (folder / "physical_package_id").write_text(f"{socket}\n")
    for node in (0, 1):
        (tmp_path / "node" / f"node{node}").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    (tmp_path / "cpuinfo").write_text("flags\t: avx2 hypervisor\n")
    found = profile.cores(tmp_path, tmp_path, tmp_path / "cpuinfo")
    assert found == profile.Cores(4, 2.5, physical=2, sockets=2, numa_nodes=2, virtual=True)
    unknown = profile.cores(tmp_path / "none", tmp_path / "none", tmp_path / "none")
    assert unknown == profile.Cores(4, None, physical=None, sockets=None, numa_nodes=1, virtual=False)


def test_instructions_have_names_for_people() -> None:
    assert set(machine.INSTRUCTION_NAMES) == set(profile.INSTRUCTIONS)


# What it can do at most ----------------------------------------------------------------------------------------------


def test_a_roofline_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_CPU_SIDE", 64)
    monkeypatch.setattr(roofline, "_SMALLEST", 2**20)
    monkeypatch.setattr(roofline, "_BLOCK_S", 0.001)
    torch.set_num_threads(2)
    found = roofline.measure_cpu(1, ("avx2", "avx512_vnni", "avx512_bf16"), 256, seconds=0.01)
    assert torch.get_num_threads() == 2
    assert (found.threads, found.array_mib) == (1, 1)
    assert list(found.tops) == ["fp32", "bf16", "int8"]
    assert found.bandwidth_gbs > 0.1 and all(1e-4 < tops < 1000 for tops in found.tops.values())
    assert found.scatter >= 0
    assert json.loads(json.dumps(found.to_dict()))["side"] == 64


def test_products_compute_what_they_say() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in {
        "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int32
    }.items():  # fmt: skip
        with roofline._product(torch.device("cpu"), name, 32) as product:
            assert torch.backends.cuda.matmul.allow_tf32 == (name == "tf32" or (name == "int8" and before))
            result = product()
        assert isinstance(result, torch.Tensor)
        assert result.dtype == dtype and result.shape == (32, 32) and result.count_nonzero() > 900
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_arrays_are_beyond_the_caches_and_within_memory() -> None:
    assert roofline._array_bytes(32 * 2**20, 2**34) == 128 * 2**20
    assert roofline._array_bytes(0, 2**34) == 64 * 2**20
    assert roofline._array_bytes(2**30, 2**40) == 2**30
    assert roofline._array_bytes(32 * 2**20, 80 * 2**20) == 10 * 2**20


def test_the_ridge_divides_memory_from_arithmetic() -> None:
    found = Roofline(None, bandwidth_gbs=320, array_mib=64, tops={"fp16": 64.0}, side=8192, scatter=0.0)
    assert found.ridge("fp16") == 200
    assert found.attainable("fp16", 100) == 32
    assert found.attainable("fp16", 1000) == 64


def test_types_are_measured_where_the_cpu_has_them() -> None:
    assert roofline.cpu_types(("avx2", "fma")) == ["fp32"]
    assert roofline.cpu_types(("avx_vnni",)) == ["fp32", "int8"]
    assert roofline.cpu_types(("asimd", "asimddp", "bf16")) == ["fp32", "bf16", "int8"]


# The command ---------------------------------------------------------------------------------------------------------


def test_probe_tells_what_this_machine_is_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, {"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)})
    told = CliRunner().invoke(app, ["probe", "--info", "--quick"])
    assert told.exit_code == 0 and "driver is not" in told.stdout and profile.cpu_model() in told.stdout
    told = CliRunner().invoke(app, ["probe", "--info", "--quick", "--json"])
    content = json.loads(told.stdout)
    assert content["kind"] == "cpu" and content["topology"]["affinity"] >= 1
    assert content["gpus"] == [] and "driver is not installed" in content["no_gpu"]
    assert content["measured"] == {}


def test_probe_measures_with_the_host_held_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    figures = Roofline(1, 8.0, 64, {"fp32": 0.05}, 64, 0.01)

    def measure(*_: object) -> Roofline:
        with default_path().open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as who computes would
                held.append(False)
            except BlockingIOError:
                held.append(True)
        return figures

    driver(monkeypatch, T4)
    cuda(monkeypatch, T4_CUDA)
    monkeypatch.setattr(machine, "measure_cpu", measure)
    monkeypatch.setattr(machine, "measure_gpu", Mock(side_effect=RuntimeError("CUDA out of memory\nTried")))
    found = machine.look(note=lambda text: None)
    assert held and all(held)
    assert found.cpu.key == machine.look(measure=False).cpu.key
    assert found.not_measured == {"gpu-0": "CUDA out of memory"}
    assert found.to_dict()["measured"]["cpu-1t"]["bandwidth_gbs"] == 8.0


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    driver(monkeypatch, T4)
    cuda(monkeypatch, T4_CUDA)
    found = machine.look(measure=False)
    measured = Roofline(None, 250.0, 64, {"fp16": 41.0, "int8": 85.0}, 8192, 0.01)
    console = Console(file=io.StringIO(), width=width)
    console.print(
        machine.table(
            machine.Machine(found.cpu, found.cores, found.clocks, found.gpus, {"gpu-0": measured}, {"gpu-1": "no"})
        )
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    assert "320.1 GB/s in theory, 256 bit at 2 x 5001 MHz, ECC on" in flat
    assert "250 GB/s, FP16 41 TFLOP/s, INT8 85 TOP/s" in flat
    assert "power limit reached" in flat


def test_get_gpu_info_is_part_of_the_package() -> None:
    import yolov8_nas

    assert yolov8_nas.get_gpu_info is get_gpu_info
    assert "get_gpu_info" in dir(yolov8_nas)
    assert isinstance(GpuInfo(0, "x", "x").to_dict(), dict)
