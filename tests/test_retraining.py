"""Retraining: when there is nothing to do, what it starts from, what becomes of the challenger."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from detection import make_dataset
from registering import Branch

from yolov8_nas.config import RunConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.registry import tracking, trial
from yolov8_nas.report.step import tell_run
from yolov8_nas.run import lifecycle, retraining
from yolov8_nas.run.summary import RUN_FILE
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results.summary import Gate, Summary
from yolov8_nas.runner.stage import StageContext, key_of
from yolov8_nas.stages import hw_probe, supernet_train
from yolov8_nas.stages.supernet_train.run import _with_weights_here
from yolov8_nas.stages.supernet_train.settings import KEPT, kept_at
from yolov8_nas.store.archive import pack
from yolov8_nas.store.store import Store

_names = (f"cast-{number}" for number in count())
TARGET = {"hardware": "cpu-2t", "precision": "best", "constraints": ["latency<=80%stock"]}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = tracking.resolve_uri(None, tmp_path_factory.mktemp("registry") / "store")
    tracking.connect(uri)
    return uri


@pytest.fixture
def branch(uri: str, tmp_path: Path) -> Branch:
    return Branch(uri, next(_names), tmp_path / "branch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the classes that the made-up branch knows."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, images in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(images):
            cv2.imwrite(
                str(folder / "images" / split / f"{number}.png"), rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
            )
            (folder / "labels" / split / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.4 0.4\n")
    described = {"path": ".", "train": "images/train", "val": "images/val", "names": ["scratch", "dent"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(described))
    return folder


def _config(branch: Branch, data: Path, **changes: Any) -> RunConfig:
    settings = {"name": branch.config.name, "data": str(data), "space": "tiny", "imgsz": 64, "targets": [TARGET]}
    return RunConfig.parse({**settings, "tracking": {"uri": branch.uri}, "retrain": {}, **changes}, "test")


def _open(config: RunConfig, store: Path, run_id: str) -> dict[str, Any]:
    return lifecycle.open_run(config, store=str(store), run_id=run_id, output=store.parent / "run.json")


def _close(store: Path, run_id: str) -> Summary:
    out = store.parent / "work"
    files = {"summary_file": out / "copy.json", "report_file": out / "copy.html"}
    return lifecycle.close_run(store=str(store), run_id=run_id, workdir=out, **files)


def test_new_images_are_trained_on_from_the_champions_supernet_and_known_ones_are_not(
    branch: Branch, data: Path, tmp_path: Path
) -> None:
    store, config = tmp_path / "store", _config(branch, data, supernet={"epochs": 10})
    branch.register()
    opened = _open(config, store, "first")
    first = RunConfig.parse(opened["config"], "test")
    assert opened["retraining"]["new"] and opened["retraining"]["origin"] == f"{config.name}/1"
    assert (first.supernet.epochs, first.finetune.baseline, first.retrain) == (3, "none", None)
    assert f"3 epochs from the supernet of {config.name}/1 instead of 10" in opened["retraining"]["says"]

    settings = supernet_train.STAGE.settings(first, None)
    ctx = StageContext(settings, {}, tmp_path, tmp_path, Progress.silent(), HostLock(), Store(store))
    weights = Path(_with_weights_here(ctx).settings.weights.path)
    assert (weights / "supernet.safetensors").read_bytes() == b"weights"

    (prepared,) = (store / "data-prep").glob("*/outputs/dataset.json")
    branch.register(dataset=read_json(prepared)["digest"], map50_95=0.2)
    assert _open(config, store, "first")["retraining"]["new"], "it goes on, whatever it has registered meanwhile"
    opened = _open(config, store, "second")
    assert not opened["retraining"]["new"], "a challenger on these images is there, champion or not"
    summary = _close(store, "second")
    assert (summary.run.status, summary.targets) == ("done", ())
    assert f"Nothing new: {config.name}/2 came from this state" in summary.run.retraining.says
    assert "Nothing new" in (tmp_path / "work" / "report.html").read_text()
    told = tell_run(summary)
    assert told.markdown.startswith(f"# {config.name} is as it was") and "/2 came from this state" in told.markdown

    another = _config(branch, data, targets=[TARGET, {**TARGET, "hardware": "cpu-1t"}])
    told = _open(another, store, "third")["retraining"]["says"]
    assert told.startswith("No version for cpu-1t-best came from this state of the dataset yet")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "nobody-made-this"}, "no registered model 'nobody-made-this'"),
        ({"targets": [{**TARGET, "hardware": "cpu-1t"}]}, "has no champion for target cpu-1t-best"),
        ({"space": "yolov8n"}, r"is of another space \('tiny'\) than 'yolov8n'"),
    ],
)
def test_what_cannot_be_retrained(branch: Branch, data: Path, changes: dict[str, Any], told: str) -> None:
    branch.register()
    with pytest.raises(InputError, match=f"retrain: .*{told}.* run it without the section retrain") as refused:
        retraining.check(_config(branch, data, **changes), branch.uri, ("scratch", "dent"))
    assert "\n" not in str(refused.value)


def test_other_classes_and_a_champion_without_its_supernet(
    branch: Branch, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch.register()
    config = _config(branch, data)
    with pytest.raises(InputError, match="knows the classes scratch, dent, the dataset has scratch, hole"):
        retraining.check(config, branch.uri, ("scratch", "hole"))
    origin = retraining.check(config, branch.uri, ())
    folder = Path(tracking.connect(branch.uri).get_run(origin.run).info.artifact_uri.removeprefix("file://"))
    (folder / "supernet" / "supernet.safetensors").unlink()
    with pytest.raises(InputError, match=rf"no supernet is kept with the run of {config.name}/1"):
        retraining.check(config, branch.uri, ())


def test_a_supernet_that_was_changed_is_refused(branch: Branch, data: Path, tmp_path: Path) -> None:
    branch.register()
    config = _config(branch, data)
    origin = retraining.check(config, branch.uri, ())
    folder = Path(tracking.connect(branch.uri).get_run(origin.run).info.artifact_uri.removeprefix("file://"))
    (folder / "supernet" / "supernet.safetensors").write_bytes(b"others!")
    with pytest.raises(StageError, match="it was changed or damaged since, so it is refused"):
        _open(config, tmp_path / "store", "run")
    assert not Store(tmp_path / "store").entry(KEPT, origin.sha256).outputs.exists()


def test_retraining_and_other_weights_do_not_go_together(branch: Branch, data: Path) -> None:
    with pytest.raises(InputError, match=r"leave supernet\.weights or retrain out"):
        _config(branch, data, supernet={"weights": "yolov8n.pt"})
    with pytest.raises(InputError, match=r"unknown key retrain.epochs \(known: share, tolerance\)"):
        _config(branch, data, retrain={"epochs": 3})


def test_tables_of_the_same_hardware_are_found_whatever_the_images_are(branch: Branch, data: Path) -> None:
    def key(config: RunConfig, classes: int = 2) -> str:
        config = config.retrained_from(kept_at("0" * 64))
        settings = hw_probe.STAGE.whole(config, config.targets[0], {"num_classes": classes})
        return key_of(hw_probe.STAGE, settings, {})

    known = _config(branch, data, retrain=None)
    again = _config(branch, data.parent / "grown", supernet={"epochs": 7}, finetune={"epochs": 2})
    assert key(known) == key(again)
    assert key(again) not in (key(again, classes=3), key(_config(branch, data, imgsz=96)))


@pytest.mark.parametrize("promoted", [True, False])
def test_the_gate_is_asked_and_its_verdict_told(
    promoted: bool, branch: Branch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def promote(function: str, **arguments: Any) -> dict[str, Any]:
        asked.update(arguments, function=function, images=trial.val_split(arguments["data"], tmp_path).files)
        return {"promoted": promoted, "reasons": ["mAP50-95 0.4, champion 1 0.3"]}

    monkeypatch.setattr(retraining.process, "call", promote)
    said = _challenge({"version": 4, "reason": ""}, tmp_path)
    assert asked["function"] == "yolov8_nas.registry.promote:promote"
    assert (asked["reference"], asked["tolerance"], len(asked["images"])) == ("line-3/4", 0.01, 2)
    assert said.plain() == read_json(tmp_path / "store" / "runs" / "run" / "gate.cpu-2t-best.json")

    store = Store(tmp_path / "store")
    news = {"new": True, "says": "The dataset has changed.", "origin": "line-3/3"}
    store.record("run", lifecycle.CONFIG_FILE, branch.config.model_dump(mode="json"))
    opened = {
        "tracking_uri": branch.uri,
        "mlflow_run": tracking.open_run(branch.config, f"gate-{promoted}", branch.uri),
    }
    store.record("run", RUN_FILE, {**opened, "retraining": news})
    summary = _close(tmp_path / "store", "run")
    assert summary.targets[0].gate.promoted is promoted
    word = "is champion" if promoted else "is not made champion"
    sentence = f"Promotion gate: line-3/4 {word}: mAP50-95 0.4, champion 1 0.3"
    assert sentence in (tmp_path / "work" / "report.html").read_text()
    assert sentence in tell_run(summary).markdown and "The dataset has changed." in tell_run(summary).markdown


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (None, "a stage before it failed"),
        ({"spooled": "x", "reason": "http://mlflow could not be reached"}, "models promote"),
        ({"version": 4, "reason": ""}, "the gate could not decide: no such thing"),
    ],
)
def test_a_gate_that_cannot_decide_says_so_and_fails_nothing(
    entry: dict[str, Any] | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: str, **arguments: Any) -> None:
        raise InputError("no such thing")

    monkeypatch.setattr(retraining.process, "call", fail)
    said = _challenge(entry, tmp_path)
    assert not said.promoted and told in said.reasons[0]


def _challenge(entry: dict[str, Any] | None, folder: Path) -> Gate:
    pack(make_dataset(folder / "data", train=1, search=1, val=2, size=64), folder / "data.tar")
    name, content = (
        ("registry.json", {"model": "line-3", "tracking_uri": "", **entry})
        if entry
        else ("status.json", {"stage": "search", "error": "no"})
    )
    write_json(folder / "registered" / name, content)
    pack(folder / "registered", folder / "registered.tar")
    return retraining.challenge(
        store=str(folder / "store"),
        run_id="run",
        label="cpu-2t-best",
        gpus=0,
        tracking_uri="sqlite:///nowhere.db",
        tolerance=0.01,
        registered=folder / "registered.tar",
        dataset=folder / "data.tar",
    )


@pytest.mark.slow
def test_on_one_machine_the_run_ends_where_nothing_is_new(branch: Branch, data: Path, tmp_path: Path) -> None:
    branch.register()
    config = _config(branch, data)
    opened = _open(config, tmp_path / "store", "look")
    (prepared,) = (tmp_path / "store" / "data-prep").glob("*/outputs/dataset.json")
    branch.register(dataset=read_json(prepared)["digest"], map50_95=0.5)
    assert opened["retraining"]["new"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config.model_dump(mode="json"), "retrain": None}))
    command = [sys.executable, "-m", "yolov8_nas.commands.main", "retrain", "config.yaml", "--workdir", "work"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"Nothing new: {config.name}/2 came from this state of the dataset." in done.stdout
    summary = Summary.read(tmp_path / "work")
    assert [(stage.name, stage.status) for stage in summary.stages] == [("data-prep", "done")]
