"""Work in a process of its own, so that a violent end of it is an answer and not the end of this process.

A step whose container ends with an exit code fails, and with it Argo fails every loop and pipeline around it, though
other targets may have models. What runs in a fork leaves its parent to say that it was lost. A fork and no new
interpreter: a step is alone in its process, and nothing heavy is imported before.

Where control groups of version 2 end a container as a whole when its memory is full (the kubelet's default), nobody
would be left: so the fork is ended shortly before.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from yolov8_nas.errors import WaitingError
from yolov8_nas.runner.stage import PARENT_VARIABLE, die_with_parent

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at the memory."""

FULL: Final = 0.98
"""Share of the memory limit from which on there is no way back."""

GROUP: Final = Path("/sys/fs/cgroup")

_HELD: Final = ("anon", "shmem", "kernel")  # of memory.stat: what no file on a disk backs
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SET_PARENT_DEATH_SIGNAL: Final = 1  # PR_SET_PDEATHSIG of prctl(2)
_MIB: Final = 2**20

T = TypeVar("T")


class EndedError(WaitingError):
    """Work that ended by a signal, or was ended for want of memory; what it has kept, it goes on from."""


def call(work: Callable[[], T], memory: Callable[[], tuple[int, int] | None] | None = None) -> T:
    """Call a function in a fork of this process and return what it returns.

    Args:
        work: The function; its result and its exceptions can be pickled.
        memory: Bytes in use and bytes allowed, or nothing where no limit is known; by default those of this container.

    Raises:
        EndedError: Its process was killed or crashed.
        Exception: What it raised.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="yolov8-nas-") as folder:
        result = Path(folder) / "result.pickle"
        child = os.fork()
        if child == 0:
            _answer(work, result)
        die_with_parent()
        full = _follow(child, memory or used_memory)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            _lost(signal.Signals(-status), full)
        value, error = pickle.loads(result.read_bytes())
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def used_memory(group: Path = GROUP) -> tuple[int, int] | None:
    """Bytes that this container holds and may hold; nothing where no limit is known, or the kernel ends one process."""
    try:
        limit = (group / "memory.max").read_text().strip()
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if not limit.isdecimal():
        return None
    return sum(int(rows.get(name, 0)) for name in _HELD) - int(rows.get("slab_reclaimable", 0)), int(limit)


def _answer(work: Callable[[], object], result: Path) -> NoReturn:
    """What the fork does."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    value, error = None, None
    try:
        value = work()
    except BaseException as raised:
        error = raised
    try:
        content = pickle.dumps((value, error))
    except Exception:
        content = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    result.write_bytes(content)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _follow(child: int, memory: Callable[[], tuple[int, int] | None]) -> str | None:
    """Wait for a process to end, and end it when the memory is full.

    Returns:
        How much memory it had, where it was ended for that.
    """
    handle = os.pidfd_open(child)
    try:
        while not select.select([handle], [], [], LOOK_EVERY)[0]:
            found = memory()
            if found is None or found[0] < FULL * found[1]:
                continue
            import psutil

            family = psutil.Process(child).children(recursive=True)
            for process in family:
                process.send_signal(signal.SIGKILL)
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            return f"{found[0] / _MIB:.0f} of {found[1] / _MIB:.0f} MiB"
        return None
    finally:
        os.close(handle)


def _lost(by: signal.Signals, full: str | None) -> NoReturn:
    if by in _PASSED_ON:  # the pod is being deleted, or somebody stops the run: not this work alone
        signal.signal(by, signal.SIG_DFL)
        os.kill(os.getpid(), by)
    while _deserted():  # about to end as well
        time.sleep(LOOK_EVERY)
    more = (
        "give the step more memory (target_pools, training_memory) and submit the run again, which goes on from there"
    )
    if full:
        raise EndedError(f"out of memory: ended at {full} that its container may have; {more}")
    if by == signal.SIGKILL:
        raise EndedError(f"killed from outside, most likely by the kernel for want of memory; {more}")
    raise EndedError(f"crashed with {by.name}; its log says where; submit the run again to go on")


def _deserted() -> bool:
    """Whether the process that this one belongs to has ended."""
    if (parent := os.environ.get(PARENT_VARIABLE)) is None:
        return False
    try:
        handle = os.pidfd_open(int(parent))
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 0)[0])
    finally:
        os.close(handle)
