"""Engines that are built on a CPU node before the device is asked: with the real compiler, in a real stage store.

No device opens them: latency, scores and what is found in images are made up here, or are those of the ONNX files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import detection
import fabricated
import pytest
import torch
from exports import SIDE
from fabricated import GPU_PROFILE, write_tuned

from yolov8_nas.config import RunConfig
from yolov8_nas.deploy.sources import sources
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.evaluation import Evaluator
from yolov8_nas.export.tensorrt_rtx import NOWHERE
from yolov8_nas.files import file_sha256, read_json, write_json
from yolov8_nas.measure import benchmark, nms
from yolov8_nas.measure import tensorrt_rtx as rtx
from yolov8_nas.measure.benchmark import Measurement, Percentiles, Timing
from yolov8_nas.measure.engine_file import read_manifest
from yolov8_nas.measure.runtime import DEFAULT
from yolov8_nas.report.step import tell
from yolov8_nas.run import local
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import (
    AheadResult,
    NmsResult,
    ResolvedLimit,
    TrainingRecipe,
    Tuned,
)
from yolov8_nas.runner.stage import Outcome, StageContext, run_stage
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages.trt_export import AHEAD, STAGE, ahead
from yolov8_nas.store.archive import extract, pack
from yolov8_nas.store.store import Store
from yolov8_nas.supernet.derive import build, save_checkpoint
from yolov8_nas.train.finetune import Recipe

LACKING = rtx.missing_to_build()
compiled = pytest.mark.skipif(bool(LACKING), reason=" and ".join(LACKING) or "the compiler is here")
"""Marks tests that need the compiler."""

TARGET = {"hardware": "NVIDIA_L4", "runtime": "tensorrt-rtx", "precision": "fp16", "constraints": ["latency<=5ms"]}
CONFIG = RunConfig.parse({"imgsz": SIDE, "targets": [TARGET]}, "test")
LABEL = "nvidia-l4-fp16"
NAMES = ("candidate-0-fp16", "candidate-1-fp16", "stock-fp16")


def profile(version: str | None = None) -> dict[str, Any]:
    """What hw-probe would tell of an L4."""
    version = version or rtx.compiler().__version__
    runtime = {"name": "tensorrt-rtx", "version": version}
    return GPU_PROFILE | {"model": "NVIDIA L4", "runtime": runtime, "gpu": {"compute_capability": "8.9"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What earlier stages write, of networks that have learnt nothing."""
    root = tmp_path_factory.mktemp("inputs")
    folders = {name: root / name for name in ("data-prep", "hw-probe", "qat-finetune", "search")}
    detection.make_dataset(folders["data-prep"], train=4, search=4, val=4, size=SIDE)
    space, recipe = SearchSpace.load("tiny"), Recipe(epochs=1, batch=4, lr=1e-3, imgsz=SIDE, seed=0)
    rows: dict[str, Tuned] = {}
    for seed, name in enumerate(("candidates/0", "candidates/1", "baseline")):
        torch.manual_seed(seed)
        folder = folders["qat-finetune"] / name
        folder.mkdir(parents=True)
        network = build(space.smallest(), 2, detection.CLASSES).eval()
        for checkpoint in ("best.pt", "subnet.pt"):
            save_checkpoint(network, folder / checkpoint, names=detection.CLASSES, imgsz=SIDE)
        rows[name] = Tuned(
            architecture=space.smallest(), map50_95={"fp32": 0.0}, average=0.0, best_epoch={"fp32": 1},
            start="scratch", begun_with="random weights", computing={"training": 1.0}, distilled=False, epochs=1,
            recipe=TrainingRecipe(**asdict(recipe)), seconds=1.0,
        )  # fmt: skip
    write_tuned(folders["qat-finetune"], rows, TrainingRecipe(**asdict(recipe)), expected=(0.0, 1.0))
    for name in ("hw-probe", "search"):
        folders[name].mkdir(exist_ok=True)
    ResolvedLimit.write_all(folders["hw-probe"], fabricated.resolved(Constraint.parse("latency<=5ms")))
    NmsResult(latency_ms=None, reason="not measured here").write(folders["hw-probe"])
    fabricated.searched().write(folders["search"])
    return folders


def context(inputs: dict[str, Path], work: Path, store: Path | None = None, version: str | None = None) -> Any:
    """The context in which the export runs."""
    write_json(inputs["hw-probe"] / "profile.json", profile(version))
    for name in ("out", "partial"):
        (work / name).mkdir(parents=True, exist_ok=True)
    settings = STAGE.settings(CONFIG, CONFIG.targets[0])
    opened = Store(store) if store else None
    lock = HostLock(work / "lock")
    return StageContext(settings, inputs, work / "out", work / "partial", Progress.silent(), lock, opened)


def run_ahead(inputs: dict[str, Path], work: Path, version: str | None = None) -> tuple[Outcome, dict[str, Any]]:
    """The step on a CPU node, as the pipeline runs it: its outcome, and what it tells."""
    write_json(inputs["hw-probe"] / "profile.json", profile(version))
    tars = {name: work / f"{name}.tar" for name in ("hw-probe", "qat-finetune")}
    for name, tar in tars.items():
        pack(inputs[name], tar)
    outcome = run_stage(
        AHEAD, config=CONFIG, target=LABEL, inputs=tars, output=work / "built.tar", store=work / "store", run_id="run"
    )
    unpacked = Path(tempfile.mkdtemp(dir=work))
    extract(work / "built.tar", unpacked)
    return outcome, read_json(unpacked / AheadResult.FILE)


def no_compiler() -> Any:
    raise InputError("no engine can be built: TensorRT for RTX is not installed here")


@compiled
def test_a_cpu_node_leaves_the_engines_in_the_store_and_the_export_takes_them_over(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, told = run_ahead(inputs, tmp_path)
    assert (outcome.status, told["built"], tuple(told["engines"])) == ("done", True, NAMES)
    assert all(row["weight_bytes"] > 0 and row["seconds"] > 0 for row in told["engines"].values())
    (kept,) = (tmp_path / "store" / ahead.ENGINES).iterdir()
    manifest = read_manifest(kept / "outputs" / "stock-fp16.engine")
    assert (manifest.built_for, manifest.built_on.gpu, manifest.precision) == (("8.9",), NOWHERE, "fp16")
    page = tell(AHEAD.name, LABEL, outcome, tmp_path / "built.tar")
    assert page.figures["engines"] == 3 and page.figures["building_seconds"] > 0
    # What is there is not built again: the export on the device has no compiler here.
    version = manifest.built_on.tensorrt
    monkeypatch.setattr(rtx, "compiler", no_compiler)
    found = sources(inputs["qat-finetune"], ("fp16",))
    ctx = context(inputs, tmp_path / "export", tmp_path / "store", version)
    folder = ahead.engines(replace(ctx, out=ctx.partial), Profile.read(inputs["hw-probe"]), found)
    for name in NAMES:
        for suffix in (".engine", ".engine.json", ".onnx"):
            assert (folder / f"{name}{suffix}").read_bytes() == (kept / "outputs" / f"{name}{suffix}").read_bytes()


@compiled
def test_a_damaged_engine_in_the_store_is_built_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    run_ahead(inputs, tmp_path)
    (kept,) = (tmp_path / "store" / ahead.ENGINES).iterdir()
    engine = kept / "outputs" / "candidate-0-fp16.engine"
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1] + b"?")
    found = sources(inputs["qat-finetune"], ("fp16",))
    ctx = context(inputs, tmp_path / "export", tmp_path / "store")
    folder = ahead.engines(replace(ctx, out=ctx.partial), Profile.read(inputs["hw-probe"]), found)
    assert read_manifest(folder / engine.name).size == len(whole)
    assert read_manifest(engine).sha256 == file_sha256(folder / engine.name)


@compiled
def test_an_engine_of_another_file_is_not_taken_over(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed(ctx: StageContext[Any], found: Sequence[Any]) -> None:
        ahead_make(ctx, found)
        (ctx.out / "stock-fp16.onnx").write_bytes((ctx.out / "candidate-0-fp16.onnx").read_bytes())

    ahead_make = ahead._make
    monkeypatch.setattr(ahead, "_make", mixed)
    ctx = context(inputs, tmp_path, tmp_path / "store")
    with pytest.raises(StageError, match=r"stock-fp16\.engine: built of another file than stock-fp16\.onnx"):
        found = sources(inputs["qat-finetune"], ("fp16",))
        ahead.engines(replace(ctx, out=ctx.partial), Profile.read(inputs["hw-probe"]), found)


def test_what_cannot_be_built_ahead_is_told_and_left_to_the_device(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(rtx, "compiler", no_compiler)
        outcome, told = run_ahead(inputs, tmp_path, "1.7.1")
    assert (outcome.status, told["built"], told["engines"]) == ("done", False, {})
    assert "TensorRT for RTX is not installed here" in told["reason"]
    assert tell(AHEAD.name, LABEL, outcome, tmp_path / "built.tar").figures["engines"] == 0
    if LACKING:
        pytest.skip(" and ".join(LACKING))
    # Another version than the device's builds nothing that the device could open.
    outcome, told = run_ahead(inputs, tmp_path, "1.8.0")
    assert (outcome.status, told["built"]) == ("done", False)
    assert "1.7" in told["reason"] and "the device was measured with 1.8.0" in told["reason"]
    # With the compiler there, the same step of the same run builds.
    assert run_ahead(inputs, tmp_path)[1]["built"] is True


def test_on_one_machine_it_is_shown_where_it_runs() -> None:
    targets = [TARGET, {"hardware": "cpu-1t", "constraints": ["latency<=5ms"]}]
    shown = local._expected(RunConfig.parse({"imgsz": SIDE, "targets": targets}, "test"))
    names = [stage for stage, label in shown if label == LABEL]
    assert names == ["hw-probe", "search", "qat-finetune", "build-ahead", "trt-export", "register"]
    assert [stage for stage, label in shown if label == "cpu-1t-fp32"] == [n for n in names if n != "build-ahead"]
    assert [stage for stage, label in shown if label is None] == ["data-prep", "supernet-train"]


@compiled
def test_the_verdict_is_of_the_engine_that_the_cpu_node_built(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole export, with a device that is played: nothing here opens an engine."""
    run_ahead(inputs, tmp_path)
    (kept,) = (tmp_path / "store" / ahead.ENGINES).iterdir()
    version = rtx.compiler().__version__

    def measure(files: Sequence[Path], **_: Any) -> list[Measurement]:
        assert {file.suffix for file in files} == {".engine"}
        return [Measurement(Percentiles(4, 4, 4), (4, 4), (4,), 100, False, memory_mb=30.0) for _ in files]

    def timed(files: Sequence[Path], *_: Any, **__: Any) -> list[Timing]:
        return [Timing(Percentiles(5, 5, 5), (5, 5), (5,), 100, False) for _ in files]

    evaluate = Evaluator.evaluate
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(nms, "measure_with_nms", timed)
    monkeypatch.setattr(nms, "boxes", lambda *_, **__: {"boxes": 0.0, "detections": 0.0})
    detect = nms.detect
    monkeypatch.setattr(
        nms,
        "detect",
        lambda file, *pictures, **how: detect(file.with_suffix(".onnx"), *pictures, **{**how, "runtime": DEFAULT}),
    )
    monkeypatch.setattr(
        Evaluator,
        "evaluate",
        lambda self, model: evaluate(self, model.with_suffix(".onnx") if model.suffix == ".engine" else model),
    )
    monkeypatch.setattr(rtx, "compiler", no_compiler)
    ctx = context(inputs, tmp_path / "export", tmp_path / "store", version)
    STAGE.run(ctx)
    verdict = json.loads((ctx.out / "verdict.json").read_text())
    assert (verdict["status"], verdict["shipped"]["file"], verdict["shipped"]["candidate"]) == (
        "met",
        "model.engine",
        1,
    )
    built = kept / "outputs" / "candidate-1-fp16.engine"
    assert (ctx.out / "model" / "model.engine").read_bytes() == built.read_bytes()
    told = read_json(ctx.out / "engine.json")
    assert (told["built_on"], told["built_for"], told["version"]) == (NOWHERE, ["8.9"], version)
