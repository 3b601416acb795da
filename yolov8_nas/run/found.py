"""Which results of a run are in the stage store before its steps begin: a step that only reads needs no device.

A key is a digest of settings and inputs, so it is known before a step begins, as far as what comes before it is done.
What the settings of hw-probe depend on is known on the device alone. It is taken to be the one that an earlier run has
seen, but only where nothing of a target is left to compute: otherwise its device is looked at first, and everything
after it follows from what is seen there, a new driver for instance.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.run.lifecycle import IN_CLUSTER
from yolov8_nas.run.summary import RUN_FILE
from yolov8_nas.runner.stage import (
    STATUS_FILE,
    find_target,
    key_of,
    open_store,
    read_record,
    record_file,
    run_stage,
    target_labels,
)
from yolov8_nas.stages import find_stage
from yolov8_nas.stages.hw_probe.settings import ProbeSettings, Seen, asked_of
from yolov8_nas.store.archive import pack
from yolov8_nas.store.store import Store

BRANCH: Final[Mapping[str, tuple[str, ...]]] = {
    "search": ("data-prep", "supernet-train", "hw-probe"),
    "qat-finetune": ("data-prep", "supernet-train", "search"),
    "trt-export": ("data-prep", "hw-probe", "search", "qat-finetune"),
}
"""The costly stages of a target after its probe, in their order, with the stages whose results each takes."""

_RUNS_LOOKED_AT: Final = 20


def stage_key(stage: str, config: RunConfig, inputs: Mapping[str, str], store: Store) -> tuple[str, str] | None:
    """Key and digest of a result of a stage for all targets; nothing where it is to be computed.

    Args:
        stage: `data-prep` or `supernet-train`.
        config: The run configuration.
        inputs: Digest of each input.
        store: The stage store.
    """
    if not _looks():
        return None
    try:
        settings = find_stage(stage).whole(config, None, {})
    except (InputError, ConnectionError):
        return None  # the step itself says what is wrong
    return _done(stage, key_of(find_stage(stage), settings, inputs), store)


def branch_keys(config: RunConfig, label: str, digests: Mapping[str, str], store: Store) -> dict[str, str]:
    """Keys of the results of a target after its probe that are in the store, up to the first that is not.

    Args:
        config: The run configuration.
        label: Label of the target.
        digests: Digest of the results of data-prep, supernet-train and hw-probe.
        store: The stage store.
    """
    digests, target = dict(digests), find_target(config, label)
    found: dict[str, str] = {}
    if not _looks():
        return found
    for name, takes in BRANCH.items():
        stage = find_stage(name)
        try:
            settings = stage.whole(config, target, {})
        except InputError:
            break  # the step itself says what is wrong, and its target alone is lost
        key = key_of(stage, settings, {one: digests[one] for one in sorted(takes)})
        if (done := _done(name, key, store)) is None:
            break
        found[name], digests[name] = done
    return found


def probe_keys(config: RunConfig, num_classes: int, store: Store, trained: RunConfig | None = None) -> dict[str, str]:
    """Keys of the probes of those targets of which nothing is left to compute, on the devices that were seen last.

    Args:
        config: The run configuration.
        num_classes: Classes of the dataset.
        store: The stage store.
        trained: The configuration that the supernet is trained by, where it is another one.

    Returns:
        The key by label; the device of any other target is to be looked at.
    """
    if (data := stage_key("data-prep", config, {}, store)) is None:
        return {}
    if (supernet := stage_key("supernet-train", trained or config, {"data-prep": data[1]}, store)) is None:
        return {}
    shared, keys = {"data-prep": data[1], "supernet-train": supernet[1]}, {}
    for label, target in zip(target_labels(config), config.targets, strict=True):
        if (seen := _last_seen(target, store)) is None:
            continue
        try:
            settings = ProbeSettings(**dict(asked_of(config, target, seen)), num_classes=num_classes)
        except InputError:
            continue
        if (probe := _done("hw-probe", key_of(find_stage("hw-probe"), settings, {}), store)) is None:
            continue
        if branch_keys(config, label, {**shared, "hw-probe": probe[1]}, store).keys() == BRANCH.keys():
            keys[label] = probe[0]
    return keys


def pick_up(config: RunConfig, label: str, *, store: str, run_id: str, output: Path) -> tuple[str, dict[str, str]]:
    """Hand on what the probe of a target came to, and look what is there of the stages after it.

    Args:
        config: The run configuration.
        label: Label of the target.
        store: The stage store.
        run_id: Name of the run, whose probe of the target has ended.
        output: Where the tar of the probe's result goes; of one that failed, the reason, which later stages pass on.

    Returns:
        Digest of the tar, and the keys of `branch_keys`.

    Raises:
        StageError: The run has no record of what the probe needs or came to.
    """
    opened = open_store(store)
    folder = opened.run_folder(run_id)
    records = {}
    for name, of in (("data-prep", None), ("supernet-train", None), ("hw-probe", label)):
        if (record := read_record(folder, name, of)) is None:
            file = folder / record_file(name, of)
            raise StageError(f"{file}: {name} has left no record in this run; start the run again")
        records[name] = record
    probe = records["hw-probe"]
    if probe.status == "failed":
        with tempfile.TemporaryDirectory() as made:
            failure = probe.model_dump(include={"status", "stage", "target", "error"})
            write_json(Path(made) / STATUS_FILE, {**failure, "kind": StageError.__name__, "run_id": run_id})
            return pack(Path(made), output), {}
    stage = find_stage("hw-probe")
    outcome = run_stage(
        stage, config=config, target=label, inputs={}, output=output, store=store, run_id=run_id, found=probe.key
    )
    if outcome.status == "failed":
        return outcome.digest, {}
    digests = {name: record.digest for name, record in records.items()}
    return outcome.digest, branch_keys(config, label, digests, opened)


def _looks() -> bool:
    return IN_CLUSTER in os.environ


def _done(stage: str, key: str, store: Store) -> tuple[str, str] | None:
    manifest = store.manifest(stage, key)
    return None if manifest is None else (key, manifest.digest)


def _last_seen(target: TargetConfig, store: Store) -> Seen | None:
    """The device of a target as the newest of the last runs with such a target has seen it."""
    for run_id in store.runs()[:_RUNS_LOOKED_AT]:
        try:
            folder = store.run_folder(run_id)
            earlier = RunConfig.parse(read_json(folder / RUN_FILE)["config"], run_id)
            for label, other in zip(target_labels(earlier), earlier.targets, strict=True):
                same = (other.hardware, other.runtime, other.far) == (target.hardware, target.runtime, None)
                if same and (record := read_record(folder, "hw-probe", label)):
                    return Seen.model_validate({name: record.settings[name] for name in Seen.model_fields})
        except (OSError, KeyError, TypeError, ValueError, StageError):
            continue  # never opened, failed for its settings, of another release, or not signed
    return None
