"""search as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def search(
    config: str,
    target: str,
    store: str,
    run_id: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
    probe: dsl.Input[dsl.Artifact],
    candidates: dsl.Output[dsl.Artifact],
) -> None:
    """Search the target's best networks within its limits.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
        probe: Tar of hw-probe for this target.
        candidates: Tar of the result, its SHA-256 in the metadata.
    """
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    artifacts = {"data-prep": dataset, "supernet-train": supernet, "hw-probe": probe}
    outcome = run_stage(
        "search",
        config=config,
        target=target,
        inputs={name: Path(artifact.path) for name, artifact in artifacts.items()},
        digests={name: artifact.metadata["sha256"] for name, artifact in artifacts.items()},
        output=Path(candidates.path),
        store=store,
        run_id=run_id,
    )
    candidates.metadata["sha256"] = outcome.digest
