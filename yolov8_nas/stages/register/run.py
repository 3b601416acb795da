"""Register: the verified detector of one target becomes a version in the model registry, with its evidence.

Its effects lie in MLflow, outside the store, so it always runs; running it again changes nothing (see
`registry.register`). Where the tracking server can't be reached, that is no failure of the run, whose result is all
there: what was to be sent is kept in the store (see `registry.spool`), and the stage is done.

Beside the configuration it takes the run's own parameters, given to `run_stage`: `run_id`, `tracking_uri` (as
`tracking.resolve_uri` gave it), `mlflow_run` (as `tracking.open_run` gave it) and `label` (of the target).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from yolov8_nas.files import file_sha256, read_json, tree_files, write_json
from yolov8_nas.registry import spool
from yolov8_nas.registry.register import Deployable
from yolov8_nas.registry.submission import SUPERNET, Submission, submit
from yolov8_nas.registry.tracking import UnavailableError, connect, unavailable, without_credentials
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture
from yolov8_nas.stages.register.settings import RegisterSettings


def run(ctx: StageContext[RegisterSettings]) -> None:
    """Send the branch's evidence and what it ships, or keep it to be sent later, and write `registry.json`."""
    uri = ctx.settings.tracking_uri
    submission = _submission(ctx)
    entry: dict[str, Any]
    ctx.progress.update(0, 2, "opening the tracking store")
    _send_what_waits(ctx, uri)
    ctx.progress.update(1, 2, "logging measurements, registering the model")
    try:
        run, done = submit(connect(uri), submission)
    except Exception as error:
        if ctx.store is None or not unavailable(error):
            raise
        kept = spool.keep_branch(ctx.store, uri, submission, error)
        entry = {"model": submission.deployable.name, "spooled": kept}
        reason = f"{without_credentials(uri)} could not be reached: it is kept in {kept}"
        ctx.progress.note(f"{reason}; `yolov8-nas models sync` or the next run sends it")
        message = f"{submission.deployable.name} is not registered yet"
    else:
        entry, reason = {**asdict(done), "run_id": run}, done.reason
        message = f"{done.model} version {done.version}" + (f" is {done.role}: {reason}" if done.role else "")
    write_json(ctx.out / "registry.json", {**entry, "reason": reason, "tracking_uri": without_credentials(uri)})
    ctx.progress.update(2, 2, message)


def _send_what_waits(ctx: StageContext[RegisterSettings], uri: str) -> None:
    """Send what earlier runs could not, first: which version is champion depends on the order."""
    if ctx.store is None:
        return
    try:
        done = spool.send(ctx.store, uri, ctx.progress.note)
    except UnavailableError as error:
        ctx.progress.note(f"what waits in {ctx.store.address}/{spool.FOLDER} is not sent: {error}")
        return
    for entry in done.waiting:
        ctx.progress.note(f"not sent: {entry.what} in {entry.folder}, for {entry.tracking_uri}: {entry.why}")


def _submission(ctx: StageContext[RegisterSettings]) -> Submission:

    return Submission(
        experiment=ctx.settings.experiment,
        parent=ctx.settings.mlflow_run,
        run_id=ctx.settings.run_id,
        label=ctx.settings.label,
        deployable=_deployable(ctx),
        evidence={
            f"{stage}/{name}": file
            for stage, folder in ctx.inputs.items()
            for name, file in tree_files(folder).items()
            if file.suffix in (".json", ".jsonl") and "dataset/" not in name
        },
        shared_files={
            f"{SUPERNET}/{name}": ctx.inputs["supernet-train"] / name
            for name in ("supernet.safetensors", "supernet.json")
        },
    )


def _deployable(ctx: StageContext[RegisterSettings]) -> Deployable:

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
    limits = ctx.settings.constraints
    scores = ctx.inputs["trt-export"] / "evaluation" / f"candidate-{shipped['candidate']}-{shipped['precision']}.npz"
    return Deployable(
        name=ctx.settings.model,
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
            "space": ctx.settings.space,
            "imgsz": str(ctx.settings.imgsz),
            "batch": str(ctx.settings.batch),
            "seed": str(ctx.settings.seed),
            "precision_requested": ctx.settings.precision,
            **({"head": "one-to-one"} if (verdict.get("nms") or {}).get("nms_free") else {}),
        },
        tags={
            "hardware": profile["name"],
            "hardware_model": profile["model"],
            "runtime": runtime["name"],
            "runtime_version": runtime["version"],
            "dataset": dataset["digest"],
            "dataset_name": ctx.settings.model,
            "architecture": architecture.digest,
            "file": shipped["file"],
            "supernet": file_sha256(ctx.inputs["supernet-train"] / "supernet.safetensors"),
            "supernet_details": file_sha256(ctx.inputs["supernet-train"] / "supernet.json"),
            "imgsz": str(ctx.settings.imgsz),
            "run_id": ctx.settings.run_id,
            "target": ctx.settings.label,
        },
        description=(
            f"{shipped['precision']}, {ctx.settings.imgsz} px, on {profile['model']} with {runtime['name']} "
            f"{runtime['version']}: mAP50-95 {shipped['map50_95']:.3f}, p50 {shipped['latency_ms']['p50']:.3g} ms; "
            f"keeps {', '.join(limits)}"
        ),
        scores=scores if scores.is_file() else None,
    )
