"""What every test needs: Ultralytics and MLflow that keep to themselves."""

from __future__ import annotations

import os
import tempfile

# Before anything imports them: both read the environment when they are imported.
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="yolov8-nas-tests-")
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Threads that wait for each other by spinning make tests ten times slower on a machine with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
