"""Warm start: a supernet that begins where a trained network ends.

From a stock YOLOv8 checkpoint of the space's size. The stock network is a point of the space, and after the warm start
that point gives the stock network's outputs. Three steps lead there:

1. *Order.* A narrower network of the supernet has the first channels of a wider one, so channels are sorted by
   importance (as in Once-for-All, arXiv:1908.09791, section 3.3). Channels that are added to each other or pooled
   from each other move together: they lie on one *axis*, and each axis has one order. The network computes what it
   did before. Importance of a channel is how much of it reaches the layers that read it: its spread, which follows
   from its BatchNorm (Network Slimming, arXiv:1708.06519, takes the factor alone; here SiLU is counted), times the L1
   norm of the weights that read it, with their BatchNorm folded in, so that weights of different layers compare.
2. *Transfer.* Weights go to where the supernet cuts the stock network from: the first channels, the centre of a 5x5.
   An output that stock has ignores what stock lacks (those weights are zero), an output that stock lacks starts at
   random: every wider, deeper or larger-kernelled network also begins as stock does, and learns from there
   (Net2Net, arXiv:1511.05641).
3. *Operators* that stock lacks start as approximations of its two 3x3 convolutions, and attention lets everything
   pass nearly unchanged; see `linearised`, `separable`, `dilated` and `_pass_through`.

From an earlier supernet of the same space and classes: its weights as they are. So retraining on grown data goes on.
"""

from __future__ import annotations

import bisect
import codecs
import itertools
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules import DFL, SPPF, Bottleneck, C2f, Concat, Conv, Detect
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils import IterableSimpleNamespace

from yolov8_nas.errors import InputError
from yolov8_nas.space import SCALES, Architecture, SearchSpace, stock_architecture
from yolov8_nas.supernet.derive import model_rows, unroll
from yolov8_nas.supernet.elastic import ElasticBottleneck, ElasticConv, ElasticPSA, ElasticPSABlock, ElasticSPPF, State
from yolov8_nas.supernet.supernet import WEIGHTS, Supernet

# Reading ------------------------------------------------------------------------------------------------------------

_MODULES: Final = (Conv, C2f, Bottleneck, SPPF, Concat, Detect, DFL)
_SCALAR: Final[Any] = np.float64(0).__reduce__()[0]  # what makes a number from a pickle has no public name
_ALLOWED: Final[Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]]] = (
    DetectionModel,
    *_MODULES,
    *((module, f"ultralytics.nn.modules.{module.__name__}") for module in _MODULES),  # checkpoints of early 2023
    *(nn.Sequential, nn.ModuleList, nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.MaxPool2d, nn.Upsample, nn.Identity),
    IterableSimpleNamespace,  # settings of the training, in checkpoints that were not stripped
    (IterableSimpleNamespace, "ultralytics.yolo.utils.IterableSimpleNamespace"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # metrics of the training
    *(np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType),
    (codecs.encode, "_codecs.encode"),
)
"""What a checkpoint may refer to: the modules of stock YOLOv8, and plain data. None of it runs code of the file's."""


def read(path: Path) -> DetectionModel | Supernet:
    """What a supernet can start from: a stock checkpoint, or the folder (or weights) of an earlier supernet.

    Raises:
        InputError: It is neither.
    """
    if path.name == WEIGHTS:
        path = path.parent
    return Supernet.load(path) if path.is_dir() else read_stock(path)


def read_stock(path: Path) -> DetectionModel:
    """A stock YOLOv8 detection network from an Ultralytics checkpoint, in full precision.

    No code of the file's is run: what it refers to beyond the modules of stock YOLOv8 is refused, and of its objects
    only the weights and class names are used, in a network that is built anew. The exponential moving average is
    taken where there is one.

    Raises:
        InputError: The file is missing, no checkpoint, or not one of stock YOLOv8 n, s, m or l for detection.
    """
    remedy = f"give a checkpoint of stock YOLOv8 {', '.join(SCALES)} for detection"
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)):
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            checkpoint = None if foreign else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a checkpoint that can be read ({error}); {remedy}") from None
    if foreign:
        raise InputError(f"{path}: it refers to {', '.join(foreign)}, which stock YOLOv8 does not; {remedy}")
    found = (checkpoint.get("ema") or checkpoint.get("model")) if isinstance(checkpoint, dict) else None
    if not isinstance(found, DetectionModel):
        raise InputError(f"{path}: no detection network in it; {remedy}")
    try:
        return _rebuilt(found)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not stock YOLOv8 ({error}); {remedy}") from None


def _rebuilt(found: DetectionModel) -> DetectionModel:
    """The stock network of the size and classes of `found`, with its weights; an error where it is another one."""
    state = found.state_dict()
    stem, outputs = state["model.0.conv.weight"].shape[0], state["model.22.cv3.0.2.weight"].shape[0]
    scales = {stock_architecture(scale).convs[0]: scale for scale in SCALES}
    if stem not in scales:
        raise ValueError(f"its stem has {stem} channels")
    model = DetectionModel({**yaml_model_load(f"yolov8{scales[stem]}.yaml"), "nc": outputs}, verbose=False)
    wanted = model.state_dict()
    for name in {**wanted, **state}:
        if name not in wanted or name not in state or wanted[name].shape != state[name].shape:
            raise ValueError(f"{name} is not as in YOLOv8{scales[stem]}")
    model.load_state_dict(state)
    for (name, module), other in zip(model.named_modules(), found.modules(), strict=True):
        if _settings(module) != _settings(other):
            raise ValueError(f"{name} is {_settings(other)}, in YOLOv8{scales[stem]} {_settings(module)}")
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ValueError("its weights are not all finite numbers")
    model.names = {i: str(found.names[i]) for i in range(outputs)}
    return model


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What a module of stock YOLOv8 computes beyond its weights, as far as other networks differ in it."""
    return (type(module).__name__, *(getattr(module, name, None) for name in ("kernel_size", "add", "eps")))


def check(path: Path, space: SearchSpace, num_classes: int | None) -> None:
    """Refuse what a supernet can't start from, before work starts.

    Args:
        path: See `read`.
        space: Of the supernet that is to start.
        num_classes: Its number of classes, where it is known yet.

    Raises:
        InputError: The file can't be read, or is of another size, space or number of classes.
    """
    _fit(read(path), space, num_classes, where=f"{path}: ")


def _fit(source: DetectionModel | Supernet, space: SearchSpace, num_classes: int | None, where: str = "") -> None:
    if isinstance(source, Supernet):
        classes = source.num_classes
        if source.space != space:
            raise InputError(
                f"{where}a supernet of another space ({source.space.name!r}) than {space.name!r}; give one of the same "
                "space, or a stock checkpoint"
            )
    else:
        classes, scale = source.yaml["nc"], source.yaml["scale"]
        if scale != space.scale:
            raise InputError(
                f"{where}YOLOv8{scale}, but the space {space.name!r} is around YOLOv8{space.scale}; give a checkpoint "
                f"of YOLOv8{space.scale}, or choose a space around YOLOv8{scale}"
            )
    if num_classes is not None and classes != num_classes:
        raise InputError(
            f"{where}trained for {classes} classes, but the dataset has {num_classes}; give a checkpoint of a network "
            "trained on the same classes"
        )


# Starting -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmStart:
    """What a supernet was started from.

    Attributes:
        source: What gave the weights.
        taken: Parameters and BatchNorm statistics that were taken over.
        total: All that the supernet has.
        ordered: Groups of channels that were sorted by importance.
        approximated: Layers whose other operators were started from 3x3 convolutions.
    """

    source: str
    taken: int
    total: int
    ordered: int = 0
    approximated: int = 0

    def __str__(self) -> str:
        told = f"Started from {self.source}: {self.taken / 1e6:.2f} of {self.total / 1e6:.2f} million weights"
        if self.ordered:
            told += f"; {self.ordered} groups of channels sorted by importance, the other operators of "
            told += f"{self.approximated} layers started from their 3x3 convolutions"
        return told


@torch.no_grad()
def warm_start(supernet: Supernet, source: DetectionModel | Supernet) -> WarmStart:
    """Start a supernet from a trained network; see the module.

    Args:
        supernet: A fresh one; it is changed in place. Which network is active in it stays.
        source: A stock network with as many classes, of the size that the space is around, or an earlier supernet of
            the same space; as `read` gives it. It is not changed.

    Raises:
        InputError: It is of another size, space or number of classes.
    """
    _fit(source, supernet.space, supernet.num_classes)
    total = sum(tensor.numel() for tensor in supernet.state_dict().values())
    if isinstance(source, Supernet):
        supernet.load_state_dict(source.state_dict())
        return WarmStart("an earlier supernet", taken=total, total=total)
    stock = supernet.space.stock
    states: list[State] = [module.state_dict() for module in unroll(source).model]
    wires = list(wiring(stock))
    orders = importance_orders(wires, states)
    taken = transfer(supernet, stock, reordered(wires, states, orders))
    approximated = 0
    for name, (_, _, module, arguments) in model_rows(stock):
        layer = supernet.get_submodule(name) if module == "Bottleneck" else None
        if isinstance(layer, ElasticBottleneck):
            _approximate(layer, arguments[0])
            approximated += 1
    if max(supernet.space.dimensions[-1].options):
        _pass_through(supernet)
    scale = f"YOLOv8{supernet.space.scale}"
    return WarmStart(f"stock {scale}", taken, total, ordered=len(orders), approximated=approximated)


# 1. Order ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wire:
    """One convolution of the stock network, and the axes that its channels lie on.

    Attributes:
        row: Its row in `model_rows`.
        weight: Name of its weights in the state of the row's module.
        norm: Prefix of its BatchNorm's tensors there; empty for a prediction, whose outputs have their places.
        inputs: Axis of each member of its input.
        output: Axis of its output; empty for a prediction.
    """

    row: int
    weight: str
    norm: str
    inputs: tuple[str, ...]
    output: str


def wiring(architecture: Architecture) -> Iterator[Wire]:
    """The convolutions of a network of 3x3 bottlenecks, in the order of the network."""

    def conv(prefix: str, inputs: tuple[str, ...], output: str) -> Wire:
        return Wire(row, f"{prefix}conv.weight", f"{prefix}bn.", inputs, output)

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
                yield conv("cv2.", (f"{name}.inner",), *axes[row])
            case "SPPF":
                yield conv("cv1.", inputs, f"{name}.hidden")
                yield conv("cv2.", (f"{name}.hidden",) * 4, name)
            case "Detect":
                for level, axis in enumerate(inputs):
                    for branch in (f"cv2.{level}.", f"cv3.{level}."):
                        yield conv(f"{branch}0.", (axis,), f"{branch}first")
                        yield conv(f"{branch}1.", (f"{branch}first",), f"{branch}second")
                        yield Wire(row, f"{branch}2.weight", "", (f"{branch}second",), "")
            case _:  # Concat, Upsample
                axes[row] = inputs


def importance_orders(wires: Sequence[Wire], states: Sequence[State]) -> dict[str, Tensor]:
    """For every axis its channels from the most important on; see the module.

    Args:
        wires: `wiring` of the network.
        states: Of each row, the state of the stock module.
    """
    spread: dict[str, Tensor] = {}
    for wire in wires:
        if wire.output:  # of channels that are added, the spreads are added
            norm = (states[wire.row][f"{wire.norm}{name}"] for name in ("weight", "bias"))
            _, own = _mean_and_spread(*norm)
            spread[wire.output] = spread.get(wire.output, torch.zeros_like(own)) + own
    read = {axis: torch.zeros_like(own) for axis, own in spread.items()}
    for wire in wires:
        if wire.inputs != ("image",):
            state = states[wire.row]
            weight = state[wire.weight].abs().sum((2, 3))
            if wire.norm:
                variance = state[f"{wire.norm}running_var"]
                weight = weight * (state[f"{wire.norm}weight"].abs() / (variance + _EPS).sqrt())[:, None]
            sizes = [len(spread[axis]) for axis in wire.inputs]
            for axis, part in zip(wire.inputs, torch.split(weight.sum(0), sizes), strict=True):
                read[axis] += part
    return {axis: (own * read[axis]).argsort(descending=True, stable=True) for axis, own in spread.items()}


def reordered(wires: Sequence[Wire], states: Sequence[State], orders: Mapping[str, Tensor]) -> list[State]:
    """The same network with the channels of every axis in the given order: its outputs stay the same.

    Args:
        wires: `wiring` of the network.
        states: Of each row, the state of the stock module.
        orders: For every axis, which channel comes first, second and so on.
    """
    moved = [dict(state) for state in states]
    for wire in wires:
        state = moved[wire.row]
        if wire.inputs != ("image",):
            starts = np.cumsum([0, *(len(orders[axis]) for axis in wire.inputs)])
            columns = torch.cat([orders[axis] + int(s) for axis, s in zip(wire.inputs, starts, strict=False)])
            state[wire.weight] = state[wire.weight][:, columns]
        if wire.output:
            names = (f"{wire.norm}{name}" for name in ("weight", "bias", "running_mean", "running_var"))
            for name in (wire.weight, *names):
                state[name] = state[name][orders[wire.output]]
    return moved


# 2. Transfer ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transfer(supernet: Supernet, architecture: Architecture, states: Sequence[State]) -> int:
    """Write the weights of a stand-alone network into a supernet, so that activating it gives the same outputs.

    Where they go is asked of the supernet itself: a copy of it whose every weight is its own address is cut to the
    architecture, and what comes out are the addresses. So there is one description of the cut.

    Outputs that the network has ignore inputs and kernel taps that it lacks: these weights become zero.

    Args:
        supernet: Changed in place.
        architecture: The network, of the supernet's space.
        states: Of each of its rows, the state of the stock module.

    Returns:
        How many weights were written.
    """
    held = {name: tensor.cpu().contiguous() for name, tensor in supernet.state_dict().items()}
    names, sizes = list(held), [tensor.numel() for tensor in held.values()]
    starts = np.cumsum([0, *sizes]).tolist()
    numbers = torch.split(torch.arange(starts[-1]), sizes)
    with torch.device("meta"):  # weights that are replaced at once need no memory
        addressed = Supernet(supernet.space, supernet.num_classes).requires_grad_(False)
    addressed.load_state_dict(
        {name: number.view(held[name].shape) for name, number in zip(names, numbers, strict=True)}, assign=True
    )
    written = 0
    for state, addresses in zip(states, addressed.states(architecture), strict=True):
        for key, address in addresses.items():
            place = bisect.bisect_right(starts, int(address.min())) - 1
            assert int(address.max()) < starts[place + 1], "a stock tensor lies in one tensor of the supernet"
            tensor, index = held[names[place]], address.flatten() - starts[place]
            if tensor.ndim == 4:
                filters = torch.zeros(len(tensor), dtype=torch.bool)
                filters[index // tensor[0].numel()] = True
                tensor[filters] = 0
            tensor.view(-1)[index] = state[key].to(tensor).flatten()
            written += len(index)
    supernet.load_state_dict(held)
    return written


# 3. Operators --------------------------------------------------------------------------------------------------------

_EPS: Final = 1e-3
"""Ultralytics' epsilon of BatchNorm."""


def _approximate(layer: ElasticBottleneck, hidden: int) -> None:
    """Start a bottleneck's other operators from its two 3x3 convolutions, of `hidden` channels.

    Their last BatchNorm gets the factors and offsets of the second convolution's, since their outputs take its place.
    """
    first, second = (conv for conv in layer.conv if isinstance(conv, ElasticConv))
    c = hidden
    kernel = linearised(first.state((c,), c, 3), second.state((c,), c, 3))
    replaced: list[tuple[ElasticConv, Tensor]] = []
    if hasattr(layer, "dwsep"):
        pointwise, depthwise = (conv for conv in layer.dwsep if isinstance(conv, ElasticConv))
        per_input, per_tap = separable(kernel, depthwise.kernel)
        replaced += [(pointwise, per_input), (depthwise, per_tap)]
    if hasattr(layer, "dilated"):
        replaced.append((layer.dilated, dilated(kernel)))
    for conv, weight in replaced:
        conv.weight[:c] = 0
        conv.weight[:c, : weight.shape[1]] = weight
        if weight.shape[-1] > 1:
            conv.bn.weight[:c], conv.bn.bias[:c] = second.bn.weight[:c], second.bn.bias[:c]


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
    between, probability = _normal(first["bn.weight"], first["bn.bias"])
    sigmoid = between.sigmoid()
    slope = probability @ (sigmoid * (1 + between * (1 - sigmoid)))
    factor = slope * first["bn.weight"] / (first["bn.running_var"] + _EPS).sqrt()
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


def _pass_through(supernet: Supernet) -> None:
    """Start attention so that what comes from SPPF leaves it nearly unchanged, at every width.

    The two halves take the even and the odd channels (so that a narrower network's take all of its channels too) and
    are put together again; inside, the shortcuts of attention and feed-forward layer are alone at first (zero factors:
    Goyal et al., arXiv:1706.02677, section 5.1). Two SiLU remain: the first one gets values that are raised to where
    it is linear, and a second one leaves what is greater than 0.2 as it is within 0.1, if it is raised by 0.2.
    """
    sppf, attention = supernet.get_submodule("sppf"), supernet.get_submodule("attention")
    assert isinstance(sppf, ElasticSPPF) and isinstance(attention, ElasticPSA)
    mean, spread = _mean_and_spread(sppf.cv2.bn.weight, sppf.cv2.bn.bias)  # BatchNorm takes them and gives them back
    merge = attention.merge
    merge.weight.zero_()
    merge.bn.weight.copy_(spread)
    merge.bn.bias.copy_(mean + 0.2)
    for parity, half in enumerate(attention.split):
        assert isinstance(half, ElasticConv)
        inside = torch.arange(half.weight.shape[0])
        outside = 2 * inside + parity
        half.weight.zero_()
        half.weight[inside, outside] = 1
        half.bn.weight.copy_(spread[outside])
        half.bn.bias.copy_(mean[outside] + 4)
        merge.weight[outside, len(inside) * parity + inside] = 1
    for block in attention.layers:
        assert isinstance(block, ElasticPSABlock) and isinstance(block.ffn[1], ElasticConv)
        for last in (block.attn.proj, block.ffn[1]):
            last.bn.weight.zero_()


def _mean_and_spread(factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what leaves SiLU behind a BatchNorm: (C,), (C,)."""
    between, probability = _normal(factor, offset)
    leaving = F.silu(between)
    mean = probability @ leaving
    return mean, (probability @ (leaving - mean) ** 2).sqrt()


def _normal(factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """What BatchNorm gives, by Gauss-Hermite quadrature: (Q, C) values of C channels, (Q,) their probabilities."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    return (
        offset + factor * factor.new_tensor(nodes)[:, None],
        factor.new_tensor(weights / math.sqrt(2 * math.pi)),
    )
