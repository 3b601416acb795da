"""Whether our stock arm is what a user gets from `yolo train`: Ultralytics' own trainer with its defaults.

Stock YOLOv8 is trained twice with every seed, from the same weights, on the same images, for as many epochs: by the
pipeline's trainer and recipe (`train.finetune`), and by `YOLO(weights).train(...)` with whatever Ultralytics does by
default (its optimizer, learning rate, weight decay, augmentation, its choice of `best.pt` by the split that it
validates on, which is the search split in both cases). Both are scored on the validation split, once, under the one
protocol. The difference comes with Student's t over seeds (`evaluation.over_trainings`).

Our arm may not be behind by more than the seeds' spread, or everything that is held against it is held against too
little.

The work folder keeps every training: the command may be killed and given again at any time, and with more seeds it
goes on from those it has. Ours goes on from its last epoch, Ultralytics' training begins again.

    python benchmarks/stock_arm.py --data bccd.tar.gz --weights yolov8s.pt --scale s --imgsz 160 --epochs 30 --seeds 5
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from arena import percent, scores_of_draws
from setting import begun, machine, prepared
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from yolov8_nas.data import dataset
from yolov8_nas.device.host import HostLock
from yolov8_nas.evaluation import Comparison, Evaluator, over_trainings
from yolov8_nas.files import atomic_write, read_json, write_json
from yolov8_nas.space import stock_architecture
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.derive import save_checkpoint
from yolov8_nas.train import finetune
from yolov8_nas.train.quantization import rewrite

ARMS: Final = {"ours": "the pipeline's trainer", "yolo": "`yolo train`, its defaults"}

TOY: Final = {"imgsz": 64, "train": 40, "val": 16, "epochs": 1, "seeds": 2, "scale": "n"}


def main() -> None:
    """Parse arguments, train, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/stock_arm"))
    parser.add_argument("--data", help="a dataset: folder or archive; nothing for inspection pictures")
    parser.add_argument("--train", type=int, default=300, help="inspection pictures to train on")
    parser.add_argument("--val", type=int, default=1000, help="inspection pictures to validate on")
    parser.add_argument("--weights", type=Path, help="stock checkpoint to start from; nothing for random numbers")
    parser.add_argument("--scale", default="s", help="size of stock: n, s, m or l")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of ours (`finetune.lr`)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only tell what is finished")
    parser.add_argument("--toy", action="store_true", help="a few images and epochs, whose figures mean nothing")
    arguments = parser.parse_args()
    if arguments.toy:
        for name, value in TOY.items():
            setattr(arguments, name, value)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    bench = Bench(arguments)
    if not arguments.report:
        for seed in range(arguments.seeds):
            for arm in ARMS:
                bench.train(arm, seed)
    report(arguments.workdir, arguments)


class Bench:
    """The data, and how each arm is trained.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        a = self.arguments = arguments
        self.workdir: Path = a.workdir.absolute()
        data = prepared(self.workdir, a.data, train=a.train, val=a.val)
        self.names = dataset.load(data).classes
        self.searched = dataset.data_yaml(data, self.workdir / "views", validate_on="search")
        validated = dataset.data_yaml(data, self.workdir / "views", validate_on="val")
        self.evaluator = Evaluator(validated, imgsz=a.imgsz, batch=16, work=self.workdir / "work")

    def train(self, arm: str, seed: int) -> None:
        """Train one arm with one seed, and score it, unless it has a record."""
        record = self.workdir / "seeds" / str(seed) / f"{arm}.json"
        if record.exists():
            return
        start, work = time.monotonic(), self.workdir / "partial" / f"{arm}-{seed}"
        train: Callable[[int, Path], tuple[Path, dict[str, Any]]] = {"ours": self.ours, "yolo": self.yolo}[arm]
        with HostLock().computing():
            checkpoint, told = train(seed, work)
            evaluation = self.evaluator.evaluate(checkpoint)
        evaluation.save(record.with_suffix(".npz"))
        row = {
            "map50_95": evaluation.map50_95,
            "seconds": round(time.monotonic() - start, 1),
            "machine": machine(torch.get_num_threads()),
            **told,
        }
        write_json(record, row)
        shutil.rmtree(work)
        print(f"seed {seed}, {arm}: mAP50-95 {100 * evaluation.map50_95:.1f} in {row['seconds']:.0f} s", flush=True)

    def ours(self, seed: int, work: Path) -> tuple[Path, dict[str, Any]]:
        """The pipeline's stock arm: its file, and what is worth telling."""
        a = self.arguments
        recipe = finetune.Recipe(a.epochs, a.batch, a.lr, a.imgsz, seed)
        calibration = calibration_batches(self.searched, a.imgsz, 256, a.batch, seed)
        network = begun(stock_architecture(a.scale), a.weights, self.names, calibration, seed)
        trained = finetune.train(network, self.searched, recipe, work=work / "training")
        file = work / "best.pt"
        save_checkpoint(trained.network, file, names=list(self.names), imgsz=a.imgsz)
        return file, {"recipe": asdict(recipe), "best_epoch": trained.epoch}

    def yolo(self, seed: int, work: Path) -> tuple[Path, dict[str, Any]]:
        """What `yolo train` gives."""
        a = self.arguments
        shutil.rmtree(work, ignore_errors=True)
        threads = torch.get_num_threads()
        source = f"yolov8{a.scale}.yaml"
        if a.weights:  # Ultralytics runs what is in a file, so it gets one that is written here
            work.parent.mkdir(parents=True, exist_ok=True)
            source = str(rewrite(a.weights, work.parent / f"{work.name}-start.pt"))
        model = YOLO(source, task="detect")
        chosen: dict[str, Any] = {}
        model.train(
            trainer=partial(_Watched, chosen=chosen),
            data=str(self.searched),
            epochs=a.epochs,
            batch=a.batch,
            imgsz=a.imgsz,
            seed=seed,
            device="0" if torch.cuda.is_available() else "cpu",
            workers=0,  # how images are read is no part of the recipe
            plots=False,
            verbose=False,
            project=str(work),
            name="training",
        )
        torch.set_num_threads(threads)
        return work / "training" / "weights" / "best.pt", {"recipe": chosen}


class _Watched(DetectionTrainer):  # type: ignore[misc]
    """Ultralytics' trainer as it is, without its integrations, and with a note of what it chose."""

    def __init__(self, *args: Any, chosen: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callbacks = {event: [] for event in self.callbacks}
        self.chosen = chosen

    def build_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().build_optimizer(*args, **kwargs)
        group = optimizer.param_groups[0]
        decays = [g["weight_decay"] for g in optimizer.param_groups]
        told = {"optimizer": type(optimizer).__name__, "lr": group["lr"], "weight_decay": max(decays)}
        self.chosen.update(told, epochs=self.args.epochs, batch=self.args.batch)
        return optimizer


def report(workdir: Path, arguments: argparse.Namespace) -> None:
    """Print the table, and write it with everything behind it."""
    folders = sorted((file.parent for file in workdir.glob("seeds/*/yolo.json")), key=lambda folder: int(folder.name))
    folders = [folder for folder in folders if (folder / "ours.json").exists()]
    if not folders:
        print("no seed is finished yet")
        return
    scores = {arm: scores_of_draws([folder / f"{arm}.npz" for folder in folders]) for arm in ARMS}
    rows = {arm: [read_json(folder / f"{arm}.json") for folder in folders] for arm in ARMS}
    lines = [
        f"{arguments.epochs} epochs at {arguments.imgsz} px, YOLOv8{arguments.scale} from "
        f"{arguments.weights.name if arguments.weights else 'random numbers'}; {scores['ours'].shape[0]} seeds, "
        f"{rows['ours'][0]['machine']}.",
        "",
        "| arm | optimizer, peak learning rate | mAP50-95, % | seconds |",
        "|---|---|---|---|",
    ]
    for arm, name in ARMS.items():
        recipe = rows[arm][0]["recipe"]
        chosen = f"{recipe.get('optimizer', 'AdamW')}, {recipe['lr']:.3g}"
        seconds = np.mean([row["seconds"] for row in rows[arm]])
        lines.append(f"| {name} | {chosen} | {percent(scores[arm][:, 0].tolist())} | {seconds:.0f} |")
    found: Comparison | None = None
    if len(folders) > 1:
        found = over_trainings(scores["ours"] - scores["yolo"])
        lines += [
            "",
            f"Ours against `yolo train`: {100 * found.difference:+.2f} points ({100 * found.low:+.2f} to "
            f"{100 * found.high:+.2f}), **{found.word}**.",
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    atomic_write(workdir / "report.md", text)
    write_json(workdir / "report.json", {"rows": rows, "comparison": asdict(found) if found else None})


if __name__ == "__main__":
    main()
