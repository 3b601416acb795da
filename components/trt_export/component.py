"""trt-export as a Kubeflow component."""

from kfp import dsl

from components.images import TARGET


@dsl.component(base_image=TARGET, install_kfp_package=False)
def trt_export(
    config: str,
    target: str,
    store: str,
    run_id: str,
    gpus: str,
    found: str,
    dataset: dsl.Input[dsl.Dataset],
    probe: dsl.Input[dsl.Artifact],
    candidates: dsl.Input[dsl.Artifact],
    tuned: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Export, measure and score the tuned candidates; ship the best that keeps the limits.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer it does not begin.
        found: Key of the result, where this step has room to read it only; empty where it computes it.
        dataset: Tar of data-prep.
        probe: Tar of hw-probe for this target.
        candidates: Tar of search.
        tuned: Tar of qat-finetune.
        exported: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import run_step

    run_step(
        "trt-export",
        config=config,
        target=target,
        store=store,
        run_id=run_id,
        gpus=gpus,
        found=found,
        inputs={
            "data-prep": dataset,
            "hw-probe": probe,
            "search": candidates,
            "qat-finetune": tuned,
        },
        output=exported,
        metrics=metrics,
        report=report,
    )
