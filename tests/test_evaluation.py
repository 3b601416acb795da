"""Scores are Ultralytics' own, and differences come with honest intervals."""

from __future__ import annotations

from pathlib import Path

import detection
import numpy as np
import pytest
import torch
from ultralytics.utils.metrics import ap_per_class

from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.errors import InputError
from yolov8_nas.evaluation import (
    Evaluation,
    Evaluator,
    ImageStats,
    TrainingSpread,
    compare,
    mean_average_precision,
    over_trainings,
)
from yolov8_nas.files import tree_digest
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.derive import build


def made_up(seed: int, images: int, *, skill: float = 0.15, ties: bool = False) -> Evaluation:
    """Statistics of a detector that never was; the more skill, the more of its detections are right."""
    rng, targets = np.random.default_rng(seed), np.random.default_rng(1000)
    stats = []
    for i in range(images):
        n = int(rng.integers(0, 120))
        conf = -np.sort(-rng.random(n)).astype(np.float32)
        if ties:
            conf = np.round(conf, 2)
        tp = (rng.random((n, 1)) < skill * conf[:, None]) & (rng.random((n, 10)) < np.linspace(1, 0.1, 10))
        boxes = targets.integers(0, 4, int(targets.integers(1, 7))).astype(np.int32)
        stats.append(ImageStats(f"{i}.png", tp, conf, rng.integers(0, 4, n).astype(np.int32), boxes))
    score = float(mean_average_precision(stats, np.ones((1, images), dtype=int))[0])
    return Evaluation(score, score, {"thing": score}, tuple(stats))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_point_estimate_is_ultralytics_map(seed: int, ties: bool) -> None:
    evaluation = made_up(seed, images=3 + 9 * seed, ties=ties)
    parts = [
        np.concatenate([getattr(i, part) for i in evaluation.images])
        for part in ("tp", "conf", "pred_cls", "target_cls")
    ]
    assert evaluation.map50_95 == pytest.approx(ap_per_class(*parts)[5].mean(), abs=1e-12)
    assert evaluation.map50_95 > 0


def test_a_weight_of_two_is_the_image_twice() -> None:
    images = made_up(3, images=12).images
    weights = np.array([[2 if i < 4 else 0 if i == 7 else 1 for i in range(12)]])
    repeated = [*images[:4], *(image for i, image in enumerate(images) if i != 7)]
    once = mean_average_precision(repeated, np.ones((1, len(repeated)), dtype=int))[0]
    # Between the two copies of one detection there is a point more on the curve; nothing else differs.
    assert mean_average_precision(images, weights)[0] == pytest.approx(once, abs=2e-3)


def test_classes_without_boxes_in_a_draw_do_not_count() -> None:
    right = ImageStats("a", np.ones((1, 10), bool), np.array([0.9], np.float32), np.array([0]), np.array([0]))
    wrong = ImageStats("b", np.zeros((1, 10), bool), np.array([0.8], np.float32), np.array([1]), np.array([1]))
    scores = mean_average_precision([right, wrong], np.array([[1, 1], [1, 0], [0, 1]]))
    assert scores == pytest.approx([0.4975, 0.995, 0.0], abs=5e-3)


def test_words() -> None:
    good, same, bad = (made_up(seed, 25, skill=skill) for seed, skill in ((1, 0.5), (2, 0.5), (3, 0.1)))
    ahead, behind = compare(good, bad, resamples=200), compare(bad, good, resamples=200)
    assert (ahead.word, behind.word) == ("ahead", "behind")
    assert ahead.difference == pytest.approx(good.map50_95 - bad.map50_95, abs=1e-9)
    assert behind.low == pytest.approx(-ahead.high)
    assert compare(good, same, resamples=200).word == "undecided"
    assert compare(good, good, resamples=10).high == 0
    assert ahead.low <= ahead.difference <= ahead.high


def test_a_single_training_of_each_says_less_than_its_file() -> None:
    good, bad = made_up(1, 20, skill=0.5), made_up(3, 20, skill=0.38)
    files = compare(good, bad, resamples=200)
    trainings = compare(good, bad, resamples=200, spread=TrainingSpread(0.01, 4, "here"))
    assert trainings.difference == files.difference
    assert trainings.low < files.low and trainings.high > files.high
    wide = compare(good, good, resamples=200, spread=TrainingSpread(0.01, 1e6, "here"))
    assert (wide.low, wide.high) == pytest.approx((-1.96 * 2**0.5 * 0.01, 1.96 * 2**0.5 * 0.01), rel=0.1)
    few = compare(good, good, resamples=200, spread=TrainingSpread(0.01, 4, "here"))
    assert few.high > 1.2 * wide.high  # a spread that few trainings told


def test_a_runs_own_trainings_count_beside_what_is_typical() -> None:
    typical = TrainingSpread(0.01, 4, "elsewhere")
    assert typical.updated([[0.5], []], "here") is typical
    both = typical.updated([[0.50, 0.52], [0.3, 0.3, 0.3]], "here")
    assert both.freedom == 7 and both.sd == pytest.approx(((4 * 1e-4 + 2e-4) / 7) ** 0.5)
    assert both.source == "elsewhere, and here"


def test_one_seed_tells_no_spread() -> None:
    with pytest.raises(ValueError, match="one seed"):
        over_trainings(np.zeros((1, 11)))


def test_different_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different images"):
        compare(made_up(0, 5), made_up(0, 6))


def test_round_trip(tmp_path: Path) -> None:
    evaluation = made_up(4, images=9)
    evaluation.save(tmp_path / "deep" / "e.npz")
    again = Evaluation.load(tmp_path / "deep" / "e.npz")
    assert (again.map50_95, again.map50, again.per_class) == (
        evaluation.map50_95,
        evaluation.map50,
        evaluation.per_class,
    )
    for a, b in zip(again.images, evaluation.images, strict=True):
        assert a.name == b.name
        assert all(np.array_equal(getattr(a, p), getattr(b, p)) for p in ("tp", "conf", "pred_cls", "target_cls"))


def test_evaluator_leaves_network_and_dataset_alone(tmp_path: Path) -> None:
    folder = detection.make_dataset(tmp_path / "data", train=2, search=2, val=5)
    before = tree_digest(folder)
    data = data_yaml(folder, tmp_path / "view", validate_on="val")
    torch.manual_seed(0)
    network = build(SearchSpace.load("tiny").smallest(), 2, detection.CLASSES)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluator = Evaluator(data, imgsz=64, batch=4, work=tmp_path / "work")
    torch.set_num_threads(threads := 2)
    first, second = evaluator.evaluate(network), evaluator.evaluate(network)
    assert torch.get_num_threads() == threads
    assert [image.name for image in first.images] == [f"val{i:03d}.png" for i in range(5)]
    assert [len(image.target_cls) for image in first.images] == [2] * 5
    assert all(np.array_equal(a.conf, b.conf) for a, b in zip(first.images, second.images, strict=True))
    assert sum(len(image.conf) for image in first.images) > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert tree_digest(folder) == before


def test_an_onnx_file_of_another_size_is_refused(tmp_path: Path) -> None:
    from yolov8_nas.export.onnx import export_onnx

    folder = detection.make_dataset(tmp_path / "data", train=2, search=2, val=2)
    data = data_yaml(folder, tmp_path / "view", validate_on="val")
    network = build(SearchSpace.load("tiny").smallest(), 2, detection.CLASSES)
    file = export_onnx(network, tmp_path / "model.onnx", imgsz=96)
    with pytest.raises(InputError, match="96x96"):
        Evaluator(data, imgsz=64, batch=4, work=tmp_path / "work").evaluate(file)
