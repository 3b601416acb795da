"""The way of a batch from pictures to boxes: timed as a whole and by parts, and with several networks at once."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from yolov8_nas.analysis.figures import NETWORK, NMS, PREPROCESSING, TO_DEVICE, TO_HOST, Frame, Part, Setting
from yolov8_nas.analysis.operators import ranges
from yolov8_nas.measure import nms
from yolov8_nas.measure.benchmark import Timed, Visit, time_in_rounds, timed_runs
from yolov8_nas.measure.cuda_events import event_times
from yolov8_nas.measure.memory import peak_memory
from yolov8_nas.measure.open_network import EventTimed, Runner
from yolov8_nas.measure.protocol import PROBE, Protocol
from yolov8_nas.measure.runtime import Runtime

Pictures = Sequence[NDArray[np.uint8]]
"""Pictures (height, width, 3) in BGR."""

PARTS: Final = (PREPROCESSING, TO_DEVICE, NETWORK, TO_HOST, NMS)
"""What a frame goes through, in its order."""

SWEEP: Final = Protocol(warmup=2, repetitions=6, min_rounds=4, max_rounds=8, precision=0.05, leg=4)
"""For the settings of a sweep, of which some are slow."""


@dataclass(frozen=True)
class Job:
    """What is to be done with each batch.

    Attributes:
        pictures: Pictures; as many as needed are taken, from the first on again after the last.
        imgsz: Side of the network's input in pixels.
        boxes: Whether non-maximum suppression follows.
        found: Output of a network for one image (4 + classes, anchors), to be suppressed in place of what the network
            gives; nothing for the network's own.
    """

    pictures: Pictures
    imgsz: int
    boxes: bool = True
    found: NDArray[np.float32] | None = None

    def taken(self, batch: int) -> Pictures:
        """The pictures of a batch."""
        return [self.pictures[i % len(self.pictures)] for i in range(batch)]

    def output(self, batch: int) -> NDArray[np.float32] | None:
        """What is suppressed in place of the network's output."""
        return None if self.found is None else np.stack([self.found] * batch)

    def prepared(self, batch: int) -> nms.Images:
        """A batch as networks take it."""
        return nms.prepare(self.taken(batch), self.imgsz)


def _way(job: Job, runner: Runner, batch: int) -> Callable[[], None]:
    """What takes one batch from pictures to boxes."""
    taken, made_up, (given,) = job.taken(batch), job.output(batch), runner.get_inputs()
    mark = ranges()

    def run() -> None:
        with mark(PREPROCESSING):
            images = nms.prepare(taken, job.imgsz)
        with mark(NETWORK):
            output = runner.run(None, {given.name: images})[0]
        if job.boxes:
            with mark(NMS):
                _suppress(output if made_up is None else made_up)

    return run


def _suppress(output: NDArray[np.float32]) -> None:
    if torch.get_num_threads() != 1:  # a network that PyTorch runs has set its own
        torch.set_num_threads(1)
    nms.suppress(output)


def measure(
    job: Job,
    file: Path,
    *,
    runtime: Runtime,
    threads: int,
    batch: int,
    protocol: Protocol = PROBE,
    progress: Callable[[float, float], None] | None = None,
) -> Frame:
    """Time the way of a batch, and its parts alone, in alternating rounds; the caller holds the host for measuring.

    Args:
        job: What is done with a batch.
        file: The network.
        runtime: What runs it.
        threads: Threads of it on a CPU.
        batch: Images per run.
        protocol: How to measure.
        progress: Called with the share done and 1.0.

    Raises:
        InputError: The file cannot be opened.
    """
    images, worked = job.prepared(batch), []
    runner = runtime.open(file, threads, batch)
    output = runner.run(None, {runner.get_inputs()[0].name: images})[0]
    by_events, shape = isinstance(runner, EventTimed), output.shape
    del runner

    def whole() -> Visit:
        run = _way(job, runtime.open(file, threads, batch), batch)
        run()
        start, before = time.perf_counter(), time.process_time()
        visit = timed_runs(run, protocol)
        worked.append((time.process_time() - before) / ((time.perf_counter() - start) * threads))
        return visit

    visits: dict[str, Timed] = {
        "whole": whole,
        PREPROCESSING: lambda: timed_runs(lambda: job.prepared(batch), protocol),
        NETWORK: lambda: _alone(runtime.open(file, threads, batch), images, protocol),
    }
    if by_events:
        visits[TO_DEVICE] = partial(_copies, images.shape, True, True, protocol)
        visits[TO_HOST] = partial(_copies, shape, False, True, protocol)
    if job.boxes:
        suppressed = job.output(batch)
        suppressed = output if suppressed is None else suppressed
        visits[NMS] = lambda: timed_runs(lambda: _suppress(suppressed), protocol)
    timings = dict(zip(visits, time_in_rounds(visits, protocol=protocol, around=whole, progress=progress), strict=True))
    whole_ms, network_ms = (timings[name].latency_ms.p50 for name in ("whole", NETWORK))
    on_gpu = network_ms / whole_ms if by_events else None
    return Frame(
        batch,
        timings["whole"],
        [Part(name, timings.get(name), _note(name, runtime, by_events, job)) for name in PARTS],
        statistics.median(worked) if runtime.kind == "cpu" else on_gpu,
    )


def _alone(runner: Runner, images: NDArray[np.float32], protocol: Protocol) -> Visit:
    """The network alone; by CUDA events where the runner has them."""
    feed = {runner.get_inputs()[0].name: images}
    visit = timed_runs(lambda: runner.run(None, feed), protocol)
    return Visit(runner.gpu_times(protocol.repetitions)) if isinstance(runner, EventTimed) else visit


def _note(name: str, runtime: Runtime, by_events: bool, job: Job) -> str:
    """What was timed as a part, or why there is nothing."""
    if name in (TO_DEVICE, TO_HOST):
        if runtime.kind == "cpu":
            return "none: the network runs in the host's memory"
        return "from pinned memory, by CUDA events" if by_events else "within inference: the runtime times no copies"
    if name == NETWORK and runtime.kind == "gpu":
        return "on the GPU alone, by CUDA events" if by_events else "with both copies"
    if name == NMS:
        if not job.boxes:
            return "none: the head is free of it"
        return "of a made-up output" if job.found is not None else "of what the network finds in the pictures"
    return ""


def copies(job: Job, batch: int) -> dict[str, float]:
    """On a GPU, the median milliseconds of a batch copied to it from `pinned` and from `pageable` memory."""
    shape = (batch, 3, job.imgsz, job.imgsz)
    return {
        name: statistics.median(_copies(shape, True, pinned, PROBE).latencies)
        for name, pinned in (("pinned", True), ("pageable", False))
    }


def _copies(shape: tuple[int, ...], to_device: bool, pinned: bool, protocol: Protocol) -> Visit:
    """Copies of FP32 tensors between host and GPU."""
    ends = torch.zeros(shape, pin_memory=pinned), torch.zeros(shape, device="cuda")
    source, target = ends if to_device else ends[::-1]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()  # the zeros are written on another stream
    event_times(lambda: target.copy_(source, non_blocking=True), stream, protocol.warmup)
    return Visit(event_times(lambda: target.copy_(source, non_blocking=True), stream, protocol.repetitions))


# Several networks at once --------------------------------------------------------------------------------------------


def sweep(
    job: Job,
    files: Mapping[int, Path],
    streams: Sequence[int],
    *,
    runtime: Runtime,
    threads: int,
    protocol: Protocol = SWEEP,
    progress: Callable[[float, float], None] | None = None,
) -> tuple[list[Setting], list[str]]:
    """Time every number of images per run with every number of networks at once; the caller holds the host.

    Each network has a thread of its own that prepares pictures, runs it and suppresses boxes, as a pipeline of several
    cameras would. The device's threads are shared out among them.

    Args:
        job: What is done with a batch.
        files: The network's file for each number of images.
        streams: Numbers of networks at once.
        runtime: What runs them.
        threads: Threads of all of them together on a CPU.
        protocol: How to measure.
        progress: Called with the share done and 1.0.

    Returns:
        The settings, and what could not be measured, with the reason.
    """
    memory = _memory(files, runtime, threads)
    rates: dict[str, list[float]] = {}
    visits: dict[str, Timed] = {}
    plans, failed = [], []
    for batch, file in files.items():
        for count in streams:
            each = max(1, threads // count)
            name = f"{batch} x {count}"
            one = partial(_together, job, file, runtime, batch, count, each)
            try:
                one(replace(protocol, warmup=0, repetitions=1), [])
            except Exception as error:  # of a runtime, out of memory most likely
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                failed.append(f"batch {batch} in {count} streams cannot run: {why}")
                continue
            visits[name] = partial(one, protocol, rates.setdefault(name, []))
            plans.append((name, batch, count, each))
    around = next(iter(visits.values()), None)
    found = time_in_rounds(visits, protocol=protocol, around=around, progress=progress)
    timings = dict(zip(visits, found, strict=True))
    settings = []
    for name, batch, count, each in plans:
        taken = memory[batch]
        if isinstance(taken, str):
            failed.append(f"memory of batch {batch} is not measured: {taken}")
        all_of_it = None if isinstance(taken, str) else taken * count
        settings.append(Setting(batch, count, each, timings[name], statistics.median(rates[name]), all_of_it))
    return settings, list(dict.fromkeys(failed))


def _memory(files: Mapping[int, Path], runtime: Runtime, threads: int) -> dict[int, float | str]:
    """Memory of a network in MiB for each number of images, or why it cannot be measured."""
    if runtime.suffix == ".onnx":  # files that fix their batch, so one process measures all of them
        return dict(zip(files, peak_memory(list(files.values()), threads, runtime), strict=True))
    return {batch: peak_memory([file], threads, runtime, batch)[0] for batch, file in files.items()}


def _together(
    job: Job,
    file: Path,
    runtime: Runtime,
    batch: int,
    count: int,
    threads: int,
    protocol: Protocol,
    rates: list[float],
) -> Visit:
    """Run several networks at once until each has done its repetitions, and note the images per second of them all."""
    ways = [_way(job, runtime.open(file, threads, batch), batch) for _ in range(count)]
    latencies: list[float] = []
    finished: list[float] = []
    left = [protocol.repetitions] * count
    begun: list[float] = []
    ready = threading.Barrier(count, action=lambda: begun.append(time.perf_counter()))

    def stream(index: int) -> None:
        try:
            for _ in range(protocol.warmup):
                ways[index]()
            ready.wait()
            while any(remaining > 0 for remaining in left):  # those that are done go on, so that the load stays
                start = time.perf_counter()
                ways[index]()
                end = time.perf_counter()
                left[index] -= 1
                latencies.append(round(1e3 * (end - start), 4))
                finished.append(end)
        except BaseException:
            left[:] = [0] * count  # nobody waits for one that failed
            ready.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(stream, index) for index in range(count)]
    broken = [error for future in futures if (error := future.exception())]
    for error in sorted(broken, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    rates.append(batch * len(finished) / (max(finished) - begun[0]))
    return Visit(latencies)
