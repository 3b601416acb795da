"""The command line."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from yolov8_nas import paths, terminal
from yolov8_nas.commands import data as datasets
from yolov8_nas.commands import models
from yolov8_nas.commands import store as stores
from yolov8_nas.commands.analyze import analyze
from yolov8_nas.commands.init import init
from yolov8_nas.commands.sensitivity import sensitivity
from yolov8_nas.config import RunConfig, lay_over
from yolov8_nas.errors import InputError, StageError, told
from yolov8_nas.files import copy_file, no_room
from yolov8_nas.space import SpaceError
from yolov8_nas.store.archive import ArchiveError
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from yolov8_nas.export.serving import Place
    from yolov8_nas.nas import Subnet
    from yolov8_nas.runner.results.summary import Target


class Commands(typer.core.TyperGroup):
    """Turns the failures that are foreseen into one message and an exit status."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except (InputError, SpaceError, ArchiveError) as error:
            _unusable(error)
        except StageError as error:
            terminal.say(f"failed: {error}", error=True)
            raise typer.Exit(1) from None
        except Exception as error:
            if full := no_room(error):
                terminal.say(f"failed: {full}", error=True)
                raise typer.Exit(1) from None
            if isinstance(error, OSError) and (of_a_path := paths.told(error)) is not None:
                _unusable(of_a_path)
            if isinstance(error, typer.Exit | typer.Abort | TyperException):
                raise
            terminal.say(told("".join(traceback.format_exception(error))), error=True)  # a fault of ours
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            terminal.say("stopped; the same command goes on from here", error=True)
            raise typer.Exit(130) from None


def _unusable(error: Exception) -> NoReturn:
    one_line = re.sub(r"\s*\n\s*", " ", str(error))
    terminal.say(f"error: {one_line}", error=True)
    raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
START, MODEL, DEVICE, CLUSTER = "Runs and data", "Models", "Device", "Kubeflow cluster"
"""Panels of the help."""

data_app = typer.Typer(no_args_is_help=True, help="Datasets: check one, make the demo's.")
app.add_typer(data_app, name="data", rich_help_panel=START)
data_app.command("check")(datasets.check)
data_app.command("make-demo")(datasets.make_demo)
app.add_typer(models.app, name="models", rich_help_panel=MODEL)
app.add_typer(stores.app, name="store", rich_help_panel=START)

Config = Annotated[Path, typer.Argument(help="Run configuration (YAML).")]
Workdir = Annotated[Path | None, typer.Option(help="Folder for everything that the run writes.")]
Data = Annotated[str | None, typer.Option(help="Dataset: a folder, a data.yaml or an archive.")]
Hardware = Annotated[list[str] | None, typer.Option(help="Target device; may be given more than once.")]
Limits = Annotated[list[str] | None, typer.Option(help='Limit, e.g. "latency<=8ms"; may be given more than once.')]
Precision = Annotated[str | None, typer.Option(help="fp32, fp16, int8 or best.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. supernet.epochs=5; may be given more than once.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        terminal.say(f"yolov8-nas {metadata.version('yolov8-nas')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Tell the version and stop.")
    ] = False,
) -> None:
    """Search YOLOv8-style detectors that keep latency limits as measured on the target device."""


@app.command(rich_help_panel=START)
def demo(workdir: Workdir = None, as_json: AsJson = False) -> None:
    """Run the whole pipeline on this machine, small: made-up data, this machine's CPU."""
    from yolov8_nas.run.lifecycle import requested

    _run(requested(""), workdir or Path("runs") / "demo", as_json=as_json)


app.command(rich_help_panel=START)(init)


@app.command(rich_help_panel=START)
def run(
    config: Config,
    workdir: Workdir = None,
    data: Data = None,
    hardware: Hardware = None,
    constraint: Limits = None,
    precision: Precision = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline on this machine for a configuration; run it again to go on where it stopped."""
    asked = _asked(config, data, hardware, constraint, precision, overrides)
    _run(asked, workdir or Path("runs") / asked.name, as_json=as_json)


@app.command(rich_help_panel=START)
def retrain(
    config: Config,
    workdir: Workdir = None,
    data: Data = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Retrain the registered model of a configuration where the dataset is a new one; end at once where it is not.

    As `run` with the section `retrain` in the configuration. The new model stands before the promotion gate at the end.
    """
    asked = _asked(config, data, None, None, None, overrides)
    if asked.retrain is None:
        asked = RunConfig.parse({**asked.model_dump(mode="json"), "retrain": {}}, str(config))
    _run(asked, workdir or Path("runs") / asked.name, as_json=as_json)


@app.command(rich_help_panel=START)
def advise(
    config: Config,
    workdir: Workdir = None,
    data: Data = None,
    hardware: Hardware = None,
    constraint: Limits = None,
    precision: Precision = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Probe the targets and tell, before anything is trained, whether to take stock, to quantize, or to search.

    A run in the same work folder measures none of it again.
    """
    from yolov8_nas.commands.advise import advise as give

    asked = _asked(config, data, hardware, constraint, precision, overrides)
    give(asked, workdir or Path("runs") / asked.name, as_json=as_json)


@app.command(rich_help_panel=START)
def search(
    config: Config,
    workdir: Workdir = None,
    data: Data = None,
    hardware: Hardware = None,
    constraint: Limits = None,
    precision: Precision = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline up to the search, and tell what it found for each target.

    What was run before is used again, by this command, by `run` and by the Python API alike.
    """
    from yolov8_nas import nas
    from yolov8_nas.runner.stage import target_labels

    asked = _asked(config, data, hardware, constraint, precision, overrides)
    workdir = workdir or Path("runs") / asked.name
    console = Terminal(stderr=as_json)
    _check(asked, workdir, console)
    session = nas.Session(asked, workdir.absolute(), console=console)
    failures = []
    told: dict[str, Any] = {}
    for label in target_labels(asked):
        try:
            found = nas.search(session, label)
        except StageError as error:  # the other targets are none the worse for it
            failures.append(f"{label}: {error}")
            continue
        file = workdir / "candidates" / f"{label}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_file(found[0].folders["search"] / "candidates.json", file)
        if as_json:
            told[label] = {
                "limits": [str(limit) for limit in found[0].limits],
                "candidates": [_plain(subnet) for subnet in found],
                "file": str(file),
            }
            continue
        limits = " and ".join(map(str, found[0].limits))
        console.print(f"\n{label}: networks that keep {limits}, as measured", style="bold", highlight=False)
        console.print(_candidates_table(found))
        console.print(f"candidates  {file}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        terminal.say_json(told)
    if failures:
        raise StageError("; ".join(failures))


@app.command(rich_help_panel=MODEL)
def export(
    model: Annotated[Path, typer.Argument(help="A checkpoint (.pt) of a detector, or the work folder of a run.")],
    format: Annotated[str, typer.Option(help="onnx, engine for TensorRT, or rtx for TensorRT for RTX.")] = "onnx",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Take other numbers of images and other sizes.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Compute in FP16.")] = False,
    nms: Annotated[bool, typer.Option("--nms", help="Suppress overlapping boxes in the file.")] = False,
    imgsz: Annotated[int | None, typer.Option(help="Side of the input in pixels; that of the training.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per inference.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="What an engine of TensorRT for RTX is for, for example NVIDIA_L4; built anywhere."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; beside the model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export a detector as a file that needs no PyTorch, and compare the two."""
    from yolov8_nas.export.packaging import SUFFIXES
    from yolov8_nas.runner import process

    if format not in SUFFIXES:
        raise InputError(f"--format {format}: use one of {', '.join(SUFFIXES)}")
    checkpoint = _shipped_checkpoint(model) if model.is_dir() else model
    file = out or checkpoint.with_suffix(SUFFIXES[format])
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    with process.log_file("export") as log, Terminal(stderr=True).status(f"exporting {checkpoint}"):
        process.call(
            "yolov8_nas.export.packaging:export",
            log=log,
            checkpoint=checkpoint,
            path=file,
            format=format,
            imgsz=imgsz,
            batch=batch,
            dynamic=dynamic,
            half=half,
            nms=nms,
            gpu=gpu,
        )
    if as_json:
        return terminal.say_json({"file": str(file), "bytes": file.stat().st_size, "of": str(checkpoint)})
    terminal.say(f"wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    return None


@app.command(rich_help_panel=MODEL)
def package(
    model: Annotated[Path, typer.Argument(help="An exported detector (.onnx, .engine), or the work folder of a run.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it must not exist or be empty.")],
    name: Annotated[str | None, typer.Option(help="Name of the model on the servers; that of MODEL.")] = None,
    storage_uri: Annotated[str | None, typer.Option(help="Where the folder triton will lie, for KServe.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Most images at once, where the file is dynamic.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies of the network on a server.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="Serve an ONNX file on a GPU; engines always are.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write what Triton, KServe and DeepStream need to serve an exported detector."""
    from yolov8_nas.export import serving

    file, place = _shipped_file(model) if model.is_dir() else (model, serving.Place())
    if gpu and place.kind == "cpu":
        place = serving.Place(kind="gpu")
    title = serving.legal_name(model.resolve().stem) if name is None else name
    written = serving.package(
        file, out, name=title, storage_uri=storage_uri, max_batch=max_batch, instances=instances, place=place
    )
    if as_json:
        told = {"folder": str(out), "parts": list(written.parts), "model": title, "notes": list(written.notes)}
        return terminal.say_json(told)
    terminal.say(f"wrote {out} ({', '.join(written.parts)}): model {title}")
    for note in written.notes:
        terminal.say(f"note: {note}")
    return None


app.command(rich_help_panel=MODEL)(sensitivity)
app.command(rich_help_panel=DEVICE)(analyze)


@app.command(rich_help_panel=DEVICE)
def probe(
    config: Annotated[Path | None, typer.Argument(help="Run configuration, for --bundle and --import.")] = None,
    info: Annotated[bool, typer.Option("--info", help="Tell what this machine is.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not measure bandwidth and throughput.")] = False,
    as_json: AsJson = False,
    bundle: Annotated[Path | None, typer.Option(help="Tar to pack for a device elsewhere (targets.far).")] = None,
    results: Annotated[Path | None, typer.Option("--import", help="Results of such a device to take in.")] = None,
    target: Annotated[str | None, typer.Option(help="Label of the target, where several are elsewhere.")] = None,
    workdir: Workdir = None,
) -> None:
    """Tell what this machine is as a target device, or measure a device elsewhere through a bundle.

    With --info: its CPU, its GPUs, and what they were measured to do at most.
    """
    from yolov8_nas.device import machine

    if bundle is not None or results is not None:
        return _probe_elsewhere(config, bundle, results, target, workdir, as_json=as_json)
    if not info:
        raise InputError(
            "probe: give --info, or a configuration with --bundle FILE or --import FILE; a device of this machine is "
            "measured by a run (stage hw-probe)"
        )
    with Terminal(stderr=True).status("looking at this machine") as status:
        found = machine.look(measure=not quick, note=lambda text: status.update(f"{text} (--quick leaves this out)"))
    if as_json:
        terminal.say_json(found.to_dict())
    else:
        Terminal().print(machine.table(found), highlight=False)
    return None


@app.command(rich_help_panel=DEVICE)
def doctor(as_json: AsJson = False) -> None:
    """Check this installation and this machine."""
    from yolov8_nas.commands.doctor import findings

    table = Table(box=None, show_header=False, pad_edge=False)
    checks = findings()
    for check in checks:
        table.add_row(Text("ok", "green") if check.ok else Text("fault", "red"), check.what, check.found)
    if as_json:
        terminal.say_json([asdict(check) for check in checks])
    else:
        Terminal().print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _in_cluster(context: typer.Context) -> None:
    """Hand a command to the part of this project that knows Kubeflow, which this library does not."""
    command = [sys.executable, "-m", "pipelines.cli", str(context.info_name), *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


for _name, _help in {
    "compile": "Compile the pipeline to YAML for a Kubeflow Pipelines server.",
    "submit": "Run the pipeline in a Kubeflow cluster.",
    "schedule": "Run the pipeline in a Kubeflow cluster again and again.",
    "plan": "Show the steps of a run in a cluster, its GPU hours and its cost.",
}.items():
    app.command(
        _name,
        help=_help,
        rich_help_panel=CLUSTER,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_in_cluster)


def _probe_elsewhere(
    file: Path | None,
    bundle: Path | None,
    results: Path | None,
    label: str | None,
    workdir: Path | None,
    *,
    as_json: bool,
) -> None:
    """Pack a bundle for a device elsewhere, or take in what was measured there."""
    from yolov8_nas.data.check import check_source
    from yolov8_nas.run import local
    from yolov8_nas.runner import process
    from yolov8_nas.runner.stage import target_labels

    if file is None or (bundle is None) == (results is None):
        raise InputError("probe: give a run configuration and one of --bundle FILE and --import FILE")
    config = _asked(file, None, None, None, None, None)
    elsewhere = [name for name, one in zip(target_labels(config), config.targets, strict=True) if one.far]
    chosen = [name for name in elsewhere if label in (None, name)]
    if len(chosen) != 1:
        known = ", ".join(elsewhere) or "none: give one of them `far: FILE`, where its results are kept"
        raise InputError(f"{file}: name one target elsewhere with --target (there are {known})")
    request: dict[str, Any] = {"config": config, "label": chosen[0]}
    with (
        tempfile.TemporaryDirectory() as folder,
        process.log_file("probe") as log,
        Terminal(stderr=True).status("exporting networks, or fitting a model"),
    ):
        if bundle is not None:
            if not bundle.absolute().parent.is_dir():
                raise InputError(f"{bundle}: there is no folder {bundle.parent}; make it first")
            request |= {"num_classes": len(check_source(config.data).names), "path": bundle.absolute()}
            process.call(
                "yolov8_nas.stages.hw_probe.elsewhere:write_bundle", log=log, work=Path(folder) / "work", **request
            )
        elif results is not None:
            store = local.store_of(config, workdir or Path("runs") / config.name)
            request |= {"results": results.absolute(), "store": store}
            process.call("yolov8_nas.stages.hw_probe.elsewhere:import_results", log=log, **request)
    if as_json:
        terminal.say_json({"target": chosen[0], "bundle": _text(bundle), "imported": _text(results)})
    elif bundle is not None:
        terminal.say(
            f"wrote {bundle} ({bundle.stat().st_size / 2**20:.0f} MiB); its README.txt says what to do with it"
        )
    else:
        terminal.say(f"took in {results} for target {chosen[0]}; the next run measures nothing there")


def _asked(
    config: Path,
    data: str | None,
    hardware: Sequence[str] | None,
    constraints: Sequence[str] | None,
    precision: str | None,
    overrides: Sequence[str] | None,
) -> RunConfig:
    """The configuration in a file with the options laid over it."""
    from yolov8_nas.run.local import with_absolute_paths

    for option, value in (("--data", data), ("--precision", precision)):
        if value is not None and not value.strip():
            raise InputError(f"{option} is empty; give a value, or leave the option out")
    settings = RunConfig.load(config, overrides or ()).model_dump(mode="json")
    changed = lay_over(settings, data=data, targets=hardware or (), constraints=constraints or (), precision=precision)
    return RunConfig.parse(with_absolute_paths(changed), f"{config} with the options given")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _check(config: RunConfig, workdir: Path, console: Terminal) -> None:
    """What can be told before a run begins."""
    from yolov8_nas.run import local, preflight

    store = local.store_of(config, workdir)
    preflight.check_folder(workdir)
    local.check_free(workdir)
    dataset = preflight.check(config, workdir, store)
    for warning in dataset.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if config.retrain is not None:
        _check_retraining(config, workdir, store, dataset.names)  # whose limits its champion keeps
    elif not dataset.names:
        console.print(f"{config.data}: is there; the run downloads and checks it, and hw-probe checks the limits")
        preflight.check_weights_apart(config, ())
    elif not any(limit.metric not in ("params", "flops") or limit.relative for limit in _limits(config)):
        preflight.check_weights_apart(config, dataset.names)
    else:
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


def _check_retraining(config: RunConfig, workdir: Path, store: str, classes: Sequence[str]) -> None:
    """Look what a retraining starts from, in a process of its own, as this one is to stay small."""
    from yolov8_nas.registry.tracking import resolve_uri
    from yolov8_nas.run import local
    from yolov8_nas.runner import process

    with Terminal(stderr=True).status("asking the registry"):
        process.call(
            "yolov8_nas.run.retraining:check",
            log=workdir / "logs" / "check.log",
            environment=local.keys_of(config),
            config=config,
            tracking_uri=resolve_uri(config.tracking.uri, store),
            classes=classes,
        )


def _run(config: RunConfig, workdir: Path, *, as_json: bool) -> None:
    from yolov8_nas.registry import spool
    from yolov8_nas.report.terminal import next_steps, verdict
    from yolov8_nas.run import local
    from yolov8_nas.runner.stage import open_store

    console = Terminal(stderr=as_json)
    _check(config, workdir, console)
    with local.held(workdir):
        summary = local.run_pipeline(config, workdir, console)
    if as_json:
        terminal.say_json(summary.plain())
    console.print(verdict(summary))
    found = [("report", "report.html"), ("summary", "summary.json")]
    for target in summary.targets:
        files = target.model.files if target.model else {}
        found += [(name, files[name]) for name in ("best.pt", "model.onnx") if name in files]
    console.print()
    for name, file in found:
        console.print(f"{name:<12}{workdir / file}", markup=False, highlight=False, soft_wrap=True)
    store = open_store(local.store_of(config, workdir))
    for entry in spool.waiting(store):
        advice = f"yolov8-nas models sync --store {store.address}"
        console.print(f"not registered yet: {entry.what} ({entry.why}); later: {advice}", soft_wrap=True, markup=False)
    if summary.run.status == "failed":
        lost = [(stage.name, stage.error or "") for stage in summary.stages if stage.status == "failed"]
        told = [f"{name}: {error}" for name, error in lost if not error.startswith("not run")]
        if (why := summary.run.error) and why not in told:
            told.append(why)
        for line in told or ["the pipeline ended early"]:
            terminal.say(f"failed: {line}", error=True)
        terminal.say(f"logs        {workdir / 'logs'}", error=True)
    if steps := next_steps(summary, workdir):
        console.print("\nwhat to do next", style="bold")
        for step in steps:
            console.print(f"  {step}", markup=False, highlight=False, soft_wrap=True)
    if summary.run.status == "failed":
        raise typer.Exit(1)


def _plain(subnet: Subnet) -> dict[str, Any]:
    """A candidate of a search for programs; latencies in ms, memory in MiB."""
    return {
        "name": subnet.name,
        "map50_95": subnet.map50_95,
        "latency_ms": dict(subnet.latency_ms),
        "memory_mb": subnet.memory_mb,
        "params": subnet.cost.params,
        "gflops": subnet.cost.gflops,
        "slack": subnet.slack,
    }


def _candidates_table(found: Sequence[Subnet]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", caption="mAP50-95 is that of the supernet's weights")
    table.caption_justify = "left"
    table.add_column("network")
    for heading in ("mAP50-95", "p50, ms", "p90, ms", "p99, ms", "MiB", "params, M", "GFLOPs", "slack"):
        table.add_column(heading, justify="right")
    for subnet in found:
        table.add_row(
            subnet.name,
            f"{subnet.map50_95:.3f}",
            *(f"{subnet.latency_ms[p]:.3g}" for p in ("p50", "p90", "p99")),
            f"{subnet.memory_mb:.0f}",
            f"{subnet.cost.params / 1e6:.2f}",
            f"{subnet.cost.gflops:.3g}",
            f"{subnet.slack:.0%}",
        )
    return table


def _shipped_checkpoint(workdir: Path) -> Path:
    """The checkpoint of what a run ships, quantized if that is: of its only target."""
    target, files = _shipped_target(workdir, "best.pt")
    return workdir / files["qat.pt" if target.precision_shipped == "int8" else "best.pt"]


def _shipped_target(workdir: Path, instead: str) -> tuple[Target, Mapping[str, str]]:
    """The only target for which a run ships something, and its files; else `instead` is what to name."""
    from yolov8_nas.runner.results.summary import Summary

    if not (workdir / Summary.FILE).is_file():
        suffix = Path(instead).suffix
        raise InputError(
            f"{workdir}: no finished run in this folder (no summary.json); give the path of a {suffix} file"
        )
    shipped = [(target, target.model.files) for target in Summary.read(workdir).targets if target.model]
    if len(shipped) != 1:
        found = ", ".join(str(workdir / files[instead]) for _, files in shipped)
        raise InputError(f"{workdir}: the run ships {len(shipped)} models; give the path of one: {found or 'none'}")
    return shipped[0]


def _shipped_file(workdir: Path) -> tuple[Path, Place]:
    """The file of what a run ships that a server runs, and where it was measured."""
    from yolov8_nas.export.serving import Place

    target, files = _shipped_target(workdir, "model.onnx")
    device = target.hardware
    product = device.model if device.kind == "gpu" else None
    place = Place(device.kind or "cpu", device.threads or 1, product, target.runtime.name)
    return workdir / files.get("model.engine", files["model.onnx"]), place


def _limits(config: RunConfig) -> list[Any]:
    return [limit for target in config.targets for limit in target.limits]


def main() -> None:
    """Entry point of the command `yolov8-nas`."""
    terminal.write_anything()
    app()


if __name__ == "__main__":
    main()
