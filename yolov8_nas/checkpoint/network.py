"""Networks of checkpoints: records become modules of the classes listed here, and of no others.

No class is called with what a file says. A module is made empty; its weights are tensors of the file, its parts are
modules of the list, and each of its settings is one that is known by name and lies in the bounds that the list states.
Whatever else a record holds is left behind: a module has no hooks, no functions and no unknown attributes.

A class of another family of Ultralytics joins by a line in `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn
from ultralytics.nn import modules as ul
from ultralytics.nn.modules import block
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT

from yolov8_nas.checkpoint import archive
from yolov8_nas.checkpoint.archive import Name, Record, Refused, shown
from yolov8_nas.errors import InputError

LARGEST_SIDE: Final = 8192
_DEEPEST: Final = 12
_MOST_MODULES: Final = 20_000
_MOST_CLASSES: Final = 100_000


# Settings of modules --------------------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _number(least: float, most: float) -> Check:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _whole(least: int, most: int) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _pair(least: int, most: int) -> Check:
    one = _whole(least, most)
    return lambda value: one(value) or (isinstance(value, tuple) and len(value) == 2 and all(map(one, value)))


def _one_of(*values: Any) -> Check:
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def _rows(value: Any) -> bool:
    """Where a row of a network takes its input from: a row, or a list of rows."""
    one = _whole(-512, 512)
    return one(value) or (isinstance(value, list) and 0 < len(value) <= 32 and all(map(one, value)))


_FLAG: Final = _one_of(True, False)
_MISSING: Final = object()


@dataclass(frozen=True)
class Kind:
    """A class of modules that a checkpoint may have.

    Attributes:
        module: The class.
        settings: What it computes by beyond its weights: what is allowed, and what it is where a file has nothing:
            `_MISSING` where the class itself has an answer to that, `_NEEDED` where such a file is refused.
        parts: Modules that it can't do without.
        weights: Tensors that it can't do without.
        optional: Tensors that it may have.
        free: Whether parts may have any name: numbers, in containers.
    """

    module: type[nn.Module]
    settings: Mapping[str, tuple[Check, Any]] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    free: bool = False


_NEEDED: Final = object()
"""In place of a default: a file without this setting is refused."""

_WIDTH: Final = _whole(1, 1 << 16)
_HEAD: Final[Mapping[str, tuple[Check, Any]]] = {
    "nc": (_whole(1, _MOST_CLASSES), _NEEDED),
    "nl": (_whole(1, 8), _NEEDED),
    "no": (_whole(1, 1 << 20), _NEEDED),
    "reg_max": (_whole(1, 256), _NEEDED),
    "inplace": (_FLAG, True),
    "max_det": (_whole(1, 100_000), _MISSING),
    "agnostic_nms": (_FLAG, _MISSING),
    "legacy": (_FLAG, _MISSING),
    "_end2end": (_FLAG, _MISSING),
}

KINDS: Final[Mapping[str, Kind]] = {
    "torch.nn.modules.container.Sequential": Kind(nn.Sequential, free=True),
    "torch.nn.modules.container.ModuleList": Kind(nn.ModuleList, free=True),
    "torch.nn.modules.linear.Identity": Kind(nn.Identity),
    "torch.nn.modules.activation.SiLU": Kind(nn.SiLU, {"inplace": (_FLAG, False)}),
    "torch.nn.modules.conv.Conv2d": Kind(
        nn.Conv2d,
        {
            "stride": (_pair(1, 8), (1, 1)),
            "padding": (_pair(0, 64), (0, 0)),
            "dilation": (_pair(1, 16), (1, 1)),
            "groups": (_WIDTH, 1),
            "padding_mode": (_one_of("zeros"), "zeros"),
            "transposed": (_one_of(False), False),
            "output_padding": (_one_of(0, (0, 0)), (0, 0)),
        },
        weights=("weight",),
        optional=("bias",),
    ),
    "torch.nn.modules.batchnorm.BatchNorm2d": Kind(
        nn.BatchNorm2d,
        {
            "eps": (_number(1e-9, 1), _NEEDED),
            "momentum": (_number(0, 1), 0.03),
            "affine": (_one_of(True), True),
            "track_running_stats": (_one_of(True), True),
        },
        weights=("weight", "bias", "running_mean", "running_var"),
        optional=("num_batches_tracked",),
    ),
    "torch.nn.modules.pooling.MaxPool2d": Kind(
        nn.MaxPool2d,
        {
            "kernel_size": (_pair(1, 31), _NEEDED),
            "stride": (_pair(1, 8), _NEEDED),
            "padding": (_pair(0, 15), _NEEDED),
            "dilation": (_pair(1, 1), 1),
            "return_indices": (_one_of(False), False),
            "ceil_mode": (_FLAG, False),
        },
    ),
    "torch.nn.modules.upsampling.Upsample": Kind(
        nn.Upsample,
        {
            "size": (_one_of(None), None),
            "scale_factor": (_number(1, 4), _NEEDED),
            "mode": (_one_of("nearest", "bilinear"), "nearest"),
            "align_corners": (_one_of(None, False), None),
            "recompute_scale_factor": (_one_of(None, False), None),
        },
    ),
    **{
        f"ultralytics.nn.modules.{place}": kind
        for places, kind in {
            ("conv.Conv", "Conv"): Kind(ul.Conv, parts=("conv", "act")),
            ("conv.DWConv", "DWConv"): Kind(ul.DWConv, parts=("conv", "act")),
            ("conv.Concat", "Concat"): Kind(ul.Concat, {"d": (_one_of(1), 1)}),
            ("block.C2f", "C2f"): Kind(ul.C2f, {"c": (_WIDTH, _NEEDED)}, ("cv1", "cv2", "m")),
            ("block.C3",): Kind(ul.C3, parts=("cv1", "cv2", "cv3", "m")),
            ("block.C3k",): Kind(block.C3k, parts=("cv1", "cv2", "cv3", "m")),
            ("block.C3k2",): Kind(ul.C3k2, {"c": (_WIDTH, _NEEDED)}, ("cv1", "cv2", "m")),
            ("block.Bottleneck", "Bottleneck"): Kind(ul.Bottleneck, {"add": (_FLAG, _NEEDED)}, ("cv1", "cv2")),
            ("block.SPPF", "SPPF"): Kind(
                ul.SPPF, {"n": (_whole(1, 8), _MISSING), "add": (_FLAG, _MISSING)}, ("cv1", "cv2", "m")
            ),
            ("block.DFL", "DFL"): Kind(ul.DFL, {"c1": (_whole(1, 256), _NEEDED)}, ("conv",)),
            ("block.C2PSA",): Kind(ul.C2PSA, {"c": (_WIDTH, _NEEDED)}, ("cv1", "cv2", "m")),
            ("block.PSABlock",): Kind(block.PSABlock, {"add": (_FLAG, True)}, ("attn", "ffn")),
            ("block.Attention",): Kind(
                block.Attention,
                {
                    "num_heads": (_whole(1, 1024), _NEEDED),
                    "head_dim": (_WIDTH, _NEEDED),
                    "key_dim": (_WIDTH, _NEEDED),
                    "scale": (_number(0, 1), _NEEDED),
                },
                ("qkv", "proj", "pe"),
            ),
            ("head.Detect", "Detect"): Kind(ul.Detect, _HEAD, ("dfl",)),
        }.items()
        for place in places
    },
}
"""The modules that a network may have, by the names under which checkpoints know them."""

NETWORK: Final = "ultralytics.nn.tasks.DetectionModel"

CLASSES: Final = frozenset({*KINDS, NETWORK})


# Loading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loaded:
    """A detector, as a checkpoint has it.

    Attributes:
        network: In FP32 and evaluation mode, with its fake quantization where it has any.
        quantized: Whether it has.
        imgsz: Side in pixels of the images that it was trained on, where the file says so.
        sha256: Of the file.
    """

    network: DetectionModel
    quantized: bool
    imgsz: int | None
    sha256: str


def load(file: Path, *, quantized: bool = True) -> Loaded:
    """The network of an Ultralytics checkpoint, whoever it is from: no code in it is run.

    The exponential moving average is taken where there is one.

    Args:
        file: The checkpoint (`.pt`).
        quantized: Whether one with fake quantization is wanted as such. Otherwise it has none, and is still told as
            quantized.

    Raises:
        InputError: There is no such file, it is damaged, or it holds something else than a detector of these modules.
    """
    if not file.exists() and not file.is_symlink():
        raise InputError(f"{file}: no such file; give the path of a checkpoint (.pt)")
    if file.suffix != ".pt":
        raise InputError(f"{file}: not a checkpoint; give the path of a .pt file")
    try:
        content = archive.read(file, CLASSES)
        return _loaded(content, quantized=quantized)
    except Refused as error:
        raise InputError(
            f"{file}: not a checkpoint of Ultralytics that can be read safely ({error}); give one of a detector that "
            "Ultralytics or this package wrote"
        ) from None


def _loaded(content: archive.Content, *, quantized: bool) -> Loaded:
    checkpoint = content.value
    found = (checkpoint.get("ema") or checkpoint.get("model")) if isinstance(checkpoint, dict) else None
    if not isinstance(found, Record) or found.name != NETWORK:
        raise Refused("no detection network in it")
    network = _Builder().network(found)
    arguments = checkpoint.get("train_args")
    imgsz = arguments.get("imgsz") if isinstance(arguments, dict) else None
    if imgsz is not None and not _whole(1, LARGEST_SIDE)(imgsz):
        raise Refused(f"it was trained on images of {imgsz!r:.40} pixels")
    network.args = {**DEFAULT_CFG_DICT, "task": "detect", **({"imgsz": imgsz} if imgsz else {})}
    state = checkpoint.get("modelopt")
    if state is not None and quantized:
        from yolov8_nas.checkpoint import quantized as fake

        try:
            fake.restore(network, state)
        except ImportError as error:
            raise Refused(f"it is quantized, and ModelOpt cannot be imported here: {error}") from None
    return Loaded(network.eval(), state is not None, imgsz, content.sha256)


class _Builder:
    """Makes modules of records; what a file has once, its network has once."""

    def __init__(self) -> None:
        self.made: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.open: set[int] = set()

    def network(self, record: Record) -> DetectionModel:
        """The network."""
        state = record.state
        self._require_plain(record)
        rows = self._parts(record).get("model")
        if not isinstance(rows, Record) or not rows.name.endswith(".Sequential"):
            raise Refused("its network has no rows")
        network: DetectionModel = self._empty(DetectionModel)
        network.model = self.module(rows, 0)
        head = network.model[-1] if len(network.model) else None
        if not isinstance(head, ul.Detect) or not 2 <= len(network.model) <= 512:
            raise Refused("its last row is no detection head")
        for row in network.model:
            if not hasattr(row, "f") or not hasattr(row, "i"):
                raise Refused("a row of its network does not say what it reads")
        if sum(isinstance(module, nn.Upsample) for module in network.modules()) > 4:
            raise Refused("its network makes images larger more than four times")
        self._require_head(head)
        network.save = self._setting(state, "save", lambda v: isinstance(v, list) and _saves(v), _NEEDED)
        network.inplace = True
        network.names = _names(state.get("names"), head.nc)
        network.yaml = _yaml(state.get("yaml"))
        network.stride = self._stride(state.get("stride"), head.nl)
        head.stride = network.stride
        network.task = "detect"
        return network.eval().requires_grad_(True)

    def _require_head(self, head: Any) -> None:
        for branch in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
            levels = head._modules.get(branch)
            if levels is not None and (not isinstance(levels, nn.ModuleList) or len(levels) != head.nl):
                raise Refused("its head has not one branch a level")
        if head._modules.get("cv2") is None and head._modules.get("one2one_cv2") is None:
            raise Refused("its head has no branch")
        if head.no != head.nc + 4 * head.reg_max:
            raise Refused("its head's outputs are not those of its classes")

    def _stride(self, value: Any, levels: int) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != (levels,):
            raise Refused("its network has no stride for each level")
        stride = value.detach().float().clone()
        if not bool(((stride >= 1) & (stride <= 256)).all()):
            raise Refused("its network's strides are out of bounds")
        return stride

    def module(self, record: Record, depth: int) -> nn.Module:
        """A module of the list."""
        if id(record) in self.made:
            return self.made[id(record)]
        if depth > _DEEPEST or id(record) in self.open:
            raise Refused("its modules lie too deep in each other")
        if len(self.made) + len(self.open) >= _MOST_MODULES:
            raise Refused(f"its network has more than {_MOST_MODULES} modules")
        kind = KINDS.get(record.name)
        if kind is None:
            raise Refused(f"{shown(record.name)} inside a network")
        self.open.add(id(record))
        self._require_plain(record)
        module: nn.Module = self._empty(kind.module)
        self._add_tensors(module, kind, record)
        parts = self._parts(record)
        for name, part in parts.items():
            if kind.free and not (type(name) is str and re.fullmatch(r"\d{1,4}", name)):
                raise Refused("a part of a list of modules that has no number")
            if not isinstance(part, Record | None):
                raise Refused(f"a part of {kind.module.__name__} that is no module")
            if not kind.free and (hasattr(kind.module, name) or not name.isidentifier()):
                raise Refused(f"a part of {kind.module.__name__} with the name {shown(name)}")
            module._modules[name] = None if part is None else self.module(part, depth + 1)
        if any(module._modules.get(name) is None for name in kind.parts):
            raise Refused(f"{kind.module.__name__} without {', '.join(kind.parts)}")
        for name, (check, default) in kind.settings.items():
            value = self._setting(record.state, name, check, default)
            if value is not _MISSING:
                module.__dict__[name] = value
        self._place(module, record)
        self._complete(module)
        self.open.discard(id(record))
        self.made[id(record)] = module
        return module

    def _empty(self, kind: type[nn.Module]) -> Any:
        """A module without anything: its class's own `__init__` is not called."""
        module = object.__new__(kind)
        nn.Module.__init__(module)
        return module

    def _require_plain(self, record: Record) -> None:
        """Refuse what is no data: hooks, and functions in place of methods."""
        for name, value in record.state.items():
            if "hook" in name and value and name != "_is_full_backward_hook":
                raise Refused("its network has hooks")
            if name == "forward" and not (isinstance(value, Name) and value.text in archive.METHODS):
                raise Refused("its network brings a function of its own")

    def _parts(self, record: Record) -> dict[str, Any]:
        parts = record.state.get("_modules")
        if not isinstance(parts, dict) or not all(type(name) is str for name in parts):
            raise Refused("a module whose parts are no modules")
        return parts

    def _setting(self, state: Mapping[str, Any], name: str, check: Check, default: Any) -> Any:
        value = state.get(name, default)
        if value is _NEEDED:
            raise Refused(f"a module without its setting {name}")
        if value is not _MISSING and value is not default and not check(value):
            raise Refused(f"a module with {name} = {shown(repr(value)[:60])}")
        return value

    def _add_tensors(self, module: nn.Module, kind: Kind, record: Record) -> None:
        found: dict[str, Tensor] = {}
        for group in ("_parameters", "_buffers"):
            tensors = record.state.get(group, {})
            if not isinstance(tensors, dict):
                raise Refused("a module whose weights are no tensors")
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if not isinstance(tensor, Tensor) or name not in (*kind.weights, *kind.optional):
                    raise Refused(f"{kind.module.__name__} with the weight {shown(str(name))}")
                if not bool(tensor.isfinite().all()):
                    raise Refused("weights that are not all finite numbers")
                found[name] = self._weight(tensor)
        if missing := [name for name in kind.weights if name not in found]:
            raise Refused(f"{kind.module.__name__} without {missing[0]}")
        for name in (*kind.weights, *kind.optional):
            tensor = found.get(name)
            if name.startswith(("running_", "num_")):
                module.register_buffer(name, tensor)
            else:
                module.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def _weight(self, tensor: Tensor) -> Tensor:
        """A copy of its own in full precision: what lies in the file once is copied once."""
        if id(tensor) not in self.tensors:
            own = tensor.detach()
            self.tensors[id(tensor)] = own.float().clone() if own.is_floating_point() else own.clone()
        return self.tensors[id(tensor)]

    def _place(self, module: nn.Module, record: Record) -> None:
        """What Ultralytics writes to a row of a network: where it stands, and what it reads."""
        for name, check in (("f", _rows), ("i", _whole(0, 512)), ("np", _whole(0, 1 << 40))):
            if name in record.state:
                module.__dict__[name] = self._setting(record.state, name, check, _NEEDED)
        if "i" in record.state:
            kind = type(module)
            module.__dict__["type"] = f"{kind.__module__}.{kind.__name__}"

    def _complete(self, module: nn.Module) -> None:
        """Settings that follow from others, and the folded form."""
        match module:
            case nn.Conv2d():
                weight, bias = module.weight, module.bias
                if weight.ndim != 4 or weight.shape[0] % module.groups or (bias is not None and bias.ndim != 1):
                    raise Refused("a convolution whose weights have another shape")
                if bias is not None and bias.shape[0] != weight.shape[0]:
                    raise Refused("a convolution whose weights have another shape")
                module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
                module.kernel_size = tuple(weight.shape[2:])
                for name in ("stride", "padding", "dilation"):
                    value = getattr(module, name)
                    module.__dict__[name] = value if isinstance(value, tuple) else (value, value)
                module.output_padding = (0, 0)
                high, wide = (int(side) for side in module.padding)
                module._reversed_padding_repeated_twice = [wide, wide, high, high]
            case nn.BatchNorm2d():
                tensors = (module.weight, module.bias, module.running_mean, module.running_var)
                if (
                    len({tuple(tensor.shape) for tensor in tensors if tensor is not None}) > 1
                    or module.weight.ndim != 1
                ):
                    raise Refused("a BatchNorm whose weights have different shapes")
                module.num_features = module.weight.shape[0]
            case ul.Conv():
                if not isinstance(module.conv, nn.Conv2d):
                    raise Refused("a Conv without a convolution")
                if module._modules.get("bn") is None:
                    module._modules.pop("bn", None)
                    module.forward = module.forward_fuse
            case nn.Upsample():
                module.name = "Upsample"
                module.scale_factor = float(module.scale_factor)  # type: ignore[arg-type]
            case _:
                pass


def _saves(value: list[Any]) -> bool:
    return len(value) <= 512 and all(type(row) is int and 0 <= row <= 512 for row in value)


def _names(found: Any, classes: int) -> dict[int, str]:
    listed = dict(enumerate(found)) if isinstance(found, list | tuple) else found
    if not isinstance(listed, dict) or set(listed) != set(range(classes)):
        raise Refused(f"its class names are not those of {classes} classes")
    return {i: str(listed[i])[:256] for i in range(classes)}


_WORDS: Final = frozenset({"None", "nc", "nearest", "bilinear", "True", "False"})


def _yaml(found: Any) -> dict[str, Any]:
    """The rows from which Ultralytics' trainer builds a network anew; it evaluates text, so only known words pass."""
    if not isinstance(found, dict):
        raise Refused("its network has no rows in words")
    result: dict[str, Any] = {}
    known = {kind.module.__name__ for kind in KINDS.values()} | {"nn.Upsample"}
    for key in ("backbone", "head"):
        rows = found.get(key)
        if not isinstance(rows, list) or len(rows) > 512:
            raise Refused("its network has no rows in words")
        for row in rows:
            if not isinstance(row, list) or len(row) != 4 or not _rows(row[0]) or not _whole(0, 64)(row[1]):
                raise Refused("a row of its network is none")
            if row[2] not in known or not isinstance(row[3], list) or not _plain(row[3], 3):
                raise Refused(f"a row of its network is {shown(str(row[2]))}")
        result[key] = [[row[0], row[1], row[2], list(row[3])] for row in rows]
    if found.get("activation") is not None:
        raise Refused("it names an activation, which would be evaluated")
    for key, check in (
        ("nc", _whole(1, _MOST_CLASSES)),
        ("reg_max", _whole(1, 256)),
        ("channels", _whole(1, 16)),
        ("ch", _whole(1, 16)),
        ("scale", _one_of(*"nsmlx")),
        ("end2end", _one_of(True, False, None)),
        ("depth_multiple", _number(0, 4)),
        ("width_multiple", _number(0, 4)),
    ):
        if key in found:
            if not check(found[key]):
                raise Refused(f"its network has {key} = {shown(repr(found[key])[:60])}")
            result[key] = found[key]
    scales = found.get("scales")
    if scales is not None:
        if (
            not isinstance(scales, dict)
            or len(scales) > 16
            or not all(
                type(k) is str and isinstance(v, list) and len(v) == 3 and all(_number(0, 1 << 16)(n) for n in v)
                for k, v in scales.items()
            )
        ):
            raise Refused("its network's scales are none")
        result["scales"] = {key: list(value) for key, value in scales.items()}
    name = found.get("yaml_file")
    if type(name) is str:
        result["yaml_file"] = Path(name).name[:128]
    return result


def _plain(value: Any, depth: int) -> bool:
    """Whether arguments of a row are numbers and known words."""
    if isinstance(value, list):
        return depth > 0 and len(value) <= 32 and all(_plain(item, depth - 1) for item in value)
    if type(value) is str:
        return value in _WORDS
    return value is None or type(value) is bool or _number(-(1 << 16), 1 << 16)(value)
