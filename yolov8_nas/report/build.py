"""Builds the report: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from yolov8_nas.files import atomic_write
from yolov8_nas.report import advice, plots, sections, wording
from yolov8_nas.report.evidence import Outputs, mapping, pick, records
from yolov8_nas.report.wording import shown

_TEMPLATES: Final = Path(__file__).parent / "templates"
_SPLITS: Final = ("train", "search", "val")


def build_report(summary: Mapping[str, Any], evidence: Mapping[str, Any], out: Path) -> Path:
    """Write the report of a run.

    Whatever part of the evidence is missing or unreadable, the report is written and says what is not there and why.
    It makes no request: scripts and styles are inside, and its content security policy forbids the rest.

    Args:
        summary: The content of `summary.json`.
        evidence: Output folders by stage name, and under `targets` the same for the stages of each target,
            by the target's `id` in the summary.
        out: The HTML file to write.

    Returns:
        `out`.
    """
    page = _template().render(
        **_page(summary, evidence),
        style=Markup((_TEMPLATES / "report.css").read_text()),
        script=Markup((_TEMPLATES / "report.js").read_text()),
        plotly=Markup(get_plotlyjs()),
    )
    atomic_write(out, page)
    return out


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "duration": wording.duration,
        "json": _embedded_json,
        "millions": wording.millions,
        "milliseconds": wording.milliseconds,
        "number": wording.number,
        "ratio": wording.ratio,
        "score": wording.score,
        "signed": wording.signed,
        "whole": wording.whole,
    }
    return environment.get_template("report.html")


def _page(summary: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, Any]:
    stages = records(summary.get("stages"))
    data, supernet = (_outputs(stage, evidence.get(stage), None, stages) for stage in ("data-prep", "supernet-train"))
    left = mapping(evidence.get("targets"))
    targets = []
    for i, entry in enumerate(records(summary.get("targets"))):
        name = str(entry.get("id"))
        target = sections.Target(
            identity=f"target-{i + 1}",
            summary=entry,
            outputs={s: _outputs(s, mapping(left.get(name)).get(s), name, stages) for s in sections.TARGET_STAGES},
            supernet=supernet,
        )
        targets.append({**sections.view(target), "advice": advice.view(entry, stages, target.verdict)})
    run = mapping(summary.get("run"))
    return {
        "run": run,
        "title": str(run.get("name") or "run"),
        "run_rows": sections.flatten(run),
        "targets": targets,
        "run_error": str(run.get("error") or ""),
        "retraining": str(mapping(run.get("retraining")).get("says") or ""),
        "dataset": _dataset(summary, data),
        "supernet": _supernet(supernet),
        "stages": [_stage(stage) for stage in stages],
        "total_seconds": sum(s["seconds"] for s in stages if wording.is_number(s.get("seconds"))),
    }


def _outputs(stage: str, folder: Any, target: str | None, stages: list[Mapping[str, Any]]) -> Outputs:
    """What a stage left; its status is that of its row in the summary."""
    status = None
    for row in stages:
        if row.get("name") == stage and row.get("target") == target:
            status = str(row.get("status"))
    return Outputs(stage, Path(folder) if folder else None, status)


def _dataset(summary: Mapping[str, Any], data: Outputs) -> dict[str, Any]:
    written = mapping(data.json("dataset.json"))
    told = mapping(summary.get("dataset"))
    images = mapping(told.get("images")) or mapping(written.get("images"))
    boxes = mapping(written.get("boxes"))
    classes = written.get("classes") or told.get("classes")
    names = [str(name) for name in (classes.values() if isinstance(classes, Mapping) else classes or [])]
    rows = [
        {"name": name, "boxes": [_class_count(boxes.get(split), name, i) for split in _SPLITS]}
        for i, name in enumerate(names)
    ]
    sides = mapping(written.get("image_sides"))
    facts = [
        (f"image {name}, smallest to largest", f"{wording.whole(values[0])} to {wording.whole(values[-1])} px")
        for name, values in sides.items()
        if isinstance(values, list) and values
    ]
    return {
        "facts": facts,
        "images": [images.get(split) for split in _SPLITS],
        "classes": rows,
        "counted": any(count is not None for row in rows for count in row["boxes"]),
        "warnings": [str(warning) for warning in written.get("warnings") or []],
        "ledger": _ledger(written),
        "converted": [(str(what), count) for what, count in mapping(written.get("converted")).items()],
        "digest": str(told.get("digest") or written.get("digest") or ""),
        "source": sections.public(str(written.get("source") or "")),
        "missing": "" if images or names else data.why_missing("dataset description"),
    }


def _ledger(written: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What became of each file, label and box of the dataset: a row for each outcome."""
    return [
        {
            "split": str(split),
            "what": f"{kind} {outcome}",
            "count": entry.get("count"),
            "examples": [str(name) for name in entry.get("examples") or []],
        }
        for split, kinds in mapping(written.get("ledger")).items()
        for kind, outcomes in mapping(kinds).items()
        for outcome, entry in mapping(outcomes).items()
        if isinstance(entry, Mapping)
    ]


def _class_count(counts: Any, name: str, index: int) -> Any:
    """Boxes of a class in a split, whether the split's counts go by name or by index."""
    return next((value for key in (name, str(index), index) if (value := pick(counts, key)) is not None), None)


def _supernet(supernet: Outputs) -> dict[str, Any]:
    curves = records(supernet.json("curves.json"))
    described = mapping(supernet.json("supernet.json"))
    drawn = [
        plots.losses("supernet-loss", "Supernet: loss", curves),
        plots.scores("supernet-score", "Supernet: accuracy of the networks followed", {"supernet": curves}),
    ]
    shown = [plot for plot in drawn if plot]
    facts = [
        ("space", str(pick(described, "space", "name") or wording.ABSENT)),
        ("input", wording.with_unit(described.get("imgsz"), "px")),
        ("epochs", wording.whole(described.get("epochs"))),
        ("training", wording.duration(described.get("seconds"))),
    ]
    missing = "" if shown else supernet.why_missing("training curves")
    return {"plots": shown, "facts": facts if described else [], "missing": missing}


def _stage(row: Mapping[str, Any]) -> dict[str, Any]:
    memory = next((row[key] for key in ("peak_memory_mb", "memory_mb") if wording.is_number(row.get(key))), None)
    return {
        "name": str(row.get("name") or ""),
        "target": str(row.get("target") or "all"),
        "status": str(row.get("status") or ""),
        "seconds": row.get("seconds"),
        "memory_mb": memory,
        "error": str(row.get("error") or ""),
    }


def _embedded_json(data: Any) -> Markup:
    """JSON that can stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
