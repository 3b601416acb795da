"""Whole runs in miniature: on S3 and PostgreSQL, as a team has them, and on this machine alone."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import registering
import servers
import small_disk
from look_ups import watched
from measured import Tables
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import registry

from yolov8_nas.commands.main import app
from yolov8_nas.errors import InputError
from yolov8_nas.files import file_sha256, read_json
from yolov8_nas.registry import query, spool, tracking
from yolov8_nas.registry.pull import pull
from yolov8_nas.registry.register import register
from yolov8_nas.runner.stage import STAGES, open_store
from yolov8_nas.store.archive import pack
from yolov8_nas.store.remote import CACHE_VARIABLE

pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "yolov8_nas.commands.main"]

MINIATURE = """
name: miniature
data: {data}
store: {store}
tracking: {{uri: {tracking}}}
space: tiny
imgsz: 64
supernet: {{epochs: 1, random_networks: 1}}
probe: {{networks: 12, holdout: 5, max_mape: 10}}
search: {{generations: 1, population: 4, candidates: 1, measure_every: 1, bn_images: 16, random: 2, prior_steps: 2}}
finetune: {{epochs: 1, candidates: 1, qat_epochs: 1}}
targets:
{targets}"""

FIRST = """  - {hardware: cpu, precision: best, constraints: ["latency<=150%stock"]}
"""

PLANTED = "pl4nted-s3cret"
"""A password that reaches the tracking server and is written down nowhere."""

LABEL = "cpu-1t-fp32"
ADDED = """  - {hardware: cpu-1t, precision: fp32, constraints: ["latency<=150%stock"]}
"""


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of an MLflow server on PostgreSQL and S3, and the name of a bucket."""
    with servers.team(tmp_path_factory.mktemp("team")) as found:
        yield found


def test_eight_at_once_make_one_version_on_postgresql(team: tuple[str, str], tmp_path: Path) -> None:
    registering.eight_at_once(team[0], tmp_path)


def test_artifacts_can_lie_in_s3_without_the_servers_help(team: tuple[str, str], tmp_path: Path) -> None:
    uri, bucket = team
    client = tracking.connect(uri)
    branch = registering.Branch(uri, "straight", tmp_path)
    for experiment, place in (("straight", bucket), ("nowhere", "no-such-bucket-of-ours")):
        client.create_experiment(experiment, artifact_location=f"s3://{place}/artifacts")
        settings = branch.config.tracking.model_copy(update={"experiment": experiment})
        branch.config = branch.config.model_copy(update={"tracking": settings})
        if place == bucket:
            branch.register()
            assert pull(uri, "straight", tmp_path / "pulled")[0].artifacts.startswith(f"s3://{bucket}/artifacts/")
        else:
            with pytest.raises(InputError, match="check the bucket of the artifact store"), tracking.foreseen(uri):
                tracking.open_run(branch.config, "nowhere", uri)

    command = [*CLI, "models", "pull", "straight", tmp_path / "again", "--tracking", uri]
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "check the bucket of the artifact store, its endpoint and the AWS credentials" in done.stderr


def test_what_waits_in_a_store_in_s3_is_sent_from_another_machine(
    team: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    uri, bucket = team
    address = f"s3://{bucket}/waiting"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "first"))
    branch = registering.Branch(uri, "waited", tmp_path)
    branch.store = open_store(address)
    with monkeypatch.context() as offline:
        offline.setattr(MlflowClient, "log_model_artifacts", away)
        kept = branch.register()["spooled"]
    assert kept.startswith(f"{address}/spool/")
    (entry,) = spool.waiting(branch.store)

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "second"))
    refused = CliRunner().invoke(app, ["models", "sync", "--store", address])
    assert refused.exit_code == 1 and f"not called unless {tracking.URI_VARIABLE} names it" in refused.stderr
    assert len(spool.waiting(branch.store)) == 1
    monkeypatch.setenv(tracking.URI_VARIABLE, uri)
    result = CliRunner().invoke(app, ["models", "sync", "--store", address])
    assert (result.exit_code, result.stdout) == (0, f"sent {entry.what}\n"), result.output
    assert query.find(uri, "waited").version == 1
    assert spool.waiting(branch.store) == []
    assert not boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix="waiting/spool/")["KeyCount"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = CliRunner().invoke(app, ["models", "sync", "--store", address])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output


def test_the_registrys_benchmark_tells_times_and_shares(team: tuple[str, str], tmp_path: Path) -> None:
    registry.report(*team, argparse.Namespace(workdir=tmp_path, **registry.TOY))
    result = read_json(tmp_path / "report.json")
    assert len(query.list_models(team[0], "line-110")) == 2
    assert {len(values) for what, values in result["seconds"].items() if "command" not in what} == {2}
    rows = [line.split(" | ") for line in (tmp_path / "report.md").read_text().splitlines() if " | " in line]
    assert next(row for row in rows if row[0] == "| uploaded by boto3")[2] == "1.00"
    _, processor = (row for row in rows if row[0] == "| registered")
    assert len(processor) == 6 and float(processor[2]) > 0
    assert registry.median_with_interval([1.0, 2.0, 9.0])[0] == 2.0


def test_files_go_through_the_server_where_the_object_store_is_out_of_reach(
    team: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    uri, _ = team
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "100000")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")  # as the server says; put back after the test
    monkeypatch.setattr(HttpArtifactRepository, "_upload_part", unreachable)
    detector = registering.detector("around", [registry.write_network(tmp_path / "model.onnx", 0.2)])
    client = tracking.connect(uri)
    assert register(client, client.create_run("0").info.run_id, detector).version == 1
    assert "files go through the server" in caplog.text
    pull(uri, "around", tmp_path / "pulled")


class Line:
    """A work folder, and what is run in it again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work, self.data = folder, folder / "work", folder / "data"
        subprocess.run([*CLI, "data", "make-demo", self.data, "--images", "40", "--size", "64"], check=True)

    def run(
        self, added: str = "", *, data: str = "", store: str = "null", tracking: str = "null", targets: str = FIRST
    ) -> dict[str, Any]:
        config = self.folder / "miniature.yaml"
        config.write_text(
            MINIATURE.format(data=data or self.data, store=store, tracking=tracking, targets=targets) + added
        )
        command = [*CLI, "run", config, "--workdir", self.work]
        environment = {**os.environ, CACHE_VARIABLE: str(self.folder / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        logs = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in sorted((self.work / "logs").glob("*.log")))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
        summary: dict[str, Any] = read_json(self.work / "summary.json")
        return summary

    def run_with_a_team(self, uri: str, bucket: str) -> dict[str, Any]:
        """Run it with dataset, stage store, registry and artifacts on servers, and nothing in the work folder."""
        pack(self.data, self.folder / "data.tar")
        boto3.client("s3").upload_file(str(self.folder / "data.tar"), bucket, "data.tar")
        store, whole = f"s3://{bucket}/store", uri.replace("//", f"//planted:{PLANTED}@")
        with watched(self.folder / "asked") as asked:
            summary = self.run(data=f"s3://{bucket}/data.tar", store=store, tracking=whole)
        assert not asked(), "nobody but this machine's own servers is asked for anything"
        self.look_for_what_was_planted(uri, bucket, summary)
        assert not {"store", "mlflow"} & {path.name for path in self.work.iterdir()}
        (target,) = summary["targets"]
        version, files = pull(uri, "miniature", self.folder / "pulled")
        assert version.version == target["registry"]["version"]
        shipped = self.work / target["model"]["files"]["model.onnx"]
        assert file_sha256(files / "model.onnx") == file_sha256(shipped)
        return summary

    def look_for_what_was_planted(self, uri: str, bucket: str, summary: dict[str, Any]) -> None:
        """Look through all that a run leaves, on this machine, in the bucket and in MLflow."""
        written = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "miniature.yaml"]
        assert len(written) > 50
        assert [path for path in written if PLANTED.encode() in path.read_bytes()] == []
        s3 = boto3.client("s3")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for entry in (entry for page in pages for entry in page.get("Contents", [])):
            content = s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            assert PLANTED.encode() not in content, entry["Key"]
        client = tracking.connect(uri)
        found = client.search_runs([run.experiment_id for run in client.search_experiments()])
        assert any(run.data.params.get("name") == "miniature" for run in found)
        assert PLANTED not in repr([run.to_dictionary() for run in found])
        assert summary["run"]["tracking_uri"] == uri

    def take_home(self, store: str, cache: Path, run_id: str) -> None:
        """Fetch what a run has made from a bucket: its results serve a folder, too."""
        with pytest.MonkeyPatch.context() as another_machine:
            another_machine.setenv(CACHE_VARIABLE, str(cache))
            fetched = open_store(store)
        for file in fetched.run_folder(run_id).glob("*.*.json"):
            record = read_json(file)
            if "begun" not in record and not file.name.startswith("advice."):
                fetched.result(record["stage"], record["key"])
        fetched.root.rename(self.work / "store")


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    """Work folders in which runs have come to their end, for tests that go on there."""
    return []


def test_the_whole_way_in_miniature_and_once_more_with_a_target_added(
    tmp_path: Path, request: pytest.FixtureRequest, tables: Tables, lines: list[Line]
) -> None:
    """The first run is on S3 and PostgreSQL where they are, the second needs no server in any case."""
    line = Line(tmp_path)
    try:
        uri, bucket = request.getfixturevalue("team")
    except pytest.skip.Exception:
        bucket, first = None, line.run()
    else:
        first = line.run_with_a_team(uri, bucket)
    assert {stage["name"] for stage in first["stages"]} >= set(STAGES)
    assert {stage["status"] for stage in first["stages"]} == {"done"}
    (target,) = first["targets"]
    assert target["status"] == "met"
    assert all(limit["met"] and limit["measured"] <= limit["limit"] for limit in target["constraints"])
    assert {"best.pt", "model.onnx"} <= set(target["model"]["files"])
    assert all((line.work / file).is_file() for file in target["model"]["files"].values())
    assert target["model"]["latency_ms"]["p50"] > 0
    assert target["registry"]["version"]
    assert "</html>" in (line.work / "report.html").read_text()
    assert not (line.work / "kfp").exists()

    if bucket:
        line.take_home(f"s3://{bucket}/store", tmp_path / "home", first["run"]["id"])
    tables.take(line.work / "store")
    second = line.run(ADDED)
    tables.give(line.work / "store")
    again = {(stage["name"], stage["target"]): stage["status"] for stage in second["stages"]}
    # The dataset is another source then, with the same name and content.
    assert again["data-prep", None] == ("done" if bucket else "cached")
    assert again["supernet-train", None] == "cached"
    before, added = second["targets"]
    own = {stage: status for (stage, label), status in again.items() if label == before["id"]}
    assert own.pop("register") == "done", "it always runs, and changes nothing"
    assert set(own.values()) == {"cached"}
    assert before["model"]["latency_ms"] == target["model"]["latency_ms"]
    assert before["registry"]["version"] == target["registry"]["version"]
    assert {status for (_, label), status in again.items() if label == added["id"]} == {"done"}
    assert (added["status"], added["hardware"]["threads"], added["precision_shipped"]) == ("met", 1, "fp32")
    assert added["registry"]["version"] != before["registry"]["version"]
    assert set(added["model"]["files"].values()).isdisjoint(before["model"]["files"].values())
    assert all((line.work / file).is_file() for file in added["model"]["files"].values())
    assert 'id="target-2"' in (line.work / "report.html").read_text()
    lines.append(line)


def test_a_run_on_a_disk_that_is_full_goes_on_when_there_is_room(tmp_path: Path, lines: list[Line]) -> None:
    """Its export finds no room for what it has made; the run comes to what one comes to that nothing disturbs."""
    prefix = small_disk.command(tmp_path / "disk", "450m")
    if not lines:
        line = Line(tmp_path)
        line.run(added=ADDED, targets="")
        lines.append(line)
    line, store = lines[0], lines[0].work / "store"
    again = ("trt-export", "register")
    runs = sorted((store / "runs").glob(f"*/{LABEL}.trt-export.json"), key=lambda file: file.stat().st_mtime)
    keys = {stage: read_json(runs[-1].with_name(f"{LABEL}.{stage}.json"))["key"] for stage in STAGES[2:]}
    undisturbed = small_disk.digests(store / "trt-export" / keys["trt-export"] / "outputs")

    (tmp_path / "full.yaml").write_text(
        MINIATURE.format(data=line.data, store=tmp_path / "disk" / "store", tracking="null", targets="") + ADDED
    )
    inputs = [*(store / "data-prep").glob("*"), store / "qat-finetune" / keys["qat-finetune"]]
    room = sum(file.stat().st_size for folder in inputs for file in folder.rglob("*") if file.is_file()) + 2**22
    asked = [*CLI, "run", tmp_path / "full.yaml", "--workdir", tmp_path / "work"]
    made = [f"{stage}/{keys[stage]}" for stage in again]
    kept = ["data-prep", "supernet-train", "tables", "stock-trainings"]  # and of this target
    kept += [f"{stage}/{key}" for stage, key in keys.items() if stage not in again]
    script = [sys.executable, small_disk.__file__, tmp_path / "disk", store, json.dumps(kept), json.dumps(made)]
    done = subprocess.run([*prefix, *script, str(room), *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    full, with_room = result["told"]
    assert full["status"] == 1, full
    first, *others = full["error"].splitlines()
    assert re.fullmatch(
        r"failed: trt-export: /.*: no room on the disk for [\d,]+ bytes \([\d,]+ bytes are free\); "
        r"free some space, and the same command goes on",
        first,
    ), full["error"]
    assert all(line.startswith("logs ") for line in others), full["error"]

    assert (with_room["status"], with_room["error"]) == (0, ""), with_room
    summary = read_json(tmp_path / "work" / "summary.json")
    assert {stage["name"]: stage["status"] for stage in summary["stages"]} == {
        stage: "done" if stage in again else "cached" for stage in STAGES
    }
    (target,) = summary["targets"]
    assert target["status"] == "met" and target["registry"]["version"]
    anew = result["made"][f"trt-export/{keys['trt-export']}"]
    measured = {"verdict.json", "engine.json", "usage.json"}  # times, which no two runs have in common
    assert anew.keys() == undisturbed.keys() and "model/model.onnx" in anew
    assert {name for name in anew if anew[name] != undisturbed[name]} <= measured
