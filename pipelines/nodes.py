"""Whether a cluster has the nodes that a run asks for, where this machine may ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.placement import Branch
from yolov8_nas.errors import InputError


def check(branches: Sequence[Branch], training_labels: Mapping[str, str]) -> str | None:
    """Compare the node labels that are asked for with those of the cluster that kubectl would talk to.

    Args:
        branches: Where the targets' steps run.
        training_labels: Labels of the nodes that train.

    Returns:
        Why nothing could be compared; nothing where it was.

    Raises:
        InputError: No node has the labels.
    """
    import kubernetes
    import urllib3

    try:
        try:
            kubernetes.config.load_incluster_config()
        except kubernetes.config.ConfigException:
            kubernetes.config.load_kube_config()
        nodes = kubernetes.client.CoreV1Api().list_node(_request_timeout=5).items
    except kubernetes.config.ConfigException:
        return "there is no kubeconfig here"
    except kubernetes.client.ApiException as error:
        return f"the cluster does not let you list its nodes ({error.status})"
    except urllib3.exceptions.HTTPError:
        return "the cluster of the kubeconfig does not answer"
    labels = [dict(node.metadata.labels or {}) for node in nodes]
    if training_labels:
        _require("training_labels", {key: [value] for key, value in training_labels.items()}, labels)
    for branch in branches:
        _require(f"target {branch.label}", _wanted(branch.nodes), labels)
    return None


def _wanted(affinity: Mapping[str, Any]) -> dict[str, list[str]]:
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return {row["key"]: row["values"] for term in terms for row in term["matchExpressions"]}


def _require(who: str, wanted: Mapping[str, Sequence[str]], nodes: Sequence[Mapping[str, str]]) -> None:
    if any(all(node.get(key) in values for key, values in wanted.items()) for node in nodes):
        return
    asked = ", ".join(f"{key} = {' or '.join(values)}" for key, values in wanted.items())
    there = sorted({f"{key} = {node[key]}" for node in nodes for key in wanted if key in node})
    found = ", ".join(there) or "no node with such a label"
    raise InputError(
        f"{who}: none of the {len(nodes)} nodes has {asked} (there is {found}); "
        "label nodes, or name others with --param target_pools=... or training_labels=..."
    )
