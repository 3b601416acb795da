"""From the names of hardware, runtime and precision in a configuration to a device that is here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from yolov8_nas.errors import InputError
from yolov8_nas.hardware.profile import Profile, available_cores, cpu_profile

GPUS: Final[Mapping[str, str]] = {
    "v100": "NVIDIA V100",
    "t4": "NVIDIA T4",
    "a2": "NVIDIA A2",
    "a10": "NVIDIA A10",
    "a10g": "NVIDIA A10G",
    "a16": "NVIDIA A16",
    "a30": "NVIDIA A30",
    "a40": "NVIDIA A40",
    "a100": "NVIDIA A100",
    "rtx3060": "NVIDIA GeForce RTX 3060",
    "rtx3070": "NVIDIA GeForce RTX 3070",
    "rtx3080": "NVIDIA GeForce RTX 3080",
    "rtx3090": "NVIDIA GeForce RTX 3090",
    "rtx4060": "NVIDIA GeForce RTX 4060",
    "rtx4070": "NVIDIA GeForce RTX 4070",
    "rtx4080": "NVIDIA GeForce RTX 4080",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx5090": "NVIDIA GeForce RTX 5090",
    "rtxa6000": "NVIDIA RTX A6000",
    "l4": "NVIDIA L4",
    "l40": "NVIDIA L40",
    "l40s": "NVIDIA L40S",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "gh200": "NVIDIA GH200",
    "b200": "NVIDIA B200",
    "jetsonorinnano": "NVIDIA Jetson Orin Nano",
    "jetsonorinnx": "NVIDIA Jetson Orin NX",
    "jetsonagxorin": "NVIDIA Jetson AGX Orin",
}
"""GPUs by the shortest of the names that people use; `NVIDIA_T4`, `Tesla-T4` and `nvidia-a100-sxm4-40gb` lead there."""

_CPU_NAMES: Final = ("auto", "cpu", "cpu-1t", "cpu-2t")
_GPU_FOLDER: Final = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Target:
    """A device of this machine that networks run on.

    Attributes:
        name: `cpu-<threads>t`.
        kind: `cpu`.
        runtime: `onnxruntime`.
        precision: `fp32`, `int8` or `best`.
        threads: Threads that a network runs on.
    """

    name: str
    kind: str
    runtime: str
    precision: str
    threads: int

    @cached_property
    def profile(self) -> Profile:
        """What the device is."""
        return cpu_profile(self.name, self.threads)

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
    if name not in _CPU_NAMES and not re.fullmatch(r"cpu-\d+t", name):
        raise InputError(_not_here(hardware))
    cores = available_cores()
    threads = cores if name in ("auto", "cpu") else int(name[len("cpu-") : -1])
    if not 1 <= threads <= cores:
        raise InputError(
            f"hardware {hardware!r}: {threads} threads, but this process may use {cores} "
            f"core{'s' * (cores > 1)}; use cpu or cpu-{cores}t"
        )
    if runtime != "onnxruntime":
        why = {
            "tensorrt": "TensorRT runs on NVIDIA GPUs only",
            "torch": "what ships for a CPU is an ONNX file, and only what ships is measured",
        }.get(runtime, "there is no such runtime")
        raise InputError(f"runtime {runtime!r} on hardware {hardware!r}: {why}; use runtime: onnxruntime")
    if precision == "fp16":
        raise InputError(
            f"precision 'fp16' on hardware {hardware!r}: most CPUs have no FP16 arithmetic, and ONNX Runtime converts "
            "to FP32 and back, so nothing is gained; use precision: fp32, int8 or best"
        )
    if precision not in ("fp32", "int8", "best"):
        raise InputError(f"precision {precision!r} is unknown; use fp32, int8 or best")
    return Target(f"cpu-{threads}t", "cpu", runtime, precision, threads)


def _not_here(hardware: str) -> str:
    """Why `hardware`, which is no CPU of this machine, cannot be a target."""
    cpus = ", ".join(_CPU_NAMES)
    gpu = _gpu(hardware)
    if gpu is None:
        known = {name: name for name in _CPU_NAMES} | {key: name.replace(" ", "_") for key, name in GPUS.items()}
        asked = "".join(_words(hardware)) if "cpu" not in hardware.lower() else hardware.lower()
        near = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
        meant = f"Did you mean {', '.join(known[name] for name in near)}? " if near else ""
        return f"hardware {hardware!r} is unknown. {meant}On this machine use {cpus}"
    present = _present_gpus()
    if gpu in map(_gpu, present):
        return (
            f"hardware {hardware!r}: the {GPUS[gpu]} is here, but this version measures CPUs with ONNX Runtime only; "
            f"use {cpus}"
        )
    found = f"its GPU is {', '.join(sorted(set(present)))}" if present else "it has no NVIDIA GPU"
    return f"hardware {hardware!r}: this machine has no {GPUS[gpu]} ({found}); run there, or use {cpus}"


def _gpu(hardware: str) -> str | None:
    """Key in `GPUS` of a GPU's name as people, drivers and clouds write it; nothing where it is none."""
    words = _words(hardware)
    # the rest of a product's name (`sxm4`, `80gb`, `pcie`, `ti`) does not tell another chip of this list
    return next((name for n in range(len(words), 0, -1) if (name := "".join(words[:n])) in GPUS), None)


def _words(hardware: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", hardware.lower())
    return [word for word in words if word not in ("nvidia", "tesla", "geforce", "gpu")]


def _present_gpus() -> list[str]:
    """Product names of this machine's NVIDIA GPUs, as the driver gives them."""
    names = []
    for information in _GPU_FOLDER.glob("*/information"):
        match = re.search(r"^Model:\s*(.+)$", information.read_text(), re.MULTILINE)
        names += [match[1].strip()] if match else []
    return names
