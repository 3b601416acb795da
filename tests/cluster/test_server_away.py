"""Scenario 9: `submit --watch` while the API server restarts, and with a token that stops being taken meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cluster import Cluster, until
from test_lost import LONGER

KUBEFLOW = "kubeflow"
"""Where Kubeflow Pipelines is installed."""


def test_a_run_is_followed_over_a_restart_of_the_server(cluster: Cluster) -> None:
    run = cluster.submit(**LONGER)
    cluster.wait_for(run, "Train the supernet", "running")
    cluster.kubectl("--namespace", KUBEFLOW, "delete", "pod", "-l", "app=ml-pipeline", "--wait=false")
    assert cluster.end(run) == 0, run.output
    assert "the run goes on, and is asked for again" in run.output, "the server was never away"


def test_a_run_is_followed_when_the_token_has_to_be_made_anew(cluster: Cluster) -> None:
    if cluster.token_file is None:
        pytest.skip("this server asks for no token")
    file = cluster.folder / "token"
    valid = cluster.token_file.read_text()
    file.write_text(valid)
    run = replace(cluster, token_file=file, runs=cluster.runs).submit(**LONGER)
    cluster.wait_for(run, "Train the supernet", "running")
    file.write_text("expired")
    refused: list[str] = []

    def is_told() -> bool:
        assert run.process.stdout is not None
        refused.append(run.process.stdout.readline())
        return "not authenticated" in refused[-1]

    until(is_told, 300.0, "the refusal is told")
    file.write_text(valid)
    assert cluster.end(run) == 0, "".join(refused) + run.output
