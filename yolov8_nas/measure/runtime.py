"""What runs networks, behind one interface.

A *runtime* opens a file on a device and gives a *runner*, which takes arrays in memory to arrays in memory. A runner
has the two methods of an `onnxruntime.InferenceSession` that this needs, so such a session is one. What is usable on a
machine differs, so each runtime says why it is not where it is not, without being asked to run anything.

This module needs NumPy and ONNX Runtime only: it is part of what measures on devices where nothing else is installed.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import InputError
from yolov8_nas.measure.open_network import Runner, TensorSpec

if TYPE_CHECKING:
    from yolov8_nas.measure.tensorrt import TensorRTRunner

_ERRORS_ONLY: Final = 3


@dataclass(frozen=True)
class Runtime(ABC):
    """What opens files on one kind of device; `find` gives the one of a name.

    Attributes:
        kind: `cpu` or `gpu`: the first GPU that the process sees (CUDA_VISIBLE_DEVICES chooses another).
        precision: `fp32`, `fp16` or `int8`, which a network's file has; where precision does not lie in the file,
            as in checkpoints, the runtime sees to it.
    """

    kind: str = "cpu"
    precision: str = "fp32"

    name: ClassVar[str]
    module: ClassVar[str]
    """What is imported before a network is opened."""
    suffix: ClassVar[str]
    """Of the files that it opens."""
    precisions: ClassVar[Mapping[str, tuple[str, ...]]]
    """What it computes in, by the kinds of device that it runs on."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the software."""

    @abstractmethod
    def why_not(self) -> str | None:
        """Why it cannot be used on this machine, and what would help; nothing where it can."""

    @abstractmethod
    def open(self, file: Path, threads: int, batch: int | None = None) -> Runner:
        """Open a file.

        Args:
            file: The file, with the suffix `suffix`.
            threads: Threads that the network runs on, where it runs on a CPU.
            batch: Images per run, where the file leaves that open.

        Raises:
            InputError: The file is damaged, or this device cannot run it.
        """

    def load(self) -> None:
        """Import the software, so that what that takes is not counted to the first network."""
        importlib.import_module(self.module)

    def to_dict(self) -> dict[str, str]:
        """Name and version, as they stand in a device's profile."""
        return {"name": self.name, "version": self.version}


class OnnxRuntime(Runtime):
    """ONNX Runtime with its own kernels: on a CPU, or CUDA's on a GPU."""

    name = "onnxruntime"
    module = "onnxruntime"
    suffix = ".onnx"
    # On GPUs its kernels for Q/DQ graphs are those of floating point, so INT8 would only cost time.
    precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("fp32", "int8"), "gpu": ("fp32", "fp16")}

    @property
    def version(self) -> str:
        """Version of the package, be it `onnxruntime` or `onnxruntime-gpu`."""
        return str(ort.__version__)

    @property
    def provider(self) -> str:
        """ONNX Runtime's own name of what computes."""
        return "CPUExecutionProvider" if self.kind == "cpu" else "CUDAExecutionProvider"

    def why_not(self) -> str | None:
        """Whether this build of ONNX Runtime has the provider, and on GPUs whether there is a driver."""
        found = ort.get_available_providers()
        if self.provider not in found:
            return (
                f"ONNX Runtime {self.version} is built without {self.provider} (it has {', '.join(found)}); "
                "install onnxruntime-gpu in place of onnxruntime"
            )
        return None if self.kind == "cpu" else _no_driver()

    def open(self, file: Path, threads: int, batch: int | None = None) -> Runner:
        """Open an ONNX file."""
        session = open_session(file, threads, [(self.provider, self._options(file))])
        # What cannot be loaded (a library of CUDA is missing, say) is replaced by the CPU, and nothing is said.
        used = session.get_providers()
        if self.provider not in used:
            raise InputError(
                f"{file}: ONNX Runtime {self.version} does not run it with {self.provider} but with {', '.join(used)}: "
                "a library of CUDA, cuDNN or TensorRT is missing or of a version that this build does not know"
            )
        runner: Runner = session if self.kind == "cpu" else BoundSession(session, batch)
        return runner

    def _options(self, file: Path) -> dict[str, str]:
        # A CUDA graph takes the host's share out of the latency; convolutions are chosen by timing all of them.
        return {} if self.kind == "cpu" else {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}


class OnnxRuntimeTensorRT(OnnxRuntime):
    """ONNX Runtime that hands the network to TensorRT, which builds an engine when a file is first opened."""

    name = "onnxruntime-tensorrt"
    precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {"gpu": ("fp32", "fp16", "int8")}

    @property
    def provider(self) -> str:
        """ONNX Runtime's own name of what computes."""
        return "TensorrtExecutionProvider"

    def _options(self, file: Path) -> dict[str, str]:
        return {
            "trt_cuda_graph_enable": "1",
            "trt_fp16_enable": str(int(self.precision != "fp32")),
            "trt_int8_enable": str(int(self.precision == "int8")),
            "trt_engine_cache_enable": "1",  # built once, and not in each visit
            "trt_engine_cache_path": str(file.with_suffix(".engines")),
        }


class TensorRT(Runtime):
    """TensorRT with engine files of our own."""

    name = "tensorrt"
    module = "tensorrt"
    suffix = ".engine"
    precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {"gpu": ("fp32", "fp16", "int8")}

    @property
    def version(self) -> str:
        """Version of TensorRT's library."""
        from yolov8_nas.measure.tensorrt import bindings

        return str(bindings().__version__)

    def why_not(self) -> str | None:
        """What is missing of TensorRT, CUDA and a GPU."""
        from yolov8_nas.measure.tensorrt import missing

        return " and ".join(missing()) or None

    def open(self, file: Path, threads: int, batch: int | None = None) -> Runner:
        """Open an engine."""
        runner = self._runner(file)
        if batch is None or all(spec.shape[0] == batch for spec in runner.get_inputs()):
            return runner
        return self._runner(file, {spec.name: (batch, *spec.shape[1:]) for spec in runner.get_inputs()})

    def _runner(self, file: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> TensorRTRunner:
        from yolov8_nas.measure.tensorrt import TensorRTRunner

        return TensorRTRunner(file, shapes=shapes)


class TensorRTForRTX(TensorRT):
    """TensorRT for RTX with engine files of our own, built ahead of time; see `measure.tensorrt_rtx`."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"

    @property
    def version(self) -> str:
        """Version of the compiler."""
        from yolov8_nas.measure.tensorrt_rtx import compiler

        return str(compiler().__version__)

    def why_not(self) -> str | None:
        """What is missing of the compiler, CUDA and a GPU that it supports in this precision."""
        from yolov8_nas.measure.tensorrt_rtx import missing

        return " and ".join(missing(self.precision)) or None

    def load(self) -> None:
        """Import its bindings, which go by another name where they came alone."""
        from yolov8_nas.measure.tensorrt_rtx import compiler

        compiler()

    def _runner(self, file: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> TensorRTRunner:
        from yolov8_nas.measure.tensorrt_rtx import RtxRunner

        return RtxRunner(file, shapes=shapes)


class Torch(Runtime):
    """PyTorch with checkpoints, run as Ultralytics runs them: eagerly on a CPU, from a CUDA graph on a GPU."""

    name = "torch"
    module = "yolov8_nas.measure.torch_runner"
    suffix = ".pt"
    precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {"cpu": ("fp32",), "gpu": ("fp32", "fp16")}

    @property
    def version(self) -> str:
        """Version of the package."""
        return importlib.metadata.version("torch")

    def why_not(self) -> str | None:
        """Whether PyTorch is installed, and on GPUs whether it sees one."""
        if importlib.util.find_spec("torch") is None:
            return "PyTorch is not installed; install torch and ultralytics"
        if self.kind == "cpu":
            return None
        import torch

        if torch.version.cuda is None:
            return f"PyTorch {self.version} is built for CPUs only; install a build for CUDA"
        return None if torch.cuda.is_available() else "PyTorch sees no NVIDIA GPU; check the driver with nvidia-smi"

    def open(self, file: Path, threads: int, batch: int | None = None) -> Runner:
        """Open a checkpoint."""
        from yolov8_nas.measure.torch_runner import open_checkpoint

        return open_checkpoint(file, self.kind, threads=threads, batch=batch or 1, half=self.precision == "fp16")


RUNTIMES: Final[Mapping[str, type[Runtime]]] = {
    runtime.name: runtime for runtime in (OnnxRuntime, OnnxRuntimeTensorRT, Torch, TensorRT, TensorRTForRTX)
}
"""Every runtime by its name."""

DEFAULT: Final = OnnxRuntime()
"""ONNX Runtime on a CPU, which is usable wherever this package is."""


def find(name: str, kind: str = "cpu", precision: str = "fp32") -> Runtime:
    """The runtime of a name on a kind of device, whether or not it is usable here.

    Args:
        name: A key of `RUNTIMES`.
        kind: `cpu` or `gpu`.
        precision: `fp32`, `fp16` or `int8`.

    Raises:
        InputError: There is no such runtime, it does not run on such devices, or it does not compute so there.
    """
    if name not in RUNTIMES:
        raise InputError(f"runtime {name!r}: there is no such runtime; use one of {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]
    if kind not in runtime.precisions:
        others = [other for other, known in RUNTIMES.items() if kind in known.precisions]
        raise InputError(f"runtime {name!r} runs on NVIDIA GPUs only; use {' or '.join(others)}")
    if precision not in runtime.precisions[kind]:
        raise InputError(
            f"precision {precision!r}: runtime {name!r} has no arithmetic of its own for it on a {kind}; "
            f"use {' or '.join(runtime.precisions[kind])}"
        )
    return runtime(kind, precision)


def of_profile(profile: Profile, precision: str = "fp32") -> Runtime:
    """The runtime of the device that hw-probe measured.

    Args:
        profile: The device.
        precision: `fp32`, `fp16` or `int8`.
    """
    return find(profile.runtime["name"], profile.kind, precision)


def usable(kind: str = "cpu") -> dict[str, str | None]:
    """Each runtime for a kind of device, and why it is not usable here (nothing where it is)."""
    return {name: known(kind).why_not() for name, known in RUNTIMES.items() if kind in known.precisions}


def open_session(
    file: Path, threads: int, providers: Sequence[Any] = ("CPUExecutionProvider",), trace: Path | None = None
) -> Any:
    """Open an ONNX file as an `onnxruntime.InferenceSession`.

    Everything is ONNX Runtime's default except two settings. The number of threads is the target's. And a session's
    threads stop spinning when a run ends: by default they go on for some 20 ms, which is right for a process that runs
    one network, and takes a core from the next network where several are timed in turn (with two threads on two cores
    medians rise two- to threefold). Within a run they spin as they do by default, so a network that runs alone is as
    fast as in a default session.

    Args:
        file: The file.
        threads: Threads that it runs on.
        providers: What computes, as ONNX Runtime names it.
        trace: Where the times of its operators go: the beginning of the file's name. They cost time themselves.

    Raises:
        InputError: ONNX Runtime cannot open the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    try:
        return ort.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # the classes of onnxruntime's errors have no common base of their own
        raise InputError(f"{file}: ONNX Runtime {ort.__version__} cannot open it: {error}") from None


class BoundSession:
    """A session on a GPU whose tensors keep their place there, as a CUDA graph wants it.

    Args:
        session: An `onnxruntime.InferenceSession` on the GPU.
        batch: Images per run, where the file leaves that open.

    Raises:
        InputError: A dimension other than the batch is not fixed.
    """

    def __init__(self, session: Any, batch: int | None = None) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._specs = [TensorSpec(v.name, _fixed(v.shape, batch), v.type) for v in session.get_inputs()]
        for spec in self._specs:
            self._inputs[spec.name] = self._on_gpu(spec)
            self._binding.bind_ortvalue_input(spec.name, self._inputs[spec.name])
        for value in session.get_outputs():
            spec = TensorSpec(value.name, _fixed(value.shape, batch), value.type)
            self._outputs[spec.name] = self._on_gpu(spec)
            self._binding.bind_ortvalue_output(spec.name, self._outputs[spec.name])

    def get_inputs(self) -> list[TensorSpec]:
        """Name, shape and type of the inputs."""
        return self._specs

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, NDArray[Any]], /) -> list[NDArray[Any]]:
        """Copy to the GPU, run, and copy back."""
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(input_feed[name]))
        self._session.run_with_iobinding(self._binding)
        return [self._outputs[name].numpy() for name in output_names or self._outputs]

    @staticmethod
    def _on_gpu(spec: TensorSpec) -> Any:
        if not all(isinstance(size, int) for size in spec.shape) or spec.type not in _NUMPY:
            raise InputError(
                f"{spec.name!r} is {spec.type} {spec.shape}: only tensors with sizes known beforehand can be measured; "
                "export with a static shape"
            )
        return ort.OrtValue.ortvalue_from_shape_and_type(spec.shape, _NUMPY[spec.type], "cuda", 0)


_NUMPY: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def random_feed(runner: Runner, seed: int = 0, batch: int | None = None) -> dict[str, NDArray[np.float32]]:
    """A network's inputs filled with the same random numbers in 0..1 on every call.

    Args:
        runner: The network.
        seed: Seed of the numbers.
        batch: Images, where the network leaves that open.

    Raises:
        InputError: An input has a dimension that is not fixed, or is not of 32-bit floats.
    """
    rng = np.random.default_rng(seed)
    feed = {}
    for value in runner.get_inputs():
        shape = _fixed(value.shape, batch)
        if value.type != "tensor(float)" or not all(isinstance(size, int) for size in shape):
            raise InputError(
                f"input {value.name!r} is {value.type} {value.shape}: "
                "only networks with fixed float32 inputs can be measured; export with a static shape"
            )
        feed[value.name] = rng.random(shape, dtype=np.float32)
    return feed


def _fixed(shape: Sequence[Any], batch: int | None) -> list[Any]:
    """A shape with the batch in place of a first dimension that is left open."""
    first, *rest = shape
    return [batch if batch is not None and not isinstance(first, int) else first, *rest]


def _no_driver() -> str | None:
    """Why there is no GPU as far as the driver's own library tells; nothing where there is one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1); install it, and check it with nvidia-smi"
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "NVIDIA's driver sees no GPU here; check it with nvidia-smi"
    return None
