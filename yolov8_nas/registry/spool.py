"""What could not be sent to the tracking server, kept on disk until it can.

An entry is a folder `spool/<id>/` in the stage store with all that is to be sent, files and their hashes included. It
is there whole or not at all, and what is kept twice is one entry. It goes when the server has all of it; since sending
twice changes nothing, a kill in between does no harm. `yolov8-nas models sync` sends, and so does the next run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from yolov8_nas import names, signing
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import (
    canonical_digest,
    file_sha256,
    read_json,
    read_kept,
    room,
    sync_folder,
    sync_tree,
    tree_files,
    write_json,
)
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
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.store.store import Store

FOLDER: Final = "spool"

_ENTRY: Final = "entry.json"
_KIND: Final = "spool"
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


def close_or_keep(store: Store, tracking_uri: str, mlflow_run: str, summary: Summary, out: Path) -> str | None:
    """Close the parent run, see `closing.close_run`; where the server cannot be told, keep that.

    Returns:
        Where that is kept, if it is.
    """
    stages = stage_runs(store, summary.run.id, [target.id for target in summary.targets])
    try:
        close_run(tracking_uri, mlflow_run, summary, out, stages)
        return None
    except Exception as error:
        if not unavailable(error):
            raise
        told = {"mlflow_run": mlflow_run, "summary": summary.plain(), "stages": [asdict(stage) for stage in stages]}
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
            entry = read_kept(folder / _ENTRY, _checked)
            if entry is None:  # there is nothing to send without it
                store.lose(f"{FOLDER}/{folder.name}")
                continue
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
        if "://" in store.address and without_credentials(named) != address:
            # Whoever may write to the bucket would choose whom this machine's credentials are sent to.
            why = f"an address that a store in S3 names is not called unless {URI_VARIABLE} names it, too"
            left += [replace(entry, why=why) for entry in waiting(store) if entry.tracking_uri == address]
            continue
        done = send(store, named if without_credentials(named) == address else address, note)
        sent += done.sent
        left += [entry for entry in done.waiting if entry.tracking_uri == address]
    return Sent(tuple(sent), tuple(left))


def _checked(file: Path) -> dict[str, Any]:
    """What an entry says, if it is of the form that `_keep` writes.

    Raises:
        InputError: It is not, or a name or a digest in it is refused.
    """
    entry = read_json(file)
    texts = ("kind", "what", "tracking_uri", "why", "since")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in texts):
        raise InputError(f"{file}: not an entry of the spool")
    if entry["kind"] not in (_BRANCH, _CLOSING, _KILLED) or not isinstance(entry.get("content"), dict):
        raise InputError(f"{file}: not an entry of the spool")
    return {**entry, "files": names.files(entry.get("files"), str(file))}


def _statement(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the signature on an entry vouches for."""
    return {key: entry[key] for key in ("kind", "tracking_uri", "content", "files")}


def _whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether an entry would be sent."""
    if signing.keys().fault(_KIND, _statement(entry), entry.get("signature")):
        return False
    files = {name: folder / "files" / name for name in entry["files"]}
    return all(file.is_file() and file_sha256(file) == entry["files"][name] for name, file in files.items())


def _send(waiting: Waiting, tracking_uri: str) -> None:
    entry = _checked(waiting.folder / _ENTRY)
    if why := signing.keys().fault(_KIND, _statement(entry), entry.get("signature")):
        raise StageError(f"{waiting.folder}: {why}; run the pipeline again, or remove the entry")
    folder = waiting.folder / "files"
    there = tree_files(folder) if folder.is_dir() else {}
    if extra := there.keys() - entry["files"].keys():
        raise StageError(f"{folder / min(extra)}: does not belong to the entry; remove it")
    for name, digest in entry["files"].items():
        if name not in there or (folder / name).is_symlink() or file_sha256(there[name]) != digest:
            raise StageError(f"{folder / name}: missing or damaged; run the pipeline again")
    content = entry["content"]
    try:
        if entry["kind"] == _CLOSING:
            stages = [StageRun(**stage) for stage in content["stages"]]
            arguments = content["mlflow_run"], Summary.model_validate(content["summary"]), folder, stages
        elif entry["kind"] == _KILLED:
            killed = {name: content[name] for name in ("experiment", "run_id", "killed_at")}
        else:
            submission = Submission.from_dict(content, there)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(f"{waiting.folder}: not of the form that a run keeps ({error}); remove it") from None
    if entry["kind"] == _CLOSING:
        close_run(tracking_uri, *arguments)
    elif entry["kind"] == _KILLED:
        close_killed(tracking_uri, **killed)
    else:
        submit(connect(tracking_uri), submission)


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
        before = read_kept(folder / _ENTRY, _checked)
        if before and _statement(before) == _statement(json.loads(json.dumps(identity))) and _whole(folder, before):
            return kept
        shutil.rmtree(folder)  # torn, or not what its name says
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    for file, path in files.items():
        copy = half / "files" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        with room(copy, path.stat().st_size):
            shutil.copyfile(path, copy)
    since = datetime.now(UTC).isoformat(timespec="milliseconds")
    signature = signing.keys().sign(_KIND, _statement(identity))
    told = {"what": what, "why": said(error, tracking_uri), "since": since, "signature": signature}
    write_json(half / _ENTRY, {**identity, **told})
    sync_tree(half)
    try:
        half.rename(folder)
        sync_folder(folder.parent)
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
