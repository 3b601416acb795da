"""The command `sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from yolov8_nas import terminal
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from yolov8_nas.analysis.sensitivity import Sensitivity, Speed, Variant
    from yolov8_nas.evaluation import Comparison


def sensitivity(
    checkpoint: Annotated[
        Path, typer.Argument(help="Stock YOLOv8, trained on the dataset: an Ultralytics checkpoint.")
    ],
    data: Annotated[str, typer.Option(help="Dataset: a folder, a data.yaml, an archive or the address of one.")],
    split: Annotated[
        Literal["search", "val"], typer.Option(help="What is scored: val is for final figures, so it decides nothing.")
    ] = "search",
    imgsz: Annotated[int | None, typer.Option(help="Side of the input in pixels; that of the training.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to score on at most.")] = 1000,
    tolerance: Annotated[float, typer.Option(min=0, help="Drop in AP (hundredths of mAP50-95) to accept.")] = 0.5,
    hardware: Annotated[str, typer.Option(help="Where latency is measured: cpu, cpu-1t, a GPU that is here.")] = "auto",
    runtime: Annotated[str, typer.Option(help="What runs the files there: onnxruntime, tensorrt, ...")] = "onnxruntime",
    accuracy_only: Annotated[bool, typer.Option("--accuracy-only", help="Measure no latency.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what INT8 costs and gains in each part, and suggest what to leave in floating point."""
    from yolov8_nas.runner import process

    found = process.call_and_tell(
        "yolov8_nas.analysis.sensitivity:measure",
        f"reading {checkpoint}",
        "scoring",
        checkpoint=checkpoint,
        data=data,
        split=split,
        imgsz=imgsz,
        images=images,
        tolerance=tolerance,
        hardware=None if accuracy_only else hardware,
        runtime=runtime,
    )
    if as_json:
        terminal.say_json(found.to_dict())
        return
    console = Terminal()
    console.print(_table(checkpoint, found), highlight=False)
    console.print(f"\n{_suggestion(found)}", markup=False, highlight=False)
    if found.suggested is not None:
        terminal.say(f"\nquantization:\n  keep_float: [{', '.join(found.suggested.keep_float)}]")


def _table(checkpoint: Path, found: Sensitivity) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        header_style="dim",
        title=f"{checkpoint.name}, {found.imgsz} px, {found.images} images of the {found.split} split",
        title_style="bold",
        title_justify="left",
        caption=_caption(found),
        caption_justify="left",
    )
    table.add_column("in floating point", overflow="fold")
    for heading in ("mAP50-95", "drop, AP", "regained, AP"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column()
    if found.target:
        table.add_column("p50, ms", justify="right", no_wrap=True)
        table.add_column()
    floats = ("", "", "", _milliseconds(found.float_latency), "") if found.target else ()
    table.add_row("everything (FP32)", f"{found.map50_95:.3f}", *floats)
    for variant in (found.quantized, *found.parts, *found.sets):
        name = f"+ {', '.join(variant.keep_float)}" if variant.keep_float else "nothing more (INT8)"
        drop, *rest = _figures(variant)[1:]
        row = [f"{variant.map50_95:.3f}", drop, *(rest if variant.keep_float else ("", ""))]
        if found.target:
            row += [_milliseconds(variant.latency), "front" if variant.keep_float in found.front else ""]
        table.add_row(name, *row)
    return table


def _caption(found: Sensitivity) -> str:
    told = "In brackets 95% intervals over images. What is regained, and the word, are against INT8."
    if not found.target:
        return told
    told += f" Latency on {found.target}; front: no other is both as fast and as accurate."
    speeds = [found.float_latency, *(v.latency for v in (found.quantized, *found.parts, *found.sets))]
    if disturbed := sum(speed.disturbed for speed in speeds if speed):
        told += f" {disturbed} of {len(speeds)} latencies are disturbed: measure again when nothing else computes here."
    return told


def _milliseconds(latency: Speed | None) -> str:
    return f"{latency.p50:.3f}" if latency else ""


def _figures(variant: Variant) -> tuple[str, ...]:
    drop, regained = _points(variant.drop, -100), _points(variant.regained, 100)
    return f"{variant.map50_95:.3f}", drop, regained, variant.regained.word


def _points(comparison: Comparison, factor: int) -> str:
    """A difference in AP with its interval."""
    low, high = sorted((factor * comparison.low, factor * comparison.high))
    return f"{factor * comparison.difference:z.2f} ({low:z.1f} to {high:z.1f})"


def _suggestion(found: Sensitivity) -> str:
    drop = _points((found.suggested or found.quantized).drop, -100)
    if found.suggested is None:
        return (
            f"INT8 costs {drop} AP, and no parts were found that bring this to {found.tolerance:g} AP. "
            "Quantization-aware training, which a run does for INT8, may; else ask for fp16 or fp32."
        )
    names = found.suggested.keep_float
    how = f"with {', '.join(names)} in floating point" if names else "with nothing more in floating point"
    sure = ""
    if -100 * found.suggested.drop.low > found.tolerance:
        sure = f" The interval reaches beyond it: on {found.images} images this is not sure."
    return (
        f"The drop is {drop} AP, within {found.tolerance:g} AP, {how}.{sure}{_speed(found)} In the run configuration:"
    )


def _speed(found: Sensitivity) -> str:
    """How fast what is suggested is against floating point and against everything quantized."""
    latency, floats, quantized = (
        found.suggested and found.suggested.latency,
        found.float_latency,
        found.quantized.latency,
    )
    if not latency or not floats or not quantized:
        return ""
    told = f" It takes {latency.p50:.3f} ms, {latency.p50 / floats.p50:.2f} of floating point's time"
    told += f" and {latency.p50 / quantized.p50:.2f} of that of everything in INT8."
    if latency.p50 >= floats.low:
        told += " That is no gain: ship it in floating point."
    return told
