"""`yolov8-nas analyze`: files from anywhere, operators and their work, findings, settings, and what people see."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from yolov8_nas.analysis import findings, frame, model, operators, run, tables, terminal
from yolov8_nas.analysis.figures import (
    NETWORK,
    NMS,
    PREPROCESSING,
    TO_DEVICE,
    TO_HOST,
    Analysis,
    Frame,
    Operator,
    Part,
    Setting,
    Trace,
    speed,
)
from yolov8_nas.analysis.page import write_page
from yolov8_nas.commands.main import app
from yolov8_nas.device.roofline import Roofline
from yolov8_nas.errors import InputError
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.measure.benchmark import Percentiles, Timing
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.runtime import find
from yolov8_nas.runner import process
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.topology import model_rows
from yolov8_nas.supernet.derive import build, save_checkpoint

SIDE = 64
QUICK = Protocol(warmup=1, repetitions=2, min_rounds=2, max_rounds=2)
SMALLEST = SearchSpace.load("tiny").smallest()
ROOFLINE = Roofline(1, 10.0, 128, {"fp32": 0.1}, 1536, 0.02)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network as a checkpoint, as a static ONNX file and as one that leaves its sizes open."""
    torch.manual_seed(0)
    folder, network = tmp_path_factory.mktemp("networks"), build(SMALLEST, 2, ["scratch", "dent"]).eval()
    save_checkpoint(network, folder / "best.pt", names=["scratch", "dent"], imgsz=SIDE)
    export_onnx(network, folder / "static.onnx", imgsz=SIDE)
    export_onnx(network, folder / "open.onnx", imgsz=SIDE, dynamic=True)
    return {"pt": folder / "best.pt", "static": folder / "static.onnx", "open": folder / "open.onnx"}


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_tells_its_parts(files: dict[str, Path]) -> None:
    found = model.read(files["pt"])
    names = [name for name, _ in model_rows(SMALLEST)]
    assert (found.imgsz, found.batch, found.classes, found.precision, found.nms_free) == (SIDE, None, 2, None, False)
    rows = (0, names.index("sppf"), names.index("upsample_p4"), len(names) - 1, None)
    assert [found.section(row) for row in rows] == ["backbone", "backbone", "neck", "head", "no row"]


def test_a_checkpoint_with_two_heads_is_told(files: dict[str, Path]) -> None:
    detector = replace(model.read(files["pt"]), two_heads=True)
    (note,) = run._notes(detector, [1], find("onnxruntime"))
    assert "NMS-free head as well" in note and "nms=False" in note


def test_an_onnx_file_does_not_guess_where_its_neck_begins(files: dict[str, Path]) -> None:
    static, free = model.read(files["static"]), model.read(files["open"], imgsz=96)
    assert (static.imgsz, static.batch, free.imgsz, free.batch) == (SIDE, 1, 96, None)
    assert [static.section(row) for row in (0, static.head)] == ["backbone and neck", "head"]
    told = model.read(files["static"], rows_of=files["pt"])
    assert told.backbone == model.read(files["pt"]).backbone and told.head == static.head


def test_a_stock_networks_name_tells_its_rows() -> None:
    described = {"description": "Ultralytics YOLOv8n model trained on coco.yaml"}
    assert model._backbone(described, 22, None) == 10
    assert model._backbone(described, 23, None) is None
    assert model._backbone({"description": "Ultralytics best model"}, 22, None) is None


@pytest.mark.parametrize(
    ("name", "row"),
    [("/model.22/cv2.0/conv/Conv", 22), ("model.3.cv1", 3), ("@model.7", 7), ("ReorderOutput_token_2", None)],
)
def test_rows_are_read_from_names(name: str, row: int | None) -> None:
    assert model.row_of(name) == row


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_missing_and_damaged_files_are_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"network{suffix}"
    with pytest.raises(InputError, match=f"network{suffix}: no such file"):
        model.read(file)
    file.write_bytes(b"no network")
    with pytest.raises(InputError, match=f"network{suffix}: not a"):
        model.read(file)


def test_what_cannot_be_analysed_is_told_with_what_can(files: dict[str, Path], tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    classifier = onnx.load(files["static"])
    next(entry for entry in classifier.metadata_props if entry.key == "task").value = "classify"
    onnx.save(classifier, tmp_path / "classifier.onnx")
    for call, words in (
        (partial(model.read, engine), "give an Ultralytics checkpoint"),
        (partial(model.read, tmp_path / "classifier.onnx"), r"not a YOLO detector.*task classify"),
        (partial(model.read, files["static"], 96), r"fixed to 64 x 64 pixels \(--imgsz 96\)"),
        (partial(model.read, files["pt"], 100), "--imgsz 100: .* multiple of 32"),
        (partial(_files, files["static"], "torch"), r"runtime 'torch' runs checkpoints \(.pt\); use onnxruntime"),
        (partial(_files, files["static"], "onnxruntime", "int8"), "computes in fp32, and int8 is asked for"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def _files(file: Path, runtime: str, precision: str = "fp32") -> dict[int, Path]:
    return model.files(model.read(file), find(runtime, "cpu", precision), [1], file.parent)


def test_open_sizes_are_fixed_for_each_batch(files: dict[str, Path], tmp_path: Path) -> None:
    found = model.files(model.read(files["open"], imgsz=96), find("onnxruntime"), [1, 2], tmp_path)
    assert {batch: model.read(file).batch for batch, file in found.items()} == {1: 1, 2: 2}
    assert model.read(found[2]).imgsz == 96


# Operators -----------------------------------------------------------------------------------------------------------


def test_work_of_a_file_is_that_on_paper(files: dict[str, Path]) -> None:
    work = operators.arithmetic(model.load_onnx(files["static"]))
    anchors = sum((SIDE // stride) ** 2 for stride in (8, 16, 32))
    assert sum(each.flops for each in work.values()) == 2 * (
        cost(SMALLEST, 2, SIDE).macs + 4 * SMALLEST.head.reg_max * anchors
    )
    first = work["/model.0/conv/Conv"]
    assert (first.inputs, first.groups) == (3, 1)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_operators_have_times_work_and_rows(
    runtime: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_RUNS", 2)
    detector = model.read(files["pt"])
    file = files["static"] if runtime == "onnxruntime" else files["pt"]
    found = operators.trace(detector, file, find(runtime), 1, 1, tmp_path)
    assert all(operator.ms >= 0 for operator in found.operators) and found.operator_ms > 0
    assert found.launches == len(found.operators) > 100
    convolutions = [operator for operator in found.operators if operator.inputs]
    assert {operator.row for operator in convolutions} <= set(range((detector.head or 0) + 1))
    assert max(operator.row or 0 for operator in convolutions) == detector.head
    on_paper = 2 * cost(SMALLEST, 2, SIDE).macs
    assert on_paper <= sum(operator.flops for operator in convolutions) <= 1.05 * on_paper
    assert all(operator.bytes for operator in convolutions)


# A whole analysis ----------------------------------------------------------------------------------------------------


def analyzed(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: Any) -> Analysis:
    monkeypatch.setattr(frame, "measure", partial(frame.measure, protocol=QUICK))
    monkeypatch.setattr(frame, "sweep", partial(frame.sweep, protocol=QUICK))
    monkeypatch.setattr(run, "_roofline", lambda _: ROOFLINE)
    asked = {
        "hardware": "cpu-1t", "runtime": "onnxruntime", "precision": None, "imgsz": None, "batches": [1],
        "streams": [1], "fps": 30.0, "size": (80, 60), "images": None, "rows_of": None,
        "progress": tmp_path / "progress",
    }  # fmt: skip
    return run.analyze(file, **{**asked, **changes})


def test_a_frame_from_pictures_to_boxes(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = analyzed(files["static"], monkeypatch, tmp_path, batches=[1, 2], streams=[1, 2], rows_of=files["pt"])
    assert [part.name for part in found.frame.parts if part.timing] == [PREPROCESSING, NETWORK, NMS]
    assert "host's memory" in {part.name: part.note for part in found.frame.parts}[TO_DEVICE]
    assert [section.name for section in found.sections][:3] == ["backbone", "neck", "head"]
    inference = found.frame.ms(NETWORK)
    assert sum(section.ms for section in found.sections) == pytest.approx(inference)
    assert [(setting.batch, setting.streams) for setting in found.settings] == [(1, 1), (1, 2)]
    one, two = found.settings
    assert one.memory_mb and two.memory_mb == pytest.approx(2 * one.memory_mb)
    assert found.recommendation and found.recommendation.batch == 1
    assert any("fixed to 1 image per run, so only that is swept" in note for note in found.notes)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["sections"]
    assert (tmp_path / "progress").read_text().startswith("timing batches")


def test_pictures_of_a_folder(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures there"):
        analyzed(files["static"], monkeypatch, tmp_path, images=tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png: not a picture"):
        analyzed(files["static"], monkeypatch, tmp_path, images=tmp_path)


def test_streams_that_fail_are_told_and_end(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "_memory", lambda files, *_: dict.fromkeys(files, 10.0))
    way = frame._way

    def fails(job: frame.Job, runner: Any, batch: int) -> Any:
        if batch == 1:
            return way(job, runner, batch)
        raise RuntimeError("out of memory\nat address 0")

    monkeypatch.setattr(frame, "_way", fails)
    job = frame.Job(model.pictures(8, 8, 1), SIDE, boxes=False)
    two = {1: files["static"], 2: files["static"]}
    settings, failed = frame.sweep(job, two, [1], runtime=find("onnxruntime"), threads=1, protocol=QUICK)
    assert [setting.batch for setting in settings] == [1]
    assert failed == ["batch 2 in 1 streams cannot run: out of memory"]


# Findings: functions of figures --------------------------------------------------------------------------------------


def timing(ms: float, p90: float | None = None) -> Timing:
    return Timing(Percentiles(ms, p90 or ms, p90 or ms), (ms, ms), (ms,) * 6, 72, False)


def setting(batch: int, streams: int, images_per_s: float, ms: float = 5.0, memory_mb: float = 100.0) -> Setting:
    return Setting(batch, streams, 1, timing(ms), images_per_s, memory_mb)


def layer(row: int, section: str, ms: float, flops: float, **changes: Any) -> Operator:
    operator = Operator(f"model.{row}.conv", "Conv", row, ms, 1, flops, flops / 50, 32, 64, 1, section)
    return replace(operator, **changes)


EVEN = (layer(0, "backbone", 4.0, 4e8), layer(15, "neck", 2.0, 2e8), layer(22, "head", 2.0, 2e8))


def analysis(
    parts: Mapping[str, float] | None = None,
    layers: Sequence[Operator] = EVEN,
    *,
    kind: str = "cpu",
    busy: float | None = 0.95,
    between_ms: float = 0.0,
    multiple: int = 16,
    settings: Sequence[Setting] = (),
    copies_ms: Mapping[str, float] | None = None,
) -> Analysis:
    """An analysis in which nothing stands out, but for what is changed."""
    timings = {PREPROCESSING: 0.5, NETWORK: 8.0, NMS: 0.5, **(parts or {})}
    order = (PREPROCESSING, TO_DEVICE, NETWORK, TO_HOST, NMS)
    way = Frame(
        1, timing(9.0), [Part(name, timing(timings[name]) if name in timings else None) for name in order], busy
    )
    runtime = {"name": "onnxruntime", "version": "1"}
    return Analysis(
        model={
            "file": "<b>.onnx", "imgsz": 640, "classes": 80, "precision": "fp32", "nms_free": False,
            "pictures": "made up",
        },
        device={"name": "cpu-1t", "model": "a CPU", "kind": kind, "threads": 1, "runtime": runtime},
        clocks={},
        frame=way,
        trace=Trace(layers, 12, "operators", between_ms),
        not_traced="",
        roofline=ROOFLINE,
        roof="fp32",
        multiple=(multiple, "so it is"),
        memory_mb=1000.0,
        copies_ms=copies_ms or {},
        settings=settings,
        recommendation=findings.recommend(settings, 1000.0, 30.0),
        notes=[],
    )  # fmt: skip


def test_nothing_is_said_where_nothing_stands_out() -> None:
    assert findings.findings(analysis()) == []


SMALL = (*(layer(row, "backbone", 0.004, 2.5e5) for row in range(20)), layer(21, "head", 0.1, 5e6))
QUICKLY = {PREPROCESSING: 0.01, NETWORK: 0.18, NMS: 0.01}
QUANTIZED = (*EVEN, Operator("q", "QuantizeLinear", 3, 1.5, section="neck"))
HEAVY_HEAD = (layer(0, "backbone", 4.0, 6e8), layer(15, "neck", 1.0, 1e8), layer(22, "head", 3.0, 1e8))
ODD = (*EVEN[:2], layer(22, "head", 2.0, 2e8, outputs=72))
SLOW = tuple(replace(operator, ms=4 * operator.ms) for operator in EVEN)
ON_GPU = {TO_DEVICE: 1.0, TO_HOST: 0.5}


@pytest.mark.parametrize(
    ("topic", "found", "words"),
    [
        ("NMS", analysis({NMS: 2.0}), "2 ms, 19% of a frame"),
        ("NMS", analysis({NMS: 2.0}, kind="gpu"), "19% of a frame"),
        ("preprocessing", analysis({PREPROCESSING: 4.0}), "4 ms, 32% of a frame"),
        ("copies", analysis(ON_GPU, kind="gpu"), "1.5 ms, 14% of a frame"),
        ("small kernels", analysis(QUICKLY, SMALL, between_ms=0.02), "20 of 21 operators take less than 10 µs"),
        ("channels", analysis(layers=ODD), r"no multiples of 16 \(72\), 1 of 3, take 25% of inference; so it is"),
        ("conversions", analysis(layers=QUANTIZED), r"between layers \(1 in all\) take 16% of inference"),
        ("uneven load", analysis(layers=HEAVY_HEAD), "head takes 38% of inference for 12% of its operations"),
        ("below the roofline", analysis({NETWORK: 40.0}, SLOW), "20 GFLOP/s, 20% of the 100 GFLOP/s .* arithmetic is"),
        ("idle device", analysis(busy=0.4), "works in 40% of a frame"),
    ],
)
def test_what_stands_out_is_told_with_its_figures(topic: str, found: Analysis, words: str) -> None:
    (only,) = findings.findings(found)
    assert only.topic == topic
    assert only.remedy and 0 < float(only.figures["share"]) <= 1
    assert re.search(words, only.text), only.text


def test_remedies_name_what_was_measured() -> None:
    swept = [setting(1, 1, 100.0), setting(8, 1, 250.0), setting(1, 2, 150.0)]
    (small,) = findings.findings(analysis(QUICKLY, SMALL, between_ms=0.02, settings=swept))
    assert "8 images per run give 2.50 times" in small.remedy
    (idle,) = findings.findings(analysis(busy=0.4, settings=swept))
    assert "2 streams give 1.50 times" in idle.remedy
    (copies,) = findings.findings(analysis(ON_GPU, kind="gpu", copies_ms={"pinned": 1.0, "pageable": 3.0}))
    assert "1 ms from pinned and 3 ms from pageable" in copies.remedy and copies.figures["pageable_ms"] == 3.0
    assert "on the GPU" in findings.findings(analysis({NMS: 2.0}, kind="gpu"))[0].remedy


def test_channels_that_cannot_be_changed_are_no_finding() -> None:
    colours = layer(0, "backbone", 4.0, 4e8, inputs=3)
    classes = layer(22, "head", 2.0, 2e8, outputs=80)
    depthwise = layer(15, "neck", 2.0, 2e8, inputs=72, outputs=72, groups=72)
    assert findings.findings(analysis(layers=(colours, classes, depthwise), multiple=32)) == []


@pytest.mark.parametrize(
    ("asked", "multiple"),
    [
        (("cpu", "fp32", ("avx2", "avx512f"), ()), 16),
        (("cpu", "fp32", ("avx2",), ()), 8),
        (("gpu", "fp16", (), ("fp16", "int8")), 8),
        (("gpu", "int8", (), ("fp16", "int8")), 32),
        (("gpu", "fp32", (), ("fp16",)), 1),
    ],
)
def test_multiples_of_channels(asked: Any, multiple: int) -> None:
    assert findings.channel_multiple(*asked) == multiple


def test_speed_against_the_roofline() -> None:
    at_memory = speed([layer(0, "backbone", 10.0, 4e8, bytes=1e8)], ROOFLINE, "fp32")
    assert (at_memory.tops, at_memory.gbs, at_memory.intensity) == pytest.approx((0.04, 10.0, 4.0))
    assert at_memory.bound == "memory" and at_memory.share == pytest.approx(1.0)
    unknown = speed([layer(0, "backbone", 10.0, 4e8, bytes=None)], ROOFLINE, "fp32")
    assert unknown.tops == pytest.approx(0.04) and unknown.gbs is unknown.share is None


# Settings ------------------------------------------------------------------------------------------------------------


def test_the_setting_for_the_most_video_streams() -> None:
    slow, best, close = setting(1, 1, 100.0, 10.0), setting(4, 2, 305.0, 30.0), setting(2, 2, 300.0, 15.0)
    late, large = setting(8, 2, 400.0, 40.0), setting(2, 4, 500.0, 15.0, 900.0)
    chosen = findings.recommend([slow, best, close, late, large], 1000.0, 30.0)
    assert chosen and (chosen.batch, chosen.streams, chosen.videos, chosen.timely) == (2, 2, 10, True)
    chosen = findings.recommend([late], 1000.0, 30.0)
    assert chosen and not chosen.timely and "no setting answers before the next frame" in chosen.reason
    assert findings.recommend([large], 1000.0, 30.0) is None
    chosen = findings.recommend([setting(1, 1, 12.0, 80.0)], 1000.0, 30.0)
    assert chosen and chosen.videos == 0


# What people see -----------------------------------------------------------------------------------------------------

SWEPT = [setting(1, 1, 100.0, 10.0), setting(2, 2, 300.0, 15.0)]


def with_findings() -> Analysis:
    found = analysis({NMS: 4.0}, settings=SWEPT)
    return replace(found, findings=findings.findings(found))


def test_terminal() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal.render(with_findings()))
    text = console.export_text()
    for words in ("<b>.onnx", "backbone", "model.0.conv", "takes 10 video streams of 30 frames", "NMS: Non-maximum"):
        assert words in text
    assert tables.recommendation(analysis()).startswith("No setting")


def test_page(tmp_path: Path) -> None:
    write_page(with_findings(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;.onnx" in page and "<b>.onnx" not in page and "Non-maximum suppression takes" in page
    assert page.count("data-plot=") == 3 and "default-src 'none'" in page
    write_page(replace(analysis(), trace=None, roofline=None, not_traced="one operator"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data-plot=") == 1 and "one operator" in page


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def call(function: str, **arguments: Any) -> Analysis:
        asked.append(arguments)
        return analysis(settings=SWEPT)

    monkeypatch.setattr(process, "call", call)
    return asked


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def test_command(called: list[dict[str, Any]], tmp_path: Path) -> None:
    result = invoke("a.onnx", "--batches", "4,1", "--streams", 2, "--json", "-", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recommendation"]["videos"] == 10
    ((asked),) = called
    assert (asked["batches"], asked["streams"], asked["size"]) == ([1, 4], [2], (1280, 720))
    assert (tmp_path / "page.html").stat().st_size
    result = invoke("a.onnx", "--json", tmp_path / "a.json")
    assert "Where the time goes" in result.stdout and json.loads((tmp_path / "a.json").read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batches", "1,x"], "--batches 1,x: give whole numbers"),
        (["--streams", "0"], "--streams 0: give whole numbers"),
        (["--size", "big"], "--size big: give width and height"),
        (["--html", "missing/page.html"], "there is no folder missing"),
    ],
)
def test_options_that_make_no_sense(called: list[Any], arguments: list[str], words: str) -> None:
    result = invoke("a.onnx", *arguments)
    assert result.exit_code == 2 and words in result.stderr and not called


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtime": "openvino"}, "'openvino': there is no such runtime"),
        ({"hardware": "NVIDIA_T4", "runtime": "torch"}, "hardware 'NVIDIA_T4'"),
        ({"precision": "best"}, "--precision best"),
    ],
)
def test_what_is_not_here(
    changes: dict[str, Any], words: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=words):
        analyzed(files["pt"], monkeypatch, tmp_path, **changes)
