"""Images of the val split with the boxes of what ships and of stock, side by side."""

from __future__ import annotations

import base64
from typing import Any, Final

from markupsafe import Markup

from yolov8_nas.foreign import html
from yolov8_nas.report.evidence import Outputs
from yolov8_nas.runner.results import DrawnBox, Picture, PicturesResult

_FOLDER: Final = "pictures"
_CELL, _GAP, _TOP = 320, 16, 22
"""Longer side of an image, what lies between two, and room for a heading, in units of a drawing."""

_CROWDED: Final = 12
"""Boxes of an image from which their labels would hide it."""

_LARGEST: Final = 1_000_000
"""Bytes of a copy from which it is left out: the export writes far smaller ones."""


def view(export: Outputs, identity: str, *, allowed: bool, room: int) -> dict[str, Any]:
    """The pictures of a target as the template shows them, the worst first; without any, why there are none.

    Args:
        export: The output of trt-export.
        identity: Unique within the page, for the ids inside the drawings.
        allowed: Whether the configuration allows pictures in the report.
        room: Characters that the drawings may take together; those that come last are left out first.
    """
    if not allowed:
        return _missing("Pictures are left out, as the configuration says (report.images = false).")
    result = export.result(PicturesResult)
    if result is None or export.folder is None:
        if export.status in ("done", "cached"):
            return _missing("No stock network was trained in this run, so there is nothing to show side by side.")
        return _missing(export.why_missing("pictures"))
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(result.images):
        image = _image(export, picture)
        if image is None:
            continue
        drawing = draw(picture, image, result, identity=f"{identity}-picture-{number}")
        if len(drawing) > room:
            break
        room -= len(drawing)
        rows.append({"name": picture.name, "svg": Markup(drawing), "told": told(picture, result)})
    left_out = len(result.images) - len(rows)
    told_left_out = f" {left_out} more are left out, to keep the report small." if rows and left_out else ""
    if not rows:
        return _missing("Pictures are left out, to keep the report small." if result.images else "There are no images.")
    return {
        "missing": "",
        "rows": rows,
        "note": (
            f"Of {result.of} validation images these are the ones in which both networks together miss the most boxes, "
            f"the worst first: what is shown here is worse than the average, for both.{told_left_out} Detections count "
            f"from a confidence of {result.confidence:g} on, and are right where they overlap a true box of their "
            f"class by {result.iou:g} (intersection over union)."
        ),
    }


def told(picture: Picture, result: PicturesResult) -> str:
    """What both networks make of a picture, in words."""
    sides = ((result.ours, picture.ours), (result.stock, picture.stock))
    each = (f"{name}: {len(one.missed)} missed, {sum(not box.right for box in one.found)} wrong" for name, one in sides)
    return f"{picture.boxes} true box{'es' * (picture.boxes != 1)}; {'; '.join(each)}"


def draw(picture: Picture, image: bytes, result: PicturesResult, *, identity: str) -> str:
    """Both sides as one SVG: the image is in it once, and shown twice.

    Args:
        picture: The image's boxes.
        image: The image as JPEG.
        result: What networks and classes are called.
        identity: Unique within the page.
    """
    # In units of a drawing, whatever the pixels are, so that lines and letters have one size in all of them.
    scale = _CELL / max(picture.width, picture.height)
    width, height = picture.width * scale, picture.height * scale
    content = base64.b64encode(image).decode()
    sides = []
    for left, name, one in ((0, result.ours, picture.ours), (_CELL + _GAP, result.stock, picture.stock)):
        shown = (
            f'<image id="{html(identity)}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
            f'href="data:image/jpeg;base64,{content}"/>'
            if not left
            else f'<use href="#{html(identity)}"/>'
        )
        labelled = [(box, "missed", f"missed {_name(box, result)}") for box in one.missed]
        for box in one.found:
            kind = "right" if box.right else "wrong"
            labelled.append((box, kind, f"{_name(box, result)} {box.confidence or 0:.2f}"))
        crowded = len(labelled) > _CROWDED
        boxes = [_box(box, scale, width, kind, text, hidden=crowded) for box, kind, text in labelled]
        heading = f'<text class="side" x="{left}" y="14">{html(name)}</text>'
        sides.append(f'{heading}<g transform="translate({left} {_TOP})">{shown}{"".join(boxes)}</g>')
    described = html(f"{picture.name}: {told(picture, result)}")
    return (
        f'<svg class="picture" viewBox="0 0 {2 * _CELL + _GAP} {height + _TOP:.1f}" role="img" '
        f'aria-label="{described}">{"".join(sides)}</svg>'
    )


def _box(box: DrawnBox, scale: float, width: float, kind: str, text: str, *, hidden: bool) -> str:
    """A box with its label; one that would hide the image is shown where somebody points at the box."""
    left, top, right, bottom = (value * scale for value in box.box)
    place = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    rectangle = f'<rect class="{kind}" {place}><title>{html(text)}</title></rect>'
    if hidden:
        return rectangle
    above = top - 3 if top > 15 else top + 14
    x, anchor = (right, ' text-anchor="end"') if left > 0.6 * width else (left, "")
    return f'{rectangle}<text class="{kind}" x="{x:.1f}" y="{above:.1f}"{anchor}>{html(text)}</text>'


def _name(box: DrawnBox, result: PicturesResult) -> str:
    return result.classes[box.label] if box.label in range(len(result.classes)) else str(box.label)


def _image(export: Outputs, picture: Picture) -> bytes | None:
    """The copy of an image, if it is a JPEG of a size that the export writes and lies where it should."""
    assert export.folder is not None
    folder = export.folder / _FOLDER
    file = folder / picture.file
    if file.parent != folder or not file.is_file() or file.is_symlink() or file.stat().st_size > _LARGEST:
        return None
    content = file.read_bytes()
    return content if content.startswith(b"\xff\xd8\xff") else None


def _missing(why: str) -> dict[str, Any]:
    return {"missing": why, "rows": [], "note": ""}
