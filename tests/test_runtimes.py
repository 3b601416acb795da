"""Runtimes: which are usable, that they compute the same, and how GPUs would be asked (nothing here has one)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call, create_autospec

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from yolov8_nas.device.profile import cpu_profile
from yolov8_nas.errors import InputError
from yolov8_nas.export import tensorrt
from yolov8_nas.export.artifact import write_network
from yolov8_nas.files import read_lines
from yolov8_nas.measure import benchmark, memory, nms, runtime
from yolov8_nas.measure.benchmark import Failed, Measurement, measure, measure_what_can_be
from yolov8_nas.measure.open_network import TensorSpec
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.runtime import (
    RUNTIMES,
    BoundSession,
    OnnxRuntime,
    OnnxRuntimeTensorRT,
    Torch,
    find,
    of_profile,
    random_feed,
    usable,
)
from yolov8_nas.measure.torch_runner import CudaRunner
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.derive import build

SIDE = 64
QUICK = Protocol(warmup=1, repetitions=3, min_rounds=2, max_rounds=2)
SMALLEST = SearchSpace.load("tiny").smallest()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network as each runtime of a CPU wants it."""
    torch.manual_seed(0)
    network = build(SMALLEST, 3).eval()
    folder = tmp_path_factory.mktemp("networks")
    known = {name: find(name) for name in ("onnxruntime", "torch")}
    return {
        name: write_network(network, folder / f"network{one.suffix}", runtime=one, imgsz=SIDE, batch=2)
        for name, one in known.items()
    }


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_a_cpus_runtimes_are_usable_and_tell_their_version(name: str) -> None:
    found = find(name)
    assert found.why_not() is None
    version = ort.__version__ if name == "onnxruntime" else torch.__version__.partition("+")[0]
    assert found.to_dict() == {"name": name, "version": version}
    assert of_profile(replace(cpu_profile("cpu-1t", 1), runtime=found.to_dict())) == found


def test_every_runtime_says_why_it_is_not_usable_here() -> None:
    assert usable("cpu") == {"onnxruntime": None, "torch": None}
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    reasons = usable("gpu")
    assert list(reasons) == list(RUNTIMES)
    for name, words in {
        "onnxruntime": "without CUDAExecutionProvider",
        "onnxruntime-tensorrt": "without TensorrtExecutionProvider",
        "torch": "PyTorch",
        "tensorrt": "TensorRT",
    }.items():
        assert words in (reasons[name] or "")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("openvino",), "'openvino': there is no such runtime; use one of onnxruntime,"),
        (("tensorrt",), "'tensorrt' runs on NVIDIA GPUs only; use onnxruntime or torch"),
        (("torch", "cpu", "int8"), "'int8': runtime 'torch' .* on a cpu; use fp32"),
        (("onnxruntime", "gpu", "int8"), "'int8': runtime 'onnxruntime' .* on a gpu; use fp32 or fp16"),
    ],
)
def test_what_a_runtime_does_not_do_is_told_with_what_would(asked: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        find(*asked)


def test_runtimes_compute_the_same(files: dict[str, Path]) -> None:
    outputs = []
    for name, file in files.items():
        runner = find(name).open(file, threads=1, batch=2)
        feed = random_feed(runner)
        assert feed["images"].shape == (2, 3, SIDE, SIDE)
        (output,) = runner.run(None, feed)
        outputs.append(output)
    assert outputs[0].shape == outputs[1].shape == (2, 7, 84)
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-3


def test_pytorch_is_measured_like_onnx_runtime(files: dict[str, Path]) -> None:
    (measured,) = measure([files["torch"]], threads=1, runtime=find("torch"), batch=2, protocol=QUICK)
    assert 0 < measured.latency_ms.p50 <= measured.latency_ms.p99
    assert measured.gpu_ms is None
    # PyTorch itself takes some 200 MiB and is not the network's.
    assert 0.5 < measured.memory_mb < 150


def test_a_network_is_run_with_its_own_number_of_threads(files: dict[str, Path]) -> None:
    runner = find("torch").open(files["torch"], threads=2)
    runner.run(None, random_feed(runner))
    assert torch.get_num_threads() == 2


def test_pytorch_is_timed_with_nms_on_one_thread(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    suppress = nms.suppress
    monkeypatch.setattr(nms, "suppress", lambda output: threads.append(torch.get_num_threads()) or suppress(output))
    images = [np.zeros((2, 3, SIDE, SIDE), np.float32)]
    (timing,) = nms.measure_with_nms([files["torch"]], images, threads=2, runtime=find("torch"), protocol=QUICK)
    assert timing.latency_ms.p50 > 0 and set(threads) == {1}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"no zip", "cannot|can be read safely"), ("quantized", "a quantized network")],
)
def test_what_is_no_checkpoint_is_refused(content: Any, words: str, files: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "network.pt"
    if content == "quantized":
        found = torch.load(files["torch"], weights_only=False)
        torch.save({**found, "modelopt": {"a": 1}}, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        find("torch").open(file, threads=1)


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_network_that_fails_does_not_end_the_measurement(files: dict[str, Path], tmp_path: Path) -> None:
    good, broken = files["onnxruntime"], tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    checkpoint = tmp_path / "legs.jsonl"
    first, second = measure_what_can_be(
        [broken, good], threads=1, protocol=QUICK, reference=good, checkpoint=checkpoint
    )
    assert isinstance(first, Failed) and "broken.onnx: ONNX Runtime" in first.reason
    assert isinstance(second, Measurement)
    assert sum("broken.onnx" in leg["failed"] for leg in read_lines(checkpoint)) == 1
    with pytest.raises(InputError, match=r"broken\.onnx"):
        measure_what_can_be([broken, good], threads=1, protocol=QUICK)


def test_what_runs_out_of_memory_only_when_it_is_weighed_has_failed_too(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: ["the process was killed"])
    assert measure_what_can_be([files["onnxruntime"]], threads=1, protocol=QUICK) == [Failed("the process was killed")]
    with pytest.raises(InputError, match="the process was killed"):
        measure([files["onnxruntime"]], threads=1, protocol=QUICK)


# GPUs: how they would be asked ---------------------------------------------------------------------------------------


class _Value:
    def __init__(self, name: str, shape: list[Any], type: str = "tensor(float)") -> None:
        self.name, self.shape, self.type = name, shape, type


def session_on_gpu() -> MagicMock:
    session = create_autospec(ort.InferenceSession, instance=True)
    session.get_inputs.return_value = [_Value("images", ["batch", 3, 32, 32])]
    session.get_outputs.return_value = [_Value("output0", [2, 7, 21])]
    session.io_binding.return_value = create_autospec(ort.IOBinding, instance=True)
    return session


def test_a_session_on_a_gpu_keeps_its_tensors_there(monkeypatch: pytest.MonkeyPatch) -> None:
    values = create_autospec(ort.OrtValue)
    tensors = [create_autospec(ort.OrtValue, instance=True) for _ in range(2)]
    values.ortvalue_from_shape_and_type.side_effect = tensors
    tensors[1].numpy.return_value = np.ones((2, 7, 21), np.float32)
    monkeypatch.setattr(ort, "OrtValue", values)
    session = session_on_gpu()
    bound = BoundSession(session, batch=2)
    assert values.ortvalue_from_shape_and_type.mock_calls[0] == call([2, 3, 32, 32], np.float32, "cuda", 0)
    feed = random_feed(bound)
    (output,) = bound.run(None, feed)
    assert output.sum() == 2 * 7 * 21
    (given,) = tensors[0].update_inplace.call_args.args
    assert (given == feed["images"]).all()
    session.run_with_iobinding.assert_called_once_with(session.io_binding.return_value)
    with pytest.raises(InputError, match="static shape"):
        BoundSession(session_on_gpu())


def test_the_cpu_in_place_of_a_gpu_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = session_on_gpu()
    session.get_providers.return_value = ["CPUExecutionProvider"]
    opened = create_autospec(ort.InferenceSession, return_value=session)
    monkeypatch.setattr(ort, "InferenceSession", opened)
    with pytest.raises(InputError, match="does not run it with CUDAExecutionProvider but with CPUExecutionProvider"):
        OnnxRuntime("gpu").open(tmp_path / "a.onnx", threads=1)
    with pytest.raises(InputError, match="TensorrtExecutionProvider"):
        OnnxRuntimeTensorRT("gpu", "fp16").open(tmp_path / "a.onnx", threads=1)
    ((provider, options),) = opened.call_args.kwargs["providers"]
    assert provider == "TensorrtExecutionProvider"
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("1", "0")
    assert options["trt_engine_cache_path"] == str(tmp_path / "a.engines")


def test_pytorch_on_a_gpu_captures_once_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is held against PyTorch's own signatures; what it does on a GPU is not measured."""
    graph, stream = (create_autospec(cls, instance=True) for cls in (torch.cuda.CUDAGraph, torch.cuda.Stream))
    events = [create_autospec(torch.cuda.Event, instance=True) for _ in range(4)]
    events[0].elapsed_time.return_value = events[2].elapsed_time.return_value = 1.5
    monkeypatch.setattr(torch.cuda, "CUDAGraph", create_autospec(torch.cuda.CUDAGraph, return_value=graph))
    monkeypatch.setattr(torch.cuda, "Stream", create_autospec(torch.cuda.Stream, return_value=stream))
    monkeypatch.setattr(torch.cuda, "Event", create_autospec(torch.cuda.Event, side_effect=events))
    for name in ("graph", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    zeros, to = torch.zeros, torch.nn.Module.to
    monkeypatch.setattr(torch, "zeros", lambda shape, device="cpu", pin_memory=False: zeros(shape))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device, dtype: to(module, "cpu", dtype))
    network = torch.nn.Conv2d(3, 7, 1)
    runner = CudaRunner(network, (1, 3, 8, 8), half=False)
    torch.cuda.graph.assert_called_once_with(graph, stream=stream)  # type: ignore[attr-defined]
    feed = random_feed(runner)
    assert runner.run(None, feed)[0].shape == (1, 7, 8, 8)
    assert (runner._input.numpy() == feed["images"]).all()
    graph.replay.assert_called_once_with()
    assert runner.gpu_times(2) == [1.5, 1.5]
    assert graph.replay.call_count == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_is_built_of_a_file_in_its_precision(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def build_engine(source: Path, engine: Path, **options: Any) -> None:
        model = onnx.load(source)
        seen.update(options, types={t.data_type for t in model.graph.initializer}, engine=engine)
        seen["quantized"] = any(node.op_type == "QuantizeLinear" for node in model.graph.node)

    monkeypatch.setattr(tensorrt, "build_engine", create_autospec(tensorrt.build_engine, side_effect=build_engine))
    network = build(SMALLEST, 3).eval()
    images = [torch.rand(1, 3, SIDE, SIDE)]
    write_network(
        network, tmp_path / "a.engine", runtime=find("tensorrt", "gpu", precision), imgsz=SIDE, calibration=images
    )
    assert seen["engine"] == tmp_path / "a.engine" and seen["timing_cache"] == tmp_path / "timing.cache"
    assert seen["quantized"] == (precision == "int8")
    assert (onnx.TensorProto.FLOAT16 in seen["types"]) == (precision != "fp32")
    assert list(tmp_path.iterdir()) == [], "the file that it was built of is left behind"


def test_a_runner_that_knows_the_gpus_own_time_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        def get_inputs(self) -> list[TensorSpec]:
            return [TensorSpec("images", [1, 3, 8, 8], "tensor(float)")]

        def run(self, names: None, feed: dict[str, Any], /) -> list[Any]:
            return []

        def gpu_times(self, repetitions: int) -> list[float]:
            return [0.25] * repetitions

    monkeypatch.setattr(Torch, "open", lambda *_: Runner())
    monkeypatch.setattr(benchmark, "peak_memory", lambda files, *_: [1.0] * len(files))
    (measured,) = measure([Path("a.pt")], threads=1, runtime=Torch(), protocol=QUICK)
    assert measured.gpu_ms == 0.25
    assert Measurement.from_dict(measured.to_dict()) == measured


class FakeDriver:
    """CUDA's driver as `ctypes` sees it: 8 GiB, of which each question finds 512 MiB more in use."""

    asked = 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        self.asked += 1
        total._obj.value = 8 * 2**30
        free._obj.value = (8 * 1024 - 512 * self.asked) * 2**20
        return 0

    def __getattr__(self, name: str) -> Any:
        assert name in ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
        return lambda *_: 0


def test_on_a_gpu_memory_is_what_the_driver_says_is_gone(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]
) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: driver)
    session = find("onnxruntime").open(files["onnxruntime"], 1)
    monkeypatch.setattr(OnnxRuntime, "open", lambda *_: session)
    assert memory._added_by(files["onnxruntime"], 1, OnnxRuntime("gpu"), None) == 512


def test_where_there_is_no_driver_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    assert "no NVIDIA driver" in (OnnxRuntime("gpu").why_not() or "")


def test_the_interface_needs_no_pytorch() -> None:
    code = "import sys, yolov8_nas.measure.runtime; print([m for m in ('torch', 'ultralytics') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
