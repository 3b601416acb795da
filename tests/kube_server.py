"""A server that speaks as much of the Kubernetes API as a step on several nodes uses; its state is in memory."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"


@dataclass
class KubernetesApi:
    """What the server knows, and how it behaves.

    Attributes:
        own: The pod that asks.
        looks: What each look at the job finds: conditions, pods, and log lines by pod. The last one stays.
        refuse: Status and message by method and path, instead of what it would do; once where the status is 500.
        lingers: How many looks a deleted job is still there.
    """

    own: dict[str, Any]
    looks: list[dict[str, Any]] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    lingers: int = 0
    host: str = ""
    job: dict[str, Any] | None = None
    made: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    going: int = -1

    def route(self, method: str, path: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
        if (method, path) == ("POST", JOBS):
            if self.job is not None:
                return 409, {"message": "already exists"}
            self.job = sent
            self.made.append(sent)
            return 201, sent
        if path.startswith(f"{JOBS}/"):
            return self._one_job(method)
        if path == PODS:
            assert query["labelSelector"] == f"jobset.sigs.k8s.io/jobset-name={self.made[-1]['metadata']['name']}"
            return 200, {"items": self.looks[0]["pods"]}
        if match := re.fullmatch(f"{PODS}/([^/]+)/log", path):
            return 200, self.looks[0]["logs"][match[1]]
        if path == f"{PODS}/{self.own['metadata']['name']}":
            return 200, self.own
        return 404, {"message": "the server could not find the requested resource"}

    def _one_job(self, method: str) -> tuple[int, Any]:
        if method == "DELETE" and self.job is not None:
            self.going = self.lingers
        if self.going == 0:
            self.job, self.going = None, -1
        self.going -= self.going > 0
        if self.job is None:
            return (200, {}) if method == "DELETE" else (404, {"message": "not found"})
        if method == "GET" and self.made and len(self.looks) > 1:
            self.looks.pop(0)
        conditions = self.looks[0]["conditions"] if self.looks else []
        return 200, {**self.job, "status": {"conditions": conditions}}


class _Handler(BaseHTTPRequestHandler):
    api: KubernetesApi

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        called = f"{self.command} {url.path}"
        self.api.log.append(called)
        self.api.tokens.add(self.headers.get("Authorization", ""))
        if called in self.api.refuse:
            status, message = self.api.refuse[called]
            if status >= 500:
                del self.api.refuse[called]
            content: Any = {"kind": "Status", "status": "Failure", "message": message}
        else:
            status, content = self.api.route(self.command, url.path, query, json.loads(body) if body else None)
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _handle


@contextmanager
def serving(api: KubernetesApi) -> Iterator[KubernetesApi]:
    """Serve the API on a free port of this machine, whose address is then its `host`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    api.host = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
