"""What a cluster is asked to run, checked: by `submit` and `schedule` before it is sent, and by open-run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components import forms
from components.placement import Branch, Training, branches, training
from yolov8_nas.config import RunConfig
from yolov8_nas.data.remote import check_address, is_address
from yolov8_nas.registry.register import check_aliases
from yolov8_nas.registry.tracking import check_form
from yolov8_nas.runner.stage import check_store
from yolov8_nas.space import SearchSpace


@dataclass(frozen=True)
class Places:
    """Where the steps of a run are placed.

    Attributes:
        branches: Where those of each target run.
        training: Where it trains.
    """

    branches: list[Branch]
    training: Training


def check(
    config: RunConfig,
    *,
    store: str,
    target_pools: Mapping[str, Any],
    tolerations: Any,
    nodes: str,
    gpus: str,
    cpu: str,
    memory: str,
    labels: Any,
) -> Places:
    """Check everything of a run that can be told from what was asked for alone, without asking anybody.

    Args:
        config: The run configuration.
        store: The stage store.
        target_pools: What is special about the nodes of a target, by hardware.
        tolerations: Taints of GPU nodes.
        nodes: Nodes that the supernet is trained on.
        gpus: GPUs of each; empty for what the targets are.
        cpu: Cores of a training step; empty for the default.
        memory: Memory of a training step; empty for the default.
        labels: Labels of the nodes that train.

    Returns:
        Where the steps run.

    Raises:
        InputError: Something of it could not be run.
        SpaceError: The space is none.
    """
    check_store(store)
    if config.data is not None and is_address(config.data):
        check_address(config.data)
    if config.tracking.uri is not None:
        check_form(config.tracking.uri, "tracking.uri")
    trains = training(config, nodes, gpus, cpu, memory)
    asked = forms.labels(labels, "training_labels")
    for key, values in asked.items():
        if len(values) > 1:
            raise forms.InputError(f"training_labels: {key} has {len(values)} values; give one")
    placed = branches(config, target_pools, forms.tolerations(tolerations, "tolerations"))
    if not config.space.endswith((".yaml", ".yml")):  # of a file, open-run tells where it is
        SearchSpace.load(config.space)
        check_aliases(config)
    return Places(placed, trains)
