"""What this machine is as a target device, for `probe --info`: its CPU, its GPUs, and what they can do at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from yolov8_nas.device import catalogue
from yolov8_nas.device.gpu import GpuInfo, GpuReport, get_gpu_info
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Cores, Profile, available_cores, cores, cpu_profile, regime
from yolov8_nas.device.roofline import Roofline, measure_cpu, measure_gpu

INSTRUCTION_NAMES: Final[Mapping[str, str]] = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "amx_tile": "AMX",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "asimdhp": "NEON FP16",
    "i8mm": "NEON INT8 matrix",
    "bf16": "NEON BF16",
    "sve": "SVE",
}
"""CPU flags as their makers call them."""


@dataclass(frozen=True)
class Machine:
    """What this machine is.

    Attributes:
        cpu: Its CPU as the target `cpu`.
        cores: The cores that this process is given.
        clocks: How the CPU's clocks are run; see `profile.regime`.
        gpus: Its GPUs.
        measured: What was measured, by device: `cpu-<n>t`, `gpu-<index>`; empty where nothing was.
        not_measured: Why something was not measured, by device.
    """

    cpu: Profile
    cores: Cores
    clocks: Mapping[str, Any]
    gpus: GpuReport
    measured: Mapping[str, Roofline]
    not_measured: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON: the CPU's profile, and everything else under keys of its own."""
        return {
            **self.cpu.to_dict(),
            "topology": asdict(self.cores),
            "clocks": dict(self.clocks),
            **self.gpus.to_dict(),
            "measured": {device: roofline.to_dict() for device, roofline in self.measured.items()},
            "not_measured": dict(self.not_measured),
        }


def look(*, measure: bool = True, note: Callable[[str], None] = print) -> Machine:
    """Look at this machine.

    Args:
        measure: Whether to measure what it can do at most, some seconds for the CPU and for each GPU, with the host
            held alone.
        note: Told what takes time.
    """
    cpu = cpu_profile("cpu", available_cores())
    gpus = get_gpu_info()
    measured: dict[str, Roofline] = {}
    failed: dict[str, str] = {}
    if measure:
        with HostLock(note=note).measuring():
            for threads in sorted({1, cpu.threads}):
                note(f"measuring the CPU with {threads} thread{'s' * (threads > 1)}")
                measured[f"cpu-{threads}t"] = measure_cpu(
                    threads, cpu.instructions, max(cpu.caches.values(), default=0)
                )
            for gpu in gpus.gpus:
                note(f"measuring GPU {gpu.index}")
                device = f"gpu-{gpu.index}"
                try:
                    measured[device] = _measure(gpu)
                except RuntimeError as error:  # out of memory, a data type without a kernel, a GPU that fell off
                    failed[device] = str(error).splitlines()[0]
    return Machine(cpu, cores(), regime(), gpus, measured, failed)


def _measure(gpu: GpuInfo) -> Roofline:
    if gpu.cuda_index is None:
        raise RuntimeError("PyTorch cannot use it")
    return measure_gpu(gpu.cuda_index, gpu.tensor_core_types, gpu.l2_mib)


def table(machine: Machine) -> RenderableType:
    """The machine for people, at any width of the terminal from 80 on."""
    parts: list[RenderableType] = [_section("CPU", _cpu_rows(machine))]
    for gpu in machine.gpus.gpus:
        parts += [Text(), _section(f"GPU {gpu.index}", _gpu_rows(gpu, machine))]
    if machine.gpus.none:
        parts += [Text(), _section("GPU", [("none", machine.gpus.none)])]
    return Group(*parts)


def _section(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Rows of a name and what is known of it; empty ones are left out."""
    grid = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    grid.add_column(title, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value:
            grid.add_row(name, Text(value))
    return grid


def _cpu_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    cpu, given, clocks = machine.cpu, machine.cores, machine.clocks
    yield "model", cpu.model + (", in a virtual machine" if given.virtual else "")
    yield "target", f"cpu (as cpu-{cpu.cores}t), id {cpu.id}"
    yield (
        "cores",
        _joined(
            f"{cpu.cores} usable",
            f"{given.affinity} by affinity",
            given.quota and f"{given.quota:g} by the container's quota",
            given.physical and f"{given.physical} physical" + (" (SMT)" if given.physical < given.affinity else ""),
            given.sockets and given.sockets > 1 and f"{given.sockets} sockets",
            given.numa_nodes > 1 and f"{given.numa_nodes} NUMA nodes",
        ),
    )
    yield "instructions", _joined(*(INSTRUCTION_NAMES[flag] for flag in cpu.instructions))
    yield "caches", _joined(*(f"{name} {_kib(size)}" for name, size in cpu.caches.items()))
    yield "memory", f"{cpu.memory_gb:g} GiB"
    yield (
        "clocks",
        _joined(
            clocks["mhz"] and f"{clocks['mhz']} MHz now",
            clocks["governor"] and f"governor {clocks['governor']}",
            clocks["boost"] is not None and f"boost {'on' if clocks['boost'] else 'off'}",
            clocks["throttled"] is not None and f"slowed down for heat {clocks['throttled']} times since the start",
        ),
    )
    yield "runtime", f"{cpu.runtime['name']} {cpu.runtime['version']}"
    yield "system", cpu.system
    for device, roofline in machine.measured.items():
        if roofline.threads:
            yield f"measured, {device}", _measured(roofline)


def _gpu_rows(gpu: GpuInfo, machine: Machine) -> Iterator[tuple[str, str]]:
    entry = catalogue.catalogue().get(gpu.specification or "")
    yield "name", gpu.name
    yield "shared", gpu.shared or ""
    yield "id", gpu.id
    yield "catalogue", f"{entry.key} ({entry.source})" if entry else ""
    yield (
        "compute",
        _joined(
            gpu.compute_capability and f"capability {gpu.compute_capability}",
            gpu.sms and f"{gpu.sms} multiprocessors",
            gpu.threads_per_sm and f"{gpu.threads_per_sm} threads each",
            gpu.warp_size and f"warps of {gpu.warp_size}",
            gpu.shared_memory_per_sm_kib and f"{gpu.shared_memory_per_sm_kib:g} KiB shared memory each",
            gpu.l2_mib and f"{gpu.l2_mib:g} MiB L2",
        ),
    )
    yield "tensor cores", _joined(*(name.upper() for name in gpu.tensor_core_types)) or "none"
    yield (
        "memory",
        _joined(
            gpu.memory_gib and f"{gpu.memory_gib:g} GiB",
            gpu.memory_type,
            gpu.bandwidth_gbs and f"{gpu.bandwidth_gbs:g} GB/s in theory",
            gpu.memory_bus_bits
            and gpu.memory_clock_mhz
            and f"{gpu.memory_bus_bits} bit at 2 x {gpu.memory_clock_mhz} MHz",
            gpu.ecc is not None and f"ECC {'on' if gpu.ecc else 'off'}",
        ),
    )
    yield "PCIe", _pcie(gpu)
    yield "joined to", "; ".join(f"GPU {index} {link}" for index, link in (gpu.peers or {}).items())
    yield (
        "power",
        _joined(
            gpu.power_limit_w and f"limit {gpu.power_limit_w:g} W",
            gpu.power_limit_default_w and f"default {gpu.power_limit_default_w:g} W",
            gpu.temperature_c and f"{gpu.temperature_c} °C now",
        ),
    )
    yield "clocks", _clocks(gpu)
    throttled = "" if gpu.throttled is None else _joined(*gpu.throttled) or "not at this moment"
    yield "throttled", throttled
    yield (
        "software",
        _joined(
            gpu.driver and f"driver {gpu.driver}",
            gpu.cuda_driver and f"for CUDA up to {gpu.cuda_driver}",
            gpu.cuda and f"CUDA {gpu.cuda}",
            f"TensorRT {gpu.tensorrt}" if gpu.tensorrt else "no TensorRT",
        ),
    )
    device = f"gpu-{gpu.index}"
    yield "measured", _measured(machine.measured[device]) if device in machine.measured else ""
    yield "not measured", machine.not_measured.get(device, "")
    yield "notes", "; ".join(gpu.notes)


def _measured(roofline: Roofline) -> str:
    products = (
        f"{name.upper()} {1000 * tops:.3g} {'GOP/s' if name == 'int8' else 'GFLOP/s'}"
        if tops < 1
        else f"{name.upper()} {tops:.3g} {'TOP/s' if name == 'int8' else 'TFLOP/s'}"
        for name, tops in roofline.tops.items()
    )
    return _joined(f"{roofline.bandwidth_gbs:.3g} GB/s", *products, f"scatter {roofline.scatter:.0%}")


def _pcie(gpu: GpuInfo) -> str:
    link = gpu.pcie or {}
    if not link.get("generation"):
        return ""
    now = f"generation {link['generation']} x{link['width']} now"
    return _joined(now, f"at most generation {link['max_generation']} x{link['max_width']}", _node(gpu))


def _node(gpu: GpuInfo) -> str:
    return "" if gpu.numa_node is None else f"NUMA node {gpu.numa_node}"


def _clocks(gpu: GpuInfo) -> str:
    clocks = gpu.clocks_mhz or {}
    told = [f"{name} {clocks[name]} MHz of {clocks[f'max_{name}']}" for name in ("sm", "memory") if clocks.get(name)]
    return _joined(*told, *gpu.clock_settings)


def _joined(*parts: object) -> str:
    """What there is of the parts, with commas between."""
    return ", ".join(str(part) for part in parts if part)


def _kib(size: int) -> str:
    return f"{size // 1024} MiB" if size >= 1024 and size % 1024 == 0 else f"{size} KiB"
