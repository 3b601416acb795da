"""The supernet and the stand-alone networks derived from it compute the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from ultralytics.nn.modules import C2PSA, Detect
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.errors import InputError
from yolov8_nas.space import CLASS_BRANCHES, Architecture, Head, SearchSpace, SpaceError, stock_architecture
from yolov8_nas.space.topology import model_rows
from yolov8_nas.supernet.batchnorm import recalibrate
from yolov8_nas.supernet.derive import build, derive, save_checkpoint, unroll
from yolov8_nas.supernet.elastic import ElasticBottleneck, ElasticConv, ElasticDetect, ElasticPSA
from yolov8_nas.supernet.supernet import Supernet

TINY = SearchSpace.load("tiny")


def randomise(model: nn.Module) -> nn.Module:
    """Give every tensor of a network a value of its own, so that no mistake in a slice can hide; in float64."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.double().state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.3, generator=generator)
    return model


def raw(model: nn.Module, x: Tensor, *, training: bool) -> dict[str, Tensor]:
    """Raw head outputs, leaving the running statistics alone."""
    model.train(training)
    statistics = {name: tensor.clone() for name, tensor in model.named_buffers()}
    with torch.no_grad():
        outputs = model(x)
    for name, tensor in model.named_buffers():
        if name in statistics and tensor.shape == statistics[name].shape:
            tensor.copy_(statistics[name])
    return outputs[1] if isinstance(outputs, tuple) else outputs


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for part in ("boxes", "scores"):
        assert a[part].shape == b[part].shape
        assert (a[part] - b[part]).abs().max() <= 1e-9 * b[part].abs().max()


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return randomise(Supernet(TINY, 3, ["scratch", "dent", "hole"]))


def genes(space: SearchSpace) -> st.SearchStrategy[Architecture]:
    return st.tuples(*(st.integers(0, len(d.options) - 1) for d in space.dimensions)).map(space.decode)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(architecture=genes(TINY), training=st.booleans())
def test_derived_network_computes_what_the_active_supernet_computes(supernet, architecture, training):
    x = torch.rand(2, 3, 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    supernet.activate(architecture)
    assert_same(raw(derive(supernet, architecture), x, training=training), raw(supernet, x, training=training))


@pytest.mark.parametrize("name", ["yolov8n", "yolov8s"])
def test_another_space(name):
    space = SearchSpace.load(name)
    net = randomise(Supernet(space, 3))
    x = torch.rand(1, 3, 64, 32, dtype=torch.float64)
    for architecture in (space.largest(), space.sample(np.random.default_rng(0))):
        net.activate(architecture)
        assert_same(raw(derive(net, architecture), x, training=False), raw(net, x, training=False))


WIDTHS = (128, 192, 256, 288, 320, 480)
"""Of attention: one head of 64 and of 96 channels, two of 64, 72 and 80, three of 80."""


@pytest.fixture(scope="module")
def attention() -> ElasticPSA:
    torch.manual_seed(0)
    return randomise(ElasticPSA(WIDTHS, 2))


@settings(max_examples=20, deadline=None)
@given(width=st.sampled_from(WIDTHS), depth=st.integers(1, 2), training=st.booleans())
def test_attention_is_cut_by_heads(attention, width, depth, training):
    stock = C2PSA(width, width, depth).double()
    for norm in (module for module in stock.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 1e-3  # as Ultralytics sets it in every network
    stock.load_state_dict(stock.state_dict() | attention.state(width, depth))
    x = torch.rand(2, width, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = attention.train(training)(x, depth), stock.train(training)(x)
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    channels_last = x.to(memory_format=torch.channels_last)  # as a supernet trains
    with torch.no_grad():
        again = attention.to(memory_format=torch.channels_last)(channels_last, depth)
    assert (again - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("classes", CLASS_BRANCHES)
@pytest.mark.parametrize(("p3", "reg_max"), [(64, 16), (288, 8), (320, 12)])
def test_head_widens_with_p3_and_bins_as_the_stock_head_does(p3, reg_max, classes):
    channels, head = (p3, 16, 32), Head(classes, reg_max)
    elastic = randomise(ElasticDetect((320, 32, 32), 120, [Head(), head])).eval()
    kind = type("Legacy", (Detect,), {"legacy": classes == "conv3"})
    stock = kind(120, reg_max=reg_max, ch=channels).double().train()
    for norm in (module for module in stock.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval().eps = 1e-3  # as Ultralytics sets it in every network
    stock.load_state_dict(stock.state_dict() | elastic.state(channels, head))
    feats = [torch.rand(1, c, size, size, dtype=torch.float64) for c, size in zip(channels, (4, 2, 1), strict=True)]
    assert_same(elastic(feats, head), stock(feats))


def test_every_slice_matters(supernet):
    """The comparison above can fail: with one weight of one member moved, the outputs differ."""
    architecture = TINY.smallest()
    x = torch.rand(1, 3, 64, 32, dtype=torch.float64)
    supernet.activate(architecture)
    network = derive(supernet, architecture)
    names = [name for name, _ in model_rows(architecture)]
    weight = network.model[names.index("topdown_p4.split0")].conv.weight
    with torch.no_grad():
        weight[:, -1] = weight[:, -2]
    with pytest.raises(AssertionError):
        assert_same(raw(network, x, training=False), raw(supernet, x, training=False))


def test_members_are_cut_one_by_one():
    conv = ElasticConv((4, 2, 3), 5, kernel=5)
    with torch.no_grad():
        conv.weight.copy_(torch.arange(conv.weight.numel(), dtype=torch.float32).view_as(conv.weight))
    assert torch.equal(conv.cut((2, 2, 1), 3, 3), conv.weight[:3, [0, 1, 4, 5, 6], 1:4, 1:4])
    assert torch.equal(conv.cut((2, 1), 5, 5), conv.weight[:, [0, 1, 4]])  # the last member is absent
    whole = conv.cut((4, 2, 1), 5, 5)
    assert torch.equal(whole, conv.weight[:, :7])
    assert whole.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()  # one span needs no copy


def test_small_kernel_is_the_centre_of_the_large_one():
    layer = ElasticBottleneck(4, ["conv3", "conv5"], shortcut=False).eval()
    with torch.no_grad():
        for conv in layer.conv:
            ring = torch.ones(5, 5, dtype=torch.bool)
            ring[1:4, 1:4] = False
            conv.weight[:, :, ring] = 0
    x = torch.rand(1, 4, 9, 9)
    torch.testing.assert_close(layer(x, "conv3"), layer(x, "conv5"))


def test_only_weights_in_use_get_gradients(supernet):
    net = Supernet(TINY, 3)
    net.activate(TINY.smallest())
    outputs = net(torch.rand(2, 3, 64, 64))
    (outputs["boxes"].sum() + outputs["scores"].sum()).backward()
    layer = net.get_submodule("backbone_p4.layers.0")
    assert layer.conv[0].weight.grad is None
    assert net.get_submodule("backbone_p4.layers.1").dwsep[0].weight.grad is None
    used = net.get_submodule("backbone_p4.merge").weight.grad.abs().sum((0, 2, 3)) > 0
    hidden, largest = TINY.smallest().block("backbone_p4").hidden, TINY.largest().block("backbone_p4").hidden
    assert used.tolist() == [i % largest < hidden and i // largest < 3 for i in range(4 * largest)]


def test_refuses_an_architecture_of_another_space(supernet):
    with pytest.raises(SpaceError, match="stem"):
        supernet.activate(stock_architecture("m"))
    with pytest.raises(InputError, match="2 class names"):
        Supernet(TINY, 3, ["a", "b"])


def test_save_and_load(tmp_path):
    net = randomise(Supernet(TINY, 2, ["a", "b"])).float()
    net.save(tmp_path, {"imgsz": 64})
    loaded = Supernet.load(tmp_path)
    assert loaded.names == ("a", "b") and loaded.space == TINY and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
    (tmp_path / "supernet.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not a supernet"):
        Supernet.load(tmp_path)


def test_recalibration_is_the_average_over_batches(supernet):
    network = derive(supernet, TINY.smallest()).float().eval()
    before = network.model[0].bn.momentum
    batches = [torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64) * 0.2]
    recalibrate(network, batches)
    stem = network.model[0]
    with torch.no_grad():
        maps = [stem.conv(x) for x in batches]
    torch.testing.assert_close(stem.bn.running_mean, sum(m.mean((0, 2, 3)) for m in maps) / 2)
    torch.testing.assert_close(stem.bn.running_var, sum(m.var((0, 2, 3)) for m in maps) / 2)
    assert stem.bn.momentum == before and not network.training
    with pytest.raises(InputError, match="no images"):
        recalibrate(network, [])


@pytest.mark.parametrize("name", ["tiny", "yolov8n"])
def test_recalibrating_the_active_supernet_is_recalibrating_the_derived_network(name):
    torch.manual_seed(0)
    space = SearchSpace.load(name)
    net = Supernet(space, 3)
    architecture = replace(space.sample(np.random.default_rng(3)), attention=space.largest().attention)
    net.activate(architecture)
    network = derive(net, architecture)
    batches = [torch.rand(4, 3, 64, 64) for _ in range(2)]
    recalibrate(net, batches)
    recalibrate(network, batches)
    torch.testing.assert_close(
        raw(derive(net, architecture), batches[0], training=False), raw(network, batches[0], training=False)
    )


@pytest.mark.parametrize("scale", ["n", "s"])
def test_unrolled_stock_network_computes_the_same(scale):
    stock = randomise(DetectionModel(f"yolov8{scale}.yaml", nc=4, verbose=False))
    unrolled = unroll(stock)
    x = torch.rand(1, 3, 64, 32, dtype=torch.float64)
    assert_same(raw(unrolled, x, training=False), raw(stock, x, training=False))
    expected = build(stock_architecture(scale), 4).state_dict()
    assert {name: t.shape for name, t in unrolled.state_dict().items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize("head", [Head(), Head("dwsep3", 8), Head("dwsep3", 16), Head("conv3", 12)])
def test_checkpoint_needs_ultralytics_only(tmp_path, supernet, head):
    architecture = replace(TINY.sample(np.random.default_rng(7)), head=head)
    network = derive(supernet, architecture).float().eval()
    save_checkpoint(network, tmp_path / "best.pt", names=["scratch", "dent", "hole"], imgsz=64)
    x = torch.rand(1, 3, 64, 64)
    outputs = raw(network, x, training=False)
    torch.save([outputs["boxes"], outputs["scores"]], tmp_path / "outputs.pt")
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys
sys.modules["yolov8_nas"] = None  # importing it, or anything in it, fails
import torch
from ultralytics import YOLO
yolo = YOLO("best.pt")
assert yolo.names == {0: "scratch", 1: "dent", 2: "hole"}, yolo.names
assert yolo.overrides["imgsz"] == 64
x, wanted = torch.load("x.pt"), torch.load("outputs.pt")
torch.testing.assert_close([yolo.model(x)[1][name] for name in ("boxes", "scores")], wanted)
rebuilt = type(yolo.model)(yolo.model.yaml, nc=3, verbose=False)  # what YOLO.train() does first
rebuilt.load(yolo.model, verbose=False)
torch.testing.assert_close([rebuilt.eval()(x)[1][name] for name in ("boxes", "scores")], wanted)
assert not [name for name in sys.modules if name.startswith("yolov8_nas.")]
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
