"""Elastic layers: convolutions whose weights are shared by all networks of a space.

Only the *operation* lives here: how a layer is cut out of the shared weights, given the channels, kernel and operator
to use. Who chooses them (a fixed architecture, a sampler, a gradient) is no business of these modules; they hold no
choice of their own. Each layer offers two views of one cut: `forward` computes with it, `state` names it as the stock
Ultralytics module would, so that a stand-alone network can be filled with it.

Cutting is done per *member*. The input of a convolution is often a concatenation, and of each of its members only the
first channels are active, so the active weights are a prefix of every member and not of the whole:

    members (maximum)   |  a a a a  |  b b b  |  c c c c  |        weight[:, all of these]
    members (active)    |  a a      |  b      |  (absent) |   ->   weight[:, a0 a1 b0]

A square kernel is the centre of the largest one that the layer has:

    . . . . .
    . 3 3 3 .
    . 3 3 3 .      3x3 as the centre of the shared 5x5
    . 3 3 3 .
    . . . . .

Shapes are given as B (batch), C (channels), H, W (pixels) and A (anchors of all levels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]
"""Tensors by the names that the stock module gives them."""

REG_MAX = 16
"""Bins of the distribution of each side of a box: Ultralytics' value for YOLOv8."""

STRIDES = (8, 16, 32)
"""Pixels per cell of the levels P3, P4 and P5."""


class ElasticBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of the first channels.

    While the supernet trains it normalises with the statistics of the batch and keeps none: running statistics would
    be a blend over networks that see different activations, right for none of them (BigNAS, arXiv:2003.11142, section
    3.4). `batchnorm.recalibrate` turns `track_running_stats` on to fill the statistics of one network.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.03)  # as Ultralytics sets them in every network
        self.track_running_stats = False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise C channels, at most as many as the layer has."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        c = x_BCHW.shape[1]
        mean: Tensor | None = self.running_mean[:c]
        var: Tensor | None = self.running_var[:c]
        momentum = 0.0
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        elif self.training:
            mean = var = None
        return F.batch_norm(x_BCHW, mean, var, self.weight[:c], self.bias[:c], self.training, momentum, self.eps)


class ElasticConv(nn.Module):
    """Convolution, batch normalisation and SiLU (Ultralytics' `Conv`) with elastic members, width and kernel.

    Args:
        members: Maximum channels of each member of the input.
        width: Maximum output channels.
        kernel: Largest kernel; smaller ones are its centre.
        stride: Pixels from one output to the next.
        dilation: Pixels from one tap of the kernel to the next.
        depthwise: One filter per channel; input and output channels are the same then.
    """

    def __init__(
        self,
        members: Sequence[int],
        width: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.kernel = kernel
        self.stride = stride
        self.dilation = dilation
        self.depthwise = depthwise
        self.weight = nn.Parameter(torch.empty(width, 1 if depthwise else sum(members), kernel, kernel))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # PyTorch's own default, and so Ultralytics'
        self.bn = ElasticBatchNorm(width)

    def cut(self, members: Sequence[int], width: int, kernel: int) -> Tensor:
        """The active weights, of shape (width, active input channels, kernel, kernel): a view where one exists.

        Args:
            members: Active channels of each member; members beyond the last one given are absent.
            width: Active output channels.
            kernel: Active kernel.
        """
        margin = (self.kernel - kernel) // 2
        taps = slice(margin, margin + kernel)
        weight = self.weight[:width, :, taps, taps]
        if self.depthwise:
            return weight
        spans: list[tuple[int, int]] = []
        start = 0
        for maximum, active in zip(self.members, members, strict=False):
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], start + active)  # the member before is whole, so the two are one span
            else:
                spans.append((start, start + active))
            start += maximum
        if len(spans) == 1:
            return weight[:, spans[0][0] : spans[0][1]]
        return torch.cat([weight[:, begin:end] for begin, end in spans], 1)

    def forward(self, x_BCHW: Tensor, members: Sequence[int], width: int, kernel: int) -> Tensor:
        """Apply the layer cut to `members`, `width` and `kernel`; C is the sum of `members`."""
        x_BCHW = F.conv2d(
            x_BCHW,
            self.cut(members, width, kernel),
            stride=self.stride,
            padding=self.dilation * (kernel // 2),
            dilation=self.dilation,
            groups=width if self.depthwise else 1,
        )
        return F.silu(self.bn(x_BCHW))

    def state(self, members: Sequence[int], width: int, kernel: int) -> State:
        """The same cut as the state of a stock `Conv`."""
        bn = self.bn
        assert bn.running_mean is not None and bn.running_var is not None
        return {
            "conv.weight": self.cut(members, width, kernel),
            "bn.weight": bn.weight[:width],
            "bn.bias": bn.bias[:width],
            "bn.running_mean": bn.running_mean[:width],
            "bn.running_var": bn.running_var[:width],
        }


class ElasticBottleneck(nn.Module):
    """One bottleneck of a C2f block, with the operators that the space offers there.

    3x3 and 5x5 share their weights. Depthwise-separable and dilated operators have their own, because what they
    compute is no part of what a dense kernel computes.

    Args:
        hidden: Maximum channels, in and out.
        operators: Those of `space.OPERATORS` that can be chosen.
        shortcut: Whether the input is added to the output.
    """

    def __init__(self, hidden: int, operators: Sequence[str], shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        kernels: dict[str, list[int]] = {"conv": [], "dwsep": [], "dilated": []}
        for operator in operators:
            kernels[operator[:-1]].append(int(operator[-1]))
        if kernels["conv"]:
            largest = max(kernels["conv"])
            self.conv = nn.ModuleList(ElasticConv((hidden,), hidden, largest) for _ in range(2))
        if kernels["dwsep"]:
            pointwise = ElasticConv((hidden,), hidden, 1)
            depthwise = ElasticConv((hidden,), hidden, max(kernels["dwsep"]), depthwise=True)
            self.dwsep = nn.ModuleList((pointwise, depthwise))
        if kernels["dilated"]:
            self.dilated = ElasticConv((hidden,), hidden, 3, dilation=2)

    def _layers(self, operator: str) -> list[tuple[str, ElasticConv, int]]:
        """(name in the stock module, layer, kernel) of an operator."""
        kernel = int(operator[-1])
        if operator == "dilated3":
            return [("", self.dilated, kernel)]
        kind = operator[:-1]
        first, second = getattr(self, kind)
        return [("cv1.", first, 1 if kind == "dwsep" else kernel), ("cv2.", second, kernel)]

    def forward(self, x_BCHW: Tensor, operator: str) -> Tensor:
        """Apply an operator; all of C is active, and as many channels leave."""
        y_BCHW, c = x_BCHW, x_BCHW.shape[1]
        for _, layer, kernel in self._layers(operator):
            y_BCHW = layer(y_BCHW, (c,), c, kernel)
        return x_BCHW + y_BCHW if self.shortcut else y_BCHW

    def state(self, hidden: int, operator: str) -> State:
        """An operator as the state of its stock module, `Bottleneck` or a dilated `Conv`."""
        layers = self._layers(operator)
        return _joined({name: layer.state((hidden,), hidden, kernel) for name, layer, kernel in layers})


class ElasticSPPF(nn.Module):
    """Spatial pyramid pooling (Ultralytics' `SPPF`) with elastic input, output and pooling kernel.

    Args:
        channels: Maximum input channels. The hidden width is half of the input, as in the stock module.
        width: Maximum output channels.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.cv1 = ElasticConv((channels,), channels // 2, 1)
        self.cv2 = ElasticConv((channels // 2,) * 4, width, 1)

    def forward(self, x_BCHW: Tensor, width: int, kernel: int) -> Tensor:
        """Pool with `kernel` three times over, and close with `width` output channels."""
        c = x_BCHW.shape[1]
        maps = [self.cv1(x_BCHW, (c,), c // 2, 1)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], kernel, 1, kernel // 2))
        return self.cv2(torch.cat(maps, 1), (c // 2,) * 4, width, 1)  # type: ignore[no-any-return]

    def state(self, channels: int, width: int) -> State:
        """The cut for `channels` input channels as the state of a stock `SPPF`."""
        half = channels // 2
        return _joined({"cv1.": self.cv1.state((channels,), half, 1), "cv2.": self.cv2.state((half,) * 4, width, 1)})


class ElasticPrediction(nn.Module):
    """The closing 1x1 convolution of a head branch: elastic input, all outputs, bias, no normalisation."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        stock = nn.Conv2d(channels, outputs, 1)
        assert stock.bias is not None
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Predict from C channels, at most as many as the layer has."""
        return F.conv2d(x_BCHW, self.weight[:, : x_BCHW.shape[1]], self.bias)

    def state(self, channels: int) -> State:
        """The cut for `channels` input channels as the state of a stock convolution."""
        return {"weight": self.weight[:, :channels], "bias": self.bias}


class ElasticBranch(nn.Module):
    """One branch of the head at one level: two 3x3 convolutions and the prediction.

    Args:
        channels: Maximum input channels.
        hidden: Maximum hidden channels.
        outputs: What is predicted per cell.
    """

    def __init__(self, channels: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = ElasticConv((channels,), hidden, 3)
        self.second = ElasticConv((hidden,), hidden, 3)
        self.prediction = ElasticPrediction(hidden, outputs)

    def forward(self, x_BCHW: Tensor, hidden: int) -> Tensor:
        """Predict with `hidden` hidden channels."""
        y_BCHW = self.first(x_BCHW, (x_BCHW.shape[1],), hidden, 3)
        return self.prediction(self.second(y_BCHW, (hidden,), hidden, 3))  # type: ignore[no-any-return]

    def state(self, channels: int, hidden: int) -> State:
        """The cut for `channels` and `hidden` as the state of the stock sequence of three."""
        first, second = self.first.state((channels,), hidden, 3), self.second.state((hidden,), hidden, 3)
        return _joined({"0.": first, "1.": second, "2.": self.prediction.state(hidden)})


class ElasticDetect(nn.Module):
    """YOLOv8's Detect head. Its hidden widths follow the active width of P3 by the stock formulas.

    Args:
        channels: Maximum channels of P3, P4 and P5.
        num_classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        box, cls = self.hidden(channels[0])
        boxes = [ElasticBranch(c, box, 4 * REG_MAX) for c in channels]
        scores = [ElasticBranch(c, cls, num_classes) for c in channels]
        # Ultralytics' start: boxes of some width, and scores that expect five objects in an image of 640 pixels.
        for stride, box_branch, cls_branch in zip(STRIDES, boxes, scores, strict=True):
            nn.init.constant_(box_branch.prediction.bias, 2.0)
            nn.init.constant_(cls_branch.prediction.bias, math.log(5 / num_classes / (640 / stride) ** 2))
        self.cv2, self.cv3 = nn.ModuleList(boxes), nn.ModuleList(scores)

    def hidden(self, p3: int) -> tuple[int, int]:
        """Hidden channels of the box and the class branches, given P3's channels (Ultralytics' `Detect`)."""
        return max(16, p3 // 4, 4 * REG_MAX), max(p3, min(self.num_classes, 100))

    def forward(self, feats: Sequence[Tensor]) -> dict[str, Tensor | list[Tensor]]:
        """Raw predictions in the form that Ultralytics' head gives and its loss takes.

        Args:
            feats: The maps of P3, P4 and P5, each BCHW.

        Returns:
            `boxes` (B, 4 * REG_MAX, A), `scores` (B, classes, A) as logits, and `feats` as they came.
        """

        def predict(branches: nn.ModuleList, hidden: int) -> Tensor:
            levels = zip(branches, feats, strict=True)
            return torch.cat([branch(x_BCHW, hidden).flatten(2) for branch, x_BCHW in levels], 2)

        box, cls = self.hidden(feats[0].shape[1])
        return {"boxes": predict(self.cv2, box), "scores": predict(self.cv3, cls), "feats": list(feats)}

    def state(self, channels: Sequence[int]) -> State:
        """The cut for the channels of P3, P4 and P5 as the state of a stock `Detect`."""
        parts: dict[str, State] = {}
        for name, branches, hidden in zip(("cv2", "cv3"), (self.cv2, self.cv3), self.hidden(channels[0]), strict=True):
            for level, (c, branch) in enumerate(zip(channels, branches, strict=True)):
                assert isinstance(branch, ElasticBranch)
                parts[f"{name}.{level}."] = branch.state(c, hidden)
        return _joined(parts)


def _joined(parts: Mapping[str, State]) -> State:
    return {prefix + name: tensor for prefix, state in parts.items() for name, tensor in state.items()}
