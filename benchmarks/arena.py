"""What benchmarks of whole searches share: the data, the probed device, the stages, and statistics over seeds."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from setting import inspection_pictures

from yolov8_nas.config import RunConfig
from yolov8_nas.data import dataset
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import Comparison, Evaluation, mean_average_precision, over_trainings
from yolov8_nas.runner.stage import run_stage, target_labels
from yolov8_nas.stages import find_stage

BATCH = 8
EVALUATION_BATCH = 16
RESAMPLES = 2000

TOY = {
    "imgsz": 64,
    "train": 60,
    "val": 20,
    "seeds": 2,
    "supernet_epochs": 1,
    "finetune_epochs": 1,
    "generations": 2,
    "population": 4,
    "prior_steps": 2,
    "probe_networks": 12,
    "probe_holdout": 5,
    "bn_images": 16,
}


@dataclass(frozen=True)
class Result:
    """What a stage gave: the tar that travels on, and the same as a folder of the store."""

    tar: Path
    folder: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every contest of a search is told: data, seeds, space, limit, budgets."""
    parser.add_argument("--data", help="a dataset: folder or archive; nothing for inspection pictures")
    parser.add_argument("--train", type=int, default=500, help="inspection pictures to train on")
    parser.add_argument("--val", type=int, default=1000, help="inspection pictures to validate on")
    parser.add_argument("--seeds", type=int, default=5, help="contests")
    parser.add_argument("--space", default="tiny")
    parser.add_argument("--imgsz", type=int, default=96)
    parser.add_argument("--hardware", default="auto")
    parser.add_argument("--limit", default="latency<=80%stock")
    parser.add_argument("--supernet-epochs", type=int, default=20)
    parser.add_argument("--finetune-epochs", type=int, default=16)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--prior-steps", type=int, default=40)
    parser.add_argument("--bn-images", type=int, default=64)
    parser.add_argument("--probe-networks", type=int, default=48)
    parser.add_argument("--probe-holdout", type=int, default=12)
    parser.add_argument("--toy", action="store_true", help="a few images and epochs, whose figures mean nothing")


class Arena:
    """What the contests of all seeds share: the data, the probed device, the store.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.workdir: Path = arguments.workdir.absolute()
        self.source = arguments.data or str(
            inspection_pictures(self.workdir / "pictures", train=arguments.train, val=arguments.val)
        )
        self.run_id = f"search-quality-{time.time_ns()}"  # a stage that failed is tried again by the next command
        self.prepared = self.stage("data-prep", 0, {})
        data = dataset.load(self.prepared.folder)
        self.classes = data.classes
        self.images = data.images
        # Once for all seeds: what the device is does not depend on them.
        self.probed = self.stage("hw-probe", 0, {}, num_classes=len(self.classes))
        self.threads = Profile.read(self.probed.folder).threads

    def config(self, number: int) -> RunConfig:
        """The run configuration of a contest."""
        return self.configured(
            number,
            search={"candidates": 2, "random": "equal"},
            finetune={"candidates": 2, "baseline": "both"},
            precision="fp32",
        )

    def configured(
        self, number: int, *, search: Mapping[str, Any], finetune: Mapping[str, Any], precision: str
    ) -> RunConfig:
        """What the arguments ask for, with what a benchmark adds to it.

        Args:
            number: Number of the contest; it seeds everything.
            search: Further settings of the search.
            finetune: Further settings of fine-tuning.
            precision: Precision of the target.
        """
        a = self.arguments
        return RunConfig.parse(
            {
                "data": self.source,
                "space": a.space,
                "imgsz": a.imgsz,
                "seed": number,
                "supernet": {"epochs": a.supernet_epochs, "batch": BATCH, "random_networks": 1},
                "probe": {"networks": a.probe_networks, "holdout": a.probe_holdout, "max_mape": 100 if a.toy else 0.15},
                "search": {
                    "generations": a.generations,
                    "population": a.population,
                    "measure_every": 3,
                    "bn_images": a.bn_images,
                    "prior_steps": a.prior_steps,
                    **search,
                },
                "finetune": {"epochs": a.finetune_epochs, "batch": BATCH, "lr": 0.002, **finetune},
                "targets": [{"hardware": a.hardware, "precision": precision, "constraints": [a.limit]}],
            },
            "the arguments",
        )

    def stage(self, name: str, number: int, inputs: Mapping[str, Path], **parameters: Any) -> Result:
        """Run a stage of the pipeline, or take its result from the store.

        Raises:
            StageError: It failed.
        """
        config = self.config(number)
        shared = name in ("data-prep", "supernet-train")
        tar = self.workdir / "tars" / f"{number}-{name}.tar"
        outcome = run_stage(
            find_stage(name),
            config=config,
            target=None if shared else target_labels(config)[0],
            inputs=inputs,
            parameters=parameters,
            output=tar,
            store=self.workdir / "store",
            run_id=self.run_id,
        )
        if outcome.status == "failed":
            raise StageError(f"{name}, seed {number}: {outcome.error}")
        return Result(tar, self.workdir / "store" / name / outcome.key / "outputs")

    def forget_unfinished(self, name: str) -> None:
        """Let a stage that was cut short begin anew: its seconds count, and it only tells those of its last try."""
        for entry in (self.workdir / "store" / name).glob("*"):
            if not (entry / "manifest.json").exists():
                shutil.rmtree(entry)


def draw_images(count: int, seed: int = 0) -> NDArray[np.integer[Any]]:
    """How often each image counts: all of them once, then the draws of a bootstrap: (1 + `RESAMPLES`, count)."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.ones((1, count), dtype=drawn.dtype), drawn])


def over_seeds(differences: NDArray[np.float64]) -> Comparison:
    """The mean difference in mAP over seeds, see `evaluation.over_trainings`; one seed has an interval over images.

    Args:
        differences: One row per seed: of all images, then of each draw of images: (seeds, 1 + draws).
    """
    if len(differences) > 1:
        return over_trainings(differences)
    low, high = np.percentile(differences[0, 1:], [2.5, 97.5])
    word = "ahead" if low > 0 else "behind" if high < 0 else "undecided"
    return Comparison(float(differences[0, 0]), float(low), float(high), word)


def scores_of_draws(files: Sequence[Path]) -> NDArray[np.float64]:
    """mAP50-95 of evaluations on the same images, of all images and of each draw: (files, 1 + `RESAMPLES`).

    Raises:
        ValueError: They were not all scored on the same images.
    """
    evaluations = [Evaluation.load(file) for file in files]
    names = [[image.name for image in evaluation.images] for evaluation in evaluations]
    if any(other != names[0] for other in names):
        raise ValueError(f"{files[0]}: the other seeds were scored on other images; begin a new work folder")
    weights = draw_images(len(names[0]))
    return np.array([mean_average_precision(evaluation.images, weights) for evaluation in evaluations])


def percent(scores: Sequence[float]) -> str:
    """Mean of shares in per cent, with what they range over."""
    values = 100 * np.array(scores)
    text = f"{values.mean():.1f}"
    return text if len(values) == 1 else f"{text} ({values.min():.1f} to {values.max():.1f})"
