"""TensorRT for RTX: NVIDIA's compiler that builds engines ahead of time, on any machine, and finishes them on the GPU.

Everything in which it differs from TensorRT stands here and in `export/tensorrt_rtx.py`:

* It is a package of its own, `tensorrt_rtx`, whose bindings come as `tensorrt_rtx_bindings`; its versions begin with 1.
  It builds without a GPU and without a driver. To open an engine takes both.
* An engine is for compute capabilities and not for one GPU: by default for all of `PORTABLE`. Kernels are compiled just
  in time when it is first run, and kept in a *runtime cache*, which belongs to the GPU and the driver.
* There is neither a timing cache nor a choice by timings, so one build is as good as two.
* It has no kernel for suppression, neither the plugin EfficientNMS_TRT nor ONNX's NonMaxSuppression: overlapping boxes
  are suppressed on the host, as everything here is measured, or the head is NMS-free.

Which GPUs it supports is its documentation's to say (Support Matrix, hardware and precision). The enumeration of the
installed version tells which capabilities it compiles for, and these are more: 8.0, an A100's, is there and is not in
the matrix.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.device import catalogue
from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write, write_json
from yolov8_nas.measure.engine_file import kernels_path, kernels_record_path
from yolov8_nas.measure.tensorrt import TensorRTRunner

if TYPE_CHECKING:
    import tensorrt_rtx as rtx

RUNTIME: Final = "tensorrt-rtx"
"""Its name in a run configuration."""

MODULES: Final = ("tensorrt_rtx", "tensorrt_rtx_bindings")
"""NVIDIA's package, and its bindings alone, which are enough."""

MAJOR: Final = 1

INSTALL: Final = "pip install 'yolov8-nas[rtx]'"

SUPPORTED: Final[Mapping[str, tuple[str, ...]]] = {
    "7.5": ("fp32", "fp16"),
    "8.6": ("fp32", "fp16", "int8"),
    "8.9": ("fp32", "fp16", "int8"),
    "12.0": ("fp32", "fp16", "int8"),
    "12.1": ("fp32", "fp16", "int8"),
}
"""Precisions by compute capability: the support matrices of its documentation, of versions 1.0, 1.1, 1.4 and 1.5, which
agree but for `SINCE`. INT8 stands there for some operations only (weights of matrix products), and for none on 7.5;
that it reads Q/DQ says nothing about its speed."""

SINCE: Final[Mapping[str, tuple[int, int]]] = {"12.1": (1, 5)}
"""The version from which on a compute capability stands in the matrix, where it is not the first."""

READ: Final = (1, 5)
"""The newest version whose matrix was read. What a newer one has beyond it is not known here, and refused."""

PORTABLE: Final = ("8.6", "8.9", "12.0")
"""What an engine is for unless it is built for something else."""


def missing_to_build() -> list[str]:
    """What keeps this machine from building engines ahead of time, in words; nothing where it can. No GPU is needed."""
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            version = str(importlib.import_module(name).__version__)
        except (ImportError, OSError) as error:
            return [f"TensorRT for RTX is installed, but its libraries cannot be loaded ({error})"]
        if not version.startswith(f"{MAJOR}."):
            return [f"TensorRT for RTX {version} is installed, and version {MAJOR} is known here"]
        return []
    return [f"TensorRT for RTX is not installed here ({INSTALL})"]


def missing(precision: str = "fp32") -> list[str]:
    """What keeps this machine from building *and* running engines, in words; nothing where it can.

    Args:
        precision: Of the engines.
    """
    import torch

    lacking = missing_to_build()
    if not torch.cuda.is_available():
        return [*lacking, "this machine has no NVIDIA GPU that PyTorch can use"]
    if why_not := refusal(*_gpu(), precision):
        lacking.append(why_not)
    return lacking


def _gpu() -> tuple[str, str]:
    """Name and compute capability of the current GPU."""
    import torch

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return gpu.name, f"{gpu.major}.{gpu.minor}"


def capability_here() -> str:
    """The compute capability of the current GPU, on which an engine is to run.

    Raises:
        InputError: There is no such GPU here.
    """
    bindings()
    return _gpu()[1]


def compiler() -> Any:
    """Its Python module, for building.

    Raises:
        InputError: It is not here.
    """
    if lacking := missing_to_build():
        raise InputError(f"no engine can be built: {' and '.join(lacking)}; or use runtime: onnxruntime")
    return importlib.import_module(next(name for name in MODULES if importlib.util.find_spec(name)))


def bindings() -> Any:
    """Its Python module, for running.

    Raises:
        InputError: This machine cannot run engines; what it lacks is named.
    """
    if lacking := missing():
        raise InputError(
            f"no engine of TensorRT for RTX can be used: {' and '.join(lacking)}; use runtime: onnxruntime"
        )
    return compiler()


def supported() -> dict[str, tuple[str, ...]]:
    """Precisions by compute capability: those of the installed version, or without one of the newest that was read."""
    version = None if missing_to_build() else _numbers(compiler().__version__)
    return {name: known for name, known in SUPPORTED.items() if not version or version >= SINCE.get(name, (MAJOR, 0))}


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor version."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def told_of_table() -> str:
    """Which GPUs the installed version supports, in words, and how far that is known."""
    version, table = compiler().__version__, ", ".join(supported())
    if _numbers(version) <= READ:
        return f"compute capability {table}"
    read = ".".join(map(str, READ))
    return f"compute capability {table}, by the support matrix of {read}, the newest that is known here"


def refusal(gpu: str, capability: str, precision: str = "fp32") -> str | None:
    """Why a GPU is not supported in a precision, with what would do; nothing where it is.

    Args:
        gpu: Its name.
        capability: Its compute capability, for example `8.6`.
        precision: `fp32`, `fp16`, `int8` or `best`.
    """
    table = supported()
    known = table.get(capability)
    if known is None:
        return (
            f"TensorRT for RTX does not support {gpu} (compute capability {capability}; it supports "
            f"{', '.join(table)}); use runtime: tensorrt or onnxruntime"
        )
    if precision in ("int8", "best") and "int8" not in known:
        return (
            f"TensorRT for RTX has no INT8 on {gpu} (compute capability {capability}); use precision: "
            f"{' or '.join(known)}, or runtime: tensorrt"
        )
    return None


def require_supported(hardware: str, precision: str) -> None:
    """See that TensorRT for RTX supports a device of the catalogue, before anyone looks for it.

    Args:
        hardware: Its name in a run configuration. One that the catalogue lacks is looked at where it is.
        precision: As asked for.

    Raises:
        InputError: It does not.
    """
    found = catalogue.find(hardware)
    for one in found.specifications if found else ():
        if why_not := refusal(one.products[0], one.compute_capability, precision):
            raise InputError(f"runtime {RUNTIME!r} on hardware {hardware!r}: {why_not}")


def capabilities(hardware: str | None) -> tuple[str, ...]:
    """What an engine for a device has to be built for.

    Args:
        hardware: A name of the catalogue, or a compute capability; nothing for the portable ones.

    Raises:
        InputError: It is neither, or not supported.
    """
    if hardware is None:
        return PORTABLE
    if hardware in supported():
        return (hardware,)
    named = catalogue.named(hardware)
    require_supported(hardware, "fp32")
    return tuple(dict.fromkeys(one.compute_capability for one in named.specifications))


def of_capability(trt: Any, capability: str) -> rtx.ComputeCapability:
    """The enumeration's member of a compute capability.

    Raises:
        InputError: The installed version has none.
    """
    name = f"SM{capability.replace('.', '')}"
    known = trt.ComputeCapability.__members__
    if name not in known:
        raise InputError(
            f"TensorRT for RTX {trt.__version__} compiles for {', '.join(sorted(known))}, not for compute capability "
            f"{capability}; install another version"
        )
    return known[name]


class RtxRunner(TensorRTRunner):
    """An engine of TensorRT for RTX opened for measuring; see `TensorRTRunner`.

    Kernels are compiled in the first launch, which is none of those that are timed, and kept beside the engine: the
    next process need not compile them again. No device has run this yet.
    """

    def __init__(self, engine: Path, *, shapes: Mapping[str, Sequence[int]] | None = None, graph: bool = True) -> None:
        fresh = not kernels_path(engine).is_file()
        start = time.perf_counter()
        super().__init__(engine, shapes=shapes, graph=graph)
        self.compiled_s = time.perf_counter() - start
        """Seconds until it could be timed: opening it, and compiling what was not kept."""
        atomic_write(kernels_path(engine), bytes(self._cache.serialize()))
        if fresh:
            write_json(kernels_record_path(engine), {"seconds": self.compiled_s})

    def _bindings(self) -> Any:
        return bindings()

    def _open_context(self, engine: Path) -> Any:
        config = self._engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        kept = kernels_path(engine)
        if kept.is_file():
            self._cache.deserialize(kept.read_bytes())  # of another GPU or driver it is refused, and made anew
        if not config.set_runtime_cache(self._cache):
            raise InputError(f"{engine}: TensorRT for RTX takes no runtime cache; install another version")
        return self._engine.create_execution_context(runtime_config=config)
