"""Measuring and computing don't mix: a lock per host, shared for computing, exclusive for measuring."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from yolov8_nas.errors import InputError
from yolov8_nas.names import part

LOCK_VARIABLE: Final = "YOLOV8_NAS_HOST_LOCK"
"""Environment variable with another lock file, for containers that share a host and a folder."""

FOLDER_VARIABLE: Final = "YOLOV8_NAS_HOST_LOCKS"
"""Environment variable with a folder of lock files, one for each host, where containers of several hosts share it."""

NODE_VARIABLE: Final = "YOLOV8_NAS_NODE"
"""Environment variable with the name of this host, as a file in that folder is called."""


def default_path() -> Path:
    """The lock file that all processes of a user on this host share.

    Containers of one host that mount one volume have the same file system below it, so that the kernel's locks hold
    between them, whatever the volume makes of locks between hosts.

    Raises:
        InputError: The folder of lock files cannot be made.
    """
    if named := os.environ.get(LOCK_VARIABLE):
        return Path(named)
    folder, node = os.environ.get(FOLDER_VARIABLE), os.environ.get(NODE_VARIABLE)
    if not folder or not node:
        return Path(tempfile.gettempdir()) / f"yolov8-nas-{os.getuid()}.lock"
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made for the locks of hosts ({error.strerror})") from None
    return Path(folder) / f"{part(node, NODE_VARIABLE)}.lock"


class HostLock:
    """The lock of this host, for one process.

    Sections nest: `measuring()` inside `computing()` gives the shared lock up and takes the exclusive one, and takes
    the shared one again at its end, so two processes that compute can both come to measure. Whatever is inside
    `measuring()` stays exclusive.

    Args:
        path: The lock file; nothing for the user's own, `default_path()`.
        note: Told, once per wait, what is waited for.
    """

    def __init__(self, path: Path | None = None, note: Callable[[str], None] = print) -> None:
        self.path = path or default_path()
        self.note = note
        self._file: int | None = None
        self._mode = fcntl.LOCK_UN

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Hold the host for work that loads it: any number of processes, but nobody who measures."""
        with self._hold(fcntl.LOCK_EX if self._mode == fcntl.LOCK_EX else fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def measuring(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the host alone.

        Raises:
            BlockingIOError: The host is held by others, and `wait` says not to wait for them.
        """
        with self._hold(fcntl.LOCK_EX, wait):
            yield

    @contextlib.contextmanager
    def _hold(self, mode: int, wait: bool = True) -> Iterator[None]:
        before = self._mode
        self._set(mode, wait)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, mode: int, wait: bool = True) -> None:
        if mode == self._mode:
            return
        if self._file is None:
            self._file = self._open()
        if mode == fcntl.LOCK_UN:
            os.close(self._file)
            self._file = None
        else:
            try:
                fcntl.flock(self._file, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    self._restore()
                    raise
                others = "a measurement" if mode == fcntl.LOCK_SH else "other work"
                self.note(f"waiting for {others} on this host to end")
                fcntl.flock(self._file, mode)
        self._mode = mode

    def _restore(self) -> None:
        """Take the old lock again, which an attempt at another one gives up even where it fails."""
        assert self._file is not None
        if self._mode == fcntl.LOCK_UN:
            os.close(self._file)
            self._file = None
        else:
            fcntl.flock(self._file, self._mode)

    def _open(self) -> int:
        # The temporary folder is everybody's: a link there, or another user's file, is not ours to follow.
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be opened as the host's lock ({error.strerror}); remove it"
            ) from None
        # A volume may give its files another owner; in a folder that others may not write to, that says nothing.
        everybodys = self.path.parent.stat().st_mode & stat.S_IWOTH
        if everybodys and os.fstat(file).st_uid != os.getuid():
            os.close(file)
            raise InputError(f"{self.path}: belongs to another user, so it cannot be the host's lock; remove it")
        return file
