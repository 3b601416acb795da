"""supernet-train: one set of weights for every network of the space.

With several processes, each has a device and a share of every batch. On one machine the stage starts them itself,
under torchrun. On several, torchrun is started on each of them (in a cluster by what `run` is given), with this module
and a request on a disk that all share:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29400 \
        -m yolov8_nas.stages.supernet_train request.json

`request.json` has `settings` (as this module's `settings` makes them), `inputs` (the folder of data-prep's result as
`data-prep`), `out` and `partial`, both folders that exist.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from yolov8_nas.config import RunConfig, SupernetConfig, TargetConfig
from yolov8_nas.data import weights
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import canonical_digest, file_sha256, read_json, write_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import PARENT_VARIABLE, Settings, Stage, StageContext, die_with_parent

FAILURE: Final = "failure.json"
"""File in `partial` with what a process said before it ended."""

START_IMAGES: Final = 256
"""Training images to which what is sliced from a larger network is fitted."""

KEPT: Final = "supernets"
"""Folder of the store with supernets that came from a registry, by the SHA-256 of their weights."""

_KEPT_AT: Final = f"store://{KEPT}/"


def settings(config: RunConfig, target: TargetConfig | None) -> Settings:
    """The space and the recipe.

    Raises:
        InputError: There are fewer GPUs than processes, the batch cannot be shared out, or there are no such weights to
            start from.
        SpaceError: The space cannot be used.
    """
    from yolov8_nas.space import SearchSpace

    supernet = config.supernet
    processes = _processes(supernet.processes)
    shards = processes * supernet.accumulate
    if supernet.batch != "auto" and supernet.batch % shards:
        raise InputError(
            f"supernet.batch = {supernet.batch} cannot be shared out evenly among {processes} processes with "
            f"supernet.accumulate = {supernet.accumulate}; make it a multiple of {shards}"
        )
    return {
        "space": SearchSpace.load(config.space).to_dict(),
        "imgsz": config.imgsz,
        "epochs": supernet.epochs,
        "batch": supernet.batch,
        "lr": supernet.lr,
        "random_networks": supernet.random_networks,
        "largest_first": supernet.alone,
        "anchor": supernet.anchored,
        "near": supernet.near,
        "seed": config.seed,
        "accumulate": supernet.accumulate,
        "amp": supernet.amp,
        "processes": processes,
        "weights": _weights(supernet),
    }


Launch = Callable[[int, str, Sequence[str], Mapping[str, str]], int]
"""Runs a module in several processes and waits for their end, as `supernet.distributed.launch` does on one machine."""


def run(ctx: StageContext, launch: Launch | None = None) -> None:
    """Write `supernet.safetensors`, `supernet.json` and `curves.json`.

    Args:
        ctx: The stage's context.
        launch: Starts the processes, where they are several; on this machine unless given.

    Raises:
        InputError: The dataset or the weights to start from don't go with the settings.
        StageError: The training diverged.
    """
    ctx = _with_weights_here(ctx)
    with ctx.host.computing():
        if ctx.settings["processes"] == 1 or "LOCAL_RANK" in os.environ:  # this is one of torchrun's
            _train(ctx)
        else:
            _train_in_several(ctx, launch)


STAGE = Stage(name="supernet-train", version=3, settings=settings, run=run, watched=True)


def _train(ctx: StageContext) -> None:
    """What each of the processes does."""
    from yolov8_nas.supernet.distributed import join

    with join() as processes:  # before Ultralytics is imported, see there
        import torch

        from yolov8_nas.data import dataset
        from yolov8_nas.device.profile import available_cores
        from yolov8_nas.space import SearchSpace
        from yolov8_nas.supernet import warmstart
        from yolov8_nas.supernet.batchnorm import calibration_batches
        from yolov8_nas.supernet.supernet import Supernet
        from yolov8_nas.supernet.training import CONDITIONS, Recipe, train

        progress = ctx.progress if processes.first else Progress.silent()
        torch.set_num_threads(max(1, available_cores() // processes.local_size))
        recipe = Recipe(**{name: ctx.settings[name] for name in Recipe.__dataclass_fields__})
        space = SearchSpace.from_dict(ctx.settings["space"])
        names = dataset.load(ctx.inputs["data-prep"]).classes
        with processes.first_alone():
            data = dataset.data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
        torch.manual_seed(recipe.seed)
        supernet = Supernet(space, len(names), names)
        progress.note(f"space {space.name}: {space.size:.3g} networks, trained at {recipe.imgsz} pixels")
        started = None
        if given := ctx.settings["weights"]:
            source = warmstart.read(Path(given["path"]))
            earlier = isinstance(source, Supernet)
            images = () if earlier else calibration_batches(data, recipe.imgsz, START_IMAGES, 16, recipe.seed)
            started = warmstart.warm_start(supernet, source, images)
            progress.note(str(started))
        average, curves = train(supernet.to(processes.device), data, recipe, ctx.partial, progress, processes)
        if processes.first:
            details = {
                "imgsz": recipe.imgsz,
                "epochs": recipe.epochs,
                "seconds": sum(point["seconds"] for point in curves),
                "training": read_json(ctx.partial / CONDITIONS),
                "warm_start": started and {**asdict(started), "sha256": given["sha256"]},
            }
            average.save(ctx.out, details)
            write_json(ctx.out / "curves.json", curves)


def kept_at(sha256: str) -> str:
    """What `supernet.weights` calls a supernet that is kept in the store."""
    return f"{_KEPT_AT}{sha256}"


def _with_weights_here(ctx: StageContext) -> StageContext:
    """The same with the path of what the supernet starts from, where that is kept in the store."""
    given = ctx.settings["weights"]
    if given is None or ctx.store is None or not given["path"].startswith(_KEPT_AT):
        return ctx
    folder = ctx.store.result(KEPT, given["sha256"]).outputs
    return replace(ctx, settings={**ctx.settings, "weights": {**given, "path": str(folder)}})


def _train_in_several(ctx: StageContext, launch: Launch | None) -> None:
    """Start the processes, and hand on what they fail of."""
    from yolov8_nas.supernet import distributed

    failure, request = ctx.partial / FAILURE, ctx.partial / "request.json"
    failure.unlink(missing_ok=True)
    inputs = {name: str(path.absolute()) for name, path in ctx.inputs.items()}
    folders = {"out": str(ctx.out.absolute()), "partial": str(ctx.partial.absolute())}
    write_json(request, {"settings": dict(ctx.settings), "inputs": inputs, **folders})
    environment = {PARENT_VARIABLE: str(os.getpid())}
    status = (launch or distributed.launch)(
        ctx.settings["processes"], "yolov8_nas.stages.supernet_train", [str(request)], environment
    )
    if failure.is_file():
        told = read_json(failure)
        raise {"InputError": InputError, "StageError": StageError}[told["kind"]](told["error"])
    if status:
        raise RuntimeError(f"a training process ended unexpectedly (torchrun's status is {status}); see the log")


def _main() -> int:
    """Be one of torchrun's processes."""
    die_with_parent()
    request: dict[str, Any] = read_json(Path(sys.argv[1]))
    ctx = StageContext(
        settings=request["settings"],
        inputs={name: Path(path) for name, path in request["inputs"].items()},
        out=Path(request["out"]),
        partial=Path(request["partial"]),
        progress=Progress.from_environment(STAGE.name),
        host=HostLock(),
    )
    try:
        run(ctx)
    except (InputError, StageError) as error:
        write_json(ctx.partial / FAILURE, {"kind": type(error).__name__, "error": str(error)})
        print(error, file=sys.stderr)
        return 1
    return 0


def _processes(asked: int | str) -> int:
    """How many processes train.

    Raises:
        InputError: There are fewer GPUs.
    """
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    gpus = 0
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists():  # else torch need not be loaded to tell
        import torch

        gpus = torch.cuda.device_count()
    if asked == "auto":
        return max(1, gpus)
    if gpus and int(asked) > gpus:
        raise InputError(f"supernet.processes = {asked}, but there are {gpus} GPUs; each process needs one of its own")
    return int(asked)


def _weights(supernet: SupernetConfig) -> dict[str, str] | None:
    """The weights to start from, by content.

    Raises:
        InputError: There are none where they are looked for.
    """
    named = supernet.weights
    if named is None:
        return None
    if kept := re.fullmatch(f"{_KEPT_AT}([0-9a-f]{{64}})", named):
        return {"path": named, "sha256": kept[1]}
    file = weights.local(supernet)
    if file.name == "supernet.safetensors":
        file = file.parent
    files = [file / name for name in ("supernet.json", "supernet.safetensors")] if file.is_dir() else [file]
    for part in files:
        if not part.is_file():
            raise InputError(
                f"supernet.weights = {named!r}: there is no {part}; give a stock YOLOv8 checkpoint (.pt), the folder "
                "of an earlier supernet, or nothing to train from scratch"
            )
    digests = [file_sha256(part) for part in files]
    return {"path": str(file), "sha256": digests[0] if len(digests) == 1 else canonical_digest(digests)}


if __name__ == "__main__":
    sys.exit(_main())
