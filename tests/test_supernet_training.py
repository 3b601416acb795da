"""The supernet learns, and an interrupted training ends with the same bits."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detection import CLASSES, make_dataset
from ultralytics.utils.loss import v8DetectionLoss

from yolov8_nas import files
from yolov8_nas.config import RunConfig
from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.evaluation import evaluate
from yolov8_nas.run import preflight
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture, Head, SearchSpace
from yolov8_nas.space.cost import cost
from yolov8_nas.stages.supernet_train.run import run
from yolov8_nas.stages.supernet_train.settings import SupernetSettings, settings
from yolov8_nas.supernet import batchnorm, learner, loading, training
from yolov8_nas.supernet.autobatch import largest_power
from yolov8_nas.supernet.batchnorm import ImageBatches, StatisticsCache, calibration_batches, recalibrate
from yolov8_nas.supernet.derive import build, derive
from yolov8_nas.supernet.distributed import Processes
from yolov8_nas.supernet.images import settings as loss_settings
from yolov8_nas.supernet.images import train_split
from yolov8_nas.supernet.learner import NEAR, Learner, distillation, draw
from yolov8_nas.supernet.loading import Batch, Loading
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.training import CHECKPOINT, CONDITIONS, Recipe, train

TINY = SearchSpace.load("tiny")
ALONE = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A result of data-prep."""
    return make_dataset(tmp_path_factory.mktemp("prepared"), train=9, search=3, val=1)


@pytest.fixture(scope="module")
def data(prepared, tmp_path_factory) -> Path:
    return data_yaml(prepared, tmp_path_factory.mktemp("view"), validate_on="search")


def recipe(**changes) -> Recipe:
    return Recipe(**{"imgsz": 64, "epochs": 2, "batch": 4, "lr": 2e-3, "random_networks": 1, "seed": 0, **changes})


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


def test_the_largest_network_trains_alone_at_first(tmp_path, data, unscored, monkeypatch):
    trained, backward = [], Learner.backward

    def recorded(learner, batch, networks, batch_size):
        trained.append(list(networks))
        return backward(learner, batch, networks, batch_size)

    monkeypatch.setattr(Learner, "backward", recorded)
    _, curves = train(fresh(), data, recipe(epochs=3, largest_first=0.7), tmp_path, Progress.silent())
    alone, together = trained[:4], trained[4:]  # two steps an epoch
    assert alone == [[TINY.largest()]] * 4
    assert [networks[:2] for networks in together] == [[TINY.largest(), TINY.smallest()]] * 2
    assert ["distill" in point for point in curves] == [False, False, True]


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


@pytest.mark.parametrize("cut", [0, 1000, 0.5])
def test_of_two_checkpoints_the_one_that_is_whole_is_gone_on_from(cut, tmp_path):
    file, told = tmp_path / CHECKPOINT, []
    for epoch in (1, 2):
        state = {"recipe": asdict(recipe()), "batch": 4, "learner": {"x": torch.randn(1000)}, "curves": []}
        files.keep(file, partial(torch.save, {**state, "epoch": epoch}))
    whole = file.read_bytes()
    file.write_bytes(whole[: cut if isinstance(cut, int) else int(cut * len(whole))])
    assert training._checkpoint(file, recipe(), torch.device("cpu"), told.append)["epoch"] == 1
    assert "torn or damaged" in told[0] and "the one before it is taken" in told[0]
    files.previous_of(file).write_bytes(b"")
    assert training._checkpoint(file, recipe(), torch.device("cpu"), told.append) is None
    assert "beginning anew" in told[1]


@pytest.mark.slow
def test_a_training_with_a_torn_checkpoint_ends_with_the_same_bits(tmp_path, data, unscored, capsys):
    steps = recipe(epochs=3)
    undisturbed, _ = train(fresh(), data, steps, tmp_path / "undisturbed", Progress.silent())
    with pytest.raises(Killed):  # in the third epoch, after two checkpoints
        train(fresh(), data, steps, tmp_path / "killed", KilledIn(5))
    file = tmp_path / "killed" / CHECKPOINT
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    resumed, curves = train(fresh(), data, steps, tmp_path / "killed", Progress.from_environment("supernet-train"))
    told = capsys.readouterr().out
    assert "torn or damaged" in told and "going on after epoch 1 of 3" in told
    assert [point["epoch"] for point in curves] == [1, 2, 3]
    for (name, a), b in zip(undisturbed.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


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


def test_distillation_between_heads_of_different_bins():
    """A side that the student can't tell is as long as its last bin; a teacher with fewer bins tells no more."""
    generator = torch.Generator().manual_seed(0)
    boxes, scores = torch.randn(2, 64, 21, generator=generator), torch.randn(2, 2, 21, generator=generator)
    sides = boxes.unflatten(1, (4, 16))
    same = torch.cat([sides[:, :, :7], sides[:, :, 7:].exp().sum(2, keepdim=True).log()], 2).flatten(1, 2)
    many, few = ({"boxes": b, "scores": scores} for b in (boxes, same))
    for student, teacher in ((few, many), (many, few)):
        assert distillation(student, teacher, 0.5, 1.5).item() == pytest.approx(0, abs=1e-5)
    shifted = {"boxes": same + torch.arange(8).repeat(4)[:, None], "scores": scores}
    for student, teacher in ((shifted, many), (many, shifted)):
        assert distillation(student, teacher, 0.5, 1.5) > 1


def test_the_loss_of_a_network_is_that_of_its_bins(data):
    net = fresh()
    step = learner_of(net)
    batch = loading.to_device(epoch_of(data)[0], ALONE.device)
    for reg_max in (8, 16):
        architecture = replace(TINY.stock, head=Head(reg_max=reg_max))
        net.activate(architecture)
        outputs = net(batch["img"])
        network = build(architecture, 2)
        network.args = loss_settings(64)
        wanted, _ = v8DetectionLoss(network)(outputs, batch)
        torch.testing.assert_close(step.criterion(outputs, batch)[0], wanted)


def learner_of(net: Supernet, **changes) -> Learner:
    return Learner(net, ALONE, **{"imgsz": 64, "accumulate": 1, "amp": False, **changes})


def epoch_of(
    data: Path,
    *,
    workers: int = 0,
    cache: str = "none",
    rank: int = 0,
    processes: int = 1,
    parts: int = 1,
    seed: int = 0,
    epoch: int = 0,
    mosaic_epochs: int = 9,
) -> list[Batch]:
    """The batches of an epoch, in order."""
    images = train_split(data, 64, augment=True)
    if cache != "none":
        images.cache = cache
        images.cache_images()
    place = {"rank": rank, "processes": processes, "parts": parts}
    shards = loading.Shards(len(images), 4, **place, seed=seed, epochs=range(epoch, epoch + 1))
    return list(loading.batches(images, Loading(cache, workers, pinned=False), shards, mosaic_epochs))


def test_networks_of_a_step_add_up_in_the_shared_weights(data):
    net = fresh()
    step = learner_of(net)
    batch = loading.to_device(epoch_of(data)[0], ALONE.device)
    told = step.backward(batch, [TINY.largest(), TINY.smallest()], 4)
    together = net.stem.weight.grad.clone()

    net.zero_grad()
    losses = []
    outputs = {}
    for architecture in (TINY.largest(), TINY.smallest()):
        net.activate(architecture)
        outputs[architecture] = net(batch["img"])
        losses.append(step.criterion(outputs[architecture], batch)[0].sum())
    teacher = {name: outputs[TINY.largest()][name].detach() for name in ("boxes", "scores")}
    losses.append(distillation(outputs[TINY.smallest()], teacher, 0.5, 1.5))
    (sum(losses) / 2).backward()
    largest, _, distilled = (loss.item() for loss in losses)
    torch.testing.assert_close(together, net.stem.weight.grad, rtol=1e-4, atol=1e-6)
    assert float(told[:3].sum()) == pytest.approx(largest / 4, rel=1e-4)
    assert float(told[3]) == pytest.approx(distilled / 4, rel=1e-4)


def test_parts_of_a_batch_add_up_to_the_mean_of_its_shards(data):
    networks = [TINY.largest(), TINY.smallest()]
    shards = [loading.to_device(batch, ALONE.device) for batch in epoch_of(data, parts=2)[:2]]
    assert [len(shard["img"]) for shard in shards] == [2, 2]
    gradients = []
    for shard in shards:
        net = fresh()
        learner_of(net).backward(shard, networks, 4)  # a shard alone, at the size of the whole batch
        gradients.append(net.stem.weight.grad)
    net = fresh()
    step = learner_of(net, accumulate=2)
    for shard in shards:
        step.backward(shard, networks, 4)
    torch.testing.assert_close(net.stem.weight.grad, sum(gradients) / 2, rtol=1e-5, atol=1e-6)


def test_images_depend_on_seed_epoch_and_place_alone(data, tmp_path):
    def digests(batches: list[Batch]) -> list[bytes]:
        return [image.numpy().tobytes() for batch in batches for image in batch["img"]]

    alone = digests(epoch_of(data))
    assert len(set(alone)) == 8  # 9 images in steps of 4
    for cache in ("ram", "disk"):
        assert digests(epoch_of(data, cache=cache)) == alone, cache
    assert digests(epoch_of(data, workers=2)) == alone
    assert digests(epoch_of(data, parts=2)) == alone
    first, second = (epoch_of(data, rank=rank, processes=2) for rank in range(2))
    assert digests([first[0], second[0], first[1], second[1]]) == alone
    for change in ({"seed": 1}, {"epoch": 1}, {"mosaic_epochs": 0}):
        assert digests(epoch_of(data, **change)) != alone, change


def test_images_are_kept_where_there_is_room(data, monkeypatch):
    def kept(**sizes: int) -> str:
        images = train_split(data, 64, augment=True)
        monkeypatch.setattr(loading, "free_memory", lambda: sizes.get("memory", 2**30))
        monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=sizes.get("disk", 2**30)))
        how = loading.prepare(images, 4, replace(ALONE, local_size=sizes.get("copies", 1)))
        assert (how.workers, how.pinned) == (0, False)
        assert images.cache == (None if how.cache == "none" else how.cache)
        return how.cache

    need = 9 * 64 * 64 * 3
    assert kept(memory=2 * need) == "ram"
    assert kept(memory=2 * need, copies=2) == kept(memory=2 * need - 2) == "disk"
    assert kept(memory=0, disk=2 * need - 2) == "none"


def test_memory_of_a_container_counts(tmp_path):
    machine = loading.free_memory(tmp_path)
    assert machine > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert loading.free_memory(tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("10000\n")
    assert loading.free_memory(tmp_path) == 8000


def test_the_largest_batch_that_fits_is_a_power_of_two():
    for room, expected in ((0, 0), (1, 1), (20, 16), (64, 64), (500, 64)):
        assert largest_power(64, room.__ge__) == expected
    assert largest_power(21, lambda n: True) == 16


def test_half_precision_keeps_full_weights(data, tmp_path, unscored):
    net = fresh()
    train(net, data, recipe(epochs=1, amp=True), tmp_path, Progress.silent())
    conditions = json.loads((tmp_path / CONDITIONS).read_text())
    assert conditions["amp"] == "bfloat16"
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    full = fresh()
    train(full, data, recipe(epochs=1), tmp_path / "full", Progress.silent())
    assert not torch.equal(net.stem.weight, full.stem.weight)
    torch.testing.assert_close(net.stem.weight, full.stem.weight, rtol=0, atol=0.02)


def test_gradients_that_overflow_leave_the_step_out(data, monkeypatch):
    monkeypatch.setattr(learner, "_precision", lambda amp, device: torch.float16)
    net = fresh()
    step = learner_of(net)
    before = net.stem.weight.clone()
    batch = loading.to_device(epoch_of(data)[0], ALONE.device)
    batch["img"][0, 0, 0, 0] = torch.inf
    state = step.state_dict()
    state["scaler"]["scale"] = 4.0
    step.load_state_dict(state)
    scales = []
    for _ in range(10):
        step.backward(batch, [TINY.smallest()], 4)
        if not step.update(0, 1e-3):
            break
        scales.append(step.state_dict()["scaler"]["scale"])
    assert scales == [2, 1, 0.5]  # then no smaller scale is tried
    assert torch.equal(net.stem.weight, before)


def test_unusable_batches_and_checkpoints_are_told(data, tmp_path, unscored):
    with pytest.raises(InputError, match=r"supernet\.batch = 10, but the train split has 9 images"):
        train(fresh(), data, recipe(batch=10), tmp_path / "a", Progress.silent())
    with pytest.raises(InputError, match=r"supernet\.batch = 4 cannot be shared out .* multiple of 3"):
        train(fresh(), data, recipe(accumulate=3), tmp_path / "b", Progress.silent())
    train(fresh(), data, recipe(epochs=1), tmp_path / "c", Progress.silent())
    with pytest.raises(InputError, match=r"checkpoint\.pt: .* \(epochs 1 instead of 2, lr 0\.002 instead of 0\.1\)"):
        train(fresh(), data, recipe(epochs=2, lr=0.1), tmp_path / "c", Progress.silent())


def test_the_batch_follows_the_split(data, tmp_path, unscored):
    train(fresh(), data, recipe(batch="auto", epochs=1, accumulate=2), tmp_path, Progress.silent())
    conditions = json.loads((tmp_path / CONDITIONS).read_text())
    expected = {"device": "cpu", "processes": 1, "amp": "off", "batch": 8, "accumulate": 2}  # 16 are not there
    assert conditions == {**expected, "cache": "ram", "workers": 0, "pinned": False}


def test_calibration_images_are_not_augmented(data, prepared):
    batches = calibration_batches(data, 64, 8, 3, seed=0)
    assert [batch.shape for batch in batches] == [(3, 3, 64, 64), (3, 3, 64, 64), (2, 3, 64, 64)]
    assert batches[0].dtype == torch.float32 and sum(part.nbytes for part in batches.parts) == 8 * 3 * 64 * 64
    files = (prepared / "dataset" / "images" / "train").iterdir()
    known = {cv2.imread(str(path))[:, :, ::-1].transpose(2, 0, 1).tobytes() for path in files}
    drawn = [(image * 255).round().byte().numpy().tobytes() for batch in batches for image in batch]
    assert len(set(drawn)) == 8 and set(drawn) <= known
    assert torch.equal(calibration_batches(data, 64, 8, 3, seed=0)[0], batches[0])
    assert not torch.equal(calibration_batches(data, 64, 8, 3, seed=1)[0], batches[0])


def test_statistics_of_a_network_are_computed_once(data, tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(
        batchnorm, "recalibrate", lambda network, images: computed.append(network) or recalibrate(network, images)
    )
    net, images = fresh(), calibration_batches(data, 64, 8, 4, seed=0)

    def filled(supernet: Supernet, images: ImageBatches, architecture: Architecture) -> dict[str, torch.Tensor]:
        network = derive(supernet, architecture)
        StatisticsCache(tmp_path, supernet, images).fill(network, architecture)
        return network.state_dict()

    first, again = filled(net, images, TINY.stock), filled(net, images, TINY.stock)
    assert len(computed) == 1
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    expected = derive(net, TINY.stock)
    recalibrate(expected, images)
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.state_dict().items())

    filled(net, images, TINY.smallest())
    filled(net, calibration_batches(data, 64, 7, 4, seed=0), TINY.stock)
    assert len(computed) == 3
    with torch.no_grad():
        net.stem.weight[0, 0, 0, 0] += 1
    filled(net, images, TINY.stock)
    assert len(computed) == 4
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    filled(net, images, TINY.stock)
    assert len(computed) == 5
    filled(net, images, TINY.stock)
    assert len(computed) == 5


def config(**supernet) -> RunConfig:
    return RunConfig.parse(
        {"space": "tiny", "imgsz": 64, "supernet": supernet, "targets": [{"constraints": ["latency<=5ms"]}]}, "test"
    )


def context(tmp_path: Path, prepared: Path, **supernet) -> StageContext[SupernetSettings]:
    for name in ("out", "partial"):
        (tmp_path / name).mkdir()
    return StageContext(
        settings=settings(config(**supernet), None),
        inputs={"data-prep": prepared},
        out=tmp_path / "out",
        partial=tmp_path / "partial",
        progress=Progress.silent(),
        host=HostLock(tmp_path / "lock"),
    )


def test_stage_settings():
    given = settings(config(epochs=7), None)
    assert given.plain()["space"] == json.loads(json.dumps(TINY.to_dict()))
    assert (given.epochs, given.batch, given.imgsz, given.seed) == (7, "auto", 64, 0)
    assert SupernetSettings.model_validate(json.loads(json.dumps(given.plain()))) == given
    with pytest.raises(
        InputError, match=r"supernet\.weights = 'yolov8n\.pt': neither in the current folder nor .*yolov8n\.pt"
    ):
        settings(config(weights="yolov8n.pt"), None)
    with pytest.raises(InputError, match=r"supernet\.weights = 'runs/best\.pt': there is no .*best\.pt"):
        settings(config(weights="runs/best.pt"), None)
    with pytest.raises(InputError, match=r"supernet\.batch = 10 .* make it a multiple of 4"):
        settings(config(batch=10, accumulate=4), None)


def test_settings_know_weights_by_content(tmp_path):
    file = tmp_path / "yolov8n.pt"
    file.write_bytes(b"weights")
    before = settings(config(weights=str(file)), None).weights
    file.write_bytes(b"others")
    after = settings(config(weights=str(file)), None).weights
    assert before and after and before.path == after.path and before.sha256 != after.sha256


def test_stage_writes_what_later_stages_read(tmp_path, prepared, unscored, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # of this process, which other tests share
    ctx = context(tmp_path, prepared, epochs=1, batch=4, random_networks=0)
    out = ctx.out
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    run(ctx)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert sorted(path.name for path in out.iterdir()) == ["curves.json", "supernet.json", "supernet.safetensors"]
    assert Supernet.load(out).names == tuple(CLASSES)
    details = json.loads((out / "supernet.json").read_text())
    assert (details["num_classes"], details["imgsz"], details["epochs"]) == (2, 64, 1)
    assert details["training"]["device"] == "cpu" and details["training"]["batch"] == 4
    (point,) = json.loads((out / "curves.json").read_text())
    assert point["epoch"] == 1 and {"seconds", "data_seconds", "box", "cls", "dfl", "distill", "lr"} <= point.keys()
    assert np.isfinite(list(point.values())).all()


def test_stage_starts_from_given_weights(tmp_path, prepared, unscored, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    earlier = fresh()
    with torch.no_grad():
        earlier.stem.weight += 1  # the stage's own start has the same seed
    (tmp_path / "earlier").mkdir()
    earlier.save(tmp_path / "earlier", {})
    given = {"epochs": 1, "batch": 8, "random_networks": 0, "weights": str(tmp_path / "earlier"), "lr": 1e-7}
    ctx = context(tmp_path, prepared, **given)
    run(ctx)
    trained = Supernet.load(ctx.out)
    torch.testing.assert_close(trained.stem.weight, earlier.stem.weight, rtol=0, atol=1e-5)
    told = json.loads((ctx.out / "supernet.json").read_text())["warm_start"]
    assert told["source"] == "an earlier supernet" and told["sha256"] == ctx.settings.weights.sha256


def test_preflight_holds_the_batch_against_the_split(tmp_path, prepared):
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    (prepared / "dataset" / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}")
    asked = config(batch=500).model_copy(update={"data": str(prepared / "dataset")})
    with pytest.raises(InputError, match=r"supernet\.batch = 500, but the train split has \d images"):
        preflight.check(asked, tmp_path, str(tmp_path / "store"))


def test_preflight_reads_the_weights(tmp_path):
    file = tmp_path / "yolov8n.pt"
    file.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match=r"yolov8n\.pt"):
        preflight.check_weights(config(weights=str(file)), CLASSES)


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


def test_a_supernet_that_starts_from_weights_is_anchored_at_stock_and_trains_near_what_is_searched():
    supernet, rng = fresh(), np.random.default_rng(0)
    space = supernet.space
    assert draw(supernet, 2, rng)[:2] == [space.largest(), space.smallest()]
    stock = cost(space.stock, 2, 64).macs
    near = []
    for _ in range(20):
        first, *drawn = draw(supernet, 4, rng, anchor="stock", near=0.6)
        assert first == space.stock and len(drawn) == 4
        near += [cost(network, 2, 64).macs / stock for network in drawn[::2]]
    low, high = (0.6 * bound for bound in NEAR)
    assert np.mean([low * 0.97 <= share <= high * 1.03 for share in near]) > 0.9


def test_what_a_start_from_weights_changes_is_settled_by_the_configuration():
    def configured(**supernet):
        return RunConfig.parse(
            {"supernet": supernet, "targets": [{"constraints": ["latency<=80%stock"]}]}, "test"
        ).supernet

    plain, started = configured(), configured(weights="yolov8n.pt")
    assert (plain.anchored, plain.alone) == ("largest", 0.4)
    assert (started.anchored, started.alone) == ("stock", 0.0)
    asked = configured(weights="yolov8n.pt", anchor="largest", largest_first=0.2)
    assert (asked.anchored, asked.alone) == ("largest", 0.2)
