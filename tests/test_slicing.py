"""A stand-alone network begins where a stock network of another shape ends."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stock_weights import assert_close, image, raw, stock_network
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint.stock import StockCheckpoint
from yolov8_nas.space import BLOCKS, CONVS, Architecture, Head, SearchSpace, stock_architecture
from yolov8_nas.space.topology import model_rows
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.channels import axis_sizes, wiring
from yolov8_nas.supernet.derive import architecture_of, build, unroll
from yolov8_nas.supernet.slicing import fitted, sliced

N = stock_architecture("n")
NAMES = ["cat", "dog", "traffic light", "person"]


def named(scale: str, classes: int = 4) -> DetectionModel:
    network = stock_network(scale, classes)
    network.names = dict(enumerate(NAMES)) if classes == 4 else {i: f"class {i}" for i in range(classes)}
    return network


@pytest.fixture(scope="module")
def source() -> DetectionModel:
    return named("n")


def rescaled(scale: str, factor: float) -> Architecture:
    """Stock of a size, every width times a factor, in multiples of 8."""

    def width(channels: int) -> int:
        return max(8, 8 * round(channels * factor / 8))

    stock = stock_architecture(scale)
    return replace(
        stock,
        convs=tuple(map(width, stock.convs)),
        blocks=tuple(replace(block, width=width(block.width)) for block in stock.blocks),
        sppf_width=width(stock.sppf_width),
    )


def with_block(architecture: Architecture, name: str, **changes: object) -> Architecture:
    blocks = [
        replace(block, **changes) if name == known else block
        for known, block in zip(BLOCKS, architecture.blocks, strict=True)
    ]
    return replace(architecture, blocks=tuple(blocks))


def images(seed: int, count: int = 4, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), size=size, mode="bicubic").clamp(0, 1)]


# What stays equal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["n", "s", *(pytest.param(s, marks=pytest.mark.slow) for s in "ml")])
@pytest.mark.parametrize("calibrated", [False, True])
def test_of_the_source_s_own_shape_it_is_the_source(scale: str, calibrated: bool) -> None:
    source = named(scale)
    before = copy.deepcopy(source.state_dict())
    calibration = [batch.double() for batch in images(0, count=2)] if calibrated else []
    network, report = sliced(source, stock_architecture(scale), NAMES, calibration)
    assert_close(raw(network, image()), raw(source, image()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())
    assert report.taken == report.total and report.fitted == 0 and report.classes == tuple(NAMES)
    assert f"from stock YOLOv8{scale} of 4 classes; the outputs of 4 classes kept (cat, dog" in str(report)


def test_what_is_wider_deeper_and_of_larger_kernels_gives_the_same(source: DetectionModel) -> None:
    larger = rescaled("n", 1.5)
    for block, changes in {
        "backbone_p2": {"depth": 3, "expansion": 0.75},
        "backbone_p4": {"operator": "conv5"},
        "topdown_p3": {"depth": 2, "operator": "conv5"},
        "bottomup_p5": {"expansion": 1.0},
    }.items():
        larger = with_block(larger, block, **changes)
    for calibration in ([], [batch.double() for batch in images(0)]):
        network, report = sliced(source, larger, NAMES, calibration)
        assert_close(raw(network, image()), raw(source, image()))
        assert report.fitted == 0 and report.widened > 50
        assert report.added == ("backbone_p2.layers.1", "backbone_p2.layers.2", "topdown_p3.layers.1")
        assert report.taken == sum(
            tensor.numel()
            for name, tensor in source.state_dict().items()
            if "dfl" not in name and "tracked" not in name
        )


def norm_of(network: DetectionModel, axis_end: str, norm: str) -> tuple[nn.Module, int]:
    """The BatchNorm behind a convolution of an unrolled row in the stock network, and where its channels begin."""
    convs = [module for module in network.model if type(module).__name__ == "Conv"]
    c2fs = [module for module in network.model if type(module).__name__ == "C2f"]
    named = dict(zip(CONVS, convs, strict=True)) | dict(zip(BLOCKS, c2fs, strict=True))
    named |= {"sppf": network.model[9], "detect": network.model[-1]}
    name, _, part = axis_end.partition(".")
    module = named[name]
    path = norm.removesuffix(".")
    match part.split("."):
        case ["split0"]:
            return module.cv1.bn, 0
        case ["split1"]:
            return module.cv1.bn, module.c
        case ["merge"]:
            return module.cv2.bn, 0
        case ["layers", i]:
            return module.m[int(i)].get_submodule(path), 0
    return module.get_submodule(path), 0


def silence(network: DetectionModel, architecture: Architecture) -> None:
    """Let as many channels of every axis as `architecture` lacks be always zero, drawn by chance."""
    own = architecture_of(network)
    states = [module.state_dict() for module in unroll(network).model]
    wanted = axis_sizes(
        list(wiring(architecture)), [module.state_dict() for module in build(architecture, len(NAMES)).model]
    )
    names = [name for name, _ in model_rows(own)]
    wires = list(wiring(own))
    generator = torch.Generator().manual_seed(0)
    silent = {
        axis: torch.randperm(size, generator=generator)[wanted[axis] :]
        for axis, size in axis_sizes(wires, states).items()
        if axis in wanted
    }
    for wire in wires:
        norm, start = norm_of(network, names[wire.row], wire.norm) if wire.norm else (None, 0)
        if norm is not None:
            with torch.no_grad():
                norm.weight[start + silent[wire.output]] = 0
                norm.bias[start + silent[wire.output]] = 0


@pytest.mark.parametrize("factor", [0.5, 0.75])
def test_channels_that_are_always_zero_are_the_ones_that_go(factor: float, source: DetectionModel) -> None:
    """Members of concatenations, shortcuts and SPPF's four parts lose channels of their own, and nothing else moves."""
    source, narrower = copy.deepcopy(source), rescaled("n", factor)
    silence(source, narrower)
    for calibration in ([], [batch.double() for batch in images(0)]):
        network, report = sliced(source, narrower, NAMES, calibration)
        assert_close(raw(network, image()), raw(source, image()))
        assert report.taken == report.total and report.fitted == 0 and not report.dropped


def test_members_of_uneven_widths(source: DetectionModel) -> None:
    source, uneven = copy.deepcopy(source), N
    for name, width, expansion in (("backbone_p4", 64, 0.25), ("topdown_p4", 80, 0.4), ("topdown_p3", 48, 0.5)):
        uneven = with_block(uneven, name, width=width, expansion=expansion)
    silence(source, uneven)
    network, _ = sliced(source, uneven, NAMES)
    assert_close(raw(network, image()), raw(source, image()))


@pytest.mark.parametrize(("idle", "depth"), [((1,), 1), ((0,), 1), ((0, 1), 0)])
def test_bottlenecks_that_add_nothing_are_the_ones_that_go(
    idle: tuple[int, ...], depth: int, source: DetectionModel
) -> None:
    source = copy.deepcopy(source)
    for i in idle:
        norm = source.model[4].m[i].cv2.bn  # backbone_p3
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
    shallower = with_block(N, "backbone_p3", depth=depth)
    for calibration in ([], [batch.double() for batch in images(0)]):
        network, report = sliced(source, shallower, NAMES, calibration)
        assert_close(raw(network, image()), raw(source, image()))
        assert report.dropped == tuple(f"backbone_p3.layers.{i}" for i in idle) and report.fitted == 0
        assert "without backbone_p3.layers" in str(report)


def test_of_a_neck_block_the_first_bottlenecks_stay() -> None:
    source = named("m")
    shallower = with_block(stock_architecture("m"), "topdown_p4", depth=1)
    merge = source.model[12].cv2.conv.weight  # of topdown_p4
    with torch.no_grad():
        merge[:, -source.model[12].c :] = 0  # nothing reads the second bottleneck
    network, report = sliced(source, shallower, NAMES)
    assert_close(raw(network, image()), raw(source, image()))
    assert report.dropped == ("topdown_p4.layers.1",)


# Classes --------------------------------------------------------------------------------------------------------------


def test_classes_of_equal_name_keep_their_outputs(source: DetectionModel) -> None:
    names = ["bird", "Traffic_Light", "c-at", "CAT"]
    network, report = sliced(source, N, names)
    found, wanted = raw(network, image()), raw(source, image())
    assert_close(found[:, :64], wanted[:, :64])  # boxes
    assert_close(found[:, 64 + 1 : 64 + 3], wanted[:, [64 + 2, 64 + 0]])
    assert network.names == dict(enumerate(names)) and report.classes == ("Traffic_Light", "c-at")
    for stride, branch in zip((8, 16, 32), network.model[-1].cv3, strict=True):
        new = branch[-1].bias.detach()[[0, 3]]
        assert new.tolist() == pytest.approx([math.log(5 / 4 / (640 / stride) ** 2)] * 2)


@pytest.mark.parametrize("classes", [1, 80, 100])
def test_the_class_branch_is_as_wide_as_the_classes_ask(classes: int, source: DetectionModel) -> None:
    names = ["person", *(f"class {i}" for i in range(1, classes))]
    network, _ = sliced(source, N, names)
    assert network.model[-1].cv3[0][0].conv.out_channels == max(64, min(classes, 100))
    found, wanted = raw(network, image()), raw(source, image())
    assert_close(found[:, :64], wanted[:, :64])
    assert_close(found[:, 64], wanted[:, 64 + 3])  # nothing is lost where the branch is wider


def test_a_narrower_class_branch_keeps_the_channels_that_matter() -> None:
    source = named("n", 80)
    source.names[5] = "person"
    silent = torch.randperm(80, generator=torch.Generator().manual_seed(1))[64:]
    with torch.no_grad():
        for branch in source.model[-1].cv3:
            for conv in branch[:2]:
                conv.bn.weight[silent] = conv.bn.bias[silent] = 0
    network, report = sliced(source, N, NAMES)
    found, wanted = raw(network, image()), raw(source, image())
    assert_close(found[:, 64 + 3], wanted[:, 64 + 5])
    assert report.classes == ("person",)


def test_a_class_branch_that_is_not_yolov8_s_is_not_taken(source: DetectionModel) -> None:
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("model.22.cv3.")}
    checkpoint = StockCheckpoint(
        path=Path("some.pt"),
        sha256="0" * 64,
        scale="n",
        names=tuple(NAMES),
        state={name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
        fused=False,
        legacy=False,
        left_out=("model.22.cv3.",),
        writer="8.3.0",
        imgsz=None,
    )
    drawn = []
    for seed, calibration in enumerate(([], images(0))):
        torch.manual_seed(seed)
        network, report = sliced(checkpoint, N, NAMES, calibration)
        found, wanted = raw(network, image().float()), raw(source, image())
        torch.testing.assert_close(found[:, :64].double(), wanted[:, :64], rtol=1e-3, atol=1e-3)
        assert report.classes == () and report.fitted == 0 and "its class branch is not YOLOv8's" in str(report)
        branch = network.model[-1].cv3[0]
        assert branch[2].bias.tolist() == pytest.approx([math.log(5 / 4 / 80**2)] * 4)
        drawn.append(branch[0].conv.weight)
    assert not torch.equal(*drawn)


# The head ------------------------------------------------------------------------------------------------------------


def test_fewer_bins_are_the_first_ones_of_each_side(source: DetectionModel) -> None:
    """What the source has beyond them goes to the last one by the fit, which changes no other one."""
    source, fewer = copy.deepcopy(source), replace(N, head=Head(reg_max=8))
    silence(source, fewer)  # its hidden width is smaller, too
    wanted = raw(source, image())
    sides = wanted[:, :64].unflatten(1, (4, 16))
    for calibration, same in (([], 8), ([batch.double() for batch in images(0)], 7)):
        network, report = sliced(source, fewer, NAMES, calibration)
        found = raw(network, image())
        assert_close(found[:, :32].unflatten(1, (4, 8))[:, :, :same], sides[:, :, :same])
        assert_close(found[:, 32:], wanted[:, 64:])  # classes
        assert network.model[-1].cv2[0][0].conv.out_channels == 32 and report.fitted == 3 * bool(calibration)


def test_the_last_bin_gets_what_the_source_has_beyond(source: DetectionModel) -> None:
    source = copy.deepcopy(source).float()
    for branch in source.model[-1].cv2:
        with torch.no_grad():
            branch[2].weight[:] *= 0.1
            branch[2].bias[:] = torch.linspace(-3, 3, 16).repeat(4)  # sides are long
    (seen,), (unseen,) = images(0, 32), images(1, 8)
    wanted = raw(source, unseen)[:, :64].unflatten(1, (4, 16)).softmax(2)
    beyond = wanted[:, :, 7:].sum(2)
    error = {}
    for fit in (False, True):
        network, _ = sliced(source, replace(N, head=Head(reg_max=8)), NAMES, [seen], fit=fit)
        found = raw(network, unseen)[:, :32].unflatten(1, (4, 8)).softmax(2)
        error[fit] = float((found[:, :, 7] - beyond).abs().mean())
    assert error[True] < 0.1 * error[False]


def score_error(network: DetectionModel, source: DetectionModel, x: Tensor) -> float:
    """Of class outputs: mean square error as a share of their variance."""
    found, wanted = (raw(model, x)[:, 64:] for model in (network, source))
    return float((found - wanted).square().mean() / wanted.var())


def test_a_depthwise_class_branch_begins_near_the_dense_one() -> None:
    source = named("n").float()
    (seen,), (unseen,) = images(0, 32), images(1, 8)
    light = replace(N, head=Head("dwsep3"))
    torch.manual_seed(0)
    state = build(light, len(NAMES), NAMES).state_dict()
    error = {}
    for how in ("fitted", "approximated", "random"):
        network, report = sliced(source, light, NAMES, [seen], fit=how == "fitted")
        if how == "random":
            row = len(network.model) - 1
            branch = {name: tensor for name, tensor in state.items() if name.startswith(f"model.{row}.cv3.")}
            network.load_state_dict({**network.state_dict(), **branch})
            recalibrate(network, [seen])
        error[how] = score_error(network, source, unseen)
    assert error["fitted"] < 0.5 * error["approximated"] < 0.5 * error["random"]
    assert report.light and "depthwise class branch approximates the dense one" in str(report)
    head, switch = network.model[-1].cv3.state_dict(), network.model[-2].state_dict()
    hidden = {name: tensor for name, tensor in head.items() if ".2." not in name}
    new = sum(t.numel() for part in (hidden, switch) for n, t in part.items() if "tracked" not in n)
    assert report.taken == report.total - new


# Any architecture, and the fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_any_network_can_be_had(seed: int, source: DetectionModel) -> None:
    space = SearchSpace.load("tiny")
    rng = np.random.default_rng(seed)
    drawn = space.sample(rng)
    drawn = replace(
        drawn,
        attention=seed % 2,
        head=Head(("dwsep3", "conv3")[seed % 2], (8, 12, 16)[seed]),
        blocks=tuple(
            replace(b, depth=int(rng.integers(3)), expansion=float(rng.choice([0.25, 1]))) for b in drawn.blocks
        ),
    )
    calibration = images(seed)
    network, report = sliced(copy.deepcopy(source).float(), drawn, NAMES, calibration)
    assert network.yaml == build(drawn, len(NAMES), NAMES).yaml
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    assert raw(network, image().float()).isfinite().all()
    assert report.fitted > 20 and 0 < report.taken < report.total
    assert report.approximated == sum(b.depth for b in drawn.blocks if b.operator not in ("conv3", "conv5"))


def feature_error(network: DetectionModel, source: DetectionModel, x: Tensor) -> float:
    """Of box outputs: mean square error as a share of their variance."""
    found, wanted = (raw(model, x)[:, :64] for model in (network, source))
    return float((found - wanted).square().mean() / wanted.var())


def test_the_fit_comes_closer_on_images_that_it_has_not_seen() -> None:
    source = named("n").float()
    (seen,), (unseen,) = images(0, 32), images(1, 8)
    error = {}
    for fit in (False, True):
        network, _ = sliced(source, rescaled("n", 0.75), NAMES, [seen], fit=fit)
        error[fit] = feature_error(network, source, unseen)
    assert error[True] < 0.5 * error[False]


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_least_squares_find_the_weights(groups: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, stride, dilation, dilation, groups=groups).double()
    x = torch.randn(8, 6, 16, 16, dtype=torch.float64) * torch.logspace(-2, 2, 6, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        wanted = conv(x)
        away = conv.weight + 0.1 * torch.randn_like(conv.weight)
        weight, offset = fitted(x, wanted, conv, away)
        before = F.conv2d(x, away, None, stride, dilation, dilation, groups)
        after = F.conv2d(x, weight, offset, stride, dilation, dilation, groups)
    before = before - (before - wanted).mean((0, 2, 3), keepdim=True)
    assert (after - wanted).norm() < 0.05 * (before - wanted).norm()
    kept, _ = fitted(torch.zeros_like(x), wanted, conv, away)  # nothing to learn from
    assert torch.equal(kept, away)
