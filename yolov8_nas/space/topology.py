"""An architecture as the rows of an Ultralytics yaml: stock modules only.

A C2f block is unrolled into stock rows: two 1x1 convolutions on the same input (the halves of C2f's first
convolution), the bottlenecks, Concat, and the closing 1x1 convolution. Unrolled stock YOLOv8 computes what C2f
computes; what it gains is that every operator of the space has a stock row, so that a checkpoint loads where only
Ultralytics is installed.

Ultralytics' yaml has no key for the class branch of the head: its parser builds the depthwise-separable one in every
network in which it has met a `C3k2` (YOLO11's block), and the dense one in all others. So a network with that class
branch has one C3k2 of two tiny 1x1 convolutions on P5 (`SWITCH`) whose output nobody reads. It makes Ultralytics'
trainer, which builds a network anew from its yaml, build the same head. In an exported ONNX file it is not there.
"""

from __future__ import annotations

from typing import Any, Final

from yolov8_nas.space.space import LEVELS, Architecture, Block, Head, is_backbone

Row = list[Any]

STOCK_BINS: Final = Head().reg_max

SWITCH: Final = "class_switch"
"""Name of the row that makes Ultralytics build the depthwise-separable class branch."""

SWITCH_CHANNELS: Final = (2, 8)
"""Output channels of its two 1x1 convolutions."""


def model_rows(architecture: Architecture) -> list[tuple[str, Row]]:
    """The rows of the network's yaml, each with the name of the supernet module it is derived from.

    Names: the stride-2 convolutions, `sppf` and `attention` by their own name; of a C2f block `<block>.split0`,
    `<block>.split1`, `<block>.layers.<i>`, `<block>.concat`, `<block>.merge`; `detect`; `upsample_p4`, `concat_...`
    and `SWITCH` for the rest.

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
    if architecture.head.classes == "dwsep3":
        hidden, closing = SWITCH_CHANNELS
        add(SWITCH, -1, "C3k2", [closing, False, hidden / 2 / closing], repeats=0)
    add("detect", [outputs[level] for level in LEVELS], "Detect", ["nc"])
    return rows


def model_yaml(architecture: Architecture, num_classes: int) -> dict[str, Any]:
    """The Ultralytics model yaml of an architecture: stock modules only, nothing scaled.

    The key `reg_max` is there where it is not Ultralytics' own value.

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
        **({} if architecture.head.reg_max == STOCK_BINS else {"reg_max": architecture.head.reg_max}),
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
