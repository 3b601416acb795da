"""No process calls anybody by itself: no telemetry, no look for a newer release, no fetching of a font, no installing.

The environment of a process is set when this package is imported, before anything that reads it, and its children
inherit it. What a library reads from files, it finds in a folder of its own (`ultralytics`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "COMET_MODE": "DISABLED",
}
"""What keeps libraries quiet that are here, or that a user's environment may hold and Ultralytics would call."""

SETTINGS: Final = "Ultralytics/settings.json"
_INTEGRATIONS: Final = ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb", "sync")
_FONTS: Final = ("Arial.ttf", "Arial.Unicode.ttf")
"""Fonts that Ultralytics looks for in its folder, and fetches from a public host, whenever it opens a dataset."""


def hush() -> None:
    """Set the environment of this process, except for what its user has set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ultralytics(folder: Path) -> dict[str, str]:
    """Make a folder in which Ultralytics finds its settings, without integrations, and fonts.

    Returns:
        The environment variables that lead there.
    """
    own = (folder / SETTINGS).parent
    own.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(dict.fromkeys(_INTEGRATIONS, False), indent=1) + "\n")
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        font = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        for name in _FONTS:
            with contextlib.suppress(FileExistsError):
                (own / name).symlink_to(font)
    return {"YOLO_CONFIG_DIR": str(folder), "YOLO_AUTOINSTALL": "false"}
