"""What stays in floating point: one recipe wherever INT8 is, and the measurement that suggests it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import detection
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor
from typer.testing import CliRunner
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.analysis import sensitivity
from yolov8_nas.analysis.sensitivity import Sensitivity, Speed, Variant, fastest, pareto_front, smallest_set, worth
from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.data.demo import CLASSES, make_demo
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.evaluation import Comparison, Evaluation, ImageStats, mean_average_precision
from yolov8_nas.export.gpu_int8 import int8_for_gpu
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.measure.benchmark import measure
from yolov8_nas.measure.bundle import differences
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.report import wording
from yolov8_nas.runner import process
from yolov8_nas.space import PARTS, Architecture, SearchSpace
from yolov8_nas.space.topology import model_rows
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.hw_probe.settings import recipe
from yolov8_nas.supernet.derive import build, save_checkpoint, unroll
from yolov8_nas.train import finetune
from yolov8_nas.train.quantization import (
    float_parts,
    fold,
    load_network,
    parts_by_row,
    quantize,
    require_recipe,
    save_qat_checkpoint,
)

TINY = SearchSpace.load("tiny")
SIDE = 64
KEPT = ("stem", "topdown_p3", "detect_boxes")


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def kept(images: list[Tensor]) -> DetectionModel:
    """A network with fake quantization, but for `KEPT`."""
    return quantize(detection.lively(SIDE, gain=1.6, shift=0.3), images, KEPT)


def asked(precision: str, keep_float: Sequence[str] = ()) -> RunConfig:
    target = {"hardware": "cpu-1t", "precision": precision, "constraints": ["latency<=50ms"]}
    content = {"space": "tiny", "probe": {"networks": 12, "holdout": 5}, "targets": [target]}
    return RunConfig.parse({**content, "quantization": {"keep_float": list(keep_float)}}, "test")


# What stays in floating point -----------------------------------------------------------------------------------------


def by_row(architecture: Architecture) -> list[str]:
    return [name.split(".")[0] for name, _ in model_rows(architecture)]


def test_rows_have_their_parts_in_every_network() -> None:
    attentive, drawn = replace(TINY.stock, attention=1), TINY.sample(np.random.default_rng(0))
    for architecture in (TINY.stock, attentive, drawn):
        network = build(architecture, 2)
        rows = parts_by_row(network)
        for row, found, named in zip(network.model, rows, by_row(architecture), strict=True):
            assert found == named or not any(True for _ in row.parameters())
    stock = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    assert [*dict.fromkeys(parts_by_row(stock))] == [*dict.fromkeys(parts_by_row(unroll(stock)))]
    with pytest.raises(InputError, match="has not YOLOv8's parts"):
        parts_by_row(DetectionModel("yolov5n.yaml", nc=2, verbose=False))


def test_only_what_is_named_stays_in_floating_point(kept: DetectionModel, images: list[Tensor]) -> None:
    plain = quantize(detection.lively(SIDE, gain=1.6, shift=0.3), images)
    assert float_parts(plain) == []
    assert float_parts(kept) == float_parts(fold(copy.deepcopy(kept))) == list(KEPT)
    ranges = plain.state_dict()
    assert all(torch.equal(value, ranges[name]) for name, value in kept.state_dict().items())


def test_files_have_floats_where_the_network_has(kept: DetectionModel, images: list[Tensor], tmp_path: Path) -> None:
    file = export_onnx(kept, tmp_path / "cpu.onnx", imgsz=SIDE)
    graph = onnx.load(file).graph
    made = {name: node for node in graph.node for name in node.output}
    rows = parts_by_row(kept)
    convolutions: dict[str, set[str]] = {}
    for node in graph.node:
        if node.op_type == "Conv" and "/dfl/" not in node.name:
            _, row, inner, *_ = node.name.removeprefix("/model").split("/")[0].split(".") + node.name.split("/")[2:]
            part = rows[int(row)] if rows[int(row)] != "detect" else inner.split(".")[0]
            weight = made.get(node.input[1])
            convolutions.setdefault(part, set()).add(weight.op_type if weight else "float")
    assert convolutions.pop("cv2") == {"float"}, "the branch of the boxes"
    assert convolutions.pop("cv3") == {"float", "DequantizeLinear"}, "the outputs stay in floating point"
    assert {part for part, kinds in convolutions.items() if kinds == {"float"}} == set(KEPT) - {"detect_boxes"}
    assert {part for part, kinds in convolutions.items() if kinds == {"DequantizeLinear"}} >= {"down_p2", "sppf"}

    image = images[0][:1]
    with torch.no_grad():
        expected = fold(copy.deepcopy(kept))(image)[0].numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for written in (file, int8_for_gpu(file, tmp_path / "signed.onnx", half=False)):
        session = onnxruntime.InferenceSession(str(written), options)
        assert np.abs(session.run(None, {"images": image.numpy()})[0] - expected).max() < 1e-2
    half = onnx.shape_inference.infer_shapes(onnx.load(int8_for_gpu(file, tmp_path / "half.onnx")), strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in half.graph.value_info}
    in_fp16 = [kinds[n.output[0]] == TensorProto.FLOAT16 for n in half.graph.node if n.op_type == "Conv"]
    assert in_fp16.count(False) == 1, "DFL's alone"


def test_a_checkpoint_keeps_the_recipe_and_another_one_is_refused(kept: DetectionModel, tmp_path: Path) -> None:
    save_qat_checkpoint(kept, tmp_path / "qat.pt", names=detection.CLASSES, imgsz=SIDE)
    network = load_network(tmp_path / "qat.pt")
    require_recipe(network, [*KEPT, "attention"], tmp_path / "qat.pt")  # the network has none
    with pytest.raises(
        StageError, match=r"qat\.pt: in floating point stay stem, topdown_p3, detect_boxes, and .* sppf"
    ):
        require_recipe(network, ["sppf"], tmp_path / "qat.pt")


def test_the_network_in_training_and_its_average_keep_the_same_parts(
    kept: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def look(trainer: Any) -> None:
        assert float_parts(trainer.model) == float_parts(trainer.ema.ema) == list(KEPT)
        raise Stopped

    monkeypatch.setattr(finetune._Trainer, "_begin_epoch", look)
    view = data_yaml(detection.make_dataset(tmp_path, train=4, search=2, val=2), tmp_path, validate_on="search")
    with pytest.raises(Stopped):
        finetune.train(kept, view, finetune.Recipe(1, 4, 1e-3, SIDE, 0), work=tmp_path / "work")


# The configuration ----------------------------------------------------------------------------------------------------


def test_parts_are_named_in_the_configuration() -> None:
    assert asked("int8", ["sppf", "stem", "sppf"]).quantization.keep_float == ("stem", "sppf")
    with pytest.raises(
        InputError, match=r"quantization\.keep_float = .*no part of a network is called 'neck'; .* stem,"
    ):
        asked("int8", ["neck"])
    with pytest.raises(InputError, match="nothing is left to quantize"):
        asked("int8", [part for part in PARTS if part != "attention"])


@pytest.mark.parametrize("stage", ["hw-probe", "search", "qat-finetune", "trt-export"])
def test_only_results_in_int8_depend_on_the_recipe(stage: str) -> None:
    def settings(precision: str, keep_float: Sequence[str] = ()) -> dict[str, Any]:
        config = asked(precision, keep_float)
        return find_stage(stage).settings(config, config.targets[0]).plain()

    assert settings("fp32", KEPT) == settings("fp32")
    assert settings("int8", KEPT)["keep_float"] == list(KEPT)
    searches_in_floats = stage in ("hw-probe", "search")
    assert (settings("best", KEPT) == settings("best")) == searches_in_floats
    assert settings("int8")["keep_float"] == []


def test_measurements_elsewhere_are_of_one_recipe() -> None:
    plain, other = (recipe(c, c.targets[0]).plain() for c in (asked("int8"), asked("int8", KEPT)))
    for packed, wanted, differing in (
        (plain, plain, []), (other, other, []), (plain, other, ["keep_float"]), (other, plain, ["keep_float"])
    ):  # fmt: skip
        assert differences(json.loads(json.dumps(packed)), wanted) == differing


def test_the_report_tells_the_recipe() -> None:
    assert wording.recipe(KEPT).startswith(
        "In INT8, stem, topdown_p3, detect_boxes (quantization.keep_float), the head's"
    )
    assert wording.recipe([]) == "In INT8, the head's output convolutions and DFL stay in floating point."


# The measurement ------------------------------------------------------------------------------------------------------


def variant(names: Sequence[str], drop: float, everything: float = 0.05) -> Variant:
    """What a made-up measurement tells; `drop` is in mAP50-95."""
    against_int8 = Comparison(everything - drop, everything - drop, everything - drop, "ahead")
    return Variant(tuple(names), 0.5 - drop, Comparison(-drop, -drop, -drop, "behind"), against_int8)


@pytest.mark.parametrize(
    ("drops", "found", "scored"),
    [
        ({"": 0.004}, (), 0),
        ({"": 0.05, "a": 0.001, "b": 0.02}, ("a",), 1),
        (
            {"": 0.05, "a": 0.03, "b": 0.04, "c": 0.049, "ab": 0.02, "abc": 0.004, "bc": 0.004, "ac": 0.03},
            ("b", "c"),
            5,
        ),
        ({"": 0.05, "a": 0.03, "b": 0.04, "c": 0.05, "ab": 0.02}, None, 2),
    ],
)
def test_the_smallest_set(drops: dict[str, float], found: tuple[str, ...] | None, scored: int) -> None:
    asked_for: list[str] = []

    def score(names: Sequence[str]) -> Variant:
        asked_for.append("".join(sorted(names)))
        return variant(sorted(names), drops[asked_for[-1]])

    alone = sorted((variant(n, d) for n, d in drops.items() if len(n) == 1), key=lambda v: -v.map50_95)
    chosen = smallest_set(variant("", drops[""]), alone, score, tolerance=0.5)
    assert (chosen and chosen.keep_float) == found
    assert len(asked_for) == scored


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a checkpoint of stock YOLOv8 that knows its classes."""
    folder = tmp_path_factory.mktemp("user")
    make_demo(folder / "data", images=40, size=SIDE)
    torch.manual_seed(0)
    stock = DetectionModel("yolov8n.yaml", nc=len(CLASSES), verbose=False)
    save_checkpoint(stock, folder / "stock.pt", names=CLASSES, imgsz=SIDE)
    save_checkpoint(build(TINY.smallest(), len(CLASSES)), folder / "small.pt", names=CLASSES, imgsz=SIDE)
    save_checkpoint(build(TINY.smallest(), 2), folder / "other.pt", names=["a", "b"], imgsz=SIDE)
    return folder


def evaluated(right: float) -> Evaluation:
    """A made-up score: of so large a share of 20 images the box is found."""
    stats = tuple(
        ImageStats(f"{i}.png", np.full((1, 10), i < 20 * right), np.ones(1, np.float32), *2 * [np.zeros(1, np.int32)])
        for i in range(20)
    )
    score = float(mean_average_precision(stats, np.ones((1, 20), int))[0])
    return Evaluation(score, score, {}, stats)


def test_each_part_is_measured_in_int8(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    gives_back = {"stem": 0.1, "sppf": 0.3, "detect_classes": 0.05}

    def evaluate(evaluator: Any, network: DetectionModel) -> Evaluation:
        assert not any("bn" in name for name, _ in network.named_modules()), "BatchNorm is folded, as in what ships"
        if not any("quantizer" in name for name, _ in network.named_modules()):
            return evaluated(0.95)
        seen.append(tuple(float_parts(network)))
        return evaluated(0.5 + sum(gives_back.get(part, 0.0) for part in seen[-1]))

    some = ("stem", "backbone_p3", "sppf", "attention", "topdown_p4", "detect_classes")
    monkeypatch.setattr(sensitivity, "PARTS", some)  # all of them would take long
    monkeypatch.setattr(sensitivity.Evaluator, "evaluate", evaluate)
    options: dict[str, Any] = {"split": "search", "imgsz": None, "images": 3, "progress": tmp_path / "progress"}
    found = sensitivity.measure(user / "small.pt", str(user / "data"), tolerance=6.0, **options)
    assert seen == [(), *((part,) for part in some if part != "attention"), ("stem", "sppf")]
    assert [v.keep_float for v in found.parts[:3]] == [("sppf",), ("stem",), ("detect_classes",)]
    assert found.suggested is not None and found.suggested.keep_float == ("stem", "sppf")
    assert found.imgsz == SIDE and found.quantized.drop.word == "behind" and found.parts[0].regained.word == "ahead"
    with pytest.raises(InputError, match=r"other\.pt: knows 2 classes \(a, b\), and .* has 4 .* train stock YOLOv8"):
        sensitivity.measure(user / "other.pt", str(user / "data"), tolerance=0.5, **options)


def test_the_command_prints_what_goes_into_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, stem, both = variant([], 0.05), variant(["stem"], 0.01), variant(["stem", "sppf"], 0.004)
    found = Sensitivity(8, "search", 64, 0.5, 0.5, quantized, (stem, variant(["sppf"], 0.05)), (both,), both)
    asked: list[dict[str, Any]] = []

    def call(*_: Any, **given: Any) -> Sensitivity:
        asked.append(given)
        return found

    monkeypatch.setattr(process, "call", call)
    arguments = ["sensitivity", "stock.pt", "--data", "somewhere"]
    told = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert told.exit_code == 0 and told.output.endswith("\nquantization:\n  keep_float: [stem, sppf]\n")
    rows = [" ".join(line.split()) for line in told.output.splitlines()]
    assert "+ stem 0.490 1.00 (1.0 to 1.0) 4.00 (4.0 to 4.0) ahead" in rows
    assert "The drop is 0.40 (0.4 to 0.4) AP, within 0.5 AP" in told.output
    in_json = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--accuracy-only"]).output)
    assert [given["hardware"] for given in asked] == ["auto", None], "latency is measured unless nobody wants it"
    assert in_json["suggested"]["keep_float"] == ["stem", "sppf"] and len(in_json["parts"]) == 2


@pytest.mark.slow
def test_the_command_measures_a_checkpoint(user: Path) -> None:
    # Every part is scored; that latency is measured where it is asked for is shown below, on fewer files.
    build_settings = ["--data", str(user / "data"), "--images", "2", "--json", "--accuracy-only"]
    done = CliRunner().invoke(app, ["sensitivity", str(user / "stock.pt"), *build_settings])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["images"] == 2 and len(found["parts"]) == len(PARTS) - 1
    missing = CliRunner().invoke(app, ["sensitivity", str(user / "none.pt"), *build_settings])
    assert missing.exit_code == 2 and "none.pt: no such file" in missing.stderr


def speedy(names: Sequence[str], drop: float, ms: float, everything: float = 0.05) -> Variant:
    """A made-up variant with a latency that is known within 1%."""
    return replace(variant(names, drop, everything), latency=Speed(ms, 0.99 * ms, 1.01 * ms))


def test_the_fastest_that_keeps_the_tolerance_is_suggested() -> None:
    quantized, stem, late = speedy([], 0.05, 2.0), speedy(["stem"], 0.004, 2.1), speedy(["sppf"], 0.002, 3.0)
    assert fastest([quantized, stem, late], 0.5) == stem
    assert fastest([quantized, stem, late], 0.1) is None
    # Of those that a measurement does not tell apart, the most accurate.
    assert fastest([stem, alike := speedy(["sppf"], 0.002, 2.12)], 0.5) == alike
    assert fastest([variant(["stem"], 0.0)], 0.5) is None
    # And of equally accurate ones the faster, which no other beats in both.
    both = speedy(["stem", "sppf"], 0.004, 2.09)
    assert fastest([stem, both], 0.5) == fastest([both, stem], 0.5) == both
    assert both.keep_float in pareto_front([stem, both], 0.5, None)


def test_parts_are_weighed_by_latency_and_accuracy_together() -> None:
    quantized, same = Speed(2.0, 1.9, 2.1), variant(["stem"], 0.03)
    dear, cheap, free = (worth(same, Speed(ms, ms, ms), quantized) for ms in (3.0, 2.1, 1.9))
    assert dear < cheap < free
    assert worth(variant(["stem"], 0.05), Speed(1.0, 1.0, 1.0), quantized) < worth(same, Speed(9, 9, 9), quantized)


def test_latencies_that_were_disturbed_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, stem = speedy([], 0.05, 2.0), speedy(["stem"], 0.004, 2.1)
    noisy = replace(stem, latency=Speed(2.1, 1.0, 4.0, disturbed=True))
    for part, words in (
        (stem, ""),
        (noisy, "1 of 3 latencies are disturbed: measure again when nothing else computes"),
    ):
        found = Sensitivity(8, "search", 64, 0.5, 0.5, quantized, (part,), (), part, "cpu-1t", Speed(3.0, 2.9, 3.1))
        monkeypatch.setattr(process, "call", lambda *_, found=found, **__: found)
        told = CliRunner().invoke(app, ["sensitivity", "stock.pt", "--data", "somewhere"], env={"COLUMNS": "160"})
        text = " ".join(told.output.split())
        assert told.exit_code == 0 and words in text and ("disturbed" in text) == bool(words)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    variants = [
        speedy([], 0.05, 2.0),
        speedy(["stem"], 0.004, 2.1),
        speedy(["sppf"], 0.01, 2.5),  # slower and less accurate than stem
        speedy(["stem", "sppf"], 0.002, 2.6),
        speedy(["detect_boxes"], 0.001, 5.0),  # slower than floating point, which loses nothing
    ]
    assert pareto_front(variants, 0.5, Speed(4.0, 3.9, 4.1)) == ((), ("stem",), ("stem", "sppf"))
    assert ("detect_boxes",) in pareto_front(variants, 0.5, None)
    assert pareto_front([variant([], 0.0)], 0.5, None) == ()


def test_latency_is_measured_on_the_files_that_would_ship(
    user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really exported and really run on this CPU, in few rounds; only the scores are made up."""
    monkeypatch.setattr(sensitivity, "PARTS", ("stem", "sppf", "detect_classes"))
    gives_back = {"stem": 0.1, "sppf": 0.3, "detect_classes": 0.05}

    def evaluate(evaluator: Any, network: DetectionModel) -> Evaluation:
        if not any("quantizer" in name for name, _ in network.named_modules()):
            return evaluated(0.95)
        return evaluated(0.5 + sum(gives_back.get(part, 0.0) for part in float_parts(network)))

    timed: list[list[str]] = []

    def measure_files(files: Sequence[Path], **options: Any) -> Any:
        timed.append([str(sum(n.op_type == "QuantizeLinear" for n in onnx.load(file).graph.node)) for file in files])
        return measure(files, protocol=Protocol(warmup=1, repetitions=2, min_rounds=2, max_rounds=2), **options)

    monkeypatch.setattr(sensitivity.Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(sensitivity, "measure_files", measure_files)
    found = sensitivity.measure(
        user / "small.pt", str(user / "data"), tolerance=10.0, split="search", imgsz=None, images=3,
        progress=tmp_path / "progress", hardware="cpu-1t",
    )  # fmt: skip
    assert found.target is not None and found.target.endswith("onnxruntime")
    assert found.float_latency is not None and found.float_latency.p50 > 0
    variants = [found.quantized, *found.parts, *found.sets]
    assert all(v.latency and v.latency.low <= v.latency.p50 <= v.latency.high for v in variants)
    # Floating point first, then all in INT8, then fewer and fewer quantizers.
    assert timed[-1][0] == "0" and len(timed[-1]) == len(variants) + 1
    assert all(0 < int(count) < int(timed[-1][1]) for count in timed[-1][2:])
    assert set(found.front) <= {v.keep_float for v in variants}
    assert found.suggested is not None and -100 * found.suggested.drop.difference <= 10.0
