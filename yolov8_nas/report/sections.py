"""What the report says of one target, from the summary and the stages' outputs; the template only lays it out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from yolov8_nas.device.profile import Profile
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.report import architecture as drawing
from yolov8_nas.report import plots, wording
from yolov8_nas.report.evidence import Outputs
from yolov8_nas.runner.results import (
    Accuracy,
    AgainstStock,
    AsExported,
    Budget,
    CandidateResult,
    CandidatesHalving,
    EngineResult,
    FileFigures,
    FinetuneResult,
    LatencyFit,
    LatencyTable,
    NmsResult,
    PriorResult,
    RegisterResult,
    ResolvedLimit,
    Rival,
    RuleApplied,
    RulesResult,
    ScoredNetwork,
    SearchResult,
    Shipped,
    StockFile,
    StockResult,
    SupernetResult,
    TrainingCost,
    Tried,
    TuningResult,
    VerdictResult,
)
from yolov8_nas.runner.results import summary as told
from yolov8_nas.space import Architecture, stock_architecture
from yolov8_nas.space.limits import LOWER

TARGET_STAGES: Final = ("hw-probe", "search", "qat-finetune", "trt-export", "register")

_UNITS: Final = {"gb": "GiB", "mb": "MiB", "ms": "ms", "mhz": "MHz"}
_SUFFIXES: Final = re.compile(rf"_({'|'.join(_UNITS)})$")
_LONG_NAMES: Final = {"caches": "cache in KiB,", "id": "identity"}
_SAME_LATENCY: Final = 0.02
"""Share within which two latencies count as equal (a stock network rescaled to the searched one's latency)."""


@dataclass(frozen=True)
class Target:
    """One target of the summary with what its stages left.

    Attributes:
        identity: Unique within the page.
        summary: Its entry in the summary.
        outputs: The outputs of each per-target stage.
        supernet: The supernet stage's outputs.
    """

    identity: str
    summary: told.Target
    outputs: Mapping[str, Outputs]
    supernet: Outputs

    @cached_property
    def verdict(self) -> VerdictResult | None:
        """trt-export's verdict, nothing where the target did not come so far."""
        return self.outputs["trt-export"].result(VerdictResult)

    @property
    def shipped(self) -> Shipped | None:
        """The file that ships, as trt-export tells of it."""
        return self.verdict.shipped if self.verdict else None

    @cached_property
    def tuned(self) -> FinetuneResult | None:
        """What qat-finetune trained."""
        return self.outputs["qat-finetune"].result(FinetuneResult)

    @cached_property
    def history(self) -> list[plots.Network]:
        """Every network that the search scored."""
        return [
            plots.Network(
                row.architecture.digest, row.map50_95, row.latency_ms, row.measured_ms, row.source, row.generation
            )
            for row in self.outputs["search"].rows(ScoredNetwork)
        ]

    @property
    def comparisons(self) -> Sequence[AgainstStock]:
        """What ships against each stock network."""
        if self.verdict and self.verdict.comparisons:
            return self.verdict.comparisons
        return [self.summary.comparison] if self.summary.comparison else []

    @property
    def name(self) -> str:
        """Device, runtime and precision."""
        summary = self.summary
        model, asked = summary.hardware.model, summary.hardware.name
        shipped, wanted = summary.precision_shipped, summary.precision_requested
        named = [
            f"{model} ({asked})" if model else asked,
            " ".join(part for part in (summary.runtime.name, summary.runtime.version) if part),
            wording.precision(shipped) if shipped else f"{wording.precision(wanted)} asked for",
        ]
        return " · ".join(named)

    @cached_property
    def stock(self) -> Architecture | None:
        """The stock network that is compared with."""
        if measured := self.outputs["hw-probe"].result(StockResult):
            return measured.architecture
        supernet = self.supernet.result(SupernetResult)
        return stock_architecture(supernet.space.scale) if supernet else None


def view(target: Target) -> dict[str, Any]:
    """Everything that the template shows of a target."""
    summary, verdict = target.summary, target.verdict
    device = target.outputs["hw-probe"].json(Profile.FILE) or summary.hardware.plain()
    return {
        "identity": target.identity,
        "name": target.name,
        "overview": overview(target),
        "verdict": outcome(target),
        "limits": [_limit(row, target) for row in summary.constraints],
        "headline": _headline(target),
        "classes": _classes(target),
        "rare": wording.rare_sentence(summary.classes),
        "side_by_side": side_by_side(target),
        "rules": _rules(target),
        "exported": _exported(target),
        "pareto": _pareto(target),
        "found": _found(target),
        "prior": _prior(target),
        "architecture": _architecture(target),
        "latency_model": _latency_model(target),
        "frame": _frame(target),
        "tuning": _tuning(target),
        "quantization": _quantization(target),
        "tried": [_tried(row, target) for row in verdict.tried] if verdict else [],
        "choose": wording.choose_sentence(summary.registry, summary.hardware.name),
        "tried_missing": target.outputs["trt-export"].why_missing("table of candidates"),
        "device": flatten(device),
        "registry": _registry(target),
        "gate": wording.gate(summary.gate) if summary.gate else "",
        "files": sorted(summary.model.files.items()) if summary.model else [],
        "unmeasured": unmeasured(target),
    }


def overview(target: Target) -> dict[str, Any]:
    """What ships for a target, to stand beside what ships for the others."""
    model, chosen, entry = target.summary.model, target.summary.architecture, target.summary.registry
    stock = target.summary.baselines[0].latency_ms.p50 if target.summary.baselines else None
    return {
        "label": target.summary.id,
        "network": chosen.digest if chosen and model else wording.ABSENT,
        "speed": _quotient(stock, model.latency_ms.p50 if model else None),
        "registered": f"{entry.model}, version {entry.version}" if entry else wording.ABSENT,
    } | _measures(model)


def outcome(target: Target) -> dict[str, str]:
    """The verdict on the limits: `kind` is met, missed or failed."""
    limits, error = target.summary.constraints, target.summary.error or ""
    missed = [row for row in limits if row.met is False]
    every = "Limit" if len(limits) == 1 else f"All {len(limits)} limits"
    if limits and all(row.met for row in limits):
        if target.summary.status == "failed":
            return {"kind": "failed", "title": f"{every} kept, but the run failed", "text": error}
        return {"kind": "met", "title": f"{every} kept", "text": "As measured on this device with the file that ships."}
    if missed or (target.verdict and target.verdict.status == "failed"):
        names = ", ".join(wording.quantity(row) for row in missed) or "No candidate keeps the limits"
        return {"kind": "missed", "title": "Limit missed", "text": error or f"{names}: as measured on this device."}
    return {
        "kind": "failed",
        "title": "No verdict",
        "text": error or "The run ended before the exported file was measured on this device.",
    }


def side_by_side(target: Target) -> list[dict[str, Any]]:
    """The shipped network and the stock ones, with the speed ratio of each stock network to the shipped one."""
    rows: list[dict[str, Any]] = []
    model, stock = target.summary.model, target.summary.baselines
    if model:
        row = {"name": "searched, shipped", "shipped": True, "speed": None, "epochs": _epochs(target)}
        row["form"] = wording.precision(target.summary.precision_shipped)
        rows.append(row | _measures(model) | _trained(model.training))
    ours = model.latency_ms.p50 if model else None

    def add(name: str, form: str, epochs: int | None, row: StockFile | told.Baseline | AsExported) -> None:
        training = None if isinstance(row, AsExported) else row.training
        named = {"name": wording.stock_name(name), "form": form, "shipped": False, "epochs": wording.whole(epochs)}
        rows.append(named | _measures(row) | {"speed": _quotient(row.latency_ms.p50, ours)} | _trained(training))

    for file in stock:
        if isinstance(file, StockFile):
            add(file.name, file.form, file.epochs, file)
        else:
            add(file.name, "", None, file)
    probed = target.outputs["hw-probe"].result(StockResult)
    if probed and stock:
        add(stock[0].name, "C2f, FP32, untrained", None, probed.as_ultralytics_exports_it)
    return rows


def _unmeasured_of_stock(target: Target) -> Iterator[tuple[str, str]]:
    """What is not known of the comparison with stock."""
    model, stock = target.summary.model, target.summary.baselines
    if not stock:
        yield "Stock baseline", "No stock network was trained in this run, so there is nothing to compare with."
        return
    yield (
        "Spread between trainings",
        "The interval allows for how far trainings of one network lie apart. Few trainings of these data tell that: in "
        "the main the figure is what is typical of other data.",
    )
    if model and all(abs(row.latency_ms.p50 / model.latency_ms.p50 - 1) > _SAME_LATENCY for row in stock):
        yield (
            "Stock at the same latency",
            "Stock is compared at its own size and for as many epochs; no stock network was rescaled to the shipped "
            "one's latency.",
        )


def unmeasured(target: Target) -> list[tuple[str, str]]:
    """What was not measured or not done, and why: absence is told, never left to be guessed."""
    rows: list[tuple[str, str]] = []
    summary, model, export = target.summary, target.summary.model, target.outputs["trt-export"]
    if target.shipped and target.shipped.disturbed:
        rows.append(("An undisturbed latency", "Other load was there throughout; too few rounds were free of it."))
    engine = summary.engine or export.result(EngineResult)
    if engine and not engine.built:
        rows.append(("TensorRT engine", f"Not built: {engine.reason or 'no reason was recorded'}"))
    elif not engine:
        rows.append(("TensorRT engine", export.why_missing("engine.json")))
    if model is None or (model.power_w is None and model.energy_mj is None):
        table = target.outputs["hw-probe"].result(LatencyTable)
        reason = table.conditions.no_counter if table else None
        rows.append(("Power and energy", f"Not counted here: {reason or 'no energy counter was read'}."))
    around = "" if model and model.latency_with_nms_ms else ", and non-maximum suppression,"
    rows.append(
        (
            "Latency around the network",
            f"Loading, decoding and resizing an image{around} come on top of what was timed.",
        )
    )
    rows += [
        (f"Limit on {wording.quantity(row)}", "It has no measurement, and so no verdict.")
        for row in summary.constraints
        if row.measured is None
    ]
    if target.verdict is None or target.verdict.quantization is None:
        asked = summary.precision_requested
        reason = f"The run asked for {wording.precision(asked)}." if asked in ("fp32", "fp16") else ""
        rows.append(("INT8", reason or export.why_missing("INT8 result")))
    rows += _unmeasured_of_stock(target)
    if model and model.memory_mb is None:
        rows.append(("Peak memory", "No figure was recorded for the shipped file."))
    rows += [
        (f"Stage {stage}", outputs.why_missing("output"))
        for stage, outputs in target.outputs.items()
        if not outputs.present
    ]
    return rows


def flatten(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Plain data as rows of name and text, nested names joined; credentials in addresses are left out."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items() if isinstance(data, Mapping) else ():
        name = _SUFFIXES.sub(lambda match: f", {_UNITS[match[1]]}", f"{prefix} {key}".strip()).replace("_", " ")
        name = _LONG_NAMES.get(name, name)
        if isinstance(value, Mapping):
            rows += flatten(value, name)
        elif isinstance(value, list):
            rows.append((name, ", ".join(str(item) for item in value) or wording.ABSENT))
        elif value is None:
            rows.append((name, "not measured"))
        elif isinstance(value, bool):
            rows.append((name, "yes" if value else "no"))
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        else:
            rows.append((name, public(str(value))))
    return rows


def public(address: str) -> str:
    """An address without user, password and query, which may be credentials: a report is passed on."""
    without_query = re.sub(r"(?<!\w)(\w{1,32}://[^?\s]{0,2048})\?\S*", r"\1", address)
    return re.sub(r"(?<!\w)(\w{1,32}://)[^/@\s]*@", r"\1", without_query)


def _measures(row: FileFigures | told.Model | told.Baseline | AsExported | Accuracy | None) -> dict[str, Any]:
    """The figures of a file, as far as it has them."""
    known = dict(row) if row else {}
    known |= dict(known.get("latency_ms") or ())
    names = ("map50_95", "map50", "p50", "p90", "p99", "memory_mb", "params", "gflops")
    return {name: known.get(name) for name in names}


def _epochs(target: Target) -> str:
    """Epochs that the shipped network's weights have seen: in the supernet, if they were there, and in fine-tuning."""
    candidates = target.tuned.candidates if target.tuned and target.shipped else ()
    row = next((row for row in candidates if target.shipped and row.index == target.shipped.candidate), None)
    if row and row.start in ("scratch", "weights"):
        return f"{wording.whole(row.epochs)}, from {row.start}"
    supernet = target.supernet.result(SupernetResult)
    return f"{wording.whole(supernet.epochs)} + {wording.whole(row.epochs)}" if supernet and row else wording.ABSENT


def _trained(training: TrainingCost | None) -> dict[str, str]:
    """What a row's network began with, in a word and in full, and the computing of its training."""
    return {
        "start": wording.STARTS[training.start] if training else wording.ABSENT,
        "begun_with": training.begun_with if training else "",
        "computing": f"{training.computing / 1e12:.3g}" if training else wording.ABSENT,
    }


def _headline(target: Target) -> dict[str, Any]:
    """The figures of the verdict: accuracy, the difference to stock with its interval, and the speed ratio."""
    baseline: Mapping[str, Any] = next((row for row in side_by_side(target) if not row["shipped"]), {})
    model, compared, interval = target.summary.model, next(iter(target.comparisons), None), None
    if compared:
        bounds = {"low": compared.low, "at": compared.difference, "high": compared.high}
        reach = 1.2 * max(0.01, *map(abs, bounds.values()))
        interval = {name: _place(bound, reach) for name, bound in bounds.items()}
    return {
        "word": compared.word if compared else None,
        "sentences": [_compared(row) for row in target.comparisons],
        "difference": compared.difference if compared else None,
        "low": compared.low if compared else None,
        "high": compared.high if compared else None,
        "interval": interval,
        "other": baseline.get("name", "stock"),
        "speed": baseline.get("speed"),
        "stock_map": baseline.get("map50_95"),
        "stock_p50": baseline.get("p50"),
        "map50_95": model.map50_95 if model else None,
        "map50": model.map50 if model else None,
        "checkpoint": target.verdict.checkpoint_map50_95 if target.verdict else None,
    }


def _compared(row: AgainstStock) -> tuple[str, str]:
    """A comparison as a sentence, and what was compared."""
    sentence = wording.comparison_sentence(row, row.subject, wording.stock_name(row.against))
    return f"{sentence} {wording.decided_by_sentence(row.decided_by)}".rstrip(), row.what


def _classes(target: Target) -> list[dict[str, Any]]:
    """mAP50-95 of each class: shipped, with what the validation images tell of it, and the first stock network."""
    stock = next(iter(target.summary.baselines), None)
    theirs = stock.per_class if isinstance(stock, StockFile) else {}
    ours = target.shipped.per_class if target.shipped else {}
    known = {row.name: row for row in target.summary.classes}
    return [
        {
            "name": name,
            "ours": ours.get(name),
            "theirs": theirs.get(name),
            "images": known[name].images if name in known else None,
            "boxes": known[name].boxes if name in known else None,
            "told": wording.class_interval(known.get(name)),
        }
        for name in dict.fromkeys([*ours, *known])
    ]


def _place(value: float, reach: float) -> float:
    """Position on an axis from -reach to reach, in percent."""
    return round(50 + 50 * value / reach, 2)


def _limit(row: told.Limit, target: Target) -> dict[str, Any]:
    """One limit beside its measurement, also as positions on a bar, in percent of its length."""
    bar, model, with_nms = None, target.summary.model, row.scope == "with_nms"
    marks: list[tuple[str, float]] = [] if row.measured is None else [("measured", row.measured)]
    if model and row.metric == "latency":
        marks = list((model.latency_with_nms_ms if with_nms else model.latency_ms) or ())
    if marks:
        full = 1.1 * max(row.limit, *(value for _, value in marks))
        interval = _interval(target, with_nms=with_nms)
        bar = {
            "limit": round(100 * row.limit / full, 2),
            "marks": [
                {
                    "name": name,
                    "at": round(100 * value / full, 2),
                    "text": wording.number(value) + (interval if name == "p50" else ""),
                    "limited": name in (row.statistic, "measured"),
                }
                for name, value in marks
            ],
        }
    return {
        "name": wording.quantity(row),
        "bound": wording.bound(row),
        "measured": wording.with_unit(row.measured, row.unit),
        "met": row.met,
        "asked": row.text or "",
        "bar": bar,
        "lower": row.metric in LOWER,
    }


def _interval(target: Target, *, with_nms: bool) -> str:
    """The 95 % interval of the shipped file's p50, with or without non-maximum suppression."""
    file = target.shipped
    interval = file and (file.latency_with_nms_interval_ms if with_nms else file.latency_interval_ms)
    if not interval:
        return ""
    return " (95\N{NO-BREAK SPACE}% interval {} to {})".format(*map(wording.number, interval))


def _rules(target: Target) -> dict[str, Any]:
    """What hardware rules took out of the space before the search, and what the latency table says of that."""
    search = target.outputs["search"]
    content = search.result(RulesResult)
    rules = content.rules if content else ()
    removed = [item for rule in rules if rule.on for item in rule.removed.items()]
    taken = sum(len(options) for _, options in removed)
    if content is None:
        sentence = search.why_missing("record of hardware rules")
    elif not rules:
        sentence = "No hardware rule is about this device, so the whole space was searched."
    else:
        sentence = (
            f"Hardware rules took {wording.whole(taken) if taken else 'none'} of the space's "
            f"{content.options.space} options out before the search."
        )
    return {
        "sentence": sentence,
        "rows": [_rule(rule) for rule in rules],
        "removed": [(_dimension(name), ", ".join(map(str, options))) for name, options in removed],
    }


def _rule(rule: RuleApplied) -> dict[str, str]:
    count = sum(map(len, rule.removed.values()))
    taken = f"{count} option{'s' * (count != 1)}" if count else "nothing"
    evidence = rule.evidence
    return {
        "name": rule.rule,
        "says": rule.says,
        "reason": rule.reason,
        "taken": taken if rule.on else f"switched off; would be {taken}",
        "measured": wording.evidence_sentence(evidence) if evidence else "not measured" if count else wording.ABSENT,
        "verdict": evidence.verdict if evidence else "",
    }


def _dimension(name: str) -> str:
    """A dimension of the space in words, for example `backbone p3 width`."""
    return name.replace("_", " ").replace(".", " ")


def _latency_limit(target: Target) -> float | None:
    """The tightest limit on the median latency of the network alone, in ms."""
    limits = [
        row.limit
        for row in [*target.summary.constraints, *target.outputs["hw-probe"].rows(ResolvedLimit)]
        if (row.metric, row.statistic, row.scope) == ("latency", "p50", "engine")
    ]
    return min(limits, default=None)


def _as_measured(network: plots.Network | None, p50: float | None) -> plots.Network | None:
    """A network at the latency that was measured of it, where that is known."""
    return network if network is None or p50 is None else replace(network, measured_ms=p50)


def _exported(target: Target) -> plots.Plot | None:
    """The plot of all exported files; nothing where the export came to none."""
    if target.verdict is None:
        return None
    shipped = target.shipped
    files = [
        _file(f"candidate {row.candidate}, {wording.precision(row.precision)}", "candidate", row)
        for row in target.verdict.tried
        if row.outcome != "shipped"
    ]
    for stock in target.verdict.baselines:
        ratio = stock.latency_ms.p50 / shipped.latency_ms.p50 if shipped else 0.0
        alike = abs(ratio - 1) <= _SAME_LATENCY
        named = f"{wording.stock_name(stock.name)}, {stock.form}"
        files.append(_file(f"{named}, of equal latency", "equal", stock) if alike else _file(named, "stock", stock))
    if shipped:
        files.append(_file(f"shipped, {wording.precision(shipped.precision)}", "shipped", shipped))
    return plots.exported(f"{target.identity}-exported", files, _latency_limit(target)) if files else None


def _file(name: str, kind: plots.Kind, row: FileFigures) -> plots.File:
    return plots.File(name, kind, row.latency_ms.p50, row.map50_95, row.latency_interval_ms)


def _pareto(target: Target) -> dict[str, Any]:
    search, networks = target.outputs["search"], target.history
    if not networks:
        return {"plot": None, "missing": search.why_missing("search history"), "facts": []}
    candidates = [
        plots.Network(
            row.architecture.digest,
            row.map50_95_search,
            row.predicted.latency_ms,
            row.measured.latency_ms.p50,
            row.source,
        )
        for row in search.rows(CandidateResult)
    ]
    chosen = target.summary.architecture
    known = {network.name: network for network in [*candidates, *networks]}
    model, limit_ms = target.summary.model, _latency_limit(target)
    stock = target.outputs["hw-probe"].result(StockResult)
    front = plots.Front(
        networks=networks,
        stock=_as_measured(_scored_stock(target, known), stock.latency_ms.p50 if stock else None),
        shipped=_as_measured(known.get(chosen.digest), model.latency_ms.p50) if chosen and model else None,
        limit_ms=limit_ms,
        candidates=candidates,
    )
    searched = [n for n in networks if n.searched]
    facts = [("evaluated by the search", str(len(searched)))]
    facts.append(("for comparison", str(len(networks) - len(searched))))
    facts.append(("on the front", str(len(plots.pareto_front(searched)))))
    if limit_ms is not None:
        facts.append(("within the limit by prediction", str(sum(n.predicted_ms <= limit_ms for n in networks))))
    return {"plot": plots.pareto(f"{target.identity}-pareto", front), "missing": "", "facts": facts}


def _scored_stock(target: Target, known: Mapping[str, plots.Network]) -> plots.Network | None:
    """Stock as the search scored it; where it misses the limit, it is no member of the history."""
    stock, result = target.stock, target.outputs["search"].result(SearchResult)
    if stock is None or stock.digest in known:
        return known.get(stock.digest) if stock else None
    return plots.Network(stock.digest, result.stock.map50_95, result.stock.latency_ms) if result else None


def _found(target: Target) -> dict[str, Any]:
    """Where the scored networks came from, which were measured, and how the search did."""
    search, networks = target.outputs["search"], target.history
    front = plots.pareto_front(n for n in networks if n.searched)
    result = search.result(SearchResult)
    sources = []
    for source in dict.fromkeys(n.source for n in networks):
        own = [n for n in networks if n.source == source]
        row = {"name": wording.SOURCES.get(source, source), "evaluated": str(len(own))}
        row["front"] = str(sum(n.source == source for n in front)) if own[0].searched else wording.ABSENT
        sources.append(row | {"best": result.best_map50_95.get(source) if result else None})
    measured = [*search.rows(CandidateResult), *(result.missed if result else ())]
    return {
        "sources": sources,
        "candidates": [_candidate(row, i) for i, row in enumerate(measured)],
        "sentences": list(_search_sentences(result)) if result else [],
    }


def _search_sentences(result: SearchResult) -> Iterator[str]:
    """How much of the limit is used, what was wanted, and how the search did against what it is compared with."""
    yield wording.budget_sentence(result.budget)
    if wanted := result.objective:
        yield (
            f"Wanted was a small {wording.number(wanted.accuracy)} × (1 − mAP50-95) + "
            f"{wording.number(wanted.latency)} × latency / stock's latency of {wording.milliseconds(wanted.stock_ms)}."
        )
    for source, compared in result.comparisons.items():
        yield wording.search_sentence(compared, source)


def _candidate(row: CandidateResult, index: int) -> dict[str, Any]:
    return {
        "name": str(index) if row.met else wording.ABSENT,
        "source": wording.SOURCES.get(row.source, row.source),
        "map50_95": row.map50_95_search,
        "predicted": row.predicted.latency_ms,
        "measured": row.measured.latency_ms.p50,
        "used": wording.percent(1 - row.slack, 0),
        "limit": row.tightest,
        "met": row.met,
    }


def _prior(target: Target) -> dict[str, Any]:
    """What the architecture parameters went through before the evolution."""
    search = target.outputs["search"]
    prior = search.result(PriorResult)
    lengths = {len(step.probabilities) for step in prior.trajectory} if prior else set()
    if prior is None or lengths != {len(prior.dimensions)}:
        result = search.result(SearchResult)
        off = result is not None and result.asked.prior_steps == 0
        missing = "No prior was asked for (search.prior_steps = 0)." if off else search.why_missing("prior")
        return {"plots": [], "curves": [], "facts": [], "missing": missing}
    choices = [
        plots.Choice(
            name=_dimension(dimension.name),
            options=[str(option) for option in dimension.options],
            probabilities=[step.probabilities[i] for step in prior.trajectory],
        )
        for i, dimension in enumerate(prior.dimensions)
        if len(dimension.options) > 1
    ]
    numbers = [step.step for step in prior.trajectory]
    limit, expected = prior.limit_ms, [step.expected_ms for step in prior.trajectory]
    curves = [
        plots.prior_latency(f"{target.identity}-prior-ms", numbers, expected, limit),
        plots.prior_loss(f"{target.identity}-prior-loss", numbers, [step.loss for step in prior.trajectory]),
    ]
    heat = [
        plots.prior_choices(f"{target.identity}-prior-steps", numbers, choices),
        plots.prior_probabilities(f"{target.identity}-prior-end", choices),
    ]
    facts = [
        ("steps", wording.whole(numbers[-1])),
        ("latency expected in the end", wording.milliseconds(expected[-1])),
        ("what the limits leave for it", wording.milliseconds(limit)),
    ]
    return {"plots": heat, "curves": [curve for curve in curves if curve], "facts": facts, "missing": ""}


def _architecture(target: Target) -> dict[str, Any]:
    chosen = target.summary.architecture
    if chosen is None:
        return {"svg": None, "missing": "No network was chosen on this target."}
    stock = target.stock
    rows = drawing.parts(chosen, stock)
    changed = sum(row.changed for row in rows)
    name = wording.stock_name(target.summary.baselines[0].name if target.summary.baselines else "network")
    if stock is None:
        summary = "There is no stock network to compare with."
    elif changed:
        summary = f"{changed} of {len(rows)} parts differ from {name}; they are tinted and say what stock has there."
    else:
        summary = f"The network that ships is {name} itself: no part differs."
    title = f"Architecture {chosen.digest} on {target.name}"
    svg = drawing.draw(chosen, stock, title=title, identity=f"{target.identity}-network")
    return {"svg": svg, "rows": rows, "summary": summary, "digest": chosen.digest, "missing": ""}


def _latency_model(target: Target) -> dict[str, Any]:
    probe = target.outputs["hw-probe"]
    fitted = probe.result(LatencyFit)
    table = probe.result(LatencyTable)
    rows = table.rows if table else ()
    if not rows or fitted is None:
        return {"plot": None, "missing": probe.why_missing("latency table"), "facts": []}
    predicted, _ = LatencyModel.of(fitted).predict([row.architecture for row in rows])
    timings = [
        plots.Timing(row.latency_ms.p50, float(value), row.role) for row, value in zip(rows, predicted, strict=True)
    ]
    held_out = [t for t in timings if t.role == "holdout"]
    facts = [
        ("mean absolute error, held out", wording.percent(fitted.mape)),
        ("Spearman correlation, held out", wording.number(fitted.spearman)),
        ("networks measured", str(len(timings))),
        ("of them held out", str(len(held_out))),
        ("scatter of the measurements themselves", f"±{wording.percent(fitted.scatter)}"),
        ("held-out networks under their upper bound", wording.percent(fitted.coverage, 0)),
    ]
    plot = plots.latency_model(f"{target.identity}-latency", timings, fitted)
    return {"plot": plot, "missing": "", "facts": facts}


def _frame(target: Target) -> list[tuple[str, str]]:
    """What a frame costs: the network, non-maximum suppression on made-up outputs, and both on real images."""
    rows: list[tuple[str, str]] = []
    if target.verdict and (shipped := target.verdict.shipped):
        settings, with_nms = target.verdict.nms, shipped.latency_with_nms_ms
        around = "with the confidence threshold" if settings.nms_free else "with NMS"
        alone, both = (_interval(target, with_nms=nms) for nms in (False, True))
        rows += [
            *[("head", "NMS-free (one-to-one): it gives detections, and nothing is suppressed")] * settings.nms_free,
            ("shipped network alone, p50", wording.milliseconds(shipped.latency_ms.p50) + alone),
            (
                f"{around}, on {wording.whole(settings.images)} images, p50",
                wording.milliseconds(with_nms.p50 if with_nms else None) + both,
            ),
            ("boxes above the threshold, an image", wording.number(shipped.found.get("boxes"))),
            ("detections, an image", wording.number(shipped.found.get("detections"))),
        ]
        if shipped.energy_mj is not None:
            rows.append(("energy of an image, network alone", wording.with_unit(shipped.energy_mj, "mJ")))
            rows.append(("mean power, network alone", wording.with_unit(shipped.power_w, "W")))
    probed = target.outputs["hw-probe"].result(NmsResult)
    if timed := probed and probed.timed:
        only = "The threshold" if timed.nms_free else "NMS"
        for name, load in timed.loads.items():
            boxes, kept = wording.whole(load.boxes), wording.whole(load.detections)
            held = ", limits are predicted with it" if name == timed.load else ""
            latency = wording.milliseconds(load.latency_ms.p50)
            rows.append((f"{only} alone, {boxes} made-up boxes for {kept} objects{held}", latency))
    return rows


def _tuning(target: Target) -> dict[str, Any]:
    """Curves of every network that was tuned, baseline last."""
    stage = target.outputs["qat-finetune"]
    curves: dict[str, Sequence[Mapping[str, float]]] = {}
    if stage.folder is not None:
        candidates = sorted((stage.folder / "candidates").glob("*"), key=lambda path: (len(path.name), path.name))
        named = [(f"candidates/{path.name}", f"Candidate {path.name}") for path in candidates]
        for folder, name in [*named, ("baseline", "Stock baseline"), ("rescaled", "Stock, rescaled")]:
            if tuning := stage.result(TuningResult, folder):
                curves |= {name: tuning.curves, f"{name}, QAT": tuning.qat_curves}
    accuracy = plots.scores(f"{target.identity}-tuning", "Accuracy of every network in training", curves)
    drawn = [
        plots.losses(f"{target.identity}-loss-{i}", f"{name}: loss", points)
        for i, (name, points) in enumerate(curves.items())
    ]
    shown = [plot for plot in drawn if plot]
    return {
        "accuracy": accuracy,
        "losses": shown,
        "missing": "" if accuracy or shown else stage.why_missing("fine-tuning curves"),
        "halvings": list(_halvings(target)),
    }


def _halvings(target: Target) -> Iterator[dict[str, Any]]:
    """Who was trained for how long, and what it scored: of the candidates, and of what they are compared with."""
    tuned = target.tuned
    if tuned is None:
        return
    arms: dict[str, FinetuneResult | Rival | None] = {
        "Candidates": tuned,
        "Rescaled stock": tuned.rescaled,
        "Stock": tuned.baseline,
    }
    shipped = target.shipped.candidate if target.shipped else None
    for name, arm in arms.items():
        if arm is None or not (halving := arm.halving).rungs or len(halving.ranking) < 2:
            continue
        yield {
            "name": name,
            "rungs": [f"{wording.whole(rung.epochs)} epochs" for rung in halving.rungs],
            "rows": [
                {
                    "name": row.index,
                    "seed": row.seed,
                    "scores": [*row.scores, *[None] * (len(halving.rungs) - len(row.scores))],
                    "expected": row.expected,
                    "shipped": name == "Candidates" and row.index == shipped,
                }
                for row in halving.ranking
            ],
            "budget": _budget(halving.budget) if isinstance(halving, CandidatesHalving) else "",
        }


def _budget(budget: Budget) -> str:
    trainings = wording.number(budget.stock_trainings)
    return f"At most the computing of {trainings} trainings of stock was allowed for, before it began."


def _quantization(target: Target) -> dict[str, Any] | None:
    result = target.verdict.quantization if target.verdict else None
    if target.verdict is None or result is None:
        return None
    files: dict[str, tuple[str, FileFigures | Accuracy]] = {
        "fp32": ("FP32", result.fp32),
        "ptq": ("INT8, calibrated only", result.ptq),
        "int8": ("INT8, quantization-aware trained", result.int8),
    }
    shipped = target.summary.precision_shipped
    confidence = target.verdict.confidence
    return {
        "rows": [{"name": name, "shipped": key == shipped} | _measures(file) for key, (name, file) in files.items()],
        "sentences": [
            wording.comparison_sentence(result.difference, "INT8", "FP32"),
            wording.comparison_sentence(result.ptq_difference, "Calibrated only, INT8", "FP32"),
            *filter(None, [wording.confidence_sentence(confidence) if confidence else ""]),
        ],
        "speed": _quotient(result.fp32.latency_ms.p50, result.int8.latency_ms.p50),
        "recipe": wording.recipe(result.keep_float),
    }


def _quotient(dividend: float | None, divisor: float | None) -> float | None:
    return None if dividend is None or not divisor else dividend / divisor


def _version(row: Tried, entry: told.Registry | None) -> str:
    """The version that a file is registered as."""
    if entry is None:
        return wording.ABSENT
    if row.outcome == "shipped":
        return str(entry.version)
    found = (one for one in entry.choices if (one.candidate, one.precision) == (row.candidate, row.precision))
    return next((str(one.version) for one in found), wording.ABSENT)


def _tried(row: Tried, target: Target) -> dict[str, Any]:
    missed = [
        f"{wording.quantity(limit)} {wording.with_unit(limit.measured, limit.unit)}, limit {wording.bound(limit)}"
        for limit in row.constraints
        if not limit.met
    ]
    return {
        "candidate": row.candidate,
        "precision": wording.precision(row.precision),
        "outcome": row.outcome,
        "reason": row.reason or "; ".join(missed),
        "shipped": row.outcome == "shipped",
        "version": _version(row, target.summary.registry),
    } | _measures(row)


def _registry(target: Target) -> list[tuple[str, str]]:
    recorded = target.outputs["register"].result(RegisterResult)
    return flatten(recorded.plain() if recorded else target.summary.registry and target.summary.registry.plain())
