"""Operators that stock YOLOv8 lacks, started from what it has.

The other operators of a bottleneck approximate its two 3x3 convolutions, and attention lets everything pass nearly
unchanged. The depthwise-separable class branch of the head approximates the dense one. A network that gets one of them
in the place of what it was trained with begins near where it was.
"""

from __future__ import annotations

import itertools
from typing import Final

import torch
from torch import Tensor

from yolov8_nas.supernet.channels import EPS, mean_and_spread, normal
from yolov8_nas.supernet.elastic import State


def linearised(first: State, second: State) -> Tensor:
    """The 5x5 kernel that is closest to two 3x3 convolutions with BatchNorm and SiLU between them.

    A nonlinearity between Gaussian inputs and outputs is best replaced by a factor, the mean of its derivative
    (Bussgang's theorem; J. J. Bussgang, Crosscorrelation functions of amplitude-distorted Gaussian signals, 1952).
    With one factor per channel in between, the two kernels are convolved with each other into one.

    Args:
        first: State of the first stock `Conv`, (M, I, 3, 3).
        second: Weights of the second one, (O, M, 3, 3), in its state.

    Returns:
        (O, I, 5, 5).
    """
    factor = _slope(first["bn.weight"], first["bn.bias"]) * first["bn.weight"] / (first["bn.running_var"] + EPS).sqrt()
    inner, outer = first["conv.weight"], second["conv.weight"] * factor[:, None, None]
    kernel = inner.new_zeros(len(outer), inner.shape[1], 5, 5)
    for y, x in itertools.product(range(3), repeat=2):
        kernel[:, :, y : y + 3, x : x + 3] += torch.tensordot(outer[:, :, y, x], inner, 1)
    return kernel


def separable(kernel: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The depthwise-separable convolution that is closest to a dense one in least squares.

    Pointwise, then depthwise: each output is a product of weights per input and weights per tap, a matrix of rank one.
    The closest one is the first term of the singular value decomposition (Eckart and Young, 1936). Its sign is chosen
    so that taps sum to something positive, since the SiLU in between lets positive values pass.

    Args:
        kernel: The dense kernel (O, I, K, K); its centre counts.
        size: Side of the depthwise kernel, K at most.

    Returns:
        Weights per input (O, I, 1, 1), and per tap (O, 1, size, size), the latter of unit norm.
    """
    margin = (kernel.shape[-1] - size) // 2
    taps = slice(margin, margin + size)
    matrix = kernel[:, :, taps, taps].flatten(2)
    per_tap = torch.linalg.eigh(matrix.transpose(1, 2) @ matrix).eigenvectors[..., -1:]
    per_tap = torch.where(per_tap.sum(1, keepdim=True) < 0, -per_tap, per_tap)
    return (matrix @ per_tap)[..., None], per_tap.view(-1, 1, size, size)


LIFT: Final = 2.0
"""Offset of the BatchNorm within a depthwise-separable layer of the head, in standard deviations of its inputs: SiLU is
nearly linear there."""


def mixed(layer: State, spread: Tensor) -> State:
    """The depthwise-separable layer of the head that is closest to a dense one: depthwise, then pointwise.

    It has one filter per input channel, whose outputs are mixed. So what all outputs read of an input channel is a
    matrix of rank one, weights per output times weights per tap: the other way round than in `separable`.

    Args:
        layer: State of the dense stock `Conv`, with weights (O, I, 3, 3).
        spread: Standard deviation of each input channel: (I,).

    Returns:
        State of the stock sequence of `DWConv` and `Conv`.
    """
    per_output, per_tap = separable(layer["conv.weight"].transpose(0, 1), 3)
    one = torch.ones_like(spread)
    factor = (spread**2 + EPS).sqrt() / _slope(one, LIFT * one)
    return {
        "0.conv.weight": per_tap,
        "0.bn.weight": one,
        "0.bn.bias": LIFT * one,
        "0.bn.running_mean": torch.zeros_like(one),
        "0.bn.running_var": spread**2,
        "1.conv.weight": per_output.transpose(0, 1) * factor[:, None, None],
        **{f"1.bn.{name}": layer[f"bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")},
    }


def _slope(factor: Tensor, offset: Tensor) -> Tensor:
    """Mean of the derivative of SiLU behind a BatchNorm: (C,)."""
    between, probability = normal(factor, offset)
    sigmoid = between.sigmoid()
    return probability @ (sigmoid * (1 + between * (1 - sigmoid)))


def dilated(kernel: Tensor) -> Tensor:
    """The 3x3 kernel of dilation 2 that stands for a 5x5 one.

    It has every other tap. The weight of a tap that it lacks goes to its neighbours in equal parts, so that the two
    give the same on all inputs that are linear from one tap to the next.

    Args:
        kernel: (O, I, 5, 5).

    Returns:
        (O, I, 3, 3).
    """
    share = kernel.new_tensor([[1, 0.5, 0, 0, 0], [0, 0.5, 1, 0.5, 0], [0, 0, 0, 0.5, 1]])
    return share @ kernel @ share.T


def pass_through(factor: Tensor, offset: Tensor, depth: int) -> State:
    """Start attention so that what comes from SPPF leaves it nearly unchanged, at every width.

    The two halves take the even and the odd channels (so that a narrower network's take all of its channels too) and
    are put together again; inside, the shortcuts of attention and feed-forward layer are alone at first (zero factors:
    Goyal et al., arXiv:1706.02677, section 5.1). Two SiLU remain: the first one gets values that are raised to where
    it is linear, and a second one leaves what is greater than 0.2 as it is within 0.1, if it is raised by 0.2.

    Args:
        factor: Of SPPF's last BatchNorm, one for each of C channels.
        offset: The same of its offsets.
        depth: Number of attention blocks.

    Returns:
        What has to be written into the state of a stock `C2PSA` of C channels.
    """
    mean, spread = mean_and_spread(factor, offset)  # BatchNorm takes them and gives them back
    width = len(factor)
    half = width // 2
    inside = torch.arange(width)
    outside = 2 * (inside % half) + inside // half  # the channel that a place inside takes
    split = factor.new_zeros(width, width, 1, 1)
    split[inside, outside] = 1
    merge = factor.new_zeros(width, width, 1, 1)
    merge[outside, inside] = 1
    state = {
        "cv1.conv.weight": split,
        "cv1.bn.weight": spread[outside],
        "cv1.bn.bias": mean[outside] + 4,
        "cv2.conv.weight": merge,
        "cv2.bn.weight": spread,
        "cv2.bn.bias": mean + 0.2,
    }
    for i in range(depth):
        for last in ("attn.proj", "ffn.1"):
            state[f"m.{i}.{last}.bn.weight"] = factor.new_zeros(half)
    return state
