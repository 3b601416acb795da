"""The weight-sharing supernet: one set of weights that holds every network of a space.

The supernet has no topology of its own. It walks the rows of the active architecture (`space.topology.model_rows`),
the same rows from which the stand-alone network is built, and applies to each the elastic layer of the row's name. So
every elastic dimension comes from one place: depth is a shorter list of rows, width and expansion are fewer channels of
the members, the operator is an argument.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write, read_json, room
from yolov8_nas.space import Architecture, Head, SearchSpace, is_backbone
from yolov8_nas.space.topology import Row, model_rows
from yolov8_nas.supernet.elastic import ElasticBottleneck, ElasticConv, ElasticDetect, ElasticPSA, ElasticSPPF, State

WEIGHTS: Final = "supernet.safetensors"
DETAILS: Final = "supernet.json"

_WITHOUT_WEIGHTS: Final = ("Concat", "nn.Upsample", "C3k2")
"""Rows of which the supernet holds nothing; the C3k2 is `topology.SWITCH`."""


@dataclass(frozen=True)
class Step:
    """One row of the active architecture, ready to run.

    Attributes:
        name: The row's name; also the elastic module's, where the row has weights.
        sources: Indices of the steps that give the input; empty for the image.
        row: The row itself.
        members: Active channels of each member of the input; of Detect, the channels of P3, P4 and P5.
        operator: The operator of a bottleneck.
    """

    name: str
    sources: tuple[int, ...]
    row: Row
    members: tuple[int, ...]
    operator: str


class Supernet(nn.Module):
    """Shared weights of all networks of a space, one of which is active at a time.

    Args:
        space: The networks.
        num_classes: Number of classes.
        names: Class names; `0`, `1`, ... unless given.
    """

    def __init__(self, space: SearchSpace, num_classes: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.space = space
        self.num_classes = num_classes
        self.names = tuple(names) if names is not None else tuple(str(i) for i in range(num_classes))
        if len(self.names) != num_classes:
            raise InputError(f"{len(self.names)} class names for {num_classes} classes; give one name per class")
        options = {dimension.name: dimension.options for dimension in space.dimensions}
        for step in network_steps(space.largest()):
            layer = _elastic_layer(step, options, num_classes)
            if layer is not None:
                self._add(step.name, layer)
        self.activate(space.largest())

    def _add(self, name: str, layer: nn.Module) -> None:
        """Register `layer` under a dotted name, so that a row's name is the name of its module."""
        parent: nn.Module = self
        *parents, last = name.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)

    def activate(self, architecture: Architecture) -> None:
        """Choose the network that `forward` computes.

        Raises:
            SpaceError: The architecture is not in the space.
        """
        self.space.encode(architecture)
        self.active = architecture
        self._active_steps = network_steps(architecture)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Raw head outputs of the active network, in training as in evaluation mode.

        Args:
            x_BCHW: Images, RGB in 0..1, height and width multiples of 32.

        Returns:
            `boxes` (B, 4 * bins, A), `scores` (B, classes, A) as logits, `feats` the maps of P3, P4 and P5.
        """
        outputs: list[Any] = []
        for step in self._active_steps:
            inputs = [outputs[i] for i in step.sources] or [x_BCHW]
            outputs.append(self._run(step, inputs))
        return outputs[-1]  # type: ignore[no-any-return]

    def _run(self, step: Step, inputs: list[Tensor]) -> Any:
        _, repeats, module, arguments = step.row
        match module:
            case "Concat":
                return torch.cat(inputs, 1)
            case "nn.Upsample":
                return F.interpolate(inputs[0], scale_factor=2.0, mode="nearest")
            case "C3k2":  # nobody reads it
                return None
        layer = self.get_submodule(step.name)
        match layer:
            case ElasticConv():
                return layer(inputs[0], step.members, *arguments[:2])
            case ElasticBottleneck():
                return layer(inputs[0], step.operator)
            case ElasticSPPF():
                return layer(inputs[0], *arguments)
            case ElasticPSA():
                return layer(inputs[0], repeats)
            case ElasticDetect():
                return layer(inputs, self.active.head)
        raise AssertionError(step)

    def states(self, architecture: Architecture) -> list[State]:
        """The weights of a network: for each of its rows, the state of the stock module (empty without weights).

        Raises:
            SpaceError: The architecture is not in the space.
        """
        self.space.encode(architecture)
        states: list[State] = []
        for step in network_steps(architecture):
            arguments = step.row[3]
            layer = self.get_submodule(step.name) if step.row[2] not in _WITHOUT_WEIGHTS else None
            match layer:
                case ElasticConv():
                    states.append(layer.state(step.members, *arguments[:2]))
                case ElasticBottleneck():
                    states.append(layer.state(arguments[0], step.operator))
                case ElasticSPPF():
                    states.append(layer.state(sum(step.members), arguments[0]))
                case ElasticPSA():
                    states.append(layer.state(arguments[0], step.row[1]))
                case ElasticDetect():
                    states.append(layer.state(step.members, architecture.head))
                case _:
                    states.append({})
        return states

    def save(self, folder: Path, details: Mapping[str, Any]) -> None:
        """Write `supernet.safetensors` and `supernet.json` (the space, the classes and `details`) into a folder."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with room(folder / WEIGHTS, sum(tensor.nbytes for tensor in tensors.values())):
            save_file(tensors, folder / WEIGHTS)
        known = {"space": self.space.to_dict(), "num_classes": self.num_classes, "names": list(self.names)}
        atomic_write(folder / DETAILS, json.dumps({**known, **details}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Supernet:
        """The supernet that `save` wrote, in evaluation mode with its largest network active.

        The description decides how large a supernet is built, so the shapes in the file of weights, which it has the
        bytes for, are compared with it before memory is taken.

        Raises:
            InputError: A file is missing, damaged or of another space.
        """
        try:
            details = read_json(folder / DETAILS)
            names = details["names"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("the names of its classes are no text")
            if details["num_classes"] != len(names):
                raise ValueError("its classes are not as many as their names")
            described = SearchSpace.from_dict(details["space"]), len(names), names
            if not (folder / WEIGHTS).is_file():  # a pipe would be waited for
                raise ValueError(f"there is no file {WEIGHTS}")
            with torch.device("meta"):
                expected = {name: tuple(tensor.shape) for name, tensor in cls(*described).state_dict().items()}
            with safe_open(folder / WEIGHTS, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    raise ValueError(
                        f"{name} has the shape {found.get(name)} in {WEIGHTS} and {expected.get(name)} in {DETAILS}"
                    )
            supernet = cls(*described)
            supernet.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, SafetensorError) as error:
            raise InputError(f"{folder}: not a supernet ({error}); train it again") from None
        return supernet.eval()


def network_steps(architecture: Architecture) -> list[Step]:
    steps: list[Step] = []
    outputs: list[tuple[int, ...]] = []  # of each row, the channels of every member of its output
    for i, (name, row) in enumerate(model_rows(architecture)):
        source, _, module, arguments = row
        relative = source if isinstance(source, list) else [source]
        sources = tuple(s % i for s in relative) if i else ()  # -1 is the row before, others are absolute already
        members = sum((outputs[s] for s in sources), ()) if i else (3,)
        operator = architecture.block(name.split(".")[0]).operator if ".layers." in name else ""
        steps.append(Step(name, sources, row, members, operator))
        outputs.append(members if module in ("Concat", "nn.Upsample", "Detect") else (arguments[0],))
    return steps


def _elastic_layer(step: Step, options: Mapping[str, Sequence[Any]], num_classes: int) -> nn.Module | None:
    """The elastic layer behind a row of the space's largest architecture."""
    _, repeats, module, arguments = step.row
    if step.operator:
        block = step.name.split(".")[0]
        return ElasticBottleneck(arguments[0], options[f"{block}.operator"], shortcut=is_backbone(block))
    match module:
        case "Conv":
            return ElasticConv(step.members, *arguments)
        case "SPPF":
            return ElasticSPPF(sum(step.members), arguments[0])
        case "C2PSA":
            return ElasticPSA(options["sppf.width"], repeats)
        case "Detect":
            heads = [Head(*pair) for pair in itertools.product(options["detect.classes"], options["detect.reg_max"])]
            return ElasticDetect(step.members, num_classes, heads)
    return None
