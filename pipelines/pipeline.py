"""From a dataset to registered detectors, one per target, as a Kubeflow pipeline.

    open-run --+-- data-prep -- supernet-train --+
               |                                 +-- per target: hw-probe, search, qat-finetune, trt-export, register
               +-- per target: hw-probe ---------+
    close-run, however it ends

The probe stands in two loops, because a loop's results cannot be picked up by another loop's iterations: the first
one measures the device while the supernet trains, the second finds the result in the stage store and ends in a blink.

Two things are as they are because of kfp.local 2.17: the branch of a target is a nested pipeline, since `dsl.If`
directly inside a loop is silently false there; and what open-run found out travels as an artifact, since an output
*parameter* taken into a loop silently becomes the loop's item there.
"""

from typing import Final

from kfp import dsl

from components.close_run.component import close_run
from components.data_prep.component import data_prep
from components.hw_probe.component import hw_probe
from components.open_run.component import open_run
from components.qat_finetune.component import qat_finetune
from components.register.component import register
from components.search.component import search
from components.supernet_train.component import supernet_train
from components.trt_export.component import trt_export

PROBES: Final = "probes"
"""Name of the loop that measures the devices."""


def _no_cache(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """State lives in the stage store; a second cache beside it would only be another thing that can be stale."""
    return task.set_caching_options(False)


@dsl.pipeline(name="target-branch", description="One target: from the supernet to a registered detector")
def target_branch(
    config: str,
    target: str,
    store: str,
    run_id: str,
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
        run: What open-run found out.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
    """
    probe = _no_cache(hw_probe(config=config, target=target, store=store, run_id=run_id, run=run))
    found = _no_cache(
        search(
            config=config,
            target=target,
            store=store,
            run_id=run_id,
            dataset=dataset,
            supernet=supernet,
            probe=probe.outputs["probe"],
        )
    )
    tuned = _no_cache(
        qat_finetune(
            config=config,
            target=target,
            store=store,
            run_id=run_id,
            dataset=dataset,
            supernet=supernet,
            candidates=found.outputs["candidates"],
        )
    )
    exported = _no_cache(
        trt_export(
            config=config,
            target=target,
            store=store,
            run_id=run_id,
            dataset=dataset,
            probe=probe.outputs["probe"],
            candidates=found.outputs["candidates"],
            tuned=tuned.outputs["tuned"],
        )
    )
    _no_cache(
        register(
            config=config,
            target=target,
            store=store,
            run_id=run_id,
            run=run,
            dataset=dataset,
            supernet=supernet,
            probe=probe.outputs["probe"],
            candidates=found.outputs["candidates"],
            tuned=tuned.outputs["tuned"],
            exported=exported.outputs["exported"],
        )
    )


@dsl.pipeline(name="yolov8-nas", description="Hardware-aware architecture search for YOLOv8-style detectors")
def yolov8_nas(
    config: str,
    targets: list[str],
    store: str,
    run_id: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    workdir: str = "",
) -> None:
    """The whole way of the data.

    Args:
        config: Run configuration as JSON.
        targets: Labels of the targets, as `stages.stage.target_labels` makes them.
        store: The stage store.
        run_id: Name of the run; Kubeflow's own by default.
        workdir: Folder for summary, report and models; empty for none beside the artifacts.
    """
    end = close_run(config=config, targets=targets, store=store, run_id=run_id, workdir=workdir)
    with dsl.ExitHandler(_no_cache(end)):
        opened = _no_cache(open_run(config=config, targets=targets, store=store, run_id=run_id))
        data = _no_cache(data_prep(config=config, store=store, run_id=run_id).after(opened))
        with dsl.ParallelFor(targets, name=PROBES) as target:
            _no_cache(hw_probe(config=config, target=target, store=store, run_id=run_id, run=opened.outputs["run"]))
        trained = _no_cache(supernet_train(config=config, store=store, run_id=run_id, dataset=data.outputs["dataset"]))
        with dsl.ParallelFor(targets, name="targets") as target:
            _no_cache(
                target_branch(
                    config=config,
                    target=target,
                    store=store,
                    run_id=run_id,
                    run=opened.outputs["run"],
                    dataset=data.outputs["dataset"],
                    supernet=trained.outputs["supernet"],
                )
            )
