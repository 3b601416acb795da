"""PyTorch checkpoints opened for measuring: eagerly on a CPU, from a CUDA graph on a GPU.

On GPUs none of this has run yet; the tests hold its calls against PyTorch's own signatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint.network import load
from yolov8_nas.errors import InputError
from yolov8_nas.measure.cuda_events import event_times
from yolov8_nas.measure.open_network import TensorSpec

_INPUT: Final = "images"
_OUTPUT: Final = "output0"
_WARM_UP: Final = 3
"""Runs before a graph is captured: cuDNN chooses its kernels in the first ones, which may not be captured."""


def open_checkpoint(file: Path, kind: str, *, threads: int, batch: int, half: bool) -> TorchRunner | CudaRunner:
    """Open the detector of a checkpoint as it runs: BatchNorm folded, output as `export_onnx` makes it.

    Whoever the file is from, no code in it is run: it may refer to modules of Ultralytics and PyTorch and to plain
    data.

    Args:
        file: An Ultralytics checkpoint of a detector.
        kind: `cpu` or `gpu`.
        threads: Threads on a CPU.
        batch: Images per run.
        half: Whether it computes in FP16.

    Raises:
        InputError: There is no such file, or it holds no detector.
    """
    network, imgsz = read_detector(file)
    network = network.fuse(verbose=False)
    for module in network.modules():
        if isinstance(module, Detect):
            module.export, module.format = True, "torchscript"  # the output alone, without the feature maps
    shape = (batch, 3, imgsz, imgsz)
    return CudaRunner(network, shape, half=half) if kind == "gpu" else TorchRunner(network, shape, threads)


def read_detector(file: Path) -> tuple[DetectionModel, int]:
    """The network of a checkpoint in FP32 and evaluation mode, and the side of its input in pixels.

    Raises:
        InputError: There is no such file, or it holds no detector.
    """
    found = load(file, quantized=False)
    if found.quantized:
        raise InputError(f"{file}: a quantized network, and PyTorch is measured with detectors in floating point only")
    return found.network.requires_grad_(False), found.imgsz or 640


class TorchRunner:
    """A network on a CPU, run eagerly.

    The number of threads is the process's own in PyTorch, so it is set anew in each run: several networks with
    different numbers may be open.

    Args:
        network: What runs.
        shape: Of its input: images, channels, height and width.
        threads: Threads.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], threads: int) -> None:
        self._network = network
        self._shape = shape
        self._threads = threads

    def get_inputs(self) -> list[TensorSpec]:
        """Name, shape and type of the input."""
        return [TensorSpec(_INPUT, list(self._shape), "tensor(float)")]

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, NDArray[Any]], /) -> list[NDArray[Any]]:
        """Run once, from array to array."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            output: Tensor = self._network(torch.from_numpy(input_feed[_INPUT]))
        return [output.numpy()]


class CudaRunner:
    """A network on a GPU, launched from one CUDA graph, with pinned memory at both ends.

    Args:
        network: What runs.
        shape: Of its input: images, channels, height and width.
        half: Whether it computes in FP16; its input and output are FP32 in any case.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], *, half: bool) -> None:
        self._network = network.to("cuda", torch.float16 if half else torch.float32)
        self._type = torch.float16 if half else torch.float32
        self._shape = shape
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._input = torch.zeros(shape, device="cuda")
        self._host_input = torch.zeros(shape, pin_memory=True)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # the zeros are written on another stream
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP):
                self._forward()
        self._stream.synchronize()
        with torch.inference_mode(), torch.cuda.graph(self._graph, stream=self._stream):
            self._output = self._forward()
        self._host_output = torch.zeros(tuple(self._output.shape), pin_memory=True)

    def get_inputs(self) -> list[TensorSpec]:
        """Name, shape and type of the input."""
        return [TensorSpec(_INPUT, list(self._shape), "tensor(float)")]

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, NDArray[Any]], /
    ) -> list[NDArray[np.float32]]:
        """Run once, from array to array: over pinned memory to the GPU, and back."""
        self._host_input.copy_(torch.from_numpy(input_feed[_INPUT]))
        with torch.cuda.stream(self._stream):
            self._input.copy_(self._host_input, non_blocking=True)
            self._graph.replay()
            self._host_output.copy_(self._output, non_blocking=True)
        self._stream.synchronize()
        return [self._host_output.numpy().copy()]

    def gpu_times(self, repetitions: int) -> list[float]:
        """Milliseconds of the network alone on the GPU, by CUDA events, with whatever the input holds."""
        return event_times(self._graph.replay, self._stream, repetitions)

    def _forward(self) -> Tensor:
        output: Tensor = self._network(self._input.to(self._type))
        return output.float()
