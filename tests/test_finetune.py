"""Trainings of stand-alone networks go on after an interruption as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import detection
import fabricated
import numpy as np
import pytest
import torch
from interruption import Interrupted, interrupt_after
from stock_weights import stock_network
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint import stock
from yolov8_nas.config import RunConfig, TrainConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import canonical_digest, read_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import CandidateResult, FinetuneResult, RescaledStock
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture, SearchSpace, rescale
from yolov8_nas.space.cost import cost
from yolov8_nas.stages import data_prep, supernet_train
from yolov8_nas.stages.qat_finetune import STAGE
from yolov8_nas.stages.qat_finetune.given import CALIBRATION_IMAGES
from yolov8_nas.stages.qat_finetune.run import rivals_of
from yolov8_nas.stages.qat_finetune.settings import FinetuneSettings
from yolov8_nas.store.store import Store
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.derive import build, derive, save_checkpoint
from yolov8_nas.supernet.slicing import sliced
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.train import finetune, starting
from yolov8_nas.train.finetune import CHECKPOINT, Recipe, Trained, train
from yolov8_nas.train.quantization import load_network, quantize

TINY = SearchSpace.load("tiny")
RECIPE = Recipe(epochs=3, batch=8, lr=2e-3, imgsz=64, seed=0)


def as_fast(network: Architecture, ms: float, candidate: str = "another") -> RescaledStock:
    """Rescaled stock of this latency, made for a candidate of 2 ms."""
    return RescaledStock(architecture=network, latency_ms=ms, candidate=candidate, candidate_ms=2.0)


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
) -> StageContext[FinetuneSettings]:
    config = RunConfig.parse(
        {
            "space": "tiny",
            "imgsz": 64,
            "supernet": {"epochs": 1} | (supernet or {}),
            "search": {"candidates": 3},
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
    (root / "search").mkdir()
    CandidateResult.write_all(root / "search", [fabricated.candidate(TINY.smallest())])
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
    for name, start in (("fine", "supernet"), ("scratch", "scratch")):
        STAGE.run(stage_context(tmp_path / name, stage_inputs, start=start))
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock of other classes, but for one of equal name."""
    network = stock_network("n", 3).float()
    file = tmp_path_factory.mktemp("weights") / "yolov8n.pt"
    save_checkpoint(network, file, names=["car", detection.CLASSES[1].upper(), "cat"], imgsz=64)
    return file


def test_from_weights_all_begin_alike_and_learn_as_long(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], checkpoint: Path, tmp_path: Path
) -> None:
    rescaled = dataclasses.replace(TINY.stock, sppf_width=128)
    inputs = shutil.copytree(stage_inputs, tmp_path / "inputs")
    RescaledStock.write_all(inputs / "search", [as_fast(rescaled, 1.0)])
    asked = {"baseline": "both", "rungs": []}
    context = stage_context(tmp_path / "one", inputs, {"weights": str(checkpoint)}, **asked)
    STAGE.run(context)
    summary = read_json(context.out / "finetune.json")
    source = stock.read(checkpoint)
    for name, row, architecture in (
        ("candidate-0", summary["candidates"][0], TINY.smallest()),
        ("stock", summary["baseline"], TINY.stock),
        ("rescaled", summary["rescaled"], rescaled),
    ):
        network, recipe = starts[name]
        torch.manual_seed(0)
        images = calibration_batches(
            data_yaml(inputs / "data-prep", context.partial, validate_on="search"), 64, CALIBRATION_IMAGES, 8, 0
        )
        assert same(network, sliced(source, architecture, detection.CLASSES, images)[0])
        assert recipe == Recipe(2, 8, 1e-3, 64, 0, True)
        assert row["start"] == "weights" and "stock YOLOv8n of 3 classes" in row["begun_with"]
        assert row["epochs"] == 2
        macs = cost(architecture, 2, 64).macs
        assert row["computing"] == {"training": pytest.approx(3 * macs * 16 * 2)}
    network, _ = starts["candidate-0"]
    again = stage_context(tmp_path / "two", inputs, {"weights": str(checkpoint)}, **asked)
    shutil.copytree(context.partial / "starts", again.partial / "starts")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(starting, "sliced", None)  # it is there
    STAGE.run(again)
    monkey.undo()
    assert same(starts["candidate-0"][0], network)


def test_the_start_is_in_the_keys(checkpoint: Path, stage_inputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(checkpoint.read_bytes() + b"x")
    asked = [
        ({}, {}),
        ({}, {"start": "scratch"}),
        ({"weights": str(checkpoint)}, {}),
        ({"weights": str(checkpoint)}, {"start": "supernet"}),
        ({"weights": str(other)}, {}),
    ]
    found = [stage_context(tmp_path / str(i), stage_inputs, *given[:1], **given[1]) for i, given in enumerate(asked)]
    assert len({canonical_digest(context.settings.plain()) for context in found}) == len(asked)
    assert [c.settings.start for c in found] == ["supernet", "scratch", "weights", "supernet", "weights"]


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"from_scratch": True}, "from_scratch is no setting: write start: scratch"),
        ({"from_scratch": False}, "leave out from_scratch: false"),
        ({"start": "weights"}, "finetune.start = 'weights' begins with the stock checkpoint of supernet.weights"),
        ({"start": "coco"}, "start = 'coco'"),
    ],
)
def test_starts_that_are_none_are_refused_in_one_line(finetune: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        RunConfig.parse({"finetune": finetune, "targets": [{"constraints": ["latency<=50ms"]}]}, "run.yaml")
    assert "\n" not in str(refused.value)


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


def test_another_limit_finds_trained_what_was_trained_for_the_first(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], tmp_path: Path
) -> None:
    rng, store = np.random.default_rng(0), Store(tmp_path / "store")
    networks = [TINY.sample(rng) for _ in range(4)]
    asked = {"candidates": 2, "epochs": 3, "rungs": [{"networks": 3, "epochs": 1}], "baseline": "none"}
    trained: dict[str, set[str]] = {}
    keys: dict[str, set[str]] = {}
    told: dict[str, FinetuneResult] = {}
    for limit, found in (("first", networks[:3]), ("second", [networks[2], networks[0], networks[3]])):
        inputs = tmp_path / f"inputs-{limit}"
        inputs.mkdir()
        for name in ("data-prep", "supernet-train"):
            (inputs / name).symlink_to(stage_inputs / name)
        (inputs / "search").mkdir()
        CandidateResult.write_all(inputs / "search", map(fabricated.candidate, found))
        starts.clear()
        STAGE.run(stage_context(tmp_path / limit, inputs, store=store, **asked))
        trained[limit] = set(starts)
        keys[limit] = {folder.name for folder in (tmp_path / "store" / "trainings").iterdir()}
        told[limit] = FinetuneResult.read(tmp_path / limit / "out")
    # All score alike, so the first two candidates are trained to the end: of the second limit, networks 2 and 0.
    assert trained["first"] == {f"rung-1-candidate-{i}" for i in range(3)} | {"candidate-0", "candidate-1"}
    assert trained["second"] == {"rung-1-candidate-2", "candidate-0"}  # networks 3 and 2
    assert keys["first"] < keys["second"] and len(keys["second"]) - len(keys["first"]) == 2
    assert [row.architecture for row in told["second"].candidates] == [networks[2], networks[0]]
    rungs = [read_json(tmp_path / "second" / "out" / "rungs" / "1" / f"{i}.json") for i in range(3)]
    assert [(row["index"], row["architecture"]) for row in rungs] == [
        (i, networks[n].to_dict()) for i, n in enumerate((2, 0, 3))
    ]
    checkpoints = [tmp_path / "first/out/candidates/0/best.pt", tmp_path / "second/out/candidates/1/best.pt"]
    assert same(*map(load_network, checkpoints))


@pytest.mark.parametrize(
    "changed",
    [{"lr": 1e-4}, {"epochs": 3}, {"start": "scratch"}, {"nms_free": True}, {"distill": True}],
)
def test_what_a_training_depends_on_is_in_its_key(
    changed: dict[str, Any],
    stage_inputs: Path,
    starts: dict[str, tuple[DetectionModel, Recipe]],
    tmp_path: Path,
) -> None:
    store, asked = Store(tmp_path / "store"), {"epochs": 2, "baseline": "none"}
    STAGE.run(stage_context(tmp_path / "first", stage_inputs, store=store, **asked))
    starts.clear()
    STAGE.run(stage_context(tmp_path / "second", stage_inputs, store=store, **asked | changed))
    assert "candidate-0" in starts


def test_another_limit_leaves_the_keys_of_data_and_supernet() -> None:
    configs = [
        RunConfig.parse({"space": "tiny", "targets": [{"hardware": "cpu-1t", "constraints": [limit]}]}, "run.yaml")
        for limit in ("latency<=50ms", "latency<=80%stock")
    ]
    for stage in (data_prep.STAGE, supernet_train.STAGE):
        first, second = (canonical_digest(stage.settings(config, None).plain()) for config in configs)
        assert first == second  # and the tables': test_other_limits_on_the_same_device_measure_nothing


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
    RescaledStock.write_all(stage_inputs / "search", [as_fast(narrow, 2.0)])
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


def test_short_trainings_choose_what_is_trained_to_the_end(
    stage_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("data-prep", "supernet-train"):
        (inputs / name).symlink_to(stage_inputs / name)
    rng = np.random.default_rng(0)
    entrants = [TINY.sample(rng) for _ in range(4)]
    (inputs / "search").mkdir()
    CandidateResult.write_all(inputs / "search", map(fabricated.candidate, entrants))
    supernet = Supernet.load(stage_inputs / "supernet-train")
    begun: list[str] = []
    shown: dict[str, tuple[set[str], set[str]]] = {}
    recipes: dict[str, Recipe] = {}

    def trained(network: DetectionModel, data: Path, recipe: Recipe, *, work: Path, **_: Any) -> Trained:
        begun.append(work.name)
        if len(begun) == 8:
            raise Interrupted
        recipes[work.name] = recipe
        images = {
            split: {file.name for file in (data.parent / "images" / split).iterdir()} for split in ("train", "val")
        }
        shown[work.name] = images["train"], images["val"]
        if work.name != "stock":
            i = int(work.name[-1])
            assert same(network, derive(supernet, entrants[i]))  # from the same start in every rung
            # Rising in the end: the mean of the last epochs counts, not the best one.
            scores = [0.9, *[0.1 * (i + 1)] * (recipe.epochs - 1)]
        else:
            scores = [0.5] * recipe.epochs
        work.mkdir(parents=True, exist_ok=True)
        (work / CHECKPOINT).write_text("large")
        curves = [{"epoch": e + 1, "seconds": 1.0, "map50_95": score} for e, score in enumerate(scores)]
        return Trained(network, recipe.epochs, curves)

    monkeypatch.setattr(finetune, "train", trained)
    asked = {"epochs": 12, "candidates": 1, "rungs": [{"networks": 4, "epochs": 4}, {"networks": 2, "epochs": 8}]}
    context = stage_context(tmp_path / "run", inputs, **asked)
    notes: list[str] = []
    monkeypatch.setattr(context.progress, "note", notes.append)
    with pytest.raises(Interrupted):
        STAGE.run(context)
    shutil.rmtree(context.out)
    context.out.mkdir()
    STAGE.run(context)
    rungs = [f"rung-1-candidate-{i}" for i in range(4)] + ["rung-2-candidate-3", "rung-2-candidate-2"]
    # What was scored is not trained again; of a whole training the checkpoint is there.
    assert begun == ["stock", *rungs, "candidate-3", "stock", "candidate-3"]
    assert [(rungs[0], r.epochs, r.seed, r.lr) for r in (recipes[rungs[0]],)] == [(rungs[0], 4, 1000, 1e-3)]
    assert (recipes[rungs[4]].epochs, recipes[rungs[4]].seed) == (8, 2000)
    assert recipes["candidate-3"] == dataclasses.replace(recipes[rungs[0]], epochs=12, seed=0)
    everything = {file.name for file in (inputs / "data-prep" / "dataset" / "images" / "train").iterdir()}
    search = {file.name for file in (inputs / "data-prep" / "dataset" / "images" / "search").iterdir()}
    folds = [shown[rungs[0]][1] - search, shown[rungs[4]][1] - search]
    assert all(shown[name] == shown[rungs[0]] for name in rungs[:4])
    assert [len(fold) for fold in folds] == [4, 4] and not folds[0] & folds[1]
    assert all(shown[rungs[r]][0] == everything - fold for r, fold in zip((0, 4), folds, strict=True))
    assert shown["candidate-3"] == shown["stock"] == (everything, search)

    summary = read_json(context.out / "finetune.json")
    assert [row["index"] for row in summary["candidates"]] == [3]
    assert [row["index"] for row in summary["halving"]["ranking"]] == [3, 2, 1, 0]
    assert summary["halving"]["ranking"][0]["scores"] == pytest.approx([0.4, 0.4, 0.4])
    assert summary["halving"]["ranking"][0]["seconds"] == 4 + 8 + 12
    assert summary["candidates"][0]["expected"] == pytest.approx(summary["candidates"][0]["average"])
    assert summary["halving"]["budget"]["epochs"] == 4 * 4 + 2 * 8 + 12
    assert notes[0].startswith("real trainings choose: 4 for 4 epochs, then 2 for 8 epochs, then 1 for 12 epochs; at")
    told = read_json(context.out / "rungs" / "1" / "0.json")
    assert told["architecture"] == entrants[0].to_dict() and len(told["curves"]) == 4
    assert not list((context.partial / "trainings").glob(f"rung*/{CHECKPOINT}"))
    assert (context.out / "candidates" / "3" / "best.pt").exists()


def test_what_candidates_are_compared_with_gets_as_many_trainings_and_the_same_teacher(
    stage_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("data-prep", "supernet-train"):
        (inputs / name).symlink_to(stage_inputs / name)
    rng = np.random.default_rng(0)
    entrants = [TINY.sample(rng) for _ in range(3)]
    (inputs / "search").mkdir()
    CandidateResult.write_all(inputs / "search", [fabricated.candidate(one, 2.0) for one in entrants])
    narrow, narrower = (rescale(TINY.stock, factor) for factor in (0.7, 0.6))
    rescaled = [
        as_fast(one, 2.0, entrant.digest)
        for one, entrant in ((TINY.stock, entrants[0]), (narrow, entrants[2]), (narrower, entrants[2]))
    ]
    RescaledStock.write_all(inputs / "search", rescaled)
    begun: dict[str, tuple[Recipe, DetectionModel | None, DetectionModel]] = {}
    scores = {"rung-1-candidate-2": 0.9, "candidate-2": 0.8, "stock-trial-2": 0.7, "rung-1-rescaled-trial-2": 0.9}

    def trained(
        network: DetectionModel, data: Path, recipe: Recipe, *, work: Path, teacher: DetectionModel | None, **_: Any
    ) -> Trained:
        begun[work.name] = recipe, teacher, network
        curves = [{"epoch": 1, "seconds": 1.0, "map50_95": scores.get(work.name, 0.5)}]
        return Trained(network, 1, curves)

    monkeypatch.setattr(finetune, "train", trained)
    asked = {"epochs": 6, "candidates": 2, "rungs": [{"networks": 3, "epochs": 2}], "baseline": "both"}
    STAGE.run(stage_context(tmp_path / "run", inputs, distill=True, **asked))
    short = [f"rung-1-candidate-{i}" for i in range(3)], [f"rung-1-rescaled{t}" for t in ("", "-trial-2", "-trial-3")]
    assert list(begun) == [
        *("stock", "stock-trial-2", *short[0], "candidate-2", "candidate-0"),
        *(*short[1], "rescaled-trial-2", "rescaled"),
    ]
    seeds = {name: recipe.seed for name, (recipe, _, _) in begun.items()}
    assert (seeds["stock"], seeds["stock-trial-2"]) == (0, 100)
    # Two roundings that take as long, and the first again with another seed.
    assert [seeds[name] for name in short[1]] == [1000, 1000, 1100]
    shapes = [sum(p.numel() for p in begun[name][2].parameters()) for name in short[1]]
    assert shapes[0] == shapes[2] > shapes[1]
    teacher = begun["stock-trial-2"][2]  # the better one of stock's trainings
    for name, (_, taught_by, _) in begun.items():
        whole = name in ("candidate-2", "candidate-0", "rescaled-trial-2", "rescaled")
        assert taught_by is (teacher if whole else None), name
    summary = read_json(tmp_path / "run" / "out" / "finetune.json")
    assert summary["rescaled"]["architecture"] == narrower.to_dict()
    assert summary["rescaled"]["equal_latency"] == {
        "latency_ms": [2.0, 2.0],
        "candidate": entrants[2].digest,
        "candidate_ms": 2.0,
    }
    assert [row["scores"] for row in summary["baseline"]["halving"]["ranking"]] == [[0.7], [0.5]]
    told = {name: row["distilled"] for name, row in summary.items() if name in ("baseline", "rescaled")}
    assert told == {"baseline": False, "rescaled": True} and summary["candidates"][0]["distilled"]
    begun.clear()
    context = stage_context(tmp_path / "alone", inputs, distill=True, **asked | {"baseline": "none"})
    notes: list[str] = []
    monkeypatch.setattr(context.progress, "note", notes.append)
    STAGE.run(context)
    assert list(begun) == ["stock", *short[0], "candidate-2", "candidate-0"]
    assert "finetune.distill takes a training of stock for 7 epochs" in notes[1]
    assert read_json(context.out / "finetune.json")["baseline"] is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a", 2.0, "mine"), ("b", 2.01, "mine"), ("c", 2.0, "other")], ["a", "b"]),
        ([("a", 2.0, "mine"), ("a", 2.01, "mine")], ["a"]),
        ([("a", 2.02, "other"), ("b", 1.99, "other"), ("c", 2.2, "other")], ["a", "b"]),
        ([("a", 2.3, "other"), ("b", 1.8, "other")], ["b"]),
        ([("a", 3.0, "other")], ["a"]),
    ],
)
def test_rivals_are_those_of_the_candidates_latency(rows: list[tuple[str, float, str]], expected: list[str]) -> None:
    named = dict(zip("abc", (rescale(TINY.stock, factor) for factor in (0.8, 0.7, 0.6)), strict=True))
    content = [as_fast(named[name], ms, whose) for name, ms, whose in rows]
    found = rivals_of(content, "mine", 2.0)
    assert [architecture for architecture, _ in found] == [named[name] for name in expected]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"rungs": [{"networks": 4, "epochs": 3}, {"networks": 6, "epochs": 5}]}, "fewer networks and more epochs"),
        ({"rungs": [{"networks": 4, "epochs": 3}, {"networks": 3, "epochs": 3}]}, "fewer networks and more epochs"),
        ({"rungs": [{"networks": 1, "epochs": 3}]}, "trained to the end"),
        ({"rungs": [{"networks": 3, "epochs": 100}]}, "fewer epochs"),
        ({"rungs": "some"}, "rungs"),
    ],
)
def test_rungs_that_do_not_narrow_are_refused(asked: dict[str, Any], told: str) -> None:
    target = {"hardware": "cpu-1t", "constraints": ["latency<=50ms"]}
    with pytest.raises(InputError, match=told):
        RunConfig.parse({"finetune": asked, "targets": [target]}, "test")


def test_an_epoch_of_luck_does_not_decide_which_weights_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.9, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5])

    def validate(self: Any) -> tuple[dict[str, float], float]:
        score = next(scores)
        losses = {f"val/{name}_loss": 1.0 for name in ("box", "cls", "dfl")}
        return {"metrics/mAP50(B)": score, "metrics/mAP50-95(B)": score, **losses}, score

    monkeypatch.setattr(finetune._Trainer, "validate", validate)
    recipe = Recipe(epochs=12, batch=16, lr=2e-3, imgsz=32, seed=0, mosaic=False)
    trained = train(network(), data, recipe, work=tmp_path)
    assert recipe.window == 3 and [Recipe(e, 8, 1e-3, 64, 0).window for e in (1, 4, 7, 8, 11)] == [1, 1, 1, 2, 2]
    assert trained.epoch == 8  # the end of the best three; the best epoch is the second
    assert finetune.average(trained.curves[:8], 3) == pytest.approx(0.6)


STAGE_SCRIPT = """
import sys
from pathlib import Path
from yolov8_nas.checkpoint import stock
from yolov8_nas.config import RunConfig, TrainConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.runner.progress import Progress
from yolov8_nas.stages import data_prep, supernet_train
from yolov8_nas.stages.qat_finetune import STAGE
from yolov8_nas.runner.stage import StageContext
root, work = map(Path, sys.argv[1:])
config = RunConfig.parse(
    {"space": "tiny", "imgsz": 64, "supernet": {"epochs": 1}, "search": {"candidates": 2},
     "finetune": {"epochs": 2, "candidates": 1, "rungs": [{"networks": 2, "epochs": 1}], "qat_epochs": 1, "batch": 8},
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
    CandidateResult.write_all(tmp_path / "search", map(fabricated.candidate, (TINY.smallest(), TINY.stock)))

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", STAGE_SCRIPT, str(tmp_path), str(tmp_path / name)]
        return subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, start_new_session=True)

    assert start("whole").wait() == 0
    killed = start("killed")
    trainings = tmp_path / "killed" / "partial" / "trainings"
    while killed.poll() is None and not (trainings / "rung-1-candidate-0" / "scored.json").exists():
        time.sleep(0.02)
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "out" / "finetune.json").exists()
    subprocess.run(["rm", "-r", str(tmp_path / "killed" / "out")], check=True)  # as a stage's next try does
    assert start("killed").wait() == 0
    summary = json.loads((tmp_path / "killed" / "out" / "finetune.json").read_text())
    chosen = f"candidates/{summary['candidates'][0]['index']}"
    for file in (f"{chosen}/best.pt", f"{chosen}/qat.pt", "baseline/best.pt", "baseline/qat.pt"):
        a, b = (
            torch.load(tmp_path / name / "out" / file, weights_only=False)["model"].state_dict()
            for name in ("whole", "killed")
        )
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items()), file
    assert [len(row["scores"]) for row in summary["halving"]["ranking"]] == [2, 1]
    assert summary["baseline"]["epochs"] == 3
    assert set(summary["candidates"][0]["map50_95"]) == {"fp32", "int8"}


TRAIN = {"optimizer": "SGD", "lr0": 0.02, "momentum": 0.8, "hsv_h": 0.0, "degrees": 10, "mosaic": 0.5, "cos_lr": True}


def test_the_users_training_settings_reach_every_arm_alike(
    stage_inputs: Path, starts: dict[str, tuple[DetectionModel, Recipe]], tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs"
    shutil.copytree(stage_inputs, inputs, symlinks=True)
    narrow = rescale(TINY.stock, 0.7)
    RescaledStock.write_all(inputs / "search", [as_fast(narrow, 2.0, TINY.smallest().digest)])
    context = stage_context(tmp_path / "run", inputs, baseline="both", train=TRAIN)
    STAGE.run(context)
    recipes = {name: recipe for name, (_, recipe) in starts.items()}
    assert {"stock", "candidate-0", "rescaled"} <= recipes.keys()
    assert len({recipe.options for recipe in recipes.values()}) == 1
    assert dict(recipes["rescaled"].options) == {name: value for name, value in TRAIN.items() if name != "lr0"}
    assert {recipe.lr for recipe in recipes.values()} == {0.02}
    told = read_json(context.out / "candidates" / "0" / "tuning.json")["recipe"]
    assert ["optimizer", "SGD"] in told["options"], "and the result says so"


def test_training_settings_are_in_the_keys(stage_inputs: Path, tmp_path: Path) -> None:
    asked = [{}, {"train": {"fliplr": 0.0}}, {"train": {"fliplr": 0.1}}]
    found = [stage_context(tmp_path / str(i), stage_inputs, **given).settings for i, given in enumerate(asked)]
    assert len({canonical_digest(settings.plain()) for settings in found}) == len(asked)


def test_ultralytics_trains_by_what_is_given(data: Path, tmp_path: Path) -> None:
    options = TrainConfig(**TRAIN).given
    recipe = dataclasses.replace(RECIPE, epochs=1, options=options)
    trainer = finetune._Trainer(network(), data, recipe, tmp_path, lambda *_: None, "cpu")
    asked = {name: getattr(trainer.args, name) for name, _ in options}
    assert asked == dict(options)
    joined = dataclasses.replace(recipe, mosaic=False)
    trainer = finetune._Trainer(network(), data, joined, tmp_path, lambda *_: None, "cpu")
    assert trainer.args.mosaic == 0.0, "quantization-aware training joins no images"
    trained = train(network(), data, recipe, work=tmp_path / "work")
    state = torch.load(tmp_path / "work" / CHECKPOINT, weights_only=True)["optimizer"]["param_groups"]
    assert all(group["momentum"] == 0.8 and "betas" not in group for group in state), "SGD it was"
    assert len(trained.curves) == 1


def test_every_training_setting_is_one_of_ultralytics() -> None:
    from ultralytics.cfg import DEFAULT_CFG_DICT, check_cfg

    fields = TrainConfig.model_fields
    assert fields.keys() <= DEFAULT_CFG_DICT.keys()
    check_cfg({name: value for name, value in TrainConfig(**TRAIN).model_dump().items() if value is not None})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fliplrr": 0.5}, r"unknown key finetune\.train\.fliplrr \(known: optimizer, lr0"),
        ({"fliplr": 1.5}, r"finetune\.train\.fliplr = 1\.5: .*less than or equal to 1"),
        ({"optimizer": "auto"}, r"finetune\.train\.optimizer = 'auto'"),
        ({"lr0": 0}, r"finetune\.train\.lr0 = 0"),
        ({"degrees": "ten"}, r"finetune\.train\.degrees = 'ten'"),
        ({"epochs": 3}, r"unknown key finetune\.train\.epochs"),
        ("fast", r"finetune\.train = 'fast'"),
    ],
)
def test_training_settings_that_are_none_are_refused_in_one_line(asked: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        RunConfig.parse({"finetune": {"train": asked}, "targets": [{"constraints": ["latency<=50ms"]}]}, "run.yaml")
    assert "\n" not in str(refused.value)
