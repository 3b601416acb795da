"""Which file ships, and why: the table of what was tried, and what ships against stock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from yolov8_nas.deploy.comparing import against_stock
from yolov8_nas.deploy.files import Scored
from yolov8_nas.deploy.job import Job
from yolov8_nas.evaluation import Evaluation, compare
from yolov8_nas.export import artifact
from yolov8_nas.export.thresholds import confidences
from yolov8_nas.files import copy_file, write_json
from yolov8_nas.power import classes_told
from yolov8_nas.runner.results import (
    Accuracy,
    CandidateFile,
    Choice,
    Confidence,
    Difference,
    FileFigures,
    FinetuneResult,
    HeldLimit,
    Latency,
    Quantized,
    Rival,
    Shipped,
    StockFile,
    Suppression,
    TrainingCost,
    Tried,
    TunedCandidate,
    VerdictResult,
)
from yolov8_nas.search.objective import figures
from yolov8_nas.space.limits import Figures
from yolov8_nas.train.quantization import load_network, require_recipe


@dataclass(frozen=True)
class Decided:
    """Which file ships.

    Attributes:
        result: The verdict, with everything that was tried.
        engine: The TensorRT engine of what ships, or of what came closest; nothing of another kind of file.
        why_none: Why no file ships; nothing where one does.
        beside: The file that ships, and that of stock it is compared with first; nothing where one is missing.
    """

    result: VerdictResult
    engine: Path | None
    why_none: str | None
    beside: tuple[Scored, Scored] | None


class Verdict:
    """Walks the files from the most wanted on, and ships the first that holds.

    Args:
        job: The export.
        files: The files, measured and scored.
        nms: How non-maximum suppression was timed.
    """

    def __init__(self, job: Job, files: Sequence[Scored], nms: Suppression) -> None:
        self.job = job
        self.files = files
        self.nms = nms
        self.tuned = FinetuneResult.read(job.tuned)

    def decide(self) -> Decided:
        """Walk the files from the most wanted on, and ship the first that holds."""
        files = self.files
        ours = sorted((f for f in files if f.candidate is not None), key=self._loss)
        stock = [f for f in files if f.candidate is None]
        shipped = next((f for f in ours if f.precision in self.job.wanted and self._holds(f)), None)
        runs = (shipped or ours[0]).runs
        stock = _same_precision_first(stock, shipped)
        checkpoint = self._checkpoint(shipped) if shipped else None
        if shipped:
            self._lay(shipped, self.job.out / "model")
        comparisons = against_stock(shipped, stock, ours, self.tuned) if shipped else ()
        result = VerdictResult(
            status="met" if shipped else "failed",
            chosen_on="search split and folds of the train split",
            shipped=self._shipped(shipped) if shipped else None,
            tried=tuple(self._tried(file, shipped) for file in ours),
            baselines=tuple(map(self._baseline, stock)),
            comparison=next(iter(comparisons), None),
            comparisons=comparisons,
            classes=classes_told(shipped.val, self.job.classes) if shipped else (),
            choices=tuple(self._choice(file, stock) for file in ours if self._is_choice(file, shipped)),
            quantization=self._quantization(files, shipped or ours[0]),
            checkpoint_map50_95=checkpoint.map50_95 if checkpoint else None,
            confidence=self._confidence(shipped, self.job.out / "model") if shipped else None,
            nms=self.nms,
        )
        self.job.step(f"{shipped.name} ships" if shipped else "no file keeps the limits")
        engine = runs if runs.suffix == ".engine" else None
        beside = (shipped, stock[0]) if shipped and stock else None
        return Decided(result, engine, None if shipped else self._why_none(ours), beside)

    def _loss(self, file: Scored) -> float:
        """The objective of the search: 1 - mAP, or its weighted sum with latency."""
        return self.job.preference.loss(_expected(file), file.measurement.latency_ms.p50)

    def _holds(self, file: Scored) -> bool:
        return not self._missed(file)

    def _constraints(self, file: Scored) -> tuple[HeldLimit, ...]:
        """The limits with what was measured of a file."""
        figures = self._limited(file)
        rows = []
        for limit in self.job.limits:
            measured = figures.value(limit)
            told = None if math.isnan(measured) else measured
            rows.append(HeldLimit(**limit.to_row(), measured=told, met=limit.met(measured)))
        return tuple(rows)

    def _limited(self, file: Scored) -> Figures[float]:
        """The figures that limits are held against."""
        with_nms = asdict(file.frame.latency_ms) if file.frame else None
        return figures(
            file.measurement, self.job.cost(file.architecture), batch=self.job.form.batch, with_nms_ms=with_nms
        )

    def _missed(self, file: Scored) -> str:
        """The limits that a file misses, in words."""
        figures = self._limited(file)
        return "; ".join(
            f"{limit.quantity} {figures.value(limit):.4g} {limit.unit}, limit {limit.limit:.4g}"
            for limit in self.job.limits
            if not limit.met(figures.value(limit))
        )

    def _figures(self, file: Scored) -> FileFigures:
        """The figures of a file."""
        measured, frame, paper = file.measurement, file.frame, self.job.cost(file.architecture)
        return FileFigures(
            precision=file.precision,
            latency_ms=Latency(**asdict(measured.latency_ms)),
            latency_interval_ms=measured.interval_ms,
            repetitions=measured.repetitions,
            disturbed=measured.disturbed or (frame is not None and frame.disturbed),
            latency_with_nms_ms=Latency(**asdict(frame.latency_ms)) if frame else None,
            latency_with_nms_interval_ms=frame.interval_ms if frame else None,
            found=file.found,
            memory_mb=measured.memory_mb,
            energy_mj=measured.energy_mj,
            power_w=measured.power_w,
            map50_95=file.val.map50_95,
            map50=file.val.map50,
            per_class=file.val.per_class,
            map50_95_search=file.search.map50_95,
            file_mb=file.runs.stat().st_size / 2**20,
            params=paper.params,
            gflops=paper.gflops,
        )

    def _described(self, file: Scored) -> CandidateFile:
        assert file.candidate is not None
        return CandidateFile(
            **dict(self._figures(file)),
            candidate=file.candidate,
            architecture=file.architecture,
            constraints=self._constraints(file),
            training=_training(file),
        )

    def _shipped(self, file: Scored) -> Shipped:
        suffix = file.runs.suffix
        return Shipped(**dict(self._described(file)), file=f"model{suffix}" if suffix != ".pt" else "best.pt")

    def _is_choice(self, file: Scored, shipped: Scored | None) -> bool:
        """Whether a file can be chosen in the place of the one that ships."""
        return shipped is not None and file is not shipped and file.precision in self.job.wanted and self._holds(file)

    def _choice(self, file: Scored, stock: Sequence[Scored]) -> Choice:
        """Lay a file beside the one that ships."""
        folder = self.job.out / Choice.IN / file.name
        self._lay(file, folder)
        self._confidence(file, folder)
        rivals = [one for one in stock if one.precision == file.precision][:1]
        compared = against_stock(file, rivals, (), self.tuned, subject=f"Candidate {file.candidate}")
        told = dict(self._shipped(file))
        return Choice(**told, folder=folder.name, comparison=next(iter(compared), None))

    def _checkpoint(self, file: Scored) -> Evaluation:
        """The score of a candidate's checkpoint in floating point."""
        name = f"checkpoint-{file.candidate}-val"
        return self.job.evaluate(self.job.evaluator("val"), name, file.folder / "best.pt")

    def _tried(self, file: Scored, shipped: Scored | None) -> Tried:
        outcome: Literal["shipped", "not asked for", "limit missed", "less accurate", "less wanted"]
        missed = self._missed(file)
        if file is shipped:
            outcome, reason = "shipped", ""
        elif file.precision not in self.job.wanted:
            outcome, reason = "not asked for", f"the target asks for {self.job.precision}; for comparison"
        elif missed:
            outcome, reason = "limit missed", missed
        else:
            assert shipped is not None
            outcome = "less accurate"
            reason = f"expected accuracy: {_expected(file):.3f} against {_expected(shipped):.3f}"
            if self.job.preference.weighs_latency:
                outcome = "less wanted"
                reason = f"weighted objective: {self._loss(file):.3f} against {self._loss(shipped):.3f}"
        return Tried(**dict(self._described(file)), outcome=outcome, reason=reason)

    def _baseline(self, file: Scored) -> StockFile:
        row = file.row
        assert isinstance(row, Rival)
        return StockFile(
            **dict(self._figures(file)),
            name=row.name,
            form=f"{row.form}, {file.precision.upper()}",
            epochs=row.epochs,
            training=_training(file),
        )

    def _quantization(self, files: Sequence[Scored], shown: Scored) -> Quantized | None:
        """FP32 and INT8 of one network side by side, where INT8 was asked for, and INT8 that was only calibrated."""
        pair = {file.precision: file for file in files if file.candidate == shown.candidate}
        if shown.candidate is None or not {"fp32", "int8"} <= pair.keys():
            return None
        fp32, int8 = pair["fp32"], pair["int8"]
        calibrated = self._calibrated(int8)
        return Quantized(
            candidate=shown.candidate,
            fp32=self._figures(fp32),
            int8=self._figures(int8),
            difference=Difference.of(compare(int8.val, fp32.val)),
            ptq=Accuracy(map50_95=calibrated.map50_95, map50=calibrated.map50, per_class=calibrated.per_class),
            ptq_difference=Difference.of(compare(calibrated, fp32.val)),
            keep_float=self.job.form.keep_float,
        )

    def _calibrated(self, trained: Scored) -> Evaluation:
        """The score on the val split of the network before its quantization-aware training: the same graph in INT8."""
        onnx = self.job.work / f"{trained.name}-ptq.onnx"
        network = load_network(trained.folder / "ptq.pt")
        require_recipe(network, self.job.form.keep_float, trained.folder / "ptq.pt")
        artifact.write_onnx(
            network, onnx, runtime=self.job.runtimes["int8"], imgsz=self.job.form.imgsz, batch=self.job.form.batch
        )
        return self.job.evaluate(self.job.evaluator("val"), f"{onnx.stem}-val", onnx)

    def _lay(self, file: Scored, folder: Path) -> None:
        """Lay a file and what belongs to it into a folder of what ships."""
        folder.mkdir(parents=True)
        copy_file(file.onnx, folder / "model.onnx")
        if file.runs.suffix == ".engine":
            for part in self.job.work.glob(f"{file.runs.name}*"):  # and what is known of it, in JSON
                if ".kernels" in part.suffixes:
                    continue  # compiled for this driver, and made anew elsewhere
                copy_file(part, folder / part.name.replace(file.runs.stem, "model"))
        for precision in self.job.runtimes:
            other = self.job.work / f"candidate-{file.candidate}-{precision}.onnx"
            if other.exists():
                copy_file(other, folder / f"model_{precision}.onnx")
        for checkpoint in ("subnet.pt", "best.pt", "qat.pt"):
            if (file.folder / checkpoint).exists():
                copy_file(file.folder / checkpoint, folder / checkpoint)

    def _confidence(self, file: Scored, folder: Path) -> Confidence | None:
        """The change of confidences in INT8, with thresholds to take in place of floating point's: `thresholds.json`.

        They are held against the same network in floating point: its file where it was exported, else its checkpoint.
        """
        if file.precision != "int8":
            return None
        floats = [f for f in self.files if f.candidate == file.candidate and f.precision != "int8"]
        told = Confidence(
            of="model_fp32.onnx" if floats else "best.pt",
            images=len(file.val.images),
            split="val",
            **dict(confidences(floats[0].val if floats else self._checkpoint(file), file.val)),
        )
        write_json(folder / "thresholds.json", told.plain())
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


def _training(file: Scored) -> TrainingCost:
    """Start, epochs and computing of a network's training."""
    row = file.row
    computing = sum(row.computing.values())
    return TrainingCost(start=row.start, begun_with=row.begun_with, epochs=row.epochs, computing=computing)


def _expected(file: Scored) -> float:
    """Expected mAP50-95 by all trainings of a network, with the file's gain or loss on the search split.

    That split alone has served the search before, and is small.
    """
    row = file.row
    assert isinstance(row, TunedCandidate)
    return row.expected + file.search.map50_95 - row.map50_95["fp32"]


def _same_precision_first(stock: Sequence[Scored], shipped: Scored | None) -> list[Scored]:
    return sorted(stock, key=lambda f: shipped is not None and f.precision != shipped.precision)
