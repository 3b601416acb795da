"""Analyses a detector on a device of this machine, from its file to findings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import torch

from yolov8_nas.analysis import findings, frame, model
from yolov8_nas.analysis.figures import Analysis, Frame, Setting, Trace
from yolov8_nas.analysis.operators import NotTracedError, trace
from yolov8_nas.device.gpu import first_gpu
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile
from yolov8_nas.device.roofline import Roofline, measure_cpu, measure_gpu
from yolov8_nas.errors import InputError
from yolov8_nas.measure import nms
from yolov8_nas.measure.runtime import Runtime, find
from yolov8_nas.measure.target import Target, resolve
from yolov8_nas.search.rules import Device

_SUFFIXES: Final = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MOST: Final = 32
"""Pictures of a folder that are used at most."""

_APART: Final = 1.5
"""How many times the sum of its parts a frame may take before that is told."""

_SCATTER: Final = 0.15
"""Scatter of a roofline from which it is said to be disturbed."""


def analyze(
    file: Path,
    *,
    hardware: str,
    runtime: str,
    precision: str | None,
    imgsz: int | None,
    batches: Sequence[int],
    streams: Sequence[int],
    fps: float,
    size: tuple[int, int],
    images: Path | None,
    rows_of: Path | None,
    progress: Path,
) -> Analysis:
    """Analyse a detector; the host is held alone while it is measured.

    Args:
        file: An Ultralytics checkpoint of a detector, or an ONNX file of one.
        hardware: A device of this machine, as in a run's configuration.
        runtime: A runtime's name.
        precision: `fp32`, `fp16` or `int8`; that of the file, or FP32, unless given.
        imgsz: Side of the network's square input in pixels; the file's own unless given.
        batches: Images per run to try; the smallest is analysed.
        streams: Numbers of networks at once to try.
        fps: Frames per second of a video stream.
        size: Width and height of made-up pictures.
        images: Folder of pictures to use instead.
        rows_of: A checkpoint of the same network, which tells the backbone from the neck.
        progress: File that always holds, in one line, what is being done.

    Raises:
        InputError: The file is no detector or damaged, or hardware, runtime or precision cannot be had here.
        StageError: TensorRT cannot build an engine.
    """
    detector = model.read(file, imgsz, rows_of)
    precision = precision or detector.precision or "fp32"
    if precision == "best":
        raise InputError("--precision best: one precision is analysed; use fp32, fp16 or int8")
    target = resolve(hardware, runtime, precision)
    chosen = find(runtime, target.kind, precision)
    sizes = sorted(set(batches)) if detector.batch is None else [detector.batch]
    chosen.load()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    job = _job(detector, images, size, max(batches))
    measured = _measure(detector, target, chosen, job, sizes, sorted(set(streams)), progress)
    of = {
        "file": str(file),
        "imgsz": detector.imgsz,
        "classes": detector.classes,
        "precision": precision,
        "nms_free": detector.nms_free,
        "pictures": str(images) if images else f"random pixels, {size[0]} x {size[1]}",
    }
    notes = [*_notes(detector, batches, chosen), *_disturbed(measured.way, measured.roofline), *measured.failed]
    return _analysis(measured, target, of, precision, fps, notes)


@dataclass(frozen=True)
class _Measured:
    """Measurements of a detector and the device; see `figures.Analysis`."""

    roofline: Roofline | None
    way: Frame
    trace: Trace | None
    not_traced: str
    settings: list[Setting]
    failed: list[str]
    copies_ms: dict[str, float]
    clocks: dict[str, Any]


def _measure(
    detector: model.Detector,
    target: Target,
    runtime: Runtime,
    job: frame.Job,
    sizes: Sequence[int],
    streams: Sequence[int],
    told: Path,
) -> _Measured:
    """Measure with the host held alone.

    Args:
        detector: The detector.
        target: The device.
        runtime: What runs the detector.
        job: What is done with a batch.
        sizes: Images per run, rising.
        streams: Numbers of networks at once, rising.
        told: File that always holds, in one line, what is being done.
    """

    def note(text: str) -> None:
        told.write_text(text)

    runtime.load()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory(prefix="yolov8-nas-analysis-") as folder, HostLock(note=note).measuring():
        note("writing what the runtime opens")
        files = model.files(detector, runtime, sizes, Path(folder))
        first, threads = files[sizes[0]], target.threads
        note("measuring what the device can do at most")
        roofline = _roofline(target.profile)
        progress = _shares(note, "timing a frame and its parts")
        way = frame.measure(job, first, runtime=runtime, threads=threads, batch=sizes[0], progress=progress)
        note("timing operators")
        traced, why_not = _traced(detector, first, runtime, threads, sizes[0], Path(folder))
        progress = _shares(note, "timing batches and streams")
        settings, failed = frame.sweep(job, files, streams, runtime=runtime, threads=threads, progress=progress)
        copied = frame.copies(job, sizes[0]) if target.kind == "gpu" and torch.cuda.is_available() else {}
        return _Measured(roofline, way, traced, why_not, settings, failed, copied, target.regime())


def _analysis(
    measured: _Measured, target: Target, of: dict[str, Any], precision: str, fps: float, notes: Sequence[str]
) -> Analysis:
    """The measurements with the conclusions from them."""
    memory_mb = 1024 * target.profile.memory_gb
    analysis = Analysis(
        model=of,
        device=target.profile.to_dict(),
        clocks=measured.clocks,
        frame=measured.way,
        trace=measured.trace,
        not_traced=measured.not_traced,
        roofline=measured.roofline,
        roof=_roof(measured.roofline, precision),
        multiple=_multiple(target.profile, precision),
        memory_mb=memory_mb,
        copies_ms=measured.copies_ms,
        settings=measured.settings,
        recommendation=findings.recommend(measured.settings, memory_mb, fps),
        notes=notes,
    )
    return replace(analysis, findings=findings.findings(analysis))


def _job(detector: model.Detector, images: Path | None, size: tuple[int, int], count: int) -> frame.Job:
    """What is done with a batch: of pictures of a folder, or of so many made-up ones."""
    pictures = _pictures(images) if images else model.pictures(*size, count=count)
    made_up = None
    if not images and not detector.nms_free:
        load = nms.LOADS["typical"]
        made_up = nms.made_up_output(load, num_classes=detector.classes, imgsz=detector.imgsz, batch=1)[0]
    return frame.Job(pictures, detector.imgsz, not detector.nms_free, made_up)


def _pictures(folder: Path) -> list[Any]:
    """Pictures of a folder, evenly chosen.

    Raises:
        InputError: It has none, or one that cannot be read.
    """
    found = sorted(file for file in folder.glob("*") if file.suffix.lower() in _SUFFIXES)
    if not found:
        raise InputError(f"--images {folder}: no pictures there ({', '.join(_SUFFIXES)})")
    chosen = found[:: -(-len(found) // _MOST)]
    pictures = [cv2.imread(str(file)) for file in chosen]
    for file, picture in zip(chosen, pictures, strict=True):
        if picture is None:
            raise InputError(f"{file}: not a picture that OpenCV can read; take it out of the folder")
    return pictures


def _shares(note: Callable[[str], None], text: str) -> Callable[[float, float], None]:
    return lambda done, total: note(f"{text} ({done / total:.0%})")


def _roofline(profile: Profile) -> Roofline | None:
    """What the device can do at most; nothing where that cannot be measured (a full GPU, PyTorch without CUDA)."""
    if profile.kind == "cpu":
        return measure_cpu(profile.threads, profile.instructions, max(profile.caches.values(), default=0))
    gpu = first_gpu()
    if gpu is None or gpu.cuda_index is None:
        return None
    try:
        return measure_gpu(gpu.cuda_index, gpu.tensor_core_types, gpu.l2_mib)
    except RuntimeError:  # out of memory, or a data type without a kernel
        return None


def _traced(
    detector: model.Detector, file: Path, runtime: Runtime, threads: int, batch: int, work: Path
) -> tuple[Trace | None, str]:
    """The operators with their parts of the network, or why they are not known."""
    try:
        found = trace(detector, file, runtime, threads, batch, work)
    except NotTracedError as error:
        return None, str(error)
    operators = [replace(operator, section=detector.section(operator.row)) for operator in found.operators]
    return replace(found, operators=operators), ""


def _roof(roofline: Roofline | None, precision: str) -> str:
    """The data type by which a network of a precision is held against the roofline: FP32 where there is no better."""
    wanted = ("tf32",) if precision == "fp32" else (precision,)
    return next((name for name in wanted if roofline and name in roofline.tops), "fp32")


def _multiple(profile: Profile, precision: str) -> tuple[int, str]:
    """The multiple of channels that suits a device, and why."""
    if profile.kind == "cpu":
        multiple = findings.channel_multiple("cpu", precision, profile.instructions, ())
        return multiple, "vectors of this CPU, and ONNX Runtime's blocks of channels, hold so many"
    cores = Device.of_profile(profile).tensor_core_types
    multiple = findings.channel_multiple("gpu", precision, (), cores)
    return multiple, f"tensor cores take {precision.upper()} channels in such multiples, and others are padded"


def _notes(detector: model.Detector, batches: Sequence[int], runtime: Runtime) -> Iterator[str]:
    if detector.batch and set(batches) != {detector.batch}:
        yield (
            f"the file is fixed to {detector.batch} image{'s' * (detector.batch > 1)} per run, so only that is swept; "
            "for others give the .pt, or export with --dynamic"
        )
    if detector.head is None:
        yield "the names of the file's nodes tell no rows, so its parts are not told apart"
    elif detector.backbone is None:
        yield "the file does not tell its backbone from its neck; --rows-of CHECKPOINT of the same network does"
    if detector.two_heads:
        yield (
            "the network has an NMS-free head as well; this is the one with NMS, as Ultralytics runs it. For the other "
            f"one: yolo export model={detector.file} format=onnx nms=False, and give the ONNX file"
        )
    if runtime.precision == "int8" and detector.precision is None:
        yield "INT8 ranges come from random images: right for times, wrong for boxes"
    if runtime.name == "torch" and runtime.kind == "gpu":
        yield "operators are those of the eager network; what is timed replays the same kernels from a CUDA graph"


def _disturbed(way: Frame, roofline: Roofline | None) -> Iterator[str]:
    whole, parts = way.whole, sum(part.timing.latency_ms.p50 for part in way.parts if part.timing)
    if whole.disturbed:
        yield "other load disturbed the timing of frames; run it again on a quiet machine"
    elif whole.latency_ms.p50 > _APART * parts:
        yield (
            f"a frame takes {whole.latency_ms.p50 / parts:.1f} times the sum of its parts: other load, or threads that "
            "get in each other's way; run it again on a quiet machine"
        )
    if roofline and roofline.scatter > _SCATTER:
        yield (
            f"other load disturbed the measurement of what the device can do at most (scatter {roofline.scatter:.0%}), "
            "so more than that may seem to be reached"
        )
