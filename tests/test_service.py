"""What is asked of a tracking server before a run begins: played servers, each lacking something."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from yolov8_nas.errors import InputError
from yolov8_nas.registry import service, tracking

API = "/api/2.0/mlflow"
SOUND: dict[str, Any] = {
    "/version": (200, "3.17.2"),
    f"{API}/logged-models/search": (200, {}),
    f"{API}/registered-models/search": (200, {}),
    f"{API}/experiments/get-by-name": (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}),
    f"{API}/experiments/get": (200, {"experiment": {"artifact_location": "mlflow-artifacts:/0"}}),
}


@contextmanager
def serving(answers: dict[str, Any], seen: list[tuple[str, str | None]] | None = None) -> Iterator[str]:
    """The address of a server that gives these answers by path, and 404 for any other."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if seen is not None:
                seen.append((self.path, self.headers.get("Authorization")))
            status, content = answers.get(self.path.partition("?")[0], (404, "<html>not found</html>"))
            if status == 0:
                time.sleep(content)
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status or 200)
            if 300 <= status < 400:
                self.send_header("Location", content)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # who asked has given up
                self.wfile.write(body)

        do_GET = do_POST = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _experiment(place: str, stage: str = "active") -> tuple[int, Any]:
    return 200, {"experiment": {"artifact_location": place, "lifecycle_stage": stage}}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "INSECURE_TLS", "SERVER_CERT_PATH"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"/version": (200, "2.19.0")}, "MLflow 2.19.0 has no logged models"),
        ({f"{API}/logged-models/search": (404, "Not found")}, "has no logged models (404 at logged-models/search)"),
        ({f"{API}/registered-models/search": (404, "Not found")}, "has no model registry"),
        ({f"{API}/registered-models/search": (501, "no")}, "in trouble (501"),
        ({"/version": (401, "no")}, "MLFLOW_TRACKING_USERNAME"),
        ({"/version": (403, "Invalid Host header - possible DNS rebinding attack detected")}, "--allowed-hosts"),
        ({f"{API}/logged-models/search": (403, "no")}, "does not let us in (403)"),
        ({"/version": (302, "https://login.example/?to=x")}, "leads on to https://login.example"),
        ({f"{API}/logged-models/search": (308, "https://mlflow.example/")}, "write the address that answers"),
        ({"/version": (502, "bad gateway")}, "the server is in trouble (502 at /version: bad gateway)"),
        ({f"{API}/logged-models/search": (503, "no")}, "the server is in trouble"),
        ({f"{API}/experiments/get-by-name": _experiment("x", "deleted")}, "was deleted"),
        ({f"{API}/experiments/get-by-name": _experiment("/proc/self/mlruns/1")}, "--artifacts-destination"),
        ({f"{API}/experiments/get-by-name": _experiment("file:///dev/null/mlruns")}, "is a file"),
        ({f"{API}/experiments/get": _experiment("wasbs://box@mlflow/0")}, "needs azure-storage-blob here"),
    ],
)
def test_what_a_server_lacks_is_told(changed: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_installed", lambda module: False)
    with serving({**SOUND, **changed}) as uri, pytest.raises(InputError) as error:
        service.check(uri, "defects")
    assert told in str(error.value)
    assert uri in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"/version": (404, "<html>")},  # behind a proxy that lets the API through only
        {f"{API}/experiments/get-by-name": _experiment("s3://bucket/mlflow")},
        {f"{API}/experiments/get-by-name": (200, "[" * 100_000)},  # what it says of experiments is of another form
        {f"{API}/experiments/get-by-name": (200, {"experiment": []})},
        {f"{API}/logged-models/search": (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})},  # no experiment 0
    ],
)
def test_a_sound_server_is_taken(changed: dict[str, Any]) -> None:
    with serving({**SOUND, **changed}) as uri:
        service.check(uri, "defects")


def test_what_is_no_mlflow_is_told() -> None:
    with serving({}) as uri, pytest.raises(InputError, match="give the address of an MLflow server"):
        service.check(uri, "defects")


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ANSWER_WITHIN", 0.3)
    with serving({"/version": (0, 3)}) as uri, pytest.raises(tracking.UnavailableError, match="no "):
        service.check(uri, "defects")


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ANSWER_WITHIN", 0.1)
    monkeypatch.setattr(service, "_check_server", lambda *_: time.sleep(3))
    with pytest.raises(tracking.UnavailableError, match=r"no answer within 0\.1 seconds"):
        service.check("http://mlflow.example", "defects")


def test_it_is_asked_with_the_credentials_that_mlflow_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, str | None]] = []
    with serving(SOUND, seen) as uri:
        service.check(uri.replace("//", "//me:geheim@"), "defects")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".mlflow").mkdir()
        kept = "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = geheim\n"
        (tmp_path / ".mlflow" / "credentials").write_text(kept)
        service.check(uri, "defects")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
        service.check(uri, "defects")
    basic = "Basic bWU6Z2VoZWlt"
    assert [sent for path, sent in seen if path == "/version"] == [basic, basic, "Bearer token"]
