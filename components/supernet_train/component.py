"""supernet-train as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def supernet_train(
    config: str,
    store: str,
    run_id: str,
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Output[dsl.Model],
) -> None:
    """Train the weight-sharing supernet.

    Args:
        config: Run configuration as JSON.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        dataset: Tar of data-prep.
        supernet: Tar of the result, its SHA-256 in the metadata.
    """
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    artifacts = {"data-prep": dataset}
    outcome = run_stage(
        "supernet-train",
        config=config,
        target=None,
        inputs={name: Path(artifact.path) for name, artifact in artifacts.items()},
        digests={name: artifact.metadata["sha256"] for name, artifact in artifacts.items()},
        output=Path(supernet.path),
        store=store,
        run_id=run_id,
    )
    supernet.metadata["sha256"] = outcome.digest
