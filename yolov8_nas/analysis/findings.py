"""What stands out in the figures, why it costs time, and what would help; each finding is a function of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from yolov8_nas.analysis.figures import (
    NMS,
    PREPROCESSING,
    TO_DEVICE,
    TO_HOST,
    Analysis,
    Finding,
    Operator,
    Recommendation,
    Setting,
)
from yolov8_nas.search.rules import GRANULARITY

SMALL_MS: Final = 0.01
"""An operator below this does little more than being launched: a launch on a GPU and an operator's share of the host's
work on a CPU take some microseconds."""

SMALL_SHARE: Final = 0.20
"""Share of a run in small operators, and between operators, from which it is a finding."""

NMS_SHARE: Final = 0.15
PREPROCESSING_SHARE: Final = 0.20
COPIES_SHARE: Final = 0.10
CHANNELS_SHARE: Final = 0.10
CONVERSIONS_SHARE: Final = 0.10
UNEVEN: Final = 0.15
"""Points by which a section's share of the time exceeds its share of the operations."""

SLOW: Final = 0.5
"""Share of what the roofline allows below which operators are said to leave something."""

IDLE: Final = 0.7
"""Share of the time in which the device works below which it is said to wait."""

CLOSE: Final = 0.03
"""Difference in throughput below which the lower latency decides."""

FREE_MEMORY: Final = 0.20
"""Share of the device's memory that a recommended setting leaves free."""

_CONVERSIONS: Final = ("Reorder", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast")


def channel_multiple(kind: str, precision: str, instructions: Sequence[str], tensor_cores: Sequence[str]) -> int:
    """The multiple of channels that a device's arithmetic works in; 1 where none is known.

    On a GPU that of its tensor cores (`rules.GRANULARITY`). On a CPU the FP32 values of a vector, in blocks of which
    ONNX Runtime lays out channels.

    Args:
        kind: `cpu` or `gpu`.
        precision: What the network computes in.
        instructions: Those of the CPU, as in a `Profile`.
        tensor_cores: Data types of the GPU's tensor cores.
    """
    if kind == "gpu":
        wanted = "tf32" if precision == "fp32" else precision
        return GRANULARITY[wanted] if wanted in tensor_cores else 1
    if "avx512f" in instructions:
        return 16
    if "avx2" in instructions:
        return 8
    return 4 if "asimd" in instructions else 1


def findings(analysis: Analysis) -> list[Finding]:
    """Everything that stands out, what costs the largest share of the time first."""
    found = [finding for look in _LOOKS for finding in look(analysis)]
    return sorted(found, key=lambda finding: -float(finding.figures["share"]))


def _small(analysis: Analysis) -> Iterator[Finding]:
    trace = analysis.trace
    if trace is None:
        return
    small = [operator for operator in trace.operators if operator.ms / operator.launches < SMALL_MS]
    taken, between = sum(operator.ms for operator in small), trace.between_ms or 0.0
    share = (taken + between) / (trace.operator_ms + between)
    if share < SMALL_SHARE or 2 * len(small) < len(trace.operators):
        return
    count = sum(operator.launches for operator in small)
    gain = _gain(analysis.settings)
    told = f"; {gain[0]} images per run give {gain[1]:.2f} times the images per second here" if gain else ""
    yield Finding(
        "small kernels",
        f"{count} of {trace.launches} {trace.launched} take less than {1000 * SMALL_MS:.0f} µs each; they and what "
        f"lies between operators are {share:.0%} of a run under the profiler.",
        f"Fuse (TensorRT, or a network of fewer and wider layers) or raise the batch{told}.",
        {"share": share, "small": count, "launches": trace.launches, "small_ms": taken, "between_ms": between},
    )


def _gain(settings: Sequence[Setting]) -> tuple[int, float] | None:
    """The number of images per run with the highest throughput in one stream, and the gain over the smallest."""
    alone = sorted((setting for setting in settings if setting.streams == 1), key=lambda setting: setting.batch)
    if len(alone) < 2:
        return None
    best = max(alone, key=lambda setting: setting.images_per_s)
    return best.batch, best.images_per_s / alone[0].images_per_s


def _nms(analysis: Analysis) -> Iterator[Finding]:
    share, ms = analysis.frame.share(NMS), analysis.frame.ms(NMS)
    if ms is None or share < NMS_SHARE:
        return
    on_gpu = analysis.device["kind"] == "gpu"
    remedy = (
        "Suppress on the GPU (an engine with EfficientNMS), or use an NMS-free head (YOLOv10, YOLO26)."
        if on_gpu
        else "Use an NMS-free head (YOLOv10, YOLO26), raise the confidence threshold, or suppress in a thread of its "
        "own while the next frame is computed."
    )
    figures = {"share": share, "ms": ms}
    yield Finding("NMS", f"Non-maximum suppression takes {ms:.3g} ms, {share:.0%} of a frame.", remedy, figures)


def _preprocessing(analysis: Analysis) -> Iterator[Finding]:
    share, ms = analysis.frame.share(PREPROCESSING), analysis.frame.ms(PREPROCESSING)
    if ms is None or share < PREPROCESSING_SHARE:
        return
    yield Finding(
        "preprocessing",
        f"Resizing and converting pictures takes {ms:.3g} ms, {share:.0%} of a frame.",
        "Let the camera or the decoder deliver pictures near the network's size, prepare them in a thread of its own, "
        "or on the GPU where there is one.",
        {"share": share, "ms": ms},
    )


def _copies(analysis: Analysis) -> Iterator[Finding]:
    frame = analysis.frame
    share, ms = (sum(of(name) or 0.0 for name in (TO_DEVICE, TO_HOST)) for of in (frame.share, frame.ms))
    pinned, pageable = analysis.copies_ms.get("pinned"), analysis.copies_ms.get("pageable")
    if share < COPIES_SHARE:
        return
    figures: dict[str, float | int | str] = {"share": share, "ms": ms}
    told = ""
    if pinned and pageable:
        figures |= {"pinned_ms": pinned, "pageable_ms": pageable}
        told = f" (here a batch takes {pinned:.3g} ms from pinned and {pageable:.3g} ms from pageable memory)"
    yield Finding(
        "copies",
        f"Copies between host and device take {ms:.3g} ms, {share:.0%} of a frame.",
        f"Use pinned memory{told}, copy the next batch in a stream of its own while this one is computed, and send "
        "8-bit pictures, a quarter of the bytes, to be converted on the device.",
        figures,
    )


def _channels(analysis: Analysis) -> Iterator[Finding]:
    multiple, why = analysis.multiple
    if analysis.trace is None or multiple == 1:
        return
    classes = analysis.model["classes"]

    def odd(operator: Operator) -> bool:
        """Whether its channels are no multiples; colours and classes are what they are, depthwise ones have no sums."""
        if not operator.inputs or not operator.outputs or operator.groups == operator.inputs:
            return False
        free = [operator.inputs] * (operator.inputs != 3) + [operator.outputs] * (operator.outputs != classes)
        return any(channels % multiple for channels in free)

    convolutions = [operator for operator in analysis.trace.operators if operator.inputs]
    chosen = [operator for operator in convolutions if odd(operator)]
    taken = sum(operator.ms for operator in chosen)
    share = taken / analysis.trace.operator_ms
    if share < CHANNELS_SHARE:
        return
    widths = sorted({c for o in chosen for c in (o.inputs, o.outputs) if c and c % multiple and c not in (3, classes)})
    told = ", ".join([*map(str, widths[:6]), *(["..."] if len(widths) > 6 else [])])
    yield Finding(
        "channels",
        f"Convolutions with channels that are no multiples of {multiple} ({told}), {len(chosen)} of "
        f"{len(convolutions)}, take {share:.0%} of inference; {why}.",
        f"Search a space whose widths are multiples of {multiple}; what is padded is paid for without use.",
        {"share": share, "convolutions": len(chosen), "multiple": multiple},
    )


def _conversions(analysis: Analysis) -> Iterator[Finding]:
    if analysis.trace is None:
        return
    chosen = [o for o in analysis.trace.operators if o.kind.startswith(_CONVERSIONS)]
    share = sum(operator.ms for operator in chosen) / analysis.trace.operator_ms
    if share < CONVERSIONS_SHARE:
        return
    quantized = any("Quantize" in operator.kind for operator in chosen)
    remedy = (
        "Keep activations in integers between convolutions: an activation that stays quantized (ReLU) in place of SiLU "
        "saves a conversion to floating point and back at each of them; compare with fp32 on this device."
        if quantized
        else "Channels in multiples of the runtime's blocks keep its own layout from layer to layer; Concat and Split "
        "force it back."
    )
    yield Finding(
        "conversions",
        f"Changes of layout or data type between layers ({len(chosen)} in all) take {share:.0%} of inference.",
        remedy,
        {"share": share, "conversions": len(chosen)},
    )


def _uneven(analysis: Analysis) -> Iterator[Finding]:
    for section in analysis.sections:
        if not section.flops_share or section.share - section.flops_share < UNEVEN:
            continue
        yield Finding(
            "uneven load",
            f"The {section.name} takes {section.share:.0%} of inference for {section.flops_share:.0%} of its "
            "operations.",
            f"Look for time in the {section.name} first: fewer and wider layers there, and narrower maps of high "
            "resolution; the heaviest operators are listed.",
            {"share": section.share, "flops_share": section.flops_share, "section": section.name},
        )


def _roofline(analysis: Analysis) -> Iterator[Finding]:
    found = analysis.speed(analysis.operators)
    if found.share is None or found.share >= SLOW or found.bound is None:
        return
    assert found.tops and found.attainable_tops and found.intensity and analysis.roofline
    yield Finding(
        "below the roofline",
        f"Inference reaches {_per_second(found.tops)}, {found.share:.0%} of the {_per_second(found.attainable_tops)} "
        f"that the device allows at {found.intensity:.3g} operations per byte, where {found.bound} is the limit.",
        "Fewer bytes help: a lower precision, fused activations, fewer layers of high resolution."
        if found.bound == "memory"
        else "Larger convolutions fill the arithmetic units: a larger batch, wider and fewer layers, none depthwise.",
        {"share": 1 - found.share, "reached": found.tops, "attainable": found.attainable_tops, "bound": found.bound},
    )


def _idle(analysis: Analysis) -> Iterator[Finding]:
    busy = analysis.frame.busy
    if busy is None or busy >= IDLE:
        return
    on_gpu = analysis.device["kind"] == "gpu"
    by_streams = _streams_gain(analysis.settings)
    told = f": {by_streams[0]} streams give {by_streams[1]:.2f} times the images per second here" if by_streams else ""
    yield Finding(
        "idle device",
        f"The device works in {busy:.0%} of a frame's time, one frame at a time"
        + ("." if on_gpu else "; other load on the machine counts as waiting, too."),
        f"Work on several frames at once{told}."
        + (" A CUDA graph takes the host's launches out." if on_gpu else " Fewer threads for each network waste less."),
        {"share": 1 - busy, "busy": busy},
    )


def _streams_gain(settings: Sequence[Setting]) -> tuple[int, float] | None:
    """The number of streams with the highest throughput at the smallest batch, and the gain over one stream."""
    batch = min((setting.batch for setting in settings), default=0)
    same = {setting.streams: setting.images_per_s for setting in settings if setting.batch == batch}
    if 1 not in same or len(same) < 2:
        return None
    best = max(same, key=lambda streams: same[streams])
    return best, same[best] / same[1]


_LOOKS: Final[tuple[Callable[[Analysis], Iterator[Finding]], ...]] = (
    _small, _nms, _preprocessing, _copies, _channels, _conversions, _uneven, _roofline, _idle
)  # fmt: skip


def recommend(settings: Sequence[Setting], memory_mb: float, fps: float) -> Recommendation | None:
    """The setting that takes the most video streams; nothing where none leaves enough memory free.

    Those whose batches are done before the next frame comes, nine in ten, are preferred. Among settings of nearly the
    same throughput the one with the lowest latency is taken.

    Args:
        settings: The sweep.
        memory_mb: Memory of the device in MiB.
        fps: Frames per second of a video stream.
    """
    room = (1 - FREE_MEMORY) * memory_mb
    fitting = [setting for setting in settings if setting.memory_mb is not None and setting.memory_mb <= room]
    timely = [setting for setting in fitting if setting.timing.latency_ms.p90 <= 1000 / fps]
    chosen = timely or fitting
    if not chosen:
        return None
    most = max(setting.images_per_s for setting in chosen)
    best = min(
        (setting for setting in chosen if setting.images_per_s >= (1 - CLOSE) * most),
        key=lambda setting: setting.timing.latency_ms.p50,
    )
    late = "" if timely else f"; no setting answers before the next frame ({1000 / fps:.3g} ms), this is the fastest"
    free = 1 - (best.memory_mb or 0.0) / memory_mb
    latency = best.timing.latency_ms
    reason = (
        f"{best.images_per_s:.3g} images per second from pictures to boxes, a batch in {latency.p50:.3g} ms "
        f"(p90 {latency.p90:.3g} ms), {best.memory_mb:.0f} MiB, {free:.0%} of the memory left{late}"
    )
    return Recommendation(best.batch, best.streams, int(best.images_per_s / fps), fps, bool(timely), reason)


def _per_second(tops: float) -> str:
    return f"{1000 * tops:.3g} GFLOP/s" if tops < 1 else f"{tops:.3g} TFLOP/s"
