"""open-run as a Kubeflow component."""

from typing import Any, NamedTuple

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def open_run(
    config: str,
    data: str,
    targets: list[Any],
    constraints: list[Any],
    precision: str,
    budget: float,
    target_pools: dict[str, Any],
    tolerations: list[Any],
    training_nodes: str,
    training_gpus: str,
    training_cpu: str,
    training_memory: str,
    training_labels: dict[str, Any],
    store: str,
    run_id: str,
    job_id: str,
    run: dsl.Output[dsl.Artifact],
) -> NamedTuple(  # type: ignore[valid-type]
    "Opened",
    [
        ("settings", str),
        ("branches", list),
        ("probes", list),
        ("name", str),
        ("work", str),
        ("supernet_gpus", str),
        ("training_gpus", str),
        ("training_cpu", str),
        ("training_memory", str),
    ],
):
    """Put together what is asked for, check what can be checked before anything is paid for, open the run in MLflow.

    Args:
        config: Run configuration as YAML or JSON; the demo's where it is empty.
        data: Dataset instead of the configuration's, where not empty.
        targets: Targets instead of the configuration's, where not empty.
        constraints: Limits for every target, where not empty.
        precision: Precision for every target, where not empty.
        budget: Factor on epochs and generations.
        target_pools: What is special about the nodes of a target, by hardware.
        tolerations: Taints of GPU nodes.
        training_nodes: Nodes that the supernet is trained on.
        training_gpus: GPUs of each; empty for one where a target is a GPU, and none otherwise.
        training_cpu: Cores of a training step; empty for what suits these GPUs.
        training_memory: Memory of a training step; empty for what suits these GPUs.
        training_labels: Labels of the nodes that train.
        store: The stage store.
        run_id: Name of the run, where not empty.
        job_id: Name of the run otherwise: Kubeflow's own.
        run: JSON: what later tasks need to know of the run.

    Returns:
        settings: The whole run configuration as JSON; for a retraining, that of the run which it comes to.
        branches: Where each target's steps run: `label`, `gpus`, `cpu`, `memory`, `node_affinity`,
            `tolerations`.
        probes: The same of the step that measures it, which is given any node where it only reads, and `found`, the
            key of what it reads.
        name: Name of the run.
        work: `all`; for a retraining `retrain`, or `none` where nothing is new.
        supernet_gpus: GPUs of the step that trains the supernet: none where a TrainJob has them.
        training_gpus: GPUs of a training.
        training_cpu: Its cores.
        training_memory: Its memory.
    """
    import json
    from collections import namedtuple
    from pathlib import Path

    from components.asked import check
    from components.placement import trained_by
    from yolov8_nas.config import RunConfig
    from yolov8_nas.files import file_sha256
    from yolov8_nas.run.found import probe_keys
    from yolov8_nas.run.lifecycle import open_run, requested, telling
    from yolov8_nas.runner.stage import open_store

    Opened = namedtuple(
        "Opened", "settings branches probes name work supernet_gpus training_gpus training_cpu training_memory"
    )
    name = run_id or job_id
    with telling("open-run", store=store, run_id=name):
        asked = requested(
            config, data=data, targets=targets, constraints=constraints, precision=precision, budget=budget
        )
        places = check(
            asked,
            store=store,
            target_pools=target_pools,
            tolerations=tolerations,
            nodes=training_nodes,
            gpus=training_gpus,
            cpu=training_cpu,
            memory=training_memory,
            labels=training_labels,
        )
        placed = [branch.plain() for branch in places.branches]
        trains = places.training
        print(f"settings: {asked.to_json()}\nbranches: {json.dumps(placed)}\ntraining: {trains}", flush=True)
        opened = open_run(asked, store=store, run_id=name, output=Path(run.path))
        run.metadata["sha256"] = file_sha256(Path(run.path))
        settled = RunConfig.parse(opened["config"], "run configuration")
        trained = trained_by(settled, trains.nodes, int(trains.gpus))
        found = probe_keys(settled, opened["num_classes"], open_store(store), trained)
        probes = [branch.plain(found.get(branch.label, "")) for branch in places.branches]
    work = "all"
    if retraining := opened["retraining"]:
        print(retraining["says"], flush=True)
        work = "retrain" if retraining["new"] else "none"
    settings = json.dumps(opened["config"], sort_keys=True)
    return Opened(settings, placed, probes, name, work, trains.supernet_gpus, trains.gpus, trains.cpu, trains.memory)
