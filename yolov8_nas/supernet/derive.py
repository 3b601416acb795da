"""From an architecture to a plain Ultralytics network, built from its rows (`space.topology`)."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov8_nas.files import replace, room
from yolov8_nas.space import BLOCKS, CONVS, Architecture, Block
from yolov8_nas.space.topology import SWITCH, model_rows, model_yaml

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.supernet.supernet import Supernet


def build(architecture: Architecture, num_classes: int, names: Sequence[str] | None = None) -> DetectionModel:
    """A plain Ultralytics network with fresh weights.

    Args:
        architecture: The network.
        num_classes: Number of classes of the Detect head.
        names: Class names; `0`, `1`, ... unless given.

    Returns:
        A `DetectionModel` of stock modules in training mode, its rows in the order of `model_rows`.
    """
    import torch
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(model_yaml(architecture, num_classes), verbose=False)
    for (name, _), row in zip(model_rows(architecture), model.model, strict=True):
        if name == SWITCH:  # nobody reads it: it has no weights by chance
            for conv in (row.cv1.conv, row.cv2.conv):
                torch.nn.init.constant_(conv.weight, 1 / conv.in_channels)
    if names is not None:
        model.names = dict(enumerate(names))
    return model


def derive(supernet: Supernet, architecture: Architecture) -> DetectionModel:
    """The stand-alone network of an architecture, with copies of its weights and BatchNorm statistics.

    A supernet keeps no running statistics while it trains: recalibrate the network (`batchnorm.recalibrate`) before it
    is evaluated. Which architecture is active in the supernet does not matter and does not change.

    Raises:
        SpaceError: The architecture is not in the supernet's space.
    """
    model = build(architecture, supernet.num_classes, supernet.names).to(next(supernet.parameters()))
    rows = model_rows(architecture)
    for (row, _), module, state in zip(rows, model.model, supernet.states(architecture), strict=True):
        fixed = {  # what a supernet does not hold: counters, the constant weights of DFL, and what nobody reads
            name: tensor for name, tensor in module.state_dict().items() if name not in state
        }
        assert row == SWITCH or all(
            name.endswith("num_batches_tracked") or name == "dfl.conv.weight" for name in fixed
        ), fixed.keys()
        module.load_state_dict({**fixed, **state})
    return model


def add_one_to_one(model: DetectionModel) -> DetectionModel:
    """Give a network the NMS-free head that Ultralytics has: a branch beside YOLOv8's, in which each object is one box.

    YOLOv8's branch learns many boxes for an object (one-to-many), the other one box (one-to-one; YOLOv10,
    arXiv:2405.14458). It learns from features that it does not change, so the network needs the first branch to learn
    at all; for inference `fuse` leaves the one that `model.end2end` names, which is the new one from here on. It starts
    from copies of the first one's weights, as Ultralytics' own does.

    Args:
        model: A network with YOLOv8's head, not quantized; it is changed.

    Returns:
        The same network.
    """
    head = model.model[-1]
    head.one2one_cv2, head.one2one_cv3 = copy.deepcopy(head.cv2), copy.deepcopy(head.cv3)
    model.yaml = {**model.yaml, "end2end": True}  # Ultralytics' trainer builds the network anew from it
    model.end2end = True
    return model


def architecture_of(stock: DetectionModel) -> Architecture:
    """The architecture of a detection network with the modules of Ultralytics' `yolov8.yaml`, of any size."""
    convs, c2fs, sppf, _ = _stock_modules(stock)

    def block(c2f: Any) -> Block:
        width = c2f.cv2.conv.out_channels
        return Block(depth=len(c2f.m), width=width, expansion=c2f.c / width, operator="conv3")

    return Architecture(
        convs=tuple(conv.conv.out_channels for conv in convs.values()),
        blocks=tuple(block(c2f) for c2f in c2fs.values()),
        sppf_kernel=sppf.m.kernel_size,
        sppf_width=sppf.cv2.conv.out_channels,
        attention=0,
    )


def _stock_modules(stock: DetectionModel) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """The convolutions and the C2f blocks by name, SPPF and Detect."""
    from ultralytics.nn.modules import SPPF, C2f, Conv, Detect

    def modules(kind: type) -> list[Any]:
        return [module for module in stock.model if type(module) is kind]

    convs, c2fs = dict(zip(CONVS, modules(Conv), strict=True)), dict(zip(BLOCKS, modules(C2f), strict=True))
    (sppf,), (detect,) = modules(SPPF), modules(Detect)
    return convs, c2fs, sppf, detect


def unroll(stock: DetectionModel) -> DetectionModel:
    """The same network as stock YOLOv8 with its C2f blocks unrolled into the rows of `model_rows`.

    Args:
        stock: A detection network with the modules of Ultralytics' `yolov8.yaml`, of any size.

    Returns:
        A new network with copied weights; its outputs are the same.
    """
    convs, c2fs, sppf, detect = _stock_modules(stock)
    architecture = architecture_of(stock)
    model = build(architecture, detect.nc, [stock.names[i] for i in range(detect.nc)])
    model.to(next(stock.parameters()))
    for (name, _), module in zip(model_rows(architecture), model.model, strict=True):
        match name.split("."):
            case ["sppf"]:
                module.load_state_dict(sppf.state_dict())
            case ["detect"]:
                if getattr(detect, "one2one_cv2", None) is not None:
                    add_one_to_one(model).end2end = stock.end2end
                module.load_state_dict(detect.state_dict())
            case [conv] if conv in convs:
                module.load_state_dict(convs[conv].state_dict())
            case [c2f_name, "split0" | "split1" as half]:
                c2f = c2fs[c2f_name]
                part = slice(0, c2f.c) if half == "split0" else slice(c2f.c, None)
                state = c2f.cv1.state_dict()
                module.load_state_dict({key: value[part] if value.ndim else value for key, value in state.items()})
            case [c2f_name, "layers", index]:
                module.load_state_dict(c2fs[c2f_name].m[int(index)].state_dict())
            case [c2f_name, "merge"]:
                module.load_state_dict(c2fs[c2f_name].cv2.state_dict())
    return model.train(stock.training)


def save_checkpoint(
    model: DetectionModel, path: Path, *, names: Sequence[str], imgsz: int, modelopt: Mapping[str, Any] | None = None
) -> None:
    """Write a plain Ultralytics checkpoint, in full precision and atomically.

    It refers to stock classes only: `YOLO(path)` validates, predicts, exports and trains it where this package is not
    installed.

    Args:
        model: A network of stock modules, as `build` or `derive` gives it; it is not changed.
        path: The file, by custom with the suffix `.pt`.
        names: Class names.
        imgsz: Side of the square input in pixels that the network was trained for.
        modelopt: What Ultralytics keeps of fake quantization beside the network, if there is any.
    """
    import torch
    import ultralytics

    model = copy.deepcopy(model).float().cpu().eval()
    model.names = dict(enumerate(names))
    model.args = {"task": "detect", "imgsz": imgsz}
    for leftover in ("criterion", "pt_path"):  # a loss from training, and the path of the machine it came from
        model.__dict__.pop(leftover, None)
        model._modules.pop(leftover, None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    checkpoint = {
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": dict(model.args),
        "train_metrics": {},
        "date": datetime.datetime.now(datetime.UTC).isoformat(),
        "version": ultralytics.__version__,
        "license": "AGPL-3.0",
    }
    if modelopt is not None:
        checkpoint["modelopt"] = modelopt
    partial = path.with_name(f".{path.name}.tmp")
    with room(path):
        torch.save(checkpoint, partial)
    replace(partial, path)
