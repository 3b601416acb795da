"""Register: the verified detector of one target becomes a version in the model registry, with its evidence.

Its effects lie in MLflow, outside the store, so it always runs; running it again changes nothing (see
`registry.register`). Where the tracking server can't be reached, that is no failure of the run, whose result is all
there: what was to be sent is kept in the store (see `registry.spool`), and the stage is done.

Beside the configuration it takes the run's own parameters, given to `run_stage`: `run_id`, `tracking_uri` (as
`tracking.resolve_uri` gave it), `mlflow_run` (as `tracking.open_run` gave it) and `label` (of the target).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Final

from yolov8_nas.data import dataset
from yolov8_nas.device.profile import Profile
from yolov8_nas.files import file_sha256, tree_files, write_json
from yolov8_nas.registry import spool
from yolov8_nas.registry.register import CHOICE, Deployable
from yolov8_nas.registry.submission import SUPERNET, Submission, Submitted, submit
from yolov8_nas.registry.tracking import UnavailableError, connect, unavailable, without_credentials
from yolov8_nas.runner.results import (
    Choice,
    Difference,
    RegisteredChoice,
    RegisterResult,
    Shipped,
    StockResult,
    VerdictResult,
)
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.register.settings import RegisterSettings

CHOOSE: Final = "; to choose from beside the one that ships"
"""The end of the description of a version that can be chosen in the place of the one that ships."""

LICENCE: Final = "AGPL-3.0"
"""Licence of Ultralytics' networks, and so of what is derived from them; checkpoint and ONNX file say so, too."""


def run(ctx: StageContext[RegisterSettings]) -> None:
    """Send the branch's evidence and what it ships, or keep it to be sent later, and write `registry.json`."""
    uri = ctx.settings.tracking_uri
    submission = _submission(ctx)
    ctx.progress.update(0, 2, "opening the tracking store")
    _send_what_waits(ctx, uri)
    ctx.progress.update(1, 2, "logging measurements, registering the model")
    try:
        done = submit(connect(uri), submission)
    except Exception as error:
        if ctx.store is None or not unavailable(error):
            raise
        kept = spool.keep_branch(ctx.store, uri, submission, error)
        result = RegisterResult(
            model=submission.deployable.name,
            tracking_uri=without_credentials(uri),
            reason=f"{without_credentials(uri)} could not be reached: it is kept in {kept}",
            spooled=kept,
        )
        ctx.progress.note(f"{result.reason}; `yolov8-nas models sync` or the next run sends it")
        message = f"{result.model} is not registered yet"
    else:
        result = _result(ctx, done, without_credentials(uri))
        ships = done.shipped
        message = f"{ships.model} version {ships.version}" + (f" is {ships.role}: {ships.reason}" if ships.role else "")
    result.write(ctx.out)
    ctx.progress.update(2, 2, message)


def _result(ctx: StageContext[RegisterSettings], done: Submitted, uri: str) -> RegisterResult:
    result = RegisterResult(**asdict(done.shipped), run_id=done.run, tracking_uri=uri)
    if not done.choices:
        return result
    told = VerdictResult.read(ctx.inputs["trt-export"]).choices
    choices = tuple(
        RegisteredChoice(version=one.version, candidate=file.candidate, precision=file.precision, aliases=one.aliases)
        for one, file in zip(done.choices, told, strict=True)
    )
    return result.model_copy(update={"choices": choices})


def _send_what_waits(ctx: StageContext[RegisterSettings], uri: str) -> None:
    """Send what earlier runs could not, first: which version is champion depends on the order."""
    if ctx.store is None:
        return
    try:
        done = spool.send(ctx.store, uri, ctx.progress.note)
    except UnavailableError as error:
        ctx.progress.note(f"what waits in {ctx.store.address}/{spool.FOLDER} is not sent: {error}")
        return
    for entry in done.waiting:
        ctx.progress.note(f"not sent: {entry.what} in {entry.folder}, for {entry.tracking_uri}: {entry.why}")


def _submission(ctx: StageContext[RegisterSettings]) -> Submission:
    exported = ctx.inputs["trt-export"]
    verdict = VerdictResult.read(exported)
    assert verdict.shipped is not None, "a target whose verdict has failed does not come so far"
    detectors = _Detectors(ctx, verdict)
    return Submission(
        experiment=ctx.settings.experiment,
        parent=ctx.settings.mlflow_run,
        run_id=ctx.settings.run_id,
        label=ctx.settings.label,
        deployable=detectors.of(verdict.shipped, exported / "model", verdict.comparison),
        choices=tuple(
            detectors.of(one, exported / Choice.IN / one.folder, one.comparison, choice=True) for one in verdict.choices
        ),
        evidence={
            f"{stage}/{name}": file
            for stage, folder in ctx.inputs.items()
            for name, file in tree_files(folder).items()
            if file.suffix in (".json", ".jsonl") and "dataset/" not in name
        },
        shared_files={
            f"{SUPERNET}/{name}": ctx.inputs["supernet-train"] / name
            for name in ("supernet.safetensors", "supernet.json")
        },
    )


class _Detectors:
    """Detectors of one target, ready to be registered.

    Args:
        ctx: The context of the stage.
        verdict: trt-export's result.
    """

    def __init__(self, ctx: StageContext[RegisterSettings], verdict: VerdictResult) -> None:
        self.ctx = ctx
        self.profile = Profile.read(ctx.inputs["hw-probe"])
        self.scale = StockResult.read(ctx.inputs["hw-probe"]).scale
        self.params = _params(ctx, nms_free=verdict.nms.nms_free)
        self.tags = _tags(ctx)

    def of(self, file: Shipped, folder: Path, comparison: Difference | None, *, choice: bool = False) -> Deployable:
        """The detector of an exported file.

        Args:
            file: The file.
            folder: Where it lies, with what belongs to it.
            comparison: It against stock.
            choice: Whether it is one to choose from, and not the one that ships.
        """
        settings, profile, network = self.ctx.settings, self.profile, file.architecture
        described = self.ctx.out / (f"architecture-{folder.name}.json" if choice else "architecture.json")
        write_json(described, network.to_dict())
        name = f"candidate-{file.candidate}-{file.precision}.npz"
        scores = self.ctx.inputs["trt-export"] / "evaluation" / name
        return Deployable(
            name=settings.model,
            files={**tree_files(folder), "architecture.json": described},
            hardware_id=profile.id,
            precision=file.precision,
            limits=settings.constraints,
            scale=self.scale,
            resolved=[limit.model_dump(mode="json", exclude_none=True) for limit in file.constraints],
            metrics=_metrics(file, comparison),
            params={"architecture": described.read_text(), **self.params},
            tags={
                "hardware": profile.name,
                "hardware_model": profile.model,
                "runtime": profile.runtime_name,
                "runtime_version": profile.runtime_version,
                "architecture": network.digest,
                "file": file.file,
                **licences(file, settings.data_license),
                **self.tags,
                **({CHOICE: network.digest[:8]} if choice else {}),
            },
            description=(
                f"{file.precision}, {settings.imgsz} px, on {profile.model} with {profile.runtime_name} "
                f"{profile.runtime_version}: mAP50-95 {file.map50_95:.3f}, p50 {file.latency_ms.p50:.3g} ms; "
                f"keeps {', '.join(settings.constraints)}{CHOOSE if choice else ''}"
            ),
            scores=scores if scores.is_file() else None,
        )


def _metrics(shipped: Shipped, comparison: Difference | None) -> dict[str, float]:
    """The figures of what ships, as far as they were measured."""
    figures: dict[str, float | None] = {
        name: getattr(shipped, name)
        for name in ("map50_95", "map50", "memory_mb", "energy_mj", "power_w", "params", "gflops")
    }
    for prefix, latency in (("latency", shipped.latency_ms), ("latency_with_nms", shipped.latency_with_nms_ms)):
        figures |= {f"{prefix}_{name}_ms": value for name, value in latency or ()}
    if comparison:
        figures |= {
            f"map50_95_against_stock_{name}": getattr(comparison, name) for name in ("difference", "low", "high")
        }
    return {name: float(value) for name, value in figures.items() if value is not None}


def licences(shipped: Shipped, data: str | None) -> dict[str, str]:
    """Under which licences the model stands: of itself, of what it began with, and of what it was trained on.

    Args:
        shipped: The file that ships.
        data: Licence of the dataset; nothing where nobody has told it.
    """
    training = shipped.training
    start = f"that of {training.begun_with}; Ultralytics' own weights are under {LICENCE}"
    return {
        "license": f"{LICENCE}, as Ultralytics' YOLOv8, whose networks and code it is made of",
        "license_start": "none: random weights" if training.start == "scratch" else start,
        "license_data": data or "not known: data_license in the run configuration tells it",
    }


def _params(ctx: StageContext[RegisterSettings], *, nms_free: bool) -> dict[str, str]:
    """What the detector is."""
    return {
        "classes": ", ".join(dataset.load(ctx.inputs["data-prep"]).classes),
        "space": ctx.settings.space,
        "imgsz": str(ctx.settings.imgsz),
        "batch": str(ctx.settings.batch),
        "seed": str(ctx.settings.seed),
        "precision_requested": ctx.settings.precision,
        **({"head": "one-to-one"} if nms_free else {}),
    }


def _tags(ctx: StageContext[RegisterSettings]) -> dict[str, str]:
    """What the detector was made from and for."""
    supernet = ctx.inputs["supernet-train"]
    return {
        "dataset": dataset.load(ctx.inputs["data-prep"]).digest,
        "dataset_name": ctx.settings.model,
        "supernet": file_sha256(supernet / "supernet.safetensors"),
        "supernet_details": file_sha256(supernet / "supernet.json"),
        "imgsz": str(ctx.settings.imgsz),
        "run_id": ctx.settings.run_id,
        "target": ctx.settings.label,
    }
