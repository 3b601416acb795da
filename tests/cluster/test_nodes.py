"""Scenario 10: nodes that are chosen when a run is submitted, by labels, affinity and tolerations.

GPUs that are not there are stood in for by a node without a kubelet, which has the labels, the taint and the capacity
of a GPU node: the scheduler is real, and what it puts there never runs. Asked for with YOLOV8_NAS_TEST_NODES=1, since
whoever looks after nodes may take offence.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cluster import Cluster, until

VARIABLE = "YOLOV8_NAS_TEST_NODES"
PRODUCT = "Tesla-T4"
T4 = {"hardware": "NVIDIA_T4", "precision": "fp16", "constraints": ["latency<=60s"]}
BEATS_EVERY = 5.0
"""Seconds between two signs of life of the stand-in."""


@contextmanager
def stand_in(cluster: Cluster) -> Iterator[str]:
    """A node with a T4 on which nothing runs."""
    name = f"cluster-test-{uuid.uuid4().hex[:8]}"
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": PRODUCT, "kubernetes.io/hostname": name}},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
    }
    cluster.kubectl("apply", "-f", "-", content=json.dumps(node))
    ended = threading.Event()

    def live() -> None:
        room = {"cpu": "8", "memory": "64Gi", "pods": "20", "ephemeral-storage": "500Gi", "nvidia.com/gpu": "1"}
        while not ended.wait(BEATS_EVERY):
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            ready = {"type": "Ready", "status": "True", "reason": "StandIn", "message": "", "lastHeartbeatTime": now}
            status = {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
            cluster.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", json.dumps(status))
            cluster.kubectl("taint", "node", name, "node.kubernetes.io/not-ready-", fails=True)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield name
    finally:
        ended.set()
        thread.join()
        cluster.kubectl("delete", "node", name)


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE}=1 allows a node that stands in for one with a GPU")
def test_a_gpu_target_goes_to_a_node_with_its_label_and_tolerates_its_taint(cluster: Cluster) -> None:
    with stand_in(cluster) as node:
        run = cluster.submit(targets=[T4])

        def placed() -> str:
            found = json.loads(cluster.kubectl("get", "pods", "-l", f"pipeline/runid={run.id}", "-o", "json"))["items"]
            return next((pod["metadata"]["name"] for pod in found if pod["spec"].get("nodeName") == node), "")

        pod = json.loads(cluster.kubectl("get", "pod", until(placed, 900.0, "a pod on the stand-in"), "-o", "json"))
        (main,) = (one for one in pod["spec"]["containers"] if one["name"] == "main")
        assert main["resources"]["limits"]["nvidia.com/gpu"] == "1"
        cluster.cancel(run)


def test_a_target_goes_where_its_labels_say(cluster: Cluster) -> None:
    label = f"cluster-test-{uuid.uuid4().hex[:8]}"
    (node, *_) = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"]
    name = node["metadata"]["name"]
    toleration = "{key: cluster-test, operator: Exists, effect: NoSchedule}"
    pools = f"target_pools={{cpu-1t: {{node_labels: {{{label}: here}}, tolerations: [{toleration}]}}}}"
    cluster.kubectl("label", "node", name, f"{label}=here")
    try:
        run = cluster.submit("--param", pools)
        cluster.wait_for(run, "Measure the device, cpu-1t-fp32", "running")
        pod = json.loads(cluster.kubectl("get", "pod", cluster.pod(run, "hw-probe"), "-o", "json"))["spec"]
        terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert terms == [{"matchExpressions": [{"key": label, "operator": "In", "values": ["here"]}]}]
        assert {"key": "cluster-test", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        assert pod["nodeName"] == name
        assert cluster.end(run) == 0, run.output
    finally:
        cluster.kubectl("label", "node", name, f"{label}-")
