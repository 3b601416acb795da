"""data-prep as a Kubeflow component."""

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def data_prep(
    config: str,
    store: str,
    run_id: str,
    dataset: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Check a dataset and cut it into train, search and val.

    Args:
        config: Run configuration as JSON.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        dataset: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import run_step

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
