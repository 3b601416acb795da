"""The channels of a YOLOv8 network: which of them belong together, how much each matters, and how to choose some.

Channels that are added to each other or pooled from each other move together: they lie on one *axis*. What reads an
axis reads it as one *member* of its input, which may be a concatenation of several: the halves of a C2f block and the
outputs of its bottlenecks, the four parts of SPPF, the maps that the neck joins. So to sort the channels of an axis, or
to leave some out, is to index the outputs of the convolutions that end on it and one member of the inputs of those that
read it. A warm start sorts (`warmstart`), slicing leaves out (`slicing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from yolov8_nas.space import Architecture
from yolov8_nas.space.topology import model_rows
from yolov8_nas.supernet.elastic import State

EPS: Final = 1e-3
"""Ultralytics' epsilon of BatchNorm."""


@dataclass(frozen=True)
class Wire:
    """One convolution of the stock network, and the axes that its channels lie on.

    Attributes:
        row: Its row in `model_rows`.
        weight: Name of its weights in the state of the row's module.
        norm: Prefix of its BatchNorm's tensors there; empty for a prediction, whose outputs have their places.
        inputs: Axis of each member of its input.
        output: Axis of its output; empty for a prediction.
        depthwise: Whether it has one filter per channel, so that input and output lie on one axis.
    """

    row: int
    weight: str
    norm: str
    inputs: tuple[str, ...]
    output: str
    depthwise: bool = False


def wiring(architecture: Architecture) -> Iterator[Wire]:
    """The convolutions of a network of 3x3 bottlenecks, in the order of the network."""

    def conv(prefix: str, inputs: tuple[str, ...], output: str, *, depthwise: bool = False) -> Wire:
        return Wire(row, f"{prefix}conv.weight", f"{prefix}bn.", inputs, output, depthwise)

    axes: list[tuple[str, ...]] = []  # of each row, those of the members of its output
    for row, (name, (source, _, module, arguments)) in enumerate(model_rows(architecture)):
        relative = source if isinstance(source, list) else [source]
        inputs = sum((axes[i % row] for i in relative), ()) if row else ("image",)
        axes.append((name,))
        match module:
            case "Conv":
                yield conv("", inputs, name)
            case "Bottleneck":
                if arguments[1]:
                    axes[row] = inputs  # the shortcut adds the input to the output, channel by channel
                yield conv("cv1.", inputs, f"{name}.inner")
                (output,) = axes[row]
                yield conv("cv2.", (f"{name}.inner",), output)
            case "SPPF":
                yield conv("cv1.", inputs, f"{name}.hidden")
                yield conv("cv2.", (f"{name}.hidden",) * 4, name)
            case "Detect":
                for level, axis in enumerate(inputs):
                    for branch, form in (("cv2", "conv3"), ("cv3", architecture.head.classes)):
                        read = axis
                        for i, hidden in enumerate(("first", "second")):
                            layer, given = f"{branch}.{level}.{i}.", f"{branch}.{level}.{hidden}"
                            if form == "dwsep3":
                                yield conv(f"{layer}0.", (read,), read, depthwise=True)
                                layer = f"{layer}1."
                            yield conv(layer, (read,), given)
                            read = given
                        yield Wire(row, f"{branch}.{level}.2.weight", "", (read,), "")
            case "C3k2":  # nobody reads it
                pass
            case _:  # Concat, Upsample
                axes[row] = inputs


def importance_orders(wires: Sequence[Wire], states: Sequence[State]) -> dict[str, Tensor]:
    """For every axis its channels from the most important on.

    Importance of a channel is how much of it reaches the layers that read it: its spread, which follows from its
    BatchNorm (Network Slimming, arXiv:1708.06519, takes the factor alone; here SiLU is counted), times the L1 norm of
    the weights that read it, with their BatchNorm folded in, so that weights of different layers compare.

    Args:
        wires: `wiring` of the network.
        states: Of each row, the state of the stock module.
    """
    sizes = axis_sizes(wires, states)
    spread: dict[str, Tensor] = {}
    for wire in wires:
        if wire.output and not wire.depthwise:  # of channels that are added, the spreads are added
            own = spread_of(wire, states)
            spread[wire.output] = spread.get(wire.output, torch.zeros_like(own)) + own
    read = {axis: torch.zeros_like(own) for axis, own in spread.items()}
    for wire in wires:
        for axis, part in zip(wire.inputs, reading(wire, states, sizes), strict=False):  # the image has no axis
            read[axis] += part
    return {axis: (own * read[axis]).argsort(descending=True, stable=True) for axis, own in spread.items()}


def axis_sizes(wires: Sequence[Wire], states: Sequence[State]) -> dict[str, int]:
    """For every axis its number of channels."""
    return {wire.output: len(states[wire.row][wire.weight]) for wire in wires if wire.output}


def spread_of(wire: Wire, states: Sequence[State]) -> Tensor:
    """Standard deviation of every output of a convolution behind its BatchNorm and SiLU."""
    _, spread = mean_and_spread(*(states[wire.row][f"{wire.norm}{name}"] for name in ("weight", "bias")))
    return spread


def reading(wire: Wire, states: Sequence[State], sizes: Mapping[str, int]) -> list[Tensor]:
    """How much a convolution reads of every channel of every member of its input; nothing of the image."""
    if wire.inputs == ("image",):
        return []
    state = states[wire.row]
    weight = state[wire.weight].abs().sum((2, 3))
    if wire.norm:
        variance = state[f"{wire.norm}running_var"]
        weight = weight * (state[f"{wire.norm}weight"].abs() / (variance + EPS).sqrt())[:, None]
    if wire.depthwise:
        return [weight[:, 0]]
    return list(torch.split(weight.sum(0), [sizes[axis] for axis in wire.inputs]))


def reordered(wires: Sequence[Wire], states: Sequence[State], orders: Mapping[str, Tensor]) -> list[State]:
    """The same network with the channels of every axis in the given order; those that an order lacks are left out.

    Where every channel stays, the network's outputs are the same.

    Args:
        wires: `wiring` of the network.
        states: Of each row, the state of the stock module.
        orders: For every axis, which channel comes first, second and so on.
    """
    sizes = axis_sizes(wires, states)
    moved = [dict(state) for state in states]
    for wire in wires:
        state = moved[wire.row]
        if wire.inputs != ("image",) and not wire.depthwise:
            starts = np.cumsum([0, *(sizes[axis] for axis in wire.inputs)])
            columns = torch.cat([orders[axis] + int(s) for axis, s in zip(wire.inputs, starts, strict=False)])
            state[wire.weight] = state[wire.weight][:, columns]
        if wire.output:
            names = (f"{wire.norm}{name}" for name in ("weight", "bias", "running_mean", "running_var"))
            for name in (wire.weight, *names):
                state[name] = state[name][orders[wire.output]]
    return moved


def mean_and_spread(factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what leaves SiLU behind a BatchNorm: (C,), (C,)."""
    between, probability = normal(factor, offset)
    leaving = F.silu(between)
    mean = probability @ leaving
    return mean, (probability @ (leaving - mean) ** 2).sqrt()


def normal(factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """What BatchNorm gives, by Gauss-Hermite quadrature: (Q, C) values of C channels, (Q,) their probabilities."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    return (
        offset + factor * factor.new_tensor(nodes)[:, None],
        factor.new_tensor(weights / math.sqrt(2 * math.pi)),
    )
