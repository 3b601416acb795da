"""What every test needs: Ultralytics and MLflow that keep to themselves, and a host lock that no run holds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports them: both read the environment when they are imported.
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolov8-nas-tests-")
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Threads that spin for long while they wait make tests ten times slower on a machine with other work.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@pytest.fixture(autouse=True, scope="session")
def own_host_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither wait for a run on this machine nor hold it up, except where they start a run of their own."""
    path: Path = tmp_path_factory.mktemp("host") / "lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yolov8_nas.host.default_path", lambda: path)
        yield
