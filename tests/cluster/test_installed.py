"""Scenario 1: what the overlay promises holds: the restricted profile, every account's rights, every way out."""

from __future__ import annotations

import json
from itertools import product

import pytest
from cluster import Cluster

PROMISED = {
    "yolov8-nas-runner": {
        "get pods",
        "create workflowtaskresults.argoproj.io",
        "patch workflowtaskresults.argoproj.io",
    },
    "yolov8-nas-submitter": {
        *(f"{verb} runs.pipelines.kubeflow.org" for verb in ("get", "list", "create")),
        *(f"{verb} jobs.pipelines.kubeflow.org" for verb in ("get", "list", "create", "delete")),
    },
    "yolov8-nas-trainjobs": {
        *(f"{verb} trainjobs.trainer.kubeflow.org" for verb in ("get", "create", "delete")),
        *("get pods", "list pods"),
    },
    "yolov8-nas-training-node": set(),
    "mlflow": set(),
    "default": set(),
}
"""What each account may do of what is asked below; whatever is not named it may not."""

RESOURCES = (
    "pods", "secrets", "configmaps", "serviceaccounts", "roles.rbac.authorization.k8s.io",
    "workflowtaskresults.argoproj.io", "workflows.argoproj.io", "runs.pipelines.kubeflow.org",
    "jobs.pipelines.kubeflow.org", "trainjobs.trainer.kubeflow.org",
)  # fmt: skip
VERBS = ("get", "list", "create", "patch", "delete")


def test_every_account_may_do_what_is_promised_and_nothing_else(cluster: Cluster) -> None:
    there = {item["metadata"]["name"] for item in json.loads(cluster.kubectl("get", "sa", "-o", "json"))["items"]}
    assert {"yolov8-nas-runner", "yolov8-nas-submitter", "mlflow"} <= there
    for account in PROMISED.keys() & there:
        may = {" ".join(one) for one in cluster.rights(account, product(VERBS, RESOURCES))}
        assert may == PROMISED[account], account


def test_a_pod_that_is_not_restricted_is_refused(cluster: Cluster) -> None:
    container = {"name": "a", "image": "a", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "privileged"}, "spec": {"containers": [container]}}
    refused = cluster.kubectl("apply", "--dry-run=server", "-f", "-", content=json.dumps(pod), fails=True)
    assert 'violates PodSecurity "restricted' in refused


def test_steps_can_write_to_the_store(cluster: Cluster) -> None:
    assert cluster.in_pod("touch /store/.cluster-test && rm /store/.cluster-test && echo written").strip() == "written"


@pytest.mark.parametrize(
    ("labels", "open_to", "closed_to"),
    [
        (
            {"pipelines.kubeflow.org/v2_component": "true"},
            ["mlflow:5000", "ml-pipeline.kubeflow:8888"],
            ["postgres:5432", "ml-pipeline.kubeflow:9999", "169.254.169.254:80"],
        ),
        ({"app": "stranger"}, [], ["mlflow:5000", "postgres:5432", "ml-pipeline.kubeflow:8888"]),
    ],
)
def test_a_pod_reaches_what_is_open_and_nothing_else(
    cluster: Cluster, labels: dict[str, str], open_to: list[str], closed_to: list[str]
) -> None:
    script = (
        "python3 - <<'EOF'\n"
        "import json, socket, time\n"
        "def reached(place, tries):\n"
        "    host, port = place.rsplit(':', 1)\n"
        "    for _ in range(tries):\n"
        "        try:\n"
        "            socket.create_connection((host, int(port)), timeout=5).close()\n"
        "            return True\n"
        "        except OSError:\n"
        "            time.sleep(1)\n"
        "    return False\n"
        "time.sleep(5)\n"  # the policies of a pod are in force a moment after its beginning
        f"print(json.dumps({{place: reached(place, 10) for place in {open_to!r}}}"
        f" | {{place: reached(place, 1) for place in {closed_to!r}}}))\n"
        "EOF"
    )
    found = json.loads(cluster.in_pod(script, labels))
    assert found == {**dict.fromkeys(open_to, True), **dict.fromkeys(closed_to, False)}
