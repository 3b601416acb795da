"""search as a Kubeflow component."""

from kfp import dsl

from components.images import TARGET


@dsl.component(base_image=TARGET, install_kfp_package=False)
def search(
    config: str,
    target: str,
    store: str,
    run_id: str,
    gpus: str,
    found: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
    probe: dsl.Input[dsl.Artifact],
    candidates: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Search the target's best networks within its limits.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer it does not begin.
        found: Key of the result, where this step has room to read it only; empty where it computes it.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
        probe: Tar of hw-probe for this target.
        candidates: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import run_step

    run_step(
        "search",
        config=config,
        target=target,
        store=store,
        run_id=run_id,
        gpus=gpus,
        found=found,
        inputs={"data-prep": dataset, "supernet-train": supernet, "hw-probe": probe},
        output=candidates,
        metrics=metrics,
        report=report,
    )
