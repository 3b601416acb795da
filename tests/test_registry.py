"""The registry, on a real MLflow with SQLite: converging, champions, queries, what was cut short, what is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import pytest
from fabricated import CONFIG, PROFILE, write_outputs
from registering import Branch, detector, made_up_scores
from rich.console import Console
from typer.testing import CliRunner

from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import file_sha256, read_json, tree_files, write_json
from yolov8_nas.registry import champions, closing, promote, query, register, spool, tracking, trial
from yolov8_nas.registry.compare import compare
from yolov8_nas.registry.pull import pull
from yolov8_nas.registry.register import Registration
from yolov8_nas.run import lifecycle, local
from yolov8_nas.runner import process
from yolov8_nas.runner.results import VerdictResult
from yolov8_nas.runner.stage import run_stage
from yolov8_nas.stages.register import STAGE
from yolov8_nas.stages.register.run import licences
from yolov8_nas.store.archive import pack
from yolov8_nas.store.store import Manifest, Store

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


def test_a_run_nests_in_that_of_kubeflows_plugin_where_there_is_one(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = tracking.connect(uri)
    pipeline = client.create_run("0").info.run_id
    task = client.create_run("0", tags={tracking.PARENT_TAG: pipeline}).info.run_id
    for named, parent in ((task, pipeline), (pipeline, pipeline), ("of-another-server", None), ("", None)):
        monkeypatch.setenv(tracking.PLUGIN_VARIABLE, named)
        opened = tracking.open_run(CONFIG, f"run-below-{named}", uri)
        assert client.get_run(opened).data.tags.get(tracking.PARENT_TAG) == parent
    assert "of-another-server: not nested below it" in capsys.readouterr().out


def test_run_is_opened_once_and_closed_with_what_it_took(uri: str, tmp_path: Path) -> None:
    client = tracking.connect(uri)
    first = tracking.open_run(CONFIG, "run-once", uri)
    assert tracking.open_run(CONFIG.model_copy(update={"seed": 7}), "run-once", uri) == first
    assert tracking.open_run(CONFIG, "run-other", uri) != first
    (tmp_path / "report.html").write_text("<html></html>")
    stages = [{"name": "search", "target": "cpu", "seconds": 2.5}]
    summary = fabricated.summary(stages=stages, id="run-once", status="failed")
    closing.close_run(uri, first, summary, tmp_path, [])
    run = client.get_run(first)
    assert run.data.params["supernet.epochs"] == "300"
    assert run.data.metrics == {"seconds/search/cpu": 2.5}
    assert run.info.status == "FAILED"
    assert {file.path for file in client.list_artifacts(first)} == {"config.json", "report.html"}


def test_one_of_two_runs_made_at_once_is_kept(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect(uri)
    race = tracking.experiment_id(client, "race")
    first = tracking.find_or_create_run(client, race, "key", "value", name="first")
    search, looks = type(client).search_runs, count()
    # The second process looked before the first had made its run.
    monkeypatch.setattr(type(client), "search_runs", lambda *args, **rest: search(*args, **rest) if next(looks) else [])
    assert tracking.find_or_create_run(client, race, "key", "value", name="second") == first
    monkeypatch.undo()
    assert len(client.search_runs([race])) == 1


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
    assert shown.tags["license"].startswith("AGPL-3.0") and shown.tags["license_data"].startswith("not known")
    assert shown.params["imgsz"] == "64"
    client = tracking.connect(uri)
    logged = client.get_logged_model(entry["model_id"])
    assert logged.metrics[0].dataset_name == model
    assert logged.source_run_id == entry["run_id"]
    run = client.get_run(entry["run_id"])
    assert run.info.status == "FINISHED"
    assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == [model]


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
    example = network.input_example["images"]
    assert (example.shape, example.dtype, example.min(), example.max()) == ((1, 3, 64, 64), np.float32, 0, 1)
    assert np.ptp(network.predict({"images": example})["output0"]) > 0


@pytest.mark.parametrize(
    ("start", "data", "expected"),
    [
        ("weights", "CC BY 4.0", ("that of yolov8n.pt; ", "CC BY 4.0")),
        ("scratch", None, ("none: random weights", "not known: data_license")),
    ],
)
def test_a_version_says_under_which_licences_it_stands(
    start: str, data: str | None, expected: tuple[str, str], tmp_path: Path
) -> None:
    verdict = VerdictResult.read(write_outputs(tmp_path / "made")["trt-export"])
    assert verdict.shipped is not None
    began = verdict.shipped.training.model_copy(update={"start": start})
    told = licences(verdict.shipped.model_copy(update={"training": began}), data)
    assert told["license"].startswith("AGPL-3.0")
    assert (told["license_start"].startswith(expected[0]), told["license_data"].startswith(expected[1])) == (True, True)


def test_what_can_be_chosen_is_registered_beside_what_ships(branch: Branch, model: str, uri: str) -> None:
    front = [(0.38, 2.4), (0.35, 1.7)]
    entry = branch.register(map50_95=0.41, p50=3.0, choices=front)
    versions = [choice["version"] for choice in entry["choices"]]
    assert (versions, entry["version"]) == ([1, 2], 3)  # what ships is the newest
    purposes = [query.find(uri, f"{model}/{version}").purpose for version in (*versions, 3)]
    assert len(set(purposes)) == 3 and all(own.startswith(f"{purposes[2]}-net-") for own in purposes[:2])
    assert [choice["aliases"] for choice in entry["choices"]] == [[f"champion-{own}"] for own in purposes[:2]]
    assert entry["aliases"] == [f"champion-{purposes[2]}"]
    hardware = PROFILE["id"]
    chosen = [query.best(uri, hardware, limit, name=model) for limit in (3.2, 2.5, 2.0)]
    assert [(one.version, one.metrics["map50_95"]) for one in chosen] == [(3, 0.41), (1, 0.38), (2, 0.35)]
    runs = [tracking.connect(uri).get_run(one.run_id) for one in chosen]
    assert [run.data.metrics["latency_p50_ms"] for run in runs] == [3.0, 2.4, 1.7]  # a run of its own each
    again = branch.register(map50_95=0.41, p50=3.0, choices=front)
    assert [choice["version"] for choice in again["choices"]] == versions and again["version"] == 3


def test_files_that_can_be_chosen_and_files_that_ship_are_two_contents() -> None:
    files, limits = {"model.onnx": "0" * 64}, [{"metric": "latency", "limit": 3.2}]
    assert register.content_digest(files, "cpu", limits, "0123abcd") != register.content_digest(files, "cpu", limits)


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
    return detector(model, files.iterdir())


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


SUFFIX = "cpu-example-2-5-ghz-2t-fp32-lat-p50-80pct-yolov8n"


@pytest.mark.parametrize("reference", ["a/b", "a@", "a/1@b", "@champion", "", "a/1/2"])
def test_reference_of_another_form_is_refused(uri: str, reference: str) -> None:
    with pytest.raises(InputError, match="write NAME/VERSION, NAME@ALIAS"):
        query.find(uri, reference)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_latency_ms": float("nan")}, "max-latency = nan: give a positive number"),
        ({"max_latency_ms": -1.0}, "give a positive number"),
        ({"min_map": 41.0}, "give an mAP50-95 from 0 to 1"),
        ({"precision": "int4"}, "precision 'int4' is unknown"),
        ({"hardware": "Example CPU 2.5 GH"}, "the nearest is Example CPU 2.5 GHz; there is"),
        ({"hardware": "it's"}, 'no model was verified on hardware "it\'s"'),
    ],
)
def test_question_that_makes_no_sense_is_refused(branch: Branch, uri: str, options: dict[str, Any], told: str) -> None:
    branch.register()
    with pytest.raises(InputError, match=re.escape(told)):
        query.best(uri, **{"hardware": PROFILE["id"], "max_latency_ms": 5.0, **options})


def test_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri = mlruns: give the address"):
        tracking.resolve_uri("mlruns", tmp_path)
    with pytest.raises(InputError, match="check what was given"):
        query.list_models("redis://somewhere")


def test_pull_brings_what_was_registered_or_nothing(branch: Branch, model: str, uri: str, tmp_path: Path) -> None:
    branch.register()
    version, folder = pull(uri, model, tmp_path / "pulled")
    assert {file.name for file in folder.iterdir()} == {*version.files, "manifest.json"}
    assert {name: file_sha256(folder / name) for name in version.files} == version.files
    assert pull(uri, model, folder)[1] == folder
    (folder / "best.pt").write_bytes(b"changed")
    with pytest.raises(InputError, match="holds something else"):
        pull(uri, model, folder)

    stored = Path(tracking.connect(uri).get_logged_model(version.tags["model_id"]).artifact_location[len("file://") :])
    (stored / "best.pt").write_bytes(b"tampered")
    with pytest.raises(StageError, match=r"best\.pt has SHA-256 .* it is refused"):
        pull(uri, model, tmp_path / "second")
    # Whoever changes the hash along with the file is found out by the version's own digest.
    client = tracking.connect(uri)
    client.set_model_version_tag(model, "1", "sha256.best.pt", file_sha256(stored / "best.pt"))
    with pytest.raises(StageError, match="somebody changed them"):
        pull(uri, model, tmp_path / "second")
    assert not [file for file in tmp_path.iterdir() if "second" in file.name]


def test_comparison_has_an_interval_where_the_images_are_the_same(branch: Branch, model: str, uri: str) -> None:
    branch.register(map50_95=0.8, scores=made_up_scores(0.8))
    branch.register(map50_95=0.3, scores=made_up_scores(0.3))
    branch.register(map50_95=0.4)
    branch.register(map50_95=0.9, dataset="e" * 64, scores=made_up_scores(0.9))
    found = compare(uri, f"{model}/1", f"{model}/2")
    assert found["scored_on"] == "12 images of val, when they were registered"
    rows = {row["what"]: row for row in found["accuracy"]}
    assert set(rows) == {"mAP50-95", "mAP50", "scratch", "dent"}
    assert rows["mAP50-95"]["word"] == "ahead"
    assert rows["mAP50-95"]["low"] <= rows["mAP50-95"]["difference"] <= rows["mAP50-95"]["high"]
    # A class's difference is that of its own boxes alone; together they make the whole.
    mean = (rows["scratch"]["difference"] + rows["dent"]["difference"]) / 2
    assert rows["mAP50-95"]["difference"] == pytest.approx(mean)
    assert {row["what"]: row["second"] for row in found["measured"]}["latency p50"] == 3.0
    assert all(row["same"] for row in found["architecture"])
    for other, why in ((3, "was not kept"), (4, "two states of a dataset")):
        found = compare(uri, f"{model}/1", f"{model}/{other}")
        assert why in found["scored_on"]
        assert "give --data" in found["scored_on"]
        assert "low" not in found["accuracy"][0]


def test_rolling_back_twice_goes_back_twice(branch: Branch, model: str, uri: str) -> None:
    for score in (0.3, 0.4, 0.5):
        branch.register(map50_95=score)
    champion = f"{model}@champion-{SUFFIX}"
    assert query.find(uri, champion).version == 3
    version, change = promote.rollback(uri, champion, by="ana", because="misses dents")
    assert (version.version, version.aliases) == (2, (f"champion-{SUFFIX}",))
    assert (change.before, change.version, change.by, change.because) == (3, 2, "ana", "misses dents")
    assert version.tags["champion_because"] == "misses dents"
    assert promote.rollback(uri, champion)[0].version == 1
    with pytest.raises(InputError, match="no predecessor"):
        promote.rollback(uri, champion)
    with pytest.raises(InputError, match="champion of 0 purposes"):
        promote.rollback(uri, f"{model}/3")
    told = champions.history(tracking.connect(uri), model)
    assert [(one.action, one.before, one.version) for one in told] == [
        ("registered", None, 1),
        ("registered", 1, 2),
        ("registered", 2, 3),
        ("rolled back", 3, 2),
        ("rolled back", 2, 1),
    ]


def test_change_that_was_cut_short_is_none(
    branch: Branch, model: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch.register(map50_95=0.3)
    branch.register(map50_95=0.2)
    client = tracking.connect(uri)
    monkeypatch.setattr(type(client), "set_registered_model_alias", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        champions.crown(client, model, SUFFIX, 2, {}, action="promoted", because="cut short")
    monkeypatch.undo()
    with pytest.raises(InputError, match="no predecessor"):
        promote.rollback(uri, f"{model}@champion-{SUFFIX}")


def _finding(map50_95: float | None, measured: float | None, scope: str = "engine") -> promote.Finding:
    limit = {"metric": "latency", "statistic": "p50", "scope": scope, "limit": 3.0, "unit": "ms"}
    met = None if measured is None else measured <= 3.0
    version = query.RegisteredVersion("line", 7, (), None, "", "", "", "", {}, {}, {})  # type: ignore[arg-type]
    return promote.Finding(version, map50_95, [{**limit, "measured": measured, "met": met}], None)


@pytest.mark.parametrize(
    ("challenger", "champion", "promoted", "reason"),
    [
        (_finding(0.50, 2.9), _finding(0.50, 2.0), True, "keeps latency_p50 2.9 ms, limit 3, as registered"),
        (_finding(0.495, 2.9), _finding(0.50, 2.0), True, "mAP50-95 0.4950, champion line/7 0.5000, tolerance 0.01"),
        (_finding(0.48, 2.9), _finding(0.50, 2.0), False, "not accurate enough: mAP50-95 0.4800"),
        (_finding(0.60, 3.1), _finding(0.50, 2.0), False, "misses latency_p50 3.1 ms, limit 3"),
        (_finding(0.60, 2.9), _finding(0.50, 3.1), True, "mAP50-95 0.6000"),
        (_finding(None, 2.9), None, True, "there is no champion"),
        (_finding(None, None, "with_nms"), None, False, "latency_p50(with_nms) could not be measured: give --data"),
    ],
)
def test_gate(challenger: promote.Finding, champion: promote.Finding | None, promoted: bool, reason: str) -> None:
    verdict = promote.decide([challenger, *([champion] if champion else [])], 0.01)
    assert verdict.promoted == promoted
    assert reason in "; ".join(verdict.reasons)


def test_gate_asks_for_data_and_for_the_files_that_were_registered(
    branch: Branch, model: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, worse = branch.register(map50_95=0.4), branch.register(map50_95=0.39)
    assert promote.promote(uri, f"{model}/1")["reasons"] == [f"{model}/1 is champion-{SUFFIX} already"]
    with pytest.raises(InputError, match="give --data"):
        promote.promote(uri, f"{model}/2")
    with pytest.raises(InputError, match="tolerance = 7"):
        promote.promote(uri, f"{model}/2", data="images", tolerance=7)
    images = trial.Images("images", "d" * 64, ("scratch", "dent"), tmp_path, ())
    monkeypatch.setattr(trial, "val_split", lambda *_: images)
    monkeypatch.setattr(trial, "score", lambda *_: [made_up_scores(0.390), made_up_scores(0.4)])
    refused = promote.promote(uri, f"{model}/2", data="images", tolerance=0.005)
    assert (refused["promoted"], refused["change"]) == (False, None)
    assert query.find(uri, f"{model}@champion-{SUFFIX}").version == 1

    stored = tracking.connect(uri).get_logged_model(champion["model_id"]).artifact_location[len("file://") :]
    good = (Path(stored) / "model.onnx").read_bytes()
    (Path(stored) / "model.onnx").write_bytes(good[:-1])
    with pytest.raises(StageError, match=r"/1: model\.onnx has SHA-256"):
        promote.promote(uri, f"{model}/2", data="images", tolerance=0.05)
    (Path(stored) / "model.onnx").write_bytes(good)

    done = promote.promote(uri, f"{model}/2", data="images", tolerance=0.05, by="ana", because="faster on wet metal")
    assert done["promoted"]
    assert "this machine is" in done["not_measured"]
    assert done["champion"]["limits"][0]["measured"] == 3.0
    change = done["change"]
    assert (change["before"], change["version"], change["by"]) == (1, 2, "ana")
    assert change["because"].startswith(
        "faster on wet metal; keeps latency_p50 3 ms, limit 3.2, as registered; mAP50-95"
    )
    assert query.find(uri, f"{model}@champion-{SUFFIX}").version == worse["version"]
    assert query.find(uri, f"{model}/2").aliases == (f"champion-{SUFFIX}",)  # and not the challenger any more


def test_what_the_server_cannot_take_is_kept_and_sent_later(
    branch: Branch, model: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", away)
    kept = [branch.register(run_id="once", map50_95=0.4, choices=[(0.3, 2.0)]) for _ in range(2)]
    monkeypatch.undo()
    assert not any("version" in entry for entry in kept)
    (entry,) = spool.waiting(branch.store)  # the same twice is one
    assert (str(entry.folder), entry.why) == (kept[0]["spooled"], "no route to host")
    with pytest.raises(InputError, match="no registered model"):
        query.find(uri, model)

    other = spool.send(branch.store, "sqlite:////elsewhere.db")
    assert (other.sent, other.waiting) == ((), (entry,))
    weights = entry.folder / "files" / "model" / "best.pt"
    good = weights.read_bytes()
    weights.write_bytes(b"rotten")
    damaged = spool.send(branch.store, uri)
    assert "missing or damaged" in damaged.waiting[0].why
    weights.write_bytes(good)
    assert [one.what for one in spool.waiting(branch.store)] == [entry.what]

    assert branch.register(map50_95=0.5)["version"] == 3  # the next run sends first what waited
    assert spool.waiting(branch.store) == []
    assert [version.version for version in query.list_models(uri, model)] == [3, 2, 1]
    assert [query.find(uri, f"{model}/{n}").metrics["map50_95"] for n in (1, 2)] == [0.3, 0.4]
    assert "-net-" in query.find(uri, f"{model}/1").purpose
    assert [change.version for change in champions.history(tracking.connect(uri), model)] == [1, 2, 3]


def keep_stage(store: Store, run_id: str, target: str | None, outputs: Path, **differently: Any) -> None:
    """Lay what a stage has written into a store, with its record, as `run_stage` does."""
    stage = outputs.name
    entry = store.entry(stage, f"key of {stage}")
    shutil.copytree(outputs, entry.outputs)
    settings = {"seed": 3, "tracking_uri": "http://me:secret@there"}
    told = {"key": entry.folder.name, "seconds": 2.5, "peak_rss_mib": 300.0, "peak_rss_child_mib": 100.0}
    record = fabricated.stage_record(stage, target, settings=settings, **told | differently)
    if record["status"] != "failed":
        files = {name: file_sha256(file) for name, file in tree_files(outputs).items()}
        made = Manifest(stage, 1, record["key"], record["settings"], {"data-prep": "d"}, files, record["digest"], 70.0)
        entry.commit(made)
    store.record(run_id, f"{target or 'all'}.{stage}.json", record)


def test_every_stage_has_a_run_of_its_own_once_even_if_the_server_was_away(
    branch: Branch, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run_id, label = f"run-{branch.config.name}", "cpu-2t-best"
    target = branch.register(run_id)["run_id"]
    run = tracking.open_run(branch.config, run_id, uri)
    store, outputs = Store(tmp_path / "store"), write_outputs(tmp_path / "outputs")
    keep_stage(store, run_id, None, outputs["supernet-train"])
    keep_stage(store, run_id, label, outputs["search"], status="cached")
    keep_stage(store, run_id, label, outputs["qat-finetune"])
    keep_stage(store, run_id, label, outputs["trt-export"], status="failed", error="no file keeps the limits")
    store.record(
        run_id, f"{label}.register.json", fabricated.stage_record("register", label, key="")
    )  # what is not run has no run
    stages = [{"name": "search", "target": label, "seconds": 2.5}]
    failed = fabricated.target(id=label, error="trt-export: no file keeps the limits")
    summary = fabricated.summary(failed, stages=stages, id=run_id, status="failed")
    (tmp_path / "report.html").write_text("<html></html>")

    def away(*_: object, **__: object) -> None:
        raise ConnectionError

    client = tracking.connect(uri)
    for method in ("log_dict", "log_artifact"):
        monkeypatch.setattr(MlflowClient, method, away)
        assert spool.close_or_keep(store, uri, run, summary, tmp_path) is not None
        monkeypatch.undo()
    assert client.get_run(run).info.status == "RUNNING"
    assert len(spool.send_everywhere(store).sent) == 1, "kept twice, it is one"
    assert spool.close_or_keep(store, uri, run, summary, tmp_path) is None
    assert client.get_run(run).info.status == "FAILED"
    assert len(client.get_metric_history(run, f"seconds/search/{label}")) == 1

    found = client.search_runs(
        [client.get_run(run).info.experiment_id], f"tags.`{closing.STAGE_TAG}` LIKE '{run_id}/%'"
    )
    made = {one.info.run_name: one for one in found}
    assert len(found) == len(made)
    assert {name: one.data.tags["mlflow.parentRunId"] for name, one in made.items()} == {
        "supernet-train": run,
        "search (from the store)": target,
        "qat-finetune": target,
        "trt-export": target,
    }
    assert {name: one.data.tags["status"] for name, one in made.items()} == {
        "supernet-train": "done",
        "search (from the store)": "cached",
        "qat-finetune": "done",
        "trt-export": "failed: no file keeps the limits",
    }
    assert [made[name].info.status for name in ("qat-finetune", "trt-export")] == ["FINISHED", "FAILED"]
    assert client.get_run(target).data.tags["status"] == "failed: trt-export: no file keeps the limits"

    supernet, search, tuned = made["supernet-train"], made["search (from the store)"], made["qat-finetune"]
    assert (supernet.info.start_time, supernet.info.end_time) == (1_700_000_057_500, 1_700_000_060_000)
    assert supernet.data.params == {"seed": "3", "tracking_uri": "http://there"}
    assert (supernet.data.metrics["seconds"], supernet.data.metrics["peak_memory_mb"]) == (2.5, 300.0)
    assert (search.data.metrics["seconds"], search.data.metrics["seconds_when_computed"]) == (2.5, 70.0)
    assert (supernet.data.tags["sha256"], supernet.data.tags["input.data-prep"]) == ("digest of supernet-train", "d")
    assert "sha256" not in made["trt-export"].data.tags
    files = client.list_artifacts(supernet.info.run_id)
    assert [file.path for file in files] == [closing.RESULT_FILE]
    assert "secret" not in Path(supernet.info.artifact_uri.removeprefix("file://"), closing.RESULT_FILE).read_text()
    assert [point.step for point in client.get_metric_history(supernet.info.run_id, "supernet/box")] == [1, 2, 3]
    assert tuned.data.metrics["candidate_0/box"] == 1.0
    for one, first in ((supernet, 50.0), (tuned, 51.0)):
        points = client.get_metric_history(one.info.run_id, "system/cpu_utilization_percentage")
        assert [(point.timestamp, point.value) for point in points] == [
            (1_700_000_000_000, first),
            (1_700_000_010_000, first + 1),
        ]


class Killed:
    """A pipeline run that began in a work folder and was killed there, with a target of it."""

    def __init__(self, uri: str, work: Path) -> None:
        self.work, self.client, self.store = work, tracking.connect(uri), Store(work / "store")
        tracked = {**CONFIG.tracking.model_dump(), "uri": uri}
        self.config = RunConfig.parse({**CONFIG.model_dump(mode="json"), "tracking": tracked}, "test")
        self.other = self.config.model_copy(update={"seed": 7})
        self.begin()
        where = self.client.get_run(self.run).info.experiment_id
        self.target = tracking.target_run(self.client, where, self.run, self.run_id, "cpu-2t-best")
        write_json(work / "logs" / "progress.jsonl", {})

    def begin(self) -> None:
        self.run_id = local._run_id(self.config, self.work)
        self.store.record(self.run_id, lifecycle.CONFIG_FILE, self.config.model_dump(mode="json"))
        self.run = tracking.open_run(self.config, self.run_id, str(self.config.tracking.uri))

    @property
    def status(self) -> list[str]:
        return [self.client.get_run(run).info.status for run in (self.run, self.target)]


@pytest.fixture
def killed(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Killed:
    def call(function: str, *, log: Path, environment: dict[str, str], **arguments: Any) -> Any:
        assert function == "yolov8_nas.run.lifecycle:close_killed_run"
        with pytest.MonkeyPatch.context() as process:
            for name, value in environment.items():
                process.setenv(name, value)
            return lifecycle.close_killed_run(**arguments)

    monkeypatch.setattr(process, "call", call)
    return Killed(uri, tmp_path / "work")


def test_the_next_run_closes_one_that_was_killed(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "running", run)
    for config, status in ((killed.config, "RUNNING"), (killed.other, "KILLED")):
        os.utime(killed.work / "logs" / "progress.jsonl", (4e9, 4e9))
        with pytest.raises(KeyboardInterrupt), local.held(killed.work):
            local.run_pipeline(config, killed.work, Console(quiet=True))
        assert killed.status == [status, status]
        write_json(killed.work / "logs" / "progress.jsonl", {})
    assert killed.client.get_run(killed.run).info.end_time == 4_000_000_000_000, "when there was a last sign of it"


def test_a_run_that_may_live_is_not_closed(killed: Killed) -> None:
    with local.held(killed.work):
        assert CliRunner().invoke(app, ["models", "sync", "--workdir", str(killed.work)]).exit_code == 0
    file = killed.work / local.LAST_RUN
    begun = read_json(file)
    for another in ({"host": ["another host", "another boot"]}, {"host": []}, {"finished": True}):
        write_json(file, {**begun, **another})
        assert local.close_killed(killed.work, killed.other) is None
    assert killed.status == ["RUNNING", "RUNNING"]


def test_a_run_that_was_closed_by_hand_goes_on(killed: Killed) -> None:
    synced = CliRunner().invoke(app, ["models", "sync", "--workdir", str(killed.work)])
    assert f"run {killed.run_id} was killed; it is closed in MLflow now" in synced.stderr
    assert killed.status == ["KILLED", "KILLED"]
    assert local.close_killed(killed.work) is None, "once is enough"
    before = killed.run
    killed.begin()
    assert (killed.run, killed.status[0]) == (before, "RUNNING")
    assert local.close_killed(killed.work) is not None, "it was killed again"
    assert killed.status[0] == "KILLED"


def test_the_end_of_a_killed_run_waits_for_the_server(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise tracking.UnavailableError("nothing answers there")

    monkeypatch.setattr(tracking, "check_server", away)
    told = local.close_killed(killed.work)
    assert told and "may still be open in MLflow: nothing answers there" in told
    assert not spool.waiting(killed.store), "it may go on, and what is sent later would close it then"
    told = local.close_killed(killed.work, killed.other)
    assert told and "it is kept in" in told
    monkeypatch.undo()
    assert killed.status == ["RUNNING", "RUNNING"]
    assert spool.send_everywhere(killed.store).sent == (f"the end of run {killed.run_id}, which was killed",)
    assert killed.status == ["KILLED", "KILLED"]


def test_answer_that_was_lost_makes_no_second_version(
    uri: str, model: str, deployable: register.Deployable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow asks again where no answer came, so the server may make a version of the same logged model twice."""
    client = tracking.connect(uri)
    run = tracking.open_run(CONFIG, f"run-{model}", uri)
    create = type(client).create_model_version

    def twice(*args: Any, **rest: Any) -> Any:
        create(*args, **rest)
        return create(*args, **rest)

    monkeypatch.setattr(type(client), "create_model_version", twice)
    done = register.register(client, run, deployable)
    assert done.version == 1
    assert [int(version.version) for version in client.search_model_versions(f"name = '{model}'")] == [1]
    assert query.find(uri, model).metrics["map50_95"] == 0.4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["best", "--hardware", "cpu", "--max-latency", "fast"], "--max-latency fast: give a positive time"),
        (["best", "--hardware", "cpu", "--max-latency", "-3"], "--max-latency -3: give a positive time"),
        (["best", "--hardware", "cpu", "--max-latency", "80%stock"], "the registry knows no stock network"),
        (["show", "nothing@champion"], "no registered model 'nothing'"),
        (["rollback", "nothing"], "no registered model 'nothing'"),
        (["pull", "a/b/c"], "write NAME/VERSION"),
        (["list", "--tracking", "http://127.0.0.1:9"], "no MLflow server answers there"),
    ],
)
def test_bad_input_is_one_line_and_status_2(uri: str, arguments: list[str], told: str) -> None:
    where = [] if "--tracking" in arguments else ["--tracking", uri]
    result = CliRunner().invoke(app, ["models", *arguments, *where])
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_commands_tell_people_and_programs(branch: Branch, model: str, uri: str, tmp_path: Path) -> None:
    def ask(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["models", *arguments, "--tracking", uri])
        assert result.exit_code == 0, result.output
        return result.stdout

    branch.register(map50_95=0.4)
    branch.register(map50_95=0.5)
    assert f"{model}/2" in ask("list", model)
    assert [one["version"] for one in json.loads(ask("list", model, "--json"))] == [2, 1]
    assert json.loads(ask("best", "--hardware", PROFILE["id"], "--max-latency", "3500us", "--model", model, "--json"))[
        "version"
    ] == 2  # fmt: skip
    told, everything = ask("show", f"{model}/2"), ask("show", f"{model}/2", "--all")
    for words in ("champion of", "latency p50 ≤", "undecided against stock (+0.030", "signed", "licence of the data"):
        assert words in told, words
    assert not re.search("[0-9a-f]{32}", told) and "sha256" not in told.lower()
    assert "files, by SHA-256" in everything and "latency_p90_ms" in everything
    assert "nothing: no alias" in ask("show", f"{model}/1")
    assert "all with the SHA-256" in ask("pull", f"{model}/1", str(tmp_path / "pulled"))
    assert "again, instead of version 2" in ask("rollback", f"{model}/2", "--because", "test")
    assert [one["because"] for one in json.loads(ask("history", model, "--json"))][-1] == "test"
    assert "nothing waits" in ask("sync", "--store", str(tmp_path))


def test_a_row_that_somebody_else_wrote_meanwhile_is_met_again(
    uri: str, deployable: register.Deployable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import BAD_REQUEST, INVALID_PARAMETER_VALUE, MlflowException

    client = tracking.connect(uri)
    run = tracking.open_run(CONFIG, "met", uri)
    refused = [
        '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "registered_model_alias_pk"',
        "(sqlite3.IntegrityError) UNIQUE constraint failed: model_version_tags.key",
    ]
    set_alias = MlflowClient.set_registered_model_alias

    def sometimes(self: MlflowClient, *args: str) -> None:
        if refused:
            raise MlflowException(refused.pop(), BAD_REQUEST)
        set_alias(self, *args)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", sometimes)
    result = register.register(client, run, deployable)
    assert (result.role, result.created) == ("champion", True) and not refused

    def never(self: MlflowClient, *args: str) -> None:
        asked.append(args)
        raise MlflowException("Invalid alias name", INVALID_PARAMETER_VALUE)

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", never)
    with pytest.raises(MlflowException, match="Invalid alias"):
        champions.crown(client, deployable.name, "other", result.version, {}, action="promoted", because="a test")
    assert len(asked) == 1
