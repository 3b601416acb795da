"""Latency tables that whole runs have measured, for other tests of the same machine: measuring one takes a minute."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from yolov8_nas.stages.hw_probe.settings import TABLES


class Tables:
    """Tables of stage stores in a folder that the processes of a test run have in common.

    The store finds them by their keys, so a run of other networks or another target measures its own. Whoever finds
    none measures, too, and the order of tests decides nothing but how long they take.
    """

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        self._folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / TABLES

    def take(self, store: Path) -> None:
        """Lay what there is into a store."""
        for found in self._folder.glob("*"):
            if not found.name.startswith("."):
                shutil.copytree(found, store / TABLES / found.name, dirs_exist_ok=True)

    def give(self, store: Path) -> None:
        """Keep what a store has, each table whole or not at all."""
        self._folder.mkdir(exist_ok=True)
        for made in (store / TABLES).iterdir():
            if not (self._folder / made.name).exists():
                copy = self._folder / f".{made.name}.{os.getpid()}"
                shutil.copytree(made, copy)
                try:
                    copy.rename(self._folder / made.name)
                except OSError:  # another process was faster
                    shutil.rmtree(copy)
