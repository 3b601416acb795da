"""Scenario 11: Kueue holds what its quota has no room for, admits it when there is room, and takes the room back."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import Cluster, until
from test_failures import SOON

from pipelines.pods import QUEUE_VARIABLE

KUEUE = "kueue.x-k8s.io/v1beta2"
COVERED = ("cpu", "memory", "ephemeral-storage", "pods")
ROOM = {"cpu": "4", "memory": "32Gi", "ephemeral-storage": "500Gi", "pods": "20"}


@pytest.fixture
def queue(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A queue of a test's own, without any room, into which its runs are put."""
    if not cluster.kubectl("get", "crd", "clusterqueues.kueue.x-k8s.io", "--ignore-not-found", "-o", "name"):
        pytest.skip("this cluster has no Kueue")
    name = f"cluster-test-{uuid.uuid4().hex[:8]}"
    make(cluster, "ResourceFlavor", name, {})
    make(cluster, "ClusterQueue", name, offering(name, dict.fromkeys(COVERED, "0")))
    make(cluster, "LocalQueue", name, {"clusterQueue": name}, namespace=cluster.namespace)
    monkeypatch.setenv(QUEUE_VARIABLE, name)
    yield name
    cluster.clean_up()
    cluster.kubectl("delete", f"localqueue/{name}", "--wait=false")
    cluster.kubectl("delete", f"clusterqueue/{name}", f"resourceflavor/{name}", "--wait=false")


def make(cluster: Cluster, kind: str, name: str, spec: dict[str, Any], **metadata: str) -> None:
    """Make an object of Kueue's, or change it."""
    body = {"apiVersion": KUEUE, "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}
    cluster.kubectl("apply", "-f", "-", content=json.dumps(body))


def offering(flavor: str, room: dict[str, str]) -> dict[str, Any]:
    """What a ClusterQueue offers."""
    resources = [{"name": key, "nominalQuota": value} for key, value in room.items()]
    groups = [{"coveredResources": list(room), "flavors": [{"name": flavor, "resources": resources}]}]
    return {"namespaceSelector": {}, "resourceGroups": groups}


def in_use(cluster: Cluster, queue: str) -> int:
    """Workloads that have room in a queue."""
    return int(cluster.kubectl("get", "clusterqueue", queue, "-o", "jsonpath={.status.admittedWorkloads}") or 0)


def test_kueue_holds_admits_and_releases(cluster: Cluster, queue: str) -> None:
    run = cluster.submit()

    def held() -> list[str]:
        found = json.loads(cluster.kubectl("get", "pods", "-l", f"pipeline/runid={run.id}", "-o", "json"))["items"]
        gated = [pod for pod in found if pod["spec"].get("schedulingGates")]
        return [pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] for pod in gated]

    assert set(until(held, SOON, "a pod is held")) == {queue}
    assert in_use(cluster, queue) == 0
    make(cluster, "ClusterQueue", queue, offering(queue, ROOM))
    assert cluster.end(run) == 0, run.output
    until(lambda: in_use(cluster, queue) == 0, SOON, "the room is given back")
