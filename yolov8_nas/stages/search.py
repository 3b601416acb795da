"""search: the networks that trade accuracy for latency best on one target, within its limits.

First the hardware rules take out of the space what is not worth searching on this device; the supernet keeps its own
space, of which that is a part. Then the architecture parameters learn, with the supernet's weights frozen, which
options are worth their latency: the prior. An exact solver turns it into the best networks within the limits. Evolution
starts from these, from samples of the prior and from relatives of stock YOLOv8, and scores every network on images;
every few generations its front is measured on the device and the latency model refitted. In the end the best are
exported and measured, and those that keep the limits are handed on.

What a step found out (the prior, each score, each measurement) is kept in `partial` as soon as it is known. After an
interruption the same search runs again from its start, in a blink as far as that reaches, and goes on from the last
network. So no network is scored twice, and nothing but the history need be saved after a generation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.search.constraint import Constraint
from yolov8_nas.stages.stage import Settings, Stage, StageContext
from yolov8_nas.store import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from yolov8_nas.hardware.benchmark import Measurement, Protocol
    from yolov8_nas.search.candidates import Candidate
    from yolov8_nas.search.differentiable import Prior, PriorStep
    from yolov8_nas.search.evolution import Source, Trial, Utility
    from yolov8_nas.search.linear_cost import LinearCost
    from yolov8_nas.search.objective import Estimate
    from yolov8_nas.space import Architecture

BATCH: Final = 16
"""Images at once when networks are scored."""

FRONT: Final = 8
"""Networks measured at most when the latency model is refitted."""

ROUNDS: Final = 12
"""Rounds in which candidates are measured at most; the verdict on what ships takes more where it needs them."""

RESCALINGS: Final = 4
"""Rescaled stock networks that are measured at most until one is as fast as the best candidate."""

MEASURING: Final = 5
"""What measuring a candidate counts in progress; scoring a network counts 1."""

LEARNING: Final = 0.7
"""What a step of the prior counts in progress."""

EXACT: Final = 8
"""One in so many networks of the first generation is an exact solution under the prior."""

SAMPLED: Final = 4
"""One in so many networks of the first generation is a sample of the prior."""

CUTS: Final = 10
"""Networks that the exact solver excludes at most for a solution; see `exact.solve`."""

APART: Final = 3
"""Choices in which exact solutions differ at least: the second best is most often the best with one small change."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the search depends on beside its inputs; the limits come resolved from hw-probe.

    Raises:
        InputError: Stock is to be rescaled for a device elsewhere.
    """
    assert target is not None
    if target.far is not None and config.finetune.baseline in ("rescaled", "both"):
        raise InputError(
            f"finetune.baseline = {config.finetune.baseline} needs one measurement after the other, and "
            f"{target.hardware} is elsewhere; use stock or none"
        )
    int8 = target.precision == "int8"
    return {
        "precision": target.precision,
        "batch": target.batch,
        "imgsz": config.imgsz,
        **config.search.model_dump(),
        "int8_aware": config.search.int8_aware and int8,
        # Of INT8 targets always: without it lie in stores what versions found that scored them in floating point.
        **({"keep_float": list(config.quantization.keep_float)} if int8 else {}),
        "rescaled": config.finetune.baseline in ("rescaled", "both"),
        **config.finetune.head(),
        "seed": config.seed,
        **({"elsewhere": target.model_dump(mode="json")} if target.far else {}),
    }


def run(ctx: StageContext) -> None:
    """Write `rules.json`, `history.jsonl`, `front.json`, `search.json` and `candidates.json`.

    And `prior.json` where there is a prior, `rescaled.json` where a stock network of the same latency is asked for.

    Raises:
        InputError: The search split has no images.
        StageError: No network keeps the limits, by prediction or as measured.
    """
    _Search(ctx).run()


STAGE = Stage(name="search", version=6, settings=settings, run=run)


class _Search:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        import torch

        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.hardware.benchmark import level
        from yolov8_nas.hardware.latency_model import LatencyModel
        from yolov8_nas.hardware.profile import available_cores
        from yolov8_nas.hardware.rules import Device, consider, narrowed, with_evidence
        from yolov8_nas.hardware.runtime import of_profile
        from yolov8_nas.search.measuring import Bench
        from yolov8_nas.search.memo import Memo
        from yolov8_nas.search.objective import CostModel, Scorer
        from yolov8_nas.search.preference import Preference
        from yolov8_nas.supernet.supernet import Supernet

        _require_images(ctx.inputs["data-prep"])
        torch.set_num_threads(available_cores())
        self.ctx = ctx
        self.start = time.monotonic()
        self.options = ctx.settings
        self.probe = ctx.inputs["hw-probe"]
        profile = read_json(self.probe / "profile.json")
        precision: str = self.options["precision"]
        self.runtime = of_profile(profile, "fp32" if precision == "best" else precision)
        self.supernet = Supernet.load(ctx.inputs["supernet-train"])
        self.supernet.to("cuda:0" if torch.cuda.is_available() else "cpu")
        measured = read_json(self.probe / "latency_table.json")["rows"]
        rules = consider(
            self.supernet.space,
            Device.of_profile(profile),
            self.runtime.precision,
            imgsz=self.options["imgsz"],
            batch=self.options["batch"],
            switched=self.options["rules"],
        )
        self.rules = with_evidence(
            rules,
            self.supernet.space,
            measured,
            num_classes=self.supernet.num_classes,
            imgsz=self.options["imgsz"],
        )
        self.space = narrowed(self.supernet.space, self.rules)
        self.costs = CostModel.from_probe(
            [Constraint.from_row(row) for row in read_json(self.probe / "constraints.json")],
            replace(LatencyModel.from_dict(read_json(self.probe / "latency_model.json")), space=self.space),
            measured,
            num_classes=self.supernet.num_classes,
            imgsz=self.options["imgsz"],
            batch=self.options["batch"],
            nms_ms=read_json(self.probe / "nms.json")["latency_ms"],
        )
        self.tables: LinearCost | None = None  # of `costs.latency`, made when they are needed
        self.data = data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
        self.scorer = Scorer(
            self.supernet,
            self.data,
            imgsz=self.options["imgsz"],
            batch=BATCH,
            bn_images=self.options["bn_images"],
            seed=self.options["seed"],
            work=ctx.partial / "work",
            int8=self.options["int8_aware"],
            keep_float=self.options.get("keep_float", ()),
        )
        stock_ms = read_json(self.probe / "stock.json")["latency_ms"]["p50"]
        self.preference = Preference(**self.options["objective"], stock_ms=stock_ms)
        self.bench = Bench(
            ctx.partial,
            export=self.export,
            reference=self.space.stock,
            runtime=self.runtime,
            threads=profile["threads"],
            batch=self.options["batch"],
            probed_ms=level(measured),
            elsewhere=TargetConfig(**self.options["elsewhere"]) if "elsewhere" in self.options else None,
            host=ctx.host,
            note=ctx.progress.note,
        )
        self.scores = Memo(ctx.partial / "scores.jsonl")
        self.prior: Prior | None = None
        self.measured_ms: dict[Architecture, float] = {}
        self.best: tuple[float, float] | None = None  # mAP50-95, and latency in ms with the sign turned
        self.comparing = 0.0  # seconds spent on what the search is compared with
        self.done = 0.0
        self.scored = 0

    def run(self) -> None:
        """Narrow, learn, solve, evolve, score what it is compared with, measure, write."""
        from yolov8_nas.search.candidates import choose
        from yolov8_nas.search.evolution import evolve

        self.tell_rules()
        with self.ctx.host.computing():
            trials = evolve(
                self.space,
                self.price,
                self.score,
                population=self.options["population"],
                generations=self.options["generations"],
                seed=self.options["seed"],
                informed=self.informed(),
                propose=self.propose if self.options["exact"] else None,
                preference=self.preference,
                after_generation=self.refit,
            )
            if not any(trial.map50_95 for trial in trials):
                self.ctx.progress.note("every network scores 0: the supernet needs more epochs to tell networks apart")
            start = time.monotonic()
            compared = self.score_for_comparison(len(trials))
            self.comparing = time.monotonic() - start
            stock = self.score_stock()
            met, missed = choose(
                trials,
                self.costs,
                self.measure_candidates,
                count=self.options["candidates"],
                preference=self.preference,
            )
            if self.options["rescaled"]:
                start = time.monotonic()
                write_json(self.ctx.out / "rescaled.json", self.rescaled(met[0]))
                self.comparing += time.monotonic() - start
        self.write(trials, compared, met, missed, stock)

    def tell_rules(self) -> None:
        """Say what each hardware rule does and why, and write `rules.json`."""
        for rule in self.rules:
            self.ctx.progress.note(f"hardware rule {rule}")
        content = {
            "options": {
                "space": sum(len(d.options) for d in self.supernet.space.dimensions),
                "searched": sum(len(d.options) for d in self.space.dimensions),
            },
            "rules": [rule.to_dict() for rule in self.rules],
        }
        write_json(self.ctx.out / "rules.json", content)

    def informed(self) -> dict[Architecture, Source]:
        """Networks for the first generation: the best within the limits by the prior, and samples of it.

        An eighth and a quarter of the generation. The prior knows what each option is worth around the networks that it
        drew, not what two options are worth together, and relatives of stock have proved a good start: so most of the
        generation does not depend on it.

        Raises:
            StageError: No network keeps the limits; told here, before images are spent.
        """
        from yolov8_nas.search.evolution import first_generation

        population, seed = self.options["population"], self.options["seed"]
        rng = np.random.default_rng([seed, 0, 0])  # another stream than any generation's
        if self.options["exact"]:
            self.solve([[0.0] * len(d.options) for d in self.space.dimensions], solutions=1)
        else:
            first_generation(self.space, self.price, 1, rng)
        if not self.options["prior_steps"]:
            return {}
        self.prior = self.learn_prior()
        informed: dict[Architecture, Source] = {}
        if self.options["exact"]:
            informed |= dict.fromkeys(self.solve(self.prior.logits, solutions=max(1, population // EXACT)), "exact")
        samples = [self.prior.sample(self.space, rng) for _ in range(population // SAMPLED - 1)]
        for architecture in (self.prior.most_likely(self.space), *samples):
            informed.setdefault(architecture, "prior")
        return informed

    def learn_prior(self) -> Prior:
        """The prior, and `prior.json`."""
        from yolov8_nas.search.differentiable import PriorRecipe, learn_prior

        steps: int = self.options["prior_steps"]

        def progress(step: PriorStep) -> None:
            message = f"learning where to look, step {step.step} of {steps}: {step.expected_ms:.3g} ms expected"
            self.tell(LEARNING * step.step, message)

        limit_ms = self.affordable_ms()
        prior = learn_prior(
            self.supernet,
            self.data,
            self.linear(),
            limit_ms,
            recipe=PriorRecipe(steps=steps, imgsz=self.options["imgsz"], seed=self.options["seed"]),
            partial=self.ctx.partial / "prior",
            progress=progress,
        )
        self.done = LEARNING * steps
        content = {
            "limit_ms": limit_ms,
            "dimensions": [asdict(dimension) for dimension in self.space.dimensions],
            "worth": prior.worth,
            "trajectory": [asdict(step) for step in prior.trajectory],
            "most_likely": prior.most_likely(self.space).to_dict(),
        }
        write_json(self.ctx.out / "prior.json", content)
        return prior

    def affordable_ms(self) -> float | None:
        """What the linear part of the latency model may come to, as far as limits speak of latency; else nothing.

        A limit on a percentile, on throughput or with NMS becomes one on the linear part by their ratio in stock.
        """
        (expected,) = self.linear()([self.space.stock])
        (values,) = self.price([self.space.stock]).values
        return min(
            (
                expected * (limit.limit / value if limit.metric == "latency" else value / limit.limit)
                for limit, value in zip(self.costs.limits, values.tolist(), strict=True)
                if limit.metric in ("latency", "throughput")
            ),
            default=None,
        )

    def linear(self) -> LinearCost:
        """The linear part of the latency model as it stands now."""
        from yolov8_nas.search.linear_cost import LinearCost

        if self.tables is None:
            self.tables = LinearCost.of_latency(self.costs.latency)
        return self.tables

    def solve(self, worth: Utility, *, solutions: int) -> list[Architecture]:
        """The networks of the highest worth within the limits, which differ in `APART` choices at least.

        They are the best, or nearly: no time is spent on a proof, since scores decide.

        Raises:
            StageError: There are none; the limit that binds is named.
        """
        from yolov8_nas.search.exact import solve

        found = solve(self.space, worth, self.costs, self.linear(), solutions=solutions, distance=APART, cuts=CUTS)
        return [solution.architecture for solution in found]

    def propose(self, effects: Utility) -> list[Architecture]:
        """The best network within the limits by what the scores so far make of each option."""
        try:
            return self.solve(effects, solutions=1)
        except StageError as error:  # evolution may know one that the refitted model still allows
            self.ctx.progress.note(str(error))
            return []

    def price(self, architectures: Sequence[Architecture]) -> Estimate:
        """What networks cost by the cost model as it stands now."""
        return self.costs(architectures)

    def score(self, architectures: Sequence[Architecture]) -> list[float]:
        """Score networks, those excepted that were scored before an interruption."""
        if not architectures:
            return []
        for architecture, latency in zip(architectures, self.price(architectures).latency_ms, strict=True):
            if architecture not in self.scores:
                self.scores.add(architecture, self.scorer(architecture))
            self.done += 1
            self.scored += 1
            found = self.scores[architecture], -float(latency)
            self.best = max(self.best or found, found)
            generation = (self.scored - 1) // self.options["population"] + 1
            step = f"generation {generation}" if generation <= self.options["generations"] else "for comparison"
            self.tell(self.done, f"{step}, network {self.scored} of {self.to_score}")
        return [self.scores[architecture] for architecture in architectures]

    def score_stock(self) -> float:
        """Score stock YOLOv8 for comparison, whether or not it keeps the limits."""
        if self.space.stock not in self.scores:
            self.scores.add(self.space.stock, self.scorer(self.space.stock))
        return self.scores[self.space.stock]

    def score_for_comparison(self, searched: int) -> list[Trial]:
        """Score random networks and the largest within the limits, drawn by the latency model as it stands in the end.

        They are drawn with no regard to what the search has scored, and none of them is handed on: a comparison in
        which the search may take over what beats it would always come out well.

        Args:
            searched: Networks that the search itself has scored.
        """
        from yolov8_nas.search.baseline import mac_ranking, random_networks
        from yolov8_nas.search.evolution import Trial

        asked = self.options["random"]
        wanted = searched if asked == "equal" else asked
        trials: list[Trial] = []
        for repetition in range(self.options["random_seeds"]):
            stream = [self.options["seed"], repetition]
            drawn = random_networks(self.space, self.price, wanted, seed=[*stream, 1])
            largest = mac_ranking(
                self.space,
                self.price,
                self.options["mac_ranking"],
                num_classes=self.supernet.num_classes,
                imgsz=self.options["imgsz"],
                seed=[*stream, 2],
            )
            if len(drawn) < wanted:
                self.ctx.progress.note(f"only {len(drawn)} random networks keep the limits; they are scored")
            networks: Sequence[Architecture]
            source: Source
            for source, networks in (("random", drawn), ("macs", largest)):
                scores = self.score(networks)
                trials += [Trial(a, s, None, source, repetition) for a, s in zip(networks, scores, strict=True)]
        return trials

    def refit(self, generation: int, history: Sequence[Trial]) -> None:
        """Every few generations and after the last, measure networks of the front and refit the latency model.

        The model is of the hour in which the device was probed, and so is what it is refitted to: as it would have been
        at the level at which stock was then. Whether candidates keep the limits is told by how fast they are now.

        A device elsewhere is asked for the candidates only: each question is a journey.
        """
        number = generation + 1
        if "elsewhere" in self.options:
            return
        if number % self.options["measure_every"] and number < self.options["generations"]:
            return
        front = [trial.architecture for trial in self.front(history) if trial.architecture not in self.measured_ms]
        if not front:
            return
        from yolov8_nas.hardware.benchmark import PROBE

        chosen = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, FRONT).round().astype(int))]
        found = self.measure(chosen, PROBE, f"front-{number}")
        latencies = [one.at_level(self.bench.probed_ms).latency_ms.p50 for one in found]
        self.measured_ms |= zip(chosen, latencies, strict=True)
        self.costs = self.costs.refit(chosen, latencies)
        self.tables = None

    def front(self, trials: Sequence[Trial]) -> list[Trial]:
        """The networks within the limits that no other one beats in both accuracy and latency, from fast to slow."""
        from yolov8_nas.search.evolution import pareto_front

        estimate = self.price([trial.architecture for trial in trials])
        feasible = [trial for trial, ok in zip(trials, estimate.feasible, strict=True) if ok]
        latency = estimate.latency_ms[estimate.feasible]
        return [feasible[i] for i in pareto_front([trial.map50_95 for trial in feasible], latency)]

    def measure_candidates(self, architectures: Sequence[Architecture]) -> list[Measurement]:
        """Measure networks nearly as precisely as the verdict on what ships will be."""
        from yolov8_nas.hardware.benchmark import VERIFY

        self.done = max(self.done, LEARNING * self.options["prior_steps"] + self.to_score)
        protocol, name = replace(VERIFY, max_rounds=ROUNDS), f"candidates-{architectures[0].digest}"
        measurements = self.measure(architectures, protocol, name, weight=MEASURING * len(architectures))
        for architecture, measurement in zip(architectures, measurements, strict=True):
            self.measured_ms[architecture] = measurement.latency_ms.p50
        return measurements

    def rescaled(self, best: Candidate) -> dict[str, Any]:
        """Stock YOLOv8 with its width rescaled to the latency of the best candidate, both measured in the same rounds.

        The latency model knows the space's networks, and the rescaled one is none of them. So what its prediction was
        wrong by is taken off, and a few networks are tried until one is near.
        """
        from yolov8_nas.hardware.benchmark import PROBE
        from yolov8_nas.search.baseline import TOLERANCE, rescaled_stock

        candidate = best.trial.architecture

        def price(architecture: Architecture) -> float:
            return float(self.price([architecture]).latency_ms[0])

        tried: dict[Architecture, tuple[float, float]] = {}  # its latency and the candidate's
        correction = price(candidate) / best.measurement.latency_ms.p50
        for number in range(RESCALINGS):
            network = rescaled_stock(self.space.scale, price, correction * best.measurement.latency_ms.p50)
            if network in tried:
                break
            rival, own = self.measure([network, candidate], PROBE, f"rescaled-{number}")
            tried[network] = rival.latency_ms.p50, own.latency_ms.p50
            if abs(tried[network][0] / tried[network][1] - 1) <= TOLERANCE:
                break
            correction = price(network) / tried[network][0]
        nearest = min(tried, key=lambda network: abs(tried[network][0] / tried[network][1] - 1))
        latency_ms, candidate_ms = tried[nearest]
        return {"architecture": nearest.to_dict(), "latency_ms": latency_ms, "candidate_ms": candidate_ms}

    def measure(
        self, architectures: Sequence[Architecture], protocol: Protocol, name: str, *, weight: int = 0
    ) -> list[Measurement]:
        """Measure networks on the device as they would ship.

        Args:
            architectures: The networks.
            protocol: How to measure.
            name: Of the measurement, under which it is kept.
            weight: What it counts in progress.
        """

        def progress(share: float, total: float) -> None:
            self.tell(self.done + weight * share / total, f"measuring {len(architectures)} networks on the device")

        measurements = self.bench.measure(architectures, protocol, name, progress)
        self.done += weight
        return measurements

    def export(self, architecture: Architecture) -> Path:
        """The network's file with the supernet's weights, in the form and precision that the search is for."""
        from yolov8_nas.deploy.artifact import write_network
        from yolov8_nas.supernet.derive import build

        file = self.ctx.partial / "networks" / f"{architecture.digest}{self.runtime.suffix}"
        if file.exists():
            return file
        if architecture in self.supernet.space:
            model = self.scorer.network(architecture).cpu()
        else:  # a rescaled stock network; how fast it is does not depend on its weights
            model = build(architecture, self.supernet.num_classes).eval()
        calibration = self.scorer.calibration if self.runtime.precision == "int8" else ()
        return write_network(
            model,
            file,
            runtime=self.runtime,
            imgsz=self.options["imgsz"],
            batch=self.options["batch"],
            calibration=calibration,
            keep_float=self.options.get("keep_float", ()),
            nms_free=self.options.get("nms_free", False),
        )

    def tell(self, done: float, message: str) -> None:
        """Progress, with the best network so far."""
        total = LEARNING * self.options["prior_steps"] + self.to_score + MEASURING * self.options["candidates"]
        figures = {"best_map50_95": self.best[0], "latency_ms": -self.best[1]} if self.best else {}
        self.ctx.progress.update(min(done, total), total, message, **figures)

    @property
    def to_score(self) -> int:
        """Networks that are scored at most."""
        searched = self.options["generations"] * self.options["population"]
        drawn = searched if self.options["random"] == "equal" else self.options["random"]
        return int(searched + self.options["random_seeds"] * (drawn + self.options["mac_ranking"]))

    def write(
        self,
        trials: Sequence[Trial],
        compared: Sequence[Trial],
        met: Sequence[Candidate],
        missed: Sequence[Candidate],
        stock: float,
    ) -> None:
        """Write the results, all with latencies as the last latency model predicts them."""
        from yolov8_nas.search.evolution import SEARCHED
        from yolov8_nas.search.outcome import best_score, budget, comparison

        rows = self.rows([*trials, *compared])
        front = self.front(trials)
        by_source: dict[Source, list[Trial]] = {}
        for trial in (*trials, *compared):
            by_source.setdefault(trial.source, []).append(trial)
        atomic_write(self.ctx.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_json(self.ctx.out / "front.json", self.rows(front))
        write_json(self.ctx.out / "candidates.json", [candidate.to_dict() for candidate in met])
        estimate = self.price([self.space.stock])
        content = {
            "settings": dict(self.options),
            "limits": [str(limit) for limit in self.costs.limits],
            "objective": self.preference.to_dict(),
            "counts": {
                **{str(source): len(group) for source, group in by_source.items()},
                "front": len(front),
                "measured": len(self.measured_ms),
            },
            "best_map50_95": {source: best_score(self.costs, group) for source, group in by_source.items()},
            "comparisons": {
                source: comparison(self.costs, trials, group)
                for source, group in by_source.items()
                if source not in SEARCHED
            },
            "stock": {
                "map50_95": stock,
                "latency_ms": float(estimate.latency_ms[0]),
                "upper_ms": float(estimate.upper_ms[0]),
                "feasible": bool(estimate.feasible[0]),
            },
            "slack": [candidate.slack for candidate in met],
            "budget": budget(self.costs, trials, met[0]),
            "missed": [candidate.to_dict() for candidate in missed],
            "tail": dict(self.costs.tail),
            "seconds": round(time.monotonic() - self.start, 1),
            "seconds_comparing": round(self.comparing, 1),
        }
        write_json(self.ctx.out / "search.json", content)

    def rows(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Scored networks as they stand in files."""
        estimate = self.price([trial.architecture for trial in trials])
        rows = []
        for trial, latency, upper in zip(trials, estimate.latency_ms, estimate.upper_ms, strict=True):
            row: dict[str, Any] = {
                "architecture": trial.architecture.to_dict(),
                "genes": list(self.supernet.space.encode(trial.architecture)),
                "map50_95": trial.map50_95,
                "latency_ms": float(latency),
                "upper_ms": float(upper),
                "generation": trial.generation,
                "source": trial.source,
                "repetition": trial.repetition,
            }
            if trial.architecture in self.measured_ms:
                row["measured_ms"] = self.measured_ms[trial.architecture]
            rows.append(row)
        return rows


def _require_images(data: Path) -> None:
    """Check that there is something to search with.

    Raises:
        InputError: The search split has no images.
    """
    if not read_json(data / "dataset.json")["images"]["search"]:
        raise InputError(
            f"{data / 'dataset.json'}: the search split has no images, so no network can be scored; "
            "give a train split of at least two images with boxes"
        )
