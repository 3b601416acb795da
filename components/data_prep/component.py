"""data-prep as a Kubeflow component."""

from typing import Any, NamedTuple

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def data_prep(
    config: str,
    store: str,
    run_id: str,
    nodes: str,
    node_gpus: str,
    supernet_gpus: str,
    training_cpu: str,
    training_memory: str,
    training_labels: dict[str, Any],
    training_tolerations: list[Any],
    dataset: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> NamedTuple(  # type: ignore[valid-type]
    "Prepared",
    [
        ("supernet_found", str),
        ("supernet_gpus", str),
        ("supernet_cpu", str),
        ("supernet_memory", str),
        ("supernet_labels", dict),
        ("supernet_tolerations", list),
    ],
):
    """Check a dataset and cut it into train, search and val; give the step after it its nodes.

    Args:
        config: Run configuration as JSON.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        nodes: Nodes that the supernet is trained on.
        node_gpus: GPUs of each of them.
        supernet_gpus: GPUs of the step that trains the supernet.
        training_cpu: Its cores.
        training_memory: Its memory.
        training_labels: Labels of its nodes.
        training_tolerations: Taints of these nodes.
        dataset: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.

    Returns:
        supernet_found: Key of the supernet, where it is in the store; empty where it is to be trained.
        supernet_gpus: GPUs of the step that trains it, or reads it from any node.
        supernet_cpu: Its cores.
        supernet_memory: Its memory.
        supernet_labels: Labels of its nodes.
        supernet_tolerations: Taints of these nodes.
    """
    import json
    from collections import namedtuple

    from components.placement import Pod, trained_by
    from components.step import run_step
    from yolov8_nas.config import RunConfig
    from yolov8_nas.run.found import stage_key
    from yolov8_nas.runner.stage import open_store

    run_step(
        "data-prep",
        config=config,
        target=None,
        store=store,
        run_id=run_id,
        output=dataset,
        metrics=metrics,
        report=report,
    )
    asked = trained_by(RunConfig.parse(json.loads(config), "run configuration"), int(nodes), int(node_gpus))
    found = stage_key("supernet-train", asked, {"data-prep": dataset.metadata["sha256"]}, open_store(store))
    pod = Pod(supernet_gpus, training_cpu, training_memory, training_labels, training_tolerations)
    fields = pod.outputs("supernet", "labels", found[0] if found else "")
    return namedtuple("Prepared", fields)(**fields)
