"""What could not be sent to the tracking server, kept on disk until it can.

An entry is a folder `spool/<id>/` in the stage store with all that is to be sent, files and their hashes included. It
is there whole or not at all, and what is kept twice is one entry. It goes when the server has all of it; since sending
twice changes nothing, a kill in between does no harm. `yolov8-nas models sync` sends, and so does the next run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.registry.closing import StageRun, close_killed, close_run, stage_runs
from yolov8_nas.registry.submission import Submission, submit
from yolov8_nas.registry.tracking import (
    URI_VARIABLE,
    UnavailableError,
    check_server,
    connect,
    foreseen,
    said,
    unavailable,
    without_credentials,
)
from yolov8_nas.store import Store, canonical_digest, file_sha256, read_json, tree_files, write_json

FOLDER: Final = "spool"

_ENTRY: Final = "entry.json"
_BRANCH: Final = "branch"
_CLOSING: Final = "closing"
_KILLED: Final = "killed"


@dataclass(frozen=True)
class Waiting:
    """An entry that has not been sent.

    Attributes:
        folder: Where it lies on this machine.
        what: What it is, in words.
        tracking_uri: Where it is for, without credentials.
        why: What the server said.
        since: When it was kept, in UTC.
    """

    folder: Path
    what: str
    tracking_uri: str
    why: str
    since: str


@dataclass(frozen=True)
class Sent:
    """What came of sending.

    Attributes:
        sent: What was sent, in words.
        waiting: What still waits: for another server, or because something was wrong with it.
    """

    sent: tuple[str, ...]
    waiting: tuple[Waiting, ...]


def keep_branch(store: Store, tracking_uri: str, submission: Submission, error: Exception) -> str:
    """Keep what a branch has to tell, because the server could not take it.

    Args:
        store: The stage store.
        tracking_uri: The server.
        submission: What was to be sent.
        error: How that ended.

    Returns:
        Where it is kept.
    """
    what = f"{submission.deployable.name} of branch {submission.run_id}/{submission.label}"
    return _keep(store, _BRANCH, what, tracking_uri, submission.to_dict(), submission.files(), error)


def close_or_keep(
    store: Store, tracking_uri: str, mlflow_run: str, summary: Mapping[str, Any], out: Path
) -> str | None:
    """Close the parent run, see `closing.close_run`; where the server cannot be told, keep that.

    Returns:
        Where that is kept, if it is.
    """
    stages = stage_runs(store, summary["run"]["id"], [target["id"] for target in summary["targets"]])
    try:
        close_run(tracking_uri, mlflow_run, summary, out, stages)
        return None
    except Exception as error:
        if not unavailable(error):
            raise
        told = {"mlflow_run": mlflow_run, "summary": summary, "stages": [asdict(stage) for stage in stages]}
        files = {name: out / name for name in ("summary.json", "report.html") if (out / name).is_file()}
        return _keep(store, _CLOSING, f"the end of run {mlflow_run}", tracking_uri, told, files, error)


def keep_killed(store: Store, tracking_uri: str, experiment: str, run_id: str, killed_at: int, error: Exception) -> str:
    """Keep that a run was killed, which the server could not be told, see `closing.close_killed`.

    Only of a run that will not go on: told later, it would close one that lives.

    Returns:
        Where it is kept.
    """
    told = {"experiment": experiment, "run_id": run_id, "killed_at": killed_at}
    return _keep(store, _KILLED, f"the end of run {run_id}, which was killed", tracking_uri, told, {}, error)


def waiting(store: Store) -> list[Waiting]:
    """The entries of a stage store, the oldest first."""
    found = []
    store.bring(FOLDER)
    for folder in (store.root / FOLDER).glob("*"):
        if not folder.name.startswith(".") and (folder / _ENTRY).is_file():
            entry = read_json(folder / _ENTRY)
            found.append(Waiting(folder, entry["what"], entry["tracking_uri"], entry["why"], entry["since"]))
    return sorted(found, key=lambda one: one.since)


def send(store: Store, tracking_uri: str, note: Callable[[str], None] = lambda _: None) -> Sent:
    """Send what waits for a server.

    Args:
        store: The stage store.
        tracking_uri: The server, with credentials where it asks for them.
        note: Told of each entry before it is sent.

    Raises:
        UnavailableError: The server does not answer, or lets nobody in; everything that was not sent still waits.
    """
    shown = without_credentials(tracking_uri)
    sent, left = [], []
    if any(entry.tracking_uri == shown for entry in waiting(store)):
        check_server(tracking_uri)
    with _alone(store):
        for entry in waiting(store):
            if entry.tracking_uri != shown:
                left.append(entry)
                continue
            note(f"sending {entry.what}, kept since {entry.since}")
            try:
                with foreseen(tracking_uri):
                    _send(entry, tracking_uri)
            except UnavailableError:
                raise
            except (InputError, StageError) as error:  # something is wrong with this entry alone
                left.append(Waiting(entry.folder, entry.what, entry.tracking_uri, str(error), entry.since))
                continue
            store.remove(f"{FOLDER}/{entry.folder.name}")
            sent.append(entry.what)
    return Sent(tuple(sent), tuple(left))


def send_everywhere(store: Store, note: Callable[[str], None] = lambda _: None) -> Sent:
    """Send what waits to wherever it is for; credentials come from MLflow's environment variables.

    Raises:
        UnavailableError: A server does not answer, or lets nobody in.
    """
    sent: list[str] = []
    left: list[Waiting] = []
    named = os.environ.get(URI_VARIABLE, "")
    for address in sorted({entry.tracking_uri for entry in waiting(store)}):
        done = send(store, named if without_credentials(named) == address else address, note)
        sent += done.sent
        left += [entry for entry in done.waiting if entry.tracking_uri == address]
    return Sent(tuple(sent), tuple(left))


def _send(waiting: Waiting, tracking_uri: str) -> None:
    entry = read_json(waiting.folder / _ENTRY)
    files = tree_files(waiting.folder / "files") if (waiting.folder / "files").is_dir() else {}
    for name, digest in entry["files"].items():
        if name not in files or file_sha256(files[name]) != digest:
            raise StageError(f"{waiting.folder / 'files' / name}: missing or damaged; run the pipeline again")
    if entry["kind"] == _CLOSING:
        content = entry["content"]
        stages = [StageRun(**stage) for stage in content["stages"]]
        close_run(tracking_uri, content["mlflow_run"], content["summary"], waiting.folder / "files", stages)
    elif entry["kind"] == _KILLED:
        close_killed(tracking_uri, **entry["content"])
    else:
        submit(connect(tracking_uri), Submission.from_dict(entry["content"], files))


def _keep(
    store: Store,
    kind: str,
    what: str,
    tracking_uri: str,
    content: Mapping[str, Any],
    files: Mapping[str, Path],
    error: Exception,
) -> str:
    digests = {name: file_sha256(path) for name, path in sorted(files.items())}
    identity = {"kind": kind, "tracking_uri": without_credentials(tracking_uri), "content": content, "files": digests}
    name = f"{FOLDER}/{canonical_digest(identity)[:16]}"
    folder, kept = store.root / name, f"{store.address}/{name}"
    store.bring(name)
    if (folder / _ENTRY).is_file():
        return kept
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    for file, path in files.items():
        copy = half / "files" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    since = datetime.now(UTC).isoformat(timespec="milliseconds")
    write_json(half / _ENTRY, {**identity, "what": what, "why": said(error, tracking_uri), "since": since})
    try:
        half.rename(folder)
    except OSError:  # another process has kept the same
        shutil.rmtree(half)
    else:
        store.lay(name, _ENTRY)
    return kept


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """One process of this machine at a time sends from a store, as one alone may remove what is sent."""
    folder = store.root / FOLDER
    if not folder.is_dir():
        yield
        return
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
