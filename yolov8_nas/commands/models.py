"""The command line's `models`: what is registered, and which of it is champion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from yolov8_nas import terminal
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from yolov8_nas.registry.query import RegisteredVersion

app = typer.Typer(
    no_args_is_help=True,
    help="Registered models. A MODEL is NAME/VERSION, NAME@ALIAS, or NAME for its newest version.",
)

Model = Annotated[str, typer.Argument(help="NAME/VERSION, NAME@ALIAS, or NAME for its newest version.")]
Where = Annotated[Path, typer.Option(help="Work folder of the run that registered the models.")]
Tracking = Annotated[str | None, typer.Option(help="MLflow tracking URI, instead of that of the work folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Data = Annotated[str | None, typer.Option(help="Dataset on whose val split models are scored: a folder or an archive.")]
By = Annotated[str | None, typer.Option(help="Who does this; you on this machine unless given.")]
Because = Annotated[str | None, typer.Option(help="Why, for the record.")]

_WORKDIR = Path("runs/demo")


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only this registered model.")] = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """List the registered versions."""
    from yolov8_nas.registry import query

    versions = query.list_models(_uri(workdir, tracking), name)
    if as_json:
        return terminal.say_json([version.to_dict() for version in versions])
    table = _table("model", "hardware", "precision", "mAP50-95", "p50, ms", "champion or challenger of")
    for version in versions:
        table.add_row(
            str(version),
            version.tags.get("hardware", ""),
            version.tags.get("precision", ""),
            _number(version.metrics.get("map50_95")),
            _number(version.metrics.get("latency_p50_ms")),
            ", ".join(version.aliases),
        )
    Terminal().print(table)
    return None


@app.command()
def show(
    model: Model,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Everything that is recorded, with digests and identifiers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what whoever releases a version has to know; with --all, or as JSON, everything that is recorded of it."""
    from yolov8_nas.registry import query

    _show(query.find(_uri(workdir, tracking), model), everything=everything, as_json=as_json)


@app.command()
def best(
    hardware: Annotated[str, typer.Option(help="Device, as `models list` names it.")],
    max_latency: Annotated[str, typer.Option(help="Longest median latency: 2.5ms, 2500us; ms unless said otherwise.")],
    min_map: Annotated[float | None, typer.Option(help="Least mAP50-95, from 0 to 1.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or int8.")] = None,
    name: Annotated[str | None, typer.Option("--model", help="Only versions of this registered model.")] = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Show the most accurate version that is fast enough on a device."""
    from yolov8_nas.registry import query

    limit = _milliseconds(max_latency)
    found = query.best(_uri(workdir, tracking), hardware, limit, min_map, precision, name)
    _show(found, everything=False, as_json=as_json)


@app.command()
def compare(
    first: Model,
    second: Model,
    data: Data = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Show two versions side by side: accuracy, latency, memory, architecture, data.

    The difference in accuracy comes with a 95% interval over images (paired bootstrap): by what was kept when both were
    scored on the same state of the dataset, or on the val split of --data, now.
    """
    found = _apart(
        "compare:compare", "comparing", tracking_uri=_uri(workdir, tracking), first=first, second=second, data=data
    )
    if as_json:
        return terminal.say_json(found)
    return _print_comparison(found)


@app.command()
def promote(
    model: Model,
    data: Data = None,
    tolerance: Annotated[
        float | None, typer.Option(help="By how much mAP50-95 it may be below the champion; 0.005 unless given.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="MLflow tracking URI of another registry, to promote it there.")
    ] = None,
    by: By = None,
    because: Because = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Make a challenger champion, if it keeps its limits and is as accurate as the champion.

    Both are scored on the val split of --data, and measured in the same rounds where this machine is their device. With
    --to the version is first registered in the other registry, its files verified; there it meets that one's champion.
    """
    uri = _uri(workdir, tracking)
    result: dict[str, Any] = {}
    if to is not None:
        target = _uri(workdir, to)
        result["copy"] = _apart("promote:carry", f"registering {model} at {to}", source=uri, model=model, target=target)
        uri, model = target, result["copy"]["reference"]
    asked = {"data": data, "by": by, "because": because, **({} if tolerance is None else {"tolerance": tolerance})}
    result |= _apart(
        "promote:promote", "scoring and measuring, alone on this host", tracking_uri=uri, reference=model, **asked
    )
    if as_json:
        terminal.say_json(result)
    else:
        _print_promotion(result)
    if not result["promoted"]:
        if not as_json:
            terminal.say(f"failed: {model} is not promoted: {'; '.join(result['reasons'])}", error=True)
        raise typer.Exit(1)


@app.command()
def rollback(
    model: Model,
    by: By = None,
    because: Because = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Restore the champion before this one; best named by its alias, NAME@champion-..."""
    from yolov8_nas.registry.promote import rollback as restore

    version, change = restore(_uri(workdir, tracking), model, by=by, because=because)
    if as_json:
        return terminal.say_json({"model": version.model, "version": version.version, "change": change.to_dict()})
    terminal.say(f"{version} is champion-{change.purpose} again, instead of version {change.before}")
    return None


@app.command()
def history(
    name: Annotated[str, typer.Argument(help="Name of the registered model.")],
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Tell who made which version champion, when, why and instead of which."""
    from yolov8_nas.registry.champions import history as changes_of
    from yolov8_nas.registry.tracking import opened

    with opened(_uri(workdir, tracking)) as client:
        changes = changes_of(client, name)
    if as_json:
        return terminal.say_json([change.to_dict() for change in changes])
    table = _table("when", "champion", "from", "to", "", "by", "because")
    for change in changes:
        before = "" if change.before is None else str(change.before)
        when = change.at.replace("+00:00", "Z")
        table.add_row(when, change.purpose, before, str(change.version), change.action, change.by, change.because)
    Terminal().print(table)
    return None


@app.command()
def pull(
    model: Model,
    folder: Annotated[Path | None, typer.Argument(help="Folder to make; NAME-VERSION unless given.")] = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Download the files of a version and hold them against the hashes that they were registered with."""
    from yolov8_nas.registry.pull import pull as fetch

    version, made = fetch(_uri(workdir, tracking), model, folder)
    if as_json:
        return terminal.say_json({**version.to_dict(), "folder": str(made), "files": version.files})
    for name, digest in version.files.items():
        terminal.say(f"{digest[:16]}  {made / name}")
    terminal.say(f"{version}: {len(version.files)} files, all with the SHA-256 that they were registered with")
    return None


@app.command()
def sign(model: Model, workdir: Where = _WORKDIR, tracking: Tracking = None, as_json: AsJson = False) -> None:
    """Sign a registered version with the key in YOLOV8_NAS_SIGNING_KEY, its files verified first.

    For versions from before there was a key, and to let a new key take the place of another.
    """
    from yolov8_nas.registry.promote import sign as seal

    version, key = seal(_uri(workdir, tracking), model)
    if as_json:
        return terminal.say_json({"model": version.model, "version": version.version, "key": key})
    typer.echo(f"{version}: signed with the key {key}")
    return None


@app.command()
def make_key(
    folder: Annotated[Path, typer.Argument(help="Folder for signing.key and the public key.")],
    hmac: Annotated[
        bool, typer.Option("--hmac", help="A shared secret instead: whoever can check a signature can make one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a key to sign evidence with, and the public one to check it."""
    from yolov8_nas import signing

    private, public = signing.make_keys(folder, shared_secret=hmac)
    if as_json:
        return terminal.say_json({"private": str(private), "public": str(public)})
    typer.echo(f"{private}: keep it to those who run stages and register ({signing.KEY_VARIABLE})")
    typer.echo(f"{public}: give it to everybody who reads ({signing.TRUSTED_VARIABLE})")
    return None


@app.command()
def recheck(data: Data = None, workdir: Where = _WORKDIR, tracking: Tracking = None, as_json: AsJson = False) -> None:
    """Measure the champions of this machine again, and tell which no longer keep their limits."""
    rows = _apart("recheck:recheck", "measuring, alone on this host", tracking_uri=_uri(workdir, tracking), data=data)
    if as_json:
        terminal.say_json(rows)
    else:
        _print_recheck(rows)
    missed = [f"{row['model']}/{row['version']}" for row in rows if row["kept"] is False]
    if missed:
        raise StageError(f"no longer within their limits: {', '.join(missed)}")


@app.command()
def sync(
    store: Annotated[str | None, typer.Option(help="Stage store, where it is not in the work folder.")] = None,
    workdir: Where = _WORKDIR,
    tracking: Tracking = None,
    as_json: AsJson = False,
) -> None:
    """Send what runs could not register because the tracking server was away, to where it was meant to go.

    And close the last run of the work folder in MLflow, where that was killed; started again, it goes on there.
    """
    from yolov8_nas.registry import spool
    from yolov8_nas.run import local
    from yolov8_nas.runner.stage import open_store

    def note(text: str) -> None:
        terminal.say(text, error=True)

    if store is None and (workdir / local.LAST_RUN).is_file():
        with suppress(local.OccupiedError), local.held(workdir):
            if closed := local.close_killed(workdir):
                note(closed)
    opened = open_store(store or workdir / "store")
    uri = None if tracking is None else _uri(workdir, tracking)
    try:
        done = spool.send_everywhere(opened, note) if uri is None else spool.send(opened, uri, note)
    except ConnectionError as error:  # the store's, where that is in S3
        raise InputError(str(error)) from None
    if as_json:
        waiting = [{**asdict(entry), "folder": str(entry.folder)} for entry in done.waiting]
        terminal.say_json({"sent": list(done.sent), "waiting": waiting})
    else:
        for what in done.sent:
            terminal.say(f"sent {what}")
        if not done.sent and not done.waiting:
            terminal.say(f"nothing waits in {opened.address}/{spool.FOLDER}")
    if done.waiting:
        left = "; ".join(f"{entry.what} for {entry.tracking_uri} ({entry.why})" for entry in done.waiting)
        raise StageError(f"not sent: {left}; the folders are in {opened.address}/{spool.FOLDER}")


def _uri(workdir: Path, uri: str | None) -> str:
    from yolov8_nas.registry.tracking import resolve_uri

    return resolve_uri(uri, workdir / "store")


def _milliseconds(text: str) -> float:
    """A latency as people write it."""
    from yolov8_nas.space.limits import Constraint

    try:
        number = f"{float(text)}ms"
    except ValueError:
        number = text
    try:
        limit = Constraint.parse(f"latency<={number}")
    except InputError:
        raise InputError(f"--max-latency {text}: give a positive time, for example 2.5 or 2.5ms or 2500us") from None
    if limit.relative:
        raise InputError(f"--max-latency {text}: give a time, for example 2.5ms; the registry knows no stock network")
    return limit.limit


def _apart(function: str, doing: str, **arguments: Any) -> Any:
    """Call a function of the registry in a process of its own, as it loads networks."""
    from yolov8_nas.runner import process

    with process.log_file("models") as log, Terminal(stderr=True).status(doing):
        return process.call(f"yolov8_nas.registry.{function}", log=log, **arguments)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _number(value: Any) -> str:
    """A figure for people; nothing where it is not known."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _short(value: Any) -> str:
    """A value for people; of a SHA-256, as much as tells it from another."""
    text = "" if value is None else str(value)
    return text[:16] if re.fullmatch("[0-9a-f]{64}", text) else text


def _print_comparison(found: Mapping[str, Any]) -> None:
    first, second = (f"{found[side]['model']}/{found[side]['version']}" for side in ("first", "second"))
    console = Terminal()
    console.print(f"accuracy on {found['scored_on']}", highlight=False, style="bold")
    table = _table("", first, second, "difference", "95% interval", "")
    for row in found["accuracy"]:
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}" if "low" in row else ""
        known = row["first"] is not None and row["second"] is not None
        difference = f"{row.get('difference', row['first'] - row['second']):+.3f}" if known else ""
        table.add_row(
            row["what"], _number(row["first"]), _number(row["second"]), difference, interval, row.get("word", "")
        )
    console.print(table)
    console.print("\nas measured when they were registered", style="bold")
    table = _table("", first, second, "ratio")
    for row in found["measured"]:
        known = row["first"] is not None and row["second"]
        ratio = f"{row['first'] / row['second']:.2f}" if known else ""
        what = f"{row['what']}, {row['unit']}" if row["unit"] else row["what"]
        table.add_row(what, _number(row["first"]), _number(row["second"]), ratio)
    console.print(table)
    same = [row["what"] for row in found["architecture"] if row["same"]]
    _print_differing(console, "architecture", [row for row in found["architecture"] if not row["same"]], first, second)
    if same:
        console.print(f"the same in both: {', '.join(same)}", style="dim", highlight=False)
    _print_differing(console, "origin", found["origin"], first, second)


def _print_differing(console: Terminal, title: str, rows: Sequence[Mapping[str, Any]], first: str, second: str) -> None:
    console.print(f"\n{title}", style="bold")
    if rows:
        table = _table("", first, second)
        for row in rows:
            table.add_row(row["what"], *(_short(row[side]) for side in ("first", "second")))
        console.print(table)


def _print_promotion(result: Mapping[str, Any]) -> None:
    console = Terminal()
    if "copy" in result:
        console.print(result["copy"]["said"], highlight=False, soft_wrap=True)
    if result.get("challenger"):
        table = _table("", "model", "mAP50-95", "limit", "measured", "kept")
        for role in ("challenger", "champion"):
            found = result[role]
            for index, limit in enumerate(found["limits"] if found else ()):
                kept = {True: "yes", False: "no", None: "not measured"}[limit["met"]]
                about = f"{limit['metric']} {limit['statistic']}" if limit["metric"] == "latency" else limit["metric"]
                scope = " with NMS" if limit["scope"] == "with_nms" else ""
                table.add_row(
                    "" if index else role,
                    "" if index else f"{found['model']}/{found['version']}",
                    "" if index else _number(found["map50_95"]),
                    f"{about}{scope} {_number(limit['limit'])} {limit['unit']}",
                    _number(limit["measured"]),
                    kept,
                )
        console.print(table)
        for key in ("scored_on", "not_measured"):
            if result[key]:
                console.print(
                    ("scored on " if key == "scored_on" else "") + result[key], highlight=False, soft_wrap=True
                )
        if result["comparison"]:
            row = result["comparison"]
            console.print(
                f"challenger is {row['word']}: mAP50-95 differs by {row['difference']:+.3f} "
                f"(95% interval {row['low']:+.3f} to {row['high']:+.3f})",
                highlight=False,
            )
    if result["promoted"]:
        for reason in result["reasons"]:
            console.print(reason, highlight=False, soft_wrap=True)
        if result["change"]:
            console.print(f"promoted: {result['alias']}", highlight=False, soft_wrap=True)


def _print_recheck(rows: Sequence[Mapping[str, Any]]) -> None:
    table = _table("champion", "limit", "registered", "runtime", "now", "runtime", "kept")
    for row in rows:
        now = row["measured"]
        for then, limit in zip(row["registered"]["limits"], now["limits"], strict=True):
            kept = {True: "yes", False: "no", None: "not measured"}[limit["met"]]
            table.add_row(
                f"{row['model']}/{row['version']}",
                f"{limit['metric']} {_number(limit['limit'])} {limit['unit']}",
                _number(then["measured"]),
                row["registered"]["runtime"],
                _number(limit["measured"]),
                now["runtime"],
                kept + (" (other load on the host)" if now["disturbed"] else ""),
            )
    Terminal().print(table)


def _signed(version: RegisteredVersion) -> str:
    """Whether a signature vouches for a version, in words."""
    from yolov8_nas import signing

    if not signing.keys():
        return f"not asked for ({signing.TRUSTED_VARIABLE} names no keys)"
    why = version.seal_fault()
    return f"NOT TRUSTED: {why}" if why else "with a trusted key"


def _show(version: RegisteredVersion, *, everything: bool, as_json: bool) -> None:
    if as_json:
        return terminal.say_json(version.to_dict())
    console = Terminal()
    console.print(f"{version}: {version.description}", style="bold", highlight=False)
    _print_rows(console, "", _for_release(version))
    if everything:
        _print_rows(console, "measured", {name: _number(value) for name, value in version.metrics.items()})
        network = {key: value for key, value in version.params.items() if key != "architecture"}
        _print_rows(console, "network", network)
        tags = {key: value for key, value in version.tags.items() if not key.startswith("sha256.")}
        _print_rows(console, "tags", {"MLflow's run": version.run_id, "loaded from": version.model_uri, **tags})
        _print_rows(console, "files, by SHA-256", version.files)
    else:
        console.print("\n--all shows everything that is recorded, with digests; --json the same for programs")
    return None


def _for_release(version: RegisteredVersion) -> dict[str, str]:
    """What whoever releases a version asks first: is it champion, does it keep its limits, is it better than stock."""
    metrics, tags = version.metrics, version.tags
    latency = " / ".join(_number(metrics.get(f"latency_{name}_ms")) or "?" for name in ("p50", "p90", "p99"))
    device = " ".join(tags[key] for key in ("runtime", "runtime_version") if key in tags)
    classes = version.params.get("classes", "")
    rows = {
        "champion of": ", ".join(a.removeprefix("champion-") for a in version.aliases if a.startswith("champion-")),
        "other aliases": ", ".join(alias for alias in version.aliases if not alias.startswith("champion-")),
        "signed": _signed(version),
        "limits, all kept": _limits(version),
        "accuracy": f"mAP50-95 {_number(metrics.get('map50_95')) or 'not recorded'}{_against_stock(metrics)}",
        "latency, p50 / p90 / p99": f"{latency} ms",
        "peak memory": f"{metrics['memory_mb']:,.0f} MiB" if "memory_mb" in metrics else "not measured",
        "measured on": f"{tags.get('hardware_model') or tags.get('hardware') or 'not recorded'}, {device}",
        "network": f"{tags.get('precision', '?')}, {tags.get('imgsz', '?')} px, file {tags.get('file', '?')}",
        "classes": classes if len(classes) <= _CLASSES_SHOWN else f"{classes[:_CLASSES_SHOWN]}...",
        "licence": tags.get("license", "not recorded"),
        "licence of the start weights": tags.get("license_start", "not recorded"),
        "licence of the data": tags.get("license_data", "not recorded"),
        "registered": f"{version.created:%Y-%m-%d %H:%M} UTC",
        "load it as": f"models:/{version}",
    }
    if not rows["champion of"]:
        rows["champion of"] = "nothing: no alias champion-... points to it"
    return {name: value for name, value in rows.items() if value}


_CLASSES_SHOWN = 200


def _limits(version: RegisteredVersion) -> str:
    """The limits of a version, which are kept by what was measured: another would not have been registered."""
    from yolov8_nas.report import wording
    from yolov8_nas.runner.results import LimitRow

    try:
        known = [{key: row[key] for key in LimitRow.model_fields if key in row} for row in version.limits]
        rows = [LimitRow.model_validate(row) for row in known]
    except InputError as error:
        return str(error)
    except ValidationError:
        return "not readable: registered by another release"
    return ", ".join(f"{wording.quantity(row)} {wording.bound(row)}" for row in rows)


def _against_stock(metrics: Mapping[str, float]) -> str:
    """The difference to stock in words; empty where none was trained beside it."""
    difference, low, high = (metrics.get(f"map50_95_against_stock_{name}") for name in ("difference", "low", "high"))
    if difference is None or low is None or high is None:
        return "; no stock network was trained beside it"
    word = "ahead of stock" if low > 0 else "behind stock" if high < 0 else "undecided against stock"
    return f", {word} ({difference:+.3f}, 95% interval {low:+.3f} to {high:+.3f})"


def _print_rows(console: Terminal, title: str, rows: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, str(value))
    if title:
        console.print(f"\n{title}", style="bold")
    console.print(table, highlight=False)
