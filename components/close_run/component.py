"""close-run as a Kubeflow component."""

from kfp import dsl

from components.images import CPU


@dsl.component(base_image=CPU, install_kfp_package=False)
def close_run(
    store: str,
    run_id: str,
    job_id: str,
    workdir: str,
    summary: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    verdict: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Write summary and report of a run, however it ended, close it in MLflow, and say which targets have a model.

    It does not fail where none has one, because Kubeflow uploads nothing of a failed step; the step `verdict` does. How
    the run went it reads from the records of its stages: the state that Kubeflow would tell is RUNNING in most endings,
    and its error message empty.

    Args:
        store: The stage store.
        run_id: Name of the run, where not empty.
        job_id: Name of the run otherwise: Kubeflow's own.
        workdir: Folder for summary.json, report.html and the models; empty for none beside the artifacts.
        summary: summary.json.
        report: report.html.
        verdict: The targets, each with its model or why it has none.
        metrics: Figures of the targets.
    """
    from pathlib import Path

    from yolov8_nas.report.step import tell_run
    from yolov8_nas.run.lifecycle import close_run, telling

    with telling("close-run", store=store, run_id=run_id or job_id):
        closed = close_run(
            store=store,
            run_id=run_id or job_id,
            workdir=Path(workdir) if workdir else None,
            summary_file=Path(summary.path),
            report_file=Path(report.path),
        )
    told = tell_run(closed)
    for name, value in told.figures.items():
        metrics.log_metric(name, value)
    Path(verdict.path).write_text(told.markdown)
    print(told.markdown, flush=True)
