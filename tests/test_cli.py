"""The command line: what it offers, what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import fabricated
import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipelines.cli import app as cluster_app
from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.report.terminal import next_steps
from yolov8_nas.run import local, preflight
from yolov8_nas.runner import process
from yolov8_nas.runner.results.summary import Summary
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.derive import build, save_checkpoint

SETTINGS = {
    "name": "x",
    "space": "tiny",
    "imgsz": 64,
    "targets": [{"hardware": "cpu-1t", "constraints": ["latency<=80%stock"]}],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    return file


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Path]]:
    """Runs that were started, instead of being run."""
    calls: list[tuple[RunConfig, Path]] = []

    def run_pipeline(config: RunConfig, workdir: Path, console: Any) -> Summary:
        calls.append((config, workdir))
        return fabricated.summary()

    monkeypatch.setattr(local, "run_pipeline", run_pipeline)
    monkeypatch.setattr(preflight, "check_limits_apart", lambda config, names: [])
    return calls


def _invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_options_go_before_the_file(config: Path, tmp_path: Path, ran: list[tuple[RunConfig, Path]]) -> None:
    work = tmp_path / "work"
    result = _invoke(
        "run", config, "--workdir", work, "--hardware", "cpu", "--hardware", "cpu-1t", "--constraint", "latency<=8ms",
        "--constraint", "memory<=1GiB", "--precision", "int8", "--set", "supernet.epochs=3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((run, where),) = ran
    assert where == work
    assert run.supernet.epochs == 3
    assert [(t.hardware, t.precision, t.constraints) for t in run.targets] == [
        ("cpu", "int8", ("latency<=8ms", "memory<=1GiB")),
        ("cpu-1t", "int8", ("latency<=8ms", "memory<=1GiB")),
    ]


def test_relative_paths_are_of_the_folder_where_the_command_is_given(
    config: Path, tmp_path: Path, ran: list[tuple[RunConfig, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _invoke("data", "make-demo", "data", "--images", "24", "--size", "64").exit_code == 0
    assert _invoke("run", config, "--data", "data").exit_code == 0
    ((run, where),) = ran
    assert run.data == str(tmp_path / "data")
    assert where == Path("runs/x")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("data.yaml: missing"), 2, "error: data.yaml: missing"),
        (StageError("no summary"), 1, "failed: no summary"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_failures_are_one_message_and_a_status(
    config: Path, tmp_path: Path, ran: object, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int,
    told: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(local, "run_pipeline", fail)
    result = _invoke("run", config, "--workdir", tmp_path / "work")
    assert result.exit_code == status
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_a_failed_stage_ends_with_one(
    config: Path, tmp_path: Path, ran: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"name": "search", "target": "cpu-1t-fp32", "status": "failed", "error": "none keeps it"}
    summary = fabricated.summary(stages=[failed], status="failed")
    monkeypatch.setattr(local, "run_pipeline", lambda *_: summary)
    result = _invoke("run", config, "--workdir", tmp_path / "work")
    assert result.exit_code == 1
    assert "failed: search: none keeps it" in result.stderr


def test_a_work_folder_holds_one_run(config: Path, tmp_path: Path, ran: list[Any]) -> None:
    with local.held(tmp_path / "work"):
        result = _invoke("run", config, "--workdir", tmp_path / "work")
    assert result.exit_code == 2
    assert "another run is in it" in result.stderr
    assert not ran


def test_a_run_that_was_cut_short_keeps_its_name(tmp_path: Path) -> None:
    config = RunConfig.parse(SETTINGS, "test")
    other = RunConfig.parse({**SETTINGS, "seed": 1}, "test")
    first = local._run_id(config, tmp_path)
    assert local._run_id(config, tmp_path) == first
    assert local._run_id(other, tmp_path) != first
    last = local._run_id(config, tmp_path)
    local._finish(tmp_path)
    assert local._run_id(config, tmp_path) not in (first, last)


def test_export_writes_beside_the_model(tmp_path: Path) -> None:
    network = build(SearchSpace.load("tiny").smallest(), 2)
    save_checkpoint(network, tmp_path / "best.pt", names=["scratch", "dent"], imgsz=64)
    result = _invoke("export", tmp_path / "best.pt", "--dynamic", "--half")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'best.onnx'}" in result.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"best.pt", "best.onnx"}
    result = _invoke("export", tmp_path / "best.onnx")
    assert result.exit_code == 2
    assert "give the path of a .pt file" in result.stderr


@pytest.mark.parametrize(("shipped", "checkpoint"), [("int8", "qat.pt"), ("fp32", "best.pt")])
def test_export_of_a_run_is_of_what_it_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: str, checkpoint: str
) -> None:
    files = {name: f"models/cpu-best/{name}" for name in ("best.pt", "qat.pt", "model.onnx")}
    model = {**fabricated.figures(2.0), "files": files}
    target = fabricated.target(model=model, precision_shipped=shipped)
    fabricated.summary(target, fabricated.target()).write(tmp_path)
    (tmp_path / "models" / "cpu-best").mkdir(parents=True)
    asked: list[dict[str, Any]] = []

    def call(function: str, **arguments: Any) -> Path:
        asked.append(arguments)
        arguments["path"].write_bytes(b"onnx")
        return Path(arguments["path"])

    monkeypatch.setattr(process, "call", call)
    assert _invoke("export", tmp_path, "--imgsz", 96, "--batch", 4, "-o", tmp_path / "x.onnx").exit_code == 0
    (arguments,) = asked
    assert arguments["checkpoint"] == tmp_path / "models" / "cpu-best" / checkpoint
    assert (arguments["path"], arguments["imgsz"], arguments["batch"]) == (tmp_path / "x.onnx", 96, 4)
    fabricated.summary(target, target).write(tmp_path)
    result = _invoke("export", tmp_path)
    assert result.exit_code == 2
    assert "the run ships 2 models" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("best.pt", "--format", "tflite"), "use one of onnx, engine"),
        (("best.pt", "-o", "missing/best.onnx"), "there is no folder missing"),
        ((".",), "no summary.json"),
    ],
)
def test_what_export_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _invoke("export", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_log_stays_where_the_message_names_it_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert process.call_and_tell("builtins:dict", "adding", "", one=1).pop("one") == 1
    with pytest.raises(InputError), process.log_file("x"):
        raise InputError("the input's fault")
    assert not list(tmp_path.iterdir())
    with pytest.raises(StageError, match=r"TypeError: .*; see ") as failed:
        process.call_and_tell("json:loads", "reading", "", s="{}")  # which takes no `progress`
    (log,) = tmp_path.iterdir()
    assert str(log) in str(failed.value)
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("arguments", [("export", "best.pt"), ("models", "recheck")])
def test_commands_name_logs_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    def call(function: str, *, log: Path, **_: object) -> None:
        raise StageError(f"{function}: ZeroDivisionError; see {log}")

    monkeypatch.setattr(process, "call", call)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = _invoke(*arguments)
    assert result.exit_code == 1
    (log,) = tmp_path.iterdir()
    assert str(log) in result.stderr


def test_every_command_says_what_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    shown = _invoke("--help").output
    for command in ("demo", "run", "search", "export", "package", "analyze", "probe", "doctor", "compile"):
        assert f" {command} " in shown
        result = _invoke(command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output + capfd.readouterr().out  # those for a cluster run in a process of their own


def _leaves(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    parts = getattr(command, "commands", None)
    if parts is None:
        yield names, command
    for name, part in (parts or {}).items():
        yield from _leaves(part, (*names, name))


def test_every_command_gives_json() -> None:
    cluster = dict(_leaves(typer.main.get_command(cluster_app)))
    everything = {**dict(_leaves(typer.main.get_command(app))), **cluster}  # which the first only hands on
    assert ("submit",) in cluster and ("models", "show") in everything
    without = [names for names, command in everything.items() if not any("--json" in p.opts for p in command.params)]
    assert without == []


def _json_of(*arguments: object, status: int = 0) -> Any:
    result = _invoke(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_json_stands_alone_on_standard_output(
    config: Path, tmp_path: Path, ran: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = _json_of("data", "make-demo", "data", "--images", 24, "--size", 64)
    assert made == {"folder": "data", "images": 24, "size": 64, "seed": 0}
    checked = _json_of("data", "check", "data")
    assert sum(checked["images"].values()) == 24 and "scratch" in checked["classes"]
    begun = _json_of("init", "--data", "data", "--out", "begun.yaml", "--hardware", "cpu-1t")
    assert begun["file"] == "begun.yaml" and Path("begun.yaml").is_file()
    keys = _json_of("models", "make-key", "keys")
    assert Path(keys["private"]).is_file() and Path(keys["public"]).is_file()
    checks = {row["what"]: row for row in json.loads(_invoke("doctor", "--json").stdout)}
    assert checks["Python"]["ok"] is True
    assert _json_of("run", config, "--workdir", "work") == fabricated.summary().plain()


def test_json_of_a_failed_run_says_what_failed(
    config: Path, tmp_path: Path, ran: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"name": "search", "target": "cpu-1t-fp32", "status": "failed", "seconds": 1.0, "error": "none keeps it"}
    summary = fabricated.summary(stages=[failed], status="failed")
    monkeypatch.setattr(local, "run_pipeline", lambda *_: summary)
    assert _json_of("run", config, "--workdir", tmp_path / "work", status=1) == summary.plain()


def test_unusable_input_leaves_standard_output_empty(tmp_path: Path) -> None:
    for arguments in (("run", "missing.yaml"), ("data", "check", "missing"), ("models", "list", "--workdir", tmp_path)):
        result = _invoke(*arguments, "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1


def test_the_exit_statuses_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    table = page.partition("## Exit status")[2]
    assert set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE)) == {"0", "1", "2", "130"}


@pytest.mark.parametrize(
    ("shipped", "words"),
    [(0, "raise the limit"), (1, "package runs/x --out serving"), (2, "runs/x/models/TARGET/model.onnx")],
)
def test_a_run_ends_with_what_to_do_next(shipped: int, words: str) -> None:
    model = {"map50_95": 0.4, "map50": 0.6, "latency_ms": fabricated.latency(3.0), "memory_mb": None, "params": 1.0}
    entry = {"model": "press-shop", "version": 3, "aliases": ()}
    target = fabricated.target(model=model | {"gflops": 1.0, "files": {}}, registry=entry)
    summary = fabricated.summary(*[target] * shipped or [fabricated.target()])
    steps = next_steps(summary, Path("runs/x"))
    assert len(steps) <= 3
    assert any(words in step for step in steps)
    assert bool(shipped) == any("models show press-shop/3 --workdir runs/x" in step for step in steps)


def test_the_demo_and_the_examples_are_sound() -> None:
    root = Path(__file__).parents[1]
    examples = sorted((root / "examples").glob("*.yaml"))
    assert {"demo.yaml", "bccd.yaml"} <= {file.name for file in examples}
    for file in examples:
        RunConfig.load(file)
    assert (root / "examples" / "demo.yaml").read_text() == (root / "yolov8_nas" / "demo.yaml").read_text()


def test_probe_tells_what_this_machine_is() -> None:
    result = _invoke("probe", "--info", "--quick", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["kind"] == "cpu"
    assert _invoke("probe").exit_code == 2


def test_doctor_finds_this_installation_sound() -> None:
    result = _invoke("doctor")
    assert "torch 2.14.0" in result.output.replace("\n", " ")


def test_data_check_counts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert _invoke("data", "make-demo", data, "--images", "24", "--size", "64").exit_code == 0
    result = _invoke("data", "check", data)
    assert result.exit_code == 0, result.output
    assert "scratch" in result.output
    assert _invoke("data", "make-demo", data).exit_code == 2


def test_models_without_a_registry(tmp_path: Path) -> None:
    result = _invoke("models", "list", "--workdir", tmp_path)
    assert result.exit_code == 2
    assert "no registry there" in result.stderr
    assert not list(tmp_path.iterdir())


def test_compile_writes_a_pipeline(tmp_path: Path) -> None:
    out = tmp_path / "pipeline.yaml"
    assert _invoke("compile", "-o", out).exit_code == 0
    assert "yolov8-nas" in out.read_text()
    assert _invoke("compile", "-o", tmp_path / "missing" / "x.yaml").exit_code == 2


def test_the_package_is_the_command_line() -> None:
    told = [
        subprocess.run([sys.executable, "-m", *command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in (("yolov8_nas",), ("yolov8_nas.commands.main",))
    ]
    assert told[0] == told[1] == f"yolov8-nas {metadata.version('yolov8-nas')}\n"
