"""Fetches the files of a version, and holds them against the hashes that they were registered with.

Only files that have a hash are fetched. The hashes stand in the version's tags, and they, device and limits together
make the digest by which versions are told apart: neither a file nor one hash can be changed unnoticed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import file_sha256, room, tree_files, write_json
from yolov8_nas.names import digest as checked_digest
from yolov8_nas.names import files as checked_files
from yolov8_nas.registry.places import check as check_place
from yolov8_nas.registry.query import RegisteredVersion, find_version
from yolov8_nas.registry.register import CONTENT, SCORES, SCORES_FILE, content_digest
from yolov8_nas.registry.tracking import opened

MANIFEST: Final = "manifest.json"

_TRIES: Final = 2  # a download can be cut off, and a file be written anew by a second process that registers the same


def pull(tracking_uri: str, reference: str, folder: Path | None = None) -> tuple[RegisteredVersion, Path]:
    """Fetch the files of a version into a folder, which is there whole or not at all.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        reference: As for `query.find`.
        folder: The folder to make; `NAME-VERSION` unless given. One that holds these files already is left as it is.

    Returns:
        The version, and the folder.

    Raises:
        InputError: There is no such version, or the folder holds something else.
        StageError: A file is not the one that was registered.
    """
    with opened(tracking_uri) as client:
        version = find_version(client, reference).trusted()
        target = folder or Path(f"{version.model}-{version.version}")
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            if target.is_dir() and _holds(target, version):
                return version, target
            raise InputError(f"{target}: holds something else than {version}; give another folder, or remove it")
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as temporary:
            whole = Path(temporary) / "files"
            fetch(version, whole)
            write_json(whole / MANIFEST, version.to_dict())
            if target.is_dir():
                target.rmdir()
            whole.replace(target)
    return version, target


def fetch(version: RegisteredVersion, folder: Path) -> dict[str, Path]:
    """Fetch the files of a version from the registry that this process is connected to.

    Args:
        version: The version.
        folder: The folder to write to; it is made.

    Returns:
        The files by name.

    Raises:
        InputError: The files are said to lie where nobody is asked.
        StageError: A file is not the one that was registered, or the version is not signed with a trusted key.
    """
    return fetch_unsigned(version.trusted(), folder)


def fetch_unsigned(version: RegisteredVersion, folder: Path) -> dict[str, Path]:
    """As `fetch`, whoever has signed the version: its files are what its hashes say, whoever wrote those."""
    _check_hashes(version)
    files = {name: folder / name for name in version.files}
    for name, digest in version.files.items():
        _fetch_file(version, name, digest, folder)
    return files


def fetch_scores(version: RegisteredVersion, folder: Path) -> Path | None:
    """Fetch what was found on each image (`evaluation.Evaluation`), where that was kept with a version.

    Raises:
        StageError: It is not what was registered.
    """
    if SCORES not in version.tags:
        return None
    try:
        expected = checked_digest(version.tags[SCORES], f"{version}: {SCORES}")
    except InputError as error:
        raise StageError(f"{error}; the version is refused") from None
    return _fetch_file(version, SCORES_FILE, expected, folder)


def _fetch_file(version: RegisteredVersion, name: str, digest: str, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    check_place(version.artifacts, str(version))
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
        with room(file), tempfile.TemporaryDirectory() as temporary:
            shutil.move(download_artifacts(f"{version.artifacts}/{name}", dst_path=temporary), file)
        found = file_sha256(file)
        if found == digest:
            return file
    file.unlink()
    raise StageError(
        f"{version}: {name} has SHA-256 {found}, and was registered with {digest}; it was changed or damaged since, so "
        "it is refused: register the model again, or restore the artifact store"
    )


def _check_hashes(version: RegisteredVersion) -> None:
    """Check that the hashes are those of the version's own digest, and its files' names such as may be written."""
    files = dict(sorted(version.files.items()))
    if content_digest(files, version.tag("hardware_id"), version.limits) != version.tag(CONTENT):
        raise StageError(
            f"{version}: its tags with hashes, device or limits are not those that it was registered with; somebody "
            "changed them, so it is refused: register the model again"
        )
    try:
        checked_files(files, str(version))
    except InputError as error:
        raise StageError(f"{error}; the version is refused") from None


def _holds(folder: Path, version: RegisteredVersion) -> bool:
    found = {name: file_sha256(path) for name, path in tree_files(folder).items() if name != MANIFEST}
    return found == version.files
