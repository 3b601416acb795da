"""What the verdict on the file that ships depends on."""

from __future__ import annotations

from typing import Final

from yolov8_nas.config import Precision, RunConfig, TargetConfig
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.space import SearchSpace

BUILT_AHEAD: Final = ("tensorrt-rtx",)
"""Runtimes whose engines are built without the device, before the export."""


class ExportSettings(StageSettings):
    """Settings of the export; which device it is for, hw-probe's result tells.

    Attributes:
        runtime: What runs the network on the target.
        precision: Precision asked for.
        batch: Images per inference.
        imgsz: Side of the square network input in pixels.
        scale: Size of the stock YOLOv8 that the space is made of.
        seed: Seed of everything random.
        keep_float: Parts that stay in floating point where networks are quantized.
        nms_free: Whether networks have the head that needs no non-maximum suppression.
        elsewhere: The target, where its device is elsewhere.
    """

    runtime: str
    precision: Precision
    batch: int
    imgsz: int
    scale: str
    seed: int
    keep_float: tuple[str, ...]
    nms_free: bool
    elsewhere: TargetConfig | None


def settings(config: RunConfig, target: TargetConfig | None) -> ExportSettings:
    """The export's settings of a run and a target."""
    assert target is not None
    return ExportSettings(
        runtime=target.runtime,
        precision=target.precision,
        batch=target.batch,
        imgsz=config.imgsz,
        scale=SearchSpace.load(config.space).scale,
        seed=config.seed,
        keep_float=config.quantization.floats(int8=target.precision in ("int8", "best")),
        nms_free=config.finetune.nms_free,
        elsewhere=target if target.far else None,
    )
