"""The command `init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from yolov8_nas import terminal
from yolov8_nas.commands.data import shown
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write


def init(
    data: Annotated[str, typer.Option(help="Dataset: a folder, a data.yaml, COCO's JSON, an archive or an address.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; NAME.yaml.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; like the dataset's.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Target device; this machine's GPU, or its CPU.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Hard limit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and ask nothing.")] = False,
) -> None:
    """Look at a dataset and this machine, and write a commented configuration to begin with."""
    from yolov8_nas.data.check import check_source
    from yolov8_nas.data.remote import is_address
    from yolov8_nas.data.source import local_path
    from yolov8_nas.run import suggest
    from yolov8_nas.yaml_text import parse_yaml

    place, limit = suggest.Place.named(hardware), constraint or "latency<=80%stock"
    with shown() as progress:
        dataset = check_source(data, progress)
    for warning in dataset.warnings:
        terminal.say(f"warning: {warning}", error=True)
    if not (yes or as_json) and sys.stdin.isatty():
        if hardware is None:
            place = suggest.Place.named(typer.prompt("target device", default=place.hardware))
        if constraint is None:
            limit = typer.prompt("hard limit", default=limit)
    where = data if is_address(data) else str(local_path(data).absolute())
    text = suggest.configuration(dataset, where, place, limit, name)
    config = RunConfig.parse(parse_yaml(text, "what is suggested"), "what is suggested")
    file = out or Path(f"{config.name}.yaml")
    if file.exists():
        raise InputError(f"{file}: is there already; name another file with --out, or remove it")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    atomic_write(file, text.encode())
    first = _missing_weights(config)
    if as_json:
        told = {"file": str(file), "name": config.name, "warnings": list(dataset.warnings), "first": first}
        return terminal.say_json(told)
    terminal.say(f"wrote {file}")
    if first is not None:
        terminal.say(f"first: {first}")
    terminal.say(f"next:  look through it, then yolov8-nas run {file}")
    return None


def _missing_weights(config: RunConfig) -> str | None:
    """What has to be done for the weights to start from; nothing where they are there."""
    from yolov8_nas.data import weights

    try:
        weights.local(config.supernet)
    except InputError as missing:
        return str(missing)
    return None
