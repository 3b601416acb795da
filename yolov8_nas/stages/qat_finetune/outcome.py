"""What the stage writes of the networks that were trained to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

from yolov8_nas.runner.results import (
    EqualLatency,
    Halving,
    Ranked,
    Rival,
    Rung,
    TrainingRecipe,
    Tuned,
    TunedCandidate,
    TuningResult,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.qat_finetune.given import Arm, Entrant, Given
from yolov8_nas.stages.qat_finetune.settings import FinetuneSettings
from yolov8_nas.stages.qat_finetune.trainings import FOLDS, Trainings
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.derive import derive, save_checkpoint
from yolov8_nas.train.finetune import Recipe, Trained, average
from yolov8_nas.train.halving import Standing
from yolov8_nas.train.quantization import quantize, save_qat_checkpoint
from yolov8_nas.train.starting import computing


class Outcome:
    """Writes trained networks, and trains them for INT8 where that is asked for.

    Args:
        ctx: The context of the stage.
        given: What all trainings have in common.
        trainings: Trains networks.
        qat: How they are trained for INT8.
    """

    def __init__(self, ctx: StageContext[FinetuneSettings], given: Given, trainings: Trainings, qat: Recipe) -> None:
        self.ctx = ctx
        self.given = given
        self.trainings = trainings
        self.qat = qat

    def candidate(self, arm: Arm, standing: Standing, trained: Trained) -> TunedCandidate:
        """Write a candidate that was trained to the end."""
        entrant = arm.entrants[standing.entrant]
        folder = self.ctx.out / "candidates" / str(standing.entrant)
        folder.mkdir(parents=True)
        subnet = derive(self.given.supernet, entrant.architecture)
        recalibrate(subnet, self.given.calibration)
        save_checkpoint(subnet, folder / "subnet.pt", names=self.given.names, imgsz=self.given.imgsz)
        tuned = self._write(arm, entrant, trained, folder)
        return TunedCandidate(**dict(tuned), index=standing.entrant, expected=standing.expected)

    def rival(
        self,
        arm: Arm,
        ranking: Sequence[Standing],
        trained: Mapping[int, Trained],
        equal_latency: EqualLatency | None = None,
    ) -> Rival:
        """Write the best stock network, as it is or rescaled."""
        best = ranking[0].entrant
        entrant, stock = arm.entrants[best], self.given.supernet.space.stock
        folder = self.ctx.out / arm.kind
        folder.mkdir(exist_ok=True)
        known_as = f"YOLOv8{self.given.supernet.space.scale}"
        if entrant.architecture != stock:
            known_as += f" at {entrant.architecture.sppf_width / stock.sppf_width:.2f} of its width"
        tuned = self._write(arm, entrant, trained[best], folder)
        # Unrolled, C2f is the same function in the form in which the candidates ship: like is compared with like.
        return Rival(
            **dict(tuned),
            name=known_as,
            form="unrolled",
            halving=halving_table(arm, ranking),
            equal_latency=equal_latency,
        )

    def _write(self, arm: Arm, entrant: Entrant, tuned: Trained, folder: Path) -> Tuned:
        """Write a trained network, and train it for INT8 where that is asked for."""
        save_checkpoint(tuned.network, folder / "best.pt", names=self.given.names, imgsz=self.given.imgsz)
        score = {"fp32": tuned.score}
        best_epoch = {"fp32": tuned.epoch}
        quantized: Trained | None = None
        if self.ctx.settings.int8:
            keep_float = self.ctx.settings.keep_float
            observed = quantize(deepcopy(tuned.network), self.given.calibration, keep_float)
            # What INT8 costs without training for it: what the training is compared with.
            save_qat_checkpoint(observed, folder / "ptq.pt", names=self.given.names, imgsz=self.given.imgsz)
            quantized = self.trainings.for_int8(entrant, observed, self.qat, tuned.network)
            save_qat_checkpoint(quantized.network, folder / "qat.pt", names=self.given.names, imgsz=self.given.imgsz)
            score["int8"] = quantized.score
            best_epoch["int8"] = quantized.epoch
        recipe, begun = replace(arm.recipe, seed=entrant.seed), self.trainings.begun[entrant.name]
        told = Tuned(
            architecture=entrant.architecture,
            map50_95=score,
            average=average(tuned.curves[: tuned.epoch], recipe.window),
            best_epoch=best_epoch,
            start=begun.start,
            begun_with=begun.told,
            computing=self._computing(arm, entrant),
            distilled=self.given.options.distill and arm.kind != "baseline",
            epochs=recipe.epochs,
            recipe=TrainingRecipe(**asdict(recipe)),
            seconds=round(sum(one.seconds for one in (tuned, quantized) if one), 1),
        )
        qat_curves = tuple(quantized.curves) if quantized else ()
        TuningResult(**dict(told), curves=tuple(tuned.curves), qat_curves=qat_curves).write(folder)
        return told

    def _computing(self, arm: Arm, entrant: Entrant) -> dict[str, float]:
        """Multiply-accumulates of a network's whole trainings; see `starting.computing`."""
        own, teacher = self.given.macs(entrant.architecture), self.given.macs(self.given.supernet.space.stock)
        taught_by = teacher if self.given.options.distill and arm.kind != "baseline" else 0.0
        told = {"training": computing(own, self.given.images, arm.recipe.epochs, taught_by=taught_by)}
        if self.ctx.settings.int8:
            told["int8"] = computing(own, self.given.images, self.qat.epochs, taught_by=own)
        return told


def halving_table(arm: Arm, ranking: Sequence[Standing]) -> Halving:
    """What the halving of an arm did."""
    last = len(arm.rungs) - 1
    return Halving(
        rungs=tuple(
            Rung(networks=rung.networks, epochs=rung.epochs, folds=FOLDS if number < last else None)
            for number, rung in enumerate(arm.rungs)
        ),
        ranking=tuple(
            Ranked(
                index=one.entrant,
                seed=arm.entrants[one.entrant].seed,
                architecture=arm.entrants[one.entrant].architecture,
                scores=tuple(told.score for told in one.results),
                lead=one.lead,
                expected=one.expected,
                seconds=round(sum(told.seconds for told in one.results), 1),
            )
            for one in ranking
        ),
    )
