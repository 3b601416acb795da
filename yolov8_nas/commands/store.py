"""The commands `store list`, `store size` and `store prune`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from yolov8_nas import terminal
from yolov8_nas.errors import InputError
from yolov8_nas.runner.stage import STAGES, open_store
from yolov8_nas.store import housekeeping
from yolov8_nas.store.housekeeping import Item
from yolov8_nas.store.store import Store
from yolov8_nas.terminal import Terminal

app = typer.Typer(no_args_is_help=True, help="The stage store: what is in it, how large it is, what nobody needs.")

Where = Annotated[Path, typer.Option("--workdir", help="Work folder with the store.")]
Folder = Annotated[str | None, typer.Option("--store", help="Stage store, where it is not in the work folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_WORKDIR = Path("runs") / "demo"


@app.command("list")
def list_(workdir: Where = _WORKDIR, store: Folder = None, as_json: AsJson = False) -> None:
    """List results with their size, age and the runs that need them."""
    items = housekeeping.survey(_opened(workdir, store), STAGES)
    if as_json:
        terminal.say_json([_plain(item) for item in items])
    else:
        _show(items)


@app.command()
def size(workdir: Where = _WORKDIR, store: Folder = None, as_json: AsJson = False) -> None:
    """Tell how much a store takes, stage by stage, and how much of it no run needs."""
    items = housekeeping.survey(_opened(workdir, store), STAGES)
    free = housekeeping.unneeded(items)
    rows: dict[str, dict[str, int]] = {}
    for item in items:
        row = rows.setdefault(item.stage, {"results": 0, "bytes": 0, "unneeded_bytes": 0})
        row["results"] += 1
        row["bytes"] += item.size
        row["unneeded_bytes"] += item.size if item in free else 0
    if as_json:
        return terminal.say_json({"stages": rows, "bytes": sum(item.size for item in items)})
    table = _table("stage", "results", "size", "no run needs", right=(1, 2, 3))
    for stage, row in rows.items():
        table.add_row(stage, str(row["results"]), _bytes(row["bytes"]), _bytes(row["unneeded_bytes"]))
    total = sum(item.size for item in items), sum(item.size for item in free)
    table.add_row("together", str(len(items)), *map(_bytes, total))
    Terminal().print(table)
    return None


@app.command()
def prune(
    workdir: Where = _WORKDIR,
    store: Folder = None,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Forget all but so many of the newest runs; without it, none."),
    ] = None,
    unfinished: Annotated[
        bool,
        typer.Option("--unfinished", help="Remove checkpoints of what is not done as well."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove results that no run, no registered version and no champion needs.

    A run of which a version is registered, or waits to be, is never forgotten.
    """
    if not (dry_run or yes) and not _somebody_there():
        raise InputError("store prune: there is nobody to ask; give --yes, or --dry-run to see what would go")
    if as_json and not (dry_run or yes):
        raise InputError("store prune --json asks nothing; give --yes or --dry-run as well")
    opened = _opened(workdir, store)
    forgotten, standing = _forgotten(opened, keep)
    items = housekeeping.unneeded(housekeeping.survey(opened, STAGES), forgotten, unfinished=unfinished)
    if not as_json:
        _tell(items, forgotten, standing)
    if not dry_run and (items or forgotten) and (yes or typer.confirm("Remove them?")):
        left = housekeeping.remove(opened, items, forgotten)
        items = [item for item in items if item not in left]
        if not as_json:
            terminal.say(f"removed {len(items)} results, {_bytes(sum(item.size for item in items))}")
            for item in left:
                terminal.say(f"still there, because somebody works on it or needs it now: {item.stage}/{item.key}")
    if as_json:
        terminal.say_json(
            {
                "removed": not dry_run,
                "results": [_plain(item) for item in items],
                "runs": sorted(forgotten),
                "kept": standing,
            }
        )


def _somebody_there() -> bool:
    return sys.stdin.isatty()


def _forgotten(store: Store, keep: int | None) -> tuple[list[str], dict[str, str]]:
    """The runs that are forgotten; and those that would be, were it not for the registry, each with the reason."""
    computed = [run for run in store.runs() if housekeeping.named(store, run)]  # advice alone needs nothing
    older = computed[keep:] if keep is not None else []
    if not older:
        return [], {}
    from yolov8_nas.registry.needed import standing

    kept = standing(store, older)
    return [run for run in older if run not in kept], kept


def _opened(workdir: Path, store: str | None) -> Store:
    """The store that is meant.

    Raises:
        InputError: It is none, or in a bucket.
    """
    opened = open_store(store or workdir / "store")
    housekeeping.require_folder(opened)
    return opened


def _tell(items: Sequence[Item], forgotten: Sequence[str], standing: dict[str, str]) -> None:
    for run, why in standing.items():
        terminal.say(f"run {run} is kept: {why}")
    for run in forgotten:
        terminal.say(f"run {run} is forgotten")
    if items:
        _show(items)
        terminal.say(f"{len(items)} results, {_bytes(sum(item.size for item in items))}")
    elif not forgotten:
        terminal.say("there is nothing that nobody needs")


def _show(items: Sequence[Item]) -> None:
    table = _table("stage", "key", "state", "size", "days old", "needed by", right=(3, 4))
    for item in items:
        days = f"{(time.time() - item.written) / 86400:.1f}"
        if item.runs:
            more = f" and {len(item.runs) - 1} more" if len(item.runs) > 1 else ""
            needed = item.runs[0] + more
        else:
            needed = "any run" if item.state == "shared" else "no run"
        table.add_row(item.stage, item.key[:12], item.state, _bytes(item.size), days, needed)
    Terminal().print(table)


def _plain(item: Item) -> dict[str, Any]:
    return {**asdict(item), "folder": str(item.folder)}


def _bytes(count: int) -> str:
    """Bytes as people read them."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def _table(*columns: str, right: tuple[int, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left")
    return table
