"""Elastic layers: convolutions whose weights are shared by all networks of a space.

Only the *operation* lives here: how a layer is cut out of the shared weights, given the channels, kernel and operator
to use. Who chooses them (a fixed architecture, a sampler, a gradient) is no business of these modules; they hold no
choice of their own. Each layer offers two views of one cut: `forward` computes with it, `state` names it as the stock
Ultralytics module would, so that a stand-alone network can be filled with it.

Cutting is done per *member*. The input of a convolution is often a concatenation, and of each of its members only the
first channels are active, so the active weights are a prefix of every member and not of the whole:

    members (maximum)   |  a a a a  |  b b b  |  c c c c  |        weight[:, all of these]
    members (active)    |  a a      |  b      |  (absent) |   ->   weight[:, a0 a1 b0]

The output is cut in the same way where it has members: in an attention block, queries, keys and values of every head.

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
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolov8_nas.space import Head, attention_heads

State = dict[str, Tensor]
"""Tensors by the names that the stock module gives them."""

Width = int | Sequence[int]
"""Channels of an output; of each of its members, where it has several."""

STRIDES = (8, 16, 32)
"""Pixels per cell of the levels P3, P4 and P5."""


def _spans(members: Sequence[int], active: Sequence[int]) -> list[tuple[int, int]]:
    """Where the first channels of each member lie, as (begin, end); members beyond the last one given are absent."""
    spans: list[tuple[int, int]] = []
    start = 0
    for maximum, channels in zip(members, active, strict=False):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], start + channels)  # the member before is whole, so the two are one span
        else:
            spans.append((start, start + channels))
        start += maximum
    return spans


def _cut(tensor: Tensor, members: Sequence[int], active: Sequence[int], dim: int) -> Tensor:
    """The first channels of each member along `dim`: a view where they are one span."""
    parts = [tensor.narrow(dim, begin, end - begin) for begin, end in _spans(members, active)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class ElasticBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of the first channels of each member.

    While the supernet trains it normalises with the statistics of the batch and keeps none: running statistics would
    be a blend over networks that see different activations, right for none of them (BigNAS, arXiv:2003.11142, section
    3.4). `batchnorm.recalibrate` turns `track_running_stats` on to fill the statistics of one network.

    Args:
        members: Maximum channels of each member.
    """

    def __init__(self, members: Sequence[int]) -> None:
        super().__init__(sum(members), eps=1e-3, momentum=0.03)  # as Ultralytics sets them in every network
        self.members = tuple(members)
        self.track_running_stats = False

    def forward(self, x_BCHW: Tensor, members: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Normalise the active channels of each member; C is the sum of `members`."""
        state = self.state(members)
        weight, bias, mean, var = state["weight"], state["bias"], state["running_mean"], state["running_var"]
        if not self.training or not self.track_running_stats:
            batch_only = self.training
            statistics = (None, None) if batch_only else (mean, var)
            return F.batch_norm(x_BCHW, statistics[0], statistics[1], weight, bias, batch_only, 0.0, self.eps)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        y_BCHW = F.batch_norm(x_BCHW, mean, var, weight, bias, True, momentum, self.eps)
        start = 0
        for begin, end in _spans(self.members, members):  # of several spans, what was updated is a copy
            self.running_mean[begin:end] = mean[start : start + end - begin]
            self.running_var[begin:end] = var[start : start + end - begin]
            start += end - begin
        return y_BCHW

    def state(self, members: Sequence[int]) -> State:
        """The active channels as the state of a stock `BatchNorm2d`: views where they are one span."""
        tensors = {name: getattr(self, name) for name in ("weight", "bias", "running_mean", "running_var")}
        return {name: _cut(tensor, self.members, members, 0) for name, tensor in tensors.items()}


class ElasticConv(nn.Module):
    """Convolution, batch normalisation and SiLU (Ultralytics' `Conv`) with elastic members, width and kernel.

    Args:
        members: Maximum channels of each member of the input.
        width: Maximum output channels; of each member of the output, where it has several.
        kernel: Largest kernel; smaller ones are its centre.
        stride: Pixels from one output to the next.
        dilation: Pixels from one tap of the kernel to the next.
        depthwise: One filter per channel; input and output channels are the same then.
        activation: Whether SiLU follows.
    """

    def __init__(
        self,
        members: Sequence[int],
        width: Width,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.outputs = _members(width)
        self.kernel = kernel
        self.stride = stride
        self.dilation = dilation
        self.depthwise = depthwise
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(sum(self.outputs), 1 if depthwise else sum(members), kernel, kernel))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # PyTorch's own default, and so Ultralytics'
        self.bn = ElasticBatchNorm(self.outputs)

    def cut(self, members: Sequence[int], width: Width, kernel: int) -> Tensor:
        """The active weights, of shape (output channels, input channels, kernel, kernel): a view where one exists.

        Args:
            members: Active channels of each member; members beyond the last one given are absent.
            width: Active output channels, in the form in which the layer's were given.
            kernel: Active kernel.
        """
        margin = (self.kernel - kernel) // 2
        taps = slice(margin, margin + kernel)
        weight = _cut(self.weight[:, :, taps, taps], self.outputs, _members(width), 0)
        return weight if self.depthwise else _cut(weight, self.members, members, 1)

    def forward(self, x_BCHW: Tensor, members: Sequence[int], width: Width, kernel: int) -> Tensor:
        """Apply the layer cut to `members`, `width` and `kernel`; C is the sum of `members`."""
        x_BCHW = F.conv2d(
            x_BCHW,
            self.cut(members, width, kernel),
            stride=self.stride,
            padding=self.dilation * (kernel // 2),
            dilation=self.dilation,
            groups=x_BCHW.shape[1] if self.depthwise else 1,
        )
        x_BCHW = self.bn(x_BCHW, _members(width))
        return F.silu(x_BCHW) if self.activation else x_BCHW

    def state(self, members: Sequence[int], width: Width, kernel: int) -> State:
        """The same cut as the state of a stock `Conv`."""
        return _joined({"conv.": {"weight": self.cut(members, width, kernel)}, "bn.": self.bn.state(_members(width))})


class ElasticBottleneck(nn.Module):
    """One bottleneck of a C2f block, with the operators that the space offers there.

    3x3 and 5x5 share their weights. Depthwise-separable and dilated operators have their own, because what they
    compute is no part of what a dense kernel computes. Fresh layers start at random, as every stock layer does: of a
    random dense kernel there is nothing to keep. A warm start approximates the 3x3 convolutions (`warmstart`).

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

    def layers(self, operator: str) -> list[tuple[str, ElasticConv, int]]:
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
        for _, layer, kernel in self.layers(operator):
            y_BCHW = layer(y_BCHW, (c,), c, kernel)
        return x_BCHW + y_BCHW if self.shortcut else y_BCHW

    def state(self, hidden: int, operator: str) -> State:
        """An operator as the state of its stock module, `Bottleneck` or a dilated `Conv`."""
        layers = self.layers(operator)
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


class ElasticAttention(nn.Module):
    """Self-attention over the cells of a map (Ultralytics' `Attention`) with elastic channels.

    C channels are as many heads as the stock module takes (`heads`), each of C / heads channels, so a narrower network
    may have fewer heads, and longer ones. Between the projections a channel is therefore named by head and place in
    it, and the cut keeps the first places of the first heads, while the channels that come and go are a plain prefix:

        heads (maximum)     |  a a a a  |  b b b b  |
        two heads of three  |  a a a    |  b b b    |
        one head of four    |  a a a a  |  (absent) |

    Args:
        channels: All numbers of channels, in and out, that can be chosen.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        c, heads = max(channels), max(map(self.heads, channels))
        size = max(n // self.heads(n) for n in channels)
        self.qkv = ElasticConv((c,), (size // 2, size // 2, size) * heads, 1, activation=False)
        self.pe = ElasticConv((size,) * heads, (size,) * heads, 3, depthwise=True, activation=False)
        self.proj = ElasticConv((size,) * heads, c, 1, activation=False)

    @staticmethod
    def heads(channels: int) -> int:
        """Heads of `channels` channels: those of an attention block whose inner half they are."""
        return attention_heads(2 * channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Let every cell look at every other; all of C is active, and as many channels leave."""
        batch, c, height, width = x_BCHW.shape
        queries_keys_values, values = self._members(c)
        heads, (key, _, size) = len(values), queries_keys_values[:3]
        # N: cells; D: channels of a head, of queries and keys half as many.
        qkv_BHDN = self.qkv(x_BCHW, (c,), queries_keys_values, 1).view(batch, heads, 2 * key + size, height * width)
        q_BHDN, k_BHDN, v_BHDN = qkv_BHDN.split([key, key, size], 2)
        scores_BHNN = (q_BHDN * key**-0.5).transpose(-2, -1) @ k_BHDN
        seen_BCHW = (v_BHDN @ scores_BHNN.softmax(-1).transpose(-2, -1)).view(x_BCHW.shape)
        place_BCHW = self.pe(v_BHDN.reshape(x_BCHW.shape), values, values, 3)
        return self.proj(seen_BCHW + place_BCHW, values, c, 1)  # type: ignore[no-any-return]

    def state(self, channels: int) -> State:
        """The cut for `channels` as the state of a stock `Attention`."""
        queries_keys_values, values = self._members(channels)
        qkv = self.qkv.state((channels,), queries_keys_values, 1)
        proj, pe = self.proj.state(values, channels, 1), self.pe.state(values, values, 3)
        return _joined({"qkv.": qkv, "proj.": proj, "pe.": pe})

    def _members(self, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Active channels of queries, keys and values of every head, and of the values alone."""
        heads = self.heads(channels)
        size = channels // heads
        return (size // 2, size // 2, size) * heads, (size,) * heads


class ElasticPSABlock(nn.Module):
    """Attention and a feed-forward layer, each with a shortcut (Ultralytics' `PSABlock`), with elastic channels.

    Args:
        channels: All numbers of channels, in and out, that can be chosen.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        c = max(channels)
        self.attn = ElasticAttention(channels)
        self.ffn = nn.ModuleList((ElasticConv((c,), 2 * c, 1), ElasticConv((2 * c,), c, 1, activation=False)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply both; all of C is active, and as many channels leave."""
        c = x_BCHW.shape[1]
        expand, reduce = self.ffn
        x_BCHW = x_BCHW + self.attn(x_BCHW)
        return x_BCHW + reduce(expand(x_BCHW, (c,), 2 * c, 1), (2 * c,), c, 1)  # type: ignore[no-any-return]

    def state(self, channels: int) -> State:
        """The cut for `channels` as the state of a stock `PSABlock`."""
        expand, reduce = (layer for layer in self.ffn if isinstance(layer, ElasticConv))
        parts = {
            "attn.": self.attn.state(channels),
            "ffn.0.": expand.state((channels,), 2 * channels, 1),
            "ffn.1.": reduce.state((2 * channels,), channels, 1),
        }
        return _joined(parts)


class ElasticPSA(nn.Module):
    """The attention block (Ultralytics' `C2PSA`): one half of the channels passes attention, the other goes around it.

    Args:
        widths: All widths, in and out, that can be chosen.
        depth: Maximum number of PSA blocks.
    """

    def __init__(self, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        width = max(widths)
        half = width // 2
        self.split = nn.ModuleList(ElasticConv((width,), half, 1) for _ in range(2))
        self.layers = nn.ModuleList(ElasticPSABlock([w // 2 for w in widths]) for _ in range(depth))
        self.merge = ElasticConv((half, half), width, 1)

    def forward(self, x_BCHW: Tensor, depth: int) -> Tensor:
        """Apply the first `depth` PSA blocks; all of C is active, and as many channels leave."""
        c = x_BCHW.shape[1]
        around_BCHW, y_BCHW = (half(x_BCHW, (c,), c // 2, 1) for half in self.split)
        for layer in self.layers[:depth]:
            y_BCHW = layer(y_BCHW)
        return self.merge(torch.cat((around_BCHW, y_BCHW), 1), (c // 2, c // 2), c, 1)  # type: ignore[no-any-return]

    def state(self, width: int, depth: int) -> State:
        """The cut for `width` and `depth` as the state of a stock `C2PSA`."""
        half = width // 2
        halves = [conv.state((width,), half, 1) for conv in self.split if isinstance(conv, ElasticConv)]
        parts = {
            "cv1.": {name: torch.cat([state[name] for state in halves]) for name in halves[0]},
            "cv2.": self.merge.state((half, half), width, 1),
        }
        for i, layer in enumerate(self.layers[:depth]):
            assert isinstance(layer, ElasticPSABlock)
            parts[f"m.{i}."] = layer.state(half)
        return _joined(parts)


def first_bins(sides: Tensor, bins: int) -> Tensor:
    """Distributions over box sides with fewer bins: what is beyond the last bin is as long as that.

    Args:
        sides: Logits (B, 4, bins, ...).
        bins: How many are wanted, at most as many as there are.

    Returns:
        Logits (B, 4, `bins`, ...).
    """
    last = bins - 1
    return torch.cat([sides[:, :, :last], sides[:, :, last:].logsumexp(2, keepdim=True)], 2)


class ElasticPrediction(nn.Module):
    """The closing 1x1 convolution of a head branch: elastic input and outputs, bias, no normalisation.

    Args:
        channels: Maximum input channels.
        outputs: Maximum outputs of each member: bins of each side of a box, or the classes.
    """

    def __init__(self, channels: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        stock = nn.Conv2d(channels, sum(outputs), 1)
        assert stock.bias is not None
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, x_BCHW: Tensor, outputs: Sequence[int]) -> Tensor:
        """Predict the first outputs of each member from C channels, at most as many as the layer has."""
        state = self.state(x_BCHW.shape[1], outputs)
        return F.conv2d(x_BCHW, state["weight"], state["bias"])

    def state(self, channels: int, outputs: Sequence[int]) -> State:
        """The cut for `channels` input channels and the first outputs of each member as a stock convolution's state."""
        weight = _cut(self.weight[:, :channels], self.outputs, outputs, 0)
        return {"weight": weight, "bias": _cut(self.bias, self.outputs, outputs, 0)}


class ElasticBranch(nn.Module):
    """One branch of the head at one level: two layers of 3x3 and the prediction.

    Args:
        channels: Maximum input channels.
        hidden: Maximum hidden channels.
        outputs: What is predicted per cell, by members (see `ElasticPrediction`).
        depthwise: Whether a layer is depthwise-separable (depthwise 3x3, then 1x1), or else a dense 3x3 convolution.
    """

    def __init__(self, channels: int, hidden: int, outputs: Sequence[int], depthwise: bool = False) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.first, self.second = (nn.ModuleList(self._layer(c, hidden)) for c in (channels, hidden))
        self.prediction = ElasticPrediction(hidden, outputs)

    def _layer(self, channels: int, hidden: int) -> list[ElasticConv]:
        if not self.depthwise:
            return [ElasticConv((channels,), hidden, 3)]
        return [ElasticConv((channels,), channels, 3, depthwise=True), ElasticConv((channels,), hidden, 1)]

    def layers(self) -> Iterator[tuple[str, ElasticConv]]:
        """(name in the stock module, convolution), in order; a depthwise one keeps its channels."""
        for i, layer in enumerate((self.first, self.second)):
            for j, conv in enumerate(layer):
                assert isinstance(conv, ElasticConv)
                yield f"{i}.{j}." if self.depthwise else f"{i}.", conv

    def forward(self, x_BCHW: Tensor, hidden: int, outputs: Sequence[int]) -> Tensor:
        """Predict `outputs` with `hidden` hidden channels."""
        for _, conv in self.layers():
            c = x_BCHW.shape[1]
            x_BCHW = conv(x_BCHW, (c,), c if conv.depthwise else hidden, conv.kernel)
        return self.prediction(x_BCHW, outputs)  # type: ignore[no-any-return]

    def state(self, channels: int, hidden: int, outputs: Sequence[int]) -> State:
        """The cut for `channels`, `hidden` and `outputs` as the state of the stock sequence of three."""
        parts: dict[str, State] = {}
        for name, conv in self.layers():
            width = channels if conv.depthwise else hidden
            parts[name] = conv.state((channels,), width, conv.kernel)
            channels = width
        return _joined({**parts, "2.": self.prediction.state(hidden, outputs)})


class ElasticDetect(nn.Module):
    """The Detect head. Its hidden widths follow the active width of P3 and the bins by the stock formulas.

    A head with fewer bins has the first ones of each side. The two forms of the class branch share nothing.

    Args:
        channels: Maximum channels of P3, P4 and P5.
        num_classes: Number of classes.
        heads: All heads that can be chosen, a stock one among them.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, heads: Sequence[Head]) -> None:
        super().__init__()
        self.num_classes = num_classes
        largest = max(heads, key=lambda head: head.reg_max)
        box, cls = largest.hidden(channels[0], num_classes)
        boxes = [ElasticBranch(c, box, (largest.reg_max,) * 4) for c in channels]
        self.cv2 = nn.ModuleList(boxes)
        self.cv3 = nn.ModuleList(ElasticBranch(c, cls, (num_classes,)) for c in channels)
        if any(head.classes == "dwsep3" for head in heads):
            self.light = nn.ModuleList(ElasticBranch(c, cls, (num_classes,), depthwise=True) for c in channels)
        # Ultralytics' start: boxes of some width, and scores that expect five objects in an image of 640 pixels.
        for branch in boxes:
            nn.init.constant_(branch.prediction.bias, 2.0)
        for classes in dict.fromkeys(head.classes for head in heads):
            for stride, branch in zip(STRIDES, self.class_branches(classes), strict=True):
                nn.init.constant_(branch.prediction.bias, math.log(5 / num_classes / (640 / stride) ** 2))

    def box_branches(self) -> list[ElasticBranch]:
        """The box branches of P3, P4 and P5."""
        return [branch for branch in self.cv2 if isinstance(branch, ElasticBranch)]

    def class_branches(self, classes: str) -> list[ElasticBranch]:
        """The class branches of P3, P4 and P5 in one of their forms (`space.CLASS_BRANCHES`)."""
        branches = self.light if classes == "dwsep3" else self.cv3
        return [branch for branch in branches if isinstance(branch, ElasticBranch)]

    def forward(self, feats: Sequence[Tensor], head: Head) -> dict[str, Tensor | list[Tensor]]:
        """Raw predictions in the form that Ultralytics' head gives and its loss takes.

        Args:
            feats: The maps of P3, P4 and P5, each BCHW.
            head: The active head.

        Returns:
            `boxes` (B, 4 * reg_max, A), `scores` (B, classes, A) as logits, and `feats` as they came.
        """

        def predict(branches: Sequence[ElasticBranch], hidden: int, outputs: Sequence[int]) -> Tensor:
            levels = zip(branches, feats, strict=True)
            return torch.cat([branch(x_BCHW, hidden, outputs).flatten(2) for branch, x_BCHW in levels], 2)

        box, cls = head.hidden(feats[0].shape[1], self.num_classes)
        return {
            "boxes": predict(self.box_branches(), box, (head.reg_max,) * 4),
            "scores": predict(self.class_branches(head.classes), cls, (self.num_classes,)),
            "feats": list(feats),
        }

    def state(self, channels: Sequence[int], head: Head) -> State:
        """The cut for the channels of P3, P4 and P5 as the state of a stock `Detect`."""
        parts: dict[str, State] = {}
        box, cls = head.hidden(channels[0], self.num_classes)
        for name, branches, hidden, outputs in (
            ("cv2", self.box_branches(), box, (head.reg_max,) * 4),
            ("cv3", self.class_branches(head.classes), cls, (self.num_classes,)),
        ):
            for level, (c, branch) in enumerate(zip(channels, branches, strict=True)):
                parts[f"{name}.{level}."] = branch.state(c, hidden, outputs)
        return _joined(parts)


def _members(width: Width) -> Sequence[int]:
    return (width,) if isinstance(width, int) else width


def _joined(parts: Mapping[str, State]) -> State:
    return {prefix + name: tensor for prefix, state in parts.items() for name, tensor in state.items()}
