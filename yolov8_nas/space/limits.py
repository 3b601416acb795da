"""Limits that a detector must keep, e.g. `latency<=2.5ms`, `latency_p99(with_nms)<=4ms`, `memory<=1GiB`,
`energy<=30mJ`, `latency<=80%stock`.

A limit is kept in one unit per metric (`UNITS`), so that what is compared is always the same quantity.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.errors import InputError

Value = TypeVar("Value", float, NDArray[np.float64])

UNITS: Final[Mapping[str, tuple[str, Mapping[str, float]]]] = {
    "latency": ("ms", {"us": 1e-3, "ms": 1.0, "s": 1e3}),
    "throughput": ("img/s", {"img/s": 1.0, "fps": 1.0}),
    "memory": ("MiB", {"MB": 1e6 / 2**20, "GB": 1e9 / 2**20, "MiB": 1.0, "GiB": 1024.0}),
    "power": ("W", {"mW": 1e-3, "W": 1.0}),
    "energy": ("mJ", {"mJ": 1.0, "J": 1e3}),
    "params": ("M", {"K": 1e-3, "M": 1.0}),
    "flops": ("G", {"M": 1e-3, "G": 1.0}),
}
"""Metric: its unit here, and the factors from the units that people write. Energy is per image."""

COUNTED: Final = ("power", "energy")
"""Metrics that only a device with an energy counter can tell."""

STATISTICS: Final = ("p50", "p90", "p99")

LOWER: Final = ("throughput",)
"""Metrics whose limits are lower ones."""

_MEANT: Final[Mapping[str, tuple[str, ...]]] = {
    "latency": ("time", "speed", "delay", "inference", "ms", "lat", "runtime", "duration"),
    "throughput": ("fps", "ips", "qps", "hz", "rate", "framerate", "images", "img/s"),
    "memory": ("ram", "vram", "mem", "gpu_mem", "footprint"),
    "power": ("watt", "watts", "tdp", "w"),
    "energy": ("joule", "joules", "mj", "j"),
    "params": ("parameters", "parameter", "param", "size", "weights", "model_size"),
    "flops": ("flop", "gflops", "gflop", "macs", "gmacs", "mac", "ops", "gops", "flops_g"),
}
"""What people write where they mean a metric."""

_SCORES: Final = re.compile(r"m?ap([_@-]?\d+([_:.-]*\d+)?)?|accuracy|acc|precision|recall|f1|score|fitness|loss")
"""What people write where they mean how good a detector is."""

_PATTERN: Final = re.compile(
    r"(?P<metric>[A-Za-z][A-Za-z/]*?)(_(?P<statistic>p\d+))?(\((?P<scope>\w+)\))?(?P<relation>[<>]=?)"
    r"(?P<number>[-+]?\d+(\.\d+)?([eE][-+]?\d+)?)(?P<unit>%stock|[^\d\s.,]+)?"
)
_ROUGHLY: Final = re.compile(r"(?P<name>[^<>=≤≥]*)(?P<relation>[<>=≤≥]*)(?P<amount>.*)", re.DOTALL)


@dataclass(frozen=True)
class Constraint:
    """One hard limit.

    Attributes:
        metric: A key of `UNITS`. `throughput` is a lower limit, every other one an upper limit.
        statistic: Percentile of latency; `p50` unless said otherwise.
        scope: `engine` (the network alone) or `with_nms`.
        limit: In the metric's unit; for a relative limit, the share of stock YOLOv8's value.
        relative: Whether `limit` is a share of the stock network's measured value.
        share: Of a limit that was relative and is absolute now: the share of stock's value that it stands for.
    """

    metric: str
    statistic: str
    scope: str
    limit: float
    relative: bool
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read a limit as people write it.

        Raises:
            InputError: It does not parse, is not positive, or names a metric, unit or statistic that does not exist.
        """
        match = _PATTERN.fullmatch(re.sub(r"\s+", "", text))
        if not match or match["metric"].lower() not in UNITS or not match["unit"]:
            raise InputError(f"constraint {text!r}{_fault(text)}")
        metric, unit = match["metric"].lower(), match["unit"]
        statistic, scope = match["statistic"] or "p50", match["scope"] or "engine"
        if match["statistic"] and metric != "latency":
            raise InputError(f"constraint {text!r}: only latency has percentiles; write {metric}")
        if statistic not in STATISTICS:
            raise InputError(f"constraint {text!r}: unknown percentile {statistic!r}; use {', '.join(STATISTICS)}")
        if scope not in ("engine", "with_nms"):
            raise InputError(f"constraint {text!r}: unknown scope {scope!r}; use engine or with_nms")
        if scope != "engine" and metric not in ("latency", "throughput"):
            raise InputError(f"constraint {text!r}: {metric} has no scope; write {metric}")
        wanted = ">" if metric in LOWER else "<"
        if match["relation"][0] != wanted:
            raise InputError(f"constraint {text!r}: a limit on {metric} is written {metric}{wanted}=...")
        limit = float(match["number"])
        if not 0 < limit < float("inf"):
            raise InputError(f"constraint {text!r}: the limit must be a positive number, not {match['number']}")
        if unit == "%stock":
            return cls(metric, statistic, scope, limit / 100, relative=True)
        factors = UNITS[metric][1]
        if unit not in factors:
            written = {known.lower(): known for known in factors}
            alike = difflib.get_close_matches(unit.lower(), [*written], n=1, cutoff=0.5)
            alike = ["%stock"] if unit.startswith("%") else alike
            near = f"; did you mean {match['number']}{written.get(alike[0], alike[0])}?" if alike else ""
            raise InputError(
                f"constraint {text!r}: unknown unit {unit!r} for {metric}; use {', '.join(factors)}, or %stock for a "
                f"share of stock YOLOv8's{near}"
            )
        return cls(metric, statistic, scope, limit * factors[unit], relative=False)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Constraint:
        """An absolute limit as hw-probe writes it to `constraints.json`."""
        return cls(row["metric"], row["statistic"], row["scope"], row["limit"], relative=False, share=row.get("share"))

    def to_row(self) -> dict[str, Any]:
        """An absolute limit as it stands in files; one that was relative with its share, and stock's value for it."""
        row = {name: getattr(self, name) for name in ("metric", "statistic", "scope", "limit", "unit")}
        return row if self.share is None else {**row, "share": self.share, "stock": self.limit / self.share}

    @property
    def quantity(self) -> str:
        """Name of what is limited, for example `latency_p50` or `latency_p99(with_nms)`."""
        name = f"{self.metric}_{self.statistic}" if self.metric == "latency" else self.metric
        return name if self.scope == "engine" else f"{name}({self.scope})"

    @property
    def unit(self) -> str:
        """Unit of `limit`, or `of stock` for a share of the stock network's value."""
        return "of stock" if self.relative else UNITS[self.metric][0]

    def resolve(self, stock: float) -> Constraint:
        """This limit as an absolute one, given the stock network's measured value in the metric's unit."""
        if not self.relative:
            return self
        return replace(self, limit=self.limit * stock, relative=False, share=self.limit)

    def beside(self, stock: float) -> Constraint:
        """This absolute limit for networks that were measured beside stock, in the same rounds.

        A share of stock is a ratio of two times of one hour: a device is some per cent faster or slower in another one.

        Args:
            stock: What was measured of stock there, in the metric's unit; NaN where it was not.
        """
        return self if self.share is None or math.isnan(stock) else replace(self, limit=self.share * stock)

    def met(self, value: float) -> bool:
        """Whether a measured value keeps the limit.

        Raises:
            ValueError: The limit is relative and has not been resolved.
        """
        if self.relative:
            raise ValueError(f"{self} is relative to stock: resolve it first")
        return value >= self.limit if self.metric in LOWER else value <= self.limit

    def violation(self, value: Value) -> Value:
        """How far a value, or each of an array, misses the limit, as a share of it; 0 or less where it keeps it."""
        excess = (value - self.limit) / self.limit
        return -excess if self.metric in LOWER else excess

    def __str__(self) -> str:
        relation = ">=" if self.metric in LOWER else "<="
        amount = f"{100 * self.limit:g}%stock" if self.relative else f"{self.limit:.6g}{self.unit}"
        return f"{self.quantity}{relation}{amount}"


def _fault(text: str) -> str:
    """What is wrong with a limit whose form or metric is none, and what was probably meant."""
    parts = _ROUGHLY.fullmatch("".join(text.split()))
    name = re.sub(r"(_p\d+)?(\(\w*\))?$", "", parts["name"]).lower() if parts else ""
    known = "; ".join(f"{metric} ({', '.join(units)})" for metric, (_, units) in UNITS.items())
    if _SCORES.fullmatch(name):
        return (
            f": {name} is no limit, because the search finds the most accurate network within the limits; "
            f"what can be limited: {known}"
        )
    metric = _meant(name)
    meant = _suggestion(metric, parts["amount"]) if parts and metric else None
    hint = f"; did you mean {meant}?" if meant else ""
    if name not in UNITS and parts and parts["relation"] and name:
        return f": unknown metric {name!r}{hint}; the metrics are {known}"
    if name in UNITS and parts and re.fullmatch(r"[-+]?\d+(\.\d+)?", parts["amount"]):
        return f" has no unit{hint}; the units of {name} are {', '.join(UNITS[name][1])}, or %stock"
    return (
        f" does not parse: write METRIC<=NUMBERUNIT, for example latency<=8ms, latency_p99<=12ms, throughput>=30fps, "
        f"memory<=1GiB or latency<=80%stock{hint}; the metrics are {known}"
    )


def _meant(name: str) -> str | None:
    """The metric that a name means, or the nearest."""
    names = {name: metric for metric, others in _MEANT.items() for name in (metric, *others)}
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)
    return names[near[0]] if near else None


def _suggestion(metric: str, amount: str) -> str | None:
    """A limit on a metric, as it is written; nothing where the amount says too little."""
    number = re.match(r"\d+([.,]\d+)?", amount)
    if number is None or float(number[0].replace(",", ".")) == 0:
        return None
    rest = amount[number.end() :]
    having = [other for other, (_, units) in UNITS.items() if _as_written(rest, units)]
    if len(having) == 1:
        (metric,) = having  # a unit says more than a name: speed>=30fps
    units = UNITS[metric][1]
    unit = "%stock" if rest.startswith("%") else _as_written(rest, units) or {"throughput": "fps"}.get(metric)
    return f"{metric}{'>' if metric in LOWER else '<'}={number[0].replace(',', '.')}{unit or UNITS[metric][0]}"


def _as_written(unit: str, units: Mapping[str, float]) -> str | None:
    """A unit in the case that it is written in."""
    return next((known for known in units if known.lower() == unit.lower()), None)


@dataclass(frozen=True)
class Figures(Generic[Value]):
    """What limits are held against: of one network as numbers, or of n networks as arrays (n,). NaN where unknown.

    Attributes:
        batch: Images per inference.
        latency_ms: Latency of the network alone in ms, by percentile.
        latency_with_nms_ms: The same of the network and the non-maximum suppression after it.
        memory_mb: Peak memory in MiB.
        power_w: Mean power in W.
        energy_mj: Energy per image in mJ.
        params: Parameters.
        gflops: FLOPs per image, in 10^9.
    """

    batch: int
    latency_ms: Mapping[str, Value]
    latency_with_nms_ms: Mapping[str, Value]
    memory_mb: Value
    power_w: Value
    energy_mj: Value
    params: Value
    gflops: Value

    def value(self, limit: Constraint) -> Value:
        """What a limit is about, in its unit. Throughput is that of one inference after the other."""
        latency = self.latency_ms if limit.scope == "engine" else self.latency_with_nms_ms
        match limit.metric:
            case "latency":
                return latency[limit.statistic]
            case "throughput":
                return 1000 * self.batch / latency["p50"]
            case "memory":
                return self.memory_mb
            case "power":
                return self.power_w
            case "energy":
                return self.energy_mj
            case "params":
                return self.params / 1e6
            case "flops":
                return self.gflops
        raise AssertionError(limit.metric)
