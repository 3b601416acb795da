"""Stock YOLOv8 checkpoints as seven versions of Ultralytics wrote them, and files that are none."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import lzma
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from ultralytics.nn import tasks
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from yolov8_nas.checkpoint import archive, stock
from yolov8_nas.errors import InputError
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.batchnorm import recalibrate, restore_statistics
from yolov8_nas.supernet.warmstart import check

FOLDER = Path(__file__).parent / "checkpoints"
WRITTEN: dict[str, dict[str, Any]] = json.loads((FOLDER / "checkpoints.json").read_text())
NAMES = ("platelets", "RBC", "WBC")
SIDE = 64


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("unpacked")

    @functools.cache
    def unpack(name: str) -> Path:
        path = folder / name
        path.write_bytes(lzma.decompress((FOLDER / f"{name}.xz").read_bytes()))
        return path

    return unpack


def test_versions_from_the_first_to_the_newest_are_there() -> None:
    versions = {name.split("-")[0] for name in WRITTEN}
    assert {"8.0.0", "8.4.190"} < versions and len(versions) >= 5
    assert {name.split("-")[1] for name in WRITTEN} == {"last.pt", "stripped.pt", "fp32.pt", "fused.pt"}


@pytest.mark.parametrize("name", WRITTEN)
def test_is_read_and_answers_as_where_it_was_written(name: str, unpacked: Callable[[str], Path]) -> None:
    version, kind = name.removesuffix(".pt").split("-")
    found = stock.read(unpacked(name))
    assert found.sha256 == WRITTEN[name]["sha256"] == hashlib.sha256(found.path.read_bytes()).hexdigest()
    assert (found.scale, found.names, found.writer) == ("n", NAMES, version)
    assert found.fused == (kind == "fused")
    assert found.legacy == (version != "8.3.0")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in found.state.values())
    network = found.network().eval()
    assert network.names == dict(enumerate(NAMES))
    if not found.legacy:
        assert found.left_out == (stock.CLASS_BRANCH,) and "class branch" in str(found)
        other = stock.read(unpacked("8.2.0-fp32.pt")).state
        assert set(found.state) == {name for name in other if not name.startswith(stock.CLASS_BRANCH)}
        for tensor in found.state:
            assert_close(found.state[tensor], other[tensor], rtol=1e-3, atol=1e-4)
        return
    assert found.left_out == ()
    image = ((torch.arange(3 * SIDE * SIDE) * 5 % 17) / 16).view(1, 3, SIDE, SIDE)
    with torch.no_grad():
        answer = network(image)[0][0, 4:].flatten()
    places = [int(i) for i in torch.linspace(0, len(answer) - 1, len(WRITTEN[name]["scores"]))]
    # The file has half precision, and the figures come from before it was written.
    assert_close(answer[places], torch.tensor(WRITTEN[name]["scores"]), rtol=0, atol=0.02)


def test_folding_is_undone(unpacked: Callable[[str], Path]) -> None:
    folded, plain = (stock.read(unpacked(f"8.4.190-{kind}.pt")) for kind in ("fused", "fp32"))
    assert set(folded.state) == set(plain.state)
    for name, estimated in folded.state.items():
        if name.endswith("running_var"):
            assert (estimated > 0).all() and estimated.std() > 0, "each channel has an estimate of its own"


def test_images_tell_again_what_folding_lost() -> None:
    torch.manual_seed(0)
    trained = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    images = [torch.rand(4, 3, SIDE, SIDE) for _ in range(2)]
    recalibrate(trained, images)
    trained.eval()
    folded = copy.deepcopy(trained).fuse(verbose=False)
    network = DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval()
    network.load_state_dict(stock.unfused(folded.state_dict()))
    with torch.no_grad():
        before = trained(images[0])[0]
        assert_close(network(images[0])[0], before, rtol=1e-3, atol=1e-3)
        restore_statistics(network, images)
        assert_close(network(images[0])[0], before, rtol=1e-3, atol=1e-3)
    restore_statistics(trained, images)  # those that training left are averages over other batches
    norms = [[m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (trained, network)]
    for wanted, found in zip(*norms, strict=True):
        # Factors differ by what epsilon adds to variances of another scale; the spread of the outputs does not.
        assert_close(_spread(found), _spread(wanted), rtol=1e-3, atol=1e-5)
        assert_close(found.bias, wanted.bias, rtol=1e-3, atol=1e-3)


def _spread(norm: nn.BatchNorm2d) -> torch.Tensor:
    """How far each channel's outputs lie apart: their standard deviation, with the sign of the factor."""
    assert norm.running_var is not None
    return norm.weight * (norm.running_var / (norm.running_var + norm.eps)).sqrt()


def test_any_attribute_but_the_weights_may_be_missing(
    unpacked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = functools.cache(stock._built)
    monkeypatch.setattr(stock, "_built", built)
    content = archive.read(unpacked("8.4.190-fp32.pt"), stock.CLASSES)
    wanted = stock._described(content).state
    records = list({id(record): record for _, record in stock._modules(content.value["model"])}.values())
    attributes = {key for record in records for key in record.state} - {"_modules", "_parameters", "_buffers"}
    assert {"add", "n", "recompute_scale_factor", "padding_mode", "reg_max", "_state_dict_pre_hooks"} < attributes
    for attribute in sorted(attributes):
        taken = [(record, record.state.pop(attribute)) for record in records if attribute in record.state]
        state = stock._described(content).state
        assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items()), attribute
        for record, value in taken:
            record.state[attribute] = value


# What is none ---------------------------------------------------------------------------------------------------------


def _of(name: str) -> nn.Module:
    kind = {"seg": "Segmentation", "pose": "Pose", "obb": "OBB", "cls": "Classification"}.get(name.split("-")[-1])
    model: nn.Module = getattr(tasks, f"{kind or 'Detection'}Model")(f"{name}.yaml", verbose=False)
    return model


def _saved(make: Callable[[], nn.Module]) -> Callable[[Path], object]:
    return lambda path: torch.save({"model": make(), "ema": None}, path)


def _changed(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        network = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
        change(network.model)
        torch.save({"model": network}, path)

    return make


def _x() -> nn.Module:
    """A network with the stem of YOLOv8x, and the rest small."""
    return DetectionModel({**yaml_model_load("yolov8n.yaml"), "scales": {"n": [0.33, 1.25, 64]}}, nc=2, verbose=False)


def _prune(model: Any) -> None:
    model[0].conv = nn.Conv2d(3, 13, 3, 2, 1, bias=False)


def _yolov5(path: Path) -> None:
    """As YOLOv5's own repository writes: its modules lie in `models`."""
    module = types.ModuleType("models.yolo")
    sys.modules["models"], sys.modules["models.yolo"] = types.ModuleType("models"), module
    try:
        module.DetectionModel = type("DetectionModel", (nn.Module,), {"__module__": "models.yolo"})  # type: ignore[attr-defined]
        torch.save({"model": module.DetectionModel(), "ema": None}, path)
    finally:
        del sys.modules["models"], sys.modules["models.yolo"]


def _torn(share: float) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        _saved(lambda: DetectionModel("yolov8n.yaml", nc=2, verbose=False))(path)
        os.truncate(path, int(path.stat().st_size * share))

    return make


def _flipped(path: Path) -> None:
    _saved(lambda: DetectionModel("yolov8n.yaml", nc=2, verbose=False))(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _onnx(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["output0"])], "g", [x], [x])
    path.write_bytes(onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString())


def _script(path: Path) -> None:
    torch.jit.script(nn.SiLU()).save(path)


NONE: dict[str, tuple[Callable[[Path], object], str]] = {
    "segmentation": (_saved(lambda: _of("yolov8n-seg")), "a network for segmentation"),
    "pose": (_saved(lambda: _of("yolov8n-pose")), "a network for poses"),
    "oriented boxes": (_saved(lambda: _of("yolov8n-obb")), "a network for oriented boxes"),
    "classification": (_saved(lambda: _of("yolov8n-cls")), "a network for classification"),
    "YOLOv5": (_yolov5, "YOLOv5"),
    "YOLOv5 of Ultralytics": (_saved(lambda: _of("yolov5n")), "YOLOv5"),
    "YOLOv9": (_saved(lambda: _of("yolov9t")), "YOLOv9"),
    "YOLOv10": (_saved(lambda: _of("yolov10n")), "YOLOv10"),
    "YOLO11": (_saved(lambda: _of("yolo11n")), "YOLO11"),
    "YOLO26": (_saved(lambda: _of("yolo26n")), "YOLO11 or later"),
    "four levels": (_saved(lambda: _of("yolov8n-p2")), "other layers than stock YOLOv8"),
    "x": (_saved(_x), "YOLOv8x"),
    "pruned": (_changed(_prune), r"its stem has 13 channels"),
    "pruned inside": (_changed(lambda m: setattr(m[2].m[0].cv1, "conv", nn.Conv2d(16, 9, 3))), "pruned"),
    "another activation": (_changed(lambda m: setattr(m[0], "act", nn.ReLU())), "ReLU"),
    "another stride": (_changed(lambda m: setattr(m[1].conv, "stride", (1, 1))), "stride"),
    "quantized": (lambda p: torch.save({"model": _of("yolov8n"), "modelopt": {"a": 1}}, p), "quantized"),
    "only weights": (lambda p: torch.save(_of("yolov8n").state_dict(), p), "no detection network"),
    "nothing": (lambda p: torch.save({}, p), "no detection network"),
    "torn in the middle": (_torn(0.5), "torn"),
    "torn near its end": (_torn(0.999), "torn"),
    "cut to the first bytes": (_torn(0.0001), "torn"),
    "a bit flipped": (_flipped, "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "ONNX": (_onnx, "ONNX"),
    "TorchScript": (_script, "TorchScript"),
    "text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "no archive of PyTorch"),
    "legacy": (lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), "before 1.6"),
    "a folder": (lambda p: p.mkdir(), "it is a folder"),
    "a link that leads nowhere": (lambda p: p.symlink_to("nowhere.pt"), "a link that leads nowhere"),
    "a pipe": (os.mkfifo, "it is no file"),
    "missing": (lambda p: None, "there is no such file"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_none_is_refused_with_what_it_is(name: str, tmp_path: Path) -> None:
    make, told = NONE[name]
    path = tmp_path / "given.pt"
    make(path)
    with pytest.raises(InputError, match=rf"given\.pt: .*{told}.*give a checkpoint of stock YOLOv8") as caught:
        stock.read(path)
    assert "\n" not in str(caught.value)


def test_one_that_is_narrower_than_the_spaces_stock(unpacked: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match=r"8\.1\.0-stripped\.pt: YOLOv8n.*yolov8s"):
        check(unpacked("8.1.0-stripped.pt"), SearchSpace.load("yolov8s"), len(NAMES))
