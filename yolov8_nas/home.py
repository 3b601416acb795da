"""A home folder for a user that has none, as in a container that runs under a number nobody has given a name.

MLflow and Ultralytics ask for one when they are imported, and fail without.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def settle() -> None:
    """See that this process, and its children, find a home folder and a user's name."""
    user = f"uid-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_private(Path(tempfile.gettempdir()) / f"yolov8-nas-home-{user}"))
        os.environ.setdefault("USER", user)


def _private(folder: Path) -> Path:
    """A folder that is this user's alone; another one where somebody else was there first."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    except OSError:  # perhaps a file of that name
        pass
    return Path(tempfile.mkdtemp(prefix="yolov8-nas-home-"))
