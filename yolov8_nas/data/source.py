"""Where a dataset lies: a folder, a description in it, or an archive that is unpacked for the time of reading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from yolov8_nas.errors import InputError
from yolov8_nas.paths import expanded
from yolov8_nas.store import archive

ARCHIVE_SUFFIXES: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")


def local_path(source: str | Path) -> Path:
    """The absolute path of a source.

    Raises:
        InputError: It is empty, as of a variable that was not set: it must not stand for the current folder.
    """
    if not str(source).strip():
        raise InputError("the path of the dataset is empty; give that of its folder, data.yaml or archive")
    return expanded(source).absolute()


def is_archive(source: Path) -> bool:
    """Whether a source is to be unpacked: a file that is neither a description nor annotations."""
    return source.is_file() and source.suffix.lower() not in {".yaml", ".yml", ".json"}


def source_name(source: Path) -> str:
    """The name of a dataset: its file's or folder's, without what an archive adds."""
    name = source.resolve().name
    for suffix in sorted(ARCHIVE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    if source.is_file() and not is_archive(source):
        folder = source.resolve().parent
        return folder.parent.name if folder.name == "annotations" else folder.name
    return name


@contextmanager
def opened(source: Path, scratch: Path | None = None, shown: str | None = None) -> Iterator[Path]:
    """The folder (or data.yaml, or JSON file) to read: the source itself, or its content where it is an archive.

    Args:
        source: A folder, a data.yaml, a JSON file of COCO's or an archive.
        scratch: Where an archive is unpacked to, in a folder that goes away again.
        shown: How messages call the source, where not by its path.

    Raises:
        InputError: There is nothing at `source`, or it is an archive that is damaged or unsafe.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; give the dataset's folder, its data.yaml or its archive")
    if not is_archive(source):
        yield source
        return
    with tempfile.TemporaryDirectory(dir=scratch, prefix="unpacked-") as folder:
        try:
            archive.extract(source, Path(folder))
        except archive.ArchiveError as error:
            text = str(error).replace("give one of them", "give one of them, or the dataset's folder")
            raise InputError(text.replace(str(source), shown or str(source))) from None
        except OSError as error:
            raise InputError(
                f"{shown or source}: cannot be unpacked ({error}); free some space or unpack it yourself"
            ) from None
        yield Path(folder)
