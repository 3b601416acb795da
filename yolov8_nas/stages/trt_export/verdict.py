"""Which file ships, and why: the table of what was tried, and what ships against stock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import TYPICAL_SPREAD, Evaluation, TrainingSpread, compare
from yolov8_nas.export import artifact
from yolov8_nas.export.tensorrt import status
from yolov8_nas.export.thresholds import confidences
from yolov8_nas.files import canonical_digest, copy_file, write_json
from yolov8_nas.search.objective import figures
from yolov8_nas.space.limits import Figures
from yolov8_nas.stages.trt_export.files import Scored
from yolov8_nas.stages.trt_export.job import Job
from yolov8_nas.train.quantization import load_network, require_recipe


class Verdict:
    """Walks the files from the most wanted on, and ships the first that holds.

    Args:
        job: The export.
        files: The files, measured and scored.
        nms: How non-maximum suppression was timed.
    """

    def __init__(self, job: Job, files: Sequence[Scored], nms: Mapping[str, Any]) -> None:
        self.job = job
        self.files = files
        self.nms = nms

    def decide(self) -> None:
        """Walk the files from the most wanted on, ship the first that holds, and write the verdict."""
        files = self.files
        ours = sorted((f for f in files if f.candidate is not None), key=self._loss)
        stock = [f for f in files if f.candidate is None]
        shipped = next((f for f in ours if f.precision in self.job.wanted and self._holds(f)), None)
        runs = (shipped or ours[0]).runs
        write_json(self.job.ctx.out / "engine.json", status(runs if runs.suffix == ".engine" else None))
        verdict: dict[str, Any] = {
            "status": "met" if shipped else "failed",
            "chosen_on": "search split and folds of the train split",
            "shipped": None,
            "tried": [self._tried(file, shipped) for file in ours],
            "baselines": [self._baseline(file) for file in _same_precision_first(stock, shipped)],
            "comparison": None,
            "comparisons": [],
            "quantization": self._quantization(files, shipped or ours[0]),
            "checkpoint_map50_95": None,
            "confidence": None,
            "nms": self.nms,
        }
        if shipped:
            self._ship(shipped)
            verdict["shipped"] = {
                **self._described(shipped),
                "file": f"model{shipped.runs.suffix}" if shipped.runs.suffix != ".pt" else "best.pt",
            }
            checkpoint = self.job.evaluate(self.job.evaluator("val"), "checkpoint-val", shipped.folder / "best.pt")
            verdict["checkpoint_map50_95"] = checkpoint.map50_95
            verdict["confidence"] = self._confidence(shipped, files, checkpoint)
            verdict["comparisons"] = self._comparisons(shipped, _same_precision_first(stock, shipped), ours)
            verdict["comparison"] = next(iter(verdict["comparisons"]), None)
        write_json(self.job.ctx.out / "verdict.json", verdict)
        self.job.step(f"{shipped.name} ships" if shipped else "no file keeps the limits")
        if not shipped:
            raise StageError(self._why_none(ours))

    def _loss(self, file: Scored) -> float:
        """What the search was asked to make small: 1 - mAP, or its sum with latency by weights."""
        return self.job.preference.loss(_expected(file), file.measurement.latency_ms.p50)

    def _holds(self, file: Scored) -> bool:
        return not self._missed(file)

    def _constraints(self, file: Scored) -> list[dict[str, Any]]:
        """The limits with what was measured of a file."""
        figures = self._limited(file)
        rows = []
        for limit in self.job.limits:
            measured = figures.value(limit)
            rows.append(
                {
                    **limit.to_row(),
                    "measured": None if math.isnan(measured) else measured,
                    "met": limit.met(measured),
                }
            )
        return rows

    def _limited(self, file: Scored) -> Figures[float]:
        """What limits are held against."""
        with_nms = asdict(file.frame.latency_ms) if file.frame else None
        return figures(file.measurement, self.job.cost(file.architecture), batch=self.job.batch, with_nms_ms=with_nms)

    def _missed(self, file: Scored) -> str:
        """The limits that a file misses, in words."""
        figures = self._limited(file)
        return "; ".join(
            f"{limit.quantity} {figures.value(limit):.4g} {limit.unit}, limit {limit.limit:.4g}"
            for limit in self.job.limits
            if not limit.met(figures.value(limit))
        )

    def _figures(self, file: Scored) -> dict[str, Any]:
        """What is told of every file."""
        measured, paper = file.measurement.to_dict(), self.job.cost(file.architecture)
        frame = file.frame.to_dict() if file.frame else {}
        return {
            "precision": file.precision,
            "latency_ms": measured["latency_ms"],
            "latency_interval_ms": measured["interval_ms"],
            "repetitions": measured["repetitions"],
            "disturbed": measured["disturbed"] or frame.get("disturbed", False),
            "latency_with_nms_ms": frame.get("latency_ms"),
            "latency_with_nms_interval_ms": frame.get("interval_ms"),
            "found": file.found,
            "memory_mb": measured["memory_mb"],
            "energy_mj": measured["energy_mj"],
            "power_w": measured["power_w"],
            "map50_95": file.val.map50_95,
            "map50": file.val.map50,
            "per_class": file.val.per_class,
            "map50_95_search": file.search.map50_95,
            "file_mb": file.runs.stat().st_size / 2**20,
            "params": paper.params,
            "gflops": paper.gflops,
        }

    def _described(self, file: Scored) -> dict[str, Any]:
        return {
            "candidate": file.candidate,
            "architecture": file.architecture,
            **self._figures(file),
            "constraints": self._constraints(file),
            "training": _training(file.row),
        }

    def _tried(self, file: Scored, shipped: Scored | None) -> dict[str, Any]:
        missed = self._missed(file)
        if file is shipped:
            outcome, reason = "shipped", ""
        elif file.precision not in self.job.wanted:
            outcome, reason = "not asked for", f"the target asks for {self.job.ctx.settings.precision}; for comparison"
        elif missed:
            outcome, reason = "limit missed", missed
        else:
            assert shipped is not None
            outcome = "less accurate"
            reason = f"expected accuracy: {_expected(file):.3f} against {_expected(shipped):.3f}"
            if self.job.preference.weighs_latency:
                outcome = "less wanted"
                reason = f"weighted objective: {self._loss(file):.3f} against {self._loss(shipped):.3f}"
        return {**self._described(file), "outcome": outcome, "reason": reason}

    def _baseline(self, file: Scored) -> dict[str, Any]:
        return {
            "name": file.row["name"],
            "form": f"{file.row['form']}, {file.precision.upper()}",
            "epochs": file.row["epochs"],
            "training": _training(file.row),
            **self._figures(file),
        }

    def _comparisons(self, shipped: Scored, stock: Sequence[Scored], ours: Sequence[Scored]) -> list[dict[str, Any]]:
        """What ships against stock: in its own precision first, and FP32 against FP32 beside it."""
        pairs = [(shipped, file) for file in stock]
        if shipped.precision != "fp32":
            own = [f for f in ours if f.candidate == shipped.candidate and f.precision == "fp32"]
            pairs += [(fp32, file) for fp32 in own for file in stock if file.precision == "fp32"]
        spread = _spread(self.job.summary)
        return [
            {
                **_compared(first.val, second.val, spread),
                "trainings": asdict(spread),
                "subject": "The shipped network" if first is shipped else f"In {first.precision.upper()} the network",
                "what": f"mAP50-95 on val, {first.precision.upper()} against {second.precision.upper()}, "
                f"as exported; 95% interval over images and trainings, whose standard deviation from seed to seed is "
                f"taken as {100 * spread.sd:.1f} points, from {spread.source}",
                "against": f"{second.row['name']} ({second.precision.upper()})",
            }
            for first, second in pairs
        ]

    def _quantization(self, files: Sequence[Scored], shown: Scored) -> dict[str, Any] | None:
        """FP32 and INT8 of one network side by side, where INT8 was asked for, and INT8 that was only calibrated."""
        pair = {file.precision: file for file in files if file.candidate == shown.candidate}
        if not {"fp32", "int8"} <= pair.keys():
            return None
        calibrated = self._calibrated(pair["int8"])
        return {
            "candidate": shown.candidate,
            **{precision: self._figures(file) for precision, file in pair.items()},
            "difference": _compared(pair["int8"].val, pair["fp32"].val),
            "ptq": {"map50_95": calibrated.map50_95, "map50": calibrated.map50, "per_class": calibrated.per_class},
            "ptq_difference": _compared(calibrated, pair["fp32"].val),
            **({"keep_float": list(self.job.keep_float)} if self.job.keep_float else {}),
        }

    def _calibrated(self, trained: Scored) -> Evaluation:
        """The score on the val split of the network before its quantization-aware training: the same graph in INT8."""
        onnx = self.job.ctx.partial / f"{trained.name}-ptq.onnx"
        network = load_network(trained.folder / "ptq.pt")
        require_recipe(network, self.job.keep_float, trained.folder / "ptq.pt")
        artifact.write_onnx(
            network, onnx, runtime=self.job.runtimes["int8"], imgsz=self.job.imgsz, batch=self.job.batch
        )
        return self.job.evaluate(self.job.evaluator("val"), f"{onnx.stem}-val", onnx)

    def _ship(self, shipped: Scored) -> None:
        model = self.job.ctx.out / "model"
        model.mkdir()
        copy_file(shipped.onnx, model / "model.onnx")
        if shipped.runs.suffix == ".engine":
            for file in self.job.ctx.partial.glob(f"{shipped.runs.name}*"):  # and what is known of it, in JSON
                if ".kernels" in file.suffixes:
                    continue  # compiled for this driver, and made anew elsewhere
                copy_file(file, model / file.name.replace(shipped.runs.stem, "model"))
        for precision in self.job.runtimes:
            other = self.job.ctx.partial / f"candidate-{shipped.candidate}-{precision}.onnx"
            if other.exists():
                copy_file(other, model / f"model_{precision}.onnx")
        for checkpoint in ("subnet.pt", "best.pt", "qat.pt"):
            if (shipped.folder / checkpoint).exists():
                copy_file(shipped.folder / checkpoint, model / checkpoint)

    def _confidence(self, shipped: Scored, files: Sequence[Scored], checkpoint: Evaluation) -> dict[str, Any] | None:
        """What INT8 does to confidences, with the thresholds to take in place of floating point's: `thresholds.json`.

        They are held against the same network in floating point: its file where it was exported, else its checkpoint.
        """

        if shipped.precision != "int8":
            return None
        floats = [f for f in files if f.candidate == shipped.candidate and f.precision != "int8"]
        told = {
            "of": "model_fp32.onnx" if floats else "best.pt",
            "images": len(shipped.val.images),
            "split": "val",
            **confidences(floats[0].val if floats else checkpoint, shipped.val).to_dict(),
        }
        write_json(self.job.ctx.out / "model" / "thresholds.json", told)
        return told

    def _why_none(self, ours: Sequence[Scored]) -> str:
        tried = [file for file in ours if file.precision in self.job.wanted]
        closest = min(
            tried, key=lambda f: max(limit.violation(self._limited(f).value(limit)) for limit in self.job.limits)
        )
        return (
            f"none of {len(tried)} exported files keeps the limits as measured; closest is {closest.name}: "
            f"{self._missed(closest)}; raise the limit, or tune more candidates (finetune.candidates)"
        )


def _training(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a network began with, its epochs and its computing."""
    told = {key: row[key] for key in ("start", "begun_with", "epochs")}
    return {**told, "computing": sum(row["computing"].values())}


def _expected(file: Scored) -> float:
    """What all trainings of a network let expect of it, with what the file lost or won on the search split.

    That split alone has served the search before, and is small.
    """
    row = file.row
    return float(row["expected"] + file.search.map50_95 - row["map50_95"]["fp32"])


def _same_precision_first(stock: Sequence[Scored], shipped: Scored | None) -> list[Scored]:
    return sorted(stock, key=lambda f: shipped is not None and f.precision != shipped.precision)


def _compared(first: Evaluation, second: Evaluation, spread: TrainingSpread | None = None) -> dict[str, Any]:
    return asdict(compare(first, second, spread=spread))


def _spread(summary: Mapping[str, Any]) -> TrainingSpread:
    """How far apart trainings of one network lie: what is typical, and what this run's own repeated ones tell."""
    groups: dict[str, list[float]] = {}
    for rival in ("baseline", "rescaled"):
        halving = (summary.get(rival) or {}).get("halving", {"rungs": [], "ranking": []})
        for row in halving["ranking"]:
            if len(row["scores"]) == len(halving["rungs"]):
                groups.setdefault(canonical_digest(row["architecture"]), []).append(row["scores"][-1])
    return TYPICAL_SPREAD.updated(list(groups.values()), "this run's own repeated trainings of stock")
