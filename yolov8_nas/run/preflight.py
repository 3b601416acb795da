"""What can be told in seconds before a run begins, so that nobody waits an hour for a typing error.

`check` looks at configuration, folders, dataset, space and devices. `check_weights` reads the weights that the supernet
starts from, `check_limits` exports and times the smallest network of the space and the stock one; both need torch, so
`python -m yolov8_nas.run.preflight` does them in a process of its own, and the process that shows progress for the
rest of the run stays small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov8_nas import quiet
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError
from yolov8_nas.paths import check_writable
from yolov8_nas.runner.stage import open_store, target_labels
from yolov8_nas.space import SearchSpace, SpaceError, stock_architecture
from yolov8_nas.space.limits import STATISTICS, Figures
from yolov8_nas.stages import find_stage

if TYPE_CHECKING:
    from yolov8_nas.data.check import CheckedDataset
    from yolov8_nas.measure.benchmark import Measurement
    from yolov8_nas.measure.runtime import Runtime
    from yolov8_nas.space.cost import Cost
    from yolov8_nas.store.store import Store


@dataclass(frozen=True)
class LimitCheck:
    """What the preflight measured for one target.

    Attributes:
        target: Label of the target.
        stock_ms: Median latency of stock YOLOv8 of the size, in ms.
        smallest_ms: Median latency of the smallest network of the space, in ms.
        limits: The limits, as absolute ones.
    """

    target: str
    stock_ms: float
    smallest_ms: float
    limits: tuple[str, ...]


def check(config: RunConfig, workdir: Path, store: str) -> CheckedDataset:
    """Check everything that needs no network to be built. Nothing that is written stays.

    Of a dataset at an address only its being there is checked, and it has names of classes only where it has been
    prepared before: open-run downloads it.

    Raises:
        InputError: A folder, the dataset, the space or a target cannot be used.
        SpaceError: The space's YAML is wrong.
    """
    from yolov8_nas.data.check import check_source
    from yolov8_nas.data.remote import is_address
    from yolov8_nas.measure.target import resolve

    check_folder(workdir)
    opened_store = check_places(config, store)
    SearchSpace.load(config.space)
    for target in config.targets:
        if target.far is None:
            resolve(target.hardware, target.runtime, target.precision)
        for stage in ("hw-probe", "search", "qat-finetune", "trt-export", "register"):
            find_stage(stage).settings(config, target)  # what a stage refuses, it refuses now
    find_stage("supernet-train").settings(config, None)
    dataset = _look(config, opened_store) if is_address(config.data) else check_source(config.data)
    batch, images = config.supernet.batch, dataset.images.get("train")  # the demo's are not made yet
    if batch != "auto" and images is not None and batch > images:
        raise InputError(f"supernet.batch = {batch}, but the train split has {images} images; make the batch smaller")
    return dataset


def _look(config: RunConfig, store: Store) -> CheckedDataset:
    """Look whether a dataset is at its address, and what is known of it."""
    from yolov8_nas.data import remote
    from yolov8_nas.data.check import CheckedDataset
    from yolov8_nas.stages.data_prep.classes import known_classes

    try:
        listing = remote.look(str(config.data), patient=False)
        return CheckedDataset(listing.name, known_classes(config, store) or (), {}, ())
    except ConnectionError as error:
        raise InputError(str(error)) from None


def check_places(config: RunConfig, store: str) -> Store:
    """Check that results, runs and models can be kept where they are to be kept.

    Args:
        config: The run configuration.
        store: The stage store.

    Returns:
        The stage store.

    Raises:
        InputError: One of the places can't be reached or written, or an alias would be too long.
    """
    from yolov8_nas.registry import service, tracking
    from yolov8_nas.registry.register import check_aliases

    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise InputError(f"{error.strerror}; make room there, or set TMPDIR to a folder that can be written") from None
    check_writable(temporary, "folder for temporary files", "set TMPDIR to one that can be written")
    opened_store = open_store(store)
    if "://" in store:
        check_writable(opened_store.root, "working folder of the store", "set YOLOV8_NAS_CACHE to another folder")
    else:
        check_writable(Path(store), "store", "choose another folder (--set store=FOLDER)")
    opened_store.check(writing=True)
    check_aliases(config)
    service.check(tracking.resolve_uri(config.tracking.uri, store), config.tracking.experiment)
    return opened_store


def check_folder(folder: Path) -> None:
    """Check that a folder can be made or written to, without making it.

    Raises:
        InputError: It cannot.
    """
    check_writable(folder, "work folder", "choose another folder with --workdir")


def check_weights(config: RunConfig, names: Sequence[str]) -> None:
    """Read the weights that the supernet starts from, if there are to be any.

    Args:
        config: The run configuration.
        names: Names of the classes; none where they are not known yet.

    Raises:
        InputError: They can't be read, or are of another size, space or number of classes.
    """
    if config.supernet.weights is not None:
        from yolov8_nas.data import weights
        from yolov8_nas.supernet import warmstart

        warmstart.check(weights.local(config.supernet), SearchSpace.load(config.space), len(names) or None)


def check_limits(config: RunConfig, names: Sequence[str]) -> list[LimitCheck]:
    """Build, export and time the smallest network and the stock one, and hold the limits against the smallest.

    While something else measures or computes on this host, nothing is timed: a disturbed measurement could only
    refuse limits that can be kept, and hw-probe holds them against measurements in any case.

    Raises:
        InputError: A limit cannot be kept by any network of the space; the fastest achievable value is named.
    """
    from yolov8_nas.measure.benchmark import measure
    from yolov8_nas.measure.protocol import Protocol
    from yolov8_nas.measure.runtime import find
    from yolov8_nas.measure.target import resolve

    host = HostLock()
    space = SearchSpace.load(config.space)
    quick = Protocol(warmup=3, repetitions=12, min_rounds=3, max_rounds=5, precision=0.05, leg=2)
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        for label, target in zip(target_labels(config), config.targets, strict=True):
            if target.far is not None:
                continue  # it has been measured as a whole, and hw-probe holds the limits against that in seconds
            device = resolve(target.hardware, target.runtime)
            runtime = find(device.runtime, device.kind)
            files = _export(space, config, target, runtime, names, Path(folder))
            try:
                with host.measuring(wait=False):
                    smallest, stock = measure(
                        files, threads=device.threads, runtime=runtime, batch=target.batch, protocol=quick
                    )
            except BlockingIOError:
                continue
            checks.append(_hold(config, space, label, target, smallest, stock, len(names)))
    return checks


def check_limits_apart(config: RunConfig, names: Sequence[str]) -> list[LimitCheck]:
    """`check_weights` and `check_limits` in a process of its own.

    Raises:
        InputError: As they do.
    """
    return [LimitCheck(**check) for check in _apart(config, names, limits=True)]


def check_weights_apart(config: RunConfig, names: Sequence[str]) -> None:
    """`check_weights` in a process of its own, where there are weights, but no limit that takes a measurement.

    Raises:
        InputError: As it does.
    """
    if config.supernet.weights is not None:
        _apart(config, names, limits=False)


def _apart(config: RunConfig, names: Sequence[str], *, limits: bool) -> list[dict[str, Any]]:
    request = json.dumps({"config": config.model_dump(mode="json"), "names": list(names), "limits": limits})
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **quiet.ultralytics(Path(folder))}
        command = [sys.executable, "-m", "yolov8_nas.run.preflight"]
        done = subprocess.run(command, input=request, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(
            f"the check of weights and limits ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _export(
    space: SearchSpace, config: RunConfig, target: TargetConfig, runtime: Runtime, names: Sequence[str], folder: Path
) -> list[Path]:
    """The files of the smallest network and of stock, written unless another target needed the same."""
    from yolov8_nas.export.artifact import write_network
    from yolov8_nas.supernet.derive import build

    files = []
    for name, architecture in (("smallest", space.smallest()), ("stock", stock_architecture(space.scale))):
        files.append(folder / f"{name}-{target.batch}{runtime.suffix}")
        if not files[-1].exists():
            network = build(architecture, len(names), names).eval()
            write_network(
                network,
                files[-1],
                runtime=runtime,
                imgsz=config.imgsz,
                batch=target.batch,
                nms_free=config.finetune.nms_free,
            )
    return files


def _hold(
    config: RunConfig,
    space: SearchSpace,
    label: str,
    target: TargetConfig,
    smallest: Measurement,
    stock: Measurement,
    num_classes: int,
) -> LimitCheck:
    from yolov8_nas.space.cost import cost

    costs = [cost(a, num_classes, config.imgsz) for a in (space.smallest(), stock_architecture(space.scale))]
    least, reference = (_best(m, c, target.batch) for m, c in zip((smallest, stock), costs, strict=True))
    limits = [limit.resolve(reference.value(limit)) for limit in target.limits]
    for asked, limit in zip(target.limits, limits, strict=True):
        # A small network need not be the one of least power, so power is left to hw-probe.
        if limit.metric != "power" and not limit.met(least.value(limit)):
            meaning = f" ({limit} here)" if asked.relative else ""
            raise InputError(
                f"constraint {asked}{meaning} on {target.hardware}: even the smallest network of space {space.name} "
                f"at {config.imgsz} px has {limit.metric} {least.value(limit):.3g} {limit.unit}; "
                "that is what can be achieved: change the limit, the space or imgsz"
            )
    return LimitCheck(label, min(stock.rounds), min(smallest.rounds), tuple(map(str, limits)))


def _best(measurement: Measurement, paper: Cost, batch: int) -> Figures[float]:
    """What limits are held against, by the best round: what can be kept must not be refused for other load.

    Non-maximum suppression is left out for the same reason: it takes time, but how much depends on the images.
    """
    from yolov8_nas.search.objective import figures

    latency = dict.fromkeys(STATISTICS, min(measurement.rounds))
    known = figures(measurement, paper, batch=batch, with_nms_ms=latency)
    return replace(known, latency_ms=latency)


def _main() -> int:
    request: dict[str, Any] = json.load(sys.stdin)
    try:
        config = RunConfig.parse(request["config"], "run configuration")
        check_weights(config, request["names"])
        checks = check_limits(config, request["names"]) if request["limits"] else []
    except (InputError, SpaceError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps([asdict(check) for check in checks]))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
