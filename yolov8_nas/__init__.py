"""Hardware-aware neural architecture search for YOLOv8-style detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from yolov8_nas.home import settle
from yolov8_nas.quiet import hush

if TYPE_CHECKING:
    from yolov8_nas.device.gpu import get_gpu_info
    from yolov8_nas.nas import NAS, Subnet

__all__ = ["NAS", "Subnet", "get_gpu_info"]


hush()  # before anything of this package imports a library that reads the environment
settle()


def __getattr__(name: str) -> Any:
    # On first use, because every process of a run imports this package and hardly one of them needs these.
    if name == "get_gpu_info":
        from yolov8_nas.device import gpu

        return gpu.get_gpu_info
    if name in __all__:
        from yolov8_nas import nas

        return getattr(nas, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
