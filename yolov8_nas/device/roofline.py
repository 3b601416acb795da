"""What a device can do at most, measured: memory bandwidth and matrix throughput, the two lines of its roofline.

Bandwidth is that of STREAM's triad, a = b + s * c (McCalpin, Memory bandwidth and machine balance in current high
performance computers, 1995): three words per element, in arrays far larger than the last cache. What a processor reads
to fill the lines of a cache that it writes is not counted, as STREAM does not. Throughput is that of a large matrix
product per data type, of random numbers: on zeros a GPU draws less power and clocks higher. Both are the best of
several repetitions: whatever disturbs makes them slower.

Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009: a kernel with i operations per
byte reaches at most min(throughput, i * bandwidth).

Callers hold the host alone (`HostLock.measuring`).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

_CACHES: Final = 4
"""How many times the last cache an array is at least, by STREAM's own rule."""

_SMALLEST: Final = 64 * 2**20
_LARGEST: Final = 2**30
_SHARE: Final = 1 / 8
"""Share of free memory that one of the three arrays may take."""

_BLOCK_S: Final = 0.05
"""How long a timed block of repetitions lasts at least; a GPU's clocks follow its load within such a time."""

_CPU_SIDE: Final = 1536
_GPU_SIDE: Final = 8192
_ROOMY: Final = 8 * 2**30
"""Free bytes of a GPU from which on its matrices have `_GPU_SIDE` rows; half of that below."""


@dataclass(frozen=True)
class Roofline:
    """What a device was measured to do at most.

    Attributes:
        threads: Threads of a CPU; nothing for a GPU.
        bandwidth_gbs: Triad in 10^9 bytes per second.
        array_mib: Size of each of its three arrays.
        tops: Matrix product, 10^12 operations per second by data type, a multiply-accumulate counted as two.
        side: Rows and columns of its matrices.
        scatter: By how much the median repetition was slower than the best one, as a share; the worst of all figures.
    """

    threads: int | None
    bandwidth_gbs: float
    array_mib: int
    tops: Mapping[str, float]
    side: int
    scatter: float

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return asdict(self)

    def ridge(self, precision: str) -> float:
        """Operations per byte from which on arithmetic is the limit, and no longer memory."""
        return 1000 * self.tops[precision] / self.bandwidth_gbs

    def attainable(self, precision: str, intensity: float) -> float:
        """Most 10^12 operations per second that a kernel with so many operations per byte can reach."""
        return min(self.tops[precision], intensity * self.bandwidth_gbs / 1000)


def measure_cpu(threads: int, instructions: Sequence[str], last_cache_kib: int, seconds: float = 0.4) -> Roofline:
    """Measure this machine's CPU.

    FP32 always; BF16 and INT8 where the CPU has instructions for them, since they are emulated otherwise.

    Args:
        threads: Threads to use.
        instructions: Flags of the CPU, as in a `Profile`.
        last_cache_kib: Its last cache.
        seconds: Time that each figure takes.
    """
    import psutil
    import torch

    array = _array_bytes(last_cache_kib * 1024, psutil.virtual_memory().available)
    with _threads(threads):
        bandwidth, spread = _triad(torch.device("cpu"), array, seconds)
        tops, spreads = _products(torch.device("cpu"), cpu_types(instructions), _CPU_SIDE, seconds)
    return Roofline(threads, bandwidth, array // 2**20, tops, _CPU_SIDE, max(spread, *spreads))


def measure_gpu(index: int, types: Sequence[str], l2_mib: float | None, seconds: float = 0.5) -> Roofline:
    """Measure a GPU.

    Args:
        index: The GPU in PyTorch's order.
        types: Data types of its tensor cores; FP32 is measured beside them.
        l2_mib: Its L2 cache.
        seconds: Time that each figure takes.

    Raises:
        torch.cuda.OutOfMemoryError: Others leave too little of its memory.
    """
    import torch

    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(device)
    array = _array_bytes(int((l2_mib or 0) * 2**20), free)
    bandwidth, spread = _triad(device, array, seconds)
    wanted = ["fp32", *(name for name in ("tf32", "fp16", "bf16", "int8") if name in types)]
    side = _GPU_SIDE if free > _ROOMY else _GPU_SIDE // 2
    tops, spreads = _products(device, wanted, side, seconds)
    torch.cuda.empty_cache()
    return Roofline(None, bandwidth, array // 2**20, tops, side, max(spread, *spreads))


def cpu_types(instructions: Sequence[str]) -> list[str]:
    """Data types that a CPU has instructions for matrix products of."""
    types = ["fp32"]
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(instructions):
        types.append("bf16")
    if {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(instructions):
        types.append("int8")
    return types


def _array_bytes(cache: int, free: int) -> int:
    """Size of one of the triad's arrays: beyond any cache, within free memory, a multiple of 4 KiB."""
    wanted = min(max(_CACHES * cache, _SMALLEST), _LARGEST)
    return max(min(wanted, int(free * _SHARE)) // 4096, 1) * 4096


def _triad(device: torch.device, size: int, seconds: float) -> tuple[float, float]:
    """10^9 bytes per second, and the scatter."""
    import torch

    a, b, c = (torch.full((size // 4,), float(i), device=device) for i in (0, 1, 2))
    best, spread = _best(lambda: torch.add(b, c, alpha=3.0, out=a), device, seconds)
    return 3 * size / best / 1e9, spread


def _products(
    device: torch.device, types: Sequence[str], side: int, seconds: float
) -> tuple[dict[str, float], list[float]]:
    """10^12 operations per second of square matrix products by data type, and the scatter of each."""
    tops, spreads = {}, []
    for name in types:
        with _product(device, name, side) as product:
            best, spread = _best(product, device, seconds)
        tops[name] = 2 * side**3 / best / 1e12
        spreads.append(spread)
    return tops, spreads


@contextlib.contextmanager
def _product(device: torch.device, name: str, side: int) -> Iterator[Callable[[], object]]:
    """A matrix product in a data type."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    if name == "int8":
        one, other = (
            torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device, generator=generator)
            for _ in range(2)
        )
        yield lambda: torch._int_mm(one, other.t())  # cuBLASLt multiplies INT8 by a matrix stored by columns
        return
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
    a, b = (torch.rand((side, side), device=device, generator=generator).sub_(0.5).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield lambda: torch.mm(a, b, out=out)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, float]:
    """Shortest mean time of a block of repetitions in seconds, and by how much the median block took longer."""
    repetitions, took = 1, _timed(work, 1, device)  # the first one loads kernels
    while took < _BLOCK_S:
        repetitions *= 1 if took == 0 else min(8, max(2, round(_BLOCK_S / took)))
        took = _timed(work, repetitions, device)
    end = time.perf_counter() + seconds
    blocks: list[float] = []
    while len(blocks) < 3 or time.perf_counter() < end:
        blocks.append(_timed(work, repetitions, device) / repetitions)
    return min(blocks), statistics.median(blocks) / min(blocks) - 1


def _timed(work: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Seconds that repetitions take, on a GPU by its own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repetitions):
            work()
        return time.perf_counter() - start
    import torch

    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        start_event.record()
        for _ in range(repetitions):
            work()
        end_event.record()
        end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) / 1e3


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
