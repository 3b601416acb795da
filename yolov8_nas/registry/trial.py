"""Registered versions on trial: scored on the same images, and measured in the same rounds on the device they are for.

What the registry says of two versions was found at two times, with two versions of the driver or two states of the
dataset. Whoever decides between them asks again. Only the very files that were registered are tried, after a look at
their hashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import copy_file
from yolov8_nas.measure.target import Target, resolve
from yolov8_nas.names import shown
from yolov8_nas.registry import pull
from yolov8_nas.registry.query import RegisteredVersion
from yolov8_nas.space.limits import STATISTICS, Constraint, Figures

if TYPE_CHECKING:
    from yolov8_nas.evaluation import Evaluation
    from yolov8_nas.measure.benchmark import Measurement, Timing

BATCH: Final = 16
"""Images at once when a checkpoint is scored; an exported file has its own batch."""


@dataclass(frozen=True)
class Entrant:
    """A version whose files are here.

    Attributes:
        version: The version.
        runs: The file that runs on the device: the one that was measured and scored.
    """

    version: RegisteredVersion
    runs: Path


@dataclass(frozen=True)
class Images:
    """The val split of a dataset, laid out for Ultralytics.

    Attributes:
        source: What people call it.
        digest: SHA-256 of these images and their labels.
        classes: Class names.
        data: The data yaml.
        files: The images.
    """

    source: str
    digest: str
    classes: tuple[str, ...]
    data: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Measured:
    """What was measured of a version on its device.

    Attributes:
        latency_ms: Percentiles of the network alone, in ms.
        interval_ms: 95% interval of the median.
        memory_mb: Peak memory in MiB.
        limits: The limits of the version, each with what was `measured` and whether it is `met`; both are nothing where
            a limit could not be measured.
        disturbed: Whether other load was there all the time.
        runtime: Name and version of what ran it.
    """

    latency_ms: dict[str, float]
    interval_ms: tuple[float, float]
    memory_mb: float
    limits: tuple[dict[str, Any], ...]
    disturbed: bool
    runtime: str


def entrant(version: RegisteredVersion, work: Path) -> Entrant:
    """Fetch the files of a version, verified, to a folder of their own in `work`.

    The files that run get names that no other version's have: measurements go by file names.

    Raises:
        StageError: A file is not the one that was registered.
        InputError: The network is not whole in its file.
    """
    from yolov8_nas.export.onnx_file import read_onnx

    folder = work / f"{version.model}-{version.version}"
    files = pull.fetch(version, folder)
    if (named := version.tag("file")) not in files:
        raise StageError(f"{version}: its tag file = {shown(named)} names none of its files; register it again")
    runs = files[named]
    if runs.suffix == ".onnx":
        read_onnx(runs)
    for file in sorted(folder.glob(f"{runs.name}*")):  # an engine has a file beside it that describes it
        copy_file(file, work / f"{folder.name}{file.name.removeprefix(runs.stem)}")
    return Entrant(version, work / f"{folder.name}{runs.suffix}")


def val_split(source: str, work: Path) -> Images:
    """Check a dataset and lay out its val split.

    Args:
        source: A folder, a data.yaml or an archive; or the folder of data-prep's result, which has been checked.
        work: Folder for what is written on the way.

    Raises:
        InputError: The dataset cannot be used.
    """
    from yolov8_nas.data import dataset
    from yolov8_nas.data.check import checked

    folder = work / "data"
    if (Path(source) / "dataset.json").is_file():
        folder, written = Path(source), dataset.load(Path(source))
        source = written.source
    else:
        with checked(source, scratch=work) as found:
            val = replace(found, splits={"train": (), "search": (), "val": found.splits["val"]})
            written = dataset.write(val, folder)
    return Images(
        source=source,
        digest=written.digest,
        classes=written.classes,
        data=dataset.data_yaml(folder, work, validate_on="val"),
        files=tuple(sorted((folder / "dataset" / "images" / "val").iterdir())),
    )


def score(entrants: Sequence[Entrant], images: Images, work: Path) -> list[Evaluation]:
    """Score versions on the same images, by the protocol of `evaluation`.

    Raises:
        InputError: A version was trained for other classes.
    """
    import torch

    from yolov8_nas.device.profile import computing_threads
    from yolov8_nas.evaluation import Evaluator

    for one in entrants:
        classes = one.version.params["classes"]
        if classes != ", ".join(images.classes):
            raise InputError(
                f"{images.source}: its classes are {', '.join(images.classes)}, those of {one.version} are {classes}; "
                "give the dataset that it was made for"
            )
    torch.set_num_threads(computing_threads())
    evaluators = {
        size: Evaluator(images.data, imgsz=int(size), batch=BATCH, work=work / f"scores-{size}")
        for size in {one.version.tag("imgsz") for one in entrants}
    }
    with HostLock().computing():
        return [evaluators[one.version.tag("imgsz")].evaluate(one.runs) for one in entrants]


def device_of(version: RegisteredVersion) -> Target:
    """The device of a version, if it is this machine's.

    Raises:
        InputError: It is not.
    """
    target = resolve(version.tag("hardware"), version.tag("runtime"), version.tag("precision"))
    if target.id != version.tag("hardware_id"):
        raise InputError(f"{version} is for {version.tag('hardware_id')}, and this machine is {target.id}")
    return target


def measure(entrants: Sequence[Entrant], images: Images | None, work: Path) -> list[Measured]:
    """Measure versions of one device in the same rounds; the first is the reference network.

    Args:
        entrants: The versions, all of the same hardware, runtime and batch.
        images: Images for limits `with_nms`, which stay unmeasured without.
        work: Folder for what is written on the way.

    Raises:
        InputError: The device is not here or cannot run a file, or the versions take different numbers of images.
    """
    from yolov8_nas.measure.benchmark import measure as measure_files
    from yolov8_nas.measure.nms import frames, measure_with_nms
    from yolov8_nas.measure.protocol import VERIFY
    from yolov8_nas.measure.runtime import find

    first = entrants[0].version
    target, batch = device_of(first), int(first.params["batch"])
    for one in entrants:
        if int(one.version.params["batch"]) != batch:
            raise InputError(f"{one.version} takes another number of images at once than {first}: they do not compare")
    runtime = find(target.runtime, target.kind, first.tag("precision"))
    whole: dict[Path, Timing] = {}
    with HostLock().measuring():
        alone = measure_files(
            [one.runs for one in entrants], threads=target.threads, runtime=runtime, batch=batch, protocol=VERIFY
        )
        if images and any(limit["scope"] == "with_nms" for one in entrants for limit in one.version.limits):
            for size in sorted({one.version.tag("imgsz") for one in entrants}):
                files = [one.runs for one in entrants if one.version.tag("imgsz") == size]
                pictures = frames(images.files, imgsz=int(size), batch=batch)
                timings = measure_with_nms(files, pictures, threads=target.threads, runtime=runtime)
                whole |= dict(zip(files, timings, strict=True))
    return [
        Measured(
            latency_ms=asdict(network.latency_ms),
            interval_ms=network.interval_ms,
            memory_mb=network.memory_mb,
            limits=tuple(_held(one.version, network, whole.get(one.runs))),
            disturbed=network.disturbed or (one.runs in whole and whole[one.runs].disturbed),
            runtime=f"{runtime.name} {runtime.version}",
        )
        for one, network in zip(entrants, alone, strict=True)
    ]


def as_registered(version: RegisteredVersion) -> list[dict[str, Any]]:
    """The limits of a version with what was measured of it when it was registered."""
    metrics = version.metrics

    def percentiles(of: str) -> dict[str, float]:
        return {p: metrics.get(f"{of}_{p}_ms", math.nan) for p in STATISTICS}

    return _rows(
        version,
        Figures(
            batch=int(version.params["batch"]),
            latency_ms=percentiles("latency"),
            latency_with_nms_ms=percentiles("latency_with_nms"),
            memory_mb=metrics.get("memory_mb", math.nan),
            power_w=metrics.get("power_w", math.nan),
            energy_mj=metrics.get("energy_mj", math.nan),
            params=metrics.get("params", math.nan),
            gflops=metrics.get("gflops", math.nan),
        ),
    )


def _held(version: RegisteredVersion, network: Measurement, frame: Timing | None) -> list[dict[str, Any]]:
    return _rows(
        version,
        Figures(
            batch=int(version.params["batch"]),
            latency_ms=asdict(network.latency_ms),
            latency_with_nms_ms=asdict(frame.latency_ms) if frame else dict.fromkeys(STATISTICS, math.nan),
            memory_mb=network.memory_mb,
            power_w=math.nan if network.power_w is None else network.power_w,
            energy_mj=math.nan if network.energy_mj is None else network.energy_mj,
            params=version.metrics["params"],
            gflops=version.metrics["gflops"],
        ),
    )


def _rows(version: RegisteredVersion, figures: Figures[float]) -> list[dict[str, Any]]:
    rows = []
    for row in version.limits:
        limit = Constraint.from_row(row)
        value = figures.value(limit)
        known = not math.isnan(value)
        rows.append({**row, "measured": value if known else None, "met": limit.met(value) if known else None})
    return rows
