"""What the NVIDIA GPUs of this machine are and how they are run at this moment.

The driver is asked through NVML, PyTorch for what belongs to a multiprocessor. What neither tells is nothing, never a
zero or a guess. Nothing is measured here and nothing is set.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from yolov8_nas.device import catalogue
from yolov8_nas.device.catalogue import Specification

LABEL_VARIABLE: Final = "YOLOV8_NAS_GPU_PRODUCT"
"""Environment variable with the node's label `nvidia.com/gpu.product`. A pod cannot tell from within that it shares a
GPU in time; the label's ending `-SHARED` does."""

DEVICE_TREE: Final = Path("/proc/device-tree/model")
PCI: Final = Path("/sys/bus/pci/devices")

DATA_RATE: Final = 2
"""Transfers per clock that NVML reports for memory.

All types of memory that GPUs have transfer on both edges of some clock, and NVML's memory clock is that one: HBM's own
clock; of GDDR5 and GDDR6 the clock of the data strobes (the commands' is slower); of GDDR6X and GDDR7, which send more
than one bit per edge, half the data rate per pin. So the factor is two for each of them. For example T4: 5001 MHz * 2 *
256 bit / 8 = 320 GB/s; RTX 4090: 10501 MHz * 2 * 384 bit / 8 = 1008 GB/s; A100 40GB: 1215 MHz * 2 * 5120 bit / 8 = 1555
GB/s, as their datasheets have it."""

THROTTLING: Final[Mapping[str, str]] = {
    "nvmlClocksEventReasonSwPowerCap": "power limit reached",
    "nvmlClocksEventReasonHwSlowdown": "slowed down by hardware, for heat or power",
    "nvmlClocksEventReasonSwThermalSlowdown": "too hot: slowed down by the driver",
    "nvmlClocksEventReasonHwThermalSlowdown": "too hot: slowed down by hardware",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake of the server",
    "nvmlClocksEventReasonSyncBoost": "kept in step with other GPUs (sync boost)",
}
"""Why a GPU runs below the clocks that it was set to, by NVML's name of the reason."""

SETTINGS: Final[Mapping[str, str]] = {
    "nvmlClocksEventReasonGpuIdle": "idle",
    "nvmlClocksEventReasonApplicationsClocksSetting": "clocks set for applications",
    "nvmlClocksEventReasonDisplayClockSetting": "clocks set for a display",
}
"""Reasons of its clocks at which nothing is wrong."""

_LINKS: Final[Mapping[str, str]] = {
    "NVML_TOPOLOGY_INTERNAL": "on the same board",
    "NVML_TOPOLOGY_SINGLE": "through one PCIe switch",
    "NVML_TOPOLOGY_MULTIPLE": "through several PCIe switches",
    "NVML_TOPOLOGY_HOSTBRIDGE": "through a PCIe host bridge",
    "NVML_TOPOLOGY_NODE": "through the host bridges of a NUMA node",
    "NVML_TOPOLOGY_SYSTEM": "through the link between processors",
}
_ECC: Final = {0: False, 1: True}


@dataclass(frozen=True)
class GpuInfo:
    """A GPU, or a slice of one (MIG), that this process may use. What is not told is nothing.

    Attributes:
        index: Its place in the driver's order.
        name: Product name as the driver gives it.
        id: What identifies the hardware in registries: [a-z0-9-], for example `nvidia-a100-sxm4-40gb`.
        uuid: The driver's own identifier.
        cuda_index: Its place in PyTorch's order; nothing where PyTorch cannot use it.
        specification: Key of its entry in the catalogue.
        compute_capability: For example `8.6`.
        tensor_core_types: Data types of its tensor cores.
        sms: Streaming multiprocessors.
        warp_size: Threads per warp.
        threads_per_sm: Threads resident on a multiprocessor at most.
        shared_memory_per_sm_kib: Shared memory of a multiprocessor.
        l2_mib: L2 cache.
        memory_gib: Device memory; of a Jetson, the machine's.
        memory_type: From the catalogue, since no driver tells it.
        memory_bus_bits: Width of the memory interface.
        memory_clock_mhz: Highest memory clock as NVML counts it; see `DATA_RATE`.
        bandwidth_gbs: Theoretical memory bandwidth in 10^9 bytes per second: bus width times clock times two. Of a
            Jetson, the catalogue's.
        driver: Version of the driver.
        cuda_driver: Newest CUDA that the driver supports.
        cuda: CUDA runtime that PyTorch was built with.
        tensorrt: Version of TensorRT.
        mig: Profile of the slice, for example `1g.5gb`; nothing for a whole GPU.
        shared: Why the GPU is not this process's alone, in words.
        ecc: Whether its memory corrects errors, which takes bandwidth where the memory is GDDR.
        pcie: `generation` and `width` now (both sink when idle), and the highest that board and slot can have.
        numa_node: NUMA node of the host that it hangs on.
        peers: How it is joined to the other GPUs, in words, by their index.
        power_limit_w: What it may draw.
        power_limit_default_w: What it may draw unless somebody sets another limit.
        clocks_mhz: `sm` and `memory` now, `max_sm` and `max_memory`.
        temperature_c: Temperature of the chip.
        throttled: Why it now runs below its clocks, in words; empty where it does not.
        clock_settings: What else decides its clocks now, in words.
        notes: What of all this was not to be had, and what is out of the ordinary.
    """

    index: int
    name: str
    id: str
    uuid: str | None = None
    cuda_index: int | None = None
    specification: str | None = None
    compute_capability: str | None = None
    tensor_core_types: tuple[str, ...] = ()
    sms: int | None = None
    warp_size: int | None = None
    threads_per_sm: int | None = None
    shared_memory_per_sm_kib: float | None = None
    l2_mib: float | None = None
    memory_gib: float | None = None
    memory_type: str | None = None
    memory_bus_bits: int | None = None
    memory_clock_mhz: int | None = None
    bandwidth_gbs: float | None = None
    driver: str | None = None
    cuda_driver: str | None = None
    cuda: str | None = None
    tensorrt: str | None = None
    mig: str | None = None
    shared: str | None = None
    ecc: bool | None = None
    pcie: Mapping[str, int | None] | None = None
    numa_node: int | None = None
    peers: Mapping[int, str] | None = None
    power_limit_w: float | None = None
    power_limit_default_w: float | None = None
    clocks_mhz: Mapping[str, int | None] | None = None
    temperature_c: int | None = None
    throttled: tuple[str, ...] | None = None
    clock_settings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        lists = {name: list(value) for name, value in asdict(self).items() if isinstance(value, tuple)}
        peers = None if self.peers is None else {str(index): link for index, link in self.peers.items()}
        return {**asdict(self), **lists, "peers": peers}

    @property
    def key(self) -> dict[str, Any]:
        """The part on which latency depends and which does not change by itself: not clocks, heat or what is measured.

        The versions of driver, CUDA and TensorRT are in it, and so are ECC and the power limit, which somebody sets.
        """
        kept = (
            "id", "name", "compute_capability", "sms", "memory_bus_bits", "memory_clock_mhz", "mig", "ecc",
            "power_limit_w", "driver", "cuda", "tensorrt",
        )  # fmt: skip
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True)
class GpuReport:
    """The GPUs of this machine; printed, it is a message for people.

    Attributes:
        gpus: The GPUs that this process may use, in the driver's order.
        none: Why there are none, and what would help; nothing where there are some.
    """

    gpus: tuple[GpuInfo, ...]
    none: str | None = None

    def __str__(self) -> str:
        if self.none:
            return f"no NVIDIA GPU: {self.none}"
        return "\n".join(f"GPU {gpu.index}: {gpu.name}" for gpu in self.gpus)

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return {"gpus": [gpu.to_dict() for gpu in self.gpus], "no_gpu": self.none}


def get_gpu_info() -> GpuReport:
    """What the NVIDIA GPUs of this machine are. Without one, the report says why; it is no error to have none."""
    model = _device_tree()
    try:
        import pynvml
    except ImportError:
        return _without_nvml("nvidia-ml-py is not installed, so the driver cannot be asked; install it", model)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _without_nvml(_why_no_nvml(pynvml, error), model)
    try:
        handles = list(_handles(pynvml))
        if not handles:
            return GpuReport((), "the driver is here and shows none; if this is a container, give it one")
        report = [_info(pynvml, i, handle, parent, mig, model) for i, (handle, parent, mig) in enumerate(handles)]
        return GpuReport(tuple(_joined(pynvml, report, [parent for _, parent, _ in handles])))
    finally:
        pynvml.nvmlShutdown()


def first_gpu() -> GpuInfo | None:
    """The GPU that CUDA numbers 0, on which networks run; nothing where PyTorch can use none."""
    return next((gpu for gpu in get_gpu_info().gpus if gpu.cuda_index == 0), None)


def regime() -> dict[str, Any]:
    """How the first GPU is run at this moment: its clocks, heat, power limit and what slows it down."""
    gpu = first_gpu()
    if gpu is None:
        return {}
    kept = ("clocks_mhz", "clock_settings", "throttled", "temperature_c", "power_limit_w", "shared")
    return {name: value for name, value in gpu.to_dict().items() if name in kept}


def gpu_names() -> list[str]:
    """Names of the GPUs and slices that this process may use, quickly: neither PyTorch nor CUDA is loaded."""
    tree = _device_tree()
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or one that does not fit: `get_gpu_info` says which
        return [tree] if tree else []
    try:
        names = [str(pynvml.nvmlDeviceGetName(handle)) for handle, _, _ in _handles(pynvml)]
    finally:
        pynvml.nvmlShutdown()
    return [tree if tree and catalogue.find(name) is None else name for name in names]


def shared_by_label(label: str | None = None) -> str | None:
    """Why a GPU is shared by the node label under which it was given to this process; nothing where it is not.

    Args:
        label: The label `nvidia.com/gpu.product`; that of the environment unless given.
    """
    label = os.environ.get(LABEL_VARIABLE, "") if label is None else label
    if label.upper().endswith("-SHARED"):
        return f"the node's product label is {label}: time slicing or MPS hands this GPU to several pods"
    return None


def _why_no_nvml(nvml: Any, error: Exception) -> str:
    """What an NVML that does not start means."""
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "the driver was updated and the old one is still loaded; reboot"
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "NVIDIA's driver is installed and not loaded; reboot, or load its kernel module"
    if code == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return (
            "NVIDIA's driver is not installed; if this is a container on a machine with a GPU, give it the GPU "
            "(docker run --gpus all, in Kubernetes the resource nvidia.com/gpu)"
        )
    return f"NVML does not start: {error}"


def _handles(nvml: Any) -> Iterator[tuple[Any, Any, bool]]:
    """Handle of each GPU or MIG slice, of the GPU that it belongs to, and whether it is a slice."""
    for index in range(nvml.nvmlDeviceGetCount()):
        parent = nvml.nvmlDeviceGetHandleByIndex(index)
        mode = _told(nvml, "nvmlDeviceGetMigMode", parent)
        if not mode or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            yield parent, parent, False
            continue
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
            if slice_ := _told(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", parent, number):
                yield slice_, parent, True


_PCIE: Final = {
    "generation": "CurrPcieLinkGeneration",
    "width": "CurrPcieLinkWidth",
    "max_generation": "MaxPcieLinkGeneration",
    "max_width": "MaxPcieLinkWidth",
}


def _info(nvml: Any, index: int, handle: Any, parent: Any, mig: bool, tree: str | None) -> GpuInfo:
    """What the driver and PyTorch tell of a GPU or a slice."""

    def of(device: Any, question: str, *arguments: Any) -> Any:
        return _told(nvml, question, device, *arguments)

    name = str(of(handle, "nvmlDeviceGetName") or "unknown NVIDIA GPU")
    name = tree if tree and catalogue.find(name) is None else name
    uuid = of(handle, "nvmlDeviceGetUUID")
    whole = of(parent, "nvmlDeviceGetMemoryInfo")
    memory = of(handle, "nvmlDeviceGetMemoryInfo")
    capability = of(parent, "nvmlDeviceGetCudaComputeCapability")
    entry = catalogue.identify(name, whole.total / 1e9 if whole else None)
    clock = of(parent, "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM)
    bus = of(parent, "nvmlDeviceGetMemoryBusWidth")
    ecc = of(parent, "nvmlDeviceGetEccMode")
    watts = [
        _scaled(of(parent, question), 1000)
        for question in ("nvmlDeviceGetPowerManagementLimit", "nvmlDeviceGetPowerManagementDefaultLimit")
    ]
    driver = _told(nvml, "nvmlSystemGetDriverVersion")
    cuda = _told(nvml, "nvmlSystemGetCudaDriverVersion")
    reasons = of(parent, "nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # the name in drivers before 535
        reasons = of(parent, "nvmlDeviceGetCurrentClocksThrottleReasons")
    info = GpuInfo(
        index=index,
        name=name,
        id=_slug(name if entry is None or entry.products else entry.key),
        uuid=uuid,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        memory_gib=_scaled(memory and memory.total, 2**30, 2),
        memory_bus_bits=bus,
        memory_clock_mhz=clock,
        bandwidth_gbs=None if mig or not (bus and clock) else round(theoretical_bandwidth(clock, bus), 1),
        driver=driver,
        cuda_driver=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        tensorrt=_tensorrt(),
        mig=_mig_profile(name) if mig else None,
        shared=shared_by_label() or _other_processes(nvml, handle),
        ecc=_ECC.get(ecc[0]) if ecc else None,
        pcie={name: of(parent, f"nvmlDeviceGet{question}") for name, question in _PCIE.items()},
        numa_node=_numa_node(of(parent, "nvmlDeviceGetPciInfo")),
        power_limit_w=watts[0],
        power_limit_default_w=watts[1],
        clocks_mhz={
            "sm": of(parent, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory": of(parent, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "max_sm": of(parent, "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "max_memory": clock,
        },
        temperature_c=of(parent, "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        throttled=None if reasons is None else _words_of(nvml, reasons, THROTTLING),
        clock_settings=() if reasons is None else _words_of(nvml, reasons, SETTINGS),
    )
    return _noted(_with_torch(_with_specification(info, entry), _cuda_index(uuid)))


def theoretical_bandwidth(clock_mhz: float, bus_bits: int) -> float:
    """Memory bandwidth in 10^9 bytes per second of a memory clock as NVML and CUDA count it; see `DATA_RATE`."""
    return clock_mhz * 1e6 * DATA_RATE * bus_bits / 8 / 1e9


def _with_specification(info: GpuInfo, entry: Specification | None) -> GpuInfo:
    """What only the catalogue knows."""
    if entry is None:
        return info
    own = info.bandwidth_gbs or (entry.bandwidth_gbs if not info.mig and not entry.products else None)
    return replace(
        info,
        specification=entry.key,
        compute_capability=info.compute_capability or entry.compute_capability,
        memory_type=entry.memory_type,
        bandwidth_gbs=own,
    )


def _with_torch(info: GpuInfo, cuda_index: int | None) -> GpuInfo:
    """What CUDA tells, which for a slice is the slice's."""
    from_capability = catalogue.tensor_core_types(info.compute_capability) if info.compute_capability else ()
    if cuda_index is None:
        return replace(info, tensor_core_types=from_capability)
    import torch

    properties = torch.cuda.get_device_properties(cuda_index)
    capability = f"{properties.major}.{properties.minor}"
    return replace(
        info,
        cuda_index=cuda_index,
        compute_capability=capability,
        tensor_core_types=catalogue.tensor_core_types(capability),
        sms=properties.multi_processor_count,
        warp_size=properties.warp_size,
        threads_per_sm=properties.max_threads_per_multi_processor,
        shared_memory_per_sm_kib=properties.shared_memory_per_multiprocessor / 1024,
        l2_mib=round(properties.L2_cache_size / 2**20, 2),
        memory_gib=info.memory_gib or round(properties.total_memory / 2**30, 2),
        cuda=torch.version.cuda,
    )


def _noted(info: GpuInfo) -> GpuInfo:
    """The same with what is out of the ordinary."""
    notes = list(info.notes)
    if info.mig:
        notes.append("a slice of a GPU: its bandwidth and power are a share that the driver does not tell")
    if info.sms is None:
        notes.append("PyTorch cannot use it, so what belongs to a multiprocessor is not known")
    if info.specification is None:
        notes.append("the catalogue has no entry for it")
    if info.pcie and (width := info.pcie["width"]) and width < (info.pcie["max_width"] or 0):
        notes.append(f"its PCIe link has {width} lanes of {info.pcie['max_width']}")
    default = info.power_limit_default_w
    if info.power_limit_w and default and info.power_limit_w < default:
        notes.append(f"its power limit is set to {info.power_limit_w:g} W, below the default of {default:g} W")
    return replace(info, notes=tuple(notes))


def _without_nvml(why: str, tree: str | None) -> GpuReport:
    """The GPU of a Jetson whose driver has no NVML; no other machine's can be used without it."""
    if tree is None or (cuda_index := _cuda_index(None)) is None:
        return GpuReport((), why)
    import torch

    properties = torch.cuda.get_device_properties(cuda_index)
    entry = catalogue.identify(tree, properties.total_memory / 1e9)
    info = GpuInfo(0, tree, _slug(entry.key if entry else tree), tensorrt=_tensorrt(), notes=(why,))
    return GpuReport((_noted(_with_torch(_with_specification(info, entry), cuda_index)),))


def _joined(nvml: Any, gpus: Sequence[GpuInfo], handles: Sequence[Any]) -> Iterator[GpuInfo]:
    """The same with what joins each of them to the others."""
    for gpu, handle in zip(gpus, handles, strict=True):
        peers = {
            other.index: link
            for other, far in zip(gpus, handles, strict=True)
            if other is not gpu and (link := _link(nvml, handle, far))
        }
        yield replace(gpu, peers=peers)


def _link(nvml: Any, one: Any, other: Any) -> str | None:
    """What joins two GPUs, in words."""
    nvlink = _told(nvml, "nvmlDeviceGetP2PStatus", one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    if nvlink is not None and nvlink == nvml.NVML_P2P_STATUS_OK:
        return "by NVLink"
    level = _told(nvml, "nvmlDeviceGetTopologyCommonAncestor", one, other)
    return next((words for name, words in _LINKS.items() if getattr(nvml, name) == level), None)


def _other_processes(nvml: Any, handle: Any) -> str | None:
    """Other processes that compute on the GPU now, in words."""
    if os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
        return "this process is a client of CUDA's Multi-Process Service"
    running = _told(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or []
    others = [process for process in running if process.pid != os.getpid()]
    return f"{len(others)} other process{'es' * (len(others) > 1)} on it now" if others else None


def _words_of(nvml: Any, reasons: int, known: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(words for name, words in known.items() if reasons & getattr(nvml, name))


def _told(nvml: Any, question: str, *arguments: Any) -> Any:
    """NVML's answer to one of its functions, or nothing where this GPU or this driver has none."""
    try:
        return getattr(nvml, question)(*arguments)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):  # the second one: the driver is older than nvidia-ml-py
        return None


def _cuda_index(uuid: str | None) -> int | None:
    """PyTorch's number of the GPU with this UUID (its order may be another), of the first one where none is given.

    Nothing where PyTorch cannot use it.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    own = re.sub(r"^(GPU|MIG)-", "", uuid or "")
    for index in range(torch.cuda.device_count()):
        if not own or str(torch.cuda.get_device_properties(index).uuid) == own:
            return index
    return None


def _tensorrt() -> str | None:
    try:
        return str(importlib.import_module("tensorrt").__version__)
    except ImportError:
        return None


def _mig_profile(name: str) -> str | None:
    named = catalogue.find(name)
    return named.mig if named else None


def _numa_node(pci: Any) -> int | None:
    """NUMA node of a PCI device; nothing where there is only one."""
    if pci is None:
        return None
    bus = pci.busId.decode() if isinstance(pci.busId, bytes) else pci.busId
    address = re.sub(r"^[0-9A-Fa-f]{4}(?=[0-9A-Fa-f]{4}:)", "", bus).lower()  # NVML writes the domain with 8 digits
    try:
        node = int((PCI / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _device_tree() -> str | None:
    """Name of a Jetson's board."""
    try:
        model = DEVICE_TREE.read_text().strip("\0\n ")
    except OSError:
        return None
    return model if re.search("jetson|orin|nvidia", model, re.IGNORECASE) else None


def _scaled(value: float | None, by: float, digits: int = 1) -> float | None:
    return None if value is None else round(value / by, digits)


def _slug(name: str) -> str:
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return text if text.startswith(("nvidia", "tesla")) else f"nvidia-{text}"
