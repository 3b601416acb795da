"""INT8 by fake quantization with ModelOpt: the one recipe, for training, for scoring during a search and for export.

Weights are symmetric per output channel, activations symmetric per tensor. Beside the inputs of the convolutions, which
is Ultralytics' recipe, what a convolution gives *before* its activation function is quantized: only between two
quantized tensors does ONNX Runtime run a convolution in integers. Measured on a CPU with AVX-512 VNNI (YOLOv8n at 160
pixels, one thread): 5.8 ms in FP32, 8.7 ms with quantized inputs alone, because each integer is turned back into a
float and the convolution stays in FP32, and 2.9 ms with this recipe.

The head's output convolutions and DFL stay in floating point, as Ultralytics has it: one scale for pixels and
probabilities would round the scores away.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import DetectionModel, load_checkpoint
from ultralytics.utils.torch_utils import is_qat, qat_state, strip_qat

from yolov8_nas.supernet.derive import save_checkpoint


def quantize(model: DetectionModel, calibration: Sequence[Tensor]) -> DetectionModel:
    """Insert fake quantization, with ranges from calibration images.

    BatchNorm stays as it is and is folded at export; so ranges belong to statistics that must be right before this.
    Ranges are fixed from here on: training adapts the weights to them.

    Args:
        model: A network of stock modules; it is changed.
        calibration: Batches BCHW, RGB in 0..1, not augmented: ranges of mosaics are not those of images.

    Returns:
        The same network.
    """
    import modelopt.torch.quantization as mtq

    config = deepcopy(mtq.INT8_DEFAULT_CFG)
    config["quant_cfg"].append(
        {"quantizer_name": "*output_quantizer", "parent_class": "nn.BatchNorm2d", "cfg": {"num_bits": 8, "axis": None}}
    )
    head = f"model.{len(model.model) - 1}."

    def calibrate(network: Any) -> None:
        for x_BCHW in calibration:
            network(x_BCHW.to(next(model.parameters())))

    def stays_float(name: str) -> bool:
        # Of the head, what is no `Conv` (convolution, BatchNorm, activation): the output convolutions, and DFL.
        return name.startswith(head) and (".dfl." in name or not (".conv." in name or ".bn." in name))

    training = model.training
    model.eval()
    with torch.no_grad():
        mtq.quantize(model, config, calibrate)
        mtq.disable_quantizer(model, stays_float)
    return model.train(training)


def move_output_quantizers(model: DetectionModel) -> None:
    """Hang each BatchNorm's quantizer to the convolution that it is about to be folded into.

    Ultralytics' `fuse` throws a BatchNorm away with all that it holds. Networks without fake quantization stay as
    they are.
    """
    if not is_qat(model):
        return
    for module in model.modules():
        if isinstance(module, Conv) and hasattr(module, "bn"):
            module.conv.output_quantizer = module.bn.output_quantizer


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
    partial = path.with_name(f".{path.name}.tmp")
    save_checkpoint(plain, partial, names=names, imgsz=imgsz)
    checkpoint = torch.load(partial, weights_only=False)  # a second ago it was ours
    torch.save({**checkpoint, "modelopt": qat_state(model)}, partial)
    partial.replace(path)


def load_network(path: Path) -> DetectionModel:
    """The network of a checkpoint in evaluation mode, with its fake quantization where it has any."""
    return load_checkpoint(path, device="cpu")[0]
