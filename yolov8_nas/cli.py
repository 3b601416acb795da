"""The command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import yaml
from rich.console import Console
from rich.table import Table

from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.space import SpaceError
from yolov8_nas.store import ArchiveError


class _Commands(typer.core.TyperGroup):
    """Turns the failures that are foreseen into one message and an exit status."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except (InputError, SpaceError, ArchiveError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except StageError as error:
            typer.echo(f"failed: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Search YOLOv8-style detectors that keep latency limits as measured on the target device.",
)
data_app = typer.Typer(no_args_is_help=True, help="Datasets: check one, make the demo's.")
models_app = typer.Typer(no_args_is_help=True, help="Registered models: list, show, find the best for a device.")
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")

Workdir = Annotated[Path | None, typer.Option(help="Folder for everything that the run writes.")]
Where = Annotated[Path, typer.Option(help="Work folder of the run that registered the models.")]
Tracking = Annotated[str | None, typer.Option(help="MLflow tracking URI, instead of that of the work folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def demo(workdir: Workdir = None) -> None:
    """Run the whole pipeline on this machine, small: made-up data, this machine's CPU."""
    text = resources.files("yolov8_nas").joinpath("demo.yaml").read_text()
    config = RunConfig.parse(yaml.safe_load(text), "the demo's configuration")
    _run(config, workdir or Path("runs") / "demo")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML).")],
    workdir: Workdir = None,
    data: Annotated[str | None, typer.Option(help="Dataset: a folder, a data.yaml or an archive.")] = None,
    hardware: Annotated[list[str] | None, typer.Option(help="Target device; may be given more than once.")] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help='Limit, e.g. "latency<=8ms"; may be given more than once.')
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, int8 or best.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. supernet.epochs=5; may be given more than once.")
    ] = None,
) -> None:
    """Run the whole pipeline on this machine for a configuration; run it again to go on where it stopped."""
    parsed = RunConfig.load(config, overrides or ())
    settings = parsed.model_dump(mode="json")
    if data is not None:
        settings["data"] = data
    if settings["data"] and "://" not in settings["data"]:
        # The stages run elsewhere than in the folder that this path may be relative to.
        settings["data"] = str(Path(settings["data"]).expanduser().absolute())
    if Path(settings["space"]).suffix in (".yaml", ".yml"):
        settings["space"] = str(Path(settings["space"]).absolute())
    if settings["store"] and "://" not in settings["store"]:
        settings["store"] = str(Path(settings["store"]).absolute())
    settings["targets"] = _targets(settings["targets"], hardware or (), constraint or (), precision)
    parsed = RunConfig.parse(settings, f"{config} with the options given")
    _run(parsed, workdir or Path("runs") / parsed.name)


@app.command()
def probe(
    info: Annotated[bool, typer.Option("--info", help="Tell what this machine is; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what this machine is as a target device."""
    from yolov8_nas.hardware.target import resolve

    if not info:
        raise InputError("probe: only --info exists on its own so far; a run measures the device (stage hw-probe)")
    _show(resolve("cpu").profile.to_dict(), as_json)


@app.command()
def doctor() -> None:
    """Check this installation and this machine."""
    from yolov8_nas.doctor import findings

    table = Table(box=None, show_header=False, pad_edge=False)
    checks = findings()
    for check in checks:
        table.add_row("[green]ok[/]" if check.ok else "[red]fault[/]", check.what, check.found)
    Console().print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command(name="compile")
def compile_(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("yolov8-nas.yaml"),
) -> None:
    """Compile the pipeline to YAML for a Kubeflow Pipelines server."""
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; make it first")
    subprocess.run([sys.executable, "-m", "pipelines.compile", str(out)], check=True)
    typer.echo(f"wrote {out}")


@data_app.command("check")
def data_check(path: Annotated[Path, typer.Argument(help="A folder, a data.yaml or an archive.")]) -> None:
    """Check a dataset as a run would, and tell what is in it."""
    from yolov8_nas.data.check import check_source

    dataset = check_source(path)
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("split", "images", *dataset.names):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, count in dataset.images.items():
        table.add_row(split, str(count), *(str(boxes) for boxes in dataset.boxes[split].values()))
    console.print(table)
    for warning in dataset.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


@data_app.command("make-demo")
def data_make_demo(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; it must not exist or be empty.")],
    images: Annotated[int, typer.Option(min=8, help="Number of images.")] = 320,
    size: Annotated[int, typer.Option(min=32, help="Side of an image in pixels.")] = 160,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other images.")] = 0,
) -> None:
    """Make the demo's dataset: industrial surfaces with defects."""
    from yolov8_nas.data.demo import make_demo
    from yolov8_nas.preflight import check_folder

    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; give a new folder")
    make_demo(folder, images=images, size=size, seed=seed)
    typer.echo(f"wrote {images} images to {folder}")


@models_app.command("list")
def models_list(workdir: Where = Path("runs/demo"), tracking: Tracking = None, as_json: AsJson = False) -> None:
    """List the registered versions."""
    from yolov8_nas.registry import query

    versions = query.list_models(_tracking(workdir, tracking))
    if as_json:
        return _show([version.to_dict() for version in versions], as_json)
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "hardware", "precision", "mAP50-95", "p50, ms", "aliases"):
        table.add_column(column)
    for version in versions:
        table.add_row(
            version.model,
            str(version.version),
            version.tags.get("hardware", ""),
            version.tags.get("precision", ""),
            f"{version.metrics['map50_95']:.3f}",
            f"{version.metrics['latency_p50_ms']:.3g}",
            ", ".join(version.aliases),
        )
    Console().print(table)
    return None


@models_app.command("show")
def models_show(
    model: Annotated[str, typer.Argument(help="Name of the registered model.")],
    version: Annotated[str | None, typer.Argument(help="Number or alias; the newest unless given.")] = None,
    workdir: Where = Path("runs/demo"),
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that is recorded of a version."""
    from yolov8_nas.registry import query

    _show(query.show(_tracking(workdir, tracking), model, version).to_dict(), as_json)


@models_app.command("best")
def models_best(
    hardware: Annotated[str, typer.Option(help="Device, as `models list` names it.")],
    max_latency: Annotated[float, typer.Option(help="Longest median latency in ms.")],
    min_map: Annotated[float | None, typer.Option(help="Least mAP50-95, from 0 to 1.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or int8.")] = None,
    workdir: Where = Path("runs/demo"),
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Show the most accurate version that is fast enough on a device."""
    from yolov8_nas.registry import query

    found = query.best(_tracking(workdir, tracking), hardware, max_latency, min_map, precision)
    _show(found.to_dict(), as_json)


def _targets(
    targets: list[dict[str, Any]], hardware: Sequence[str], constraints: Sequence[str], precision: str | None
) -> list[dict[str, Any]]:
    """The configured targets with the options laid over them; devices that are named replace those configured."""
    if hardware:
        targets = [{**targets[0], "hardware": name} for name in hardware]
    changes: dict[str, Any] = {}
    if constraints:
        changes["constraints"] = list(constraints)
    if precision is not None:
        changes["precision"] = precision
    return [{**target, **changes} for target in targets]


def _run(config: RunConfig, workdir: Path) -> None:
    from yolov8_nas import local, preflight
    from yolov8_nas.report.terminal import verdict

    console = Console()
    store = local.store_of(config, workdir)
    dataset = preflight.check(config, workdir, store)
    for warning in dataset.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if any(limit.metric not in ("params", "flops") or limit.relative for limit in _limits(config)):
        with console.status("exporting and timing the smallest network and the stock one"):
            checks = preflight.check_limits_apart(config, dataset.names)
        for check in checks:
            console.print(
                f"{check.target}, at a first look: stock {check.stock_ms:.2f} ms, smallest network of the space "
                f"{check.smallest_ms:.2f} ms, to keep about {', '.join(check.limits)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    with local.held(workdir):
        summary = local.run_pipeline(config, workdir, console)
    console.print(verdict(summary))
    found = [("report", "report.html"), ("summary", "summary.json")]
    for target in summary["targets"]:
        files = target["model"]["files"] if target["model"] else {}
        found += [(name, files[name]) for name in ("best.pt", "model.onnx") if name in files]
    console.print()
    for name, file in found:
        console.print(f"{name:<12}{workdir / file}", markup=False, highlight=False, soft_wrap=True)
    if summary["run"]["status"] == "failed":
        for stage in summary["stages"]:
            if stage["status"] == "failed" and not stage["error"].startswith("not run"):
                typer.echo(f"failed: {stage['name']}: {stage['error']}", err=True)
        raise typer.Exit(1)


def _limits(config: RunConfig) -> list[Any]:
    return [limit for target in config.targets for limit in target.limits]


def _tracking(workdir: Path, uri: str | None) -> str:
    from yolov8_nas.registry.tracking import resolve_uri

    return resolve_uri(uri, workdir / "store")


def _show(content: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        typer.echo(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100).rstrip())


def main() -> None:
    """Entry point of the command `yolov8-nas`."""
    app()


if __name__ == "__main__":
    main()
