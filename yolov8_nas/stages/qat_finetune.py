"""qat-finetune: the search's candidates and the stock baseline, trained to the end.

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
    from yolov8_nas.space import Architecture

Start: TypeAlias = Literal["supernet", "weights", "scratch"]
"""What a training starts from: the supernet, the weights that the supernet itself started from, or random weights."""

CALIBRATION_IMAGES: Final = 256
"""Training images from which BatchNorm statistics and INT8 ranges come."""

QAT_LR: Final = 0.1
"""Peak learning rate of quantization-aware training as a share of fine-tuning's: the network only has to adapt."""

STOCK: Final = "stock-trainings"
"""Folder of the store with the trainings of stock that targets and runs share."""

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
    """Write `candidates/<i>/{subnet.pt,best.pt,ptq.pt,qat.pt,tuning.json}` and `finetune.json`.

    The same without `subnet.pt` for `baseline` (stock) and `rescaled` (stock at the best candidate's latency), where
    they are asked for.

    Raises:
        StageError: A training diverged.
    """
    with ctx.host.computing():
        _Finetuning(ctx).run()


STAGE = Stage(name="qat-finetune", version=4, settings=settings, run=run, watched=True)


class _Finetuning:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        import torch

        from yolov8_nas.data.dataset import data_yaml
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
        found = read_json(ctx.inputs["search"] / "candidates.json")[: self.options["candidates"]]
        self.candidates = [Architecture.from_dict(candidate["architecture"]) for candidate in found]
        # What does not start from the supernet (stock, and the candidates where that is asked for) learns for as many
        # epochs as the supernet and the fine-tuning together, so that none has seen the data more often than another,
        # and with the supernet's learning rate.
        whole = ctx.settings["supernet"]
        self.from_scratch = self._recipe(whole["epochs"] + self.options["epochs"], whole["lr"])
        fine = self._recipe(self.options["epochs"], self.options["lr"])
        self.tuning = self.from_scratch if self.options["from_scratch"] else fine
        self.qat = self._recipe(self.options["qat_epochs"], QAT_LR * self.options["lr"], mosaic=False)
        qat_cost = QAT_COST * self.qat.epochs if ctx.settings["int8"] else 0
        self.total = len(self.candidates) * (self.tuning.epochs + qat_cost)
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
        from yolov8_nas.supernet.batchnorm import recalibrate
        from yolov8_nas.supernet.derive import derive, save_checkpoint

        rows = []
        for i, architecture in enumerate(self.candidates):
            folder = self.ctx.out / "candidates" / str(i)
            folder.mkdir(parents=True)
            network = derive(self.supernet, architecture)
            recalibrate(network, self.calibration)
            save_checkpoint(network, folder / "subnet.pt", names=self.names, imgsz=self.imgsz)
            start: Start = "supernet"
            if self.options["from_scratch"]:
                network, start = self._fresh(architecture), "scratch"
            tuned = self._train(f"candidate {i}", network, architecture, start, self.tuning, folder)
            rows.append({"index": i, "architecture": architecture.to_dict(), **tuned})
        result: dict[str, Any] = {"candidates": rows, "baseline": None, "rescaled": None, "qat": asdict(self.qat)}
        for name, architecture in self.rivals.items():
            result[name] = self._rival(name, architecture)
        write_json(self.ctx.out / "finetune.json", result)

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
        from yolov8_nas.deploy.quantization import quantize, save_qat_checkpoint
        from yolov8_nas.supernet.derive import add_one_to_one, save_checkpoint

        if self.ctx.settings.get("nms_free"):
            add_one_to_one(network)
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

        work = (partial or self.ctx.partial) / "trainings" / name.replace(", ", "-").replace(" ", "-").lower()
        trained = train(network, self.data, recipe, work=work, teacher=teacher, report=report, device=self.device)
        self.done += weight * recipe.epochs
        return trained

    def _recipe(self, epochs: int, lr: float, *, mosaic: bool = True) -> Recipe:
        from yolov8_nas.deploy.finetune import Recipe

        return Recipe(epochs, self.options["batch"], lr, self.imgsz, self.seed, mosaic)
