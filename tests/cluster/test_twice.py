"""Scenario 7: the same content twice, at once and after the end."""

from __future__ import annotations

from cluster import Cluster


def test_what_is_submitted_twice_at_once_is_computed_once(cluster: Cluster) -> None:
    first = cluster.submit()
    (file,) = cluster.folder.glob("*.yaml")
    second = cluster.submit_file(file)
    assert [cluster.end(run) for run in (first, second)] == [0, 0], first.output + second.output
    for stage in ("all.data-prep", "all.supernet-train", "cpu-1t-fp32.search", "cpu-1t-fp32.qat-finetune"):
        one, other = (cluster.record(run, f"{stage}.json") for run in (first, second))
        assert one["digest"] == other["digest"]
        assert {one["status"], other["status"]} == {"done", "cached"}, stage


def test_what_is_submitted_again_comes_from_the_store(cluster: Cluster) -> None:
    first = cluster.submit()
    (file,) = cluster.folder.glob("*.yaml")
    assert cluster.end(first) == 0, first.output
    again = cluster.submit_file(file)
    assert cluster.end(again) == 0, again.output
    for stage in ("all.supernet-train", "cpu-1t-fp32.search", "cpu-1t-fp32.trt-export"):
        assert cluster.record(again, f"{stage}.json")["status"] == "cached", stage
