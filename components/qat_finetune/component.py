"""qat-finetune as a Kubeflow component."""

from kfp import dsl

from components.images import TRAINING


@dsl.component(base_image=TRAINING, install_kfp_package=False)
def qat_finetune(
    config: str,
    target: str,
    store: str,
    run_id: str,
    gpus: str,
    found: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
    candidates: dsl.Input[dsl.Artifact],
    tuned: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Fine-tune the candidates, train with quantization, train the stock baseline.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer it does not begin.
        found: Key of the result, where this step has room to read it only; empty where it computes it.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
        candidates: Tar of search.
        tuned: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import run_step

    run_step(
        "qat-finetune",
        config=config,
        target=target,
        store=store,
        run_id=run_id,
        gpus=gpus,
        found=found,
        inputs={"data-prep": dataset, "supernet-train": supernet, "search": candidates},
        output=tuned,
        metrics=metrics,
        report=report,
    )
