"""The registry with a thousand versions: how long `best` takes, and how fast a model is registered.

    python benchmarks/registry.py --workdir runs/registry

Starts PostgreSQL, an object store (OpenStack Swift, or the endpoint that YOLOV8_NAS_TEST_S3 names) and MLflow's server
in front of both. One version is registered as the register stage does it; the others get its tags, parameters and
metrics through MLflow's client, with other names, devices and figures, and no files, for which `best` does not ask.
Then `query.best` is asked again and again. Last, a model of 50 MB is registered through the server, in turn with
boto3's upload of the same file to the same object store: of two that follow each other, the ratio counts.

It ends with a table, in the work folder as `report.md` and `report.json`. Figures in milliseconds are those of this
machine with what else ran on it; the server and what asks it share its cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import boto3
import numpy as np
import onnx
from setting import machine

from yolov8_nas.registry import query, tracking
from yolov8_nas.registry.query import RegisteredVersion
from yolov8_nas.registry.register import COMPLETE, CONTENT, MODEL_ID, STATE, register
from yolov8_nas.store import read_json, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the servers are those of the tests

import registering
import servers

DEVICES: Final = 7
MODELS: Final = 10
RESAMPLES: Final = 10_000
TARGET: Final = "line-3"
TOY: Final = {"versions": 12, "calls": 2, "megabytes": 1, "uploads": 2}


def main() -> None:
    """Parse arguments, start servers, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder to make: logs of the servers, the report")
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=50, help="how often each question is asked")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--uploads", type=int, default=15, help="pairs of uploads")
    parser.add_argument("--toy", action="store_true", help="a few small ones, whose figures mean nothing")
    arguments = parser.parse_args()
    if arguments.toy:
        vars(arguments).update(TOY)
    arguments.workdir.mkdir(parents=True)
    with servers.team(arguments.workdir) as (uri, bucket):
        report(uri, bucket, arguments)


def report(uri: str, bucket: str, arguments: argparse.Namespace) -> None:
    """Measure on servers that run, and write `report.json` and `report.md`."""
    folder = arguments.workdir
    template = fill(uri, folder, arguments.versions)
    latencies = ask(uri, template, arguments.calls)
    command = [sys.executable, "-m", "yolov8_nas.cli", "models", "best", "--tracking", uri]
    command += ["--hardware", "device-1", "--max-latency", "5ms"]
    latencies["the whole command `yolov8-nas models best`"] = repeated(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), max(3, arguments.calls // 10)
    )
    uploads = upload(uri, bucket, folder, arguments.megabytes, arguments.uploads)
    result = {"machine": machine(1), "versions": arguments.versions, "seconds": latencies, "uploads": uploads}
    write_json(folder / "report.json", result)
    (folder / "report.md").write_text(text := "\n".join(table(read_json(folder / "report.json"))) + "\n")
    print(text, end="")


def fill(uri: str, folder: Path, versions: int) -> RegisteredVersion:
    """Register versions; the first is a real one, and is returned."""
    client = tracking.connect(uri)
    entry = registering.Branch(uri, TARGET, folder / "branch").register()
    template = query.find(uri, f"{TARGET}/{entry['version']}")
    experiment = client.get_run(entry["run_id"]).info.experiment_id

    def add_to(model: int) -> None:
        add(client, experiment, template, f"line-{100 + model}", range(model or MODELS, versions, MODELS))

    with ThreadPoolExecutor(MODELS) as pool:
        list(pool.map(add_to, range(MODELS)))
    return template


def add(client: Any, experiment: str, template: RegisteredVersion, name: str, numbers: Sequence[int]) -> None:
    """Record versions of a new model as `register` does, with the tags of another, and without files."""
    from mlflow.entities import Metric

    client.create_registered_model(name)
    run = client.create_run(experiment, run_name=name).info
    for version, number in enumerate(numbers, 1):
        device = f"device-{number % DEVICES}"
        tags = {key: value for key, value in template.tags.items() if key not in (STATE, MODEL_ID)}
        tags |= {"hardware": device, "hardware_id": device, "hardware_model": device, CONTENT: f"{number:064x}"}
        tags |= {"precision": ("fp32", "fp16", "int8")[number % 3], STATE: COMPLETE}
        model = client.create_logged_model(
            experiment,
            name=name,
            source_run_id=run.run_id,
            tags={**tags, "registered_model": name, "registered_version": str(version)},
            params=dict(template.params),
            model_type="detector",
        )
        source = {"source": f"models:/{model.model_id}", "run_id": run.run_id, "model_id": model.model_id}
        client.create_model_version(name, tags={**tags, MODEL_ID: model.model_id}, **source)
        score = np.random.default_rng(number).uniform(0.2, 0.5)
        metrics = {**template.metrics, "map50_95": score, "latency_p50_ms": 1 + number % 97 / 10}
        points = [Metric(key, value, run.start_time, 0, model_id=model.model_id) for key, value in metrics.items()]
        client.log_batch(run.run_id, metrics=points)
        client.finalize_logged_model(model.model_id, "READY")


def ask(uri: str, template: RegisteredVersion, calls: int) -> dict[str, list[float]]:
    """Seconds that questions take, which are asked in turn."""
    hardware = template.tag("hardware_id")
    questions: dict[str, Callable[[], object]] = {
        "`best` on a device": lambda: query.best(uri, "device-1", 5.0),
        "`best` on a device, of a precision and a model": lambda: query.best(
            uri, "device-1", 10.0, 0.1, "fp16", "line-101"
        ),
        "`best` on a device with one version": lambda: query.best(uri, hardware, 10.0),
        "for comparison: is the server well?": lambda: tracking.check_server(uri),
    }
    for question in questions.values():
        question()
    rounds = [[seconds(question) for question in questions.values()] for _ in range(calls)]
    return dict(zip(questions, map(list, zip(*rounds, strict=True)), strict=True))


def upload(uri: str, bucket: str, folder: Path, megabytes: float, pairs: int) -> dict[str, Any]:
    """Seconds of uploads of a file in three ways, in turn: by boto3, by MLflow's client, and of registering it."""
    file = write_network(folder / "model.onnx", megabytes)
    client = tracking.connect(uri)
    s3 = boto3.client("s3")
    run = client.create_run("0").info.run_id

    models = (registering.detector("large", [file], 1.0 + number) for number in range(pairs + 1))
    ways: dict[str, Callable[[], object]] = {
        "boto3": lambda: s3.upload_file(str(file), bucket, "plain.onnx"),
        "mlflow": lambda: client.log_artifact(run, str(file)),
        "register": lambda: register(client, run, next(models)),
    }
    for way in ways.values():
        way()
    rounds = [[seconds(way) for way in ways.values()] for _ in range(pairs)]
    return {"bytes": file.stat().st_size, **dict(zip(ways, map(list, zip(*rounds, strict=True)), strict=True))}


def write_network(file: Path, megabytes: float) -> Path:
    """A network that is a file of this size."""
    columns = max(int(megabytes * 1e6 / (4 * 12_288)), 1)
    weights = np.random.default_rng(0).standard_normal((12_288, columns)).astype(np.float32)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["output0"])],
        "large",
        [helper.make_tensor_value_info("images", kind, (1, 3, 64, 64))],
        [helper.make_tensor_value_info("output0", kind, (1, columns))],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    return file


def repeated(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call."""
    return [seconds(work) for _ in range(times)]


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median with its 95% interval (bootstrap)."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def table(result: dict[str, Any]) -> Iterator[str]:
    """The report."""
    yield f"{result['machine']}; {result['versions']} versions on PostgreSQL\n"
    yield "| question | median, ms | 95% interval |"
    yield "|---|---|---|"
    for what, values in result["seconds"].items():
        median, low, high = (1e3 * value for value in median_with_interval(values))
        yield f"| {what} | {median:.0f} | {low:.0f} to {high:.0f} |"
    uploads = result["uploads"]
    size = uploads["bytes"] / 1e6
    yield f"\n| a model of {size:.0f} MB | median, MB/s | speed as a share of boto3's | 95% interval |"
    yield "|---|---|---|---|"
    for way, what in (
        ("boto3", "uploaded by boto3"),
        ("mlflow", "uploaded by MLflow's client through the server"),
        ("register", "registered"),
    ):
        share, low, high = median_with_interval([a / b for a, b in zip(uploads["boto3"], uploads[way], strict=True)])
        yield f"| {what} | {size / np.median(uploads[way]):.1f} | {share:.2f} | {low:.2f} to {high:.2f} |"


if __name__ == "__main__":
    main()
