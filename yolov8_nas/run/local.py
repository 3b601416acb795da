"""Runs the pipeline on this machine, or some of its stages, and follows it.

The pipeline runs in a process of its own (`pipelines.local`), each stage in a further one; they end with this process,
however it ends. A run that was cut short goes on where it was when the same command is given again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from yolov8_nas import signing
from yolov8_nas.config import RunConfig
from yolov8_nas.data import weights
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import check_room, read_json, read_kept, read_lines, write_json
from yolov8_nas.names import part
from yolov8_nas.paths import expanded
from yolov8_nas.run.lifecycle import FAILURES_LOG
from yolov8_nas.runner import process
from yolov8_nas.runner.display import Display
from yolov8_nas.runner.progress import FILE_VARIABLE
from yolov8_nas.runner.results import DatasetResult
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.runner.stage import (
    LOGS_VARIABLE,
    PARENT_VARIABLE,
    STAGES,
    STATUS_FILE,
    Outcome,
    find_target,
    open_store,
    target_labels,
)
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.trt_export import AHEAD
from yolov8_nas.stages.trt_export.settings import BUILT_AHEAD

SHARED_STAGES: Final = ("data-prep", "supernet-train")

INPUTS: Final[dict[str, tuple[str, ...]]] = {
    "data-prep": (),
    "hw-probe": (),
    "supernet-train": ("data-prep",),
    "search": ("data-prep", "supernet-train", "hw-probe"),
    "qat-finetune": ("data-prep", "supernet-train", "search"),
}
"""The stages that `run_stages` can run, each with those whose results it takes; what fails soonest stands first."""

TRAINING: Final = ("supernet-train", "qat-finetune")
"""The stages that train, and so can be given a device."""

LAST_RUN: Final = "run.json"
"""File of a work folder with its last run: name, configuration, store, where it ran, and whether it finished."""

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class OccupiedError(InputError):
    """A run is in the work folder."""


def store_of(config: RunConfig, workdir: Path) -> str:
    """The stage store of a run in a work folder."""
    return config.store or str(workdir.absolute() / "store")


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run whose paths do not depend on the current folder: the stages run elsewhere."""
    changed = dict(settings)
    for key in ("data", "store"):
        if changed.get(key) and "://" not in changed[key]:
            changed[key] = str(expanded(changed[key]).absolute())
    space = expanded(changed.get("space", ""))
    if space.suffix in (".yaml", ".yml") and space.is_file():  # else it is a name
        changed["space"] = str(space.absolute())
    supernet = changed.get("supernet") or {}
    if isinstance(supernet, dict):
        paths = {"weights_folder": supernet.get("weights_folder"), "weights": supernet.get("weights")}
        if not (isinstance(paths["weights"], str) and weights.is_path(paths["weights"])):
            del paths["weights"]  # a name, an address, or nothing
        found = {name: str(expanded(path).absolute()) for name, path in paths.items() if path}
        if found:
            changed["supernet"] = {**supernet, **found}
    if isinstance(keys := changed.get("signing"), dict):
        changed["signing"] = {name: str(expanded(path).absolute()) if path else path for name, path in keys.items()}
    changed["targets"] = [
        {**target, "far": str(expanded(target["far"]).absolute())} if target.get("far") else target
        for target in changed.get("targets", [])
    ]
    return changed


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keep a work folder to one run at a time.

    Raises:
        OccupiedError: Another run is in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OccupiedError(
                f"work folder {workdir}: another run is in it; wait for it or take another one"
            ) from None
        yield


def check_free(workdir: Path) -> None:
    """Look whether a run is in a work folder, before anything is measured for another one there.

    Raises:
        OccupiedError: One is.
    """
    if (workdir / ".lock").is_file():
        with held(workdir):
            pass


def run_pipeline(config: RunConfig, workdir: Path, console: Console) -> Summary:
    """Run the whole pipeline in a work folder, which the caller has `held`.

    Args:
        config: What to run.
        workdir: Gets `summary.json`, `report.html`, the models, `logs/` and, unless it is elsewhere, the store.
        console: Where progress is shown.

    Returns:
        The summary.

    Raises:
        StageError: The pipeline ended without a summary; the message names the log.
    """
    workdir = workdir.absolute()
    logs, summary_file = workdir / "logs", workdir / Summary.FILE
    if told := close_killed(workdir, config):
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    run_id = _run_id(config, workdir)
    for stale in (summary_file, workdir / "report.html", logs / "progress.jsonl", logs / FAILURES_LOG):
        stale.unlink(missing_ok=True)
    request = {
        "pipeline_root": str(workdir / "kfp"),
        "arguments": {
            "config": config.to_json(),
            "store": store_of(config, workdir),
            "run_id": run_id,
            "workdir": str(workdir),
        },
    }
    write_json(logs / "pipeline.json", request)
    environment = {**os.environ, **_environment(logs), **keys_of(config), PARENT_VARIABLE: str(os.getpid())}
    expected = _expected(config)
    with (
        (logs / "pipeline.log").open("ab") as log,
        Display(logs / "progress.jsonl", expected, console) as display,
        process.running(
            [sys.executable, "-m", "pipelines.local", str(logs / "pipeline.json")], environment, log
        ) as pipeline,
    ):
        while pipeline.poll() is None:
            display.poll()
            time.sleep(0.2)
    if not summary_file.is_file():
        for place in (workdir, logs, *([Path(store)] if "://" not in (store := store_of(config, workdir)) else [])):
            check_room(place)  # where there is none, nobody could write down what went wrong
        raise StageError(f"the pipeline ended without a summary: {_last_words(logs)}; see {logs / 'pipeline.log'}")
    _finish(workdir)
    return Summary.read(workdir)


def _expected(config: RunConfig) -> list[tuple[str, str | None]]:
    """The stages of a run with their targets, in the order in which they begin on one machine."""
    branch = [stage for stage in STAGES if stage not in SHARED_STAGES]
    labels = target_labels(config)
    expected: list[tuple[str, str | None]] = [("data-prep", None), *(("hw-probe", label) for label in labels)]
    expected.append(("supernet-train", None))
    for label, target in zip(labels, config.targets, strict=True):
        for stage in branch:
            if stage == "trt-export" and target.runtime in BUILT_AHEAD:
                expected.append((AHEAD.name, label))
            if stage != "hw-probe":
                expected.append((stage, label))
    return expected


def _last_words(logs: Path) -> str:
    """Why a pipeline ended without a summary, as far as it says so: what its tasks told, or its log's last line."""
    told = [f"{failure['task']}: {failure['error']}" for failure in read_lines(logs / FAILURES_LOG)]
    if told:
        return "; ".join(dict.fromkeys(told))
    with (logs / "pipeline.log").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def close_killed(workdir: Path, config: RunConfig | None = None) -> str | None:
    """Close the last run of a work folder in MLflow, where that was killed: it could not do so itself.

    The caller has the folder `held`, so on this host the run is dead. Not every network file system tells other hosts
    of that lock, so a run that was begun on another one is left alone.

    Args:
        workdir: The work folder.
        config: What is to be run now. A run of the same goes on and is left open; any other will not go on.

    Returns:
        What became of it, in words, be it that closing failed; nothing where nothing was open.
    """
    workdir = workdir.absolute()
    progress = workdir / "logs" / "progress.jsonl"
    last = _unfinished(workdir)
    if last is None or not set(_here()).intersection(last.get("host", ())):
        return None
    if config is not None and last["config"] == config.digest:
        return None
    seen = (progress if progress.is_file() else workdir / LAST_RUN).stat().st_mtime
    try:
        told: str | None = process.call(
            "yolov8_nas.run.lifecycle:close_killed_run",
            log=workdir / "logs" / "closing.log",
            environment=keys_of(config) if config else {},
            store=last["store"],
            run_id=last["run_id"],
            killed_at=round(1000 * seen),
            final=config is not None,
        )
    except (InputError, StageError) as error:
        return f"run {last['run_id']} was killed, and may still be open in MLflow: {error}"
    return told


def run_stages(
    config: RunConfig,
    workdir: Path,
    last: str,
    target: str | None,
    console: Console,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Run a stage and those before it that it needs, one after the other, each in a process of its own.

    They are the stages of the pipeline, with the same keys in the same store: what a run has done is not done again
    here, nor the reverse.

    Args:
        config: What to run.
        workdir: Gets `logs/` and, unless it is elsewhere, the store.
        last: The stage whose result is wanted: `hw-probe`, `supernet-train`, `search` or `qat-finetune`.
        target: Label of the target, where a stage serves one.
        console: Where progress is shown.
        environment: Environment variables to set for the stages that train.

    Returns:
        The folder of each stage's result in the store, which is not to be changed.

    Raises:
        InputError: A stage can't use what it was given.
        StageError: A stage failed, or its result must not ship.
    """
    workdir = workdir.absolute()
    logs, store = workdir / "logs", store_of(config, workdir)
    plan = _needed(last, target)
    for stage, label in plan:
        if stage != "data-prep":  # its settings hold a digest of the data, which takes time; and it runs first anyway
            find_stage(stage).settings(config, find_target(config, label) if label else None)
    request = {"config": config.to_json(), "store": store, "run_id": _new_run_id()}
    found: dict[str, Path] = {}
    with held(workdir), _empty_folder(workdir / ".tars") as tars:
        (logs / "progress.jsonl").unlink(missing_ok=True)
        with Display(logs / "progress.jsonl", plan, console) as display:
            for stage, label in plan:
                outcome: Outcome = process.call(
                    "yolov8_nas.stages:run_by_name",
                    log=logs / "stages.log",
                    environment={
                        **_environment(logs),
                        **keys_of(config),
                        **((environment or {}) if stage in TRAINING else {}),
                    },
                    wait=display.poll,
                    stage=stage,
                    target=label,
                    inputs={name: tars / f"{name}.tar" for name in INPUTS[stage]},
                    output=tars / f"{stage}.tar",
                    parameters=_parameters(stage, found),
                    **request,
                )
                found[stage] = open_store(store).result(stage, outcome.key).outputs
                if outcome.status == "failed":
                    _raise_failure(stage, outcome, found[stage], logs)
    return found


def _needed(last: str, target: str | None) -> list[tuple[str, str | None]]:
    """A stage and those that it needs, in their order, each with its target; all need the dataset for its classes."""
    needed = {last, "data-prep"}
    for stage in reversed(INPUTS):
        needed |= set(INPUTS[stage]) if stage in needed else set()
    return [(stage, None if stage in SHARED_STAGES else target) for stage in INPUTS if stage in needed]


def _parameters(stage: str, found: Mapping[str, Path]) -> dict[str, int]:
    """What a stage is told beside the configuration."""
    if stage != "hw-probe":
        return {}
    return {"num_classes": len(DatasetResult.read(found["data-prep"]).classes)}


def _raise_failure(stage: str, outcome: Outcome, folder: Path, logs: Path) -> None:
    """Raise what a stage of one target has recorded instead of raising it."""
    kind = read_json(folder / STATUS_FILE)["kind"] if outcome.key else "InputError"
    if kind in ("InputError", "SpaceError", "ArchiveError"):
        raise InputError(outcome.error)
    raise StageError(f"{stage}: {outcome.error}" + ("" if kind in ("StageError", "WaitingError") else f"; see {logs}"))


def keys_of(config: RunConfig) -> dict[str, str]:
    """Environment variables with the keys that a configuration names, for all processes of its run."""
    named = config.signing
    return {} if named is None else signing.environment(named.key, named.trusted)


def patience() -> dict[str, str]:
    """Environment variables of processes that train on this machine, or measure what training takes."""
    # Threads that wait for each other spin: with GNU OpenMP's default for so long that training crawls on a machine
    # in use, with none at all it takes twice as long on a quiet one. This many turns cost little on either.
    return {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}


def _environment(logs: Path) -> dict[str, str]:
    """Environment variables of stages that run on this machine."""
    return {
        **patience(),
        # What a step prints is read and printed again: with another encoding a name could break the pipeline.
        "PYTHONUTF8": "1",
        FILE_VARIABLE: str(logs / "progress.jsonl"),
        LOGS_VARIABLE: str(logs),
    }


@contextmanager
def _empty_folder(folder: Path) -> Iterator[Path]:
    """A folder for what is on its way, whatever a killed process left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_id(config: RunConfig, workdir: Path) -> str:
    """The name of the run: that of the last one where it was cut short and was the same, else a new one."""
    last = _unfinished(workdir)
    run_id = last["run_id"] if last is not None and last["config"] == config.digest else _new_run_id()
    begun = {"run_id": run_id, "config": config.digest, "store": store_of(config, workdir), "host": _here()}
    write_json(workdir / LAST_RUN, {**begun, "finished": False})
    return run_id


def _unfinished(workdir: Path) -> dict[str, Any] | None:
    """The last run of a work folder, where it did not finish."""

    def read(file: Path) -> dict[str, Any]:
        found: dict[str, Any] = read_json(file)
        for key in ("run_id", "config", "store", "finished"):
            if key not in found:
                raise InputError(f"no {key} in it")
        part(found["run_id"], str(file))
        return found

    last = read_kept(workdir / LAST_RUN, read)
    return None if last is None or last["finished"] else last


def _here() -> list[str]:
    """What tells this host from others: its name, which a new container changes, and its boot, which a restart does."""
    return [socket.gethostname(), *([_BOOT.read_text().strip()] if _BOOT.is_file() else [])]


def _new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _finish(workdir: Path) -> None:
    write_json(workdir / LAST_RUN, {**read_json(workdir / LAST_RUN), "finished": True})
