"""What a machine does while a stage runs: use of its CPUs and memory, and use, memory and power of its GPUs.

Names and units are those of MLflow's system metrics, so its pages show them as such. MLflow's own sampler needs a
server, and to import it takes seconds; a stage has neither to spend. Where NVML tells nothing of a GPU, nothing is
recorded of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil
import pynvml

from yolov8_nas.errors import NoRoomError
from yolov8_nas.files import read_json, read_kept, write_json

FILE: Final = "usage.json"

EVERY: Final = 10.0
"""Seconds between two samples, at the beginning."""

MOST: Final = 1000
"""Samples that are kept: when there are so many, each two become one, and the next ones take twice as long."""


@contextmanager
def recorded(result: Path, partial: Path) -> Iterator[None]:
    """Sample the machine within the context.

    Args:
        result: Folder that gets `usage.json`: `every_s`, and `rows`, each with `time` (seconds since 1970) and figures
            by the names that MLflow gives them. CPU use is the mean since the row before; all else is of the moment.
        partial: Folder of checkpoints: what an earlier try has recorded there is gone on with.
    """
    kept = partial / f".{FILE}"  # of this machine alone, so it is not sent to a remote store again and again
    record: dict[str, Any] = read_kept(kept, read_json) or {"every_s": EVERY, "rows": []}
    end, gpus = threading.Event(), _gpus()

    def sample() -> None:
        record["rows"].append({"time": round(time.time(), 3), **_now(gpus)})
        if len(record["rows"]) >= MOST:
            record["every_s"] *= 2
            record["rows"] = [_mean(*pair) for pair in zip(record["rows"][::2], record["rows"][1::2], strict=False)]
        write_json(kept, record)

    def repeat() -> None:
        with suppress(OSError, NoRoomError):  # a full disk is the stage's own affair
            while not end.wait(record["every_s"]):
                sample()

    psutil.cpu_percent()  # the next call tells the mean since this one
    thread = threading.Thread(target=repeat, name="usage", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        sample()
        write_json(result / FILE, record)


def _now(gpus: list[Any]) -> dict[str, float]:
    figures = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": psutil.virtual_memory().used / 1e6,
    }
    for index, gpu in enumerate(gpus):
        with suppress(pynvml.NVMLError):  # slices of a GPU (MIG) do not tell everything
            figures[f"gpu_{index}_memory_usage_megabytes"] = pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6
            figures[f"gpu_{index}_utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
            figures[f"gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
    return figures


def _gpus() -> list[Any]:
    """NVML's handles of the GPUs that it shows to this process, in the driver's order."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _mean(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {key: (first[key] + second[key]) / 2 for key in first if key in second}
