"""register as a Kubeflow component."""

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def register(
    config: str,
    target: str,
    store: str,
    run_id: str,
    run: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
    probe: dsl.Input[dsl.Artifact],
    candidates: dsl.Input[dsl.Artifact],
    tuned: dsl.Input[dsl.Model],
    exported: dsl.Input[dsl.Model],
    registered: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Register what ships, with everything that led to it.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        run: What open-run found out.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
        probe: Tar of hw-probe for this target.
        candidates: Tar of search.
        tuned: Tar of qat-finetune.
        exported: Tar of trt-export.
        registered: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import opened, run_step

    known = opened(run)
    run_step(
        "register",
        config=config,
        target=target,
        store=store,
        run_id=run_id,
        inputs={
            "data-prep": dataset,
            "supernet-train": supernet,
            "hw-probe": probe,
            "search": candidates,
            "qat-finetune": tuned,
            "trt-export": exported,
        },
        parameters={
            "run_id": run_id,
            "label": target,
            "mlflow_run": known["mlflow_run"],
            "tracking_uri": known["tracking_uri"],
        },
        output=registered,
        metrics=metrics,
        report=report,
    )
