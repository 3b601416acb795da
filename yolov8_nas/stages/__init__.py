"""The seven stages: functions of files to files. Each has its settings, light to import, and a module that runs it."""

from __future__ import annotations

import importlib
from typing import Any

from yolov8_nas.runner.stage import STAGES, Outcome, Stage, run_stage


def find_stage(name: str) -> Stage[Any]:
    """The stage of a name; stage `a-b` is `STAGE` of `stages.a_b`.

    Raises:
        KeyError: There is none.
    """
    if name not in STAGES:
        raise KeyError(f"no stage {name!r}; the stages are {', '.join(STAGES)}")
    stage = importlib.import_module(f"yolov8_nas.stages.{name.replace('-', '_')}").STAGE
    assert isinstance(stage, Stage)
    return stage


def run_by_name(stage: str, **request: Any) -> Outcome:
    """Bring the stage of a name to its end; see `run_stage`."""
    return run_stage(find_stage(stage), **request)
