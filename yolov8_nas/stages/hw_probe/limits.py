"""Limits held against the measured networks: whether any network keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from yolov8_nas.errors import StageError
from yolov8_nas.measure.benchmark import Failed, Measurement, level
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.measure.sampling import Sample
from yolov8_nas.runner.results import LatencyFit, LatencyTable, NmsResult, ProbedNetwork, ResolvedLimit
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search.nearest import closest_predicted
from yolov8_nas.search.objective import CostModel, figures, with_nms
from yolov8_nas.space import Architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.space.limits import Constraint, Figures
from yolov8_nas.stages.hw_probe.bench import Bench
from yolov8_nas.stages.hw_probe.settings import ProbeSettings


class Limits:
    """The limits, held against the table's networks."""

    def __init__(self, ctx: StageContext[ProbeSettings]) -> None:
        self.ctx = ctx
        self.bench = Bench.of(ctx)
        self.table = LatencyTable.read(ctx.out)
        nms_ms = NmsResult.read(ctx.out).latency_ms
        self.nms_ms: dict[str, float] | None = dict(nms_ms) if nms_ms else None
        self.figures = {row.architecture: self._figures(row) for row in self.table.rows}
        asked = map(Constraint.parse, ctx.settings.constraints)
        stock = self.figures[self.bench.space.stock]
        self.limits = [limit.resolve(stock.value(limit)) for limit in asked]

    def run(self) -> None:
        """Write the limits, and see that some network keeps each of them, and all of them together.

        Raises:
            StageError: None was found that does.
        """
        texts = self.ctx.settings.constraints
        rows = [ResolvedLimit(**limit.to_row(), text=text) for limit, text in zip(self.limits, texts, strict=True)]
        ResolvedLimit.write_all(self.ctx.out, rows)
        alone = [limit for limit in self.limits if not self._kept([limit])]
        if alone:
            raise StageError(self._unreachable(alone))
        if not self._kept(self.limits):
            raise StageError(self._incompatible())

    def _figures(self, row: ProbedNetwork) -> Figures[float]:
        paper = cost(row.architecture, self.bench.num_classes, self.ctx.settings.imgsz)
        timed = with_nms(dict(row.latency_ms), self.nms_ms) if self.nms_ms else None
        return figures(Measurement.from_dict(row.plain()), paper, batch=self.ctx.settings.batch, with_nms_ms=timed)

    def _kept(self, limits: Sequence[Constraint]) -> bool:
        """Whether some measured network keeps the limits; one that comes closest by prediction is measured as well."""
        if self._closest(limits)[1] > 0 and self.ctx.settings.elsewhere is None:
            self._measure_closest(limits)
        return self._closest(limits)[1] <= 0

    def _closest(self, limits: Sequence[Constraint]) -> tuple[Architecture, float]:
        """The measured network that misses the limits least, and its worst miss as a share of the limit."""
        missed = {a: max(limit.violation(f.value(limit)) for limit in limits) for a, f in self.figures.items()}
        closest = min(missed, key=lambda architecture: missed[architecture])
        return closest, missed[closest]

    def _measure_closest(self, limits: Sequence[Constraint]) -> None:
        """Measure the network that is predicted to come closest to the limits, unless it is measured already."""
        costs = CostModel.from_probe(
            limits,
            LatencyModel.of(LatencyFit.read(self.ctx.out)),
            self.table.rows,
            num_classes=self.bench.num_classes,
            imgsz=self.ctx.settings.imgsz,
            batch=self.ctx.settings.batch,
            nms_ms=self.nms_ms,
        )
        closest = closest_predicted(costs, self.bench.space, self._closest(limits)[0])
        if closest in self.figures:
            return
        self.ctx.progress.note(
            f"no measured network keeps {' and '.join(map(str, limits))}; measuring the one predicted to come closest"
        )
        with self.ctx.host.computing():
            file = self.bench.export(closest)
            with self.ctx.host.measuring():
                (measurement,) = self.bench.measure([file], f"{closest.digest}-legs.jsonl")
        if isinstance(measurement, Failed):
            self.ctx.progress.note(f"it could not be measured: {measurement.reason}")
            return
        row = self.bench.row(Sample(closest, "fastest"), measurement.at_level(level(self.table.rows)))
        self.table = self.table.model_copy(update={"rows": (*self.table.rows, row)})
        self.figures[closest] = self._figures(row)
        self.table.write(self.ctx.out)

    def _unreachable(self, missed: Sequence[Constraint]) -> str:
        told = []
        for limit in missed:
            best = self.figures[self._closest([limit])[0]].value(limit)
            told.append(f"{limit} cannot be kept: the best that is achievable is {best:.4g} {limit.unit}")
        return f"{'; '.join(told)} {self._where()}"

    def _incompatible(self) -> str:
        closest = self.figures[self._closest(self.limits)[0]]
        values = ", ".join(f"{limit.quantity} {closest.value(limit):.4g} {limit.unit}" for limit in self.limits)
        binding = max(self.limits, key=lambda limit: limit.violation(closest.value(limit)))
        return (
            f"{' and '.join(map(str, self.limits))} can each be kept, but not together: the network that comes closest "
            f"has {values}, so {binding} binds {self._where()}"
        )

    def _where(self) -> str:
        return (
            f"(measured on {self.ctx.settings.device.id} at {self.ctx.settings.imgsz} px, the best of "
            f"{len(self.figures)} networks of space {self.bench.space.name}); change the limit, the space or imgsz"
        )
