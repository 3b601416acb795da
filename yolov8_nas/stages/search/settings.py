"""What the search on one device depends on."""

from __future__ import annotations

from yolov8_nas.config import Precision, RunConfig, SearchConfig, TargetConfig
from yolov8_nas.errors import InputError
from yolov8_nas.runner.settings import StageSettings


class SearchSettings(StageSettings):
    """Settings of the search; the limits come resolved from hw-probe.

    Attributes:
        precision: Precision that ships.
        batch: Images per inference.
        imgsz: Side of the square network input in pixels.
        search: How much is searched, and for what; `int8_aware` is true of targets in INT8 only.
        keep_float: Parts that stay in floating point where networks are quantized.
        rescaled: Whether stock is rescaled to the candidates' latencies.
        nms_free: Whether networks have the head that needs no non-maximum suppression.
        seed: Seed of everything random.
        elsewhere: The target, where its device is elsewhere.
    """

    precision: Precision
    batch: int
    imgsz: int
    search: SearchConfig
    keep_float: tuple[str, ...]
    rescaled: bool
    nms_free: bool
    seed: int
    elsewhere: TargetConfig | None


def settings(config: RunConfig, target: TargetConfig | None) -> SearchSettings:
    """The search's settings of a run and a target.

    Raises:
        InputError: Stock is to be rescaled for a device elsewhere.
    """
    assert target is not None
    rescaled, int8 = config.finetune.baseline in ("rescaled", "both"), target.precision == "int8"
    if target.far is not None and rescaled:
        raise InputError(
            f"finetune.baseline = {config.finetune.baseline} needs one measurement after the other, and "
            f"{target.hardware} is elsewhere; use stock or none"
        )
    return SearchSettings(
        precision=target.precision,
        batch=target.batch,
        imgsz=config.imgsz,
        search=config.search.model_copy(update={"int8_aware": config.search.int8_aware and int8}),
        keep_float=config.quantization.floats(int8=int8),
        rescaled=rescaled,
        nms_free=config.finetune.nms_free,
        seed=config.seed,
        elsewhere=target if target.far else None,
    )
