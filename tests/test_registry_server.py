"""The registry on a real MLflow server, through a proxy that fails on purpose; the gate; the model as it is served."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import pytest
import registering
import servers
import torch
from detection import CLASSES, lively, make_dataset
from fabricated import CONFIG, PROFILE
from typer.testing import CliRunner
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.commands.main import app
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.measure import protocol
from yolov8_nas.measure.target import resolve
from yolov8_nas.registry import promote, query, recheck, register, spool, tracking
from yolov8_nas.registry.pull import pull
from yolov8_nas.supernet.derive import save_checkpoint

pytestmark = pytest.mark.slow

DOCS: Final = Path(__file__).parents[1] / "docs" / "registry.md"
SIDE: Final = 64
SUFFIX: Final = "cpu-example-2-5-ghz-2t-fp32-lat-p50-80pct-yolov8n"

Fault = Callable[[str, str], str | None]
"""From method and path of a request to what goes wrong: a status, `slow`, `lost` (the answer) or `cut` (the body)."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server with a database and artifacts of its own."""
    folder = tmp_path_factory.mktemp("server")
    with servers.mlflow(folder, f"sqlite:///{folder}/server.db", f"{folder}/artifacts") as uri:
        yield uri


class Proxy:
    """Hands requests on to a server, except those that `fault` has something against."""

    def __init__(self, server: str) -> None:
        self.fault: Fault = lambda method, path: None
        self.faults = 0
        proxy, address = self, server.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _hand_on(self) -> None:
                fault = proxy.fault(self.command, self.path)
                proxy.faults += fault is not None
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.close_connection = True
                if fault in ("401", "503"):
                    self.send_error(int(fault))
                    return
                if fault == "slow":
                    time.sleep(3)
                    return
                upstream = http.client.HTTPConnection(address)
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders()
                upstream.send(body[: len(body) // 2] if fault == "cut" else body)
                if fault == "cut":
                    upstream.close()
                    return
                answer = upstream.getresponse()
                content = answer.read()
                upstream.close()
                if fault == "lost":
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    proxy = Proxy(server)
    yield proxy
    proxy.http.shutdown()
    proxy.http.server_close()


def test_server_does_as_the_database_does(server: str, tmp_path: Path) -> None:
    """A server answers with other types (a version is text), and artifacts go through it."""
    branch = registering.Branch(server, "served", tmp_path)
    entries = [branch.register(map50_95=score) for score in (0.4, 0.5, 0.4, 0.3)]
    assert [entry["version"] for entry in entries] == [1, 2, 1, 3]
    assert [entry["aliases"] for entry in entries] == [
        [f"champion-{SUFFIX}"],
        [f"champion-{SUFFIX}"],
        [],
        [f"challenger-{SUFFIX}"],
    ]
    assert query.best(server, PROFILE["model"], 10, name="served").version == 2
    assert [version.version for version in query.list_models(server, "served")] == [3, 2, 1]
    assert query.find(server, f"served@challenger-{SUFFIX}").metrics["map50_95"] == 0.3
    assert promote.rollback(server, f"served@champion-{SUFFIX}")[0].version == 1
    version, folder = pull(server, f"served@champion-{SUFFIX}", tmp_path / "pulled")
    assert set(version.files) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    with pytest.raises(InputError, match="no registered model 'nothing'"):
        pull(server, "nothing")


def test_eight_at_once_make_one_version(server: str, tmp_path: Path) -> None:
    registering.eight_at_once(server, tmp_path)


def test_server_that_recovers_is_asked_again(proxy: Proxy, tmp_path: Path) -> None:
    turn = count()
    proxy.fault = lambda method, path: "503" if next(turn) % 5 == 4 else None
    entry = registering.Branch(proxy.uri, "stutter", tmp_path).register()
    assert proxy.faults
    assert (entry["version"], entry["role"]) == (1, "champion")


@pytest.mark.parametrize("fault", ["503", "slow", "down"])
def test_server_that_does_not_recover_gets_it_later(
    proxy: Proxy, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    model = f"later-{fault}"
    branch = registering.Branch(proxy.uri, model, tmp_path)
    if fault == "slow":
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    # The run was opened while the server was well.
    proxy.fault = lambda method, path: {"down": "lost"}.get(fault, fault) if "registered-models" in path else None
    entry = branch.register()
    assert (entry["model"], "version" in entry) == (model, False)
    (waiting,) = spool.waiting(branch.store)
    with pytest.raises(InputError, match="try again when the server is well"):
        spool.send(branch.store, proxy.uri)
    assert spool.waiting(branch.store) == [waiting]
    proxy.fault = lambda method, path: None
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert spool.send(branch.store, proxy.uri).sent == (waiting.what,)
    assert [version.version for version in query.list_models(server, model)] == [1]
    assert spool.send(branch.store, proxy.uri) == spool.Sent((), ())


def test_server_that_lets_nobody_in_says_what_it_wants(proxy: Proxy, tmp_path: Path) -> None:
    branch = registering.Branch(proxy.uri, "locked", tmp_path)
    proxy.fault = lambda method, path: "401" if "registered-models" in path or "model-versions" in path else None
    result = CliRunner().invoke(app, ["models", "list", "--tracking", proxy.uri])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in result.stderr
    assert "spooled" in branch.register()
    proxy.fault = lambda method, path: None
    assert len(spool.send(branch.store, proxy.uri).sent) == 1


def test_upload_that_is_cut_off_leaves_nothing_that_claims_to_be_whole(
    proxy: Proxy, server: str, tmp_path: Path
) -> None:
    branch = registering.Branch(proxy.uri, "cut", tmp_path)
    proxy.fault = lambda method, path: "cut" if method == "PUT" and path.endswith("best.pt") else None
    assert "version" not in branch.register()
    with pytest.raises(InputError, match="no registered model 'cut'"):
        query.find(server, "cut")
    proxy.fault = lambda method, path: None
    spool.send(branch.store, proxy.uri)
    version, _ = pull(server, "cut", tmp_path / "pulled")
    assert version.version == 1


def test_answers_that_are_lost_double_nothing(proxy: Proxy, server: str, tmp_path: Path) -> None:
    asked: set[str] = set()

    def lose_the_first(method: str, path: str) -> str | None:
        if method == "GET" or path in asked or "create" not in path:
            return None
        asked.add(path)
        return "lost"

    proxy.fault = lose_the_first
    entry = registering.Branch(proxy.uri, "echo", tmp_path).register()
    assert proxy.faults >= 3  # the run, the logged model, the version
    client = tracking.connect(server)
    assert [int(version.version) for version in client.search_model_versions("name = 'echo'")] == [entry["version"]]
    runs = client.search_runs(
        [client.get_run(entry["run_id"]).info.experiment_id], f"tags.`{tracking.BRANCH_TAG}` LIKE 'run-echo-%'"
    )
    assert [run.info.run_id for run in runs] == [entry["run_id"]]
    pull(server, "echo", tmp_path / "pulled")


def test_version_is_carried_to_another_registry_once(server: str, tmp_path: Path) -> None:
    staging = registering.Branch(server, "carried", tmp_path)
    staging.register(map50_95=0.4)
    production = tracking.resolve_uri(None, tmp_path / "production" / "store")
    tracking.connect(production)
    for created in (True, False):
        version, there = promote.copy(server, "carried", production)
        assert (there.version, there.created, there.role) == (1, created, "champion")
    (copied,) = query.list_models(production)
    assert (copied.files, copied.metrics, copied.params) == (version.files, version.metrics, version.params)
    assert pull(production, "carried", tmp_path / "pulled")[0].description == version.description

    stored = tracking.connect(production).get_logged_model(copied.tags["model_id"]).artifact_location
    (Path(stored.removeprefix("file://")) / "best.pt").write_bytes(b"tampered")
    with pytest.raises(StageError, match=r"best\.pt has SHA-256"):
        promote.copy(production, "carried", server)


def sharp_network(seed: int) -> DetectionModel:
    """A network that is sure of some small boxes, and not of others, though it was never trained."""
    network = lively(SIDE, seed, gain=1.6, shift=0.3)
    head = network.model[-1]
    for branch in head.cv2:
        torch.nn.init.normal_(branch[-1].weight, std=0.5)
        branch[-1].bias.data = (-1.5 * torch.arange(head.reg_max)).repeat(4)
    for branch in head.cv3:
        torch.nn.init.normal_(branch[-1].weight, std=1.0)
        torch.nn.init.constant_(branch[-1].bias, -6.0)
    return network


class Line:
    """A registered model with real detectors for this machine, on one thread."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        self.uri, self.name, self.folder = uri, name, folder
        self.client = tracking.connect(uri)
        self.hardware_id = resolve("cpu-1t").id

    def register(self, seed: int, limit: float = 1e4, map50_95: float = 0.4) -> register.Registration:
        """Register a network; a limit of its own makes a version of its own."""
        folder = self.folder / str(seed)
        folder.mkdir(parents=True)
        network = sharp_network(seed)
        export_onnx(network, folder / "model.onnx", imgsz=SIDE, names=CLASSES)
        save_checkpoint(network, folder / "best.pt", names=CLASSES, imgsz=SIDE)
        deployable = register.Deployable(
            name=self.name,
            files={file.name: file for file in folder.iterdir()},
            hardware_id=self.hardware_id,
            precision="fp32",
            limits=("latency<=80%stock",),
            scale="n",
            resolved=[{"metric": "latency", "statistic": "p50", "scope": "engine", "limit": limit, "unit": "ms"}],
            metrics={"map50_95": map50_95, "latency_p50_ms": 3.0, "params": 1.0, "gflops": 1.0},
            params={"imgsz": str(SIDE), "batch": "1", "classes": ", ".join(CLASSES), "architecture": "{}"},
            tags={
                "hardware": "cpu-1t",
                "hardware_model": "this one",
                "runtime": "onnxruntime",
                "runtime_version": "1.0",
                "file": "model.onnx",
                "imgsz": str(SIDE),
                "dataset": "d" * 64,
                "dataset_name": self.name,
            },
            description="made up",
        )
        run = tracking.open_run(CONFIG, f"{self.name}-{seed}", self.uri)
        return register.register(self.client, run, deployable)


@pytest.fixture
def line(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    quick = protocol.Protocol(warmup=1, repetitions=3, min_rounds=2, max_rounds=2)
    monkeypatch.setattr(protocol, "VERIFY", quick)
    return Line(server, f"line-{tmp_path.name.replace('_', '-')[:40]}", tmp_path / "networks")


def test_gate_scores_and_measures_both_again(line: Line, server: str, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", train=6, search=0, val=4) / "dataset"
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(CLASSES))
    (data / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    roles = [line.register(0).role, line.register(1, map50_95=0.3).role]
    roles.append(line.register(2, limit=1e-6, map50_95=0.2).role)
    assert roles == ["champion", "challenger", "challenger"]

    refused = promote.promote(server, f"{line.name}/3", data=str(data), tolerance=0.9)
    assert not refused["promoted"]
    assert re.search(r"^misses latency_p50 .* limit 1e-06, measured here with onnxruntime", refused["reasons"][0])
    assert refused["challenger"]["measured"]["latency_ms"]["p50"] > 0

    done = promote.promote(server, f"{line.name}/2", data=str(data), tolerance=0.9)
    assert done["promoted"]
    assert done["scored_on"].startswith("4 images of val")
    assert done["not_measured"] is None
    # The champion was measured in the same rounds; what the registry says of either did not count.
    assert len(done["champion"]["measured"]["interval_ms"]) == 2
    assert 0 <= done["challenger"]["map50_95"] != 0.3
    assert done["comparison"]["word"] in ("ahead", "undecided", "behind")

    (data / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [disc, square]\n")
    with pytest.raises(InputError, match="its classes are disc, square, those of"):
        promote.promote(server, f"{line.name}/1", data=str(data))


def test_recheck_tells_which_champion_no_longer_keeps_its_limit(line: Line, server: str) -> None:
    done = line.register(3, limit=1e-6)
    (row,) = [row for row in recheck.recheck(server) if row["model"] == line.name]
    assert (row["version"], row["kept"]) == (done.version, False)
    assert row["registered"]["limits"][0]["measured"] == 3.0
    assert row["registered"]["runtime"] == "onnxruntime 1.0" != row["measured"]["runtime"]
    tags = query.find(server, line.name).tags
    assert '"kept": false' in tags["recheck"]
    assert any(alias.startswith("champion-") for alias in done.aliases)


def test_served_model_finds_what_ultralytics_finds(line: Line, server: str) -> None:
    """The documented way from an image to detections, with MLflow, NumPy and OpenCV alone."""
    import mlflow
    from ultralytics import YOLO

    done = line.register(2)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    documented: dict[str, Any] = {}
    exec(next(block for block in blocks if "def detect(" in block), documented)
    network = mlflow.pyfunc.load_model(f"models:/{done.model}@{done.aliases[0]}")
    yolo = YOLO(line.folder / "2" / "best.pt")
    image = np.random.default_rng(0).integers(0, 255, (90, 150, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 5)
    for shown in (image, image.transpose(1, 0, 2).copy()):
        boxes, scores, classes = documented["detect"](network, shown, SIDE)
        (found,) = yolo.predict(shown, imgsz=SIDE, rect=False, conf=0.25, iou=0.7, device="cpu", verbose=False)
        assert len(scores) == len(found.boxes) >= 3
        assert len(np.unique(classes)) == len(CLASSES)
        assert (np.ptp(boxes, axis=0) > 5).any()
        np.testing.assert_allclose(scores, found.boxes.conf.numpy(), atol=0.01)
        np.testing.assert_allclose(boxes, found.boxes.xyxy.numpy(), atol=0.5)
        np.testing.assert_array_equal(classes, found.boxes.cls.numpy())
