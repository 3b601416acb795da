"""What a search finds, against what people would take instead, when every network begins with the same trained weights.

    python benchmarks/search_quality.py --weights yolov8s.pt --data bccd.tar.gz --imgsz 160 --limit "latency<=60%stock"
    python benchmarks/search_quality.py --weights yolov8s.pt --limit "latency<=60%stock"    # pictures the project draws

The device is probed once. For each search a supernet that begins with the weights is trained for a few epochs, the
space is searched within the limit, and real trainings choose among the candidates (successive halving). Then the arms
are trained to the end with seeds that nothing was chosen by, and scored on the validation split, once for each seed:

    searched    the network that the search and the halving chose;
    rescaled    stock with its width rescaled to the latency of `searched`, chosen by the same halving among the
                roundings of its widths;
    random      the best, by the same halving, of as many random networks at the limit;
    stock       stock, the limit's measure;
    compute     rescaled stock, trained for as many epochs as equal the computing of searching and training.

All arms start from the same checkpoint, sliced to their shape, and learn alike: epochs, images, schedule, and, with
`--distill`, the same teacher (trained stock) in every training, those of the halving too. Computing is counted in
multiply-accumulates times images, which load can't change; a forward and a backward pass count as three forward ones.
Latencies are measured side by side, in the same rounds. Differences are paired by seed and image, with a 95% interval
over both (`arena.over_seeds`).

The work folder keeps everything: the command may be killed and given again at any time, and with more seeds or searches
it goes on from those it has. `--arms` trains a part of the arms, `--report` prints what is finished, and `--toy` shows
in a few minutes that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from arena import over_seeds, scores_of_draws
from setting import inspection_pictures, machine
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.config import RunConfig
from yolov8_nas.data import dataset
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import StageError
from yolov8_nas.evaluation import Evaluation, Evaluator
from yolov8_nas.export.artifact import write_network
from yolov8_nas.files import read_json, write_json
from yolov8_nas.measure.benchmark import Measurement, level, measure
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.measure.protocol import VERIFY
from yolov8_nas.measure.runtime import of_profile
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import LatencyFit, LatencyTable, ResolvedLimit
from yolov8_nas.runner.stage import run_stage, target_labels
from yolov8_nas.search.baseline import TOLERANCE, rescalings
from yolov8_nas.search.evolution import to_the_limit
from yolov8_nas.search.measuring import Bench
from yolov8_nas.search.memo import Memo
from yolov8_nas.search.objective import CostModel, Scorer
from yolov8_nas.search.plan import Plan
from yolov8_nas.search.rescaling import Rescaling
from yolov8_nas.search.searcher import Searcher
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint
from yolov8_nas.stages import find_stage
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.derive import build, save_checkpoint
from yolov8_nas.supernet.learner import draw
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.training import Recipe, train
from yolov8_nas.supernet.warmstart import read_stock, warm_start
from yolov8_nas.train import finetune
from yolov8_nas.train.halving import Result, Rung, halve, schedule
from yolov8_nas.train.quantization import load_network
from yolov8_nas.train.starting import SLICING_IMAGES, Starts, computing

ARMS: Final = ("searched", "rescaled", "random", "stock", "compute")
FRESH: Final = 5000
"""By how much the seeds of the arms' trainings lie from those by which anything was chosen."""

BATCH: Final = 16
TOY: Final = {
    "imgsz": 64, "train": 40, "val": 10, "seeds": 2, "epochs": 3, "supernet_epochs": 1, "generations": 2,
    "population": 6, "candidates": 3, "rungs": ["3x1"], "finalists": 2, "probe_networks": 12, "probe_holdout": 5,
    "bn_images": 16,
}  # fmt: skip


def main() -> None:
    """Parse arguments, search, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="only print what is finished")
    arguments = parsed(parser)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    study = Study(arguments)
    if not arguments.report:
        for number in range(arguments.searches):
            Contest(study, number).hold()
    for number in range(arguments.searches):
        report(study, study.workdir / "searches" / str(number))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a study."""
    parser.add_argument("--workdir", type=Path, default=Path("runs/search_quality"))
    parser.add_argument("--weights", type=Path, required=True, help="a trained stock checkpoint")
    parser.add_argument("--data", help="a dataset: folder or archive; nothing for inspection pictures")
    parser.add_argument("--train", type=int, default=300, help="inspection pictures to train on")
    parser.add_argument("--val", type=int, default=1000, help="inspection pictures to validate on")
    parser.add_argument("--space", default="yolov8s")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--hardware", default="cpu-1t")
    parser.add_argument("--limit", default="latency<=60%stock")
    parser.add_argument("--searches", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each arm with fresh seeds")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--distill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--supernet-epochs", type=int, default=6)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--rungs", nargs="*", default=["12x5", "4x10"], help="networks x epochs of short trainings")
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--probe-networks", type=int, default=60)
    parser.add_argument("--probe-holdout", type=int, default=12)
    parser.add_argument("--bn-images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="a few images and epochs")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; with `--toy` the settings of a toy."""
    arguments = parser.parse_args()
    if arguments.toy:
        for name, value in TOY.items():
            setattr(arguments, name, value)
    return arguments


class Study:
    """What all searches share: data, start, probed device, trained stock.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.workdir: Path = arguments.workdir.absolute()
        self.data_source = arguments.data or str(
            inspection_pictures(self.workdir / "pictures", train=arguments.train, val=arguments.val)
        )
        self.space = SearchSpace.load(arguments.space)
        self.source = read_stock(arguments.weights)
        self.run_id = f"search-quality-{time.time_ns()}"  # a stage that failed is tried again by the next command
        self.prepared = self.stage("data-prep")
        described = dataset.load(self.prepared)
        self.names, self.images = described.classes, described.images["train"]
        self.data = data_yaml(self.prepared, self.folder("views"), validate_on="search")
        self.folds = 4
        limit = Constraint.parse(arguments.limit)
        self.share = limit.limit if limit.relative else None
        calibration = calibration_batches(self.data, arguments.imgsz, SLICING_IMAGES, BATCH, 0)
        names, folder = self.names, self.folder("starts")
        untrained = Supernet(self.space, len(names), names)
        self.starts = Starts("weights", untrained, arguments.weights, calibration, folder)

    def folder(self, *parts: str) -> Path:
        """A folder of the study, made where it is missing."""
        folder = self.workdir.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def config(self) -> RunConfig:
        """The run configuration of the stages that are used as they are."""
        a = self.arguments
        return RunConfig.parse(
            {
                "data": self.data_source,
                "space": a.space,
                "imgsz": a.imgsz,
                "probe": {"networks": a.probe_networks, "holdout": a.probe_holdout, "max_mape": 100 if a.toy else 0.15},
                "targets": [{"hardware": a.hardware, "precision": "fp32", "constraints": [a.limit]}],
            },
            "the arguments",
        )

    def stage(self, name: str, **parameters: Any) -> Path:
        """Run a stage of the pipeline, or take its result from the store; returns the folder of its result.

        Raises:
            StageError: It failed.
        """
        config = self.config()
        outcome = run_stage(
            find_stage(name),
            config=config,
            target=None if name == "data-prep" else target_labels(config)[0],
            inputs={},
            parameters=parameters,
            output=self.workdir / "tars" / f"{name}.tar",
            store=self.workdir / "store",
            run_id=self.run_id,
        )
        if outcome.status == "failed":
            raise StageError(f"{name}: {outcome.error}")
        return self.workdir / "store" / name / outcome.key / "outputs"

    @cached_property
    def probed(self) -> Path:
        """What hw-probe found."""
        return self.stage("hw-probe", num_classes=len(self.names))

    def macs(self, network: Architecture) -> float:
        """Multiply-accumulates of one image."""
        return float(cost(network, len(self.names), self.arguments.imgsz).macs)

    def trained(
        self,
        network: Architecture,
        folder: Path,
        *,
        epochs: int,
        seed: int,
        start_seed: int,
        teacher: DetectionModel | None = None,
        held_out: int | None = None,
    ) -> dict[str, Any]:
        """Train a network from the start, or find it trained.

        Args:
            network: The network.
            folder: The training's own.
            epochs: How long.
            seed: Of order and augmentation.
            start_seed: Of what is new in the network; a network and seed are sliced once.
            teacher: What it learns from beside the labels.
            held_out: Fold of the train split that is not trained on but scored on.

        Returns:
            `score`: mean of the last epochs on the images that chose; `seconds`; `file`: the checkpoint.
        """
        done = folder / "training.json"
        if not done.exists():
            a = self.arguments
            data = self.data
            if held_out is not None:
                views = self.folder("views")
                data = data_yaml(self.prepared, views, validate_on="search", held_out=(held_out, self.folds))
            recipe = finetune.Recipe(epochs, a.batch, a.lr, a.imgsz, seed)
            report = teller(f"{folder.relative_to(self.workdir)}, {epochs} epochs")
            start, _ = self.starts.network(network, start_seed, candidate=True)
            tuned = finetune.train(start, data, recipe, work=folder, teacher=teacher, report=report)
            save_checkpoint(tuned.network, folder / "best.pt", names=self.names, imgsz=a.imgsz)
            (folder / finetune.CHECKPOINT).unlink(missing_ok=True)
            write_json(
                done,
                {
                    "architecture": network.to_dict(),
                    "recipe": asdict(recipe),
                    "score": finetune.average(tuned.curves, recipe.window),
                    "seconds": sum(row["seconds"] for row in tuned.curves),
                    "curves": tuned.curves,
                },
            )
        return {**read_json(done), "file": str(folder / "best.pt")}

    @cached_property
    def teacher(self) -> DetectionModel | None:
        """Trained stock, where networks learn from it."""
        if not self.arguments.distill:
            return None
        epochs = self.arguments.epochs
        trained = self.trained(self.space.stock, self.folder("stock", "0"), epochs=epochs, seed=0, start_seed=0)
        return load_network(Path(trained["file"]))


class Contest:
    """One search, its halvings, and the trainings of all arms with fresh seeds.

    Args:
        study: What all searches share.
        number: Number of the search, from 0; it seeds everything that chooses.
    """

    def __init__(self, study: Study, number: int) -> None:
        self.study, self.number = study, number
        self.arguments = study.arguments
        self.folder = study.folder("searches", str(number))

    def hold(self) -> None:
        """Bring the contest to its end, from wherever it stands."""
        chosen = self.choose()
        epochs = dict.fromkeys(ARMS, self.arguments.epochs)
        epochs["compute"] = self.epochs_of_equal_computing(chosen)
        networks = {**chosen, "stock": self.study.space.stock, "compute": chosen.get("rescaled")}
        self.measure({arm: networks[arm] for arm in ("searched", "rescaled", "random", "stock") if networks.get(arm)})
        evaluator = Evaluator(
            data_yaml(self.study.prepared, self.study.folder("views"), validate_on="val"),
            imgsz=self.arguments.imgsz,
            batch=BATCH,
            work=self.study.folder("evaluation"),
            device="cpu",
        )
        for seed in range(self.arguments.seeds):
            for arm in self.arguments.arms:
                if (network := networks.get(arm)) is None:
                    continue
                base = self.study.folder("stock") if arm == "stock" else self.folder / "arms" / arm
                folder = base / f"{FRESH + seed}"
                folder.mkdir(parents=True, exist_ok=True)
                teacher = None if arm == "stock" else self.study.teacher
                fresh = FRESH + seed
                told = self.study.trained(
                    network, folder, epochs=epochs[arm], seed=fresh, start_seed=fresh, teacher=teacher
                )
                if not (folder / "val.npz").exists():
                    scored = evaluator.evaluate(load_network(Path(told["file"])))
                    scored.save(folder / "val.npz")
                    print(f"{arm}, seed {FRESH + seed}: {100 * scored.map50_95:.1f}", flush=True)

    # Choosing ---------------------------------------------------------------------------------------------------------

    def choose(self) -> dict[str, Architecture]:
        """The networks of the arms that are chosen, each by the same halving."""
        found = self.search()
        arms = set(self.arguments.arms)
        searched = self.halved("searched", [Architecture.from_dict(row["architecture"]) for row in found["candidates"]])
        chosen = {"searched": searched}
        if arms & {"rescaled", "compute"}:
            chosen["rescaled"] = self.halved("rescaled", self.rivals(searched))
        if "random" in arms and found["random"]:
            chosen["random"] = self.halved("random", [Architecture.from_dict(row) for row in found["random"]])
        return chosen

    def rivals(self, searched: Architecture) -> list[Architecture]:
        """Stock rescaled to the latency of the network that was found, in several roundings, all measured beside it."""
        file = self.folder / "rivals.json"
        if not file.exists():
            protocol = replace(VERIFY, max_rounds=24)

            def measured(networks: Sequence[Architecture], name: str) -> list[Measurement]:
                return self.bench.measure(networks, protocol, name, lambda done, total: None)

            (own,) = measured([searched], f"winner-{searched.digest}")
            rescaling = Rescaling(self.study.space.scale, self.price, measured)
            nearest = rescaling.to(searched, own.latency_ms.p50, f"rivals-{searched.digest}")
            like = rescalings(rescaling.scale, self.price, self.price(nearest.architecture))
            networks = list(dict.fromkeys([nearest.architecture, *like]))[: self.arguments.candidates]
            own, *others = measured([searched, *networks], f"rivals-{searched.digest}")
            share = [other.latency_ms.p50 / own.latency_ms.p50 for other in others]
            rows = [
                {"architecture": network.to_dict(), "of_winner": of_winner}
                for network, of_winner in zip(networks, share, strict=True)
                if network == nearest.architecture or abs(of_winner - 1) <= TOLERANCE
            ]
            write_json(file, rows)
        return [Architecture.from_dict(row["architecture"]) for row in read_json(file)]

    def price(self, network: Architecture) -> float:
        """Median latency of a network in milliseconds, as predicted."""
        return float(self.latency_model.predict([network])[0][0])

    @cached_property
    def latency_model(self) -> LatencyModel:
        """The latency model as it was fitted to the probe."""
        return LatencyModel.of(LatencyFit.read(self.study.probed))

    @cached_property
    def bench(self) -> Bench:
        """What measures networks on the device."""
        work, profile = self.folder / "search", Profile.read(self.study.probed)
        runtime, names = of_profile(profile, "fp32"), len(self.study.names)

        def export(network: Architecture) -> Path:
            path = work / "networks" / f"{network.digest}{runtime.suffix}"
            if not path.exists():
                write_network(build(network, names).eval(), path, runtime=runtime, imgsz=self.arguments.imgsz, batch=1)
            return path

        return Bench(
            work, export=export, reference=self.study.space.stock, runtime=runtime, threads=profile.threads, batch=1,
            probed_ms=level(LatencyTable.read(self.study.probed).rows), elsewhere=None, host=HostLock(),
            note=lambda text: print(text, flush=True),
        )  # fmt: skip

    def halved(self, arm: str, networks: Sequence[Architecture]) -> Architecture:
        """The best of some networks by real trainings."""
        a = self.arguments
        short = [Rung(*map(int, rung.split("x"))) for rung in a.rungs]
        rungs = schedule(len(networks), min(a.finalists, len(networks)), a.epochs, short)
        if len(networks) == 1:
            return networks[0]
        if len(rungs) > 1 and rungs[-1].networks == 1:  # the arms train it to the end, with other seeds
            rungs = rungs[:-1]

        def one(i: int, rung: int) -> Result:
            last = rungs[rung].epochs == a.epochs
            folder = self.folder / "halving" / arm / f"{rungs[rung].epochs}-{networks[i].digest}"
            folder.mkdir(parents=True, exist_ok=True)
            told = self.study.trained(
                networks[i],
                folder,
                epochs=rungs[rung].epochs,
                seed=1000 * (self.number + 1) + rung,
                start_seed=self.number,
                teacher=self.study.teacher,
                held_out=None if last else rung % self.study.folds,
            )
            return Result(told["score"], told["seconds"])

        ranking = halve(len(networks), rungs, one)
        write_json(
            self.folder / "halving" / f"{arm}.json",
            {
                "rungs": [asdict(rung) for rung in rungs],
                "computing": self.computing_of_halving(networks, rungs, [len(s.results) for s in ranking], ranking),
                "ranking": [
                    {
                        "architecture": networks[s.entrant].to_dict(),
                        "entered_as": s.entrant,
                        "scores": [result.score for result in s.results],
                        "lead": s.lead,
                    }
                    for s in ranking
                ],
            },
        )
        return networks[ranking[0].entrant]

    def computing_of_halving(
        self, networks: Sequence[Architecture], rungs: Sequence[Rung], lengths: Sequence[int], ranking: Sequence[Any]
    ) -> float:
        """Multiply-accumulates times images of all trainings of a halving, backward and the teacher's passes included.

        One whole training of the winner counts in any case.
        """
        images, epochs = self.study.images, self.arguments.epochs
        trained = [
            (s.entrant, rung.epochs) for s, length in zip(ranking, lengths, strict=True) for rung in rungs[:length]
        ]
        if rungs[-1].epochs < epochs:
            trained.append((ranking[0].entrant, epochs))
        taught_by = self.study.macs(self.study.space.stock) if self.arguments.distill else 0.0
        return sum(
            computing(self.study.macs(networks[entrant]), images, length, taught_by=taught_by)
            for entrant, length in trained
        )

    def epochs_of_equal_computing(self, chosen: dict[str, Architecture]) -> int:
        """For how long rescaled stock can be trained with all the computing that the searched network took."""
        told = read_json(self.folder / "found.json")
        halving = self.folder / "halving" / "searched.json"
        if "rescaled" not in chosen or not halving.exists():
            return self.arguments.epochs
        a, images = self.arguments, self.study.images
        spent = told["computing"] + read_json(halving)["computing"]
        if a.distill:
            spent += 3 * self.study.macs(self.study.space.stock) * images * a.epochs
        return max(a.epochs, round(spent / (3 * self.study.macs(chosen["rescaled"]) * images)))

    # Searching --------------------------------------------------------------------------------------------------------

    def supernet(self) -> Supernet:
        """A supernet that begins with the weights, trained for a while."""
        folder, a = self.folder / "supernet", self.arguments
        if not (folder / "supernet.json").exists():
            folder.mkdir(exist_ok=True)
            torch.manual_seed(self.number)
            supernet = Supernet(self.study.space, len(self.study.names), self.study.names)
            told = warm_start(supernet, self.study.source)
            if a.supernet_epochs:
                recipe = Recipe(
                    imgsz=a.imgsz,
                    epochs=a.supernet_epochs,
                    batch=a.batch,
                    lr=a.lr,
                    random_networks=2,
                    seed=self.number,
                    largest_first=0.0,
                    anchor="stock",
                    near=self.study.share,
                )
                partial = self.folder / "supernet-partial"
                supernet, _ = train(supernet, self.study.data, recipe, partial, Progress.silent())
            supernet.save(folder, {"started": str(told)})
        return Supernet.load(folder)

    def search(self) -> dict[str, Any]:
        """Search, and draw as many random networks at the limit; kept once it is found."""
        file = self.folder / "found.json"
        if file.exists():
            return read_json(file)  # type: ignore[no-any-return]
        study, a, probe = self.study, self.arguments, self.study.probed
        rows = LatencyTable.read(probe).rows
        supernet, work = self.supernet(), self.folder / "search"
        work.mkdir(exist_ok=True)
        costs = CostModel.from_probe(
            [row.constraint for row in ResolvedLimit.read_all(probe)],
            self.latency_model,
            rows,
            num_classes=len(study.names),
            imgsz=a.imgsz,
            batch=1,
        )
        scorer = Scorer(
            supernet,
            study.data,
            imgsz=a.imgsz,
            batch=BATCH,
            bn_images=a.bn_images,
            seed=self.number,
            work=work / "scores",
        )
        memo, counted = Memo(work / "scores.jsonl"), [0.0]

        def score(network: Architecture) -> float:
            counted[0] += study.macs(network) * (a.bn_images + dataset.load(study.prepared).images["search"])
            if network not in memo:
                memo.add(network, scorer(network) if a.supernet_epochs else 0.0)
            return memo[network]

        plan = Plan(
            generations=a.generations, population=a.population, candidates=a.candidates, measure_every=2, prior_steps=0,
            rescaled=False, seed=self.number,
        )  # fmt: skip
        searcher = Searcher(
            supernet, study.data, study.space, costs, plan, score, self.bench.measure, imgsz=a.imgsz, work=work,
            probed_ms=level(rows), progress=lambda done, message, best: None, note=lambda text: print(text, flush=True),
        )  # fmt: skip
        found = searcher.run()
        rng = np.random.default_rng([self.number, 7])
        options = np.array([len(d.options) for d in study.space.dimensions])
        genes, worst = to_the_limit(
            study.space, searcher.price, rng.integers(0, options, size=(4 * a.candidates, len(options))), rng
        )
        drawn = [study.space.decode(g) for g, w in zip(genes.tolist(), worst, strict=True) if w <= 0]
        supernet_macs = 0.0
        if a.supernet_epochs:  # of many steps, each of stock and two random networks
            steps = [draw(supernet, 2, rng, anchor="stock", near=study.share) for _ in range(50)]
            macs = sum(study.macs(network) for step in steps for network in step) / len(steps)
            supernet_macs = 3 * macs * study.images * a.supernet_epochs
        write_json(
            file,
            {
                "machine": machine(Profile.read(probe).threads),
                "candidates": [candidate.to_result().plain() for candidate in found.met],
                "random": [network.to_dict() for network in dict.fromkeys(drawn)][: a.candidates],
                "used": [1 - candidate.slack for candidate in found.met],
                "scored": len(found.trials),
                "computing": counted[0] + supernet_macs,
            },
        )
        return read_json(file)  # type: ignore[no-any-return]

    def measure(self, networks: dict[str, Architecture]) -> None:
        """Latencies side by side, as the exported networks have them."""
        file = self.folder / f"latency-{'-'.join(n.digest for n in networks.values())}.json"
        if not file.exists():
            profile = Profile.read(self.study.probed)
            runtime = of_profile(profile, "fp32")
            files: dict[Architecture, Path] = {}  # two arms may have chosen the same network
            for network in networks.values():
                path = self.folder / "latency" / f"{network.digest}{runtime.suffix}"
                model = build(network, len(self.study.names)).eval()
                if not path.exists():
                    write_network(model, path, runtime=runtime, imgsz=self.arguments.imgsz, batch=1)
                files[network] = path
            with HostLock().measuring():
                found = measure(
                    list(files.values()), threads=profile.threads, runtime=runtime, batch=1,
                    protocol=replace(VERIFY, max_rounds=24), reference=files[networks["stock"]],
                )  # fmt: skip
            latency_ms = {network: one.latency_ms.p50 for network, one in zip(files, found, strict=True)}
            write_json(file, {arm: latency_ms[network] for arm, network in networks.items()})
        write_json(self.folder / "latency.json", read_json(file))


def teller(name: str) -> Callable[[float, float], None]:
    """Progress of a training, a line for each epoch."""
    told, start = [-1], time.monotonic()

    def report(epochs: float, best: float) -> None:
        if int(epochs) > told[0]:
            told[0] = int(epochs)
            print(f"{time.strftime('%H:%M:%S')} {name}: {told[0]} done, {time.monotonic() - start:.0f} s", flush=True)

    return report


def scored(workdir: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """The scored trainings of each arm, by seed."""
    found: dict[str, dict[str, Path]] = {}
    for arm in ARMS:
        base = workdir / "stock" if arm == "stock" else folder / "arms" / arm
        if files := {file.parent.name: file for file in sorted(base.glob("*/val.npz"))}:
            found[arm] = files
    return found


def report(study: Study, folder: Path) -> None:
    """Print what is finished of a search."""
    files = scored(study.workdir, folder)
    latency = read_json(folder / "latency.json") if (folder / "latency.json").exists() else {}
    print(f"\nsearch {folder.name}: mAP50-95 on val, seeds that nothing was chosen by")
    for arm, by_seed in files.items():
        of_stock = latency.get("rescaled" if arm == "compute" else arm, math.nan) / latency.get("stock", math.nan)
        values = [100 * Evaluation.load(file).map50_95 for file in by_seed.values()]
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"  {arm:10} {of_stock:5.3f} of stock's time   mean {np.mean(values):5.1f}   ({each})")
    for arm in ARMS[1:]:
        if both := sorted(set(files.get("searched", {})) & set(files.get(arm, {}))):
            draws = [scores_of_draws([files[name][seed] for seed in both]) for name in ("searched", arm)]
            told = over_seeds(draws[0] - draws[1])
            low, high = 100 * told.low, 100 * told.high
            difference = f"{100 * told.difference:+.1f} ({low:+.1f} to {high:+.1f})"
            print(f"  searched against {arm}: {difference}, {told.word}, {len(both)} seeds")
    if (found := folder / "found.json").exists():
        told = read_json(found)
        whole = 3 * study.macs(study.space.stock) * study.images * study.arguments.epochs
        used = told["used"]
        print(f"  limit used by {len(used)} candidates: {min(used):.3f} to {max(used):.3f}")
        parts = {"search": told["computing"]}
        for file in (folder / "halving").glob("*.json"):
            parts[f"halving of {file.stem}"] = read_json(file)["computing"]
        print("  computing in trainings of stock: " + ", ".join(f"{k} {v / whole:.2f}" for k, v in parts.items()))


if __name__ == "__main__":
    main()
