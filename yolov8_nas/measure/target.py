"""From the names of hardware, runtime and precision in a configuration to a device that is here."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from yolov8_nas.device import catalogue, gpu, profile
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import InputError
from yolov8_nas.measure import tensorrt_rtx
from yolov8_nas.measure.runtime import find

_CPU_NAMES: Final = ("auto", "cpu", "cpu-1t", "cpu-2t")


@dataclass(frozen=True)
class Target:
    """A device of this machine that networks run on.

    Attributes:
        name: `cpu-<threads>t`, or the id of a GPU, for example `tesla-t4`.
        kind: `cpu` or `gpu`; `gpu` is the one that CUDA numbers 0.
        runtime: Name of a runtime of `measure.runtime`.
        precision: `fp32`, `fp16`, `int8` or `best`.
        threads: Threads that a network runs on; 1 on a GPU.
    """

    name: str
    kind: str
    runtime: str
    precision: str
    threads: int

    @cached_property
    def profile(self) -> Profile:
        """What the device is.

        Raises:
            InputError: It is a GPU, and not here any more.
        """
        if self.kind == "gpu":
            found = gpu.first_gpu()
            if found is None or found.id != self.name:
                raise InputError(
                    f"{self.name} is not the GPU that CUDA numbers 0 here ({found.id if found else 'there is none'}); "
                    "run on the machine that it is in"
                )
            return profile.gpu_profile(found, find(self.runtime, self.kind).to_dict())
        return replace(profile.cpu_profile(self.name, self.threads), runtime=find(self.runtime, self.kind).to_dict())

    def regime(self) -> dict[str, Any]:
        """How its clocks are run at this moment; see `profile.regime` and `gpu.regime`."""
        return gpu.regime() if self.kind == "gpu" else profile.regime()

    @property
    def id(self) -> str:
        """What identifies the hardware in registries, for example `cpu-amd-epyc-9354-2t`."""
        return self.profile.id


def resolve(hardware: str, runtime: str = "onnxruntime", precision: str = "fp32") -> Target:
    """The device that a configuration's names mean on this machine.

    `auto` and `cpu` are this machine's CPU with all cores that the process may use, `cpu-<n>t` with `n` threads.

    Raises:
        InputError: The hardware is unknown or not here, or the runtime or the precision is not usable on it.
    """
    name = hardware.strip().lower()
    if not names_cpu(name):
        return _gpu_target(hardware, runtime, precision)
    cores = profile.available_cores()
    threads = named_threads(name) or (cores if name in ("auto", "cpu") else 0)
    if not 1 <= threads <= cores:
        raise InputError(
            f"hardware {hardware!r}: {threads} threads, but this process may use {cores} "
            f"core{'s' * (cores > 1)}; use cpu or cpu-{cores}t"
        )
    if precision == "fp16":
        raise InputError(
            f"precision 'fp16' on hardware {hardware!r}: most CPUs have no FP16 arithmetic, and ONNX Runtime converts "
            "to FP32 and back, so nothing is gained; use precision: fp32, int8 or best"
        )
    if precision not in ("fp32", "int8", "best"):
        raise InputError(f"precision {precision!r} is unknown; use fp32, int8 or best")
    if why_not := find(runtime, "cpu", "int8" if precision == "best" else precision).why_not():
        raise InputError(f"runtime {runtime!r} on hardware {hardware!r}: {why_not}")
    return Target(f"cpu-{threads}t", "cpu", runtime, precision, threads)


def require_runtime_supports(hardware: str, runtime: str, precision: str) -> None:
    """See that a runtime supports a device, as far as names tell: nothing has to be here.

    Raises:
        InputError: It does not; what would do is named.
    """
    if runtime == tensorrt_rtx.RUNTIME and not names_cpu(hardware):
        tensorrt_rtx.require_supported(hardware, precision)


def names_cpu(hardware: str) -> bool:
    """Whether a configuration's name means a CPU, be it this machine's or a cluster node's."""
    name = hardware.strip().lower()
    return name in _CPU_NAMES or named_threads(name) is not None


def named_threads(hardware: str) -> int | None:
    """The number of threads in a CPU's name, `cpu-<n>t`; nothing where it names none."""
    found = re.fullmatch(r"cpu-(\d+)t", hardware.strip().lower())
    return int(found[1]) if found else None


def _gpu_target(hardware: str, runtime: str, precision: str) -> Target:
    """A GPU of this machine on which networks can run."""
    require_runtime_supports(hardware, runtime, precision)
    name = find_gpu(hardware)
    if why_not := find(runtime, "gpu", "int8" if precision == "best" else precision).why_not():
        raise InputError(f"runtime {runtime!r} on hardware {hardware!r}: {why_not}")
    first = gpu.first_gpu()
    if first is None or first.name != name:
        raise InputError(
            f"hardware {hardware!r}: the {name} is here, but networks run on the GPU that CUDA numbers 0, which is "
            f"{first.name if first else 'none'}; set CUDA_VISIBLE_DEVICES to the {name}"
        )
    return Target(first.id, "gpu", runtime, precision, 1)


def find_gpu(hardware: str) -> str:
    """The GPU of this machine that a configuration's name means, by the name that the driver gives it.

    Raises:
        InputError: The name is unknown, or means a GPU that is not here, a whole one where there are slices or a slice
            where there is none, or one that several pods share, on which latency is not its own.
    """
    asked = catalogue.find(hardware)
    shared = gpu.shared_by_label(hardware) or gpu.shared_by_label()
    if shared:
        raise InputError(
            f"hardware {hardware!r}: {shared}, so its latency depends on what they do; use a node that gives it to one "
            "pod alone"
        )
    present = gpu.gpu_names()
    for name in present:
        if name.replace(" ", "-").lower() == re.sub(r"[ _]", "-", hardware.strip()).lower():
            return name  # whether or not the catalogue has it
    if asked is None:
        raise InputError(_unknown(hardware))
    own = {name: found for name in present if (found := catalogue.find(name))}
    family = [name for name, found in own.items() if set(found.specifications) & set(asked.specifications)]
    for name in family:
        if own[name].mig == asked.mig:
            return name
    cpus = ", ".join(_CPU_NAMES)
    if family:
        raise InputError(
            f"hardware {hardware!r}: here it is {' and '.join(sorted(set(family)))}, which is not the same part of the "
            "GPU; name that one, or cut the GPU in another way (nvidia-smi mig)"
        )
    found_here = f"its GPU is {', '.join(sorted(set(present)))}" if present else "it has no NVIDIA GPU"
    raise InputError(f"hardware {hardware!r}: this machine has none ({found_here}); run there, or use {cpus}")


def _unknown(hardware: str) -> str:
    near = catalogue.similar(hardware)
    if "cpu" in hardware.lower():
        near = difflib.get_close_matches(hardware.lower(), _CPU_NAMES, n=3, cutoff=0.5)
    meant = f"Did you mean {', '.join(near)}? " if near else ""
    return f"hardware {hardware!r} is unknown. {meant}On this machine use {', '.join(_CPU_NAMES)}"
