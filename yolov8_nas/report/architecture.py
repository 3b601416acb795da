"""Draws a detector beside the stock network of its size, as an SVG: backbone, neck downwards, neck upwards, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from yolov8_nas.foreign import html
from yolov8_nas.space import BLOCKS, CONVS, Architecture, Block

OPERATOR_NAMES: Final = {
    "conv3": "3×3",
    "conv5": "5×5",
    "dwsep3": "depthwise 3×3",
    "dwsep5": "depthwise 5×5",
    "dilated3": "dilated 3×3",
}

_CONV_NAMES: Final = {
    "stem": "Stem",
    "down_p2": "Down to P2",
    "down_p3": "Down to P3",
    "down_p4": "Down to P4",
    "down_p5": "Down to P5",
    "neck_down_p4": "Neck down to P4",
    "neck_down_p5": "Neck down to P5",
}
_BLOCK_NAMES: Final = {
    "backbone_p2": "Backbone P2",
    "backbone_p3": "Backbone P3",
    "backbone_p4": "Backbone P4",
    "backbone_p5": "Backbone P5",
    "topdown_p4": "Top-down P4",
    "topdown_p3": "Top-down P3",
    "bottomup_p4": "Bottom-up P4",
    "bottomup_p5": "Bottom-up P5",
}
_NAMES: Final = {**_CONV_NAMES, **_BLOCK_NAMES, "sppf": "SPPF", "attention": "Attention", "detect": "Detect"}
_ORDER: Final = (
    "stem",
    "down_p2",
    "backbone_p2",
    "down_p3",
    "backbone_p3",
    "down_p4",
    "backbone_p4",
    "down_p5",
    "backbone_p5",
    "sppf",
    "attention",
    "topdown_p4",
    "topdown_p3",
    "neck_down_p4",
    "bottomup_p4",
    "neck_down_p5",
    "bottomup_p5",
    "detect",
)

# Geometry in SVG units: a cell is a convolution's strip on top of a C2f block's box.
_WIDTH, _HEIGHT = 972, 574
_BOX, _STRIP, _CARD, _PITCH = 232, 24, 66, 112
_COLUMNS: Final = {"backbone": 4, "topdown": 278, "bottomup": 552, "head": 832}
_TOP: Final = {"p2": 70, "p3": 70 + _PITCH, "p4": 70 + 2 * _PITCH, "p5": 70 + 3 * _PITCH}
_SPPF_TOP: Final = 70 + 4 * _PITCH


@dataclass(frozen=True)
class Part:
    """One row of the comparison with the stock network.

    Attributes:
        name: Name of the part.
        here: What it is in this network.
        stock: What it is in the stock network, empty where there is none to compare with.
        changed: Whether they differ.
    """

    name: str
    here: str
    stock: str
    changed: bool


def parts(architecture: Architecture, stock: Architecture | None) -> list[Part]:
    """Every part in the order of the network, beside its stock counterpart; attention only where there is some."""
    rows = []
    for name in _ORDER:
        if name == "attention" and not architecture.attention:
            continue
        here, there = _describe(architecture, name), "" if stock is None else _describe(stock, name)
        rows.append(Part(_NAMES[name], here, there, stock is not None and here != there))
    return rows


def draw(architecture: Architecture, stock: Architecture | None, *, title: str, identity: str) -> str:
    """The network as an inline SVG; colours come from the page's CSS variables.

    Args:
        architecture: The network to draw.
        stock: The network it is compared with: parts that differ from it are tinted and say what stock has there.
        title: Accessible name of the drawing.
        identity: Unique within the page, for the ids inside the drawing.
    """
    changes = [part for part in parts(architecture, stock) if part.changed]
    described = "; ".join(f"{part.name}: {part.here} (stock {part.stock})" for part in changes)
    body = [*_edges(identity), *_heads(architecture, stock)]
    body += [_conv(architecture, stock, name) for name in CONVS]
    body += [_block(architecture.block(name), stock.block(name) if stock else None, name) for name in BLOCKS]
    body.append(_sppf(architecture, stock))
    if architecture.attention:
        body.append(_attention(architecture, stock))
    identity = html(identity)
    return (
        f'<svg class="network" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{identity}-title {identity}-description">'
        f'<title id="{identity}-title">{html(title)}</title>'
        f'<desc id="{identity}-description">{html(described or "Every part is as in the stock network.")}</desc>'
        f"{''.join(body)}</svg>"
    )


def _describe(architecture: Architecture, name: str) -> str:
    if name in CONVS:
        return f"{architecture.conv(name)} channels"
    if name == "sppf":
        return f"{architecture.sppf_kernel}×{architecture.sppf_kernel}, {architecture.sppf_width} channels"
    if name == "attention":
        return f"{architecture.attention} × PSA" if architecture.attention else "none"
    if name == "detect":
        head = architecture.head
        return f"{OPERATOR_NAMES.get(head.classes, head.classes)} for classes, {head.reg_max} bins for boxes"
    block = architecture.block(name)
    return f"{_layers(block)}, {block.width} channels, {block.hidden} hidden"


def _layers(block: Block) -> str:
    return f"{block.depth} × {OPERATOR_NAMES.get(block.operator, block.operator)}"


def _text(x: float, y: float, content: str, style: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:g}" y="{y:g}" class="{style}"{anchor}>{html(content)}</text>'


def _rect(x: float, y: float, width: float, height: float, style: str, radius: float = 0) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{style}"/>'


def _place(name: str) -> tuple[float, float]:
    """Left and top of the cell that a convolution or block lies in."""
    if name == "stem":
        return _COLUMNS["backbone"], 28
    column = {"topdown": "topdown", "bottomup": "bottomup", "neck": "bottomup"}.get(name.split("_")[0], "backbone")
    return _COLUMNS[column], _TOP[name[-2:]]


def _conv(architecture: Architecture, stock: Architecture | None, name: str) -> str:
    x, y = _place(name)
    width = architecture.conv(name)
    changed = stock is not None and stock.conv(name) != width
    amount = f"{width} ch (stock {stock.conv(name)})" if changed and stock is not None else f"{width} ch"
    style = "strip changed" if changed else "strip"
    return "".join(
        (
            _rect(x, y, _BOX, _STRIP, style, 4),
            _text(x + 10, y + 16, f"{'Stem' if name == 'stem' else 'Conv'} 3×3 /2", "small"),
            _text(x + _BOX - 10, y + 16, amount, "small", end=True),
        )
    )


def _block(block: Block, stock: Block | None, name: str) -> str:
    x, y = _place(name)
    y += _STRIP
    changed = stock is not None and block != stock
    drawn = [
        _rect(x, y, _BOX, _CARD, "card changed" if changed else "card", 4),
        _text(x + 10, y + 18, f"C2f {name[-2:].upper()}", "strong"),
        _text(x + _BOX - 10, y + 18, f"{block.width} ch, {block.hidden} hidden", "strong", end=True),
    ]
    step = min(16.0, 96 / max(block.depth, 1))
    drawn += [
        _rect(x + 10 + i * step, y + 26, step - 4 if step > 8 else step - 1, 12, f"op-{html(block.operator)}", 2)
        for i in range(block.depth)
    ]
    drawn.append(_text(x + 14 + block.depth * step, y + 36, _layers(block), "plain"))
    if stock is not None:
        was = f"stock {_layers(stock)}, {stock.width} ch, {stock.hidden} hidden" if changed else "as stock"
        drawn.append(_text(x + 10, y + 53, was, "note" if changed else "faint"))
        full = max(block.width, stock.width)
        drawn += [
            _rect(x + 10, y + 59, (_BOX - 20) * stock.width / full, 3, "track", 1.5),
            _rect(x + 10, y + 59, (_BOX - 20) * block.width / full, 3, "level", 1.5),
        ]
    return "".join(drawn)


def _sppf(architecture: Architecture, stock: Architecture | None) -> str:
    x, y = _COLUMNS["backbone"], _SPPF_TOP
    here, there = _describe(architecture, "sppf"), "" if stock is None else _describe(stock, "sppf")
    changed = stock is not None and here != there
    drawn = [
        _rect(x, y, _BOX, 46, "card changed" if changed else "card", 4),
        _text(x + 10, y + 18, f"SPPF {architecture.sppf_kernel}×{architecture.sppf_kernel}", "strong"),
        _text(x + _BOX - 10, y + 18, f"{architecture.sppf_width} ch", "strong", end=True),
    ]
    if stock is not None:
        drawn.append(_text(x + 10, y + 36, f"stock {there}" if changed else "as stock", "note" if changed else "faint"))
    return "".join(drawn)


def _attention(architecture: Architecture, stock: Architecture | None) -> str:
    """Attention lies on the way from SPPF into the neck."""
    x, y, width = _COLUMNS["backbone"] + _BOX + 14, _SPPF_TOP, 126
    drawn = [
        _rect(x, y, width, 46, "card" if stock is None else "card changed", 4),
        _text(x + 10, y + 18, "Attention", "strong"),
        _text(x + width - 10, y + 18, _describe(architecture, "attention"), "plain", end=True),
    ]
    if stock is not None:
        drawn.append(_text(x + 10, y + 36, f"stock {_describe(stock, 'attention')}", "note"))
    return "".join(drawn)


def _heads(architecture: Architecture, stock: Architecture | None) -> list[str]:
    drawn = [
        _text(_COLUMNS[name] + (_BOX if name != "head" else 136) / 2, 16, label, "heading")
        for name, label in (
            ("backbone", "Backbone"),
            ("topdown", "Neck, top-down"),
            ("bottomup", "Neck, bottom-up"),
            ("head", "Head"),
        )
    ]
    head, changed = architecture.head, stock is not None and architecture.head != stock.head
    style = "note" if changed else "faint"
    for level, stride in (("p3", 8), ("p4", 16), ("p5", 32)):
        x, y = _COLUMNS["head"], _TOP[level] + _STRIP
        drawn += [
            _rect(x, y + 2, 136, 62, "card changed" if changed else "card", 4),
            _text(x + 10, y + 20, f"Detect {level.upper()}", "strong"),
            _text(x + 126, y + 20, f"stride {stride}", "small", end=True),
            _text(x + 10, y + 38, f"classes {OPERATOR_NAMES.get(head.classes, head.classes)}", style),
            _text(x + 10, y + 54, f"boxes {head.reg_max} bins", style),
        ]
    return drawn


def _edges(identity: str) -> list[str]:
    """The connections. A lateral one leaves a block at its middle; the ones into a concatenation end at the cell."""
    backbone, topdown, bottomup, head = _COLUMNS.values()
    middle = {level: top + _STRIP + _CARD / 2 for level, top in _TOP.items()}
    bottom = {level: top + _STRIP + _CARD for level, top in _TOP.items()}
    centre = _BOX / 2
    arrow = html(f"{identity}-arrow")
    lines = [
        f"M{backbone + centre} 52V{_TOP['p2'] - 2}",
        *(f"M{backbone + centre} {bottom[a]}V{_TOP[b] - 2}" for a, b in (("p2", "p3"), ("p3", "p4"), ("p4", "p5"))),
        f"M{backbone + centre} {bottom['p5']}V{_SPPF_TOP - 2}",
        f"M{backbone + _BOX} {middle['p3']}H{topdown - 2}",
        f"M{backbone + _BOX} {middle['p4']}H{topdown - 2}",
        # SPPF goes up into the top-down path and across into the bottom-up path.
        f"M{backbone + _BOX} {_SPPF_TOP + 23}H{topdown + centre}V{bottom['p4'] + 2}",
        f"M{topdown + centre} {_SPPF_TOP + 23}H{bottomup - 20}V{middle['p5']}H{bottomup - 2}",
        f"M{topdown + centre} {_TOP['p4'] + _STRIP}V{bottom['p3'] + 2}",
        f"M{topdown + _BOX} {middle['p3']}H{head - 2}",
        f"M{bottomup + centre} {middle['p3']}V{_TOP['p4'] - 2}",
        f"M{topdown + _BOX} {middle['p4']}H{bottomup - 2}",
        f"M{bottomup + centre} {bottom['p4']}V{_TOP['p5'] - 2}",
        f"M{bottomup + _BOX} {middle['p4']}H{head - 2}",
        f"M{bottomup + _BOX} {middle['p5']}H{head - 2}",
    ]
    marker = (
        f'<defs><marker id="{arrow}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8Z" class="arrow"/></marker></defs>'
    )
    return [
        marker,
        *(f'<path d="{line}" class="edge" marker-end="url(#{arrow})"/>' for line in lines),
        _text(topdown + centre + 8, (bottom["p3"] + _TOP["p4"] + _STRIP) / 2 + 4, "upsample, concat", "faint"),
        _text(topdown + centre + 8, bottom["p4"] + 40, "upsample, concat", "faint"),
    ]
