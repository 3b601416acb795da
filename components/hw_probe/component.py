"""hw-probe as a Kubeflow component."""

from kfp import dsl

from components.images import TARGET


@dsl.component(base_image=TARGET, install_kfp_package=False)
def hw_probe(
    config: str,
    target: str,
    store: str,
    run_id: str,
    gpus: str,
    found: str,
    run: dsl.Input[dsl.Artifact],
    probe: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Measure the target device and fit its latency model.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        gpus: GPUs that this step was promised; with fewer it does not begin.
        found: Key of the result, where this step has room to read it only; empty where it computes it.
        run: What open-run found out.
        probe: Tar of the result, its SHA-256 in the metadata.
        metrics: Figures of the result.
        report: A page on the result.
    """
    from components.step import opened, run_step

    known = opened(run)
    run_step(
        "hw-probe",
        config=config,
        target=target,
        store=store,
        run_id=run_id,
        gpus=gpus,
        found=found,
        parameters={"num_classes": known["num_classes"]},
        output=probe,
        metrics=metrics,
        report=report,
    )
