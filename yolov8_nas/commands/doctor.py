"""Checks an installation: the versions that go together, and what the machine has."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

import psutil
from packaging.requirements import Requirement

_GIB: Final = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        ok: Whether runs can work with it as it is.
        what: What was looked at.
        found: What was found, and where it is not ok, what to do.
    """

    ok: bool
    what: str
    found: str


def findings() -> list[Finding]:
    """Look at Python, packages, memory, disk and devices."""
    return [
        _python(),
        *_packages(),
        _memory(),
        _disk(),
        _temporary_folder(),
        _cpu(),
        *_gpus(),
        _tensorrt(),
        _tensorrt_rtx(),
    ]


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info < (3, 13)
    return Finding(ok, "Python", platform.python_version() + ("" if ok else ": use 3.11 or 3.12"))


def _packages() -> list[Finding]:
    """Every requirement that is missing or of a version that does not go together with the others."""
    faults = []
    pinned = []
    for line in requires("yolov8-nas") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            faults.append(Finding(False, requirement.name, f"{found}; install {requirement}"))
        elif any(specifier.operator == "==" for specifier in requirement.specifier):
            pinned.append(f"{requirement.name} {found}")
    return [Finding(True, "packages", ", ".join(pinned)), *faults]


def _memory() -> Finding:
    free = psutil.virtual_memory().available / _GIB
    return Finding(free >= 4, "memory", f"{free:.1f} GiB free" + ("" if free >= 4 else "; the demo takes up to 4 GiB"))


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    return Finding(free >= 2, "disk", f"{free:.1f} GiB free here" + ("" if free >= 2 else "; make room for a run"))


def _temporary_folder() -> Finding:
    folder = Path(tempfile.gettempdir())
    ok = os.access(folder, os.W_OK)
    return Finding(ok, "temporary folder", f"{folder}" + ("" if ok else " is not writable; set TMPDIR"))


def _cpu() -> Finding:
    from yolov8_nas.device.profile import available_cores, cpu_model

    cores = available_cores()
    return Finding(True, "CPU", f"{cpu_model()}, {cores} core{'s' * (cores > 1)} usable (target cpu-{cores}t)")


def _gpus() -> list[Finding]:
    from yolov8_nas.device.gpu import get_gpu_info

    report = get_gpu_info()
    if report.none:
        return [Finding(True, "GPU", f"none: {report.none}")]
    rows = []
    for gpu in report.gpus:
        told = [gpu.name, f"target {gpu.specification}" if gpu.specification else "not in the catalogue"]
        told += [gpu.shared] if gpu.shared else []
        told += gpu.throttled or ()
        usable = gpu.cuda_index is not None
        told += [] if usable else ["PyTorch cannot use it; install the build of PyTorch for the driver's CUDA"]
        rows.append(Finding(usable, f"GPU {gpu.index}", "; ".join(told)))
    return rows


def _tensorrt() -> Finding:
    from yolov8_nas.measure.tensorrt import bindings, missing

    if lacking := missing():
        return Finding(True, "TensorRT", f"not available: {' and '.join(lacking)}; CPUs with ONNX Runtime do without")
    return Finding(True, "TensorRT", f"{bindings().__version__}: engines can be built and run here")


def _tensorrt_rtx() -> Finding:
    from yolov8_nas.measure.tensorrt_rtx import compiler, missing, missing_to_build, told_of_table

    what = "TensorRT for RTX"
    if lacking := missing_to_build():
        return Finding(True, what, f"not available: {' and '.join(lacking)}; only runtime: tensorrt-rtx needs it")
    version, table = compiler().__version__, told_of_table()
    if lacking := missing():
        why = " and ".join(lacking)
        told = f"{version}: engines can be built here, for GPUs elsewhere ({table}); none can be run: {why}"
        return Finding(True, what, told)
    return Finding(True, what, f"{version}: engines can be built and run here ({table})")
