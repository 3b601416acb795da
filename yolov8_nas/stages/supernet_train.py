"""supernet-train: one set of weights for every network of the space."""

from __future__ import annotations

from typing import Any

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError
from yolov8_nas.stages.stage import Stage, StageContext
from yolov8_nas.store import write_json

BATCH = 16
"""Images per step where the configuration says `auto`."""


def settings(config: RunConfig, target: TargetConfig | None) -> dict[str, Any]:
    """The space and the recipe.

    Raises:
        InputError: A checkpoint to start from is given.
        SpaceError: The space cannot be used.
    """
    from yolov8_nas.space import SearchSpace

    supernet = config.supernet
    if supernet.weights is not None:
        raise InputError(
            f"supernet.weights = {supernet.weights!r}: starting from a stock checkpoint is not supported yet; leave it "
            "out, and the supernet is trained from scratch"
        )
    return {
        "space": SearchSpace.load(config.space).to_dict(),
        "imgsz": config.imgsz,
        "epochs": supernet.epochs,
        "batch": BATCH if supernet.batch == "auto" else supernet.batch,
        "lr": supernet.lr,
        "random_networks": supernet.random_networks,
        "seed": config.seed,
        "weights": None,
    }


def run(ctx: StageContext) -> None:
    """Write `supernet.safetensors`, `supernet.json` and `curves.json`.

    Raises:
        StageError: The training diverged.
    """
    import torch

    from yolov8_nas.data import dataset
    from yolov8_nas.hardware.profile import available_cores
    from yolov8_nas.space import SearchSpace
    from yolov8_nas.supernet.supernet import Supernet
    from yolov8_nas.supernet.training import Recipe, train

    torch.set_num_threads(available_cores())
    recipe = Recipe(**{name: ctx.settings[name] for name in Recipe.__dataclass_fields__})
    space = SearchSpace.from_dict(ctx.settings["space"])
    names = dataset.load(ctx.inputs["data-prep"]).classes
    data = dataset.data_yaml(ctx.inputs["data-prep"], ctx.partial, validate_on="search")
    torch.manual_seed(recipe.seed)
    supernet = Supernet(space, len(names), names).to("cuda" if torch.cuda.is_available() else "cpu")
    ctx.progress.note(f"space {space.name}: {space.size:.3g} networks, trained at {recipe.imgsz} pixels")
    with ctx.host.computing():
        average, curves = train(supernet, data, recipe, ctx.partial, ctx.progress)
    seconds = sum(point["seconds"] for point in curves)
    average.save(ctx.out, {"imgsz": recipe.imgsz, "epochs": recipe.epochs, "seconds": seconds})
    write_json(ctx.out / "curves.json", curves)


STAGE = Stage(name="supernet-train", version=1, settings=settings, run=run)
