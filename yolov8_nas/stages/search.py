"""search: the networks that trade accuracy for latency best on one target, within its limits.

Scores and measurements are remembered in `partial`. After an interruption the same search runs again from its start, in
a blink as far as they reach, and goes on from the last network.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.search.constraint import Constraint
from yolov8_nas.stages.stage import Settings, Stage, StageContext
from yolov8_nas.store import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from yolov8_nas.hardware.benchmark import Measurement, Protocol
    from yolov8_nas.search.candidates import Candidate
    from yolov8_nas.search.evolution import Trial
    from yolov8_nas.search.objective import Estimate
    from yolov8_nas.space import Architecture

BATCH: Final = 16
"""Images at once when networks are scored."""

FRONT: Final = 8
"""Networks measured at most when the latency model is refitted."""

ROUNDS: Final = 12
"""Rounds in which candidates are measured at most; the verdict on what ships takes more where it needs them."""

MEASURING: Final = 5
"""What measuring a candidate counts in progress; scoring a network counts 1."""


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """What the search depends on beside its inputs; the limits come resolved from hw-probe."""
    assert target is not None
    return {
        "precision": target.precision,
        "batch": target.batch,
        "imgsz": config.imgsz,
        **config.search.model_dump(),
        "seed": config.seed,
    }


def run(ctx: StageContext) -> None:
    """Write `history.jsonl`, `front.json`, `search.json` and `candidates.json`.

    Raises:
        StageError: No network keeps the limits, by prediction or as measured.
    """
    _Search(ctx).run()


STAGE = Stage(name="search", version=1, settings=settings, run=run)


class _Search:
    """One run of the stage."""

    def __init__(self, ctx: StageContext) -> None:
        import torch

        from yolov8_nas.data.dataset import data_yaml
        from yolov8_nas.hardware.latency_model import LatencyModel
        from yolov8_nas.hardware.profile import available_cores
        from yolov8_nas.search.memo import Memo
        from yolov8_nas.search.objective import CostModel, Scorer
        from yolov8_nas.supernet.supernet import Supernet

        torch.set_num_threads(available_cores())
        self.ctx = ctx
        self.start = time.monotonic()
        self.options = ctx.settings
        self.probe = ctx.inputs["hw-probe"]
        self.threads: int = read_json(self.probe / "profile.json")["threads"]
        self.supernet = Supernet.load(ctx.inputs["supernet-train"])
        self.space = self.supernet.space
        self.costs = CostModel.from_probe(
            [Constraint.from_row(row) for row in read_json(self.probe / "constraints.json")],
            LatencyModel.from_dict(read_json(self.probe / "latency_model.json")),
            read_json(self.probe / "latency_table.json")["rows"],
            num_classes=self.supernet.num_classes,
            imgsz=self.options["imgsz"],
            batch=self.options["batch"],
        )
        self.scorer = Scorer(
            self.supernet,
            data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search"),
            imgsz=self.options["imgsz"],
            batch=BATCH,
            bn_images=self.options["bn_images"],
            seed=self.options["seed"],
            work=ctx.partial / "work",
        )
        self.scores = Memo(ctx.partial / "scores.jsonl")
        self.latencies = Memo(ctx.partial / "latencies.jsonl")
        self.measured_ms: dict[Architecture, float] = {}
        self.best: tuple[float, float] | None = None  # mAP50-95, and latency in ms with the sign turned
        self.done = 0

    def run(self) -> None:
        """Evolve, draw at random for comparison, measure, write."""
        from yolov8_nas.search.candidates import choose
        from yolov8_nas.search.evolution import Trial, evolve, random_networks

        with self.ctx.host.computing():
            trials = evolve(
                self.space,
                self.price,
                self.score,
                population=self.options["population"],
                generations=self.options["generations"],
                seed=self.options["seed"],
                after_generation=self.refit,
            )
            drawn = random_networks(
                self.space,
                self.price,
                self.options["random"],
                seen={trial.architecture for trial in trials},
                seed=self.options["seed"],
            )
            if len(drawn) < self.options["random"]:
                self.ctx.progress.note(f"only {len(drawn)} random networks keep the limits; they are scored")
            trials += [Trial(a, s, None, "random") for a, s in zip(drawn, self.score(drawn), strict=True)]
            if not any(trial.map50_95 for trial in trials):
                self.ctx.progress.note("every network scores 0: the supernet needs more epochs to tell networks apart")
            stock = self.score_stock()
            met, missed = choose(trials, self.costs, self.measure_candidates, count=self.options["candidates"])
        self.write(trials, met, missed, stock)

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
            found = self.scores[architecture], -float(latency)
            self.best = max(self.best or found, found)
            generation = (self.done - 1) // self.options["population"] + 1
            step = f"generation {generation}" if generation <= self.options["generations"] else "random networks"
            self.tell(self.done, f"{step}, network {self.done} of {self.to_score}")
        return [self.scores[architecture] for architecture in architectures]

    def score_stock(self) -> float:
        """Score stock YOLOv8 for comparison, whether or not it keeps the limits."""
        if self.space.stock not in self.scores:
            self.scores.add(self.space.stock, self.scorer(self.space.stock))
        return self.scores[self.space.stock]

    def refit(self, generation: int, history: Sequence[Trial]) -> None:
        """Every few generations, measure networks of the front and fit the latency model to them as well."""
        number = generation + 1
        if number % self.options["measure_every"] or number == self.options["generations"]:
            return
        front = [trial.architecture for trial in self.front(history) if trial.architecture not in self.measured_ms]
        if not front:
            return
        chosen = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, FRONT).round().astype(int))]
        unknown = [architecture for architecture in chosen if architecture not in self.latencies]
        if unknown:
            from yolov8_nas.hardware.benchmark import PROBE

            self.ctx.progress.note(f"measuring {len(unknown)} networks of the front after generation {number}")
            for architecture, measurement in zip(
                unknown, self.measure(unknown, PROBE, f"front-{number}.json"), strict=True
            ):
                self.latencies.add(architecture, measurement.latency_ms.p50)
        latencies = [self.latencies[architecture] for architecture in chosen]
        self.measured_ms |= zip(chosen, latencies, strict=True)
        self.costs = self.costs.refit(chosen, latencies)

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

        self.done = max(self.done, self.to_score)
        protocol, checkpoint = replace(VERIFY, max_rounds=ROUNDS), f"candidates-{architectures[0].digest}.json"
        measurements = self.measure(architectures, protocol, checkpoint, weight=MEASURING * len(architectures))
        for architecture, measurement in zip(architectures, measurements, strict=True):
            self.measured_ms[architecture] = measurement.latency_ms.p50
        return measurements

    def measure(
        self, architectures: Sequence[Architecture], protocol: Protocol, checkpoint: str, *, weight: int = 0
    ) -> list[Measurement]:
        """Export networks as they ship and measure them in the same rounds, with stock as the reference network.

        Args:
            architectures: The networks.
            protocol: How to measure.
            checkpoint: Name of the file in `partial` from which an interrupted measurement goes on.
            weight: What it counts in progress.
        """
        from yolov8_nas.hardware.benchmark import measure

        files = [self.export(architecture) for architecture in (*architectures, self.space.stock)]

        def progress(share: float, total: float) -> None:
            self.tell(self.done + weight * share / total, f"measuring {len(architectures)} networks on the device")

        with self.ctx.host.measuring():
            measurements = measure(
                files[:-1],
                threads=self.threads,
                protocol=protocol,
                reference=files[-1],
                progress=progress,
                checkpoint=self.ctx.partial / checkpoint,
            )
        self.done += weight
        return measurements

    def export(self, architecture: Architecture) -> Path:
        """The network's ONNX file with the supernet's weights, in the precision that the search is for."""
        from yolov8_nas.deploy.onnx import export_int8_ptq, export_onnx

        file = self.ctx.partial / "networks" / f"{architecture.digest}.onnx"
        if file.exists():
            return file
        model, imgsz, batch = self.scorer.network(architecture), self.options["imgsz"], self.options["batch"]
        if self.options["precision"] == "int8":
            return export_int8_ptq(model, file, imgsz=imgsz, batch=batch, calibration=self.scorer.calibration)
        return export_onnx(model, file, imgsz=imgsz, batch=batch)

    def tell(self, done: float, message: str) -> None:
        """Progress, with the best network so far."""
        total = self.to_score + MEASURING * self.options["candidates"]
        figures = {"best_map50_95": self.best[0], "latency_ms": -self.best[1]} if self.best else {}
        self.ctx.progress.update(min(done, total), total, message, **figures)

    @property
    def to_score(self) -> int:
        """Networks that are scored at most."""
        return int(self.options["generations"] * self.options["population"] + self.options["random"])

    def write(
        self, trials: Sequence[Trial], met: Sequence[Candidate], missed: Sequence[Candidate], stock: float
    ) -> None:
        """Write the results, all with latencies as the last latency model predicts them."""
        rows = self.rows(trials)
        atomic_write(self.ctx.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        front = self.front([trial for trial in trials if trial.source != "random"])
        write_json(self.ctx.out / "front.json", self.rows(front))
        write_json(self.ctx.out / "candidates.json", [candidate.to_dict() for candidate in met])
        sources = {row["source"] for row in rows}
        estimate = self.price([self.space.stock])
        content = {
            "settings": dict(self.options),
            "limits": [str(limit) for limit in self.costs.limits],
            "counts": {
                **{source: sum(row["source"] == source for row in rows) for source in sorted(sources)},
                "front": len(front),
                "measured": len(self.measured_ms),
            },
            "best_map50_95": {
                source: max(row["map50_95"] for row in rows if row["source"] == source) for source in sorted(sources)
            },
            "stock": {
                "map50_95": stock,
                "latency_ms": float(estimate.latency_ms[0]),
                "upper_ms": float(estimate.upper_ms[0]),
                "feasible": bool(estimate.feasible[0]),
            },
            "slack": [candidate.slack for candidate in met],
            "missed": [candidate.to_dict() for candidate in missed],
            "tail": dict(self.costs.tail),
            "seconds": round(time.monotonic() - self.start, 1),
        }
        write_json(self.ctx.out / "search.json", content)

    def rows(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Scored networks as they stand in files."""
        estimate = self.price([trial.architecture for trial in trials])
        rows = []
        for trial, latency, upper in zip(trials, estimate.latency_ms, estimate.upper_ms, strict=True):
            row: dict[str, Any] = {
                "architecture": trial.architecture.to_dict(),
                "genes": list(self.space.encode(trial.architecture)),
                "map50_95": trial.map50_95,
                "latency_ms": float(latency),
                "upper_ms": float(upper),
                "generation": trial.generation,
                "source": trial.source,
            }
            if trial.architecture in self.measured_ms:
                row["measured_ms"] = self.measured_ms[trial.architecture]
            rows.append(row)
        return rows
