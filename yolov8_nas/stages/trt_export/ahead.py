"""Engines that are built before the device is asked: TensorRT for RTX needs none to build them.

They are a part of their own in the stage store, under a key of the networks' digests, their form, the compiler's
version and the compute capability that hw-probe found. A step of the pipeline on a CPU node makes it. The export on the
device takes over what lies there, each file held against its SHA-256, and makes what does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from yolov8_nas.deploy.job import WANTED
from yolov8_nas.deploy.sources import Form, Source, sources, write
from yolov8_nas.device.profile import Profile
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.tensorrt_rtx import build_ahead
from yolov8_nas.files import file_sha256
from yolov8_nas.measure import tensorrt_rtx
from yolov8_nas.measure.engine_file import read_manifest, told_of
from yolov8_nas.measure.runtime import find
from yolov8_nas.runner.results import AheadResult, BuiltAhead
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.trt_export.settings import ExportSettings

ENGINES: Final = "engines"
"""Name of the part in the store."""

ENGINES_VERSION: Final = 1
"""Raised when the same settings would give other engines."""


class EngineSettings(Form):
    """All that the engines depend on: the form of their files, and

    Attributes:
        compiler: Version of TensorRT for RTX, the one that the device was measured with.
        capability: The compute capability that they are for.
        networks: SHA-256 of each checkpoint, by the name of its files.
    """

    compiler: str
    capability: str
    networks: Mapping[str, str]


def run(ctx: StageContext[ExportSettings]) -> None:
    """Build all engines of a target, and write `ahead.json`: what was built, or why nothing was.

    Nothing is lost where it cannot be done here: the export tries again on the device, and says what it lacks.
    """
    try:
        with ctx.host.computing():
            profile = Profile.read(ctx.inputs["hw-probe"])
            found = sources(ctx.inputs["qat-finetune"], WANTED[ctx.settings.precision])
            built = engines(replace(ctx, out=ctx.partial / ENGINES), profile, found)
    except (InputError, StageError) as error:
        ctx.progress.note(f"the device has to build them: {error}")
        AheadResult(built=False, reason=str(error), engines={}).write(ctx.out)
        return
    told = {source.name: BuiltAhead.model_validate(told_of(built / f"{source.name}.engine")) for source in found}
    AheadResult(built=True, reason=None, engines=told).write(ctx.out)


def engines(ctx: StageContext[ExportSettings], profile: Profile, found: Sequence[Source]) -> Path:
    """The engines of networks and the ONNX files that they are of, taken from the store or built here.

    Args:
        ctx: The context of the stage; its `out` gets them.
        profile: hw-probe's profile of the device.
        found: The networks.

    Returns:
        The folder with `<name>.onnx`, `<name>.engine` and what is known of it, each engine whole and of the ONNX file
        beside it.

    Raises:
        InputError: The compiler is not here, is of another version than the device was measured with, or refuses a
            layer of a file.
        StageError: It cannot build one, or a checkpoint cannot be exported.
    """
    assert profile.compute_capability is not None, "this compiler builds for GPUs alone"
    settings = EngineSettings(
        compiler=profile.runtime_version,
        capability=profile.compute_capability,
        networks={source.name: file_sha256(source.checkpoint) for source in found},
        imgsz=ctx.settings.imgsz,
        batch=ctx.settings.batch,
        nms_free=ctx.settings.nms_free,
        keep_float=ctx.settings.keep_float,
    )
    ctx.out.mkdir(parents=True, exist_ok=True)
    ctx.share(ENGINES, ENGINES_VERSION, settings, partial(_make, found=found))
    for source in found:
        engine, onnx = (ctx.out / f"{source.name}{suffix}" for suffix in (".engine", ".onnx"))
        if read_manifest(engine).source_sha256 != file_sha256(onnx):
            raise StageError(f"{engine}: built of another file than {onnx.name}; remove both, and start the run again")
    return ctx.out


def _make(ctx: StageContext[EngineSettings], found: Sequence[Source]) -> None:
    settings = ctx.settings
    here = tensorrt_rtx.compiler().__version__
    if here != settings.compiler:
        raise InputError(
            f"TensorRT for RTX {here} is installed here, and the device was measured with {settings.compiler}: an "
            "engine runs with the version that built it; install that one"
        )
    for number, source in enumerate(found, 1):
        ctx.progress.note(f"building {source.name} for compute capability {settings.capability}")
        onnx = ctx.out / f"{source.name}.onnx"
        write(source, onnx, find(tensorrt_rtx.RUNTIME, "gpu", source.precision), settings)
        build_ahead(onnx, onnx.with_suffix(".engine"), capabilities=[settings.capability])
        ctx.progress.update(number, len(found), f"built {source.name}")
