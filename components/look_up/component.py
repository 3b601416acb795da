"""look-up as a Kubeflow component."""

from typing import Any, NamedTuple

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def look_up(
    config: str,
    target: str,
    store: str,
    run_id: str,
    gpus: str,
    cpu: str,
    memory: str,
    node_affinity: dict[str, Any],
    tolerations: list[Any],
    training_gpus: str,
    training_cpu: str,
    training_memory: str,
    training_labels: dict[str, Any],
    training_tolerations: list[Any],
    probe: dsl.Output[dsl.Artifact],
) -> NamedTuple(  # type: ignore[valid-type]
    "LookedUp",
    [
        ("search_found", str),
        ("search_gpus", str),
        ("search_cpu", str),
        ("search_memory", str),
        ("search_affinity", dict),
        ("search_tolerations", list),
        ("tuning_found", str),
        ("tuning_gpus", str),
        ("tuning_cpu", str),
        ("tuning_memory", str),
        ("tuning_labels", dict),
        ("tuning_tolerations", list),
        ("export_found", str),
        ("export_gpus", str),
        ("export_cpu", str),
        ("export_memory", str),
        ("export_affinity", dict),
        ("export_tolerations", list),
    ],
):
    """Pick up what was measured of a target, and give its further steps their nodes: any, where they only read.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run.
        gpus: GPUs of the target's steps.
        cpu: Their cores.
        memory: Their memory.
        node_affinity: Their nodes.
        tolerations: Taints of these nodes.
        training_gpus: GPUs of a training.
        training_cpu: Its cores.
        training_memory: Its memory.
        training_labels: Labels of its nodes.
        training_tolerations: Taints of these nodes.
        probe: Tar of hw-probe for this target.

    Returns:
        search_found: Key of the search's result, where it is in the store; empty where it is to be computed.
        search_gpus: GPUs of the step that searches, or reads.
        search_cpu: Its cores.
        search_memory: Its memory.
        search_affinity: Its nodes.
        search_tolerations: Taints of these nodes.
        tuning_found: The same of the step that fine-tunes.
        tuning_gpus: GPUs of it.
        tuning_cpu: Its cores.
        tuning_memory: Its memory.
        tuning_labels: Labels of its nodes.
        tuning_tolerations: Taints of these nodes.
        export_found: The same of the step that exports.
        export_gpus: GPUs of it.
        export_cpu: Its cores.
        export_memory: Its memory.
        export_affinity: Its nodes.
        export_tolerations: Taints of these nodes.
    """
    import json
    from collections import namedtuple
    from pathlib import Path

    from components.placement import Pod
    from yolov8_nas.config import RunConfig
    from yolov8_nas.run.found import pick_up
    from yolov8_nas.run.lifecycle import telling

    own = Pod(gpus, cpu, memory, node_affinity, tolerations)
    training = Pod(training_gpus, training_cpu, training_memory, training_labels, training_tolerations)
    asked = RunConfig.parse(json.loads(config), "run configuration")
    with telling("look-up", store=store, run_id=run_id, target=target):
        probe.metadata["sha256"], found = pick_up(asked, target, store=store, run_id=run_id, output=Path(probe.path))
    print(f"in the store: {', '.join(found) or 'nothing'}", flush=True)
    fields: dict[str, Any] = {}
    for name, stage, pod, nodes in (
        ("search", "search", own, "affinity"),
        ("tuning", "qat-finetune", training, "labels"),
        ("export", "trt-export", own, "affinity"),
    ):
        fields |= pod.outputs(name, nodes, found.get(stage, ""))
    return namedtuple("LookedUp", fields)(**fields)
