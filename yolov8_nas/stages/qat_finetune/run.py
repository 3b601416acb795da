"""qat-finetune: real trainings choose among the search's candidates; the chosen ones and stock are trained to the end.

All candidates enter a successive halving (`train.halving`), from the same start. A short training is scored on the
search split and on a fold of the train split that it does not see, another one in each rung: the search split alone is
small, and has served the supernet's scores before. Ultralytics' trainer validates after each epoch anyway, so this
costs nothing but the fold's images, which are not trained on, and all networks of a rung are asked the same. The score
is the mean over the last epochs (`Recipe.window`). Whole trainings see all images of the train split, as stock's do;
what a network scored on the folds counts in the accuracy that is expected of it, by which trt-export ships.

Every training is a part of its own in the store, under a key of all that it depends on, and goes on from its last
epoch. Neither limit nor target is in that key: with another limit, or for another target, the same network is found
trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Final, Literal

from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.runner.results import (
    Budget,
    CandidateResult,
    CandidatesHalving,
    EqualLatency,
    FinetuneResult,
    RescaledStock,
    Rival,
    TrainingRecipe,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search.baseline import TOLERANCE
from yolov8_nas.space import Architecture
from yolov8_nas.stages.qat_finetune.given import Arm, Entrant, Given
from yolov8_nas.stages.qat_finetune.outcome import Outcome, halving_table
from yolov8_nas.stages.qat_finetune.settings import QAT_COST, FinetuneSettings
from yolov8_nas.stages.qat_finetune.trainings import Trainings
from yolov8_nas.train.finetune import Recipe, Trained, average
from yolov8_nas.train.halving import Result, Rung, Standing, epochs_of, halve, schedule

QAT_LR: Final = 0.1
"""Peak learning rate of quantization-aware training as a share of fine-tuning's: the network only has to adapt."""

RESERVE: Final = 0.02
"""Share of its tightest limit that a network leaves unused, as measured, to count as one that keeps it in any hour."""

TRIAL_SEED: Final = 100
"""By how much the seeds of two trainings of one network lie apart."""


def run(ctx: StageContext[FinetuneSettings]) -> None:
    """Write `candidates/<i>/{subnet.pt,best.pt,ptq.pt,qat.pt,tuning.json}`, `rungs/<r>/<i>.json` and `finetune.json`.

    `i` is a candidate's index in the search's `candidates.json`, `r` the number of a short rung. The same without
    `subnet.pt` for `baseline` (stock) and `rescaled` (stock at the best candidate's latency), where they are asked for.

    Raises:
        StageError: A training diverged.
    """
    with ctx.host.computing():
        _Finetuning(ctx).run()


class _Finetuning:
    """One run of the stage."""

    def __init__(self, ctx: StageContext[FinetuneSettings]) -> None:
        self.ctx = ctx
        self.given = Given(ctx)
        self.options = ctx.settings.finetune
        self.found = CandidateResult.read_all(ctx.inputs["search"])
        # From weights, all learn for as long. Otherwise stock, and candidates that do not begin with the supernet,
        # learn for as many epochs as the supernet and the fine-tuning together, with the supernet's learning rate: none
        # has seen the data more often than another.
        whole = ctx.settings.supernet
        peak = self.options.train.lr0
        long = self.given.recipe(whole.epochs + self.options.epochs, peak or whole.lr)
        fine = self.given.recipe(self.options.epochs, peak or self.options.lr)
        self.rivals = fine if ctx.settings.start == "weights" else long
        qat = self.given.recipe(self.options.qat_epochs, QAT_LR * fine.lr, mosaic=False)
        self.trainings = Trainings(ctx, self.given)
        self.outcome = Outcome(ctx, self.given, self.trainings, qat)
        self.candidates = self._candidates(long if ctx.settings.start == "scratch" else fine)
        self.distilled = self.options.distill
        self.with_stock = self.options.baseline in ("stock", "both")
        self.with_rescaled = self.options.baseline in ("rescaled", "both")
        # Stock gets as many whole trainings as the candidates: the best of several is luck that it must have, too.
        trials = self.candidates.rungs[-1].networks if self.with_stock else int(self.distilled)
        stock = self._trials("stock", [self.given.supernet.space.stock], trials)
        self.stock = Arm("baseline", stock, (Rung(trials, self.rivals.epochs),), self.rivals)
        self.trainings.total = self._total(QAT_COST * qat.epochs if ctx.settings.int8 else 0)

    def _candidates(self, tuning: Recipe) -> Arm:
        entrants = tuple(
            Entrant(f"candidate {i}", one.architecture, self.given.seed) for i, one in enumerate(self.found)
        )
        return Arm("candidates", entrants, self._rungs(tuning), tuning)

    def _total(self, qat_cost: int) -> float:
        """Epochs of all trainings; one of a network that is trained for INT8 costs so much more in the end."""
        total = epochs_of(self.candidates.rungs) + self.candidates.rungs[-1].networks * qat_cost
        total += epochs_of(self.stock.rungs) + self.with_stock * qat_cost
        if self.with_rescaled:
            total += epochs_of(self._rungs(self.rivals)) + qat_cost
        return total

    def run(self) -> None:
        """Train everything, one after the other."""
        budget = self._tell_budget()
        baseline: Rival | None = None
        rescaled: Rival | None = None
        teacher: DetectionModel | None = None
        if self.stock.entrants:  # first: it teaches the others
            ranking, trained = self._halve(self.stock)
            if self.with_stock:
                baseline = self.outcome.rival(self.stock, ranking, trained)
            if self.distilled:
                teacher = trained[ranking[0].entrant].network
        ranking, trained = self._halve(self.candidates, teacher)
        candidates = [
            self.outcome.candidate(self.candidates, one, trained[one.entrant])
            for one in ranking
            if one.entrant in trained
        ]
        halving = CandidatesHalving(budget=budget, **dict(halving_table(self.candidates, ranking)))
        if self.with_rescaled:
            arm, equal = self._rescaled(ranking[0].entrant)
            rescaled = self.outcome.rival(arm, *self._halve(arm, teacher), equal)
        FinetuneResult(
            candidates=tuple(candidates),
            baseline=baseline,
            rescaled=rescaled,
            qat=TrainingRecipe(**asdict(self.outcome.qat)),
            halving=halving,
        ).write(self.ctx.out)

    def _rungs(self, recipe: Recipe) -> tuple[Rung, ...]:
        """The trainings among which one is chosen, of candidates or of what they are compared with."""
        asked = self.options.rungs
        short: Sequence[Rung] | Literal["auto"] = (
            "auto" if asked == "auto" else [Rung(rung.networks, rung.epochs) for rung in asked]
        )
        return schedule(len(self.found), self.options.candidates, recipe.epochs, short)

    def _trials(self, name: str, architectures: Sequence[Architecture], count: int) -> tuple[Entrant, ...]:
        """So many trainings: of each network one after the other, then of all of them again with another seed."""
        return tuple(
            Entrant(
                f"{name}, trial {i + 1}" if i else name,
                architectures[i % len(architectures)],
                self.given.seed + TRIAL_SEED * (i // len(architectures)),
            )
            for i in range(count)
        )

    def _tell_budget(self) -> Budget:
        """What the choice takes at most: epochs, and computing as a multiple of a training of stock.

        Computing is multiply-accumulates times images; which networks go on is not known yet, so the largest are
        reckoned with.
        """
        rungs = self.candidates.rungs
        entering = [self.given.macs(one.architecture) for one in self.candidates.entrants[: rungs[0].networks]]
        largest = sorted(entering, reverse=True)
        work = sum(sum(largest[: rung.networks]) * rung.epochs for rung in rungs)
        whole = self.given.macs(self.given.supernet.space.stock) * self.rivals.epochs
        trainings = round(work / whole, 3)
        if len(rungs) > 1:
            steps = ", then ".join(f"{rung.networks} for {rung.epochs} epochs" for rung in rungs)
            self.ctx.progress.note(
                f"real trainings choose: {steps}; at most the computing of {trainings:.3g} trainings of stock"
            )
        if self.distilled and not self.with_stock:
            self.ctx.progress.note(
                f"finetune.distill takes a training of stock for {self.rivals.epochs} epochs, which "
                f"finetune.baseline = {self.options.baseline} does not ask for"
            )
        return Budget(epochs=epochs_of(rungs), stock_trainings=trainings, taught_by_stock=float(self.distilled))

    def _halve(self, arm: Arm, teacher: DetectionModel | None = None) -> tuple[list[Standing], dict[int, Trained]]:
        """Train the networks of an arm, rung by rung; returns their ranking, and those that were trained to the end.

        A teacher teaches whole trainings only: short ones have to tell networks apart, which they do as well without
        the time that it takes.
        """
        whole: dict[int, Trained] = {}

        def train(i: int, rung: int) -> Result:
            if rung < len(arm.rungs) - 1:
                return self.trainings.short(
                    arm, i, rung, self.ctx.out if arm is self.candidates else self.ctx.out / arm.kind
                )
            entrant = arm.entrants[i]
            recipe = replace(arm.recipe, seed=entrant.seed)
            network, self.trainings.begun[entrant.name] = self.trainings.start(arm, entrant)
            whole[i] = self.trainings.shared(arm, entrant, self.trainings.headed(network), recipe, teacher)
            score = average(whole[i].curves[: whole[i].epoch], recipe.window)
            return Result(score, whole[i].seconds)

        # Networks that use all of a limit may miss it when their files are measured; then one that does not is there.
        spare = {i for i, row in enumerate(self.found) if row.slack >= RESERVE}
        return halve(len(arm.entrants), arm.rungs, train, spare if arm is self.candidates else frozenset()), whole

    def _rescaled(self, winner: int) -> tuple[Arm, EqualLatency]:
        """Rescaled stock at the latency of the best candidate, with as many trainings as the candidates had.

        What they have is other architectures; what rescaled stock has is other roundings of its widths, as far as they
        take as long, and other seeds.
        """
        candidate = self.found[winner]
        latency_ms, digest = candidate.measured.latency_ms.p50, candidate.architecture.digest
        rows = rivals_of(RescaledStock.read_all(self.ctx.inputs["search"]), digest, latency_ms)
        rungs = self._rungs(self.rivals)
        entrants = self._trials("rescaled", [architecture for architecture, _ in rows], rungs[0].networks)
        equal = EqualLatency(latency_ms=tuple(ms for _, ms in rows), candidate=digest, candidate_ms=latency_ms)
        return Arm("rescaled", entrants, rungs, self.rivals), equal


def rivals_of(rows: Sequence[RescaledStock], digest: str, latency_ms: float) -> list[tuple[Architecture, float]]:
    """The rescaled stock networks that are as fast as a candidate, with their latency in milliseconds.

    There are several for each candidate: stock with its widths multiplied by one factor, within
    `search.baseline.TOLERANCE` of the candidate's measured latency where any is.

    Args:
        rows: Rescaled stock networks.
        digest: Digest of the candidate's architecture.
        latency_ms: Its measured latency.

    Returns:
        Those that were made for it. Without any, those within the tolerance that were made for others, and if there are
        none, the nearest.
    """

    def distance(row: RescaledStock) -> float:
        return abs(math.log(row.latency_ms / latency_ms))

    mine = [row for row in rows if row.candidate == digest]
    near = [row for row in rows if distance(row) <= math.log(1 + TOLERANCE)]
    return list({row.architecture: row.latency_ms for row in mine or near or [min(rows, key=distance)]}.items())
