"""close-run as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def close_run(
    config: str,
    targets: list[str],
    store: str,
    run_id: str,
    workdir: str,
    summary: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Write summary and report of a run, however it ended, and close it in MLflow.

    Args:
        config: Run configuration as JSON.
        targets: Labels of the targets.
        store: The stage store.
        run_id: Name of the run.
        workdir: Folder for summary.json, report.html and the models; empty for none beside the artifacts.
        summary: summary.json.
        report: report.html.
        status: How the pipeline ended, from Kubeflow.
    """
    from pathlib import Path

    from yolov8_nas.lifecycle import close_run

    close_run(
        config,
        targets=targets,
        store=store,
        run_id=run_id,
        workdir=Path(workdir) if workdir else None,
        summary_file=Path(summary.path),
        report_file=Path(report.path),
        pipeline_error=status.error_message if status.state == "FAILED" else None,
    )
