"""Register: the verified detector of one target becomes a version in the model registry, with its evidence.

Its effects lie in MLflow, outside the store, so it always runs; running it again changes nothing (see
`registry.register`). Beside the configuration it takes the run's own parameters, given to `run_stage`: `run_id`,
`tracking_uri` (as `tracking.resolve_uri` gave it), `mlflow_run` (as `tracking.open_run` gave it) and `label` (of the
target).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.space import Architecture
from yolov8_nas.stages.stage import Stage, StageContext
from yolov8_nas.store import file_sha256, read_json, tree_files, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from yolov8_nas.registry.register import Deployable


def settings(config: RunConfig, target: TargetConfig | None) -> dict[str, Any]:
    """What the registration depends on beside its inputs."""
    assert target is not None
    return {
        "model": config.name,
        "experiment": config.tracking.experiment,
        "space": config.space,
        "imgsz": config.imgsz,
        "seed": config.seed,
        "precision": target.precision,
        "constraints": list(target.constraints),
        "batch": target.batch,
    }


def run(ctx: StageContext) -> None:
    """Log the branch's evidence to a run of its own, register what it ships, and write `registry.json`."""
    from yolov8_nas.registry.register import register
    from yolov8_nas.registry.tracking import BRANCH_TAG, connect, find_or_create_run, without_credentials

    uri, label = ctx.settings["tracking_uri"], ctx.settings["label"]
    ctx.progress.update(0, 3, "opening the tracking store")
    client = connect(uri)
    mlflow_run = find_or_create_run(
        client,
        ctx.settings["experiment"],
        BRANCH_TAG,
        f"{ctx.settings['run_id']}/{label}",
        name=label,
        tags={"mlflow.parentRunId": ctx.settings["mlflow_run"]},
    )
    ctx.progress.update(1, 3, "logging curves and measurements")
    _log_evidence(client, mlflow_run, ctx)
    ctx.progress.update(2, 3, "registering the model")
    done = register(client, mlflow_run, _deployable(ctx))
    client.set_terminated(mlflow_run, "FINISHED")
    write_json(
        ctx.out / "registry.json", {**asdict(done), "run_id": mlflow_run, "tracking_uri": without_credentials(uri)}
    )
    standing = f" is {done.role}: {done.reason}" if done.role else ""
    ctx.progress.update(3, 3, f"{done.model} version {done.version}{standing}")


def _deployable(ctx: StageContext) -> Deployable:
    from yolov8_nas.registry.register import Deployable

    verdict = read_json(ctx.inputs["trt-export"] / "verdict.json")
    shipped = verdict["shipped"]
    profile = read_json(ctx.inputs["hw-probe"] / "profile.json")
    dataset = read_json(ctx.inputs["data-prep"] / "dataset.json")
    architecture = Architecture.from_dict(shipped["architecture"])
    described = ctx.out / "architecture.json"
    write_json(described, architecture.to_dict())
    runtime = profile["runtime"]
    comparison = verdict.get("comparison") or {}
    figures = {
        "map50_95": shipped["map50_95"],
        "map50": shipped["map50"],
        **{f"latency_{name}_ms": value for name, value in shipped["latency_ms"].items()},
        **{f"latency_with_nms_{name}_ms": value for name, value in (shipped.get("latency_with_nms_ms") or {}).items()},
        "memory_mb": shipped["memory_mb"],
        "energy_mj": shipped.get("energy_mj"),
        "power_w": shipped.get("power_w"),
        "params": shipped["params"],
        "gflops": shipped["gflops"],
        **{f"map50_95_against_stock_{key}": comparison.get(key) for key in ("difference", "low", "high")},
    }
    limits = tuple(ctx.settings["constraints"])
    return Deployable(
        name=ctx.settings["model"],
        files={**tree_files(ctx.inputs["trt-export"] / "model"), described.name: described},
        hardware_id=profile["id"],
        precision=shipped["precision"],
        limits=limits,
        scale=read_json(ctx.inputs["hw-probe"] / "stock.json")["scale"],
        resolved=shipped["constraints"],
        metrics={name: float(value) for name, value in figures.items() if value is not None},
        params={
            "architecture": described.read_text(),
            "classes": ", ".join(dataset["classes"]),
            "space": ctx.settings["space"],
            "imgsz": str(ctx.settings["imgsz"]),
            "batch": str(ctx.settings["batch"]),
            "seed": str(ctx.settings["seed"]),
            "precision_requested": ctx.settings["precision"],
        },
        tags={
            "hardware": profile["name"],
            "hardware_model": profile["model"],
            "runtime": runtime["name"],
            "runtime_version": runtime["version"],
            "dataset": dataset["digest"],
            "dataset_name": ctx.settings["model"],
            "architecture": architecture.digest,
            "supernet": file_sha256(ctx.inputs["supernet-train"] / "supernet.safetensors"),
            "imgsz": str(ctx.settings["imgsz"]),
            "run_id": ctx.settings["run_id"],
        },
        description=(
            f"{shipped['precision']}, {ctx.settings['imgsz']} px, on {profile['model']} with {runtime['name']} "
            f"{runtime['version']}: mAP50-95 {shipped['map50_95']:.3f}, p50 {shipped['latency_ms']['p50']:.3g} ms; "
            f"keeps {', '.join(limits)}"
        ),
    )


def _log_evidence(client: MlflowClient, mlflow_run: str, ctx: StageContext) -> None:
    """Curves as metrics by epoch; every stage's JSON files as artifacts, under the stage's name."""
    curves = read_json(ctx.inputs["supernet-train"] / "curves.json")
    _log_curves(client, ctx.settings["mlflow_run"], "supernet", curves)
    tuned = ctx.inputs["qat-finetune"]
    for file in sorted(tuned.rglob("tuning.json")):
        name = file.parent.relative_to(tuned).as_posix().replace("candidates/", "candidate_")
        tuning = read_json(file)
        _log_curves(client, mlflow_run, name, tuning["curves"])
        _log_curves(client, mlflow_run, f"{name}_int8", tuning.get("qat_curves", ()))
    for stage, folder in ctx.inputs.items():
        for name, file in tree_files(folder).items():
            if file.suffix in (".json", ".jsonl") and "dataset/" not in name:
                client.log_artifact(mlflow_run, str(file), f"{stage}/{name}".rpartition("/")[0])


def _log_curves(client: MlflowClient, mlflow_run: str, name: str, curves: Iterable[Mapping[str, Any]]) -> None:
    """Log each figure of each epoch; the time is the run's start, so that a repeated call adds nothing."""
    from mlflow.entities import Metric

    when = client.get_run(mlflow_run).info.start_time
    metrics = [
        Metric(f"{name}/{key}", float(value), when, int(row["epoch"]))
        for row in curves
        for key, value in row.items()
        if key != "epoch" and isinstance(value, int | float)
    ]
    for first in range(0, len(metrics), 1000):  # MLflow takes no more at once
        client.log_batch(mlflow_run, metrics=metrics[first : first + 1000])


STAGE = Stage(name="register", version=1, settings=settings, run=run, always_run=True)
