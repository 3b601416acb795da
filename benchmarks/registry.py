"""The registry with a thousand versions: how long `best` takes, and how fast a model is registered.

    python benchmarks/registry.py --workdir runs/registry

Starts PostgreSQL, an object store (OpenStack Swift, or the endpoint that YOLOV8_NAS_TEST_S3 names) and MLflow's server
in front of both. One version is registered as the register stage does it, a hundred more by the same `register`, with
other names, devices and figures and a network of a few bytes. The rest get the same tags, parameters and metrics
through MLflow's client, and no files, for which `best` does not ask: all of them by `register` would take an hour.
Then `query.best` is asked again and again. Last, a model of
50 MB is registered at the server, in turn with boto3's upload of the same file to the same object store: of two that
follow each other, the ratio counts.

It ends with tables, in the work folder as `report.md` and `report.json`. Figures in milliseconds are those of this
machine with what else ran on it (the load average tells); the servers and what asks them share its cores. Processor
time tells where an upload's time goes, whatever else runs; of an object store elsewhere it is not known.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Final

import boto3
import numpy as np
import onnx
import psutil
from pytest import MonkeyPatch
from setting import machine

from yolov8_nas.files import read_json, write_json
from yolov8_nas.registry import query, tracking
from yolov8_nas.registry.query import RegisteredVersion
from yolov8_nas.registry.register import COMPLETE, CONTENT, MODEL_ID, STATE, register

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the servers are those of the tests

import registering
import servers
from fabricated import small_onnx

DEVICES: Final = 7
MODELS: Final = 10
THREADS: Final = 4
RESAMPLES: Final = 10_000
TARGET: Final = "line-3"
LONGEST_MS: Final = 300.0
"""What `best` may take."""
LEAST_SHARE: Final = 0.5
"""How fast a model has to be registered, as a share of boto3's speed."""
WAYS: Final = {
    "boto3": "uploaded by boto3",
    "mlflow": "uploaded by MLflow's client through the server",
    "register": "registered",
    "through": "registered through the server (`MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=false`)",
}
PROCESSES: Final = ("client", "MLflow", "object store", "PostgreSQL")
TOY: Final = {"versions": 14, "registered": 2, "calls": 2, "megabytes": 1, "uploads": 2}


def main() -> None:
    """Parse arguments, start servers, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder to make: logs of the servers, the report")
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--registered", type=int, default=100, help="how many of them by `register`")
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
    folder, load = arguments.workdir, [os.getloadavg()[0]]
    began = datetime.now(UTC).isoformat(timespec="minutes")
    template, filling = fill(uri, folder, arguments.versions, arguments.registered)
    load.append(os.getloadavg()[0])
    latencies, used = ask(uri, template, arguments.calls)
    command = [sys.executable, "-m", "yolov8_nas.commands.main", "models", "best", "--tracking", uri]
    command += ["--hardware", "device-1", "--max-latency", "5ms"]
    latencies["the whole command `yolov8-nas models best`"] = repeated(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), max(3, arguments.calls // 10)
    )
    load.append(os.getloadavg()[0])
    uploads = upload(uri, bucket, folder, arguments.megabytes, arguments.uploads)
    load.append(os.getloadavg()[0])
    result = {
        "machine": machine(1),
        "began": began,
        "load": load,
        "versions": arguments.versions,
        "filling": filling,
        "seconds": latencies,
        "processor": used,
        "uploads": uploads,
    }
    write_json(folder / "report.json", result)
    (folder / "report.md").write_text(text := "\n".join(table(read_json(folder / "report.json"))) + "\n")
    print(text, end="")


def fill(uri: str, folder: Path, versions: int, registered: int) -> tuple[RegisteredVersion, list[float]]:
    """Make versions; the first, which the stage registered, is returned, with the seconds that `register` took."""
    client = tracking.connect(uri)
    entry = registering.Branch(uri, TARGET, folder / "branch").register()
    template = query.find(uri, f"{TARGET}/{entry['version']}")
    experiment = client.get_run(entry["run_id"]).info.experiment_id
    network = small_onnx(folder / "model.onnx")

    def add(number: int) -> float:
        made = registering.detector(f"line-{100 + number % MODELS}", [network], 1.0 + number)
        device, precision, metrics = figures(template, number)
        tags = {**made.tags, "hardware": device, "hardware_model": device, "architecture": template.tag("architecture")}
        made = replace(
            made, hardware_id=device, precision=precision, metrics=metrics, params=template.params, tags=tags
        )
        run = client.create_run(experiment, run_name=f"run-{number}").info.run_id
        return seconds(lambda: register(client, run, made))

    def add_alike(model: int) -> None:
        numbers = range(1 + registered + model, versions, MODELS)
        record(client, experiment, template, f"line-{100 + MODELS + model}", numbers)

    with ThreadPoolExecutor(THREADS) as pool:
        took = list(pool.map(add, range(1, 1 + registered)))
        list(pool.map(add_alike, range(MODELS)))
    return template, took


def figures(template: RegisteredVersion, number: int) -> tuple[str, str, dict[str, float]]:
    """Device, precision and metrics of a version."""
    score = float(np.random.default_rng(number).uniform(0.2, 0.5))
    metrics = {**template.metrics, "map50_95": score, "latency_p50_ms": 1 + number % 97 / 10}
    return f"device-{number % DEVICES}", ("fp32", "fp16", "int8")[number % 3], metrics


def record(client: Any, experiment: str, template: RegisteredVersion, name: str, numbers: Sequence[int]) -> None:
    """Record versions of a new model as `register` does, with the tags of another, and without files."""
    from mlflow.entities import Metric

    client.create_registered_model(name)
    for version, number in enumerate(numbers, 1):
        run = client.create_run(experiment, run_name=f"run-{number}").info
        device, precision, metrics = figures(template, number)
        tags = {key: value for key, value in template.tags.items() if key not in (STATE, MODEL_ID)}
        tags |= {"hardware": device, "hardware_id": device, "hardware_model": device, "precision": precision}
        tags |= {CONTENT: f"{number:064x}", STATE: COMPLETE}
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
        points = [Metric(key, value, run.start_time, 0, model_id=model.model_id) for key, value in metrics.items()]
        client.log_batch(run.run_id, metrics=points)
        client.finalize_logged_model(model.model_id, "READY")


def ask(uri: str, template: RegisteredVersion, calls: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds that questions take, which are asked in turn, and seconds of processor time for one of each."""
    hardware = template.tag("hardware_id")
    questions: dict[str, Callable[[], object]] = {
        "`best` on a device": lambda: query.best(uri, "device-1", 5.0),
        "`best` on a device, of a precision and a model": lambda: query.best(
            uri, "device-1", 10.0, 0.1, "fp16", "line-101"
        ),
        "`best` on a device with one version": lambda: query.best(uri, hardware, 10.0),
        "for comparison: is the server well?": lambda: tracking.check_server(uri),
    }
    used = {}
    for what, question in questions.items():
        question()
        before = sum(processor_seconds().values())
        repeated(question, calls)
        used[what] = (sum(processor_seconds().values()) - before) / calls
    rounds = [[seconds(question) for question in questions.values()] for _ in range(calls)]
    return dict(zip(questions, map(list, zip(*rounds, strict=True)), strict=True)), used


def upload(uri: str, bucket: str, folder: Path, megabytes: float, pairs: int) -> dict[str, Any]:
    """Seconds of uploads of a file in turn: by boto3, by MLflow's client, and of registering it in two ways."""
    file = write_network(folder / "model.onnx", megabytes)
    client = tracking.connect(uri)
    s3 = boto3.client("s3")
    run = client.create_run("0").info.run_id

    models = (registering.detector("large", [file], 1.0 + number) for number in count())

    def through(work: Callable[[], object]) -> None:
        with MonkeyPatch.context() as changed:
            changed.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
            work()

    ways: dict[str, Callable[[], object]] = {
        "boto3": lambda: s3.upload_file(str(file), bucket, "plain.onnx"),
        "mlflow": lambda: through(lambda: client.log_artifact(run, str(file))),
        "register": lambda: register(client, run, next(models)),
        "through": lambda: through(lambda: register(client, run, next(models))),
    }
    for way in ways.values():
        way()
    took: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, way in ways.items():
            before = processor_seconds()
            took[name].append(seconds(way))
            used[name].append({who: value - before[who] for who, value in processor_seconds().items()})
    return {"bytes": file.stat().st_size, "processor": used, **took}


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


def processor_seconds() -> dict[str, float]:
    """What this process and the servers that it has started have used of the processor until now."""
    this = psutil.Process()
    used = dict.fromkeys(PROCESSES, 0.0)
    used["client"] = sum(this.cpu_times()[:2])
    for server in this.children():
        command = " ".join(server.cmdline())
        who = "PostgreSQL" if server.name() == "postgres" else "object store" if "swift_server" in command else "MLflow"
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                used[who] += sum(process.cpu_times()[:4])  # user and system, and those of its children that have ended
    return used


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median with its 95% interval (bootstrap)."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


def verdict(low: float, high: float, bound: float, below: bool) -> str:
    """Whether an interval keeps a bound."""
    if (high if below else -low) <= (bound if below else -bound):
        return "kept"
    return "missed" if (low > bound if below else high < bound) else "undecided"


def table(result: dict[str, Any]) -> Iterator[str]:
    """The report."""
    load = ", ".join(f"{value:.1f}" for value in result["load"])
    yield f"{result['machine']}; {result['versions']} versions on PostgreSQL; {result['began']}"
    yield f"load average at the start, after registering, after asking, after uploading: {load}\n"
    yield f"| what | median, ms | 95% interval | under {LONGEST_MS:.0f} ms | processor time of one, ms |"
    yield "|---|---|---|---|---|"
    for what, values in result["seconds"].items():
        median, low, high = (1e3 * value for value in median_with_interval(values))
        kept = verdict(low, high, LONGEST_MS, below=True) if what.startswith("`best`") else ""
        used = f"{1e3 * result['processor'][what]:.0f}" if what in result["processor"] else ""
        yield f"| {what} | {median:.0f} | {low:.0f} to {high:.0f} | {kept} | {used} |"
    median, low, high = (1e3 * value for value in median_with_interval(result["filling"]))
    yield f"| registering a network of a few bytes, {THREADS} at once | {median:.0f} | {low:.0f} to {high:.0f} | | |"
    uploads = result["uploads"]
    size = uploads["bytes"] / 1e6
    yield f"\n| a model of {size:.0f} MB | median, MB/s | speed as a share of boto3's | 95% interval | at least half |"
    yield "|---|---|---|---|---|"
    for way, what in WAYS.items():
        share, low, high = median_with_interval([a / b for a, b in zip(uploads["boto3"], uploads[way], strict=True)])
        kept = verdict(low, high, LEAST_SHARE, below=False) if what.startswith("registered") else ""
        yield f"| {what} | {size / np.median(uploads[way]):.1f} | {share:.2f} | {low:.2f} to {high:.2f} | {kept} |"
    yield f"\n| seconds of processor time, mean | {' | '.join(PROCESSES)} | together |"
    yield "|---|---|---|---|---|---|"
    for way, what in WAYS.items():
        means = [float(np.mean([used[who] for used in uploads["processor"][way]])) for who in PROCESSES]
        yield f"| {what} | {' | '.join(f'{mean:.2f}' for mean in (*means, sum(means)))} |"


if __name__ == "__main__":
    main()
