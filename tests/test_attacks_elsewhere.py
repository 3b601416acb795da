"""Attacks from other machines: a device that is measured, a cluster that is followed, a registry that names places.

And secrets on their way back: libraries put into their errors what they were given, in spellings of their own.
"""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import io
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from kfp import dsl
from test_attacks_reading import Attack, hold, ready
from typer.testing import CliRunner

from components import step
from pipelines import watch
from yolov8_nas import credentials, space
from yolov8_nas.commands import main as cli
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError, told
from yolov8_nas.files import read_json
from yolov8_nas.measure import bundle, returned
from yolov8_nas.measure.far import sealed
from yolov8_nas.registry import places
from yolov8_nas.run.lifecycle import telling
from yolov8_nas.runner import process
from yolov8_nas.space import Architecture, SearchSpace

# What a device elsewhere sends back -----------------------------------------------------------------------------------

ROW: Final = {
    "latency_ms": {"p50": 1.0, "p90": 1.1, "p99": 1.2}, "interval_ms": [0.9, 1.1], "memory_mb": 1.0,
    "rounds": [1.0, 1.0], "repetitions": 3, "disturbed": False, "energy_mj": None, "power_w": None, "gpu_ms": None,
    "reference_ms": 1.0,
}  # fmt: skip
PROFILE: Final = {
    "name": "cpu-1t", "id": "cpu-some-1t", "kind": "cpu", "model": "Some CPU", "cores": 1, "threads": 1,
    "instructions": ["avx2"], "caches": {"L2": 512}, "memory_gb": 1.0,
    "runtime": {"name": "onnxruntime", "version": "1.31.1"}, "system": "Linux 6.1",
}  # fmt: skip
ORDER: Final = {
    "format": 1, "purpose": "table", "hardware": "cpu-1t", "kind": "cpu", "threads": 1, "runtime": "onnxruntime",
    "precision": "fp32", "batch": 1, "protocol": {}, "recipe": {"num_classes": 2, "failed": {}},
    "reference": "a.onnx", "networks": {"a.onnx": "0" * 64},
}  # fmt: skip
RESULTS: Final = {
    "format": 1, "profile": PROFILE, "counter": None, "no_counter": "none here", "networks": ORDER["networks"],
    "key": {name: PROFILE[name] for name in ("id", "model", "threads", "instructions", "caches", "runtime")},
    "regime": {"before": {}, "after": {}}, "measured": {"a.onnx": ROW},
}  # fmt: skip


def _target(folder: Path) -> TargetConfig:
    far = {"hardware": "cpu-1t", "constraints": ["latency<=10s"], "far": str(folder / "far.json")}
    return RunConfig.parse({"space": "tiny", "imgsz": 64, "targets": [far]}, "c").targets[0]


def _sent(**changes: Any) -> Callable[[Path], object]:
    """Results with other content, and the digest that goes with it; `without` names what is left out."""
    left_out = changes.pop("without", None)
    order = {**ORDER, **changes.pop("order", {})}

    def attempt(folder: Path) -> object:
        content = {**RESULTS, "bundle": sealed(order), **changes}
        content.pop(left_out, None)
        text = json.dumps(sealed(content) if _countable(content) else {**content, "digest": "0" * 64})
        (folder / "results.json").write_text(text)
        read = bundle.read_results(folder / "results.json", _target(folder))
        returned.check_table(returned.Returned(read), folder / "results.json")
        return read

    return attempt


def _countable(content: object) -> bool:
    try:
        return bool(json.dumps(content, allow_nan=False))
    except ValueError:
        return False


def _row(**changes: Any) -> Callable[[Path], object]:
    return _sent(measured={"a.onnx": {**ROW, **changes}})


def _latency(**changes: Any) -> Callable[[Path], object]:
    return _row(latency_ms={"p50": 1.0, "p90": 1.1, "p99": 1.2, **changes})


def _named(name: str) -> Callable[[Path], object]:
    networks = {name: "0" * 64}
    return _sent(order={"networks": networks}, networks=networks, measured={name: ROW})


DEVICE: Final = [
    Attack("a time of no seconds", _latency(p50=0), "p50: Input should be greater than 0"),
    Attack("a time below zero", _latency(p50=-1.0), "p50: Input should be greater than 0"),
    Attack("a time that is no number", _latency(p50=float("nan")), "NaN is no number"),
    Attack("a time without end", _latency(p99=float("inf")), "Infinity is no number"),
    Attack("a time of a year", _latency(p99=4e10), "p99: Input should be less than"),
    Attack("a time as text", _latency(p50="1.0"), "p50: Input should be a valid number"),
    Attack("a time that is true", _latency(p50=True), "p50: Input should be a valid number"),
    Attack("percentiles that fall", _latency(p99=1.05), "do not rise"),
    Attack("a percentile more", _latency(__class__=1.0), "__class__"),
    Attack("an interval of one end", _row(interval_ms=[1.0]), "interval_ms"),
    Attack("an interval that is a text", _row(interval_ms="ab"), "interval_ms"),
    Attack("rounds that are a text", _row(rounds="abc"), "rounds"),
    Attack("a hundred thousand rounds", _row(rounds=[1.0] * 100_000), "rounds"),
    Attack("memory below zero", _row(memory_mb=-1.0), "memory_mb"),
    Attack("memory as text", _row(memory_mb="a lot"), "memory_mb"),
    Attack("no repetitions", _row(repetitions=0), "repetitions"),
    Attack("energy as a list", _row(energy_mj=[1.0]), "energy_mj"),
    Attack("a reference of no time", _row(reference_ms=0.0), "reference_ms"),
    Attack("a row that is a text", _sent(measured={"a.onnx": "fast"}), "measured.a.onnx"),
    Attack("a row that is nothing", _sent(measured={"a.onnx": None}), "measured.a.onnx"),
    Attack("a failure that is a number", _sent(measured={"a.onnx": {"failed": 7}}), "measured.a.onnx"),
    Attack("rows in a list", _sent(measured=["a.onnx"]), "measured"),
    Attack("no rows", _sent(without="measured"), "holds no measurements"),
    Attack("no networks", _sent(without="networks"), "networks: Field required"),
    Attack("no profile", _sent(without="profile"), "profile: Field required"),
    Attack("a profile that is nothing", _sent(profile=None), "profile"),
    Attack("an id that leads up", _sent(profile={**PROFILE, "id": "../../x"}), "profile.id"),
    Attack("a runtime without a version", _sent(profile={**PROFILE, "runtime": {"name": "x"}}), "without name and"),
    Attack("a profile with a part more", _sent(profile={**PROFILE, "__class__": 1}), "profile.__class__"),
    Attack("no key", _sent(without="key"), "key: Field required"),
    Attack("the key of another device", _sent(key={**RESULTS["key"], "model": "Another"}), "another device"),
    Attack("no bundle", _sent(without="bundle"), "holds no measurements"),
    Attack("a bundle that is a text", _sent(bundle="x"), "has no digest of itself"),
    Attack("a purpose that leads up", _sent(order={"purpose": "../../x"}), "bundle.purpose"),
    Attack("a recipe that is nothing", _sent(order={"recipe": None}), "bundle.recipe"),
    Attack("a recipe without classes", _sent(order={"recipe": {"failed": {}}}), "num_classes"),
    Attack("a billion classes", _sent(order={"recipe": {"num_classes": 10**9, "failed": {}}}), "num_classes"),
    Attack("a network that leads up", _named("../../x.onnx"), "'..' in its path"),
    Attack("an absolute network", _named("/etc/passwd"), "an absolute path"),
    Attack("a network in a folder", _named("a/b.onnx"), "a slash in it"),
    Attack("a SHA-256 that is none", _sent(order={"networks": {"a.onnx": "0"}}, networks={"a.onnx": "0"}), "SHA-256"),
    Attack("a regime that is a number", _sent(regime=7), "regime"),
    Attack("a counter that is a list", _sent(counter=["x"]), "counter"),
]


@pytest.mark.parametrize("attack", DEVICE, ids=lambda attack: attack.name)
def test_a_device_that_lies(attack: Attack, tmp_path: Path) -> None:
    said = hold(attack, tmp_path)
    assert "\n" not in said


def test_what_a_device_really_sends_is_taken(tmp_path: Path) -> None:
    failed = {"measured": {"a.onnx": {"failed": "no room"}}}
    for changes in ({}, {"measured": {"a.onnx": {**ROW, "energy_mj": 3.5, "gpu_ms": 0.5}}}, failed):
        assert _sent(**copy.deepcopy(changes))(tmp_path)


# What a cluster says of a run -----------------------------------------------------------------------------------------


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content)).decode()


def _followed(workflow: Mapping[str, Any]) -> Callable[[Path], object]:
    def attempt(_: Path) -> object:
        found = [str(step) for step in watch.steps(workflow, ["cpu"])]
        raise InputError(f"{len(found)} steps: {'; '.join(found)}")

    return attempt


def _node(**changes: Any) -> dict[str, Any]:
    node = {"id": "x-1", "name": "x.open-run", "displayName": "open-run", "type": "Pod", "phase": "Running"}
    return {**node, **changes}


def _nodes(**changes: Any) -> Mapping[str, Any]:
    return {"metadata": {"name": "run"}, "status": {"nodes": {"x": _node(**changes)}}}


def _bomb(folder: Path) -> object:
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb", compresslevel=1) as file:
        for part in (b"[", *[b" " * 2**20] * 1024, b"]"):
            file.write(part)
    packed = base64.b64encode(buffer.getvalue()).decode()
    ready()
    return _followed({"status": {"compressedNodes": packed}})(folder)


CLUSTER: Final = [
    Attack("nodes that unpack to a gigabyte", _bomb, "0 steps"),
    Attack("nodes that nest", _followed({"status": {"compressedNodes": _packed(b"[" * 10**5)}}), "0 steps"),
    Attack("nodes that are cut off", _followed({"status": {"compressedNodes": _packed(b"{}")[:16]}}), "0 steps"),
    Attack("nodes that are no gzip", _followed({"status": {"compressedNodes": "eHh4"}}), "0 steps"),
    Attack("nodes that are a number", _followed({"status": {"compressedNodes": 7}}), "0 steps"),
    Attack("a status that is a list", _followed({"status": [1]}), "0 steps"),
    Attack("nodes that are a list", _followed({"status": {"nodes": [1]}}), "0 steps"),
    Attack("a node that is a text", _followed({"status": {"nodes": {"x": "y"}}}), "0 steps"),
    Attack("a name that is a number", _followed(_nodes(displayName=7)), "0 steps"),
    Attack("a phase that is a list", _followed(_nodes(phase=["Running"])), "0 steps"),
    Attack("an iteration of many digits", _followed(_nodes(name=f"x.iteration-iterations({'9' * 9999}:")), "1 step"),
    Attack(
        "a pod whose name is a command for a shell",
        _followed({**_nodes(phase="Failed"), "metadata": {"name": "x; rm -rf ~", "namespace": "$(id)"}}),
        "log: kubectl -n '$(id)' logs 'x; rm -rf ~-None-1' -c main",
    ),
    Attack("a message with an escape", _followed(_nodes(phase="Failed", message="\x1b[2J gone")), r"\x1b[2J gone"),
]  # fmt: skip


@pytest.mark.parametrize("attack", CLUSTER, ids=lambda attack: attack.name)
def test_a_cluster_that_lies(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)


def test_nodes_that_are_packed_are_read() -> None:
    packed = _packed(json.dumps({"x": _node()}).encode())
    (step,) = watch.steps({"status": {"compressedNodes": packed}}, [])
    assert step.state == "running"


OPENED: Final = {
    "another tracking server": b'{"tracking_uri": "http://evil.example"}', "nothing": b"", "no JSON": b"{",
    "a byte more": b'{"tracking_uri": "http://ours"} ',
}  # fmt: skip
"""What lies in the place of what open-run wrote, in a bucket of Kubeflow's that others may write to."""


@pytest.mark.parametrize("what", OPENED)
def test_what_open_run_wrote_is_taken_as_it_wrote_it(what: str, tmp_path: Path) -> None:
    content = b'{"tracking_uri": "http://ours"}'
    artifact = dsl.Artifact(uri=str(tmp_path / "run.json"))
    (tmp_path / "run.json").write_bytes(content)
    artifact.metadata["sha256"] = hashlib.sha256(content).hexdigest()
    assert step.opened(artifact) == {"tracking_uri": "http://ours"}
    (tmp_path / "run.json").write_bytes(OPENED[what])
    with pytest.raises(StageError, match="was changed on its way"):
        step.opened(artifact)
    del artifact.metadata["sha256"]
    with pytest.raises(StageError, match="was changed on its way"):
        step.opened(artifact)


# Spaces and architectures ---------------------------------------------------------------------------------------------

HOSTILE: Final = {
    "nothing": None, "a number": 7, "a text": "x", "true": True, "an empty list": [], "a list of lists": [[]],
    "a list of mappings": [{}], "no number": [float("nan")], "a number without end": [float("inf")],
    "a huge number": [10**18], "below zero": [-8], "a hundred thousand options": [8] * 100_000,
}  # fmt: skip
"""What stands in the place of each part of a description."""

DESCRIPTIONS: Final = {"space": SearchSpace.from_dict, "architecture": Architecture.from_dict}


def _described(kind: str) -> dict[str, Any]:
    text = (Path(space.__file__).parent / "spaces" / "tiny.yaml").read_text()
    described: dict[str, Any] = yaml.safe_load(text)
    return described if kind == "space" else SearchSpace.from_dict(described).stock.to_dict()


def _places(part: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield place
    if isinstance(part, dict):
        for key, value in part.items():
            yield from _places(value, (*place, key))


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_description_with_something_else_in_each_of_its_places(kind: str, hostile: str) -> None:
    """Each is refused in a line, or is such as a network can be built of."""
    sound = _described(kind)
    for place in _places(sound):
        described = {"": copy.deepcopy(sound)}
        part: Any = described
        for key in ("", *place)[:-1]:
            part = part[key]
        part[("", *place)[-1]] = HOSTILE[hostile]
        try:
            found = DESCRIPTIONS[kind](described[""])
        except space.SpaceError as error:
            assert len(str(error)) < 2600
        else:
            assert DESCRIPTIONS[kind](json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found, place
            assert place == ("name",) or str(10**18) not in str(found), place


# Where a registry says that files lie ---------------------------------------------------------------------------------

SERVER: Final = "https://mlflow.example:5000"

PLACES: Final = (
    "mlflow-artifacts://evil.example/a", "mlflow-artifacts://mlflow.example/a", "mlflow-artifacts://mlflow.example:1/a",
    "http://mlflow.example:5000/api/2.0/mlflow-artifacts/artifacts/a", "https://evil.example:5000/a",
    "https://mlflow.example:5000@evil.example/a", "https://mlflow.example/a", "http://169.254.169.254/latest/meta-data",
    "ftp://evil.example/a", "sftp://evil.example/a", "file://evil.example/share", "https://mlflow.example:x/a",
    "runs:/0/a", "models:/other/1", "databricks://x/a", "javascript:alert(1)", "\x1b[2J://x", "https:///a",
)  # fmt: skip
"""Addresses to which MLflow's client would go, some of them with the credentials for the tracking server."""

SOUND_PLACES: Final = (
    "mlflow-artifacts:/1/models/m-1/artifacts", "mlflow-artifacts://mlflow.example:5000/a", "s3://bucket/a",
    "https://mlflow.example:5000/api/2.0/mlflow-artifacts/artifacts/a", "/srv/mlruns/1", "file:///srv/mlruns/1",
    "gs://bucket/a", "wasbs://container@account.example/a",
)  # fmt: skip


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://user:secret@mlflow.example:5000")


@pytest.mark.parametrize("place", PLACES)
def test_nobody_is_asked_at_a_place_that_is_not_the_servers(place: str, connected: None) -> None:
    with pytest.raises(InputError, match="nobody is asked there") as caught:
        places.check(place, "line/1")
    assert "secret" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("place", SOUND_PLACES)
def test_places_that_registries_have_are_gone_to(place: str, connected: None) -> None:
    places.check(place, "line/1")


def test_credentials_do_not_go_to_whoever_an_experiment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack as a whole: a reader of a version whose experiment keeps its files at the attacker's."""
    import mlflow
    from registering import Branch

    from yolov8_nas.registry import pull, query, tracking

    heard: list[str | None] = []

    class Ear(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization"))
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a password of the reader")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = tracking.resolve_uri(None, tmp_path / "store")
    Branch(uri, "line", tmp_path / "branch").register()
    server = HTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        evil = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/a"
        sound = query.find(uri, "line")
        with pytest.raises(Exception, match=r"404|Expecting value"):
            mlflow.artifacts.download_artifacts(f"{evil}/best.pt", dst_path=str(tmp_path))
        assert heard and heard[0] and heard[0].startswith("Basic "), "MLflow's client gives them to anybody"
        heard.clear()
        monkeypatch.setattr(query, "_described", lambda *_: _with(sound, artifacts=evil))
        with pytest.raises(InputError, match="nobody is asked there"):
            pull.pull(uri, "line", tmp_path / "pulled")
        client = tracking.connect(uri)
        client.create_experiment("evil", artifact_location=evil)
        with pytest.raises(InputError, match="nobody is asked there"):
            tracking.experiment_id(client, "evil")
    finally:
        server.shutdown()
        server.server_close()
    assert heard == [] and not (tmp_path / "pulled").exists()


def _with(version: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(version, **changes)


# Secrets in what libraries say ----------------------------------------------------------------------------------------

USER: Final = "http://user:p%40ss%2fw0rd%20long@127.0.0.1:9/x?sig=a%2fb%2Bc%7Edefgh&n=1"
PASSWORD: Final = "p@ss/w0rd long"
TOKEN: Final = "t0ken-of-the-environment"

SPELLINGS: Final = {
    "as it was given": "p%40ss%2fw0rd%20long", "decoded": PASSWORD, "in upper case": "p%40ss%2Fw0rd%20long",
    "with a plus": "p%40ss%2Fw0rd+long", "with its slash": "p%40ss/w0rd%20long", "with its at": "p@ss/w0rd%20long",
    "as HTTP sends it": base64.b64encode(f"user:{PASSWORD}".encode()).decode(),
    "a query as it was given": "a%2fb%2Bc%7Edefgh", "a query decoded": "a/b+c~defgh",
    "a query as requests writes it": "a%2Fb%2Bc~defgh", "a query in upper case": "a%2Fb%2Bc%7Edefgh",
    "a query in lower case": "a%2fb%2bc~defgh", "a token of the environment": TOKEN,
    "a token in the form of Python": repr(f"Bearer {TOKEN}\n")[1:-1],
}  # fmt: skip


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(credentials.VARIABLE, "")
    monkeypatch.delenv(credentials.TRACKING_VARIABLE, raising=False)
    monkeypatch.setattr(credentials, "_taken", set())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{TOKEN}\n")  # as from a file
    assert credentials.hidden(USER) == "http://127.0.0.1:9/x"


def _silent(said: str) -> None:
    for spelling in (*SPELLINGS.values(), TOKEN):
        assert spelling not in said, said[:2000]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_secret_is_known_in_each_spelling(spelling: str, planted: None) -> None:
    _silent(told(f"401 for {SPELLINGS[spelling]}, sent to the server"))


def _requests(_: Path) -> object:
    import requests

    return requests.get(USER, timeout=2)


def _header(_: Path) -> object:
    import requests

    header = {"Authorization": f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}"}
    return requests.get("http://127.0.0.1:9", headers=header, timeout=2)


def _boto3(_: Path) -> object:
    import boto3

    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "x"}
    return boto3.client("s3", endpoint_url=USER, **keys).list_buckets()


def _mlflow(_: Path) -> object:
    from mlflow import MlflowClient

    return MlflowClient(USER.partition("/x")[0]).search_experiments()


def _sqlalchemy(_: Path) -> object:
    import sqlalchemy

    return sqlalchemy.create_engine(f"{USER.replace('http', 'postgresql+psycopg2')}&port=x").connect()


def _urllib(_: Path) -> object:
    from urllib.request import urlopen

    return urlopen(USER, timeout=2)


LIBRARIES: Final = {
    "requests": _requests, "requests, of a header": _header, "boto3": _boto3, "MLflow": _mlflow,
    "SQLAlchemy": _sqlalchemy, "urllib": _urllib,
}  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_says_shows_no_secret(library: str, planted: None, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        LIBRARIES[library](tmp_path)
    _silent(told("".join(traceback.format_exception(caught.value))))
    _silent(str(InputError(str(caught.value))))


def test_a_task_that_fails_shows_no_secret(planted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in the run's records nor in its log, nor in what Python shows of an error that nobody foresaw."""
    with pytest.raises(StageError) as caught, telling("open-run", store=str(tmp_path), run_id="run"):
        try:
            raise KeyError(f"{USER} {PASSWORD}")
        except KeyError:
            raise RuntimeError(f"no answer to Bearer {TOKEN} from {USER}") from None
    _silent("".join(traceback.format_exception(caught.value)))
    out, err = capsys.readouterr()
    _silent(out + err)
    assert "Traceback" in err and "RuntimeError: no answer to Bearer *** from http://127.0.0.1:9/x" in out
    _silent(json.dumps(read_json(tmp_path / "runs" / "run" / "failure.all.open-run.json")))


def test_a_command_that_fails_shows_no_secret(planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"no answer to Bearer {TOKEN} from {USER}: {PASSWORD}")

    monkeypatch.setattr(cli.RunConfig, "load", fail)
    result = CliRunner().invoke(cli.app, ["run", "run.yaml"])
    assert result.exit_code == 1
    assert "RuntimeError: no answer to Bearer ***" in result.output and "Traceback" in result.output
    _silent(result.output)


def test_a_process_that_fails_shows_no_secret(planted: None, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught, (tmp_path / "log").open("w"):
        process.call("requests:get", log=tmp_path / "log", url=USER, timeout=2)
    _silent("".join(traceback.format_exception(caught.value)))
    written = (tmp_path / "log").read_text()
    assert "Traceback" in written
    _silent(written)


def test_security_md_tells_how_many_attacks_there_are() -> None:
    rows = sum(map(len, (DEVICE, CLUSTER, OPENED, PLACES, SPELLINGS, LIBRARIES))) + len(HOSTILE) * len(DESCRIPTIONS)
    lines = (Path(__file__).parents[1] / "SECURITY.md").read_text().splitlines()
    (line,) = (line for line in lines if f"`tests/{Path(__file__).name}`" in line)
    assert line.endswith(f"| {rows} | {rows} |"), rows
