"""What every test needs: Ultralytics and MLflow that keep to themselves, and a host lock that no run holds."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from measured import Tables
from web_files import https  # noqa: F401  # a fixture

from yolov8_nas import quiet

# The same examples each time: whether a change passes must not depend on luck.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Before anything imports them: both read the environment when they are imported.
os.environ.update(quiet.ultralytics(Path(tempfile.mkdtemp(prefix="yolov8-nas-tests-"))))
# Tests neither wait for a run on this machine nor hold it up.
os.environ["YOLOV8_NAS_HOST_LOCK"] = str(Path(tempfile.mkdtemp(prefix="yolov8-nas-host-")) / "lock")
# What checks of datasets find out is not left in the cache of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="yolov8-nas-cache-")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# With the number of threads the last bits of a training change, and after some steps everything.
os.environ["OMP_NUM_THREADS"] = "1"
# Two processes test at once: threads of a stage would wait for each other at every layer of a tiny network.
os.environ["YOLOV8_NAS_THREADS"] = "1"
# Threads that spin for long while they wait make tests ten times slower on a machine with other work.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


LONGEST = ("test_whole_run.py", "test_finetune.py", "test_hw_probe.py", "test_int8.py")
"""The files that take longest, the longest first. `test_nas.py` waits for the table that the whole run measures."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, short ones last: a process that came to a long one last would leave the other idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (order.get(item.path.name, len(order)), item.path not in slow))


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection: a full one, as at each training's end, takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return Tables(tmp_path_factory)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Stages take all cores; the next test's figures must not depend on which test came before it."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
