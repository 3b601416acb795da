"""The supernet as a function of choices that can be differentiated.

Layers run at full width, and what is not chosen is multiplied by 0: channels beyond a width (FBNetV2,
arXiv:2004.05565), bottlenecks beyond the depth, every operator of a bottleneck but one. With choices that are one-hot
the result is what `Supernet.forward` computes for that network, batch statistics included, as BatchNorm treats each
channel alone; and each weight of a choice gets the derivative of the loss by the presence of its option. Of the bins of
the box branch it is the derivative by the hidden width that follows from them: bins themselves are there or not.

What has the weight 0 passes no gradient on to what is before it, so it is computed without a graph: an operator that is
not chosen costs a forward pass and nothing more.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yolov8_nas.space import BLOCKS, CONVS, LEVELS, Block, Head
from yolov8_nas.supernet.elastic import (
    ElasticBottleneck,
    ElasticBranch,
    ElasticConv,
    ElasticDetect,
    ElasticPSA,
    ElasticSPPF,
)
from yolov8_nas.supernet.supernet import Step, Supernet, network_steps

Options = Mapping[str, tuple[Any, ...]]
"""The options of each dimension, by its name."""

Choices = Mapping[str, Tensor]
"""The weights of the options of each dimension, by its name: (options,), one-hot in value."""


class RelaxedSupernet:
    """A supernet that computes one network, and what its derivative by every choice takes; call it with images.

    Args:
        supernet: The weights. A frozen copy of them is used, which normalises with the statistics of the batch.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = copy.deepcopy(supernet).requires_grad_(False).train().to(memory_format=torch.channels_last)
        self.options: Options = {dimension.name: dimension.options for dimension in supernet.space.dimensions}
        self._steps = network_steps(supernet.space.largest())
        self._prefixes = {name: (of, self._prefix(channels)) for name, (of, channels) in self._widths().items()}

    def __call__(self, x_BCHW: Tensor, choices: Choices) -> dict[str, Tensor | list[Tensor]]:
        """Raw head outputs of the chosen network, as `Supernet.forward` gives them.

        Args:
            x_BCHW: Images, RGB in 0..1, height and width multiples of 32.
            choices: One option of each dimension of the space.
        """
        masks = {}
        for name, (dimensions, prefix) in self._prefixes.items():
            weights = choices[dimensions[0]]
            for other in dimensions[1:]:
                weights = torch.outer(weights, choices[other]).flatten()
            masks[name] = (weights @ prefix).view(1, -1, 1, 1)
        chosen = {name: self.options[name][int(weights.argmax())] for name, weights in choices.items()}
        network = _Network(self.options, choices, chosen, masks)
        outputs: list[Any] = []
        for step in self._steps:
            inputs = [outputs[i] for i in step.sources] or [x_BCHW]
            outputs.append(self._run(step, inputs, network))
        return outputs[-1]  # type: ignore[no-any-return]

    def _run(self, step: Step, inputs: list[Tensor], network: _Network) -> Any:
        part, _, row = step.name.partition(".")
        match step.row[2]:
            case "Concat":
                if row:  # of a C2f block: its two halves, and its bottlenecks
                    inputs[2:] = [x * network.presence(part, i) for i, x in enumerate(inputs[2:])]
                return torch.cat(inputs, 1)
            case "nn.Upsample":
                return F.interpolate(inputs[0], scale_factor=2.0, mode="nearest")
        layer = self.supernet.get_submodule(step.name)
        match layer:
            case ElasticConv():
                return _whole(layer, inputs[0]) * network.masks[f"{part}.hidden" if row.startswith("split") else part]
            case ElasticBottleneck():
                return _bottleneck(layer, inputs[0], part, int(row.removeprefix("layers.")), network)
            case ElasticSPPF():
                return _sppf(layer, inputs[0], network)
            case ElasticPSA():
                return _attention(layer, inputs[0], network)
            case ElasticDetect():
                levels = [network.masks[name] for name in LEVELS]
                bins = (network.chosen["detect.reg_max"],) * 4
                boxes = _predictions(layer.box_branches(), inputs, levels, network.masks["detect.box"], bins)

                def scores(classes: str) -> Tensor:
                    branches, outputs = layer.class_branches(classes), (layer.num_classes,)
                    return _predictions(branches, inputs, levels, network.masks["detect.cls"], outputs)

                return {"boxes": boxes, "scores": network.mixed("detect.classes", scores), "feats": inputs}
        raise AssertionError(step)

    def _widths(self) -> dict[str, tuple[tuple[str, ...], list[int]]]:
        """Of every width that a mask cuts, the dimensions that settle it, and the channels by their options."""
        options = self.options
        widths: dict[str, tuple[tuple[str, ...], list[int]]] = {name: ((name,), [*options[name]]) for name in CONVS}
        widths |= {name: ((f"{name}.width",), [*options[f"{name}.width"]]) for name in (*BLOCKS, "sppf")}
        for name in BLOCKS:
            hidden = f"{name}.width", f"{name}.expansion"
            pairs = itertools.product(*(options[dimension] for dimension in hidden))
            widths[f"{name}.hidden"] = hidden, [Block(1, width, expansion, "").hidden for width, expansion in pairs]
        widths["sppf.hidden"] = ("backbone_p5.width",), [width // 2 for width in options["backbone_p5.width"]]
        detect = self.supernet.get_submodule("detect")
        assert isinstance(detect, ElasticDetect)
        pairs = itertools.product(options["topdown_p3.width"], options["detect.reg_max"])
        boxes = [Head(reg_max=bins).hidden(p3, detect.num_classes)[0] for p3, bins in pairs]
        classes = [Head().hidden(p3, detect.num_classes)[1] for p3 in options["topdown_p3.width"]]
        widths["detect.box"] = ("topdown_p3.width", "detect.reg_max"), boxes
        widths["detect.cls"] = ("topdown_p3.width",), classes
        return widths

    def _prefix(self, channels: Sequence[int]) -> Tensor:
        """For each number of channels a row that starts with so many ones: (options, largest)."""
        parameter = next(self.supernet.parameters())
        places = torch.arange(max(channels), device=parameter.device)
        return (places < torch.tensor(channels, device=parameter.device)[:, None]).to(parameter.dtype)


@dataclass(frozen=True, eq=False)
class _Network:
    """The choices of one pass.

    Attributes:
        options: The options of each dimension.
        choices: Their weights.
        chosen: The option of each dimension whose weight is 1.
        masks: For each elastic width the weights of its channels: (1, C, 1, 1).
    """

    options: Options
    choices: Choices
    chosen: Mapping[str, Any]
    masks: Mapping[str, Tensor]

    def presence(self, block: str, index: int) -> Tensor:
        """Weight of the depths at which a C2f block has the bottleneck `index`."""
        weights, depths = self.choices[f"{block}.depth"], self.options[f"{block}.depth"]
        return weights[[i for i, depth in enumerate(depths) if depth > index]].sum()

    def mixed(self, dimension: str, branch: Callable[[Any], Tensor]) -> Tensor:
        """The weighted sum of what `branch` gives for each option, with a graph for the chosen one only."""
        outputs = []
        for option, weight in zip(self.options[dimension], self.choices[dimension], strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and option == self.chosen[dimension]):
                output = branch(option)
            outputs.append(weight * output)
        total: Tensor = sum(outputs[1:], start=outputs[0])
        return total


def _whole(layer: ElasticConv, x_BCHW: Tensor, kernel: int | None = None) -> Tensor:
    """A layer at full width."""
    y_BCHW: Tensor = layer(x_BCHW, layer.members, layer.outputs, kernel or layer.kernel)
    return y_BCHW


def _bottleneck(layer: ElasticBottleneck, x_BCHW: Tensor, block: str, index: int, network: _Network) -> Tensor:
    def branch(operator: str) -> Tensor:
        y_BCHW = x_BCHW
        for _, conv, kernel in layer.layers(operator):
            y_BCHW = _whole(conv, y_BCHW, kernel) * network.masks[f"{block}.hidden"]
        return y_BCHW

    operator = f"{block}.operator"
    if index < network.chosen[f"{block}.depth"]:
        y_BCHW = network.mixed(operator, branch)
    else:  # absent: its output counts for the derivative by depth only
        with torch.no_grad():
            y_BCHW = branch(network.chosen[operator])
            x_BCHW = x_BCHW.detach()
    return x_BCHW + y_BCHW if layer.shortcut else y_BCHW


def _sppf(layer: ElasticSPPF, x_BCHW: Tensor, network: _Network) -> Tensor:
    first_BCHW = _whole(layer.cv1, x_BCHW) * network.masks["sppf.hidden"]

    def branch(kernel: int) -> Tensor:
        maps = [first_BCHW]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], kernel, 1, kernel // 2))
        return torch.cat(maps, 1)

    return _whole(layer.cv2, network.mixed("sppf.kernel", branch)) * network.masks["sppf"]


def _attention(layer: ElasticPSA, x_BCHW: Tensor, network: _Network) -> Tensor:
    """Attention at the chosen width: how channels make up heads depends on it. Channels beyond go around it."""
    active_BCHW, beyond_BCHW = x_BCHW.tensor_split([network.chosen["sppf.width"]], 1)

    def branch(depth: int) -> Tensor:
        return torch.cat([layer(active_BCHW, depth), beyond_BCHW], 1) if depth else x_BCHW

    return network.mixed("attention", branch)


def _predictions(
    branches: Sequence[ElasticBranch],
    feats: Sequence[Tensor],
    masks: Sequence[Tensor],
    hidden: Tensor,
    outputs: Sequence[int],
) -> Tensor:
    """One kind of the head's predictions on all levels, whose channels have `masks`: (B, outputs, A)."""
    levels = []
    for branch, y_BCHW, mask in zip(branches, feats, masks, strict=True):
        for _, conv in branch.layers():
            mask = mask if conv.depthwise else hidden
            y_BCHW = _whole(conv, y_BCHW) * mask
        levels.append(branch.prediction(y_BCHW, outputs).flatten(2))
    return torch.cat(levels, 2)
