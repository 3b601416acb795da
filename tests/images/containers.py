"""The images, built and run as a cluster runs them: another user, no rights, a read-only root file system.

For a machine with docker, and not among the tests that run everywhere:

    BASE=stand-in:bookworm make test-images

BASE is any Debian with Python 3.11; without it the image of images/pins.json is taken. The image `target`, which needs
TensorRT from NVIDIA, is not built here. Nothing of this has run yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESTRICTED = (
    *("--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--tmpfs=/tmp:rw,exec", "--shm-size=256m"),
)
IMAGES = ("cpu", "training", "mlflow")


def docker(*arguments: str) -> str:
    """What docker prints; a failure is one of the test."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    return done.stdout


def run(image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    """What a command prints in a container with no rights."""
    return docker("run", *RESTRICTED, *options, f"yolov8-nas/{image}:{version()}", *command)


def version() -> str:
    """The project's version, which is the images' tag."""
    from importlib.metadata import version

    return version("yolov8-nas")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Build them as `make images` does."""
    base = ["--base", os.environ["BASE"]] if os.environ.get("BASE") else []
    subprocess.run([sys.executable, str(ROOT / "images" / "build.py"), *base, *IMAGES], check=True)


@pytest.mark.parametrize("image", IMAGES)
def test_it_runs_as_nobody_in_particular_and_says_what_it_is(image: str) -> None:
    assert run(image, "id", "-u").strip() == "10001"
    config = json.loads(docker("image", "inspect", f"yolov8-nas/{image}:{version()}"))[0]["Config"]
    assert config["User"] == "10001:10001"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"yolov8-nas {image}"
    assert labels["org.opencontainers.image.version"] == version()


@pytest.mark.parametrize("image", IMAGES)
def test_its_bill_of_materials_is_that_of_what_is_installed(image: str) -> None:
    bill = json.loads((ROOT / "build" / "images" / f"{image}.cdx.json").read_text())
    listed = {component["name"].lower(): component["version"] for component in bill["components"]}
    installed = "{each.name.lower(): each.version for each in importlib.metadata.distributions()}"
    program = f"import importlib.metadata, json; print(json.dumps({installed}))"
    assert listed.items() >= json.loads(run(image, "python", "-c", program)).items()


@pytest.mark.parametrize("image", ["cpu", "training"])
def test_everything_that_steps_import_is_there(image: str) -> None:
    modules = "cv2, kfp, mlflow, modelopt.torch.quantization, onnxruntime, torchvision, ultralytics, yolov8_nas.cli"
    run(image, "python", "-c", f"import {modules}, components.images, pipelines.pipeline")


def test_the_demo_runs_in_it(tmp_path: Path) -> None:
    """All seven stages, with a stage store that belongs to the group of the steps."""
    tmp_path.chmod(0o777)
    run("cpu", "yolov8-nas", "demo", "--workdir", "/store/demo", options=("-v", f"{tmp_path}:/store"))
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert [target["status"] for target in summary["targets"]] == ["done"]


def test_mlflow_makes_its_tables() -> None:
    run("mlflow", "mlflow", "db", "upgrade", "sqlite:////tmp/mlflow.db")
    run("mlflow", "python", "-c", "import psycopg2, boto3, mlflow.server")
