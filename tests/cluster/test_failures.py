"""Scenario 5: what people see of a step that fails or can't begin, and that it does not hang for ever.

The volume is filled where YOLOV8_NAS_TEST_FILL=1 allows it: one that has no size of its own is the disk of a node.
"""

from __future__ import annotations

import os
import time

import pytest
from cluster import Cluster

SOON = 600.0
"""Seconds in which each of these is to be told."""

FILL = "YOLOV8_NAS_TEST_FILL"

AT_ONCE = ("--unschedulable", "0.02")


def test_exit_code_1_is_told_with_its_reason_and_its_log(cluster: Cluster) -> None:
    run = cluster.submit(data="/store/no-such-dataset")
    assert cluster.end(run, SOON) == 1
    assert "Check and open the run: failed" in run.output and "log: kubectl" in run.output
    assert "Write the report: succeeded" in run.output


def test_a_target_out_of_memory_is_lost_and_says_what_to_do(cluster: Cluster) -> None:
    run = cluster.submit("--param", "target_pools={cpu-1t: {memory: 400Mi}}")
    cluster.end(run)
    closed = cluster.record(run, "closed.json")
    assert "for want of memory" in closed["lost"]["cpu-1t-fp32"] and "target_pools" in closed["lost"]["cpu-1t-fp32"]


def test_a_training_out_of_memory_is_told(cluster: Cluster) -> None:
    run = cluster.submit("--param", "training_memory=400Mi")
    assert cluster.end(run) == 1
    assert "Train the supernet: failed" in run.output and "OOMKilled" in run.output


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("training_labels={pool: there-is-no-such-pool}", "didn't match"),
        ("training_cpu=4000", "Insufficient cpu"),
        ("training_gpus=64", "Insufficient nvidia.com/gpu"),
    ],
)
def test_a_step_that_no_node_can_take_is_told_with_the_schedulers_reason(
    cluster: Cluster, parameter: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.folder / "none"))  # or `submit` looks at the nodes, and refuses
    began = time.monotonic()
    run = cluster.submit("--param", parameter, *AT_ONCE)
    status = cluster.end(run, SOON)
    assert status == 2, run.output
    assert "Train the supernet: waits (" in run.output
    assert reason in run.output or "exceeded quota" in run.output
    print(f"{parameter}: told after {time.monotonic() - began:.0f} s")


def test_an_image_that_is_missing_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV8_NAS_IMAGE_TRAINING", f"registry.invalid/nothing@sha256:{'0' * 64}")
    run = cluster.submit()
    step = cluster.wait_for(run, "Train the supernet", "waits", SOON)
    assert "ImagePull" in step.why and "yolov8-nas-pull" in step.why


@pytest.mark.skipif(FILL not in os.environ, reason=f"{FILL}=1 allows the volume to be filled")
def test_a_full_volume_is_told_and_the_run_goes_on_when_there_is_room(cluster: Cluster) -> None:
    filler = "/store/.cluster-test-filler"
    file = cluster.configuration()
    cluster.in_pod(f"dd if=/dev/zero of={filler} bs=1M 2>/dev/null; truncate -s -2M {filler}")
    try:
        full = cluster.submit_file(file)
        assert cluster.end(full, SOON) == 1
        assert "No space left" in full.output or "no room" in full.output, full.output
    finally:
        cluster.in_pod(f"rm {filler}")
    again = cluster.submit_file(file)
    assert cluster.end(again) == 0, again.output
