"""hw-probe as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def hw_probe(
    config: str,
    target: str,
    store: str,
    run_id: str,
    run: dsl.Input[dsl.Artifact],
    probe: dsl.Output[dsl.Artifact],
) -> None:
    """Measure the target device and fit its latency model.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        run: What open-run found out.
        probe: Tar of the result, its SHA-256 in the metadata.
    """
    import json
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    opened = json.loads(Path(run.path).read_text())
    outcome = run_stage(
        "hw-probe",
        config=config,
        target=target,
        inputs={},
        parameters={"num_classes": opened["num_classes"]},
        output=Path(probe.path),
        store=store,
        run_id=run_id,
    )
    probe.metadata["sha256"] = outcome.digest
