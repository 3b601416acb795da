"""trt-export as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def trt_export(
    config: str,
    target: str,
    store: str,
    run_id: str,
    dataset: dsl.Input[dsl.Dataset],
    probe: dsl.Input[dsl.Artifact],
    candidates: dsl.Input[dsl.Artifact],
    tuned: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
) -> None:
    """Export, measure and score the tuned candidates; ship the best that keeps the limits.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        dataset: Tar of data-prep.
        probe: Tar of hw-probe for this target.
        candidates: Tar of search.
        tuned: Tar of qat-finetune.
        exported: Tar of the result, its SHA-256 in the metadata.
    """
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    artifacts = {"data-prep": dataset, "hw-probe": probe, "search": candidates, "qat-finetune": tuned}
    outcome = run_stage(
        "trt-export",
        config=config,
        target=target,
        inputs={name: Path(artifact.path) for name, artifact in artifacts.items()},
        digests={name: artifact.metadata["sha256"] for name, artifact in artifacts.items()},
        output=Path(exported.path),
        store=store,
        run_id=run_id,
    )
    exported.metadata["sha256"] = outcome.digest
