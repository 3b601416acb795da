"""Stock YOLOv8 checkpoints of any version of Ultralytics, from 8.0.0 on: recognised, and described.

A checkpoint is a network's objects as their version of Ultralytics had them. Of these only the weights, the class names
and the few settings that tell one network from another are used; what a version's modules lack is what Ultralytics
itself takes in its place. What is not stock YOLOv8 n, s, m or l for detection is refused, with what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from yolov8_nas.checkpoint import archive
from yolov8_nas.checkpoint.archive import Record, Refused
from yolov8_nas.errors import InputError
from yolov8_nas.space import SCALES, stock_architecture

REMEDY: Final = f"give a checkpoint of stock YOLOv8 {', '.join(SCALES)} for detection"

CLASS_BRANCH: Final = "model.22.cv3."
"""Of the head's two branches that which gives the classes; the last of its three layers has their outputs."""

_ONE_TO_ONE: Final = "model.22.one2one_"
_BATCHNORM: Final = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_PLACES: Final[Mapping[str, str]] = {
    "Conv": "conv",
    "DWConv": "conv",
    "Concat": "conv",
    "C2f": "block",
    "Bottleneck": "block",
    "SPPF": "block",
    "DFL": "block",
    "Detect": "head",
}

_TORCH: Final = (
    *("container.Sequential", "container.ModuleList", "conv.Conv2d", "batchnorm.BatchNorm2d", "activation.SiLU"),
    *("pooling.MaxPool2d", "upsampling.Upsample", "linear.Identity"),
)

CLASSES: Final = frozenset(
    {
        "ultralytics.nn.tasks.DetectionModel",
        *(f"ultralytics.nn.modules.{place}.{name}" for name, place in _PLACES.items()),
        *(f"ultralytics.nn.modules.{name}" for name in _PLACES),  # one file until early 2023
        *(f"torch.nn.modules.{name}" for name in _TORCH),
    }
)
"""The classes that stock YOLOv8 consists of, under each name that they have had."""

_OTHERS: Final = (
    (r"\.tasks\.SegmentationModel$|\.Segment$", "a network for segmentation"),
    (r"\.tasks\.PoseModel$|\.Pose$", "a network for poses"),
    (r"\.tasks\.OBBModel$|\.OBB$", "a network for oriented boxes"),
    (r"\.tasks\.ClassificationModel$|\.Classify$", "a network for classification"),
    (r"\.tasks\.(RTDETR\w*|World\w*|YOLOE\w*)$", "another kind of network"),
    (r"^models\.|\.C3$", "YOLOv5"),
    (r"\.(C3k2?|C2PSA)$", "YOLO11 or later, or a searched network with parts of it"),
    (r"\.(SCDown|C2fCIB|v10Detect|PSA)$", "YOLOv10"),
    (r"\.(RepNCSPELAN4|ELAN1|ADown|AConv|CBLinear|CBFuse)$", "YOLOv9"),
)
"""What a name tells of the network that it occurs in."""


@dataclass(frozen=True, eq=False)
class StockCheckpoint:
    """A stock YOLOv8 detection network, as a checkpoint has it.

    Attributes:
        path: The file.
        sha256: Of its bytes.
        scale: Its size: n, s, m or l.
        names: Class names, in the order of the outputs.
        state: Its weights by their stock names (`model.0.conv.weight`), in float32 and contiguous. Each convolution of
            a `Conv` has its BatchNorm; `left_out` is missing.
        fused: Whether the file has its BatchNorms folded into the convolutions. Those in `state` compute the same, but
            their statistics are estimates from the norms of the weights (`unfused`); `restore_statistics` in
            `supernet/batchnorm.py` measures them on images.
        legacy: Whether the class branch is YOLOv8's own of two 3x3 convolutions, not the depthwise one that Ultralytics
            8.3.0 built into every network.
        left_out: Prefixes of what is not taken over: the class branch where it is the depthwise one, and a one-to-one
            head beside the one-to-many one.
        writer: Version of Ultralytics that wrote the file, or `unknown`.
        imgsz: Side in pixels of the images that it was trained on, where the file says so.
    """

    path: Path
    sha256: str
    scale: str
    names: tuple[str, ...]
    state: Mapping[str, Tensor]
    fused: bool
    legacy: bool
    left_out: tuple[str, ...]
    writer: str
    imgsz: int | None

    @property
    def num_classes(self) -> int:
        """How many classes it tells apart."""
        return len(self.names)

    def network(self) -> DetectionModel:
        """The network, built anew by the installed Ultralytics: what is left out is as Ultralytics starts it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = _built(self.scale, self.num_classes)
        network.load_state_dict(dict(self.state), strict=False)
        network.names = dict(enumerate(self.names))
        return network

    def __str__(self) -> str:
        told = f"YOLOv8{self.scale}, {self.num_classes} classes, written by Ultralytics {self.writer}"
        if self.fused:
            told += ", its BatchNorms folded"
        if not self.legacy:
            told += ", all but its class branch, which is depthwise and not YOLOv8's"
        return told


def read(path: Path) -> StockCheckpoint:
    """Recognise and read a stock YOLOv8 checkpoint; nothing of the file's is run.

    The exponential moving average is taken where there is one.

    Raises:
        InputError: The file can't be read, or is not one of stock YOLOv8 n, s, m or l for detection.
    """
    try:
        content = archive.read(path, CLASSES)
        return _described(content)
    except Refused as error:
        why = str(error)
        for pattern, kind in _OTHERS:
            if error.name and re.search(pattern, error.name):
                why = f"{kind}: {why}, which stock YOLOv8 does not"
                break
        raise InputError(f"{path}: not a checkpoint that can be read as stock YOLOv8 ({why}); {REMEDY}") from None


def _described(content: archive.Content) -> StockCheckpoint:
    checkpoint = content.value
    found = (checkpoint.get("ema") or checkpoint.get("model")) if isinstance(checkpoint, dict) else None
    if not isinstance(found, Record) or not found.name.endswith(".DetectionModel"):
        raise Refused("no detection network in it")
    if checkpoint.get("modelopt"):
        raise Refused("a quantized network; take the one before its quantization")
    modules = dict(_modules(found))
    state = {name: tensor for name, tensor in _tensors(modules) if not name.startswith(_ONE_TO_ONE)}
    left_out = (_ONE_TO_ONE,) if any(name.startswith(_ONE_TO_ONE) for name in modules) else ()
    modules = {name: module for name, module in modules.items() if not name.startswith(_ONE_TO_ONE)}
    legacy = _kind(modules.get(f"{CLASS_BRANCH}0.0")) != "Sequential"
    scale, classes = _size(state)
    fused = "model.0.bn" not in modules
    if fused:
        _require_biases(state)
    if not legacy:
        left_out = (CLASS_BRANCH, *left_out)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(CLASS_BRANCH)}
        modules = {name: module for name, module in modules.items() if not name.startswith(CLASS_BRANCH)}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise Refused("its weights are not all finite numbers")
    wanted = _built(scale, classes)
    if fused:
        state = unfused(state)
    _compare(modules, state, wanted, scale, fused=fused, skipped=left_out)
    arguments = checkpoint.get("train_args")
    if isinstance(arguments, Record):
        arguments = arguments.state
    imgsz = arguments.get("imgsz") if isinstance(arguments, dict) else None
    version = checkpoint.get("version")
    return StockCheckpoint(
        path=content.path,
        sha256=content.sha256,
        scale=scale,
        names=_names(found.state.get("names"), classes),
        state={name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()},
        fused=fused,
        legacy=legacy,
        left_out=left_out,
        writer=version if isinstance(version, str) and re.fullmatch(r"[0-9A-Za-z.+-]{1,32}", version) else "unknown",
        imgsz=imgsz if type(imgsz) is int and 32 <= imgsz <= 8192 else None,
    )


def _built(scale: str, classes: int) -> DetectionModel:
    """The stock network of a size, by the installed Ultralytics."""
    return DetectionModel({**yaml_model_load(f"yolov8{scale}.yaml"), "nc": classes}, verbose=False)


def _size(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Size and number of classes that weights have."""
    try:
        stem = state["model.0.conv.weight"].shape[0]
        classes = state[f"{CLASS_BRANCH}0.2.weight"].shape[0]
    except (KeyError, IndexError):
        raise Refused("a detection network of other layers than stock YOLOv8") from None
    # `DetectionModel` builds and runs what it is asked for: a number of classes that no head has is none.
    if not 1 <= classes <= 100_000:
        raise Refused(f"{classes} classes")
    scales = {stock_architecture(scale).convs[0]: scale for scale in SCALES}
    if stem not in scales:
        raise Refused(f"YOLOv8x: its stem has {stem} channels" if stem == 80 else f"its stem has {stem} channels")
    return scales[stem], classes


def _compare(
    modules: Mapping[str, Record],
    state: Mapping[str, Tensor],
    wanted: DetectionModel,
    scale: str,
    *,
    fused: bool,
    skipped: Sequence[str],
) -> None:
    """Refuse what differs from the stock network of its size."""

    def held(name: str) -> bool:
        return not any(name.startswith(prefix.removesuffix(".")) for prefix in skipped)

    expected = {name: tensor for name, tensor in wanted.state_dict().items() if held(name)}
    for name in {**expected, **state}:
        if name not in expected or name not in state or expected[name].shape != state[name].shape:
            what = f"is {list(state[name].shape)}" if name in state else "is missing"
            there = f"is {list(expected[name].shape)}" if name in expected else "does not exist"
            raise Refused(f"{name} {what}; in YOLOv8{scale} it {there}: pruned, or another network")
    for name, module in wanted.named_modules():
        if not held(name) or (fused and isinstance(module, nn.BatchNorm2d)):
            continue
        found = modules.get(name)
        kind = type(module).__name__
        if _kind(found) != kind:
            raise Refused(f"{name} is {_kind(found)}, in YOLOv8{scale} {kind}")
        assert found is not None
        for setting in _SETTINGS.get(kind, ()):
            mine = getattr(module, setting)
            if found.state.get(setting, mine) != mine:
                raise Refused(f"{name} has {setting} {found.state[setting]!r:.40}, in YOLOv8{scale} {mine!r}")


_SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "Conv2d": ("kernel_size", "stride", "padding", "dilation", "groups", "transposed", "padding_mode"),
    "BatchNorm2d": ("eps", "affine", "track_running_stats"),
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "Upsample": ("size", "scale_factor", "mode"),
    "SPPF": ("n", "add"),
    "Bottleneck": ("add",),
    "Concat": ("d", "f"),
    "Detect": ("reg_max", "f"),
}
"""What modules compute by beyond their weights; an attribute that a file lacks is the stock one."""


def _kind(record: Record | None) -> str:
    return "missing" if record is None else record.name.rpartition(".")[2]


def _modules(network: Record) -> Iterator[tuple[str, Record]]:
    """The modules of a network by their paths."""
    waiting: list[tuple[str, Record]] = [("", network)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            return
        path, record = waiting.pop()
        yield path, record
        inner = record.state.get("_modules")
        if not isinstance(inner, dict):
            raise Refused(f"{path or 'the network'} has no modules")
        for name, module in inner.items():
            if isinstance(module, Record) and type(name) is str and len(name) < 64 and path.count(".") < 16:
                waiting.append((f"{path}.{name}" if path else name, module))
            elif module is not None:
                raise Refused(f"a module in {path or 'the network'} is none")
    raise Refused(f"its network has more than {_MOST_MODULES} modules")


_MOST_MODULES: Final = 10_000


def _tensors(modules: Mapping[str, Record]) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` gives of a network."""
    for path, record in modules.items():
        for kind in ("_parameters", "_buffers"):
            tensors = record.state.get(kind)
            if not isinstance(tensors, dict):
                raise Refused(f"{path or 'the network'} has no weights")
            for name, tensor in tensors.items():
                if tensor is not None:
                    if not isinstance(tensor, Tensor) or type(name) is not str:
                        raise Refused(f"a weight in {path or 'the network'} is none")
                    yield f"{path}.{name}" if path else name, tensor.detach()


def _names(found: Any, classes: int) -> tuple[str, ...]:
    """Class names; a number where the file has none."""
    listed = dict(enumerate(found)) if isinstance(found, list | tuple) else found if isinstance(found, dict) else {}
    return tuple(str(listed[i])[:256] if isinstance(listed.get(i), str | int) else str(i) for i in range(classes))


# Folded BatchNorms ----------------------------------------------------------------------------------------------------


def _require_biases(state: Mapping[str, Tensor]) -> None:
    if "model.0.conv.bias" not in state:
        raise Refused("model.0.bn.weight is missing, and model.0.conv has no bias that it is folded into")


def unfused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with folded BatchNorms as weights with BatchNorms that compute the same.

    Folding loses what a BatchNorm knows of its channels: their mean and spread before it. The spread is estimated as
    the norm of the channel's weights, which is what it is where inputs are uncorrelated and of spread one, and the mean
    as zero. The BatchNorm's factor is the same number, so that it takes out what it brings in.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".conv.")
        if not prefix or "dfl" in prefix or f"{prefix}.conv.bias" not in state:
            result[name] = tensor
        elif last == "weight":
            spread = tensor.flatten(1).norm(dim=1).clamp(min=_EPS**0.5 * 2)
            result[name] = tensor
            values = (
                spread,
                state[f"{prefix}.conv.bias"],
                torch.zeros_like(spread),
                spread**2 - _EPS,
                torch.zeros((), dtype=torch.int64),
            )
            result.update({f"{prefix}.bn.{part}": value for part, value in zip(_BATCHNORM, values, strict=True)})
    return result


_EPS: Final = 1e-3
"""Ultralytics' epsilon of BatchNorm."""
