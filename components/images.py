"""The one place that names the container images of the components.

There are three: `training` (CUDA), `target` (CUDA and TensorRT, for what runs on a target device) and `cpu` (light
steps). Each is named by `YOLOV8_NAS_IMAGE_TRAINING`, `..._TARGET` or `..._CPU` when the pipeline is compiled; without
that by `YOLOV8_NAS_IMAGE`, one for all; without that by `images/digests.json`, which maps these kinds to references.
Local runs use none of them.
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).parents[1] / "images" / "digests.json"
VARIABLE: Final = "YOLOV8_NAS_IMAGE"

_BY_DIGEST: Final = re.compile(r"^[\w./:-]+@sha256:[0-9a-f]{64}$")


def _reference(kind: str) -> str:
    """The image of a kind; where nobody has named one, a tag that no cluster is to be given."""
    named = os.environ.get(f"{VARIABLE}_{kind.upper()}") or os.environ.get(VARIABLE)
    if not named and FILE.is_file():
        named = json.loads(FILE.read_text()).get(kind)
    return named or f"yolov8-nas-{kind}:{version('yolov8-nas')}"


def by_digest(image: str) -> bool:
    """Whether a reference names one image for ever."""
    return bool(_BY_DIGEST.match(image))


IMAGES: Final = {kind: _reference(kind) for kind in ("training", "target", "cpu")}
TRAINING: Final = IMAGES["training"]
TARGET: Final = IMAGES["target"]
CPU: Final = IMAGES["cpu"]
