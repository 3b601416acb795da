"""The command `analyze`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from yolov8_nas import terminal
from yolov8_nas.errors import InputError
from yolov8_nas.terminal import Terminal


def analyze(
    model: Annotated[Path, typer.Argument(help="A detector: an Ultralytics checkpoint (.pt) or an ONNX file.")],
    hardware: Annotated[str, typer.Option(help="cpu, cpu-<n>t for n threads, or a GPU of this machine.")] = "cpu",
    runtime: Annotated[str, typer.Option(help="onnxruntime, torch, tensorrt or onnxruntime-tensorrt.")] = "onnxruntime",
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or int8, where the runtime has it; an ONNX file has its own.")
    ] = None,
    imgsz: Annotated[int | None, typer.Option(help="Side of the input in pixels; that of the file.")] = None,
    batches: Annotated[str, typer.Option(help="Images per run to try.")] = "1,2,4,8",
    streams: Annotated[str, typer.Option(help="Networks at once to try.")] = "1,2",
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second of a video stream.")] = 30.0,
    images: Annotated[Path | None, typer.Option(help="Folder of pictures to use instead of made-up ones.")] = None,
    size: Annotated[str, typer.Option(help="Width and height of made-up pictures.")] = "1280x720",
    rows_of: Annotated[
        Path | None, typer.Option(help="Checkpoint of the same network, to tell an ONNX file's backbone from its neck.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="JSON file to write, or - for the screen.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write.")] = None,
) -> None:
    """Tell where the time of one frame goes on a device of this machine, and what would help."""
    from yolov8_nas.runner import process

    for file in (as_json, html):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    asked: dict[str, Any] = {
        "batches": _numbers("--batches", batches),
        "streams": _numbers("--streams", streams),
        "size": _size(size),
    }
    found = process.call_and_tell(
        "yolov8_nas.analysis.run:analyze",
        f"reading {model}",
        "measuring",
        file=model,
        hardware=hardware,
        runtime=runtime,
        precision=precision,
        imgsz=imgsz,
        fps=fps,
        images=images,
        rows_of=rows_of,
        **asked,
    )
    content = json.dumps(found.to_dict(), indent=1, allow_nan=False)
    if as_json == Path("-"):
        typer.echo(content)
    else:
        from yolov8_nas.analysis.terminal import render

        Terminal().print(render(found), highlight=False)
        if as_json is not None:
            as_json.write_text(content + "\n")
            terminal.say(f"wrote {as_json}")
    if html is not None:
        from yolov8_nas.analysis.page import write_page

        write_page(found, html)
        terminal.say(f"wrote {html}", error=as_json == Path("-"))


def _numbers(option: str, text: str) -> list[int]:
    """Numbers from 1 on, in a list like `1,2,4`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"{option} {text}: give whole numbers from 1 on, for example 1,2,4")
    return sorted({int(part) for part in parts})


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise InputError(f"--size {text}: give width and height in pixels, for example 1280x720")
    return int(found[1]), int(found[2])
