"""qat-finetune: real trainings choose among the search's candidates; the chosen ones and stock are trained to the end.

All candidates enter a successive halving (`train.halving`), from the same start. A short training is scored on the
search split and on a fold of the train split that it does not see, another one in each rung: the search split alone is
small, and has served the supernet's scores before. Ultralytics' trainer validates after each epoch anyway, so this
costs nothing but the fold's images, which are not trained on, and all networks of a rung are asked the same. The score
is the mean over the last epochs (`Recipe.window`). Whole trainings see all images of the train split, as stock's do;
what a network scored on the folds counts in the accuracy that is expected of it, by which trt-export ships.

Every training has a folder of its own in `partial` and goes on from its last epoch. Stock's, in floating point, is a
part of its own in the store: it is the same for every target, so the first one trains it and the others find it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from yolov8_nas.config import RunConfig, Start, TargetConfig
from yolov8_nas.files import read_json, write_json
from yolov8_nas.runner.stage import Settings, Stage, StageContext

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.space import Architecture
    from yolov8_nas.train.finetune import Recipe, Trained
    from yolov8_nas.train.halving import Result, Rung, Standing
    from yolov8_nas.train.starting import Begun

CALIBRATION_IMAGES: Final = 256
"""Training images from which BatchNorm statistics and INT8 ranges come."""

QAT_LR: Final = 0.1
"""Peak learning rate of quantization-aware training as a share of fine-tuning's: the network only has to adapt."""

STOCK: Final = "stock-trainings"
"""Folder of the store with the trainings of stock that targets and runs share."""

FOLDS: Final = 4
"""Folds of the train split; a short training leaves one of them out."""

RUNG_SEED: Final = 1000
"""By how much the seeds of one rung and the next lie apart: their luck shall not be the same."""

RESERVE: Final = 0.02
"""Share of its tightest limit that a network leaves unused, as measured, to count as one that keeps it in any hour."""

TRIAL_SEED: Final = 100
"""By how much the seeds of two trainings of one network lie apart."""

QAT_COST: Final = 3
"""What an epoch with fake quantization counts in progress; one without counts 1."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the trainings depend on beside their inputs."""
    from yolov8_nas.stages import supernet_train

    assert target is not None
    supernet = supernet_train.settings(config, None)
    int8 = target.precision in ("int8", "best")
    return {
        "finetune": {**config.finetune.model_dump(exclude={"nms_free"}), "start": config.start},
        **config.finetune.head(),
        "supernet": {name: supernet[name] for name in ("epochs", "lr", "weights")},
        "int8": int8,
        **config.quantization.settings(int8=int8),
        "imgsz": config.imgsz,
        "seed": config.seed,
    }


def run(ctx: StageContext) -> None:
    """Write `candidates/<i>/{subnet.pt,best.pt,ptq.pt,qat.pt,tuning.json}`, `rungs/<r>/<i>.json` and `finetune.json`.

    `i` is a candidate's index in the search's `candidates.json`, `r` the number of a short rung. The same without
    `subnet.pt` for `baseline` (stock) and `rescaled` (stock at the best candidate's latency), where they are asked for.

    Raises:
        StageError: A training diverged.
    """
    with ctx.host.computing():
        _Finetuning(ctx).run()


STAGE = Stage(name="qat-finetune", version=7, settings=settings, run=run, watched=True)


@dataclass(frozen=True)
class _Entrant:
    """A network that is trained.

    Attributes:
        name: Of its trainings.
        architecture: What it is.
        seed: Of its whole training; those of short ones follow from it.
    """

    name: str
    architecture: Architecture
    seed: int


@dataclass(frozen=True)
class _Arm:
    """Networks that are trained alike, and among which one is chosen.

    Attributes:
        kind: Whose they are.
        entrants: The networks.
        rungs: Of their halving; the last one is whole trainings.
        recipe: Of whole trainings, but for the seed.
    """

    kind: Literal["candidates", "baseline", "rescaled"]
    entrants: tuple[_Entrant, ...]
    rungs: tuple[Rung, ...]
    recipe: Recipe


class _Finetuning:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        import torch

        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.device.profile import available_cores
        from yolov8_nas.space import Architecture
        from yolov8_nas.supernet.batchnorm import calibration_batches
        from yolov8_nas.supernet.supernet import Supernet
        from yolov8_nas.train.halving import Rung, epochs_of
        from yolov8_nas.train.starting import Starts

        self.ctx = ctx
        self.options = ctx.settings["finetune"]
        self.imgsz: int = ctx.settings["imgsz"]
        self.seed: int = ctx.settings["seed"]
        torch.set_num_threads(available_cores())  # what importing Ultralytics left would be one, or depend on the order
        self.device = "0" if torch.cuda.is_available() else "cpu"
        self.supernet = Supernet.load(ctx.inputs["supernet-train"])
        self.names = list(self.supernet.names)
        self.data = data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
        self.calibration = calibration_batches(
            self.data, self.imgsz, CALIBRATION_IMAGES, self.options["batch"], self.seed
        )
        self.found: list[dict[str, Any]] = read_json(ctx.inputs["search"] / "candidates.json")
        found = [Architecture.from_dict(candidate["architecture"]) for candidate in self.found]
        # From weights, all learn for as long. Otherwise stock, and candidates that do not begin with the supernet,
        # learn for as many epochs as the supernet and the fine-tuning together, with the supernet's learning rate: none
        # has seen the data more often than another.
        start: Start = self.options["start"]
        weights, whole = ctx.settings["supernet"]["weights"], ctx.settings["supernet"]
        self.starts = Starts(
            start, self.supernet, Path(weights["path"]) if weights else None, self.calibration, ctx.partial / "starts"
        )
        self.images: int = read_json(ctx.inputs["data-prep"] / "dataset.json")["images"]["train"]
        long = self._recipe(whole["epochs"] + self.options["epochs"], whole["lr"])
        fine = self._recipe(self.options["epochs"], self.options["lr"])
        tuning = long if start == "scratch" else fine
        self.rivals = fine if start == "weights" else long
        self.qat = self._recipe(self.options["qat_epochs"], QAT_LR * self.options["lr"], mosaic=False)
        entrants = tuple(_Entrant(f"candidate {i}", one, self.seed) for i, one in enumerate(found))
        self.candidates = _Arm("candidates", entrants, self._rungs(tuning), tuning)
        asked: str = self.options["baseline"]
        self.distilled: bool = self.options["distill"]
        self.with_stock, self.with_rescaled = asked in ("stock", "both"), asked in ("rescaled", "both")
        # Stock gets as many whole trainings as the candidates: the best of several is luck that it must have, too.
        trials = self.candidates.rungs[-1].networks if self.with_stock else int(self.distilled)
        stock = self._trials("stock", [self.supernet.space.stock], trials)
        self.stock = _Arm("baseline", stock, (Rung(trials, self.rivals.epochs),), self.rivals)

        qat_cost = QAT_COST * self.qat.epochs if ctx.settings["int8"] else 0
        self.total = epochs_of(self.candidates.rungs) + self.candidates.rungs[-1].networks * qat_cost
        self.total += epochs_of(self.stock.rungs) + self.with_stock * qat_cost
        if self.with_rescaled:
            self.total += epochs_of(self._rungs(self.rivals)) + qat_cost
        self.done = 0.0
        self.begun: dict[str, Begun] = {}  # what each whole training began with

    def run(self) -> None:
        """Train everything, one after the other."""
        result: dict[str, Any] = {"candidates": [], "baseline": None, "rescaled": None, "qat": asdict(self.qat)}
        budget = self._tell_budget()
        teacher: DetectionModel | None = None
        if self.stock.entrants:  # first: it teaches the others
            ranking, trained = self._halve(self.stock)
            if self.with_stock:
                result["baseline"] = self._rival(self.stock, ranking, trained)
            if self.distilled:
                teacher = trained[ranking[0].entrant].network
        ranking, trained = self._halve(self.candidates, teacher)
        result["candidates"] = [self._candidate(one, trained[one.entrant]) for one in ranking if one.entrant in trained]
        result["halving"] = {"budget": budget, **_table(self.candidates, ranking)}
        if self.with_rescaled:
            rescaled, told = self._rescaled(ranking[0].entrant)
            ranking, trained = self._halve(rescaled, teacher)
            result["rescaled"] = {**self._rival(rescaled, ranking, trained), **told}
        write_json(self.ctx.out / "finetune.json", result)

    def _rungs(self, recipe: Recipe) -> tuple[Rung, ...]:
        """The trainings among which one is chosen, of candidates or of what they are compared with."""
        from yolov8_nas.train.halving import Rung, schedule

        asked = self.options["rungs"]
        short: Sequence[Rung] | Literal["auto"] = "auto" if asked == "auto" else [Rung(**rung) for rung in asked]
        return schedule(len(self.found), self.options["candidates"], recipe.epochs, short)

    def _trials(self, name: str, architectures: Sequence[Architecture], count: int) -> tuple[_Entrant, ...]:
        """So many trainings: of each network one after the other, then of all of them again with another seed."""
        return tuple(
            _Entrant(
                f"{name}, trial {i + 1}" if i else name,
                architectures[i % len(architectures)],
                self.seed + TRIAL_SEED * (i // len(architectures)),
            )
            for i in range(count)
        )

    def _tell_budget(self) -> dict[str, float]:
        """What the choice takes at most: epochs, and computing as a multiple of a training of stock.

        Computing is multiply-accumulates times images; which networks go on is not known yet, so the largest are
        reckoned with.
        """
        from yolov8_nas.space.cost import cost
        from yolov8_nas.train.halving import epochs_of

        def macs(architecture: Architecture) -> float:
            return cost(architecture, len(self.names), self.imgsz).macs

        rungs = self.candidates.rungs
        entering = [macs(one.architecture) for one in self.candidates.entrants[: rungs[0].networks]]
        largest = sorted(entering, reverse=True)
        work = sum(sum(largest[: rung.networks]) * rung.epochs for rung in rungs)
        whole = macs(self.supernet.space.stock) * self.rivals.epochs
        trainings = round(work / whole, 3)
        if len(rungs) > 1:
            steps = ", then ".join(f"{rung.networks} for {rung.epochs} epochs" for rung in rungs)
            self.ctx.progress.note(
                f"real trainings choose: {steps}; at most the computing of {trainings:.3g} trainings of stock"
            )
        if self.distilled and not self.with_stock:
            self.ctx.progress.note(
                f"finetune.distill takes a training of stock for {self.rivals.epochs} epochs, which "
                f"finetune.baseline = {self.options['baseline']} does not ask for"
            )
        return {"epochs": epochs_of(rungs), "stock_trainings": trainings, "taught_by_stock": float(self.distilled)}

    def _halve(self, arm: _Arm, teacher: DetectionModel | None = None) -> tuple[list[Standing], dict[int, Trained]]:
        """Train the networks of an arm, rung by rung; returns their ranking, and those that were trained to the end.

        A teacher teaches whole trainings only: short ones have to tell networks apart, which they do as well without
        the time that it takes.
        """
        from yolov8_nas.train.finetune import average
        from yolov8_nas.train.halving import Result, halve

        whole: dict[int, Trained] = {}

        def train(i: int, rung: int) -> Result:
            if rung < len(arm.rungs) - 1:
                return self._short(arm, i, rung)
            entrant = arm.entrants[i]
            recipe = replace(arm.recipe, seed=entrant.seed)
            network, self.begun[entrant.name] = self._start(arm, entrant)
            carry_out = self._shared if arm is self.stock else self._carry_out
            whole[i] = carry_out(entrant.name, self._headed(network), recipe, teacher=teacher)
            score = average(whole[i].curves[: whole[i].epoch], recipe.window)
            return Result(score, {"seconds": sum(row["seconds"] for row in whole[i].curves)})

        # Networks that use all of a limit may miss it when their files are measured; then one that does not is there.
        spare = {i for i, row in enumerate(self.found) if (row.get("slack") or 0) >= RESERVE}
        return halve(len(arm.entrants), arm.rungs, train, spare if arm is self.candidates else frozenset()), whole

    def _short(self, arm: _Arm, i: int, rung: int) -> Result:
        """Train a network for a while, without a fold of the images; the score is that of the fold and the rest."""
        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.train.finetune import CHECKPOINT, average
        from yolov8_nas.train.halving import Result

        entrant = arm.entrants[i]
        recipe = replace(arm.recipe, epochs=arm.rungs[rung].epochs, seed=entrant.seed + RUNG_SEED * (rung + 1))
        name = f"rung {rung + 1}, {entrant.name}"
        work = self._work(name)
        kept = work / "scored.json"
        if kept.exists():
            told = read_json(kept)
            self.done += recipe.epochs
        else:
            data = data_yaml(
                self.ctx.inputs["data-prep"], self.ctx.partial, validate_on="search", held_out=(rung % FOLDS, FOLDS)
            )
            network, begun = self._start(arm, entrant)
            trained = self._carry_out(name, self._headed(network), recipe, data=data)
            told = {
                "index": i,
                "architecture": entrant.architecture.to_dict(),
                "start": begun.start,
                "begun_with": begun.told,
                "recipe": asdict(recipe),
                "score": average(trained.curves, recipe.window),
                "seconds": round(sum(row["seconds"] for row in trained.curves), 1),
                "curves": trained.curves,
            }
            write_json(kept, told)
            (work / CHECKPOINT).unlink(missing_ok=True)  # all that is asked of it is known
        folder = self.ctx.out if arm is self.candidates else self.ctx.out / arm.kind
        write_json(folder / "rungs" / str(rung + 1) / f"{i}.json", told)
        return Result(told["score"], {"seconds": told["seconds"]})

    def _candidate(self, standing: Standing, trained: Trained) -> dict[str, Any]:
        """Write a candidate that was trained to the end; returns its row of the summary."""
        from yolov8_nas.supernet.batchnorm import recalibrate
        from yolov8_nas.supernet.derive import derive, save_checkpoint

        entrant = self.candidates.entrants[standing.entrant]
        folder = self.ctx.out / "candidates" / str(standing.entrant)
        folder.mkdir(parents=True)
        subnet = derive(self.supernet, entrant.architecture)
        recalibrate(subnet, self.calibration)
        save_checkpoint(subnet, folder / "subnet.pt", names=self.names, imgsz=self.imgsz)
        tuned = self._write(self.candidates, entrant, trained, folder)
        return {"index": standing.entrant, "expected": standing.expected, **tuned}

    def _rival(self, arm: _Arm, ranking: Sequence[Standing], trained: Mapping[int, Trained]) -> dict[str, Any]:
        """Write the best stock network, as it is or rescaled; returns its row of the summary."""
        best = ranking[0].entrant
        entrant, stock = arm.entrants[best], self.supernet.space.stock
        folder = self.ctx.out / arm.kind
        folder.mkdir(exist_ok=True)
        known_as = f"YOLOv8{self.supernet.space.scale}"
        if entrant.architecture != stock:
            known_as += f" at {entrant.architecture.sppf_width / stock.sppf_width:.2f} of its width"
        tuned = self._write(arm, entrant, trained[best], folder)
        # Unrolled, C2f is the same function in the form in which the candidates ship: like is compared with like.
        return {"name": known_as, "form": "unrolled", **tuned, "halving": _table(arm, ranking)}

    def _rescaled(self, winner: int) -> tuple[_Arm, dict[str, Any]]:
        """Rescaled stock at the latency of the best candidate, with as many trainings as the candidates had.

        What they have is other architectures; what rescaled stock has is other roundings of its widths, as far as they
        take as long, and other seeds.
        """
        candidate = self.found[winner]
        latency_ms: float | None = (candidate.get("measured") or {}).get("latency_ms", {}).get("p50")
        digest = self.candidates.entrants[winner].architecture.digest
        rows = rivals_of(self.ctx.inputs["search"] / "rescaled.json", digest, latency_ms)
        rungs = self._rungs(self.rivals)
        entrants = self._trials("rescaled", [architecture for architecture, _ in rows], rungs[0].networks)
        told = {"latency_ms": [ms for _, ms in rows], "for": digest, "for_ms": latency_ms}
        return _Arm("rescaled", entrants, rungs, self.rivals), {"equal_latency": told}

    def _start(self, arm: _Arm, entrant: _Entrant) -> tuple[DetectionModel, Begun]:
        """A network at the start of a training, the same in every rung; and what it begins with."""
        return self.starts.network(entrant.architecture, entrant.seed, candidate=arm is self.candidates)

    def _headed(self, network: DetectionModel) -> DetectionModel:
        """A network with the head that was asked for."""
        from yolov8_nas.supernet.derive import add_one_to_one

        if self.ctx.settings.get("nms_free"):
            add_one_to_one(network)
        return network

    def _write(self, arm: _Arm, entrant: _Entrant, tuned: Trained, folder: Path) -> dict[str, Any]:
        """Write a trained network, and train it for INT8 where that is asked for; returns its row of the summary."""
        from yolov8_nas.supernet.derive import save_checkpoint
        from yolov8_nas.train.finetune import average
        from yolov8_nas.train.quantization import quantize, save_qat_checkpoint

        save_checkpoint(tuned.network, folder / "best.pt", names=self.names, imgsz=self.imgsz)
        score = {"fp32": tuned.curves[tuned.epoch - 1]["map50_95"]}
        best_epoch = {"fp32": tuned.epoch}
        quantized: Trained | None = None
        if self.ctx.settings["int8"]:
            keep_float = self.ctx.settings.get("keep_float", ())
            observed = quantize(deepcopy(tuned.network), self.calibration, keep_float)
            # What INT8 costs without training for it: what the training is compared with.
            save_qat_checkpoint(observed, folder / "ptq.pt", names=self.names, imgsz=self.imgsz)
            quantized = self._carry_out(f"{entrant.name}, INT8", observed, self.qat, teacher=tuned.network)
            save_qat_checkpoint(quantized.network, folder / "qat.pt", names=self.names, imgsz=self.imgsz)
            score["int8"] = quantized.curves[quantized.epoch - 1]["map50_95"]
            best_epoch["int8"] = quantized.epoch
        recipe, begun = replace(arm.recipe, seed=entrant.seed), self.begun[entrant.name]
        row = {
            "map50_95": score,
            "average": average(tuned.curves[: tuned.epoch], recipe.window),
            "best_epoch": best_epoch,
            "start": begun.start,
            "begun_with": begun.told,
            "computing": self._computing(arm, entrant),
            "distilled": self.distilled and arm is not self.stock,
            "epochs": recipe.epochs,
            "recipe": asdict(recipe),
            "seconds": round(sum(r["seconds"] for t in (tuned, quantized) if t for r in t.curves), 1),
        }
        tuning = {"architecture": entrant.architecture.to_dict(), "curves": tuned.curves, **row}
        if quantized:
            tuning["qat_curves"] = quantized.curves
        write_json(folder / "tuning.json", tuning)
        return {"architecture": entrant.architecture.to_dict(), **row}

    def _computing(self, arm: _Arm, entrant: _Entrant) -> dict[str, float]:
        """Multiply-accumulates of a network's whole trainings; see `starting.computing`."""
        from yolov8_nas.space.cost import cost
        from yolov8_nas.train.starting import computing

        def macs(architecture: Architecture) -> float:
            return cost(architecture, len(self.names), self.imgsz).macs

        own, teacher = macs(entrant.architecture), macs(self.supernet.space.stock)
        taught_by = teacher if self.distilled and arm is not self.stock else 0.0
        told = {"training": computing(own, self.images, arm.recipe.epochs, taught_by=taught_by)}
        if self.ctx.settings["int8"]:
            told["int8"] = computing(own, self.images, self.qat.epochs, taught_by=own)
        return told

    def _shared(self, name: str, network: DetectionModel, recipe: Recipe, *, teacher: None = None) -> Trained:
        """Train stock in floating point, or find it trained; nothing teaches it."""
        from yolov8_nas.supernet.derive import save_checkpoint
        from yolov8_nas.train.finetune import Trained
        from yolov8_nas.train.quantization import load_network

        weights = self.ctx.settings["supernet"]["weights"]
        begun = self.begun[name].start
        settings = {
            "dataset": read_json(self.ctx.inputs["data-prep"] / "dataset.json")["digest"],
            "architecture": self.supernet.space.stock.to_dict(),
            "start": {"kind": begun, "sha256": weights["sha256"] if begun == "weights" else None},
            "recipe": asdict(recipe),
            "nms_free": self.ctx.settings.get("nms_free", False),
        }

        def make(part: StageContext) -> None:
            trained = self._carry_out(name, network, recipe, partial=part.partial)
            save_checkpoint(trained.network, part.out / "best.pt", names=self.names, imgsz=self.imgsz)
            write_json(part.out / "training.json", {"epoch": trained.epoch, "curves": trained.curves})

        found = self.ctx.partial / f".{self._work(name).name}"
        found.mkdir(exist_ok=True)
        done = self.done + recipe.epochs
        replace(self.ctx, out=found).share(STOCK, STAGE.version, settings, make)
        self.done = done
        training = read_json(found / "training.json")
        network.load_state_dict(load_network(found / "best.pt").state_dict())
        return Trained(network.eval(), training["epoch"], training["curves"])

    def _carry_out(
        self,
        name: str,
        network: DetectionModel,
        recipe: Recipe,
        *,
        data: Path | None = None,
        teacher: DetectionModel | None = None,
        partial: Path | None = None,
    ) -> Trained:
        """Train a network, with its checkpoints in the stage's `partial` or another one."""
        from ultralytics.utils.torch_utils import is_qat

        from yolov8_nas.train.finetune import train

        weight = QAT_COST if is_qat(network) else 1

        def report(epochs: float, best: float) -> None:
            figures = {"map50_95": best} if best >= 0 else {}
            message = f"{name}: epoch {min(int(epochs) + 1, recipe.epochs)} of {recipe.epochs}"
            self.ctx.progress.update(self.done + weight * epochs, self.total, message, **figures)

        work = self._work(name, partial)
        data = data or self.data
        trained = train(network, data, recipe, work=work, teacher=teacher, report=report, device=self.device)
        self.done += weight * recipe.epochs
        return trained

    def _work(self, name: str, partial: Path | None = None) -> Path:
        """The folder of a training."""
        return (partial or self.ctx.partial) / "trainings" / name.replace(", ", "-").replace(" ", "-").lower()

    def _recipe(self, epochs: int, lr: float, *, mosaic: bool = True) -> Recipe:
        from yolov8_nas.train.finetune import Recipe

        return Recipe(epochs, self.options["batch"], lr, self.imgsz, self.seed, mosaic)


def rivals_of(file: Path, digest: str, latency_ms: float | None) -> list[tuple[Architecture, float]]:
    """The rescaled stock networks that are as fast as a candidate, with their latency in milliseconds.

    `rescaled.json` is a list of `{"architecture": ..., "latency_ms": ..., "for": digest of a candidate}`, several for
    each candidate: stock with its widths multiplied by one factor, within `search.baseline.TOLERANCE` of the
    candidate's measured latency where any is. A single such mapping, without `for`, is a list of one.

    Args:
        file: The file.
        digest: Digest of the candidate's architecture.
        latency_ms: Its measured latency.

    Returns:
        Those that were made for it. Without any, those within the tolerance that were made for others, and if there are
        none, the nearest.
    """
    from yolov8_nas.search.baseline import TOLERANCE
    from yolov8_nas.space import Architecture

    content = read_json(file)
    rows = content if isinstance(content, list) else [content]
    mine = [row for row in rows if row.get("for") == digest]
    if not mine and latency_ms:

        def distance(row: Mapping[str, Any]) -> float:
            return abs(math.log(row["latency_ms"] / latency_ms))

        near = [row for row in rows if distance(row) <= math.log(1 + TOLERANCE)]
        mine = near or [min(rows, key=distance)]
    found = {Architecture.from_dict(row["architecture"]): float(row["latency_ms"]) for row in mine or rows[:1]}
    return list(found.items())


def _table(arm: _Arm, ranking: Sequence[Standing]) -> dict[str, Any]:
    """What the halving of an arm did, as it stands in `finetune.json`."""
    return {
        "rungs": [{**asdict(rung), "folds": FOLDS} for rung in arm.rungs[:-1]] + [asdict(arm.rungs[-1])],
        "ranking": [
            {
                "index": one.entrant,
                "seed": arm.entrants[one.entrant].seed,
                "architecture": arm.entrants[one.entrant].architecture.to_dict(),
                "scores": [told.score for told in one.results],
                "lead": one.lead,
                "expected": one.expected,
                "seconds": round(sum(told.told["seconds"] for told in one.results), 1),
            }
            for one in ranking
        ],
    }
