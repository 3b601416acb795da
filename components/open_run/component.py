"""open-run as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def open_run(
    config: str,
    targets: list[str],
    store: str,
    run_id: str,
    run: dsl.Output[dsl.Artifact],
) -> None:
    """Check what can be checked before anything is paid for, and open the run in MLflow.

    Args:
        config: Run configuration as JSON.
        targets: Labels of the targets.
        store: The stage store.
        run_id: Name of the run.
        run: JSON: what later tasks need to know of the run.
    """
    from pathlib import Path

    from yolov8_nas.lifecycle import open_run

    open_run(config, targets=targets, store=store, run_id=run_id, output=Path(run.path))
