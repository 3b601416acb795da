"""The registry, on a real MLflow with SQLite: converging, aliases, queries, half-finished registrations."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import CONFIG, PROFILE, write_outputs

from yolov8_nas.errors import InputError
from yolov8_nas.host import HostLock
from yolov8_nas.progress import Progress
from yolov8_nas.registry import query, register, tracking
from yolov8_nas.registry.register import Registration
from yolov8_nas.stages.register import STAGE
from yolov8_nas.stages.stage import StageContext, run_stage
from yolov8_nas.store import file_sha256, pack, read_json, write_json

_names = (f"line-{number}" for number in count())


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow on SQLite, shared: making its tables takes seconds. Each test uses a model name of its own."""
    uri = tracking.resolve_uri(None, tmp_path_factory.mktemp("registry") / "store")
    tracking.connect(uri)
    return uri


@pytest.fixture
def model() -> str:
    return next(_names)


class Branch:
    """Runs the stage on fabricated outputs, in a run of its own each time."""

    def __init__(self, uri: str, model: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder
        self.config = CONFIG.model_copy(update={"name": model})
        self.tries = count()

    def register(self, run_id: str | None = None, **outputs: Any) -> dict[str, Any]:
        number = next(self.tries)
        run_id = run_id or f"run-{self.config.name}-{number}"
        # The same figures give the same files, as a stage that is cached does.
        inputs = write_outputs(self.folder / str(number), **outputs)
        out = self.folder / f"out-{number}"
        out.mkdir()
        target = self.config.targets[0]
        parameters = {
            "run_id": run_id,
            "tracking_uri": self.uri,
            "mlflow_run": tracking.open_run(self.config, run_id, self.uri),
            "label": "cpu-2t-best",
        }
        context = StageContext(
            {**STAGE.settings(self.config, target), **parameters}, inputs, out, out, Progress.silent(), HostLock()
        )
        STAGE.run(context)
        result = read_json(out / "registry.json")
        assert isinstance(result, dict)
        return result


@pytest.fixture
def branch(uri: str, model: str, tmp_path: Path) -> Branch:
    return Branch(uri, model, tmp_path)


def test_uri_is_the_configured_one_or_a_database_beside_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.resolve_uri(None, tmp_path / "store") == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert tracking.resolve_uri("http://mlflow:5000", tmp_path) == "http://mlflow:5000"
    with pytest.raises(InputError, match=r"tracking\.uri"):
        tracking.resolve_uri(None, "s3://bucket/store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://given:5000")
    assert tracking.resolve_uri(None, "s3://bucket/store") == "http://given:5000"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:secret@mlflow.example:5000/path?token=1", "https://mlflow.example:5000/path"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("sqlite:////store/mlflow.db", "sqlite:////store/mlflow.db"),
    ],
)
def test_uri_is_shown_without_credentials(uri: str, shown: str) -> None:
    assert tracking.without_credentials(uri) == shown


def test_server_that_does_not_answer_is_named_at_once() -> None:
    with pytest.raises(InputError, match=re.escape("http://127.0.0.1:9")):
        tracking.open_run(CONFIG, "run", "http://127.0.0.1:9")


def test_run_is_opened_once_and_closed_with_what_it_took(uri: str, tmp_path: Path) -> None:
    client = tracking.connect(uri)
    first = tracking.open_run(CONFIG, "run-once", uri)
    assert tracking.open_run(CONFIG.model_copy(update={"seed": 7}), "run-once", uri) == first
    assert tracking.open_run(CONFIG, "run-other", uri) != first
    (tmp_path / "report.html").write_text("<html></html>")
    stages = [
        {"name": "search", "target": "cpu", "seconds": 2.5},
        {"name": "register", "target": "cpu", "seconds": None},
    ]
    tracking.close_run(uri, first, {"run": {"status": "failed"}, "stages": stages}, tmp_path)
    run = client.get_run(first)
    assert run.data.params["supernet.epochs"] == "300"
    assert run.data.metrics == {"seconds/search/cpu": 2.5}
    assert run.info.status == "FAILED"
    assert {file.path for file in client.list_artifacts(first)} == {"config.json", "report.html"}


def test_one_of_two_runs_made_at_once_is_kept(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect(uri)
    first = tracking.find_or_create_run(client, "race", "key", "value", name="first")
    search, looks = type(client).search_runs, count()
    # The second process looked before the first had made its run.
    monkeypatch.setattr(type(client), "search_runs", lambda *args, **rest: search(*args, **rest) if next(looks) else [])
    assert tracking.find_or_create_run(client, "race", "key", "value", name="second") == first
    monkeypatch.undo()
    assert len(client.search_runs([client.get_experiment_by_name("race").experiment_id])) == 1


def test_version_holds_files_figures_and_tags(branch: Branch, model: str, uri: str) -> None:
    entry = branch.register(map50_95=0.41, p50=3.0)
    assert (entry["model"], entry["version"], entry["role"]) == (model, 1, "champion")
    assert entry["aliases"] == ["champion-cpu-example-2-5-ghz-2t-fp32-lat-p50-80pct-yolov8n"]

    shown = query.find(uri, model)
    assert shown.metrics["map50_95"] == 0.41
    assert shown.metrics["latency_p99_ms"] == 4.0
    assert shown.metrics["map50_95_against_stock_low"] == -0.01
    assert shown.tags["hardware_id"] == PROFILE["id"]
    assert shown.tags["constraints"] == "latency<=80%stock"
    assert shown.params["imgsz"] == "64"
    client = tracking.connect(uri)
    logged = client.get_logged_model(entry["model_id"])
    assert logged.metrics[0].dataset_name == model
    assert logged.source_run_id == entry["run_id"]
    run = client.get_run(entry["run_id"])
    assert run.info.status == "FINISHED"
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == [model]
    parent = run.data.tags["mlflow.parentRunId"]
    assert [point.step for point in client.get_metric_history(parent, "supernet/box")] == [1, 2, 3]
    assert "candidate_0/box" in run.data.metrics


def test_shipped_file_comes_back_byte_by_byte_and_runs(branch: Branch, tmp_path: Path) -> None:
    import mlflow

    entry = branch.register()
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{entry['model_id']}", dst_path=str(tmp_path / "back")))
    manifest = read_json(folder / "manifest.json")
    assert set(manifest["files"]) == {"model.onnx", "best.pt", "subnet.pt", "architecture.json"}
    for name, digest in manifest["files"].items():
        assert file_sha256(folder / name) == digest
    shipped = branch.folder / "0" / "trt-export" / "model" / "model.onnx"
    assert file_sha256(folder / "model.onnx") == file_sha256(shipped)
    network = mlflow.pyfunc.load_model(f"models:/{entry['model']}@{entry['aliases'][0]}")
    assert network.predict({"images": np.zeros((1, 3, 64, 64), np.float32)})["output0"].shape == (1, 8, 64, 64)


def test_same_content_twice_is_one_version(branch: Branch, model: str, uri: str) -> None:
    first = branch.register()
    again = branch.register()
    resumed = branch.register(run_id=f"run-{model}-0")
    assert [entry["version"] for entry in (first, again, resumed)] == [1, 1, 1]
    assert [entry["created"] for entry in (first, again, resumed)] == [True, False, False]
    assert first["run_id"] == resumed["run_id"] != again["run_id"]
    assert len(tracking.connect(uri).search_model_versions(f"name = '{model}'")) == 1
    # A run that found its model there is linked to it all the same.
    outputs = tracking.connect(uri).get_run(again["run_id"]).outputs.model_outputs
    assert [output.model_id for output in outputs] == [first["model_id"]]


def test_same_content_at_once_is_one_version(
    branch: Branch, model: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = branch.register()
    client = tracking.connect(uri)
    search, looks = type(client).search_model_versions, count()
    monkeypatch.setattr(
        type(client), "search_model_versions", lambda *args, **rest: search(*args, **rest) if next(looks) else []
    )
    assert branch.register()["version"] == first["version"]
    monkeypatch.undo()
    left = client.search_model_versions(f"name = '{model}'")
    assert [int(version.version) for version in left] == [first["version"]]


def test_same_files_under_another_limit_are_another_version(uri: str, model: str, branch: Branch) -> None:
    assert branch.register()["version"] == 1
    target = branch.config.targets[0].model_copy(update={"constraints": ("latency<=5ms",)})
    branch.config = branch.config.model_copy(update={"targets": (target,)})
    entry = branch.register()
    # The limit that was resolved is the same: the content is the same, and so is the version.
    assert entry["version"] == 1


def test_better_one_becomes_champion_and_worse_one_challenger(branch: Branch, model: str, uri: str) -> None:
    suffix = "cpu-example-2-5-ghz-2t-fp32-lat-p50-80pct-yolov8n"
    branch.register(map50_95=0.40)
    worse = branch.register(map50_95=0.35)
    assert worse["aliases"] == [f"challenger-{suffix}"]
    assert "0.3500, below the 0.4000" in worse["reason"]
    better = branch.register(map50_95=0.45)
    assert better["aliases"] == [f"champion-{suffix}"]
    assert query.find(uri, f"{model}@champion-{suffix}").version == better["version"]
    # Registering an old version again does not undo what came after.
    assert branch.register(map50_95=0.40)["aliases"] == []
    assert query.find(uri, f"{model}@champion-{suffix}").version == better["version"]


def test_scores_on_other_images_do_not_dethrone(uri: str, model: str, deployable: register.Deployable) -> None:
    client = tracking.connect(uri)
    run = tracking.open_run(CONFIG, f"run-{model}", uri)
    register.register(client, run, deployable)
    grown = replace(
        deployable,
        metrics={**deployable.metrics, "map50_95": 0.9},
        tags={**deployable.tags, "dataset": "e" * 64},
        precision="fp32",
        resolved=[{**deployable.resolved[0], "limit": 3.3}],
    )
    result = register.register(client, run, grown)
    assert (result.version, result.role) == (2, "challenger")
    assert "same images" in result.reason


@pytest.fixture
def deployable(model: str, tmp_path: Path) -> register.Deployable:
    files = write_outputs(tmp_path / "deployable")["trt-export"] / "model"
    return register.Deployable(
        name=model,
        files={file.name: file for file in files.iterdir()},
        hardware_id=f"cpu-{model}",
        precision="fp32",
        limits=("latency<=3.2ms",),
        scale="n",
        resolved=[{"metric": "latency", "statistic": "p50", "scope": "engine", "limit": 3.2, "unit": "ms"}],
        metrics={"map50_95": 0.4, "latency_p50_ms": 3.0},
        params={"imgsz": "64"},
        tags={"hardware": "cpu", "hardware_model": f"CPU of {model}", "dataset": "d" * 64, "dataset_name": model},
        description="made up",
    )


def test_registration_that_was_cut_short_is_hidden_and_finished_by_the_next(
    uri: str, model: str, deployable: register.Deployable, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tracking.connect(uri)
    run = tracking.open_run(CONFIG, f"run-{model}", uri)

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError

    for step in ("create_model_version", "log_model_artifacts", "finalize_logged_model", "set_registered_model_alias"):
        monkeypatch.setattr(type(client), step, cut)
        with pytest.raises(ConnectionError):
            register.register(client, run, deployable)
        monkeypatch.undo()
        with pytest.raises(InputError, match=f"no registered model '{model}'"):
            query.list_models(uri, model)
        with pytest.raises(InputError, match="no model was verified"):
            query.best(uri, f"CPU of {model}", 10.0)
    done = register.register(client, run, deployable)
    assert (done.version, done.created, done.role) == (1, True, "champion")
    assert [version.version for version in query.list_models(uri, model)] == [1]


def test_best_is_the_most_accurate_within_the_limits(uri: str, model: str, deployable: register.Deployable) -> None:
    client = tracking.connect(uri)
    run = tracking.open_run(CONFIG, f"run-{model}", uri)
    hardware = deployable.tags["hardware_model"]

    def add(number: int, map50_95: float, latency: float, **changes: Any) -> Registration:
        limit = {**deployable.resolved[0], "limit": 10.0 + number}
        metrics = {"map50_95": map50_95, "latency_p50_ms": latency}
        return register.register(client, run, replace(deployable, metrics=metrics, resolved=[limit], **changes))

    fast = add(0, 0.30, 2.0)
    middle = add(1, 0.40, 4.0, precision="int8")
    slow = add(2, 0.50, 9.0)
    add(3, 0.90, 1.0, tags={**deployable.tags, "hardware_model": "other"}, hardware_id="other-id")
    assert query.best(uri, hardware, 10).version == slow.version
    assert query.best(uri, hardware, 4.0).version == middle.version
    assert query.best(uri, deployable.hardware_id, 4.0, name=model).version == middle.version
    assert query.best(uri, hardware, 4.0, precision="fp32").version == fast.version
    assert query.best(uri, hardware, 10, min_map=0.45).version == slow.version
    with pytest.raises(InputError, match=f"{model}/{fast.version} .*0.300 at 2 ms"):
        query.best(uri, hardware, 1.0)
    with pytest.raises(InputError, match=re.escape("mAP50-95 >= 0.95")):
        query.best(uri, hardware, 10, min_map=0.95)
    with pytest.raises(InputError, match=f"no model was verified on hardware 'Tesla T4'.*{re.escape(hardware)}"):
        query.best(uri, "Tesla T4", 10)
    with pytest.raises(InputError, match=r"'cpu' is more than one device; give one of .*other-id"):
        query.best(uri, "cpu", 10)
    with pytest.raises(InputError, match="no registered model 'it\"s'"):
        query.best(uri, hardware, 10, name='it"s')
    # A version that somebody deleted is not offered any more.
    client.delete_model_version(model, str(slow.version))
    assert query.best(uri, hardware, 10).version == middle.version


def test_show_names_what_there_is(branch: Branch, model: str, uri: str, tmp_path: Path) -> None:
    branch.register()
    with pytest.raises(InputError, match=f"no registered model 'nothing'.*{model}"):
        query.find(uri, "nothing")
    with pytest.raises(InputError, match="no version or alias '7'; there is 1, champion-"):
        query.find(uri, f"{model}/7")
    with pytest.raises(InputError, match="no registry there"):
        query.list_models(tracking.resolve_uri(None, tmp_path / "store"))


def test_failed_branch_registers_nothing(branch: Branch, model: str, uri: str, tmp_path: Path) -> None:
    """What comes after a failed verdict passes the failure on, and the registry never hears of it."""
    folders = write_outputs(tmp_path / "outputs", p50=9.0)
    write_json(folders["trt-export"] / "status.json", {"status": "failed", "stage": "trt-export", "error": "no file"})
    inputs = {name: tmp_path / f"{name}.tar" for name in folders}
    for name, folder in folders.items():
        pack(folder, inputs[name])
    outcome = run_stage(
        STAGE,
        config=branch.config,
        target="cpu-2t-best",
        inputs=inputs,
        output=tmp_path / "out.tar",
        store=tmp_path / "store",
        run_id="run",
        parameters={"run_id": "run", "tracking_uri": uri, "mlflow_run": "none", "label": "cpu-2t-best"},
    )
    assert (outcome.status, outcome.error) == ("failed", "not run, because trt-export failed")
    assert tracking.connect(uri).search_registered_models(f"name = '{model}'") == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server with a database and artifacts of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    database, artifacts = f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", artifacts]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{uri}/health"):
                break
            time.sleep(1)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_server_does_as_the_database_does(server: str, tmp_path: Path) -> None:
    """A server answers with other types (a version is text), and artifacts go through it."""
    branch = Branch(server, "served", tmp_path)
    suffix = "cpu-example-2-5-ghz-2t-fp32-lat-p50-80pct-yolov8n"
    entries = [branch.register(map50_95=score) for score in (0.4, 0.5, 0.4, 0.3)]
    assert [entry["version"] for entry in entries] == [1, 2, 1, 3]
    assert [entry["aliases"] for entry in entries] == [
        [f"champion-{suffix}"],
        [f"champion-{suffix}"],
        [],
        [f"challenger-{suffix}"],
    ]
    assert query.best(server, PROFILE["model"], 10).version == 2
    assert [version.version for version in query.list_models(server)] == [3, 2, 1]
    assert query.find(server, f"served@challenger-{suffix}").metrics["map50_95"] == 0.3


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (["latency<=3ms"], "cpu-amd-epyc-2t-fp32-lat-p50-3000us"),
        (["latency_p99(with_nms)<=2.5ms"], "cpu-amd-epyc-2t-fp32-lat-p99-nms-2500us"),
        (["memory<=1GiB", "latency<=1.5s"], "cpu-amd-epyc-2t-fp32-lat-p50-1500000us-mem-1024mib"),
        (["latency<=80%stock", "params<=3.2M"], "cpu-amd-epyc-2t-fp32-lat-p50-80pct-yolov8n-params-3200k"),
        (["throughput>=120fps", "flops<=8.7G"], "cpu-amd-epyc-2t-fp32-flops-8700m-thr-120ips"),
    ],
)
def test_alias_names_hardware_precision_and_limits(limits: list[str], expected: str) -> None:
    assert register.purpose("CPU_AMD EPYC (2t)", "fp32", limits, "n") == expected
    assert re.fullmatch(r"[a-z0-9_-]+", expected)
