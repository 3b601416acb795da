"""The commands `data check` and `data make-demo`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from yolov8_nas import terminal
from yolov8_nas.errors import InputError
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from yolov8_nas.data.check import CheckedDataset

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check(
    path: Annotated[str, typer.Argument(help="A folder, a data.yaml, COCO's JSON, an archive or an address.")],
    as_json: AsJson = False,
) -> None:
    """Check a dataset as a run would, and tell what is in it."""
    from yolov8_nas.data.check import check_source

    with shown() as progress:
        dataset = check_source(path, progress)
    if as_json:
        return terminal.say_json(_plain(dataset))
    console = Terminal()
    for table in tables(dataset):
        console.print(table)
        console.print()
    for warning in dataset.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return None


def _plain(dataset: CheckedDataset) -> dict[str, Any]:
    """What is in a dataset, for programs."""
    return {
        "source": dataset.source,
        "classes": list(dataset.names),
        "images": dict(dataset.images),
        "boxes": {split: dict(counts) for split, counts in dataset.boxes.items()},
        "ledger": {
            split: {
                kind: {outcome: entry.plain() for outcome, entry in outcomes.items()}
                for kind, outcomes in kinds.items()
            }
            for split, kinds in dataset.ledger.items()
        },
        "converted": dict(dataset.remarks),
        "warnings": list(dataset.warnings),
    }


def make_demo(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; it must not exist or be empty.")],
    images: Annotated[int, typer.Option(min=8, help="Number of images.")] = 320,
    size: Annotated[int, typer.Option(min=32, help="Side of an image in pixels.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other images.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the demo's dataset: industrial surfaces with defects."""
    from yolov8_nas.data import demo
    from yolov8_nas.run.preflight import check_folder

    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; give a new folder")
    demo.make_demo(folder, images=images, size=size, seed=seed)
    if as_json:
        return terminal.say_json({"folder": str(folder), "images": images, "size": size, "seed": seed})
    terminal.say(f"wrote {images} images to {folder}")
    return None


@contextlib.contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error that a long check tells how far it has come; it goes away at the end."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    console = Terminal(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def tell(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        yield tell


def tables(dataset: CheckedDataset) -> Iterator[Table]:
    """What is in a dataset: images and boxes, a line a class, what became of each file and label, what is converted."""
    splits = list(dataset.splits)
    boxes = dataset.boxes
    table = _table("split", "images", "boxes")
    for split, count in dataset.images.items():
        table.add_row(split, str(count), str(sum(boxes[split].values())))
    yield table
    table = _table("boxes of class", *splits)
    for name in dataset.names:
        table.add_row(name, *(str(boxes[split][name]) for split in splits))
    yield table
    table = _table("as given", "what became of it", "count")  # before the search split is cut from train
    for split, kinds in dataset.ledger.items():
        for kind, outcomes in kinds.items():
            table.add_row(split, f"{kind}, in all", str(sum(outcome.count for outcome in outcomes.values())))
            for outcome, entry in outcomes.items():
                table.add_row("", f"  {outcome}", str(entry.count))
    yield table
    if dataset.remarks:
        table = _table("images that are converted, or taken in part", "count")
        for remark, count in dataset.remarks.items():
            table.add_row(remark, str(count))
        yield table


def _table(*columns: str) -> Table:
    """A table whose words are folded where the terminal is narrow, and whose numbers never are."""
    table = Table(box=None, pad_edge=False)
    numbers = {"images", "boxes", "count", "train", "search", "val"}
    for column in columns:
        number = column in numbers
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table
