"""data-prep as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def data_prep(
    config: str,
    store: str,
    run_id: str,
    dataset: dsl.Output[dsl.Dataset],
) -> None:
    """Check a dataset and cut it into train, search and val.

    Args:
        config: Run configuration as JSON.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        dataset: Tar of the result, its SHA-256 in the metadata.
    """
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    outcome = run_stage(
        "data-prep",
        config=config,
        target=None,
        inputs={},
        output=Path(dataset.path),
        store=store,
        run_id=run_id,
    )
    dataset.metadata["sha256"] = outcome.digest
