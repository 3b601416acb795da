"""A supernet begins where a stock YOLOv8 network ends."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detection import CLASSES, make_dataset
from stock_weights import assert_close, image, raw, stock_network
from torch import nn
from torch.nn import functional as F
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules import SPPF, Bottleneck, C2f, Concat, Conv, Detect
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.errors import InputError
from yolov8_nas.space import BLOCKS, Architecture, Head, SearchSpace
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.channels import importance_orders, reordered, wiring
from yolov8_nas.supernet.derive import build, derive, save_checkpoint, unroll
from yolov8_nas.supernet.elastic import State
from yolov8_nas.supernet.images import train_split
from yolov8_nas.supernet.operators import dilated, linearised, separable
from yolov8_nas.supernet.slicing import sliced
from yolov8_nas.supernet.supernet import Supernet
from yolov8_nas.supernet.warmstart import check, read, read_stock, serving, transfer, warm_start

TINY = SearchSpace.load("tiny")
BIG = [pytest.param(name, marks=pytest.mark.slow) for name in ("yolov8m", "yolov8l")]


@pytest.fixture(scope="module")
def stock() -> DetectionModel:
    return stock_network("n")


def states(network: DetectionModel) -> list[State]:
    return [module.state_dict() for module in unroll(network).model]


# The stock network as a point of the space ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "yolov8n-mixed", "yolov8s", *BIG])
def test_the_stock_point_with_stock_weights_gives_stock_outputs(name: str) -> None:
    space = SearchSpace.load(name)
    network = stock_network(space.scale)
    supernet = Supernet(space, 4).double().eval()
    transfer(supernet, space.stock, states(network))
    supernet.activate(space.stock)
    assert_close(raw(supernet, image()), raw(network, image()))


@pytest.mark.parametrize("name", ["tiny", "yolov8n"])
def test_after_a_warm_start_the_stock_point_and_all_larger_ones_give_stock_outputs(
    name: str, stock: DetectionModel
) -> None:
    space = SearchSpace.load(name)
    supernet = Supernet(space, 4).double().eval()
    before = copy.deepcopy(stock.state_dict())
    told = warm_start(supernet, stock)
    assert told.taken == sum(t.numel() for n, t in stock.state_dict().items() if "dfl" not in n and "tracked" not in n)
    assert told.ordered > 50 and told.approximated == 10 and "stock YOLOv8n" in str(told)
    assert all(torch.equal(tensor, before[key]) for key, tensor in stock.state_dict().items())
    wider = replace(space.largest(), sppf_kernel=5, attention=0)
    for architecture in (space.stock, wider, replace(space.stock, blocks=wider.blocks)):
        supernet.activate(architecture)
        assert_close(raw(supernet, image()), raw(stock, image()))


def test_other_heads_of_the_stock_point_begin_where_sliced_ones_do(stock: DetectionModel) -> None:
    """The depthwise class branch is the fitted one; fewer bins are stock's first ones."""
    supernet = Supernet(TINY, 4).double().eval()
    calibration = [torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()]
    warm_start(supernet, stock, calibration)
    light = replace(TINY.stock, head=Head("dwsep3"))
    network, _ = sliced(stock, light, supernet.names, calibration)
    supernet.activate(light)
    assert_close(raw(supernet, image()), raw(network, image()))
    silent = copy.deepcopy(network)
    with torch.no_grad():
        for branch in silent.model[-1].cv3:
            branch[0][0].conv.weight[:] = 0
    with pytest.raises(AssertionError):
        assert_close(raw(supernet, image()), raw(silent, image()))
    supernet.activate(replace(TINY.stock, head=Head(reg_max=8)))
    assert raw(supernet, image()).shape[1] == 4 * 8 + 4


def test_what_stock_lacks_can_learn(stock: DetectionModel) -> None:
    supernet = Supernet(TINY, 4)
    warm_start(supernet, stock)
    supernet.activate(TINY.largest())
    optimiser = torch.optim.SGD(supernet.parameters(), 0.1)
    for _ in range(2):  # what reads new channels is zero at first, so that they learn from the second step on
        outputs = supernet.train()(torch.rand(2, 3, 64, 64))
        optimiser.zero_grad()
        (outputs["boxes"].square().mean() + outputs["scores"].square().mean()).backward()
        optimiser.step()
    extra = supernet.get_submodule("backbone_p5.layers.1").conv[0].weight  # the second bottleneck of stock's one
    ring = supernet.get_submodule("backbone_p4.layers.0").conv[0].weight[:, :, 0]
    for weight in (extra.grad, ring, supernet.get_submodule("backbone_p5.merge").weight[:, -1]):
        assert weight is not None and weight.abs().max() > 0


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_reordering_channels_changes_no_output(seed: int, stock: DetectionModel) -> None:
    wires, weights = list(wiring(TINY.stock)), states(stock)
    generator = torch.Generator().manual_seed(seed)
    orders = {
        axis: torch.randperm(len(order), generator=generator)
        for axis, order in importance_orders(wires, weights).items()
    }
    network = build(TINY.stock, 4).double()
    moved = reordered(wires, weights, orders)
    for module, state in zip(network.model, moved, strict=True):
        module.load_state_dict(state)
    assert_close(raw(network, image()), raw(stock, image()))
    assert not torch.equal(moved[-1]["cv2.0.0.conv.weight"], weights[-1]["cv2.0.0.conv.weight"])


def test_channels_that_reach_less_come_later(stock: DetectionModel) -> None:
    network = copy.deepcopy(stock)
    c2f = network.model[2]  # backbone_p2: one bottleneck with a shortcut, so the second half and its output are tied
    hidden = c2f.c
    with torch.no_grad():
        network.model[0].bn.weight[3] = 0  # nothing leaves
        c2f.cv2.conv.weight[:, 5] = 0  # of the first half, nobody reads it
        c2f.cv1.bn.weight[hidden + 7] *= 1e-3  # of the second half,
        c2f.m[0].cv2.bn.weight[7] *= 1e-3  # and what is added to it
        network.model[3].bn.weight[20] = -1e3  # a factor counts without its sign
    orders = importance_orders(list(wiring(TINY.stock)), states(network))
    assert orders["stem"][-1] == 3
    assert orders["backbone_p2.split0"][-1] == 5
    assert orders["backbone_p2.split1"][-1] == 7 and "backbone_p2.layers.0" not in orders
    assert orders["down_p3"][0] == 20
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in orders.values())


# Operators ------------------------------------------------------------------------------------------------------------


def convs(between: float) -> tuple[nn.Module, nn.Module]:
    """Two stock 3x3 convolutions, with `between` as the mean of what SiLU gets."""
    torch.manual_seed(0)
    first, second = (Conv(c, 6, 3).double().eval() for c in (4, 6))
    first.bn.eps = 1e-3
    nn.init.uniform_(first.bn.weight, 0.5, 1.5)
    nn.init.uniform_(first.bn.running_var, 0.5, 1.5)
    nn.init.constant_(first.bn.bias, between)
    return first, second


def test_two_convolutions_are_one_where_silu_is_linear() -> None:
    first, second = convs(between=40.0)
    kernel = linearised(first.state_dict(), second.state_dict())
    a, b = torch.rand(2, 1, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted = second.conv(first(a)) - second.conv(first(b))
    inner = slice(2, -2)  # at the border the first one's padding is not the second one's
    assert_close(F.conv2d(a - b, kernel), wanted[:, :, inner, inner])


def test_the_factor_between_them_is_the_best_one() -> None:
    first, second = convs(between=0.3)
    kernel = linearised(first.state_dict(), second.state_dict())
    between = 0.3 + first.bn.weight.detach() * torch.randn(
        400_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    factor = ((between - 0.3) * F.silu(between)).mean(0) / first.bn.weight.detach().square()
    nn.init.constant_(first.bn.bias, 40.0)
    with torch.no_grad():
        second.conv.weight *= factor[:, None, None]
    torch.testing.assert_close(kernel, linearised(first.state_dict(), second.state_dict()), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("size", [3, 5])
def test_the_closest_separable_convolution(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=generator)
    per_input, per_tap = separable(kernel, size)
    assert per_input.shape == (6, 4, 1, 1) and per_tap.shape == (6, 1, size, size)
    margin = (5 - size) // 2
    centre = kernel[:, :, margin : 5 - margin, margin : 5 - margin]
    error = (centre - per_input * per_tap).square().sum((1, 2, 3))
    values = torch.linalg.svdvals(centre.flatten(2))
    torch.testing.assert_close(error, values[:, 1:].square().sum(1))
    assert (per_tap.sum((1, 2, 3)) >= 0).all()
    again = separable(per_input * per_tap, size)
    assert_close(again[0] * again[1], per_input * per_tap)


def test_the_dilated_kernel_gives_the_same_on_slopes() -> None:
    kernel = torch.randn(6, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    slopes = torch.stack([torch.ones(7, 7), x, y, 3 * x - 2 * y]).double()[None]
    assert_close(F.conv2d(slopes, dilated(kernel), dilation=2), F.conv2d(slopes, kernel))


# Checkpoints ----------------------------------------------------------------------------------------------------------


def write(path: Path, network: nn.Module, **more: Any) -> Path:
    torch.save({"model": network, "ema": None, "epoch": -1, **more}, path)
    return path


def test_reads_what_ultralytics_writes(stock: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = stock.state_dict()

    def read_back(path: Path) -> DetectionModel:
        network = read_stock(path)
        for name, tensor in network.state_dict().items():
            assert tensor.dtype in (torch.float32, torch.int64)
            torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), rtol=1e-3, atol=1e-4)
        return network

    halved = copy.deepcopy(stock).half()
    halved.names = {0: "a", 1: "b", 2: "c", 3: "d"}
    network = read_back(write(tmp_path / "stripped.pt", halved, train_metrics={"fitness": np.float64(0.5)}))
    assert network.names == halved.names and network.yaml["scale"] == "n"
    torch.testing.assert_close(raw(network.double(), image()), raw(stock, image()), rtol=0.02, atol=0.02)
    halved.args = get_cfg()  # as in a checkpoint in the middle of a training
    read_back(write(tmp_path / "last.pt", stock_network("n", 2), ema=halved, best_fitness=np.float64(0)))
    for module in (Conv, C2f, Bottleneck, SPPF, Concat, Detect):
        monkeypatch.setattr(module, "__module__", "ultralytics.nn.modules")
    read_back(write(tmp_path / "early.pt", halved))


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def other(network: DetectionModel, change: Callable[[DetectionModel], Any]) -> DetectionModel:
    network = copy.deepcopy(network)
    with torch.no_grad():
        change(network)
    return network


def test_refuses_everything_else(stock: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pt"

    def refused(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(InputError, match=rf"given\.pt: .*{message}.*give a checkpoint of stock YOLOv8"):
            read_stock(path)

    refused({"model": stock, "ema": Payload()}, "refers to posix.system")
    assert not (tmp_path / "executed").exists()
    refused({"model": DetectionModel("yolo11n.yaml", nc=4, verbose=False)}, "YOLO11.*C3k2.*which stock YOLOv8 does not")
    for content in ({}, [], {"model": {"weight": torch.zeros(1)}}, {"model": nn.Conv2d(3, 3, 1)}):
        refused(content, "no detection network in it")
    refused({"model": build(replace(TINY.smallest(), head=Head()), 4)}, "other layers than stock YOLOv8")
    refused({"model": other(stock, lambda n: setattr(n.model[9], "m", nn.MaxPool2d(3, 1, 1)))}, r"model\.9\.m")
    refused({"model": other(stock, lambda n: setattr(n.model[2].m[0], "add", False))}, r"model\.2\.m\.0")
    refused({"model": other(stock, lambda n: setattr(n.model[0], "act", nn.Identity()))}, r"model\.\d\.act")
    refused({"model": other(stock, lambda n: n.model[0].bn.bias.fill_(math.nan))}, "not all finite")
    refused({"model": other(stock, lambda n: setattr(n.model[0], "bn", nn.Identity()))}, "bn.weight is missing")
    path.write_bytes(b"garbage")
    for name in ("given.pt", "absent.pt"):
        with pytest.raises(InputError, match=rf"{name}: not a checkpoint that can be read as stock YOLOv8"):
            read_stock(tmp_path / name)


SERVES = {"n": "nsml", "s": "sml", "m": "m", "l": "l"}
"""By the size of a space, the sizes of checkpoints that it can start from: l's P5 is narrower than m's."""


@pytest.mark.parametrize("scale", SERVES)
def test_a_checkpoint_serves_where_it_is_nowhere_narrower_or_shallower(scale: str) -> None:
    assert "".join(serving(SearchSpace.load(f"yolov8{scale}"))) == SERVES[scale]


def test_a_checkpoint_of_a_smaller_size_is_refused(stock: DetectionModel, tmp_path: Path) -> None:
    path = tmp_path / "stock.pt"
    save_checkpoint(stock, path, names=["a", "b", "c", "d"], imgsz=64)
    for classes in (4, 3, None):
        check(path, TINY, classes)
    with pytest.raises(
        InputError,
        match=r"stock\.pt: YOLOv8n is too small for the space 'yolov8s' around YOLOv8s: its stem has 16 channels "
        r"instead of 32; give a checkpoint of YOLOv8s or YOLOv8m or YOLOv8l, or choose a space around YOLOv8n$",
    ):
        check(path, SearchSpace.load("yolov8s"), 4)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_larger_checkpoint_of_other_classes_serves(fitted: bool) -> None:
    source = stock_network("s", 7).float()
    source.names = {i: f"class {i}" for i in range(7)}
    torch.manual_seed(0)
    supernet = Supernet(TINY, 2, ["Class 5", "new"])
    calibration = [torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))] if fitted else []
    told = warm_start(supernet, source, calibration)
    torch.manual_seed(0)
    Supernet(TINY, 2)  # draws as many random numbers
    network, sliced_told = sliced(source, TINY.stock, supernet.names, calibration)
    supernet.activate(TINY.stock)
    torch.testing.assert_close(raw(supernet, image().float()), raw(network, image().float()), rtol=1e-3, atol=1e-3)
    assert told.sliced == sliced_told and told.taken == sliced_told.taken > 2.9e6
    assert "Started from stock YOLOv8s of 7 classes" in str(told) and "1 classes kept (Class 5)" in str(told)
    assert ("fitted" in str(told)) == fitted


def test_starts_from_an_earlier_supernet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    earlier, supernet = Supernet(TINY, 2), Supernet(TINY, 2)
    earlier.save(tmp_path, {})
    told = warm_start(supernet, read(tmp_path / "supernet.safetensors"))
    assert told.taken == told.total and "earlier supernet" in str(told)
    for found, wanted in zip(supernet.state_dict().values(), earlier.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)
    check(tmp_path, TINY, 2)
    with pytest.raises(InputError, match="a supernet of 2 classes, but the dataset has 5"):
        check(tmp_path, TINY, 5)
    with pytest.raises(InputError, match=r"of another space \('tiny'\) than 'yolov8n'"):
        check(tmp_path, SearchSpace.load("yolov8n"), 2)
    (tmp_path / "supernet.json").write_text("{}")
    with pytest.raises(InputError, match="not a supernet"):
        check(tmp_path, TINY, 2)


# What it is good for --------------------------------------------------------------------------------------------------


def changed(architecture: Architecture, block: str, operator: str) -> Architecture:
    data = architecture.to_dict()
    data["blocks"][block]["operator"] = operator
    return Architecture.from_dict(data)


@pytest.mark.slow
def test_of_a_trained_network_more_survives(tmp_path: Path) -> None:
    """Narrower networks and other operators begin closer to a trained stock network than without the warm start."""
    folder = make_dataset(tmp_path, train=64, search=0, val=0) / "dataset"
    data = {"path": str(folder), "train": "images/train", "val": "images/train", "names": dict(enumerate(CLASSES))}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    images = train_split(tmp_path / "data.yaml", 64, augment=False)
    torch.manual_seed(0)
    stock = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    stock.args = get_cfg()
    optimiser = torch.optim.AdamW(stock.parameters(), 2e-3)
    for step in range(60):
        batch = images.collate_fn([images[(8 * step + i) % 64] for i in range(8)])
        loss, _ = stock.train().loss(batch | {"img": batch["img"].float() / 255})
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()

    seen = [torch.stack([images[i + k]["img"] for i in range(32)]).float() / 255 for k in (0, 32)]
    recalibrate(stock, seen)
    space = SearchSpace.load("yolov8n-mixed")
    supernets = {kind: Supernet(space, 2) for kind in ("started", "unordered")}
    warm_start(supernets["started"], stock)
    transfer(supernets["unordered"], space.stock, states(stock))

    def distance(kind: str, architecture: Architecture) -> float:
        """Mean square difference of raw outputs from the stock network's, as a share of their variance."""
        network = derive(supernets[kind], architecture)
        recalibrate(network, seen)
        found, wanted = (raw(n, seen[0]).split([64, 2], 1) for n in (network, stock))
        return float(sum((a - b).square().mean() / b.var() for a, b in zip(found, wanted, strict=True)))

    def narrower(block: str) -> Architecture:
        genes = list(space.encode(space.stock))
        at = [dimension.name for dimension in space.dimensions].index(f"{block}.width")
        genes[at] -= 1
        return space.decode(genes)

    assert distance("started", space.stock) < 1e-6
    started, unordered = (sum(distance(kind, narrower(block)) for block in BLOCKS) for kind in supernets)
    assert started < 0.6 * unordered
    others = (("backbone_p3", "dwsep5"), ("topdown_p4", "dwsep3"), ("bottomup_p4", "dilated3"))
    replaced = [changed(space.stock, block, operator) for block, operator in others]
    started, unordered = (sum(distance(kind, network) for network in replaced) for kind in supernets)
    assert started < 0.5 * unordered
    attentive = replace(space.stock, attention=1)
    assert distance("started", attentive) < 0.1 * distance("unordered", attentive)
