"""TensorRT: whether it is here, and how an engine is opened for measuring.

The Python bindings are reached through `bindings` alone, and everything that they are asked for is named as an
attribute of `trt` or of an object annotated with its class. So the tests can hold each name and each call against the
real bindings of TensorRT 10 and 11, without TensorRT.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.errors import InputError
from yolov8_nas.measure.cuda_events import event_times
from yolov8_nas.measure.engine_file import RTX, TENSORRT, EngineManifest, GpuEnvironment, read_manifest, split_header
from yolov8_nas.measure.open_network import TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt
    import torch

VERSIONS: Final = (10, 11)
"""Major versions of TensorRT that engines are built with: both build strongly typed networks from the same ONNX."""

_NO_DRIVER: Final = "CUDA driver version is insufficient"
"""What CUDA says where there is no driver, or one that is too old."""


def missing() -> list[str]:
    """What keeps this machine from building and running engines, in words; nothing where it can."""
    import torch

    lacking = []
    try:
        found = str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        lacking.append(_why_no_import(error))
    else:
        if major(found) not in VERSIONS:
            lacking.append(f"TensorRT {found} is installed, and TensorRT 10 or 11 is needed")
    if not torch.cuda.is_available():
        lacking.append("this machine has no NVIDIA GPU that PyTorch can use")
    return lacking


def _why_no_import(error: ImportError) -> str:
    if importlib.util.find_spec("tensorrt") is not None:
        return f"TensorRT is installed, but its libraries cannot be loaded ({error})"
    if importlib.util.find_spec("tensorrt_bindings") is not None:
        return "TensorRT is not installed here: its Python bindings are, its libraries are missing"
    return "TensorRT is not installed here"


def bindings() -> Any:
    """TensorRT's Python module.

    Raises:
        InputError: This machine can neither build nor run engines; what it lacks is named.
    """
    if lacking := missing():
        raise InputError(f"no TensorRT engine can be used: {' and '.join(lacking)}; use runtime: onnxruntime")
    return importlib.import_module("tensorrt")


def product(trt: Any) -> str:
    """Which of the two compilers a module is: `TENSORRT` or `RTX`."""
    return RTX if "rtx" in getattr(trt, "__name__", "") else TENSORRT


def major(version: str) -> int:
    """The first number of a version."""
    return int(version.partition(".")[0])


def environment(trt: Any) -> GpuEnvironment:
    """The current GPU and the software above it."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GpuEnvironment(
        gpu=gpu.name,
        compute_capability=f"{gpu.major}.{gpu.minor}",
        tensorrt=trt.__version__,
        compiler=product(trt),
        cuda=torch.version.cuda or "unknown",
        driver=pynvml.nvmlSystemGetDriverVersion(),
    )


def check_engine(engine: Path, trt: Any) -> EngineManifest:
    """Whether an engine is whole and was built for this GPU and this TensorRT, asked before TensorRT is.

    Args:
        engine: The file.
        trt: TensorRT's module, or that of TensorRT for RTX.

    Raises:
        InputError: It is missing, truncated, changed or not one of ours, was built for another GPU, compute capability
            or TensorRT, or this machine cannot run engines.
    """
    manifest = read_manifest(engine)
    manifest.check_runs_on(environment(trt), engine)
    return manifest


def open_log(trt: Any, *, notes: bool = False) -> Any:
    """A logger for TensorRT that keeps what it is told: `errors`, `warnings` and `notes`, lists of messages.

    Args:
        trt: TensorRT's module, or that of TensorRT for RTX.
        notes: Whether what is neither is kept too; of a build, thousands of lines.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.notes: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(msg)
            elif notes:
                self.notes.append(msg)

    return Log()


def _layer_times(trt: Any) -> Any:
    """What TensorRT tells the times of an engine's layers: `layers`, milliseconds by name."""

    class Times(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.layers: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers[layer_name] = self.layers.get(layer_name, 0.0) + ms

    return Times()


def load_engine(trt: Any, plan: bytes, log: Any, name: str) -> trt.ICudaEngine:
    """Open the bytes of an engine; `name` is its file's name for messages.

    Raises:
        InputError: TensorRT refuses it.
    """
    trt.init_libnvinfer_plugins(log, "")
    try:
        runtime = trt.Runtime(log)
    except TypeError:  # what the bindings raise where the library gives them nothing
        raise InputError(f"{name}: TensorRT does not start: {told(log)}; check the driver with nvidia-smi") from None
    cuda_engine = runtime.deserialize_cuda_engine(plan)
    if cuda_engine is None:
        raise InputError(
            f"{name}: {product(trt)} {trt.__version__} cannot open it: {told(log)}; build it anew on this machine"
        )
    return cuda_engine


def told(log: Any) -> str:
    """The last errors that TensorRT has logged, in one line; that there is no driver last, and once.

    Where an engine is built ahead of time, that stands between all other messages, and is the cause of none.
    """
    causes = [message for message in log.errors if _NO_DRIVER not in message][-3:]
    no_driver = [message for message in log.errors if _NO_DRIVER in message][:1]
    return "; ".join(causes + no_driver) or "it gives no reason"


@dataclass(frozen=True)
class _Buffer:
    """Where a tensor lies: pinned in the host's memory, and in the GPU's."""

    name: str
    is_input: bool
    host: torch.Tensor
    device: torch.Tensor


class TensorRTRunner:
    """An engine opened for measuring: fixed shapes, buffers of its own, launched from one CUDA graph.

    `get_inputs` and `run` are those of an ONNX Runtime session, so that what feeds and times one can feed and time the
    other. `run` is what an application waits for, from arrays in memory to arrays in memory; `gpu_times` is the
    engine alone.

    Args:
        engine: The engine file, with its manifest beside it.
        shapes: Shape of each input of an engine with dynamic shapes; the profile's best unless given.
        graph: Whether the launches are captured once and replayed, which takes the host's share out of the latency.

    Raises:
        InputError: The engine cannot run here (see `check_engine`), or a shape does not fit its profile.
    """

    _engine: trt.ICudaEngine
    _context: trt.IExecutionContext

    def __init__(self, engine: Path, *, shapes: Mapping[str, Sequence[int]] | None = None, graph: bool = True) -> None:
        import torch

        trt = self._bindings()
        self.manifest = check_engine(engine, trt)
        self.name = engine.name
        self._log = open_log(trt)
        self._engine = load_engine(trt, split_header(engine)[1], self._log, engine.name)
        self._context = self._open_context(engine)
        if self._context is None:
            raise InputError(f"{engine}: no room to run it: {told(self._log)}; free memory of the GPU")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._buffers = self._allocate(trt, dict(shapes or {}))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._launch()  # TensorRT allocates in its first run, which may not be captured
        self._stream.synchronize()
        if graph:
            self._graph = self._capture()

    def _bindings(self) -> Any:
        return bindings()

    def _open_context(self, engine: Path) -> trt.IExecutionContext:
        return self._engine.create_execution_context()

    @property
    def memory_mb(self) -> float:
        """Memory in MiB that the engine's activations take on the GPU."""
        return float(self._engine.device_memory_size_v2) / 2**20

    def get_inputs(self) -> list[TensorSpec]:
        """Name, shape and type of the inputs."""
        return [
            TensorSpec(buffer.name, list(buffer.host.shape), _onnx_type(buffer.host.numpy().dtype))
            for buffer in self._buffers
            if buffer.is_input
        ]

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run once, from arrays to arrays.

        Args:
            output_names: Outputs to give; all of them where there is nothing.
            feed: An array per input, of its shape and type.

        Raises:
            InputError: An input is missing, or has another shape or type.
        """
        import torch

        for buffer in self._buffers:
            if buffer.is_input:
                buffer.host.copy_(torch.from_numpy(self._checked(buffer, feed)))
        with torch.cuda.stream(self._stream):
            for buffer in self._buffers:
                if buffer.is_input:
                    buffer.device.copy_(buffer.host, non_blocking=True)
            self._launch()
            for buffer in self._buffers:
                if not buffer.is_input:
                    buffer.host.copy_(buffer.device, non_blocking=True)
        self._stream.synchronize()
        outputs = {buffer.name: buffer.host.numpy().copy() for buffer in self._buffers if not buffer.is_input}
        return [outputs[name] for name in output_names or outputs]

    def gpu_times(self, repetitions: int) -> list[float]:
        """Milliseconds of the engine alone on the GPU, by CUDA events, with whatever the input buffers hold."""
        return event_times(self._launch, self._stream, repetitions)

    def layer_times(self, repetitions: int) -> list[dict[str, float]]:
        """Milliseconds of each of the engine's layers in so many runs, as TensorRT itself times them.

        Layers are timed from here on: the runner is of no use for anything else then. It must have no graph, since
        what a graph replays is not told apart.
        """
        assert self._graph is None
        runs = []
        for _ in range(repetitions):
            times = _layer_times(self._bindings())
            self._context.profiler = times
            self._launch()
            self._stream.synchronize()
            runs.append(times.layers)
        return runs

    def _allocate(self, trt: Any, shapes: dict[str, Sequence[int]]) -> list[_Buffer]:
        import torch

        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.INT8: torch.int8,
            trt.DataType.INT32: torch.int32,
            trt.DataType.INT64: torch.int64,
            trt.DataType.BOOL: torch.bool,
            trt.DataType.UINT8: torch.uint8,
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            fixed = tuple(self._engine.get_tensor_shape(name))
            best = tuple(self._engine.get_tensor_profile_shape(name, 0)[1]) if -1 in fixed else fixed
            shape = tuple(shapes.get(name, best))
            if not self._context.set_input_shape(name, shape):
                profile = self.manifest.inputs.get(name, {})
                raise InputError(
                    f"{self.name}: input {name!r} cannot be {shape}; "
                    f"it was built for {profile.get('min')} to {profile.get('max')}"
                )
        buffers = []
        for name in names:
            shape = tuple(self._context.get_tensor_shape(name))
            kind = types.get(self._engine.get_tensor_dtype(name))
            if -1 in shape or kind is None:
                raise InputError(
                    f"{self.name}: {name!r} has shape {shape} and type {self._engine.get_tensor_dtype(name)}: "
                    "only tensors with sizes known beforehand and of a type that NumPy has can be measured"
                )
            buffer = _Buffer(
                name,
                name in inputs,
                torch.zeros(shape, dtype=kind, pin_memory=True),
                torch.zeros(shape, dtype=kind, device="cuda"),
            )
            self._context.set_tensor_address(name, buffer.device.data_ptr())
            buffers.append(buffer)
        torch.cuda.synchronize()  # the zeros are written on another stream
        return buffers

    def _capture(self) -> torch.cuda.CUDAGraph:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._launch()
        return graph

    def _launch(self) -> None:
        """Put one inference on the stream."""
        import torch

        if self._graph is not None:
            with torch.cuda.stream(self._stream):
                self._graph.replay()
        elif not self._context.execute_async_v3(self._stream.cuda_stream):
            raise InputError(f"{self.name}: TensorRT refuses to run it: {told(self._log)}")

    def _checked(self, buffer: _Buffer, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        if buffer.name not in feed:
            raise InputError(f"{self.name}: the input {buffer.name!r} is missing (given: {', '.join(feed) or 'none'})")
        array, wanted = feed[buffer.name], buffer.host.numpy()
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise InputError(
                f"{self.name}: input {buffer.name!r} is {array.dtype} {array.shape}; give {wanted.dtype} {wanted.shape}"
            )
        return np.ascontiguousarray(array)


def _onnx_type(dtype: np.dtype[Any]) -> str:
    return f"tensor({'float' if dtype == np.float32 else dtype.name})"
