"""A disk that is really full: a small one in memory, in a namespace of its own, which needs no rights beyond that.

small_disk.command(folder, "300m")      what goes before a command that is to see the disk in that folder
python tests/small_disk.py ...          what is done there; see `twice`
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def command(folder: Path, size: str) -> list[str]:
    """The beginning of a command that sees a disk of a size in a folder, which is empty and gone with the command."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = f'mount -t tmpfs -o size={size} none "{folder}" && exec "$@"'
    found = ["unshare", "-rm", "sh", "-c", mounted, "sh"]
    try:
        able = subprocess.run([*found, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("this machine lets nobody mount a disk in a namespace of their own")
    return found


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes of a disk free; the file that takes the others."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free)
    return ballast


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def twice(disk: Path, given: Path, kept: list[str], made: list[str], free: int, asked: list[str]) -> dict[str, Any]:
    """Give a command twice: with little room beside the copy of a store, and with enough.

    Args:
        disk: Where the small disk is; the store is `store` there, and MLflow's database beside it.
        given: The store.
        kept: What is copied of it.
        made: Results, `STAGE/KEY`, that are made anew.
        free: Bytes that are free the first time.
        asked: The command.

    Returns:
        Of each time the exit status and what stood on standard error, and the digests of what was made anew.
    """
    for name in kept:
        shutil.copytree(given / name, disk / "store" / name)
    (disk / "mlflow").mkdir()
    shutil.copy(given.parent / "mlflow" / "mlflow.db", disk / "mlflow")
    ballast = fill(disk, free)
    told = []
    for full in (True, False):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        told.append({"status": done.returncode, "error": done.stderr})
        if full:
            ballast.unlink()
    return {"told": told, "made": {name: digests(disk / "store" / name / "outputs") for name in made}}


if __name__ == "__main__":
    _, disk, given, kept, made, free, *asked = sys.argv
    print(json.dumps(twice(Path(disk), Path(given), json.loads(kept), json.loads(made), int(free), asked)))
