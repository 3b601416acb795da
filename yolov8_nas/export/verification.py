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
"""Of scores, and of boxes as a share of the image's longer side."""

HALF_TOLERANCE: Final = 1e-2
"""The same of FP16 files: eleven bits, through some sixty layers."""

ROUNDING: Final = 10
"""How many times further than the network itself in the file's precision a file may be from exact arithmetic."""


def verify_onnx(
    network: DetectionModel,
    file: Path,
    *,
    imgsz: int,
    batch: int = 1,
    seed: int = 0,
    dynamic: bool = False,
    half: bool = False,
) -> float:
    """Compare an FP32 or FP16 ONNX file with the network it was exported from, on random images.

    What they are compared with is the network in double precision: rounding alone can move a network that has hardly
    been trained by more than the tolerance, in PyTorch as in the file. For FP16 files, what rounding does is seen in
    the network with weights rounded to FP16.

    What comes out of an NMS-free head is a choice of the best, in which two that are all but equal may change places.
    So its scores are compared in order, and each of its detections with the nearest of all that the network had to
    choose from.

    INT8 files are not compared so: where a value lies between two integers, a rounding error in its last bit becomes a
    whole step. They are scored instead.

    Args:
        network: The network.
        file: The file.
        imgsz: Side of the square input in pixels.
        batch: Images per inference.
        seed: Seed of the images.
        dynamic: Whether the file takes other shapes, which are then tried too: one more image, and wider ones.
        half: Whether the file computes in FP16.

    Returns:
        The largest difference of a score, or of a box as a share of the image's longer side.

    Raises:
        StageError: It is larger than the tolerance and than rounding explains.
    """
    network = deepcopy(network).eval()
    exact = deepcopy(network).double()
    rounded = network.half().float() if half else network
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    shapes = [(batch, imgsz, imgsz)] + [(batch + 1, imgsz, imgsz + 32)] * dynamic
    return max(_compare(exact, rounded, session, rng, shape, file.name, half) for shape in shapes)


def _compare(
    exact: DetectionModel,
    rounded: DetectionModel,
    session: onnxruntime.InferenceSession,
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    name: str,
    half: bool,
) -> float:
    batch, height, width = shape
    images = rng.random((batch, 3, height, width), dtype=np.float32)
    with torch.no_grad():
        output, raw = exact(torch.from_numpy(images).double())
        truth = output.numpy()
        anchors_BCA = exact.model[-1]._inference(raw["one2one"]).numpy() if exact.end2end else truth
        reference = rounded(torch.from_numpy(images))[0].numpy()
    (got,) = session.run(None, {"images": images})
    side = max(height, width)

    def distance(outputs: NDArray[np.floating]) -> float:
        if exact.end2end:
            return _distance_of_detections(outputs, truth, anchors_BCA, side)
        difference = np.abs(outputs - truth).max(axis=(0, 2))
        return float(max(difference[:4].max() / side, difference[4:].max()))

    largest, most = distance(got), max(HALF_TOLERANCE if half else TOLERANCE, ROUNDING * distance(reference))
    if not largest <= most:
        raise StageError(
            f"{name} differs from its network by {largest:.2g} (at most {most:.2g}) on images of {height} x {width}: "
            "do not ship it"
        )
    return largest


def _distance_of_detections(
    got: NDArray[np.floating], truth: NDArray[np.floating], anchors_BCA: NDArray[np.floating], side: int
) -> float:
    """How far detections are from those of exact arithmetic, whichever of equal ones were chosen.

    Args:
        got: Detections (batch, rows, 6), from the highest score on. A file of any size has more rows than `truth` where
            an image has few anchors: further classes of these, then boxes and scores of zero.
        truth: Those of exact arithmetic.
        anchors_BCA: What they were chosen from: corners and class probabilities of each anchor.
        side: The image's longer side in pixels.
    """
    if not np.isfinite(got).all():
        return np.inf
    distances = [np.abs(got[:, : truth.shape[1], 4] - truth[:, :, 4]).max()]
    for rows, anchors_CA in zip(got, np.pad(anchors_BCA, ((0, 0), (0, 0), (0, 1))), strict=True):
        corners, scores, classes = rows[:, :4], rows[:, 4], rows[:, 5].astype(int)
        away = np.abs(scores[:, None] - anchors_CA[4 + classes])
        for axis in range(4):
            away = np.maximum(away, np.abs(corners[:, axis, None] - anchors_CA[axis]) / side)
        distances.append(away.min(axis=1).max())
    return float(np.max(distances))
