"""trt-export: the file that ships, exported, verified, timed and scored on the target.

Every tuned network is exported in every precision that may ship. What the target's runtime opens is measured and
scored: the ONNX files, or with PyTorch the checkpoints, of which the ONNX files are then portable copies. All are
measured in the same alternating rounds, with the stock network among them: alone, and together with non-maximum
suppression on images of the search split. Which one ships is decided by what all trainings of its network let expect
(`finetune.json`), and what its file gains or loses on the search split; the figures told are of the val split, which
has chosen nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import StageError
from yolov8_nas.files import canonical_digest, copy_file, read_json, read_kept, write_json
from yolov8_nas.runner.stage import Settings, Stage, StageContext
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import Constraint

if TYPE_CHECKING:
    from yolov8_nas.evaluation import Evaluation, Evaluator, TrainingSpread
    from yolov8_nas.measure.benchmark import Measurement, Timing
    from yolov8_nas.measure.nms import Images
    from yolov8_nas.space.cost import Cost
    from yolov8_nas.space.limits import Figures

BATCH: Final = 16
"""Images at once when a checkpoint is scored; an exported file has its own batch."""

WANTED: Final = {"fp32": ("fp32",), "fp16": ("fp16",), "int8": ("int8",), "best": ("fp32", "int8")}
"""Precisions that may ship, by the precision asked for."""

PROBED: Final = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "best": "fp32"}
"""Precision in which the device was probed, and so that of the stock network whose shares limits are."""

STOCK: Final = "stock"
"""Name of the files of stock."""

CHECKPOINTS: Final = {"fp32": "best.pt", "fp16": "best.pt", "int8": "qat.pt"}
"""What a file of each precision is exported from."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the verdict depends on beside the inputs; which device it is for, hw-probe's result tells."""
    assert target is not None
    return {
        "runtime": target.runtime,
        "precision": target.precision,
        "batch": target.batch,
        "imgsz": config.imgsz,
        "scale": SearchSpace.load(config.space).scale,
        "seed": config.seed,
        **config.quantization.settings(int8=target.precision in ("int8", "best")),
        **config.finetune.head(),
        **({"elsewhere": target.model_dump(mode="json")} if target.far else {}),
    }


def run(ctx: StageContext) -> None:
    """Write `verdict.json`, `engine.json`, `evaluation/*.npz`, and `model/` where a file keeps the limits.

    Raises:
        StageError: None does; the verdict with the table of what was tried is written all the same.
    """
    _Export(ctx).run()


STAGE = Stage(name="trt-export", version=10, settings=settings, run=run)


@dataclass(frozen=True)
class _Exported:
    """One exported file: of a candidate, or of a stock network (`candidate` is None).

    Attributes:
        candidate: Index of the candidate.
        precision: `fp32` or `int8`.
        folder: Where its checkpoints lie.
        onnx: The file.
        runs: What the target's runtime opens: the file, or the checkpoint that it was exported from.
        row: What qat-finetune tells of the network.
    """

    candidate: int | None
    precision: str
    folder: Path
    onnx: Path
    runs: Path
    row: dict[str, Any]

    @property
    def name(self) -> str:
        return self.onnx.stem

    @property
    def architecture(self) -> dict[str, Any]:
        architecture: dict[str, Any] = self.row["architecture"]
        return architecture


@dataclass(frozen=True)
class _File(_Exported):
    """One exported file and what was measured of it.

    Attributes:
        measurement: Of the network alone.
        frame: Of the network and non-maximum suppression, on real images; nothing of a device elsewhere.
        found: Boxes above the threshold and detections, the mean of these images.
        search: Its score on the search split.
        val: Its score on the val split.
    """

    measurement: Measurement
    frame: Timing | None
    found: dict[str, float]
    search: Evaluation
    val: Evaluation


class _Export:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        from yolov8_nas.measure.runtime import RUNTIMES, find

        self.ctx = ctx
        self.imgsz: int = ctx.settings["imgsz"]
        self.batch: int = ctx.settings["batch"]
        self.wanted = WANTED[ctx.settings["precision"]]
        self.keep_float: list[str] = ctx.settings.get("keep_float", [])
        self.nms_free: bool = ctx.settings.get("nms_free", False)
        self.tuned = ctx.inputs["qat-finetune"]
        self.summary = read_json(self.tuned / "finetune.json")
        self.classes: list[str] = read_json(ctx.inputs["data-prep"] / "dataset.json")["classes"]
        self.limits = [Constraint.from_row(row) for row in read_json(ctx.inputs["hw-probe"] / "constraints.json")]
        profile = read_json(ctx.inputs["hw-probe"] / "profile.json")
        self.threads: int = profile["threads"]
        kind, name = profile["kind"], profile["runtime"]["name"]
        # FP32 always on a CPU: it is what INT8 is compared with. On a GPU precision may be the runtime's own setting.
        precisions = ("fp32", "int8") if kind == "cpu" else self.wanted
        self.runtimes = {p: find(name, kind, p) for p in precisions if p in RUNTIMES[name].precisions[kind]}
        self.runtime = next(iter(self.runtimes.values()))
        objective = read_json(ctx.inputs["search"] / "search.json")["objective"]
        self.preference = Preference(**objective) if objective else MOST_ACCURATE
        self.scale: str = ctx.settings["scale"]
        self.stock: Path | None = None
        self.nms: dict[str, Any] = {}
        self.evaluators: dict[str, Evaluator] = {}
        self.steps = 0
        self.total = 1

    def run(self) -> None:
        """Export, measure, score, decide, write."""
        with self.ctx.host.computing():
            exported = self._export()
            self.total = 3 * len(exported) + 2
            self._step("exported")
            files = self._score(self._measure(exported))
            self._decide(files)

    def _export(self) -> list[_Exported]:
        from yolov8_nas.export.artifact import build_engine, write_onnx
        from yolov8_nas.export.verification import verify_onnx
        from yolov8_nas.train.quantization import load_network, require_recipe

        rows: list[tuple[str, int | None, Path, dict[str, Any]]] = [
            (f"candidate-{row['index']}", row["index"], self.tuned / "candidates" / str(row["index"]), row)
            for row in self.summary["candidates"]
        ]
        for stem, rival in ((STOCK, "baseline"), ("rescaled", "rescaled")):
            if row := self.summary.get(rival):
                rows.append((stem, None, self.tuned / rival, row))
        files = []
        for stem, candidate, folder, row in rows:
            for precision, runtime in self.runtimes.items():
                checkpoint = folder / CHECKPOINTS[precision]
                if not checkpoint.exists():
                    continue
                network = load_network(checkpoint)
                if network.end2end != self.nms_free:
                    raise StageError(
                        f"{checkpoint}: its head is {'' if network.end2end else 'not '}NMS-free, and finetune.nms_free "
                        f"is {self.nms_free}; train it again with this configuration"
                    )
                if precision == "int8":
                    require_recipe(network, self.keep_float, checkpoint)
                onnx = self.ctx.partial / f"{stem}-{precision}.onnx"
                write_onnx(network, onnx, runtime=runtime, imgsz=self.imgsz, batch=self.batch)
                if precision != "int8":
                    verify_onnx(network, onnx, imgsz=self.imgsz, batch=self.batch, half=precision == "fp16")
                runs = onnx.with_suffix(runtime.suffix)
                if runtime.suffix == ".pt":
                    copy_file(checkpoint, runs)
                elif runs != onnx:
                    build_engine(onnx, runs, runtime)
                files.append(_Exported(candidate, precision, folder, onnx, runs, row))
        return files

    def _measure(self, files: Sequence[_Exported]) -> list[dict[str, Any]]:
        """What the device tells of each file: the fields of a `_File` without its scores."""
        from yolov8_nas.measure.benchmark import PROBE, VERIFY, measure
        from yolov8_nas.measure.nms import NMS_FREE, SETTINGS, boxes, frames, measure_with_nms

        self.stock, extra = self._stock_beside(files)
        runs = [file.runs for file in files]
        reference = self.stock or next((f.runs for f in files if f.candidate is None), runs[0])
        pictures = sorted((self.ctx.inputs["data-prep"] / "dataset" / "images" / "search").iterdir())
        images = frames(pictures, imgsz=self.imgsz, batch=self.batch)
        self.nms = {**(NMS_FREE if self.nms_free else SETTINGS), "images": len(images) * self.batch, "split": "search"}
        limited = any(limit.scope == "with_nms" for limit in self.limits)

        def progress(done: float, total: float) -> None:
            share = len(files) * done / total
            self.ctx.progress.update(self.steps + share, self.total, "measuring on the target")

        if "elsewhere" in self.ctx.settings:
            return self._measured_there(files, extra, reference, images)

        with self.ctx.host.measuring():
            measurements = measure(
                [*runs, *extra],
                threads=self.threads,
                runtime=self.runtime,
                batch=self.batch,
                protocol=VERIFY,
                reference=reference,
                progress=progress,
                checkpoint=self.ctx.partial / "measurements.jsonl",
            )
            self._step("measured", len(files))
            timings = measure_with_nms(
                runs,
                images,
                threads=self.threads,
                runtime=self.runtime,
                protocol=VERIFY if limited else PROBE,
                reference=reference,
                progress=progress,
                checkpoint=self.ctx.partial / "frames.jsonl",
            )
            self._step("measured with non-maximum suppression", len(files))
        self._hold_beside_stock([*runs, *extra], measurements, timings)
        return [
            {
                **vars(file),
                "measurement": measurement,
                "frame": timing,
                "found": boxes(file.runs, images, threads=self.threads, runtime=self.runtime),
            }
            for file, measurement, timing in zip(files, measurements[: len(files)], timings, strict=True)
        ]

    def _stock_beside(self, files: Sequence[_Exported]) -> tuple[Path | None, list[Path]]:
        """Stock's file, where a limit is a share of it, and what has to be measured beside the exported files for it.

        It is in the precision in which the device was probed. Stock that was trained for comparison is that network;
        without it one with random weights takes as long.
        """
        import torch

        from yolov8_nas.export.artifact import write_network
        from yolov8_nas.space import stock_architecture
        from yolov8_nas.supernet.derive import build

        if all(limit.share is None for limit in self.limits):
            return None, []
        precision = PROBED[self.ctx.settings["precision"]]
        runtime = self.runtimes[precision]
        trained = next((f.runs for f in files if f.name == f"{STOCK}-{precision}"), None)
        if trained is None:
            trained = self.ctx.partial / f"beside-{precision}{runtime.suffix}"
            if not trained.exists():
                write_network(
                    build(stock_architecture(self.scale), len(self.classes)).eval(),
                    trained,
                    runtime=runtime,
                    imgsz=self.imgsz,
                    batch=self.batch,
                    calibration=[torch.rand(2, 3, self.imgsz, self.imgsz)],  # ranges have no influence on speed
                    keep_float=self.keep_float,
                    nms_free=self.nms_free,
                )
            return trained, [trained]
        return trained, []

    def _hold_beside_stock(
        self, runs: Sequence[Path], measurements: Sequence[Measurement], timings: Sequence[Timing | None]
    ) -> None:
        """Hold limits that are shares of stock against what stock took in the same rounds."""
        from yolov8_nas.search.objective import figures, with_nms
        from yolov8_nas.space import stock_architecture
        from yolov8_nas.space.cost import cost

        at = next((i for i, file in enumerate(runs) if file == self.stock), None)
        if at is None:
            return
        own = timings[at] if at < len(timings) else None
        latency_ms = asdict(measurements[at].latency_ms)
        nms_file = self.ctx.inputs["hw-probe"] / "nms.json"
        both: Mapping[str, float] | None
        if own:
            both = asdict(own.latency_ms)
        else:  # with random weights there is nothing to suppress: as the probe has it
            both = with_nms(latency_ms, read_json(nms_file)["latency_ms"]) if nms_file.exists() else None
        paper = cost(stock_architecture(self.scale), len(self.classes), self.imgsz)
        stock = figures(measurements[at], paper, batch=self.batch, with_nms_ms=both)
        self.limits = [limit.beside(stock.value(limit)) for limit in self.limits]

    def _measured_there(
        self, files: Sequence[_Exported], extra: Sequence[Path], reference: Path, images: Sequence[Images]
    ) -> list[dict[str, Any]]:
        """What a device elsewhere tells of each file; what is found in images needs no device.

        Raises:
            WaitingError: The files have to be measured there first.
        """
        from yolov8_nas.measure.benchmark import VERIFY
        from yolov8_nas.measure.bundle import measured_there
        from yolov8_nas.measure.nms import boxes

        runs = [*(file.runs for file in files), *extra]
        measurements = measured_there(
            runs,
            target=TargetConfig(**self.ctx.settings["elsewhere"]),
            stage="trt-export",
            protocol=VERIFY,
            reference=reference,
            bundle=self.ctx.partial / "bundle.tar",
        )
        self._step("measured elsewhere", 2 * len(files))
        self._hold_beside_stock(runs, measurements, [None] * len(runs))
        return [
            {**vars(file), "measurement": measurement, "frame": None, "found": boxes(file.onnx, images, threads=1)}
            for file, measurement in zip(files, measurements[: len(files)], strict=True)
        ]

    def _score(self, measured: Sequence[dict[str, Any]]) -> list[_File]:
        search, val = self._evaluator("search"), self._evaluator("val")
        files = []
        for fields in measured:
            runs: Path = fields["runs"]
            scored = _File(
                **fields,
                search=self._evaluate(search, f"{runs.stem}-search", runs),
                val=self._evaluate(val, f"{runs.stem}-val", runs),
            )
            scored.val.save(self.ctx.out / "evaluation" / f"{scored.name}.npz")
            files.append(scored)
            self._step(f"scored {scored.name}", map50_95=scored.val.map50_95)
        return files

    def _evaluator(self, split: Literal["search", "val"]) -> Evaluator:
        """Scores on a split; one for all files, since it reads the images."""
        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.evaluation import Evaluator

        if split not in self.evaluators:
            data = data_yaml(self.ctx.inputs["data-prep"], self.ctx.partial, validate_on=split)
            self.evaluators[split] = Evaluator(data, imgsz=self.imgsz, batch=BATCH, work=self.ctx.partial / "work")
        return self.evaluators[split]

    def _evaluate(self, evaluator: Evaluator, name: str, model: Path) -> Evaluation:
        from yolov8_nas.evaluation import Evaluation

        kept = self.ctx.partial / "evaluation" / f"{name}.npz"
        if (before := read_kept(kept, Evaluation.load)) is not None:
            return before
        evaluation = evaluator.evaluate(model)
        evaluation.save(kept)
        return evaluation

    def _decide(self, files: Sequence[_File]) -> None:
        """Walk the files from the most wanted on, ship the first that holds, and write the verdict."""
        from yolov8_nas.export.tensorrt import status

        ours = sorted((f for f in files if f.candidate is not None), key=self._loss)
        stock = [f for f in files if f.candidate is None]
        shipped = next((f for f in ours if f.precision in self.wanted and self._holds(f)), None)
        runs = (shipped or ours[0]).runs
        write_json(self.ctx.out / "engine.json", status(runs if runs.suffix == ".engine" else None))
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
            checkpoint = self._evaluate(self._evaluator("val"), "checkpoint-val", shipped.folder / "best.pt")
            verdict["checkpoint_map50_95"] = checkpoint.map50_95
            verdict["confidence"] = self._confidence(shipped, files, checkpoint)
            verdict["comparisons"] = self._comparisons(shipped, _same_precision_first(stock, shipped), ours)
            verdict["comparison"] = next(iter(verdict["comparisons"]), None)
        write_json(self.ctx.out / "verdict.json", verdict)
        self._step(f"{shipped.name} ships" if shipped else "no file keeps the limits")
        if not shipped:
            raise StageError(self._why_none(ours))

    def _loss(self, file: _File) -> float:
        """What the search was asked to make small: 1 - mAP, or its sum with latency by weights."""
        return self.preference.loss(_expected(file), file.measurement.latency_ms.p50)

    def _holds(self, file: _File) -> bool:
        return not self._missed(file)

    def _constraints(self, file: _File) -> list[dict[str, Any]]:
        """The limits with what was measured of a file."""
        figures = self._limited(file)
        rows = []
        for limit in self.limits:
            measured = figures.value(limit)
            rows.append(
                {
                    **limit.to_row(),
                    "measured": None if math.isnan(measured) else measured,
                    "met": limit.met(measured),
                }
            )
        return rows

    def _limited(self, file: _File) -> Figures[float]:
        """What limits are held against."""
        from yolov8_nas.search.objective import figures

        with_nms = asdict(file.frame.latency_ms) if file.frame else None
        return figures(file.measurement, self._cost(file), batch=self.batch, with_nms_ms=with_nms)

    def _missed(self, file: _File) -> str:
        """The limits that a file misses, in words."""
        figures = self._limited(file)
        return "; ".join(
            f"{limit.quantity} {figures.value(limit):.4g} {limit.unit}, limit {limit.limit:.4g}"
            for limit in self.limits
            if not limit.met(figures.value(limit))
        )

    def _cost(self, file: _File) -> Cost:
        from yolov8_nas.space import Architecture
        from yolov8_nas.space.cost import cost

        return cost(Architecture.from_dict(file.architecture), len(self.classes), self.imgsz)

    def _figures(self, file: _File) -> dict[str, Any]:
        """What is told of every file."""
        measured, paper = file.measurement.to_dict(), self._cost(file)
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

    def _described(self, file: _File) -> dict[str, Any]:
        return {
            "candidate": file.candidate,
            "architecture": file.architecture,
            **self._figures(file),
            "constraints": self._constraints(file),
            "training": _training(file.row),
        }

    def _tried(self, file: _File, shipped: _File | None) -> dict[str, Any]:
        missed = self._missed(file)
        if file is shipped:
            outcome, reason = "shipped", ""
        elif file.precision not in self.wanted:
            outcome, reason = "not asked for", f"the target asks for {self.ctx.settings['precision']}; for comparison"
        elif missed:
            outcome, reason = "limit missed", missed
        else:
            assert shipped is not None
            outcome = "less accurate"
            reason = f"expected accuracy: {_expected(file):.3f} against {_expected(shipped):.3f}"
            if self.preference.weighs_latency:
                outcome = "less wanted"
                reason = f"weighted objective: {self._loss(file):.3f} against {self._loss(shipped):.3f}"
        return {**self._described(file), "outcome": outcome, "reason": reason}

    def _baseline(self, file: _File) -> dict[str, Any]:
        return {
            "name": file.row["name"],
            "form": f"{file.row['form']}, {file.precision.upper()}",
            "epochs": file.row["epochs"],
            "training": _training(file.row),
            **self._figures(file),
        }

    def _comparisons(self, shipped: _File, stock: Sequence[_File], ours: Sequence[_File]) -> list[dict[str, Any]]:
        """What ships against stock: in its own precision first, and FP32 against FP32 beside it."""
        pairs = [(shipped, file) for file in stock]
        if shipped.precision != "fp32":
            own = [f for f in ours if f.candidate == shipped.candidate and f.precision == "fp32"]
            pairs += [(fp32, file) for fp32 in own for file in stock if file.precision == "fp32"]
        spread = _spread(self.summary)
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

    def _quantization(self, files: Sequence[_File], shown: _File) -> dict[str, Any] | None:
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
            **({"keep_float": self.keep_float} if self.keep_float else {}),
        }

    def _calibrated(self, trained: _File) -> Evaluation:
        """The score on the val split of the network before its quantization-aware training: the same graph in INT8."""
        from yolov8_nas.export.artifact import write_onnx
        from yolov8_nas.train.quantization import load_network, require_recipe

        onnx = self.ctx.partial / f"{trained.name}-ptq.onnx"
        network = load_network(trained.folder / "ptq.pt")
        require_recipe(network, self.keep_float, trained.folder / "ptq.pt")
        write_onnx(network, onnx, runtime=self.runtimes["int8"], imgsz=self.imgsz, batch=self.batch)
        return self._evaluate(self._evaluator("val"), f"{onnx.stem}-val", onnx)

    def _ship(self, shipped: _File) -> None:
        model = self.ctx.out / "model"
        model.mkdir()
        copy_file(shipped.onnx, model / "model.onnx")
        if shipped.runs.suffix == ".engine":
            for file in self.ctx.partial.glob(f"{shipped.runs.name}*"):  # and what is known of it, in JSON
                if ".kernels" in file.suffixes:
                    continue  # compiled for this driver, and made anew elsewhere
                copy_file(file, model / file.name.replace(shipped.runs.stem, "model"))
        for precision in self.runtimes:
            other = self.ctx.partial / f"candidate-{shipped.candidate}-{precision}.onnx"
            if other.exists():
                copy_file(other, model / f"model_{precision}.onnx")
        for checkpoint in ("subnet.pt", "best.pt", "qat.pt"):
            if (shipped.folder / checkpoint).exists():
                copy_file(shipped.folder / checkpoint, model / checkpoint)

    def _confidence(self, shipped: _File, files: Sequence[_File], checkpoint: Evaluation) -> dict[str, Any] | None:
        """What INT8 does to confidences, with the thresholds to take in place of floating point's: `thresholds.json`.

        They are held against the same network in floating point: its file where it was exported, else its checkpoint.
        """
        from yolov8_nas.export.thresholds import confidences

        if shipped.precision != "int8":
            return None
        floats = [f for f in files if f.candidate == shipped.candidate and f.precision != "int8"]
        told = {
            "of": "model_fp32.onnx" if floats else "best.pt",
            "images": len(shipped.val.images),
            "split": "val",
            **confidences(floats[0].val if floats else checkpoint, shipped.val).to_dict(),
        }
        write_json(self.ctx.out / "model" / "thresholds.json", told)
        return told

    def _why_none(self, ours: Sequence[_File]) -> str:
        tried = [file for file in ours if file.precision in self.wanted]
        closest = min(tried, key=lambda f: max(limit.violation(self._limited(f).value(limit)) for limit in self.limits))
        return (
            f"none of {len(tried)} exported files keeps the limits as measured; closest is {closest.name}: "
            f"{self._missed(closest)}; raise the limit, or tune more candidates (finetune.candidates)"
        )

    def _step(self, message: str, steps: int = 1, **figures: float) -> None:
        self.steps += steps
        self.ctx.progress.update(self.steps, self.total, message, **figures)


def _training(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a network began with, its epochs and its computing."""
    told = {key: row[key] for key in ("start", "begun_with", "epochs")}
    return {**told, "computing": sum(row["computing"].values())}


def _expected(file: _File) -> float:
    """What all trainings of a network let expect of it, with what the file lost or won on the search split.

    That split alone has served the search before, and is small.
    """
    row = file.row
    return float(row["expected"] + file.search.map50_95 - row["map50_95"]["fp32"])


def _same_precision_first(stock: Sequence[_File], shipped: _File | None) -> list[_File]:
    return sorted(stock, key=lambda f: shipped is not None and f.precision != shipped.precision)


def _compared(first: Evaluation, second: Evaluation, spread: TrainingSpread | None = None) -> dict[str, Any]:
    from yolov8_nas.evaluation import compare

    return asdict(compare(first, second, spread=spread))


def _spread(summary: Mapping[str, Any]) -> TrainingSpread:
    """How far apart trainings of one network lie: what is typical, and what this run's own repeated ones tell."""
    from yolov8_nas.evaluation import TYPICAL_SPREAD

    groups: dict[str, list[float]] = {}
    for rival in ("baseline", "rescaled"):
        halving = (summary.get(rival) or {}).get("halving", {"rungs": [], "ranking": []})
        for row in halving["ranking"]:
            if len(row["scores"]) == len(halving["rungs"]):
                groups.setdefault(canonical_digest(row["architecture"]), []).append(row["scores"][-1])
    return TYPICAL_SPREAD.updated(list(groups.values()), "this run's own repeated trainings of stock")
