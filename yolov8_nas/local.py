"""Runs the pipeline on this machine and follows it.

The pipeline runs in a process of its own (`pipelines.local`), each stage in a further one; they end with this process,
however it ends. A run that was cut short goes on where it was when the same command is given again.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from yolov8_nas.config import RunConfig
from yolov8_nas.display import Display
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.progress import FILE_VARIABLE
from yolov8_nas.stages.stage import LOGS_VARIABLE, PARENT_VARIABLE, STAGES, target_labels
from yolov8_nas.store import read_json, write_json

SHARED_STAGES: Final = ("data-prep", "supernet-train")


def store_of(config: RunConfig, workdir: Path) -> str:
    """The stage store of a run in a work folder."""
    return config.store or str(workdir.absolute() / "store")


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keep a work folder to one run at a time.

    Raises:
        InputError: Another run is in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"work folder {workdir}: another run is in it; wait for it or take another one") from None
        yield


def run_pipeline(config: RunConfig, workdir: Path, console: Console) -> dict[str, Any]:
    """Run the whole pipeline in a work folder.

    Args:
        config: What to run.
        workdir: Gets `summary.json`, `report.html`, the models, `logs/` and, unless it is elsewhere, the store.
        console: Where progress is shown.

    Returns:
        The content of `summary.json`.

    Raises:
        StageError: The pipeline ended without a summary; the message names the log.
    """
    workdir = workdir.absolute()
    logs, summary_file = workdir / "logs", workdir / "summary.json"
    run_id = _run_id(config, workdir)
    labels = target_labels(config)
    for stale in (summary_file, workdir / "report.html", logs / "progress.jsonl"):
        stale.unlink(missing_ok=True)
    request = {
        "pipeline_root": str(workdir / "kfp"),
        "arguments": {
            "config": config.to_json(),
            "targets": labels,
            "store": store_of(config, workdir),
            "run_id": run_id,
            "workdir": str(workdir),
        },
    }
    write_json(logs / "pipeline.json", request)
    environment = {
        # Threads that wait for each other spin: with GNU OpenMP's default for so long that training crawls on a machine
        # in use, with none at all it takes twice as long on a quiet one. This many turns cost little on either.
        "GOMP_SPINCOUNT": "10000",
        **os.environ,
        FILE_VARIABLE: str(logs / "progress.jsonl"),
        LOGS_VARIABLE: str(logs),
        PARENT_VARIABLE: str(os.getpid()),
    }
    branch = [stage for stage in STAGES if stage not in SHARED_STAGES]
    expected: list[tuple[str, str | None]] = [("data-prep", None)]
    expected += [("hw-probe", label) for label in labels]
    expected += [("supernet-train", None)]
    expected += [(stage, label) for label in labels for stage in branch if stage != "hw-probe"]
    with (
        (logs / "pipeline.log").open("ab") as log,
        Display(logs / "progress.jsonl", expected, console) as display,
        _process([sys.executable, "-m", "pipelines.local", str(logs / "pipeline.json")], environment, log) as process,
    ):
        while process.poll() is None:
            display.poll()
            time.sleep(0.2)
    if not summary_file.is_file():
        raise StageError(f"the pipeline ended without a summary; see {logs / 'pipeline.log'}")
    _finish(workdir)
    summary: dict[str, Any] = read_json(summary_file)
    return summary


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, of which nothing is left when the context ends."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        # The group and not only the process: a stage could be left. It loses nothing but the work since a checkpoint.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run_id(config: RunConfig, workdir: Path) -> str:
    """The name of the run: that of the last one where it was cut short and was the same, else a new one."""
    file = workdir / "run.json"
    if file.is_file():
        last = json.loads(file.read_text())
        if last["config"] == config.digest and not last["finished"]:
            return str(last["run_id"])
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    write_json(file, {"run_id": run_id, "config": config.digest, "finished": False})
    return run_id


def _finish(workdir: Path) -> None:
    write_json(workdir / "run.json", {**read_json(workdir / "run.json"), "finished": True})
