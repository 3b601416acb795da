"""A server that speaks as much of Kubeflow Pipelines' v2beta1 API as the project uses; its state is in memory."""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

API = "/apis/v2beta1"
API_1 = "/apis/v1beta1"


_NAMED_ONCE = ("pipelines", "versions", "experiments")


class _ConflictError(Exception):
    """There is one of the name already."""


@dataclass
class Cluster:
    """What the server knows, and how it behaves.

    Attributes:
        multi_user: Whether it asks for namespaces.
        token: Bearer token that it wants; nothing for none.
        namespaces: Namespaces that a user may use.
        states: States that a run goes through, a look at it at a time: of the run, and of its steps by name, or the
            nodes of its workflow, which the server then hands out by version 1 of the API.
        refuse: Status and message for a path, instead of what it would do.
        unseen: Lists that are answered as empty the next time: what somebody else makes in the meantime.
        packed: Whether the nodes of a workflow are compressed, as Argo does with many.
        fails: The same, for the next requests below a path (with a slash at its end) alone; a status of 0 breaks the
            connection off.
    """

    multi_user: bool = False
    token: str | None = None
    namespaces: tuple[str, ...] = ("team",)
    states: list[tuple[str, dict[str, str] | list[dict[str, Any]]]] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    fails: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)
    host: str = ""
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    recurring: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    uploads: list[bytes] = field(default_factory=list)
    packed: bool = False
    now: dict[str, str] | list[dict[str, Any]] = field(default_factory=dict)

    def health(self, **_: Any) -> Any:
        return {"multi_user": self.multi_user}

    def list_of(self, kind: str, **query: str) -> Any:
        found = [] if kind in self.unseen else getattr(self, kind)
        self.unseen.discard(kind)
        if text := query.get("filter"):
            for predicate in json.loads(text)["predicates"]:
                wanted = predicate.get("stringValue", predicate.get("string_value"))
                found = [row for row in found if row[predicate["key"]] == wanted]
        for key in ("namespace", "experiment_id"):
            if query.get(key):
                found = [row for row in found if row.get(key) == query[key]]
        return {{"recurring": "recurringRuns"}.get(kind, kind): found}

    def add(self, kind: str, id_key: str, row: dict[str, Any]) -> Any:
        name = row.get("display_name")
        if kind in _NAMED_ONCE and any(name == one.get("display_name") for one in getattr(self, kind)):
            raise _ConflictError(f"{kind}: {name} already exists")
        made = {**row, id_key: f"{kind}-{len(self.log)}"}
        getattr(self, kind).append(made)
        return made

    def run(self, run_id: str) -> Any:
        (run,) = (run for run in self.runs if run["run_id"] == run_id)
        state, self.now = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        steps = self.now if isinstance(self.now, dict) else {}
        details = [
            {"task_id": name, "display_name": name, "state": of, "create_time": f"2030-01-01T00:00:{i:02}Z"}
            for i, (name, of) in enumerate(steps.items())
        ]
        return {**run, "state": state, "run_details": {"task_details": details}}

    def workflow(self) -> Any:
        """Argo's workflow, as of the last look at the run."""
        status = {"nodes": {node["id"]: node for node in self.now}} if isinstance(self.now, list) else {}
        if self.packed and status:
            nodes = gzip.compress(json.dumps(status["nodes"]).encode())
            status = {"compressedNodes": base64.b64encode(nodes).decode()}
        workflow = {"metadata": {"name": "run-x", "namespace": "team"}, "status": status}
        return {"pipeline_runtime": {"workflow_manifest": json.dumps(workflow)}}


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        cluster = self.cluster
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = url.path.removeprefix(API)
        cluster.log.append(f"{self.command} {path}")
        if cluster.token and self.headers.get("authorization") != f"Bearer {cluster.token}":
            return self._answer(401, {"message": "Unauthenticated"})
        if url.path.startswith(f"{API_1}/runs/") and isinstance(cluster.now, list):
            return self._answer(200, cluster.workflow())
        if not url.path.startswith(API):
            return self._answer(404, {"message": "nothing here"})
        if failures := cluster.fails.get(path[: path.rfind("/") + 1]):
            status, message = failures.pop(0)
            if status == 0:
                self.close_connection = True
                return self.connection.close()
            return self._answer(status, {"message": message})
        if path in cluster.refuse:
            status, message = cluster.refuse[path]
            return self._answer(status, {"message": message})
        sent = json.loads(body) if body and self.headers.get("Content-Type", "").startswith("application/json") else {}
        namespace = query.get("namespace") or sent.get("namespace")
        if cluster.multi_user and namespace and namespace not in cluster.namespaces:
            return self._answer(403, {"message": f"no access to namespace {namespace}"})
        if namespace and not cluster.multi_user:
            return self._answer(400, {"message": "In single-user mode, there is no namespace"})
        try:
            return self._answer(200, self._route(path, query, sent, body))
        except _ConflictError as conflict:
            return self._answer(409, {"message": str(conflict)})

    def _route(self, path: str, query: dict[str, str], sent: dict[str, Any], body: bytes) -> Any:
        cluster = self.cluster
        if path == "/pipelines/upload_version":
            cluster.uploads.append(body)
            row = {"display_name": query["name"], "name": query["name"], "pipeline_id": query["pipelineid"]}
            row["tags"] = json.loads(query.get("tags", "{}"))
            return cluster.add("versions", "pipeline_version_id", row)
        if match := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            found = cluster.list_of("versions", **query)["versions"]
            return {"pipeline_versions": [row for row in found if row["pipeline_id"] == match[1]]}
        if re.fullmatch(r"/runs/[^/]+:(archive|terminate)", path):
            return {}
        if match := re.fullmatch(r"/runs/([^/]+)", path):
            return cluster.run(match[1])
        if match := re.fullmatch(r"/recurringruns/([^/]+)", path):
            cluster.recurring[:] = [row for row in cluster.recurring if row["recurring_run_id"] != match[1]]
            return {}
        routes: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "/healthz"): cluster.health,
            ("GET", "/pipelines"): lambda: cluster.list_of("pipelines", **query),
            ("POST", "/pipelines"): lambda: cluster.add("pipelines", "pipeline_id", sent),
            ("GET", "/experiments"): lambda: cluster.list_of("experiments", **query),
            ("POST", "/experiments"): lambda: cluster.add("experiments", "experiment_id", sent),
            ("POST", "/runs"): lambda: cluster.add("runs", "run_id", sent),
            ("GET", "/recurringruns"): lambda: cluster.list_of("recurring", **query),
            ("POST", "/recurringruns"): lambda: cluster.add(
                "recurring", "recurring_run_id", {**sent, "status": f"{sent['mode']}D"}
            ),
        }
        return routes[self.command, path]()

    do_GET = do_POST = do_DELETE = _handle


@contextmanager
def serving(cluster: Cluster) -> Iterator[Cluster]:
    """Serve a cluster on a free port of this machine, whose address is then its `host`."""
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    cluster.host = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
