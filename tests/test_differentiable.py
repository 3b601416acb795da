"""The relaxed supernet computes the networks themselves, and its gradient tells which options help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detection import CLASSES, make_dataset
from test_supernet import assert_same, randomise, raw
from torch.nn import functional as F
from toys import TINY, gflops, networks, toy

from yolov8_nas.data.dataset import data_yaml
from yolov8_nas.errors import InputError
from yolov8_nas.runner.results import PriorStep
from yolov8_nas.search import differentiable
from yolov8_nas.search.differentiable import CHECKPOINT_EVERY, Prior, PriorRecipe, learn_prior, within
from yolov8_nas.search.linear_cost import LinearCost
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.supernet.relaxed import RelaxedSupernet
from yolov8_nas.supernet.supernet import Supernet

LINEAR = LinearCost.tabulate(TINY, gflops)
"""FLOPs in the place of milliseconds."""


def chosen(space: SearchSpace, architecture: Architecture) -> dict[str, torch.Tensor]:
    """The choices that are an architecture."""
    genes = zip(space.dimensions, space.encode(architecture), strict=True)
    return {d.name: F.one_hot(torch.tensor(gene), len(d.options)).double().requires_grad_() for d, gene in genes}


@pytest.mark.parametrize("name", ["tiny", "yolov8n-mixed"])
def test_one_hot_choices_give_the_active_network(name: str) -> None:
    space = SearchSpace.load(name)
    torch.manual_seed(0)
    supernet = randomise(Supernet(space, 3))
    relaxed = RelaxedSupernet(supernet)
    x = torch.rand(2, 3, 64, 32, dtype=torch.float64)
    drawn = networks(space, 4, seed=2)
    assert name == "tiny" or {a.attention for a in drawn} == {0, 1}
    for architecture in (space.smallest(), space.largest(), *drawn):
        supernet.activate(architecture)
        assert_same(relaxed(x, chosen(space, architecture)), raw(supernet, x, training=True))


def test_derivatives_are_those_of_a_small_change_of_the_choices() -> None:
    space = toy(
        {
            "down_p3": [32, 64],
            "backbone_p3.depth": [1, 2, 3],
            "backbone_p3.width": [32, 64],
            "backbone_p3.expansion": [0.25, 0.5],
            "backbone_p3.operator": ["dwsep3", "dwsep5", "conv3", "conv5"],
            "topdown_p3.operator": ["dilated3", "conv3"],
            "topdown_p3.width": [32, 64],
            "sppf.kernel": [3, 5],
            "sppf.width": [128, 256],
            "attention": [0, 1],
            "detect.classes": ["dwsep3", "conv3"],
            "detect.reg_max": [8, 16],
        }
    )
    torch.manual_seed(0)
    relaxed = RelaxedSupernet(randomise(Supernet(space, 3)))
    x = torch.rand(2, 3, 64, 32, dtype=torch.float64)

    def loss(choices: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = relaxed(x, choices)
        return outputs["boxes"].square().mean() + outputs["scores"].square().mean()

    for architecture in networks(space, 2):
        choices = chosen(space, architecture)
        loss(choices).backward()
        for dimension in space.dimensions:
            weights = choices[dimension.name]
            for option in range(len(dimension.options) if len(dimension.options) > 1 else 0):
                ends = []
                for change in (1e-7, -1e-7):
                    moved = weights.detach().clone()
                    moved[option] += change
                    with torch.no_grad():
                        ends.append(loss({**choices, dimension.name: moved}).item())
                slope = (ends[0] - ends[1]) / 2e-7
                assert weights.grad[option].item() == pytest.approx(slope, rel=1e-3, abs=1e-6), (dimension, option)


def test_the_limit_holds_in_expectation_and_not_by_more_than_it_must() -> None:
    free = [torch.zeros(len(d.options), dtype=torch.float64) for d in TINY.dimensions]
    uniform = LINEAR.expected([x.softmax(0) for x in free]).item()
    for share in (0.9, 0.7, 0.5):
        moved, multiplier = within(free, LINEAR, share * uniform)
        assert LINEAR.expected([x.softmax(0) for x in moved]).item() == pytest.approx(share * uniform, rel=1e-4)
        assert LINEAR.expected([x.softmax(0) for x in moved]).item() <= share * uniform
        assert multiplier > 0
    assert within(free, LINEAR, 1.1 * uniform) == (free, 0.0)
    moved, _ = within(free, LINEAR, 1e-6)
    likeliest = TINY.decode([int(x.argmax()) for x in moved])
    assert LINEAR([likeliest])[0] < 1.1 * LINEAR([TINY.smallest()])[0]


def test_samples_follow_the_logits() -> None:
    rng = np.random.default_rng(0)
    logits = tuple(tuple(rng.normal(size=len(d.options)).tolist()) for d in TINY.dimensions)
    prior = Prior(logits, logits, ())
    genes = np.array([TINY.encode(prior.sample(TINY, rng)) for _ in range(2000)])
    for column, values in zip(genes.T, logits, strict=True):
        wanted = np.exp(values) / np.exp(values).sum()
        assert np.abs(np.bincount(column, minlength=len(values)) / 2000 - wanted).max() < 0.05
    likely = TINY.encode(prior.most_likely(TINY))
    assert list(likely) == [int(np.argmax(values)) for values in logits]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared = make_dataset(tmp_path_factory.mktemp("prepared"), train=4, search=6, val=1)
    return data_yaml(prepared, tmp_path_factory.mktemp("view"), validate_on="search")


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(TINY, 2, CLASSES).eval()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the library can catch it."""


def learn(
    supernet: Supernet,
    data: Path,
    partial: Path,
    *,
    linear: LinearCost = LINEAR,
    limit: float | None = None,
    killed_at: int = 0,
) -> Prior:
    def progress(step: PriorStep) -> None:
        if step.step == killed_at:
            raise Killed

    recipe = PriorRecipe(steps=12, imgsz=64, seed=0, batch=4, temperature=0.005)
    return learn_prior(supernet, data, linear, limit, recipe=recipe, partial=partial, progress=progress)


def test_logits_are_what_options_save_within_the_limit(
    supernet: Supernet, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss whose logarithm is a sum over options, all that is learned is known."""
    rng = np.random.default_rng(3)
    effects = {d.name: torch.tensor(rng.normal(0, 0.02, len(d.options))).float() for d in TINY.dimensions}

    def outputs(x: torch.Tensor, choices: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(choices[name] @ effect for name, effect in effects.items()).exp() * len(x)

    monkeypatch.setattr(differentiable, "RelaxedSupernet", lambda supernet: outputs)
    monkeypatch.setattr(differentiable, "DetectionLoss", lambda supernet, imgsz: lambda outputs, batch: [outputs])
    free = learn(supernet, data, tmp_path / "free")
    for dimension, logits, worth in zip(TINY.dimensions, free.logits, free.worth, strict=True):
        saved = -effects[dimension.name] + effects[dimension.name].mean()
        assert worth == pytest.approx(saved.tolist(), abs=1e-6)
        assert logits == pytest.approx([value / 0.005 for value in worth])
    assert all(step.penalty == 0 for step in free.trajectory)

    limit = 0.7 * free.trajectory[-1].expected_ms
    tight = learn(supernet, data, tmp_path / "tight", limit=limit)
    assert all(step.expected_ms <= limit for step in tight.trajectory)
    assert tight.trajectory[-1].expected_ms == pytest.approx(limit, rel=1e-3)
    assert tight.trajectory[-1].penalty > 0
    for found, known in zip(tight.worth, free.worth, strict=True):
        assert found == pytest.approx(known, abs=1e-6)
    assert LINEAR([tight.most_likely(TINY)])[0] < LINEAR([free.most_likely(TINY)])[0]

    stock = zip(TINY.dimensions, TINY.encode(TINY.stock), strict=True)
    fewer = SearchSpace("fewer", "n", tuple(replace(d, options=d.options[min(gene, 1) :]) for d, gene in stock))
    assert fewer.size < TINY.size
    kept = learn(supernet, data, tmp_path / "fewer", linear=LinearCost.tabulate(fewer, gflops))
    for dimension, worth in zip(fewer.dimensions, kept.worth, strict=True):
        saved = -effects[dimension.name][-len(dimension.options) :]
        assert worth == pytest.approx((saved - saved.mean()).tolist(), abs=1e-6)


@pytest.mark.slow
def test_a_supernet_is_left_as_it_is(supernet: Supernet, data: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    prior = learn(supernet, data, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    assert not supernet.training and all(p.requires_grad for p in supernet.parameters())
    assert [step.step for step in prior.trajectory] == list(range(1, 13))
    for dimension, worth in zip(TINY.dimensions, prior.worth, strict=True):
        idle = len(dimension.options) == 1 or dimension.name == "sppf.kernel"  # on 2x2 cells both pool everything
        assert (np.ptp(worth) == 0) == idle, dimension
        assert sum(worth) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, CHECKPOINT_EVERY + 2])
def test_a_killed_learning_ends_the_same(supernet: Supernet, data: Path, tmp_path: Path, killed_at: int) -> None:
    whole = learn(supernet, data, tmp_path / "whole", limit=0.4)
    with pytest.raises(Killed):
        learn(supernet, data, tmp_path / "killed", limit=0.4, killed_at=killed_at)
    assert learn(supernet, data, tmp_path / "killed", limit=0.4) == whole


def test_an_empty_search_split_is_named(supernet: Supernet, tmp_path: Path) -> None:
    prepared = make_dataset(tmp_path / "prepared", train=2, search=0, val=1)
    view = data_yaml(prepared, tmp_path, validate_on="search")
    with pytest.raises(InputError, match=r"data.yaml: no images in `val`, the search split"):
        learn(supernet, view, tmp_path / "partial")
