"""Two processes on the CPU, under torchrun, train as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from detection import CLASSES, make_dataset

from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError
from yolov8_nas.files import write_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import SearchSpace
from yolov8_nas.stages.supernet_train.run import run
from yolov8_nas.stages.supernet_train.settings import SupernetSettings, settings
from yolov8_nas.supernet import loading, training
from yolov8_nas.supernet.distributed import Processes, launch
from yolov8_nas.supernet.images import train_split
from yolov8_nas.supernet.learner import Learner
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.training import Recipe, train

TINY = SearchSpace.load("tiny")
ALONE = Processes(torch.device("cpu"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A result of data-prep."""
    return make_dataset(tmp_path_factory.mktemp("prepared"), train=9, search=3, val=1)


def fresh() -> Supernet:
    torch.manual_seed(0)
    return Supernet(TINY, 2, CLASSES)


RECIPE = {"imgsz": 64, "epochs": 2, "batch": 4, "lr": 2e-3, "random_networks": 1, "seed": 0}
IN_PARTS = Recipe(**RECIPE, accumulate=2)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory, prepared) -> Path:
    """A folder with what two processes have done of `torchrun_process`, once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    data = data_yaml(prepared, folder / "view", validate_on="search")
    torch.save(fresh().state_dict(), folder / "weights.pt")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    with pytest.MonkeyPatch.context() as unscored, pytest.raises(KeyboardInterrupt):
        unscored.setattr(training._Validation, "run", lambda self, supernet: {})
        train(fresh(), data, IN_PARTS, folder / "resumed", StoppedAfter(2))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    assert launch(2, "torchrun_process", [str(folder)], {"PYTHONPATH": paths}) == 0
    return folder


def test_reduced_gradients_are_the_mean_of_the_shards(tmp_path, prepared, in_two_processes):
    data = data_yaml(prepared, tmp_path / "view", validate_on="search")
    first, second = (torch.load(in_two_processes / f"gradients{rank}.pt") for rank in range(2))

    for saved in (first, second):
        everywhere, here, nowhere = saved["missing"]
        assert everywhere.unique().item() == 1.5 and here.unique().item() == 0.5 and nowhere is None

    images = train_split(data, 64, augment=True)
    how = loading.prepare(images, 2, ALONE)
    places = loading.Shards(len(images), 4, rank=0, processes=1, parts=2, seed=0, epochs=range(1))
    shards = list(loading.batches(images, how, places, mosaic_epochs=1))[:2]
    alone = []
    for shard in shards:  # each by itself, in one process
        supernet = fresh()
        learner = Learner(supernet, ALONE, imgsz=64, accumulate=1, amp=False)
        learner.backward(loading.to_device(shard, ALONE.device), [TINY.largest(), TINY.smallest()], 4)
        alone.append({name: p.grad for name, p in supernet.named_parameters()})
    used = 0
    for name, gradient in first["found"].items():
        a, b = (shard[name] for shard in alone)
        assert (gradient is None) == (a is None) == (b is None), name
        if gradient is not None:
            used += 1
            torch.testing.assert_close(gradient, (a + b) / 2, rtol=1e-6, atol=1e-6, msg=name)
            assert torch.equal(gradient, second["found"][name]), name
    assert used > 50


def test_processes_hold_the_same_weights_and_go_on_where_one_left_off(
    tmp_path, prepared, in_two_processes, monkeypatch
):
    monkeypatch.setattr(training._Validation, "run", lambda self, supernet: {})
    data = data_yaml(prepared, tmp_path / "view", validate_on="search")
    undisturbed = fresh()
    _, curves = train(undisturbed, data, IN_PARTS, tmp_path / "undisturbed", Progress.silent())

    for name in ("fresh", "resumed"):
        first, second = (torch.load(in_two_processes / f"{name}{rank}.pt") for rank in range(2))
        for part in ("supernet", "average"):
            for key, tensor in first[part].items():
                assert torch.equal(tensor, second[part][key]), f"{name}: {part}: {key}"
        assert first["curves"] == second["curves"]
    assert len(torch.load(in_two_processes / "fresh0.pt")["curves"]) == 10  # epochs of two steps
    # Two processes see the shards that one process saw in two parts: but for the order of sums, it is one training.
    resumed = torch.load(in_two_processes / "resumed0.pt")
    for point, expected in zip(resumed["curves"], curves, strict=True):
        for loss in ("box", "cls", "dfl", "distill"):
            assert point[loss] == pytest.approx(expected[loss], rel=1e-3), (point["epoch"], loss)
    initial = fresh().state_dict()
    for key, tensor in undisturbed.named_parameters():
        moved = (tensor - initial[key]).abs().mean()
        assert (resumed["supernet"][key] - tensor).abs().mean() <= 0.02 * moved, key


class StoppedAfter(Progress):
    """Progress that ends the training in the step after `step`."""

    def __init__(self, step: int) -> None:
        super().__init__("", lines=False)
        self.step = step

    def update(self, done: float, total: float, message: str = "", **figures: float) -> None:
        if done > self.step:
            raise KeyboardInterrupt


def context(tmp_path: Path, prepared: Path, **supernet) -> StageContext[SupernetSettings]:
    """The stage in two processes."""
    asked = {"epochs": 1, "batch": 4, "random_networks": 0, "processes": 2, **supernet}
    config = RunConfig.parse(
        {"space": "tiny", "imgsz": 64, "supernet": asked, "targets": [{"constraints": ["latency<=5ms"]}]}, "test"
    )
    for name in ("out", "partial"):
        (tmp_path / name).mkdir()
    return StageContext(
        settings=settings(config, None),
        inputs={"data-prep": prepared},
        out=tmp_path / "out",
        partial=tmp_path / "partial",
        progress=Progress.silent(),
        host=HostLock(tmp_path / "lock"),
    )


def test_stage_runs_in_several_processes(tmp_path, prepared):
    ctx = context(tmp_path, prepared)
    run(ctx)
    assert Supernet.load(ctx.out).names == tuple(CLASSES)
    details = json.loads((ctx.out / "supernet.json").read_text())
    assert details["training"]["processes"] == 2 and details["training"]["batch"] == 4
    (point,) = json.loads((ctx.out / "curves.json").read_text())
    assert {"map50_95_largest", "data_seconds", "distill"} <= point.keys()


def test_what_a_process_says_is_what_the_stage_says(tmp_path, prepared):
    with pytest.raises(InputError, match=r"supernet\.batch = 10, but the train split has 9 images"):
        run(context(tmp_path, prepared, batch=10))


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_no_process_outlives_the_stage(tmp_path, prepared, kill):
    ctx = context(tmp_path, prepared, epochs=1000)
    request = {"settings": ctx.settings.plain(), "inputs": {"data-prep": str(prepared)}}
    write_json(tmp_path / "request.json", {**request, "out": str(ctx.out), "partial": str(ctx.partial)})
    stage = subprocess.Popen([sys.executable, "-m", "yolov8_nas.stages.supernet_train", str(tmp_path / "request.json")])
    try:
        deadline = time.monotonic() + 120
        while not (ctx.partial / "checkpoint.pt").exists():
            assert time.monotonic() < deadline and stage.poll() is None
            time.sleep(0.1)
        started = psutil.Process(stage.pid).children(recursive=True)
        assert len(started) >= 3  # torchrun and its two
    finally:
        stage.send_signal(kill)
        stage.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
