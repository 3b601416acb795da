"""What one stage came to, read from the tar that it hands on: figures for charts, and a page of Markdown."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from yolov8_nas.foreign import fenced, markdown
from yolov8_nas.reading import parse_json
from yolov8_nas.report import wording
from yolov8_nas.runner.progress import duration
from yolov8_nas.runner.results import (
    AheadResult,
    CandidateResult,
    DatasetResult,
    FinetuneResult,
    Latency,
    LatencyFit,
    RegisterResult,
    ResultFile,
    ResultRow,
    SearchResult,
    StockResult,
    SupernetEpoch,
    SupernetResult,
    VerdictResult,
)
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.runner.stage import STATUS_FILE, Outcome

File = TypeVar("File", bound=ResultFile)
Row = TypeVar("Row", bound=ResultRow)


@dataclass(frozen=True)
class _Tar:
    """The tar of a stage's result.

    Attributes:
        tar: The open tar.
        names: What is in it.
    """

    tar: tarfile.TarFile
    names: frozenset[str]

    def json(self, name: str) -> Any:
        """Content of a JSON file; nothing where it is not there."""
        member = self.tar.extractfile(name) if name in self.names else None
        return parse_json(member.read(), name, finite=False) if member else None

    def file(self, form: type[File]) -> File:
        """A file as its model."""
        return form.model_validate(self.json(form.FILE))

    def rows(self, form: type[Row]) -> list[Row]:
        """A file of rows as their models."""
        return [form.model_validate(row) for row in self.json(form.FILE)]


@dataclass(frozen=True)
class Told:
    """What one step shows.

    Attributes:
        figures: Numbers by name; a name ends with its unit. Only finite ones stay: kfp writes others as bare NaN, which
            is no JSON, and Kubeflow's launcher then fails a step that has done its work.
        markdown: A page for people.
    """

    figures: Mapping[str, float]
    markdown: str

    def __post_init__(self) -> None:
        finite = {name: value for name, value in self.figures.items() if math.isfinite(value)}
        object.__setattr__(self, "figures", finite)


def tell(stage: str, target: str | None, outcome: Outcome, result: Path) -> Told:
    """What a step shows of its stage.

    Args:
        stage: Name of the stage.
        target: Label of the target, or nothing.
        outcome: How the stage ended.
        result: The tar that it wrote.
    """
    with tarfile.open(result, "r:") as tar:
        read = _Tar(tar, frozenset(tar.getnames()))
        failed = read.json(STATUS_FILE)
        figures = {} if failed else dict(_FIGURES[stage](read))
    figures = {name: float(value) for name, value in figures.items() if value is not None}
    return Told({**figures, "seconds": round(outcome.seconds, 1)}, _page(stage, target, outcome, figures))


def tell_run(summary: Summary) -> Told:
    """What the last step shows: the targets of a run, each with its model or why it has none."""
    run, targets, retraining = summary.run, summary.targets, summary.run.retraining
    if retraining and not retraining.new:
        return Told({}, f"# {markdown(run.name)} is as it was\n\n{markdown(retraining.says)}\n")
    shipped = [target for target in targets if target.status == "met"]
    figures: dict[str, float] = {"targets": len(targets), "targets_with_a_model": len(shipped)}
    lines = [f"# {len(shipped)} of {len(targets)} targets of {markdown(run.name)} have a model", ""]
    lines += ["| target | mAP50-95 | p50, ms | precision | model |", "|---|---:|---:|---|---|"]
    for target in targets:
        model, registry = target.model, target.registry
        if target.status != "met" or model is None:
            lines.append(f"| {target.id} | | | | **none**: {markdown(target.error or '')} |")
            continue
        figures[f"{target.id}_map50_95"] = model.map50_95
        figures[f"{target.id}_latency_p50_ms"] = model.latency_ms.p50
        name = f"{markdown(registry.model)} version {registry.version}" if registry else "not registered yet"
        lines.append(
            f"| {target.id} | {model.map50_95:.3f} | {model.latency_ms.p50:.3g} | {target.precision_shipped} | {name} |"
        )
    if retraining:
        lines += ["", markdown(retraining.says)]
    lines += [f"\n{target.id}: {markdown(wording.gate(target.gate))}" for target in targets if target.gate]
    if run.error:
        lines += ["", f"The run failed: {markdown(run.error)}"]
    lost = [stage for stage in summary.stages if stage.status == "failed"]
    if lost:
        lines += ["", "| stage | target | why it failed |", "|---|---|---|"]
        lines += [f"| {stage.name} | {stage.target or 'all'} | {markdown(stage.error or '')} |" for stage in lost]
    return Told(figures, "\n".join(lines) + "\n")


def _page(stage: str, target: str | None, outcome: Outcome, figures: Mapping[str, float]) -> str:
    lines = [f"# {stage}" + (f" for {target}" if target else ""), ""]
    took = duration(outcome.seconds)
    if outcome.status == "failed":
        lines += [f"**Failed** after {took}. The other targets go on without it.", "", fenced(outcome.error)]
    elif outcome.status == "cached":
        lines += [f"The stage store had this result already: checked and handed on in {took}, nothing computed."]
    else:
        lines += [f"Done in {took}."]
    if figures:
        lines += ["", "| figure | value |", "|---|---:|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in figures.items()]
    if outcome.key:
        lines += ["", f"Key in the store: `{stage}/{outcome.key}`"]
    return "\n".join(lines) + "\n"


def _data_prep(read: _Tar) -> Iterator[tuple[str, Any]]:
    dataset = read.file(DatasetResult)
    yield "classes", len(dataset.classes)
    for split, images in dataset.images.items():
        yield f"images_{split}", images
    for split, boxes in dataset.boxes.items():
        yield f"boxes_{split}", sum(boxes.values())


def _supernet_train(read: _Tar) -> Iterator[tuple[str, Any]]:
    curves = read.rows(SupernetEpoch)
    last = curves[-1].plain()
    yield "epochs", len(curves)
    for name in ("box", "cls", "dfl", "distill"):
        yield f"last_loss_{name}", last.get(name)
    yield "training_seconds", read.file(SupernetResult).seconds


def _hw_probe(read: _Tar) -> Iterator[tuple[str, Any]]:
    yield from _latency(read.file(StockResult).latency_ms, "stock_")
    model = read.file(LatencyFit)
    for name in ("mape", "spearman", "networks", "holdout"):
        yield f"latency_model_{name}", getattr(model, name)


def _search(read: _Tar) -> Iterator[tuple[str, Any]]:
    found = read.file(SearchResult)
    for name, count in found.counts.items():
        yield f"networks_{name}", count
    for name, score in found.best_map50_95.items():
        yield f"best_map50_95_{name}", score
    best = read.rows(CandidateResult)[0]
    yield "candidate_map50_95", best.map50_95_search
    yield from _latency(best.measured.latency_ms, "candidate_")


def _qat_finetune(read: _Tar) -> Iterator[tuple[str, Any]]:
    result = read.file(FinetuneResult)
    for candidate in result.candidates:
        for precision, score in candidate.map50_95.items():
            yield f"candidate_{candidate.index}_map50_95_{precision}", score
    for name, rival in (("baseline", result.baseline), ("rescaled", result.rescaled)):
        for precision, score in rival.map50_95.items() if rival else ():
            yield f"{name}_map50_95_{precision}", score


def _build_ahead(read: _Tar) -> Iterator[tuple[str, Any]]:
    engines = read.file(AheadResult).engines.values()
    yield "engines", len(engines)
    yield "building_seconds", sum(engine.seconds for engine in engines)
    yield "engines_mb", sum(engine.plan_bytes for engine in engines) / 2**20


def _trt_export(read: _Tar) -> Iterator[tuple[str, Any]]:
    verdict = read.file(VerdictResult)
    shipped = verdict.shipped
    assert shipped is not None, "a stage whose verdict has failed has failed"
    for name in ("map50_95", "map50", "memory_mb", "file_mb", "params"):
        yield name, getattr(shipped, name)
    yield from _latency(shipped.latency_ms)
    yield "difference_to_baseline_map50_95", verdict.comparison and verdict.comparison.difference


def _register(read: _Tar) -> Iterator[tuple[str, Any]]:
    yield "version", read.file(RegisterResult).version  # none yet, where the server could not be reached


def _latency(latency_ms: Latency, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for statistic, value in latency_ms:
        yield f"{prefix}latency_{statistic}_ms", value


_FIGURES: Final[Mapping[str, Callable[[_Tar], Iterator[tuple[str, Any]]]]] = {
    "data-prep": _data_prep,
    "supernet-train": _supernet_train,
    "hw-probe": _hw_probe,
    "search": _search,
    "qat-finetune": _qat_finetune,
    "build-ahead": _build_ahead,
    "trt-export": _trt_export,
    "register": _register,
}
