"""What a run came to, as `summary.json`: read from the run's records and the stages' outputs, however the run ended.

The models below are the schema. Keys may be added; those that are there keep name, unit and meaning, because people's
scripts read them. Latencies are in milliseconds, memory in MiB, mAP between 0 and 1.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device.profile import Profile
from yolov8_nas.files import copy_file, read_json, tree_files, write_json
from yolov8_nas.registry.tracking import without_credentials
from yolov8_nas.runner import results
from yolov8_nas.runner.results import (
    HeldLimit,
    LatencyFit,
    RegisterResult,
    ResolvedLimit,
    ResultFile,
    StockResult,
    Tried,
    VerdictResult,
)
from yolov8_nas.runner.stage import STAGES, TOLD, begun_file, target_labels
from yolov8_nas.store.store import SIGNATURE, Store

MODELS: Final = "models"
"""Folder, beside the summary, that gets the files that ship: a folder per target in it."""

RUN_FILE: Final = "run.json"
"""Record of a run with what was found out when it was opened."""

FAILURES: Final = "failure."
"""What the names of a run's records begin with that say why a task failed; the task's name follows."""

KILLED: Final = "ended from outside before it was done (out of memory, a lost node, or stopped)"
"""Why a stage failed that could not say so itself."""

File = TypeVar("File", bound=ResultFile)

_ALL: Final = "all"  # stands for the target in the records of stages that serve all of them


def gate_file(label: str) -> str:
    """Name of the record of a run with what the promotion gate said of a target's new version."""
    return f"gate.{label}.json"


def advice_file(label: str) -> str:
    """Name of the record of a run with the advice on a target, given once it was probed."""
    return f"advice.{label}.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")


class Run(_Model):
    """The run as a whole; `failed` where any stage or target failed."""

    id: str
    name: str
    status: Literal["done", "failed"]
    error: str | None
    space: str
    imgsz: int
    seed: int
    config: str = Field(description="Digest of the configuration")
    seconds: float
    peak_memory_mb: float | None = Field(description="Largest of the stages that computed something")
    tools: dict[str, str]
    tracking_uri: str | None
    mlflow_run: str | None
    retraining: dict[str, Any] | None = Field(None, description="What a retraining found: new, says, origin")


class Images(_Model):
    """Images per split."""

    train: int
    search: int
    val: int


class Dataset(_Model):
    """The dataset as data-prep checked it."""

    digest: str
    images: Images
    classes: list[str]


class StageRow(_Model):
    """One call of one stage; `target` is nothing for a stage that serves all of them."""

    name: str
    target: str | None
    status: Literal["done", "cached", "failed"]
    seconds: float
    error: str | None
    peak_memory_mb: float | None


class Hardware(_Model):
    """The device, as hw-probe described it; only the configured name where it did not come so far."""

    name: str
    threads: int | None = None


class Runtime(_Model):
    """What ran the network."""

    name: str
    version: str | None = None


class Limit(_Model):
    """A limit and what was measured of the file that ships.

    A limit that was asked for as a `share` of stock's value is held against `stock` as measured in the same rounds.
    """

    metric: str
    statistic: str
    scope: str
    limit: float
    unit: str
    measured: float | None = None
    met: bool | None = None
    share: float | None = None
    stock: float | None = None


class Latency(_Model):
    """Percentiles of latency in ms."""

    p50: float
    p90: float
    p99: float


class Training(_Model):
    """How a network was trained: what it began with, and how much it took.

    `start` is `weights`, `supernet` or `scratch`; `begun_with` is the same in words.
    `computing` is in multiply-accumulates: those of the network times the images seen, three times for forward and
    backward pass, and what a teacher computed.
    """

    start: str
    begun_with: str
    epochs: int
    computing: float


class Shipped(_Model):
    """The exported file that ships, as measured and scored on the device; `files` are relative to the summary.

    `energy_mj` is per image; it and `power_w` are missing where the device has no counter.
    """

    map50_95: float
    map50: float
    latency_ms: Latency
    latency_with_nms_ms: Latency | None = None
    memory_mb: float | None
    energy_mj: float | None = None
    power_w: float | None = None
    params: float
    gflops: float
    training: Training | None = None
    files: dict[str, str]


class Baseline(_Model):
    """A stock network under the same measurement; without a score where it was not trained."""

    name: str
    map50_95: float | None = None
    latency_ms: Latency
    training: Training | None = None


class LatencyModel(_Model):
    """Error of the latency model, fitted to `networks` measured ones, on `holdout` others.

    `coverage` is the share of them that were no slower than the model's upper bound.
    """

    mape: float
    spearman: float
    networks: int
    holdout: int
    coverage: float


class Registry(_Model):
    """The registered version."""

    model: str
    version: int
    aliases: list[str]


class Target(_Model):
    """One target; `met` where a network ships that keeps every limit and is registered."""

    id: str
    status: Literal["met", "failed"]
    error: str | None
    hardware: Hardware
    runtime: Runtime
    precision_requested: str
    precision_shipped: str | None
    constraints: list[Limit]
    architecture: dict[str, Any] | None
    model: Shipped | None
    baselines: list[Baseline]
    latency_model: LatencyModel | None
    registry: Registry | None
    comparison: results.AgainstStock | None
    quantization: results.Quantized | None
    engine: results.EngineResult | None
    gate: dict[str, Any] | None = Field(None, description="What the promotion gate said, in a retraining")
    advice: results.Advice | None = Field(None, description="What was told before anything was trained")


class Summary(_Model):
    """The content of `summary.json`."""

    schema_: Literal[1] = Field(1, alias="schema")
    run: Run
    dataset: Dataset | None
    stages: list[StageRow]
    targets: list[Target]


def summarise(store: Store, run_id: str, out: Path, config: RunConfig) -> dict[str, Any]:
    """Write `summary.json` and copy the files that ship to `models/<target>/`.

    Args:
        store: The stage store.
        run_id: The run in whose records to look.
        out: Folder for `summary.json` and the models.
        config: The run's configuration.

    Returns:
        The content of `summary.json`.
    """
    records = _records(store, run_id)
    failures = list(_failures(store, run_id, records))
    shared = [record for (label, _), record in records.items() if label == _ALL and record["status"] == "failed"]
    failures += [f"{record['stage']}: {record['error']}" for record in shared]
    error = "; ".join(failures) or None
    labels = target_labels(config)
    rows = [_row(record) for record in _in_order(records, labels)]
    opened = _read(store.run_folder(run_id), RUN_FILE) or {}
    retraining = opened.get("retraining")
    targets = [
        _Branch(store, run_id, records, label, target, failures).summary(out)
        for label, target in zip(labels, config.targets, strict=True)
        if retraining is None or retraining["new"]
    ]
    failed = error is not None or any(row.status == "failed" for row in rows)
    failed = failed or any(target.status == "failed" for target in targets)
    dataset = _read(_outputs(store, records.get((_ALL, "data-prep"))), "dataset.json")
    summary = Summary(
        schema=1,
        run=Run(
            id=run_id,
            name=config.name,
            status="failed" if failed else "done",
            error=error,
            space=config.space,
            imgsz=config.imgsz,
            seed=config.seed,
            config=config.digest,
            seconds=round(sum(row.seconds for row in rows), 3),
            peak_memory_mb=max((row.peak_memory_mb for row in rows if row.peak_memory_mb is not None), default=None),
            tools=_tools(store, records.values()),
            tracking_uri=without_credentials(opened["tracking_uri"]) if opened else None,
            mlflow_run=opened.get("mlflow_run"),
            retraining=retraining,
        ),
        dataset=Dataset.model_validate({key: dataset[key] for key in Dataset.model_fields}) if dataset else None,
        stages=rows,
        targets=targets,
    )
    content = summary.model_dump(mode="json", by_alias=True)
    write_json(out / "summary.json", content)
    return content


class _Branch:
    """What one target's stages left."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        records: Mapping[tuple[str, str], dict[str, Any]],
        label: str,
        target: TargetConfig,
        failures: Sequence[str] = (),
    ) -> None:
        self.failures = failures
        self.gate = _read(store.run_folder(run_id), gate_file(label))
        self.advice = read_advice(store.run_folder(run_id), label)
        self.label = label
        self.target = target
        # In the order of the pipeline, the stages that serve all targets among them: what failed first is the cause.
        self.records = {
            stage: record for stage in STAGES if (record := records.get((label, stage)) or records.get((_ALL, stage)))
        }
        self.folders = {stage: _outputs(store, record) for stage, record in self.records.items()}

    def summary(self, out: Path) -> Target:
        """The target's part of the summary; the files that ship are copied below `out`."""
        verdict = self._result("trt-export", VerdictResult)
        shipped = verdict.shipped if verdict else None
        profile = self._json("hw-probe", Profile.FILE) or {}
        registry = self._result("register", RegisterResult)
        fit = self._result("hw-probe", LatencyFit)
        error = self._error()
        return Target.model_validate(
            {
                "id": self.label,
                "status": "failed" if error else "met",
                "error": error,
                "hardware": {key: value for key, value in profile.items() if key != "runtime"}
                or {"name": self.target.hardware},
                "runtime": profile.get("runtime") or {"name": self.target.runtime},
                "precision_requested": self.target.precision,
                "precision_shipped": shipped.precision if shipped else None,
                "constraints": [limit.plain() for limit in shipped.constraints]
                if shipped
                else self._limits(verdict.tried if verdict else ()),
                "architecture": shipped.architecture.to_dict() if shipped else None,
                "model": {**_figures(shipped), "files": self._ship(out)} if shipped else None,
                "baselines": [file.plain() for file in verdict.baselines]
                if verdict and verdict.baselines
                else self._stock(),
                "latency_model": {key: getattr(fit, key) for key in LatencyModel.model_fields} if fit else None,
                "registry": registry.plain() if registry and registry.version is not None else None,
                "comparison": verdict.comparison if verdict else None,
                "quantization": verdict.quantization if verdict else None,
                "engine": self._result("trt-export", results.EngineResult),
                "gate": self.gate,
                "advice": self.advice,
            }
        )

    def _result(self, stage: str, form: type[File]) -> File | None:
        """A file of a stage's result; nothing where the stage did not come so far."""
        folder = self.folders.get(stage)
        return form.read(folder) if folder and (folder / form.FILE).is_file() else None

    def _json(self, stage: str, name: str) -> dict[str, Any] | None:
        content: dict[str, Any] | None = _read(self.folders.get(stage), name)
        return content

    def _error(self) -> str | None:
        """Why nothing ships; the cause, not what followed from it."""
        for stage, record in self.records.items():
            if record["status"] == "failed":
                return f"{stage}: {record['error']}"
        missing = [stage for stage in STAGES if stage not in self.records]
        if missing and self.failures:
            return "; ".join(self.failures)
        if missing:
            return f"{missing[0]}: the run ended before it; start the same command again to go on"
        return None

    def _limits(self, tried: Sequence[Tried]) -> list[dict[str, Any]]:
        """The limits where nothing ships: with what the closest file had, or else only resolved, or as written."""
        asked = [file.constraints for file in tried if file.outcome == "limit missed"]
        if asked:
            closest = min(asked, key=lambda limits: max(map(_violation, limits)))
            return [limit.plain() for limit in closest]
        folder = self.folders.get("hw-probe")
        if folder and (folder / ResolvedLimit.FILE).is_file():
            return [limit.plain() for limit in ResolvedLimit.read_all(folder)]
        keys = ("metric", "statistic", "scope", "limit", "unit")
        return [{key: getattr(limit, key) for key in keys} for limit in self.target.limits]

    def _stock(self) -> list[dict[str, Any]]:
        """The stock network's latency where there is nothing but hw-probe's measurement of it."""
        stock = self._result("hw-probe", StockResult)
        return [{"name": f"stock YOLOv8{stock.scale}", "latency_ms": stock.latency_ms.plain()}] if stock else []

    def _ship(self, out: Path) -> dict[str, str]:
        source = self.folders["trt-export"]
        assert source is not None
        folder = out / MODELS / self.label
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in the same work folder
        files = {}
        for name, path in tree_files(source / "model").items():
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, copy)
            files[name] = copy.relative_to(out).as_posix()
        return files


def read_advice(records: Path, label: str) -> results.Advice | None:
    """The advice on a target; nothing where none was given, or not by this version."""
    content = {**(_read(records, advice_file(label)) or {})}
    content.pop(SIGNATURE, None)
    try:
        return results.Advice.model_validate(content) if content else None
    except ValidationError:
        return None


def _figures(shipped: results.Shipped) -> dict[str, Any]:
    return {key: value for key, value in shipped.plain().items() if key in Shipped.model_fields}


def _violation(limit: HeldLimit) -> float:
    return math.inf if limit.measured is None else limit.constraint.violation(limit.measured)


def _records(store: Store, run_id: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What `run_stage` recorded of a run, by target (or `all`) and stage."""
    records = {}
    for file in sorted(store.run_folder(run_id).glob("*.json")):
        content = read_json(file)
        if "stage" in content:
            records[content["target"] or _ALL, content["stage"]] = content
    return records


def _failures(store: Store, run_id: str, records: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterable[str]:
    """Why the run failed beside what its stages' own records say: tasks that are no stages, and what was ended."""
    folder = store.run_folder(run_id)
    for file in sorted(folder.glob(f"{FAILURES}*.json")):
        told = read_json(file)
        key = (told["target"] or _ALL, told["task"])
        if told["error"] and key not in records:  # a stage's own record says it, or that a later try went well
            yield f"{told['task']}{_of(told['target'])}: {told['error']}"
    for file in sorted(folder.glob(begun_file("*", "*"))):
        begun = read_json(file)
        record = records.get((begun["target"] or _ALL, begun["begun"]))
        if record is None or record.get("ended", math.inf) < begun["at"]:
            yield f"{begun['begun']}{_of(begun['target'])}: {KILLED}; start the same command again to go on"


def _of(target: str | None) -> str:
    return f" of {target}" if target else ""


def _in_order(records: Mapping[tuple[str, str], dict[str, Any]], labels: list[str]) -> Iterable[dict[str, Any]]:
    """The records as the pipeline goes: what serves all targets, then target by target."""
    keys = [(label, stage) for label in (_ALL, *labels) for stage in STAGES]
    return [records[key] for key in keys if key in records]


def _row(record: Mapping[str, Any]) -> StageRow:
    peak = max(record["peak_rss_mib"], record["peak_rss_child_mib"])
    return StageRow(
        name=record["stage"],
        target=record["target"],
        status=record["status"],
        seconds=record["seconds"],
        error=record["error"],
        # A stage that found its result there has used no memory for it.
        peak_memory_mb=peak if record["status"] != "cached" else None,
    )


def _outputs(store: Store, record: Mapping[str, Any] | None) -> Path | None:
    """The output folder of a stage; nothing where it never began."""
    if not record or not record["key"]:
        return None
    return store.result(record["stage"], record["key"], TOLD.get(record["stage"], ())).outputs


def _tools(store: Store, records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Versions of what computed the results."""
    tools: dict[str, str] = {}
    for record in records:
        manifest = store.entry(record["stage"], record["key"]).manifest if record["key"] else None
        if manifest is not None:
            tools |= manifest.tools
    return tools


def _read(folder: Path | None, name: str) -> Any:
    """Content of a JSON file, or nothing where the stage did not come so far."""
    file = folder / name if folder else None
    return read_json(file) if file and file.is_file() else None
