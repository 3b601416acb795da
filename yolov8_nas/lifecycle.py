"""How a run begins and how it ends: the two light tasks around the stages."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError
from yolov8_nas.stages.stage import STAGES, open_store, target_labels
from yolov8_nas.store import Store, read_json, write_json

RUN_FILE: Final = "run.json"


def open_run(config: str, *, targets: Sequence[str], store: str, run_id: str, output: Path) -> dict[str, Any]:
    """Check what can be checked before anything is paid for, and open the run in MLflow.

    Args:
        config: The run configuration as JSON.
        targets: Labels of the targets.
        store: The stage store.
        run_id: Name of the run.
        output: File for what later tasks need to know: the number of classes, MLflow's run and where it is.

    Raises:
        InputError: The dataset, the space or the tracking server cannot be used.
    """
    from yolov8_nas.data.check import check_source
    from yolov8_nas.registry import tracking
    from yolov8_nas.space import SearchSpace

    parsed = RunConfig.parse(json.loads(config), "run configuration")
    if list(targets) != target_labels(parsed):
        raise InputError(f"targets {list(targets)} are not those of the configuration, {target_labels(parsed)}")
    SearchSpace.load(parsed.space)
    dataset = check_source(parsed.data)
    uri = tracking.resolve_uri(parsed.tracking.uri, store)
    opened = {
        "run_id": run_id,
        "config": parsed.model_dump(mode="json"),
        "classes": list(dataset.names),
        "num_classes": len(dataset.names),
        "tracking_uri": uri,
        "mlflow_run": tracking.open_run(parsed, run_id, uri),
    }
    write_json(output, opened)
    # The task that closes the run has no inputs, since it also runs when this one never ended.
    write_json(open_store(store).run_folder(run_id) / RUN_FILE, opened)
    return opened


def close_run(
    config: str,
    *,
    targets: Sequence[str],
    store: str,
    run_id: str,
    workdir: Path | None,
    summary_file: Path,
    report_file: Path,
    pipeline_error: str | None,
) -> dict[str, Any]:
    """Write summary and report of a run, however it ended, and close it in MLflow.

    Args:
        config: The run configuration as JSON.
        targets: Labels of the targets.
        store: The stage store.
        run_id: Name of the run.
        workdir: Folder for `summary.json`, `report.html` and the models that ship; nothing for a temporary one.
        summary_file: Where a copy of the summary goes.
        report_file: Where a copy of the report goes.
        pipeline_error: What the pipeline says went wrong, if anything.
    """
    from yolov8_nas.registry import spool
    from yolov8_nas.report.build import build_report
    from yolov8_nas.summary import summarise

    opened_store = open_store(store)
    parsed = RunConfig.parse(json.loads(config), "run configuration")
    with tempfile.TemporaryDirectory() as temporary:
        out = workdir or Path(temporary)
        summary = summarise(opened_store, run_id, out, parsed, pipeline_error)
        report = build_report(summary, evidence(opened_store, run_id, targets), out / "report.html")
        for source, copy in ((out / "summary.json", summary_file), (report, report_file)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        opened = opened_store.run_folder(run_id) / RUN_FILE
        if opened.is_file():
            known = read_json(opened)
            spool.close_or_keep(opened_store.root, known["tracking_uri"], known["mlflow_run"], summary, out)
    return summary


def evidence(store: Store, run_id: str, targets: Sequence[str]) -> dict[str, Any]:
    """The folders that the stages of a run left in the store, for the report.

    Returns:
        Folder by stage name; under `targets`, by label, the same for the stages of each target.
    """

    def folders(target: str | None) -> dict[str, Path]:
        found = {}
        for stage in STAGES:
            record = store.run_folder(run_id) / f"{target or 'all'}.{stage}.json"
            if record.is_file() and (key := read_json(record)["key"]):
                found[stage] = store.entry(stage, key).outputs
        return found

    return {**folders(None), "targets": {label: folders(label) for label in targets}}
