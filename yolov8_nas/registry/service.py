"""What a tracking server has to be able to do, asked within seconds before anything is paid for.

A server that lacks something would be noticed at the end of a run only, with the training done. Nothing is written, and
MLflow is not imported, which takes seconds.
"""

from __future__ import annotations

import base64
import configparser
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from yolov8_nas import credentials, paths
from yolov8_nas.errors import InputError
from yolov8_nas.registry import tracking
from yolov8_nas.registry.tracking import UnavailableError, database, without_credentials

LEAST_VERSION: Final = 3
"""Major version of MLflow from which on there are logged models, which hold files and figures of what is registered."""

_NEEDED: Final = (
    ("POST", "logged-models/search", {"experiment_ids": ["0"], "max_results": 1}, "logged models"),
    ("GET", "registered-models/search?max_results=1", None, "model registry"),
)
_CLIENTS: Final = {
    "gs": ("google.cloud.storage", "google-cloud-storage"),
    "wasbs": ("azure.storage.blob", "azure-storage-blob"),
    "abfss": ("azure.storage.filedatalake", "azure-storage-file-datalake"),
    "hdfs": ("pyarrow", "pyarrow"),
}
"""Kinds of artifact stores that need a package: the module, and what to install."""

_OTHER_WAYS: Final = ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
"""Environment variables that let MLflow authenticate in ways of its own."""

_REMEDY: Final = (
    "correct tracking.uri (or MLFLOW_TRACKING_URI), or leave it out to track in a database beside the store"
)


def check(uri: str, experiment: str) -> None:
    """Check that runs can be recorded and models registered.

    Args:
        uri: As `tracking.resolve_uri` gave it, perhaps a bare one (`credentials`).
        experiment: Name of the experiment.

    Raises:
        UnavailableError: Nothing answers in time, or the server is in trouble.
        InputError: It is no MLflow server, too old, refuses, or its artifact store can't be written from here.
    """
    uri = credentials.revealed(uri)
    file = database(uri)
    if file is not None:
        _check_file(file)
    elif uri.startswith(("http://", "https://")):
        _in_time(lambda: _check_server(uri, experiment), uri)
    elif urlsplit(uri).scheme.split("+")[0] in tracking.DATABASES:
        _in_time(lambda: _check_database(uri), uri)


def _in_time(work: Callable[[], None], uri: str) -> None:
    """Do something, but not for longer than a server has to answer: looking up a name alone can take minutes."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(tracking.ANSWER_WITHIN)
    if raised:
        raise raised[0] from None
    if thread.is_alive():
        raise UnavailableError(
            f"tracking.uri = {without_credentials(uri)}: no answer within {tracking.ANSWER_WITHIN:g} seconds; "
            f"start the server, or {_REMEDY}"
        )


def _check_file(file: Path) -> None:
    """Check that MLflow can use a SQLite file."""
    if file.is_dir():
        raise InputError(f"tracking.uri: {file} is a folder; name a file in it, for example {file / 'mlflow.db'}")
    paths.check_writable(file.parent, "folder of the tracking database", _REMEDY)
    if not file.exists():
        return
    try:
        with file.open("r+b") as opened:
            start = opened.read(16)
    except OSError as error:
        raise paths.told(error) or error from None
    if start and not start.startswith(b"SQLite format 3\0"):
        raise InputError(f"tracking.uri: {file} is no SQLite database; name another file")


def _check_database(uri: str) -> None:
    """Check that a database lets us in."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    address = without_credentials(uri)
    try:
        engine = create_engine(uri)
        with engine.connect():
            pass
        engine.dispose()
    except ImportError as error:
        raise InputError(
            f"tracking.uri = {address}: its driver is not installed ({error.name}); install it, or {_REMEDY}"
        ) from None
    except SQLAlchemyError as error:
        raise UnavailableError(
            f"tracking.uri = {address}: {tracking.said(error, uri)}; check the database's address, user and password"
        ) from None


def _check_server(uri: str, experiment: str) -> None:
    server = _Server(uri)
    status, text = server.ask("GET", "/version")
    if any(os.environ.get(name) for name in _OTHER_WAYS):
        return  # MLflow's first call tells whether it lets us in
    version = text.strip().split(".")[0] if status == 200 else ""
    if version.isdecimal() and int(version) < LEAST_VERSION:
        raise InputError(
            f"tracking.uri = {server.address}: MLflow {text.strip()} has no logged models, in which files and figures "
            f"of models are kept; upgrade the server to MLflow {LEAST_VERSION} or newer, or {_REMEDY}"
        )
    for method, path, body, what in _NEEDED:
        status, text = server.ask(method, f"/api/2.0/mlflow/{path}", body)
        if status >= 400 and (status not in (400, 404) or "error_code" not in text):
            raise InputError(
                f"tracking.uri = {server.address}: has no {what} ({status} at {path.partition('?')[0]}); give the "
                f"address of an MLflow server, version {LEAST_VERSION} or newer, or {_REMEDY}"
            )
    _check_artifacts(server, experiment)


def _check_artifacts(server: _Server, name: str) -> None:
    """Check that this machine can write where the experiment keeps its artifacts."""
    for query in (f"get-by-name?experiment_name={quote(name, safe='')}", "get?experiment_id=0"):
        status, text = server.ask("GET", f"/api/2.0/mlflow/experiments/{query}")
        if status != 200:
            continue
        try:
            found = json.loads(text)["experiment"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if not isinstance(found, dict):
            return
        if query.startswith("get-by-name") and found.get("lifecycle_stage") == "deleted":
            raise InputError(
                f"tracking.experiment = {name!r} was deleted at {server.address}: restore it or name another one"
            )
        _check_place(server.address, str(found.get("artifact_location", "")))
        return


def _check_place(address: str, place: str) -> None:
    parts = urlsplit(place)
    if parts.scheme in ("", "file") and parts.path:
        remedy = (
            "start the server with --artifacts-destination instead of --default-artifact-root, so that files go "
            f"through it, or {_REMEDY}"
        )
        paths.check_writable(
            Path(unquote(parts.path)), f"artifact folder of {address}, which is the server's own,", remedy
        )
    module, package = _CLIENTS.get(parts.scheme, ("", ""))
    if module and not _installed(module):
        raise InputError(
            f"tracking.uri = {address}: keeps artifacts in {parts.scheme}://{parts.netloc}, which needs {package} "
            "here; install it, or let files go through the server (--artifacts-destination)"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class _Server:
    """An MLflow server, asked as MLflow's own client asks it, but once."""

    def __init__(self, uri: str) -> None:
        import requests  # here, since it takes its time

        parts = urlsplit(uri)
        self.address = without_credentials(uri)
        self.until = time.monotonic() + tracking.ANSWER_WITHIN
        self.session = requests.Session()
        user, password = _account()
        if parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            self.session.headers["Authorization"] = f"Bearer {token}"
        elif user:
            secret = base64.b64encode(f"{user}:{password}".encode()).decode()
            self.session.headers["Authorization"] = f"Basic {secret}"
        trusted = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        if trusted:
            self.session.verify = trusted
        if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
            self.session.verify = False
        self.session.cert = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of an answer.

        Raises:
            UnavailableError: There is none, or the server is in trouble.
            InputError: It does not let us in.
        """
        import requests

        try:
            answer = self.session.request(
                method,
                self.address.rstrip("/") + path,
                json=body,
                allow_redirects=False,
                timeout=max(0.1, self.until - time.monotonic()),
                stream=True,
            )
            text = answer.raw.read(2**16, decode_content=True).decode(errors="replace")
        except (requests.RequestException, OSError, ValueError) as error:
            raise UnavailableError(
                f"tracking.uri = {self.address}: no MLflow server answers there ({_reason(error)}); start it, or "
                f"{_REMEDY}"
            ) from None
        if answer.status_code == 403 and "host header" in text.lower():
            raise InputError(
                f"tracking.uri = {self.address}: refuses this name of itself (Invalid Host header); start it with "
                "--allowed-hosts naming it, or give the address that it knows"
            )
        if answer.status_code in (401, 403) and not any(os.environ.get(name) for name in _OTHER_WAYS):
            raise InputError(
                f"tracking.uri = {self.address}: does not let us in ({answer.status_code}); set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for one who may"
            )
        if answer.is_redirect:
            place = credentials.redacted(answer.headers.get("Location", "another address"))
            raise InputError(
                f"tracking.uri = {self.address}: leads on to {place[:200]} instead of answering; write the address "
                "that answers, or set MLFLOW_TRACKING_TOKEN where this is a page to log in"
            )
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            raise UnavailableError(
                f"tracking.uri = {self.address}: the server is in trouble ({answer.status_code} at {path}: "
                f"{' '.join(text.split())[:200]}); try again when it is well"
            )
        return answer.status_code, text


def _account() -> tuple[str, str]:
    """User and password as MLflow takes them: from the environment, or from its file of credentials."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not (user and password):
        kept = configparser.ConfigParser(interpolation=None)
        try:
            kept.read(Path("~/.mlflow/credentials").expanduser(), encoding="utf-8")
        except (configparser.Error, RuntimeError, OSError, UnicodeDecodeError):
            return user, password
        user = user or kept.get("mlflow", "mlflow_tracking_username", fallback="")
        password = password or kept.get("mlflow", "mlflow_tracking_password", fallback="")
    return user, password


def _reason(error: Exception) -> str:
    """The last and plainest of the reasons that an error of the network is made of."""
    reason: Any = error
    while getattr(reason, "reason", None) or (reason.args and isinstance(reason.args[0], Exception)):
        reason = getattr(reason, "reason", None) or reason.args[0]
    text = " ".join(str(reason).split())
    return text.rpartition(">: ")[2][:200] or type(reason).__name__
