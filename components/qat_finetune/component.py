"""qat-finetune as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def qat_finetune(
    config: str,
    target: str,
    store: str,
    run_id: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
    candidates: dsl.Input[dsl.Artifact],
    tuned: dsl.Output[dsl.Model],
) -> None:
    """Fine-tune the candidates, train with quantization, train the stock baseline.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
        candidates: Tar of search.
        tuned: Tar of the result, its SHA-256 in the metadata.
    """
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    artifacts = {"data-prep": dataset, "supernet-train": supernet, "search": candidates}
    outcome = run_stage(
        "qat-finetune",
        config=config,
        target=target,
        inputs={name: Path(artifact.path) for name, artifact in artifacts.items()},
        digests={name: artifact.metadata["sha256"] for name, artifact in artifacts.items()},
        output=Path(tuned.path),
        store=store,
        run_id=run_id,
    )
    tuned.metadata["sha256"] = outcome.digest
