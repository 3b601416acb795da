"""The one place that names the container image of the components."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Final

IMAGE: Final = os.environ.get("YOLOV8_NAS_IMAGE") or f"yolov8-nas:{version('yolov8-nas')}"
"""Image with this project installed; set `YOLOV8_NAS_IMAGE` when compiling, best to a digest. Local runs use none."""
