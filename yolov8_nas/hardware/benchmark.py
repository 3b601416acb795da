"""The one protocol by which latency, energy and memory are measured, whatever runs the networks.

Latency is the wall time of a run from arrays in memory to arrays in memory; of a network on a GPU so with both copies,
and how long the GPU itself was busy is told beside it, by CUDA events. Other load comes in bursts
and clocks drift, so one pass over the networks is not to be trusted. Here every network is visited in several rounds,
each in another random order. In each visit a network is opened afresh (where it happens to lie in memory shifts
its speed by a per cent or two, which so becomes part of the spread), warmed up, timed and closed: memory stays bounded
however many networks there are.

A round is cut into legs of a few networks with the *reference network* timed before and after. A leg whose reference is
slower than its median by more than a stated share was disturbed: it does not count, and its networks are visited again.
A network is finished when the 95% interval of its p50 is narrow enough; the number of rounds is bounded.

Where the device counts its energy, it is read at both ends of a visit's timed runs, which then go on for long enough
for the counter's steps. It is the whole device's: what it takes when idle is not subtracted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from yolov8_nas.errors import InputError
from yolov8_nas.hardware.counters import Counter, NoCounterError, open_counter
from yolov8_nas.hardware.memory import peak_memory
from yolov8_nas.hardware.runtime import DEFAULT, EventTimed, Runtime, random_feed
from yolov8_nas.store import read_json, write_json


@dataclass(frozen=True)
class Visit:
    """What was timed in one visit.

    Attributes:
        latencies: Of each run in ms, in the order of time.
        energy_mj: Energy per image in mJ; nothing where the device counts none.
        power_w: Mean power in W; likewise.
        gpu_ms: Median time in ms of the network alone on a GPU; nothing where the runtime can't tell.
    """

    latencies: list[float]
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_ms: float | None = None


Timed: TypeAlias = Callable[[], Visit]
"""Something that can be visited: it is set up, warmed up and timed."""


@dataclass(frozen=True)
class Protocol:
    """How networks are timed.

    Attributes:
        warmup: Runs before the timed ones in each visit.
        repetitions: Timed runs in each visit; more where an energy counter needs them.
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
class Timing:
    """What was timed of something.

    Attributes:
        latency_ms: p50 is the median of the rounds' medians, which a burst of other load in a few rounds does not
            move; p90 and p99 are over all runs of all kept rounds. p50 is never above p90.
        interval_ms: 95% interval of p50 (distribution-free, from the order of the rounds' medians).
        rounds: Medians of the kept rounds in ms.
        repetitions: Timed runs in the kept rounds.
        disturbed: Whether too few rounds were undisturbed, so that disturbed ones had to be kept.
        energy_mj: Energy per image in mJ, the median of the kept rounds; nothing where the device counts none.
        power_w: Mean power in W; likewise.
        gpu_ms: Median time in ms of the network alone on a GPU; nothing where the runtime can't tell.
    """

    latency_ms: Percentiles
    interval_ms: tuple[float, float]
    rounds: tuple[float, ...]
    repetitions: int
    disturbed: bool
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return {**asdict(self), "interval_ms": list(self.interval_ms), "rounds": list(self.rounds)}


@dataclass(frozen=True)
class Measurement:
    """What was measured of one network: its `Timing`, and its memory.

    Attributes:
        memory_mb: Peak memory in MiB added to a process (or on a GPU) by loading and running the network; see `memory`.
    """

    latency_ms: Percentiles
    interval_ms: tuple[float, float]
    memory_mb: float
    rounds: tuple[float, ...]
    repetitions: int
    disturbed: bool
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return {**asdict(self), "interval_ms": list(self.interval_ms), "rounds": list(self.rounds)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` described; further keys are ignored."""
        low, high = data["interval_ms"]
        return cls(
            latency_ms=Percentiles(**data["latency_ms"]),
            interval_ms=(low, high),
            rounds=tuple(data["rounds"]),
            gpu_ms=data.get("gpu_ms"),
            **{key: data[key] for key in ("memory_mb", "repetitions", "disturbed", "energy_mj", "power_w")},
        )


@dataclass(frozen=True)
class Failed:
    """What could not be measured.

    Attributes:
        reason: What went wrong, in words.
    """

    reason: str


@dataclass(frozen=True)
class _Leg:
    """Some networks timed in turn between two timings of the reference network (`reference`: the slower median).

    Those that failed stand in `failed` with the reason.
    """

    reference: float
    visits: dict[str, Visit]
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    files: Sequence[Path],
    *,
    threads: int,
    runtime: Runtime = DEFAULT,
    batch: int | None = None,
    protocol: Protocol = PROBE,
    reference: Path | None = None,
    progress: Callable[[float, float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Measurement]:
    """Measure latency, memory and, where the device counts it, energy of networks on this machine.

    The caller holds the host for measuring (nothing else may compute meanwhile).

    Args:
        files: Networks with static inputs, under different file names.
        threads: Threads of each network on a CPU.
        runtime: What runs them.
        batch: Images per run, where the files leave that open.
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
    visits, first = _visits(files, reference, threads, runtime, batch, protocol)
    timings = time_in_rounds(visits, protocol=protocol, reference=first, progress=progress, checkpoint=checkpoint)
    found = _with_memory(files, timings, peak_memory(files, threads, runtime, batch))
    for one in found:
        if isinstance(one, Failed):
            raise InputError(one.reason)
    return [one for one in found if isinstance(one, Measurement)]


def measure_what_can_be(
    files: Sequence[Path],
    *,
    threads: int,
    runtime: Runtime = DEFAULT,
    batch: int | None = None,
    protocol: Protocol = PROBE,
    reference: Path | None = None,
    progress: Callable[[float, float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Measurement | Failed]:
    """Like `measure`, but a network that fails (it has no room in memory, say) does not end it.

    It is told what went wrong with it, and the others are measured. The reference network must not fail.

    Raises:
        InputError: The reference network cannot be opened, run or measured.
        ValueError: Two files have the same name.
    """
    visits, first = _visits(files, reference, threads, runtime, batch, protocol)
    if not visits:
        return []
    legs = _rounds(visits, protocol, first, progress, checkpoint, tolerant=True)
    failed = {name: Failed(reason) for leg in legs for name, reason in leg.failed.items()}
    kept = _kept(legs, protocol)
    timings = [failed.get(name) or _summary(name, legs, kept, protocol) for name in visits]
    runnable = [file for file, timing in zip(files, timings, strict=True) if isinstance(timing, Timing)]
    memory = dict(zip(runnable, peak_memory(runnable, threads, runtime, batch), strict=True))
    return _with_memory(files, timings, [memory.get(file, 0.0) for file in files])


def _visits(
    files: Sequence[Path],
    reference: Path | None,
    threads: int,
    runtime: Runtime,
    batch: int | None,
    protocol: Protocol,
) -> tuple[dict[str, Timed], Timed | None]:
    """What is timed of files, by their names, and of the reference network."""
    counter = energy_counter(runtime.kind)

    def visit(file: Path) -> Timed:
        return partial(_visit, file, threads, protocol, counter, runtime, batch)

    return named(files, visit), visit(reference or files[0]) if files else None


def _with_memory(
    files: Sequence[Path], timings: Sequence[Timing | Failed], memory: Sequence[float | str]
) -> list[Measurement | Failed]:
    found: list[Measurement | Failed] = []
    for timing, mib in zip(timings, memory, strict=True):
        if isinstance(timing, Failed):
            found.append(timing)
        elif isinstance(mib, str):
            found.append(Failed(mib))
        else:
            found.append(Measurement(**vars(timing), memory_mb=mib))
    return found


def named(files: Sequence[Path], visit: Callable[[Path], Timed]) -> dict[str, Timed]:
    """What `visit` makes of each file, by the file's name.

    Raises:
        ValueError: Two files have the same name.
    """
    visits = {file.name: visit(file) for file in files}
    if len(visits) != len(files):
        raise ValueError("two of the files to measure have the same name")
    return visits


def energy_counter(kind: str) -> Counter | None:
    """The energy counter of this machine's CPU (or GPU), if there is one that can be read."""
    try:
        return open_counter(kind)
    except NoCounterError:
        return None


def time_in_rounds(
    visits: Mapping[str, Timed],
    *,
    protocol: Protocol,
    reference: Timed | None = None,
    progress: Callable[[float, float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Timing]:
    """Time several things in alternating rounds, as the module says.

    Args:
        visits: What is timed, by name.
        protocol: How to measure.
        reference: What is timed around each leg; the first of `visits` unless said otherwise.
        progress: Called with the share done and 1.0; rounds that prove to be needed stretch the last part.
        checkpoint: JSON file in which finished legs are kept, so that a killed measurement goes on from there.

    Returns:
        One timing per entry of `visits`, in their order.
    """
    if not visits:
        return []
    legs = _rounds(visits, protocol, reference, progress, checkpoint)
    kept = _kept(legs, protocol)
    return [_summary(name, legs, kept, protocol) for name in visits]


def _rounds(
    visits: Mapping[str, Timed],
    protocol: Protocol,
    reference: Timed | None,
    progress: Callable[[float, float], None] | None,
    checkpoint: Path | None,
    tolerant: bool = False,
) -> list[_Leg]:
    """The legs of all rounds that it takes; what fails is noted there and visited no more if `tolerant`."""
    reference = reference or next(iter(visits.values()))
    legs = _load(checkpoint)
    while pending := _pending(visits, legs, protocol):
        for names in _legs(pending, len(legs), protocol):
            before = reference()
            visited, failed = {}, {}
            for name in names:
                try:
                    visited[name] = visits[name]()
                except Exception as error:  # of a runtime, which has many classes for what goes wrong
                    if not tolerant:
                        raise
                    failed[name] = str(error) or type(error).__name__
            after = reference()
            slower = max(statistics.median(visit.latencies) for visit in (before, after))
            legs.append(_Leg(slower, visited, failed))
            if checkpoint:
                write_json(checkpoint, [asdict(leg) for leg in legs])
            if progress:
                progress(_share_done(visits, legs, protocol), 1.0)
    return legs


def timed_runs(run: Callable[[], object], protocol: Protocol, counter: Counter | None, images: int) -> Visit:
    """Warm up, then time runs one after the other.

    Args:
        run: What is timed.
        protocol: How many runs.
        counter: Counts the energy of the timed runs, if there is one.
        images: Images per run.
    """
    for _ in range(protocol.warmup):
        run()
    latencies: list[float] = []
    least = counter.shortest_s if counter else 0.0
    if counter:
        counter.start()
    begin = now = time.perf_counter_ns()
    while len(latencies) < protocol.repetitions or (now - begin) / 1e9 < least:
        start = time.perf_counter_ns()
        run()
        now = time.perf_counter_ns()
        latencies.append(round((now - start) / 1e6, 4))
    if counter is None:
        return Visit(latencies)
    joules, seconds = counter.stop(), (now - begin) / 1e9
    return Visit(latencies, round(1e3 * joules / (len(latencies) * images), 4), round(joules / seconds, 3))


def _visit(
    file: Path, threads: int, protocol: Protocol, counter: Counter | None, runtime: Runtime, batch: int | None
) -> Visit:
    runner = runtime.open(file, threads, batch)
    feed = random_feed(runner, protocol.seed, batch)
    images = len(next(iter(feed.values())))
    visit = timed_runs(lambda: runner.run(None, feed), protocol, counter, images)
    if isinstance(runner, EventTimed):
        visit = replace(visit, gpu_ms=round(statistics.median(runner.gpu_times(protocol.repetitions)), 4))
    return visit


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
    return [statistics.median(leg.visits[name].latencies) for leg in legs if name in leg.visits]


def _pending(names: Iterable[str], legs: list[_Leg], protocol: Protocol) -> list[str]:
    """The networks that the next round visits."""
    kept = _kept(legs, protocol) if legs else []

    def finished(name: str) -> bool:
        if any(name in leg.failed for leg in legs):
            return True
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


def _summary(name: str, legs: list[_Leg], kept: list[_Leg], protocol: Protocol) -> Timing:
    disturbed = len(_medians(name, kept)) < min(3, protocol.min_rounds)
    chosen = legs if disturbed else kept
    medians = _medians(name, chosen)
    visits = [leg.visits[name] for leg in chosen if name in leg.visits]
    runs = [latency for visit in visits for latency in visit.latencies]
    p90, p99 = np.percentile(runs, [90, 99])
    low, high = median_interval(medians)
    return Timing(
        latency_ms=Percentiles(*(round(float(p), 4) for p in (statistics.median(medians), p90, p99))),
        interval_ms=(round(low, 4), round(high, 4)),
        rounds=tuple(round(m, 4) for m in medians),
        repetitions=len(runs),
        disturbed=disturbed,
        energy_mj=_median([visit.energy_mj for visit in visits]),
        power_w=_median([visit.power_w for visit in visits]),
        gpu_ms=_median([visit.gpu_ms for visit in visits]),
    )


def _median(values: Sequence[float | None]) -> float | None:
    """The median; nothing where any value is missing."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


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
    if not checkpoint or not checkpoint.exists():
        return []
    return [
        _Leg(leg["reference"], {name: Visit(**visit) for name, visit in leg["visits"].items()}, leg.get("failed", {}))
        for leg in read_json(checkpoint)
    ]
