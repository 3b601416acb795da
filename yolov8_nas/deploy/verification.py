"""Whether an exported file computes what its network computes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.errors import StageError

TOLERANCE: Final = 1e-4
"""Of scores, and of boxes as a share of the image's side."""

ROUNDING: Final = 10
"""How many times further than the FP32 network itself a file may be from exact arithmetic."""


def verify_onnx(network: DetectionModel, file: Path, *, imgsz: int, batch: int = 1, seed: int = 0) -> float:
    """Compare an FP32 ONNX file with the network it was exported from, on random images.

    What they are compared with is the network in double precision: rounding alone can move a network that has hardly
    been trained by more than `TOLERANCE`, in PyTorch as in the file.

    INT8 files are not compared so: where a value lies between two integers, a rounding error in its last bit becomes a
    whole step. They are scored instead.

    Args:
        network: The network.
        file: The file.
        imgsz: Side of the square input in pixels.
        batch: Images per inference.
        seed: Seed of the images.

    Returns:
        The largest difference of a score, or of a box as a share of the image's side.

    Raises:
        StageError: It is larger than `TOLERANCE` and than rounding explains.
    """
    images = np.random.default_rng(seed).random((batch, 3, imgsz, imgsz), dtype=np.float32)
    with torch.no_grad():
        rounded = network.eval()(torch.from_numpy(images))[0].numpy()
        exact = deepcopy(network).double()(torch.from_numpy(images).double())[0].numpy()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": images})

    def distance(outputs: NDArray[np.floating]) -> float:
        difference = np.abs(outputs - exact).max(axis=(0, 2))
        return float(max(difference[:4].max() / imgsz, difference[4:].max()))

    largest, most = distance(got), max(TOLERANCE, ROUNDING * distance(rounded))
    if not largest <= most:
        raise StageError(f"{file.name} differs from its network by {largest:.2g} (at most {most:.2g}): do not ship it")
    return largest
