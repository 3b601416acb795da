"""Scenario 4: pods that are deleted in the middle of their work."""

from __future__ import annotations

import time

import pytest
from cluster import Cluster

STEPS = {
    "supernet-train": "Train the supernet",
    "search": "Search networks, cpu-1t-fp32",
    "qat-finetune": "Fine-tune and quantize, cpu-1t-fp32",
}
LONGER = {"supernet": {"epochs": 4, "batch": 8, "random_networks": 1}}
"""So that the training has a middle."""

MIDDLE = {
    "supernet-train": LONGER,
    "search": {"search": {"prior_steps": 4, "generations": 12, "population": 16, "candidates": 1, "bn_images": 16}},
    "qat-finetune": {"finetune": {"epochs": 8, "batch": 8, "candidates": 1, "rungs": [], "start": "scratch"}},
}
"""So that each of them has."""

BEGUN = 20.0
"""Seconds after which a pod is in its middle."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("force", [True, False], ids=["by-force", "with-grace"])
def test_a_run_whose_pod_is_deleted_goes_on_by_itself_or_when_it_is_submitted_again(
    cluster: Cluster, step: str, force: bool
) -> None:
    run = cluster.submit(**MIDDLE[step])
    pod = cluster.pod(run, step)
    time.sleep(BEGUN)
    cluster.kubectl("delete", "pod", pod, *(("--force", "--grace-period=0") if force else ()), "--wait=false")
    status = cluster.end(run)
    by_itself = status == 0
    print(f"{step}, {'by force' if force else 'with grace'}: {'by itself' if by_itself else 'submitted again'}")
    if by_itself:  # Argo makes the pod anew under its name, or tries again under another
        assert run.output.count(f"{STEPS[step]}: running") > 1, run.output
        return
    assert not force, run.output
    (file,) = cluster.folder.glob("*.yaml")
    again = cluster.submit_file(file)
    assert cluster.end(again) == 0, again.output


def test_equal_trainings_give_equal_networks_whether_or_not_their_pods_were_lost(cluster: Cluster) -> None:
    seed = 4711
    undisturbed = cluster.submit(**LONGER, seed=seed, store="/store/cluster-test-undisturbed")
    assert cluster.end(undisturbed) == 0, undisturbed.output
    disturbed = cluster.submit(**LONGER, seed=seed, store="/store/cluster-test-disturbed")
    pod = cluster.pod(disturbed, "supernet-train")
    time.sleep(BEGUN)
    cluster.kubectl("delete", "pod", pod, "--force", "--grace-period=0")
    assert cluster.end(disturbed) == 0, disturbed.output
    stores = (undisturbed, "/store/cluster-test-undisturbed"), (disturbed, "/store/cluster-test-disturbed")
    digests = {cluster.record(run, "all.supernet-train.json", store)["digest"] for run, store in stores}
    cluster.in_pod("rm -rf /store/cluster-test-undisturbed /store/cluster-test-disturbed")
    assert len(digests) == 1
