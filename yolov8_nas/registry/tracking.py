"""Runs in MLflow: one parent run per pipeline run, one child run per target; `closing` adds those of the stages.

With no server configured, everything lies in `mlflow/` beside the stage store: `mlflow.db` (SQLite) and `artifacts/`.
All processes of a run, and `yolov8-nas models` later, come to the same place from the same configuration.

MLflow is imported by `connect`, not with this module: it takes seconds, and its telemetry has to be off before.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar
from urllib.parse import urlsplit

from yolov8_nas import credentials
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import no_room, replace, room
from yolov8_nas.registry.places import check as check_place

if TYPE_CHECKING:
    from mlflow import MlflowClient

P = ParamSpec("P")
R = TypeVar("R")

PLUGIN_VARIABLE: Final = "MLFLOW_RUN_ID"
"""Environment variable with MLflow's id of the run that Kubeflow's plugin has made for the task."""

PARENT_TAG: Final = "mlflow.parentRunId"

RUN_TAG: Final = "yolov8_nas.run_id"
"""Tag of a parent run: the pipeline run's id."""

BRANCH_TAG: Final = "yolov8_nas.branch"
"""Tag of a child run: the pipeline run's id, a slash and the target's id."""

URI_VARIABLE: Final = "MLFLOW_TRACKING_URI"
"""Environment variable of MLflow with the server."""
_SQLITE: Final = "sqlite:///"
DATABASES: Final = ("sqlite", "postgresql", "mysql", "mssql")
"""Kinds of databases that MLflow tracks in."""

ANSWER_WITHIN: Final = 5.0
"""Seconds in which a tracking server has to answer before a run starts."""

_SETTINGS: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "10000000",
}
"""What MLflow does unless the environment says otherwise. Where a server is down, slow or answers 429 or 5xx, it tries
again after 0, 4, 8, 16 and 32 seconds; its own two minutes for an answer could hold a run up for a quarter of an hour.
It prints nothing, not even into the JSON of a command. And from 10 MB on, instead of 500, files go to the object store
in parts, by addresses that the server signs, if it offers that (see `upload`).
"""

_STRAIGHT: Final = "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"
_PARTS_LOST: Final = "Failed to upload at least one part"

_PLATFORM: Final = ("mlflow", "requests", "urllib3", "boto3", "botocore", "s3transfer", "sqlalchemy")
"""Packages whose errors tell of the server, its database or its artifact store."""

_LONGEST: Final = 300  # letters of what an error of somebody else says
_CONFLICTS: Final = 6
"""How often work that met another writer is done again before its error stands."""

_S3: Final = ("boto3", "botocore", "s3transfer")

_LATER: Final = (401, 403, 408, 429)
"""HTTP statuses below 500 that other credentials or more time can mend."""


def resolve_uri(uri: str | None, store: str | Path) -> str:
    """Where a run is tracked.

    Args:
        uri: The configured tracking server or database; it goes before everything else.
        store: Folder of the stage store.

    Returns:
        `uri`, as it can be shown and recorded (`credentials`); without one, the server that `MLFLOW_TRACKING_URI`
        names; without that, SQLite in `mlflow/` beside the store. SQLite paths are made absolute, since not every
        process of a run has the same working folder.

    Raises:
        InputError: It is no URI; or there is neither a URI nor a folder to put a database beside, because the store is
            remote.
    """
    if uri:
        check_form(uri, "tracking.uri")
    elif uri := os.environ.get(URI_VARIABLE):
        check_form(uri, URI_VARIABLE)
    try:
        uri = credentials.hidden(uri or "")
    except ValueError as error:
        raise InputError(f"tracking.uri: {error}") from None
    if not uri:
        if "://" in str(store):
            raise InputError(
                f"tracking.uri is not set and the store {store} is no local folder to put a database beside: "
                f"set tracking.uri or {URI_VARIABLE}"
            )
        uri = f"{_SQLITE}{Path(store).resolve().parent / 'mlflow' / 'mlflow.db'}"
    if uri.startswith(_SQLITE):
        return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).resolve()}"
    return uri


def check_form(uri: str, source: str) -> None:
    """Check that a tracking URI is of a kind that runs and models can be kept at, without asking there.

    Args:
        uri: The URI.
        source: Where it was given.

    Raises:
        InputError: It is a folder, which MLflow's older versions took, or of another kind.
    """
    remedy = "give the address of a server (http://...) or a database (sqlite:///...)"
    if "://" not in uri:
        raise InputError(f"{source} = {uri}: {remedy}; models can't be kept in a folder such as ./mlruns")
    shown = without_credentials(uri)
    kind = urlsplit(uri).scheme.split("+")[0]
    if kind not in ("http", "https", "databricks", *DATABASES):
        raise InputError(f"{source} = {shown}: runs and models can't be kept at {kind}://; {remedy}")
    if kind in ("http", "https"):
        try:
            named = bool(urlsplit(uri).hostname) and urlsplit(uri).port != 0
        except ValueError:
            named = False
        if not named:
            raise InputError(f"{source} = {shown}: names no server; write http://HOST:PORT")


def database(uri: str) -> Path | None:
    """The SQLite file of a tracking URI, or nothing for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def without_credentials(uri: str) -> str:
    """A tracking URI that can be shown: no user, no password, no query."""
    try:
        return credentials.without(uri)
    except ValueError:  # nothing of it can be told from a password
        return f"{uri.partition('://')[0]}://..."


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server and model registry at `uri`; a SQLite database is made where there is none.

    MLflow's own log lines go to Python's root logger instead of the terminal.
    """
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    import mlflow

    credentials.guard_logs()
    for name in ("mlflow", "alembic"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # The registry of a database looks up logged models at the process's URI, not at the client's. The environment stays
    # as it is, though: `resolve_uri` reads it.
    before = os.environ.get(URI_VARIABLE)
    whole = credentials.revealed(uri)
    mlflow.set_tracking_uri(whole)
    os.environ.pop(URI_VARIABLE, None)
    if before is not None:
        os.environ[URI_VARIABLE] = before
    file = database(uri)
    if file is not None and not file.exists():
        with room(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.with_suffix(".lock")):  # two processes that make the tables at once would both fail
                if not file.exists():
                    _make_database(file)
    return mlflow.MlflowClient(tracking_uri=whole, registry_uri=whole)


def _make_database(file: Path) -> None:
    """Make MLflow's tables in a file that gets its name when they are all there.

    Half of them, as a kill or a full disk leaves them, could be neither used nor completed.
    """
    import mlflow

    fresh = file.with_name(f".{file.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        mlflow.MlflowClient(tracking_uri=f"{_SQLITE}{fresh}").search_experiments(max_results=1)
        replace(fresh, file)
    finally:
        for left in file.parent.glob(f"{fresh.name}*"):  # SQLite's journal, too
            left.unlink(missing_ok=True)


class UnavailableError(InputError):
    """The server, its database or its artifact store does not answer, or lets nobody in: later it may."""


@contextmanager
def opened(uri: str) -> Iterator[MlflowClient]:
    """A client of a registry that is there.

    Raises:
        InputError: There is none, it does not answer, or it refuses what is asked of it within the context.
    """
    file = database(uri)
    if file is not None and not file.is_file():
        raise InputError(f"{file}: no registry there; run yolov8-nas first, or name the work folder or tracking URI")
    check_server(uri)
    with foreseen(uri):
        yield connect(uri)


@contextmanager
def foreseen(uri: str) -> Iterator[None]:
    """Tell in one line what a server, its database or its artifact store has to say.

    Raises:
        InputError: Instead of what MLflow and the packages below it raise.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError | StageError) or not _of_the_server(error):
            raise
        if full := no_room(error, database(uri)):
            raise full from None
        kind = UnavailableError if unavailable(error) else InputError
        raise kind(f"{without_credentials(uri)}: {said(error, uri)}; {_remedy(error)}") from None


def repeated_on_conflict(work: Callable[P, R]) -> Callable[P, R]:
    """Decorator for work that does no harm when it is done twice: it is done again where somebody else was faster.

    MLflow writes a tag or an alias by looking whether it is there and inserting it where it is not. When two do that at
    once, the database refuses the second, which MLflow passes on as a bad request and its client does not repeat.
    """

    @functools.wraps(work)
    def patient(*args: P.args, **kwargs: P.kwargs) -> R:
        for attempt in range(_CONFLICTS):
            try:
                return work(*args, **kwargs)
            except Exception as error:
                if not _conflict(error):
                    raise
                time.sleep(random.uniform(0.0, 0.1 * 2**attempt))  # apart, so that they do not meet again
        return work(*args, **kwargs)

    return patient


def upload(send: Callable[[], None]) -> None:
    """Upload files to MLflow's artifact store.

    Where the server offers addresses of the object store for parts of a file, and the store can't be reached there from
    here, files go through the server, now and for the rest of this process.

    Args:
        send: What uploads; it may be called twice.
    """
    from mlflow.exceptions import MlflowException

    try:
        send()
    except MlflowException as error:
        if _PARTS_LOST not in str(error):
            raise
        logging.getLogger(__name__).warning(
            "the object store behind the MLflow server can't be reached from here; files go through the server"
        )
        os.environ[_STRAIGHT] = "false"
        send()


def _conflict(error: Exception) -> bool:
    """Whether a database refused a row because there is one with its key: PostgreSQL's, SQLite's and MySQL's words."""
    text = str(error).lower()
    return _of_the_server(error) and any(words in text for words in ("unique constraint", "duplicate entry"))


def said(error: Exception, uri: str) -> str:
    """What an error says, on one line and without the credentials of a tracking URI."""
    words = " ".join(str(error).replace(uri, without_credentials(uri)).split()) or type(error).__name__
    # An error of requests begins with what was asked, and the cause stands at its end.
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST // 2]} ... {words[-_LONGEST // 2 :]}"


def unavailable(error: Exception) -> bool:
    """Whether registering later, or with other credentials, can go well where it has ended with this error."""
    status = _status(error)
    return _of_the_server(error) and (status is None or status >= 500 or status in _LATER)


def _of_the_server(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in _PLATFORM or isinstance(error, ConnectionError | TimeoutError)


def _status(error: Exception) -> int | None:
    """The HTTP status of an error of MLflow, requests or botocore; nothing where there was no answer."""
    asked = getattr(error, "get_http_status_code", None)
    if callable(asked):
        return int(asked())
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    return getattr(response, "status_code", None)


def _remedy(error: Exception) -> str:
    module, status = type(error).__module__.split(".")[0], _status(error)
    if module in _S3 or type(error.__context__).__module__.split(".")[0] in _S3:  # MLflow wraps some of them
        return "check the bucket of the artifact store, its endpoint and the AWS credentials"
    if status in (401, 403):
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for one who may"
    if module == "sqlalchemy":
        return "check the database's address, user and password"
    if "too many 5" in str(error):  # it answered, but that it cannot, for as long as it was asked
        return (
            "try again when the server is well; its log says why: perhaps its database, or the bucket of its artifacts"
        )
    return "check the address, and try again when the server is well" if unavailable(error) else "check what was given"


def open_run(config: RunConfig, run_id: str, tracking_uri: str) -> str:
    """Open the parent run of a pipeline run, or the one that an earlier try of the same run opened.

    Where Kubeflow's MLflow plugin has made a run for the pipeline on this server, it nests in that one.

    Args:
        config: The run configuration; its values become parameters, and the whole an artifact.
        run_id: Id of the pipeline run.
        tracking_uri: As `resolve_uri` gave it.

    Returns:
        MLflow's id of the run.

    Raises:
        InputError: No server answers at `tracking_uri` or it refuses, or the experiment was deleted.
    """
    check_server(tracking_uri)
    with foreseen(tracking_uri):
        client = connect(tracking_uri)
        where = experiment_id(client, config.tracking.experiment)
        run = find_or_create_run(
            client, where, RUN_TAG, run_id, name=f"{config.name}-{run_id}", tags=_below_plugin(client)
        )
        known = client.get_run(run).data.params  # a parameter can't be changed: a run that is resumed keeps its own
        values = {key: str(value) for key, value in flat(config.model_dump(mode="json")) if key not in known}
        from mlflow.entities import Param

        client.log_batch(run, params=[Param(key, value) for key, value in values.items()])
        client.log_text(run, config.to_json(), "config.json")
        client.update_run(run, status="RUNNING")
        return run


def _below_plugin(client: MlflowClient) -> dict[str, str]:
    """The tag that nests a run below the pipeline's, of which Kubeflow's plugin names that of the task it starts.

    The variable is MLflow's own, too, and may name a run of another server.
    """
    from mlflow.exceptions import MlflowException

    named = os.environ.get(PLUGIN_VARIABLE)
    if not named:
        return {}
    try:
        task = client.get_run(named)
    except MlflowException as error:
        print(f"{PLUGIN_VARIABLE} = {named}: not nested below it: {' '.join(str(error).split())[:200]}", flush=True)
        return {}
    return {PARENT_TAG: task.data.tags.get(PARENT_TAG, named)}


def target_run(client: MlflowClient, experiment_id: str, parent: str, run_id: str, label: str) -> str:
    """The child run of a target, which is made where there is none.

    Args:
        client: As `connect` gave it.
        experiment_id: MLflow's id of the experiment.
        parent: MLflow's id of the parent run.
        run_id: Id of the pipeline run.
        label: Label of the target.

    Returns:
        MLflow's id of the run.
    """
    tags = {PARENT_TAG: parent}
    return find_or_create_run(client, experiment_id, BRANCH_TAG, f"{run_id}/{label}", name=label, tags=tags)


def find_or_create_run(
    client: MlflowClient,
    experiment_id: str,
    key: str,
    value: str,
    *,
    name: str,
    tags: Mapping[str, str] | None = None,
    start_time: int | None = None,
) -> str:
    """The run of an experiment whose tag `key` is `value`; it is made where there is none, and never doubled.

    MLflow has no unique tags: two processes that make the same run at once both look again and keep the older one.

    Returns:
        MLflow's id of the run.
    """

    def oldest() -> str | None:
        found = client.search_runs([experiment_id], f"tags.`{key}` = '{value}'")
        return min(((run.info.start_time, run.info.run_id) for run in found), default=(0, None))[1]

    present = oldest()
    if present is not None:
        return present
    tags = {key: value, **(tags or {})}
    made: str = client.create_run(experiment_id, start_time=start_time, run_name=name, tags=tags).info.run_id
    kept = oldest() or made
    if kept != made:
        client.delete_run(made)
    return kept


def experiment_id(client: MlflowClient, name: str) -> str:
    """MLflow's id of an experiment, which is made where there is none.

    Raises:
        InputError: It was deleted, or keeps files where nobody is asked.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        file = database(client.tracking_uri)
        try:
            made: str = client.create_experiment(
                name, artifact_location=(file.parent / "artifacts").as_uri() if file else None
            )
            return made
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found.lifecycle_stage == "deleted":
        raise InputError(
            f"tracking.experiment = {name!r} was deleted at {client.tracking_uri}: restore it or name another one"
        )
    check_place(found.artifact_location, f"tracking.experiment = {name!r}")
    return str(found.experiment_id)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere that a server leads to: that it answers at all is what is asked."""

    def redirect_request(self, *_: Any) -> None:
        return None


def check_server(uri: str) -> None:
    """Ask a server for its health, once: MLflow's own client would retry for minutes.

    Raises:
        UnavailableError: Nothing answers.
    """
    if not uri.startswith(("http://", "https://")):
        return
    address = without_credentials(uri)
    try:
        with urllib.request.build_opener(_Stay).open(f"{address.rstrip('/')}/health", timeout=ANSWER_WITHIN):
            pass
    except urllib.error.HTTPError:
        pass  # something answers; whether it lets us in, MLflow's first call tells
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return  # something answers; which certificates are trusted, MLflow's own variables say
        raise UnavailableError(
            f"tracking.uri = {address}: no MLflow server answers there ({error}); start it, "
            "or leave tracking.uri empty to track in a local database"
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flat(data: Any, prefix: str = "", *, lists: bool = True) -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}, "c": [2]}` as `a.b = 1, c.0 = 2`; without `lists`, these are values: `c = [2]`."""
    items: Sequence[tuple[Any, Any]]
    if isinstance(data, Mapping):
        items = list(data.items())
    elif isinstance(data, list) and lists:
        items = list(enumerate(data))
    else:
        yield prefix, data
        return
    for key, value in items:
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key), lists=lists)
