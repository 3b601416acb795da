"""The report, on evidence that is made up here: figures in it measure nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import fabricated
import numpy as np
import plotly.graph_objects as go
import pytest
from rich.console import Console

from yolov8_nas.config import SearchConfig
from yolov8_nas.measure import nms
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.report import architecture as drawing
from yolov8_nas.report import plots, sections, wording
from yolov8_nas.report.build import LARGEST, build_report
from yolov8_nas.report.terminal import verdict
from yolov8_nas.runner.results import (
    Difference,
    Drawn,
    DrawnBox,
    FileFigures,
    FinetuneResult,
    Larger,
    LimitRow,
    LimitUsed,
    Picture,
    PicturesResult,
    RuleEvidence,
)
from yolov8_nas.runner.results.summary import Summary, Target
from yolov8_nas.search.rules import RULES, Device, consider, narrowed
from yolov8_nas.space import Architecture, SearchSpace

SPACE = SearchSpace.load("tiny")
LABEL = "cpu-onnxruntime-best"
SUPERNET = fabricated.TRAINING | {"start": "supernet", "begun_with": "the supernet"}
LIMIT = {"metric": "latency", "statistic": "p50", "scope": "engine", "limit": 3.0, "unit": "ms"}
RECIPE = {"epochs": 12, "batch": 8, "lr": 1e-3, "imgsz": 128, "seed": 0, "mosaic": True}
STAGES = ("hw-probe", "search", "qat-finetune", "trt-export", "register")


def made_up_latency(architecture: Architecture) -> float:
    """Something that grows with the network; no device has it."""
    work = sum(
        b.depth * b.hidden**1.2 * {"conv3": 1.0, "conv5": 1.9}.get(b.operator, 0.55) for b in architecture.blocks
    )
    return 1.6 + sum(architecture.convs) / 700 + work / 900


def percentiles(p50: float) -> dict[str, float]:
    return {"p50": p50, "p90": 1.05 * p50, "p99": 1.22 * p50}


def curve(epochs: int, *, keys: tuple[str, ...] = ("map50_95",), top: float = 0.4) -> list[dict[str, float]]:
    return [
        {"epoch": e, "seconds": 9.0, "lr": 2e-3, "box": 2.4 * 0.88**e + 1, "cls": 3.1 * 0.8**e + 1, "dfl": 1.1 + 0.9**e}
        | {key: top * (1 - 0.8**e) / (1 + i / 2) for i, key in enumerate(keys)}
        for e in range(epochs)
    ]


def prior(steps: int) -> dict[str, Any]:
    """Architecture parameters that settle on the last option of every dimension."""

    def softmax(count: int, sharpness: float) -> list[float]:
        weights = np.exp(sharpness * np.arange(count))
        return (weights / weights.sum()).tolist()

    return {
        "limit_ms": 3.0,
        "dimensions": [{"name": d.name, "options": list(d.options)} for d in SPACE.dimensions],
        "trajectory": [
            {
                "step": step,
                "loss": 4 - step / steps,
                "expected_ms": 5 - 2 * step / steps,
                "penalty": 0.1,
                "probabilities": [softmax(len(d.options), 3 * step / steps) for d in SPACE.dimensions],
            }
            for step in range(steps)
        ],
        "worth": [[0.0] * len(d.options) for d in SPACE.dimensions],
        "most_likely": SPACE.largest().to_dict(),
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = name.endswith(".jsonl")
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    return folder


def tuned(architecture: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "architecture": architecture, "map50_95": {"fp32": 0.4}, "average": 0.4, "best_epoch": {"fp32": 12},
        "start": "supernet", "begun_with": "the supernet", "computing": {"training": 1e12}, "distilled": False,
        "epochs": 12, "recipe": RECIPE, "seconds": 1.0, **changes,
    }  # fmt: skip


def pictures(folder: Path, classes: tuple[str, ...], count: int = 8) -> Path:
    """Pictures as trt-export leaves them, of noise with boxes anywhere."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number in range(count):
        name, (height, width) = f"plate-{number}", ((240, 320), (320, 240))[number % 2]
        image = cv2.resize(rng.integers(60, 200, (6, 8, 3)).astype(np.uint8), (width, height))
        cv2.imwrite(str(folder / "pictures" / f"{name}.jpg"), image)

        def box(confidence: float | None, right: bool, width: int = width, height: int = height) -> DrawnBox:
            left, top = float(rng.uniform(0, width - 60)), float(rng.uniform(0, height - 40))
            return DrawnBox(
                box=(left, top, left + 60, top + 40), label=int(rng.integers(len(classes))), confidence=confidence,
                right=right,
            )  # fmt: skip

        sides = [Drawn(found=(box(0.91, True), box(0.34, False)), missed=(box(None, False),)) for _ in range(2)]
        rows.append(
            Picture(name=f"{name}.png", file=f"{name}.jpg", width=width, height=height, boxes=2, ours=sides[0],
                    stock=sides[1])
        )  # fmt: skip
    PicturesResult(
        confidence=0.25, iou=0.5, ours="searched, FP32", stock="stock YOLOv8n, FP32", classes=classes,
        images=tuple(rows), of=60,
    ).write(folder)  # fmt: skip
    return folder


def timed_load(boxes: float, detections: float, p50: float) -> dict[str, Any]:
    timed = {"interval_ms": [p50, p50], "rounds": [p50], "repetitions": 9, "disturbed": False}
    return {"boxes": boxes, "detections": detections, "latency_ms": percentiles(p50), **timed}


def used_limit(**changes: Any) -> LimitUsed:
    fields = {"map50_95": 0.3, "limit": "latency_p50<=3ms", "used": 0.9, "used_predicted": 0.5, "reserve": 0.05}
    larger = Larger(scored=12, best_map50_95=0.305)
    return LimitUsed(**{**fields, "largest_keeps_it": False, "larger": larger, **changes})


class MadeUpRun:
    """A run as its stages would leave it; `folder` may be thinned out to play a run that failed."""

    def __init__(
        self, folder: Path, networks: int = 150, name: str = "press-shop", classes: tuple[str, ...] = ()
    ) -> None:
        rng = np.random.default_rng(0)
        classes = classes or ("scratch", "dent", "hole", "stain")
        stock = SPACE.stock
        stock_ms = made_up_latency(stock)
        self.limit = 0.8 * stock_ms
        history = [self._evaluated(stock, "seed", 0, rng)]
        history += [self._evaluated(SPACE.sample(rng), "evolution", 1 + i // 20, rng) for i in range(networks)]
        history += [self._evaluated(SPACE.sample(rng), "random", 0, rng) for _ in range(networks // 3)]
        within = [row for row in history if row["latency_ms"] <= self.limit]
        chosen = sorted(within, key=lambda row: -row["map50_95"])[:3]
        self.chosen = chosen[0]["architecture"]
        p50 = 0.985 * chosen[0]["latency_ms"]
        model = {
            "map50_95": 0.4127,
            "map50": 0.6714,
            "latency_ms": percentiles(p50),
            "memory_mb": 142.3,
            "params": 1_934_112,
            "gflops": 0.241,
        }
        limit = {"metric": "latency", "statistic": "p50", "scope": "engine", "limit": self.limit, "unit": "ms"}
        kept = limit | {"measured": p50, "met": True}
        stock_figures = {"map50_95": 0.3985, "map50": 0.655, "memory_mb": 171.0, "params": 3_011_628, "gflops": 0.33}
        stock_figures |= {"epochs": 28, "per_class": dict.fromkeys(classes, 0.3985)}
        baselines = [
            fabricated.stock_file(form=form, **stock_figures, latency_ms=percentiles(ms)).plain()
            for form, ms in (("unrolled, FP32", stock_ms), ("unrolled, INT8", 0.9 * stock_ms))
        ]
        comparison = fabricated.against_stock(what="on the same 60 validation images").plain()
        against_int8 = fabricated.against_stock(
            difference=0.04, low=0.012, high=0.066, word="ahead", against="YOLOv8n (INT8)"
        ).plain()
        measured = [SPACE.sample(rng) for _ in range(36)]
        latencies = [made_up_latency(a) * rng.normal(1, 0.02) for a in measured]
        fitted = LatencyModel.fit(SPACE, len(classes), 128, measured[:28], latencies[:28]).to_result()
        whole = fabricated.figures(p50, **model, candidate=0, architecture=self.chosen, training=SUPERNET)
        int8 = whole | {"latency_ms": percentiles(0.9 * p50), "map50_95": 0.4011, "map50": 0.66, "memory_mb": 120.0}
        int8 |= {"precision": "int8"}
        fp32_figures, int8_figures = ({name: file[name] for name in FileFigures.model_fields} for file in (whole, int8))
        shared = {
            "data-prep": write(
                folder / "data-prep",
                {
                    "dataset.json": {
                        "digest": "5f" * 32,
                        "image_sides": {"width": [192, 256, 320], "height": [192, 256, 320]},
                        "images": {"train": 180, "search": 40, "val": 60},
                        "classes": list(classes),
                        "source": "built-in demo data",
                        "warnings": ["the same image is in train and val: a.jpg and b.jpg"],
                        "ledger": {
                            "train": {
                                "files": {
                                    "used, with boxes": {"count": 220, "examples": []},
                                    "skipped: copies of another image": {"count": 2, "examples": ["c.jpg = <d>.jpg"]},
                                }
                            }
                        },
                        "converted": {"AVIF converted to PNG": 3},
                        "box_sides": [],
                        "boxes": {
                            split: {c: 31 * (i + 2) for i, c in enumerate(classes)}
                            for split in ("train", "search", "val")
                        },
                    }
                },
            ),
            "supernet-train": write(
                folder / "supernet-train",
                {
                    "supernet.json": fabricated.supernet(SPACE, imgsz=128, epochs=16, seconds=151.2).plain(),
                    "curves.json": [
                        row | {"distill": 1.8 * 0.9 ** row["epoch"]}
                        for row in curve(16, keys=("map50_95_largest", "map50_95_smallest"))
                    ],
                },
            ),
        }
        own = {
            "hw-probe": write(
                folder / "hw-probe",
                {
                    "profile.json": {
                        "name": "cpu-2t",
                        "model": "Example CPU",
                        "id": "example-cpu",
                        "kind": "cpu",
                        "cores": 2,
                        "threads": 2,
                        "instructions": ["avx2", "avx512_vnni"],
                        "memory_gb": 24.0,
                        "runtime": {"name": "onnxruntime", "version": "1.31.1"},
                    },
                    "latency_table.json": fabricated.table(
                        [
                            fabricated.probed(a, ms, latency_ms=percentiles(ms), role=role)
                            for a, ms, role in zip(
                                [*measured, stock],
                                [*latencies, stock_ms],
                                ["train"] * 28 + ["holdout"] * 8 + ["stock"],
                                strict=True,
                            )
                        ]
                    ).plain(),
                    "latency_model.json": fabricated.fitted(
                        fitted, mape=0.034, spearman=0.981, networks=8, coverage=1.0
                    ).plain(),
                    "stock.json": fabricated.stock_result(stock_ms, stock).plain(),
                    "constraints.json": [limit | {"text": "latency<=80%stock"}],
                    "nms.json": {
                        "latency_ms": percentiles(0.39),
                        "timed": {
                            "confidence": 0.25,
                            "iou": 0.7,
                            "max_detections": 300,
                            "threads": 1,
                            "shape": [],
                            "load": "typical",
                            "loads": {
                                "few": timed_load(50, 5, 0.31),
                                "typical": timed_load(200, 20, 0.39),
                            },
                        },
                    },
                },
            ),
            "search": write(
                folder / "search",
                {
                    "prior.json": prior(30),
                    "rules.json": {"options": {"space": 104, "searched": 104}, "rules": []},
                    "search.json": fabricated.searched(
                        best_map50_95={"evolution": 0.31},
                        comparisons={
                            "random": {
                                "search": 0.31,
                                "search_evaluations": 151,
                                "best": [0.28, 0.29, 0.27],
                                "evaluations": [50, 50, 50],
                                "mean": 0.28,
                                "interval": [0.255, 0.305],
                            }
                        },
                        budget=used_limit(map50_95=0.31, used=0.87, used_predicted=0.94, reserve=0.06),
                    ).plain(),
                    "history.jsonl": history,
                    "candidates.json": [
                        fabricated.candidate(
                            row["architecture"],
                            row["latency_ms"],
                            map50_95_search=row["map50_95"],
                            source=row["source"],
                            slack=0.13,
                            tightest="latency_p50<=3ms",
                            measured=fabricated.measured(row["latency_ms"] * f),
                        ).plain()
                        for row, f in zip(chosen, (0.985, 1.02, 0.97), strict=True)
                    ],
                },
            ),
            "qat-finetune": write(
                folder / "qat-finetune",
                {
                    "candidates/0/tuning.json": tuned(self.chosen, curves=curve(12), qat_curves=curve(3)),
                    "candidates/1/tuning.json": tuned(chosen[1]["architecture"], curves=curve(12, top=0.41)),
                    "finetune.json": {
                        "candidates": [tuned(self.chosen, index=i, expected=0.4, epochs=12) for i in (0, 1)],
                        "baseline": None,
                        "rescaled": None,
                        "qat": RECIPE,
                        "halving": {
                            "budget": {"epochs": 24, "stock_trainings": 2.47, "taught_by_stock": 0},
                            "rungs": [{"networks": 3, "epochs": 4}, {"networks": 2, "epochs": 12}],
                            "ranking": [
                                {"index": i, "seed": 0, "scores": scores, "expected": expected}
                                | {"architecture": self.chosen, "lead": 0.0, "seconds": 1.0}
                                for i, scores, expected in (
                                    (1, [0.311, 0.412], 0.411),
                                    (0, [0.309, 0.403], 0.404),
                                    (2, [0.287], 0.287),
                                )
                            ],
                        },
                    },
                    "baseline/tuning.json": tuned(SPACE.stock.to_dict(), curves=curve(28, top=0.39)),
                },
            ),
            "trt-export": write(
                pictures(folder / "trt-export", classes),
                {
                    "verdict.json": {
                        "status": "met",
                        "chosen_on": "search split",
                        "confidence": None,
                        "baselines": baselines,
                        "comparison": comparison,
                        "comparisons": [comparison, against_int8],
                        "checkpoint_map50_95": 0.4129,
                        "nms": nms.SETTINGS.plain() | {"images": 32, "split": "search"},
                        "shipped": whole
                        | {
                            "file": "model.onnx",
                            "constraints": [kept],
                            "latency_interval_ms": [0.99 * p50, 1.01 * p50],
                            "per_class": dict.fromkeys(classes, 0.4127),
                            "latency_with_nms_ms": percentiles(p50 + 0.4),
                            "latency_with_nms_interval_ms": [p50 + 0.38, p50 + 0.42],
                            "found": {"boxes": 63.5, "detections": 4.25},
                        },
                        "tried": [
                            whole | {"constraints": [kept], "outcome": "shipped", "reason": ""},
                            int8
                            | {
                                "constraints": [kept],
                                "outcome": "less accurate",
                                "reason": "keeps the limit, but scores 0.012 below FP32",
                            },
                            whole
                            | {
                                "candidate": 1,
                                "map50_95": 0.4198,
                                "outcome": "limit missed",
                                "reason": "",
                                "latency_ms": percentiles(1.03 * self.limit),
                                "constraints": [kept | {"measured": 1.03 * self.limit, "met": False}],
                            },
                        ],
                        "quantization": {
                            "candidate": 0,
                            "keep_float": ["stem", "detect_boxes"],
                            "fp32": fp32_figures,
                            "int8": int8_figures,
                            "difference": {
                                "difference": -0.0116,
                                "low": -0.0202,
                                "high": -0.0031,
                                "word": "behind",
                            },
                            "ptq": {"map50_95": 0.3812, "map50": 0.7, "per_class": {}},
                            "ptq_difference": {
                                "difference": -0.0502,
                                "low": -0.0631,
                                "high": -0.0388,
                                "word": "behind",
                            },
                        },
                    },
                    "engine.json": {
                        "built": False,
                        "reason": "TensorRT is not installed and this machine has no NVIDIA GPU.",
                    },
                },
            ),
            "register": write(
                folder / "register",
                {
                    "registry.json": {
                        "model": name,
                        "version": 3,
                        "reason": "",
                        "aliases": ["champion-example-cpu-fp32"],
                        "run_id": "0f" * 16,
                        "tracking_uri": "https://someone:secret@mlflow.example/?token=hidden",
                    }
                },
            ),
        }
        self.evidence: dict[str | None, dict[str, Path]] = {None: shared, LABEL: own}
        names = ["data-prep", "supernet-train", *STAGES]
        seconds = (4.2, 151.2, 97.0, 74.4, 139.0, 31.2, 8.8)
        self.target = fabricated.target(
            id=LABEL,
            status="met",
            hardware={"name": "cpu-2t", "model": "Example CPU", "threads": 2},
            runtime={"name": "onnxruntime", "version": "1.31.1"},
            precision_shipped="fp32",
            constraints=[kept | {"text": "latency<=80%stock"}],
            architecture=self.chosen,
            model=model
            | {"training": SUPERNET}
            | {"files": {"best.pt": "targets/cpu/best.pt", "model.onnx": "targets/cpu/model.onnx"}},
            baselines=baselines,
            registry={"model": name, "version": 3, "aliases": []},
            classes=[{**fabricated.CLASSES[i == 0], "name": one} for i, one in enumerate(classes)],
        )
        self.stages = [
            {"name": n, "target": None if i < 2 else LABEL, "seconds": s, "peak_memory_mb": 1900 - 70 * i}
            for i, (n, s) in enumerate(zip(names, seconds, strict=True))
        ]
        self.name = name

    @property
    def summary(self) -> Summary:
        return self.summary_of(self.target)

    def summary_of(self, *targets: Target) -> Summary:
        return fabricated.summary(*targets, stages=self.stages, name=self.name, seed=0, imgsz=128, space="tiny")

    @staticmethod
    def _evaluated(
        architecture: Architecture, source: str, generation: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        ms = made_up_latency(architecture)
        return {
            "architecture": architecture.to_dict(),
            "map50_95": 0.34 * (1 - np.exp(-(ms - 1.2) / 1.4)) + rng.normal(0, 0.016),
            "latency_ms": ms,
            "upper_ms": 1.05 * ms,
            "generation": generation,
            "source": source,
            "genes": [],
            "repetition": 0 if source == "random" else None,
        }


class Page(HTMLParser):
    """Reads a page's elements, attributes and the text of its scripts; fails on an element that is not closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.elements[-1][1], data))
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> dict[str, Any]:
        return {str(a["data-plot"]): json.loads(text) for a, text in self.scripts if "data-plot" in a}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return MadeUpRun(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def page(run: MadeUpRun, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(run.summary, run.evidence, tmp_path_factory.mktemp("report") / "report.html"))


def test_is_one_file_that_asks_for_nothing(run: MadeUpRun, tmp_path: Path) -> None:
    path = build_report(run.summary, run.evidence, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.stat().st_size < 3e6
    for tag, attributes in Page(path).elements:
        assert tag not in ("link", "iframe", "img")
        assert "src" not in attributes
        assert str(attributes.get("href") or "#").startswith("data:image/jpeg;" if tag == "image" else "#")
        if "http-equiv" in attributes:
            assert str(attributes["content"]).startswith("default-src 'none'")


def test_says_what_an_engineer_asks_first(run: MadeUpRun, page: Page) -> None:
    assert run.target.model is not None
    p50 = run.target.model.latency_ms.p50
    verdict_at = page.text.index("Limit kept As measured")
    assert verdict_at < page.text.index("What the search saw")
    for words in (
        "against stock YOLOv8n (FP32) is undecided",
        f"p50 {p50:#.3g} (95 % interval",
        "16 + 12",
        "+0.014 (95 % interval −0.006 to +0.034)",
        "0.413",
        "0.399",
        "the interval holds zero",
        "1 point would take about 2,600 images. Between two networks, each trained once, they decide 6.8 points",
        "Too rare in the validation images to say anything about: scratch (in 4 images).",
        "dent 0.413 0.399 60 90 0.360 to 0.460",
        "scratch 0.413 0.399 4 4 too rare",
    ):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ")


def test_every_part_is_there(page: Page) -> None:
    headings = ("side by side", "What the search saw", "The chosen architecture", "Latency model", "Quantization")
    headings += ("Candidates walked", "Fine-tuning", "Device", "Registry", "What was not measured", "Supernet", "Data")
    assert all(heading in page.text for heading in headings)
    for words in (
        "less accurate",
        "avx512_vnni",
        "the same image is in train and val",
        "files skipped: copies of another image",
        "3 of AVIF converted to PNG",
        "2 min 31 s",
        "1,900",
        "INT8, calibrated only 0.381",
        "In INT8, stem, detect_boxes (quantization.keep_float), the head's output convolutions and DFL stay in",
        "Calibrated only, INT8 is behind FP32 on these validation images: mAP50-95 differs by −0.050",
    ):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ")


def test_what_a_frame_costs_is_told_with_made_up_and_real_boxes(page: Page) -> None:
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    told = text[text.index("What a frame costs") : text.index("Fine-tuning")]
    for words in (
        "with NMS, on 32 images, p50",
        "boxes above the threshold, an image 63.5",
        "NMS alone, 50 made-up boxes for 5 objects 0.310 ms",
        "NMS alone, 200 made-up boxes for 20 objects, limits are predicted with it 0.390 ms",
        "confidence 0.25, IoU 0.7",
    ):
        assert words in told, told


def test_tells_what_was_not_measured(page: Page) -> None:
    told = page.text[page.text.index("Registry and files") :]
    for words in ("TensorRT is not installed", "Power and energy", "Few trainings of these data", "rescaled"):
        assert words in told


def test_figures_are_valid_and_named(page: Page) -> None:
    assert len(page.figures) == 14
    for identity, figure in page.figures.items():
        assert figure["data"], identity
        plain = re.sub(r'"@[a-z0-9-]+"', '"#123456"', json.dumps(figure))
        go.Figure(**json.loads(plain))  # raises on a name or value that Plotly does not know
    labels = {a["id"]: a["aria-label"] for _, a in page.elements if a.get("class") == "plot"}
    assert set(labels) == set(page.figures)
    assert all(len(str(label)) > 40 for label in labels.values())


def test_colours_of_figures_exist_in_light_and_dark(page: Page) -> None:
    css = (Path(sections.__file__).parent / "templates" / "report.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    for name in set(re.findall(r'"@([a-z0-9-]+)"', json.dumps(page.figures))):
        assert f"--{name}:" in light and f"--{name}:" in dark.split("\n}\n")[0]


def test_pareto_marks_limit_shipped_stock_and_measured(run: MadeUpRun, page: Page) -> None:
    figure = page.figures["target-1-pareto"]
    traces = {trace["name"]: trace for trace in figure["data"]}
    told = {"evaluated", "random search", "front", "measured", "stock, measured", "shipped, measured"}
    assert set(traces) == told
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(run.limit)
    p50 = run.target.model.latency_ms.p50
    assert traces["shipped, measured"]["x"] == [pytest.approx(p50, rel=1e-5)]
    assert traces["stock, measured"]["x"] == [pytest.approx(made_up_latency(SPACE.stock), rel=1e-5)]
    assert len(traces["measured"]["x"]) == 9 and traces["measured"]["x"][2] is None


def test_what_was_not_measured_is_marked_as_predicted(run: MadeUpRun, tmp_path: Path) -> None:
    probe = shutil.copytree(run.evidence[LABEL]["hw-probe"], tmp_path / "probe")
    (probe / "stock.json").unlink()
    stages = run.evidence[LABEL] | {"hw-probe": probe}
    evidence = run.evidence | {LABEL: stages}
    figure = Page(build_report(run.summary, evidence, tmp_path / "report.html")).figures["target-1-pareto"]
    names = {trace["name"] for trace in figure["data"]}
    assert "stock, predicted" in names and "stock, measured" not in names


def test_exported_files_stand_beside_stock_of_equal_latency(run: MadeUpRun, tmp_path: Path) -> None:
    stages = dict(run.evidence[LABEL])
    stages["trt-export"] = shutil.copytree(stages["trt-export"], tmp_path / "trt-export")
    file = stages["trt-export"] / "verdict.json"
    content = json.loads(file.read_text())
    p50 = content["shipped"]["latency_ms"]["p50"]
    rescaled = {"name": "YOLOv8n of 0.9 of its width", "form": "unrolled, FP32", "map50_95": 0.4}
    content["baselines"].append(content["baselines"][0] | rescaled | {"latency_ms": percentiles(1.01 * p50)})
    file.write_text(json.dumps(content))
    evidence = run.evidence | {LABEL: stages}
    page = Page(build_report(run.summary, evidence, tmp_path / "report.html"))
    traces = {trace["name"]: trace for trace in page.figures["target-1-exported"]["data"]}
    equal = traces["stock YOLOv8n of 0.9 of its width, unrolled, FP32, of equal latency"]
    assert equal["x"] == [pytest.approx(1.01 * p50, rel=1e-5)] and equal["y"] == [0.4]
    assert traces["shipped, FP32"]["error_x"]["array"] == [pytest.approx(0.01 * p50, rel=1e-3)]
    assert len(traces["candidate"]["x"]) == 2
    assert traces["front of the candidates"]["x"] == sorted(traces["front of the candidates"]["x"])
    assert page.figures["target-1-exported"]["layout"]["shapes"][0]["x0"] == pytest.approx(run.limit)


def _drawings(page: Page) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in page.elements if tag == "svg" and attributes["class"] == "picture"]


def test_the_same_images_are_shown_with_both_networks_boxes(page: Page) -> None:
    assert len(_drawings(page)) == 8
    images = [attributes for tag, attributes in page.elements if tag == "image"]
    again = [attributes["href"] for tag, attributes in page.elements if tag == "use"]
    assert again == [f"#{image['id']}" for image in images]  # in the page once, shown twice
    assert all(str(image["href"]).startswith("data:image/jpeg;base64,/9j/") for image in images)
    kinds = [attributes["class"] for tag, attributes in page.elements if tag == "rect" and "class" in attributes]
    assert [kinds.count(kind) for kind in ("right", "wrong", "missed")] == [16, 16, 16]
    assert "2 true boxes; searched, FP32: 1 missed, 1 wrong; stock YOLOv8n, FP32: 1 missed, 1 wrong" in page.text


def test_pictures_stay_out_where_the_configuration_says_so(run: MadeUpRun, tmp_path: Path) -> None:
    page = Page(build_report(run.summary, run.evidence, tmp_path / "report.html", images=False))
    assert not _drawings(page)
    assert "data:image" not in (tmp_path / "report.html").read_text()
    assert "report.images = false" in page.text


def test_pictures_leave_the_report_small(run: MadeUpRun, tmp_path: Path) -> None:
    stages = dict(run.evidence[LABEL])
    stages["trt-export"] = shutil.copytree(stages["trt-export"], tmp_path / "trt-export")
    for file in (stages["trt-export"] / "pictures").iterdir():
        file.write_bytes(file.read_bytes() + bytes(700_000))
    evidence = run.evidence | {LABEL: stages}
    path = build_report(run.summary, evidence, tmp_path / "report.html")
    shown = len(_drawings(page := Page(path)))
    assert 0 < shown < 8 and path.stat().st_size <= LARGEST
    assert f"{8 - shown} more are left out" in page.text


@pytest.mark.parametrize("name", ["../verdict.jpg", "plate-0.png", "gone.jpg"])
def test_only_copies_of_images_get_into_the_report(run: MadeUpRun, tmp_path: Path, name: str) -> None:
    stages = dict(run.evidence[LABEL])
    folder = stages["trt-export"] = shutil.copytree(stages["trt-export"], tmp_path / "trt-export")
    shutil.copy(folder / "pictures" / "plate-0.jpg", folder / "verdict.jpg")
    (folder / "pictures" / "plate-0.png").write_text("<svg>")
    content = json.loads((folder / "pictures.json").read_text())
    content["images"][0]["file"] = name
    (folder / "pictures.json").write_text(json.dumps(content))
    evidence = run.evidence | {LABEL: stages}
    page = Page(build_report(run.summary, evidence, tmp_path / "report.html"))
    assert len(_drawings(page)) == 7


def test_tells_what_the_architecture_parameters_learned(page: Page) -> None:
    choices = [d for d in SPACE.dimensions if len(d.options) > 1]
    (path,) = page.figures["target-1-prior-steps"]["data"]
    assert len(path["y"]) == len(path["z"]) == len(choices)
    assert all(row[0] < row[-1] for row in path["z"])  # of the option that won, which was as likely as the others
    assert path["text"][0][0] == str(choices[0].options[-1])
    (end,) = page.figures["target-1-prior-end"]["data"]
    for row, text, dimension in zip(end["z"], end["text"], choices, strict=True):
        known = len(dimension.options)
        assert sum(row[:known]) == pytest.approx(1, abs=1e-4) and set(row[known:]) <= {None}
        assert text[:known] == [str(option) for option in dimension.options]
    latency = page.figures["target-1-prior-ms"]
    assert latency["layout"]["shapes"][0]["y0"] == 3.0
    assert latency["data"][0]["y"][0] == 5.0


def test_every_training_that_chose_is_told(page: Page) -> None:
    for words in (
        "Candidates: real trainings, mAP50-95 by their length",
        "network seed 4 epochs 12 epochs expected 1 0 0.311 0.412 0.411 0 0 0.309 0.403 0.404 2 0 0.287",
        "At most the computing of 2.47 trainings of stock was allowed for",
    ):
        assert words in page.text, words
    assert "Rescaled stock: real trainings" not in page.text


def test_a_winner_trained_from_scratch_says_so(run: MadeUpRun, tmp_path: Path) -> None:
    folders = run.evidence[LABEL]
    folder = shutil.copytree(folders["qat-finetune"], tmp_path / "tuned")
    found = FinetuneResult.read(folder)
    first = found.candidates[0].model_copy(update={"epochs": 28, "start": "scratch"})
    found.model_copy(update={"candidates": (first,)}).write(folder)
    evidence = run.evidence | {LABEL: folders | {"qat-finetune": folder}}
    page = Page(build_report(run.summary, evidence, tmp_path / "report.html"))
    assert "28, from scratch" in page.text and "16 + 12" not in page.text


def test_a_run_without_a_prior_says_so(run: MadeUpRun, tmp_path: Path) -> None:
    folders = run.evidence[LABEL]
    search = shutil.copytree(folders["search"], tmp_path / "search")
    (search / "prior.json").unlink()
    write(search, {"search.json": fabricated.searched(asked=SearchConfig(prior_steps=0)).plain()})
    evidence = run.evidence | {LABEL: folders | {"search": search}}
    page = Page(build_report(run.summary, evidence, tmp_path / "report.html"))
    assert "No prior was asked for (search.prior_steps = 0)." in page.text


def test_tells_where_candidates_come_from_and_what_they_use_of_the_limit(page: Page) -> None:
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "handed on",
        "random search, 3 times 50 networks: their best score 0.280 on average (95 % interval 0.255 to 0.305)",
        "151 of the search score 0.310 at best",
        "uses 87 % of the limit latency_p50<=3ms",
        "predicted to use 94 %",
        "12 scored networks use more of it; the best of them scores 0.305 on the search split, this one 0.310",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("budget", "words", "others"),
    [
        ({"used": 0.97}, "uses 97 %", "upper bound"),
        ({"used": 0.7, "largest_keeps_it": True}, "largest network of the space keeps", "No scored network"),
        (
            {"used": 0.7, "larger": Larger(scored=0, best_map50_95=None)},
            "No scored network within the limits",
            "largest network",
        ),
        (
            {"used": 0.8, "used_predicted": 0.96, "reserve": 0.08},
            "bound lies 8.0 % above its prediction",
            "largest network",
        ),
    ],
)
def test_unused_budget_is_explained(budget: dict[str, Any], words: str, others: str) -> None:
    sentence = wording.budget_sentence(used_limit(**budget)).replace("\N{NO-BREAK SPACE}", " ")
    assert words in sentence and others not in sentence


def test_names_from_users_stay_text(tmp_path: Path) -> None:
    evil = """"><img src=x onerror=alert(1)></script><script>alert(2)</script>'{{ 7*7 }}&amp;"""
    made = MadeUpRun(tmp_path / "evidence", networks=30, name=evil, classes=(evil, "dent"))
    target = made.target.plain()
    target["hardware"]["name"] = target["error"] = target["precision_shipped"] = target["runtime"]["version"] = evil
    target["baselines"][0] |= {"name": evil, "form": evil}
    target["model"]["files"] = {evil: evil}
    target["constraints"][0] |= {"text": evil, "unit": evil}
    made.target = fabricated.target(**target)
    made.stages[0]["name"] = evil
    export = made.evidence[LABEL]["trt-export"]
    content = json.loads((export / "verdict.json").read_text())
    content["tried"][0] |= {"precision": evil, "reason": evil}
    content["comparisons"][0] |= {"what": evil, "word": evil, "subject": evil}
    write(export, {"verdict.json": content})
    page = Page(build_report(made.summary, made.evidence, tmp_path / "report.html"))
    assert not [tag for tag, attributes in page.elements if tag == "img" or "onerror" in attributes]
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert len(scripts) == len(page.figures) + 2
    assert not [tag for tag, attributes in page.elements if tag == "image" and len(attributes) != 5]
    assert page.text.count("alert(2)") >= 10
    assert "49" not in page.text.split("alert(2)")[1][:20]


def test_addresses_lose_their_credentials(page: Page, run: MadeUpRun) -> None:
    assert "https://mlflow.example/" in page.text
    assert "secret" not in page.text and "hidden=" not in page.text and "token" not in page.text
    assert sections.public("s3://bucket/data.tar") == "s3://bucket/data.tar"


def test_hardware_rules_are_told_with_what_was_measured_of_them(run: MadeUpRun, page: Page, tmp_path: Path) -> None:
    assert "No hardware rule is about this device, so the whole space was searched." in page.text
    search = shutil.copytree(run.evidence[LABEL]["search"], tmp_path / "search")
    device = Device("Tesla T4", "gpu", ("fp16", "int8"), 320.0, 4.0)
    applied = consider(SPACE, device, "int8", imgsz=128, batch=1, switched=dict.fromkeys(RULES, True))
    evidence = RuleEvidence(networks=150, with_option=140, extra=0.021, interval=(0.012, 0.03), verdict="supports")
    applied = [replace(rule, evidence=evidence if rule.removed else None) for rule in applied]
    space, searched = (sum(len(d.options) for d in s.dimensions) for s in (SPACE, narrowed(SPACE, applied)))
    taken = space - searched
    assert taken > 0

    def told(**changes: Any) -> Page:
        rows = [replace(rule, **changes).to_result().plain() for rule in applied]
        write(search, {"rules.json": {"options": {"space": space, "searched": searched}, "rules": rows}})
        evidence = run.evidence | {LABEL: run.evidence[LABEL] | {"search": search}}
        return Page(build_report(run.summary, evidence, tmp_path / "report.html"))

    text = told().text.replace("\N{NO-BREAK SPACE}", " ")
    assert f"Hardware rules took {taken} of the space's {space} options out before the search." in text
    assert "channels in multiples that tensor cores work in tensor_core_channels" in text
    assert "supports at equal multiply-accumulates, each of these options changes latency by +2.1 %" in text
    assert "95 % interval +1.2 % to +3.0 %; 140 of 150 networks have any" in text
    assert "backbone p3 expansion 0.25" in text
    off = told(on=False, evidence=None).text
    assert f"Hardware rules took none of the space's {space} options out before the search." in off
    assert f"switched off; would be {taken} options not measured" in off
    assert "backbone p3 expansion 0.25" not in off


@pytest.mark.parametrize("stage", ["data-prep", "supernet-train", *STAGES])
def test_builds_without_any_one_stage(run: MadeUpRun, stage: str, tmp_path: Path) -> None:
    evidence = {
        label: {name: left for name, left in folders.items() if name != stage}
        for label, folders in run.evidence.items()
    }
    rows = [row.model_copy(update={"status": "failed"} if row.name == stage else {}) for row in run.summary.stages]
    summary = run.summary.model_copy(update={"stages": tuple(rows)})
    page = Page(build_report(summary, evidence, tmp_path / "report.html"))
    # What the summary itself holds is shown from there.
    assert stage in ("data-prep", "register") or f"The stage {stage} failed, so there is no" in page.text


@pytest.mark.parametrize("how", ["empty", "broken"])
def test_builds_from_files_that_are_absent_or_broken(how: str, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "evidence", networks=30)
    for file in (tmp_path / "evidence").rglob("*.json*"):
        file.write_text('{"half": ') if how == "broken" else file.unlink()
    page = Page(build_report(run.summary, run.evidence, tmp_path / "report.html"))
    assert "The stage search left no readable search history." in page.text
    assert "Limit kept" in page.text and "0.413" in page.text


def test_results_that_contradict_themselves_are_told_as_missing(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "evidence", networks=30)
    folders = run.evidence[LABEL]
    short = prior(3)
    short["trajectory"][1]["probabilities"].pop()
    write(folders["search"], {"prior.json": short, "rules.json": {"options": 104}})
    write(folders["hw-probe"], {"latency_table.json": fabricated.table([]).plain(), "nms.json": {"latency_ms": 1}})
    page = Page(build_report(run.summary, run.evidence, tmp_path / "report.html"))
    for what in ("prior", "record of hardware rules"):
        assert f"The stage search left no readable {what}." in page.text
    assert "The stage hw-probe left no readable latency table." in page.text
    assert "made-up boxes" not in page.text


def test_a_run_that_reached_no_target_has_a_report(tmp_path: Path) -> None:
    summary = fabricated.summary(stages=[{"name": "data-prep", "status": "failed", "error": "no images"}])
    page = Page(build_report(summary, {}, tmp_path / "report.html"))
    assert "No target was reached" in page.text and "no images" in page.text
    assert "The stage data-prep failed" in page.text and "The stage supernet-train did not run" in page.text
    Page(build_report(fabricated.summary(), {}, tmp_path / "report.html"))


def test_two_targets_stand_apart(run: MadeUpRun, tmp_path: Path) -> None:
    failed = fabricated.target(id="t4", error="hw-probe: no such device", hardware={"name": "NVIDIA T4"})
    page = Page(build_report(run.summary_of(run.target, failed), run.evidence, tmp_path / "report.html"))
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    assert {"target-1", "target-2", "targets"} <= set(identities)
    assert f"{Architecture.from_dict(run.chosen).digest} 0.413" in page.text and "press-shop, version 3" in page.text
    assert "No verdict hw-probe: no such device" in page.text
    assert "The stage search did not run, so there is no search history." in page.text


@pytest.mark.parametrize(
    ("status", "met", "kind"),
    [
        ("met", [True], "met"),
        ("met", [True, True], "met"),
        ("failed", [True], "failed"),
        ("failed", [True, False], "missed"),
        ("failed", [False], "missed"),
        ("failed", [], "failed"),
        ("met", [True, None], "failed"),
        ("failed", [None], "failed"),
    ],
)
def test_verdict_needs_every_limit_measured_and_kept(status: str, met: list[bool | None], kind: str) -> None:
    limits = [LIMIT | {"limit": 3.0, "measured": 2.0, "met": value} for value in met]
    target = fabricated.target(status=status, constraints=limits)
    assert sections.outcome(sections.Target("t", target, _nothing(), _nothing()["search"]))["kind"] == kind


def _nothing() -> dict[str, sections.Outputs]:
    return {stage: sections.Outputs(stage, None, None) for stage in STAGES}


@pytest.mark.parametrize("word", ["ahead", "undecided", "behind", ""])
def test_no_outcome_without_its_interval(word: str) -> None:
    comparison = Difference(difference=0.0142, low=-0.0061, high=0.0339, word=word)
    sentence = wording.comparison_sentence(comparison, "The shipped network", "stock YOLOv8n")
    assert "+0.014 (95\N{NO-BREAK SPACE}% interval −0.006 to +0.034)" in sentence
    assert (word or "against") in sentence


def test_latency_bar_marks_the_statistic_that_is_limited() -> None:
    row = LIMIT | {"statistic": "p99", "limit": 4.0, "measured": 3.6, "met": True}
    model = {"map50_95": 0.4, "map50": 0.6, "latency_ms": percentiles(3.0), "memory_mb": 60.0, "params": 1, "gflops": 1}
    target = fabricated.target(constraints=[row], model=model | {"files": {}})
    bar = sections.view(sections.Target("t", target, _nothing(), _nothing()["search"]))["limits"][0]["bar"]
    assert [mark["name"] for mark in bar["marks"] if mark["limited"]] == ["p99"]
    assert 0 < bar["marks"][0]["at"] < bar["marks"][2]["at"] < bar["limit"] < 100


def test_front_is_exactly_the_networks_that_none_beats() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        values = rng.integers(0, 12, (30, 2))
        networks = [plots.Network(str(i), float(s), float(ms)) for i, (ms, s) in enumerate(values)]
        expected = {
            (n.predicted_ms, n.score)
            for n in networks
            if not any(
                o.predicted_ms <= n.predicted_ms
                and o.score >= n.score
                and (o.predicted_ms, o.score) != (n.predicted_ms, n.score)
                for o in networks
            )
        }
        front = plots.pareto_front(networks)
        assert {(n.predicted_ms, n.score) for n in front} == expected and len(front) == len(expected)


def test_drawing_tells_what_differs_from_stock() -> None:
    stock = SPACE.stock
    same = drawing.draw(stock, stock, title="stock", identity="a")
    assert "changed" not in same and not any(part.changed for part in drawing.parts(stock, stock))
    genes = list(SPACE.encode(stock))
    at = [d.name for d in SPACE.dimensions].index("topdown_p3.operator")
    genes[at] = SPACE.dimensions[at].options.index("dilated3")
    other = SPACE.decode(genes)
    changed = [part for part in drawing.parts(other, stock) if part.changed]
    assert [(part.name, "dilated 3×3" in part.here, "1 × 3×3" in part.stock) for part in changed] == [
        ("Top-down P3", True, True)
    ]
    assert drawing.draw(other, stock, title="x", identity="a").count("changed") == 1


def test_every_architecture_draws_as_valid_svg() -> None:
    rng = np.random.default_rng(1)
    for space in (SPACE, SearchSpace.load("yolov8l")):
        for _ in range(5):
            svg = drawing.draw(space.sample(rng), space.stock, title='<b> & "x"', identity='a"b')
            root = ElementTree.fromstring(svg)
            assert all(float(r.get("width", 0)) > 0 for r in root.iter("rect"))
            assert root.find("title") is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.number(3.0712), "3.07"),
        (wording.number(0.98123), "0.981"),
        (wording.number(15234.4), "15,234"),
        (wording.number(0), "0"),
        (wording.number(-0.5), "−0.500"),
        (wording.number(None), "–"),
        (wording.score(float("nan")), "–"),
        (wording.number("fast"), "–"),
        (wording.duration(4.24), "4.2 s"),
        (wording.duration(59.9), "1 min 0 s"),
        (wording.duration(3725), "1 h 2 min"),
        (wording.millions(1_934_112), "1.93 M"),
        (wording.signed(-0.0061), "−0.006"),
        (
            wording.bound(LimitRow(**LIMIT | {"metric": "throughput", "limit": 120.0, "unit": "img/s"})),
            "≥ 120 img/s",
        ),
        (wording.quantity(LimitRow(**LIMIT | {"statistic": "p99", "scope": "with_nms"})), "latency p99 with NMS"),
    ],
)
def test_figures_read_well(text: str, expected: str) -> None:
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected


def _printed(summary: Summary) -> str:
    console = Console(width=110, record=True, file=StringIO())
    console.print(verdict(summary))
    return console.export_text().replace("\N{NO-BREAK SPACE}", " ")


def test_terminal_verdict(run: MadeUpRun) -> None:
    target = run.target.model_copy(update={"comparison": fabricated.against_stock()})
    printed = " ".join(_printed(fabricated.summary(target)).split())
    assert "13 trainings of each and about 5,200 images" in printed and "scratch (in 4 images)" in printed
    for words in ("Example CPU", "kept", "0.413", "searched, FP32 (shipped)", "stock YOLOv8n", "undecided", "interval"):
        assert words in printed


def test_terminal_verdict_of_failures() -> None:
    failed = fabricated.target(error="[red]no network keeps 0.1 ms[/red]", hardware={"name": "[b]cpu"})
    printed = _printed(fabricated.summary(failed))
    assert "[red]no network keeps 0.1 ms[/red]" in printed and "[b]cpu" in printed
    assert "data-prep failed" in _printed(fabricated.summary(stages=[{"name": "data-prep", "status": "failed"}]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_draws_in_a_browser_without_sideways_scrolling(run: MadeUpRun, width: int, tmp_path: Path) -> None:
    build_report(run.summary, run.evidence, tmp_path / "report.html")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "onload = () => { const page = document.querySelector('iframe').contentDocument;"
        "const wait = setInterval(() => { const plots = [...page.querySelectorAll('.plot')];"
        "const drawn = plots.filter((plot) => plot.querySelector('.main-svg')).length;"
        "document.title = [page.documentElement.scrollWidth, plots.length, drawn,"
        "[...page.querySelectorAll('.picture')].filter((one) => one.getBoundingClientRect().height > 50).length"
        "].join(' '); if (drawn === plots.length) clearInterval(wait); }, 200); }</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=30000", "--window-size=1400,1000"]
    command += ["--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    assert title, done.stdout[:500]
    scroll_width, wanted, drawn, shown = map(int, title.groups())
    assert scroll_width <= width
    assert drawn == wanted == 14
    assert shown == 8
    # An error of a script, and a request that the page's policy forbids, are told on the console.
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
