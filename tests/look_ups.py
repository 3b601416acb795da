"""Whom processes ask: every look-up of a name and every connection, of this process's children and theirs.

Python runs `sitecustomize` when it starts, wherever it is found first, and tells an audit hook of each as it happens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_WITNESS: Final = """
import os, sys

def _witness(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        asked = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        asked = arguments[1][0]
    else:
        return
    asked = asked.decode() if isinstance(asked, bytes) else str(asked)
    own = asked in ("None", "", "localhost", "0.0.0.0", "::", "::1", os.uname().nodename) or asked.startswith("127.")
    line = f"{'own' if own else 'foreign'} {event} {asked} by {' '.join(sys.argv)[:200]!r}\\n"
    handle = os.open(os.environ["LOOK_UPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, line.encode(errors="replace"))
    os.close(handle)

sys.addaudithook(_witness)
_witness("socket.gethostbyname", ("127.0.0.1",))  # a sign of life of each process
"""


@contextmanager
def watched(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """Watch the processes that are started within the context.

    Args:
        folder: For what is written down.

    Yields:
        What tells whom they have asked beside this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_WITNESS)
    record = folder / "look-ups.txt"
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "LOOK_UPS")}
    path = os.pathsep.join(filter(None, (str(folder), before["PYTHONPATH"])))
    os.environ.update({"PYTHONPATH": path, "LOOK_UPS": str(record)})

    def foreign() -> list[str]:
        lines = record.read_text().splitlines() if record.exists() else []
        assert lines, "no process was watched"
        return sorted({line for line in lines if line.startswith("foreign")})

    try:
        yield foreign
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
