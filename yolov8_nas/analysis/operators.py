"""The operators of a network as they run: their times from the runtime's own profiler, their work from their shapes.

Profilers cost time, so what they tell is used for shares; a whole run is timed without them.

What concerns GPUs has not run on one yet.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from yolov8_nas.analysis.figures import Operator, Trace
from yolov8_nas.analysis.model import Detector, load_onnx, row_of
from yolov8_nas.measure.runtime import Runtime, open_session, random_feed
from yolov8_nas.measure.tensorrt import TensorRTRunner
from yolov8_nas.measure.torch_runner import read_detector

_WARM_UP: Final = 3
_RUNS: Final = 12
_MARK: Final = "@"
"""Before the names of modules among those of PyTorch's operators."""


class NotTracedError(Exception):
    """The runtime does not tell its operators' times; the message says why."""


def trace(detector: Detector, file: Path, runtime: Runtime, threads: int, batch: int, work: Path) -> Trace:
    """The operators of a network.

    Args:
        detector: The network.
        file: The file that the runtime opens.
        runtime: What runs it.
        threads: Threads on a CPU.
        batch: Images per run.
        work: Folder for what a profiler writes.

    Raises:
        NotTracedError: The runtime does not tell.
    """
    match runtime.name:
        case "onnxruntime":
            return _onnxruntime(file, runtime, threads, batch, work)
        case "torch":
            return _torch(file, (batch, 3, detector.imgsz, detector.imgsz), runtime, threads)
        case "tensorrt":
            return _tensorrt(file)
    raise NotTracedError(
        f"{runtime.name} runs the network as one operator, an engine of TensorRT; its layers are told by --runtime "
        "tensorrt"
    )


def ranges() -> Callable[[str], AbstractContextManager[object]]:
    """What marks a stretch of time under a name for Nsight Systems; nothing where there is no CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.nvtx.range
    return lambda _: contextlib.nullcontext()


def _medians(runs: Sequence[Sequence[Operator]]) -> list[Operator]:
    """Operators with the medians of their times; each run has the same ones in the same order."""
    return [
        replace(same[0], ms=statistics.median(operator.ms for operator in same)) for same in zip(*runs, strict=True)
    ]


# ONNX Runtime --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The work of a convolution or matrix product: operations, and channels of a convolution."""

    flops: float
    inputs: int | None = None
    outputs: int | None = None
    groups: int | None = None


def arithmetic(graph: onnx.ModelProto) -> dict[str, Work]:
    """The work of each convolution and matrix product of a graph whose shapes are known, by the node's name."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    found = {}
    for node in graph.graph.node:
        output, operands = shapes.get(node.output[0]), [shapes.get(name) for name in node.input[:2]]
        if output is None or any(shape is None for shape in operands):
            continue
        if node.op_type == "Conv":
            weight = operands[1] or []  # (outputs, inputs / groups, height, width)
            groups = next((int(a.i) for a in node.attribute if a.name == "group"), 1)
            flops = 2.0 * math.prod(output) * math.prod(weight[1:])
            found[node.name] = Work(flops, weight[1] * groups, weight[0], groups)
        elif node.op_type == "MatMul":
            found[node.name] = Work(2.0 * math.prod(output) * (operands[0] or [])[-1])
    return found


def _onnxruntime(file: Path, runtime: Runtime, threads: int, batch: int, folder: Path) -> Trace:
    provider = "CPUExecutionProvider" if runtime.kind == "cpu" else "CUDAExecutionProvider"
    session = open_session(file, threads, [(provider, {})], trace=folder / "trace")
    feed = random_feed(session, batch=batch)
    for _ in range(_WARM_UP + _RUNS):
        session.run(None, feed)
    written = Path(session.end_profiling())
    events = json.loads(written.read_text())
    written.unlink()
    known = arithmetic(load_onnx(file))
    if runtime.kind == "cpu":
        runs, between_ms = _of_runs(events)
        operators = _medians([[_cpu_operator(event, known) for event in run] for run in runs])
        return Trace(operators, len(runs), "operators", between_ms)
    return _kernels(events, known)


def _of_runs(events: Sequence[Mapping[str, Any]]) -> tuple[list[list[Mapping[str, Any]]], float]:
    """Events of the operators of each run after the warm-up, and the least time in ms between those of a run."""
    nodes = sorted((event for event in events if event["cat"] == "Node"), key=lambda event: event["ts"])
    whole = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    runs = [[node for node in nodes if run["ts"] <= node["ts"] < run["ts"] + run["dur"]] for run in whole[_WARM_UP:]]
    between = [
        run["dur"] - sum(node["dur"] for node in inside) for run, inside in zip(whole[_WARM_UP:], runs, strict=True)
    ]
    return runs, max(0, min(between)) / 1e3


def _cpu_operator(event: Mapping[str, Any], known: Mapping[str, Work]) -> Operator:
    name, told = event["name"].removesuffix("_kernel_time"), event["args"]
    sizes = [int(told.get(size) or 0) for size in ("activation_size", "parameter_size", "output_size")]
    return _operator(name, told["op_name"], event["dur"] / 1e3, known, float(sum(sizes)))


def _operator(name: str, kind: str, ms: float, known: Mapping[str, Work], moved: float | None) -> Operator:
    """An operator with the work of the node that it was made of.

    ONNX Runtime renames what it changes: to the node's name with something after it, or to that of its output.
    """
    made_of = ""
    if any(product in kind for product in ("Conv", "MatMul", "Gemm")):
        made_of = max((node for node in known if name.startswith(node)), key=len, default="")
    done = known.get(made_of, Work(0.0))
    layer = (made_of or name).strip("/")
    return Operator(layer, kind, row_of(name), ms, 1, done.flops, moved, done.inputs, done.outputs, done.groups)


def _kernels(events: Sequence[Mapping[str, Any]], known: Mapping[str, Work]) -> Trace:
    """What a build of ONNX Runtime with CUPTI tells of kernels on a GPU."""
    kernels = [event for event in events if event["cat"] == "Kernel" and "parent_name" in event["args"]]
    if not kernels:
        raise NotTracedError(
            "this build of ONNX Runtime does not time kernels on a GPU; --runtime torch and --runtime tensorrt do"
        )
    times: dict[tuple[str, str], list[float]] = {}
    for kernel in kernels:
        name = kernel["args"]["parent_name"].removesuffix("_kernel_time")
        times.setdefault((name, kernel["args"].get("op_name", kernel["name"])), []).append(kernel["dur"] / 1e3)
    runs = _WARM_UP + _RUNS
    found = [
        replace(_operator(name, kind, sum(each) / runs, known, None), launches=max(1, round(len(each) / runs)))
        for (name, kind), each in times.items()
    ]
    return Trace(found, runs, "kernels")


# PyTorch -------------------------------------------------------------------------------------------------------------


def _torch(file: Path, shape: tuple[int, ...], runtime: Runtime, threads: int) -> Trace:
    """The operators of the eager network; on a GPU its kernels, which are those that a CUDA graph replays."""
    network, _ = read_detector(file)
    network = network.fuse(verbose=False)
    images = torch.zeros(shape)
    activities = [ProfilerActivity.CPU]
    if runtime.kind == "gpu":
        kind = torch.float16 if runtime.precision == "fp16" else torch.float32
        network, images = network.to("cuda", kind), images.to("cuda", kind)
        activities.append(ProfilerActivity.CUDA)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), _marked(network):
            for _ in range(_WARM_UP):
                network(images)
            with profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
                for _ in range(_RUNS):
                    with record_function(_MARK):
                        network(images)
                if runtime.kind == "gpu":
                    torch.cuda.synchronize()
    finally:
        torch.set_num_threads(before)
    roots = [event for event in profiler.events() if event.name == _MARK and event.cpu_parent is None]
    on_gpu = runtime.kind == "gpu"
    runs = [list(_below(root, "", on_gpu, images.element_size())) for root in roots]
    return Trace(_medians(runs), len(runs), "kernels" if on_gpu else "operators")


@contextlib.contextmanager
def _marked(network: nn.Module) -> Iterator[None]:
    """Every module's name around its operators, in the profile and for Nsight Systems."""
    mark, hooks = ranges(), []
    entered: list[contextlib.ExitStack] = []

    def enter(name: str) -> None:
        entered.append(contextlib.ExitStack())
        entered[-1].enter_context(record_function(f"{_MARK}{name}"))
        entered[-1].enter_context(mark(name))

    for name, module in network.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_: entered.pop().close()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _below(event: Any, layer: str, on_gpu: bool, size: int) -> Iterator[Operator]:
    """The outermost operators under an event, with the innermost module that each of them is in."""
    if not event.name.startswith(_MARK):
        if operator := _aten(event, layer, on_gpu, size):
            yield operator
        return
    for child in event.cpu_children:
        yield from _below(child, event.name.removeprefix(_MARK), on_gpu, size)


def _aten(event: Any, layer: str, on_gpu: bool, size: int) -> Operator | None:
    """An operator of PyTorch; on a GPU nothing where it launches no kernel."""
    flops = float(sum(inner.flops or 0 for inner in _all(event)))
    kernels = sum(len(inner.kernels) for inner in _all(event))
    if on_gpu and not kernels:
        return None
    ms = (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3
    kind = event.name.removeprefix("aten::")
    found = Operator(layer, kind, row_of(layer), ms, kernels if on_gpu else 1)
    if kind not in ("conv2d", "linear", "matmul", "mm", "bmm") or not flops:
        return found
    image, weight = event.input_shapes[:2]
    convolution = kind == "conv2d"
    # Each element of the output takes as many multiply-accumulates as a convolution's kernel, or a row, has elements.
    outputs = flops / 2 / (math.prod(weight[1:]) if convolution else image[-1])
    found = replace(found, flops=flops, bytes=size * (math.prod(image) + math.prod(weight) + outputs))
    if convolution:
        return replace(found, inputs=image[1], outputs=weight[0], groups=image[1] // weight[1])
    return found


def _all(event: Any) -> Iterator[Any]:
    yield event
    for child in event.cpu_children:
        yield from _all(child)


# TensorRT ------------------------------------------------------------------------------------------------------------


def _tensorrt(file: Path) -> Trace:
    runner = TensorRTRunner(file, graph=False)
    runner.run(None, random_feed(runner))
    runs = runner.layer_times(_WARM_UP + _RUNS)[_WARM_UP:]
    operators = [
        Operator(name, "layer", row_of(name), statistics.median(run.get(name, 0.0) for run in runs)) for name in runs[0]
    ]
    return Trace(operators, len(runs), "layers of the engine")
