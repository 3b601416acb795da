"""How a run begins and how it ends: the two light tasks around the stages."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, Final

from yolov8_nas import credentials, foreign, paths, signing
from yolov8_nas.config import RunConfig, lay_over
from yolov8_nas.errors import InputError, NoRoomError, Said, StageError, told
from yolov8_nas.files import append_line, copy_file, no_room, read_json, write_json
from yolov8_nas.run.preflight import check_places
from yolov8_nas.run.summary import FAILURES, RUN_FILE
from yolov8_nas.runner.results.summary import Run, Summary
from yolov8_nas.runner.stage import LOGS_VARIABLE, STAGES, TOLD, open_store, read_record, target_labels
from yolov8_nas.store.store import SIGNATURE, Store
from yolov8_nas.yaml_text import parse_yaml

CONFIG_FILE: Final = "config.json"

CLOSED_FILE: Final = "closed.json"
"""Record of a run with what it came to, written when it is closed, for whoever sees the store alone."""

FAILURES_LOG: Final = "failures.jsonl"
"""File beside the logs of a run on this machine: why tasks failed, a line each."""

IN_CLUSTER: Final = "KUBERNETES_SERVICE_HOST"
"""Environment variable that Kubernetes sets in every container."""


def requested(config: str, **asked: Any) -> RunConfig:
    """The run configuration that somebody filled in.

    Args:
        config: A run configuration as YAML or JSON; empty for the demo's.
        asked: What is laid over it, as `config.lay_over` takes it.

    Raises:
        InputError: It is no mapping, a key is unknown, a value is not of its form.
    """
    text = config.strip() or resources.files("yolov8_nas").joinpath("demo.yaml").read_text(encoding="utf-8")
    settings = parse_yaml(text, "config")
    if not isinstance(settings, dict):
        raise InputError(f"config: expected a mapping of settings, got {type(settings).__name__}")
    return RunConfig.parse(lay_over(settings, **asked), "config")


def open_run(config: RunConfig, *, store: str, run_id: str, output: Path) -> dict[str, Any]:
    """Check what can be checked before anything is paid for, and open the run in MLflow.

    Args:
        config: The run configuration.
        store: The stage store.
        run_id: Name of the run.
        output: File for what later tasks need to know: the number of classes, MLflow's run and where it is.

    Returns:
        What is in the file. Its `config` is that of the run that comes of it: another one than was given where
        `retraining` is there, which says whether there is anything to do (`retraining.prepare`).

    Raises:
        InputError: The dataset, the space or the tracking server cannot be used, or there is nothing to retrain.
        StageError: What a retraining starts from is not what was registered.
    """
    from yolov8_nas.registry import tracking
    from yolov8_nas.run import retraining
    from yolov8_nas.space import SearchSpace
    from yolov8_nas.stages.data_prep.classes import find_classes

    if os.environ.get(IN_CLUSTER) and (bare := credentials.taken(config.model_dump(mode="json"))):
        raise InputError(
            f"{', '.join(bare)}: user, password or query of an address stand in Kubeflow's record of this run: change "
            f"them, give the bare address, and the whole in the pods' {credentials.VARIABLE} (docs/kubeflow.md)"
        )
    # The task that closes the run has no inputs but the run's name, since it also runs when this one never ended.
    if config.signing is not None:
        signing.adopt(config.signing.key, config.signing.trusted)
    signing.require_signer()
    opened_store = open_store(store)
    opened_store.record(run_id, CONFIG_FILE, config.model_dump(mode="json"))
    SearchSpace.load(config.space)
    check_places(config, store)
    classes = find_classes(config, opened_store)
    uri = tracking.resolve_uri(config.tracking.uri, store)
    recorded = opened_store.run_folder(run_id) / RUN_FILE
    news = None
    if config.retrain is not None and recorded.is_file():  # a run that goes on, which may have registered something
        known = read_json(recorded)
        config, news = RunConfig.parse(known["config"], str(recorded)), known["retraining"]
    elif config.retrain is not None:
        config, news = retraining.prepare(config, store=store, run_id=run_id, tracking_uri=uri, classes=classes)
    opened_store.record(run_id, CONFIG_FILE, config.model_dump(mode="json"))
    opened = {
        "run_id": run_id,
        "config": config.model_dump(mode="json"),
        "classes": list(classes),
        "num_classes": len(classes),
        "tracking_uri": uri,
        "mlflow_run": tracking.open_run(config, run_id, uri),
        "retraining": news,
    }
    write_json(output, opened)
    opened_store.record(run_id, RUN_FILE, opened)
    return opened


def close_run(
    *,
    store: str,
    run_id: str,
    workdir: Path | None,
    summary_file: Path,
    report_file: Path,
) -> Summary:
    """Write summary and report of a run, however it ended, and close it in MLflow.

    Args:
        store: The stage store.
        run_id: Name of the run.
        workdir: Folder for `summary.json`, `report.html` and the models that ship; nothing for a temporary one.
        summary_file: Where a copy of the summary goes.
        report_file: Where a copy of the report goes.

    Returns:
        The summary; of a run that was never opened, one without targets that says why.
    """
    from yolov8_nas.registry import spool
    from yolov8_nas.report.build import build_report
    from yolov8_nas.run.summary import summarise

    opened_store = open_store(store)
    folder = opened_store.run_folder(run_id)
    if not (folder / CONFIG_FILE).is_file():
        return _never_opened(run_id, folder, summary_file, report_file)
    config = _recorded(folder)
    with tempfile.TemporaryDirectory() as temporary:
        out = workdir or Path(temporary)
        summary = summarise(opened_store, run_id, out, config)
        found = evidence(opened_store, run_id, target_labels(config))
        report = build_report(summary, found, out / "report.html", images=config.report.images)
        for source, copy in ((out / "summary.json", summary_file), (report, report_file)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, copy)
        opened_store.record(run_id, CLOSED_FILE, _closed(summary))
        if (folder / RUN_FILE).is_file():
            known = read_json(folder / RUN_FILE)
            spool.close_or_keep(opened_store, known["tracking_uri"], known["mlflow_run"], summary, out)
    return summary


def _closed(summary: Summary) -> dict[str, Any]:
    """What a run came to, in short."""
    lost = {target.id: target.error for target in summary.targets if target.status == "failed"}
    count = len(summary.targets)
    return {"targets": count, "with_a_model": count - len(lost), "lost": lost, "error": summary.run.error}


def _never_opened(run_id: str, folder: Path, summary_file: Path, report_file: Path) -> Summary:
    """Summary and report of a run of which nothing is known but why it could not be opened."""
    failures = [read_json(file) for file in sorted(folder.glob(f"{FAILURES}*.json"))]
    why = "; ".join(f"{failure['task']}: {failure['error']}" for failure in failures if failure["error"])
    error = why or "open-run left no word in the stage store; its log says why"
    run = Run(id=run_id, name=run_id, status="failed", error=error)
    summary = Summary(schema=1, run=run, dataset=None, stages=(), targets=())
    write_json(summary_file, summary.plain())
    report_file.parent.mkdir(parents=True, exist_ok=True)
    page = f"<!doctype html><meta charset=utf-8><title>{run_id}</title><h1>The run was never opened</h1><p>"
    report_file.write_text(page + foreign.html(error), encoding="utf-8")
    return summary


def verdict(*, store: str, run_id: str) -> None:
    """Say as the last step before a run is closed whether it came to anything.

    Raises:
        StageError: No target has a model, and there were some; the message says why of each.
    """
    from yolov8_nas.run.summary import summarise

    opened_store = open_store(store)
    with tempfile.TemporaryDirectory() as out:
        config = _recorded(opened_store.run_folder(run_id))
        closed = _closed(summarise(opened_store, run_id, Path(out), config))
    if closed["targets"] and not closed["with_a_model"]:
        lost = "; ".join(f"{label}: {why}" for label, why in closed["lost"].items())
        raise StageError(f"no target has a model: {lost}")


@contextmanager
def telling(task: str, *, store: str, run_id: str, target: str | None = None) -> Iterator[None]:
    """Around a task of the pipeline that is no stage: should it fail, its reason stands where people look.

    Args:
        task: Name of the task.
        store: The stage store.
        run_id: Name of the run.
        target: Label of the target that it serves, if it is one.
    """
    try:
        yield
    except Exception as error:
        raise tell_failure(error, task, store=store, run_id=run_id, target=target) from None
    record = open_store(store).run_folder(run_id) / _failure_file(task, target)
    if record.is_file():  # of an earlier try
        open_store(store).record(run_id, record.name, {"task": task, "target": target, "error": None})


def tell_failure(error: Exception, task: str, *, store: str, run_id: str, target: str | None = None) -> Exception:
    """Keep the reason why a task failed: in the run's records, from which the summary and the report are made.

    On this machine it stands beside the logs, too, for when not even the store can be written.

    Returns:
        The error as the task may end with it: Python shows what a process ends with, and all that led to it, as it is.
    """
    expected = no_room(error) or (paths.told(error) if isinstance(error, OSError) else None) or error
    reason = " ".join(told(expected).split())
    if not isinstance(expected, Said):
        print(told("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
        reason = f"{type(error).__name__}: {reason}"
        expected = StageError(f"{task}: {reason}")
    content = {"task": task, "target": target, "error": reason, "at": round(time.time(), 3)}
    print(f"{task} failed: {reason}", flush=True)
    if logs := os.environ.get(LOGS_VARIABLE):
        with suppress(OSError, NoRoomError):
            append_line(Path(logs) / FAILURES_LOG, content)
    try:
        open_store(store).record(run_id, _failure_file(task, target), content)
    except Exception as another:  # the store is perhaps what the task failed for
        print(f"this could not be recorded in {store}: {told(another)}", flush=True)
    return expected


def _failure_file(task: str, target: str | None) -> str:
    return f"{FAILURES}{target or 'all'}.{task}.json"


def close_killed_run(*, store: str, run_id: str, killed_at: int, final: bool) -> str | None:
    """Close in MLflow what a run that was killed left open there.

    Args:
        store: The stage store.
        run_id: Name of the run.
        killed_at: When there was a last sign of it, in ms since 1970.
        final: Whether it will not go on. Where the server does not answer, its end is kept for `models sync` then.

    Returns:
        What became of it, in words; nothing where nothing was open.

    Raises:
        InputError: The server refuses; or it does not answer, and the run may go on.
    """
    from yolov8_nas.registry import closing, spool, tracking

    opened_store = open_store(store)
    folder = opened_store.run_folder(run_id)
    if not (folder / CONFIG_FILE).is_file():
        return None  # it was killed before it was opened
    asked = _recorded(folder).tracking
    if (folder / RUN_FILE).is_file():
        uri = read_json(folder / RUN_FILE)["tracking_uri"]
    else:  # it was killed while it was opened
        uri = tracking.resolve_uri(asked.uri, store)
    try:
        tracking.check_server(uri)
        with tracking.foreseen(uri):
            closed = closing.close_killed(uri, asked.experiment, run_id, killed_at)
    except tracking.UnavailableError as error:
        if not final:
            raise
        kept = spool.keep_killed(opened_store, uri, asked.experiment, run_id, killed_at, error)
        return f"run {run_id} was killed, which MLflow could not be told: it is kept in {kept}"
    return f"run {run_id} was killed; it is closed in MLflow now" if closed else None


def _recorded(folder: Path) -> RunConfig:
    """The configuration among a run's records."""
    content = read_json(folder / CONFIG_FILE)
    content.pop(SIGNATURE, None)
    return RunConfig.parse(content, "run configuration")


def evidence(store: Store, run_id: str, targets: Sequence[str]) -> dict[str | None, dict[str, Path]]:
    """The folders that the stages of a run left in the store, for the report.

    Returns:
        Folders by label of the target (nothing for all of them) and stage.
    """
    records = store.run_folder(run_id)

    def folders(target: str | None) -> dict[str, Path]:
        ended = [record for stage in STAGES if (record := read_record(records, stage, target)) and record.key]
        return {it.stage: store.result(it.stage, it.key, TOLD.get(it.stage, ())).outputs for it in ended}

    return {target: folders(target) for target in (None, *targets)}
