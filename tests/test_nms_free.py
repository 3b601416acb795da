"""The NMS-free head: both branches learn, one of them ships, and what is measured, scored and served is that one."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import detection
import fabricated
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fabricated import PROFILE, write_outputs
from interruption import Interrupted, interrupt_after
from onnx import TensorProto
from torch import Tensor
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss

from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.evaluation import ProtocolValidator, evaluate
from yolov8_nas.export import artifact, packaging, serving
from yolov8_nas.export import tensorrt as engines
from yolov8_nas.export.artifact import write_network
from yolov8_nas.export.deepstream import parsed_by_deepstream
from yolov8_nas.export.gpu_int8 import int8_for_gpu
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.export.onnx_file import read_metadata, read_onnx
from yolov8_nas.export.servable import nms_free, read_servable
from yolov8_nas.export.verification import TOLERANCE, _distance_of_detections, verify_onnx
from yolov8_nas.files import read_json, write_json
from yolov8_nas.measure import benchmark, nms
from yolov8_nas.measure.benchmark import Measurement, Percentiles, Timing
from yolov8_nas.measure.bundle import differences
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.runtime import find
from yolov8_nas.report import sections
from yolov8_nas.report.evidence import Outputs
from yolov8_nas.run import preflight
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import (
    CandidateResult,
    Latency,
    NmsResult,
    ResolvedLimit,
    SuppressionTimed,
    TimedLoad,
    VerdictResult,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.hw_probe import STAGE
from yolov8_nas.stages.hw_probe import settings as hw_probe
from yolov8_nas.stages.hw_probe.table import Table
from yolov8_nas.stages.search.run import _Search
from yolov8_nas.supernet.derive import add_one_to_one, build, save_checkpoint, unroll
from yolov8_nas.supernet.images import settings
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.train.finetune import Recipe, _TaughtLoss, train
from yolov8_nas.train.quantization import float_parts, fold, load_network, quantize, save_qat_checkpoint

TINY = SearchSpace.load("tiny")
SIDE = 64
ANCHORS = 84


def two_branches(seed: int = 0, **strength: float) -> DetectionModel:
    """A network whose one-to-one branch is another one than its one-to-many branch, as after a training."""
    network = add_one_to_one(detection.lively(SIDE, seed, **strength))
    head = network.model[-1]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*head.one2one_cv2.parameters(), *head.one2one_cv3.parameters()):
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def network() -> DetectionModel:
    return two_branches()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def exported(network: DetectionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network, tmp_path_factory.mktemp("exported") / "model.onnx", imgsz=SIDE)


# What is exported -----------------------------------------------------------------------------------------------------


def test_the_branch_starts_as_a_copy_and_the_yaml_tells_of_it() -> None:
    plain = detection.lively(SIDE)
    network = add_one_to_one(copy.deepcopy(plain))
    rebuilt = DetectionModel(copy.deepcopy(network.yaml), verbose=False)
    assert list(rebuilt.state_dict()) == list(network.state_dict()), "as Ultralytics' trainer rebuilds it"
    head = network.model[-1]
    for one, many in ((head.one2one_cv2, head.cv2), (head.one2one_cv3, head.cv3)):
        pairs = list(zip(one.parameters(), many.parameters(), strict=True))
        assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert not plain.end2end and "end2end" not in plain.yaml
    with torch.no_grad():
        assert network(torch.zeros(1, 3, SIDE, SIDE))[0].shape == (1, ANCHORS, 6)


def test_stock_is_unrolled_with_both_branches() -> None:
    stock = add_one_to_one(DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval())
    image = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(unroll(stock)(image)[0], stock(image)[0])


@pytest.mark.parametrize(("half", "dynamic"), [(False, False), (False, True), (True, True)])
def test_a_file_computes_what_its_network_computes(
    network: DetectionModel, tmp_path: Path, half: bool, dynamic: bool
) -> None:
    shape: dict[str, Any] = {"imgsz": SIDE, "batch": 2, "half": half, "dynamic": dynamic}
    before = [*network.state_dict()]
    file = export_onnx(network, tmp_path / "model.onnx", **shape)
    assert [*network.state_dict()] == before and network.end2end
    largest = verify_onnx(network, file, **shape)
    assert half or largest < TOLERANCE
    with pytest.raises(StageError, match="differs from its network"):
        verify_onnx(two_branches(seed=1), file, **shape)
    onnx.checker.check_model(onnx.load(file), full_check=True)
    (given,) = onnxruntime.InferenceSession(str(file)).get_outputs()
    assert (given.type, given.shape) == ("tensor(float)", ["batch", 300, 6] if dynamic else [2, ANCHORS, 6])
    metadata = read_metadata(file, read_onnx(file)[1])
    assert metadata["end2end"] is True and metadata["args"]["nms"] is False


def test_only_the_one_to_one_branch_ships(network: DetectionModel, exported: Path, tmp_path: Path) -> None:
    plain = export_onnx(detection.lively(SIDE), tmp_path / "plain.onnx", imgsz=SIDE)
    convolutions = [sum(n.op_type == "Conv" for n in onnx.load(f).graph.node) for f in (exported, plain)]
    assert convolutions[0] == convolutions[1]
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.model[-1].cv2[0][2].bias[0] += 5
    verify_onnx(other, exported, imgsz=SIDE)
    with torch.no_grad():
        other.model[-1].one2one_cv2[0][2].bias[0] += 5
    with pytest.raises(StageError, match="differs from its network"):
        verify_onnx(other, exported, imgsz=SIDE)


def test_a_file_of_any_size_has_as_many_detections_on_small_and_large_images(
    network: DetectionModel, tmp_path: Path
) -> None:
    file = export_onnx(network, tmp_path / "model.onnx", imgsz=SIDE, dynamic=True)
    session = onnxruntime.InferenceSession(str(file))
    rng = np.random.default_rng(0)
    for height, width in ((32, 32), (160, 128)):
        image = rng.random((1, 3, height, width), dtype=np.float32)
        (found,) = session.run(None, {"images": image})
        with torch.no_grad():
            expected = network(torch.from_numpy(image))[0].numpy()
        assert found.shape == (1, 300, 6)
        np.testing.assert_allclose(found[:, : expected.shape[1], 4], expected[..., 4], atol=1e-3)
        choices = 2 * sum(height * width // stride**2 for stride in (8, 16, 32))
        assert not found[:, choices:, :5].any(), "score and box of what is not there"


def test_verification_is_about_detections_and_not_about_their_places() -> None:
    rng = np.random.default_rng(0)
    anchors = np.concatenate([rng.uniform(0, SIDE, (1, 4, 20)), rng.uniform(0.1, 0.9, (1, 2, 20))], axis=1)
    anchors[0, 4, :2] = 0.95  # two as good as each other
    order = np.argsort(-anchors[0, 4])
    truth = np.stack([*anchors[0, :4, order].T, anchors[0, 4, order], np.zeros(20)], axis=-1)[None, :10]
    other = truth[:, [1, 0, *range(2, 10)]]
    assert (other != truth).any() and _distance_of_detections(other, truth, anchors, SIDE) == 0
    for column, by in ((0, 3.2), (4, 0.05), (5, 1.0)):
        wrong = truth.copy()
        wrong[0, 4, column] += by
        assert _distance_of_detections(wrong, truth, anchors, SIDE) > 0.02
    wrong = truth.copy()
    wrong[0, 3:] = truth[0, 2]
    assert _distance_of_detections(wrong, truth, anchors, SIDE) > 0.02, "one detection, over and over"
    assert np.isinf(_distance_of_detections(np.full_like(truth, np.nan), truth, anchors, SIDE))


def test_stock_ultralytics_finds_the_same_with_file_and_checkpoint(
    network: DetectionModel, exported: Path, tmp_path: Path
) -> None:
    save_checkpoint(network, tmp_path / "best.pt", names=detection.CLASSES, imgsz=SIDE)
    picture = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
    asked: dict[str, Any] = {"imgsz": SIDE, "conf": 1e-3, "verbose": False}
    file, checkpoint = (
        stock.predict(picture, **asked, **setting)[0].boxes.data
        for stock, setting in (
            (YOLO(str(exported), task="detect"), {}),
            (YOLO(str(tmp_path / "best.pt")), {"nms": False}),
        )
    )
    assert len(file) == len(checkpoint) > 10
    torch.testing.assert_close(file[:, 4], checkpoint[:, 4], rtol=1e-4, atol=1e-5)


def test_suppression_behind_it_is_refused(network: DetectionModel, exported: Path, tmp_path: Path) -> None:
    save_checkpoint(network, tmp_path / "best.pt", names=detection.CLASSES, imgsz=SIDE)
    with pytest.raises(InputError, match=r"both\.onnx: the network's head is NMS-free.*export it without nms"):
        packaging.export(tmp_path / "best.pt", tmp_path / "both.onnx", nms=True)
    graph = onnx.load(exported)
    with pytest.raises(InputError, match=r"leave options\.nms out"):
        engines._check_has_no_nms(exported, graph, read_metadata(exported, graph))
    written = packaging.export(tmp_path / "best.pt", tmp_path / "one.onnx")
    assert written.read_bytes() == exported.read_bytes()


def test_int8(network: DetectionModel, images: list[Tensor], tmp_path: Path) -> None:
    lively = two_branches(gain=1.6, shift=0.3)
    quantized = quantize(copy.deepcopy(lively), images, ["stem", "detect_classes"])
    assert float_parts(quantized) == ["stem", "detect_classes"]
    head = quantized.model[-1]
    for box, one in zip(head.cv2, head.one2one_cv2, strict=True):
        for branch in (box, one):
            assert branch[0].conv.input_quantizer._amax > 0, "either branch has seen images"
            assert not branch[2].input_quantizer.is_enabled
    assert not head.one2one_cv3[0][0].conv.input_quantizer.is_enabled

    save_qat_checkpoint(quantized, tmp_path / "qat.pt", names=detection.CLASSES, imgsz=SIDE)
    loaded = load_network(tmp_path / "qat.pt")
    assert loaded.end2end and float_parts(loaded) == ["stem", "detect_classes"]
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    found = YOLO(str(tmp_path / "qat.pt")).predict(picture, imgsz=SIDE, conf=1e-3, nms=False, verbose=False)
    assert len(found[0].boxes) > 10

    file = export_onnx(loaded, tmp_path / "int8.onnx", imgsz=SIDE)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    image = images[0][:1]
    with torch.no_grad():
        expected, exact = (model(image)[0][..., 4].numpy() for model in (fold(copy.deepcopy(loaded)), lively))
    for written in (file, int8_for_gpu(file, tmp_path / "signed.onnx", half=False)):
        (got,) = onnxruntime.InferenceSession(str(written), options).run(None, {"images": image.numpy()})
        assert np.abs(got[..., 4] - expected).max() < 1e-3 < np.abs(exact - expected).max()
    gpu = int8_for_gpu(file, tmp_path / "gpu.onnx")
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(onnx.load(gpu)).graph.value_info
    }
    chosen = [kinds[node.input[0]] for node in onnx.load(gpu).graph.node if node.op_type == "TopK"]
    assert chosen == [TensorProto.FLOAT] * 2
    assert TensorProto.FLOAT16 in kinds.values()


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection.make_dataset(tmp_path_factory.mktemp("data-prep"), train=16, search=4, val=4)


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_yaml(folder, tmp_path_factory.mktemp("view"), validate_on="search")


def fresh() -> DetectionModel:
    torch.manual_seed(0)
    return add_one_to_one(build(TINY.smallest(), 2, detection.CLASSES))


def test_both_branches_learn_and_an_interrupted_training_ends_the_same(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch=8, lr=2e-3, imgsz=SIDE, seed=0)
    start, teacher = fresh(), two_branches()
    whole = train(start, data, recipe, work=tmp_path / "whole", teacher=teacher)
    with pytest.raises(Interrupted):
        train(start, data, recipe, work=tmp_path / "parts", teacher=teacher, report=interrupt_after(1))
    parts = train(start, data, recipe, work=tmp_path / "parts", teacher=teacher)
    assert [{**row, "seconds": 0} for row in whole.curves] == [{**row, "seconds": 0} for row in parts.curves]
    state = parts.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.network.state_dict().items())

    before, after = start.model[-1], whole.network.model[-1]
    for name in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-3, f"{name} has not learnt"
    pairs = zip(after.cv2.parameters(), after.one2one_cv2.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs), "they learn different things"

    assert whole.network.end2end
    files = [export_onnx(n, tmp_path / f"{i}.onnx", imgsz=SIDE) for i, n in enumerate((start, whole.network))]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_each_branch_is_taught_by_the_teachers_own(images: list[Tensor]) -> None:
    student = two_branches()
    student.args = settings(SIDE)
    batch = {"img": images[0], "batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}
    with torch.no_grad():
        _, predictions = student(images[0])

    def distance(changed: str = "", loss: E2ELoss | None = None) -> float:
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            for output in getattr(teacher.model[-1], changed) if changed else ():
                output[2].bias += 0.5
        return float(_TaughtLoss(loss or student.init_criterion(), student, teacher)(predictions, batch)[0][-1])

    assert distance() == pytest.approx(0, abs=1e-4)
    late = student.init_criterion()
    late.o2m, late.o2o = 0.1, 0.9
    for branch, share in (("cv3", 0.1 / 0.8), ("one2one_cv3", 0.9 / 0.2)):
        assert distance(branch) > 0.01
        assert distance(branch, late) == pytest.approx(share * distance(branch), rel=1e-3)


def test_what_is_scored_is_the_branch_that_ships(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated: list[tuple[int, ...]] = []
    postprocess = ProtocolValidator.postprocess

    def look(validator: ProtocolValidator, preds: Any) -> Any:
        validated.append((preds[0] if isinstance(preds, (list, tuple)) else preds).shape[1:])
        return postprocess(validator, preds)

    monkeypatch.setattr(ProtocolValidator, "postprocess", look)
    recipe = Recipe(epochs=1, batch=8, lr=2e-3, imgsz=SIDE, seed=0)
    trained = train(fresh(), data, recipe, work=tmp_path / "work").network
    save_checkpoint(trained, tmp_path / "best.pt", names=detection.CLASSES, imgsz=SIDE)
    file = export_onnx(trained, tmp_path / "best.onnx", imgsz=SIDE)
    models = (tmp_path / "best.pt", fold(copy.deepcopy(trained)), file)
    scores = [evaluate(model, data, imgsz=SIDE, batch=4, work=tmp_path / "scores").images for model in models]
    assert set(validated) == {(ANCHORS, 6)}
    for found in scores[1:]:
        for image, same in zip(found, scores[0], strict=True):
            np.testing.assert_allclose(image.conf, same.conf, atol=1e-3)


# The stages -----------------------------------------------------------------------------------------------------------


def asked(nms_free: bool, precision: str = "best", constraints: Sequence[str] = ("latency<=50ms",)) -> RunConfig:
    return RunConfig.parse(
        {
            "space": "tiny",
            "imgsz": SIDE,
            "supernet": {"epochs": 1},
            "probe": {"networks": 12, "holdout": 5},
            "search": {"candidates": 1},
            "finetune": {"epochs": 1, "qat_epochs": 1, "candidates": 1, "batch": 8, "nms_free": nms_free},
            "targets": [{"hardware": "cpu-1t", "precision": precision, "constraints": list(constraints)}],
        },
        "test",
    )


@pytest.mark.parametrize("stage", ["hw-probe", "search", "qat-finetune", "trt-export"])
def test_results_depend_on_the_head(stage: str) -> None:
    given = find_stage(stage).settings
    plain, free = (given(config, config.targets[0]).plain() for config in (asked(False), asked(True)))
    head = "finetune" if stage == "qat-finetune" else "nms_free"
    assert {name for name in plain if plain[name] != free[name]} == {head}


def test_measurements_elsewhere_are_of_one_head() -> None:
    recipes = [hw_probe.recipe(config, config.targets[0]).plain() for config in (asked(False), asked(True))]
    for i, packed in enumerate(recipes):
        assert differences(json.loads(json.dumps(packed)), recipes[i]) == []
        assert differences(json.loads(json.dumps(packed)), recipes[1 - i]) == ["nms_free"]


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("onnxruntime", "fp32"), pytest.param("onnxruntime", "int8", marks=pytest.mark.slow), ("torch", "fp32")],
)
def test_what_is_measured_has_the_head_that_ships(
    runtime: str, precision: str, images: list[Tensor], tmp_path: Path
) -> None:
    network, runs = detection.lively(SIDE), find(runtime, "cpu", precision)
    file = tmp_path / f"network{runs.suffix}"
    write_network(network, file, runtime=runs, imgsz=SIDE, calibration=images, nms_free=True)
    assert not network.end2end, "the network itself is left as it is"
    runner = runs.open(file, 1, 1)
    (taken,) = runner.get_inputs()
    (output,) = runner.run(None, {taken.name: images[0][:1].numpy()})
    assert output.shape == (1, ANCHORS, 6)
    found = nms.boxes(file, [images[0][:1].numpy()], threads=1, runtime=runs)
    assert found["boxes"] == found["detections"] == (output[0, :, 4] > nms.CONFIDENCE).sum()


@pytest.mark.parametrize("asked_for", [False, True])
def test_probe_search_and_preflight_ask_for_the_same_head(
    asked_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bool] = []

    def written(model: DetectionModel, file: Path, *, nms_free: bool, **_: Any) -> Path:
        heads.append(nms_free)
        return file

    def timed(*, nms_free: bool, **_: Any) -> None:
        heads.append(nms_free)
        raise Interrupted

    monkeypatch.setattr(artifact, "write_network", written)
    monkeypatch.setattr(nms, "time_nms", timed)
    config = asked(asked_for, precision="fp32")
    target, network = config.targets[0], build(TINY.smallest(), 2)
    host, runtime = HostLock(tmp_path / "lock"), find("onnxruntime", "cpu", "fp32")
    given = STAGE.whole(config, target, {"num_classes": 2}).table
    table = Table(StageContext(given, {}, tmp_path, tmp_path, Progress.silent(), host))
    table.bench.write(network, tmp_path / "network.onnx")
    monkeypatch.setattr(table.bench, "export_all", lambda samples: ({}, {}))
    monkeypatch.setattr(table.bench, "export_as_c2f", lambda: tmp_path)
    monkeypatch.setattr(table.bench, "measure", lambda files, checkpoint: [None])
    with pytest.raises(Interrupted):
        table.run()
    searching: Any = SimpleNamespace(
        ctx=SimpleNamespace(partial=tmp_path), runtime=runtime, supernet=SimpleNamespace(space=TINY, num_classes=2),
        scorer=SimpleNamespace(network=lambda architecture: network),
        settings=find_stage("search").settings(config, target),
    )  # fmt: skip
    _Search.export(searching, TINY.smallest())
    preflight._export(TINY, config, target, runtime, detection.CLASSES, tmp_path)
    assert heads == [asked_for] * 5


def test_behind_it_the_threshold_alone_is_timed() -> None:
    quick = Protocol(warmup=1, repetitions=2, min_rounds=1, max_rounds=1, precision=1.0, leg=1)
    told = nms.time_nms(num_classes=3, imgsz=SIDE, batch=2, nms_free=True, protocol=quick).timed
    assert told is not None
    assert told.shape == (2, ANCHORS, 6) and told.nms_free and told.iou is None
    for name, load in told.loads.items():
        assert load.boxes == load.detections == min(nms.LOADS[name].objects, ANCHORS)
    output = nms.made_up_detections(nms.LOADS["few"], num_classes=3, imgsz=640, batch=1)
    assert output.shape == (1, 300, 6) and (np.diff(output[0, :, 4]) <= 0).all()


@pytest.mark.slow
def test_from_fine_tuning_to_the_verdict(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, quantized, exported and scored; only latencies are made up."""
    inputs = {name: tmp_path / name for name in ("supernet-train", "search", "hw-probe")} | {"data-prep": folder}
    torch.manual_seed(0)
    inputs["supernet-train"].mkdir()
    Supernet(TINY, 2, detection.CLASSES).save(inputs["supernet-train"], {})
    for name in ("search", "hw-probe"):
        inputs[name].mkdir()
    CandidateResult.write_all(inputs["search"], [fabricated.candidate(TINY.smallest())])
    fabricated.searched().write(inputs["search"])
    ResolvedLimit.write_all(inputs["hw-probe"], fabricated.resolved(Constraint.parse("latency(with_nms)<=4.4ms")))
    profile = PROFILE | {"threads": 1}
    write_json(inputs["hw-probe"] / "profile.json", profile)
    NmsResult(latency_ms=None, reason="not measured here").write(inputs["hw-probe"])

    def measure(files: Sequence[Path], **_: Any) -> list[Measurement]:
        p50s = [5.0 if "fp32" in file.stem else 4.0 for file in files]
        return [Measurement(Percentiles(p, p, p), (p, p), (p,), 100, False, None, None, memory_mb=30.0) for p in p50s]

    def measure_with_nms(files: Sequence[Path], images: Sequence[Any], **_: Any) -> list[Timing]:
        return [
            Timing(Percentiles(p, p, p), (p, p), (p,), 100, False)
            for p in (one.latency_ms.p50 + 0.1 for one in measure(files))
        ]

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(nms, "measure_with_nms", measure_with_nms)

    def run(stage: str, config: RunConfig, name: str) -> Path:
        work = tmp_path / name
        for part in ("out", "partial"):
            (work / part).mkdir(parents=True)
        host = HostLock(work / "lock")
        given = find_stage(stage).settings(config, config.targets[0])
        find_stage(stage).run(StageContext(given, inputs, work / "out", work / "partial", Progress.silent(), host))
        return work / "out"

    inputs["qat-finetune"] = run("qat-finetune", asked(True), "tuned")
    tuned = inputs["qat-finetune"]
    assert not load_network(tuned / "candidates" / "0" / "subnet.pt").end2end, "as it was searched"
    for name in ("candidates/0/best.pt", "candidates/0/qat.pt", "candidates/0/ptq.pt", "baseline/best.pt"):
        assert load_network(tuned / name).end2end

    with pytest.raises(StageError, match=r"best\.pt: its head is NMS-free, and finetune\.nms_free is False"):
        run("trt-export", asked(False), "other")
    out = run("trt-export", asked(True), "exported")
    verdict = read_json(out / "verdict.json")
    assert verdict["shipped"]["precision"] == "int8", "with the threshold it keeps the limit"
    assert verdict["shipped"]["constraints"][0]["measured"] == pytest.approx(4.1)
    assert verdict["nms"]["nms_free"] is True
    assert verdict["shipped"]["found"]["boxes"] == verdict["shipped"]["found"]["detections"]
    shipped = read_servable(out / "model" / "model.onnx")
    assert nms_free(shipped.metadata) and shipped.output.shape == (1, ANCHORS, 6)


# Servers --------------------------------------------------------------------------------------------------------------


def test_servers_are_told_that_nothing_is_to_be_suppressed(exported: Path, tmp_path: Path) -> None:
    done = serving.package(exported, tmp_path / "served", name="parts")
    assert done.parts == ("triton", "deepstream")
    assert f"dims: [ 1, {ANCHORS}, 6 ]" in (tmp_path / "served/triton/parts/config.pbtxt").read_text()
    config = (tmp_path / "served/deepstream/config_infer_primary.txt").read_text()
    assert "cluster-mode=4\n" in config and "nms-iou-threshold" not in config

    image = np.random.default_rng(0).random((1, 3, SIDE, SIDE), dtype=np.float32)
    (raw,) = onnxruntime.InferenceSession(str(exported)).run(None, {"images": image})
    session = onnxruntime.InferenceSession(str(tmp_path / "served/deepstream/model.onnx"))
    names = ["detection_boxes", "detection_scores", "detection_classes"]
    boxes, scores, classes = session.run(names, {"images": image})
    np.testing.assert_allclose(boxes[..., [1, 0, 3, 2]] * SIDE, raw[..., :4], rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(scores, raw[..., 4])
    np.testing.assert_array_equal(classes, raw[..., 5])
    dynamic = export_onnx(two_branches(), tmp_path / "dynamic.onnx", imgsz=SIDE, dynamic=True)
    graph = parsed_by_deepstream(onnx.load(dynamic), SIDE, SIDE, classes=2, nms_free=True)
    assert [size.dim_value for size in graph.graph.output[0].type.tensor_type.shape.dim][1:] == [300, 4]


def test_the_example_finds_what_stock_ultralytics_finds(exported: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "infer.py"))
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 255, (40, 100, 3)).astype(np.uint8))
    found = list(example["detect"](str(exported), [str(picture)], confidence=1e-3))
    stock = YOLO(str(exported), task="detect").predict(picture, imgsz=SIDE, conf=1e-3, verbose=False)[0].boxes.data
    assert len(found) == len(stock) > 3
    for (_, _, score, corners), row in zip(found, stock.tolist(), strict=True):
        np.testing.assert_allclose([*corners, score], row[:5], rtol=1e-4, atol=1e-2)


# What is told ---------------------------------------------------------------------------------------------------------


def test_the_report_tells_the_head(tmp_path: Path) -> None:
    folders = write_outputs(tmp_path)
    verdict = VerdictResult.read(folders["trt-export"])
    assert verdict.shipped is not None
    latency = Latency(p50=2.0, p90=2.1, p99=2.2)
    shipped = verdict.shipped.model_copy(update={"latency_with_nms_ms": latency})
    timed = {"latency_ms": latency, "interval_ms": (2, 2), "rounds": (2,), "repetitions": 9, "disturbed": False}
    loads = {"typical": TimedLoad(boxes=20.0, detections=20.0, **timed)}
    for told, words in (({}, "NMS"), ({"nms_free": True}, "threshold")):
        timed_on_images = verdict.nms.model_copy(update=told)
        verdict.model_copy(update={"shipped": shipped, "nms": timed_on_images}).write(folders["trt-export"])
        suppressed = SuppressionTimed(**{**dict(nms.SETTINGS), **told}, shape=(), loads=loads, load="typical")
        NmsResult(latency_ms=latency, timed=suppressed).write(folders["hw-probe"])
        outputs = {stage: Outputs(stage, folders[stage], "done") for stage in ("hw-probe", "trt-export")}
        rows = sections._frame(
            sections.Target("t", fabricated.target(), outputs, Outputs("supernet-train", None, None))
        )
        assert ("head" in dict(rows)) == bool(told)
        assert sum(words in name for name, _ in rows if "p50" in name or "alone, 20" in name) == 2


@pytest.mark.slow
def test_the_registered_version_tells_the_head(tmp_path: Path) -> None:
    from yolov8_nas.stages.register.run import _submission
    from yolov8_nas.stages.register.settings import RegisterSettings

    folders = write_outputs(tmp_path / "outputs")
    asked_for = dict.fromkeys(RegisterSettings.model_fields, "") | {"constraints": ()}
    ctx: Any = SimpleNamespace(inputs=folders, out=tmp_path, settings=SimpleNamespace(**asked_for))
    assert "head" not in _submission(ctx).deployable.params
    file = folders["trt-export"] / "verdict.json"
    verdict = read_json(file)
    write_json(file, verdict | {"nms": verdict["nms"] | {"nms_free": True}})
    assert _submission(ctx).deployable.params["head"] == "one-to-one"
