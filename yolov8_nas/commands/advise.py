"""The command `advise`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.table import Table

from yolov8_nas import terminal
from yolov8_nas.advice import words
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from yolov8_nas.runner.results import Advice


_WIDTH: Final = 140


def advise(config: RunConfig, workdir: Path, *, as_json: bool) -> None:
    """Probe the targets, tell what that says of stock sizes and of a search, and train nothing.

    Raises:
        InputError: The configuration or the dataset cannot be used, or none of the targets can be reached.
        StageError: No target could be probed.
    """
    from yolov8_nas.run import local, preflight
    from yolov8_nas.runner.stage import target_labels

    preflight.check_folder(workdir)
    local.check_free(workdir)
    preflight.check_places(config, local.store_of(config, workdir))
    given: dict[str, Advice] = {}
    missing: dict[str, InputError | StageError] = {}
    for label in target_labels(config):
        try:
            given[label] = _one(config, workdir, label)
        except (InputError, StageError) as error:  # the other targets are none the worse for it
            missing[label] = error
    if not given:
        kind = InputError if any(isinstance(error, InputError) for error in missing.values()) else StageError
        raise kind("; ".join(f"{label}: {error}" for label, error in missing.items()))
    _tell(given, missing, as_json=as_json)


def _one(config: RunConfig, workdir: Path, label: str) -> Advice:
    from yolov8_nas.run import local
    from yolov8_nas.runner import process

    console = Terminal(stderr=True)
    folders = local.run_stages(config, workdir, "hw-probe", label, console)
    with console.status("measuring stock sizes and training steps"):
        found: Advice = process.call(
            "yolov8_nas.run.advising:advise_and_keep",
            log=workdir / "logs" / "advice.log",
            environment={**local.keys_of(config), **local.patience()},
            config=config,
            label=label,
            store=local.store_of(config, workdir),
            key=folders["hw-probe"].parent.name,
            dataset=folders["data-prep"],
        )
    return found


def _tell(given: Mapping[str, Advice], missing: Mapping[str, Exception], *, as_json: bool) -> None:
    if as_json:
        content = {
            "targets": [advice.plain() for advice in given.values()],
            "not_measured": {label: str(error) for label, error in missing.items()},
        }
        terminal.say_json(content)
        return
    console = Terminal()
    if not console.is_terminal:
        console.width = _WIDTH  # in a file nothing is to be cut off
    for advice in given.values():
        _show(console, advice)
    for label, error in missing.items():
        console.print(f"\n{label}", style="bold")
        console.print(f"not measured: {error}", soft_wrap=True)


def _show(console: Terminal, advice: Advice) -> None:
    console.print(f"\n{advice.target}: {' and '.join(advice.limits)}", style="bold")
    console.print(_table(words.SIZES, words.size_rows(advice), right=(1,)))
    console.print(words.gap(advice), soft_wrap=True)
    console.print("\nWhat a search has gained from such a start:")
    for row in advice.gains:
        console.print(f"- {words.gain(row)}", soft_wrap=True)
    if not advice.gains:
        console.print("- no figures of ours")
    console.print()
    rows = [(row.stage, words.cost(row), row.source) for row in advice.costs]
    console.print(_table(("stage", "takes", "known from"), [*rows, ("together", words.total(advice.costs), "")]))
    console.print(f"\n{advice.recommendation}", style="bold", soft_wrap=True)


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left")
    for row in rows:
        table.add_row(*row)
    return table
