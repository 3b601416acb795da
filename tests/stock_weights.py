"""Stock networks with weights for tests, and their raw outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel


def stock_network(scale: str, classes: int = 4) -> DetectionModel:
    """Stock YOLOv8 in float64 whose weights, and statistics above all, are all different."""
    torch.manual_seed(0)
    network = DetectionModel(f"yolov8{scale}.yaml", nc=classes, verbose=False).double()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.3, generator=generator)
    return network.eval()


def raw(network: nn.Module, x: Tensor) -> Tensor:
    """Raw outputs of the head, all in one tensor."""
    with torch.no_grad():
        outputs = network.eval()(x)
    outputs = outputs[1] if isinstance(outputs, tuple) else outputs
    return torch.cat([outputs["boxes"], outputs["scores"]], 1)


def image(size: int = 64) -> Tensor:
    return torch.rand(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
