"""data-prep: a dataset as people have it becomes a checked one in train, search and val splits."""

from __future__ import annotations

import shutil
from typing import Any

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import StageError
from yolov8_nas.files import read_json
from yolov8_nas.runner.stage import TOLD, Stage, StageContext, key_of
from yolov8_nas.store.store import Store


def settings(config: RunConfig, target: TargetConfig | None) -> dict[str, Any]:
    """The source and its content.

    The run's seed is not among them: which image is in which split depends on the image alone, and runs with
    different seeds are comparable because they see the same data.

    Raises:
        InputError: The source is missing or its labels are at fault.
    """
    if config.data is None:
        return {"source": None}
    from yolov8_nas.data.check import source_digest
    from yolov8_nas.data.remote import is_address
    from yolov8_nas.data.source import local_path

    source = config.data if is_address(config.data) else str(local_path(config.data))
    return {"source": source, "source_digest": source_digest(source)}


def known_classes(config: RunConfig, store: Store) -> tuple[str, ...] | None:
    """The names of a run's classes, where its data has been prepared before.

    Raises:
        InputError: As `settings`.
        ConnectionError: The dataset is at an address, and nothing answers there.
    """
    try:
        entry = store.result(STAGE.name, key_of(STAGE, settings(config, None), {}), TOLD[STAGE.name])
    except StageError:  # it is damaged, and prepared anew
        return None
    file = entry.outputs / "dataset.json"
    return tuple(read_json(file)["classes"]) if file.is_file() else None


def find_classes(config: RunConfig, store: Store) -> tuple[str, ...]:
    """The names of a run's classes, after a check of the dataset.

    A dataset at an address is not downloaded where it has been prepared before. Otherwise it is downloaded to where the
    stage finds it.

    Raises:
        InputError: The dataset cannot be used.
        ConnectionError: It is at an address, and nothing answers there.
    """
    from yolov8_nas.data.check import check_source, checked
    from yolov8_nas.data.remote import is_address

    if not is_address(config.data):
        return check_source(config.data).names
    found = settings(config, None)
    entry = store.entry(STAGE.name, key_of(STAGE, found, {}))
    with entry.lock(lambda: print(f"{config.data}: another run works on it; waiting for it", flush=True)):
        if (manifest := entry.manifest) and entry.damage(manifest, TOLD[STAGE.name]) is None:
            return tuple(read_json(entry.outputs / "dataset.json")["classes"])
        entry.partial.mkdir(parents=True, exist_ok=True)
        with checked(config.data, scratch=entry.partial, digest=found["source_digest"]) as dataset:
            return dataset.names


def run(context: StageContext) -> None:
    """Write `dataset/{images,labels}/{train,search,val}` and `dataset.json`.

    Raises:
        InputError: The dataset cannot be used.
    """
    from yolov8_nas.data import dataset
    from yolov8_nas.data.check import FETCHED, checked

    context.partial.mkdir(parents=True, exist_ok=True)
    for left in context.partial.iterdir():
        if left.name != FETCHED:  # what a killed try had unpacked
            shutil.rmtree(left)
    with (
        context.host.computing(),
        checked(
            context.settings["source"],
            scratch=context.partial,
            progress=lambda step, done, total: context.progress.update(done, total, step),
            digest=context.settings.get("source_digest"),
        ) as source,
    ):
        for warning in source.warnings:
            context.progress.note(f"warning: {warning}")
        written = dataset.write(
            source,
            context.out,
            progress=lambda done, total: context.progress.update(done, total, "writing images"),
        )
    counts = ", ".join(f"{count} {split}" for split, count in written.images.items())
    context.progress.note(f"{written.source}: {counts} images, {len(written.classes)} classes")


STAGE = Stage(name="data-prep", version=2, settings=settings, run=run)
