"""The part of trt-export that needs no device, as a Kubeflow component."""

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def build_ahead(
    config: str,
    target: str,
    store: str,
    run_id: str,
    probe: dsl.Input[dsl.Artifact],
    tuned: dsl.Input[dsl.Model],
    built: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Build the engines of a target's tuned networks where no device is, and leave them in the stage store.

    Where the target's runtime needs the device for that, or needs no engine, nothing is done.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        probe: Tar of hw-probe for this target.
        tuned: Tar of qat-finetune.
        built: Tar of what was built, or why nothing was, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    import json
    from pathlib import Path

    from components.step import run_step
    from yolov8_nas.config import RunConfig
    from yolov8_nas.runner.stage import find_target
    from yolov8_nas.stages.trt_export import AHEAD
    from yolov8_nas.stages.trt_export.settings import BUILT_AHEAD

    runtime = find_target(RunConfig.parse(json.loads(config), "run configuration"), target).runtime
    if runtime not in BUILT_AHEAD:
        for output in (built, report):
            Path(output.path).write_text(f"Nothing is built ahead of time for runtime {runtime}.\n")
        return
    run_step(
        AHEAD,
        config=config,
        target=target,
        store=store,
        run_id=run_id,
        inputs={"hw-probe": probe, "qat-finetune": tuned},
        output=built,
        metrics=metrics,
        report=report,
    )
