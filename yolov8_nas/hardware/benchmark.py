"""The one protocol by which latency and memory are measured on a CPU.

Latency is the wall time of `InferenceSession.run` from arrays in memory to arrays in memory. Other load comes in bursts
and clocks drift, so one pass over the networks is not to be trusted. Here every network is visited in several rounds,
each in another random order. In each visit a fresh session is opened (where a session happens to lie in memory shifts
its speed by a per cent or two, which so becomes part of the spread), warmed up, timed and closed: memory stays bounded
however many networks there are.

A round is cut into legs of a few networks with the *reference network* timed before and after. A leg whose reference is
slower than its median by more than a stated share was disturbed: it does not count, and its networks are visited again.
A network is finished when the 95% interval of its p50 is narrow enough; the number of rounds is bounded.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from yolov8_nas.hardware.memory import peak_memory
from yolov8_nas.hardware.runtime import open_session, random_feed
from yolov8_nas.store import read_json, write_json

Visit = list[float]
"""The latencies in ms of one visit to a network, in the order of time."""


@dataclass(frozen=True)
class Protocol:
    """How networks are timed.

    Attributes:
        warmup: Runs before the timed ones in each visit.
        repetitions: Timed runs in each visit.
        min_rounds: Undisturbed visits that every network gets. Six is the least for which the interval from the
            smallest to the largest round holds the median with 95% probability.
        max_rounds: Visits after which a network is not visited again.
        precision: Half-width of the 95% interval of p50, as a share of p50, at which a network is finished.
        disturbance: Excess of the reference network over its median, as a share, from which a leg counts as disturbed.
        leg: Networks between two timings of the reference network.
        seed: Seed of the order and of the input.
    """

    warmup: int = 4
    repetitions: int = 12
    min_rounds: int = 6
    max_rounds: int = 12
    precision: float = 0.03
    disturbance: float = 0.10
    leg: int = 8
    seed: int = 0


PROBE: Final = Protocol()
"""For the many networks that a latency model is fitted to."""

VERIFY: Final = Protocol(warmup=10, repetitions=50, min_rounds=8, max_rounds=20, precision=0.01, leg=3)
"""For the few networks of which a verdict is told: at least 400 runs each, so that p99 means something."""


@dataclass(frozen=True)
class Percentiles:
    """Latency in ms."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Measurement:
    """What was measured of one network.

    Attributes:
        latency_ms: p50 is the median of the rounds' medians, which a burst of other load in a few rounds does not
            move; p90 and p99 are over all runs of all kept rounds. p50 is never above p90.
        interval_ms: 95% interval of p50 (distribution-free, from the order of the rounds' medians).
        memory_mb: Peak memory in MiB added to a process by loading and running the network; see `memory`.
        rounds: Medians of the kept rounds in ms.
        repetitions: Timed runs in the kept rounds.
        disturbed: Whether too few rounds were undisturbed, so that disturbed ones had to be kept.
    """

    latency_ms: Percentiles
    interval_ms: tuple[float, float]
    memory_mb: float
    rounds: tuple[float, ...]
    repetitions: int
    disturbed: bool

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return {**asdict(self), "interval_ms": list(self.interval_ms), "rounds": list(self.rounds)}


@dataclass(frozen=True)
class _Leg:
    """Some networks timed in turn between two timings of the reference network (`reference`: the slower median)."""

    reference: float
    visits: dict[str, Visit]


def measure(
    files: Sequence[Path],
    *,
    threads: int,
    protocol: Protocol = PROBE,
    reference: Path | None = None,
    progress: Callable[[float, float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Measurement]:
    """Measure latency and memory of ONNX files on this CPU.

    The caller holds the host for measuring (nothing else may compute meanwhile).

    Args:
        files: Networks with static inputs, under different file names.
        threads: Threads of each session.
        protocol: How to measure.
        reference: The reference network; the first of `files` unless said otherwise.
        progress: Called with the share done and 1.0; rounds that prove to be needed stretch the last part.
        checkpoint: JSON file in which finished legs are kept, so that a killed measurement goes on from there.

    Returns:
        One measurement per file, in their order.

    Raises:
        InputError: A file cannot be opened, run or measured.
        ValueError: Two files have the same name.
    """
    named = {file.name: file for file in files}
    if len(named) != len(files):
        raise ValueError("two of the files to measure have the same name")
    if not files:
        return []
    reference = reference or files[0]
    legs = _load(checkpoint)
    while pending := _pending(named, legs, protocol):
        for names in _legs(pending, len(legs), protocol):
            before = _visit(reference, threads, protocol)
            visits = {name: _visit(named[name], threads, protocol) for name in names}
            after = _visit(reference, threads, protocol)
            legs.append(_Leg(max(statistics.median(before), statistics.median(after)), visits))
            if checkpoint:
                write_json(checkpoint, [asdict(leg) for leg in legs])
            if progress:
                progress(_share_done(named, legs, protocol), 1.0)
    memory = peak_memory(files, threads)
    kept = _kept(legs, protocol)
    return [_summary(name, legs, kept, protocol, mib) for name, mib in zip(named, memory, strict=True)]


def _visit(file: Path, threads: int, protocol: Protocol) -> Visit:
    session = open_session(file, threads)
    feed = random_feed(session, protocol.seed)
    for _ in range(protocol.warmup):
        session.run(None, feed)
    latencies = []
    for _ in range(protocol.repetitions):
        start = time.perf_counter_ns()
        session.run(None, feed)
        latencies.append(round((time.perf_counter_ns() - start) / 1e6, 4))
    return latencies


def _legs(pending: list[str], done: int, protocol: Protocol) -> Iterable[list[str]]:
    """The networks of a round in random order, cut into legs; `done` legs came before."""
    order = np.random.default_rng((protocol.seed, done)).permutation(len(pending))
    for start in range(0, len(order), protocol.leg):
        yield [pending[i] for i in order[start : start + protocol.leg]]


def _kept(legs: list[_Leg], protocol: Protocol) -> list[_Leg]:
    """The undisturbed legs."""
    level = statistics.median(leg.reference for leg in legs)
    return [leg for leg in legs if leg.reference <= level * (1 + protocol.disturbance)]


def _medians(name: str, legs: list[_Leg]) -> list[float]:
    return [statistics.median(leg.visits[name]) for leg in legs if name in leg.visits]


def _pending(names: Iterable[str], legs: list[_Leg], protocol: Protocol) -> list[str]:
    """The networks that the next round visits."""
    kept = _kept(legs, protocol) if legs else []

    def finished(name: str) -> bool:
        if sum(name in leg.visits for leg in legs) >= protocol.max_rounds:
            return True
        medians = _medians(name, kept)
        if len(medians) < protocol.min_rounds:
            return False
        low, high = median_interval(medians)
        return (high - low) / 2 <= protocol.precision * statistics.median(medians)

    return [name for name in names if not finished(name)]


def _share_done(names: Iterable[str], legs: list[_Leg], protocol: Protocol) -> float:
    pending = set(_pending(names, legs, protocol))
    kept = _kept(legs, protocol)
    shares = [
        min(len(_medians(name, kept)) / (protocol.min_rounds + 1), 0.95) if name in pending else 1.0 for name in names
    ]
    return statistics.fmean(shares)


def _summary(name: str, legs: list[_Leg], kept: list[_Leg], protocol: Protocol, memory: float) -> Measurement:
    disturbed = len(_medians(name, kept)) < min(3, protocol.min_rounds)
    chosen = legs if disturbed else kept
    medians = _medians(name, chosen)
    runs = [latency for leg in chosen for latency in leg.visits.get(name, [])]
    p90, p99 = np.percentile(runs, [90, 99])
    low, high = median_interval(medians)
    return Measurement(
        latency_ms=Percentiles(*(round(float(p), 4) for p in (statistics.median(medians), p90, p99))),
        interval_ms=(round(low, 4), round(high, 4)),
        memory_mb=memory,
        rounds=tuple(round(m, 4) for m in medians),
        repetitions=len(runs),
        disturbed=disturbed,
    )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics, with at least `confidence` where the number of values allows it.

    With `n` values the interval from the (k+1)-th smallest to the (k+1)-th largest misses the median with probability
    2 P(Binomial(n, 1/2) <= k). With fewer than six values even the whole range covers less than 95%; it is what is
    returned then. Source: David and Nagaraja, Order Statistics, 3rd edition, section 7.1.
    """
    ordered, n, k = sorted(values), len(values), 0
    while 2 * sum(math.comb(n, i) for i in range(k + 2)) / 2**n <= 1 - confidence:
        k += 1
    return ordered[k], ordered[-1 - k]


def _load(checkpoint: Path | None) -> list[_Leg]:
    return [_Leg(**leg) for leg in read_json(checkpoint)] if checkpoint and checkpoint.exists() else []
