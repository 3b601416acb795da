"""Peak memory of networks under ONNX Runtime, each in a process of its own.

Run as `python -m yolov8_nas.hardware.memory THREADS FILE...`, which prints a JSON list of MiB. The process imports ONNX
Runtime and forks one child per file, so that no network sees what another one left behind and Python starts once.
Neither torch nor Ultralytics is imported here: the figure is that of a deployed process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.hardware.runtime import open_session, random_feed

_RUNS = 3


def peak_memory(files: Sequence[Path], threads: int) -> list[float]:
    """Peak resident memory in MiB that loading and running each network adds to a process with ONNX Runtime loaded.

    Counted are weights, ONNX Runtime's packed copies of them, activations, and what optimising the graph takes for a
    moment; not counted is the library itself, which every network of a process shares.

    Args:
        files: ONNX files with static inputs.
        threads: Threads of the session.

    Raises:
        InputError: A file cannot be opened or run.
    """
    if not files:
        return []
    command = [sys.executable, "-m", "yolov8_nas.hardware.memory", str(threads), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode == 2:
        raise InputError(done.stderr.strip())
    if done.returncode:
        raise StageError(f"measuring memory failed with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [float(value) for value in json.loads(done.stdout)]


def _environment() -> dict[str, str]:
    """This process's environment with this package found first, wherever the process was started."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _resident(what: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process in MiB."""
    match = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, what
    return int(match[1]) / 1024


def _added_by(file: Path, threads: int) -> float:
    before = _resident("VmRSS")  # the peak starts anew at a fork
    session = open_session(file, threads)
    feed = random_feed(session)
    for _ in range(_RUNS):
        session.run(None, feed)
    return _resident("VmHWM") - before


def _in_child(file: Path, threads: int) -> float:
    reading, writing = os.pipe()
    child = os.fork()  # ONNX Runtime has no threads before its first session, so this is safe
    if child == 0:
        try:
            os.write(writing, json.dumps({"mib": _added_by(file, threads)}).encode())
        except Exception as error:
            os.write(writing, json.dumps({"error": f"{error}"}).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.loads(pipe.read() or '{"error": "the process was killed, probably for its memory"}')
    os.waitpid(child, 0)
    if "error" in answer:
        raise InputError(f"{file}: cannot be measured: {answer['error']}")
    return float(answer["mib"])


def _main(threads: str, *files: str) -> int:
    try:
        print(json.dumps([round(_in_child(Path(file), int(threads)), 2) for file in files]))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
