"""register as a Kubeflow component."""

from kfp import dsl

from components.images import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    config: str,
    target: str,
    store: str,
    run_id: str,
    run: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    supernet: dsl.Input[dsl.Model],
    probe: dsl.Input[dsl.Artifact],
    candidates: dsl.Input[dsl.Artifact],
    tuned: dsl.Input[dsl.Model],
    exported: dsl.Input[dsl.Model],
    registered: dsl.Output[dsl.Artifact],
) -> None:
    """Register what ships, with everything that led to it.

    Args:
        config: Run configuration as JSON.
        target: Label of the target.
        store: The stage store.
        run_id: Name of the run in whose records the outcome is written.
        run: What open-run found out.
        dataset: Tar of data-prep.
        supernet: Tar of supernet-train.
        probe: Tar of hw-probe for this target.
        candidates: Tar of search.
        tuned: Tar of qat-finetune.
        exported: Tar of trt-export.
        registered: Tar of the result, its SHA-256 in the metadata.
    """
    import json
    from pathlib import Path

    from yolov8_nas.stages.stage import run_stage

    artifacts = {
        "data-prep": dataset,
        "supernet-train": supernet,
        "hw-probe": probe,
        "search": candidates,
        "qat-finetune": tuned,
        "trt-export": exported,
    }
    opened = json.loads(Path(run.path).read_text())
    outcome = run_stage(
        "register",
        config=config,
        target=target,
        inputs={name: Path(artifact.path) for name, artifact in artifacts.items()},
        digests={name: artifact.metadata["sha256"] for name, artifact in artifacts.items()},
        parameters={
            "run_id": run_id,
            "label": target,
            "mlflow_run": opened["mlflow_run"],
            "tracking_uri": opened["tracking_uri"],
        },
        output=Path(registered.path),
        store=store,
        run_id=run_id,
    )
    registered.metadata["sha256"] = outcome.digest
