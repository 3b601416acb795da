"""What the report says of one target, from the summary and the stages' outputs; the template only lays it out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.report import architecture as drawing
from yolov8_nas.report import plots, wording
from yolov8_nas.report.evidence import Outputs, mapping, pick, records
from yolov8_nas.runner.results import (
    CandidateResult,
    LatencyFit,
    LatencyTable,
    NmsResult,
    PriorResult,
    ResolvedLimit,
    RuleApplied,
    RulesResult,
    SearchResult,
    StockResult,
)
from yolov8_nas.space import Architecture, SpaceError, stock_architecture

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
    summary: Mapping[str, Any]
    outputs: Mapping[str, Outputs]
    supernet: Outputs

    @property
    def verdict(self) -> Mapping[str, Any]:
        """trt-export's verdict, empty where the target did not come so far."""
        return mapping(self.outputs["trt-export"].json("verdict.json"))

    @property
    def model(self) -> Mapping[str, Any]:
        """Figures of the shipped file, as measured."""
        return mapping(self.summary.get("model"))

    @property
    def baselines(self) -> list[Mapping[str, Any]]:
        """The stock networks; trt-export's table knows more of them than the summary."""
        return records(self.verdict.get("baselines")) or records(self.summary.get("baselines"))

    @property
    def name(self) -> str:
        """Device, runtime and precision."""
        runtime = mapping(self.summary.get("runtime"))
        shipped, wanted = self.summary.get("precision_shipped"), self.summary.get("precision_requested")
        device = {**mapping(self.summary.get("hardware")), **mapping(self.outputs["hw-probe"].json("profile.json"))}
        model, asked = device.get("model"), device.get("name")
        named = [
            f"{model} ({asked})" if model and asked else str(model or asked or "unknown device"),
            " ".join(str(runtime[key]) for key in ("name", "version") if runtime.get(key)),
            wording.precision(shipped) if shipped else f"{wording.precision(wanted)} asked for" if wanted else "",
        ]
        return " · ".join(part for part in named if part)

    def architecture(self, data: Any) -> Architecture | None:
        """An architecture, or nothing where `data` is none."""
        try:
            return Architecture.from_dict(data) if isinstance(data, Mapping) else None
        except SpaceError:
            return None

    @property
    def stock(self) -> Architecture | None:
        """The stock network that is compared with."""
        measured = self.outputs["hw-probe"].result(StockResult)
        scale = pick(self.supernet.json("supernet.json"), "space", "scale")
        if measured is None and scale in ("n", "s", "m", "l"):
            return stock_architecture(scale)
        return measured.architecture if measured else None


def view(target: Target) -> dict[str, Any]:
    """Everything that the template shows of a target."""
    comparisons = records(target.verdict.get("comparisons"))
    if not comparisons and mapping(target.summary.get("comparison")):
        comparisons = [target.summary["comparison"]]
    return {
        "identity": target.identity,
        "name": target.name,
        "overview": overview(target),
        "verdict": verdict(target),
        "limits": [_limit(row, target) for row in records(target.summary.get("constraints"))],
        "headline": _headline(target, comparisons),
        "classes": _classes(target),
        "side_by_side": side_by_side(target),
        "rules": _rules(target),
        "pareto": _pareto(target),
        "found": _found(target),
        "prior": _prior(target),
        "architecture": _architecture(target),
        "latency_model": _latency_model(target),
        "frame": _frame(target),
        "tuning": _tuning(target),
        "quantization": _quantization(target),
        "tried": [_tried(row) for row in records(target.verdict.get("tried"))],
        "tried_missing": target.outputs["trt-export"].why_missing("table of candidates"),
        "device": flatten(target.outputs["hw-probe"].json("profile.json") or target.summary.get("hardware")),
        "registry": _registry(target),
        "gate": wording.gate(gate) if (gate := mapping(target.summary.get("gate"))) else "",
        "files": sorted(mapping(target.model.get("files")).items()),
        "unmeasured": unmeasured(target),
    }


def overview(target: Target) -> dict[str, Any]:
    """What ships for a target, to stand beside what ships for the others."""
    chosen = target.architecture(target.summary.get("architecture"))
    entry = mapping(target.summary.get("registry"))
    stock = pick(target.baselines, 0, "latency_ms", "p50")
    return {
        "label": str(target.summary.get("id") or target.name),
        "network": chosen.digest if chosen and target.model else wording.ABSENT,
        "speed": _quotient(stock, pick(target.model, "latency_ms", "p50")),
        "registered": f"{entry.get('model')}, version {entry.get('version')}" if entry else wording.ABSENT,
    } | _measures(target.model)


def verdict(target: Target) -> dict[str, str]:
    """The verdict on the limits: `kind` is met, missed or failed."""
    limits = records(target.summary.get("constraints"))
    error = str(target.summary.get("error") or "")
    failed = target.summary.get("status") == "failed"
    missed = [row for row in limits if row.get("met") is False]
    every = "Limit" if len(limits) == 1 else f"All {len(limits)} limits"
    if limits and all(row.get("met") is True for row in limits):
        if failed:
            return {"kind": "failed", "title": f"{every} kept, but the run failed", "text": error}
        return {"kind": "met", "title": f"{every} kept", "text": "As measured on this device with the file that ships."}
    if missed or target.verdict.get("status") == "failed":
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
    if target.model:
        row = {"name": "searched, shipped", "shipped": True, "speed": None, "epochs": _epochs(target)}
        row["form"] = wording.precision(target.summary.get("precision_shipped"))
        rows.append(row | _measures(target.model) | _trained(target.model))
    ours = pick(target.model, "latency_ms", "p50")
    stock = [*target.baselines]
    probed = target.outputs["hw-probe"].result(StockResult)
    if probed and stock:
        as_c2f = {"name": stock[0].get("name"), "form": "C2f, FP32, untrained"}
        stock.append({**probed.as_ultralytics_exports_it.plain(), **as_c2f})
    rows += [
        {"name": wording.stock_name(row.get("name")), "form": str(row.get("form") or ""), "shipped": False}
        | _measures(row)
        | {"speed": _quotient(pick(row, "latency_ms", "p50"), ours), "epochs": wording.whole(row.get("epochs"))}
        | _trained(row)
        for row in stock
    ]
    return rows


def _unmeasured_of_stock(target: Target) -> Iterator[tuple[str, str]]:
    """What is not known of the comparison with stock."""
    if not target.baselines:
        yield "Stock baseline", "No stock network was trained in this run, so there is nothing to compare with."
        return
    yield (
        "Spread between trainings",
        "The interval allows for how far trainings of one network lie apart. Few trainings of these data tell that: in "
        "the main the figure is what is typical of other data.",
    )
    ours = pick(target.model, "latency_ms", "p50")
    theirs = [pick(row, "latency_ms", "p50") for row in target.baselines]
    if wording.is_number(ours) and not any(
        wording.is_number(value) and abs(value / ours - 1) <= _SAME_LATENCY for value in theirs
    ):
        yield (
            "Stock at the same latency",
            "Stock is compared at its own size and for as many epochs; no stock network was rescaled to the shipped "
            "one's latency.",
        )


def unmeasured(target: Target) -> list[tuple[str, str]]:
    """What was not measured or not done, and why: absence is told, never left to be guessed."""
    told: list[tuple[str, str]] = []
    if pick(target.verdict, "shipped", "disturbed"):
        told.append(("An undisturbed latency", "Other load was there throughout; too few rounds were free of it."))
    engine = mapping(target.summary.get("engine") or target.outputs["trt-export"].json("engine.json"))
    if engine and not engine.get("built"):
        told.append(("TensorRT engine", f"Not built: {engine.get('reason') or 'no reason was recorded'}"))
    elif not engine:
        told.append(("TensorRT engine", target.outputs["trt-export"].why_missing("engine.json")))
    if not any(wording.is_number(target.model.get(key)) for key in ("power_w", "energy_mj")):
        table = target.outputs["hw-probe"].result(LatencyTable)
        reason = table.conditions.no_counter if table else None
        told.append(("Power and energy", f"Not counted here: {reason or 'no energy counter was read'}."))
    limits = records(target.summary.get("constraints"))
    around = "" if target.model.get("latency_with_nms_ms") else ", and non-maximum suppression,"
    told.append(
        (
            "Latency around the network",
            f"Loading, decoding and resizing an image{around} come on top of what was timed.",
        )
    )
    told += [
        (f"Limit on {wording.quantity(row)}", "It has no measurement, and so no verdict.")
        for row in limits
        if row.get("measured") is None
    ]
    if not records(target.verdict.get("tried")) or not mapping(pick(target.verdict, "quantization", "int8")):
        asked = target.summary.get("precision_requested")
        reason = f"The run asked for {wording.precision(asked)}." if asked in ("fp32", "fp16") else ""
        told.append(("INT8", reason or target.outputs["trt-export"].why_missing("INT8 result")))
    told += _unmeasured_of_stock(target)
    told += [
        (name, "No figure was recorded for the shipped file.")
        for key, name in (
            ("map50", "mAP50"),
            ("memory_mb", "Peak memory"),
            ("params", "Parameters"),
            ("gflops", "FLOPs"),
        )
        if target.model and target.model.get(key) is None
    ]
    told += [
        (f"Stage {stage}", outputs.why_missing("output"))
        for stage, outputs in target.outputs.items()
        if not outputs.present
    ]
    return told


def flatten(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Plain data as rows of name and text, nested names joined; credentials in addresses are left out."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping(data).items():
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


def _measures(row: Mapping[str, Any]) -> dict[str, Any]:
    latency = mapping(row.get("latency_ms"))
    return {
        "map50_95": row.get("map50_95"),
        "map50": row.get("map50"),
        "p50": latency.get("p50"),
        "p90": latency.get("p90"),
        "p99": latency.get("p99"),
        "memory_mb": row.get("memory_mb"),
        "params": row.get("params"),
        "gflops": row.get("gflops"),
    }


def _epochs(target: Target) -> str:
    """Epochs that the shipped network's weights have seen: in the supernet, if they were there, and in fine-tuning."""
    tuned = records(pick(target.outputs["qat-finetune"].json("finetune.json"), "candidates"))
    index = pick(target.verdict, "shipped", "candidate")
    row: Mapping[str, Any] = next((row for row in tuned if row.get("index") == index), {})
    if row.get("start") in ("scratch", "weights"):
        return f"{wording.whole(row.get('epochs'))}, from {row['start']}"
    seen = [pick(target.supernet.json("supernet.json"), "epochs"), row.get("epochs")]
    return " + ".join(map(wording.whole, seen)) if all(map(wording.is_number, seen)) else wording.ABSENT


def _trained(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row's network began with, in a word and in full, and the computing of its training."""
    training = mapping(row.get("training"))
    computing = training.get("computing")
    return {
        "start": wording.STARTS.get(str(training.get("start")), wording.ABSENT),
        "begun_with": str(training.get("begun_with") or ""),
        "computing": f"{computing / 1e12:.3g}" if wording.is_number(computing) else wording.ABSENT,
    }


def _headline(target: Target, comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the verdict: accuracy, the difference to stock with its interval, and the speed ratio."""
    baseline: Mapping[str, Any] = next((row for row in side_by_side(target) if not row["shipped"]), {})
    comparison = comparisons[0] if comparisons else {}
    bounds = [comparison[key] for key in ("low", "difference", "high") if wording.is_number(comparison.get(key))]
    interval = None
    if len(bounds) == 3:
        reach = 1.2 * max(0.01, *map(abs, bounds))
        interval = dict(zip(("low", "at", "high"), (_place(bound, reach) for bound in bounds), strict=True))
    return {
        "word": comparison.get("word") if interval else None,
        "sentences": [_compared(row, baseline) for row in comparisons],
        "difference": comparison.get("difference"),
        "low": comparison.get("low"),
        "high": comparison.get("high"),
        "interval": interval,
        "other": str(baseline.get("name") or "stock"),
        "speed": baseline.get("speed"),
        "stock_map": baseline.get("map50_95"),
        "stock_p50": baseline.get("p50"),
        "map50_95": target.model.get("map50_95"),
        "map50": target.model.get("map50"),
        "checkpoint": target.verdict.get("checkpoint_map50_95"),
    }


def _compared(comparison: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[str, str]:
    """A comparison as a sentence, and what was compared."""
    other = wording.stock_name(comparison.get("against") or baseline.get("name"))
    subject = str(comparison.get("subject") or "The shipped network")
    return wording.comparison_sentence(comparison, subject, other), str(comparison.get("what") or "")


def _classes(target: Target) -> list[tuple[str, Any, Any]]:
    """mAP50-95 of each class: shipped, and the first stock network."""
    ours = mapping(pick(target.verdict, "shipped", "per_class"))
    theirs = mapping(pick(target.baselines, 0, "per_class"))
    return [(str(name), value, theirs.get(name)) for name, value in ours.items()]


def _place(value: float, reach: float) -> float:
    """Position on an axis from -reach to reach, in percent."""
    return round(50 + 50 * value / reach, 2)


def _limit(row: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """One limit beside its measurement, also as positions on a bar, in percent of its length."""
    bar = None
    bound, measured = row.get("limit"), row.get("measured")
    limited = (row.get("statistic") or "p50", "measured")
    marks: list[tuple[str, Any]] = [("measured", measured)]
    timed = "latency_with_nms_ms" if row.get("scope") == "with_nms" else "latency_ms"
    if target.model and row.get("metric") == "latency":
        marks = [(name, pick(target.model, timed, name)) for name in ("p50", "p90", "p99")]
    marks = [(name, value) for name, value in marks if wording.is_number(value)]
    if wording.is_number(bound) and marks:
        full = 1.1 * max(bound, *(value for _, value in marks))
        bar = {
            "limit": round(100 * bound / full, 2),
            "marks": [
                {
                    "name": name,
                    "at": round(100 * value / full, 2),
                    "text": wording.number(value) + (_interval(target, timed) if name == "p50" else ""),
                    "limited": name in limited,
                }
                for name, value in marks
            ],
        }
    return {
        "name": wording.quantity(row),
        "bound": wording.limit(row),
        "measured": wording.with_unit(measured, str(row.get("unit", ""))),
        "met": row.get("met"),
        "asked": str(row.get("text") or ""),
        "bar": bar,
        "lower": row.get("metric") == "throughput",
    }


def _interval(target: Target, timed: str) -> str:
    """The 95 % interval of the shipped file's p50 in `latency_ms` or `latency_with_nms_ms`."""
    low, high = (pick(target.verdict, "shipped", timed.replace("_ms", "_interval_ms"), i) for i in (0, 1))
    if not (wording.is_number(low) and wording.is_number(high)):
        return ""
    return f" (95\N{NO-BREAK SPACE}% interval {wording.number(low)} to {wording.number(high)})"


def _as_scored(candidate: CandidateResult) -> Mapping[str, Any]:
    """A candidate as a row of the history."""
    return {
        "architecture": candidate.architecture.to_dict(),
        "map50_95": candidate.map50_95_search,
        "latency_ms": candidate.predicted.latency_ms,
        "measured_ms": candidate.measured.latency_ms.p50,
        "source": candidate.source,
    }


def _network(row: Mapping[str, Any]) -> plots.Network | None:
    predicted, measured = row.get("latency_ms"), row.get("measured_ms")
    if not wording.is_number(predicted) or not wording.is_number(row.get("map50_95")):
        return None
    try:
        name = Architecture.from_dict(row["architecture"]).digest
    except (KeyError, SpaceError, TypeError):
        name = "network"
    return plots.Network(
        name=name,
        score=row["map50_95"],
        predicted_ms=float(predicted),
        measured_ms=float(measured) if wording.is_number(measured) else None,
        source=str(row.get("source") or "evolution"),
        generation=row.get("generation"),
    )


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


def _dimension(name: Any) -> str:
    """A dimension of the space in words, for example `backbone p3 width`."""
    return str(name).replace("_", " ").replace(".", " ")


def _pareto(target: Target) -> dict[str, Any]:
    search = target.outputs["search"]
    history = [row for row in search.lines("history.jsonl") if isinstance(row, Mapping)]
    networks = [network for network in map(_network, history) if network]
    if not networks:
        return {"plot": None, "missing": search.why_missing("search history"), "facts": []}
    candidates = [n for row in search.rows(CandidateResult) if (n := _network(_as_scored(row)))]
    chosen = target.architecture(target.summary.get("architecture"))
    known = {network.name: network for network in [*candidates, *networks]}
    stock = target.stock
    # A stock network that misses the limit is no member of the search's history; its score stands apart.
    result = search.result(SearchResult)
    scored = result.stock.plain() if result else {}
    limits = [
        row["limit"]
        for row in records(target.summary.get("constraints"))
        if row.get("metric") == "latency"
        and row.get("statistic") in (None, "p50")
        and row.get("scope") in (None, "engine")
        and wording.is_number(row.get("limit"))
    ]
    of_networks = ("latency", "p50", "engine")
    resolved = target.outputs["hw-probe"].rows(ResolvedLimit)
    limits += [row.limit for row in resolved if (row.metric, row.statistic, row.scope) == of_networks]
    front = plots.Front(
        networks=networks,
        stock=(known.get(stock.digest) or _network({**scored, "architecture": stock.to_dict()})) if stock else None,
        shipped=known.get(chosen.digest) if chosen and target.model else None,
        limit_ms=min(limits) if limits else None,
        candidates=candidates,
    )
    searched = [n for n in networks if n.searched]
    facts = [("evaluated by the search", str(len(searched)))]
    facts.append(("for comparison", str(len(networks) - len(searched))))
    facts.append(("on the front", str(len(plots.pareto_front(searched)))))
    if limits:
        facts.append(("within the limit by prediction", str(sum(n.predicted_ms <= min(limits) for n in networks))))
    return {"plot": plots.pareto(f"{target.identity}-pareto", front), "missing": "", "facts": facts}


def _found(target: Target) -> dict[str, Any]:
    """Where the scored networks came from, which were measured, and how the search did."""
    search = target.outputs["search"]
    networks = [n for n in map(_network, records(search.lines("history.jsonl"))) if n]
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
    chosen = target.architecture(target.summary.get("architecture"))
    if chosen is None:
        return {"svg": None, "missing": "No network was chosen on this target."}
    stock = target.stock
    rows = drawing.parts(chosen, stock)
    changed = sum(row.changed for row in rows)
    name = wording.stock_name(pick(target.baselines, 0, "name"))
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
    rows = [row for row in table.rows if wording.is_number(row.latency_ms.p50)] if table else []
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
    probed = target.outputs["hw-probe"].result(NmsResult)
    shipped, settings = mapping(target.verdict.get("shipped")), mapping(target.verdict.get("nms"))
    rows: list[tuple[str, str]] = []
    if shipped and settings:
        found = mapping(shipped.get("found"))
        free = settings.get("nms_free")
        around = "with the confidence threshold" if free else "with NMS"
        rows += [
            *[("head", "NMS-free (one-to-one): it gives detections, and nothing is suppressed")] * bool(free),
            ("shipped network alone, p50", _p50(target, "latency_ms")),
            (f"{around}, on {wording.whole(settings.get('images'))} images, p50", _p50(target, "latency_with_nms_ms")),
            ("boxes above the threshold, an image", wording.number(found.get("boxes"))),
            ("detections, an image", wording.number(found.get("detections"))),
        ]
        if wording.is_number(shipped.get("energy_mj")):
            rows.append(("energy of an image, network alone", wording.with_unit(shipped["energy_mj"], "mJ")))
            rows.append(("mean power, network alone", wording.with_unit(shipped.get("power_w"), "W")))
    if timed := probed and probed.timed:
        alone = "The threshold" if timed.nms_free else "NMS"
        for name, load in timed.loads.items():
            boxes, kept = wording.whole(load.boxes), wording.whole(load.detections)
            held = ", limits are predicted with it" if name == timed.load else ""
            latency = wording.milliseconds(load.latency_ms.p50)
            rows.append((f"{alone} alone, {boxes} made-up boxes for {kept} objects{held}", latency))
    return rows


def _p50(target: Target, timed: str) -> str:
    return wording.milliseconds(pick(target.verdict, "shipped", timed, "p50")) + _interval(target, timed)


def _tuning(target: Target) -> dict[str, Any]:
    """Curves of every network that was tuned, baseline last."""
    stage = target.outputs["qat-finetune"]
    curves: dict[str, list[Mapping[str, Any]]] = {}
    if stage.folder is not None:
        candidates = sorted((stage.folder / "candidates").glob("*"), key=lambda path: (len(path.name), path.name))
        named = [(f"candidates/{path.name}", f"Candidate {path.name}") for path in candidates]
        for folder, name in [*named, ("baseline", "Stock baseline"), ("rescaled", "Stock, rescaled")]:
            tuning = mapping(stage.json(f"{folder}/tuning.json"))
            curves[name] = records(tuning.get("curves"))
            curves[f"{name}, QAT"] = records(tuning.get("qat_curves"))
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
        "halvings": _halvings(target),
    }


def _halvings(target: Target) -> list[dict[str, Any]]:
    """Who was trained for how long, and what it scored: of the candidates, and of what they are compared with."""
    tuned = mapping(target.outputs["qat-finetune"].json("finetune.json"))
    shipped = pick(target.verdict, "shipped", "candidate")
    arms = {
        "Candidates": tuned,
        "Rescaled stock": mapping(tuned.get("rescaled")),
        "Stock": mapping(tuned.get("baseline")),
    }
    tables = []
    for name, arm in arms.items():
        halving = mapping(arm.get("halving"))
        rungs, ranking = records(halving.get("rungs")), records(halving.get("ranking"))
        if not rungs or len(ranking) < 2:
            continue
        rows = []
        for row in ranking:
            scores = [*(row.get("scores") or ())]
            rows.append(
                {
                    "name": f"{row.get('index', wording.ABSENT)}",
                    "seed": f"{row.get('seed', wording.ABSENT)}",
                    "scores": [*scores, *[None] * (len(rungs) - len(scores))],
                    "expected": row.get("expected"),
                    "shipped": name == "Candidates" and row.get("index") == shipped,
                }
            )
        headings = [f"{wording.whole(rung.get('epochs'))} epochs" for rung in rungs]
        tables.append(
            {"name": name, "rungs": headings, "rows": rows, "budget": _budget(mapping(halving.get("budget")))}
        )
    return tables


def _budget(budget: Mapping[str, Any]) -> str:
    trainings = budget.get("stock_trainings")
    if not wording.is_number(trainings):
        return ""
    return f"At most the computing of {wording.number(trainings)} trainings of stock was allowed for, before it began."


def _quantization(target: Target) -> dict[str, Any] | None:
    result = mapping(target.verdict.get("quantization"))
    names = {"fp32": "FP32", "ptq": "INT8, calibrated only", "int8": "INT8, quantization-aware trained"}
    rows = {
        key: {"name": name, "shipped": target.summary.get("precision_shipped") == key} | _measures(mapping(result[key]))
        for key, name in names.items()
        if mapping(result.get(key))
    }
    if not {"fp32", "int8"} <= rows.keys():
        return None
    differences = {"INT8": "difference", "Calibrated only, INT8": "ptq_difference"}
    found = {subject: mapping(result.get(key)) for subject, key in differences.items()}
    compared = [
        wording.comparison_sentence(difference, subject, "FP32")
        for subject, difference in found.items()
        if wording.is_number(difference.get("difference"))
    ]
    confidence = mapping(target.verdict.get("confidence"))
    return {
        "rows": list(rows.values()),
        "sentences": [*compared, *filter(None, [wording.confidence_sentence(confidence)])],
        "speed": _quotient(rows["fp32"]["p50"], rows["int8"]["p50"]),
        "recipe": wording.recipe(result.get("keep_float") or ()),
    }


def _quotient(dividend: Any, divisor: Any) -> float | None:
    if wording.is_number(dividend) and wording.is_number(divisor) and divisor:
        return dividend / divisor
    return None


def _tried(row: Mapping[str, Any]) -> dict[str, Any]:
    missed = [
        f"{wording.quantity(limit)} {wording.with_unit(limit.get('measured'), str(limit.get('unit', '')))}, "
        f"limit {wording.limit(limit)}"
        for limit in records(row.get("constraints"))
        if limit.get("met") is False
    ]
    return {
        "candidate": str(row.get("candidate", "")),
        "precision": wording.precision(row.get("precision")),
        "outcome": str(row.get("outcome") or ""),
        "reason": str(row.get("reason") or "; ".join(missed)),
        "shipped": row.get("outcome") == "shipped",
    } | _measures(row)


def _registry(target: Target) -> list[tuple[str, str]]:
    recorded = mapping(target.outputs["register"].json("registry.json")) or mapping(target.summary.get("registry"))
    return flatten(recorded)
