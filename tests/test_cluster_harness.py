"""What the tests against a cluster are made of, on a server that speaks the API of Kubeflow Pipelines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp_server import Cluster as Fake
from kfp_server import serving
from test_kubeflow_server import Workflow

sys.path.insert(0, str(Path(__file__).with_name("cluster")))

import cluster as harness
from cluster import Cluster, cleaning

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    monkeypatch.setenv("YOLOV8_NAS_IMAGE", f"registry.example.com/x@sha256:{'1' * 64}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(harness, "POLL", 0.05)
    with serving(Fake(multi_user=True, token="t")) as running:
        yield running


@pytest.fixture
def cluster(fake: Fake, tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "token").write_text("t")
    (tmp_path / "asked").mkdir()
    with cleaning(Cluster(fake.host, "team", tmp_path / "token", tmp_path / "asked")) as made:
        yield made


def test_a_run_is_submitted_followed_and_cleaned_up(fake: Fake, cluster: Cluster) -> None:
    begins, ends = Workflow(), Workflow()
    ends.step(ends.run, "supernet-train", phase="Succeeded")
    fake.states = [("RUNNING", begins.nodes), ("SUCCEEDED", ends.nodes)]
    run = cluster.submit("--param", "budget=0.5", seed=7)
    sent = fake.runs[0]["runtime_config"]["parameters"]
    config = json.loads(sent["config"])
    assert (config["imgsz"], config["seed"], sent["budget"]) == (64, 7, 0.5)
    assert cluster.end(run, 600) == 0, run.output
    assert "Train the supernet: succeeded" in run.output
    assert cluster.steps(run)["Train the supernet"].state == "succeeded"
    assert cluster.wait_for(run, "Train the supernet", "succeeded", 1).why == ""
    with pytest.raises(AssertionError, match="not within 0 s: Search networks: running"):
        cluster.wait_for(run, "Search networks", "running", 0)
    cluster.clean_up()
    assert fake.log[-1] == f"POST /runs/{run.id}:archive" and not any("terminate" in call for call in fake.log)


def test_the_pod_of_a_step_is_found(
    fake: Fake, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workflow = Workflow()
    workflow.step(workflow.branches[2], "search")
    fake.states = [("SUCCEEDED", workflow.nodes)]
    run = cluster.submit()
    cluster.end(run, 600)
    names = [node["name"] for node in workflow.nodes if node["type"] == "Pod"]
    pods = {
        "items": [
            {
                "metadata": {"name": f"pod-{i}", "annotations": {"workflows.argoproj.io/node-name": name}},
                "status": {"phase": "Running"},
            }
            for i, name in enumerate(names)
        ]
    }
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\necho '{json.dumps(pods)}'\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (own,) = (i for i, name in enumerate(names) if ".search(" in name and "-driver" not in name)
    assert cluster.pod(run, "search", 0) == f"pod-{own}"
    with pytest.raises(AssertionError, match="not within 0 s: a pod of qat-finetune runs"):
        cluster.pod(run, "qat-finetune", 0)


def test_without_a_cluster_each_test_says_why_it_is_skipped() -> None:
    command = [sys.executable, "-m", "pytest", "tests/cluster", "-p", "no:xdist"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout
    assert "no cluster: make test-cluster HOST=" in done.stdout
    assert " skipped in " in done.stdout and "passed" not in done.stdout and "failed" not in done.stdout
