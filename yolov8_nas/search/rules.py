"""Hardware rules: options of a space that are not worth searching on a device, taken out before the search.

A rule knows from the maker's documentation what a device is bad at. It takes options out, never one that stock YOLOv8
has, gives its reason, and can be switched off by its name. What the latency table says of it stands beside it, whether
it supports the rule or contradicts it: a rule is a guess about software that changes. On CPUs there is none, because
ONNX Runtime's kernels pad channels to the width of a vector, and every width of a space is a multiple of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.stats import t as student

from yolov8_nas.device.catalogue import tensor_core_types
from yolov8_nas.device.gpu import theoretical_bandwidth
from yolov8_nas.device.profile import Profile
from yolov8_nas.runner.results import RuleApplied, RuleEvidence
from yolov8_nas.space import BLOCKS, CONVS, Architecture, Block, SearchSpace
from yolov8_nas.space.cost import Attention, cost

TENSOR_CORE_TYPES: Final = "tensor_core_types"
TENSOR_CORE_CHANNELS: Final = "tensor_core_channels"
KERNELS_NOT_ATTENTION: Final = "large_kernels_not_attention"

RULES: Final[Mapping[str, str]] = {
    TENSOR_CORE_TYPES: "count on tensor cores only for the data types that the chip's tensor cores have",
    TENSOR_CORE_CHANNELS: "channels in multiples that tensor cores work in",
    KERNELS_NOT_ATTENTION: "on low memory bandwidth, large kernels rather than attention",
}
"""Every rule and what it says; `RulesConfig` of the run configuration has a switch for each."""

GRANULARITY: Final[Mapping[str, int]] = {"tf32": 4, "fp16": 8, "int8": 32}
"""Multiple of channels at which convolutions run on tensor cores without padding, by data type. NVIDIA TensorRT
documentation, Best Practices, Optimizing for Tensor Cores."""

LOW_BANDWIDTH_GBS: Final = 350.0
"""Below this a device counts as short of bandwidth: T4, L4, A2 and all Jetsons are; A10 and better are not."""

_ENOUGH: Final = 12
"""Networks in a table below which it is no evidence."""

_CONFIDENCE: Final = 0.95
_BYTES: Final = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Device:
    """What rules need to know of a device; what is not known is nothing.

    Attributes:
        name: The device in words.
        kind: `cpu` or `gpu`.
        tensor_core_types: Data types of its tensor cores.
        bandwidth_gbs: Theoretical memory bandwidth in 10^9 bytes per second.
        l2_mib: L2 cache.
    """

    name: str
    kind: str
    tensor_core_types: tuple[str, ...] = ()
    bandwidth_gbs: float | None = None
    l2_mib: float | None = None

    @classmethod
    def of_profile(cls, profile: Profile) -> Device:
        """The device that hw-probe measured."""
        gpu = profile.gpu
        if gpu is None:
            return cls(profile.model, profile.kind)
        bus, clock, l2 = gpu["memory_bus_bits"], gpu["memory_clock_mhz"], profile.caches.get("L2")
        return cls(
            profile.model,
            profile.kind,
            tensor_core_types(gpu["compute_capability"]) if gpu["compute_capability"] else (),
            theoretical_bandwidth(clock, bus) if bus and clock and not gpu["mig"] else None,
            l2 / 1024 if l2 else None,
        )


@dataclass(frozen=True)
class Applied:
    """A rule held against a device and a space.

    Attributes:
        rule: Its name, a key of `RULES`.
        on: Whether it is switched on; where it is not, `removed` is what it would take out.
        reason: Why it takes options out on this device, or why it does not.
        removed: The options that it takes out, by dimension.
        evidence: What was measured of it; nothing where no table can tell.
    """

    rule: str
    on: bool
    reason: str
    removed: Mapping[str, tuple[Any, ...]]
    evidence: RuleEvidence | None = None

    def __str__(self) -> str:
        count = sum(map(len, self.removed.values()))
        did = f"{'takes' if self.on else 'would take'} out {count} option{'s' * (count != 1)}" if count else "no change"
        off = "" if self.on else " (switched off)"
        return f"{self.rule}{off}: {self.reason}; {did}"

    def to_result(self) -> RuleApplied:
        """The rule as a part of the stage's result."""
        return RuleApplied(**vars(self), says=RULES[self.rule])


def consider(
    space: SearchSpace,
    device: Device,
    precision: str,
    *,
    imgsz: int,
    batch: int,
    switched: Mapping[str, bool],
) -> list[Applied]:
    """Hold every rule against a device and a space; there is none for a CPU.

    Args:
        space: The space.
        device: The device.
        precision: What networks compute in: `fp32`, `fp16` or `int8`.
        imgsz: Side of the square input in pixels.
        batch: Images per inference.
        switched: Whether each rule is on, by name.
    """
    if device.kind != "gpu":
        return []
    types = device.tensor_core_types if switched[TENSOR_CORE_TYPES] else tuple(GRANULARITY)
    return [
        Applied(rule, switched[rule], reason, removed)
        for rule, (reason, removed) in {
            TENSOR_CORE_TYPES: (_types_reason(device, precision), {}),
            TENSOR_CORE_CHANNELS: _channels(space, device, precision, types),
            KERNELS_NOT_ATTENTION: _attention(space, device, precision, imgsz, batch),
        }.items()
    ]


def narrowed(space: SearchSpace, applied: Sequence[Applied]) -> SearchSpace:
    """The space without what the rules that are on take out, which its name tells; stock YOLOv8 is always in it.

    A supernet keeps its whole space: each network of the narrowed one is one of its own.
    """
    out: dict[str, set[Any]] = {}
    for rule in applied:
        if rule.on:
            for dimension, options in rule.removed.items():
                out.setdefault(dimension, set()).update(options)
    kept = tuple(
        replace(d, options=tuple(option for option in d.options if option not in out.get(d.name, ())))
        for d in space.dimensions
    )
    name = f"{space.name} (narrowed by hardware rules)" if kept != space.dimensions else space.name
    return SearchSpace(name, space.scale, kept)


def with_evidence(
    applied: Sequence[Applied],
    space: SearchSpace,
    measured: Mapping[Architecture, float],
    *,
    num_classes: int,
    imgsz: int,
) -> list[Applied]:
    """The rules with what a latency table says of them.

    Args:
        applied: The rules.
        space: The space that the table is of.
        measured: Median latencies of its networks in ms.
        num_classes: Classes of the Detect head.
        imgsz: Side of the square input in pixels.
    """
    if not any(rule.removed for rule in applied):
        return list(applied)
    macs = {network: cost(network, num_classes, imgsz).macs for network in measured}
    return [replace(rule, evidence=_evidence(rule.removed, space, measured, macs)) for rule in applied]


def _evidence(
    removed: Mapping[str, tuple[Any, ...]],
    space: SearchSpace,
    measured: Mapping[Architecture, float],
    macs: Mapping[Architecture, int],
) -> RuleEvidence | None:
    """Least squares of log latency on the number of removed options, beside a parabola in log multiply-accumulates.

    Nothing where the table has too few networks, or all of them have as many such options.
    """
    count = np.array([_count(network, space, removed) for network in measured], dtype=np.float64)
    if len(count) < _ENOUGH or np.ptp(count) == 0:
        return None
    size = np.log([macs[network] for network in measured])
    size = (size - size.mean()) / max(size.std(), 1e-9)
    design = np.stack([np.ones_like(size), size, size**2, count], axis=1)
    latency = np.log(list(measured.values()))
    solution, _, rank, _ = np.linalg.lstsq(design, latency)
    free = len(count) - design.shape[1]
    if rank < design.shape[1]:
        return None
    variance = float(((latency - design @ solution) ** 2).sum()) / free
    error = math.sqrt(variance * np.linalg.inv(design.T @ design)[-1, -1])
    half = float(student.ppf((1 + _CONFIDENCE) / 2, free)) * error
    slope = float(solution[-1])
    low, high = math.expm1(slope - half), math.expm1(slope + half)
    return RuleEvidence(
        networks=len(count),
        with_option=int((count > 0).sum()),
        extra=math.expm1(slope),
        interval=(low, high),
        verdict="supports" if low > 0 else "contradicts" if high < 0 else "undecided",
    )


def _count(network: Architecture, space: SearchSpace, removed: Mapping[str, tuple[Any, ...]]) -> int:
    """Options of a network that are removed."""
    return sum(option in removed.get(dimension, ()) for dimension, option in _chosen(space, network).items())


def _types_reason(device: Device, precision: str) -> str:
    """What the chip computes in, where that is not what was asked for."""
    wanted = "tf32" if precision == "fp32" else precision
    if wanted in device.tensor_core_types:
        return f"{device.name} has tensor cores for {wanted.upper()}"
    have = ", ".join(name.upper() for name in device.tensor_core_types)
    if not have:
        return f"{device.name} is not known to have tensor cores"
    return (
        f"{device.name} has no tensor cores for {wanted.upper()}, only for {have}: {precision.upper()} runs on its "
        "CUDA cores, which know no multiples of channels"
    )


def _channels(
    space: SearchSpace, device: Device, precision: str, types: Sequence[str]
) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """Widths that tensor cores would pad, and expansions that give no block a hidden width which they would not."""
    wanted = "tf32" if precision == "fp32" else precision
    if wanted not in types:
        return f"{device.name} does not compute {precision.upper()} on tensor cores", {}
    multiple = GRANULARITY[wanted]
    stock = _chosen(space, space.stock)
    removed: dict[str, tuple[Any, ...]] = {}
    for dimension in space.dimensions:
        if dimension.name in CONVS or dimension.name.endswith(".width"):
            bad = [width for width in dimension.options if width % multiple and width != stock[dimension.name]]
            removed |= {dimension.name: tuple(bad)} if bad else {}
    for block in BLOCKS:
        name = f"{block}.expansion"
        widths = set(_options(space, f"{block}.width")) - set(removed.get(f"{block}.width", ()))
        bad = [
            share
            for share in _options(space, name)
            if share != stock[name] and all(Block(1, width, share, "conv3").hidden % multiple for width in widths)
        ]
        removed |= {name: tuple(bad)} if bad else {}
    return f"tensor cores take {wanted.upper()} channels in multiples of {multiple}, and others are padded", removed


def _attention(
    space: SearchSpace, device: Device, precision: str, imgsz: int, batch: int
) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """Attention, where its matrix of scores has to go through a slow memory.

    A kernel of 5x5 does 25 multiply-accumulates with each value that it reads; attention writes and reads the scores of
    every cell with every other and does little with each of them.
    """
    blocks = [number for number in _options(space, "attention") if number]
    if not blocks:
        return "the space has no attention", {}
    if device.bandwidth_gbs is None or device.l2_mib is None:
        return "bandwidth or L2 cache are not known, so measurement has to decide", {}
    if device.bandwidth_gbs >= LOW_BANDWIDTH_GBS:
        return f"{device.bandwidth_gbs:.0f} GB/s are not low", {}
    largest = replace(space.largest(), attention=1)
    scores = sum(
        layer.heads * layer.size**4 for layer in cost(largest, 1, imgsz).layers if isinstance(layer, Attention)
    )
    mib = scores * batch * _BYTES[precision] / 2**20
    if mib <= device.l2_mib / 2:
        return f"attention's scores ({mib:.2g} MiB) stay in the L2 cache of {device.l2_mib:.3g} MiB", {}
    reason = (
        f"attention's scores ({mib:.2g} MiB) do not stay in the L2 cache of {device.l2_mib:.3g} MiB, and memory gives "
        f"{device.bandwidth_gbs:.0f} GB/s: a large kernel does more with what it reads"
    )
    return reason, {"attention": tuple(blocks)}


def _options(space: SearchSpace, name: str) -> tuple[Any, ...]:
    return next(dimension.options for dimension in space.dimensions if dimension.name == name)


def _chosen(space: SearchSpace, network: Architecture) -> dict[str, Any]:
    """The options of a network, by dimension."""
    genes = zip(space.encode(network), space.dimensions, strict=True)
    return {dimension.name: dimension.options[gene] for gene, dimension in genes}
