"""MLflow with accounts and TLS on a database with TLS: what the component mlflow-secured sets up, on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import servers
from test_manifests import _certificates, of_kind, render

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(render.kubectl() is None, reason="kubectl, which renders the manifests, is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("flask_wtf") is None, reason="Flask-WTF, which MLflow's log-in needs, is not installed"
    ),
]

CLIENT = """
import mlflow
from yolov8_nas.registry import tracking

tracking.check_server(mlflow.get_tracking_uri())
client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment("of-the-pipeline")).info.run_id
client.log_text(run, "kept", "note.txt")
client.create_registered_model("line-3")
client.create_model_version("line-3", f"runs:/{run}/note.txt", run)
client.set_registered_model_alias("line-3", "champion", "1")
version = client.get_model_version_by_alias("line-3", "champion").version
print(mlflow.artifacts.load_text(f"runs:/{run}/note.txt"), version)
"""


def _python(program: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = ["-c", program] if isinstance(program, str) else [program]
    everything = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    return subprocess.run([sys.executable, *code], env=everything, capture_output=True, text=True)


def test_steps_log_in_over_tls_and_nobody_comes_in_without(tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    _certificates(certificates)
    stateful = of_kind("gpu-cluster", "StatefulSet")["postgres"]["spec"]["template"]["spec"]["containers"][0]
    maps = of_kind("gpu-cluster", "ConfigMap")
    (container,) = of_kind("gpu-cluster", "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"]
    for name, content in maps["mlflow-auth"]["data"].items():
        (tmp_path / name).write_text(content)
    with servers.postgres_with_tls(stateful["args"], maps["postgres-hba"]["data"]["pg_hba.conf"], certificates) as made:
        _, database = made
        address = f"postgresql+psycopg2://mlflow@localhost:{database['PGPORT']}/{database['PGDATABASE']}"
        settings = (tmp_path / "basic_auth.ini").read_text()
        (tmp_path / "basic_auth.ini").write_text(
            re.sub(r"(?m)^database_uri = .*", f"database_uri = {address}", settings)
        )
        port = servers.free_port()
        args = [
            f"--port={port}" if arg.startswith("--port=") else "--workers=1" if arg.startswith("--workers=")
            else arg.replace("/tls/tls.", f"{certificates}/mlflow.")
            for arg in container["args"]
            if not arg.startswith(("--host=", "--allowed-hosts="))
        ]  # fmt: skip
        environment = {
            **os.environ,
            **database,
            "PGSSLMODE": maps["yolov8-nas-config"]["data"]["PGSSLMODE"],
            "PGSSLROOTCERT": str(certificates / "ca.crt"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MLFLOW_BACKEND_STORE_URI": address,
            "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "artifacts"),
            "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": "password-of-admin",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "session-key",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        needed = {
            row["name"]
            for row in container["env"]
            if not row.get("valueFrom", {}).get("secretKeyRef", {}).get("optional")
        }
        assert {name for name in needed if not name.startswith("AWS_")} <= environment.keys() | {
            "MLFLOW_DISABLE_TELEMETRY"
        }
        log, uri = tmp_path / "mlflow.log", f"https://localhost:{port}"
        trusts = ssl.create_default_context(cafile=certificates / "ca.crt")
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", *container["command"], *args],
                env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"{uri}/health", context=trusts):
                    return True
            except OSError:
                return False

        try:
            servers.wait_for(healthy, server, log)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0", context=trusts)
            assert refused.value.code == 401
            with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
                urllib.request.urlopen(f"{uri}/health")
            reached = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificates / "ca.crt")}
            admin = {**reached, "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "password-of-admin"}
            for password, told in (("first-password-1", "made"), ("second-password-2", "was there")):
                account = {"PIPELINE_USERNAME": "pipeline", "PIPELINE_PASSWORD": password}
                done = _python(tmp_path / "accounts.py", **admin, **account, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
                assert done.returncode == 0 and told in done.stdout, done.stdout + done.stderr
            login = {**reached, "MLFLOW_TRACKING_USERNAME": "pipeline"}
            done = _python(CLIENT, **login, MLFLOW_TRACKING_PASSWORD="second-password-2")
            assert done.returncode == 0 and done.stdout.split()[-2:] == ["kept", "1"], done.stdout + done.stderr
            stale = _python(
                CLIENT, **login, MLFLOW_TRACKING_PASSWORD="first-password-1", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"
            )
            assert stale.returncode != 0 and "401" in stale.stderr
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
