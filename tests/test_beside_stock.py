"""A limit that is a share of stock is held against stock as measured in the same rounds, wherever it is held."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from yolov8_nas.measure.benchmark import Measurement, Percentiles
from yolov8_nas.registry.register import content_digest
from yolov8_nas.report import wording
from yolov8_nas.runner.results import LimitRow
from yolov8_nas.search.objective import CostModel
from yolov8_nas.space import SearchSpace
from yolov8_nas.space.limits import Constraint

TINY = SearchSpace.load("tiny")


def measured(p50: float, reference_ms: float | None) -> Measurement:
    latency = Percentiles(p50, 1.2 * p50, 1.5 * p50)
    return Measurement(latency, (p50, p50), (p50,), 100, False, reference_ms=reference_ms, memory_mb=40.0)


def test_a_share_survives_files_and_follows_stock() -> None:
    asked = Constraint.parse("latency<=80%stock")
    probed = asked.resolve(3.0)
    again = Constraint.from_row(json.loads(json.dumps(probed.to_row())))
    assert again == probed and probed.to_row()["stock"] == pytest.approx(3.0)
    assert again.beside(4.0).limit == pytest.approx(3.2) and again.beside(4.0).beside(2.0).limit == pytest.approx(1.6)
    assert again.beside(math.nan) is again
    absolute = Constraint.parse("latency<=2.4ms")
    assert absolute.beside(9.0) is absolute and absolute.resolve(9.0) is absolute
    assert set(absolute.to_row()) == {"metric", "statistic", "scope", "limit", "unit"}
    assert Constraint.from_row(absolute.to_row()) == absolute


@pytest.mark.parametrize(
    ("text", "share_of_value"),
    [
        ("latency<=80%stock", 1.0),
        ("latency_p99<=80%stock", 1.5),
        ("latency(with_nms)<=80%stock", 1.0),
    ],
)
def test_the_search_holds_candidates_against_stock_of_their_rounds(text: str, share_of_value: float) -> None:
    limits = (Constraint.parse(text).resolve(3.0 * share_of_value), Constraint.parse("latency<=2.3ms"))
    nms = {"p50": 0.0, "p90": 0.0, "p99": 0.0}
    costs = CostModel(limits, None, {}, None, None, nms, 2, 64, 1, stock_ms=3.0)  # type: ignore[arg-type]
    # The device is slower by a third than it was: so is stock, and the share is the same.
    values = costs.measured(TINY.smallest(), measured(3.1, 4.0))
    relative, absolute = costs.violation(values[None])[0]
    assert relative == pytest.approx(3.1 / 4.0 / 0.8 - 1) and relative < 0
    assert absolute == pytest.approx(3.1 / 2.3 - 1)
    (faster, _), (unknown, _) = (
        costs.violation(costs.measured(TINY.smallest(), measured(2.3, stock))[None])[0] for stock in (2.5, None)
    )
    assert faster > 0 > unknown  # without stock's time in these rounds there is only the probe's


def test_the_same_files_are_the_same_version_in_another_hour() -> None:
    def digest(stock: float, text: str = "latency<=80%stock", files: str = "a") -> str:
        row = Constraint.parse(text).resolve(stock).to_row()
        return content_digest({"model.onnx": files}, "cpu", [row])

    assert digest(3.0) == digest(4.0)
    assert (
        len({digest(3.0), digest(3.0, "latency<=70%stock"), digest(3.0, "latency<=2.4ms"), digest(3.0, files="b")}) == 4
    )
    assert digest(3.0, "latency<=2.4ms") != digest(3.0, "latency<=2.5ms")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"share": 0.8, "stock": 2.99, "limit": 2.392}, "≤ 2.39 ms (80 % of stock's 2.99 ms)"),
        ({"limit": 2.8}, "≤ 2.80 ms"),
    ],
)
def test_share_and_both_values_are_told(row: dict[str, Any], told: str) -> None:
    shown = wording.bound(LimitRow(metric="latency", statistic="p50", scope="engine", unit="ms", **row))
    assert shown.replace("\N{NO-BREAK SPACE}", " ") == told


def test_a_limit_is_a_value_like_others() -> None:
    resolved = Constraint.parse("throughput>=50%stock").resolve(100.0)
    assert str(resolved) == "throughput>=50img/s" and dataclasses.replace(resolved) == resolved
