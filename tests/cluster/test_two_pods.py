"""Scenarios 6 and 12: a TrainJob of two pods trains the supernet; the store is in S3, or on the volume."""

from __future__ import annotations

import json
import os
import uuid

import pytest
from cluster import Cluster, until
from test_failures import SOON
from test_lost import LONGER

S3_VARIABLE = "YOLOV8_NAS_TEST_S3"
"""Environment variable with an address in a bucket for stage stores, such as s3://bucket/cluster-tests."""

TWO_NODES = ("--param", "training_nodes=2")


@pytest.fixture(autouse=True)
def trainer(cluster: Cluster) -> None:
    if not cluster.kubectl("get", "crd", "trainjobs.trainer.kubeflow.org", "--ignore-not-found", "-o", "name"):
        pytest.skip("this cluster has no Kubeflow Trainer")


def jobs(cluster: Cluster) -> list[str]:
    """TrainJobs of the namespace."""
    return [row["metadata"]["name"] for row in json.loads(cluster.kubectl("get", "trainjobs", "-o", "json"))["items"]]


@pytest.mark.parametrize("place", ["volume", "s3"])
def test_two_pods_train_the_supernet_and_leave_nothing(cluster: Cluster, place: str) -> None:
    store = os.environ.get(S3_VARIABLE) if place == "s3" else "/store"
    if store is None:
        pytest.skip(f"{S3_VARIABLE} names no bucket")
    run = cluster.submit(*TWO_NODES, store=f"{store}/cluster-test-{uuid.uuid4().hex[:8]}")
    cluster.wait_for(run, "Train the supernet", "running")
    until(lambda: jobs(cluster), SOON, "a TrainJob")
    assert cluster.end(run) == 0, run.output
    assert not jobs(cluster)


def test_a_trainjob_ends_with_the_run_that_is_cancelled(cluster: Cluster) -> None:
    run = cluster.submit(*TWO_NODES, **LONGER)
    until(lambda: jobs(cluster), 2 * SOON, "a TrainJob")
    cluster.cancel(run)
    assert cluster.end(run, SOON) == 1, run.output
    until(lambda: not jobs(cluster), SOON, "the TrainJob has gone")
