"""Measures champions again: after an update of driver or runtime, say, do they still keep their limits?"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from yolov8_nas.errors import InputError
from yolov8_nas.registry import trial
from yolov8_nas.registry.champions import CHAMPION, alias
from yolov8_nas.registry.query import RegisteredVersion, list_models
from yolov8_nas.registry.tracking import opened

RECHECK: Final = "recheck"
"""Tag of a version: what was measured of it the last time, as JSON."""


def recheck(tracking_uri: str, data: str | None = None) -> list[dict[str, Any]]:
    """Measure the champions of this machine again, in the same rounds, and note on each what was found.

    The figures that they were registered with stay as they are, and so do the aliases.

    Args:
        tracking_uri: As `tracking.resolve_uri` gave it.
        data: A dataset with images for limits `with_nms`, which stay unmeasured without.

    Returns:
        A row per champion: `model`, `version`, `aliases`, `registered` (its limits as measured then, and the runtime),
        `measured` (`trial.Measured`), and `kept`, which is nothing where a limit could not be measured.

    Raises:
        InputError: No champion is for this machine.
        StageError: A file is not the one that was registered, or a champion is not signed with a trusted key.
    """
    champions = [
        version.trusted()
        for version in list_models(tracking_uri)
        if any(held.startswith(alias(CHAMPION, "")) for held in version.aliases)
    ]
    here = _for_this_machine(champions)
    rows = []
    with opened(tracking_uri) as client, tempfile.TemporaryDirectory() as folder:
        images = trial.val_split(data, Path(folder)) if data is not None else None
        for number, versions in enumerate(here):
            work = Path(folder) / str(number)
            entrants = [trial.entrant(version, work) for version in versions]
            for version, found in zip(versions, trial.measure(entrants, images, work), strict=True):
                met = [limit["met"] for limit in found.limits]
                kept = False if False in met else None if None in met else True
                row = {
                    "model": version.model,
                    "version": version.version,
                    "aliases": list(version.aliases),
                    "registered": {
                        "limits": trial.as_registered(version),
                        "runtime": f"{version.tag('runtime')} {version.tag('runtime_version')}",
                    },
                    "measured": asdict(found),
                    "kept": kept,
                }
                note = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(found), "kept": kept}
                client.set_model_version_tag(version.model, str(version.version), RECHECK, json.dumps(note))
                rows.append(row)
    return rows


def _for_this_machine(champions: list[RegisteredVersion]) -> list[list[RegisteredVersion]]:
    """The champions that can be measured here, in groups of those that run alike."""
    groups = defaultdict(list)
    for version in champions:
        try:
            target = trial.device_of(version)
        except InputError:
            continue
        alike = (target.name, target.runtime, version.tag("precision"), version.params["batch"], version.tag("imgsz"))
        groups[alike].append(version)
    if not groups:
        there = sorted({version.tag("hardware_id") for version in champions})
        raise InputError(
            f"no champion is for this machine; the champions are for {', '.join(there) or 'nothing: there is none'}"
        )
    return list(groups.values())
