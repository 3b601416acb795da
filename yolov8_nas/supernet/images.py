"""The train split as the supernet sees it, through Ultralytics' dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ultralytics.cfg import get_cfg

from yolov8_nas.evaluation import DetectionImages


def settings(imgsz: int, *, mosaic: bool = True) -> Any:
    """Ultralytics' settings for augmentation and loss: its defaults, but for what is given.

    Args:
        imgsz: Side of the square network input in pixels.
        mosaic: Whether four images are joined to one.
    """
    # `deterministic` would only warn of images kept in memory; training seeds and orders them itself.
    return get_cfg(overrides={"task": "detect", "imgsz": imgsz, "mosaic": float(mosaic), "deterministic": False})


def train_split(data_yaml: Path, imgsz: int, *, augment: bool) -> DetectionImages:
    """The images and boxes of the train split, see `read_split`."""
    return read_split(data_yaml, "train", imgsz, augment=augment)


def read_split(data_yaml: Path, split: str, imgsz: int, *, augment: bool) -> DetectionImages:
    """The images and boxes of a split.

    Args:
        data_yaml: Ultralytics data yaml with absolute paths. Parsed labels are cached beside it.
        split: `train` or `val`.
        imgsz: Side of the square network input in pixels.
        augment: Whether for training, with Ultralytics' augmentation; without it images are resized and padded only, as
            in evaluation.
    """
    data: dict[str, Any] = yaml.safe_load(data_yaml.read_text())
    root = Path(data.get("path") or data_yaml.parent)
    folders = data[split] if isinstance(data[split], list) else [data[split]]
    return DetectionImages(
        img_path=[str(root / folder) for folder in folders],
        imgsz=imgsz,
        cache=None,  # images are read when they are asked for; `loading` may keep them
        augment=augment,
        hyp=settings(imgsz),
        stride=32,
        task="detect",
        data={**data, "yaml_file": str(data_yaml), "channels": 3},
    )
