"""Limits: what people write, what is kept, and how a value is held against it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov8_nas.errors import InputError
from yolov8_nas.search.constraint import STATISTICS, UNITS, Constraint

amounts = st.floats(1e-3, 1e6, allow_nan=False).map(lambda x: float(f"{x:.6g}"))


@st.composite
def constraints(draw: st.DrawFn) -> Constraint:
    metric = draw(st.sampled_from(sorted(UNITS)))
    statistic = draw(st.sampled_from(STATISTICS)) if metric == "latency" else "p50"
    scope = draw(st.sampled_from(["engine", "with_nms"])) if metric in ("latency", "throughput") else "engine"
    return Constraint(metric, statistic, scope, draw(amounts), draw(st.booleans()))


@given(constraints())
def test_what_is_printed_parses_to_the_same_limit(constraint: Constraint) -> None:
    again = Constraint.parse(str(constraint))
    assert again.limit == pytest.approx(constraint.limit, rel=1e-5)
    assert str(again) == str(constraint)
    assert (again.quantity, again.relative) == (constraint.quantity, constraint.relative)


@given(constraints(), st.floats(1e-3, 1e6), st.floats(1e-3, 1e3))
def test_violation_is_positive_exactly_where_the_limit_is_missed(
    constraint: Constraint, value: float, stock: float
) -> None:
    absolute = constraint.resolve(stock)
    assert (absolute.violation(value) <= 0) == absolute.met(value)
    assert absolute.violation(absolute.limit) == 0
    assert absolute.met(absolute.limit)


@given(constraints(), st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=5))
def test_violation_takes_arrays(constraint: Constraint, values: list[float]) -> None:
    absolute = constraint.resolve(2.0)
    expected = [absolute.violation(value) for value in values]
    assert absolute.violation(np.array(values)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "limit", "quantity"),
    [
        ("latency<=2.5ms", 2.5, "latency_p50"),
        ("latency < 800 us", 0.8, "latency_p50"),
        ("latency_p99(with_nms)<=4ms", 4.0, "latency_p99(with_nms)"),
        ("throughput>=120fps", 120.0, "throughput"),
        ("memory<=1GiB", 1024.0, "memory"),
        ("memory<=100MB", 100e6 / 2**20, "memory"),
        ("params<=500K", 0.5, "params"),
        ("flops<=800M", 0.8, "flops"),
    ],
)
def test_units_become_one_unit_per_metric(text: str, limit: float, quantity: str) -> None:
    constraint = Constraint.parse(text)
    assert constraint.limit == pytest.approx(limit)
    assert constraint.quantity == quantity


def test_a_share_of_stock_becomes_absolute() -> None:
    constraint = Constraint.parse("latency<=80%stock")
    with pytest.raises(ValueError, match="relative"):
        constraint.met(1.0)
    assert constraint.resolve(5.0).limit == pytest.approx(4.0)
    assert constraint.resolve(5.0).resolve(9.0).limit == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("latency", "does not parse"),
        ("latency<=ms", "does not parse"),
        ("latency<=-2ms", "positive"),
        ("latency<=0ms", "positive"),
        ("latency<=1e999ms", "positive"),
        ("speed<=2ms", "unknown metric"),
        ("latency<=2GiB", "unknown unit"),
        ("latency_p75<=2ms", "unknown percentile"),
        ("params_p50<=2M", "only latency has percentiles"),
        ("latency(outside)<=2ms", "unknown scope"),
        ("memory(with_nms)<=1GiB", "has no scope"),
        ("latency>=2ms", "latency<="),
        ("throughput<=30fps", "throughput>="),
    ],
)
def test_what_does_not_parse_is_told_with_its_text(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        Constraint.parse(text)
    assert text in str(error.value)
