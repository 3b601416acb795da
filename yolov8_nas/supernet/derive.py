"""From an architecture to a plain Ultralytics network of stock modules.

A C2f block is unrolled into stock rows: two 1x1 convolutions on the same input (the halves of C2f's first
convolution), the bottlenecks, Concat, and the closing 1x1 convolution. Unrolled stock YOLOv8 computes what C2f
computes; what it gains is that every operator of the space has a stock row, so that a checkpoint loads where only
Ultralytics is installed.

`model_rows` and `model_yaml` need neither torch nor Ultralytics, so both are imported by the functions that use them.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov8_nas.files import replace, room
from yolov8_nas.space import BLOCKS, CONVS, Architecture, Block, is_backbone

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.supernet.supernet import Supernet

Row = list[Any]


def model_rows(architecture: Architecture) -> list[tuple[str, Row]]:
    """The rows of the network's yaml, each with the name of the supernet module it is derived from.

    Names: the stride-2 convolutions, `sppf` and `attention` by their own name; of a C2f block `<block>.split0`,
    `<block>.split1`, `<block>.layers.<i>`, `<block>.concat`, `<block>.merge`; `detect`; `upsample_p4`, `concat_...`
    for the rest.

    Returns:
        (name, [from, repeats, module, arguments]) in the order of the network; the last one is the Detect head.
    """
    rows: list[tuple[str, Row]] = []
    outputs: dict[str, int] = {}

    def add(name: str, source: int | list[int], module: str, arguments: list[Any], repeats: int = 1) -> int:
        rows.append((name, [source, repeats, module, arguments]))
        return len(rows) - 1

    def conv(name: str) -> None:
        outputs[name] = add(name, -1, "Conv", [architecture.conv(name), 3, 2])

    def c2f(name: str) -> None:
        block, source = architecture.block(name), len(rows) - 1
        inner = [add(f"{name}.split{i}", source, "Conv", [block.hidden, 1, 1]) for i in range(2)]
        inner += [add(f"{name}.layers.{i}", -1, *_layer(block, is_backbone(name))) for i in range(block.depth)]
        add(f"{name}.concat", inner, "Concat", [1])
        outputs[name] = add(f"{name}.merge", -1, "Conv", [block.width, 1, 1])

    def concat(name: str, other: str) -> None:
        add(name, [-1, outputs[other]], "Concat", [1])

    conv("stem")
    for level in ("p2", "p3", "p4", "p5"):
        conv(f"down_{level}")
        c2f(f"backbone_{level}")
    outputs["p5"] = add("sppf", -1, "SPPF", [architecture.sppf_width, architecture.sppf_kernel])
    if architecture.attention:
        outputs["p5"] = add("attention", -1, "C2PSA", [architecture.sppf_width], architecture.attention)
    for level in ("p4", "p3"):
        add(f"upsample_{level}", -1, "nn.Upsample", [None, 2, "nearest"])
        concat(f"concat_topdown_{level}", f"backbone_{level}")
        c2f(f"topdown_{level}")
    for level, other in (("p4", "topdown_p4"), ("p5", "p5")):
        conv(f"neck_down_{level}")
        concat(f"concat_bottomup_{level}", other)
        c2f(f"bottomup_{level}")
    add("detect", [outputs["topdown_p3"], outputs["bottomup_p4"], outputs["bottomup_p5"]], "Detect", ["nc"])
    return rows


def model_yaml(architecture: Architecture, num_classes: int) -> dict[str, Any]:
    """The Ultralytics model yaml of an architecture: stock modules only, nothing scaled.

    Args:
        architecture: The network.
        num_classes: Number of classes of the Detect head.
    """
    names, rows = zip(*model_rows(architecture), strict=True)
    neck = names.index("upsample_p4")
    return {
        "nc": num_classes,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "backbone": list(rows[:neck]),
        "head": list(rows[neck:]),
    }


def _layer(block: Block, shortcut: bool) -> tuple[str, list[Any]]:
    """Module and arguments of one bottleneck of a C2f block."""
    c = block.hidden
    match block.operator:
        case "conv3" | "conv5":
            k = int(block.operator[-1])
            return "Bottleneck", [c, shortcut, 1, [k, k], 1.0]
        case "dwsep3" | "dwsep5":
            return "Bottleneck", [c, shortcut, c, [1, int(block.operator[-1])], 1.0]
        case "dilated3":
            return "Conv", [c, 3, 1, None, 1, 2]
    raise AssertionError(block.operator)


def build(architecture: Architecture, num_classes: int, names: Sequence[str] | None = None) -> DetectionModel:
    """A plain Ultralytics network with fresh weights.

    Args:
        architecture: The network.
        num_classes: Number of classes of the Detect head.
        names: Class names; `0`, `1`, ... unless given.

    Returns:
        A `DetectionModel` of stock modules in training mode, its rows in the order of `model_rows`.
    """
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(model_yaml(architecture, num_classes), verbose=False)
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
    for module, state in zip(model.model, supernet.states(architecture), strict=True):
        fixed = {  # what a supernet does not hold: counters, and the constant weights of DFL
            name: tensor for name, tensor in module.state_dict().items() if name not in state
        }
        assert all(name.endswith("num_batches_tracked") or name == "dfl.conv.weight" for name in fixed), fixed.keys()
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
