"""search: the networks that are expected to be the most accurate on one target, within its limits.

First the hardware rules take out of the space what is not worth searching on this device; the supernet keeps its own
space, of which that is a part. The search itself is `search.searcher`. This stage gives it what the stages before have
written, and writes what it found.

What a step found out (the prior, each score, each measurement) is kept in `partial` as soon as it is known. After an
interruption the same search runs again from its start, in a blink as far as that reaches, and goes on from the last
network. So no network is scored twice, and nothing but the history need be saved after a generation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from yolov8_nas.data import dataset
from yolov8_nas.device.profile import Profile, computing_threads
from yolov8_nas.errors import InputError
from yolov8_nas.export import artifact
from yolov8_nas.measure import engine_file
from yolov8_nas.measure.benchmark import level
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.measure.runtime import of_profile
from yolov8_nas.runner.results import (
    CandidateResult,
    Choices,
    Compiled,
    FrontNetwork,
    LatencyFit,
    LatencyTable,
    NmsResult,
    OptionCounts,
    PriorResult,
    RescaledStock,
    ResolvedLimit,
    RulesResult,
    ScoredNetwork,
    ScoredStock,
    SearchResult,
    Source,
    StockResult,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search.candidates import Candidate
from yolov8_nas.search.differentiable import Prior
from yolov8_nas.search.evolution import SEARCHED, Trial
from yolov8_nas.search.measuring import Bench
from yolov8_nas.search.memo import Memo
from yolov8_nas.search.objective import CostModel, Scorer
from yolov8_nas.search.outcome import best_score, budget, comparison, front
from yolov8_nas.search.plan import Plan
from yolov8_nas.search.preference import Preference
from yolov8_nas.search.rules import Applied, Device, consider, narrowed, with_evidence
from yolov8_nas.search.searcher import Found, Searcher
from yolov8_nas.space import Architecture
from yolov8_nas.stages.search.settings import SearchSettings
from yolov8_nas.supernet.derive import build
from yolov8_nas.supernet.supernet import Supernet

BATCH: Final = 16
"""Images at once when networks are scored."""


def run(ctx: StageContext[SearchSettings]) -> None:
    """Write `rules.json`, `history.jsonl`, `front.json`, `search.json` and `candidates.json`.

    And `prior.json` where there is a prior, `rescaled.json` where stock networks of the candidates' latencies are asked
    for: a list with, for each candidate, the rescaled network, what both take, and the candidate's digest.

    Raises:
        InputError: The search split has no images.
        StageError: No network keeps the limits, by prediction or as measured.
    """
    _Search(ctx).run()


def plan_of(settings: SearchSettings) -> Plan:
    """How much the searcher may spend; a device elsewhere is measured once, at the end."""
    asked = settings.search
    return Plan(
        generations=asked.generations,
        population=asked.population,
        candidates=asked.candidates,
        measure_every=0 if settings.elsewhere else asked.measure_every,
        prior_steps=asked.prior_steps,
        exact=asked.exact,
        rescaled=settings.rescaled,
        random=asked.random,
        mac_ranking=asked.mac_ranking,
        random_seeds=asked.random_seeds,
        seed=settings.seed,
    )


class _Search:
    """One run of the stage."""

    def __init__(self, ctx: StageContext[SearchSettings]) -> None:

        _require_images(ctx.inputs["data-prep"])
        torch.set_num_threads(computing_threads())
        self.ctx = ctx
        self.start = time.monotonic()
        self.settings = ctx.settings
        self.probe = ctx.inputs["hw-probe"]
        self.profile = Profile.read(self.probe)
        precision = self.settings.precision
        self.runtime = of_profile(self.profile, "fp32" if precision == "best" else precision)
        self.supernet = Supernet.load(ctx.inputs["supernet-train"])
        self.supernet.to("cuda:0" if torch.cuda.is_available() else "cpu")
        self.measured = LatencyTable.read(self.probe).rows
        self.data = dataset.data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
        self.scorer = Scorer(
            self.supernet,
            self.data,
            imgsz=self.settings.imgsz,
            batch=BATCH,
            bn_images=self.settings.search.bn_images,
            seed=self.settings.seed,
            work=ctx.partial / "work",
            int8=self.settings.search.int8_aware,
            keep_float=self.settings.keep_float,
        )
        self.scores = Memo(ctx.partial / "scores.jsonl")
        self.rules = self.consider_rules()
        self.searcher = self.make_searcher()

    def run(self) -> None:
        """Search, and write what was found."""
        self.tell_rules()
        with self.ctx.host.computing():
            found = self.searcher.run()
        self.write(found)

    def consider_rules(self) -> list[Applied]:
        """The hardware rules, with what the latency table says of them."""
        rules = consider(
            self.supernet.space,
            Device.of_profile(self.profile),
            self.runtime.precision,
            imgsz=self.settings.imgsz,
            batch=self.settings.batch,
            switched=self.settings.search.rules.model_dump(),
        )
        return with_evidence(
            rules,
            self.supernet.space,
            {row.architecture: row.latency_ms.p50 for row in self.measured},
            num_classes=self.supernet.num_classes,
            imgsz=self.settings.imgsz,
        )

    def make_searcher(self) -> Searcher:
        """The search, given what the stages before have written."""
        space = narrowed(self.supernet.space, self.rules)
        nms_ms = NmsResult.read(self.probe).latency_ms
        costs = CostModel.from_probe(
            [row.constraint for row in ResolvedLimit.read_all(self.probe)],
            replace(LatencyModel.of(LatencyFit.read(self.probe)), space=space),
            self.measured,
            num_classes=self.supernet.num_classes,
            imgsz=self.settings.imgsz,
            batch=self.settings.batch,
            nms_ms=dict(nms_ms) if nms_ms else None,
        )
        probed_ms = level(self.measured)
        bench = Bench(
            self.ctx.partial,
            export=self.export,
            reference=space.stock,
            runtime=self.runtime,
            threads=self.profile.threads,
            batch=self.settings.batch,
            probed_ms=probed_ms,
            elsewhere=self.settings.elsewhere,
            host=self.ctx.host,
            note=self.ctx.progress.note,
        )
        stock_ms = StockResult.read(self.probe).latency_ms.p50
        return Searcher(
            self.supernet,
            self.data,
            space,
            costs,
            plan_of(self.settings),
            self.score,
            bench.measure,
            imgsz=self.settings.imgsz,
            work=self.ctx.partial,
            probed_ms=probed_ms,
            preference=Preference(**self.settings.search.objective.model_dump(), stock_ms=stock_ms),
            progress=self.tell,
            note=self.ctx.progress.note,
        )

    def tell_rules(self) -> None:
        """Say what each hardware rule does and why, and write `rules.json`."""
        for rule in self.rules:
            self.ctx.progress.note(f"hardware rule {rule}")
        options = OptionCounts(
            space=sum(len(d.options) for d in self.supernet.space.dimensions),
            searched=sum(len(d.options) for d in self.searcher.space.dimensions),
        )
        RulesResult(options=options, rules=tuple(rule.to_result() for rule in self.rules)).write(self.ctx.out)

    def score(self, architecture: Architecture) -> float:
        """Score a network, or remember its score from before an interruption."""
        if architecture not in self.scores:
            self.scores.add(architecture, self.scorer(architecture))
        return self.scores[architecture]

    def export(self, architecture: Architecture) -> Path:
        """The network's file with the supernet's weights, in the form and precision that the search is for."""
        file = self.ctx.partial / "networks" / f"{architecture.digest}{self.runtime.suffix}"
        if file.exists():
            return file
        if architecture in self.supernet.space:
            model = self.scorer.network(architecture).cpu()
        else:  # a rescaled stock network; how fast it is does not depend on its weights
            model = build(architecture, self.supernet.num_classes).eval()
        calibration = self.scorer.calibration if self.runtime.precision == "int8" else ()
        return artifact.write_network(
            model,
            file,
            runtime=self.runtime,
            imgsz=self.settings.imgsz,
            batch=self.settings.batch,
            calibration=calibration,
            keep_float=self.settings.keep_float,
            nms_free=self.settings.nms_free,
        )

    def tell(self, done: float, message: str, best: tuple[float, float] | None) -> None:
        """Progress, with the best network so far."""
        figures = {"best_map50_95": best[0], "latency_ms": -best[1]} if best else {}
        self.ctx.progress.update(done, self.searcher.plan.work, message, **figures)

    def write(self, found: Found) -> None:
        """Write the results, all with latencies as the last latency model predicts them."""
        if found.prior:
            self.prior(found, found.prior).write(self.ctx.out)
        if self.settings.rescaled:
            RescaledStock.write_all(self.ctx.out, [rescaled.to_result() for rescaled in found.rescaled])
        ScoredNetwork.write_all(self.ctx.out, self.rows([*found.trials, *found.compared], found))
        best = self.rows(front(found.costs, found.trials), found)
        FrontNetwork.write_all(self.ctx.out, [FrontNetwork(**dict(row)) for row in best])
        CandidateResult.write_all(self.ctx.out, map(self.described, found.met))
        self.result(found, front=len(best)).write(self.ctx.out)

    def prior(self, found: Found, prior: Prior) -> PriorResult:
        """The prior as a part of the result."""
        space = self.searcher.space
        return PriorResult(
            limit_ms=found.limit_ms,
            dimensions=tuple(Choices(name=choice.name, options=choice.options) for choice in space.dimensions),
            worth=prior.worth,
            trajectory=prior.trajectory,
            most_likely=prior.most_likely(space),
        )

    def result(self, found: Found, *, front: int) -> SearchResult:
        """The search as a whole."""
        by_source: dict[Source, list[Trial]] = {}
        for trial in (*found.trials, *found.compared):
            by_source.setdefault(trial.source, []).append(trial)
        estimate = found.costs([self.searcher.space.stock])
        return SearchResult(
            asked=self.settings.search,
            limits=tuple(map(str, found.costs.limits)),
            objective=self.searcher.preference.to_result(),
            counts={
                **{str(source): len(group) for source, group in by_source.items()},
                "front": front,
                "measured": len(found.measured_ms),
            },
            best_map50_95={source: best_score(found.costs, group) for source, group in by_source.items()},
            comparisons={
                source: comparison(found.costs, found.trials, group)
                for source, group in by_source.items()
                if source not in SEARCHED
            },
            stock=ScoredStock(
                map50_95=found.stock_score,
                latency_ms=float(estimate.latency_ms[0]),
                upper_ms=float(estimate.upper_ms[0]),
                feasible=bool(estimate.feasible[0]),
            ),
            slack=tuple(candidate.slack for candidate in found.met),
            budget=budget(found.costs, found.trials, found.met[0]),
            missed=tuple(map(self.described, found.missed)),
            tail=found.costs.tail,
            seconds=round(time.monotonic() - self.start, 1),
            seconds_comparing=round(found.seconds_comparing, 1),
        )

    def described(self, candidate: Candidate) -> CandidateResult:
        """A measured network as it stands in files, with what its compiler told of it where an engine was built."""
        told = None
        if self.runtime.suffix == ".engine":
            told = engine_file.told_of(self.export(candidate.trial.architecture))
        return candidate.to_result(Compiled.model_validate(told) if told else None)

    def rows(self, trials: Sequence[Trial], found: Found) -> list[ScoredNetwork]:
        """Scored networks as they stand in files."""
        estimate = found.costs([trial.architecture for trial in trials])
        return [
            ScoredNetwork(
                architecture=trial.architecture,
                genes=self.supernet.space.encode(trial.architecture),
                map50_95=trial.map50_95,
                latency_ms=float(latency),
                upper_ms=float(upper),
                generation=trial.generation,
                source=trial.source,
                repetition=trial.repetition,
                measured_ms=found.measured_ms.get(trial.architecture),
            )
            for trial, latency, upper in zip(trials, estimate.latency_ms, estimate.upper_ms, strict=True)
        ]


def _require_images(data: Path) -> None:
    """Check that there is something to search with.

    Raises:
        InputError: The search split has no images.
    """
    if not dataset.load(data).images["search"]:
        raise InputError(
            f"{data / 'dataset.json'}: the search split has no images, so no network can be scored; "
            "give a train split of at least two images with boxes"
        )
