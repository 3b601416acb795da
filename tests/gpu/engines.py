"""What only a GPU with TensorRT can show: `make test-gpu` runs this and prints what it has verified.

It is no part of `make test`, which collects `test_*.py` only. Without a GPU or without TensorRT it fails at once:
nothing here is ever skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import detection
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from yolov8_nas.measure.tensorrt import missing

if lacking := missing():
    pytest.exit(f"{'no TensorRT here' if torch.cuda.is_available() else 'no GPU here'}: {' and '.join(lacking)}", 1)

from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.errors import InputError
from yolov8_nas.export.gpu_int8 import int8_for_gpu
from yolov8_nas.export.nms_in_graph import NmsOptions
from yolov8_nas.export.onnx import export_int8_ptq, export_onnx
from yolov8_nas.export.tensorrt import EngineOptions, Profile, build_engine
from yolov8_nas.measure.engine_file import EngineManifest, layers_path, manifest_path, split_header
from yolov8_nas.measure.tensorrt import TensorRTRunner, bindings, environment
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.derive import add_one_to_one, build
from yolov8_nas.train.finetune import Recipe, train

SIDE = 64
EXACT = EngineOptions(tf32=False)

# The largest difference from ONNX Runtime of a score, and of a box as a share of the side.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}


def verified(what: str) -> None:
    print(f"\nverified: {what}", file=sys.__stdout__, flush=True)


@pytest.fixture(scope="session", autouse=True)
def here() -> None:
    machine = environment(bindings())
    print(f"\non {machine.gpu} ({machine.compute_capability}), TensorRT {machine.tensorrt}, CUDA {machine.cuda}, "
          f"driver {machine.driver}", file=sys.__stdout__)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What data-prep writes, of squares and discs."""
    return detection.make_dataset(tmp_path_factory.mktemp("data"), train=24, search=8, val=16)


@pytest.fixture(scope="module")
def calibration(pictures: Path) -> list[torch.Tensor]:
    """The training pictures, in batches of eight."""
    files = sorted((pictures / "dataset" / "images" / "train").glob("*.png"))
    images = [torch.from_numpy(cv2.imread(str(file))[..., ::-1].copy()).permute(2, 0, 1) / 255 for file in files]
    return [torch.stack(images[i : i + 8]) for i in range(0, len(images), 8)]


@pytest.fixture(scope="module")
def images(calibration: list[torch.Tensor]) -> NDArray[np.float32]:
    return calibration[0][:1].numpy()


@pytest.fixture(scope="module")
def detector(
    pictures: Path, calibration: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> DetectionModel:
    """A tiny network that has learnt a little: one that has not turns each rounding into noise."""
    work = tmp_path_factory.mktemp("training")
    data = data_yaml(pictures, work / "view", validate_on="search")
    torch.manual_seed(0)
    fresh = build(SearchSpace.load("tiny").smallest(), 2, detection.CLASSES).eval()
    recipe = Recipe(epochs=10, batch=4, lr=1e-2, imgsz=SIDE, seed=0, mosaic=False)
    network = train(fresh, data, recipe, work=work).network
    recalibrate(network, calibration)
    return network


@pytest.fixture(scope="module")
def folder(detector: DetectionModel, calibration: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fp32.onnx`, `fp16.onnx` and `int8.onnx` of the network, and `open.onnx` with dynamic shapes."""
    folder = tmp_path_factory.mktemp("engines")
    export_onnx(detector, folder / "fp32.onnx", imgsz=SIDE)
    export_onnx(detector, folder / "fp16.onnx", imgsz=SIDE, half=True)
    export_onnx(detector, folder / "open.onnx", imgsz=SIDE, dynamic=True)
    export_int8_ptq(detector, folder / "cpu.onnx", imgsz=SIDE, calibration=calibration)
    int8_for_gpu(folder / "cpu.onnx", folder / "int8.onnx")
    return folder


def median(engine: Path) -> float:
    return float(np.median(TensorRTRunner(engine).gpu_times(200)))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Callable[[str], Path]:
    """The engine of one of the files, built once."""

    def built(name: str) -> Path:
        path = folder / f"{name}.engine"
        if not path.exists():
            build_engine(folder / f"{name}.onnx", path, measure=median, options=EXACT)
        return path

    return built


def reference(file: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": images})
    return np.asarray(output)


def difference(got: NDArray[Any], wanted: NDArray[Any], side: int) -> float:
    gap = np.abs(got - wanted).max(axis=(0, 2))
    return float(max(gap[:4].max() / side, gap[4:].max()))


@pytest.mark.parametrize("precision", TOLERANCE)
def test_an_engine_computes_what_onnx_runtime_computes(
    precision: str, folder: Path, engine: Callable[[str], Path], images: NDArray[np.float32]
) -> None:
    runner = TensorRTRunner(engine(precision))
    (output,) = runner.run(None, {"images": images})
    gap = difference(output, reference(folder / f"{precision}.onnx", images), SIDE)
    assert runner.manifest.precision == precision
    assert gap <= TOLERANCE[precision]
    verified(f"{precision} engine and ONNX Runtime differ by {gap:.2g} (at most {TOLERANCE[precision]:.2g})")


def test_an_int8_engine_is_no_further_from_fp32_than_onnx_runtime_is(
    folder: Path, engine: Callable[[str], Path], images: NDArray[np.float32]
) -> None:
    # Not compared value by value: where one lies between two integers, a rounding in its last bit is a whole step.
    runner = TensorRTRunner(engine("int8"))
    (output,) = runner.run(None, {"images": images})
    exact = reference(folder / "fp32.onnx", images)
    ours, theirs = (np.abs(o - exact).mean() for o in (output, reference(folder / "int8.onnx", images)))
    assert runner.manifest.precision == "int8"
    assert ours <= 3 * theirs
    verified(f"int8 engine is {ours:.2g} from FP32 in the mean, ONNX Runtime's INT8 {theirs:.2g}")
    with pytest.raises(InputError, match="int8_for_gpu"):
        build_engine(folder / "cpu.onnx", folder / "cpu.engine", measure=median)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_stock_yolo_loads_an_engine(
    precision: str, folder: Path, engine: Callable[[str], Path], pictures: Path
) -> None:
    picture = pictures / "dataset" / "images" / "train" / "train000.png"
    found = {
        file.suffix: YOLO(file, task="detect").predict(picture, imgsz=SIDE, conf=0.1, verbose=False)[0]
        for file in (engine(precision), folder / f"{precision}.onnx")
    }
    assert found[".engine"].names == {0: "square", 1: "disc"}
    counts = {suffix: len(result.boxes) for suffix, result in found.items()}
    assert counts[".engine"] > 0
    if precision == "fp32":
        assert counts[".engine"] == counts[".onnx"]
    verified(f'stock YOLO("{precision}.engine") predicts {counts[".engine"]} boxes, the ONNX file {counts[".onnx"]}')


def test_an_engine_with_nms_finds_what_ultralytics_finds(
    folder: Path, images: NDArray[np.float32], pictures: Path
) -> None:
    path = folder / "nms.engine"
    nms = NmsOptions(score=0.02, iou=0.6, boxes=50)
    build_engine(folder / "fp32.onnx", path, measure=median, options=replace(EXACT, nms=nms))
    (rows,) = TensorRTRunner(path).run(None, {"images": images})
    raw = torch.from_numpy(reference(folder / "fp32.onnx", images))
    wanted = non_max_suppression(raw, conf_thres=nms.score, iou_thres=nms.iou, max_det=nms.boxes, multi_label=True)[0]
    got = rows[0][rows[0][:, 4] > 0]
    assert len(got) > 0
    order = [np.lexsort((table[:, 5], -table[:, 4])) for table in (got, wanted.numpy())]
    np.testing.assert_allclose(got[order[0]], wanted.numpy()[order[1]], atol=0.05)
    picture = pictures / "dataset" / "images" / "train" / "train000.png"
    boxes = YOLO(path, task="detect").predict(picture, imgsz=SIDE, conf=nms.score, verbose=False)[0].boxes
    verified(f"EfficientNMS keeps the {len(got)} boxes that Ultralytics keeps; stock YOLO reads them ({len(boxes)})")


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_engine_with_an_nms_free_head_finds_what_onnx_runtime_finds(
    dynamic: bool, detector: DetectionModel, folder: Path, images: NDArray[np.float32], pictures: Path
) -> None:
    file = folder / ("free-open.onnx" if dynamic else "free.onnx")
    export_onnx(add_one_to_one(deepcopy(detector)), file, imgsz=SIDE, dynamic=dynamic)
    profile = Profile(min=(1, 32, 32), opt=(1, SIDE, SIDE), max=(2, SIDE, SIDE)) if dynamic else None
    engine = file.with_suffix(".engine")
    build_engine(file, engine, measure=median, options=replace(EXACT, profile=profile))
    (rows,) = TensorRTRunner(engine, shapes={"images": images.shape} if dynamic else {}).run(None, {"images": images})
    wanted = reference(file, images)
    assert rows.shape == wanted.shape
    gap = float(np.abs(rows[..., 4] - wanted[..., 4]).max())  # in order; boxes of equal scores may change places
    assert gap <= TOLERANCE["fp32"]
    picture = pictures / "dataset" / "images" / "train" / "train000.png"
    boxes = YOLO(engine, task="detect").predict(picture, imgsz=SIDE, conf=0.1, verbose=False)[0].boxes
    verified(f"an NMS-free engine's scores differ by {gap:.2g}; stock YOLO reads its detections ({len(boxes)})")


def test_dynamic_shapes(folder: Path) -> None:
    path = folder / "open.engine"
    profile = Profile(min=(1, 32, 32), opt=(2, 64, 64), max=(4, 96, 128))
    build_engine(folder / "open.onnx", path, measure=median, options=replace(EXACT, profile=profile))
    for images, height, width in (profile.min, profile.opt, profile.max):
        feed = np.random.default_rng(3).random((images, 3, height, width), dtype=np.float32)
        (output,) = TensorRTRunner(path, shapes={"images": feed.shape}).run(None, {"images": feed})
        gap = difference(output, reference(folder / "open.onnx", feed), max(height, width))
        assert gap <= TOLERANCE["fp32"]
    with pytest.raises(InputError, match="cannot be"):
        TensorRTRunner(path, shapes={"images": (8, 3, 64, 64)})
    verified("a dynamic engine agrees at its smallest, best and largest shape, and refuses one beyond")


def test_the_timing_cache_is_used_again(folder: Path) -> None:
    cache, path = folder / "timing.cache", folder / "cached.engine"
    first = build_engine(folder / "fp16.onnx", path, measure=median, timing_cache=cache)
    before = cache.read_bytes()
    again = build_engine(folder / "fp16.onnx", path, measure=median, timing_cache=cache)
    assert before
    assert len(cache.read_bytes()) >= len(before)
    assert first.layers == again.layers  # the same choices
    same = "nothing was timed anew" if cache.read_bytes() == before else "the cache has grown"
    verified(f"with its timing cache ({len(before):,} bytes) a build makes the same choices; {same}")
    cache.write_bytes(b"damaged")
    with pytest.raises(InputError, match="timing cache"):
        build_engine(folder / "fp16.onnx", path, measure=median, timing_cache=cache)
    verified("a damaged timing cache is refused")


def test_every_build_is_measured_and_the_fastest_kept(folder: Path) -> None:
    manifest = build_engine(folder / "fp16.onnx", folder / "best.engine", measure=median, builds=3)
    assert len(manifest.builds_ms) == 3
    verified(
        f"three builds took {', '.join(f'{ms:.4f}' for ms in manifest.builds_ms)} ms; the first of the fastest kept"
    )


def test_the_inspector_tells_of_layers(engine: Callable[[str], Path]) -> None:
    summary = TensorRTRunner(engine("int8")).manifest.layers
    account = json.loads(layers_path(engine("int8")).read_text())
    assert summary["layers"] == len(account["Layers"]) > 0
    assert "unknown" not in summary["types"]
    verified(f"the inspector tells of {summary['layers']} layers, {len(summary['reformats'])} of them reformats, "
             f"{summary['fused']} fused")  # fmt: skip


def test_an_engine_of_another_machine_is_refused(engine: Callable[[str], Path], tmp_path: Path) -> None:
    manifest: EngineManifest = TensorRTRunner(engine("fp32")).manifest
    other = tmp_path / "other.engine"
    for change in ({"gpu": "Tesla T4 of tomorrow"}, {"compute_capability": "1.0"}, {"tensorrt": "9.9.9"}):
        other.write_bytes(engine("fp32").read_bytes())
        row = replace(manifest, built_on=replace(manifest.built_on, **change)).to_dict()
        manifest_path(other).write_text(json.dumps(row))
        with pytest.raises(InputError, match="runs nowhere else"):
            TensorRTRunner(other)
    other.write_bytes(engine("fp32").read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        TensorRTRunner(other)
    verified("engines of another GPU, compute capability or TensorRT, and truncated ones, are refused")


def test_an_operator_that_tensorrt_lacks_is_named(folder: Path) -> None:
    model = onnx.load(folder / "fp32.onnx")
    model.graph.node.append(helper.make_node("NoSuchOperator", ["output0"], ["beyond"], name="last", domain="ours"))
    model.graph.output[0].name = "beyond"
    model.opset_import.append(helper.make_opsetid("ours", 1))
    onnx.save(model, folder / "beyond.onnx")
    with pytest.raises(InputError, match="NoSuchOperator"):
        build_engine(folder / "beyond.onnx", folder / "beyond.engine", measure=median)
    verified("an operator that TensorRT lacks is named")


def test_cuda_graphs_change_the_time_and_not_the_result(
    engine: Callable[[str], Path], images: NDArray[np.float32]
) -> None:
    launched, captured = (TensorRTRunner(engine("fp16"), graph=graph) for graph in (False, True))
    outputs = [runner.run(None, {"images": images})[0] for runner in (launched, captured)]
    np.testing.assert_array_equal(*outputs)
    for name, runner in (("launched", launched), ("as a CUDA graph", captured)):
        runner.gpu_times(200)
        p50, p90, p99 = np.percentile(runner.gpu_times(1000), [50, 90, 99])
        verified(f"{name}: p50 {p50:.4f}, p90 {p90:.4f}, p99 {p99:.4f} ms; memory {runner.memory_mb:.1f} MiB")


def test_a_header_that_tensorrt_does_not_see(engine: Callable[[str], Path]) -> None:
    metadata, plan = split_header(engine("fp32"))
    assert metadata["task"] == "detect"
    assert engine("fp32").read_bytes().endswith(plan)
    verified("the header holds Ultralytics' metadata, and the engine follows it")
