"""verdict as a Kubeflow component."""

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def verdict(store: str, run_id: str, job_id: str) -> None:
    """Fail where no target has a model, as the last step before the run is closed and reported.

    It stands before close-run, because Argo Workflows 4.0.5 leaves out a task after an exit task where a step failed,
    and takes the run for a success then. A retraining that found nothing new has no targets, and nothing to fail for.

    Args:
        store: The stage store.
        run_id: Name of the run, where not empty.
        job_id: Name of the run otherwise: Kubeflow's own.
    """
    from yolov8_nas.errors import StageError
    from yolov8_nas.run.lifecycle import verdict

    try:
        verdict(store=store, run_id=run_id or job_id)
    except StageError as error:
        raise SystemExit(str(error)) from None
