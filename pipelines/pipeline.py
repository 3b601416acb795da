"""From a dataset to registered detectors, one per target, as a Kubeflow pipeline.

    open-run --+-- data-prep -- supernet-train --+
               |                                 +-- per target: hw-probe, search, qat-finetune, trt-export, register
               +-- per target: hw-probe ---------+
    and before trt-export, for a compiler that needs no device, build-ahead on a CPU node
    verdict, which fails where no target has a model
    close-run, however it ends

A retraining goes the same way, from the champion's supernet on, with a last step in each branch: the promotion gate.
Where the dataset is not a new one, it goes from open-run to close-run.

The probe stands in two loops, because a loop's results cannot be picked up by another loop's iterations: the first
one measures the device while the supernet trains, the second finds the result in the stage store and ends in a blink.

Why pipelines are nested in pipelines:

* What a person fills in becomes the settings of a run in open-run, and the loops go over what it found. An output
  *parameter* taken directly into a loop silently becomes the loop's item in kfp.local 2.17; as the input of a pipeline
  that has the loop in it, it arrives.
* The nodes that a step runs on are chosen by parameters. kfp 2.17 compiles these right where the step stands directly
  in a pipeline that has them as its own inputs. In a loop it refers to an input that is not there
  (`targets-loop-item-subvar-node_affinity`), which nothing notices before the pod is to be made.
* `dsl.If` directly in a loop, or on a task's output within an exit handler, is silently false in kfp.local 2.17.

hw-probe stands in two nested pipelines, and kfp 2.17 mixes up the pod settings of steps of one name when it merges
pipelines. Both take them from the same names (`_target_pod`), so there is nothing to mix up; a test holds this.
"""

from typing import Any, Final

from kfp import dsl

from components.build_ahead.component import build_ahead
from components.close_run.component import close_run
from components.data_prep.component import data_prep
from components.hw_probe.component import hw_probe
from components.open_run.component import open_run
from components.promote.component import promote
from components.qat_finetune.component import qat_finetune
from components.register.component import register
from components.search.component import search
from components.supernet_train.component import supernet_train
from components.trt_export.component import trt_export
from components.verdict.component import verdict
from pipelines.pods import GPU_TOLERATION, STORE, Light, Placed, light, makes_train_jobs, placed, reads_data

PROBES: Final = "probes"
"""Name of the loop that measures the devices."""

VERDICT: Final = "Give the verdict"
"""What people call the step that fails where nothing came of the run."""

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


def _target_pod(gpus: Any, cpu: Any, memory: Any, node_affinity: Any, tolerations: Any) -> Placed:
    return Placed(gpus, cpu, memory, tolerations, node_affinity=node_affinity)


def _training_pod(
    training_gpus: Any, training_cpu: Any, training_memory: Any, training_labels: Any, training_tolerations: Any
) -> Placed:
    return Placed(training_gpus, training_cpu, training_memory, training_tolerations, node_labels=training_labels)


@dsl.pipeline(name="probe-target", description="Measure one device while the supernet trains")
def probe_target(
    config: str,
    target: str,
    store: str,
    run_id: str,
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
        target_gpus: GPUs of the target's steps.
        target_cpu: Their cores.
        target_memory: Their memory.
        target_affinity: Their nodes.
        target_tolerations: Taints of these nodes.
        run: What open-run found out.
    """
    pod = _target_pod(target_gpus, target_cpu, target_memory, target_affinity, target_tolerations)
    probe = hw_probe(config=config, target=target, store=store, run_id=run_id, gpus=target_gpus, run=run)
    _measures(probe, "Measure the device", pod)


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
    pod = _target_pod(target_gpus, target_cpu, target_memory, target_affinity, target_tolerations)
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
    pod = _target_pod(target_gpus, target_cpu, target_memory, target_affinity, target_tolerations)
    common = {"config": config, "target": target, "store": store, "run_id": run_id}
    probe = _measures(hw_probe(**common, gpus=target_gpus, run=run), "Measure the device", pod).outputs["probe"]
    found = _measures(
        search(**common, gpus=target_gpus, dataset=dataset, supernet=supernet, probe=probe), "Search networks", pod
    )
    candidates = found.outputs["candidates"]
    tuned = _trains(
        qat_finetune(**common, gpus=training_gpus, dataset=dataset, supernet=supernet, candidates=candidates),
        "Fine-tune and quantize",
        _training_pod(training_gpus, training_cpu, training_memory, training_labels, training_tolerations),
        hours=7 * 24,
    ).outputs["tuned"]
    # It leaves engines in the store, where the export finds them, and has nothing to do for most runtimes. It is no
    # condition: what comes after one that is false has been seen to begin in kfp.local only, and in no cluster.
    built = light(build_ahead(**common, probe=probe, tuned=tuned), "Build engines ahead", _DATA)
    exporting = trt_export(
        **common, gpus=target_gpus, dataset=dataset, probe=probe, candidates=candidates, tuned=tuned
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
    branches: list,  # type: ignore[type-arg]  # kfp takes an item's parts to be of its type, and knows no Any
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
        "training_gpus": training_gpus,
        "training_cpu": training_cpu,
        "training_memory": training_memory,
        "training_labels": training_labels,
        "training_tolerations": training_tolerations,
    }

    def of(branch: Any) -> dict[str, Any]:
        return {
            **common,
            "target": branch.label,
            "target_gpus": branch.gpus,
            "target_cpu": branch.cpu,
            "target_memory": branch.memory,
            "target_affinity": branch.node_affinity,
            "target_tolerations": branch.tolerations,
            "run": run,
        }

    data = reads_data(light(data_prep(**common), "Prepare the dataset", _DATA))
    with dsl.ParallelFor(branches, name=PROBES) as branch:
        _uncached(probe_target(**of(branch)), "Measure early")
    trained = _trains(
        supernet_train(
            **common,
            gpus=supernet_gpus,
            nodes=training_nodes,
            node_gpus=training_gpus,
            dataset=data.outputs["dataset"],
        ),
        "Train the supernet",
        _training_pod(supernet_gpus, training_cpu, training_memory, training_labels, training_tolerations),
        hours=14 * 24,
    )
    makes_train_jobs(reads_data(trained))
    with dsl.ParallelFor(branches, name="targets") as branch:
        _uncached(
            target_branch(
                **of(branch),
                **training,
                work=work,
                dataset=data.outputs["dataset"],
                supernet=trained.outputs["supernet"],
            ),
            "One target",
        )


@dsl.pipeline(name="if-anything-is-new", description="Nothing more, for a retraining without a new dataset")
def if_anything_is_new(
    config: str,
    branches: list,  # type: ignore[type-arg]
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
    with dsl.ExitHandler(light(end, "Write the report", _SHORT), name="Search for all targets"):
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
