"""ONNX files of any shape and in FP16: what they compute, and that stock Ultralytics can use them."""

from __future__ import annotations

import ast
from pathlib import Path

import detection
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torchvision.ops import batched_nms
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.nms_in_graph import NmsOptions, add_nms
from yolov8_nas.export.onnx import export_onnx, put_nms
from yolov8_nas.export.verification import TOLERANCE, verify_onnx
from yolov8_nas.train.quantization import quantize

SIDE = 64


@pytest.fixture(scope="module")
def network() -> DetectionModel:
    return detection.lively(SIDE)


@pytest.fixture(scope="module", params=[(False, True), (True, False), (True, True)], ids=["dynamic", "half", "both"])
def exported(request: pytest.FixtureRequest, network: DetectionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    half, dynamic = request.param
    folder = tmp_path_factory.mktemp("exported")
    return export_onnx(network, folder / "model.onnx", imgsz=SIDE, batch=2, half=half, dynamic=dynamic)


def traits(file: Path) -> tuple[bool, bool]:
    """Whether a file computes in FP16, and whether it is dynamic, as its metadata say."""
    metadata = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    arguments = ast.literal_eval(metadata["args"])
    return arguments.get("quantize") == 16, arguments["dynamic"]


def test_it_computes_what_its_network_computes(exported: Path, network: DetectionModel) -> None:
    half, dynamic = traits(exported)
    largest = verify_onnx(network, exported, imgsz=SIDE, batch=2, half=half, dynamic=dynamic)
    assert half or largest < TOLERANCE  # rounding to FP16 moves a network that has learnt nothing by any amount
    with pytest.raises(StageError, match="differs from its network"):
        verify_onnx(detection.lively(SIDE, seed=1), exported, imgsz=SIDE, batch=2, half=half, dynamic=dynamic)


def test_it_says_what_it_takes(exported: Path) -> None:
    half, dynamic = traits(exported)
    graph = onnx.load(exported)
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(str(exported))
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.type, given.type) == ("tensor(float)",) * 2, "whoever feeds it need not know its precision"
    assert taken.shape == (["batch", 3, "height", "width"] if dynamic else [2, 3, SIDE, SIDE])
    assert given.shape == (["batch", 6, "anchors"] if dynamic else [2, 6, 84])
    kinds = {tensor.data_type for tensor in graph.graph.initializer if tensor.name.endswith("weight")}
    assert (TensorProto.FLOAT16 in kinds) == half


def test_stock_ultralytics_uses_it(exported: Path) -> None:
    _, dynamic = traits(exported)
    stock = YOLO(str(exported), task="detect")
    assert stock.names == dict(enumerate(detection.CLASSES))
    wide = np.full((SIDE, 3 * SIDE, 3), 90, np.uint8)
    results = stock.predict([wide] * 3, imgsz=3 * SIDE if dynamic else SIDE, conf=1e-4, verbose=False)
    assert len(results) == 3
    assert all(torch.equal(result.boxes.data, results[0].boxes.data) for result in results)
    assert results[0].boxes.xyxy[:, 2].max() > SIDE, "boxes are in pixels of the image as it was given"


def test_boxes_of_fp16_files_are_finer_than_fp16(network: DetectionModel, tmp_path: Path) -> None:
    """In FP16, positions from 512 pixels on are multiples of half a pixel."""
    file = export_onnx(network, tmp_path / "wide.onnx", imgsz=SIDE, half=True, dynamic=True)
    session = onnxruntime.InferenceSession(str(file))
    image = np.random.default_rng(0).random((1, 3, 32, 1024), dtype=np.float32)
    (outputs,) = session.run(None, {"images": image})
    x = outputs[0, 0][outputs[0, 0] > 512]
    assert len(x) > 10
    assert np.abs(2 * x - np.round(2 * x)).max() > 0.05


@pytest.mark.parametrize("dynamic", [False, True])
def test_suppression_in_the_file_keeps_what_torchvision_keeps(dynamic: bool) -> None:
    kept, classes, anchors = NmsOptions(score=0.3, iou=0.5, boxes=40), 3, 30  # of 90 scores; images of 40 rows
    batch, last = ("B", "A") if dynamic else (2, anchors)
    passing = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> one (float[{batch}, {4 + classes}, {last}] images) => '
        f"(float[{batch}, {4 + classes}, {last}] output0) {{ output0 = Identity (images) }}"
    )
    model = add_nms(passing, kept)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(0)
    rows = rng.uniform([10, 10, 5, 5, 0, 0, 0], [60, 60, 40, 40, 1, 1, 0.4], (2, anchors, 7)).astype(np.float32)
    rows[1, 5:, 4:] = 0  # the second image has little in it
    (got,) = session.run(None, {"images": rows.transpose(0, 2, 1)})
    assert got.shape == (2, 40, 6)
    for image, found in zip(torch.from_numpy(rows), torch.from_numpy(got), strict=True):
        centre, size, scores = image.split([2, 2, 3], 1)
        corners = torch.cat([centre - size / 2, centre + size / 2], 1)
        anchor, label = (scores > kept.score).nonzero(as_tuple=True)
        score = scores[anchor, label]
        best = batched_nms(corners[anchor], score, label, kept.iou)[: kept.boxes]
        wanted = torch.cat([corners[anchor[best]], score[best, None], label[best, None].float()], 1)
        torch.testing.assert_close(found[: len(wanted)], wanted)
        assert not found[len(wanted) :].any()


def test_stock_ultralytics_uses_a_file_with_suppression(network: DetectionModel, tmp_path: Path) -> None:
    options = NmsOptions(score=1e-4)
    whole = put_nms(export_onnx(network, tmp_path / "whole.onnx", imgsz=SIDE), options)
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    found = YOLO(str(whole), task="detect").predict(image, imgsz=SIDE, conf=options.score, verbose=False)[0].boxes.data
    with torch.no_grad():
        outputs = network(torch.from_numpy(image[None, :, :, ::-1].copy()).permute(0, 3, 1, 2) / 255)
    (wanted,) = non_max_suppression(outputs, options.score, options.iou, multi_label=True, max_det=options.boxes)
    assert len(wanted) > 3
    wanted[:, :4] = wanted[:, :4].clamp(0, SIDE)  # prediction clips boxes to the image
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=1e-3)


def test_precisions_exclude_each_other(
    network: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolov8_nas.export.onnx.is_qat", lambda network: True)
    with pytest.raises(InputError, match="choose one"):
        export_onnx(network, tmp_path / "model.onnx", imgsz=SIDE, half=True)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_a_quantized_file_can_be_dynamic(tmp_path: Path) -> None:
    images = torch.rand(3, 3, SIDE, SIDE + 32, generator=torch.Generator().manual_seed(0))
    quantized = quantize(detection.lively(SIDE), [images])
    fixed = export_onnx(quantized, tmp_path / "fixed.onnx", imgsz=SIDE, batch=1)
    dynamic = export_onnx(quantized, tmp_path / "dynamic.onnx", imgsz=SIDE, dynamic=True)
    square = images[:1, :, :, :SIDE].numpy()
    outputs = [onnxruntime.InferenceSession(str(f)).run(None, {"images": square})[0] for f in (fixed, dynamic)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    (wide,) = onnxruntime.InferenceSession(str(dynamic)).run(None, {"images": images.numpy()})
    assert wide.shape == (3, 6, (8 * 12 + 4 * 6 + 2 * 3))
