"""Servers as a team has them, started for a test: PostgreSQL, and MLflow's own in front of a database and a store."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import object_store
import pytest

DEBIAN: Final = Path("/usr/lib/postgresql")
"""Where Debian's packages keep PostgreSQL, by version, and outside the path."""


@contextmanager
def team(folder: Path) -> Iterator[tuple[str, str]]:
    """MLflow's server on PostgreSQL, which hands artifacts on to S3.

    Within the context, boto3 finds that S3 by the environment.

    Args:
        folder: An empty folder.

    Returns:
        The server's address, and the name of a bucket.
    """
    with postgres() as database, object_store.running(folder) as environment, pytest.MonkeyPatch.context() as changed:
        for name, value in environment.items():
            changed.setenv(name, value)
        with object_store.bucket() as (_, bucket), mlflow(folder, database, f"s3://{bucket}/mlflow") as uri:
            yield uri, bucket


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a database in a cluster of its own, which is reached through a socket in its folder."""
    initdb = _initdb()
    if initdb is None:
        pytest.skip("no PostgreSQL: install it (apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="yolov8-nas-pg-") as folder:
        data, log = Path(folder) / "data", Path(folder) / "log"
        who: dict[str, Any] = {}
        if os.getuid() == 0:  # whom PostgreSQL refuses
            shutil.chown(folder, "nobody")
            who = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        made = [initdb, "--pgdata", data, "--username", "mlflow", "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=folder, **who)
        settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off"}
        command = [initdb.with_name("postgres"), "-D", data]
        command += [f"--{name}={value}" for name, value in settings.items()]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, **who)
        try:
            ready = [initdb.with_name("pg_isready"), "--host", folder]
            wait_for(lambda: subprocess.run(ready, stdout=subprocess.DEVNULL).returncode == 0, process, log)
            yield f"postgresql+psycopg2://mlflow@/postgres?host={folder}"
        finally:
            process.send_signal(signal.SIGINT)  # at once, whoever is connected
            process.wait()


@contextmanager
def postgres_with_tls(
    args: Sequence[str], rules: str, certificates: Path
) -> Iterator[tuple[Callable[[str, Mapping[str, str]], subprocess.CompletedProcess[str]], dict[str, str]]]:
    """A database that is reached over TCP, with a server's arguments as a cluster has them.

    Args:
        args: The arguments; paths below /tls and /hba are those of the files here.
        rules: Content of pg_hba.conf.
        certificates: Folder with `postgres.crt` and `postgres.key`.

    Returns:
        What runs SQL with an environment, and an environment with libpq's variables; `PATH` finds its other programs.
    """
    initdb = _initdb()
    if initdb is None:
        pytest.skip("no PostgreSQL: install it (apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="yolov8-nas-pg-") as name:
        folder = Path(name)
        data, log, password = folder / "data", folder / "log", folder / "password"
        (folder / "pg_hba.conf").write_text(rules)
        for kind in ("crt", "key"):
            shutil.copy(certificates / f"postgres.{kind}", folder / f"tls.{kind}")
            (folder / f"tls.{kind}").chmod(0o600)
        password.write_text("a 'password' of $pecial letters")
        who: dict[str, Any] = {}
        if os.getuid() == 0:
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, "nobody")
            who = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        made = [initdb, "--pgdata", data, "--username", "mlflow", "--auth", "scram-sha-256", "--pwfile", password]
        subprocess.run([*made, "--no-sync"], check=True, stdout=subprocess.DEVNULL, cwd=folder, **who)
        port = free_port()
        here = [part.replace("/tls/", f"{folder}/").replace("/hba/", f"{folder}/") for part in args]
        command = [initdb.with_name("postgres"), "-D", data, "-p", str(port), "-k", folder, "-F", *here]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, **who)
        environment = {
            "PATH": f"{initdb.parent}:{os.environ['PATH']}",
            "PGHOST": "localhost",
            "PGPORT": str(port),
            "PGUSER": "mlflow",
            "PGDATABASE": "postgres",
            "PGPASSWORD": password.read_text(),
        }

        def psql(sql: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
            asked = [initdb.with_name("psql"), "--no-psqlrc", "--tuples-only", "--command", sql]
            return subprocess.run(asked, env=dict(environment), capture_output=True, text=True)

        try:
            ready = [initdb.with_name("pg_isready"), "--host", folder, "--port", str(port)]
            wait_for(lambda: subprocess.run(ready, stdout=subprocess.DEVNULL).returncode == 0, process, log)
            yield psql, environment
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def _initdb() -> Path | None:
    found = shutil.which("initdb")
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return Path(found).resolve() if found else versions[-1] if versions else None


@contextmanager
def mlflow(folder: Path, database: str, artifacts: str) -> Iterator[str]:
    """The address of an MLflow server.

    Args:
        folder: Gets its log.
        database: What it keeps its records in.
        artifacts: Where it hands artifacts on to.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", artifacts]
    # Its helpers for jobs that nobody here gives it would take longer to start than itself.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log, uri = folder / "mlflow.log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)

    def answers() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{uri}/health"):
            return True
        return False

    try:
        wait_for(answers, process, log)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers.

    Raises:
        AssertionError: It ended; its log says why.
        TimeoutError: It did not answer.
    """
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        if answers():
            return
        time.sleep(0.5)
    raise TimeoutError(log.read_text())
