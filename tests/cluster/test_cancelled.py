"""Scenario 6: a run that is cancelled ends, nothing of it goes on computing, and its records say so."""

from __future__ import annotations

import pytest
from cluster import Cluster, until
from test_failures import SOON
from test_lost import LONGER, STEPS


@pytest.mark.parametrize("step", ["supernet-train", "qat-finetune"])
def test_nothing_of_a_run_that_is_cancelled_goes_on(cluster: Cluster, step: str) -> None:
    run = cluster.submit(**LONGER)
    cluster.wait_for(run, STEPS[step], "running")
    cluster.cancel(run)
    assert cluster.end(run, SOON) == 1, run.output
    assert "run canceled" in run.output or "run failed" in run.output
    until(lambda: set(cluster.pods(run).values()) <= {"Succeeded", "Failed"}, SOON, "its pods have ended")
    (file,) = cluster.folder.glob("*.yaml")
    again = cluster.submit_file(file)
    assert cluster.end(again) == 0, again.output
