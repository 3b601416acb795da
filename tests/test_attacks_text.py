"""Attacks with text: names that command a terminal, a page or Markdown, and secrets that look for a way out."""

from __future__ import annotations

import base64
import inspect
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import fabricated
import pytest
import web_server
import yaml
from look_ups import watched
from PIL import Image
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from pipelines import request
from yolov8_nas import credentials, foreign, quiet, terminal
from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.data.faults import Faults
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.registry import tracking
from yolov8_nas.report.build import build_report
from yolov8_nas.report.step import tell, tell_run
from yolov8_nas.report.terminal import verdict
from yolov8_nas.run.lifecycle import IN_CLUSTER, open_run, requested
from yolov8_nas.runner.display import Display
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results.summary import Dataset, Summary
from yolov8_nas.runner.stage import Outcome, run_stage
from yolov8_nas.space import SpaceError
from yolov8_nas.stages import find_stage
from yolov8_nas.store.archive import ArchiveError, pack

ROOT: Final = Path(__file__).parents[1]

HOSTILE: Final = {
    "Rich markup": "[red]dent[/red]",
    "markup that closes nothing": "dent[/]",
    "markup of a link": "[link=https://example.com]dent[/link]",
    "an escape that clears": "dent\x1b[2J\x1b[H",
    "an escape of a title": "dent\x1b]0;owned\x07",
    "an escape of 8 bits": "dent\x9b31m",
    "a hyperlink": "\x1b]8;;https://example.com\x1b\\dent\x1b]8;;\x1b\\",
    "a carriage return": "dent\rerror: none",
    "a line of its own": "dent\nerror: the disk is full",
    "backspaces": "dent\b\b\b\bhole",
    "an override of direction": "dent\u202etned",
    "an isolate of direction": "dent\u2067tned\u2069",
    "a mark of direction": "dent\u200f!",
    "a separator of lines": "dent\u2028error: none",
    "a letter of no width": "de\u200bnt",
    "tags": "dent\U000e0041\U000e0042",
    "half a letter": "dent\ud800",
    "a zero byte": "dent\x00hole",
    "backticks": "dent```\n# owned\n```",
    "a table's bar": "dent | owned | ",
    "an element": "<script>alert(1)</script>",
    "an attribute": "\" onmouseover=\"alert(1)",
    "a link of Markdown": "[dent](javascript:alert(1))",
    "an image of Markdown": "![dent](https://example.com/x.png)",
    "a heading": "# dent",
    "an entity": "&lt;b&gt;dent",
    "a very long line": "dent" * 50_000,
}  # fmt: skip
"""Names that somebody may give to a class, a file, a run or a dataset."""

_COMMANDS: Final = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\U000e0000-\U000e007f]"
)


def _harmless(shown: str, *, lines: int, longest: int = 3000) -> None:
    """What must hold of whatever is shown of such a name."""
    assert not _COMMANDS.search(shown), ascii(shown[:300])
    assert "\nerror:" not in shown
    assert shown.count("\n") <= lines
    assert max(map(len, shown.split("\n"))) <= longest


@pytest.fixture(params=list(HOSTILE))
def name(request: pytest.FixtureRequest) -> str:
    return HOSTILE[request.param]


def test_on_one_line_it_commands_nothing(name: str) -> None:
    _harmless(foreign.plain(name), lines=0)
    assert foreign.plain(foreign.plain(name)) == foreign.plain(name)


def test_said_on_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(f"wrote {foreign.plain(name)}")
    terminal.say(name, error=True)
    out, err = capsys.readouterr()
    _harmless(out, lines=1)
    assert not _COMMANDS.search(err)
    if "[" in name and "\x1b" not in name:
        assert name in out, "markup is text"


def test_in_a_table_of_a_terminal(name: str) -> None:
    buffer = io.StringIO()
    console = terminal.Terminal(file=buffer, width=100, force_terminal=False)
    table = Table(box=None, title=name)
    table.add_column(name, overflow="fold")
    table.add_row(name)
    table.add_row(Text(name))
    console.print(table, name, Text(name), Panel(name))
    console.print(name, soft_wrap=True)
    with console.status(name) as status:
        status.update(f"reading {name}")
    assert not _COMMANDS.search(buffer.getvalue()), ascii(buffer.getvalue()[:500])
    if name == HOSTILE["Rich markup"]:
        assert buffer.getvalue().count(name) >= 4


def test_in_the_message_of_an_error(name: str) -> None:
    for kind in (InputError, StageError, SpaceError, ArchiveError):
        error = kind(f"data.yaml: class {name}: is there twice; take one out")
        assert not _COMMANDS.search(str(error))
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert len(str(error)) < 2500
    faults = Faults()
    faults.add(name, name, name)
    with pytest.raises(InputError) as caught:
        faults.raise_any("data")
    _harmless(str(caught.value), lines=0, longest=7000)


def test_in_the_log_and_the_display_of_a_stage(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("data-prep", file=tmp_path / "progress.jsonl")
    progress.started()
    progress.note(f"warning: {name}")
    progress.update(1, 2, name)
    progress.finished("failed", 1.0, f"class {name}")
    out = capsys.readouterr().out
    assert not _COMMANDS.search(out)
    assert all(line.startswith("[data-prep] ") for line in out.split("\n")[:2])
    buffer = io.StringIO()
    for forced in (False, True):
        console = terminal.Terminal(file=buffer, width=120, force_terminal=forced, color_system=None)
        with Display(tmp_path / "progress.jsonl", [("data-prep", None)], console) as display:
            display.poll()
    shown = re.sub("\x1b\\[[0-9;?]*[A-Za-z]|\r", "", buffer.getvalue())  # Rich's own, to draw the table
    assert not _COMMANDS.search(shown), ascii(shown[:300])
    assert "owned\x07" not in buffer.getvalue()
    assert "\x1b[2J" not in buffer.getvalue()


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _summary(name: str) -> Summary:
    """A summary in which everything that others name has this name."""
    limit = {"metric": "latency", "statistic": "p50", "scope": "engine", "limit": 1.0, "unit": "ms"}
    target = fabricated.target(
        error=name,
        hardware={"name": name, "model": name},
        runtime={"name": name, "version": name},
        constraints=[limit],
        baselines=[{"name": name, "map50_95": 0.5, "latency_ms": fabricated.latency(1.0)}],
    )
    failed = {"name": "data-prep", "status": "failed", "error": name}
    summary = fabricated.summary(target, stages=[failed], id=name, name=name, status="failed", error=name)
    dataset = {"digest": name, "images": {"train": 1, "search": 1, "val": 1}, "classes": [name], "source": name}
    return summary.model_copy(update={"dataset": Dataset.model_validate(dataset)})


def test_in_the_report(name: str, tmp_path: Path) -> None:
    page = build_report(_summary(name), {}, tmp_path / "report.html").read_text(errors="surrogatepass")
    parser = _Elements()
    body = re.sub("<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    parser.feed(body)
    assert not _COMMANDS.search(body)
    assert not any(tag in ("script", "img", "b") for tag, _ in parser.found)
    assert not any(attribute.startswith("on") for _, attributes in parser.found for attribute in attributes)
    assert "<script>alert" not in page


def test_in_the_verdict_on_a_terminal(name: str) -> None:
    buffer = io.StringIO()
    terminal.Terminal(file=buffer, width=200, force_terminal=False).print(verdict(_summary(name)))
    assert not _COMMANDS.search(buffer.getvalue())


def test_in_markdown(name: str, tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "status.json").write_text('{"status": "failed"}')
    pack(tmp_path / "result", tmp_path / "result.tar")
    failed = Outcome("failed", "0" * 64, "", 1.0, f"class {name}: no")
    told = tell("data-prep", None, failed, tmp_path / "result.tar").markdown
    fence = next(line for line in told.split("\n") if line.startswith("```"))
    assert told.split("\n").count(fence) == 2, "the block ends where it should"
    assert told.rstrip().endswith(fence)
    page = tell_run(_summary(name)).markdown
    for shown in (told, page):
        assert not _COMMANDS.search(shown)
    assert not re.search(r"(?<!\\)\[dent|(?<!\\)!\[|^# dent|<script", page, re.MULTILINE)
    rows = [line for line in page.split("\n") if line.startswith("| data-prep")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows), "nothing leaves its cell"


def _dataset(folder: Path, name: str) -> Path:
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for i in range(6):
            colour = (i * 40, 9, 9 if split == "train" else 90)
            Image.new("RGB", (32, 32), colour).save(folder / "images" / split / f"{i}.png")
            (folder / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    described = {"train": "images/train", "val": "images/val", "names": [name, "hole"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(described, allow_unicode=False))
    return folder


def test_classes_of_a_dataset_on_the_command_line(name: str, tmp_path: Path) -> None:
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):
        pytest.skip("YAML has no half letters")
    folder = _dataset(tmp_path / "data", name)
    result = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 2)
    assert not _COMMANDS.search(result.output), ascii(result.output[:500])


OF_FILES: Final = ("Rich markup", "an escape that clears", "an override of direction", "backticks")
OF_VALUES: Final = ("Rich markup", "an escape of a title", "a carriage return")


@pytest.mark.parametrize("kind", OF_FILES)
def test_files_of_a_dataset_on_the_command_line(kind: str, tmp_path: Path) -> None:
    folder = _dataset(tmp_path / "data", "dent")
    (folder / "images" / "train" / f"{HOSTILE[kind].replace('/', '')}.png").write_bytes(b"no image")
    result = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert result.exit_code == 2
    assert not _COMMANDS.search(result.output), ascii(result.output[:500])
    assert "unreadable" in result.output or "image" in result.output


@pytest.mark.parametrize("kind", OF_VALUES)
def test_values_of_a_configuration_on_the_command_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": HOSTILE[kind], HOSTILE[kind]: 1}))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml")])
    assert (result.exit_code, result.exception and type(result.exception)) == (2, SystemExit)
    assert not _COMMANDS.search(result.output)


# Secrets -------------------------------------------------------------------------------------------------------------

SECRET: Final = "pl4nted-s3cret"
TOKEN: Final = "t0ken-of-a-signed-address"

ADDRESSES: Final = {
    "https://data.example/line3.tar?X-Amz-Signature=t0ken-of-a-signed-address&a=b": "https://data.example/line3.tar",
    "http://user:pl4nted-s3cret@mlflow.example:5000/path": "http://mlflow.example:5000/path",
    "http://user:pl4nted-s3cret%40x@mlflow.example": "http://mlflow.example",
    "http://pl4nted-s3cret@mlflow.example/": "http://mlflow.example/",
    "postgresql+psycopg2://user:pl4nted-s3cret@db/name?password=t0ken-of-a-signed-address": "postgresql+psycopg2://db/name",
    "s3://key:pl4nted-s3cret@bucket/a b.tar": "s3://bucket/a b.tar",
    "https://user:a@b:pl4nted-s3cret@host/x": "https://host/x",
    "https://[2001:db8::1]:8443/x?t0ken-of-a-signed-address": "https://[2001:db8::1]:8443/x",
    "sqlite:////store/mlflow.db": "sqlite:////store/mlflow.db",
    "https://host/x@y/z.tar": "https://host/x@y/z.tar",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(credentials.VARIABLE, "")
    monkeypatch.delenv(credentials.TRACKING_VARIABLE, raising=False)
    monkeypatch.setattr(credentials, "_taken", set())


def _silent(text: object) -> None:
    for planted in (SECRET, TOKEN, base64.b64encode(f"user:{SECRET}".encode()).decode()):
        assert planted not in str(text)


@pytest.mark.parametrize(("whole", "bare"), ADDRESSES.items())
def test_an_address_loses_its_secret_and_finds_it_again(whole: str, bare: str) -> None:
    assert credentials.hidden(whole) == bare
    assert credentials.revealed(bare) == whole
    assert credentials.hidden(bare) == bare
    _silent(credentials.redacted(f"GET {whole}: refused; '{whole}', ({whole})."))
    again = subprocess.run(
        [sys.executable, "-c", f"from yolov8_nas import credentials; print(credentials.revealed({bare!r}))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stdout.strip() == whole, "a child process knows it"


MALFORMED: Final = (
    "http://user:pl4nted/s3cret@host/x",
    "http://user:pl4nted?s3cret@host",
    "https://u:pl4nted-s3cret:x/y",
)


@pytest.mark.parametrize("address", MALFORMED)
def test_an_address_whose_password_cannot_be_told_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="%XX") as caught:
        RunConfig.parse({"data": address, "targets": []}, "run.yaml")
    assert "pl4nted" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def _planted(**changes: Any) -> dict[str, Any]:
    return {
        "name": "planted",
        "data": f"https://data.example/line3.tar?token={TOKEN}",
        "store": f"s3://bucket/store?{TOKEN}",
        "supernet": {"weights": f"https://user:{SECRET}@weights.example/yolov8n.pt?{TOKEN}"},
        "tracking": {"uri": f"http://user:{SECRET}@mlflow.example:5000"},
        "targets": [{"hardware": "cpu", "constraints": ["latency<=8ms"]}],
        **changes,
    }


WAYS_IN: Final[Mapping[str, Callable[[Path], RunConfig]]] = {
    "a file": lambda f: ((f / "run.yaml").write_text(yaml.safe_dump(_planted())), RunConfig.load(f / "run.yaml"))[1],
    "a parameter": lambda _: requested(json.dumps(_planted())),
    "plain data": lambda _: RunConfig.parse(_planted(), "NAS"),
    "the model itself": lambda _: RunConfig(**_planted()),
    "an override": lambda f: (
        (f / "run.yaml").write_text(yaml.safe_dump(_planted(tracking={}))),
        RunConfig.load(f / "run.yaml", [f"tracking.uri=http://user:{SECRET}@mlflow.example:5000"]),
    )[1],
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_configuration_shows_no_secret(way: str, tmp_path: Path) -> None:
    config = WAYS_IN[way](tmp_path)
    for shown in (
        config,
        config.to_json(),
        config.model_dump(),
        config.digest,
        RunConfig.parse(config.model_dump(), "x"),
    ):
        _silent(repr(shown))
    assert credentials.revealed(str(config.data)).endswith(TOKEN)
    assert SECRET in credentials.revealed(str(config.tracking.uri))
    uri = tracking.resolve_uri(config.tracking.uri, "store")
    assert uri == "http://mlflow.example:5000"
    assert credentials.taken(config.model_dump()) != []


FAULTS: Final = {
    "an unknown key": {"traking": {"uri": f"http://user:{SECRET}@host"}},
    "a value of another form": {"imgsz": f"http://user:{SECRET}@host?{TOKEN}"},
    "a list for a text": {"data": [f"https://host/x?{TOKEN}"]},
    "a text for a section": {"tracking": f"http://user:{SECRET}@host"},
    "the same address with two secrets": {"data": f"https://h/x?{TOKEN}", "space": f"https://h/x?{TOKEN}2"},
    "a target that is an address": {"targets": [f"http://user:{SECRET}@host"]},
    "an address inside a text": {"name": f"see http://user:{SECRET}@host?{TOKEN} there"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_configuration_shows_no_secret(fault: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(_planted(**FAULTS[fault])))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2, result.output
    _silent(result.output)


def test_what_is_no_yaml_shows_no_secret(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"tracking:\n  uri: http://user:{SECRET}@host: [\n")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "run.yaml"), "--set", f"http://user:{SECRET}@host"])
    assert result.exit_code == 2
    _silent(result.output)


def test_errors_logs_and_tracebacks_show_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    whole = f"http://user:{SECRET}@mlflow.example:5000"
    credentials.hidden(whole)
    before = logging.getLogRecordFactory()
    try:
        credentials.guard_logs()
        try:
            raise RuntimeError(f"API request to {whole}/api failed, sent Basic to {SECRET}")
        except RuntimeError:
            logging.getLogger("mlflow").exception("no answer from %s", whole)
    finally:
        logging.setLogRecordFactory(before)
    _silent(caplog.text)
    assert "no answer from http://mlflow.example:5000" in caplog.text
    _silent(InputError(f"{whole}/a/b?{TOKEN} said {SECRET}"))
    _silent(Progress.silent())


def test_the_address_of_the_environment_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = f"http://user:{SECRET}@mlflow.example:5000"
    monkeypatch.setenv(credentials.TRACKING_VARIABLE, whole)
    assert tracking.resolve_uri(None, "s3://bucket") == "http://mlflow.example:5000"
    assert credentials.revealed("http://mlflow.example:5000") == whole
    _silent(InputError(f"{whole}: {SECRET}"))


def test_a_cluster_is_not_given_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(_planted(supernet={}, store=None)))
    with pytest.raises(InputError, match="in the Secret yolov8-nas-credentials") as caught:
        request.make(tmp_path / "run.yaml", [], [])
    _silent(caught.value)
    monkeypatch.setenv(IN_CLUSTER, "10.0.0.1")
    with pytest.raises(InputError, match="in Kubeflow's record") as caught:
        open_run(requested(json.dumps(_planted())), store=str(tmp_path / "store"), run_id="r", output=tmp_path / "o")
    _silent(caught.value)


def test_a_run_with_data_at_a_signed_address_leaves_no_trace_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """open-run and data-prep for real: settings, manifest, records, MLflow's parameters and config.json."""
    tar = tmp_path / "data.tar"
    pack(_dataset(tmp_path / "data", "dent"), tar)
    content, heard = tar.read_bytes(), []

    def answer(asked: Any) -> None:
        heard.append(asked.path)
        first, last = asked.headers["Range"].removeprefix("bytes=").split("-") if asked.headers["Range"] else (0, -1)
        part = content[int(first) : int(last) + 1 or None]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        headers = {"ETag": '"1"', "Content-Length": str(len(part)), "Content-Range": place}
        web_server.headed(headers, part, 206 if asked.headers["Range"] else 200)(asked)

    work = tmp_path / "work"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with web_server.serving({"/line3.tar": answer}, tmp_path) as (address, certificate):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        settings = _planted(data=f"{address}/line3.tar?token={TOKEN}", store=None, supernet={}, tracking={})
        config = RunConfig.parse(settings, "run.yaml")
        opened = open_run(config, store=str(work / "store"), run_id="run-1", output=work / "run.json")
        run_stage(
            find_stage("data-prep"), config=config.to_json(), target=None, inputs={}, output=work / "data.tar",
            store=str(work / "store"), run_id="run-1",
        )  # fmt: skip
    assert any(TOKEN in path for path in heard), "the secret reaches the server"
    _silent(opened)
    _silent(capsys.readouterr())
    written = [path for path in work.rglob("*") if path.is_file()]
    assert {"config.json", "manifest.json", "mlflow.db", "run.json"} <= {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    params = tracking.connect(opened["tracking_uri"]).get_run(opened["mlflow_run"]).data.params
    assert params["data"] == f"{address}/line3.tar"


# No call home --------------------------------------------------------------------------------------------------------

_SCORING: Final = """
import sys, tempfile
from pathlib import Path
from yolov8_nas import quiet
import os
os.environ.update(quiet.ultralytics(Path(sys.argv[1]) / "ultralytics"))
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import ONLINE, SETTINGS
from ultralytics.utils.checks import check_font
check_det_dataset(str(Path(sys.argv[1]) / "data" / "data.yaml"), autodownload=False)
assert check_font("Arial.ttf") and check_font("Arial.Unicode.ttf")
assert not ONLINE and not SETTINGS["sync"]
import subprocess
subprocess.run([sys.executable, "-c", "import yolov8_nas, ultralytics, mlflow, plotly, kfp"], check=True)
"""


def test_nobody_is_asked_by_what_is_imported_and_by_reading_a_dataset(tmp_path: Path) -> None:
    _dataset(tmp_path / "data", "délié")
    described = yaml.safe_load((tmp_path / "data" / "data.yaml").read_text())
    (tmp_path / "data" / "data.yaml").write_text(yaml.safe_dump({**described, "path": str(tmp_path / "data")}))
    ours = {*quiet.ENVIRONMENT, "YOLO_CONFIG_DIR"}
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    with watched(tmp_path / "asked") as asked:
        command = [sys.executable, "-c", _SCORING, str(tmp_path)]
        environment = {**plain, **{name: os.environ[name] for name in ("PYTHONPATH", "LOOK_UPS")}}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert asked() == []


def test_the_witness_hears_whoever_asks(tmp_path: Path) -> None:
    code = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.getaddrinfo('nobody.invalid', 443)"
    with watched(tmp_path) as asked:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert any("nobody.invalid" in line for line in asked())


@pytest.mark.parametrize("variable", ["YOLO_OFFLINE", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"])
@pytest.mark.parametrize("file", ["Dockerfile", "mlflow.Dockerfile"])
def test_images_are_quiet(file: str, variable: str) -> None:
    if (file, variable) != ("mlflow.Dockerfile", "YOLO_OFFLINE"):
        assert f"{variable}=true" in (ROOT / "images" / file).read_text()


def test_security_md_tells_how_many_attacks_there_are() -> None:
    """A row is a name in one of the places where it is shown, or a way in which a secret could get out."""
    tests = [test for name, test in globals().items() if name.startswith("test_") and callable(test)]
    places = sum("name" in inspect.signature(test).parameters for test in tests)
    no_yaml = 1  # half a letter, which is in no dataset's YAML
    rows = places * len(HOSTILE) - no_yaml + sum(map(len, (OF_FILES, OF_VALUES, ADDRESSES, MALFORMED, WAYS_IN, FAULTS)))
    lines = (Path(__file__).parents[1] / "SECURITY.md").read_text().splitlines()
    (line,) = (line for line in lines if f"`tests/{Path(__file__).name}`" in line)
    assert line.endswith(f"| {rows} | {rows} |"), rows
