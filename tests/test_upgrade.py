"""What an older version wrote is read, or refused in one line. docs/upgrade.md tells what is done with it.

`older/9ec0985` is a stage store that the first version with one wrote (commit 9ec0985).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from plain_settings import Plain
from registering import Branch
from typer.testing import CliRunner

from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.files import read_json, write_json
from yolov8_nas.registry import tracking
from yolov8_nas.registry.register import MODEL_ID, STATE
from yolov8_nas.runner.stage import Outcome, Stage, StageContext, run_stage

OLDEST = Path(__file__).parent / "older" / "9ec0985"
CONFIG = RunConfig(targets=(TargetConfig(hardware="cpu", constraints=("latency<=80%stock",)),))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLDEST, tmp_path / "store"))


def _run(store: Path, version: int) -> Outcome:
    def write(ctx: StageContext[Any]) -> None:
        (ctx.out / "result.txt").write_text("written by this version\n")

    stage = Stage("search", version, lambda config, target: Plain(seed=config.seed), write)
    return run_stage(
        stage,
        config=CONFIG,
        target="cpu-fp32",
        inputs={},
        output=store.parent / "out.tar",
        store=store,
        run_id="run-2",
    )


def test_a_stage_that_computes_the_same_takes_what_the_first_version_wrote(store: Path) -> None:
    outcome = _run(store, version=1)
    assert outcome.status == "cached"
    assert (store / "search" / outcome.key / "outputs" / "result.txt").read_text() == "written by the first version\n"


def test_a_stage_that_computes_something_else_runs_again_and_leaves_the_old_result(store: Path) -> None:
    (old,) = (store / "search").iterdir()
    outcome = _run(store, version=2)
    assert outcome.status == "done" and outcome.key != old.name
    assert (old / "outputs" / "result.txt").is_file()


def test_a_manifest_of_another_release_does_not_count_and_is_told_in_one_line(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old,) = (store / "search").iterdir()
    write_json(old / "manifest.json", {**read_json(old / "manifest.json"), "shards": 3})
    assert _run(store, version=1).status == "done"
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "manifest" in line]
    assert "not a manifest of this release ('shards' in it)" in told


def test_an_old_store_is_looked_after(store: Path) -> None:
    result = CliRunner().invoke(app, ["store", "list", "--store", str(store), "--json"])
    assert result.exit_code == 0, result.output
    (item,) = json.loads(result.stdout)
    assert (item["stage"], item["state"], item["runs"]) == ("search", "done", ["run-1"])


def test_a_configuration_with_a_key_that_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("targets: [{constraints: [latency<=8ms]}]\nfinetune: {from_scratch: true}\n")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "old.yaml")])
    assert result.exit_code == 2
    (told,) = result.stderr.splitlines()
    assert "write start: scratch in place of from_scratch: true" in told


def test_a_version_without_what_was_added_later_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    uri = tracking.resolve_uri(None, tmp_path / "store")
    branch = Branch(uri, "old-model", tmp_path)
    branch.register()
    client = tracking.connect(uri)
    (version,) = client.search_model_versions("name = 'old-model'")
    later = sorted(set(version.tags) - {STATE, MODEL_ID})
    assert {"license", "purpose", "file"} <= set(later)
    commands = {
        "list": ["list", "old-model"],
        "show": ["show", "old-model/1"],
        "show all": ["show", "old-model/1", "--all"],
        "best": ["best", "--hardware", "cpu-2t", "--max-latency", "9", "--model", "old-model"],
        "pull": ["pull", "old-model/1", str(tmp_path / "pulled")],
        "compare": ["compare", "old-model/1", "old-model/1"],
    }
    logged = client.get_logged_model(version.tags[MODEL_ID]).tags
    for tag in later:
        client.delete_model_version_tag("old-model", "1", tag)
        if tag in logged:
            client.delete_logged_model_tag(version.tags[MODEL_ID], tag)
    for name, arguments in commands.items():
        result = CliRunner().invoke(app, ["models", *arguments, "--tracking", uri])
        assert "Traceback" not in result.output, name
        if name in ("list", "show", "show all"):
            assert result.exit_code == 0, result.output
        elif result.exit_code:
            assert result.exit_code in (1, 2) and len(result.stderr.splitlines()) == 1, (name, result.output)
