"""Whether a searched network is better than what people would take instead, on validation images nobody has seen.

    python benchmarks/search_quality.py --workdir runs/search_quality/inspection
    python benchmarks/search_quality.py --workdir runs/search_quality/bccd --data bccd.tar.gz --imgsz 128

For each seed a supernet is trained, a network searched under a limit and fine-tuned, all by the pipeline's own stages.
It is compared with

    random              the best of as many random networks under the same limit, by the same supernet, tuned the same;
    stock, epochs       stock YOLOv8 rescaled in width to the searched network's measured latency, within 2% where
                        widths in steps of 8 allow it, trained from scratch for as many epochs as supernet and
                        fine-tuning had together;
    stock, compute      the same network, trained for as many seconds as supernet, search and fine-tuning took (without
                        the probe of the device, which is made once);
    full stock          stock YOLOv8 of the space's size, the limit's measure, for as many epochs;
    scratch             the searched network itself, trained from scratch for as many epochs as stock: what the
                        architecture is worth without the supernet's weights (`finetune.start: scratch`).

All of them choose their best epoch on the search split; the validation split is scored once. Latencies are measured
side by side, in the same rounds. Differences in mAP50-95 come with a 95% interval: for each seed of a paired bootstrap
over images, over all seeds together of Student's t, with the images' share from the bootstrap.

The work folder keeps everything: the command may be killed and given again at any time, and with more seeds it goes on
from those it has. Run it on a machine that does nothing else: seconds of training are part of the result. `--toy` shows
in a few minutes that it works.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from setting import inspection_pictures, machine

from yolov8_nas.config import RunConfig
from yolov8_nas.data import dataset
from yolov8_nas.deploy import finetune
from yolov8_nas.deploy.onnx import export_onnx
from yolov8_nas.deploy.quantization import load_network
from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import Comparison, Evaluation, Evaluator, mean_average_precision, over_trainings
from yolov8_nas.hardware.benchmark import VERIFY, Measurement, measure
from yolov8_nas.hardware.profile import available_cores
from yolov8_nas.host import HostLock
from yolov8_nas.space import Architecture
from yolov8_nas.stages.stage import run_stage, target_labels
from yolov8_nas.store import atomic_write, pack, read_json, write_json
from yolov8_nas.supernet.derive import build, save_checkpoint

BATCH = 8
EVALUATION_BATCH = 16
RESAMPLES = 2000

ARMS = {
    "random": "best of as many random networks, tuned the same",
    "stock-epochs": "stock rescaled to equal latency, equal epochs",
    "stock-compute": "stock rescaled to equal latency, equal compute",
    "stock": "stock of full size, equal epochs",
    "scratch": "the searched network from scratch, equal epochs",
}
"""What the searched network is compared with."""

PAIRS = [
    *(("searched", arm) for arm in ARMS),
    ("scratch", "stock-epochs"),
    ("scratch", "stock-compute"),
    ("scratch", "stock"),
]

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


def main() -> None:
    """Parse arguments, hold the contests, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/search_quality/inspection"))
    add_arguments(parser)
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    if arguments.toy:
        for name, value in TOY.items():
            setattr(arguments, name, value)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    arena = Arena(arguments)
    if not arguments.report:
        for number in range(arguments.seeds):
            Contest(arena, number).hold()
    report(arguments.workdir, arena)


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
        self.threads: int = read_json(self.probed.folder / "profile.json")["threads"]

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
            name,
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


class Contest:
    """One seed: the searched network and the others, trained, scored and measured.

    Args:
        arena: What all contests share.
        number: Number of the contest, from 0; it seeds everything.
    """

    def __init__(self, arena: Arena, number: int) -> None:
        self.arena, self.number = arena, number
        self.config = arena.config(number)
        self.folder = arena.workdir / "seeds" / str(number)
        self.evaluator: Evaluator | None = None

    def hold(self) -> None:
        """Bring the contest to its end, from wherever it stands."""
        torch.set_num_threads(available_cores())
        if not (self.folder / "result.json").exists():
            self.compare()
        result = read_json(self.folder / "result.json")
        searched = Architecture.from_dict(result["architectures"]["searched"])
        self.score("scratch", self.train("scratch", searched, result["epochs"]["stock-epochs"]))

    def compare(self) -> None:
        """Search, train the others, score and measure them all."""
        arena, number = self.arena, self.number
        base = {"data-prep": arena.prepared.tar}
        supernet = arena.stage("supernet-train", number, base)
        base |= {"supernet-train": supernet.tar}
        arena.forget_unfinished("search")
        search = arena.stage("search", number, {**base, "hw-probe": arena.probed.tar})
        searched, drawn = self.finalists(search)
        tuned = arena.stage("qat-finetune", number, {**base, "search": self.joined(search, searched, drawn)})
        told, searching = read_json(tuned.folder / "finetune.json"), read_json(search.folder / "search.json")
        seconds = {
            "supernet": sum(point["seconds"] for point in read_json(supernet.folder / "curves.json")),
            "search": searching["seconds"] - searching["seconds_comparing"],
            "finetune": told["candidates"][0]["seconds"],
        }
        alone = told["rescaled"]
        epochs = alone["epochs"]
        as_long = round(sum(seconds.values()) / (alone["seconds"] / epochs))
        files = {
            "searched": tuned.folder / "candidates" / "0" / "best.pt",
            "random": tuned.folder / "candidates" / "1" / "best.pt",
            "stock-epochs": tuned.folder / "rescaled" / "best.pt",
            "stock-compute": self.train("stock-compute", Architecture.from_dict(alone["architecture"]), as_long),
            "stock": tuned.folder / "baseline" / "best.pt",
        }
        for arm, file in files.items():
            self.score(arm, file)
        measured = self.measure([self.exported(arm, file) for arm, file in files.items()], "side-by-side.json")
        write_json(
            self.folder / "result.json",
            {
                "machine": machine(self.arena.threads),
                "seconds": seconds,
                "epochs": {arm: as_long if arm == "stock-compute" else epochs for arm in files},
                "architectures": {
                    "searched": searched["architecture"],
                    "random": drawn["architecture"],
                    "rescaled": alone["architecture"],
                },
                "supernet_map50_95": {"searched": searched["map50_95_search"], "random": drawn["map50_95_search"]},
                "latency": {arm: m.to_dict() for arm, m in zip(files, measured, strict=True)},
            },
        )

    def finalists(self, search: Result) -> tuple[dict[str, Any], dict[str, Any]]:
        """The search's first candidate, and the random network that scored best."""
        history = [json.loads(line) for line in (search.folder / "history.jsonl").read_text().splitlines()]
        best = max((row for row in history if row["source"] == "random"), key=lambda row: row["map50_95"])
        drawn = {"architecture": best["architecture"], "map50_95_search": best["map50_95"], "source": "random"}
        return read_json(search.folder / "candidates.json")[0], drawn

    def joined(self, search: Result, *candidates: Mapping[str, Any]) -> Path:
        """The search's result with these candidates instead of its own, so that all are tuned by the same stage."""
        folder = self.folder / "finalists"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(search.folder, folder)
        write_json(folder / "candidates.json", list(candidates))
        tar = self.arena.workdir / "tars" / f"{self.number}-finalists.tar"
        pack(folder, tar)
        return tar

    def train(self, arm: str, network: Architecture, epochs: int) -> Path:
        """Train a network from scratch, as the pipeline trains what it compares with, for so many epochs."""
        file, c = self.folder / f"{arm}.pt", self.config
        if file.exists():
            return file
        recipe = finetune.Recipe(epochs, c.finetune.batch, c.supernet.lr, c.imgsz, c.seed)
        work = self.folder / "partial" / arm
        torch.manual_seed(c.seed)
        with HostLock().computing():
            trained = finetune.train(
                build(network, len(self.arena.classes), self.arena.classes),
                dataset.data_yaml(self.arena.prepared.folder, self.folder / "views", validate_on="search"),
                recipe,
                work=work,
            )
        curves = {"recipe": asdict(recipe), "best_epoch": trained.epoch, "curves": trained.curves}
        write_json(file.with_suffix(".json"), curves)
        save_checkpoint(trained.network, file, names=self.arena.classes, imgsz=c.imgsz)
        shutil.rmtree(work)
        return file

    def score(self, arm: str, file: Path) -> None:
        """Score a network on the validation split, once."""
        into = self.folder / f"{arm}.npz"
        if into.exists():
            return
        if self.evaluator is None:
            data = dataset.data_yaml(self.arena.prepared.folder, self.folder / "views", validate_on="val")
            self.evaluator = Evaluator(data, imgsz=self.config.imgsz, batch=EVALUATION_BATCH, work=self.folder / "work")
        with HostLock().computing():
            self.evaluator.evaluate(load_network(file).fuse(verbose=False)).save(into)

    def exported(self, arm: str, file: Path) -> Path:
        """A trained network's file."""
        return export_onnx(load_network(file), self.folder / "networks" / f"{arm}.onnx", imgsz=self.config.imgsz)

    def measure(self, files: Sequence[Path], checkpoint: str) -> list[Measurement]:
        """Measure networks in the same rounds."""
        with HostLock().measuring():
            protocol = replace(VERIFY, seed=self.number)
            return measure(files, threads=self.arena.threads, protocol=protocol, checkpoint=self.folder / checkpoint)


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


def report(workdir: Path, arena: Arena) -> None:
    """Print the tables, and write them with everything behind them."""
    folders = sorted((file.parent for file in workdir.glob("seeds/*/scratch.npz")), key=lambda f: int(f.name))
    if not folders:
        print("no seed is finished yet")
        return
    results = [read_json(folder / "result.json") for folder in folders]
    scores = {arm: scores_of_draws([folder / f"{arm}.npz" for folder in folders]) for arm in ("searched", *ARMS)}
    rows: list[dict[str, Any]] = []
    for first, arm in PAIRS:
        differences = scores[first] - scores[arm]
        rows.append(
            {
                "of": first,
                "arm": arm,
                "map50_95": scores[arm][:, 0].tolist(),
                "latency_ratio": [p50(result, arm) / p50(result, first) for result in results],
                "epochs": [result["epochs"][_measured_as(arm, "stock-epochs")] for result in results],
                "by_seed": [asdict(over_seeds(row[None])) for row in differences],
                "over_seeds": asdict(over_seeds(differences)),
            }
        )
    text = markdown(arena, results, scores["searched"][:, 0].tolist(), rows)
    print(text)
    atomic_write(workdir / "report.md", text)
    write_json(workdir / "report.json", {"arguments": vars(arena.arguments) | {"workdir": str(workdir)}, "rows": rows})


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


def p50(result: Mapping[str, Any], arm: str) -> float:
    """Median latency of a contest's network in milliseconds."""
    return float(result["latency"][_measured_as(arm, "searched")]["latency_ms"]["p50"])


def _measured_as(arm: str, stand_in: str) -> str:
    """The arm whose record is that of another: from scratch, the searched network is the same architecture."""
    return stand_in if arm == "scratch" else arm


def markdown(
    arena: Arena, results: Sequence[Mapping[str, Any]], searched: Sequence[float], rows: Sequence[Mapping[str, Any]]
) -> str:
    """The tables for the README."""
    a, seconds = arena.arguments, {k: np.mean([r["seconds"][k] for r in results]) for k in results[0]["seconds"]}
    lines = [
        f"{arena.images['train']} training images, {arena.images['search']} for the search, {arena.images['val']} for "
        f"validation, {a.imgsz} px; space {a.space}, {a.limit}, FP32; {len(results)} seeds; {results[0]['machine']}. "
        f"Supernet {seconds['supernet']:.0f} s, search {seconds['search']:.0f} s, fine-tuning "
        f"{seconds['finetune']:.0f} s. The searched network has mAP50-95 {percent(searched)}%.",
        "",
        "| network | compared with | epochs | its mAP50-95, % | difference, points | 95% interval | the first is | its "
        "latency, the first = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        c, epochs = row["over_seeds"], "/".join(map(str, dict.fromkeys(row["epochs"])))
        lines.append(
            f"| {row['of']} | {ARMS[row['arm']]} | {epochs} | {percent(row['map50_95'])} "
            f"| {100 * c['difference']:+.2f} | {100 * c['low']:+.2f} to {100 * c['high']:+.2f} | **{c['word']}** "
            f"| {np.mean(row['latency_ratio']):.3f} |"
        )
    lines += [
        "",
        "| seed | network | compared with | difference, points | 95% interval | the first is |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for seed, c in enumerate(row["by_seed"]):
            lines.append(
                f"| {seed} | {row['of']} | {ARMS[row['arm']]} | {100 * c['difference']:+.2f} "
                f"| {100 * c['low']:+.2f} to {100 * c['high']:+.2f} | {c['word']} |"
            )
    return "\n".join(lines) + "\n"


def percent(scores: Sequence[float]) -> str:
    """Mean of shares in per cent, with what they range over."""
    values = 100 * np.array(scores)
    text = f"{values.mean():.1f}"
    return text if len(values) == 1 else f"{text} ({values.min():.1f} to {values.max():.1f})"


if __name__ == "__main__":
    main()
