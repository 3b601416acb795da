"""Demo data: procedurally made pictures of metal and fabric surfaces with defects, as an inspection camera sees them.

Every picture is composed in float32 from a surface, at most four defects, lighting, lens blur and sensor noise. A
defect's box is the bounding rectangle of the pixels that drawing it changed, so boxes are exact by construction.
Surfaces carry regular features that are no defects (tool marks, dust, thick threads, folds), so that a detector has
something to tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov8_nas.errors import InputError
from yolov8_nas.files import write_file

CLASSES = ("scratch", "dent", "hole", "stain")

Image = NDArray[np.float32]  # (size, size, 3), BGR, 0 to 255; a plane is (size, size)

_VISIBLE = 8.0  # a pixel belongs to a defect when drawing it changed a channel by more than this many grey levels
_SMALLEST, _LARGEST = 0.10, 0.55  # sides of a box as a share of the image's side
_DEFECTS_PER_IMAGE = (0.10, 0.34, 0.30, 0.18, 0.08)  # share of images with 0, 1, 2, 3, 4 defects
_FABRICS = ((150, 118, 92), (122, 146, 160), (148, 150, 150), (112, 140, 128), (128, 124, 168), (165, 178, 186))  # BGR
_STAINS = ((34, 48, 70), (30, 34, 36), (40, 62, 98), (84, 58, 48))  # coffee, oil, rust, ink; BGR


@dataclass(frozen=True)
class Defect:
    """One defect of a picture.

    Attributes:
        label: Index into `CLASSES`.
        left: First column of the defect, in pixels.
        top: First row.
        right: Column after the last.
        bottom: Row after the last.
    """

    label: int
    left: int
    top: int
    right: int
    bottom: int


def make_demo(
    folder: Path,
    images: int = 320,
    size: int = 160,
    seed: int = 0,
    val_share: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the demo as a YOLO dataset: `data.yaml`, `images/{train,val}/*.png`, `labels/{train,val}/*.txt`.

    The same arguments give the same bytes (with the same versions of NumPy and OpenCV). Picture `i` depends on `seed`
    and `i` alone, so a larger demo contains the smaller one's pictures.

    Args:
        folder: Where to write: a new or an empty folder.
        images: Number of pictures, at least 2.
        size: Side of a picture in pixels, at least 64.
        seed: Seed of the pictures.
        val_share: Share of the pictures that goes to `val`, spread evenly.
        progress: Is told how many pictures of how many are made.

    Returns:
        The path of `data.yaml`.

    Raises:
        InputError: The folder holds something already.
    """
    if images < 2 or size < 64 or not 0 < val_share < 1:
        raise ValueError(f"images={images}, size={size}, val_share={val_share}: give at least 2 images of 64 pixels")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; give a new or an empty folder")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)

    for i in range(images):
        # Half a step ahead, so that the counts are the shares rounded, not cut off.
        val_before, val_after = (math.floor(n * val_share + 0.5) for n in (i, i + 1))
        split = "val" if val_after > val_before else "train"
        picture, defects = render(size, np.random.default_rng((seed, i)))
        encoded, png = cv2.imencode(".png", picture)
        assert encoded
        write_file(folder / "images" / split / f"part_{i:04d}.png", png.tobytes())
        lines = [
            f"{d.label} {(d.left + d.right) / 2 / size:.6f} {(d.top + d.bottom) / 2 / size:.6f} "
            f"{(d.right - d.left) / size:.6f} {(d.bottom - d.top) / size:.6f}\n"
            for d in defects
        ]
        write_file(folder / "labels" / split / f"part_{i:04d}.txt", "".join(lines))
        if progress:
            progress(i + 1, images)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    data_yaml = folder / "data.yaml"
    write_file(data_yaml, f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return data_yaml


def render(size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], tuple[Defect, ...]]:
    """Draw one picture.

    Returns:
        The picture, (size, size, 3) BGR, and its defects with exact boxes that do not touch each other.
    """
    scale = size / 160  # lengths below are in pixels of a 160-pixel picture
    metal = bool(rng.random() < 0.5)
    picture = _metal(size, scale, rng) if metal else _fabric(size, scale, rng)
    light = rng.uniform(0, 2 * math.pi)
    defects: list[Defect] = []
    taken = np.zeros((size, size), bool)
    for _ in range(int(rng.choice(len(_DEFECTS_PER_IMAGE), p=_DEFECTS_PER_IMAGE))):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(12):  # tries: a place that overlaps another defect, or a size out of bounds, is drawn again
            drawn = _PAINTERS[label](picture, metal, light, scale, rng)
            box = _bounds((np.abs(drawn - picture) > _VISIBLE).any(axis=2))
            if box is None:
                continue
            left, top, right, bottom = box
            sides = (right - left) / size, (bottom - top) / size
            gap = max(2, round(3 * scale))
            around = taken[max(0, top - gap) : bottom + gap, max(0, left - gap) : right + gap]
            if min(sides) < _SMALLEST or max(sides) > _LARGEST or around.any():
                continue
            taken[top:bottom, left:right] = True
            picture = drawn
            defects.append(Defect(label, left, top, right, bottom))
            break
    picture = picture * _lighting(size, light, metal, rng)[..., None]
    picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.35, 0.6)) * scale)
    picture = picture + np.float32(rng.uniform(1.5, 4.0)) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), tuple(defects)


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom (the last two exclusive) of what is set."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _grid(size: int) -> tuple[Image, Image]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + np.float32(0.5)
    return x, y


def _noise(shape: tuple[int, int], sigma_x: float, sigma_y: float, rng: np.random.Generator) -> Image:
    """Smooth noise of mean 0 and standard deviation 1."""
    height, width = shape
    step_x, step_y = max(1, int(sigma_x // 6)), max(1, int(sigma_y // 6))  # wide blurs are done small and enlarged
    small = rng.standard_normal((math.ceil(height / step_y), math.ceil(width / step_x)), dtype=np.float32)
    noise = cv2.GaussianBlur(small, (0, 0), sigma_x / step_x, sigmaY=sigma_y / step_y, borderType=cv2.BORDER_REFLECT)
    if small.shape != shape:
        noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray((noise - noise.mean()) / (noise.std() + 1e-6), np.float32)


# Surfaces ------------------------------------------------------------------------------------------------------------


def _metal(size: int, scale: float, rng: np.random.Generator) -> Image:
    """A brushed sheet: streaks along one direction, tool marks, dust."""
    wide = math.ceil(size * 1.5)  # turned below, so the corners must be covered
    streaks = (
        6.0 * _noise((wide, wide), 26 * scale, 0.6 * scale, rng)
        + 3.5 * _noise((wide, wide), 70 * scale, 2.5 * scale, rng)
        + 2.5 * _noise((wide, wide), 3 * scale, 0.7 * scale, rng)
    )
    for _ in range(rng.integers(0, 4)):  # feed lines of the brush: along the grain, edge to edge, never a defect
        row = rng.uniform(0.2, 0.8) * wide
        distance = np.abs(np.arange(wide, dtype=np.float32) - row) / (0.9 * scale)
        streaks += (rng.choice((-1, 1)) * rng.uniform(8, 20) * np.exp(-(distance**2)))[:, None].astype(np.float32)
    turn = cv2.getRotationMatrix2D((wide / 2, wide / 2), float(rng.uniform(0, 180)), 1.0)
    streaks = cv2.warpAffine(streaks, turn, (wide, wide), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    margin = (wide - size) // 2
    level = rng.uniform(125, 175) + streaks[margin : margin + size, margin : margin + size]
    x, y = _grid(size)
    if rng.random() < 0.4:  # turning marks: concentric arcs about a centre outside the picture
        reach, angle = rng.uniform(1.0, 2.5) * size, rng.uniform(0, 2 * math.pi)
        radius = np.hypot(x - size / 2 - reach * math.cos(angle), y - size / 2 - reach * math.sin(angle))
        level = level + rng.uniform(3, 8) * np.sin(radius * (2 * math.pi / (rng.uniform(5, 10) * scale)))
    for _ in range(rng.integers(0, 8)):  # dust
        centre = rng.uniform(0, size, 2)
        spot = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * (rng.uniform(0.5, 1.2) * scale) ** 2))
        level = level + rng.choice((-1, 1)) * rng.uniform(25, 60) * spot
    tint = np.array([1.0, 0.985, 0.97]) if rng.random() < 0.6 else np.array([0.93, 0.975, 1.0])
    return np.asarray(level[..., None] * tint, np.float32)


def _fabric(size: int, scale: float, rng: np.random.Generator) -> Image:
    """A weave: threads over and under each other, uneven in tone, some of them thick."""
    x, y = _grid(size)
    angle, pitch = math.radians(rng.uniform(-10, 10)), rng.uniform(4.5, 7.0) * scale
    bend = 0.5 * _noise((size, size), 22 * scale, 22 * scale, rng)
    u = (x * math.cos(angle) + y * math.sin(angle)) / pitch + 0.4 * bend + 50
    v = (-x * math.sin(angle) + y * math.cos(angle)) / pitch + 0.3 * bend + 50
    column, row = np.floor(u).astype(int) % 256, np.floor(v).astype(int) % 256
    twill = rng.random() < 0.5
    warp_on_top = (column + row) % 3 == 0 if twill else (column + row) % 2 == 0
    across = np.where(warp_on_top, np.abs(np.sin(math.pi * u)), np.abs(np.sin(math.pi * v)))
    tones = rng.normal(1.0, 0.045, (2, 256))
    for thread in rng.integers(50, 75, rng.integers(0, 3)):  # slubs: single threads of another tone, edge to edge
        tones[rng.integers(2), thread] += rng.choice((-1, 1)) * rng.uniform(0.12, 0.22)
    tone = np.where(warp_on_top, tones[0][column], tones[1][row] * rng.uniform(0.86, 1.0))
    level = np.asarray((0.74 + 0.30 * across) * tone, np.float32)
    for _ in range(rng.integers(0, 3)):  # folds: wide soft waves of light
        direction = rng.uniform(0, math.pi)
        along = x * math.cos(direction) + y * math.sin(direction) - rng.uniform(0.2, 0.8) * size
        wave = rng.choice((-1, 1)) * rng.uniform(0.05, 0.12) * np.exp(-((along / (14 * scale)) ** 2))
        level = level * np.asarray(1 + wave, np.float32)
    dye = np.array(_FABRICS[rng.integers(len(_FABRICS))]) * rng.uniform(0.95, 1.15)
    return np.asarray(np.clip(level[..., None] * dye, 0, 255), np.float32)


def _lighting(size: int, light: float, metal: bool, rng: np.random.Generator) -> Image:
    """Gain per pixel: a slope towards the lamp, fall-off at the corners, on metal a soft reflection."""
    x, y = (np.asarray(plane / size - 0.5, np.float32) for plane in _grid(size))
    towards = x * math.cos(light) + y * math.sin(light)
    gain = 1 + rng.uniform(0.05, 0.35) * towards - rng.uniform(0.1, 0.35) * (x**2 + y**2)
    if metal and rng.random() < 0.6:
        gain = gain + rng.uniform(0.08, 0.2) * np.exp(-(((towards - rng.uniform(-0.4, 0.4)) / 0.16) ** 2))
    return np.asarray(gain, np.float32)


# Defects: each takes the picture and gives a new one with the defect drawn --------------------------------------------


def _scratch(picture: Image, metal: bool, light: float, scale: float, rng: np.random.Generator) -> Image:
    """A thin curved groove: bright edge and shadow on metal; on fabric a pulled thread."""
    size = picture.shape[0]
    length = rng.uniform(0.24, 0.58) * size
    angle = math.radians(rng.uniform(22, 68)) + math.pi / 2 * rng.integers(4)
    along = np.array([math.cos(angle), math.sin(angle)])
    normal = np.array([-along[1], along[0]])
    reach = np.abs(along) * length / 2 + 3 * scale
    middle = rng.uniform(reach, size - reach)
    bow = rng.uniform(-0.16, 0.16) * length
    t = np.linspace(-1, 1, 15)[:, None]
    points = middle + along * t * length / 2 + normal * bow * (1 - t**2)
    if not metal:
        points = points + normal * rng.normal(0, 0.7 * scale, (15, 1))
    x, y = _grid(size)
    distance, position = _to_path(x, y, points)
    half = rng.uniform(0.8, 1.5) * scale * np.sqrt(np.clip(1.1 - (2 * position - 1) ** 2, 0.1, 1))  # tapers off
    groove = np.clip(half - np.abs(distance) + 0.5, 0, 1)
    edge = np.clip(half - np.abs(distance - 1.6 * scale) + 0.5, 0, 1) * (1 - groove)
    side = 1.0 if normal @ [math.cos(light), math.sin(light)] > 0 else -1.0
    if side < 0:
        edge = np.clip(half - np.abs(distance + 1.6 * scale) + 0.5, 0, 1) * (1 - groove)
    depth = rng.uniform(48, 90)
    bright = rng.random() < 0.6
    change = depth * groove - 0.6 * depth * edge if bright else -depth * groove + 0.6 * depth * edge
    return np.asarray(picture + change[..., None], np.float32)


def _dent(picture: Image, metal: bool, light: float, scale: float, rng: np.random.Generator) -> Image:
    """A smooth hollow, seen by its shading: dark towards the lamp, bright away from it."""
    size = picture.shape[0]
    a = rng.uniform(0.085, 0.21) * size
    b = a * rng.uniform(0.65, 1.0)
    u, v, turn = _ellipse_frame(size, a, b, rng)
    r2 = u**2 + v**2
    # Height -(1 - r²)² inside the unit circle; its slope along the direction of the light is the shading.
    towards = u * math.cos(light - turn) + v * math.sin(light - turn)
    slope = np.where(r2 < 1, towards * (1 - r2), 0) / 0.385  # 0.385 is the largest value of r (1 - r²)
    bottom = np.where(r2 < 1, (1 - r2) ** 2, 0)
    strength = rng.uniform(48, 80) if metal else rng.uniform(40, 64)
    shade = -strength * slope - 0.3 * strength * bottom
    glint = np.exp(-(((u + 0.55 * math.cos(light - turn)) ** 2 + (v + 0.55 * math.sin(light - turn)) ** 2) / 0.05))
    shade = shade + (0.5 * strength * glint * (r2 < 1) if metal else 0)
    return np.asarray(picture + shade[..., None], np.float32)


def _hole(picture: Image, metal: bool, light: float, scale: float, rng: np.random.Generator) -> Image:
    """A hole through to the dark: a lit rim on metal, a frayed edge with loose threads on fabric."""
    size = picture.shape[0]
    a = rng.uniform(0.055, 0.14) * size
    u, v, turn = _ellipse_frame(size, a, a * rng.uniform(0.75, 1.0), rng)
    outline = _outline(u, v, 0.03 if metal else 0.12, rng)
    inside = np.clip((1 - outline) * a / (1.0 * scale) + 0.5, 0, 1)
    towards = u * math.cos(light - turn) + v * math.sin(light - turn)
    ground = rng.uniform(14, 40) * (1 + 0.35 * np.clip(-towards, -1, 1))
    ring = np.clip(1 - np.abs((outline - 1) * a / (1.6 * scale) - 0.9), 0, 1) * (1 - inside)
    rim = rng.uniform(45, 75) * ring * (-towards if metal else 0.5)
    drawn = picture * (1 - inside[..., None]) + (inside * ground)[..., None] + rim[..., None]
    if not metal:
        x, y = _grid(size)
        away = math.hypot(*picture.mean(axis=(0, 1))[:2]) / math.sqrt(2)
        centre = np.array([(x * inside).sum(), (y * inside).sum()]) / max(inside.sum(), 1)
        for _ in range(rng.integers(3, 7)):  # loose threads that hang over the edge into the hole
            angle = rng.uniform(0, 2 * math.pi)
            start = centre + a * np.array([math.cos(angle), math.sin(angle)])
            end = centre + a * rng.uniform(0.3, 0.8) * np.array([math.cos(angle + 0.5), math.sin(angle + 0.5)])
            distance, _ = _to_path(x, y, np.stack([start, (start + end) / 2 + rng.normal(0, scale, 2), end]))
            thread = np.clip(0.7 * scale - np.abs(distance) + 0.5, 0, 1) * inside
            drawn = drawn * (1 - 0.7 * thread[..., None]) + 0.7 * (thread * away)[..., None]
    return np.asarray(drawn, np.float32)


def _stain(picture: Image, metal: bool, light: float, scale: float, rng: np.random.Generator) -> Image:
    """A dried liquid: the surface shows through, the rim may be darker."""
    size = picture.shape[0]
    a = rng.uniform(0.08, 0.2) * size
    u, v, _ = _ellipse_frame(size, a, a * rng.uniform(0.6, 1.0), rng)
    outline = _outline(u, v, 0.11, rng) + 0.07 * _noise((size, size), 4 * scale, 4 * scale, rng)
    body = np.clip((1 - outline) * a / (rng.uniform(2.5, 5.0) * scale) + 0.5, 0, 1)
    rim = rng.uniform(0, 1) * np.exp(-((((outline - 0.9) * a) / (2.2 * scale)) ** 2)) * body
    cloud = 0.85 + 0.15 * _noise((size, size), 6 * scale, 6 * scale, rng)
    cover = np.clip(rng.uniform(0.42, 0.7) * body * cloud + 0.22 * rim, 0, 0.92)
    colour = np.array(_STAINS[rng.integers(len(_STAINS))], np.float32)
    # Thin liquid dyes: the surface's own texture stays, multiplied with the colour; where it is thick it covers.
    dyed = 0.6 * picture * (colour / 150 + 0.15) + 0.4 * colour
    return np.asarray(picture * (1 - cover[..., None]) + dyed * cover[..., None], np.float32)


_PAINTERS: tuple[Callable[[Image, bool, float, float, np.random.Generator], Image], ...] = (
    _scratch,
    _dent,
    _hole,
    _stain,
)


def _ellipse_frame(size: int, a: float, b: float, rng: np.random.Generator) -> tuple[Image, Image, float]:
    """Coordinates in which a turned ellipse somewhere in the picture is the unit circle, and the turn in radians."""
    x, y = _grid(size)
    cx, cy = rng.uniform(1.2 * a, size - 1.2 * a, 2)
    turn = float(rng.uniform(0, math.pi))
    u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) / a
    v = (-(x - cx) * math.sin(turn) + (y - cy) * math.cos(turn)) / b
    return np.asarray(u, np.float32), np.asarray(v, np.float32), turn


def _outline(u: Image, v: Image, unevenness: float, rng: np.random.Generator) -> Image:
    """Distance from the centre in units of an uneven circle's radius: 1 on the outline."""
    theta = np.arctan2(v, u)
    radius = np.ones_like(theta)
    for k in range(1, 9):
        radius += unevenness / k**0.7 * rng.normal() * np.cos(k * theta + rng.uniform(0, 2 * math.pi))
    return np.asarray(np.hypot(u, v) / np.clip(radius, 0.4, 1.6), np.float32)


def _to_path(x: Image, y: Image, points: NDArray[np.float64]) -> tuple[Image, Image]:
    """Signed distance of every pixel to a polyline, and the nearest point's position along it, 0 to 1."""
    best = np.full(x.shape, np.inf, np.float32)
    signed, position = np.zeros_like(x), np.zeros_like(x)
    segments = len(points) - 1
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(points[:-1].tolist(), points[1:].tolist(), strict=True)):
        dx, dy = x1 - x0, y1 - y0
        from_x, from_y = x - x0, y - y0
        t = np.clip((from_x * dx + from_y * dy) / (dx * dx + dy * dy), 0, 1)
        from_x, from_y = from_x - t * dx, from_y - t * dy
        squared = from_x**2 + from_y**2
        nearer = squared < best
        np.copyto(best, squared, where=nearer)
        np.copyto(signed, np.sign(dx * from_y - dy * from_x), where=nearer)
        np.copyto(position, (i + t) / segments, where=nearer)
    return signed * np.sqrt(best), position
