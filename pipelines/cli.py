"""The commands of `yolov8-nas` that speak of a cluster: `python -m pipelines.cli COMMAND ...`.

They stand apart from the library's, which knows nothing of Kubeflow, and run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from rich.table import Table

from yolov8_nas import terminal
from yolov8_nas.advice import words
from yolov8_nas.commands.main import Commands
from yolov8_nas.errors import InputError
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from pipelines.plan import Pool, Step
    from pipelines.request import Request

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Runs in Kubeflow."
)

_WIDTH = 140

Config = Annotated[Path, typer.Argument(help="Run configuration (YAML).")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration.")]
Parameters = Annotated[
    list[str] | None, typer.Option("--param", help="NAME=VALUE of the pipeline, e.g. training_gpus=4; value as YAML.")
]
Host = Annotated[str | None, typer.Option(help="Address of Kubeflow Pipelines.", envvar="KF_PIPELINES_ENDPOINT")]
Namespace = Annotated[str | None, typer.Option(help="Your namespace, where Kubeflow serves several users.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with a bearer token.")]
TokenEnv = Annotated[str | None, typer.Option(help="Environment variable with a bearer token.")]
Certificates = Annotated[Path | None, typer.Option("--ca", help="Certificates to trust (PEM).")]
Experiment = Annotated[str | None, typer.Option(help="Experiment; yolov8-nas, made where missing, unless given.")]
CreateExperiment = Annotated[bool, typer.Option("--create-experiment", help="Make the experiment where it is missing.")]
Account = Annotated[str, typer.Option(help="Service account of the steps.")]
Ui = Annotated[str | None, typer.Option(help="Address of the UI for links, where it is not that of --host.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")]


@app.command(name="compile")
def compile_(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("yolov8-nas.yaml"),
    manifests: Annotated[
        Path | None, typer.Option("--kubernetes-manifests", help="Folder for Pipeline and PipelineVersion resources.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of these resources.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile the pipeline to YAML for a Kubeflow Pipelines server."""
    from pipelines import compile

    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; make it first")
    if manifests is not None:
        compile.require_digests()
    compile.compile_pipeline(out)
    manifest = None if manifests is None else compile.write_manifest(out, manifests, namespace)
    if as_json:
        told = {"file": str(out), "manifest": None if manifest is None else str(manifest)}
        terminal.say_json({**told, "not_named_by_digest": list(compile.floating_images())})
    else:
        for file in filter(None, (out, manifest)):
            terminal.say(f"wrote {file}")
    if floating := compile.floating_images():
        terminal.say(
            f"warning: image {', '.join(floating)}: not named by digest; submit and schedule refuse this", error=True
        )


@app.command()
def submit(
    config: Config,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    ca: Certificates = None,
    experiment: Experiment = None,
    create_experiment: CreateExperiment = False,
    overrides: Overrides = None,
    param: Parameters = None,
    service_account: Account = "yolov8-nas-runner",
    ui: Ui = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run to its end; exit 1 where it fails.")] = False,
    poll: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 15.0,
    unschedulable: Annotated[
        float, typer.Option(min=0, help="Hours that --watch waits for a step that no node can take.")
    ] = 24.0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline in a Kubeflow cluster. The same pipeline is uploaded once, however often it is run."""
    from pipelines import nodes, request
    from pipelines import submit as to
    from pipelines.client import Access, Server

    asked = request.make(config, overrides or (), param or ())
    _check_names(service_account, namespace)
    if dry_run:
        return _would_send(asked, experiment, service_account, as_json=as_json)
    server = Server(Access(host, namespace, token_file, token_env, ca))
    if unknown := nodes.check(asked.branches, asked.parameters.get("training_labels", {})):
        terminal.say(f"node labels not checked: {unknown}", error=True)
    with server.told("open the experiment"):
        place = server.experiment(experiment or to.EXPERIMENT, create_experiment or experiment is None)
    version = to.upload(server)
    run = to.submit(server, asked, version, place, service_account)
    link = to.link(server, run.run_id, ui)
    told = {"run_id": run.run_id, "link": link, "version": version.name, "uploaded": version.new, "state": None}

    def tell(text: str) -> None:
        terminal.say(text, error=as_json)

    tell(f"version  {version.name} ({'uploaded' if version.new else 'was there'})")
    tell(f"run      {link}")
    if not watch and as_json:
        terminal.say_json(told)
    if watch:
        from pipelines.watch import watch as follow

        labels = [branch.label for branch in asked.branches]
        state = follow(server, run.run_id, labels, tell, poll, unschedulable=unschedulable)
        tell(f"run {state.lower()}; its report is an artifact of the step Write the report")
        if as_json:
            terminal.say_json({**told, "state": state})
        if state != "SUCCEEDED":
            raise typer.Exit(1)
    return None


@app.command()
def schedule(
    config: Config,
    cron: Annotated[str, typer.Option(help='When, in UTC: minute hour day month weekday, e.g. "0 3 * * 1".')],
    name: Annotated[str | None, typer.Option(help="Name of the schedule; that of the configuration.")] = None,
    disabled: Annotated[bool, typer.Option("--disabled", help="Create it, but let it start nothing yet.")] = False,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    token_env: TokenEnv = None,
    ca: Certificates = None,
    experiment: Experiment = None,
    create_experiment: CreateExperiment = False,
    overrides: Overrides = None,
    param: Parameters = None,
    service_account: Account = "yolov8-nas-runner",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline again and again. Given once more, the command changes the schedule, or nothing."""
    from pipelines import request
    from pipelines import submit as to
    from pipelines.client import Access, Server

    asked = request.make(config, overrides or (), param or ())
    _check_names(service_account, namespace)
    wanted = to.Schedule(name or asked.config.name, to.cron(cron), enabled=not disabled)
    if dry_run:
        return _would_send(asked, experiment, service_account, wanted, as_json=as_json)
    server = Server(Access(host, namespace, token_file, token_env, ca))
    with server.told("open the experiment"):
        place = server.experiment(experiment or to.EXPERIMENT, create_experiment or experiment is None)
    version = to.upload(server)
    done = to.schedule(server, asked, version, place, service_account, wanted)
    if as_json:
        told = {"schedule": wanted.name, "done": done, "cron": wanted.cron, "enabled": wanted.enabled}
        return terminal.say_json({**told, "version": version.name, "uploaded": version.new})
    terminal.say(f"schedule {wanted.name}: {done}, {wanted.cron} (second minute hour day month weekday, UTC)")
    terminal.say(f"version  {version.name} ({'uploaded' if version.new else 'was there'})")
    return None


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    param: Parameters = None,
    store: Annotated[
        str | None, typer.Option(help="Stage store (s3://, too) with runs that tell how long stages take.")
    ] = None,
    rates: Annotated[Path | None, typer.Option(help="YAML: seconds per unit by stage, or by stage and pool.")] = None,
    price: Annotated[list[str] | None, typer.Option(help="POOL=EUR per hour of a step, e.g. training=3.20.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The dataset on this machine, where the configuration's is elsewhere.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure here what no run tells, in minutes.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Show the steps of a run, the GPU hours of each pool as far as rates are known, and what they cost."""
    from pipelines import plan as planning
    from pipelines import request

    asked = request.make(config, overrides or (), param or ())
    known = planning.Rates.load(rates, store)
    steps = planning.steps(asked, known)
    advice = [*known.advice(asked.config)]
    prices = dict(_price(text) for text in price or ())
    pools = planning.pools(steps, prices)
    why_not = ""
    if measure:
        steps, why_not = _measured(asked, steps, data)
        pools = planning.pools(steps, prices)
    told = planning.assumptions(asked, steps) + ([f"Nothing could be measured here: {why_not}"] if why_not else [])
    if as_json:
        rows = [{**asdict(step), "hours": step.hours} for step in steps]
        content = {"steps": rows, "pools": [asdict(pool) for pool in pools], "assumptions": told}
        terminal.say_json({**content, "advice": [given.plain() for given in advice]})
        return
    _show_plan(steps, pools, told, priced=bool(price))
    for given in advice:
        terminal.say(f"\n{given.target}, {' and '.join(given.limits)}: {words.gap(given)} {given.recommendation}")
    if not advice:
        terminal.say("\nNo advice: none of the targets was probed in --store; yolov8-nas advise CONFIG does that.")


def _measured(asked: Request, steps: list[Step], data: Path | None) -> tuple[list[Step], str]:
    from pipelines import plan as planning
    from yolov8_nas.runner import process

    with process.log_file("plan") as log, Terminal(stderr=True).status("measuring here what no run tells"):
        return planning.measure_here(asked, steps, log, None if data is None else str(data))


def _show_plan(steps: Sequence[Step], pools: Sequence[Pool], told: Sequence[str], *, priced: bool) -> None:
    from pipelines import plan as planning

    console = Terminal()
    if not console.is_terminal:
        console.width = _WIDTH  # in a file nothing is to be cut off
    table = _table("step", "target", "pool", "GPUs", "work", "seconds each", "hours", "known from", right=(3, 5, 6))
    for step in steps:
        rate = "unknown" if step.seconds_per_unit is None else f"{step.seconds_per_unit:.3g}"
        hours = "unknown" if step.hours is None else f"{step.hours:.2f}"
        work = f"{step.units} x {planning.UNITS[step.stage]}"
        table.add_row(step.stage, step.target or "", step.pool, str(step.gpus), work, rate, hours, step.source)
    console.print(table)
    table = _table("pool", "hours", "GPU hours", "EUR per hour", "EUR", right=(1, 2, 3, 4))
    for pool in pools:
        price_of = "not given" if pool.price is None else f"{pool.price:.2f}"
        figures = [_bound(value, pool.complete) for value in (pool.hours, pool.gpu_hours, pool.cost)]
        table.add_row(pool.name, *figures[:2], price_of, figures[2])
    console.print()
    console.print(table)
    if priced:
        cost = sum(pool.cost for pool in pools if pool.cost is not None)
        complete = all(pool.complete and pool.cost is not None for pool in pools)
        console.print(f"\nin all {_bound(cost, complete)} EUR", highlight=False)
    console.print("\nAssumed:", highlight=False)
    for line in told:
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def _check_names(service_account: str, namespace: str | None) -> None:
    from components.forms import object_name

    object_name(service_account, "--service-account")
    if namespace is not None:
        object_name(namespace, "--namespace")


def _would_send(
    asked: object, experiment: str | None, service_account: str, wanted: object | None = None, *, as_json: bool
) -> None:
    """Print what `submit` or `schedule` would send."""
    from pipelines import submit as to
    from pipelines.compile import NAME
    from pipelines.request import Request, described

    assert isinstance(asked, Request)
    with to.package() as (_, version):
        content = {
            "pipeline": NAME,
            "version": version,
            "experiment": experiment or to.EXPERIMENT,
            "service_account": service_account,
            **({"schedule": asdict(wanted)} if isinstance(wanted, to.Schedule) else {"run": asked.config.name}),
            "parameters": described(asked),
            "targets": [{key: value for key, value in branch.plain().items() if value} for branch in asked.branches],
        }
    if as_json:
        return terminal.say_json(content)
    typer.echo(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100).rstrip())
    return None


def _price(text: str) -> tuple[str, float]:
    pool, _, value = text.partition("=")
    try:
        price = float(value)
    except ValueError:
        price = -1.0
    if not pool or not 0 <= price < float("inf"):
        raise InputError(f"--price {text!r} does not parse: write POOL=EUR_PER_HOUR, for example training=3.20")
    return pool, price


def _bound(value: float | None, complete: bool) -> str:
    """A sum, which is a lower bound where a part of it is unknown."""
    if value is None or (value == 0 and not complete):
        return "unknown"
    return f"{value:.2f}" if complete else f"at least {value:.2f}"


def _table(*columns: str, right: tuple[int, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left")
    return table


if __name__ == "__main__":
    app(prog_name="yolov8-nas")
