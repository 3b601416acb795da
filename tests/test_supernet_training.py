"""The supernet learns, and an interrupted training ends with the same bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detection import CLASSES, make_dataset

from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.evaluation import evaluate
from yolov8_nas.host import HostLock
from yolov8_nas.progress import Progress
from yolov8_nas.space import SearchSpace
from yolov8_nas.stages import supernet_train
from yolov8_nas.stages.stage import StageContext
from yolov8_nas.supernet import training
from yolov8_nas.supernet.batchnorm import calibration_batches, recalibrate
from yolov8_nas.supernet.derive import derive
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.training import CHECKPOINT, Recipe, distillation, train

TINY = SearchSpace.load("tiny")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A result of data-prep."""
    return make_dataset(tmp_path_factory.mktemp("prepared"), train=9, search=3, val=1)


@pytest.fixture(scope="module")
def data(prepared, tmp_path_factory) -> Path:
    return data_yaml(prepared, tmp_path_factory.mktemp("view"), validate_on="search")


def recipe(**changes) -> Recipe:
    return Recipe(**{"imgsz": 64, "epochs": 3, "batch": 4, "lr": 2e-3, "random_networks": 1, "seed": 0, **changes})


def fresh() -> Supernet:
    torch.manual_seed(0)
    return Supernet(TINY, 2, CLASSES)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the library can catch it."""


class KilledIn(Progress):
    """Progress that ends the process at a step."""

    def __init__(self, step: int) -> None:
        super().__init__("", lines=False)
        self.step = step

    def update(self, done: float, total: float, message: str = "", **figures: float) -> None:
        if done == self.step:
            raise Killed


@pytest.fixture
def unscored(monkeypatch):
    """Leave out the scoring, which takes longer than the training here."""
    monkeypatch.setattr(
        training._Validation, "run", lambda self, supernet: {"map50_95_largest": 0.0, "map50_95_smallest": 0.0}
    )


def without(points: list[dict[str, float]], *parts: str) -> list[dict[str, float]]:
    return [{name: v for name, v in point.items() if not any(part in name for part in parts)} for point in points]


def test_resumed_training_ends_with_the_same_bits(tmp_path, data, unscored, monkeypatch):
    undisturbed, curves = train(fresh(), data, recipe(), tmp_path / "undisturbed", Progress.silent())
    other, _ = train(fresh(), data, recipe(epochs=1, seed=1), tmp_path / "other", Progress.silent())
    assert not torch.equal(other.stem.weight, undisturbed.stem.weight)

    monkeypatch.undo()  # scored from here on: that must not change a bit either
    with pytest.raises(Killed):  # in the second epoch, after a step that no checkpoint knows of
        train(fresh(), data, recipe(), tmp_path / "killed", KilledIn(3))
    assert torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)["epoch"] == 1
    resumed, again = train(fresh(), data, recipe(), tmp_path / "killed", Progress.silent())
    for (name, a), b in zip(undisturbed.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert without(curves, "seconds", "map50") == without(again, "seconds", "map50")
    assert all({"map50_95_largest", "map50_95_smallest"} <= point.keys() for point in again)


def test_divergence_is_told(tmp_path, data, unscored):
    net = fresh()
    with torch.no_grad():
        net.stem.weight.fill_(torch.nan)
    with pytest.raises(StageError, match=r"epoch 1: .* supernet\.lr = 0\.002"):
        train(net, data, recipe(), tmp_path, Progress.silent())


def test_learning_rate_warms_up_and_falls():
    rates = [recipe(lr=1.0).learning_rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.01, abs=2e-3)


def test_distillation_is_zero_for_the_same_and_pulls_towards_the_teacher():
    generator = torch.Generator().manual_seed(0)

    def outputs() -> dict[str, torch.Tensor]:
        return {
            "boxes": torch.randn(2, 64, 21, generator=generator),
            "scores": torch.randn(2, 2, 21, generator=generator),
        }

    teacher, student = outputs(), outputs()
    assert distillation(teacher, teacher, 0.5, 1.5).item() == pytest.approx(0, abs=1e-5)
    leaves = {name: tensor.requires_grad_() for name, tensor in student.items()}
    loss = distillation(leaves, teacher, 0.5, 1.5)
    loss.backward()
    for name, tensor in leaves.items():
        nearer = {**student, name: (tensor - 0.1 * tensor.grad).detach()}
        assert distillation(nearer, teacher, 0.5, 1.5) < loss, name


def test_networks_of_a_step_add_up_in_the_shared_weights(data):
    net, r = fresh().train(), recipe()
    criterion = training._criterion(net, r)
    rng = training.seed_everything(0, 0)
    batch = next(training._batches(training.train_split(data, 64, augment=True), r, 0, rng))
    batch["img"] = batch["img"].float() / 255
    training._sandwich(net, batch, criterion, 0, rng)
    together = net.stem.weight.grad.clone()

    net.zero_grad()
    losses = []
    outputs = {}
    for architecture in (TINY.largest(), TINY.smallest()):
        net.activate(architecture)
        outputs[architecture] = net(batch["img"])
        losses.append(criterion(outputs[architecture], batch)[0].sum())
    teacher = {name: outputs[TINY.largest()][name].detach() for name in ("boxes", "scores")}
    losses.append(distillation(outputs[TINY.smallest()], teacher, 0.5, 1.5))
    (sum(losses) / 2).backward()
    torch.testing.assert_close(together, net.stem.weight.grad, rtol=1e-4, atol=1e-6)


def test_calibration_images_are_not_augmented(data, prepared):
    batches = calibration_batches(data, 64, 8, 3, seed=0)
    assert [batch.shape for batch in batches] == [(3, 3, 64, 64), (3, 3, 64, 64), (2, 3, 64, 64)]
    files = (prepared / "dataset" / "images" / "train").iterdir()
    known = {cv2.imread(str(path))[:, :, ::-1].transpose(2, 0, 1).tobytes() for path in files}
    drawn = [(image * 255).round().byte().numpy().tobytes() for batch in batches for image in batch]
    assert len(set(drawn)) == 8 and set(drawn) <= known
    assert torch.equal(calibration_batches(data, 64, 8, 3, seed=0)[0], batches[0])
    assert not torch.equal(calibration_batches(data, 64, 8, 3, seed=1)[0], batches[0])


def config(**supernet) -> RunConfig:
    return RunConfig.parse(
        {"space": "tiny", "imgsz": 64, "supernet": supernet, "targets": [{"constraints": ["latency<=5ms"]}]}, "test"
    )


def test_stage_settings():
    given = supernet_train.settings(config(epochs=7), None)
    assert given["space"] == TINY.to_dict()
    assert (given["epochs"], given["batch"], given["imgsz"], given["seed"]) == (7, 16, 64, 0)
    json.dumps(given)
    with pytest.raises(InputError, match=r"supernet.weights = 'yolov8n\.pt'"):
        supernet_train.settings(config(weights="yolov8n.pt"), None)


def test_stage_writes_what_later_stages_read(tmp_path, prepared, unscored, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # of this process, which other tests share
    out, partial = tmp_path / "out", tmp_path / "partial"
    out.mkdir()
    partial.mkdir()
    ctx = StageContext(
        settings=supernet_train.settings(config(epochs=1, batch=4, random_networks=0), None),
        inputs={"data-prep": prepared},
        out=out,
        partial=partial,
        progress=Progress.silent(),
        host=HostLock(tmp_path / "lock"),
    )
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    supernet_train.run(ctx)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert sorted(path.name for path in out.iterdir()) == ["curves.json", "supernet.json", "supernet.safetensors"]
    assert Supernet.load(out).names == tuple(CLASSES)
    details = json.loads((out / "supernet.json").read_text())
    assert (details["num_classes"], details["imgsz"], details["epochs"]) == (2, 64, 1)
    (point,) = json.loads((out / "curves.json").read_text())
    assert point["epoch"] == 1 and {"seconds", "data_seconds", "box", "cls", "dfl", "distill", "lr"} <= point.keys()
    assert np.isfinite(list(point.values())).all()


@pytest.mark.slow
def test_supernet_learns(tmp_path):
    prepared = make_dataset(tmp_path / "prepared", train=96, search=24, val=1, size=96)
    data = data_yaml(prepared, tmp_path / "view", validate_on="search")
    work = tmp_path / "work"
    average, curves = train(fresh(), data, recipe(imgsz=96, epochs=8, batch=8), work, Progress.silent())
    assert min(point["cls"] for point in curves[4:]) < 0.7 * curves[0]["cls"]
    images = calibration_batches(data, 96, 96, 16, seed=0)
    for architecture in (TINY.largest(), TINY.smallest(), TINY.stock):
        network = derive(average, architecture)
        recalibrate(network, images)
        score = evaluate(network.eval(), data, imgsz=96, batch=16, work=work / "evaluation")
        assert score.map50 > 0.2, architecture
