"""Stage outputs as a finished branch leaves them, small and made up: what registry and summary read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolov8_nas.config import RunConfig, SearchConfig
from yolov8_nas.files import write_json
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.runner.results import (
    AgainstStock,
    AsExported,
    Budget,
    CandidateResult,
    CandidatesHalving,
    Conditions,
    DatasetResult,
    FinetuneResult,
    FittedModel,
    Halving,
    Larger,
    Latency,
    LatencyFit,
    LatencyTable,
    LimitUsed,
    Measured,
    Predicted,
    ProbedNetwork,
    Regime,
    ResolvedLimit,
    Rival,
    ScoredStock,
    SearchResult,
    StageRecord,
    StockFile,
    StockResult,
    SupernetResult,
    TrainingRecipe,
    Tuned,
    TunedCandidate,
    TuningResult,
)
from yolov8_nas.runner.results.summary import Summary, Target
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.limits import Constraint

CONFIG = RunConfig.parse(
    {
        "name": "weld-seams",
        "space": "tiny",
        "imgsz": 64,
        "targets": [{"hardware": "cpu-2t", "precision": "best", "constraints": ["latency<=80%stock"]}],
    },
    "test",
)
PROFILE = {
    "name": "cpu-2t",
    "id": "cpu-example-2-5-ghz-2t",
    "kind": "cpu",
    "model": "Example CPU 2.5 GHz",
    "cores": 4,
    "threads": 2,
    "instructions": ["avx2"],
    "caches": {"L1d": 32, "L2": 1024},
    "memory_gb": 16.0,
    "runtime": {"name": "onnxruntime", "version": "1.31.1"},
    "system": "Linux 6.1",
}

GPU_PROFILE = PROFILE | {
    "name": "Tesla_T4",
    "id": "gpu-tesla-t4",
    "kind": "gpu",
    "model": "Tesla T4",
    "threads": 1,
    "instructions": [],
    "caches": {"L2": 4096},
    "runtime": {"name": "tensorrt", "version": "10"},
    "gpu": {"compute_capability": "7.5", "memory_bus_bits": 256, "memory_clock_mhz": 5001, "mig": None},
}


TRAINING = {"start": "weights", "begun_with": "yolov8n.pt", "epochs": 8, "computing": 1e12}


DECIDED_BY = {
    "difference": 0.01, "power": 0.8, "images": 80, "smallest": 0.0568, "images_needed": 2581,
    "smallest_trained": 0.0681, "trainings": 13, "images_trained": 5131,
}  # fmt: skip
"""What is told beside an undecided comparison."""

CLASSES: list[dict[str, Any]] = [
    {"name": "scratch", "images": 60, "boxes": 90, "map50_95": 0.41, "low": 0.36, "high": 0.46, "why_not": None},
    {"name": "dent", "images": 4, "boxes": 4, "map50_95": 0.3, "low": None, "high": None, "why_not": "few images"},
]
"""What the validation images tell of each class."""


def dataset(**changes: Any) -> DatasetResult:
    """A dataset of two classes, but for `changes`."""
    fields = {
        "digest": "d" * 64, "images": {"train": 12, "search": 3, "val": 4}, "classes": ("scratch", "dent"),
        "source": "demo", "boxes": {}, "image_sides": {}, "box_sides": (), "warnings": (),
        "ledger": {}, "converted": {},
    }  # fmt: skip
    return DatasetResult(**fields | changes)


def supernet(space: SearchSpace, **changes: Any) -> SupernetResult:
    """What supernet-train tells of a supernet of two classes, but for `changes`."""
    fields = {
        "space": space, "num_classes": 2, "names": ("scratch", "dent"), "imgsz": 64, "epochs": 3, "seconds": 9.0,
        "training": {}, "warm_start": None,
    }  # fmt: skip
    return SupernetResult(**fields | changes)


def latency(p50: float, p90: float | None = None, p99: float | None = None) -> Latency:
    """Percentiles; all alike unless given."""
    return Latency(p50=p50, p90=p50 if p90 is None else p90, p99=p50 if p99 is None else p99)


def measured(p50: float, **changes: Any) -> Measured:
    """What was measured of a network, but for `changes`."""
    fields = {"latency_ms": latency(p50), "interval_ms": (p50, p50), "rounds": (p50,), "repetitions": 1}
    fields |= {"disturbed": False, "memory_mb": 30.0, "energy_mj": None, "power_w": None}
    return Measured(**fields | changes)


def probed(architecture: Architecture, p50: float, **changes: Any) -> ProbedNetwork:
    """A row of a latency table, but for `changes`."""
    fields = {**dict(measured(p50)), "architecture": architecture, "genes": (), "role": "train"}
    return ProbedNetwork(**fields | changes)


def table(rows: Sequence[ProbedNetwork]) -> LatencyTable:
    """A latency table of rows."""
    regime = Regime(before={}, after={})
    conditions = Conditions(threads=1, runtime={}, counter=None, no_counter="there is none", regime=regime)
    return LatencyTable(protocol={}, conditions=conditions, rows=tuple(rows), failed=())


def stock_result(p50: float, architecture: Architecture) -> StockResult:
    """What hw-probe tells of stock."""
    return StockResult(
        scale="n", architecture=architecture, latency_ms=latency(p50), memory_mb=70.0, energy_mj=None, power_w=None,
        params=3_000_000, gflops=0.4,
        as_ultralytics_exports_it=AsExported(latency_ms=latency(1.05 * p50), memory_mb=70.0),
    )  # fmt: skip


def fitted(model: FittedModel, **changes: Any) -> LatencyFit:
    """A latency model with errors."""
    fields = {"mape": 0.03, "spearman": 0.98, "networks": 40, "holdout": 10, "coverage": 0.9, "scatter": 0.01}
    return LatencyFit(**dict(model), **{**fields, "energy": None, **changes})


def resolved(*limits: Constraint) -> list[ResolvedLimit]:
    """Absolute limits as hw-probe writes them."""
    return [ResolvedLimit(**limit.to_row(), text=str(limit)) for limit in limits]


def candidate(architecture: Architecture, p50: float = 4.0, **changes: Any) -> CandidateResult:
    """A candidate of a search, but for `changes`."""
    fields = {
        "architecture": architecture, "map50_95_search": 0.3, "source": "evolution", "met": True, "slack": 0.0,
        "predicted": Predicted(latency_ms=p50, upper_ms=p50), "measured": measured(p50), "tightest": "latency_p50<=4ms",
    }  # fmt: skip
    return CandidateResult(**fields | changes)


def searched(**changes: Any) -> SearchResult:
    """What a search tells of itself, but for `changes`."""
    larger = Larger(scored=0, best_map50_95=None)
    fields = {
        "asked": SearchConfig(), "limits": (), "objective": None, "counts": {}, "best_map50_95": {}, "comparisons": {},
        "stock": ScoredStock(map50_95=0.2, latency_ms=4.0, upper_ms=4.2, feasible=False), "slack": (), "missed": (),
        "budget": LimitUsed(
            map50_95=0.3, limit="latency_p50<=4ms", used=0.99, used_predicted=1.0, reserve=0.05, largest_keeps_it=False,
            larger=larger,
        ),
        "tail": {}, "seconds": 1.0, "seconds_comparing": 0.0,
    }  # fmt: skip
    return SearchResult(**fields | changes)


def write_tuned(folder: Path, rows: Mapping[str, Tuned], recipe: TrainingRecipe, *, expected: Sequence[float]) -> None:
    """Write what qat-finetune tells of two candidates and stock.

    Args:
        folder: The stage's result.
        rows: What it tells of each, by the folder of its checkpoints.
        recipe: How networks were trained.
        expected: What is expected of each candidate.
    """
    none = Halving(rungs=(), ranking=())
    candidates = [TunedCandidate(**dict(rows[f"candidates/{i}"]), index=i, expected=e) for i, e in enumerate(expected)]
    FinetuneResult(
        candidates=tuple(candidates),
        baseline=Rival(**dict(rows["baseline"]), name="YOLOv8n", form="unrolled", halving=none),
        rescaled=None,
        qat=recipe,
        halving=CandidatesHalving(
            **dict(none), budget=Budget(epochs=recipe.epochs, stock_trainings=1, taught_by_stock=0)
        ),
    ).write(folder)


def measured_alike(p50: float) -> dict[str, Any]:
    """What is told of every exported file beside its own figures."""
    return {
        "latency_interval_ms": [p50, p50], "repetitions": 400, "disturbed": False, "latency_with_nms_ms": None,
        "latency_with_nms_interval_ms": None, "found": {"boxes": 3.0, "detections": 2.0}, "energy_mj": None,
        "power_w": None, "per_class": {"scratch": 0.4, "dent": 0.3}, "map50_95_search": 0.3, "file_mb": 9.0,
    }  # fmt: skip


def figures(p50: float, **changes: Any) -> dict[str, Any]:
    """Figures of an exported file, but for `changes`."""
    fields = {"precision": "fp32", "latency_ms": latency(p50), "memory_mb": 61.0, "map50_95": 0.41, "map50": 0.61}
    return {**fields, "params": 2_300_000, "gflops": 0.31, **measured_alike(p50), **changes}


def stock_file(p50: float = 4.0, **changes: Any) -> StockFile:
    """Stock's exported file, but for `changes`."""
    fields = {"name": "YOLOv8n", "form": "unrolled", "epochs": 8, "training": TRAINING}
    return StockFile(**figures(p50, **{**fields, **changes}))


def against_stock(**changes: Any) -> AgainstStock:
    """A comparison with stock that is undecided, but for `changes`."""
    trainings = {"sd": 0.005, "freedom": 10.0, "source": "other runs"}
    fields = {"difference": 0.0142, "low": -0.0061, "high": 0.0339, "word": "undecided", "trainings": trainings}
    told = {"subject": "The shipped network", "what": "mAP50-95", "against": "YOLOv8n (FP32)"}
    told |= {"decided_by": DECIDED_BY}
    return AgainstStock(**fields | told | changes)


def target(**changes: Any) -> Target:
    """A target of a summary for which nothing is known, but for `changes`."""
    fields = {
        "id": "cpu-2t-best", "status": "failed", "error": None, "hardware": {"name": "cpu-2t"},
        "runtime": {"name": "onnxruntime"}, "precision_requested": "best", "precision_shipped": None,
        "constraints": (), "baselines": (),
    }  # fmt: skip
    none = dict.fromkeys(("architecture", "model", "latency_model", "registry", "comparison", "quantization", "engine"))
    return Target.model_validate(none | fields | changes)


def summary(*targets: Target, stages: Sequence[Mapping[str, Any]] = (), **run: Any) -> Summary:
    """A summary of targets.

    Args:
        targets: The targets.
        stages: Rows of its stages, with what differs from a stage that is done.
        run: What of the run differs from one that is done.
    """
    row = {"target": None, "status": "done", "seconds": 1.0, "error": None, "peak_memory_mb": None}
    told = {"id": "run", "name": "weld-seams", "status": "done", "error": None, **run}
    return Summary.model_validate(
        {"run": told, "dataset": None, "stages": [row | stage for stage in stages], "targets": targets}
    )


def stage_record(stage: str, target: str | None = None, **changes: Any) -> dict[str, Any]:
    """The record of a stage that was done, but for `changes`."""
    fields = {
        "stage": stage, "target": target, "key": "key", "status": "done", "seconds": 2.0, "seconds_spared": 0.0,
        "error": None, "peak_rss_mib": 900.0, "peak_rss_child_mib": 1000.0, "ended": 1.7e9 + 60,
        "digest": f"digest of {stage}", "settings": {},
    }  # fmt: skip
    return StageRecord(**fields | changes).plain()


def small_onnx(path: Path, bias: float = 0.0) -> Path:
    """Write a network of one convolution; `bias` makes its bytes differ."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 8, 64, 64])
    weight = numpy_helper.from_array(np.full((8, 3, 1, 1), 0.5, np.float32), "weight")
    shift = numpy_helper.from_array(np.full(8, bias, np.float32), "bias")
    node = helper.make_node("Conv", ["images", "weight", "bias"], ["output0"])
    graph = helper.make_graph([node], "small", [images], [output], [weight, shift])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_outputs(
    root: Path, *, map50_95: float = 0.41, p50: float = 3.0, choices: Sequence[tuple[float, float]] = ()
) -> dict[str, Path]:
    """Write every stage's output below `root` as the stages do.

    Args:
        root: A folder per stage is made in it.
        map50_95: Score of the shipped network.
        p50: Its median latency in ms; the limit is 3.2 ms. Above it, nothing ships.
        choices: Score and median latency of each network to choose from beside it.

    Returns:
        The folder of each stage but `register`.
    """
    names = ("data-prep", "supernet-train", "hw-probe", "search", "qat-finetune", "trt-export")
    folders = {name: root / name for name in names}
    for folder in folders.values():
        folder.mkdir(parents=True)
    space = SearchSpace.load("tiny")
    architecture = space.stock.to_dict()
    dataset().write(folders["data-prep"])
    (folders["supernet-train"] / "supernet.safetensors").write_bytes(b"weights")
    supernet(space).write(folders["supernet-train"])
    curves = [{"epoch": e, "seconds": 1.5 * e, "box": 2.0 / e, "map50_95_largest": 0.1 * e} for e in (1, 2, 3)]
    write_json(folders["supernet-train"] / "curves.json", curves)
    for number, stage in enumerate(("supernet-train", "qat-finetune")):
        rows = [{"time": 1.7e9 + 10 * i, "cpu_utilization_percentage": 50.0 + number + i} for i in range(2)]
        write_json(folders[stage] / "usage.json", {"every_s": 10.0, "rows": rows})
    write_json(folders["hw-probe"] / "profile.json", PROFILE)
    stock_ms = latency(4.0, 4.2, 4.9)
    stock_result(4.0, space.stock).model_copy(update={"latency_ms": stock_ms}).write(folders["hw-probe"])
    networks = [space.sample(np.random.default_rng(seed)) for seed in range(4)]
    fitted(LatencyModel.fit(space, 2, 64, networks, [1.0, 2.0, 3.0, 4.0]).to_result()).write(folders["hw-probe"])
    limit: dict[str, Any] = {"metric": "latency", "statistic": "p50", "scope": "engine", "limit": 3.2, "unit": "ms"}
    ResolvedLimit.write_all(folders["hw-probe"], [ResolvedLimit(**limit, text="latency<=80%stock")])
    (folders["search"] / "history.jsonl").write_text('{"map50_95": 0.3}\n')
    CandidateResult.write_all(folders["search"], [candidate(space.stock, slack=0.05)])
    tuned = folders["qat-finetune"] / "candidates" / "0"
    tuned.mkdir(parents=True)
    recipe = TrainingRecipe(epochs=1, batch=8, lr=1e-3, imgsz=64, seed=0, mosaic=True)
    TuningResult(
        architecture=space.stock, map50_95={"fp32": 0.4}, average=0.4, best_epoch={"fp32": 1}, start="weights",
        begun_with="yolov8n.pt", computing={"training": 1e12}, distilled=False, epochs=1, recipe=recipe, seconds=1.0,
        curves=({"epoch": 1, "box": 1.0},),
    ).write(tuned)  # fmt: skip
    met = p50 <= limit["limit"]
    model = folders["trt-export"] / "model"
    model.mkdir()
    small_onnx(model / "model.onnx", bias=map50_95 + p50)
    for name in ("best.pt", "subnet.pt"):
        (model / name).write_bytes(f"{name} {map50_95} {p50}".encode())
    shipped = {
        "candidate": 0,
        "precision": "fp32",
        "file": "model.onnx",
        "architecture": architecture,
        "latency_ms": {"p50": p50, "p90": p50 + 0.2, "p99": p50 + 1},
        "memory_mb": 61.0,
        "map50_95": map50_95,
        "map50": map50_95 + 0.2,
        "params": 2_300_000,
        "gflops": 0.31,
        "constraints": [{**limit, "measured": p50, "met": met}],
        **measured_alike(p50),
        "training": TRAINING,
    }
    tried = {name: value for name, value in shipped.items() if name != "file"}
    comparison = {
        "difference": 0.03, "low": -0.01, "high": 0.07, "word": "undecided", "what": "mAP50-95", "subject": "It",
        "against": "YOLOv8n (FP32)", "trainings": {"sd": 0.005, "freedom": 10.0, "source": "other runs"},
        "decided_by": DECIDED_BY,
    }  # fmt: skip
    verdict: dict[str, Any] = {
        "status": "met" if met else "failed",
        "chosen_on": "search split",
        "shipped": shipped if met else None,
        "tried": [{**tried, "outcome": "shipped" if met else "limit missed", "reason": ""}],
        "baselines": [
            {
                "name": "YOLOv8n",
                "form": "unrolled",
                "map50_95": 0.38,
                "map50": 0.6,
                "latency_ms": stock_ms.plain(),
                "epochs": 8,
                "precision": "fp32",
                "memory_mb": 70.0,
                "params": 3_000_000,
                "gflops": 0.4,
                "training": TRAINING,
                **measured_alike(4.0),
            }
        ],
        "comparison": comparison,
        "comparisons": [comparison],
        "classes": CLASSES,
        "choices": [],
        "quantization": None,
        "checkpoint_map50_95": map50_95,
        "confidence": None,
        "nms": {"confidence": 0.001, "iou": 0.7, "max_detections": 300, "threads": 1, "images": 3, "split": "search"},
    }
    for number, (score, ms) in enumerate(choices, 1):
        folder = folders["trt-export"] / "choices" / f"candidate-{number}-fp32"
        folder.mkdir(parents=True)
        small_onnx(folder / "model.onnx", bias=score + ms)
        (folder / "best.pt").write_bytes(f"{number} {score} {ms}".encode())
        network = space.sample(np.random.default_rng(number)).to_dict()
        own = {"candidate": number, "architecture": network, "map50_95": score, "latency_ms": latency(ms).plain()}
        verdict["choices"].append({**shipped, **own, "folder": folder.name, "comparison": None})
    write_json(folders["trt-export"] / "verdict.json", verdict)
    return folders
