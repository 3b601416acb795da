"""What a run came to, as `summary.json`: read from the run's records and the stages' outputs, however the run ended."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device.profile import Profile
from yolov8_nas.files import copy_file, read_json, tree_files
from yolov8_nas.registry.tracking import without_credentials
from yolov8_nas.runner.results import (
    Advice,
    DatasetResult,
    EngineResult,
    HeldLimit,
    LatencyFit,
    RegisterResult,
    ResolvedLimit,
    Result,
    ResultFile,
    StageRecord,
    StockResult,
    VerdictResult,
)
from yolov8_nas.runner.results.summary import (
    Baseline,
    Dataset,
    Gate,
    Hardware,
    LatencyModel,
    Limit,
    Model,
    News,
    Registry,
    Run,
    Runtime,
    StageRow,
    Summary,
    Target,
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


def summarise(store: Store, run_id: str, out: Path, config: RunConfig) -> Summary:
    """Write `summary.json` and copy the files that ship to `models/<target>/`.

    Args:
        store: The stage store.
        run_id: The run in whose records to look.
        out: Folder for `summary.json` and the models.
        config: The run's configuration.

    Returns:
        The summary.
    """
    records = _records(store, run_id)
    failures = list(_failures(store, run_id, records))
    shared = [record for (label, _), record in records.items() if label == _ALL and record.status == "failed"]
    failures += [f"{record.stage}: {record.error}" for record in shared]
    error = "; ".join(failures) or None
    labels = target_labels(config)
    rows = [_row(record) for record in _in_order(records, labels)]
    opened = _read(store.run_folder(run_id), RUN_FILE) or {}
    retraining = News.model_validate(found) if (found := opened.get("retraining")) else None
    targets = [
        _Branch(store, run_id, records, label, target, failures).summary(out)
        for label, target in zip(labels, config.targets, strict=True)
        if retraining is None or retraining.new
    ]
    failed = error is not None or any(row.status == "failed" for row in rows)
    failed = failed or any(target.status == "failed" for target in targets)
    dataset = _result(_outputs(store, records.get((_ALL, "data-prep"))), DatasetResult)
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
        dataset=Dataset.model_validate(dataset.model_dump(include={*Dataset.model_fields})) if dataset else None,
        stages=tuple(rows),
        targets=tuple(targets),
    )
    summary.write(out)
    return summary


class _Branch:
    """What one target's stages left."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        records: Mapping[tuple[str, str], StageRecord],
        label: str,
        target: TargetConfig,
        failures: Sequence[str] = (),
    ) -> None:
        self.failures = failures
        self.gate = _gate(store.run_folder(run_id), label)
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
        profile = _read(self.folders.get("hw-probe"), Profile.FILE) or {"name": self.target.hardware}
        runtime = profile.pop("runtime", {"name": self.target.runtime})
        registry = self._result("register", RegisterResult)
        fit = self._result("hw-probe", LatencyFit)
        error = self._error()
        return Target(
            id=self.label,
            status="failed" if error else "met",
            error=error,
            hardware=Hardware(**profile),
            runtime=Runtime(**runtime),
            precision_requested=self.target.precision,
            precision_shipped=shipped.precision if shipped else None,
            constraints=tuple(self._limits(verdict)),
            architecture=shipped.architecture if shipped else None,
            model=Model(**_common(shipped, Model), files=self._ship(out)) if shipped else None,
            baselines=verdict.baselines if verdict and verdict.baselines else tuple(self._stock()),
            latency_model=LatencyModel(**_common(fit, LatencyModel)) if fit else None,
            registry=Registry(**registry.plain()) if registry and registry.version is not None else None,
            comparison=verdict.comparison if verdict else None,
            classes=verdict.classes if verdict else (),
            quantization=verdict.quantization if verdict else None,
            engine=self._result("trt-export", EngineResult),
            gate=self.gate,
            advice=self.advice,
        )

    def _result(self, stage: str, form: type[File]) -> File | None:
        """A file of a stage's result; nothing where the stage did not come so far."""
        return _result(self.folders.get(stage), form)

    def _error(self) -> str | None:
        """Why nothing ships; the cause, not what followed from it."""
        for stage, record in self.records.items():
            if record.status == "failed":
                return f"{stage}: {record.error}"
        missing = [stage for stage in STAGES if stage not in self.records]
        if missing and self.failures:
            return "; ".join(self.failures)
        if missing:
            return f"{missing[0]}: the run ended before it; start the same command again to go on"
        return None

    def _limits(self, verdict: VerdictResult | None) -> Iterable[Limit]:
        """The limits with what ships; else with what the closest file had, or else only resolved, or as written."""
        if verdict and verdict.shipped:
            return [Limit(**dict(limit)) for limit in verdict.shipped.constraints]
        asked = [file.constraints for file in verdict.tried if file.outcome == "limit missed"] if verdict else []
        if asked:
            closest = min(asked, key=lambda limits: max(map(_violation, limits)))
            return [Limit(**dict(limit)) for limit in closest]
        folder = self.folders.get("hw-probe")
        if folder and (folder / ResolvedLimit.FILE).is_file():
            return [Limit(**dict(limit)) for limit in ResolvedLimit.read_all(folder)]
        keys = ("metric", "statistic", "scope", "limit", "unit")
        return [Limit(**{key: getattr(limit, key) for key in keys}) for limit in self.target.limits]

    def _stock(self) -> Iterable[Baseline]:
        """The stock network's latency where there is nothing but hw-probe's measurement of it."""
        if stock := self._result("hw-probe", StockResult):
            yield Baseline(name=f"stock YOLOv8{stock.scale}", latency_ms=stock.latency_ms)

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


def _gate(records: Path, label: str) -> Gate | None:
    said = _read(records, gate_file(label))
    return Gate.model_validate(said) if said else None


def read_advice(records: Path, label: str) -> Advice | None:
    """The advice on a target; nothing where none was given, or not by this version."""
    content = {**(_read(records, advice_file(label)) or {})}
    content.pop(SIGNATURE, None)
    try:
        return Advice.model_validate(content) if content else None
    except ValidationError:
        return None


def _common(result: Result, form: type[Result]) -> dict[str, Any]:
    """The fields of a result that a part of the summary has, too."""
    return {name: value for name, value in result if name in form.model_fields}


def _result(folder: Path | None, form: type[File]) -> File | None:
    return form.read(folder) if folder and (folder / form.FILE).is_file() else None


def _violation(limit: HeldLimit) -> float:
    return math.inf if limit.measured is None else limit.constraint.violation(limit.measured)


def _records(store: Store, run_id: str) -> dict[tuple[str, str], StageRecord]:
    """What `run_stage` recorded of a run, by target (or `all`) and stage."""
    contents = map(read_json, sorted(store.run_folder(run_id).glob("*.json")))
    records = [StageRecord.model_validate(content) for content in contents if "stage" in content]
    return {(record.target or _ALL, record.stage): record for record in records}


def _failures(store: Store, run_id: str, records: Mapping[tuple[str, str], StageRecord]) -> Iterable[str]:
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
        if record is None or record.ended < begun["at"]:
            yield f"{begun['begun']}{_of(begun['target'])}: {KILLED}; start the same command again to go on"


def _of(target: str | None) -> str:
    return f" of {target}" if target else ""


def _in_order(records: Mapping[tuple[str, str], StageRecord], labels: list[str]) -> Iterable[StageRecord]:
    """The records as the pipeline goes: what serves all targets, then target by target."""
    keys = [(label, stage) for label in (_ALL, *labels) for stage in STAGES]
    return [records[key] for key in keys if key in records]


def _row(record: StageRecord) -> StageRow:
    return StageRow(
        name=record.stage,
        target=record.target,
        status=record.status,
        seconds=record.seconds,
        error=record.error,
        # A stage that found its result there has used no memory for it.
        peak_memory_mb=record.peak_memory_mb if record.status != "cached" else None,
    )


def _outputs(store: Store, record: StageRecord | None) -> Path | None:
    """The output folder of a stage; nothing where it never began."""
    if not record or not record.key:
        return None
    return store.result(record.stage, record.key, TOLD.get(record.stage, ())).outputs


def _tools(store: Store, records: Iterable[StageRecord]) -> dict[str, str]:
    """Versions of what computed the results."""
    tools: dict[str, str] = {}
    for record in records:
        manifest = store.entry(record.stage, record.key).manifest if record.key else None
        if manifest is not None:
            tools |= manifest.tools
    return tools


def _read(folder: Path | None, name: str) -> Any:
    """Content of a JSON file, or nothing where the stage did not come so far."""
    file = folder / name if folder else None
    return read_json(file) if file and file.is_file() else None
