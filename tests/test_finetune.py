"""Trainings of stand-alone networks go on after an interruption as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import detection
import pytest
import torch
from interruption import Interrupted, interrupt_after
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.deploy import finetune
from yolov8_nas.deploy.finetune import CHECKPOINT, Recipe, Trained, train
from yolov8_nas.deploy.quantization import load_network, quantize
from yolov8_nas.errors import StageError
from yolov8_nas.host import HostLock
from yolov8_nas.progress import Progress
from yolov8_nas.space import SearchSpace
from yolov8_nas.stages.qat_finetune import STAGE
from yolov8_nas.stages.stage import StageContext
from yolov8_nas.store import Store, read_json, write_json
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.derive import build, derive
from yolov8_nas.supernet.supernet import Supernet

TINY = SearchSpace.load("tiny")
RECIPE = Recipe(epochs=3, batch=8, lr=2e-3, imgsz=64, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection.make_dataset(tmp_path_factory.mktemp("data"), train=16, search=4, val=4)


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_yaml(folder, tmp_path_factory.mktemp("view"), validate_on="search")


def network() -> DetectionModel:
    torch.manual_seed(0)
    return build(TINY.smallest(), 2, detection.CLASSES)


def assert_same_training(first: Trained, second: Trained, works: tuple[Path, Path]) -> None:
    assert [{**row, "seconds": 0} for row in first.curves] == [{**row, "seconds": 0} for row in second.curves]
    a, b = (torch.load(work / CHECKPOINT, weights_only=True) for work in works)
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, b[part][name]) for name, tensor in a[part].items())
    assert all(
        torch.equal(moment, b["optimizer"]["state"][i][key])
        for i, moments in a["optimizer"]["state"].items()
        for key, moment in moments.items()
    )


def test_resumed_is_bit_identical(data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(threads := 2)  # with the number of threads the order of sums changes, and so the last bits
    start = network()
    whole = train(start, data, RECIPE, work=tmp_path / "whole")
    for epoch in (1, 2):
        with pytest.raises(Interrupted):
            train(start, data, RECIPE, work=tmp_path / "parts", report=interrupt_after(epoch))
    parts = train(start, data, RECIPE, work=tmp_path / "parts")
    assert_same_training(whole, parts, (tmp_path / "whole", tmp_path / "parts"))
    assert torch.get_num_threads() == threads
    moved = [(a - b).abs().max() for a, b in zip(start.parameters(), whole.network.parameters(), strict=True)]
    assert max(moved) > 1e-3


def test_a_finished_training_is_not_repeated(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch=8, lr=2e-3, imgsz=64, seed=0)
    told: list[float] = []
    first = train(network(), data, recipe, work=tmp_path, report=lambda epochs, best: told.append(epochs))
    assert told == sorted(told) and told[-1] == 1
    second = train(network(), data, recipe, work=tmp_path, report=interrupt_after(1))
    assert second.curves == first.curves
    states = first.network.state_dict(), second.network.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_seeds_differ(data: Path, tmp_path: Path) -> None:
    curves = [train(network(), data, Recipe(1, 8, 2e-3, 64, seed), work=tmp_path / str(seed)).curves for seed in (0, 1)]
    assert curves[0][0]["box"] != curves[1][0]["box"]


def test_a_teacher_is_learnt_from_and_stays_as_it_is(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch=8, lr=2e-3, imgsz=64, seed=0)
    teacher = detection.lively(64).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    alone = train(network(), data, recipe, work=tmp_path / "alone")
    taught = train(network(), data, recipe, work=tmp_path / "taught", teacher=teacher)
    assert taught.curves[0]["val_cls"] != alone.curves[0]["val_cls"]
    assert teacher.training and all(torch.equal(tensor, before[n]) for n, tensor in teacher.state_dict().items())


def test_divergence_is_told(data: Path, tmp_path: Path) -> None:
    broken = network()
    with torch.no_grad():
        broken.model[0].conv.weight.fill_(float("nan"))
    with pytest.raises(StageError, match=r"lower finetune\.lr"):
        train(broken, data, Recipe(1, 8, 2e-3, 64, 0), work=tmp_path)


@pytest.mark.slow
def test_resumed_qat_is_bit_identical(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch=8, lr=1e-3, imgsz=64, seed=0, mosaic=False)
    calibration = calibration_batches(data, 64, 16, 8, 0)

    def start() -> DetectionModel:
        return quantize(network().eval(), calibration)

    whole = train(start(), data, recipe, work=tmp_path / "whole", teacher=network())
    with pytest.raises(Interrupted):
        train(start(), data, recipe, work=tmp_path / "parts", teacher=network(), report=interrupt_after(1))
    parts = train(start(), data, recipe, work=tmp_path / "parts", teacher=network())
    assert_same_training(whole, parts, (tmp_path / "whole", tmp_path / "parts"))


def stage_context(
    folder: Path,
    inputs: Path,
    supernet: dict[str, Any] | None = None,
    store: Store | None = None,
    **finetune: Any,
) -> StageContext:
    config = RunConfig.parse(
        {
            "space": "tiny",
            "imgsz": 64,
            "supernet": {"epochs": 1} | (supernet or {}),
            "search": {"candidates": 1},
            "finetune": {"epochs": 2, "candidates": 1, "batch": 8} | finetune,
            "targets": [{"hardware": "cpu-1t", "constraints": ["latency<=50ms"]}],
        },
        "test",
    )
    for name in ("out", "partial"):
        (folder / name).mkdir(parents=True)
    return StageContext(
        settings=STAGE.settings(config, config.targets[0]),
        inputs={name: inputs / name for name in ("data-prep", "supernet-train", "search")},
        out=folder / "out",
        partial=folder / "partial",
        progress=Progress.silent(),
        host=HostLock(folder / "lock"),
        store=store,
    )


@pytest.fixture(scope="module")
def stage_inputs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    (root / "data-prep").symlink_to(folder)
    torch.manual_seed(0)
    (root / "supernet-train").mkdir()
    Supernet(TINY, 2, detection.CLASSES).save(root / "supernet-train", {})
    write_json(root / "search" / "candidates.json", [{"architecture": TINY.smallest().to_dict()}])
    return root


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[DetectionModel, Recipe]]:
    """The networks at the start of each training, by the training's folder; nothing is trained."""
    begun: dict[str, tuple[DetectionModel, Recipe]] = {}

    def trained(network: DetectionModel, data: Path, recipe: Recipe, *, work: Path, **_: Any) -> Trained:
        begun[work.name] = network, recipe
        return Trained(network, 1, [{"epoch": 1, "seconds": 0.0, "map50_95": 0.5}])

    monkeypatch.setattr(finetune, "train", trained)
    return begun


def same(network: DetectionModel, other: DetectionModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_candidates_start_from_the_supernet_or_from_scratch_and_learn_as_long(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], tmp_path: Path
) -> None:
    rows = {}
    for name, from_scratch in (("fine", False), ("scratch", True)):
        STAGE.run(stage_context(tmp_path / name, stage_inputs, from_scratch=from_scratch))
        summary = read_json(tmp_path / name / "out" / "finetune.json")
        rows[name] = summary["candidates"][0], starts["candidate-0"], starts["stock"]
        assert (
            read_json(tmp_path / name / "out" / "candidates" / "0" / "tuning.json")["start"] == rows[name][0]["start"]
        )
        assert summary["baseline"]["start"] == "scratch" and starts["stock"][1].epochs == 3
    derived = derive(Supernet.load(stage_inputs / "supernet-train"), TINY.smallest())
    fine, scratch = rows["fine"], rows["scratch"]
    assert fine[0]["start"] == "supernet" and same(fine[1][0], derived) and fine[1][1].epochs == 2
    assert scratch[0]["start"] == "scratch" and not same(scratch[1][0], derived)
    assert scratch[1][1] == scratch[2][1] == fine[2][1]  # stock's own recipe


def test_stock_starts_from_the_weights_that_the_supernet_started_from(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], tmp_path: Path
) -> None:
    weights = stage_inputs / "supernet-train"
    STAGE.run(stage_context(tmp_path, stage_inputs, {"weights": str(weights)}))
    assert same(starts["stock"][0], derive(Supernet.load(weights), TINY.stock))
    assert read_json(tmp_path / "out" / "finetune.json")["baseline"]["start"] == "weights"


def test_stock_is_trained_once_for_all_targets(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], tmp_path: Path
) -> None:
    store, rows = Store(tmp_path / "store"), {}
    changes: dict[str, dict[str, Any]] = {"first": {}, "second": {"lr": 1e-4}, "other": {"epochs": 3}}
    for name, changed in changes.items():
        starts.clear()
        STAGE.run(stage_context(tmp_path / name, stage_inputs, store=store, **changed))
        assert set(starts) == ({"candidate-0"} if name == "second" else {"candidate-0", "stock"})
        rows[name] = read_json(tmp_path / name / "out" / "finetune.json")["baseline"]
    assert rows["first"] == rows["second"] != rows["other"]
    networks = [load_network(tmp_path / name / "out" / "baseline" / "best.pt") for name in ("first", "second")]
    assert same(*networks)
    assert not list((tmp_path / "first" / "partial").rglob("stock"))


def test_stocks_training_goes_on_for_whoever_comes_next(
    stage_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def trained(network: DetectionModel, data: Path, recipe: Recipe, *, work: Path, **_: Any) -> Trained:
        if work.name == "stock":
            seen.append(sorted(path.name for path in work.glob("*")))
            work.mkdir(parents=True, exist_ok=True)
            (work / CHECKPOINT).write_text("of the last epoch")
            if len(seen) == 1:
                raise Interrupted
        return Trained(network, 1, [{"epoch": 1, "seconds": 0.0, "map50_95": 0.5}])

    monkeypatch.setattr(finetune, "train", trained)
    store = Store(tmp_path / "store")
    with pytest.raises(Interrupted):
        STAGE.run(stage_context(tmp_path / "first", stage_inputs, store=store))
    STAGE.run(stage_context(tmp_path / "second", stage_inputs, store=store))
    assert seen == [[], [CHECKPOINT]]


def test_a_rescaled_stock_network_is_trained_where_it_is_asked_for(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], tmp_path: Path
) -> None:
    narrow = dataclasses.replace(TINY.stock, convs=tuple(8 * (w // 16) for w in TINY.stock.convs), sppf_width=200)
    write_json(stage_inputs / "search" / "rescaled.json", {"architecture": narrow.to_dict(), "latency_ms": 2.0})
    for asked, trained in (
        ("none", set()),
        ("stock", {"stock"}),
        ("rescaled", {"rescaled"}),
        ("both", {"stock", "rescaled"}),
    ):
        starts.clear()
        STAGE.run(stage_context(tmp_path / asked, stage_inputs, baseline=asked))
        assert set(starts) == {"candidate-0"} | trained
    summary = read_json(tmp_path / "both" / "out" / "finetune.json")
    assert summary["rescaled"]["name"] == "YOLOv8n at 0.78 of its width"
    assert summary["rescaled"]["architecture"] == narrow.to_dict()
    assert summary["rescaled"]["recipe"] == summary["baseline"]["recipe"]
    assert (tmp_path / "both" / "out" / "rescaled" / "best.pt").exists()


STAGE_SCRIPT = """
import sys
from pathlib import Path
from yolov8_nas.config import RunConfig
from yolov8_nas.host import HostLock
from yolov8_nas.progress import Progress
from yolov8_nas.stages.qat_finetune import STAGE
from yolov8_nas.stages.stage import StageContext
root, work = map(Path, sys.argv[1:])
config = RunConfig.parse(
    {"space": "tiny", "imgsz": 64, "supernet": {"epochs": 1}, "search": {"candidates": 1},
     "finetune": {"epochs": 2, "candidates": 1, "qat_epochs": 1, "batch": 8},
     "targets": [{"hardware": "cpu-1t", "precision": "best", "constraints": ["latency<=50ms"]}]}, "test")
for name in ("out", "partial"):
    (work / name).mkdir(parents=True, exist_ok=True)
inputs = {name: root / name for name in ("data-prep", "supernet-train", "search")}
context = StageContext(STAGE.settings(config, config.targets[0]), inputs, work / "out", work / "partial",
                       Progress.silent(), HostLock(work / "lock"))
STAGE.run(context)
"""


@pytest.mark.slow
def test_stage_survives_sigkill(tmp_path: Path) -> None:
    detection.make_dataset(tmp_path / "data-prep", train=16, search=4, val=4)
    torch.manual_seed(0)
    (tmp_path / "supernet-train").mkdir()
    Supernet(TINY, 2, detection.CLASSES).save(tmp_path / "supernet-train", {})
    (tmp_path / "search").mkdir()
    candidates = [{"architecture": TINY.smallest().to_dict()}]
    (tmp_path / "search" / "candidates.json").write_text(json.dumps(candidates))

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", STAGE_SCRIPT, str(tmp_path), str(tmp_path / name)]
        return subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, start_new_session=True)

    assert start("whole").wait() == 0
    killed = start("killed")
    trainings = tmp_path / "killed" / "partial" / "trainings"
    while killed.poll() is None and not (trainings / "candidate-0" / CHECKPOINT).exists():
        time.sleep(0.02)
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "out" / "finetune.json").exists()
    subprocess.run(["rm", "-r", str(tmp_path / "killed" / "out")], check=True)  # as a stage's next try does
    assert start("killed").wait() == 0
    for file in ("candidates/0/best.pt", "candidates/0/qat.pt", "baseline/best.pt", "baseline/qat.pt"):
        a, b = (
            torch.load(tmp_path / name / "out" / file, weights_only=False)["model"].state_dict()
            for name in ("whole", "killed")
        )
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items()), file
    summary = json.loads((tmp_path / "killed" / "out" / "finetune.json").read_text())
    assert summary["baseline"]["epochs"] == 3
    assert set(summary["candidates"][0]["map50_95"]) == {"fp32", "int8"}
