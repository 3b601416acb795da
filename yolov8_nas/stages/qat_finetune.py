"""qat-finetune: real trainings choose among the search's candidates; the chosen ones and stock are trained to the end.

All candidates enter a successive halving (`deploy.halving`), from the same start. A short training is scored on the
search split and on a fold of the train split that it does not see, another one in each rung: the search split alone is
small, and has served the supernet's scores before. Ultralytics' trainer validates after each epoch anyway, so this
costs nothing but the fold's images, which are not trained on, and all networks of a rung are asked the same. The score
is the mean over the last epochs (`Recipe.window`). Whole trainings see all images of the train split, as stock's do;
what a network scored on the folds counts in the accuracy that is expected of it, by which trt-export ships.

Every training has a folder of its own in `partial` and goes on from its last epoch. Stock's, in floating point, is a
part of its own in the store: it is the same for every target, so the first one trains it and the others find it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.stages.stage import Settings, Stage, StageContext
from yolov8_nas.store import read_json, write_json

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.deploy.finetune import Recipe, Trained
    from yolov8_nas.deploy.halving import Result
    from yolov8_nas.space import Architecture

Start: TypeAlias = Literal["supernet", "weights", "scratch"]
"""What a training starts from: the supernet, the weights that the supernet itself started from, or random weights."""

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

QAT_COST: Final = 3
"""What an epoch with fake quantization counts in progress; one without counts 1."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the trainings depend on beside their inputs."""
    from yolov8_nas.stages import supernet_train

    assert target is not None
    supernet = supernet_train.settings(config, None)
    int8 = target.precision in ("int8", "best")
    return {
        "finetune": config.finetune.model_dump(exclude={"nms_free"}),
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


STAGE = Stage(name="qat-finetune", version=5, settings=settings, run=run, watched=True)


class _Finetuning:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        import torch

        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.deploy.halving import Rung, epochs_of, schedule
        from yolov8_nas.hardware.profile import available_cores
        from yolov8_nas.space import Architecture
        from yolov8_nas.supernet.batchnorm import calibration_batches
        from yolov8_nas.supernet.supernet import Supernet

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
        found = read_json(ctx.inputs["search"] / "candidates.json")
        self.candidates = [Architecture.from_dict(candidate["architecture"]) for candidate in found]
        # What does not start from the supernet (stock, and the candidates where that is asked for) learns for as many
        # epochs as the supernet and the fine-tuning together, so that none has seen the data more often than another,
        # and with the supernet's learning rate.
        whole = ctx.settings["supernet"]
        self.from_scratch = self._recipe(whole["epochs"] + self.options["epochs"], whole["lr"])
        fine = self._recipe(self.options["epochs"], self.options["lr"])
        self.tuning = self.from_scratch if self.options["from_scratch"] else fine
        self.qat = self._recipe(self.options["qat_epochs"], QAT_LR * self.options["lr"], mosaic=False)
        asked_for = self.options["rungs"]
        self.rungs = schedule(
            len(self.candidates),
            self.options["candidates"],
            self.tuning.epochs,
            "auto" if asked_for == "auto" else [Rung(**rung) for rung in asked_for],
        )
        qat_cost = QAT_COST * self.qat.epochs if ctx.settings["int8"] else 0
        self.total = epochs_of(self.rungs) + self.rungs[-1].networks * qat_cost
        # The networks that are trained for comparison, by the name of their folder.
        asked = self.options["baseline"]
        self.rivals: dict[str, Architecture] = {}
        if asked in ("stock", "both"):
            self.rivals["baseline"] = self.supernet.space.stock
        if asked in ("rescaled", "both"):
            rescaled = read_json(ctx.inputs["search"] / "rescaled.json")
            self.rivals["rescaled"] = Architecture.from_dict(rescaled["architecture"])
        self.total += len(self.rivals) * (self.from_scratch.epochs + qat_cost)
        self.done = 0.0

    def run(self) -> None:
        """Train everything, one after the other."""
        from yolov8_nas.deploy.halving import Result, halve

        rows: dict[int, dict[str, Any]] = {}

        def trained(entrant: int, rung: int) -> Result:
            if rung < len(self.rungs) - 1:
                return self._short(entrant, rung)
            rows[entrant] = self._candidate(entrant)
            return Result(rows[entrant]["average"], {"seconds": rows[entrant]["seconds"]})

        budget = self._budget()
        if len(self.rungs) > 1:
            steps = [f"{rung.networks} networks for {rung.epochs} epochs" for rung in self.rungs]
            self.ctx.progress.note(
                f"real trainings choose: {', then '.join(steps)}; at most the computing of "
                f"{budget['stock_trainings']:.3g} trainings of stock"
            )
        ranking = halve(len(self.candidates), self.rungs, trained)
        finalists = [standing for standing in ranking if standing.rungs == len(self.rungs)]
        result: dict[str, Any] = {
            "candidates": [{**rows[one.entrant], "expected": one.expected} for one in finalists],
            "baseline": None,
            "rescaled": None,
            "qat": asdict(self.qat),
            "halving": {
                "budget": budget,
                "rungs": [{**asdict(rung), "folds": FOLDS} for rung in self.rungs[:-1]] + [asdict(self.rungs[-1])],
                "ranking": [
                    {
                        "index": one.entrant,
                        "architecture": self.candidates[one.entrant].to_dict(),
                        "scores": [told.score for told in one.results],
                        "lead": one.lead,
                        "expected": one.expected,
                        "seconds": round(sum(told.told["seconds"] for told in one.results), 1),
                    }
                    for one in ranking
                ],
            },
        }
        for name, architecture in self.rivals.items():
            result[name] = self._rival(name, architecture)
        write_json(self.ctx.out / "finetune.json", result)

    def _budget(self) -> dict[str, float]:
        """What the halving takes at most: epochs, and computing as a multiple of a training of stock.

        Computing is multiply-accumulates times images; which networks go on is not known yet, so the largest are
        reckoned with.
        """
        from yolov8_nas.deploy.halving import epochs_of
        from yolov8_nas.hardware.cost import cost

        def macs(architecture: Architecture) -> float:
            return cost(architecture, len(self.names), self.imgsz).macs

        entrants = [macs(architecture) for architecture in self.candidates]
        entering, *later = self.rungs
        work = sum(entrants[: entering.networks]) * entering.epochs
        largest = sorted(entrants[: entering.networks], reverse=True)
        work += sum(sum(largest[: rung.networks]) * rung.epochs for rung in later)
        whole = macs(self.supernet.space.stock) * self.from_scratch.epochs
        return {"epochs": epochs_of(self.rungs), "stock_trainings": round(work / whole, 3)}

    def _candidate(self, i: int) -> dict[str, Any]:
        """Train a candidate to the end."""
        from yolov8_nas.supernet.batchnorm import recalibrate
        from yolov8_nas.supernet.derive import derive, save_checkpoint

        architecture = self.candidates[i]
        folder = self.ctx.out / "candidates" / str(i)
        folder.mkdir(parents=True)
        subnet = derive(self.supernet, architecture)
        recalibrate(subnet, self.calibration)
        save_checkpoint(subnet, folder / "subnet.pt", names=self.names, imgsz=self.imgsz)
        network, start = self._start(architecture)
        tuned = self._train(f"candidate {i}", network, architecture, start, self.tuning, folder)
        return {"index": i, "architecture": architecture.to_dict(), **tuned}

    def _short(self, i: int, rung: int) -> Result:
        """Train a candidate for a while, without a fold of the images; the score is that of the fold and the rest."""
        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.deploy.finetune import CHECKPOINT, average
        from yolov8_nas.deploy.halving import Result

        recipe = replace(self.tuning, epochs=self.rungs[rung].epochs, seed=self.seed + RUNG_SEED * (rung + 1))
        name = f"rung {rung + 1}, candidate {i}"
        work = self._work(name)
        kept = work / "scored.json"
        if kept.exists():
            told = read_json(kept)
            self.done += recipe.epochs
        else:
            data = data_yaml(
                self.ctx.inputs["data-prep"], self.ctx.partial, validate_on="search", held_out=(rung % FOLDS, FOLDS)
            )
            network, start = self._start(self.candidates[i])
            trained = self._carry_out(name, self._headed(network), recipe, data=data)
            told = {
                "index": i,
                "architecture": self.candidates[i].to_dict(),
                "start": start,
                "recipe": asdict(recipe),
                "score": average(trained.curves, recipe.window),
                "seconds": round(sum(row["seconds"] for row in trained.curves), 1),
                "curves": trained.curves,
            }
            write_json(kept, told)
            (work / CHECKPOINT).unlink(missing_ok=True)  # all that is asked of it is known
        write_json(self.ctx.out / "rungs" / str(rung + 1) / f"{i}.json", told)
        return Result(told["score"], {"seconds": told["seconds"]})

    def _start(self, architecture: Architecture) -> tuple[DetectionModel, Start]:
        """A candidate at the start of a training: the same in every rung."""
        from yolov8_nas.supernet.batchnorm import recalibrate
        from yolov8_nas.supernet.derive import derive

        if self.options["from_scratch"]:
            return self._fresh(architecture), "scratch"
        network = derive(self.supernet, architecture)
        recalibrate(network, self.calibration)
        return network, "supernet"

    def _headed(self, network: DetectionModel) -> DetectionModel:
        """A network with the head that was asked for."""
        from yolov8_nas.supernet.derive import add_one_to_one

        if self.ctx.settings.get("nms_free"):
            add_one_to_one(network)
        return network

    def _rival(self, name: str, architecture: Architecture) -> dict[str, Any]:
        """Train a stock network, as it is or rescaled."""
        stock = self.supernet.space.stock
        folder = self.ctx.out / name
        folder.mkdir()
        weights = self.ctx.settings["supernet"]["weights"]
        start: Start = "weights" if weights and architecture == stock else "scratch"
        network = self._fresh(architecture)
        if start == "weights":
            network = self._as_the_supernet_began(Path(weights["path"]))
        known_as = f"YOLOv8{self.supernet.space.scale}"
        if architecture != stock:
            known_as += f" at {architecture.sppf_width / stock.sppf_width:.2f} of its width"
        kind = "stock" if name == "baseline" else name
        tuned = self._train(kind, network, architecture, start, self.from_scratch, folder)
        # Unrolled, C2f is the same function in the form in which the candidates ship: like is compared with like.
        return {"name": known_as, "form": "unrolled", "architecture": architecture.to_dict(), **tuned}

    def _fresh(self, architecture: Architecture) -> DetectionModel:
        """A network with random weights."""
        import torch

        from yolov8_nas.supernet.derive import build

        torch.manual_seed(self.seed)
        return build(architecture, len(self.names), self.names)

    def _as_the_supernet_began(self, weights: Path) -> DetectionModel:
        """Stock with the weights that the supernet started from: what it had, its rival has."""
        import torch

        from yolov8_nas.supernet.batchnorm import recalibrate
        from yolov8_nas.supernet.derive import derive
        from yolov8_nas.supernet.supernet import Supernet
        from yolov8_nas.supernet.warmstart import read, warm_start

        torch.manual_seed(self.seed)
        supernet = Supernet(self.supernet.space, len(self.names), self.names)
        warm_start(supernet, read(weights))
        network = derive(supernet, self.supernet.space.stock)
        recalibrate(network, self.calibration)
        return network

    def _train(
        self,
        name: str,
        network: DetectionModel,
        architecture: Architecture,
        start: Start,
        recipe: Recipe,
        folder: Path,
    ) -> dict[str, Any]:
        """Train a network in floating point, then for INT8 where that is asked for; returns its row of the summary."""
        from yolov8_nas.deploy.finetune import average
        from yolov8_nas.deploy.quantization import quantize, save_qat_checkpoint
        from yolov8_nas.supernet.derive import save_checkpoint

        network = self._headed(network)
        carry_out = self._shared if name == "stock" else self._carry_out
        tuned = carry_out(name, network, recipe)
        save_checkpoint(tuned.network, folder / "best.pt", names=self.names, imgsz=self.imgsz)
        score = {"fp32": tuned.curves[tuned.epoch - 1]["map50_95"]}
        best_epoch = {"fp32": tuned.epoch}
        quantized: Trained | None = None
        if self.ctx.settings["int8"]:
            keep_float = self.ctx.settings.get("keep_float", ())
            observed = quantize(deepcopy(tuned.network), self.calibration, keep_float)
            # What INT8 costs without training for it: what the training is compared with.
            save_qat_checkpoint(observed, folder / "ptq.pt", names=self.names, imgsz=self.imgsz)
            quantized = self._carry_out(f"{name}, INT8", observed, self.qat, teacher=tuned.network)
            save_qat_checkpoint(quantized.network, folder / "qat.pt", names=self.names, imgsz=self.imgsz)
            score["int8"] = quantized.curves[quantized.epoch - 1]["map50_95"]
            best_epoch["int8"] = quantized.epoch
        row = {
            "map50_95": score,
            "average": average(tuned.curves[: tuned.epoch], recipe.window),
            "best_epoch": best_epoch,
            "start": start,
            "epochs": recipe.epochs,
            "recipe": asdict(recipe),
            "seconds": round(sum(r["seconds"] for t in (tuned, quantized) if t for r in t.curves), 1),
        }
        tuning = {"architecture": architecture.to_dict(), "curves": tuned.curves, **row}
        if quantized:
            tuning["qat_curves"] = quantized.curves
        write_json(folder / "tuning.json", tuning)
        return row

    def _shared(self, name: str, network: DetectionModel, recipe: Recipe) -> Trained:
        """Train stock in floating point, or find it trained."""
        from yolov8_nas.deploy.finetune import Trained
        from yolov8_nas.deploy.quantization import load_network
        from yolov8_nas.supernet.derive import save_checkpoint

        weights = self.ctx.settings["supernet"]["weights"]
        settings = {
            "dataset": read_json(self.ctx.inputs["data-prep"] / "dataset.json")["digest"],
            "architecture": self.supernet.space.stock.to_dict(),
            "weights": weights and weights["sha256"],
            "recipe": asdict(recipe),
            "nms_free": self.ctx.settings.get("nms_free", False),
        }

        def make(part: StageContext) -> None:
            trained = self._carry_out(name, network, recipe, partial=part.partial)
            save_checkpoint(trained.network, part.out / "best.pt", names=self.names, imgsz=self.imgsz)
            write_json(part.out / "training.json", {"epoch": trained.epoch, "curves": trained.curves})

        found = self.ctx.partial / ".stock"
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

        from yolov8_nas.deploy.finetune import train

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
        from yolov8_nas.deploy.finetune import Recipe

        return Recipe(epochs, self.options["batch"], lr, self.imgsz, self.seed, mosaic)
