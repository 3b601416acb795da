"""What this machine is, as far as latency depends on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from yolov8_nas.errors import InputError
from yolov8_nas.files import read_json

if TYPE_CHECKING:
    from yolov8_nas.device.gpu import GpuInfo

INSTRUCTIONS: Final = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""CPU flags, as Linux names them, for which ONNX Runtime has kernels of their own."""

THREADS_VARIABLE: Final = "YOLOV8_NAS_THREADS"
"""Names how many threads trainings and scorings take at most, on a machine that other work shares."""

_GIB = 2**30


@dataclass(frozen=True)
class Profile:
    """A device that networks are measured on.

    Attributes:
        name: Name of the target as asked for, for example `cpu-2t`.
        id: What identifies the hardware in registries: [a-z0-9-], for example `cpu-amd-epyc-9354-2t`.
        kind: `cpu` or `gpu`.
        model: The CPU's or GPU's own name.
        cores: Cores that this process may use.
        threads: Threads that a network runs on; 1 where it runs on a GPU.
        instructions: Those of `INSTRUCTIONS` that the CPU has.
        caches: Level, and size in KiB as the first core sees it, for example {"L1d": 32, "L2": 1024, "L3": 32768}.
        memory_gb: Memory that this process may use, in GiB; a GPU's own.
        runtime: Name and version of what runs the networks.
        system: Operating system and kernel.
        gpu: Of a GPU, what latency depends on (`GpuInfo.key`).
        FILE: Name of the file that hw-probe keeps it in.
    """

    FILE: ClassVar[str] = "profile.json"

    name: str
    id: str
    kind: str
    model: str
    cores: int
    threads: int
    instructions: tuple[str, ...]
    caches: Mapping[str, int]
    memory_gb: float
    runtime: Mapping[str, str]
    system: str
    gpu: Mapping[str, Any] | None = None

    @property
    def runtime_name(self) -> str:
        """Name of what runs the networks."""
        return self.runtime["name"]

    @property
    def runtime_version(self) -> str:
        """Version of what runs the networks."""
        return self.runtime["version"]

    @property
    def compute_capability(self) -> str | None:
        """A GPU's compute capability; nothing of a CPU, or where the driver does not tell."""
        return self.gpu["compute_capability"] if self.gpu else None

    @classmethod
    def read(cls, folder: Path) -> Profile:
        """Read the profile that hw-probe wrote into the folder of its result.

        Raises:
            InputError: It has other fields than a profile.
        """
        return cls.of(read_json(folder / cls.FILE), str(folder / cls.FILE))

    @classmethod
    def of(cls, content: Mapping[str, Any], source: str) -> Profile:
        """A profile of what `to_dict` gives.

        Args:
            content: Its fields.
            source: Where they come from, for messages.

        Raises:
            InputError: They are not those of a profile.
        """
        try:
            return cls(**{**content, "instructions": tuple(content["instructions"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"{source}: no device's profile ({error}); run hw-probe again") from None

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        content = {**asdict(self), "instructions": list(self.instructions)}
        if self.gpu is None:
            del content["gpu"]
        return content

    @property
    def key(self) -> dict[str, Any]:
        """The part on which latency depends: measurements are shared between machines where this is the same."""
        kept = ("id", "model", "threads", "instructions", "caches", "runtime", "gpu")
        return {name: value for name, value in self.to_dict().items() if name in kept}


def cpu_profile(name: str, threads: int) -> Profile:
    """This machine's CPU as the target `name` with so many threads."""
    model = cpu_model()
    return Profile(
        name=name,
        id=f"cpu-{slug(model)}-{threads}t",
        kind="cpu",
        model=model,
        cores=available_cores(),
        threads=threads,
        instructions=_instructions(),
        caches=_caches(),
        memory_gb=round(_memory() / _GIB, 1),
        runtime={"name": "onnxruntime", "version": version("onnxruntime")},
        system=f"{platform.system()} {platform.release()}",
    )


def gpu_profile(gpu: GpuInfo, runtime: Mapping[str, str]) -> Profile:
    """A GPU of this machine as a target; what runs on the CPU beside it has one thread."""
    return Profile(
        name=gpu.id,
        id=gpu.id,
        kind="gpu",
        model=gpu.name,
        cores=available_cores(),
        threads=1,
        instructions=(),
        caches={"L2": round(gpu.l2_mib * 1024)} if gpu.l2_mib else {},
        memory_gb=gpu.memory_gib or 0.0,
        runtime=runtime,
        system=f"{platform.system()} {platform.release()}",
        gpu=gpu.key,
    )


@dataclass(frozen=True)
class Cores:
    """The cores that a process is given, and what they really are.

    Attributes:
        affinity: Logical cores that the process may run on.
        quota: Cores' worth of time that its container may use; nothing where that is not limited.
        physical: Physical cores behind the logical ones; nothing where the system does not tell.
        sockets: Processors that these belong to.
        numa_nodes: NUMA nodes of the machine.
        virtual: Whether this is a virtual machine, whose topology and caches are what the hypervisor shows.
    """

    affinity: int
    quota: float | None
    physical: int | None
    sockets: int | None
    numa_nodes: int
    virtual: bool


def cores(
    system: Path = Path("/sys/devices/system"),
    cgroup: Path = Path("/sys/fs/cgroup"),
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> Cores:
    """The cores of this process: by affinity, by quota, and without simultaneous multithreading."""
    logical = sorted(os.sched_getaffinity(0))
    topology = [system / "cpu" / f"cpu{core}" / "topology" for core in logical]
    siblings = {_line(folder / "thread_siblings_list") for folder in topology} - {""}
    sockets = {_line(folder / "physical_package_id") for folder in topology} - {""}
    return Cores(
        affinity=len(logical),
        quota=_cgroup_quota(cgroup),
        physical=len(siblings) or None,
        sockets=len(sockets) or None,
        numa_nodes=len(list(system.glob("node/node[0-9]*"))) or 1,
        virtual="hypervisor" in next(_cpuinfo(cpuinfo, "flags"), "").split(),
    )


def regime(cpus: Path = Path("/sys/devices/system/cpu"), cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """How the CPU's clocks are run at this moment; what a machine does not tell (a virtual one, mostly) is nothing.

    Returns:
        `governor`: what chooses the clock, e.g. `performance`. `boost`: whether it may go above its nominal value.
        `mhz`: the mean clock of all cores. `throttled`: how often cores of this process have been slowed down for heat
        since the machine was started.
    """
    cores = sorted(os.sched_getaffinity(0))
    governors = {_line(cpus / f"cpu{core}/cpufreq/scaling_governor") for core in cores}
    boost = _line(cpus / "cpufreq/boost")
    clocks = [float(value) for value in _cpuinfo(cpuinfo, "cpu MHz")]
    throttled = [_line(cpus / f"cpu{core}/thermal_throttle/core_throttle_count") for core in cores]
    return {
        "governor": ", ".join(sorted(filter(None, governors))) or None,
        "boost": boost == "1" if boost else None,
        "mhz": round(sum(clocks) / len(clocks)) if clocks else None,
        "throttled": sum(map(int, filter(None, throttled))) if any(throttled) else None,
    }


def _line(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name, or its architecture where it does not tell (many ARM machines)."""
    return next(_cpuinfo(cpuinfo, "model name", "Model", "Hardware"), platform.machine() or "unknown")


def slug(model: str) -> str:
    """A CPU's name in [a-z0-9-], without trademarks, the word CPU or Processor, and the number of cores."""
    text = re.sub(r"\((r|tm|c)\)|\b(cpu|processor|\d+-core)\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container rounded down, at least one."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(_cgroup_quota(Path("/sys/fs/cgroup")) or cores)))


def computing_threads() -> int:
    """Threads for trainings and scorings: one for each usable core, or what `THREADS_VARIABLE` says where it is fewer.

    What is measured runs on the threads of its target instead.

    Raises:
        InputError: The variable holds no positive number.
    """
    cores = available_cores()
    most = os.environ.get(THREADS_VARIABLE) or str(cores)
    if not (most.isascii() and most.isdigit()) or int(most) < 1:
        raise InputError(f"{THREADS_VARIABLE} = {most!r}: give a number of threads, 1 or more, or unset it")
    return min(cores, int(most))


def _cgroup_quota(root: Path) -> float | None:
    """CPU quota of the container in cores; nothing where there is none."""
    try:
        quota, period = (root / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period"))
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _memory() -> int:
    """Bytes of memory: the machine's, or the container's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(total, int((Path("/sys/fs/cgroup") / limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def _instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    flags = set(next(_cpuinfo(cpuinfo, "flags", "Features"), "").split())
    return tuple(name for name in INSTRUCTIONS if name in flags)


def _caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    caches = {}
    for entry in sorted(root.glob("index*")):
        try:
            level, kind, size = ((entry / part).read_text().strip() for part in ("level", "type", "size"))
        except OSError:
            continue
        if match := re.fullmatch(r"(\d+)([KM])", size):
            letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
            caches[f"L{level}{letter}"] = int(match[1]) * (1024 if match[2] == "M" else 1)
    return caches


def _cpuinfo(cpuinfo: Path, *keys: str) -> Iterator[str]:
    """Values of `keys` in /proc/cpuinfo, the first key first."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        return
    for wanted in keys:
        yield from (value.strip() for key, _, value in lines if key.strip() == wanted and value.strip())
