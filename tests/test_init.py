"""`yolov8-nas init`: a configuration that suits a dataset and a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.data.check import CheckedDataset, check_source
from yolov8_nas.data.demo import make_demo
from yolov8_nas.errors import InputError
from yolov8_nas.run import suggest
from yolov8_nas.run.suggest import OBJECT_SIDE, Place, Seen, configuration, input_side
from yolov8_nas.yaml_text import parse_yaml

CPU, GPU = Place("cpu"), Place("T4", gpu=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data") / "line 3: dents"
    make_demo(made, 24, 64)
    return made


@pytest.fixture(scope="module")
def dataset(folder: Path) -> CheckedDataset:
    return check_source(folder)


def _read(text: str) -> RunConfig:
    return RunConfig.parse(parse_yaml(text, "test"), "test")


def test_what_is_written_is_a_configuration_of_this_dataset_and_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLOV8_NAS_WEIGHTS", str(tmp_path / "weights"))
    done = CliRunner().invoke(app, ["init", "--data", str(folder), "--yes"])
    assert done.exit_code == 0, done.output
    file = tmp_path / "line-3-dents.yaml"
    config = RunConfig.load(file, ())
    assert config.data == str(folder)
    assert (config.start, config.supernet.weights, config.targets[0].precision) == ("weights", "yolov8n.pt", "best")
    assert "first: supernet.weights = 'yolov8n.pt': neither in the current folder nor in" in done.output
    assert "next:  look through it, then yolov8-nas run line-3-dents.yaml" in done.output
    written = file.read_bytes()
    again = CliRunner().invoke(app, ["init", "--data", str(folder), "--yes"])
    assert again.exit_code == 2 and "is there already; name another file with --out" in again.output
    assert file.read_bytes() == written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hardware", "NVIDIA_T44"], "hardware 'NVIDIA_T44' is unknown; did you mean"),
        (["--constraint", "latency<=fast"], "latency<=fast"),
        (["--name", "two words"], "name"),
        (["--out", "no/such/folder/x.yaml"], "there is no folder no/such/folder"),
    ],
)
def test_what_cannot_be_suggested_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "--data", str(folder), "--yes", *options])
    assert done.exit_code == 2 and said in done.output, done.output
    assert not list(tmp_path.iterdir())


def test_a_gpu_gets_its_own_runtime_precision_and_more_steps(dataset: CheckedDataset) -> None:
    cpu, gpu = (_read(configuration(dataset, "data", place, "latency<=3ms")) for place in (CPU, GPU))
    target = gpu.targets[0]
    assert (target.hardware, target.runtime, target.precision) == ("T4", "tensorrt", "fp16")
    assert (cpu.space, gpu.space) == ("yolov8n", "yolov8s")
    assert gpu.finetune.epochs > cpu.finetune.epochs
    assert cpu.supernet.near is None, "an absolute limit says nothing of a share"


def test_the_supernet_is_trained_near_a_relative_limit(dataset: CheckedDataset) -> None:
    assert _read(configuration(dataset, "data", CPU, "latency<=60%stock")).supernet.near == 0.6


@pytest.mark.parametrize("small", [0.01, 0.05, 0.1, 0.5, None])
@pytest.mark.parametrize("image", [50, 640, 4000])
def test_an_input_shows_small_objects_and_is_no_larger_than_images_are(small: float | None, image: int) -> None:
    seen = Seen(train=100, val=20, classes=2, image_side=image, small_object=small)
    for place in (CPU, GPU):
        side = input_side(seen, place)
        assert side % 32 == 0 and 160 <= side <= max(160, min(place.largest_side, image + 31))
        if small is not None and 160 < side < min(place.largest_side, image):
            assert OBJECT_SIDE <= small * side < OBJECT_SIDE + 32 * small


def test_a_name_that_is_none_of_a_run_is_made_one() -> None:
    assert suggest._name("s3://bucket/Zeile 3/ä.tar.gz") == "detector"
    assert suggest._name("/data/.hidden") == "detector"
    assert suggest._name("x" * 100) == "x" * 63
    with pytest.raises(InputError, match="unknown"):
        Place.named("NVIDIA_T44")
