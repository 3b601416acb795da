"""Settings of stages that are made up in tests."""

from __future__ import annotations

from pydantic import ConfigDict

from yolov8_nas.runner.settings import StageSettings


class Plain(StageSettings):
    """Settings with whatever fields they are given."""

    model_config = ConfigDict(extra="allow")
