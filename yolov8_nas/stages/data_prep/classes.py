"""The names of a run's classes, before its data is prepared."""

from __future__ import annotations

from yolov8_nas.config import RunConfig
from yolov8_nas.errors import StageError
from yolov8_nas.runner.stage import TOLD, key_of
from yolov8_nas.stages.data_prep import STAGE
from yolov8_nas.stages.data_prep.settings import settings
from yolov8_nas.store.store import Entry, Store


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
    return _classes(entry) if file.is_file() else None


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
            return _classes(entry)
        entry.partial.mkdir(parents=True, exist_ok=True)
        with checked(config.data, scratch=entry.partial, digest=found.source_digest) as dataset:
            return dataset.names


def _classes(prepared: Entry) -> tuple[str, ...]:
    from yolov8_nas.data import dataset

    return dataset.load(prepared.outputs).classes
