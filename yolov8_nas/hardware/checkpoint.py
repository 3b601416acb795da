"""Reads Ultralytics checkpoints without running code that they may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.nn.tasks import torch_safe_load

from yolov8_nas.errors import InputError


def load_checkpoint(file: Path) -> dict[str, Any]:
    """The content of an Ultralytics checkpoint.

    Whoever the file is from, no code in it is run: it may refer to modules of Ultralytics and PyTorch and to plain
    data (Ultralytics' own restricted loading, which it leaves to those who ask for it).

    Raises:
        InputError: There is no such file, or it cannot be read so.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the path of a checkpoint (.pt)")
    if file.suffix != ".pt":
        raise InputError(f"{file}: not a checkpoint; give the path of a .pt file")
    try:
        found, _ = torch_safe_load(str(file), safe_only=True)
    except Exception as error:  # of many classes, and a damaged file can cause any
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: not a checkpoint of Ultralytics that can be read safely ({why})") from None
    content: dict[str, Any] = found
    return content
