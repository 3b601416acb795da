"""From a dataset to registered detectors, one per target, as a Kubeflow pipeline.

    open-run --+-- data-prep -- supernet-train --+
               |                                 +-- per target: look-up, search, qat-finetune, trt-export, register
               +-- per target: hw-probe ---------+
    and before trt-export, for a compiler that needs no device, build-ahead on a CPU node
    verdict, which fails where no target has a model
    close-run, however it ends

A retraining goes the same way, from the champion's supernet on, with a last step in each branch: the promotion gate.
Where the dataset is not a new one, it goes from open-run to close-run.

A loop's results cannot be picked up by another loop's iterations: hw-probe measures the device while the supernet
trains, and look-up, which begins when both have ended, finds the result in the stage store.

A step that finds its result in the store needs no device to read it. Whoever stands before it looks (`run.found`), and
gives it its pod: open-run that of hw-probe, data-prep that of supernet-train, look-up those of a branch.

Why pipelines are nested in pipelines:

* What a person fills in becomes the settings of a run in open-run, and the loops go over what it found. An output
  *parameter* taken directly into a loop silently becomes the loop's item in kfp.local 2.17; as the input of a pipeline
  that has the loop in it, it arrives.
* The nodes that a step runs on are chosen by parameters. kfp 2.17 compiles these right where the step stands directly
  in a pipeline that has them as its own inputs, or beside the step whose outputs they are. In a loop it refers to an
  input that is not there (`targets-loop-item-subvar-node_affinity`), and nothing notices before the pod is made.
* `dsl.If` directly in a loop, or on a task's output within an exit handler, is silently false in kfp.local 2.17.
* A step can come after a pipeline, but not after a loop beside it.
"""

from collections.abc import Mapping
from typing import Any, Final

from kfp import dsl

from components.build_ahead.component import build_ahead
from components.close_run.component import close_run
from components.data_prep.component import data_prep
from components.hw_probe.component import hw_probe
from components.look_up.component import look_up
from components.open_run.component import open_run
from components.promote.component import promote
from components.qat_finetune.component import qat_finetune
from components.register.component import register
from components.search.component import search
from components.supernet_train.component import supernet_train
from components.trt_export.component import trt_export
from components.verdict.component import verdict
from pipelines.pods import GPU_TOLERATION, STORE, Light, Placed, light, makes_train_jobs, placed, reads_data

PROBES: Final = "Measure the devices"
"""What people call the part that measures them."""

VERDICT: Final = "Give the verdict"
"""What people call the step that fails where nothing came of the run."""

REPORT: Final = "Write the report"
"""What people call the last step of a run."""

_LONGEST_RUN: Final = 60 * 24 * 3600
"""Seconds after which a run is ended, whatever its steps wait for: their own limits count from the start of a pod."""

_SHORT: Final = Light(cpu="1", memory="4Gi", hours=2)
_DATA: Final = Light(cpu="4", memory="8Gi", hours=12, memory_request="2Gi")


def _trains(task: dsl.PipelineTask, name: str, where: Placed, hours: int) -> dsl.PipelineTask:
    return placed(task, name, where, hours=hours, priority="yolov8-nas-training")


def _measures(task: dsl.PipelineTask, name: str, where: Placed) -> dsl.PipelineTask:
    # It may have to wait for trainings on its node, which count as well.
    return placed(task, name, where, hours=21 * 24, priority="yolov8-nas-target")


def _uncached(task: dsl.PipelineTask, name: str) -> dsl.PipelineTask:
    return task.set_caching_options(False).set_display_name(name)


def _found(step: str, outputs: Mapping[str, Any], nodes: str) -> Placed:
    """The pod that whoever stands before a step has given it; `nodes` is `labels` or `affinity`."""
    return Placed(
        outputs[f"{step}_gpus"],
        outputs[f"{step}_cpu"],
        outputs[f"{step}_memory"],
        outputs[f"{step}_tolerations"],
        **{f"node_{nodes}": outputs[f"{step}_{nodes}"]},
    )


@dsl.pipeline(name="probe-target", description="Measure one device while the supernet trains")
def probe_target(
    config: str,
    target: str,
    store: str,
    run_id: str,
    found: str,
    target_gpus: str,
    target_cpu: str,
    target_memory: str,
    target_affinity: dict[str, Any],
    target_tolerations: list[Any],
    run: dsl.Input[dsl.Artifact],
) -> None:
    """Probe one target.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run.
        found: Key of the result, where it is only read.
        target_gpus: GPUs of the step.
        target_cpu: Its cores.
        target_memory: Its memory.
        target_affinity: Its nodes.
        target_tolerations: Taints of these nodes.
        run: What open-run found out.
    """
    probe = hw_probe(config=config, target=target, store=store, run_id=run_id, gpus=target_gpus, found=found, run=run)
    pod = Placed(target_gpus, target_cpu, target_memory, target_tolerations, node_affinity=target_affinity)
    _measures(probe, "Measure the device", pod)


@dsl.pipeline(name="probe-all-targets", description="Measure the devices")
def probe_all_targets(
    config: str,
    probes: list,  # type: ignore[type-arg]  # kfp takes an item's parts to be of its type, and knows no Any
    store: str,
    run_id: str,
    run: dsl.Input[dsl.Artifact],
) -> None:
    """Probe the targets.

    Args:
        config: Run configuration as JSON.
        probes: Where the device of each target is measured, from open-run.
        store: The stage store.
        run_id: Name of the run.
        run: What open-run found out.
    """
    with dsl.ParallelFor(probes, name="probes") as probe:
        early = probe_target(
            config=config,
            target=probe.label,
            store=store,
            run_id=run_id,
            found=probe.found,
            target_gpus=probe.gpus,
            target_cpu=probe.cpu,
            target_memory=probe.memory,
            target_affinity=probe.node_affinity,
            target_tolerations=probe.tolerations,
            run=run,
        )
        _uncached(early, "Measure early")


@dsl.pipeline(name="promotion", description="One target: the promotion gate of a retraining")
def promotion(
    target: str,
    store: str,
    run_id: str,
    target_gpus: str,
    target_cpu: str,
    target_memory: str,
    target_affinity: dict[str, Any],
    target_tolerations: list[Any],
    run: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    registered: dsl.Input[dsl.Artifact],
) -> None:
    """Put what a branch has registered before the gate.

    Args:
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run.
        target_gpus: GPUs of the target's steps.
        target_cpu: Their cores.
        target_memory: Their memory.
        target_affinity: Their nodes.
        target_tolerations: Taints of these nodes.
        run: What open-run found out.
        dataset: Tar of data-prep.
        registered: Tar of register.
    """
    pod = Placed(target_gpus, target_cpu, target_memory, target_tolerations, node_affinity=target_affinity)
    common = {"target": target, "store": store, "run_id": run_id, "gpus": target_gpus}
    gate = promote(**common, run=run, dataset=dataset, registered=registered)
    _measures(gate, "Promotion gate", pod)


@dsl.pipeline(name="target-branch", description="One target: from the supernet to a registered detector")
def target_branch(
    config: str,
    target: str,
    store: str,
    run_id: str,
    work: str,
    target_gpus: str,
    target_cpu: str,
    target_memory: str,
    target_affinity: dict[str, Any],
    target_tolerations: list[Any],
    training_gpus: str,
    training_cpu: str,
    training_memory: str,
    training_labels: dict[str, Any],
    training_tolerations: list[Any],
    run: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
) -> None:
    """Search, tune, export and register for one target.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run.
        work: `retrain` for a retraining.
        target_gpus: GPUs of the target's steps.
        target_cpu: Their cores.
        target_memory: Their memory.
        target_affinity: Their nodes.
        target_tolerations: Taints of these nodes.
        training_gpus: GPUs of a training.
        training_cpu: Its cores.
        training_memory: Its memory.
        training_labels: Labels of its nodes.
        training_tolerations: Taints of these nodes.
        run: What open-run found out.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
    """
    common = {"config": config, "target": target, "store": store, "run_id": run_id}
    looked = look_up(
        **common,
        gpus=target_gpus,
        cpu=target_cpu,
        memory=target_memory,
        node_affinity=target_affinity,
        tolerations=target_tolerations,
        training_gpus=training_gpus,
        training_cpu=training_cpu,
        training_memory=training_memory,
        training_labels=training_labels,
        training_tolerations=training_tolerations,
    )
    there = light(looked, "Look up what is there", _SHORT).outputs
    probe = there["probe"]
    pod = _found("search", there, "affinity")
    searching = search(
        **common, gpus=pod.gpus, found=there["search_found"], dataset=dataset, supernet=supernet, probe=probe
    )
    candidates = _measures(searching, "Search networks", pod).outputs["candidates"]
    pod = _found("tuning", there, "labels")
    tuning = qat_finetune(
        **common, gpus=pod.gpus, found=there["tuning_found"], dataset=dataset, supernet=supernet, candidates=candidates
    )
    tuned = _trains(tuning, "Fine-tune and quantize", pod, hours=7 * 24).outputs["tuned"]
    # It leaves engines in the store, where the export finds them, and has nothing to do for most runtimes. It is no
    # condition: what comes after one that is false has been seen to begin in kfp.local only, and in no cluster.
    built = light(build_ahead(**common, probe=probe, tuned=tuned), "Build engines ahead", _DATA)
    pod = _found("export", there, "affinity")
    exporting = trt_export(
        **common,
        gpus=pod.gpus,
        found=there["export_found"],
        dataset=dataset,
        probe=probe,
        candidates=candidates,
        tuned=tuned,
    ).after(built)
    exported = _measures(exporting, "Export and verify", pod).outputs["exported"]
    registered = light(
        register(
            **common,
            run=run,
            dataset=dataset,
            supernet=supernet,
            probe=probe,
            candidates=candidates,
            tuned=tuned,
            exported=exported,
        ),
        "Register the model",
        _SHORT,
    ).outputs["registered"]
    with dsl.If(work == "retrain", name="A retraining"):
        _uncached(
            promotion(
                target=target,
                store=store,
                run_id=run_id,
                target_gpus=target_gpus,
                target_cpu=target_cpu,
                target_memory=target_memory,
                target_affinity=target_affinity,
                target_tolerations=target_tolerations,
                run=run,
                dataset=dataset,
                registered=registered,
            ),
            "Hand over",
        )


@dsl.pipeline(name="all-targets", description="Dataset and supernet once, then a branch for each target")
def all_targets(
    config: str,
    branches: list,  # type: ignore[type-arg]
    probes: list,  # type: ignore[type-arg]
    store: str,
    run_id: str,
    work: str,
    supernet_gpus: str,
    training_nodes: str,
    training_gpus: str,
    training_cpu: str,
    training_memory: str,
    training_labels: dict[str, Any],
    training_tolerations: list[Any],
    run: dsl.Input[dsl.Artifact],
) -> None:
    """Everything between opening and closing a run.

    Args:
        config: Run configuration as JSON.
        branches: Where the steps of each target run, from open-run.
        probes: Where the device of each is measured, from open-run.
        store: The stage store.
        run_id: Name of the run.
        work: `retrain` for a retraining.
        supernet_gpus: GPUs of the step that trains the supernet.
        training_nodes: Nodes that the supernet is trained on.
        training_gpus: GPUs of a training.
        training_cpu: Its cores.
        training_memory: Its memory.
        training_labels: Labels of its nodes.
        training_tolerations: Taints of these nodes.
        run: What open-run found out.
    """
    common = {"config": config, "store": store, "run_id": run_id}
    training = {
        "training_cpu": training_cpu,
        "training_memory": training_memory,
        "training_labels": training_labels,
        "training_tolerations": training_tolerations,
    }
    over = {"nodes": training_nodes, "node_gpus": training_gpus}
    probed = _uncached(probe_all_targets(**common, probes=probes, run=run), PROBES)
    preparing = data_prep(**common, **over, **training, supernet_gpus=supernet_gpus)
    prepared = reads_data(light(preparing, "Prepare the dataset", _DATA)).outputs
    dataset = prepared["dataset"]
    pod = _found("supernet", prepared, "labels")
    trained = supernet_train(**common, **over, gpus=pod.gpus, found=prepared["supernet_found"], dataset=dataset)
    makes_train_jobs(reads_data(_trains(trained, "Train the supernet", pod, hours=14 * 24)))
    with dsl.ParallelFor(branches, name="targets") as branch:
        one = target_branch(
            **common,
            **training,
            target=branch.label,
            work=work,
            target_gpus=branch.gpus,
            target_cpu=branch.cpu,
            target_memory=branch.memory,
            target_affinity=branch.node_affinity,
            target_tolerations=branch.tolerations,
            training_gpus=training_gpus,
            run=run,
            dataset=dataset,
            supernet=trained.outputs["supernet"],
        )
        _uncached(one, "One target").after(probed)


@dsl.pipeline(name="if-anything-is-new", description="Nothing more, for a retraining without a new dataset")
def if_anything_is_new(
    config: str,
    branches: list,  # type: ignore[type-arg]
    probes: list,  # type: ignore[type-arg]
    store: str,
    run_id: str,
    work: str,
    supernet_gpus: str,
    training_nodes: str,
    training_gpus: str,
    training_cpu: str,
    training_memory: str,
    training_labels: dict[str, Any],
    training_tolerations: list[Any],
    run: dsl.Input[dsl.Artifact],
) -> None:
    """`all_targets`, unless there is no work.

    Args:
        config: Run configuration as JSON.
        branches: Where the steps of each target run, from open-run.
        probes: Where the device of each is measured, from open-run.
        store: The stage store.
        run_id: Name of the run.
        work: `none` where there is nothing to do.
        supernet_gpus: GPUs of the step that trains the supernet.
        training_nodes: Nodes that the supernet is trained on.
        training_gpus: GPUs of a training.
        training_cpu: Its cores.
        training_memory: Its memory.
        training_labels: Labels of its nodes.
        training_tolerations: Taints of these nodes.
        run: What open-run found out.
    """
    with dsl.If(work != "none", name="There is work"):
        _uncached(
            all_targets(
                config=config,
                branches=branches,
                probes=probes,
                store=store,
                run_id=run_id,
                work=work,
                supernet_gpus=supernet_gpus,
                training_nodes=training_nodes,
                training_gpus=training_gpus,
                training_cpu=training_cpu,
                training_memory=training_memory,
                training_labels=training_labels,
                training_tolerations=training_tolerations,
                run=run,
            ),
            "Dataset, supernet, targets",
        )


@dsl.pipeline(
    name="yolov8-nas",
    description="Hardware-aware architecture search for YOLOv8-style detectors",
    pipeline_config=dsl.PipelineConfig(active_deadline_seconds=_LONGEST_RUN),
)
def yolov8_nas(
    config: str = "",
    data: str = "",
    targets: list[Any] = [],  # noqa: B006 - kfp wants the value itself
    constraints: list[Any] = [],  # noqa: B006
    precision: str = "",
    budget: float = 1.0,
    store: str = STORE,
    training_nodes: str = "1",
    training_gpus: str = "",
    training_cpu: str = "",
    training_memory: str = "",
    training_labels: dict[str, Any] = {},  # noqa: B006
    target_pools: dict[str, Any] = {},  # noqa: B006
    tolerations: list[Any] = [GPU_TOLERATION],  # noqa: B006
    run_id: str = "",
    workdir: str = "",
) -> None:
    """The whole way of the data. Left as it is, it runs the demo on a CPU target.

    Args:
        config: Run configuration as YAML or JSON: the whole file. Empty for the demo's. What follows is laid over it.
        data: Dataset: a folder or archive under /store, s3:// or https://. Empty for the configuration's.
        targets: Devices to search for, by name (["NVIDIA_T4", "NVIDIA_A10"]) or in full ([{"hardware": "NVIDIA_T4",
            "runtime": "tensorrt", "precision": "int8", "constraints": ["latency<=2.5ms"]}]). Empty for the
            configuration's.
        constraints: Limits for every target, for example ["latency<=8ms", "memory<=1GiB"]. Empty for the
            configuration's.
        precision: fp32, fp16, int8 or best, for every target. Empty for the configuration's.
        budget: Factor on epochs and generations: 0.1 for a cheap trial.
        store: The stage store: what is there is not computed again.
        training_nodes: Nodes that the supernet is trained on. More than "1" take Kubeflow Trainer.
        training_gpus: GPUs of a training step, and of each of these nodes. Empty for one where a target is a GPU, and
            none otherwise.
        training_cpu: Cores of a training step. Empty for 7 with a GPU, 1 without.
        training_memory: Memory of a training step. Empty for 28Gi with a GPU, 4Gi without.
        training_labels: Labels of the nodes that train, for example {"nvidia.com/gpu.product": "NVIDIA-A10"}. Empty for
            any.
        target_pools: Nodes and resources of targets by hardware, where the defaults are not right, for example
            {"nvidia-t4": {"node_labels": {"pool": "t4"}, "cpu": "3", "memory": "12Gi"}}.
        tolerations: Taints that steps on GPU nodes tolerate, as Kubernetes writes them.
        run_id: Name of the run. Empty for Kubeflow's own.
        workdir: Folder for summary, report and models; empty for none beside the artifacts.
    """
    job: Final = dsl.PIPELINE_JOB_ID_PLACEHOLDER  # only in the place of a task's argument does Kubeflow fill it in
    end = close_run(store=store, run_id=run_id, job_id=job, workdir=workdir)
    with dsl.ExitHandler(light(end, REPORT, _SHORT), name="Search for all targets"):
        opened = open_run(
            config=config,
            data=data,
            targets=targets,
            constraints=constraints,
            precision=precision,
            budget=budget,
            target_pools=target_pools,
            tolerations=tolerations,
            training_nodes=training_nodes,
            training_gpus=training_gpus,
            training_cpu=training_cpu,
            training_memory=training_memory,
            training_labels=training_labels,
            store=store,
            run_id=run_id,
            job_id=job,
        )
        reads_data(light(opened, "Check and open the run", _DATA))  # a retraining's prepares the dataset
        everything = if_anything_is_new(
            config=opened.outputs["settings"],
            branches=opened.outputs["branches"],
            probes=opened.outputs["probes"],
            store=store,
            run_id=opened.outputs["name"],
            work=opened.outputs["work"],
            supernet_gpus=opened.outputs["supernet_gpus"],
            training_nodes=training_nodes,
            training_gpus=opened.outputs["training_gpus"],
            training_cpu=opened.outputs["training_cpu"],
            training_memory=opened.outputs["training_memory"],
            training_labels=training_labels,
            training_tolerations=tolerations,
            run=opened.outputs["run"],
        )
        _uncached(everything, "If anything is new")
        light(verdict(store=store, run_id=run_id, job_id=job), VERDICT, _SHORT).after(everything)
