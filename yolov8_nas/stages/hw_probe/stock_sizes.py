"""Stock sizes beside the one of the space, measured on the device: what stands against a search.

They are a part of the store of their own, beside the table: which of them are worth measuring follows from the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.measure.benchmark import Failed, Measurement
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.runtime import find
from yolov8_nas.runner.results import MeasuredSize, MeasuredSizes
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import stock_architecture
from yolov8_nas.stages.hw_probe.bench import Bench
from yolov8_nas.stages.hw_probe.settings import TableSettings
from yolov8_nas.supernet import derive

PROTOCOL: Final = Protocol(warmup=2, repetitions=6, min_rounds=6, max_rounds=10)
"""For a handful of networks, some of which are much slower than any of the space."""

VERSION: Final = 1
"""Raised when the same settings would be measured in another way."""


class SizesSettings(TableSettings):
    """What is measured, and where.

    Attributes:
        sizes: The sizes, each with its precision.
    """

    sizes: tuple[tuple[str, str], ...]


def measure(ctx: StageContext[SizesSettings]) -> None:
    """Write `stock_sizes.json`."""
    asked = ctx.settings
    bench = Bench(
        asked.model_copy(update={"protocol": PROTOCOL}),
        asked.num_classes,
        find(asked.device.runtime.name, asked.kind, asked.precision),
        asked.device.threads,
        ctx.partial,
        ctx.progress,
    )
    with ctx.host.computing():
        torch.set_num_threads(1)
        files, failed = _export(bench, asked.sizes)
    found: Sequence[Measurement | Failed] = ()
    if files:
        with ctx.host.measuring():
            found = bench.measure([*files.values()], "sizes.jsonl")
    rows = []
    for (scale, precision), one in zip(files, found, strict=True):
        if isinstance(one, Failed):
            failed[f"{scale}-{precision}"] = one.reason
        else:
            rows.append(MeasuredSize(**one.to_dict(), scale=scale, precision=precision))
    MeasuredSizes(rows=tuple(rows), failed=failed).write(ctx.out)


def _export(bench: Bench, sizes: Sequence[tuple[str, str]]) -> tuple[dict[tuple[str, str], Path], dict[str, str]]:
    """The files of sizes, and why others cannot be built."""
    files, failed = {}, {}
    for scale, precision in sizes:
        runtime = find(bench.runtime.name, bench.runtime.kind, precision)
        own = Bench(bench.recipe, bench.num_classes, runtime, bench.threads, bench.folder, bench.progress)
        file = own.file(f"stock-{scale}-{precision}")
        try:
            if not file.exists():
                own.write(derive.build(stock_architecture(scale), bench.num_classes), file)
            files[scale, precision] = file
        except (InputError, StageError, MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
            failed[f"{scale}-{precision}"] = str(error)
        bench.progress.note(f"exported stock YOLOv8{scale} in {precision}")
    return files, failed
