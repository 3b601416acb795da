"""supernet-train: one set of weights for every network of the space.

With several processes, each has a device and a share of every batch. On one machine the stage starts them itself,
under torchrun. On several, torchrun is started on each of them (in a cluster by what `run` is given), with this module
and a request on a disk that all share:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29400 \
        -m yolov8_nas.stages.supernet_train request.json

`request.json` has `settings` (the stage's, as JSON), `inputs` (the folder of data-prep's result as
`data-prep`), `out` and `partial`, both folders that exist.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import Result, ResultFile, SupernetEpoch, SupernetTraining
from yolov8_nas.runner.stage import PARENT_VARIABLE, StageContext, die_with_parent
from yolov8_nas.stages.supernet_train.settings import KEPT, SupernetSettings

if TYPE_CHECKING:
    from yolov8_nas.supernet.training import Recipe


class Request(Result):
    """A request to torchrun's processes.

    Attributes:
        settings: The stage's settings.
        inputs: Folders of the results that it needs, by stage.
        out: Folder for the result.
        partial: Folder for checkpoints.
    """

    settings: SupernetSettings
    inputs: Mapping[str, Path]
    out: Path
    partial: Path


class Failure(ResultFile):
    """The failure of a process, left in `partial`.

    Attributes:
        kind: The kind of failure.
        error: Its message.
    """

    FILE = "failure.json"

    kind: Literal["InputError", "StageError"]
    error: str

    @property
    def exception(self) -> InputError | StageError:
        """The failure, to be raised."""
        return (InputError if self.kind == "InputError" else StageError)(self.error)


START_IMAGES: Final = 256
"""Training images to which what is sliced from a larger network is fitted."""


Launch = Callable[[int, str, Sequence[str], Mapping[str, str]], int]
"""Runs a module in several processes and waits for their end, as `supernet.distributed.launch` does on one machine."""


def run(ctx: StageContext[SupernetSettings], launch: Launch | None = None) -> None:
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
        if ctx.settings.processes == 1 or "LOCAL_RANK" in os.environ:  # this is one of torchrun's
            _train(ctx)
        else:
            _train_in_several(ctx, launch)


def recipe_of(settings: SupernetSettings) -> Recipe:
    """How the supernet is trained."""
    from yolov8_nas.supernet.training import Recipe

    return Recipe(
        imgsz=settings.imgsz,
        epochs=settings.epochs,
        batch=settings.batch,
        lr=settings.lr,
        random_networks=settings.random_networks,
        seed=settings.seed,
        largest_first=settings.largest_first,
        accumulate=settings.accumulate,
        anchor=settings.anchor,
        near=settings.near,
        amp=settings.amp,
    )


def _train(ctx: StageContext[SupernetSettings]) -> None:
    """What each of the processes does."""
    from yolov8_nas.supernet.distributed import join

    with join() as processes:  # before Ultralytics is imported, see there
        import torch

        from yolov8_nas.data import dataset
        from yolov8_nas.device.profile import computing_threads
        from yolov8_nas.supernet import warmstart
        from yolov8_nas.supernet.batchnorm import calibration_batches
        from yolov8_nas.supernet.supernet import Supernet
        from yolov8_nas.supernet.training import CONDITIONS, train

        progress = ctx.progress if processes.first else Progress.silent()
        torch.set_num_threads(max(1, computing_threads() // processes.local_size))
        recipe = recipe_of(ctx.settings)
        space = ctx.settings.space
        names = dataset.load(ctx.inputs["data-prep"]).classes
        with processes.first_alone():
            data = dataset.data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
        torch.manual_seed(recipe.seed)
        supernet = Supernet(space, len(names), names)
        progress.note(f"space {space.name}: {space.size:.3g} networks, trained at {recipe.imgsz} pixels")
        started = None
        if given := ctx.settings.weights:
            source = warmstart.read(Path(given.path))
            earlier = isinstance(source, Supernet)
            images = () if earlier else calibration_batches(data, recipe.imgsz, START_IMAGES, 16, recipe.seed)
            started = warmstart.warm_start(supernet, source, images)
            progress.note(str(started))
        average, curves = train(supernet.to(processes.device), data, recipe, ctx.partial, progress, processes)
        if processes.first:
            details = SupernetTraining(
                imgsz=recipe.imgsz,
                epochs=recipe.epochs,
                seconds=sum(point["seconds"] for point in curves),
                training=read_json(ctx.partial / CONDITIONS),
                warm_start={**asdict(started), "sha256": given.sha256} if given and started else None,
            )
            average.save(ctx.out, details.plain())
            SupernetEpoch.write_all(ctx.out, map(SupernetEpoch.model_validate, curves))


def _with_weights_here(ctx: StageContext[SupernetSettings]) -> StageContext[SupernetSettings]:
    """The same with the path of what the supernet starts from, where that is kept in the store."""
    given = ctx.settings.weights
    if given is None or ctx.store is None or not given.kept:
        return ctx
    folder = ctx.store.result(KEPT, given.sha256).outputs
    return replace(
        ctx, settings=ctx.settings.model_copy(update={"weights": given.model_copy(update={"path": str(folder)})})
    )


def _train_in_several(ctx: StageContext[SupernetSettings], launch: Launch | None) -> None:
    """Start the processes, and hand on what they fail of."""
    from yolov8_nas.supernet import distributed

    failure, request = ctx.partial / Failure.FILE, ctx.partial / "request.json"
    failure.unlink(missing_ok=True)
    asked = Request(
        settings=ctx.settings,
        inputs={name: path.absolute() for name, path in ctx.inputs.items()},
        out=ctx.out.absolute(),
        partial=ctx.partial.absolute(),
    )
    write_json(request, asked.plain())
    environment = {PARENT_VARIABLE: str(os.getpid())}
    status = (launch or distributed.launch)(
        ctx.settings.processes, "yolov8_nas.stages.supernet_train", [str(request)], environment
    )
    if failure.is_file():
        raise Failure.read(ctx.partial).exception
    if status:
        raise RuntimeError(f"a training process ended unexpectedly (torchrun's status is {status}); see the log")


def main() -> int:
    """Be one of torchrun's processes."""
    die_with_parent()
    asked = Request.model_validate(read_json(Path(sys.argv[1])))
    ctx = StageContext(
        settings=asked.settings,
        inputs=asked.inputs,
        out=asked.out,
        partial=asked.partial,
        progress=Progress.from_environment("supernet-train"),
        host=HostLock(),
    )
    try:
        run(ctx)
    except (InputError, StageError) as error:
        kind: Literal["InputError", "StageError"] = "InputError" if isinstance(error, InputError) else "StageError"
        Failure(kind=kind, error=str(error)).write(ctx.partial)
        print(error, file=sys.stderr)
        return 1
    return 0
