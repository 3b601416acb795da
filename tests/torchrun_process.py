"""What each process does that `test_distributed` starts under torchrun: `torchrun_process FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from yolov8_nas.supernet.distributed import Processes, join


def gradients(processes: Processes, folder: Path) -> None:
    """Average made-up gradients, some of which are missing, and those of a step on this process's images."""
    from detection import CLASSES

    from yolov8_nas.space import SearchSpace
    from yolov8_nas.supernet import distributed, loading
    from yolov8_nas.supernet.images import train_split
    from yolov8_nas.supernet.learner import Learner
    from yolov8_nas.supernet.supernet import Supernet

    distributed.BUCKET_BYTES = 64 * 1024  # several buckets
    everywhere, here, nowhere = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(3))
    everywhere.grad = torch.full((3, 2), 1.0 + processes.rank)
    if processes.rank == 1:
        here.grad = torch.ones(3, 2)
    processes.average_gradients([everywhere, here, nowhere])
    missing = [everywhere.grad, here.grad, nowhere.grad]

    space = SearchSpace.load("tiny")
    torch.manual_seed(processes.rank)  # what a process would start with on its own
    supernet = Supernet(space, 2, CLASSES)
    if processes.first:
        supernet.load_state_dict(torch.load(folder / "weights.pt"))
    processes.copy_first(list(supernet.state_dict().values()))
    images = train_split(folder / "view" / ".data-train-search" / "data.yaml", 64, augment=True)
    how = loading.prepare(images, 2, processes)
    shards = loading.Shards(len(images), 4, rank=processes.rank, processes=2, parts=1, seed=0, epochs=range(1))
    batches = loading.batches(images, how, shards, mosaic_epochs=1)
    learner = Learner(supernet, processes, imgsz=64, accumulate=1, amp=False)
    learner.backward(loading.to_device(next(batches), processes.device), [space.largest(), space.smallest()], 4)
    processes.average_gradients(list(supernet.parameters()))
    found = {name: p.grad for name, p in supernet.named_parameters()}
    torch.save({"missing": missing, "found": found}, folder / f"gradients{processes.rank}.pt")


def training(processes: Processes, folder: Path) -> None:
    """Train from scratch for 20 steps, then go on from a checkpoint that one process wrote."""
    from detection import CLASSES

    from yolov8_nas.runner.progress import Progress
    from yolov8_nas.space import SearchSpace
    from yolov8_nas.supernet.supernet import Supernet
    from yolov8_nas.supernet.training import Recipe, _Validation, train

    _Validation.run = lambda self, supernet: {}  # scoring takes longer than the training here
    data = folder / "view" / ".data-train-search" / "data.yaml"
    asked = json.loads((folder / "recipe.json").read_text())
    for name, changes in (("fresh", {"epochs": 10}), ("resumed", {})):
        torch.manual_seed(processes.rank)
        supernet = Supernet(SearchSpace.load("tiny"), 2, CLASSES)
        recipe = Recipe(**{**asked, **changes})
        average, curves = train(supernet, data, recipe, folder / name, Progress.silent(), processes)
        weights = {"supernet": supernet.state_dict(), "average": average.state_dict()}
        torch.save({**weights, "curves": curves}, folder / f"{name}{processes.rank}.pt")


if __name__ == "__main__":
    with join() as processes:
        for task in (gradients, training):
            task(processes, Path(sys.argv[1]))
