"""The record of a run on one of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict, JsonValue

from yolov8_nas.runner.results.form import Result


class StageRecord(Result):
    """What a stage came to in a run.

    Attributes:
        stage: The stage.
        target: Label of the target; nothing for a stage that serves all of them.
        key: Key of the result in the store; empty where the stage was not run, because one before it failed.
        status: `cached` where the result was there.
        seconds: How long it took.
        seconds_spared: What its parts that were found in the store had taken.
        error: Why it failed.
        peak_rss_mib: Peak resident memory of the process, in MiB.
        peak_rss_child_mib: Peak resident memory of its largest child process, in MiB.
        ended: When, in seconds since 1970.
        digest: SHA-256 of the result as a tar; what the stages after it name as their input.
        settings: All that the result depends on besides the inputs.
    """

    model_config = ConfigDict(extra="ignore")  # the signature of the record

    stage: str
    target: str | None
    key: str
    status: Literal["done", "cached", "failed"]
    seconds: float
    seconds_spared: float
    error: str | None
    peak_rss_mib: float
    peak_rss_child_mib: float
    ended: float
    digest: str
    settings: Mapping[str, JsonValue]

    @property
    def peak_memory_mb(self) -> float:
        """Peak resident memory in MiB."""
        return max(self.peak_rss_mib, self.peak_rss_child_mib)
