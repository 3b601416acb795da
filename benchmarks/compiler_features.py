"""Does what NVIDIA's compiler tells without a device predict latency across networks better than our own features?

    python benchmarks/compiler_features.py --space yolov8n --imgsz 640 --networks 60 --precision fp16

TensorRT for RTX builds an engine of each network, which takes no GPU, and tells memory, weights, layers and the
engine's size. Where a GPU is that it supports, each engine is timed, and latency is predicted from our features, from
the compiler's, and from both, each network by a fit to the others. Without one, latency is *not measured*, and what is
shown is only how the compiler's figures go with ours.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr

from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError
from yolov8_nas.export.artifact import write_onnx
from yolov8_nas.export.tensorrt_rtx import build_ahead
from yolov8_nas.measure.benchmark import measure
from yolov8_nas.measure.latency_model import Features
from yolov8_nas.measure.runtime import find
from yolov8_nas.measure.tensorrt_rtx import PORTABLE, RUNTIME, capability_here, missing
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.supernet.derive import build
from yolov8_nas.train.quantization import quantize

TOLD: Final = (
    "parsed_layers",
    "quantized_convolutions",
    "activation_bytes",
    "scratch_bytes",
    "weight_bytes",
    "plan_bytes",
)
"""The compiler's figures that are numbers for every network."""

FOLDS: Final = 10

Floats = NDArray[np.float64]


def main() -> None:
    """Parse arguments, build, measure where that can be, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="yolov8n")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--networks", type=int, default=60)
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16", "int8"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    space, rng = SearchSpace.load(arguments.space), np.random.default_rng(arguments.seed)
    networks = [space.stock, *(space.sample(rng) for _ in range(arguments.networks - 1))]
    lacking = missing(arguments.precision)
    capabilities = PORTABLE if lacking else (capability_here(),)
    with tempfile.TemporaryDirectory() as folder:
        told = compile_all(networks, Path(folder), arguments.imgsz, arguments.precision, capabilities)
        print(
            f"{len(networks)} networks of space {space.name}, {arguments.imgsz} px, {arguments.precision.upper()}, ",
            end="",
        )
        print(
            f"for compute capability {', '.join(capabilities)}; compiled in {sum(row['seconds'] for row in told):.0f} s"
        )
        compare(networks, told, arguments.imgsz)
        if lacking:
            print(f"latency: *not measured*: {' and '.join(lacking)}")
            return
        predict(networks, told, time_all(Path(folder), len(networks), arguments.precision), arguments.imgsz)


def compile_all(
    networks: Sequence[Architecture], folder: Path, imgsz: int, precision: str, capabilities: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Build an engine of each network, with fresh weights, and give what the compiler tells of it."""
    told = []
    runtime = find(RUNTIME, "gpu", precision)
    for index, architecture in enumerate(networks):
        torch.manual_seed(index)
        model = build(architecture, 80).eval()
        if precision == "int8":
            model = quantize(model, [torch.rand(2, 3, imgsz, imgsz)])
        onnx = write_onnx(model, folder / f"{index}.onnx", runtime=runtime, imgsz=imgsz)
        told.append(build_ahead(onnx, folder / f"{index}.engine", capabilities=capabilities).layers)
        onnx.unlink()
    return told


def time_all(folder: Path, count: int, precision: str) -> Floats:
    """Median latency in ms of each engine, in alternating rounds."""
    runtime = find(RUNTIME, "gpu", precision)
    with HostLock().measuring():
        measured = measure([folder / f"{index}.engine" for index in range(count)], threads=1, runtime=runtime)
    return np.array([one.latency_ms.p50 for one in measured])


def compare(networks: Sequence[Architecture], told: Sequence[Mapping[str, Any]], imgsz: int) -> None:
    """Print how the compiler's figures go with ours, and which of them say nothing."""
    ours = {
        "multiply-accumulates": [cost(network, 80, imgsz).gflops for network in networks],
        "parameters": [cost(network, 80, imgsz).params for network in networks],
    }
    for name in ("fused_layers", *TOLD):
        values = np.array([row[name] if row[name] is not None else np.nan for row in told], dtype=np.float64)
        if np.isnan(values).any() or np.ptp(values) == 0:
            print(f"{name}: the same for all ({told[0][name]}), so it tells none from another")
            continue
        ranks = ", ".join(f"{what} {spearmanr(values, figures).statistic:+.2f}" for what, figures in ours.items())
        print(f"{name}: {values.min():.4g} to {values.max():.4g}; Spearman with {ranks}")


def predict(networks: Sequence[Architecture], told: Sequence[Mapping[str, Any]], latency: Floats, imgsz: int) -> None:
    """Print the errors of predictions from our features, the compiler's, and both."""
    work, _ = Features(80, imgsz)(networks)
    compiler = np.array([[float(row[name] or 0) for name in TOLD] for row in told])
    both = np.concatenate([work, compiler], axis=1)
    for what, features in (("our features", work), ("the compiler's", compiler), ("both", both)):
        predicted = held_out(features, latency)
        error = np.abs(predicted / latency - 1)
        print(f"{what}: MAPE {error.mean():.2%}, Spearman {spearmanr(predicted, latency).statistic:.3f}")


def held_out(features: Floats, latency: Floats, folds: int = FOLDS) -> Floats:
    """Latency of each network as it is predicted from the others: prices that are not negative, by relative errors.

    Args:
        features: (networks, features), not negative.
        latency: (networks,).
        folds: Parts that the networks are held out in.

    Raises:
        InputError: There are fewer networks than folds.
    """
    if len(latency) < folds:
        raise InputError(f"{len(latency)} networks are fewer than the {folds} folds; build more (--networks)")
    scaled = np.concatenate([np.ones((len(features), 1)), features / np.maximum(features.max(0), 1e-12)], axis=1)
    predicted = np.empty(len(latency))
    part = np.arange(len(latency)) % folds
    for fold in range(folds):
        rest = part != fold
        prices, _ = nnls(scaled[rest] / latency[rest, None], np.ones(rest.sum()))
        predicted[~rest] = scaled[~rest] @ prices
    return predicted


if __name__ == "__main__":
    main()
