"""Energy counters: NVML's of NVIDIA GPUs, and RAPL's of Intel and AMD CPUs.

A counter tells the energy of the whole device between two moments: of a GPU's board, of a CPU's packages and their
memory. What the device takes when it does nothing is not subtracted, and neither is what other processes make it do,
so it means something only while the host is held for measuring.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

RAPL: Final = Path("/sys/class/powercap")

_SAMPLING_S: Final = 0.02
"""Seconds between two samples of a GPU's power."""


class NoCounterError(Exception):
    """The device has no energy counter that this process can read; the message says why, and what would help."""


class Counter(Protocol):
    """Counts the energy of a device.

    Attributes:
        name: What is read, for the record.
        shortest_s: How long counting has to go on before the counter's own steps are at most 2 to 5% of the result.
    """

    @property
    def name(self) -> str: ...

    @property
    def shortest_s(self) -> float: ...

    def start(self) -> None:
        """Begin to count."""

    def stop(self) -> float:
        """Joules since `start`."""


def open_counter(kind: str, index: int | None = None) -> Counter:
    """The energy counter of a device.

    Args:
        kind: `cpu` or `gpu`.
        index: Which GPU, in the driver's order; unless given, the one that CUDA numbers 0, on which networks run.

    Raises:
        NoCounterError: There is none that can be read here.
    """
    return _nvml(index) if kind == "gpu" else Rapl.open()


def why_not(kind: str) -> str | None:
    """Why a device's energy cannot be counted here; nothing where it can."""
    try:
        open_counter(kind)
    except NoCounterError as error:
        return str(error)
    return None


@dataclass
class Rapl:
    """Running Average Power Limit: what Linux counts of CPU packages and, where it is apart, of their memory.

    Source: Documentation/power/powercap/powercap.rst of the Linux kernel. `energy_uj` counts microjoules, begins again
    at zero after `max_energy_range_uj` (after minutes at the soonest, so at most once in a visit), and is brought up to
    date about every millisecond.

    Attributes:
        zones: Folders of the zones that are summed.
    """

    zones: tuple[Path, ...]
    shortest_s: float = 0.05
    _before: list[int] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, root: Path | None = None) -> Rapl:
        """The counter of this machine's CPUs.

        Args:
            root: Where the kernel shows its zones.

        Raises:
            NoCounterError: There are none, or only root may read them.
        """
        root = root or RAPL
        zones = []
        for zone in sorted(root.glob("intel-rapl:*")):
            name = _text(zone / "name")
            # `core` and `uncore` are parts of a package and `psys` holds it; memory counts apart from all of them
            if name.startswith("package") or name == "dram":
                zones.append(zone)
        if not zones:
            raise NoCounterError(
                f"{root} has no RAPL zone: the CPU counts no energy, or this is a virtual machine or a container that "
                "hides the counter; run on the machine itself"
            )
        counter = cls(tuple(zones))
        try:
            counter.start()
        except OSError as error:
            raise NoCounterError(
                f"{error.filename}: cannot be read ({error.strerror}); Linux lets only root read it, so let root make "
                "it readable (chmod a+r) or run as root"
            ) from None
        return counter

    @property
    def name(self) -> str:
        """The zones by their names."""
        return "RAPL " + ", ".join(_text(zone / "name") for zone in self.zones)

    def start(self) -> None:
        """Begin to count."""
        self._before = self._read()

    def stop(self) -> float:
        """Joules since `start`."""
        joules = 0.0
        for zone, before, after in zip(self.zones, self._before, self._read(), strict=True):
            wrapped = int(_text(zone / "max_energy_range_uj")) if after < before else 0
            joules += (after - before + wrapped) / 1e6
        return joules

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _nvml(index: int | None) -> Counter:
    """The counter of an NVIDIA GPU: the driver's own of energy where the chip has it, else its power, sampled."""
    try:
        import pynvml
    except ImportError:
        raise NoCounterError("nvidia-ml-py is not installed, so NVML cannot be asked; install it") from None
    named = "the GPU that CUDA numbers 0" if index is None else f"GPU {index}"
    try:
        pynvml.nvmlInit()
        if index is None and (own := cuda_uuid()):
            device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{own}")
        else:
            device = pynvml.nvmlDeviceGetHandleByIndex(index or 0)
    except pynvml.NVMLError as error:
        raise NoCounterError(f"NVML tells nothing of {named}: {error}; install NVIDIA's driver") from None
    for counter in (NvmlEnergy(pynvml, device), NvmlPower(pynvml, device)):
        try:
            counter.start()
            counter.stop()
        except pynvml.NVMLError:
            continue
        return counter
    raise NoCounterError(f"{named} tells neither energy nor power through NVML; MIG slices and old chips do not")


def cuda_uuid() -> str | None:
    """UUID of the GPU that CUDA numbers 0 in this process; nothing without a driver.

    The driver's own order is another one (CUDA_DEVICE_ORDER, CUDA_VISIBLE_DEVICES). Its library is asked itself, so
    that PyTorch is not needed.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetUuid_v2(found, device):
        return None
    return str(uuid.UUID(bytes=bytes(found)))


@dataclass
class NvmlEnergy:
    """The driver's counter of a GPU's energy in mJ since it was loaded (Volta and later).

    Attributes:
        nvml: The module `pynvml`, initialised.
        device: Its handle of the GPU.
    """

    nvml: Any
    device: Any
    name: str = "NVML total energy"
    shortest_s: float = 2.0  # brought up to date every 20 to 100 ms
    _before: int = field(default=0, repr=False)

    def start(self) -> None:
        """Begin to count."""
        self._before = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device)

    def stop(self) -> float:
        """Joules since `start`."""
        now: int = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device)
        return (now - self._before) / 1e3


class NvmlPower:
    """A GPU's power, sampled in a thread and summed by the trapezoidal rule; for chips without the counter.

    Args:
        nvml: The module `pynvml`, initialised.
        device: Its handle of the GPU.
    """

    name = "NVML power, sampled"
    shortest_s = 2.0

    def __init__(self, nvml: Any, device: Any) -> None:
        self.nvml = nvml
        self.device = device
        self._samples: list[tuple[float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread()

    def start(self) -> None:
        """Begin to count."""
        self._samples, self._ended = [self._sample()], threading.Event()
        self._thread = threading.Thread(target=self._watch, name="power", daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Joules since `start`."""
        self._ended.set()
        self._thread.join()
        self._samples.append(self._sample())
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(self._samples))

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLING_S):
            self._samples.append(self._sample())

    def _sample(self) -> tuple[float, float]:
        """Seconds and watts."""
        return time.perf_counter(), self.nvml.nvmlDeviceGetPowerUsage(self.device) / 1e3
