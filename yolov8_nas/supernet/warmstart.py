"""Warm start: a supernet that begins where a trained network ends.

From a stock YOLOv8 checkpoint of the space's size, or a larger one, of any classes. The space's stock network is sliced
from it (`slicing`); of a checkpoint of the same size and classes that is the whole network. It is a point of the space,
and after the warm start that point gives the sliced network's outputs. Three steps lead there:

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
   pass nearly unchanged; see `operators`. The depthwise-separable class branch is taken from a sliced network that has
   it, where it is fitted to the dense one.

From an earlier supernet of the same space and classes: its weights as they are. So retraining on grown data goes on.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint import stock
from yolov8_nas.checkpoint.stock import StockCheckpoint
from yolov8_nas.errors import InputError
from yolov8_nas.space import BLOCKS, CONVS, SCALES, Architecture, SearchSpace, stock_architecture
from yolov8_nas.space.topology import model_rows
from yolov8_nas.supernet.channels import importance_orders, reordered, wiring
from yolov8_nas.supernet.elastic import ElasticBottleneck, ElasticConv, ElasticPSA, ElasticPSABlock, ElasticSPPF, State
from yolov8_nas.supernet.operators import dilated, linearised, pass_through, separable
from yolov8_nas.supernet.slicing import Sliced, sliced
from yolov8_nas.supernet.supernet import WEIGHTS, Supernet

# Reading ------------------------------------------------------------------------------------------------------------


def read(path: Path) -> StockCheckpoint | Supernet:
    """What a supernet can start from: a stock checkpoint, or the folder (or weights) of an earlier supernet.

    Raises:
        InputError: It is neither.
    """
    if path.name == WEIGHTS:
        path = path.parent
    return Supernet.load(path) if path.is_dir() else stock.read(path)


def read_stock(path: Path) -> DetectionModel:
    """A stock YOLOv8 detection network from an Ultralytics checkpoint, in full precision; see `checkpoint.stock`.

    Raises:
        InputError: The file is missing, no checkpoint, or not one of stock YOLOv8 n, s, m or l for detection.
    """
    return stock.read(path).network()


def check(path: Path, space: SearchSpace, num_classes: int | None) -> None:
    """Refuse what a supernet can't start from, before work starts.

    Args:
        path: See `read`.
        space: Of the supernet that is to start.
        num_classes: Its number of classes, where it is known yet.

    Raises:
        InputError: The file can't be read; or a stock network is somewhere narrower or shallower than the one that the
            space is around; or an earlier supernet is of another space or number of classes.
    """
    _fit(read(path), space, num_classes, where=f"{path}: ")


def serving(space: SearchSpace) -> list[str]:
    """The sizes of stock YOLOv8 that a supernet of a space can start from: nowhere narrower and nowhere shallower."""
    return [scale for scale in SCALES if _lacking(stock_architecture(scale), space.stock) is None]


def _lacking(found: Architecture, wanted: Architecture) -> str | None:
    """Where a stock network is narrower or shallower than another one, in words; nothing where it is not."""
    convs = zip(CONVS, found.convs, wanted.convs, strict=True)
    places = [(name, "channels", mine, other) for name, mine, other in convs]
    for name, mine, other in zip(BLOCKS, found.blocks, wanted.blocks, strict=True):
        places += [(name, "channels", mine.width, other.width), (name, "hidden channels", mine.hidden, other.hidden)]
        places += [(name, "bottlenecks", mine.depth, other.depth)]
    places += [("sppf", "channels", found.sppf_width, wanted.sppf_width)]
    short = next((place for place in places if place[2] < place[3]), None)
    return None if short is None else f"{short[0]} has {short[2]} {short[1]} instead of {short[3]}"


def _fit(
    source: DetectionModel | StockCheckpoint | Supernet, space: SearchSpace, num_classes: int | None, where: str = ""
) -> None:
    if not isinstance(source, Supernet):
        scale = source.scale if isinstance(source, StockCheckpoint) else source.yaml["scale"]
        if lacking := _lacking(stock_architecture(scale), space.stock):
            raise InputError(
                f"{where}YOLOv8{scale} is too small for the space {space.name!r} around YOLOv8{space.scale}: its "
                f"{lacking}; give a checkpoint of YOLOv8{' or YOLOv8'.join(serving(space))}, or choose a space around "
                f"YOLOv8{scale}"
            )
        return
    if source.space != space:
        raise InputError(
            f"{where}a supernet of another space ({source.space.name!r}) than {space.name!r}; give one of the same "
            "space, or a stock checkpoint"
        )
    if num_classes is not None and source.num_classes != num_classes:
        raise InputError(
            f"{where}a supernet of {source.num_classes} classes, but the dataset has {num_classes}; give one that was "
            "trained on the same classes, or a stock checkpoint, which serves any classes"
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
        sliced: What the space's stock network took from a stock network; nothing from an earlier supernet.
    """

    source: str
    taken: int
    total: int
    ordered: int = 0
    approximated: int = 0
    sliced: Sliced | None = None

    def __str__(self) -> str:
        told = f"Started from {self.source}: {self.taken / 1e6:.2f} of {self.total / 1e6:.2f} million weights"
        if self.sliced:
            told += f"; its stock network has {self.sliced}"
        if self.ordered:
            told += f"; {self.ordered} groups of channels sorted by importance, the other operators of "
            told += f"{self.approximated} layers started from their 3x3 convolutions"
        return told


@torch.no_grad()
def warm_start(
    supernet: Supernet, source: DetectionModel | StockCheckpoint | Supernet, calibration: Sequence[Tensor] = ()
) -> WarmStart:
    """Start a supernet from a trained network; see the module.

    Args:
        supernet: A fresh one; it is changed in place. Which network is active in it stays.
        source: A stock network of any classes that is nowhere narrower or shallower than the one that the space is
            around, or an earlier supernet of the same space and classes; as `read` gives it. It is not changed.
        calibration: Batches BCHW of images, RGB in 0..1, to which what is sliced from a larger network is fitted.

    Raises:
        InputError: It is too small, or of another space or number of classes.
    """
    _fit(source, supernet.space, supernet.num_classes)
    total = sum(tensor.numel() for tensor in supernet.state_dict().values())
    if isinstance(source, Supernet):
        supernet.load_state_dict(source.state_dict())
        return WarmStart("an earlier supernet", taken=total, total=total)
    architecture = supernet.space.stock
    network, told = sliced(source, architecture, supernet.names, calibration)
    states: list[State] = [module.state_dict() for module in network.model]
    wires = list(wiring(architecture))
    orders = importance_orders(wires, states)
    light = replace(architecture, head=replace(architecture.head, classes="dwsep3"))
    if light in supernet.space:  # its hidden channels stand for those of the dense branch, so their order is the same
        fitted, _ = sliced(source, light, supernet.names, calibration)
        own: list[State] = [module.state_dict() for module in fitted.model]
        transfer(supernet, light, reordered(list(wiring(light)), own, orders))
    transfer(supernet, architecture, reordered(wires, states, orders))
    approximated = 0
    for name, (_, _, module, arguments) in model_rows(architecture):
        layer = supernet.get_submodule(name) if module == "Bottleneck" else None
        if isinstance(layer, ElasticBottleneck):
            _approximate(layer, arguments[0])
            approximated += 1
    if supernet.space.largest().attention:
        _pass_through(supernet)
    return WarmStart(told.source, told.taken, total, len(orders), approximated, told)


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


def _pass_through(supernet: Supernet) -> None:
    """Start attention at its maximum width as `operators.pass_through` says."""
    sppf, attention = supernet.get_submodule("sppf"), supernet.get_submodule("attention")
    assert isinstance(sppf, ElasticSPPF) and isinstance(attention, ElasticPSA)
    depth = len(attention.layers)
    state = pass_through(sppf.cv2.bn.weight, sppf.cv2.bn.bias, depth)
    half = attention.merge.weight.shape[0] // 2
    for conv, part in zip(attention.split, (slice(half), slice(half, None)), strict=True):
        assert isinstance(conv, ElasticConv)
        conv.weight.copy_(state["cv1.conv.weight"][part])
        conv.bn.weight.copy_(state["cv1.bn.weight"][part])
        conv.bn.bias.copy_(state["cv1.bn.bias"][part])
    attention.merge.weight.copy_(state["cv2.conv.weight"])
    attention.merge.bn.weight.copy_(state["cv2.bn.weight"])
    attention.merge.bn.bias.copy_(state["cv2.bn.bias"])
    for i, block in enumerate(attention.layers):
        assert isinstance(block, ElasticPSABlock) and isinstance(block.ffn[1], ElasticConv)
        block.attn.proj.bn.weight.copy_(state[f"m.{i}.attn.proj.bn.weight"])
        block.ffn[1].bn.weight.copy_(state[f"m.{i}.ffn.1.bn.weight"])
