"""The table of measured networks and the latency model that is fitted to it.

A network that cannot be built or run (it has no room in memory, say) is recorded with the reason and left out. Where
that happens to stock, or to more than a share of `FAILURES`, there is something wrong with more than a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Final

import numpy as np

from yolov8_nas.device.counters import why_not
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import write_json
from yolov8_nas.measure import nms
from yolov8_nas.measure.benchmark import Failed, Measurement
from yolov8_nas.measure.latency_model import Floats, LatencyModel, accuracy
from yolov8_nas.measure.returned import Returned
from yolov8_nas.measure.sampling import Sample, sample
from yolov8_nas.measure.target import Target
from yolov8_nas.runner.results import (
    AsExported,
    Conditions,
    FailedNetwork,
    Latency,
    LatencyFit,
    LatencyTable,
    NmsResult,
    PredictionErrors,
    Regime,
    StockResult,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.stages.hw_probe.bench import Bench
from yolov8_nas.stages.hw_probe.settings import TableSettings

FAILURES: Final = 0.1
"""Share of the networks that may fail before the probe does."""

_C2F: Final = "stock-as-c2f"
"""Name under which stock in Ultralytics' own form is measured elsewhere."""


class Table:
    """What is measured whatever the limits are.

    Args:
        ctx: The context of the shared part.
        results: What was measured of a device elsewhere; nothing for one that is here.
    """

    def __init__(self, ctx: StageContext[TableSettings], results: Returned | None = None) -> None:
        self.ctx = ctx
        self.settings = ctx.settings
        self.results = results
        self.bench = Bench.of(ctx)
        self.space = self.bench.space
        self.samples = sample(self.space, ctx.settings.networks, ctx.settings.holdout, ctx.settings.seed)
        self.measured: dict[Architecture, Measurement] = {}
        self.failed: dict[Architecture, str] = {}

    def run(self) -> None:
        """Export, measure, fit, write, judge."""
        if self.results is not None:
            self.take_in_results(self.results)
            return

        runtime = self.bench.runtime
        # The name is the settings' own: on another machine with the same key it means the same.
        device = Target(self.settings.name, runtime.kind, runtime.name, runtime.precision, self.bench.threads)
        profile, regime = device.profile, device.regime
        write_json(self.ctx.out / Profile.FILE, profile.to_dict())
        with self.ctx.host.computing():
            files, self.failed = self.bench.export_all(self.samples)
        with self.ctx.host.measuring():
            before = regime()
            *found, c2f = self.bench.measure([*files.values(), self.bench.export_as_c2f()], "legs.jsonl")
            timed = nms.time_nms(
                num_classes=self.bench.num_classes,
                imgsz=self.settings.imgsz,
                batch=self.settings.batch,
                nms_free=self.settings.nms_free,
            )
            after = regime()
        conditions = Conditions(
            threads=self.bench.threads,
            runtime=dict(self.settings.device.runtime),
            counter=self.settings.counter,
            no_counter=why_not(profile.kind),
            regime=Regime(before=before, after=after),
        )
        timed.write(self.ctx.out)
        self.take_in(dict(zip(files, found, strict=True)), c2f, conditions)

    def take_in(
        self,
        found: Mapping[Architecture, Measurement | Failed],
        c2f: Measurement | Failed,
        conditions: Conditions,
    ) -> None:
        """Make the table and the model of what was measured.

        Args:
            found: By network.
            c2f: Of stock in Ultralytics' own form.
            conditions: How it was measured, for the record.

        Raises:
            StageError: Too much failed, or latency is predicted too badly.
        """

        self.measured = {a: one for a, one in found.items() if isinstance(one, Measurement)}
        self.failed |= {a: one.reason for a, one in found.items() if isinstance(one, Failed)}
        self._judge_failures(c2f)
        assert isinstance(c2f, Measurement)
        self._stock(c2f).write(self.ctx.out)
        LatencyTable(
            protocol=asdict(self.settings.protocol),
            conditions=conditions,
            rows=tuple(self.bench.row(s, self.measured[s.architecture]) for s in self.samples if self._was_measured(s)),
            failed=tuple(
                FailedNetwork(architecture=s.architecture, role=s.role, reason=self.failed[s.architecture])
                for s in self.samples
                if not self._was_measured(s)
            ),
        ).write(self.ctx.out)
        # Written before it is judged: a probe that fails leaves the evidence.
        mape = self._write_model()
        if mape > self.settings.max_mape:
            raise StageError(self._poor_fit(mape))

    def take_in_results(self, results: Returned) -> None:
        """Make the table and the model of what was measured elsewhere.

        Raises:
            InputError: It was measured for another number of classes.
            StageError: As `take_in`.
        """
        if results.num_classes != self.bench.num_classes:
            raise InputError(
                f"the device elsewhere was measured with networks of {results.num_classes} classes, and the dataset "
                f"has {self.bench.num_classes}; pack a bundle for this dataset (yolov8-nas probe CONFIG --bundle FILE)"
            )
        measured = results.measured
        self.failed = {s.architecture: results.failed.get(s.architecture.digest, "") for s in self.samples}
        self.failed = {architecture: reason for architecture, reason in self.failed.items() if reason}
        write_json(self.ctx.out / Profile.FILE, results.profile.to_dict())
        NmsResult(latency_ms=None, reason="not measured on a device elsewhere").write(self.ctx.out)
        conditions = Conditions(
            threads=self.bench.threads,
            runtime=results.profile.runtime,
            counter=results.counter,
            no_counter=results.no_counter,
            regime=Regime.model_validate(results.regime),
            bundle=results.bundle,
        )
        wanted = [s.architecture for s in self.samples if s.architecture not in self.failed]
        lacking = [name for name in (*(a.digest for a in wanted), _C2F) if name not in measured]
        if lacking:
            raise InputError(
                f"the results of the device elsewhere lack {len(lacking)} of the networks that the table is made of, "
                f"{lacking[0]} first; pack a bundle for this dataset and measure that (yolov8-nas probe CONFIG "
                "--bundle FILE)"
            )
        found = {architecture: measured[architecture.digest] for architecture in wanted}
        self.take_in(found, measured[_C2F], conditions)

    def _was_measured(self, s: Sample) -> bool:
        return s.architecture in self.measured

    def _judge_failures(self, c2f: Measurement | Failed) -> None:
        """Say what failed.

        Raises:
            StageError: It is stock, or too much.
        """

        stock = self.failed.get(self.space.stock) or (c2f.reason if isinstance(c2f, Failed) else None)
        if stock:
            raise StageError(f"stock YOLOv8 cannot be measured: {stock}")
        if not self.failed:
            return
        told = (
            f"{len(self.failed)} of {len(self.samples)} networks could not be built or measured, the first because "
            f"{next(iter(self.failed.values()))}"
        )
        if len(self.failed) > FAILURES * len(self.samples):
            raise StageError(f"{told}; at most {FAILURES:.0%} may fail: free memory, or take a smaller space or batch")
        self.ctx.progress.note(f"{told}; left out")

    def _stock(self, c2f: Measurement) -> StockResult:
        paper = cost(self.space.stock, self.bench.num_classes, self.settings.imgsz)
        stock = self.measured[self.space.stock]
        return StockResult(
            scale=self.space.scale,
            architecture=self.space.stock,
            latency_ms=Latency(**asdict(stock.latency_ms)),
            memory_mb=stock.memory_mb,
            energy_mj=stock.energy_mj,
            power_w=stock.power_w,
            params=paper.params,
            gflops=paper.gflops,
            as_ultralytics_exports_it=AsExported(latency_ms=Latency(**asdict(c2f.latency_ms)), memory_mb=c2f.memory_mb),
        )

    def _write_model(self) -> float:
        """Fit and write the latency model with its errors.

        Returns:
            Its mean absolute percentage error on the held-out networks, as a share.
        """
        latency = {a: m.latency_ms.p50 for a, m in self.measured.items()}
        model, errors, upper = self._fit(latency)
        counted = {a: m.energy_mj for a, m in self.measured.items() if m.energy_mj is not None}
        held_out = self._held_out
        LatencyFit(
            **dict(model.to_result()),
            **dict(errors),
            networks=len(model.architectures),
            holdout=len(held_out),
            coverage=float(np.mean([latency[a] for a in held_out] <= upper)),
            scatter=self._scatter(),
            energy=self._fit(counted)[1] if len(counted) == len(self.measured) else None,
        ).write(self.ctx.out)
        return errors.mape

    def _fit(self, values: Mapping[Architecture, float]) -> tuple[LatencyModel, PredictionErrors, Floats]:
        """A model of latencies (or energies), its errors on the held-out networks, and their upper bounds."""
        fitted = [s.architecture for s in self.samples if s.role != "holdout" and self._was_measured(s)]
        model = LatencyModel.fit(
            self.space,
            self.bench.num_classes,
            self.settings.imgsz,
            fitted,
            [values[architecture] for architecture in fitted],
            seed=self.settings.seed,
        )
        predicted, upper = model.predict(self._held_out)
        return model, accuracy(predicted, np.array([values[a] for a in self._held_out])), upper

    @cached_property
    def _held_out(self) -> list[Architecture]:
        return [s.architecture for s in self.samples if s.role == "holdout" and self._was_measured(s)]

    def _scatter(self) -> float:
        """Half-width of the 95% interval of p50, as a share of it: the median over the networks."""
        halves = [(m.interval_ms[1] - m.interval_ms[0]) / 2 / m.latency_ms.p50 for m in self.measured.values()]
        return float(np.median(halves))

    def _poor_fit(self, mape: float) -> str:
        return (
            f"latency is predicted with a mean error of {mape:.1%} on {self.settings.holdout} held-out networks,"
            f" more than probe.max_mape = {self.settings.max_mape:.1%}; the measurements themselves scatter by "
            f"{self._scatter():.1%}. On a busy machine make it quiet and run again; otherwise raise probe.networks "
            f"(now {self.settings.networks})"
        )
