"""What each part of a trained network costs and gains in INT8, in accuracy and in latency, on this machine's CPU.

    python benchmarks/sensitivity.py --data bccd.tar.gz --weights yolov8s-coco20.pt

Stock YOLOv8n is sliced from the weights, trained on the dataset (one thread, some minutes), kept as `OUT/stock.pt`, and
given to `yolov8-nas sensitivity`, whose table is the result. Then its confidences in INT8, calibrated and not trained
on, are held against those in floating point. What was trained before is not trained again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Final

import onnxruntime
import torch
from setting import begun, machine, prepared

from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.evaluation import Evaluator
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.export.packaging import CALIBRATION_IMAGES
from yolov8_nas.export.thresholds import confidences
from yolov8_nas.runner.results import DatasetResult
from yolov8_nas.space import stock_architecture
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.derive import save_checkpoint
from yolov8_nas.train.finetune import Recipe, train
from yolov8_nas.train.quantization import load_network, quantize

BATCH: Final = 8
LR: Final = 1e-3
SEED: Final = 0

CUT_IMAGES: Final = 128
"""Training images to which a network that is cut out of another one is fitted."""


def main() -> None:
    """Parse arguments, train what is not there, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder, a data.yaml or an archive")
    parser.add_argument("--weights", required=True, type=Path, help="a stock YOLOv8 checkpoint, of any classes")
    parser.add_argument("--size", default="n", help="of the stock network that is trained: n, s, m or l")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stock = arguments.out / "stock.pt"
    if not stock.exists():
        learn(arguments, stock)
    command = ["sensitivity", str(stock), "--data", str(arguments.data), "--imgsz", str(arguments.imgsz)]
    print(f"{date.today()}, {machine(threads=1)}, ONNX Runtime {onnxruntime.__version__}")
    print(f"yolov8-nas {' '.join(command)} --hardware cpu-1t", flush=True)
    code = "from yolov8_nas.commands.main import app; app()"
    subprocess.run([sys.executable, "-c", code, *command, "--hardware", "cpu-1t"], check=True)
    tell_confidences(arguments, stock)


def learn(arguments: argparse.Namespace, stock: Path) -> None:
    """Train stock YOLOv8 on the train split; the epoch that is kept is chosen on the search split."""
    out: Path = arguments.out
    folder = prepared(out, arguments.data, train=0, val=0)
    names = DatasetResult.read(folder).classes
    data = data_yaml(folder, out / "search", validate_on="search")
    images = calibration_batches(data, arguments.imgsz, CUT_IMAGES, BATCH, SEED)
    network = begun(stock_architecture(arguments.size), arguments.weights, names, images, SEED)
    recipe = Recipe(epochs=arguments.epochs, batch=BATCH, lr=LR, imgsz=arguments.imgsz, seed=SEED)
    trained = train(network.train(), data, recipe, work=out / "training")
    last = trained.curves[-1]
    print(
        f"YOLOv8{arguments.size}, {arguments.epochs} epochs, {sum(row['seconds'] for row in trained.curves):.0f} s, on "
        f"the search split mAP50-95 {last['map50_95']:.3f}, mAP50 {last['map50']:.3f}",
        flush=True,
    )
    save_checkpoint(trained.network, stock, names=names, imgsz=arguments.imgsz)


def tell_confidences(arguments: argparse.Namespace, stock: Path) -> None:
    """Print what INT8 does to the confidences of the exported files, on the val split."""
    out, side = arguments.out, arguments.imgsz
    data = data_yaml(out / "data", out / "val", validate_on="val")
    network = load_network(stock)
    quantized = quantize(deepcopy(network), calibration_batches(data, side, CALIBRATION_IMAGES, BATCH, SEED))
    evaluator = Evaluator(data, imgsz=side, batch=BATCH, work=out / "work")
    old, new = (
        evaluator.evaluate(export_onnx(model, out / name, imgsz=side))
        for name, model in (("fp32.onnx", network), ("int8.onnx", quantized))
    )
    told = confidences(old, new)
    assert told.spread is not None, "a network that has learnt finds something"
    print(f"confidences on {len(new.images)} images of val: INT8 spreads them over {told.spread:.2f} of FP32's range")
    for row in told.table:
        carried = f"{row.new:.3f}" if row.new is not None else row.why_not
        print(f"  threshold {row.old:.2f} becomes {carried}")


if __name__ == "__main__":
    main()
