"""What lies in a stage store, how large it is, and which of it nobody needs.

A result is needed by the runs whose records name it. Records do not name what results have in common (latency tables,
trainings of networks, training rates, supernets from a registry): that is always kept, and so are submissions that wait
for a tracking server. A key that is not done holds the checkpoints of a run that may go on, and is kept unless it is
asked for.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yolov8_nas.errors import InputError
from yolov8_nas.files import read_json
from yolov8_nas.store.store import Store

State = Literal["done", "unfinished", "shared"]


@dataclass(frozen=True)
class Item:
    """A folder of the store.

    Attributes:
        stage: The stage, or what the folder holds that runs share.
        key: The key.
        folder: Where it is.
        state: Whether it is a stage's finished result, an unfinished one, or shared.
        size: Bytes of its files.
        written: When it was last written to, in seconds since 1970.
        runs: The runs that need it, the newest first.
    """

    stage: str
    key: str
    folder: Path
    state: State
    size: int
    written: float
    runs: tuple[str, ...]


def require_folder(store: Store) -> None:
    """See that a store is a folder, and is one.

    Raises:
        InputError: It is in a bucket, or no stage store.
    """
    if "://" in store.address:
        raise InputError(
            f"{store.address}: only stores in folders are looked after here; in a bucket, use its own tools and rules"
        )
    if not (store.root / "runs").is_dir():
        raise InputError(f"{store.root}: no stage store, since it has no folder runs; give one with --store FOLDER")


def survey(store: Store, stages: Collection[str]) -> list[Item]:
    """Everything in a store but records and what waits for a tracking server, stage by stage.

    Args:
        store: A store in a folder.
        stages: Names of the stages; any other folder of keys is shared.
    """
    needed = needs(store)
    items = []
    for place in sorted(path for path in store.root.iterdir() if path.is_dir() and path.name != "runs"):
        for folder in sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")):
            if place.name not in stages and not (folder / "manifest.json").is_file():
                continue  # not one of keys, such as what waits for a tracking server
            done = (folder / "manifest.json").is_file()
            state: State = "shared" if place.name not in stages else "done" if done else "unfinished"
            runs = tuple(needed.get((place.name, folder.name), ()))
            size, written = _extent(folder)
            items.append(Item(place.name, folder.name, folder, state, size, written, runs))
    return items


def needs(store: Store) -> Mapping[tuple[str, str], Sequence[str]]:
    """The runs that need each result, the newest first, by stage and key."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in store.runs():
        for stage, key in named(store, run):
            found.setdefault((stage, key), []).append(run)
    return found


def named(store: Store, run: str) -> list[tuple[str, str]]:
    """The results that the records of a run name, each by stage and key.

    Raises:
        InputError: A record cannot be read.
    """
    results = []
    for file in sorted((store.root / "runs" / run).glob("*.json")):
        try:
            content = read_json(file)
        except ValueError as error:
            raise InputError(f"{error}; mend or remove the record: nobody knows what it needs") from None
        if isinstance(content, dict) and content.get("stage") and content.get("key"):
            results.append((str(content["stage"]), str(content["key"])))
    return results


def unneeded(items: Sequence[Item], forgotten: Collection[str] = (), *, unfinished: bool = False) -> list[Item]:
    """The items that no run needs.

    Args:
        items: The content of a store.
        forgotten: Runs whose needs do not count.
        unfinished: Whether keys that are not done go as well.
    """
    wanted = ("done", "unfinished") if unfinished else ("done",)
    return [item for item in items if item.state in wanted and not set(item.runs) - set(forgotten)]


def remove(store: Store, items: Sequence[Item], forgotten: Collection[str] = ()) -> list[Item]:
    """Remove items, and the records of the runs that are forgotten, but for what somebody works on or needs by now.

    Args:
        store: A store in a folder.
        items: What is to go.
        forgotten: Runs whose needs do not count.

    Returns:
        Those that are still there.
    """
    needed = {place: set(runs) - set(forgotten) for place, runs in needs(store).items()}
    for run in forgotten:
        shutil.rmtree(store.root / "runs" / run)
    left = []
    for item in items:
        with (item.folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                left.append(item)
                continue
            if needed.get((item.stage, item.key)):
                left.append(item)
                continue
            (item.folder / "manifest.json").unlink(missing_ok=True)  # first: what is half gone must not count as done
            shutil.rmtree(item.folder)
    return left


def _extent(folder: Path) -> tuple[int, float]:
    """Bytes of all files below a folder, and when the newest was written."""
    size, written = 0, folder.stat().st_mtime
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # somebody works there
            state = path.lstat()
            size += state.st_size if path.is_file() and not path.is_symlink() else 0
            written = max(written, state.st_mtime)
    return size, written
