"""The search space: which detectors can be found, and what one of them is.

A detector of the space has YOLOv8's topology: a stem and four down-sampling convolutions with a C2f block after each
(P2 to P5), SPPF, a top-down neck (P4, P3), a bottom-up neck (P4, P5) and a Detect head. What can vary is the width of
every convolution, and depth, width, expansion and operator of every C2f block. Of the head it is what a stock yaml can
say of it: the operator of the class branch, and the bins of the box branch, which its hidden width follows. After SPPF,
where cells are fewest, a light attention block (Ultralytics' C2PSA) can be had.

This module imports nothing heavy: it is safe to use anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from yolov8_nas.errors import InputError, Said
from yolov8_nas.yaml_text import read_yaml

CONVS: Final = ("stem", "down_p2", "down_p3", "down_p4", "down_p5", "neck_down_p4", "neck_down_p5")
"""The stride-2 convolutions, in the order of the network."""

BLOCKS: Final = (
    "backbone_p2",
    "backbone_p3",
    "backbone_p4",
    "backbone_p5",
    "topdown_p4",
    "topdown_p3",
    "bottomup_p4",
    "bottomup_p5",
)
"""The C2f blocks, in the order of the network. Backbone blocks have shortcuts, neck blocks have none (as in YOLOv8)."""

LEVELS: Final = ("topdown_p3", "bottomup_p4", "bottomup_p5")
"""The blocks whose outputs the head reads: P3, P4 and P5."""

PARTS: Final = (
    "stem",
    "down_p2", "backbone_p2", "down_p3", "backbone_p3", "down_p4", "backbone_p4", "down_p5", "backbone_p5",
    "sppf", "attention",
    "topdown_p4", "topdown_p3", "neck_down_p4", "bottomup_p4", "neck_down_p5", "bottomup_p5",
    "detect_boxes", "detect_classes",
)  # fmt: skip
"""What a network consists of, in its order: names that hold whatever widths, depths and operators are. The last two are
the head's branches, on all three levels; `attention` is empty in a network that has none."""

OPERATORS: Final = ("dwsep3", "dwsep5", "dilated3", "conv3", "conv5")
"""What a C2f block is made of, from the fewest multiply-accumulates to the most: depthwise-separable 3x3 and 5x5,
dilated 3x3 (neck only: stock Ultralytics has no dilated block with a shortcut), two 3x3 (stock), two 5x5."""

CLASS_BRANCHES: Final = ("dwsep3", "conv3")
"""What the head's class branch is made of: depthwise-separable convolutions (Ultralytics' `legacy=False`, as YOLO11 has
them) or dense ones (stock YOLOv8), two of 3x3 either way."""

SCALES: Final[Mapping[str, tuple[float, float, int]]] = {
    "n": (0.33, 0.25, 1024),
    "s": (0.33, 0.50, 1024),
    "m": (0.67, 0.75, 768),
    "l": (1.00, 1.00, 512),
}
"""YOLOv8's depth multiple, width multiple and maximum channels by size (Ultralytics' yolov8.yaml)."""

FACTORS: Final = (1 / 2, 9 / 16, 5 / 8, 7 / 10, 3 / 4, 5 / 6, 15 / 16, 1.0)
"""Factors on all of stock's widths that the built-in spaces contain: what people do who need another latency than a
stock size has, so the network that a search has to beat is one that it can find. The resulting widths of SPPF divide
into attention heads of equal size."""

_STOCK_CONVS: Final = (64, 128, 256, 512, 1024, 256, 512)
_STOCK_BLOCKS: Final = ((3, 128), (6, 256), (6, 512), (3, 1024), (3, 512), (3, 256), (3, 512), (3, 1024))
_STOCK_SPPF: Final = 1024


class SpaceError(Said, ValueError):
    """A space or an architecture that cannot be used: the message says where, what and what would be right."""


def is_backbone(block: str) -> bool:
    """Whether a C2f block lies in the backbone, where its bottlenecks have shortcuts."""
    return block.startswith("backbone")


@dataclass(frozen=True)
class Block:
    """One C2f block.

    Attributes:
        depth: Number of bottlenecks; with none, the block is its 1x1 convolutions alone.
        width: Output channels.
        expansion: Hidden channels as a share of the output channels.
        operator: One of `OPERATORS`.
    """

    depth: int
    width: int
    expansion: float
    operator: str

    @property
    def hidden(self) -> int:
        """Channels of each of the block's inner tensors, a multiple of 8."""
        return max(8, 8 * round(self.width * self.expansion / 8))


@dataclass(frozen=True)
class Head:
    """The Detect head; without arguments, stock YOLOv8's.

    Attributes:
        classes: What the class branch is made of, one of `CLASS_BRANCHES`.
        reg_max: Bins of the distribution over each side of a box. A side is at most `reg_max - 1` cells long.
    """

    classes: str = "conv3"
    reg_max: int = 16

    def hidden(self, p3: int, num_classes: int) -> tuple[int, int]:
        """Hidden channels of the box branch and of the class branch, given P3's channels (Ultralytics' `Detect`)."""
        return max(16, p3 // 4, 4 * self.reg_max), max(p3, min(num_classes, 100))


@dataclass(frozen=True)
class Architecture:
    """One detector of a space: hashable, and the same after a round trip through JSON.

    Attributes:
        convs: Output channels of the stride-2 convolutions, in the order of `CONVS`.
        blocks: The C2f blocks, in the order of `BLOCKS`.
        sppf_kernel: Kernel of SPPF's max-pooling.
        sppf_width: Output channels of SPPF. Its hidden width is fixed by stock code at half its input.
        attention: Number of attention blocks after SPPF, which keep its width; 0 for none, as in YOLOv8.
        head: The Detect head.
    """

    convs: tuple[int, ...]
    blocks: tuple[Block, ...]
    sppf_kernel: int
    sppf_width: int
    attention: int
    head: Head = Head()

    def conv(self, name: str) -> int:
        """Output channels of the stride-2 convolution `name`."""
        return self.convs[CONVS.index(name)]

    def block(self, name: str) -> Block:
        """The C2f block `name`."""
        return self.blocks[BLOCKS.index(name)]

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON or YAML."""
        return {
            "convs": dict(zip(CONVS, self.convs, strict=True)),
            "blocks": {
                name: {"depth": b.depth, "width": b.width, "expansion": b.expansion, "operator": b.operator}
                for name, b in zip(BLOCKS, self.blocks, strict=True)
            },
            "sppf": {"kernel": self.sppf_kernel, "width": self.sppf_width},
            "attention": self.attention,
            "detect": {"classes": self.head.classes, "reg_max": self.head.reg_max},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` described.

        Without the key `attention` it has none, and without `detect` it has stock's head: descriptions of registered
        models that lack them were written when no network could have another.

        Raises:
            SpaceError: A part is missing or not of its form.
        """
        try:
            detect = data.get("detect")
            return cls(
                convs=tuple(_within(data["convs"][name], 1, _WIDEST) for name in CONVS),
                blocks=tuple(
                    Block(
                        _within(b["depth"], 0, _DEEPEST),
                        _within(b["width"], 1, _WIDEST),
                        float(_within(b["expansion"], 0.01, 8.0, float)),
                        _known(b["operator"], OPERATORS),
                    )
                    for b in (data["blocks"][name] for name in BLOCKS)
                ),
                sppf_kernel=_within(data["sppf"]["kernel"], 1, _DEEPEST),
                sppf_width=_within(data["sppf"]["width"], 1, _WIDEST),
                attention=_within(_count(data.get("attention", 0)), 0, _DEEPEST),
                head=Head(_known(detect["classes"], CLASS_BRANCHES), _within(detect["reg_max"], 1, _DEEPEST))
                if detect is not None
                else Head(),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SpaceError(f"not an architecture: {error!r} in {data!r}; expected the form of to_dict()") from None

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this architecture in files and logs."""
        return _digest(self.to_dict())[:12]


@dataclass(frozen=True)
class Dimension:
    """One choice of the space, e.g. `backbone_p3.depth` with the options (1, 2)."""

    name: str
    options: tuple[Any, ...]


@dataclass(frozen=True)
class SearchSpace:
    """The set of architectures that a search can reach: one option of every dimension.

    An architecture's *genes* are the indices of its options in `dimensions`, an integer vector of fixed length.

    Attributes:
        name: Name of the space.
        scale: The YOLOv8 size whose stock network the space contains.
        dimensions: All choices, in a fixed order.
    """

    name: str
    scale: str
    dimensions: tuple[Dimension, ...]
    stock: Architecture = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stock", stock_architecture(self.scale))
        try:
            self.encode(self.stock)
        except SpaceError as error:
            raise SpaceError(f"space {self.name!r} does not contain stock YOLOv8{self.scale}: {error}") from None

    @classmethod
    def load(cls, name: str | Path) -> SearchSpace:
        """Read a space by its name (`tiny`, `yolov8n`, ...) or from a YAML file.

        `yolov8-nas-supernet.yaml` and `yolov8s-nas-supernet.yaml` are other names of YOLOv8n's and YOLOv8s's, unless
        there is a file of that name.

        Raises:
            SpaceError: No such space, or the file does not describe one.
        """
        spelled = re.fullmatch(r"yolov8([nsml]?)-nas-supernet(\.yaml)?", str(name))
        if spelled and not Path(name).is_file():
            name = f"yolov8{spelled[1] or 'n'}"
        builtin = Path(__file__).parent / "spaces" / f"{name}.yaml"
        path = builtin if builtin.is_file() else Path(name)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in builtin.parent.glob("*.yaml")))
            raise SpaceError(f"no space {str(name)!r}: give one of {known}, or the path of a YAML file")
        try:
            data = read_yaml(path, "a search space")
        except InputError as error:
            raise SpaceError(str(error)) from None
        try:
            return cls.from_dict(data)
        except SpaceError as error:
            raise SpaceError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Any) -> SearchSpace:
        """The space that a mapping of the YAML form describes (see `spaces/tiny.yaml`).

        Without the key `detect` every network has stock's head.

        Raises:
            SpaceError: An unknown key or operator, a width that is no multiple of 8, stock YOLOv8 not contained, ...
        """
        if isinstance(data, Mapping):
            data = {"detect": {"classes": ["conv3"], "reg_max": [16]}, **data}
        parts = _mapping(data, "space", ("name", "scale", "convs", "blocks", "sppf", "attention", "detect"))
        scale = str(parts["scale"])
        if scale not in SCALES:
            raise SpaceError(f"scale: {scale!r} is not one of {', '.join(SCALES)}")
        dimensions = [
            Dimension(name, _channels(name, options))
            for name, options in _mapping(parts["convs"], "convs", CONVS).items()
        ]
        for name, choices in _mapping(parts["blocks"], "blocks", BLOCKS).items():
            choices = _mapping(choices, name, ("depth", "width", "expansion", "operator"))
            dimensions += [
                Dimension(f"{name}.depth", _numbers(f"{name}.depth", choices["depth"], int, 0, 16)),
                Dimension(f"{name}.width", _channels(f"{name}.width", choices["width"])),
                Dimension(f"{name}.expansion", _numbers(f"{name}.expansion", choices["expansion"], float, 0.125, 1.0)),
                Dimension(f"{name}.operator", _block_operators(name, choices["operator"])),
            ]
        sppf = _mapping(parts["sppf"], "sppf", ("kernel", "width"))
        kernels = _numbers("sppf.kernel", sppf["kernel"], int, 3, 13)
        if any(k % 2 == 0 for k in kernels):
            raise SpaceError(f"sppf.kernel: {kernels} has an even kernel; SPPF keeps the size only with odd ones")
        dimensions += [
            Dimension("sppf.kernel", kernels),
            Dimension("sppf.width", _channels("sppf.width", sppf["width"])),
            Dimension("attention", _numbers("attention", parts["attention"], int, 0, 4)),
        ]
        if any(dimensions[-1].options):
            for width in dimensions[-2].options:
                half, heads = width // 2, attention_heads(width)
                if half % heads:
                    raise SpaceError(
                        f"sppf.width: {width} leaves attention {half} channels for {heads} heads of equal size; "
                        "use another width, or attention: [0]"
                    )
        detect = _mapping(parts["detect"], "detect", ("classes", "reg_max"))
        dimensions += [
            Dimension("detect.classes", _operators("detect.classes", detect["classes"], CLASS_BRANCHES)),
            Dimension("detect.reg_max", _numbers("detect.reg_max", detect["reg_max"], int, 2, 16)),
        ]
        return cls(name=str(parts["name"]), scale=scale, dimensions=tuple(dimensions))

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_dict` reads."""
        options = {d.name: list(d.options) for d in self.dimensions}
        return {
            "name": self.name,
            "scale": self.scale,
            "convs": {name: options[name] for name in CONVS},
            "blocks": {
                name: {part: options[f"{name}.{part}"] for part in ("depth", "width", "expansion", "operator")}
                for name in BLOCKS
            },
            "sppf": {"kernel": options["sppf.kernel"], "width": options["sppf.width"]},
            "attention": options["attention"],
            "detect": {"classes": options["detect.classes"], "reg_max": options["detect.reg_max"]},
        }

    @cached_property
    def digest(self) -> str:
        """sha256 of the space's content."""
        return _digest(self.to_dict())

    @property
    def size(self) -> int:
        """Number of architectures."""
        return math.prod(len(d.options) for d in self.dimensions)

    def decode(self, genes: Sequence[int]) -> Architecture:
        """The architecture with these genes.

        Raises:
            SpaceError: Not one gene per dimension, or one out of range.
        """
        if len(genes) != len(self.dimensions):
            raise SpaceError(f"{len(genes)} genes for {len(self.dimensions)} dimensions")
        values = {}
        for gene, dimension in zip(genes, self.dimensions, strict=True):
            if not 0 <= gene < len(dimension.options):
                raise SpaceError(f"{dimension.name}: gene {gene} is not in 0..{len(dimension.options) - 1}")
            values[dimension.name] = dimension.options[gene]
        return Architecture(
            convs=tuple(values[name] for name in CONVS),
            blocks=tuple(
                Block(*(values[f"{name}.{part}"] for part in ("depth", "width", "expansion", "operator")))
                for name in BLOCKS
            ),
            sppf_kernel=values["sppf.kernel"],
            sppf_width=values["sppf.width"],
            attention=values["attention"],
            head=Head(values["detect.classes"], values["detect.reg_max"]),
        )

    def encode(self, architecture: Architecture) -> tuple[int, ...]:
        """The genes of an architecture.

        Raises:
            SpaceError: The architecture is not in the space; the message names the dimension.
        """
        values = _values(architecture)
        genes = []
        for dimension in self.dimensions:
            if values[dimension.name] not in dimension.options:
                raise SpaceError(f"{dimension.name} = {values[dimension.name]} is not one of {list(dimension.options)}")
            genes.append(dimension.options.index(values[dimension.name]))
        return tuple(genes)

    def __contains__(self, architecture: Architecture) -> bool:
        try:
            self.encode(architecture)
        except SpaceError:
            return False
        return True

    def largest(self) -> Architecture:
        """The architecture with the largest option of every dimension (operators by multiply-accumulates)."""
        return self.decode([d.options.index(max(d.options, key=_rank)) for d in self.dimensions])

    def smallest(self) -> Architecture:
        """The architecture with the smallest option of every dimension (operators by multiply-accumulates)."""
        return self.decode([d.options.index(min(d.options, key=_rank)) for d in self.dimensions])

    def rescaled(self) -> list[Architecture]:
        """Uniformly rescaled stock networks of the space, from narrow to wide; stock itself is the last one."""
        networks = (rescale(self.stock, factor) for factor in FACTORS)
        return [network for network in networks if network in self]

    def sample(self, rng: np.random.Generator) -> Architecture:
        """An architecture with every option drawn independently and uniformly."""
        return self.decode([int(rng.integers(len(d.options))) for d in self.dimensions])


def stock_architecture(scale: str) -> Architecture:
    """Stock YOLOv8 of a size (`n`, `s`, `m`, `l`) as an architecture.

    Source of the figures: Ultralytics' `yolov8.yaml` and its rule that channels are capped, scaled and rounded up to a
    multiple of 8, repeats scaled and rounded.
    """
    depth, width, cap = SCALES[scale]

    def channels(stock: int) -> int:
        return math.ceil(min(stock, cap) * width / 8) * 8

    return Architecture(
        convs=tuple(channels(c) for c in _STOCK_CONVS),
        blocks=tuple(Block(max(round(n * depth), 1), channels(c), 0.5, "conv3") for n, c in _STOCK_BLOCKS),
        sppf_kernel=5,
        sppf_width=channels(_STOCK_SPPF),
        attention=0,
        head=Head(),
    )


def rescale(architecture: Architecture, factor: float, shift: float = 0.0) -> Architecture:
    """An architecture with all of its widths multiplied by one factor; depths and head stay.

    Args:
        architecture: The network.
        factor: Factor on the widths.
        shift: Part of a step of 8 channels by which a width may fall short of a multiple of 8 before it is rounded up
            to the next; 0 rounds up always, as Ultralytics does between its own sizes.
    """

    def width(channels: int) -> int:
        steps = round(channels * factor / 8 - shift, 9)  # a product of floats may lie just above a whole number
        return 8 * max(1, math.ceil(steps))

    return replace(
        architecture,
        convs=tuple(width(channels) for channels in architecture.convs),
        blocks=tuple(replace(block, width=width(block.width)) for block in architecture.blocks),
        sppf_width=width(architecture.sppf_width),
    )


def attention_heads(width: int) -> int:
    """Heads of an attention block between `width` channels (Ultralytics' `C2PSA`): one per 64 of the half inside."""
    return max(width // 2 // 64, 1)


def _values(architecture: Architecture) -> dict[str, Any]:
    values: dict[str, Any] = dict(zip(CONVS, architecture.convs, strict=True))
    for name, block in zip(BLOCKS, architecture.blocks, strict=True):
        for part in ("depth", "width", "expansion", "operator"):
            values[f"{name}.{part}"] = getattr(block, part)
    values["sppf.kernel"] = architecture.sppf_kernel
    values["sppf.width"] = architecture.sppf_width
    values["attention"] = architecture.attention
    values["detect.classes"], values["detect.reg_max"] = architecture.head.classes, architecture.head.reg_max
    return values


def _rank(option: Any) -> float:
    return float(OPERATORS.index(option)) if isinstance(option, str) else float(option)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _mapping(data: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """`data` as a mapping with exactly `keys`, in their order."""
    if not isinstance(data, Mapping):
        raise SpaceError(f"{where}: expected a mapping with the keys {', '.join(keys)}, got {data!r}")
    unknown = sorted(set(map(str, data)) - set(keys))
    missing = [key for key in keys if key not in data]
    if unknown or missing:
        told = [f"unknown {unknown}"] * bool(unknown) + [f"missing {missing}"] * bool(missing)
        raise SpaceError(f"{where}: {' and '.join(told)}; the keys are {', '.join(keys)}")
    return {key: data[key] for key in keys}


_WIDEST: Final = 16384
"""Channels of a network that anybody has; a description may come from anywhere, and decides what memory is taken."""

_DEEPEST: Final = 64


def _within(value: Any, low: float, high: float, kind: type[int] | type[float] = int) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a number ({kind.__name__}) from {low} to {high}")
    return value


def _count(value: Any) -> Any:
    """A number; some descriptions of registered models say whether there is any."""
    return int(value) if isinstance(value, bool) else value


def _known(value: Any, names: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{value!r} is not one of {', '.join(names)}")
    return value


def _options(where: str, data: Any) -> Iterator[Any]:
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise SpaceError(f"{where}: expected a list of options, got {data!r}")
    if not all(isinstance(option, str | int | float) for option in data):
        raise SpaceError(f"{where}: {list(data)!r} has options that are neither numbers nor names")
    if len(set(data)) != len(data):
        raise SpaceError(f"{where}: {list(data)} names an option twice")
    return iter(data)


def _numbers(where: str, data: Any, kind: type[int] | type[float], low: float, high: float) -> tuple[Any, ...]:
    numbers = []
    for option in _options(where, data):
        if isinstance(option, bool) or not isinstance(option, (int, kind)) or not low <= option <= high:
            raise SpaceError(f"{where}: {option!r} is not a number ({kind.__name__}) from {low} to {high}")
        numbers.append(kind(option))
    return tuple(sorted(numbers))


def _channels(where: str, data: Any) -> tuple[int, ...]:
    channels: tuple[int, ...] = _numbers(where, data, int, 8, 2048)
    for option in channels:
        if option % 8:
            raise SpaceError(f"{where}: {option} channels are no multiple of 8; use {8 * math.ceil(option / 8)}")
    return channels


def _block_operators(block: str, data: Any) -> tuple[str, ...]:
    operators = _operators(f"{block}.operator", data, OPERATORS)
    if "dilated3" in operators and is_backbone(block):
        raise SpaceError(f"{block}.operator: dilated3 has no stock module with a shortcut; use it in the neck only")
    return operators


def _operators(where: str, data: Any, known: Sequence[str]) -> tuple[str, ...]:
    """Operators from the fewest multiply-accumulates to the most, as `known` has them."""
    operators = list(_options(where, data))
    for option in operators:
        if option not in known:
            raise SpaceError(f"{where}: {option!r} is not one of {', '.join(known)}")
    return tuple(sorted(operators, key=OPERATORS.index))
