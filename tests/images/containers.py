"""The images, built and run as a cluster runs them: another user, no rights, a read-only root file system.

For a machine with docker and gcc, and not among the tests that run everywhere:

    make test-images

builds on the image of images/pins.json, or on BASE, any Debian with Python 3.11. BUILD_BASE is the same with the
certificates and settings of pip that installing takes. Where no registry can be reached, stand-ins for both are made by

    tests/images/stand_in_base.sh stand-in
    make test-images BASE=stand-in:base BUILD_BASE=stand-in:build

The image `target` gets stubs in the place of TensorRT's libraries (tensorrt_index.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "images"))  # scripts, not a package

import build
import tensorrt_index

ROOT = Path(__file__).parents[2]
VERSION = version("yolov8-nas")
IMAGES = ("cpu", "training", "target", "mlflow")
CONTEXT = (".dockerignore", "LICENSE", "README.md", "pyproject.toml")
CONTEXT += ("components", "images", "pipelines", "requirements", "yolov8_nas")
INDEX = "/opt/tensorrt-index"
RESTRICTED = (
    *("--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--tmpfs=/tmp:rw,exec", "--shm-size=256m"),
)
MINIATURE = """
name: miniature
data: /store/data
space: tiny
imgsz: 64
supernet: {epochs: 1, random_networks: 1}
probe: {networks: 12, holdout: 5, max_mape: 10}
search: {generations: 1, population: 4, candidates: 1, measure_every: 1, bn_images: 16, random: 2, prior_steps: 2}
finetune: {epochs: 1, candidates: 1, qat_epochs: 1}
targets:
  - {hardware: cpu, precision: best, constraints: ["latency<=150%stock"]}
"""


def docker(*arguments: str) -> str:
    """What docker prints; a failure is one of the test."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    return done.stdout


def name(image: str) -> str:
    return f"yolov8-nas/{image}:{VERSION}"


def run(image: str, *command: str, options: tuple[str, ...] = ()) -> str:
    """What a command prints in a container with no rights."""
    return docker("run", "--rm", *RESTRICTED, *options, name(image), *command)


@pytest.fixture(scope="module", autouse=True)
def bills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build them as `make images` does; the folder with their bills of materials."""
    source = tmp_path_factory.mktemp("source")
    for part in CONTEXT:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    pinned = json.loads((ROOT / "images" / "pins.json").read_text())["python"]
    base = os.environ.get("BASE") or pinned

    index = tmp_path_factory.mktemp("index")
    lock = tensorrt_index.make(index, build.TENSORRT_VERSION, build.TENSORRT_PACKAGES)
    (source / "images" / build.TENSORRT_LOCK.name).write_text(lock)
    (index / "Dockerfile").write_text(f"FROM {os.environ.get('BUILD_BASE') or base}\nCOPY . {INDEX}\n")
    docker("build", "--tag", "yolov8-nas-test:build", str(index))

    command = [sys.executable, source / "images" / "build.py", "--base", base, "--build-base", "yolov8-nas-test:build"]
    settings = {build.INDEX_VARIABLE: f"file://{INDEX}", "GIT_DIR": str(ROOT / ".git")}
    subprocess.run([*command, *IMAGES], check=True, env={**os.environ, **settings})
    return source / "build" / "images"


@pytest.mark.parametrize("image", IMAGES)
def test_it_runs_as_nobody_in_particular_and_says_what_it_is(image: str) -> None:
    assert run(image, "id", "-u").strip() == "10001"
    config = json.loads(docker("image", "inspect", name(image)))[0]["Config"]
    assert config["User"] == "10001:10001"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == f"yolov8-nas {image}"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert len(labels["org.opencontainers.image.revision"]) == 40


@pytest.mark.parametrize("image", IMAGES)
def test_where_packages_came_from_is_not_left_in_it(image: str) -> None:
    kept = docker("image", "history", "--no-trunc", name(image)) + docker("image", "inspect", name(image))
    assert "PIP_" not in kept and f"file://{INDEX}" not in kept
    present = run(image, "sh", "-c", f"ls -d {INDEX} /etc/pip.conf /locks /source 2> /dev/null || true")
    assert present == ""


@pytest.mark.parametrize("image", IMAGES)
def test_its_bill_of_materials_is_that_of_what_is_installed(image: str, bills: Path) -> None:
    bill = json.loads((bills / f"{image}.cdx.json").read_text())
    listed = {component["name"].lower(): component["version"] for component in bill["components"]}
    installed = "{each.name.lower(): each.version for each in importlib.metadata.distributions()}"
    program = f"import importlib.metadata, json; print(json.dumps({installed}))"
    assert listed.items() >= json.loads(run(image, "python", "-c", program)).items()


@pytest.mark.parametrize("image", ["cpu", "training", "target"])
def test_everything_that_steps_import_is_there(image: str) -> None:
    modules = (
        "cv2, kfp, mlflow, modelopt.torch.quantization, onnxruntime, torchvision, ultralytics, yolov8_nas.commands.main"
    )
    run(image, "python", "-c", f"import {modules}, components.images, pipelines.pipeline")


def test_tensorrt_is_found() -> None:
    told = run("target", "python", "-c", "import tensorrt; print(tensorrt.__version__, tensorrt.__file__)")
    assert told.split() == [build.TENSORRT_VERSION, "/opt/tensorrt/tensorrt/__init__.py"]


def test_the_pipeline_runs_in_it_with_a_container_for_each_step(tmp_path: Path) -> None:
    data = tmp_path / "store" / "data"
    data.parent.mkdir()
    data.parent.chmod(0o777)
    make = ("yolov8-nas", "data", "make-demo", "/store/data", "--images", "40", "--size", "64")
    run("cpu", *make, options=("-v", f"{data.parent}:/store"))

    script = str(Path(__file__).with_name("in_containers.py"))
    done = subprocess.run([sys.executable, script, name("cpu"), tmp_path, MINIATURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    summary = json.loads((data.parent / "run" / "summary.json").read_text())
    assert {stage["status"] for stage in summary["stages"]} == {"done"}
    (target,) = summary["targets"]
    assert target["status"] == "met" and target["registry"]["version"]
    model = data.parent / "run" / target["model"]["files"]["model.onnx"]
    assert model.stat().st_uid == 10001


def test_mlflow_serves_from_a_new_database() -> None:
    database = "sqlite:////tmp/mlflow.db"
    serve = f"mlflow db upgrade {database} && exec mlflow server --backend-store-uri {database}"
    container = docker("run", "--detach", *RESTRICTED, name("mlflow"), "sh", "-c", serve).strip()
    program = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:5000/version').read().decode())"
    try:
        for _ in range(120):
            asked = subprocess.run(
                ["docker", "exec", container, "python", "-c", program], capture_output=True, text=True
            )
            if asked.returncode == 0:
                break
            time.sleep(2)
        assert asked.stdout.strip() == "3.17.2", docker("logs", container)
    finally:
        docker("rm", "--force", container)
    run("mlflow", "python", "-c", "import psycopg2, boto3")
