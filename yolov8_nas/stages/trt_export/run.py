"""trt-export: the file that ships, exported, verified, timed and scored on the target; see `deploy.exporter`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from yolov8_nas.deploy.exporter import export
from yolov8_nas.deploy.job import Job
from yolov8_nas.deploy.sources import Form, Source
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import StageError
from yolov8_nas.export.tensorrt import status
from yolov8_nas.measure import tensorrt_rtx
from yolov8_nas.runner.results import NmsResult, ResolvedLimit, SearchResult
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.search.preference import MOST_ACCURATE, Preference
from yolov8_nas.stages.trt_export import ahead
from yolov8_nas.stages.trt_export.settings import ExportSettings


def run(ctx: StageContext[ExportSettings]) -> None:
    """Write `verdict.json`, `engine.json`, `evaluation/*.npz`, and `model/` where a file keeps the limits.

    Where stock was trained for comparison, `pictures.json` and `pictures/` as well.
    What can be chosen in its place lies in `choices/`, a folder each with the same files.

    Raises:
        StageError: None does; the verdict with the table of what was tried is written all the same.
    """
    decided = export(job_of(ctx))
    status(decided.engine).write(ctx.out)
    decided.result.write(ctx.out)
    if decided.why_none:
        raise StageError(decided.why_none)


def job_of(ctx: StageContext[ExportSettings]) -> Job:
    """The export, given what the stages before have written."""
    settings, probe = ctx.settings, ctx.inputs["hw-probe"]
    profile = Profile.read(probe)
    objective, nms_ms = SearchResult.read(ctx.inputs["search"]).objective, NmsResult.read(probe).latency_ms

    def engines(found: Sequence[Source]) -> Path:
        return ahead.engines(replace(ctx, out=ctx.partial), profile, found)

    return Job(
        tuned=ctx.inputs["qat-finetune"],
        data=ctx.inputs["data-prep"],
        profile=profile,
        limits=[row.constraint for row in ResolvedLimit.read_all(probe)],
        precision=settings.precision,
        form=Form(**{name: getattr(settings, name) for name in Form.model_fields}),
        scale=settings.scale,
        out=ctx.out,
        work=ctx.partial,
        preference=Preference(**dict(objective)) if objective else MOST_ACCURATE,
        nms_ms=dict(nms_ms) if nms_ms else None,
        elsewhere=settings.elsewhere,
        build_ahead=engines if profile.runtime_name == tensorrt_rtx.RUNTIME else None,
        host=ctx.host,
        progress=ctx.progress,
    )
