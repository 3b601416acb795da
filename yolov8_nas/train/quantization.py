"""INT8 by fake quantization with ModelOpt: the one recipe, for training, for scoring during a search and for export.

Weights are symmetric per output channel, activations symmetric per tensor. Beside the inputs of the convolutions, which
is Ultralytics' recipe, what a convolution gives *before* its activation function is quantized: only between two
quantized tensors does ONNX Runtime run a convolution in integers. Measured on a CPU with AVX-512 VNNI (YOLOv8n at 160
pixels, one thread): 5.8 ms in FP32, 8.7 ms with quantized inputs alone, because each integer is turned back into a
float and the convolution stays in FP32, and 2.9 ms with this recipe.

The head's output convolutions and DFL stay in floating point, as Ultralytics has it: one scale for pixels and
probabilities would round the scores away. Beside them stay the parts that a run's configuration names
(`quantization.keep_float`). Nothing but `leave_float` decides it: the files that hw-probe and the search measure, the
scores of the search, what is trained (network and average alike) and what ships all come from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C2PSA, SPPF, C3k2, Conv, Detect
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import is_qat, qat_state, strip_qat

from yolov8_nas.checkpoint.network import load
from yolov8_nas.checkpoint.quantized import recipe
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.space import BLOCKS, CONVS, PARTS
from yolov8_nas.space.topology import SWITCH
from yolov8_nas.supernet.derive import save_checkpoint

_BRANCHES: Final = {"cv2": "detect_boxes", "cv3": "detect_classes"}
"""The parts that the head consists of, by Ultralytics' names; those of an NMS-free branch begin with `one2one_`."""


def quantize(model: DetectionModel, calibration: Sequence[Tensor], keep_float: Sequence[str] = ()) -> DetectionModel:
    """Insert fake quantization, with ranges from calibration images.

    BatchNorm stays as it is and is folded at export; so ranges belong to statistics that must be right before this.
    Ranges are fixed from here on: training adapts the weights to them.

    Args:
        model: A network of stock modules; it is changed.
        calibration: Batches BCHW, RGB in 0..1, not augmented: ranges of mosaics are not those of images.
        keep_float: Parts (`space.PARTS`) that stay in floating point.

    Returns:
        The same network.

    Raises:
        InputError: Parts are named, and the network has not YOLOv8's.
    """
    import modelopt.torch.quantization as mtq

    def calibrate(network: Any) -> None:
        for x_BCHW in calibration:
            network(x_BCHW.to(next(model.parameters())))

    training = model.training
    model.eval()
    with torch.no_grad():
        mtq.quantize(model, recipe(), calibrate)
    leave_float(model, keep_float)
    return model.train(training)


def leave_float(model: DetectionModel, keep_float: Sequence[str] = ()) -> None:
    """Take fake quantization from what stays in floating point. The ranges of the rest do not depend on it.

    Args:
        model: A network with fake quantization; it is changed.
        keep_float: Parts (`space.PARTS`) that stay so beside the head's output convolutions and DFL.

    Raises:
        InputError: Parts are named, and the network has not YOLOv8's.
    """
    import modelopt.torch.quantization as mtq

    head = f"model.{len(model.model) - 1}."
    rows = parts_by_row(model) if keep_float else []

    def stays_float(name: str) -> bool:
        # Of the head, what is no `Conv` (convolution, BatchNorm, activation): the output convolutions, and DFL.
        if name.startswith(head) and (".dfl." in name or not (".conv." in name or ".bn." in name)):
            return True
        return bool(keep_float) and _part(name, rows) in keep_float

    mtq.disable_quantizer(model, stays_float)


def parts_by_row(model: DetectionModel) -> list[str]:
    """The part (`space.PARTS`) that each row of a network belongs to, by its place in YOLOv8's topology.

    It holds for networks of any size, with C2f as one module or unrolled.

    Returns:
        A name for each row. Rows without weights between the parts have names that are none of a part's; so has the
        head, whose branches are parts.

    Raises:
        InputError: The network has another topology.
    """
    convs, blocks = iter(CONVS), iter(BLOCKS)
    found: list[str] = []
    for row in model.model:
        match row:
            case Conv() if row.conv.stride == (2, 2):
                part = next(convs, None)
            case SPPF():
                part = "sppf"
            case C2PSA():
                part = "attention"
            case nn.Upsample():
                part = "upsample"
            case C3k2():
                part = SWITCH
            case Detect():
                part = "detect"
            case _ if found and found[-1] in BLOCKS:
                part = found[-1]
            case _:
                part = next(blocks, None)
        if part is None:
            break
        found.append(part)
    wanted = [part for part in PARTS if part not in ("attention", *_BRANCHES.values())]
    if [*dict.fromkeys(part for part in found if part not in ("attention", "upsample", SWITCH))] != [*wanted, "detect"]:
        raise InputError(
            "the network has not YOLOv8's parts, so none of them can be told from the others; give stock YOLOv8 for "
            "detection, or a network of a search space"
        )
    return found


def float_parts(model: DetectionModel) -> list[str]:
    """The parts of a network with fake quantization of which nothing is quantized, in the order of the network.

    Raises:
        InputError: The network has not YOLOv8's parts.
    """
    rows = parts_by_row(model)
    enabled = {_part(name, rows): False for name, _ in model.named_parameters() if _part(name, rows) in PARTS}
    for name, module in model.named_modules():
        if type(module).__name__ == "TensorQuantizer" and module.is_enabled:
            enabled[_part(name, rows)] = True
    return [part for part in PARTS if enabled.get(part) is False]


def require_recipe(model: DetectionModel, keep_float: Sequence[str], source: Path) -> None:
    """See that a network is quantized as it was searched.

    Args:
        model: A network with fake quantization.
        keep_float: Parts that are to be in floating point.
        source: Where the network is from, for messages.

    Raises:
        StageError: Others are.
    """
    found, rows = float_parts(model), parts_by_row(model)
    wanted = [part for part in PARTS if part in keep_float and (part in rows or part in _BRANCHES.values())]
    if found != wanted:
        raise StageError(
            f"{source}: in floating point stay {', '.join(found) or 'no parts'}, and quantization.keep_float asks for "
            f"{', '.join(wanted) or 'none'}; train it again with this configuration"
        )


def _part(name: str, rows: Sequence[str]) -> str:
    """The part that something inside a network belongs to.

    Args:
        name: For example `model.22.cv2.0.1.conv.weight`.
        rows: As `parts_by_row` gives them.
    """
    _, row, inner, *_ = name.split(".")
    part = rows[int(row)]
    return _BRANCHES.get(inner.removeprefix("one2one_"), part) if part == "detect" else part


def fold(model: DetectionModel) -> DetectionModel:
    """Fold BatchNorm into the convolutions, as in what ships; the network itself is changed.

    Ultralytics' `fuse` throws a BatchNorm away with all that it holds: first its quantizer is hung to the convolution.
    """
    if is_qat(model):
        for module in model.modules():
            if isinstance(module, Conv) and hasattr(module, "bn"):
                module.conv.output_quantizer = module.bn.output_quantizer
    folded: DetectionModel = model.fuse(verbose=False)
    return folded


def save_qat_checkpoint(model: DetectionModel, path: Path, *, names: Sequence[str], imgsz: int) -> None:
    """Write a checkpoint as Ultralytics does after its own QAT: stock modules, and the quantization beside them.

    `YOLO(path)` loads it where ModelOpt is installed.

    Args:
        model: A network with fake quantization; it is not changed.
        path: The file.
        names: Class names.
        imgsz: Side of the square input in pixels.
    """
    plain = deepcopy(model)
    strip_qat(plain)
    save_checkpoint(plain, path, names=names, imgsz=imgsz, modelopt=qat_state(model))


def rewrite(checkpoint: Path, path: Path) -> Path:
    """Write a checkpoint anew from what is read of it, for libraries that would run what is in the other one.

    Raises:
        InputError: The file can't be read, or holds something else; see `checkpoint.network`.
    """
    found = load(checkpoint)
    write = save_qat_checkpoint if found.quantized else save_checkpoint
    write(found.network, path, names=list(found.network.names.values()), imgsz=found.imgsz or 640)
    return path


def load_network(path: Path) -> DetectionModel:
    """The network of a checkpoint in evaluation mode, with its fake quantization where it has any.

    Raises:
        InputError: The file can't be read, or holds something else; see `checkpoint.network`.
    """
    return load(path).network
