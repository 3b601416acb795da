"""TensorRT engines: so far only whether one can be built on this machine, and why not."""

from __future__ import annotations

import importlib.util
from typing import Any


def status() -> dict[str, Any]:
    """The content of `engine.json`: whether an engine was built, and the reason where none was.

    Nothing is imitated: without TensorRT and a GPU there is no engine, no timing of one and no claim about one.
    """
    import torch

    missing = []
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("TensorRT is not installed here")
    if not torch.cuda.is_available():
        missing.append("this machine has no NVIDIA GPU that PyTorch can use")
    reason = " and ".join(missing) or "building engines comes in a later version"
    return {"built": False, "reason": reason}
