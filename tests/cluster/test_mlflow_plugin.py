"""Scenario 13: with Kubeflow's MLflow plugin on, our run nests in its run instead of standing beside it."""

from __future__ import annotations

import json

import pytest
from cluster import Cluster

ASK = (
    "python3 - <<'EOF'\n"
    "import json, mlflow\n"
    "client = mlflow.MlflowClient()\n"
    "run = client.get_run({run!r})\n"
    "print(json.dumps(run.data.tags.get('mlflow.parentRunId')))\n"
    "EOF"
)
STEP = {"pipelines.kubeflow.org/v2_component": "true"}


def test_our_run_nests_in_that_of_the_plugin(cluster: Cluster) -> None:
    run = cluster.submit()
    assert cluster.end(run) == 0, run.output
    log = cluster.kubectl("get", "workflows", "-l", f"pipeline/runid={run.id}", "-o", "json")
    if "MLFLOW_RUN_ID" not in log:
        pytest.skip("Kubeflow's MLflow plugin is off: it sets no MLFLOW_RUN_ID")
    opened = cluster.record(run, "run.json")
    ask = f"export MLFLOW_TRACKING_URI={opened['tracking_uri']}\n" + ASK.format(run=opened["mlflow_run"])
    assert json.loads(cluster.in_pod(ask, STEP)), "it stands beside it"
