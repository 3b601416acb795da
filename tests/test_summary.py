"""The summary of runs that went well, failed in a branch, failed for all, or were cut short."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fabricated
import pytest
from fabricated import CONFIG, PROFILE, write_outputs

from yolov8_nas.files import file_sha256, write_json
from yolov8_nas.run.summary import summarise
from yolov8_nas.runner.results import RegisterResult
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.runner.stage import target_labels
from yolov8_nas.store.store import Store

SHARED = ("data-prep", "supernet-train")
(LABEL,) = target_labels(CONFIG)
REGISTERED = RegisterResult(model=CONFIG.name, tracking_uri="", reason="", version=3, aliases=("champion-x",))


class FinishedRun:
    """A store with the outputs and records of a run that went well; tests break it."""

    def __init__(self, folder: Path, **outputs: Any) -> None:
        self.store, self.out = Store(folder / "store"), folder
        made = write_outputs(folder / "made", **outputs)
        registered = folder / "made" / "register"
        registered.mkdir()
        REGISTERED.write(registered)
        for stage, source in {**made, "register": registered}.items():
            shutil.copytree(source, self.store.entry(stage, "key").outputs)
            self.record(stage)
        opened = {"mlflow_run": "f00", "tracking_uri": "https://user:secret@mlflow.example/path?token=1"}
        write_json(self.store.run_folder("run") / "run.json", opened)

    def file(self, stage: str) -> Path:
        return self.store.run_folder("run") / f"{'all' if stage in SHARED else LABEL}.{stage}.json"

    def record(self, stage: str, status: str = "done", error: str | None = None, key: str = "key") -> None:
        target = None if stage in SHARED else LABEL
        write_json(self.file(stage), fabricated.stage_record(stage, target, status=status, error=error, key=key))

    def fail(self, stage: str, error: str, *later: str) -> None:
        self.record(stage, "failed", error)
        for name in later:
            self.record(name, "failed", f"not run, because {stage} failed", key="")

    def summarise(self) -> dict[str, Any]:
        summary = summarise(self.store, "run", self.out, CONFIG)
        assert Summary.read(self.out) == summary
        return summary.plain()


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    return FinishedRun(tmp_path)


def test_finished_run_has_every_key_of_the_schema(run: FinishedRun) -> None:
    summary = run.summarise()
    assert summary["schema"] == 1
    assert summary["run"]["status"] == "done"
    assert summary["dataset"] == {
        "digest": "d" * 64,
        "images": {"train": 12, "search": 3, "val": 4},
        "classes": ["scratch", "dent"],
    }
    assert [row["name"] for row in summary["stages"]] == [
        "data-prep",
        "supernet-train",
        "hw-probe",
        "search",
        "qat-finetune",
        "trt-export",
        "register",
    ]
    assert [row["target"] for row in summary["stages"]] == [None, None] + 5 * [LABEL]
    (target,) = summary["targets"]
    assert (target["status"], target["error"]) == ("met", None)
    assert target["hardware"]["name"] == PROFILE["name"]
    assert target["hardware"]["threads"] == 2
    assert target["runtime"] == {"name": "onnxruntime", "version": "1.31.1"}
    assert (target["precision_requested"], target["precision_shipped"]) == ("best", "fp32")
    limit = {"metric": "latency", "statistic": "p50", "scope": "engine", "limit": 3.2, "unit": "ms"}
    assert target["constraints"] == [
        {**limit, "measured": 3.0, "met": True, "share": None, "stock": None, "text": None}
    ]
    assert set(target["architecture"]) == {"convs", "blocks", "sppf", "attention", "detect"}
    model = target["model"]
    assert model["map50_95"] == 0.41
    assert model["latency_ms"] == {"p50": 3.0, "p90": 3.2, "p99": 4.0}
    told = {"map50_95", "map50", "latency_ms", "memory_mb", "params", "gflops", "files"}
    assert set(model) == told | {"latency_with_nms_ms", "energy_mj", "power_w", "training"}
    assert target["baselines"][0]["name"] == "YOLOv8n"
    assert target["baselines"][0]["latency_ms"]["p50"] == 4.0
    errors = {"mape": 0.03, "spearman": 0.98, "networks": 40, "holdout": 10, "coverage": 0.9}
    assert target["latency_model"] == errors
    assert target["registry"] == {**REGISTERED.plain(), "choices": []}
    assert target["comparison"]["word"] == "undecided"
    assert target["comparison"]["decided_by"]["images_needed"] == 2581
    assert [row["why_not"] for row in target["classes"]] == [None, "few images"]


def test_files_that_ship_are_copied_and_found_by_relative_paths(run: FinishedRun) -> None:
    stale = run.out / "models" / LABEL / "qat.pt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    files = run.summarise()["targets"][0]["model"]["files"]
    assert set(files) == {"model.onnx", "best.pt", "subnet.pt"}
    shipped = run.store.entry("trt-export", "key").outputs / "model"
    for name, file in files.items():
        assert not Path(file).is_absolute()
        assert file_sha256(run.out / file) == file_sha256(shipped / name)
    assert not stale.exists()


def test_no_credentials_get_into_the_summary(run: FinishedRun) -> None:
    assert run.summarise()["run"]["tracking_uri"] == "https://mlflow.example/path"
    assert "secret" not in (run.out / "summary.json").read_text()


def test_memory_is_that_of_stages_that_computed(run: FinishedRun) -> None:
    run.record("search", "cached")
    rows = {row["name"]: row for row in run.summarise()["stages"]}
    assert rows["search"]["peak_memory_mb"] is None
    assert rows["register"]["peak_memory_mb"] == 1000.0


def test_failed_verdict_tells_what_the_closest_file_had(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, p50=3.6)
    run.fail("trt-export", "none of 2 exported files keeps the limits", "register")
    summary = run.summarise()
    assert summary["run"]["status"] == "failed"
    (target,) = summary["targets"]
    assert target["status"] == "failed"
    assert target["error"] == "trt-export: none of 2 exported files keeps the limits"
    assert (target["model"], target["registry"], target["precision_shipped"]) == (None, None, None)
    assert (target["constraints"][0]["measured"], target["constraints"][0]["met"]) == (3.6, False)
    assert [row["status"] for row in summary["stages"]].count("failed") == 2
    assert not (tmp_path / "models").exists()


def test_branch_that_failed_early_still_names_device_limit_and_stock(run: FinishedRun) -> None:
    run.fail("search", "no network keeps the limit", "qat-finetune", "trt-export", "register")
    (target,) = run.summarise()["targets"]
    assert target["error"] == "search: no network keeps the limit"
    assert target["hardware"]["model"] == PROFILE["model"]
    assert (target["constraints"][0]["limit"], target["constraints"][0]["met"]) == (3.2, None)
    latency = {"p50": 4.0, "p90": 4.2, "p99": 4.9}
    stock = {"name": "stock YOLOv8n", "map50_95": None, "latency_ms": latency, "training": None}
    assert target["baselines"] == [stock]


def test_failure_before_the_branches_is_the_cause_of_all(run: FinishedRun) -> None:
    for stage in ("supernet-train", "hw-probe", "search", "qat-finetune", "trt-export", "register"):
        run.file(stage).unlink()
    run.record("data-prep", "failed", "data.yaml is missing", key="")
    summary = run.summarise()
    assert summary["dataset"] is None
    (target,) = summary["targets"]
    assert target["error"] == "data-prep: data.yaml is missing"
    # Nothing is known of the device but what was asked for.
    assert target["hardware"]["name"] == "cpu-2t"
    limit = {"metric": "latency", "statistic": "p50", "scope": "engine", "limit": 0.8, "unit": "of stock"}
    assert target["constraints"] == [
        {**limit, "measured": None, "met": None, "share": None, "stock": None, "text": None}
    ]


def test_run_that_ended_between_stages_is_no_success(run: FinishedRun) -> None:
    run.file("register").unlink()
    summary = run.summarise()
    assert (summary["run"]["status"], summary["run"]["error"]) == ("failed", None)
    assert summary["targets"][0]["error"].startswith("register: the run ended before it")
    # What ships is there all the same.
    assert summary["targets"][0]["model"]["map50_95"] == 0.41


def test_run_that_never_opened_has_a_summary(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.record("run", "failure.all.open-run.json", {"task": "open-run", "target": None, "error": "no such dataset"})
    summary = summarise(store, "run", tmp_path, CONFIG)
    assert (summary.run.status, summary.stages) == ("failed", ())
    assert summary.targets[0].status == "failed"
