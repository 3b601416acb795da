"""Limits: what people write, what is kept, and how a value is held against it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov8_nas.errors import InputError
from yolov8_nas.space.limits import _MEANT, STATISTICS, UNITS, Constraint, Figures

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
        ("throughput(with_nms)>=90fps", 90.0, "throughput(with_nms)"),
        ("power<=900mW", 0.9, "power"),
        ("energy<=0.05J", 50.0, "energy"),
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
        ("energy(with_nms)<=1mJ", "has no scope"),
        ("energy<=2W", "unknown unit 'W' for energy; use mJ, J"),
        ("power<=2mJ", "unknown unit"),
        ("power<=0W", "positive"),
        ("energy_p50<=2mJ", "only latency has percentiles"),
        ("power>=2W", "power<="),
        ("latency>=2ms", "latency<="),
        ("throughput<=30fps", "throughput>="),
    ],
)
def test_what_does_not_parse_is_told_with_its_text(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        Constraint.parse(text)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("map>=0.5", "map is no limit, because the search finds the most accurate network"),
        ("mAP50-95>=0.5", "map50-95 is no limit"),
        ("map@0.5>=60%", "is no limit"),
        ("accuracy>0.9", "is no limit"),
        ("fps>=30", "unknown metric 'fps'; did you mean throughput>=30fps?"),
        ("FPS >= 30", "did you mean throughput>=30fps?"),
        ("speed>=30fps", "did you mean throughput>=30fps?"),
        ("speed<=8ms", "did you mean latency<=8ms?"),
        ("latncy<=8ms", "did you mean latency<=8ms?"),
        ("latency_p99ms<=8", "did you mean latency<=8ms?"),
        ("latency=8ms", "did you mean latency<=8ms?"),
        ("latency≤8ms", "did you mean latency<=8ms?"),
        ("latency=<8ms", "did you mean latency<=8ms?"),
        ("latency<=8,5ms", "did you mean latency<=8.5ms?"),
        ("latency<=8", "has no unit; did you mean latency<=8ms?; the units of latency are us, ms, s"),
        ("latency<=80%", "did you mean 80%stock?"),
        ("latency<=8MS", "unknown unit 'MS' for latency; use us, ms, s"),
        ("vram<=2GB", "did you mean memory<=2GB?"),
        ("memory<=500mb", "did you mean 500MB?"),
        ("gflops<=5", "did you mean flops<=5G?"),
        ("parameters<=3M", "did you mean params<=3M?"),
        ("zebra<=3M", "unknown metric 'zebra'; the metrics are latency (us, ms, s); throughput (img/s, fps)"),
        ("", "does not parse"),
        ("8ms", "write METRIC<=NUMBERUNIT"),
    ],
)
def test_what_is_meant_is_told_with_metrics_and_units(text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        Constraint.parse(text)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_every_suggestion_parses() -> None:
    for names in (*_MEANT.values(), tuple(UNITS)):
        for name in names:
            for amount in ("8", "30fps", "2.5ms", "80%", "1GB", "3M"):
                try:
                    Constraint.parse(f"{name}<={amount}")
                except InputError as error:
                    if meant := re.search(r"did you mean ([a-z]+[<>]=\S+)\?", str(error)):
                        Constraint.parse(meant[1])


def test_a_metric_may_be_written_large() -> None:
    assert Constraint.parse("Latency<=8ms") == Constraint.parse("latency<=8ms")


def test_every_quantity_is_found_among_the_figures_in_the_unit_of_its_limit() -> None:
    figures = Figures(
        batch=4,
        latency_ms={"p50": 8.0, "p90": 9.0, "p99": 12.0},
        latency_with_nms_ms={"p50": 10.0, "p90": 12.0, "p99": 16.0},
        memory_mb=80.0,
        power_w=20.0,
        energy_mj=40.0,
        params=2_500_000.0,
        gflops=0.7,
    )
    kept = {
        "latency<=8ms": 8.0,
        "latency_p99<=12000us": 12.0,
        "latency_p90(with_nms)<=12ms": 12.0,
        "throughput>=500fps": 500.0,
        "throughput(with_nms)>=400fps": 400.0,
        "memory<=80MiB": 80.0,
        "power<=20000mW": 20.0,
        "energy<=0.04J": 40.0,
        "params<=2500K": 2.5,
        "flops<=700M": 0.7,
    }
    assert set(UNITS) == {Constraint.parse(text).metric for text in kept}
    for text, value in kept.items():
        limit = Constraint.parse(text)
        assert figures.value(limit) == pytest.approx(value)
        assert abs(limit.violation(figures.value(limit))) < 1e-9
