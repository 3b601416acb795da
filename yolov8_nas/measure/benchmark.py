"""The one protocol by which latency, energy and memory are measured, whatever runs the networks.

Latency is the wall time of a run from arrays in memory to arrays in memory; of a network on a GPU so with both copies,
and how long the GPU itself was busy is told beside it, by CUDA events. Other load comes in bursts and clocks drift, so
one pass over the networks is not to be trusted. Here every network is visited in several rounds, each in another random
order. In each visit a network is opened afresh (where it happens to lie in memory shifts its speed by a per cent or
two, which so becomes part of the spread), warmed up, timed and closed: memory stays bounded however many networks there
are.

Within a visit the network takes turns with the *reference network*, a few runs each. How fast the device is just then
is in the times of both, so the reference serves as a control variate: what the reference's runs of a visit deviate from
their median over all visits is taken from the network's, by the share to which both have been seen to deviate together
(none where they don't, as on a device whose clocks are locked). On a virtual machine whose neighbours make it a sixth
slower or faster for moments this cuts the spread of visits from 10% to 3%. Source: Owen, Monte Carlo theory, methods
and examples (2013), section 8.9. A visit whose reference is slower than that median by more than a stated share was
disturbed: it does not count, and its network is visited again. A network is finished when the 95% interval of its p50
is narrow enough; the number of rounds is bounded.

Where the device counts its energy, it is read at both ends of further runs of the network alone, which go on for long
enough for the counter's steps. It is the whole device's: what it takes when idle is not subtracted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.device.counters import Counter, NoCounterError, open_counter
from yolov8_nas.errors import InputError
from yolov8_nas.files import append_line, read_lines
from yolov8_nas.measure.memory import peak_memory
from yolov8_nas.measure.open_network import EventTimed, Runner
from yolov8_nas.measure.protocol import PROBE, Protocol
from yolov8_nas.measure.runtime import DEFAULT, Runtime, random_feed


@dataclass(frozen=True)
class Visit:
    """What was timed in one visit.

    Attributes:
        latencies: Of each run in ms, in the order of time.
        reference: Median in ms of what the reference took meanwhile.
        energy_mj: Energy per image in mJ; nothing where the device counts none.
        power_w: Mean power in W; likewise.
        gpu_ms: Median time in ms of the network alone on a GPU; nothing where the runtime can't tell.
    """

    latencies: list[float]
    reference: float = 1.0
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_ms: float | None = None

    @property
    def median(self) -> float:
        """Of the latencies, in ms."""
        return statistics.median(self.latencies)


Timed: TypeAlias = Callable[[], Visit]
"""Something that can be visited: it is set up, warmed up and timed."""


_SHARED: Final = 4.0
"""Weight, in visits, of what all networks show about how they and the reference slow down together, beside what a
network's own visits show: small networks slow down more than large ones, but few visits tell little."""


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
            move; p90 and p99 are over all runs of all kept rounds, as they were timed. p50 is never above p90.
        interval_ms: 95% interval of p50 (distribution-free, from the order of the rounds' medians).
        rounds: Medians of the kept rounds in ms, at the median speed of the device as the reference tells it.
        repetitions: Timed runs in the kept rounds.
        disturbed: Whether too few rounds were undisturbed, so that disturbed ones had to be kept.
        energy_mj: Energy per image in mJ, the median of the kept rounds; nothing where the device counts none.
        power_w: Mean power in W; likewise.
        gpu_ms: Median time in ms of the network alone on a GPU; nothing where the runtime can't tell.
        reference_ms: Median time in ms of the reference over all visits of all networks: how fast the device was.
    """

    latency_ms: Percentiles
    interval_ms: tuple[float, float]
    rounds: tuple[float, ...]
    repetitions: int
    disturbed: bool
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_ms: float | None = None
    reference_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return {**asdict(self), "interval_ms": list(self.interval_ms), "rounds": list(self.rounds)}


@dataclass(frozen=True)
class Measurement(Timing):
    """What was measured of one network: its timing, and its memory.

    Attributes:
        memory_mb: Peak memory in MiB added to a process (or on a GPU) by loading and running the network; see `memory`.
    """

    memory_mb: float = field(kw_only=True)

    def at_level(self, reference_ms: float | None) -> Measurement:
        """What it would have been, had the reference taken this long: all times by the same ratio.

        Where the reference's time was not noted, then or now, it is what it is.

        Two measurements of one device an hour apart differ by some per cent that all networks have in common (clocks,
        neighbours of a virtual machine). Networks that were measured in different hours are compared at one level.
        """
        if self.reference_ms is None or reference_ms is None:
            return self
        ratio = reference_ms / self.reference_ms
        low, high = self.interval_ms
        return replace(
            self,
            latency_ms=Percentiles(*(round(ratio * ms, 4) for ms in astuple(self.latency_ms))),
            interval_ms=(round(ratio * low, 4), round(ratio * high, 4)),
            rounds=tuple(round(ratio * ms, 4) for ms in self.rounds),
            gpu_ms=None if self.gpu_ms is None else round(ratio * self.gpu_ms, 4),
            reference_ms=reference_ms,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` described; further keys are ignored."""
        low, high = data["interval_ms"]
        return cls(
            latency_ms=Percentiles(**data["latency_ms"]),
            interval_ms=(low, high),
            rounds=tuple(data["rounds"]),
            gpu_ms=data.get("gpu_ms"),
            reference_ms=data.get("reference_ms"),
            **{key: data[key] for key in ("memory_mb", "repetitions", "disturbed", "energy_mj", "power_w")},
        )


class HasReference(Interface):
    """A measurement in rounds with a reference network."""

    @property
    def reference_ms(self) -> float | None:
        """Median time in ms of the reference; nothing where it was not noted."""


def level(measured: Iterable[HasReference]) -> float | None:
    """Median time of the reference in ms, over measurements; nothing where one of them did not note it."""
    return _median([one.reference_ms for one in measured])


@dataclass(frozen=True)
class Failed:
    """What could not be measured.

    Attributes:
        reason: What went wrong, in words.
    """

    reason: str


@dataclass(frozen=True)
class _Leg:
    """Some visits in a row; those that failed stand in `failed` with the reason."""

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
        checkpoint: File of JSON lines in which finished legs are kept, so that a killed measurement goes on from there.

    Returns:
        One measurement per file, in their order.

    Raises:
        InputError: A file cannot be opened, run or measured.
        ValueError: Two files have the same name.
    """
    visits = _visits(files, reference, threads, runtime, batch, protocol)
    timings = time_in_rounds(visits, protocol=protocol, progress=progress, checkpoint=checkpoint)
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
    visits = _visits(files, reference, threads, runtime, batch, protocol)
    legs = _rounds(visits, protocol, None, progress, checkpoint, tolerant=True)
    failed = {name: Failed(reason) for leg in legs for name, reason in leg.failed.items()}
    timed = _timings([name for name in visits if name not in failed], legs, protocol)
    timings = [failed.get(name) or timed[name] for name in visits]
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
) -> dict[str, Timed]:
    """What is timed of files, by their names."""
    if not files:
        return {}
    counter = energy_counter(runtime.kind)
    beside = _open(reference or files[0], threads, protocol, runtime, batch).run
    return named(files, lambda file: partial(_visit, file, threads, protocol, counter, runtime, batch, beside))


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
    around: Timed | None = None,
    progress: Callable[[float, float], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Timing]:
    """Time several things in alternating rounds, as the module says.

    Args:
        visits: What is timed, by name.
        protocol: How to measure.
        around: What is timed before and after each leg, to be the reference of visits that take no turns with one.
        progress: Called with the share done and 1.0; rounds that prove to be needed stretch the last part.
        checkpoint: File of JSON lines in which finished legs are kept, so that a killed measurement goes on from there.

    Returns:
        One timing per entry of `visits`, in their order.
    """
    timings = _timings(visits, _rounds(visits, protocol, around, progress, checkpoint), protocol)
    return [timings[name] for name in visits]


def _rounds(
    visits: Mapping[str, Timed],
    protocol: Protocol,
    around: Timed | None,
    progress: Callable[[float, float], None] | None,
    checkpoint: Path | None,
    tolerant: bool = False,
) -> list[_Leg]:
    """The legs of all rounds that it takes; what fails is noted there and visited no more if `tolerant`."""
    legs = _load(checkpoint)
    while pending := _pending(visits, legs, protocol):
        for names in _legs(pending, len(legs), protocol):
            reference = [around().median] if around else []
            visited, failed = {}, {}
            for name in names:
                try:
                    visited[name] = visits[name]()
                except Exception as error:  # of a runtime, which has many classes for what goes wrong
                    if not tolerant:
                        raise
                    failed[name] = str(error) or type(error).__name__
            if around:
                slower = max(*reference, around().median)
                visited = {name: replace(visit, reference=slower) for name, visit in visited.items()}
            legs.append(_Leg(visited, failed))
            if checkpoint:
                append_line(checkpoint, asdict(legs[-1]))
            if progress:
                progress(_share_done(visits, legs, protocol), 1.0)
    return legs


Run: TypeAlias = Callable[[], object]
"""Something that is run again and again to be timed."""


def timed_runs(run: Run, protocol: Protocol, beside: Run | None = None) -> Visit:
    """Warm up, then time runs one after the other.

    Args:
        run: What is timed.
        protocol: How many runs.
        beside: The reference, already warm, with which it takes turns.
    """
    for _ in range(protocol.warmup):
        run()
    if beside is None:
        return Visit(_latencies(run, protocol.repetitions))
    latencies: list[float] = []
    reference: list[float] = []
    while len(latencies) < protocol.repetitions:
        reference += _turn(beside, protocol.turn)
        latencies += _turn(run, min(protocol.turn, protocol.repetitions - len(latencies)))
    reference += _turn(beside, protocol.turn)
    return Visit(latencies, round(statistics.median(reference), 4))


def _turn(run: Run, repetitions: int) -> list[float]:
    """As `_latencies`, after a run that is not timed: what the other has left in the caches is gone after it."""
    run()
    return _latencies(run, repetitions)


def _latencies(run: Run, repetitions: int) -> list[float]:
    """How long each of some runs takes, in ms."""
    latencies = []
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        run()
        latencies.append(round((time.perf_counter_ns() - start) / 1e6, 4))
    return latencies


def energy_of_runs(run: Run, counter: Counter, repetitions: int, images: int) -> tuple[float, float]:
    """Energy in mJ per image, and mean power in W.

    Args:
        run: What is run.
        counter: Counts the energy.
        repetitions: The least number of runs; it may take more until the counter can tell.
        images: Images per run.
    """
    runs = 0
    counter.start()
    begin = now = time.perf_counter_ns()
    while runs < repetitions or (now - begin) / 1e9 < counter.shortest_s:
        run()
        runs += 1
        now = time.perf_counter_ns()
    joules, seconds = counter.stop(), (now - begin) / 1e9
    return round(1e3 * joules / (runs * images), 4), round(joules / seconds, 3)


@dataclass(frozen=True)
class _Opened:
    """A network with input.

    Attributes:
        runner: What runs it.
        feed: Its input.
    """

    runner: Runner
    feed: dict[str, NDArray[np.float32]]

    def run(self) -> object:
        return self.runner.run(None, self.feed)


def _open(file: Path, threads: int, protocol: Protocol, runtime: Runtime, batch: int | None) -> _Opened:
    runner = runtime.open(file, threads, batch)
    return _Opened(runner, random_feed(runner, protocol.seed, batch))


def _visit(
    file: Path,
    threads: int,
    protocol: Protocol,
    counter: Counter | None,
    runtime: Runtime,
    batch: int | None,
    beside: Run,
) -> Visit:
    network = _open(file, threads, protocol, runtime, batch)
    visit = timed_runs(network.run, protocol, beside)
    if counter:
        images = len(next(iter(network.feed.values())))
        energy, power = energy_of_runs(network.run, counter, protocol.repetitions, images)
        visit = replace(visit, energy_mj=energy, power_w=power)
    if isinstance(network.runner, EventTimed):
        visit = replace(visit, gpu_ms=round(statistics.median(network.runner.gpu_times(protocol.repetitions)), 4))
    return visit


def _legs(pending: list[str], done: int, protocol: Protocol) -> Iterable[list[str]]:
    """The networks of a round in random order, cut into legs; `done` legs came before."""
    order = np.random.default_rng((protocol.seed, done)).permutation(len(pending))
    for start in range(0, len(order), protocol.leg):
        yield [pending[i] for i in order[start : start + protocol.leg]]


def _by_name(legs: Iterable[_Leg]) -> dict[str, list[Visit]]:
    """All visits, by the name of what was timed."""
    visits: dict[str, list[Visit]] = {}
    for leg in legs:
        for name, visit in leg.visits.items():
            visits.setdefault(name, []).append(visit)
    return visits


def _undisturbed(visits: Mapping[str, list[Visit]], protocol: Protocol) -> dict[str, list[Visit]]:
    """The visits whose reference was not much slower than it usually is."""
    if not visits:
        return {}
    most = _level(visits) * (1 + protocol.disturbance)
    return {name: [visit for visit in seen if visit.reference <= most] for name, seen in visits.items()}


def _level(visits: Mapping[str, list[Visit]]) -> float:
    """Median in ms of what the reference took in all visits, of which there is one at least."""
    return statistics.median(visit.reference for seen in visits.values() for visit in seen)


def _medians(visits: Mapping[str, list[Visit]]) -> dict[str, list[float]]:
    """Median latency in ms of each visit, by name, with the reference as control variate."""
    pairs = {name: np.log([[visit.median, visit.reference] for visit in seen]) for name, seen in visits.items() if seen}
    if not pairs:
        return {}
    level = math.log(_level(visits))
    # Of each visit: deviation of the network times that of the reference, and the latter's square.
    products = {name: (away := pair - pair.mean(axis=0)) * away[:, 1:] for name, pair in pairs.items()}
    everywhere = np.concatenate(list(products.values())).mean(axis=0)
    medians = {}
    for name, pair in pairs.items():
        together, spread = products[name].sum(axis=0) + _SHARED * everywhere
        share = max(together / spread, 0.0) if spread else 0.0
        medians[name] = np.exp(pair[:, 0] - share * (pair[:, 1] - level)).tolist()
    return medians


def _pending(names: Iterable[str], legs: list[_Leg], protocol: Protocol) -> list[str]:
    """The networks that the next round visits."""
    visits = _by_name(legs)
    kept = _medians(_undisturbed(visits, protocol))
    failed = {name for leg in legs for name in leg.failed}

    def finished(name: str) -> bool:
        if name in failed or len(visits.get(name, ())) >= protocol.max_rounds:
            return True
        medians = kept.get(name, [])
        if len(medians) < protocol.min_rounds:
            return False
        low, high = median_interval(medians)
        return (high - low) / 2 <= protocol.precision * statistics.median(medians)

    return [name for name in names if not finished(name)]


def _share_done(names: Iterable[str], legs: list[_Leg], protocol: Protocol) -> float:
    pending = set(_pending(names, legs, protocol))
    kept = _undisturbed(_by_name(legs), protocol)
    shares = [
        min(len(kept.get(name, ())) / (protocol.min_rounds + 1), 0.95) if name in pending else 1.0 for name in names
    ]
    return statistics.fmean(shares)


def _timings(names: Iterable[str], legs: list[_Leg], protocol: Protocol) -> dict[str, Timing]:
    """What the legs tell of what was timed, by its name."""
    every = _by_name(legs)
    kept = _undisturbed(every, protocol)
    corrected, disturbed_ones = _medians(kept), _medians(every)
    found = {}
    for name in names:
        disturbed = len(kept[name]) < min(3, protocol.min_rounds)
        visits, medians = (every[name], disturbed_ones[name]) if disturbed else (kept[name], corrected[name])
        runs = [latency for visit in visits for latency in visit.latencies]
        p50, (p90, p99) = statistics.median(medians), np.percentile(runs, [90, 99])
        low, high = median_interval(medians)
        found[name] = Timing(
            latency_ms=Percentiles(*(round(float(max(p50, p)), 4) for p in (p50, p90, p99))),
            interval_ms=(round(low, 4), round(high, 4)),
            rounds=tuple(round(m, 4) for m in medians),
            repetitions=len(runs),
            disturbed=disturbed,
            energy_mj=_median([visit.energy_mj for visit in visits]),
            power_w=_median([visit.power_w for visit in visits]),
            gpu_ms=_median([visit.gpu_ms for visit in visits]),
            reference_ms=round(_level(every if disturbed else kept), 4),
        )
    return found


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
    return [
        _Leg({name: Visit(**visit) for name, visit in leg["visits"].items()}, leg["failed"])
        for leg in (read_lines(checkpoint) if checkpoint else ())
    ]
