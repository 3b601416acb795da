"""Which nodes a target's steps run on, with how much of them.

A *pool* is a set of nodes, told by their labels. A GPU of the catalogue is found by the label that GPU feature
discovery gives its nodes, `nvidia.com/gpu.product`; anything else, and nodes without it, are named in `target_pools`:

    nvidia-t4: {node_labels: {pool: t4}, cpu: "3", memory: 12Gi}

whose keys are the targets' hardware, in lower case and with dashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from components import forms
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device import catalogue
from yolov8_nas.errors import InputError
from yolov8_nas.measure.target import named_threads, names_cpu, require_runtime_supports
from yolov8_nas.runner.stage import target_labels

KEYS_PATH: Final = "/var/run/yolov8-nas/keys"
"""Where the secret with the keys of signatures lies in a pod."""

TRAINJOBS_ACCOUNT: Final = "yolov8-nas-trainjobs"
"""The service account that may make TrainJobs, and the Secret with its token, which supernet-train alone mounts."""

TRAINJOBS_PATH: Final = "/var/run/yolov8-nas/trainjobs"
"""Where that Secret lies in a pod."""

NODE_ACCOUNT: Final = "yolov8-nas-training-node"
"""The service account of a TrainJob's pods, which may do nothing."""

PRODUCT: Final = "nvidia.com/gpu.product"

# Cores and memory of a step. Without a GPU they fit on a node of two cores beside what Kubernetes runs there.
_TRAINING_ON_GPU: Final = ("7", "28Gi")
_TRAINING_ON_CPU: Final = ("1", "4Gi")
_TARGET: Final = ("3", "12Gi")
_TARGET_CPU_MEMORY: Final = "4Gi"
_READING: Final = ("500m", "2Gi")

_KEYS: Final = ("node_labels", "tolerations", "gpus", "cpu", "memory")


@dataclass(frozen=True)
class Pod:
    """What one step gets, and where, in what Kubernetes takes.

    Attributes:
        gpus: Whole GPUs.
        cpu: Cores, request and limit.
        memory: Memory, request and limit.
        nodes: Labels of its nodes, or a NodeAffinity; empty for any node.
        tolerations: Taints of these nodes.
    """

    gpus: str
    cpu: str
    memory: str
    nodes: Mapping[str, Any]
    tolerations: Sequence[Mapping[str, Any]]

    def fields(self, nodes: str, found: str = "") -> dict[str, Any]:
        """As plain values; with the key of a result that was found, room on any node to read that.

        Args:
            nodes: Name of the field with the nodes.
            found: Key of the step's result in the stage store; empty where the step computes it.
        """
        pod = Pod("0", *_READING, {}, []) if found else self
        own = {"found": found, "gpus": pod.gpus, "cpu": pod.cpu, "memory": pod.memory}
        return own | {nodes: dict(pod.nodes), "tolerations": list(pod.tolerations)}

    def outputs(self, step: str, nodes: str, found: str) -> dict[str, Any]:
        """The outputs of a component that say so of a step; see `fields`."""
        return {f"{step}_{name}": value for name, value in self.fields(nodes, found).items()}


@dataclass(frozen=True)
class Branch(Pod):
    """Where the steps of one target run; their nodes are a NodeAffinity.

    Attributes:
        label: Label of the target.
        pool: Name of the pool: the hardware, in lower case and with dashes.
    """

    label: str
    pool: str

    def plain(self, found: str = "") -> dict[str, Any]:
        """As plain values: for a step whose result was found, room on any node to read that."""
        return {"label": self.label, "pool": self.pool, **self.fields("node_affinity", found)}


def pool_name(target: TargetConfig) -> str:
    """The pool that a target's steps run in."""
    return target.hardware.strip().lower().replace("_", "-").replace(" ", "-")


def is_gpu(target: TargetConfig) -> bool:
    """Whether a target is a GPU of the cluster."""
    return not names_cpu(target.hardware) and target.far is None


@dataclass(frozen=True)
class Training:
    """Where a run trains, in the strings that Kubernetes takes.

    Attributes:
        nodes: Nodes that the supernet is trained on.
        gpus: GPUs of each, and of the steps that fine-tune.
        cpu: Cores per step, request and limit.
        memory: Memory per step, request and limit.
    """

    nodes: int
    gpus: str
    cpu: str
    memory: str

    @property
    def supernet_gpus(self) -> str:
        """GPUs of the step that trains the supernet: none where a TrainJob has them."""
        return self.gpus if self.nodes == 1 else "0"


def training(config: RunConfig, nodes: str, gpus: str = "", cpu: str = "", memory: str = "") -> Training:
    """Where a run trains. What is not asked for follows from its targets: GPUs where one of them is a GPU.

    Args:
        config: The run configuration.
        nodes: Nodes that the supernet is trained on.
        gpus: GPUs of each; empty for one or none, as the targets are.
        cpu: Cores; empty for those of a small node, or more beside a GPU.
        memory: Memory; likewise.

    Raises:
        InputError: One of them is no such number or quantity.
    """
    gpus = gpus or str(int(any(map(is_gpu, config.targets))))
    for name, value, least in (("training_nodes", nodes, 1), ("training_gpus", gpus, 0)):
        if not value.isdecimal() or int(value) < least:
            raise InputError(f"{name} = {value!r}: give a whole number from {least} on")
    cores, room = _TRAINING_ON_GPU if int(gpus) else _TRAINING_ON_CPU
    return Training(
        int(nodes),
        gpus,
        forms.quantity(cpu or cores, forms.CORES, "training_cpu"),
        forms.quantity(memory or room, forms.BYTES, "training_memory"),
    )


def over_nodes(config: str, nodes: int, gpus: int) -> str:
    """A run configuration whose supernet is trained by a process for each GPU of all nodes, or one for each node.

    Args:
        config: Run configuration as JSON.
        nodes: Number of nodes; with one, the configuration stays as it is.
        gpus: GPUs of each.
    """
    if nodes == 1:
        return config
    settings = json.loads(config)
    settings["supernet"]["processes"] = nodes * max(1, gpus)
    return json.dumps(settings)


def trained_by(config: RunConfig, nodes: int, gpus: int) -> RunConfig:
    """A run configuration as the step that trains the supernet sees it, whatever this machine has.

    Args:
        config: The run configuration.
        nodes: Number of nodes.
        gpus: GPUs of each, which are all that a step on them sees.
    """
    if nodes == 1 and config.supernet.processes != "auto":
        return config
    supernet = config.supernet.model_copy(update={"processes": nodes * max(1, gpus)})
    return config.model_copy(update={"supernet": supernet})


def branches(
    config: RunConfig, target_pools: Mapping[str, Any], tolerations: Sequence[Mapping[str, Any]]
) -> list[Branch]:
    """A branch for each target of a run.

    Args:
        config: The run configuration.
        target_pools: What is to be different, by pool.
        tolerations: Taints of GPU nodes.

    Raises:
        InputError: A pool is none of the run's, has unknown keys or a value that Kubernetes would refuse; or a GPU has
            neither an entry in the catalogue nor node labels, or its runtime does not support it.
    """
    if not isinstance(target_pools, Mapping):
        raise InputError(
            f"target_pools = {target_pools!r}: give a mapping by hardware, for example {{nvidia-t4: {{...}}}}"
        )
    names = {pool_name(target) for target in config.targets}
    for name in target_pools.keys() - names:
        raise InputError(f"target_pools: no target runs in {name!r}; this run's pools are {', '.join(sorted(names))}")
    return [
        _branch(label, target, target_pools.get(pool_name(target), {}), tolerations)
        for label, target in zip(target_labels(config), config.targets, strict=True)
    ]


def _branch(label: str, target: TargetConfig, asked: Any, tolerations: Sequence[Mapping[str, Any]]) -> Branch:
    name = pool_name(target)
    if not isinstance(asked, Mapping) or asked.keys() - set(_KEYS):
        raise InputError(f"target_pools: {name}: {asked!r}: give a mapping with some of {', '.join(_KEYS)}")
    require_runtime_supports(target.hardware, target.runtime, target.precision)
    gpu = is_gpu(target)
    place = f"target_pools: {name}"
    labels = forms.labels(asked.get("node_labels", {}), f"{place}: node_labels")
    if gpu and not labels:
        known = catalogue.find(target.hardware)
        if known is None:
            raise InputError(
                f"target {label}: the catalogue has no {target.hardware!r}, so its nodes are unknown; name their "
                f"labels: target_pools = {{{name}: {{node_labels: {{LABEL: VALUE}}}}}}"
            )
        suffix = f"-MIG-{known.mig}" if known.mig else ""
        labels = {PRODUCT: [f"{value}{suffix}" for one in known.specifications for value in one.labels]}
    small = names_cpu(target.hardware) and target.far is None
    cores, memory = (str(named_threads(target.hardware) or 1), _TARGET_CPU_MEMORY) if small else _TARGET
    return Branch(
        label=label,
        pool=name,
        gpus=_whole(asked.get("gpus", int(gpu)), place),
        cpu=forms.quantity(asked.get("cpu", cores), forms.CORES, f"{place}: cpu"),
        memory=forms.quantity(asked.get("memory", memory), forms.BYTES, f"{place}: memory"),
        nodes=_affinity(labels),
        tolerations=forms.tolerations(asked.get("tolerations", tolerations if gpu else []), f"{place}: tolerations"),
    )


def _whole(number: Any, place: str) -> str:
    if isinstance(number, bool) or not str(number).isdecimal():
        raise InputError(f"{place}: gpus = {number!r}; give a whole number from 0 on")
    return str(number)


def _affinity(labels: Mapping[str, list[str]]) -> dict[str, Any]:
    if not labels:
        return {}
    expressions = [{"key": key, "operator": "In", "values": values} for key, values in sorted(labels.items())]
    terms = [{"matchExpressions": expressions}]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
