"""data-prep: a dataset as people have it becomes a checked one in train, search and val splits."""

from __future__ import annotations

import shutil
from typing import Any

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.stages.stage import Stage, StageContext


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
    from yolov8_nas.data.readers import local_path

    path = local_path(config.data)
    return {"source": str(path), "source_digest": source_digest(path)}


def run(context: StageContext) -> None:
    """Write `dataset/{images,labels}/{train,search,val}` and `dataset.json`.

    Raises:
        InputError: The dataset cannot be used.
    """
    from yolov8_nas.data import dataset
    from yolov8_nas.data.check import checked

    shutil.rmtree(context.partial, ignore_errors=True)  # what a killed try had unpacked
    context.partial.mkdir(parents=True)
    with (
        context.host.computing(),
        checked(
            context.settings["source"],
            scratch=context.partial,
            progress=lambda step, done, total: context.progress.update(done, total, step),
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


STAGE = Stage(name="data-prep", version=1, settings=settings, run=run)
