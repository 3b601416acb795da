"""Scenario 7: the same content twice, at once and after the end."""

from __future__ import annotations

import json
import os
import uuid

import pytest
from cluster import CPU_VARIABLE, Cluster


def test_what_is_submitted_twice_at_once_is_computed_once(cluster: Cluster) -> None:
    first = cluster.submit()
    (file,) = cluster.folder.glob("*.yaml")
    second = cluster.submit_file(file)
    assert [cluster.end(run) for run in (first, second)] == [0, 0], first.output + second.output
    for stage in ("all.data-prep", "all.supernet-train", "cpu-1t-fp32.search", "cpu-1t-fp32.qat-finetune"):
        one, other = (cluster.record(run, f"{stage}.json") for run in (first, second))
        assert one["digest"] == other["digest"]
        assert {one["status"], other["status"]} == {"done", "cached"}, stage


def test_what_is_submitted_again_comes_from_the_store_and_asks_for_no_node(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = f"cluster-test-{uuid.uuid4().hex[:8]}"
    (node, *_) = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    chosen, cpu = f"{{{label}: here}}", os.environ.get(CPU_VARIABLE, "1")
    pool = f"target_pools={{cpu-1t: {{node_labels: {chosen}, cpu: {cpu}}}}}"
    places = ("--param", pool, "--param", f"training_labels={chosen}")
    cluster.kubectl("label", "node", node["metadata"]["name"], f"{label}=here")
    try:
        first = cluster.submit(*places)
        (file,) = cluster.folder.glob("*.yaml")
        assert cluster.end(first) == 0, first.output
    finally:
        cluster.kubectl("label", "node", node["metadata"]["name"], f"{label}-")
    with monkeypatch.context() as blind:
        blind.setenv("KUBECONFIG", str(cluster.folder / "none"))  # or `submit` sees that no node has the label
        again = cluster.submit_file(file, *places, "--unschedulable", "0.02")
    assert cluster.end(again) == 0, again.output
    for stage in ("all.supernet-train", "cpu-1t-fp32.search", "cpu-1t-fp32.trt-export"):
        assert cluster.record(again, f"{stage}.json")["status"] == "cached", stage
