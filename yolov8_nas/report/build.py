"""Builds the report: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from yolov8_nas.files import atomic_write
from yolov8_nas.report import advice, pictures, plots, sections, wording
from yolov8_nas.report.evidence import Outputs
from yolov8_nas.report.wording import shown
from yolov8_nas.runner.results import DatasetResult, SupernetEpoch, SupernetResult
from yolov8_nas.runner.results.summary import Dataset, StageRow, Summary

LARGEST: Final = 5_000_000
"""Bytes of a report up to which it holds pictures; the rest of it takes about 2.3 MB, most of them Plotly's."""

_MARGIN: Final = 20_000
"""Bytes for what stands around pictures."""

_TEMPLATES: Final = Path(__file__).parent / "templates"
_SPLITS: Final = ("train", "search", "val")

Evidence = Mapping[str | None, Mapping[str, Path]]
"""The folders that the stages of a run left, by label of the target (nothing for all of them) and stage."""


def build_report(summary: Summary, evidence: Evidence, out: Path, *, images: bool = True) -> Path:
    """Write the report of a run.

    Whatever part of the evidence is missing or unreadable, the report is written and says what is not there and why.
    It makes no request: scripts and styles are inside, and its content security policy forbids the rest.

    Args:
        summary: What the run came to.
        evidence: What its stages left.
        out: The HTML file to write.
        images: Whether it may hold images of the dataset, as far as they leave it within `LARGEST`.

    Returns:
        `out`.
    """
    parts = {
        "style": Markup((_TEMPLATES / "report.css").read_text()),
        "script": Markup((_TEMPLATES / "report.js").read_text()),
        "plotly": _packed_plotly(),
    }
    page = _page(summary, evidence)

    def rendered(room: int) -> str:
        """The page with pictures that take so many characters at most."""
        for target in page["targets"]:
            target["pictures"] = pictures.view(
                target["export"], target["identity"], allowed=images, room=room // len(page["targets"])
            )
        return _template().render(**page, **parts)

    html = rendered(0)
    if images and page["targets"]:
        html = rendered(max(0, LARGEST - len(html.encode(errors="surrogatepass")) - _MARGIN))
    atomic_write(out, html)
    return out


@cache
def _packed_plotly() -> Markup:
    """Plotly's script, compressed, as text: a third of its 4.8 MB, which the page's own script unpacks."""
    return Markup(base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode())


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


def _page(summary: Summary, evidence: Evidence) -> dict[str, Any]:
    def left(stage: str, target: str | None) -> Outputs:
        """What a stage left; its status is that of its row in the summary."""
        status = next((row.status for row in summary.stages if (row.name, row.target) == (stage, target)), None)
        return Outputs(stage, evidence.get(target, {}).get(stage), status)

    run, supernet, targets = summary.run, left("supernet-train", None), []
    for i, entry in enumerate(summary.targets):
        outputs = {stage: left(stage, entry.id) for stage in sections.TARGET_STAGES}
        target = sections.Target(f"target-{i + 1}", entry, outputs, supernet)
        told = {"advice": advice.view(entry, summary.stages, target.verdict), "export": outputs["trt-export"]}
        targets.append({**sections.view(target), **told})
    return {
        "title": run.name,
        "run_rows": sections.flatten(run.plain()),
        "targets": targets,
        "run_error": run.error or "",
        "retraining": run.retraining.says if run.retraining else "",
        "dataset": _dataset(summary.dataset, left("data-prep", None)),
        "supernet": _supernet(supernet),
        "stages": [_stage(stage) for stage in summary.stages],
        "total_seconds": sum(stage.seconds for stage in summary.stages),
    }


def _dataset(told: Dataset | None, data: Outputs) -> dict[str, Any]:
    written = data.result(DatasetResult)
    images = told.images.plain() if told else written.images if written else {}
    boxes = [written.boxes.get(split, {}) if written else {} for split in _SPLITS]
    names = told.classes if told else written.classes if written else ()
    rows = [{"name": name, "boxes": [counts.get(name) for counts in boxes]} for name in names]
    sides = written.image_sides if written else {}
    return {
        "facts": [
            (f"image {name}, smallest to largest", f"{wording.whole(values[0])} to {wording.whole(values[-1])} px")
            for name, values in sides.items()
        ],
        "images": [images.get(split) for split in _SPLITS],
        "classes": rows,
        "counted": any(boxes),
        "warnings": written.warnings if written else (),
        "ledger": list(_ledger(written)) if written else [],
        "converted": written.converted.items() if written else (),
        "digest": told.digest if told else written.digest if written else "",
        "source": sections.public(written.source) if written else "",
        "missing": "" if told or written else data.why_missing("dataset description"),
    }


def _ledger(written: DatasetResult) -> Iterator[dict[str, Any]]:
    """What became of each file, label and box of the dataset: a row for each outcome."""
    for split, kinds in written.ledger.items():
        for kind, outcomes in kinds.items():
            for outcome, entry in outcomes.items():
                yield {
                    "split": split, "what": f"{kind} {outcome}", "count": entry.count, "examples": entry.examples
                }  # fmt: skip


def _supernet(supernet: Outputs) -> dict[str, Any]:
    curves = [point.plain() for point in supernet.rows(SupernetEpoch)]
    drawn = [
        plots.losses("supernet-loss", "Supernet: loss", curves),
        plots.scores("supernet-score", "Supernet: accuracy of the networks followed", {"supernet": curves}),
    ]
    shown, facts = [plot for plot in drawn if plot], []
    if described := supernet.result(SupernetResult):
        facts = [
            ("space", described.space.name),
            ("input", wording.with_unit(described.imgsz, "px")),
            ("epochs", wording.whole(described.epochs)),
            ("training", wording.duration(described.seconds)),
        ]
    missing = "" if shown else supernet.why_missing("training curves")
    return {"plots": shown, "facts": facts, "missing": missing}


def _stage(row: StageRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "target": row.target or "all",
        "status": row.status,
        "seconds": row.seconds,
        "memory_mb": row.peak_memory_mb,
        "error": row.error or "",
    }


def _embedded_json(data: Any) -> Markup:
    """JSON that can stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
