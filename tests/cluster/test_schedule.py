"""Scenario 8: a schedule every two minutes, given again, changed, and longer runs than its interval; retrainings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, until

from yolov8_nas.config import RunConfig

EVERY_TWO_MINUTES = "*/2 * * * *"
TICK = 120.0
"""Seconds between two of its times."""


@pytest.fixture
def schedule(cluster: Cluster) -> Iterator[Schedule]:
    made = Schedule(cluster, cluster.configuration())
    yield made
    made.remove()


class Schedule:
    """A schedule that is a test's own."""

    def __init__(self, cluster: Cluster, file: Path) -> None:
        self.cluster = cluster
        self.file = file
        self.name = RunConfig.load(file, ()).name

    def ask(self, cron: str, *options: str) -> str:
        """What the command says it did."""
        said = self.cluster.command("schedule", str(self.file), "--cron", cron, *options)
        return said.partition(f"schedule {self.name}: ")[2].partition(",")[0]

    def recurring(self) -> list[str]:
        """Ids of the recurring runs of the name."""
        found = self.cluster.server.client.list_recurring_runs(page_size=100, namespace=self.cluster.namespace)
        return [one.recurring_run_id for one in found.recurring_runs or [] if one.display_name == self.name]

    def runs(self) -> dict[str, str]:
        """Runs that it started, with their states."""
        client = self.cluster.server.client
        found = client.list_runs(page_size=100, sort_by="created_at desc", namespace=self.cluster.namespace).runs or []
        own = set(self.recurring())
        return {run.run_id: run.state for run in found if run.recurring_run_id in own}

    def remove(self) -> None:
        """Take it away, with what it has started."""
        client = self.cluster.server.client
        for run, state in self.runs().items():
            if state in ("PENDING", "RUNNING"):
                client.terminate_run(run)
        for one in self.recurring():
            client.delete_recurring_run(one)


def test_a_schedule_is_made_kept_and_replaced(schedule: Schedule) -> None:
    assert schedule.ask("0 3 * * 1") == "created"
    assert schedule.ask("0 3 * * 1") == "unchanged"
    (first,) = schedule.recurring()
    assert schedule.ask("0 4 * * 1") == "replaced"
    (second,) = schedule.recurring()
    assert first != second
    assert schedule.ask("0 4 * * 1", "--set", "seed=2") == "replaced"


def test_a_run_that_takes_longer_than_the_interval_has_no_other_beside_it(schedule: Schedule) -> None:
    schedule.ask(EVERY_TWO_MINUTES, "--set", "supernet.epochs=20")
    until(schedule.runs, 2 * TICK + 60, "the schedule starts a run")
    (first,) = schedule.runs()
    with pytest.raises(AssertionError, match="not within"):
        until(lambda: len(schedule.runs()) > 1, 1.5 * TICK, "a second run beside it")
    assert schedule.runs()[first] == "RUNNING"


def test_a_retraining_ends_early_without_new_images_and_goes_to_the_gate_with_them(cluster: Cluster) -> None:
    data = f"/store/cluster-test-{cluster.folder.name}"
    make = "from pathlib import Path; from yolov8_nas.data.demo import make_demo; make_demo(Path({!r}), {}, 64)"
    try:
        cluster.in_pod(f'python3 -c "{make.format(data, 60)}"')
        settings = {"data": data, "name": f"cluster-test-{cluster.folder.name}"}
        first = cluster.submit(**settings)
        assert cluster.end(first) == 0, first.output
        nothing_new = cluster.submit(**settings, retrain={})
        assert cluster.end(nothing_new) == 0, nothing_new.output
        assert "Train the supernet" not in nothing_new.output
        cluster.in_pod(f'rm -r {data} && python3 -c "{make.format(data, 80)}"')
        new = cluster.submit(**settings, retrain={})
        assert cluster.end(new) == 0, new.output
        assert "Promotion gate, cpu-1t-fp32: succeeded" in new.output
    finally:
        cluster.in_pod(f"rm -rf {data}")
