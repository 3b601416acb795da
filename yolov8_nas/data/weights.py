"""Weights to start from, by name, path or address: where they are looked for, and how they come here.

A name such as `yolov8s.pt` is looked for in the current folder, then in the folder of weights: that of
`supernet.weights_folder`, else of the environment's `YOLOV8_NAS_WEIGHTS`, else `~/.cache/yolov8-nas/weights`. Only
where it is missing there, and only with consent (`supernet.download: true`, or `YOLOV8_NAS_DOWNLOAD=1` in the
environment), stock YOLOv8 is downloaded from Ultralytics' release assets. An address (`s3://`, `https://`) is
downloaded once into that folder; naming it is consent.

Beside each file of the folder its SHA-256 is recorded (`yolov8s.pt.sha256`, as `sha256sum` writes it) when it is first
used. A later run that finds another content refuses it. In a folder that cannot be written to, only records that are
there already are held against.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from yolov8_nas.config import SupernetConfig
from yolov8_nas.data import remote
from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write, file_sha256
from yolov8_nas.paths import expanded

FOLDER_VARIABLE: Final = "YOLOV8_NAS_WEIGHTS"
CONSENT_VARIABLE: Final = "YOLOV8_NAS_DOWNLOAD"

RELEASE: Final = "https://github.com/ultralytics/assets/releases/download/v8.4.0/"
"""Where Ultralytics keeps its checkpoints, as the installed version downloads them."""

MOST_BYTES: Final = 2**29
"""Bytes of a checkpoint at most; that of YOLOv8l has 88 million."""

_STOCK: Final = re.compile(r"yolov8[nsml]\.pt")


def is_stock_name(named: str) -> bool:
    """Whether this is the name of a checkpoint among Ultralytics' release assets that a supernet can start from."""
    return _STOCK.fullmatch(named) is not None


def is_path(named: str) -> bool:
    """Whether weights are named by a path of this machine, not by a bare name or an address."""
    if "://" in named:
        return False
    return "/" in named or not named.endswith(".pt") or expanded(named).exists()


def folder(supernet: SupernetConfig) -> Path:
    """The folder of weights; it need not exist."""
    asked = supernet.weights_folder or os.environ.get(FOLDER_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(asked or f"{cache}/yolov8-nas/weights").absolute()


def local(supernet: SupernetConfig) -> Path:
    """The file or folder of this machine that `supernet.weights` names; downloaded where it has to be and may be.

    Raises:
        InputError: It is not here and can't be had, or it is another one than in an earlier run.
    """
    named = str(supernet.weights)
    if is_path(named):
        return expanded(named).absolute()
    here = folder(supernet)
    if "://" in named:
        name = PurePosixPath(unquote(urlsplit(named).path)).name
        if not name or name in (".", ".."):
            raise _refusal(named, "names no file; give the address of a checkpoint")
        file, address = here / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}-{name}", named
    else:
        file, address = here / named, RELEASE + named
    if not file.exists():
        consent = supernet.download or os.environ.get(CONSENT_VARIABLE, "") not in ("", "0")
        if address != named and not (is_stock_name(named) and consent):
            remedy = f"put the file there as {file}"
            if is_stock_name(named):
                remedy += (
                    f", or let it be downloaded from {RELEASE} with supernet.download: true or {CONSENT_VARIABLE}=1"
                )
            raise _refusal(named, f"neither in the current folder nor in the folder of weights; {remedy}")
        _download(named, address, file)
    _hold(named, file)
    return file


def _download(named: str, address: str, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = (file.parent / ".lock").open("w")
    except OSError as error:
        raise _refusal(
            named, f"{file.parent}: cannot be written to ({error.strerror}); choose another folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():  # another process was faster
            return
        try:
            listing = remote.look(address, patient=False)
            if listing.is_folder or listing.size > MOST_BYTES:
                what = "a folder" if listing.is_folder else f"{listing.size:,} bytes, more than {MOST_BYTES:,}"
                raise InputError(f"{address}: {what}; give the address of a checkpoint")
            came = remote.fetch(address, file.parent / ".downloads", expected=listing.digest)
        except (InputError, ConnectionError) as error:
            raise _refusal(named, f"{error}; without a network, put the file there as {file}") from None
        _record(file, file_sha256(came))
        came.replace(file)


def _hold(named: str, file: Path) -> None:
    """Hold a file against what is recorded of it, or record it."""
    if not file.is_file():
        raise _refusal(named, f"{file} is no file; put a checkpoint there")
    digest = file_sha256(file)
    try:
        recorded = _recorded(file).read_text().split()[:1]
    except (OSError, UnicodeDecodeError):
        recorded = []
    if not recorded:
        with contextlib.suppress(OSError):  # a folder that others keep
            _record(file, digest)
    elif recorded != [digest]:
        raise _refusal(
            named,
            f"{file} has SHA-256 {digest}, but {recorded[0][:64]} when it was first used; put the earlier file back, "
            f"or remove {_recorded(file)} to use this one",
        )


def _recorded(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _record(file: Path, digest: str) -> None:
    atomic_write(_recorded(file), f"{digest}  {file.name}\n".encode())


def _refusal(named: str, why: str) -> InputError:
    return InputError(f"supernet.weights = {named!r}: {why}")
