"""Scenarios 2 and 3: runs that end well, and one that can't, with a report in any case."""

from __future__ import annotations

from cluster import Cluster

CPU = {"hardware": "cpu-1t", "precision": "fp32", "constraints": ["latency<=60s"]}
BRANCH = (
    "Measure the device",
    "Look up what is there",
    "Search networks",
    "Fine-tune and quantize",
    "Build engines ahead",
    "Export and verify",
    "Register the model",
)
SHARED = ("Check and open the run", "Prepare the dataset", "Train the supernet", "Write the report", "Give the verdict")


def test_one_target(cluster: Cluster) -> None:
    run = cluster.submit()
    assert cluster.end(run) == 0, run.output
    found = cluster.steps(run)
    assert {name: step.state for name, step in found.items()} == dict.fromkeys(
        [*SHARED, *(f"{name}, cpu-1t-fp32" for name in BRANCH)], "succeeded"
    )
    closed = cluster.record(run, "closed.json")
    assert (closed["targets"], closed["with_a_model"]) == (1, 1)


def test_two_targets(cluster: Cluster) -> None:
    other = {"hardware": "cpu-1t", "precision": "int8", "constraints": ["latency<=60s"]}
    run = cluster.submit(targets=[CPU, other])
    assert cluster.end(run) == 0, run.output
    for label in ("cpu-1t-fp32", "cpu-1t-int8"):
        assert run.output.count(f"Register the model, {label}: succeeded") == 1
    assert cluster.record(run, "closed.json")["with_a_model"] == 2


def test_a_limit_that_nothing_can_keep(cluster: Cluster) -> None:
    run = cluster.submit(targets=[{**CPU, "constraints": ["latency<=1us"]}])
    assert cluster.end(run) == 1, run.output
    assert "Write the report: succeeded" in run.output, "a step that ends green has uploaded its report"
    assert "Give the verdict: failed" in run.output
    assert cluster.record(run, "closed.json")["with_a_model"] == 0


def test_a_target_that_is_lost_does_not_take_the_other_with_it(cluster: Cluster) -> None:
    run = cluster.submit(targets=[CPU, {**CPU, "precision": "int8", "constraints": ["latency<=1us"]}])
    assert cluster.end(run) == 0, run.output
    closed = cluster.record(run, "closed.json")
    assert closed["with_a_model"] == 1 and set(closed["lost"]) == {"cpu-1t-int8"}
