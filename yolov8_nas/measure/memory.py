"""Peak memory of networks, each in a process of its own.

Run as `python -m yolov8_nas.measure.memory THREADS FILE...`, which prints a JSON list with MiB, or what went wrong, of
each file. The process imports the runtime and forks one child per file, so that no network sees what another one left
behind and Python starts once. Nothing but the runtime is imported here: the figure is that of a deployed process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.measure.runtime import DEFAULT, Runtime, find, random_feed

_RUNS: Final = 3


def peak_memory(
    files: Sequence[Path], threads: int, runtime: Runtime = DEFAULT, batch: int | None = None
) -> list[float | str]:
    """Peak memory in MiB that loading and running each network adds, or why it cannot be measured.

    On a CPU it is resident memory. Counted are weights, the runtime's packed copies of them, activations, and what
    optimising the graph takes for a moment; not counted is the library itself, which every network of a process shares.
    On a GPU it is the device's memory above that of the process's CUDA context; runtimes keep what they have taken.

    Args:
        files: Networks with static inputs.
        threads: Threads of a network on a CPU.
        runtime: What runs them.
        batch: Images per run, where a file leaves that open.
    """
    if not files:
        return []
    command = [sys.executable, "-m", "yolov8_nas.measure.memory"]
    command += ["--runtime", runtime.name, "--kind", runtime.kind, "--precision", runtime.precision]
    command += ["--batch", str(batch)] if batch else []
    command += [str(threads), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise StageError(f"measuring memory failed with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: list[float | str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    """This process's environment with this package found first, wherever the process was started."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _resident(what: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process in MiB."""
    match = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, what
    return int(match[1]) / 1024


def _on_gpu() -> float:
    """Memory in use on the current GPU in MiB, by whomever, as CUDA's driver tells it.

    The driver's library is asked itself, because NVML tells nothing of a Jetson and needs a package.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for status in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),  # the one that the runtimes use as well
        cuda.cuCtxSetCurrent(context),
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
    ):
        if status:
            raise InputError(f"NVIDIA's driver does not tell the GPU's memory (error {status}); check nvidia-smi")
    return (total.value - free.value) / 2**20


def _added_by(file: Path, threads: int, runtime: Runtime, batch: int | None) -> float:
    before = _on_gpu() if runtime.kind == "gpu" else _resident("VmRSS")  # the peak starts anew at a fork
    runner = runtime.open(file, threads, batch)
    feed = random_feed(runner, batch=batch)
    for _ in range(_RUNS):
        runner.run(None, feed)
    return (_on_gpu() if runtime.kind == "gpu" else _resident("VmHWM")) - before


def _in_child(file: Path, threads: int, runtime: Runtime, batch: int | None) -> float | str:
    reading, writing = os.pipe()
    child = os.fork()  # runtimes have no threads before their first network, so this is safe
    if child == 0:
        try:
            answer = {"mib": round(_added_by(file, threads, runtime, batch), 2)}
            os.write(writing, json.dumps(answer).encode())
        except Exception as error:
            os.write(writing, json.dumps({"error": f"{error}"}).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read() or '{"error": "the process was killed, probably for its memory"}')
    os.waitpid(child, 0)
    return f"{file}: cannot be measured: {answer['error']}" if "error" in answer else float(answer["mib"])


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("threads", type=int)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--runtime", default=DEFAULT.name)
    parser.add_argument("--kind", default=DEFAULT.kind)
    parser.add_argument("--precision", default=DEFAULT.precision)
    parser.add_argument("--batch", type=int)
    asked = parser.parse_args()
    runtime = find(asked.runtime, asked.kind, asked.precision)
    runtime.load()
    print(json.dumps([_in_child(file, asked.threads, runtime, asked.batch) for file in asked.files]))


if __name__ == "__main__":
    _main()
