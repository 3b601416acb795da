"""Calls a function in a process of its own.

What trains, measures or loads networks sets threads, prints, writes settings and holds memory; a notebook, and the
process that shows progress, must notice none of that. A fork would inherit the caller's threads and locks, and
`multiprocessing` would run the caller's script again; this does neither.

Request and result are pickles, written and read by this package alone.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from yolov8_nas import paths, quiet
from yolov8_nas.errors import InputError, StageError, told
from yolov8_nas.files import no_room
from yolov8_nas.runner.stage import PARENT_VARIABLE, die_with_parent
from yolov8_nas.space import SpaceError
from yolov8_nas.store.archive import ArchiveError

FORESEEN: Final = (InputError, StageError, SpaceError, ArchiveError)
"""Errors that come back as what they are; any other is a fault of ours and comes back as a `StageError`."""


def call(
    function: str,
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    wait: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> Any:
    """Call a function in a process of its own and return what it returns.

    The process ends with this one, however this one ends.

    Args:
        function: `module:name`; the module need not be importable without what it needs in this process.
        log: File to which its output is appended.
        environment: Environment variables to set for it.
        wait: Called some times a second while it runs.
        arguments: Arguments by name, and the result: whatever can be pickled.

    Raises:
        StageError: The function failed unexpectedly or its process was killed; the message names the log.
        Exception: An error of `FORESEEN` that the function raised.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="yolov8-nas-") as folder, log.open("ab") as output:
        request, result = Path(folder) / "request.pickle", Path(folder) / "result.pickle"
        request.write_bytes(pickle.dumps((function, arguments, log)))
        everything = {
            **os.environ,
            **quiet.ultralytics(Path(folder)),
            **(environment or {}),
            PARENT_VARIABLE: str(os.getpid()),
        }
        command = [sys.executable, "-m", "yolov8_nas.runner.process", str(request), str(result)]
        with running(command, everything, output) as process:
            while process.poll() is None:
                wait()
                time.sleep(0.1)
        if not result.exists():
            how = f"killed by signal {-process.returncode}" if process.returncode < 0 else "gone without a result"
            raise StageError(f"{function}: its process was {how}, perhaps for want of memory; see {log}")
        value, error = pickle.loads(result.read_bytes())
    if error is not None:
        raise error
    return value


def call_and_tell(function: str, doing: str, otherwise: str, **arguments: Any) -> Any:
    """As `call`, with a spinner on standard error that tells what the function does meanwhile.

    Args:
        function: `module:name`; it takes `progress`, a file in which it keeps one line on what it does.
        doing: What is told until it writes one.
        otherwise: What is told where the line is empty.
        arguments: Its other arguments by name.
    """

    from yolov8_nas.terminal import Terminal  # here, since the process that is called shows nothing

    with (
        tempfile.TemporaryDirectory() as folder,
        log_file(function.rpartition(":")[2]) as log,
        Terminal(stderr=True).status(doing) as status,
    ):
        progress = Path(folder) / "progress"
        progress.write_text(doing)
        return call(
            function,
            log=log,
            wait=lambda: status.update(progress.read_text() or otherwise),
            progress=progress,
            **arguments,
        )


@contextmanager
def log_file(name: str) -> Iterator[Path]:
    """A log for `call`, where no work folder takes it; it stays if the error that ends the context names it.

    Args:
        name: What stands in its name beside a few random letters.
    """
    with tempfile.NamedTemporaryFile(prefix=f"yolov8-nas-{name}-", suffix=".log", delete=False) as file:
        log = Path(file.name)
    named = False
    try:
        yield log
    except StageError as error:
        named = str(log) in str(error)
        raise
    finally:
        if not named:
            log.unlink()


@contextmanager
def running(command: list[str], environment: Mapping[str, str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, of which nothing is left when the context ends."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        # The group and not only the process: a stage could be left. It loses nothing but the work since a checkpoint.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _main(request: Path, result: Path) -> None:
    die_with_parent()
    function, arguments, log = pickle.loads(request.read_bytes())
    module, _, name = function.partition(":")
    value, error = None, None
    try:
        value = getattr(importlib.import_module(module), name)(**arguments)
    except FORESEEN as foreseen:
        error = foreseen
    except Exception as unexpected:
        full = no_room(unexpected)
        if full is None:
            print(told(traceback.format_exc()), file=sys.stderr, flush=True)
        of_a_path = paths.told(unexpected) if isinstance(unexpected, OSError) else None
        error = full or of_a_path or StageError(f"{function}: {type(unexpected).__name__}: {unexpected}; see {log}")
    result.with_suffix(".tmp").write_bytes(pickle.dumps((value, error)))
    result.with_suffix(".tmp").replace(result)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
