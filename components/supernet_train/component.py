"""supernet-train as a Kubeflow component."""

from kfp import dsl

from components.images import TRAINING


@dsl.component(base_image=TRAINING, install_kfp_package=False)
def supernet_train(
    config: str,
    store: str,
    run_id: str,
    gpus: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Train the weight-sharing supernet.

    Args:
        config: Run configuration as JSON.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer it does not begin.
        dataset: Tar of data-prep.
        supernet: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import run_step

    run_step(
        "supernet-train",
        config=config,
        target=None,
        store=store,
        run_id=run_id,
        gpus=gpus,
        inputs={"data-prep": dataset},
        output=supernet,
        metrics=metrics,
        report=report,
    )
