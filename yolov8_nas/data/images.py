"""Opening of images as the training opens them, and their normal form.

The training reads with OpenCV: eight bits a channel, upright, and nothing where OpenCV can't. So OpenCV decides here,
too. What it reads as it was meant (JPEG, PNG, BMP and WebP, eight bits, one picture) stays as it is. Everything else
that can be read at all (other formats, more bits, several pictures in a file) is converted once, to PNG.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from yolov8_nas.errors import InputError

VERSION: Final = 1
"""Of what `look` finds: facts that another version found are not used."""

MAX_PIXELS: Final = 178_956_970
"""Most pixels of an image: above it the training's reader refuses one as a decompression bomb (Pillow's limit)."""

PIXELS_A_BYTE: Final = 50
"""Most pixels of a large image for a byte of its file: photographs have fewer than 20, a bomb has hundreds."""

SAFE_PIXELS: Final = 32_000_000
"""Pixels that an image may have in any case: decoded, they take 100 MB."""

MOST_BYTES: Final = 256 * 2**20
"""Bytes of an image's file."""

LEAST_SIDE: Final = 10
"""Shortest side of an image in pixels: the training drops smaller ones."""

IMAGE_SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "avifs", "bmp", "dib", "gif", "heic", "heif", "hif", "j2k", "jfif", "jp2", "jpe", "jpeg"),
        *("jpf", "jpg", "jpx", "mpo", "pbm", "pgm", "pjp", "pjpeg", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)
"""Names of images end in one of these."""

UNREAD_SUFFIXES: Final = {
    f".{name}": what
    for what, names in {
        "raw files of cameras": "3fr arw cr2 cr3 dng erf nef nrw orf pef raf raw rw2 srw",
        "medical pictures": "dcm dicom nii",
        "other pictures": "ai eps exr hdr ico jxl jxr pcx pdf psd ras sgi svg xcf",
        "arrays": "h5 hdf5 mat npy npz parquet tfrecord",
        "videos": "asf avi m4v mkv mov mp4 mpeg mpg ts webm wmv",
    }.items()
    for name in names.split()
}
"""What else may hold pictures and is not read, and what to call it."""

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_KEPT = {"jpeg": ".jpg", "png": ".png", "bmp": ".bmp", "webp": ".webp"}
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations: by a quarter
_ORIENTATION = 0x0112
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_FILLING = b"\x5a\xa5\x33\xcc" * 64
_TAIL = 1e-3  # share of an image's values at either end that says nothing of the range in use: hot and dead pixels

Image.init()  # all of Pillow's formats
# Pillow warns from half its limit on. What is read is bounded by MAX_PIXELS alone.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # faults are named by us, with the file


def _unbounded(pixels: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an image that can be used.

    Attributes:
        sha256: Digest of the file's bytes.
        width: Width in pixels, upright.
        height: Height in pixels, upright.
        suffix: What its name ends in, in the normal form.
        kept: Whether the normal form has the same picture data; otherwise it is a PNG that is made of it.
        remarks: What a person may want to know: converted from what, the first of how many pictures.
        depth: Kind of its values (`uint16`, `float32`, ...), where not eight bits.
        low: Where the range of its values that is in use begins, where `depth` is set.
        high: Where it ends.
    """

    sha256: str
    width: int
    height: int
    suffix: str
    kept: bool = True
    remarks: tuple[str, ...] = ()
    depth: str = ""
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class _Picture:
    """A decoded picture: its values (gray, or blue, green, red), upright; nothing where the file stays as it is."""

    width: int
    height: int
    kind: str
    values: NDArray[Any] | None = None
    remarks: tuple[str, ...] = ()


def look(data: bytes, spend: Callable[[int], AbstractContextManager[None]] = _unbounded) -> Facts:
    """Decode an image as a whole and tell what it is.

    Args:
        data: The bytes of its file.
        spend: What to hold while so many pixels are decoded.

    Raises:
        InputError: It can't be used: why and, after a semicolon, what to do about it.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    picture = _decoded(data, spend)
    if min(picture.width, picture.height) < LEAST_SIDE:
        raise InputError(
            f"{picture.width} x {picture.height} pixels; give images of at least {LEAST_SIDE} pixels a side"
        )
    if picture.values is None:
        return Facts(sha256, picture.width, picture.height, _KEPT[picture.kind], True, picture.remarks)
    depth, low, high = "", 0.0, 0.0
    if picture.values.dtype != np.uint8:
        depth = str(picture.values.dtype)
        low, high = _in_use(picture.values)
    return Facts(sha256, picture.width, picture.height, ".png", False, picture.remarks, depth, low, high)


def ranges(images: Iterable[Facts]) -> dict[str, tuple[float, float]]:
    """The range of values that a dataset's images of more than eight bits use, for each kind of value.

    It is one for all of them, so that what is brighter stays brighter. It begins at zero where that costs little.
    """
    found: dict[str, tuple[float, float]] = {}
    for image in images:
        if image.depth:
            low, high = found.get(image.depth, (image.low, image.high))
            found[image.depth] = (min(low, image.low), max(high, image.high))
    return {kind: (0.0 if 0 <= low < high / 4 else low, high) for kind, (low, high) in sorted(found.items())}


def normal(data: bytes, facts: Facts, in_use: Mapping[str, tuple[float, float]]) -> bytes:
    """An image's bytes in the normal form.

    Args:
        data: The bytes of its file.
        facts: What `look` said of them.
        in_use: What `ranges` said of the dataset.
    """
    if facts.kept:
        # Decoders read a JPEG with something behind its end, but Ultralytics rewrites it in place, which a verified
        # output must not suffer.
        return data if not data.startswith(_JPEG_START) or data.endswith(_JPEG_END) else _closed(data)
    values = _decoded(data).values
    assert values is not None
    if facts.depth:
        low, high = in_use[facts.depth]
        scaled = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / (high - low) if high > low else 0)
        values = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    done, encoded = cv2.imencode(".png", values)
    assert done
    return bytes(encoded.tobytes())


def is_image(head: bytes) -> bool:
    """Whether a file begins as an image does, whatever its name."""
    return _kind(head) is not None


def pixel_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an image, upright, without decoding it; nothing where it can't be read."""
    try:
        with _opened(data) as image:
            return _upright_size(image)
    except (InputError, OSError, SyntaxError, ValueError):
        return None


def _kind(head: bytes) -> str | None:
    """The format by a file's first bytes."""
    if head.startswith(_JPEG_START):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"BM") and len(head) > 18 and head[15:18] == b"\0\0\0":
        return "bmp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jp2"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "avif"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"):
        return "heif"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "pnm"
    return None


def _decoded(data: bytes, spend: Callable[[int], AbstractContextManager[None]] = _unbounded) -> _Picture:
    kind = _kind(data[:64])
    if kind is None and (foreign := _foreign(data)):
        raise InputError(f"unreadable or truncated image ({foreign[0]}); {foreign[1]}")
    try:
        with _opened(data) as image, spend(image.width * image.height):
            return _read(data, kind or str(image.format).lower(), image)
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they meet in a damaged file
        if kind == "tiff" and (picture := _only_opencv(data)):
            return picture
        reason = str(error) if str(error) and "BytesIO" not in str(error) else "no image that is known"
        raise InputError(f"unreadable or truncated image ({reason}); replace it or take it out") from None


def _opened(data: bytes) -> Image.Image:
    """An image's header, by Pillow."""
    formats: tuple[str, ...] = _FORMATS
    if _kind(data[:64]) == "heif":
        import pi_heif  # here, since few datasets hold such images

        pi_heif.register_heif_opener()
        formats = ("HEIF",)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        pixels = "".join(filter(str.isdigit, str(error).partition(" pixels")[0]))
        raise _too_large(int(pixels), len(data)) from None
    if image.width * image.height > _limit(len(data)):
        raise _too_large(image.width * image.height, len(data))
    return image


def _limit(size: int) -> int:
    """Most pixels of an image in a file of so many bytes."""
    return max(SAFE_PIXELS, min(MAX_PIXELS, size * PIXELS_A_BYTE))


def _too_large(pixels: int, size: int) -> InputError:
    limit = _limit(size)
    why = "" if limit == MAX_PIXELS else f" in a file of {size:,} bytes"
    return InputError(
        f"{pixels:,} pixels ({pixels / 1e6:.0f} megapixels), above the limit of {limit:,} pixels for an image{why}; "
        "make it smaller, or cut it into tiles and its labels with it"
    )


def _read(data: bytes, kind: str, image: Image.Image) -> _Picture:
    size = _upright_size(image)
    remarks = _frames(image, kind)
    turned = _orientation(image) not in (None, 1)
    deep = (kind == "png" and data[24:25] == b"\x10") or (kind == "tiff" and _bits(image) > 8)
    if kind == "jpeg":
        readable = _jpeg_size(data) == _eighth(size)
        if not readable and _is_whole(data) and _jpeg_size(_closed(data)) == _eighth(size):
            readable, remarks = True, (*remarks, "JPEG without its end marker, closed")
        if readable:
            return _Picture(*size, kind, None, remarks)
    elif kind in _KEPT and not (deep or turned or remarks):
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if values is not None and values.shape[1::-1] == size:
            return _Picture(*size, kind, None, remarks)
    values = None
    if deep or kind in ("jp2", "pnm"):  # Pillow takes the upper eight bits of colours of sixteen
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is not None and (values.shape[1::-1] != size or (turned and kind != "jp2")):
            values = None
    if values is None:
        values = _by_pillow(image)
    if values.dtype == np.uint8 and not remarks:
        how = "converted to PNG" if kind not in _KEPT else "turned upright" if turned else "written anew as PNG"
        remarks = (f"{kind.upper()} {how}",)
    return _picture(values, kind, remarks)


def _picture(values: NDArray[Any], kind: str, remarks: tuple[str, ...]) -> _Picture:
    if values.ndim == 3 and values.shape[2] in (2, 4):  # with alpha
        values = values[..., : values.shape[2] - 1]
    elif values.ndim == 3 and values.shape[2] > 4:
        remarks = (*remarks, f"the first 3 of {values.shape[2]} channels are taken")
        values = values[..., :3]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return _Picture(values.shape[1], values.shape[0], kind, values, remarks)


def _only_opencv(data: bytes) -> _Picture | None:
    """A TIFF that Pillow does not know, such as one of three floating-point channels."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        return None
    return _picture(values, "tiff", ("TIFF converted to PNG",) if values.dtype == np.uint8 else ())


def _by_pillow(image: Image.Image) -> NDArray[Any]:
    image.seek(0)
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        return np.array(upright)
    if upright.mode in ("L", "1"):
        return np.array(upright.convert("L"))
    return np.ascontiguousarray(np.array(upright.convert("RGB"))[..., ::-1])


def _frames(image: Image.Image, kind: str) -> tuple[str, ...]:
    """That a file holds several pictures, of which the first is taken."""
    if kind == "jpeg" and image.format != "MPO":
        return ()
    count = getattr(image, "n_frames", 1)
    if count < 2:
        return ()
    if kind in ("gif", "png", "webp"):
        return (f"animated {kind.upper()}, the first picture is taken",)
    return (f"{kind.upper()} of several {'pages' if kind == 'tiff' else 'pictures'}, the first is taken",)


def _bits(image: Image.Image) -> int:
    """Bits of a TIFF's values."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = tags.get(258, (1,))
    return int(max(bits) if isinstance(bits, tuple) else bits)


def _orientation(image: Image.Image) -> int | None:
    value = image.getexif().get(_ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height at which OpenCV decodes a JPEG to an eighth of its size; nothing where it can't.

    The decoder reads all of the data as for the full size, and fails on the same files, at half the cost.
    """
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_8)
    return None if values is None else (values.shape[1], values.shape[0])


def _eighth(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // 8), -(-size[1] // 8)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _TURNED else (width, height)


def _closed(data: bytes) -> bytes:
    """A JPEG with its end marker."""
    return data.rstrip(b"\xff") + _JPEG_END


def _is_whole(data: bytes) -> bool:
    """Whether nothing but the end marker is missing in a JPEG.

    Then what stands before the marker is not part of the picture any more, and the picture is the same whatever it is.
    """
    pictures = []
    for filling in (b"", _FILLING):
        with Image.open(io.BytesIO(data.rstrip(b"\xff") + filling + _JPEG_END), formats=("JPEG",)) as image:
            try:
                image.load()
            except OSError:
                return False
            pictures.append(image.tobytes())
    return pictures[0] == pictures[1]


def _in_use(values: NDArray[Any]) -> tuple[float, float]:
    """Where the values of an image lie, but for a few at either end."""
    flat = values.ravel()
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            raise InputError("no finite value in the image; replace it or take it out")
    low, high = np.quantile(flat, (_TAIL, 1 - _TAIL), method="nearest")
    return float(low), float(high)


def _foreign(data: bytes) -> tuple[str, str] | None:
    """What a file is that should be an image and isn't, where that can be told."""
    start = data[:256].lstrip().lower()
    if not data:
        return "an empty file", "replace it or take it out"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS", "fetch the file with `git lfs pull`"
    if b"/annex/objects/" in start:
        return "a pointer of git-annex", "fetch the file with `git annex get`"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page or XML", "download the image again"
    if not data.strip(b"\0"):
        return "nothing but zeros", "replace it or take it out"
    return None
