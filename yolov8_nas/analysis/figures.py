"""What an analysis consists of: figures that were measured, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from yolov8_nas.device.roofline import Roofline
from yolov8_nas.measure.benchmark import Timing

SECTIONS: Final = ("backbone", "neck", "backbone and neck", "head", "no row")
"""Parts of a network in their order. `backbone and neck` where the file does not tell them apart; `no row` is what a
runtime puts between layers, changes of layout mostly."""

NMS: Final = "NMS"
NETWORK: Final = "inference"
PREPROCESSING: Final = "preprocessing"
TO_DEVICE: Final = "host to device"
TO_HOST: Final = "device to host"


@dataclass(frozen=True)
class Operator:
    """One operator of a network as the runtime runs it, per run of a batch.

    Attributes:
        layer: Where it stands in the network, for example `model.0.conv`.
        kind: What the runtime calls it: an operator's or a kernel's name.
        row: Row of the network's yaml; nothing where its name tells none.
        ms: Median time under the profiler.
        launches: Operators or kernels that were launched.
        flops: Operations of a convolution or matrix product, a multiply-accumulate counted as two.
        bytes: What it reads and writes; nothing where that is not known.
        inputs: Input channels of a convolution.
        outputs: Its output channels.
        groups: Its groups of channels.
        section: The part of the network that it belongs to, one of `SECTIONS`.
    """

    layer: str
    kind: str
    row: int | None
    ms: float
    launches: int = 1
    flops: float = 0.0
    bytes: float | None = None
    inputs: int | None = None
    outputs: int | None = None
    groups: int | None = None
    section: str = "no row"


@dataclass(frozen=True)
class Trace:
    """The operators of a network.

    Attributes:
        operators: In the order in which they run.
        runs: How many runs their times are medians of.
        launched: What is counted in `Operator.launches`: `operators`, `kernels` or `layers of the engine`.
        between_ms: Time of a run in which no operator runs, in the run where that was the least; nothing where the
            profiler does not tell it from what it takes itself.
    """

    operators: Sequence[Operator]
    runs: int
    launched: str = "operators"
    between_ms: float | None = None

    @property
    def operator_ms(self) -> float:
        """Time of all operators."""
        return sum(operator.ms for operator in self.operators)

    @property
    def launches(self) -> int:
        """Launches of a run."""
        return sum(operator.launches for operator in self.operators)


@dataclass(frozen=True)
class Speed:
    """What some operators reach, against what the device can do at most.

    Attributes:
        tops: 10^12 operations per second; nothing where there are no operations.
        gbs: 10^9 bytes per second, of the operators whose bytes are known; nothing where none are.
        intensity: Operations per byte.
        attainable_tops: What the roofline allows at this intensity.
        bound: `memory` or `arithmetic`: the line of the roofline that they are under.
    """

    tops: float | None = None
    gbs: float | None = None
    intensity: float | None = None
    attainable_tops: float | None = None
    bound: str | None = None

    @property
    def share(self) -> float | None:
        """Share of what is attainable."""
        return self.tops / self.attainable_tops if self.tops and self.attainable_tops else None


def speed(operators: Iterable[Operator], roofline: Roofline | None, precision: str) -> Speed:
    """The speed of some operators together.

    Args:
        operators: The operators.
        roofline: What the device can do at most; nothing where that was not measured.
        precision: Data type of its matrix products, as the roofline names it.
    """
    chosen = [operator for operator in operators if operator.ms > 0]
    known = [operator for operator in chosen if operator.bytes is not None]
    ms, flops = sum(operator.ms for operator in chosen), sum(operator.flops for operator in chosen)
    read_ms, moved = sum(operator.ms for operator in known), sum(operator.bytes or 0 for operator in known)
    tops = flops / ms / 1e9 if flops else None
    gbs = moved / read_ms / 1e6 if moved else None
    if not tops or not moved or roofline is None:
        return Speed(tops, gbs)
    intensity = sum(operator.flops for operator in known) / moved
    bound = "memory" if intensity < roofline.ridge(precision) else "arithmetic"
    return Speed(tops, gbs, intensity, roofline.attainable(precision, intensity), bound)


@dataclass(frozen=True)
class Section:
    """A part of the network.

    Attributes:
        name: One of `SECTIONS`.
        share: Of the time of all operators.
        ms: That share of the undisturbed time of a run.
        flops_share: Its share of all operations.
        launches: Launches in it.
        speed: What it reaches.
    """

    name: str
    share: float
    ms: float
    flops_share: float
    launches: int
    speed: Speed


@dataclass(frozen=True)
class Part:
    """What one frame goes through: `preprocessing`, `host to device`, `inference`, `device to host` or `NMS`.

    Attributes:
        name: Which.
        timing: Of a run; nothing where the part does not exist or was not measured.
        note: What was timed, or why nothing was.
    """

    name: str
    timing: Timing | None
    note: str = ""


@dataclass(frozen=True)
class Frame:
    """The way of a batch from pictures in memory to boxes.

    Attributes:
        batch: Images of a run.
        whole: All of it in one loop.
        parts: Each part timed alone, in the same rounds.
        busy: Share of that time in which the device worked: of a GPU by its own clock, of a CPU by the time that the
            process got, over all threads.
    """

    batch: int
    whole: Timing
    parts: Sequence[Part]
    busy: float | None

    def ms(self, name: str) -> float | None:
        """Median time of a part."""
        timings = [part.timing for part in self.parts if part.name == name and part.timing]
        return timings[0].latency_ms.p50 if timings else None

    def share(self, name: str) -> float:
        """A part's share of the sum of all parts."""
        total = sum(part.timing.latency_ms.p50 for part in self.parts if part.timing)
        return (self.ms(name) or 0.0) / total


@dataclass(frozen=True)
class Setting:
    """A number of images per run, and of networks that run at once.

    Attributes:
        batch: Images per run.
        streams: Networks open at once, each fed by a thread of its own.
        threads: Threads of each network on a CPU.
        timing: From pictures to boxes of one batch.
        images_per_s: Images per second of all streams together.
        memory_mb: Memory of all of them: that of one as measured, times their number.
    """

    batch: int
    streams: int
    threads: int
    timing: Timing
    images_per_s: float
    memory_mb: float | None


@dataclass(frozen=True)
class Recommendation:
    """The setting to use.

    Attributes:
        batch: Images per run.
        streams: Networks open at once.
        videos: Video streams that it takes.
        fps: Frames per second of each of them.
        timely: Whether 90% of the batches are done before the next frame comes.
        reason: Why this one, with the figures.
    """

    batch: int
    streams: int
    videos: int
    fps: float
    timely: bool
    reason: str


@dataclass(frozen=True)
class Finding:
    """Something that costs time, and what would help.

    Attributes:
        topic: Which of the findings it is, in a word or two.
        text: What was found.
        remedy: What to do.
        figures: The figures that led to it.
    """

    topic: str
    text: str
    remedy: str
    figures: Mapping[str, float | int | str]


@dataclass(frozen=True)
class Analysis:
    """Everything that was found out.

    Attributes:
        model: File, input, classes and precision of the network.
        device: The device's profile.
        clocks: How its clocks were run.
        frame: The way of a frame.
        trace: The operators; nothing where the runtime does not tell.
        not_traced: Why it does not.
        roofline: What the device was measured to do at most.
        roof: Data type by which the network is held against that.
        multiple: Multiple of channels that suits the device, and why.
        memory_mb: Memory of the device.
        copies_ms: On a GPU, a batch copied to it from pinned and from pageable memory.
        settings: The sweep.
        recommendation: The setting to use; nothing where none fits in memory.
        notes: What to bear in mind.
        findings: What stands out.
    """

    model: Mapping[str, Any]
    device: Mapping[str, Any]
    clocks: Mapping[str, Any]
    frame: Frame
    trace: Trace | None
    not_traced: str
    roofline: Roofline | None
    roof: str
    multiple: tuple[int, str]
    memory_mb: float
    copies_ms: Mapping[str, float]
    settings: Sequence[Setting]
    recommendation: Recommendation | None
    notes: Sequence[str]
    findings: Sequence[Finding] = ()

    @property
    def operators(self) -> list[Operator]:
        """The operators with times that make up the undisturbed time of inference; empty without a trace."""
        if self.trace is None:
            return []
        scale = (self.frame.ms(NETWORK) or 0.0) / self.trace.operator_ms
        return [replace(operator, ms=scale * operator.ms) for operator in self.trace.operators]

    @property
    def sections(self) -> list[Section]:
        """Parts of the network; empty without a trace."""
        operators = self.operators
        ms, flops = sum(operator.ms for operator in operators), sum(operator.flops for operator in operators)
        found = []
        for name in SECTIONS:
            chosen = [operator for operator in operators if operator.section == name]
            if chosen:
                taken = sum(operator.ms for operator in chosen)
                done = sum(operator.flops for operator in chosen)
                launches = sum(operator.launches for operator in chosen)
                found.append(
                    Section(name, taken / ms, taken, done / flops if flops else 0.0, launches, self.speed(chosen))
                )
        return found

    def speed(self, operators: Iterable[Operator]) -> Speed:
        """What some of `operators` reach, against the device's roofline."""
        return speed(operators, self.roofline, self.roof)

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON; times in ms are per run of `frame.batch` images.

        Those of `trace` are under the profiler; those of `sections` and `inference` are of an undisturbed run.
        """
        told = asdict(self)
        sections = [asdict(section) for section in self.sections]
        return {"schema": 1, **told, "sections": sections, "inference": asdict(self.speed(self.operators))}
