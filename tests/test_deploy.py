"""What ships: exported files compute what their networks compute, and the verdict comes from measuring them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import detection
import fabricated
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from ultralytics import YOLO

from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.deploy.exporter import export
from yolov8_nas.deploy.job import Job
from yolov8_nas.deploy.sources import Form
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import Evaluation, evaluate
from yolov8_nas.export import tensorrt
from yolov8_nas.export.onnx import export_int8, export_int8_ptq, export_onnx
from yolov8_nas.export.thresholds import THRESHOLDS
from yolov8_nas.export.verification import verify_onnx
from yolov8_nas.files import file_sha256
from yolov8_nas.measure import benchmark, nms
from yolov8_nas.measure.benchmark import Measurement, Percentiles, Timing
from yolov8_nas.measure.protocol import VERIFY, Protocol
from yolov8_nas.measure.runtime import Runtime
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import (
    NmsResult,
    Objective,
    PicturesResult,
    ResolvedLimit,
    TrainingRecipe,
    Tuned,
    VerdictResult,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages.trt_export import STAGE
from yolov8_nas.supernet.batchnorm import calibration_batches, recalibrate
from yolov8_nas.supernet.derive import build, save_checkpoint
from yolov8_nas.train.finetune import Recipe, train
from yolov8_nas.train.quantization import fold, load_network, quantize, save_qat_checkpoint

TINY = SearchSpace.load("tiny")
SIDE = 64
PROFILE = fabricated.PROFILE | {"threads": 1}


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))]


def session(file: Path, *, optimise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(file), options)


def test_fp32_file(tmp_path: Path, images: list[Tensor]) -> None:
    network = detection.lively(SIDE, gain=1.6, shift=0.3)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    file = export_onnx(network, tmp_path / "model.onnx", imgsz=SIDE, batch=2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert verify_onnx(network, file, imgsz=SIDE, batch=2) < 1e-4
    again = export_onnx(copy.deepcopy(network), tmp_path / "again.onnx", imgsz=SIDE, batch=2)
    assert file.read_bytes() == again.read_bytes()
    (taken,), (given,) = session(file).get_inputs(), session(file).get_outputs()
    assert (taken.name, taken.shape) == ("images", [2, 3, SIDE, SIDE])
    assert (given.name, given.shape) == ("output0", [2, 6, 84])
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(file).graph.node}
    stock = YOLO(str(file), task="detect")
    assert stock.names == dict(enumerate(detection.CLASSES))
    assert (
        stock.predict(np.zeros((SIDE, SIDE, 3), np.uint8), imgsz=SIDE, batch=2, verbose=False)[0].names == stock.names
    )


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    file = export_onnx(detection.lively(SIDE, gain=1.6, shift=0.3), tmp_path / "model.onnx", imgsz=SIDE)
    with pytest.raises(StageError, match="differs from its network"):
        verify_onnx(detection.lively(SIDE, seed=1, gain=1.6, shift=0.3), file, imgsz=SIDE)


def test_int8_file(tmp_path: Path, images: list[Tensor]) -> None:
    network = detection.lively(SIDE, gain=1.6, shift=0.3)
    file = export_int8_ptq(network, tmp_path / "int8.onnx", imgsz=SIDE, calibration=images)
    assert not any("quantizer" in name for name, _ in network.named_modules())
    fp32 = export_onnx(network, tmp_path / "fp32.onnx", imgsz=SIDE)
    assert file.stat().st_size < 0.4 * fp32.stat().st_size

    # Unoptimised, ONNX Runtime computes what fake quantization computes: the same integers.
    fake = fold(quantize(copy.deepcopy(network), images))
    image = images[0][:1]
    with torch.no_grad():
        expected, exact = fake(image)[0].numpy(), network(image)[0].numpy()
    (got,) = session(file, optimise=False).run(None, {"images": image.numpy()})
    assert np.abs(got - expected).max() < 1e-2 < np.abs(exact - expected).max()

    # Optimised, it runs on integers: every convolution with BatchNorm, none in the head's outputs.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(file), options)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    convs = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert kinds["QLinearConv"] == convs
    assert kinds["Conv"] + kinds["FusedConv"] == 7  # two outputs on three levels, and DFL


@pytest.mark.slow
def test_qat_checkpoint(tmp_path: Path, images: list[Tensor]) -> None:
    network = quantize(detection.lively(SIDE, gain=1.6, shift=0.3), images)
    with torch.no_grad():
        expected = network(images[0])[0]
    save_qat_checkpoint(network, tmp_path / "qat.pt", names=detection.CLASSES, imgsz=SIDE)
    with torch.no_grad():
        assert torch.equal(network(images[0])[0], expected)
        assert torch.equal(load_network(tmp_path / "qat.pt")(images[0])[0], expected)
    first = export_onnx(network, tmp_path / "a.onnx", imgsz=SIDE)
    second = export_int8(tmp_path / "qat.pt", tmp_path / "b.onnx", imgsz=SIDE)
    assert first.read_bytes() == second.read_bytes()
    checkpoint = torch.load(tmp_path / "qat.pt", weights_only=False)
    assert not any("modelopt" in type(module).__module__ for module in checkpoint["model"].modules())


def test_engine_status_is_honest() -> None:
    status = tensorrt.status()
    assert status.built is False
    assert "TensorRT is not installed" in str(status.reason)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What qat-finetune writes for two candidates and a baseline, beside a dataset; the first candidate has learnt."""
    root = tmp_path_factory.mktemp("tuned")
    detection.make_dataset(root / "data-prep", train=24, search=8, val=16)
    data = data_yaml(root / "data-prep", root / "view", validate_on="search")
    torch.manual_seed(0)
    fresh = build(TINY.smallest(), 2, detection.CLASSES).eval()
    recipe = Recipe(epochs=10, batch=4, lr=1e-2, imgsz=SIDE, seed=0, mosaic=False)
    learnt = train(fresh, data, recipe, work=root / "training").network
    calibration = calibration_batches(data, SIDE, 24, 8, 0)
    recalibrate(learnt, calibration)  # after so few steps the running statistics lag behind the weights
    rows: dict[str, Tuned] = {}
    for name, network in {"candidates/0": fresh, "candidates/1": learnt, "baseline": fresh}.items():
        folder = root / "qat-finetune" / name
        folder.mkdir(parents=True)
        save_checkpoint(network, folder / "best.pt", names=detection.CLASSES, imgsz=SIDE)
        save_checkpoint(fresh, folder / "subnet.pt", names=detection.CLASSES, imgsz=SIDE)
        quantized = quantize(copy.deepcopy(network), calibration)
        save_qat_checkpoint(quantized, folder / "qat.pt", names=detection.CLASSES, imgsz=SIDE)
        unlearnt = quantize(copy.deepcopy(fresh), calibration)
        save_qat_checkpoint(unlearnt, folder / "ptq.pt", names=detection.CLASSES, imgsz=SIDE)
        rows[name] = Tuned(
            architecture=TINY.smallest(),
            map50_95={"fp32": 0.0},
            average=0.0,
            best_epoch={"fp32": 12},
            start="supernet",
            begun_with="supernet",
            computing={"training": 1.0},
            distilled=False,
            epochs=12,
            recipe=TrainingRecipe(**asdict(recipe)),
            seconds=1.0,
        )
    # Of candidates is expected as much as their checkpoints had: the file's score decides.
    fabricated.write_tuned(root / "qat-finetune", rows, TrainingRecipe(**asdict(recipe)), expected=(0.0, 0.0))
    (root / "hw-probe").mkdir()
    ResolvedLimit.write_all(root / "hw-probe", fabricated.resolved(Constraint.parse("latency<=5ms")))
    NmsResult(latency_ms=None, reason="not measured here").write(root / "hw-probe")
    (root / "hw-probe" / "profile.json").write_text(json.dumps(PROFILE))
    (root / "search").mkdir()
    fabricated.searched().write(root / "search")
    return root


def test_with_pytorch_the_checkpoint_is_what_is_measured_scored_and_shipped(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tuned / "hw-probe" / "profile.json"
    try:
        profile.write_text(json.dumps(PROFILE | {"runtime": {"name": "torch", "version": "2"}}))
        out = run_export(tuned, tmp_path, monkeypatch, {}, precision="fp32", suffix=".pt")
    finally:
        profile.write_text(json.dumps(PROFILE))
    shipped = json.loads((out / "verdict.json").read_text())["shipped"]
    assert shipped["file"] == "best.pt" and shipped["found"]["boxes"] >= 0
    best = tuned / "qat-finetune" / "candidates" / str(shipped["candidate"]) / "best.pt"
    assert (out / "model" / "best.pt").read_bytes() == best.read_bytes()
    assert shipped["file_mb"] == best.stat().st_size / 2**20
    assert (out / "model" / "model.onnx").exists()


def test_checkpoint_and_onnx_score_alike(tuned: Path, tmp_path: Path) -> None:
    data = data_yaml(tuned / "data-prep", tmp_path, validate_on="val")
    best = tuned / "qat-finetune" / "candidates" / "1" / "best.pt"
    file = export_onnx(load_network(best), tmp_path / "best.onnx", imgsz=SIDE)
    scores = [
        evaluate(model, data, imgsz=SIDE, batch=8, work=tmp_path).map50_95 for model in (best, load_network(best), file)
    ]
    assert min(scores) > 0.05
    assert max(scores) - min(scores) <= 1e-3
    stock = YOLO(str(best)).val(
        data=str(data), imgsz=SIDE, batch=8, rect=False, plots=False, verbose=False, project=str(tmp_path), workers=0
    )
    assert stock.box.map == pytest.approx(scores[0], abs=1e-3)


def made_up_latency(tuned: Path, monkeypatch: pytest.MonkeyPatch, latency: dict[str, float], suffix: str) -> None:
    """Let files take these milliseconds; see `run_export`."""

    def measure(files: Sequence[Path], *, runtime: Runtime, **_: Any) -> list[Measurement]:
        assert {file.suffix for file in files} == {suffix} == {runtime.suffix}
        p50s = [latency.get(file.stem, 4.0) for file in files]
        return [Measurement(Percentiles(p, p, p), (p, p), (p,), 100, False, 40.0, 40 / p, memory_mb=30.0) for p in p50s]

    def measure_with_nms(
        files: Sequence[Path], images: Sequence[np.ndarray], *, protocol: Protocol, **_: Any
    ) -> list[Timing]:
        assert [batch.shape for batch in images] == [(1, 3, SIDE, SIDE)] * 8  # the search split
        limits = json.loads((tuned / "hw-probe" / "constraints.json").read_text())
        assert (protocol == VERIFY) == any(limit["scope"] == "with_nms" for limit in limits)
        p50s = [1 + latency.get(file.stem, 4.0) for file in files]
        return [Timing(Percentiles(p, p, p), (p, p), (p,), 100, False) for p in p50s]

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(nms, "measure_with_nms", measure_with_nms)


def run_export(
    tuned: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    latency: dict[str, float],
    precision: str = "best",
    suffix: str = ".onnx",
) -> Path:
    """Run the stage with made-up latencies (by file name, 4 ms where none is given); returns its output.

    Non-maximum suppression takes 1 ms more, and every file 40 mJ.
    """

    made_up_latency(tuned, monkeypatch, latency, suffix)
    target = {"hardware": "cpu-1t", "precision": precision, "constraints": ["latency<=5ms"]}
    config = RunConfig.parse({"imgsz": SIDE, "targets": [target]}, "test")
    out, partial = work / "out", work / "partial"
    out.mkdir()
    partial.mkdir(exist_ok=True)
    inputs = {name: tuned / name for name in ("data-prep", "hw-probe", "qat-finetune", "search")}
    settings = STAGE.settings(config, config.targets[0])
    context = StageContext(settings, inputs, out, partial, Progress.silent(), HostLock(work / "lock"))
    STAGE.run(context)
    return out


@pytest.fixture
def only_fp32(tuned: Path, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("qat.pt", "ptq.pt", "training", "view")
    return Path(shutil.copytree(tuned, tmp_path / "tuned", ignore=ignored))


def test_fp32_ships(only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_export(only_fp32, tmp_path, monkeypatch, {}, precision="fp32")
    verdict = json.loads((out / "verdict.json").read_text())
    assert [(row["candidate"], row["outcome"]) for row in verdict["tried"]] == [(1, "shipped"), (0, "less accurate")]
    assert verdict["quantization"] is None
    assert (verdict["comparison"]["word"], verdict["comparison"]["decided_by"]) == ("ahead", None)
    assert len(verdict["comparisons"]) == 1
    assert {row["name"]: row["map50_95"] for row in verdict["classes"]} == pytest.approx(
        verdict["shipped"]["per_class"]
    )
    assert {file.name for file in (out / "model").iterdir()} == {
        "model.onnx",
        "model_fp32.onnx",
        "best.pt",
        "subnet.pt",
    }
    (other,) = verdict["choices"]  # it keeps the limits, too
    assert (other["candidate"], other["precision"], other["folder"]) == (0, "fp32", "candidate-0-fp32")
    assert other["comparison"]["subject"] == "Candidate 0"
    beside = out / "choices" / other["folder"]
    assert {file.name for file in beside.iterdir()} == {file.name for file in (out / "model").iterdir()}
    assert file_sha256(beside / "best.pt") == file_sha256(only_fp32 / "qat-finetune" / "candidates" / "0" / "best.pt")


def test_the_same_images_are_shown_with_what_both_find(
    only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nms, "CONFIDENCE", 0.05)  # after so few epochs
    out = run_export(only_fp32, tmp_path, monkeypatch, {}, precision="fp32")
    result = PicturesResult.read(out)
    assert (len(result.images), result.of) == (8, 16)
    assert (result.ours, result.stock) == ("searched, FP32", "stock YOLOv8n, FP32")
    assert {file.name for file in (out / "pictures").iterdir()} == {picture.file for picture in result.images}
    missed = [len(picture.ours.missed) + len(picture.stock.missed) for picture in result.images]
    assert missed == sorted(missed, reverse=True)
    right = [box for picture in result.images for box in picture.ours.found if box.right]
    assert right  # the network that ships has learnt, so boxes of the labels and of the network lie on each other
    for picture in result.images:
        found = sum(box.right for box in picture.ours.found)
        assert found + len(picture.ours.missed) == picture.boxes


def test_detections_are_those_of_ultralytics_on_the_same_picture(tuned: Path, tmp_path: Path) -> None:
    checkpoint, file = tuned / "qat-finetune" / "candidates" / "1" / "best.pt", tmp_path / "best.onnx"
    export_onnx(load_network(checkpoint), file, imgsz=SIDE, batch=2)
    source = sorted((tuned / "data-prep" / "dataset" / "images" / "val").iterdir())
    pictures = [cv2.copyMakeBorder(cv2.imread(str(s)), 0, 40, 0, 0, cv2.BORDER_REFLECT) for s in source[:3]]
    theirs = YOLO(checkpoint).predict(pictures, imgsz=SIDE, rect=False, conf=0.25, iou=0.7, verbose=False)
    ours = nms.detect(file, pictures, imgsz=SIDE, batch=2, threads=1)
    assert sum(len(found) for found in ours) > 0
    for found, result in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, result.boxes.data.numpy(), atol=0.02)


def test_the_export_needs_no_stage(only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_stage = run_export(only_fp32, tmp_path, monkeypatch, {}, precision="fp32")
    job = Job(
        tuned=only_fp32 / "qat-finetune",
        data=only_fp32 / "data-prep",
        profile=Profile.of(PROFILE, "test"),
        limits=[Constraint.parse("latency<=5ms")],
        precision="fp32",
        form=Form(imgsz=SIDE, batch=1, nms_free=False, keep_float=()),
        scale="n",
        out=tmp_path / "alone",
        work=tmp_path / "work",
        host=HostLock(tmp_path / "lock"),
    )
    job.out.mkdir()
    decided = export(job)
    assert decided.result == VerdictResult.read(by_stage) and decided.why_none is None
    names = ("model.onnx", "best.pt")
    assert [file_sha256(job.out / "model" / n) for n in names] == [file_sha256(by_stage / "model" / n) for n in names]


def test_what_would_decide_stands_beside_undecided(
    only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = only_fp32 / "qat-finetune"
    shutil.copyfile(tuned / "candidates" / "1" / "best.pt", tuned / "baseline" / "best.pt")
    out = run_export(only_fp32, tmp_path, monkeypatch, {}, precision="fp32")
    compared = VerdictResult.read(out).comparison
    assert compared is not None and compared.word == "undecided" and compared.decided_by is not None
    assert (compared.decided_by.images, compared.decided_by.smallest) == (16, 0)  # the same network twice
    assert compared.decided_by.trainings is not None


def test_what_all_trainings_let_expect_decides_and_not_the_search_split_alone(
    only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = only_fp32 / "qat-finetune" / "finetune.json"
    summary = json.loads(file.read_text())
    summary["candidates"][0] |= {"expected": 0.9}
    file.write_text(json.dumps(summary))
    verdict = json.loads(
        (run_export(only_fp32, tmp_path, monkeypatch, {}, precision="fp32") / "verdict.json").read_text()
    )
    assert [(row["candidate"], row["outcome"]) for row in verdict["tried"]] == [(0, "shipped"), (1, "less accurate")]
    assert verdict["tried"][1]["reason"].startswith("expected accuracy: 0.")


def test_weights_decide_what_ships_and_every_stock_network_is_told(
    only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = only_fp32 / "qat-finetune"
    shutil.copytree(tuned / "baseline", tuned / "rescaled")
    summary = json.loads((tuned / "finetune.json").read_text())
    summary["rescaled"] = {**summary["baseline"], "name": "YOLOv8n at 0.80 of its width"}
    (tuned / "finetune.json").write_text(json.dumps(summary))
    objective = Objective(accuracy=1.0, latency=10.0, stock_ms=4.0)
    fabricated.searched(objective=objective).write(only_fp32 / "search")
    out = run_export(
        only_fp32, tmp_path, monkeypatch, {"candidate-0-fp32": 3.0, "rescaled-fp32": 3.1}, precision="fp32"
    )
    verdict = json.loads((out / "verdict.json").read_text())
    assert [(row["candidate"], row["outcome"]) for row in verdict["tried"]] == [(0, "shipped"), (1, "less wanted")]
    assert [(row["name"], row["latency_ms"]["p50"]) for row in verdict["baselines"]] == [
        ("YOLOv8n", 4.0),
        ("YOLOv8n at 0.80 of its width", 3.1),
    ]
    assert [row["against"] for row in verdict["comparisons"]] == [
        "YOLOv8n (FP32)",
        "YOLOv8n at 0.80 of its width (FP32)",
    ]


@pytest.mark.slow
def test_the_most_accurate_that_holds_ships(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run_export(tuned, tmp_path, monkeypatch, {"candidate-1-fp32": 5.1, "stock-fp32": 6.0})
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["status"] == "met"
    outcomes = {(row["candidate"], row["precision"]): row["outcome"] for row in verdict["tried"]}
    assert outcomes == {
        (0, "fp32"): "less accurate",
        (0, "int8"): "less accurate",
        (1, "fp32"): "limit missed",
        (1, "int8"): "shipped",
    }
    shipped = verdict["shipped"]
    assert (shipped["candidate"], shipped["precision"], shipped["latency_ms"]["p50"]) == (1, "int8", 4.0)
    assert shipped["constraints"][0]["measured"] == 4.0 and shipped["constraints"][0]["met"]
    assert shipped["params"] == sum(p.numel() for p in build(TINY.smallest(), 2).parameters())
    files = {file.name for file in (out / "model").iterdir()}
    assert files == {
        "model.onnx",
        "model_fp32.onnx",
        "model_int8.onnx",
        "thresholds.json",
        "best.pt",
        "qat.pt",
        "subnet.pt",
    }
    told = verdict["confidence"]
    assert told == json.loads((out / "model" / "thresholds.json").read_text())
    assert (told["of"], told["split"], told["images"]) == ("model_fp32.onnx", "val", 16)
    assert [row["old"] for row in told["table"]] == list(THRESHOLDS)
    assert told["new"]["levels"] > 1
    assert (out / "model" / "model.onnx").read_bytes() == (out / "model" / "model_int8.onnx").read_bytes()
    assert [row["form"] for row in verdict["baselines"]] == ["unrolled, INT8", "unrolled, FP32"]
    assert verdict["comparison"]["word"] == "ahead"
    assert verdict["comparison"]["against"] == "YOLOv8n (INT8)"
    assert len(verdict["comparisons"]) == 3
    assert verdict["quantization"]["difference"]["difference"] == pytest.approx(
        verdict["quantization"]["int8"]["map50_95"] - verdict["quantization"]["fp32"]["map50_95"]
    )
    calibrated = verdict["quantization"]["ptq"]["map50_95"]
    assert calibrated < verdict["quantization"]["int8"]["map50_95"]
    assert verdict["quantization"]["ptq_difference"]["difference"] == pytest.approx(
        calibrated - verdict["quantization"]["fp32"]["map50_95"]
    )
    data = data_yaml(tuned / "data-prep", tmp_path / "again", validate_on="val")
    again = evaluate(out / "model" / "model.onnx", data, imgsz=SIDE, batch=1, work=tmp_path / "again")
    assert shipped["map50_95"] == again.map50_95
    assert Evaluation.load(out / "evaluation" / "candidate-1-int8.npz").map50_95 == again.map50_95
    fp32 = verdict["quantization"]["fp32"]["map50_95"]
    assert verdict["checkpoint_map50_95"] == pytest.approx(fp32, abs=1e-3)
    assert json.loads((out / "engine.json").read_text())["built"] is False


def test_an_exhausted_list_is_a_failed_verdict(
    only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {f"candidate-{i}-fp32": 5.5 + i for i in range(2)}
    with pytest.raises(StageError, match=r"none of 2 exported files .* candidate-0-fp32: latency_p50 5.5 ms, limit 5;"):
        run_export(only_fp32, tmp_path, monkeypatch, slow, precision="fp32")
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert (verdict["status"], verdict["shipped"]) == ("failed", None)
    assert [row["outcome"] for row in verdict["tried"]] == ["limit missed"] * 2
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize(
    ("stock_ms", "candidate_ms", "outcomes"),
    [
        (4.0, 3.1, [(1, "shipped"), (0, "limit missed")]),  # as slow an hour as stock's
        (2.5, 2.3, [(1, "limit missed"), (0, "limit missed")]),  # what was enough by the probe's stock is not beside it
    ],
)
def test_a_share_of_stock_is_held_against_stock_of_the_same_rounds(
    only_fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    baseline: bool,
    stock_ms: float,
    candidate_ms: float,
    outcomes: list[tuple[int, str]],
) -> None:
    limit = Constraint.parse("latency<=80%stock").resolve(3.0)
    ResolvedLimit.write_all(only_fp32 / "hw-probe", fabricated.resolved(limit))
    if not baseline:
        file = only_fp32 / "qat-finetune" / "finetune.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "baseline": None}))
    stock = "stock-fp32" if baseline else "beside-fp32"
    latency = {stock: stock_ms, "candidate-1-fp32": candidate_ms, "candidate-0-fp32": 3.9}
    if outcomes[0][1] == "shipped":
        run_export(only_fp32, tmp_path, monkeypatch, latency, precision="fp32")
    else:
        with pytest.raises(StageError, match="none of 2 exported files"):
            run_export(only_fp32, tmp_path, monkeypatch, latency, precision="fp32")
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert [(tried["candidate"], tried["outcome"]) for tried in verdict["tried"]] == outcomes
    (held,) = verdict["tried"][0]["constraints"]
    assert (held["share"], held["stock"], held["limit"]) == pytest.approx((0.8, stock_ms, 0.8 * stock_ms))
    assert len(verdict["baselines"]) == baseline  # what is only measured beside is no network to compare with


def test_limits_with_nms_and_on_energy_are_held_against_what_ships(
    only_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["latency(with_nms)<=5.2ms", "throughput(with_nms)>=190fps", "energy<=50mJ", "power<=20W"]
    ResolvedLimit.write_all(only_fp32 / "hw-probe", fabricated.resolved(*map(Constraint.parse, asked)))
    out = run_export(only_fp32, tmp_path, monkeypatch, {"candidate-1-fp32": 4.3}, precision="fp32")
    verdict = json.loads((out / "verdict.json").read_text())
    assert [(row["candidate"], row["outcome"]) for row in verdict["tried"]] == [(1, "limit missed"), (0, "shipped")]
    assert verdict["tried"][0]["reason"].startswith("latency_p50(with_nms) 5.3 ms, limit 5.2; throughput(with_nms) 188")
    shipped = verdict["shipped"]
    assert [row["measured"] for row in shipped["constraints"]] == pytest.approx([5.0, 200.0, 40.0, 10.0])
    assert [row["scope"] for row in shipped["constraints"]] == ["with_nms", "with_nms", "engine", "engine"]
    assert (shipped["latency_ms"]["p50"], shipped["latency_with_nms_ms"]["p50"], shipped["energy_mj"]) == (4, 5, 40)
    assert shipped["found"]["boxes"] >= shipped["found"]["detections"]
    assert verdict["nms"] == {**nms.SETTINGS.plain(), "images": 8, "split": "search", "nms_free": False}


ALONE = """
import sys, tempfile
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("yolov8_nas", "modelopt"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from ultralytics import YOLO
best, data, work = sys.argv[1:]
common = {"imgsz": 64, "plots": False, "verbose": False, "workers": 0, "project": work}
score = YOLO(best).val(data=data, rect=False, batch=8, **common).box.map
assert len(YOLO(best).predict(data.replace("data.yaml", "images/val"), save=False, **common)) == 16
file = YOLO(best).export(format="onnx", imgsz=64)
assert abs(YOLO(file).val(data=data, **common).box.map - score) < 1e-3
YOLO(best).train(data=data, epochs=1, batch=8, optimizer="AdamW", amp=False, **common)
print("score", score)
"""


@pytest.mark.slow
def test_best_pt_needs_only_ultralytics(tuned: Path, tmp_path: Path) -> None:
    best = tmp_path / "best.pt"
    best.write_bytes((tuned / "qat-finetune" / "candidates" / "1" / "best.pt").read_bytes())
    data = data_yaml(tuned / "data-prep", tmp_path, validate_on="val")
    ours = evaluate(best, data, imgsz=SIDE, batch=8, work=tmp_path / "work").map50_95
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(best), str(data), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split("score")[-1]) == pytest.approx(ours, abs=1e-3)
