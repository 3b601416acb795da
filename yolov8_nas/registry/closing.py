"""Closing a run in MLflow: what its stages came to, its summary and its report.

Each stage gets a run of its own, nested in that of its target or, where it serves all of them, in the pipeline run's.
They are made by the task that closes the pipeline run, from what the stage store holds: a stage needs no way to the
server, and one that failed is shown like one that was done. Closing twice changes nothing: a stage's run is known by a
tag, and what is logged to it has times that stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.device import usage
from yolov8_nas.files import read_json
from yolov8_nas.registry.tracking import (
    BRANCH_TAG,
    RUN_TAG,
    connect,
    find_or_create_run,
    flat,
    target_run,
    upload,
    without_credentials,
)
from yolov8_nas.runner.results import StageRecord, SupernetEpoch, TuningResult
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.runner.stage import STAGES, TOLD, read_record
from yolov8_nas.store.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

STAGE_TAG: Final = "yolov8_nas.stage"
"""Tag of a stage's run: the pipeline run's id, the target's label or `all`, the stage and the key of its result."""

RESULT_FILE: Final = "result.json"
"""Artifact of a stage's run: settings, inputs, tools, and the SHA-256 of each file of the result."""

Curves = Sequence[Mapping[str, Any]]
"""Figures by epoch, or of moments: those have a `time` in ms since 1970, too, and a number in place of the epoch."""


@dataclass(frozen=True)
class StageRun:
    """What a stage came to in a run, in plain values.

    Attributes:
        stage: Its name.
        target: Label of its target; nothing for a stage that serves all of them.
        key: Key of its result in the stage store.
        status: `done`, `cached` (the result was there already) or `failed`.
        error: What went wrong, where it failed.
        ended: When, in ms since 1970.
        seconds: How long this run took for it.
        peak_memory_mb: Peak resident memory, in MiB.
        digest: SHA-256 of the result as a tar; what the stages after it name as their input.
        settings: All that the result depends on beside the inputs.
        manifest: What the store knows of the result; nothing where the stage failed.
        curves: Figures over time, by the name of what was trained, and of the machine meanwhile.
    """

    stage: str
    target: str | None
    key: str
    status: str
    error: str | None
    ended: int
    seconds: float
    peak_memory_mb: float
    digest: str
    settings: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    curves: Mapping[str, Curves]


def stage_runs(store: Store, run_id: str, labels: Iterable[str]) -> list[StageRun]:
    """What the stages of a run came to that have begun, in the order of the pipeline.

    Args:
        store: The stage store.
        run_id: The run.
        labels: Labels of its targets.
    """
    folder = store.run_folder(run_id)
    records = [read_record(folder, stage, label) for label in (None, *labels) for stage in STAGES]
    # Without a key a stage was not run, because one before it failed.
    return [_stage_run(store, record) for record in records if record and record.key]


def close_run(tracking_uri: str, mlflow_run: str, summary: Summary, out: Path, stages: Iterable[StageRun]) -> None:
    """Close the parent run: what the stages came to, the summary and the report.

    Args:
        tracking_uri: As given to `tracking.open_run`.
        mlflow_run: What `tracking.open_run` returned.
        summary: What `summary.summarise` returned.
        out: Folder that holds `summary.json` and `report.html`; one that is missing is left out.
        stages: What `stage_runs` returned.
    """
    client = connect(tracking_uri)
    from mlflow.entities import Metric

    info = client.get_run(mlflow_run).info
    when = info.start_time  # a fixed time: closing twice adds nothing
    seconds = [
        Metric("/".join(part for part in ("seconds", stage.name, stage.target) if part), stage.seconds, when, 0)
        for stage in summary.stages
    ]
    client.log_batch(mlflow_run, metrics=seconds)
    run_id = summary.run.id
    parents: dict[str | None, str] = {None: mlflow_run}
    for target in summary.targets:
        label, failed = target.id, target.status == "failed"
        run = parents[label] = target_run(client, info.experiment_id, mlflow_run, run_id, label)
        client.set_tag(run, "status", f"failed: {target.error}" if failed else target.status)
        if failed:
            client.set_terminated(run, "FAILED")
    for stage in stages:
        _log_stage(client, info.experiment_id, parents[stage.target], run_id, stage, when)
    for file in (out / "summary.json", out / "report.html"):
        if file.is_file():
            upload(partial(client.log_artifact, mlflow_run, str(file)))
    status = summary.run.status
    client.set_tag(mlflow_run, "status", status)
    client.set_terminated(mlflow_run, "FAILED" if status == "failed" else "FINISHED")


def close_killed(tracking_uri: str, experiment: str, run_id: str, killed_at: int) -> bool:
    """Close what a pipeline run that was killed left open: the runs of its stages and targets, and the parent run.

    Args:
        tracking_uri: As given to `tracking.open_run`.
        experiment: Name of the experiment.
        run_id: Id of the pipeline run.
        killed_at: When there was a last sign of it, in ms since 1970.

    Returns:
        Whether anything was open.
    """
    client = connect(tracking_uri)
    where = client.get_experiment_by_name(experiment)
    if where is None:
        return False
    left = []
    below = f"LIKE '{run_id}/%'"
    for tag, value in ((STAGE_TAG, below), (BRANCH_TAG, below), (RUN_TAG, f"= '{run_id}'")):
        open_ones = f"tags.`{tag}` {value} AND attributes.status = 'RUNNING'"
        left += client.search_runs([where.experiment_id], open_ones)
    for run in left:
        client.set_terminated(run.info.run_id, "KILLED", max(killed_at, run.info.start_time))
    return bool(left)


def _stage_run(store: Store, record: StageRecord) -> StageRun:
    entry = store.result(record.stage, record.key, TOLD.get(record.stage, ()))
    manifest = asdict(entry.manifest) if entry.manifest else None
    settings = {**record.settings}
    for content in (settings, (manifest or {}).get("settings", {})):
        if "tracking_uri" in content:
            content["tracking_uri"] = without_credentials(str(content["tracking_uri"]))
    return StageRun(
        stage=record.stage,
        target=record.target,
        key=record.key,
        status=record.status,
        error=record.error,
        ended=round(1000 * record.ended),
        seconds=record.seconds,
        peak_memory_mb=record.peak_memory_mb,
        digest=record.digest,
        settings=settings,
        manifest=manifest,
        curves=dict(_curves(entry.outputs)),
    )


def _curves(outputs: Path) -> Iterator[tuple[str, Curves]]:
    """What a stage recorded over time: of the supernet, of the candidates, of the machine (see `device.usage`)."""
    if (outputs / SupernetEpoch.FILE).is_file():
        yield "supernet", [point.plain() for point in SupernetEpoch.read_all(outputs)]
    for file in sorted(outputs.rglob(TuningResult.FILE)):
        name = file.parent.relative_to(outputs).as_posix().replace("candidates/", "candidate_")
        tuning = TuningResult.read(file.parent)
        yield name, tuning.curves
        yield f"{name}_int8", tuning.qat_curves
    if (file := outputs / usage.FILE).is_file():
        rows = read_json(file)["rows"]
        yield "system", [{**row, "time": round(1000 * row["time"]), "epoch": i} for i, row in enumerate(rows)]


def _log_stage(client: MlflowClient, experiment_id: str, parent: str, run_id: str, stage: StageRun, when: int) -> None:
    """Log a stage to its own run; `when` is the time of figures that have none of their own."""
    from mlflow.entities import Metric, Param, RunTag

    run = find_or_create_run(
        client,
        experiment_id,
        STAGE_TAG,
        f"{run_id}/{stage.target or 'all'}/{stage.stage}/{stage.key}",
        name=f"{stage.stage} (from the store)" if stage.status == "cached" else stage.stage,
        tags={"mlflow.parentRunId": parent},
        start_time=stage.ended - round(1000 * stage.seconds),
    )
    tags = {
        "stage": stage.stage,
        "status": f"failed: {stage.error}" if stage.status == "failed" else stage.status,
        "key": stage.key,
        **({"target": stage.target} if stage.target else {}),
        **({"sha256": stage.digest} if stage.digest and stage.status != "failed" else {}),
        **{f"input.{name}": digest for name, digest in (stage.manifest or {}).get("inputs", {}).items()},
    }
    figures = {"seconds": stage.seconds, "peak_memory_mb": stage.peak_memory_mb}
    if stage.status == "cached" and stage.manifest:
        figures = {"seconds": stage.seconds, "seconds_when_computed": stage.manifest["seconds"]}
    client.log_batch(
        run,
        metrics=[Metric(name, value, stage.ended, 0) for name, value in figures.items()]
        + [metric for name, rows in stage.curves.items() for metric in _metrics(name, rows, when)],
        params=[Param(name, _text(value)) for name, value in flat(stage.settings, lists=False)],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    if stage.manifest:
        client.log_dict(run, dict(stage.manifest), RESULT_FILE)
    client.set_terminated(run, "FAILED" if stage.status == "failed" else "FINISHED", stage.ended)


def _metrics(name: str, curves: Curves, when: int) -> Iterator[Metric]:
    from mlflow.entities import Metric

    for row in curves:
        for key, value in row.items():
            if key not in ("epoch", "time") and isinstance(value, int | float):
                yield Metric(f"{name}/{key}", float(value), row.get("time", when), int(row["epoch"]))


def _text(value: Any) -> str:
    """A setting as MLflow shows it; a list stays one."""
    return json.dumps(value) if isinstance(value, list) else str(value)
