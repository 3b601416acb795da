"""What a network costs on paper: parameters, multiply-accumulates and bytes, without building it.

The shapes are derived from the rows of the network's yaml (`space.topology.model_rows`), so that there is one
description of the network. Parameters agree exactly with the Ultralytics model built from that yaml.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

from yolov8_nas.space import Architecture, Head, attention_heads
from yolov8_nas.space.topology import SWITCH_CHANNELS, model_rows

Kind = Literal["conv1", "conv3", "conv5", "stride2", "dilated", "depthwise", "attention"]
KINDS: Final[tuple[Kind, ...]] = ("conv1", "conv3", "conv5", "stride2", "dilated", "depthwise", "attention")
"""Kinds of layer that a runtime has different kernels for: convolutions, and the products within attention."""


@dataclass(frozen=True)
class Layer:
    """One convolution.

    Attributes:
        name: The yaml row that it belongs to, by its name in `space.topology.model_rows`.
        kernel: Side of its kernel.
        stride: Step.
        dilation: Spacing of the kernel's taps.
        groups: Groups of channels.
        inputs: Input channels.
        outputs: Output channels.
        size: Side of the square output.
        batch_norm: Whether BatchNorm follows (folded into the weights in what ships); otherwise it has a bias.
    """

    name: str
    kernel: int
    stride: int
    dilation: int
    groups: int
    inputs: int
    outputs: int
    size: int
    batch_norm: bool = True

    @property
    def kind(self) -> Kind:
        """What a runtime takes it for."""
        if self.groups > 1:
            return "depthwise"
        if self.stride > 1:
            return "stride2"
        if self.dilation > 1:
            return "dilated"
        return {1: "conv1", 3: "conv3"}.get(self.kernel, "conv5")  # type: ignore[return-value]

    @property
    def weights(self) -> int:
        """Elements of the kernel."""
        return self.kernel**2 * self.inputs // self.groups * self.outputs

    @property
    def params(self) -> int:
        """Parameters before BatchNorm is folded."""
        return self.weights + self.outputs * (2 if self.batch_norm else 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.weights * self.size**2

    @property
    def bytes(self) -> int:
        """Bytes of FP32 input, weights and output: what must move at least."""
        return 4 * (self.inputs * (self.size * self.stride) ** 2 + self.weights + self.outputs * self.size**2)


@dataclass(frozen=True)
class Attention:
    """The products within one attention block: every cell with every other, and the weighted sum of their values.

    Attributes:
        name: The yaml row that they belong to.
        heads: Number of heads.
        key: Channels of a head's queries, and of its keys.
        value: Channels of a head's values.
        size: Side of the square map.
    """

    name: str
    heads: int
    key: int
    value: int
    size: int
    kind: ClassVar[Kind] = "attention"
    params: ClassVar[int] = 0

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.heads * self.value

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image; they grow with the fourth power of the side."""
        return self.heads * (self.key + self.value) * self.size**4

    @property
    def bytes(self) -> int:
        """Bytes of FP32 queries, keys, values, output and the matrix of scores, which is written and read."""
        return 4 * self.heads * (2 * (self.key + self.value) * self.size**2 + 2 * self.size**4)


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        layers: Its convolutions and attention products, in the order of the network, without Detect's fixed sum over
            bins and without what nobody reads (`topology.SWITCH`), which no exported file has.
        others: Parameters of what is no layer here.
    """

    layers: tuple[Layer | Attention, ...]
    others: int

    @cached_property
    def params(self) -> int:
        """Trainable and fixed parameters as Ultralytics counts them before BatchNorm is folded."""
        return sum(layer.params for layer in self.layers) + self.others

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the layers for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def gflops(self) -> float:
        """Twice the multiply-accumulates of the layers, in 10^9 for one image.

        This is what is usually quoted for YOLOv8. Profilers that also count BatchNorm, pooling and activations (as
        `thop` does) give one or two per cent more.
        """
        return 2e-9 * self.macs

    @cached_property
    def bytes(self) -> int:
        """FP32 bytes that the layers read and write at least for one image."""
        return sum(layer.bytes for layer in self.layers)


def cost(architecture: Architecture, num_classes: int, imgsz: int) -> Cost:
    """The cost of an architecture.

    Args:
        architecture: The network.
        num_classes: Classes of the Detect head.
        imgsz: Side of the square input in pixels, a multiple of 32.
    """
    others = architecture.head.reg_max
    if architecture.head.classes == "dwsep3":
        hidden, closing = SWITCH_CHANNELS
        others += (architecture.block("bottomup_p5").width + 2) * hidden + (hidden + 2) * closing
    return Cost(tuple(_layers(architecture, num_classes, imgsz)), others)


def _layers(architecture: Architecture, num_classes: int, imgsz: int) -> Iterator[Layer | Attention]:
    """The layers of `architecture`, following channels and sizes from row to row."""
    shapes: list[tuple[int, int]] = []  # (channels, side) of every row's output
    for name, (source, repeats, module, arguments) in model_rows(architecture):
        sources = [shapes[i] if shapes else (3, imgsz) for i in ([source] if isinstance(source, int) else source)]
        channels, size = sources[0]
        match module:
            case "Conv":
                layer = _conv(name, channels, size, *arguments)
                yield layer
                shapes.append((layer.outputs, layer.size))
            case "Bottleneck":
                outputs, _, groups, kernels, _ = arguments
                yield _conv(name, channels, size, outputs, kernels[0])
                yield _conv(name, outputs, size, outputs, kernels[1], 1, None, groups)
                shapes.append((outputs, size))
            case "SPPF":
                outputs, hidden = arguments[0], channels // 2
                yield _conv(name, channels, size, hidden, 1)
                yield _conv(name, 4 * hidden, size, outputs, 1)
                shapes.append((outputs, size))
            case "C2PSA":
                half = channels // 2
                yield _conv(name, channels, size, 2 * half, 1)
                for _ in range(repeats):
                    yield from _psa_block(name, half, size, attention_heads(channels))
                yield _conv(name, 2 * half, size, channels, 1)
                shapes.append((channels, size))
            case "nn.Upsample":
                shapes.append((channels, size * arguments[1]))
            case "Concat":
                shapes.append((sum(c for c, _ in sources), size))
            case "C3k2":  # nobody reads it
                shapes.append((0, 0))
            case "Detect":
                yield from _detect(name, sources, num_classes, architecture.head)
            case _:
                raise AssertionError(f"no cost rule for the module {module} of {name}")


def _conv(
    name: str, inputs: int, size: int, outputs: int, kernel: int, stride: int = 1, padding: None = None,
    groups: int = 1, dilation: int = 1,
) -> Layer:  # fmt: skip
    """A stock Conv from the arguments of its row; its padding keeps the size but for the stride."""
    del padding
    return Layer(name, kernel, stride, dilation, groups, inputs, outputs, math.ceil(size / stride))


def _psa_block(name: str, channels: int, size: int, heads: int) -> Iterator[Layer | Attention]:
    """One attention with its projections and the encoding of places, and the feed-forward layer."""
    value = channels // heads
    key = value // 2
    yield _conv(name, channels, size, channels + 2 * heads * key, 1)
    yield Attention(name, heads, key, value, size)
    yield _conv(name, channels, size, channels, 3, groups=channels)
    yield _conv(name, channels, size, channels, 1)
    yield _conv(name, channels, size, 2 * channels, 1)
    yield _conv(name, 2 * channels, size, channels, 1)


def _detect(name: str, sources: list[tuple[int, int]], num_classes: int, head: Head) -> Iterator[Layer]:
    """The head: of every level a branch of three layers for boxes and one for classes."""
    box, cls = head.hidden(sources[0][0], num_classes)
    for channels, size in sources:
        for width, outputs, kind in ((box, 4 * head.reg_max, "conv3"), (cls, num_classes, head.classes)):
            for inputs in (channels, width):
                if kind == "dwsep3":
                    yield _conv(name, inputs, size, inputs, 3, groups=inputs)
                    yield _conv(name, inputs, size, width, 1)
                else:
                    yield _conv(name, inputs, size, width, 3)
            yield Layer(name, 1, 1, 1, 1, width, outputs, size, batch_norm=False)


def summary(architecture: Architecture, num_classes: int, imgsz: int) -> dict[str, Any]:
    """Parameters and GFLOPs as they stand in reports."""
    total = cost(architecture, num_classes, imgsz)
    return {"params": total.params, "gflops": round(total.gflops, 4)}
