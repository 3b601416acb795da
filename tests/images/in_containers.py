"""Run the pipeline with a container of an image for each step, through kfp's DockerRunner.

    python tests/images/in_containers.py IMAGE FOLDER CONFIG

The containers are another user's, without rights and network, and their root file system is read-only: they write to
a /tmp of their own, to FOLDER/artifacts, and to FOLDER/store, which is their /store. A process of its own, because
kfp.local redirects `print` and the root logger.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docker.types import Mount
from kfp import local

from pipelines.local import one_at_a_time, without_pods
from pipelines.pipeline import yolov8_nas
from pipelines.pods import STORE, STORE_PATH, UID


def main(image: str, folder: Path, config: str) -> None:
    """Run it, with summary and models in FOLDER/store/run at the end."""
    spec = yolov8_nas.pipeline_spec
    one_at_a_time(spec)
    without_pods(spec)
    for executor in spec.deployment_spec["executors"].values():
        executor["container"]["image"] = image
    places = [folder / name for name in ("store", "artifacts", "workspace")]
    for place in places:
        place.mkdir(exist_ok=True)
        place.chmod(0o777)  # it is not this user who writes there
    store, artifacts, workspace = places
    runner = local.DockerRunner(
        user=f"{UID}:{UID}",
        read_only=True,
        tmpfs={"/tmp": "rw,exec"},
        mounts=[Mount(STORE_PATH, str(store), type="bind")],
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        network_mode="none",
        shm_size="256m",
    )
    local.init(runner, pipeline_root=str(artifacts), workspace_root=str(workspace))
    yolov8_nas(config=config, store=STORE, run_id="in-containers", workdir=f"{STORE_PATH}/run", training_gpus="0")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute(), sys.argv[3])
