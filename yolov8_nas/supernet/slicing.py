"""Slicing: from a trained stock network to one of other widths, depths, operators and classes that begins as it ended.

Channels are chosen by importance on their axes (`channels`), so every member of a concatenation keeps its own. Then:

- *Depth.* Of a backbone block, whose bottlenecks add to what they get, the ones that add least are left out, and what
  reads their sum reads the sum before them. Of a neck block the first ones stay: each of them works on what the one
  before gives.
- *Wider, deeper, larger kernels.* What is there ignores what is new (those weights are zero), what is new starts at
  random: the outputs stay (Net2Net, arXiv:1511.05641).
- *Operators* that the source lacks approximate its two 3x3 convolutions, and a depthwise-separable class branch
  approximates the dense one; see `operators`.
- *Bins.* A box branch with fewer bins has the first ones of each side; by the fit, what the source has beyond them goes
  to the last one.
- *Classes* of equal name keep their outputs; the others start as Ultralytics starts every class.
- *Fit.* With calibration images, every convolution that lost something is fitted to what the source's gives there, in
  the order of the network and on the sliced network's own inputs: least squares with a ridge around the sliced weights,
  in closed form (as ThiNet, arXiv:1707.06342, and He et al., arXiv:1707.06168, fit what pruning leaves). Its BatchNorm
  statistics are set so that on those images mean and variance of every channel are the source's.

A network of the source's own architecture and classes is the source.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules import Concat, Detect
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint.stock import StockCheckpoint
from yolov8_nas.space import BLOCKS, SCALES, Architecture, is_backbone, stock_architecture
from yolov8_nas.space.topology import SWITCH, model_rows
from yolov8_nas.supernet.batchnorm import restore_statistics
from yolov8_nas.supernet.channels import (
    EPS,
    Wire,
    axis_sizes,
    importance_orders,
    reading,
    reordered,
    spread_of,
    wiring,
)
from yolov8_nas.supernet.derive import architecture_of, build, unroll
from yolov8_nas.supernet.elastic import State, first_bins
from yolov8_nas.supernet.operators import dilated, linearised, mixed, pass_through, separable

PIXELS: Final = 2**23
"""Pixels of calibration images that a fit looks at, at most: 327 images of 160 x 160, 20 of 640 x 640."""

RIDGE: Final = 0.01
"""How strongly a fit holds on to the sliced weights: the share of each input's own energy that is added to it."""

_CELLS: Final = (4096, 6)
"""Cells that a fit looks at, at most: as many, or so many times the unknowns of one output, if that is more."""

_EXACT: Final = 1e-5
"""Relative error up to which a convolution gives what the source's gives, but for rounding."""


@dataclass(frozen=True)
class Sliced:
    """What a network took from the one that it was sliced from.

    Attributes:
        source: The source: its size and number of classes.
        taken: Weights and BatchNorm statistics that come from the source.
        total: All that the network has.
        dropped: Bottlenecks of the source that were left out.
        widened: Groups of channels that have more channels than the source's; the rest of them starts at random.
        added: Bottlenecks that the source lacks.
        approximated: Bottlenecks whose operator approximates the source's 3x3 convolutions.
        classes: Classes that keep their outputs; the others start as Ultralytics starts them.
        class_branch: Whether the class branch comes from the source at all.
        light: Whether the class branch is depthwise-separable, which approximates the source's dense one.
        fitted: Convolutions that were fitted to the source's outputs.
    """

    source: str
    taken: int
    total: int
    dropped: tuple[str, ...]
    widened: int
    added: tuple[str, ...]
    approximated: int
    classes: tuple[str, ...]
    class_branch: bool
    light: bool
    fitted: int

    def __str__(self) -> str:
        told = f"{self.taken / 1e6:.2f} of {self.total / 1e6:.2f} million weights from {self.source}"
        if self.dropped:
            told += f", without {', '.join(self.dropped)}"
        if self.widened or self.added:
            told += f"; {self.widened} groups of channels are wider and {len(self.added)} bottlenecks are new"
        if self.approximated:
            told += f"; {self.approximated} bottlenecks approximate its 3x3 convolutions"
        if self.light and self.class_branch:
            told += "; its depthwise class branch approximates the dense one"
        if not self.class_branch:
            told += "; its class branch is not YOLOv8's, and all of that is new"
        elif self.classes:
            told += f"; the outputs of {len(self.classes)} classes kept ({_few(self.classes)})"
        else:
            told += "; class outputs are new"
        if self.fitted:
            told += f"; {self.fitted} convolutions fitted to its outputs"
        return told


@torch.no_grad()
def sliced(
    source: DetectionModel | StockCheckpoint,
    architecture: Architecture,
    names: Sequence[str],
    calibration: Sequence[Tensor] = (),
    *,
    fit: bool = True,
) -> tuple[DetectionModel, Sliced]:
    """A stand-alone network that begins as a trained stock network ended.

    What is new starts from PyTorch's global generator: seed it for a network that is always the same.

    Args:
        source: A stock detection network of any size and any classes, as `warmstart.read_stock` gives it, or the
            checkpoint that has it. Of a checkpoint whose class branch is not YOLOv8's that branch is not taken.
        architecture: The network that is wanted; it may be narrower and wider, shallower and deeper.
        names: Its class names.
        calibration: Batches BCHW of images, RGB in 0..1, as the network will see them. Without, BatchNorm statistics of
            a network that is not the source's own are wrong until they are recalibrated.
        fit: Whether convolutions are fitted on the calibration images; else these set BatchNorm statistics alone.

    Returns:
        The network, of stock rows as `derive.build` builds it, in evaluation mode; and what was taken.
    """
    source, class_branch = _network_of(source, calibration)
    source_architecture = architecture_of(source)
    unrolled = unroll(source).eval()
    original = _Network.of(source_architecture, [module.state_dict() for module in unrolled.model])
    kept = {name: _kept_layers(original, name, architecture.block(name).depth) for name in BLOCKS}
    reduced = _without(original, kept)
    target = build(architecture, len(names), names).to(next(source.parameters())).eval()
    wanted = _untrained(_plain(architecture), names, source)
    chosen = _most_important(reduced, wanted.sizes)
    narrow = _Network.of(reduced.architecture, reordered(reduced.wires, reduced.states, chosen))
    classes = _same_classes([source.names[i] for i in range(len(source.names))], names) if class_branch else None
    taken = _place(wanted, narrow, classes)
    approximated = _fill(target, architecture, wanted, class_branch=classes is not None)
    light = architecture.head.classes == "dwsep3"
    for name in (*approximated, *([_CLASS_LAYERS] if light else [])):
        taken.pop(name, None)
    fitting = _Fitting(wanted, chosen, classes, kept, fit)
    if len(calibration):
        images = torch.cat(list(_first(calibration, PIXELS))).to(next(source.parameters()))
        fitting.run(_Walk(unrolled, source_architecture, images), _Walk(target, architecture, images))
    return target, Sliced(
        source=described(source),
        taken=sum(taken.values()),
        total=sum(tensor.numel() for name, tensor in target.state_dict().items() if not name.endswith(_CONSTANT)),
        dropped=_layers(
            (name, i) for name in BLOCKS for i in range(len(original.of_block(name))) if i not in kept[name]
        ),
        widened=sum(reduced.sizes.get(axis, size) < size for axis, size in wanted.sizes.items()),
        added=_layers((name, i) for name in BLOCKS for i in range(len(kept[name]), architecture.block(name).depth)),
        approximated=len(approximated),
        classes=tuple(names[i] for i in classes or ()),
        class_branch=class_branch,
        light=light,
        fitted=fitting.fitted,
    )


def _network_of(source: DetectionModel | StockCheckpoint, calibration: Sequence[Tensor]) -> tuple[DetectionModel, bool]:
    """The stock network of a checkpoint, and whether its class branch is YOLOv8's."""
    if not isinstance(source, StockCheckpoint):
        return source, True
    network = source.network()
    if source.fused and len(calibration):
        restore_statistics(network.eval(), calibration)
    return network, source.legacy


def _plain(architecture: Architecture) -> Architecture:
    """The architecture with the operators that stock has."""
    return replace(
        architecture,
        attention=0,
        blocks=tuple(replace(block, operator="conv3") for block in architecture.blocks),
        head=replace(architecture.head, classes="conv3"),
    )


def _layers(layers: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Names of layers, each given as its block and its number."""
    return tuple(f"{name}.layers.{i}" for name, i in layers)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def described(source: DetectionModel) -> str:
    """Size and classes of a stock network, in words."""
    widths = architecture_of(source)
    scale = next((scale for scale in SCALES if stock_architecture(scale) == widths), "")
    return f"stock YOLOv8{scale} of {len(source.names)} classes"


_CONSTANT: Final = ("num_batches_tracked", "dfl.conv.weight")
"""What a network holds beside what it learns."""


# Depth ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    """A network of 3x3 bottlenecks by its rows."""

    architecture: Architecture
    names: list[str]
    states: list[State]
    wires: list[Wire]

    @classmethod
    def of(cls, architecture: Architecture, states: list[State]) -> _Network:
        names = [name for name, _ in model_rows(architecture)]
        return cls(architecture, names, states, list(wiring(architecture)))

    @property
    def sizes(self) -> dict[str, int]:
        return axis_sizes(self.wires, self.states)

    def of_row(self, name: str) -> list[Wire]:
        """The convolutions of a row."""
        return [wire for wire in self.wires if self.names[wire.row] == name]

    def of_block(self, block: str) -> list[list[Wire]]:
        """The convolutions of every bottleneck of a block."""
        depth = self.architecture.block(block).depth
        return [self.of_row(f"{block}.layers.{i}") for i in range(depth)]


def _untrained(architecture: Architecture, names: Sequence[str], like: DetectionModel) -> _Network:
    """A network with fresh weights, on the device and of the type of another."""
    fresh = build(architecture, len(names), names).to(next(like.parameters()))
    return _Network.of(architecture, [module.state_dict() for module in fresh.model])


def _most_important(network: _Network, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The channels of each axis that stay, as many as it is to have, in their order."""
    orders = importance_orders(network.wires, network.states)
    return {axis: order[: sizes[axis]].sort().values for axis, order in orders.items()}


def _kept_layers(network: _Network, block: str, depth: int) -> list[int]:
    """Which bottlenecks of a block stay, if `depth` of them can; see the module.

    What a bottleneck of the backbone adds reaches all that read its sum or a later one.
    """
    layers = network.of_block(block)
    if not is_backbone(block) or depth >= len(layers):
        return list(range(min(depth, len(layers))))
    (merge,) = network.of_row(f"{block}.merge")
    members = reading(merge, network.states, network.sizes)[2:]
    inner = [reading(first, network.states, network.sizes)[0] for first, _ in layers]
    worth = []
    for i, (_, second) in enumerate(layers):
        read = torch.stack([*members[i:], *inner[i + 1 :]]).sum(0)
        worth.append(float(spread_of(second, network.states) @ read))
    return sorted(sorted(range(len(layers)), key=lambda i: -worth[i])[:depth])


def _without(network: _Network, kept: Mapping[str, Sequence[int]]) -> _Network:
    """The same network with the given bottlenecks of each block alone.

    What reads the sum behind one that is left out reads the sum before it. In the neck there is no sum, and the
    weights that read it go.
    """
    blocks = tuple(
        replace(block, depth=len(kept[name])) for name, block in zip(BLOCKS, network.architecture.blocks, strict=True)
    )
    states: list[State] = []
    for row, (name, state) in enumerate(zip(network.names, network.states, strict=True)):
        block, _, part = name.partition(".")
        if part.startswith("layers."):
            if int(part.removeprefix("layers.")) not in kept[block]:
                continue
        elif part == "merge":
            (merge,) = (wire for wire in network.wires if wire.row == row)
            members = list(torch.split(state[merge.weight], [network.sizes[axis] for axis in merge.inputs], 1))
            stay = members[:2]
            for i, member in enumerate(members[2:]):
                if i in kept[block]:
                    stay.append(member)
                elif is_backbone(block):
                    stay[-1] = stay[-1] + member
            state = {**state, merge.weight: torch.cat(stay, 1)}
        states.append(state)
    return _Network.of(replace(network.architecture, blocks=blocks), states)


# Width and classes ---------------------------------------------------------------------------------------------------


def _place(wanted: _Network, narrow: _Network, classes: Mapping[int, int] | None) -> dict[str, int]:
    """Write a network into a fresh one that is nowhere narrower.

    Returns how many weights of every row were written; those of the class branch's hidden layers as `_CLASS_LAYERS`.

    Args:
        wanted: The fresh network; its states are replaced.
        narrow: The one that was cut, with as many rows or fewer.
        classes: For the classes that keep their outputs, which of the source's it is; nothing where the source has no
            class branch to give.
    """
    sizes, places = narrow.sizes, wanted.sizes
    taken: dict[str, int] = defaultdict(int)
    given = {(narrow.names[wire.row], wire.weight): wire for wire in narrow.wires}
    for wire in wanted.wires:
        found = given.get((wanted.names[wire.row], wire.weight))
        if found is None or (classes is None and _in_class_branch(wire)):  # what the source lacks
            continue
        old, state = narrow.states[found.row], dict(wanted.states[wire.row])
        part = _CLASS_LAYERS if _in_class_branch(wire) and wire.norm else wanted.names[wire.row]
        columns: list[Tensor] = [torch.arange(3)]
        if wire.inputs != ("image",):
            starts = torch.tensor([0, *(places[axis] for axis in wire.inputs)]).cumsum(0)
            columns = [
                int(start) + torch.arange(sizes[axis]) for start, axis in zip(starts, found.inputs, strict=False)
            ]
        weight = old[found.weight]
        rows = from_rows = torch.arange(len(weight))
        if not wire.norm and _in_class_branch(wire):
            assert classes is not None
            rows, from_rows = (torch.tensor(list(part), dtype=torch.long) for part in (classes, classes.values()))
        elif not wire.norm:
            rows, from_rows = _same_bins(len(state[wire.weight]) // 4, len(weight) // 4)
        vectors = [f"{wire.norm}{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        if not wire.norm:
            vectors = [wire.weight.removesuffix("weight") + "bias"]
        placed = state[wire.weight].clone()
        placed[rows] = 0
        placed[rows[:, None], torch.cat(columns)[None]] = weight[from_rows]
        state[wire.weight] = placed
        for name in vectors:
            state[name] = state[name].clone()
            state[name][rows] = old[name][from_rows]
            taken[part] += len(rows)
        taken[part] += weight[from_rows].numel()
        wanted.states[wire.row] = state
    return taken


_CLASS_LAYERS: Final = "detect.classes"


def _in_class_branch(wire: Wire) -> bool:
    return wire.weight.startswith("cv3.")


def _same_bins(own: int, source: int) -> tuple[Tensor, Tensor]:
    """Places of the bins that two box branches have in common, of all four sides: in the one, in the other."""
    sides, bins = torch.arange(4)[:, None], torch.arange(min(own, source))
    return (sides * own + bins).flatten(), (sides * source + bins).flatten()


def _same_classes(source: Sequence[str], names: Sequence[str]) -> dict[int, int]:
    """For classes of equal name, case, spaces, underscores and hyphens aside: place here, place in the source."""

    def key(name: str) -> str:
        return re.sub(r"[\s_-]+", "", name).casefold()

    known: dict[str, int] = {}
    for i, name in enumerate(source):
        known.setdefault(key(name), i)
    same: dict[int, int] = {}
    for i, name in enumerate(names):
        place = known.pop(key(name), None)
        if place is not None:
            same[i] = place
    return same


# Operators -----------------------------------------------------------------------------------------------------------


def _fill(target: DetectionModel, architecture: Architecture, plain: _Network, *, class_branch: bool) -> list[str]:
    """Give a network the weights of one of 3x3 bottlenecks without attention.

    Args:
        target: The network; it is changed.
        architecture: What it is.
        plain: The other one.
        class_branch: Whether its class branch is worth taking over.

    Returns:
        The rows whose weights approximate the other one's.
    """
    states = dict(zip(plain.names, plain.states, strict=True))
    approximated: list[str] = []
    for (name, (_, repeats, _, _)), module in zip(model_rows(architecture), target.model, strict=True):
        state = states.get(name)
        if name == "attention":
            last = states["sppf"]
            state = pass_through(last["cv2.bn.weight"], last["cv2.bn.bias"], repeats)
        elif ".layers." in name:
            operator = architecture.block(name.split(".")[0]).operator
            if operator != "conv3":
                assert state is not None
                state = _approximated(state, operator)
            if operator not in ("conv3", "conv5"):
                approximated.append(name)
        elif name == "detect" and architecture.head.classes == "dwsep3":
            assert state is not None
            state = _light(state, plain, class_branch=class_branch)
        elif name == SWITCH:
            continue
        assert state is not None
        module.load_state_dict({**module.state_dict(), **state})
    return approximated


def _light(state: State, plain: _Network, *, class_branch: bool) -> State:
    """The state of a head with the depthwise-separable class branch, as far as the dense one tells it."""
    spreads = {wire.output: spread_of(wire, plain.states) for wire in plain.wires if wire.output}
    light = {name: tensor for name, tensor in state.items() if not re.match(r"cv3\.\d\.[01]\.", name)}
    if not class_branch:
        return light
    for wire in plain.wires:
        if _in_class_branch(wire) and wire.norm:
            prefix = wire.weight.removesuffix("conv.weight")
            dense = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            (read,) = wire.inputs
            light |= {f"{prefix}{name}": tensor for name, tensor in mixed(dense, spreads[read]).items()}
    return light


def _approximated(state: State, operator: str) -> State:
    """The state of a bottleneck's other operator, as far as its two 3x3 convolutions tell it."""
    if operator == "conv5":
        return {key: F.pad(tensor, (1, 1, 1, 1)) if tensor.ndim == 4 else tensor for key, tensor in state.items()}
    first, second = (
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for prefix in ("cv1.", "cv2.")
    )
    kernel = linearised(first, second)
    norm = {f"bn.{name}": second[f"bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    if operator == "dilated3":
        return {"conv.weight": dilated(kernel), **norm}
    per_input, per_tap = separable(kernel, int(operator[-1]))
    return {
        "cv1.conv.weight": per_input,
        "cv2.conv.weight": per_tap,
        **{f"cv2.{name}": tensor for name, tensor in norm.items()},
    }


# Fit -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Goal:
    """What a convolution of the sliced network should give.

    Attributes:
        outputs: Which of its outputs.
        y_BCHW: What the source's convolution gives in their place, before BatchNorm.
        mean: Running mean of the source's BatchNorm there; nothing for a prediction.
        variance: The same of its running variance.
        exact: Whether the convolution gives that already.
    """

    outputs: Tensor
    y_BCHW: Tensor
    mean: Tensor | None = None
    variance: Tensor | None = None
    exact: bool = False


class _Walk:
    """A network of stock rows that computes one row after the other, for many images at once."""

    def __init__(self, model: DetectionModel, architecture: Architecture, images: Tensor) -> None:
        rows = model_rows(architecture)
        self.names = [name for name, _ in rows]
        self.modules = list(model.model)
        self._images = images
        self._sources: list[list[int]] = []
        for i, (_, (source, *_)) in enumerate(rows):
            relative = source if isinstance(source, list) else [source]
            self._sources.append([s % i for s in relative] if i else [])
        self._last_read = {s: i for i, sources in enumerate(self._sources) for s in sources}
        self._outputs: dict[int, Tensor] = {}
        self._row = 0

    def until(self, name: str) -> nn.Module:
        """Compute what comes before a row; returns the row's module."""
        while self.names[self._row] != name:
            self.step()
        return self.modules[self._row]  # type: ignore[no-any-return]

    def step(self) -> None:
        """Compute the next row."""
        row, module = self._row, self.modules[self._row]
        inputs = [self._outputs[s] for s in self._sources[row]] or [self._images]
        if isinstance(module, Detect):
            for branches in (module.cv2, module.cv3):
                for branch, x_BCHW in zip(branches, inputs, strict=True):
                    branch(x_BCHW)
        else:
            self._outputs[row] = module(inputs if isinstance(module, Concat) else inputs[0])
        for s in self._sources[row]:
            if self._last_read[s] == row:
                self._outputs.pop(s, None)
        self._row += 1


class _Fitting:
    """Fits a sliced network to its source, side by side in the order of the network.

    Args:
        plain: The sliced network as one of 3x3 bottlenecks.
        chosen: For every axis, the source's channels that stay.
        classes: For the classes that keep their outputs, which of the source's it is; nothing where the source has no
            class branch to give.
        kept: The bottlenecks of every block that stay.
        fit: Whether weights are fitted, or BatchNorm statistics set alone.
    """

    def __init__(
        self,
        plain: _Network,
        chosen: Mapping[str, Tensor],
        classes: Mapping[int, int] | None,
        kept: Mapping[str, Sequence[int]],
        fit: bool,
    ) -> None:
        self.chosen = chosen
        self.classes = classes
        self.kept = kept
        self.fit = fit
        self.fitted = 0
        self._wires = {(plain.names[wire.row], wire.weight): wire for wire in plain.wires}

    def run(self, original: _Walk, own: _Walk) -> None:
        """Fit the second one."""
        for name, module in zip(own.names, own.modules, strict=True):
            convs = dict(_convs(module))
            goals: dict[str, _Goal] = {}
            counterpart = self._counterpart(name)
            if convs and counterpart:
                layer = original.until(counterpart)
                with _outputs_of(layer) as given:
                    original.step()
                goals = dict(self._goals(name, convs, dict(layer.named_modules()), given))
            handles = []
            for path, conv in convs.items():
                goal = goals.get(path)
                if goal:
                    handles.append(conv.register_forward_pre_hook(partial(self._fit_to, goal)))
                norm = path.removesuffix("conv") + "bn"
                if path.endswith("conv"):
                    handles.append(module.get_submodule(norm).register_forward_pre_hook(partial(_set_statistics, goal)))
            own.step()
            for handle in handles:
                handle.remove()

    def _counterpart(self, name: str) -> str:
        """The source's row of a row; empty where it has none."""
        block, _, part = name.partition(".layers.")
        if part:
            kept = self.kept[block]
            return f"{block}.layers.{kept[int(part)]}" if int(part) < len(kept) else ""
        return "" if name in ("attention", SWITCH) else name

    def _goals(
        self, name: str, convs: Mapping[str, nn.Conv2d], source: Mapping[str, nn.Module], given: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, _Goal]]:
        for path, conv in convs.items():
            # A dilated convolution stands for two; the first one of a separable pair stands for none.
            same = "cv2.conv" if path == "conv" and "cv2.conv" in given else path
            if path == "cv1.conv" and ".layers." in name and conv.kernel_size == (1, 1):
                continue
            if light := re.fullmatch(r"(cv3\.\d\.\d\.)([01])\.conv", path):
                if light[2] == "0":
                    continue
                same = f"{light[1]}conv"
            wire = self._wires[name, f"{same}.weight"]
            if self.classes is None and _in_class_branch(wire):
                continue
            y_BCHW = given[same]
            if wire.output:
                channels, outputs = self.chosen[wire.output], torch.arange(len(self.chosen[wire.output]))
            elif _in_class_branch(wire):
                assert self.classes is not None
                channels, outputs = (torch.tensor(list(part)) for part in (self.classes.values(), self.classes))
            else:
                bins = min(conv.out_channels, y_BCHW.shape[1]) // 4
                outputs, _ = _same_bins(conv.out_channels // 4, bins)
                channels = torch.arange(4 * bins)
                y_BCHW = first_bins(y_BCHW.view(len(y_BCHW), 4, -1, *y_BCHW.shape[2:]), bins).flatten(1, 2)
            if not len(channels):
                continue
            goal = _Goal(outputs, y_BCHW[:, channels])
            norm = source[same.removesuffix("conv") + "bn"] if wire.output else None
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
                goal.mean, goal.variance = norm.running_mean[channels], norm.running_var[channels]
            yield path, goal

    def _fit_to(self, goal: _Goal, conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        x_BCHW, y_BCHW, outputs = inputs[0], goal.y_BCHW, goal.outputs
        if conv.groups > 1:
            x_BCHW = x_BCHW[:, outputs]
        weight, bias = conv.weight[outputs], None if conv.bias is None else conv.bias[outputs]
        groups = len(outputs) if conv.groups > 1 else 1
        found = F.conv2d(x_BCHW, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
        goal.exact = bool((found - y_BCHW).norm() <= _EXACT * y_BCHW.norm())
        if goal.exact or not self.fit:
            return
        conv.weight[outputs], offset = fitted(x_BCHW, y_BCHW, conv, weight)
        if conv.bias is not None:
            conv.bias[outputs] = offset
        self.fitted += 1


def fitted(x_BCHW: Tensor, y_BCHW: Tensor, conv: nn.Conv2d, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and offsets with which a convolution comes closest to given outputs, in least squares with a ridge.

    The ridge holds every weight to where it was, as strongly as `RIDGE` says; with it an input that is always zero
    keeps its weights.

    Args:
        x_BCHW: Inputs; of a depthwise convolution K channels.
        y_BCHW: Outputs that are wanted, of K channels.
        conv: The convolution: its kernel, stride, padding and dilation, and whether it is depthwise.
        weight: Its weights of these outputs (K, I, k, k).

    Returns:
        Weights (K, I, k, k), offsets (K,).
    """
    depthwise, padding = conv.groups > 1, conv.padding
    assert not isinstance(padding, str)
    unknowns = weight[0].numel()
    count = max(_CELLS[0], _CELLS[1] * unknowns)
    per_image = max(1, count // len(x_BCHW))
    generator = torch.Generator().manual_seed(0)
    patches, targets = [], []
    for x_CHW, y_CHW in zip(x_BCHW, y_BCHW, strict=True):
        columns = F.unfold(x_CHW[None], conv.kernel_size, conv.dilation, padding, conv.stride)[0]
        cells = torch.randperm(columns.shape[1], generator=generator)[:per_image]
        patches.append(columns[:, cells].T)
        targets.append(y_CHW.flatten(1)[:, cells].T)
    x_ND, y_NK = torch.cat(patches), torch.cat(targets)
    if depthwise:  # a regression of its own for every channel
        x_GND = x_ND.view(len(x_ND), len(weight), unknowns).transpose(0, 1)
        y_GNK = y_NK.T[..., None]
        w_GDK = weight.flatten(1)[..., None]
    else:
        x_GND, y_GNK, w_GDK = x_ND[None], y_NK[None], weight.flatten(1).T[None]
    x_mean, y_mean = x_GND.mean(1, keepdim=True), y_GNK.mean(1, keepdim=True)
    x_GND, y_GNK = x_GND - x_mean, y_GNK - y_mean
    gram = (x_GND.transpose(1, 2) @ x_GND).double()
    missing = (x_GND.transpose(1, 2) @ (y_GNK - x_GND @ w_GDK)).double()
    energy = gram.diagonal(dim1=1, dim2=2)
    gram = gram + torch.diag_embed(RIDGE * energy + 1e-6 * energy.mean(1, keepdim=True) + 1e-12)
    change = torch.cholesky_solve(missing, torch.linalg.cholesky(gram))
    w_GDK = w_GDK + change.to(w_GDK)
    offset = (y_mean - x_mean @ w_GDK).flatten()
    return w_GDK.transpose(1, 2).reshape(weight.shape), offset


def _set_statistics(goal: _Goal | None, norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Let BatchNorm give mean and variance of the source's; where there is no goal, mean 0 and variance 1."""
    assert norm.running_mean is not None and norm.running_var is not None
    variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
    if goal is not None:
        outputs = goal.outputs
        assert goal.mean is not None and goal.variance is not None
        if goal.exact:
            mean[outputs], variance[outputs] = norm.running_mean[outputs], norm.running_var[outputs]
        else:
            wanted_variance, wanted_mean = torch.var_mean(goal.y_BCHW, (0, 2, 3), correction=0)
            share = (variance[outputs] + EPS) / (wanted_variance + EPS)
            mean[outputs] -= (wanted_mean - goal.mean) * share.sqrt()
            variance[outputs] = (goal.variance + EPS) * share - EPS
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp(min=0))


def _convs(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of a row's module that learn, by name."""
    for path, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and not path.startswith("dfl."):
            yield path, part


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the convolutions of a module give, by their names."""
    given: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, __: object, output: Tensor) -> None:
        given[path] = output

    handles = [conv.register_forward_hook(partial(keep, path)) for path, conv in _convs(module)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _first(batches: Sequence[Tensor], pixels: int) -> Iterator[Tensor]:
    """The first batches, of so many pixels in all, and at least one."""
    for x_BCHW in batches:
        yield x_BCHW
        pixels -= len(x_BCHW) * x_BCHW.shape[2] * x_BCHW.shape[3]
        if pixels <= 0:
            return
