"""Keeping house in a stage store: what is in it, and what goes because nobody needs it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from yolov8_nas.commands.main import app
from yolov8_nas.errors import InputError
from yolov8_nas.files import write_json
from yolov8_nas.registry import needed, tracking
from yolov8_nas.runner.results import RegisterResult
from yolov8_nas.runner.stage import STAGES, open_store
from yolov8_nas.store import housekeeping


class Place:
    """A stage store with made-up results."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.age = 0

    def result(self, stage: str, key: str, size: int = 1000, *, done: bool = True) -> Path:
        folder = self.root / stage / key
        (folder / "outputs").mkdir(parents=True)
        (folder / "outputs" / "weights").write_bytes(b"x" * size)
        if done:
            write_json(folder / "manifest.json", {})
        return folder

    def run(self, name: str, **named: str) -> None:
        """Records of a run, older than those of every run before."""
        folder = self.root / "runs" / name
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"name": name})
        for stage, key in named.items():
            write_json(folder / f"all.{stage}.json", {"stage": stage.replace("_", "-"), "target": None, "key": key})
        self.age += 1000
        os.utime(folder, (2e9 - self.age, 2e9 - self.age))

    def there(self) -> set[str]:
        return {
            f"{path.parent.name}/{path.name}"
            for path in self.root.glob("*/*")
            if path.is_dir() and path.parent.name != "runs"
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Two runs that share a dataset, a result that no run names, one that is not done, and what all runs share."""
    place = Place(tmp_path / "store")
    for stage, key in (("data-prep", "d"), ("search", "new"), ("search", "old"), ("search", "orphan"), ("tables", "t")):
        place.result(stage, key)
    place.result("supernet-train", "half", done=False)
    place.run("second", data_prep="d", search="new")
    place.run("first", data_prep="d", search="old")
    waiting = place.root / "spool" / "1"
    waiting.mkdir(parents=True)
    write_json(waiting / "entry.json", {})
    return place


def _store(*arguments: object, place: Place) -> Any:
    return CliRunner().invoke(app, ["store", *map(str, arguments), "--store", str(place.root)])


def test_results_are_listed_with_who_needs_them(place: Place) -> None:
    items = {f"{item.stage}/{item.key}": item for item in housekeeping.survey(open_store(str(place.root)), STAGES)}
    assert items["data-prep/d"].runs == ("second", "first")
    assert items["search/orphan"].runs == ()
    assert (items["supernet-train/half"].state, items["tables/t"].state) == ("unfinished", "shared")
    assert "spool/1" not in items, "what waits for a tracking server is not the house's"
    assert 1000 <= items["search/new"].size < 2000
    shown = _store("list", place=place)
    assert shown.exit_code == 0 and "second and 1 more" in shown.output and "no run" in shown.output
    listed = json.loads(_store("list", "--json", place=place).stdout)
    assert {row["key"] for row in listed} == {"d", "new", "old", "orphan", "t", "half"}


def test_sizes_add_up(place: Place) -> None:
    content = json.loads(_store("size", "--json", place=place).stdout)
    assert content["bytes"] == sum(row["bytes"] for row in content["stages"].values())
    search = content["stages"]["search"]
    assert search["results"] == 3 and 1000 <= search["unneeded_bytes"] < 2000
    assert content["stages"]["tables"]["unneeded_bytes"] == 0
    assert "together" in _store("size", place=place).output


def test_only_what_no_run_needs_goes(place: Place) -> None:
    before = place.there()
    shown = _store("prune", "--dry-run", place=place)
    assert shown.exit_code == 0 and "orphan" in shown.output
    assert place.there() == before
    assert _store("prune", "--yes", place=place).exit_code == 0
    assert place.there() == before - {"search/orphan"}
    assert _store("prune", "--yes", "--unfinished", place=place).exit_code == 0
    assert place.there() == before - {"search/orphan", "supernet-train/half"}
    assert "nothing that nobody needs" in _store("prune", "--yes", place=place).output


def test_forgotten_runs_leave_what_newer_ones_need(place: Place) -> None:
    advised = place.root / "runs" / "advice-0"
    advised.mkdir()
    done = _store("prune", "--keep", "1", "--yes", "--json", place=place)
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["removed"] is True and content["runs"] == ["first"]
    assert {row["key"] for row in content["results"]} == {"old", "orphan"}
    assert "data-prep/d" in place.there() and "search/new" in place.there()
    assert {path.name for path in (place.root / "runs").iterdir()} == {"second", "advice-0"}


def test_it_asks_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = _store("prune", place=place)
    assert refused.exit_code == 2 and "give --yes, or --dry-run" in refused.stderr
    monkeypatch.setattr("yolov8_nas.commands.store._somebody_there", lambda: True)
    for answer, goes in (("n\n", False), ("y\n", True)):
        done = CliRunner().invoke(app, ["store", "prune", "--store", str(place.root)], input=answer)
        assert done.exit_code == 0, done.output
        assert ("search/orphan" not in place.there()) is goes


def test_what_somebody_works_on_stays(place: Place) -> None:
    with (place.root / "search" / "orphan" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = _store("prune", "--yes", place=place)
    assert done.exit_code == 0 and "still there" in done.output
    assert "search/orphan" in place.there()


def test_what_a_run_has_come_to_need_meanwhile_stays(place: Place) -> None:
    store = open_store(str(place.root))
    items = housekeeping.unneeded(housekeeping.survey(store, STAGES))
    place.run("third", search="orphan")
    assert housekeeping.remove(store, items) == items
    assert "search/orphan" in place.there()


def _registered(place: Place, **result: Any) -> None:
    folder = place.result("register", "r")
    RegisterResult(**{"model": "weld-seams", "tracking_uri": "", "reason": "", **result}).write(folder / "outputs")
    write_json(place.root / "runs" / "first" / "x.register.json", {"stage": "register", "target": "x", "key": "r"})


def test_a_run_of_which_a_version_is_registered_is_not_forgotten(place: Place, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    _registered(place, version=1, tracking_uri=uri)
    client = tracking.connect(uri)
    client.create_registered_model("weld-seams")
    version = client.create_model_version("weld-seams", str(tmp_path / "model"))
    assert needed.standing(open_store(str(place.root)), ["first"]) == {"first": "weld-seams version 1 is registered"}
    shown = _store("prune", "--keep", "1", "--yes", place=place)
    assert shown.exit_code == 0 and "run first is kept" in shown.output
    assert {"search/old", "register/r"} <= place.there()
    client.delete_model_version("weld-seams", version.version)
    assert needed.standing(open_store(str(place.root)), ["first"]) == {}


def test_a_version_that_waits_keeps_its_run(place: Place) -> None:
    _registered(place, spooled="spool/1")
    assert needed.standing(open_store(str(place.root)), ["first"]) == {
        "first": "a version of weld-seams waits to be registered"
    }


def test_without_an_answer_of_the_registry_nothing_is_forgotten(place: Place) -> None:
    _registered(place, version=1, tracking_uri="http://127.0.0.1:9")
    before = place.there()
    refused = _store("prune", "--keep", "1", "--yes", place=place)
    assert refused.exit_code == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert place.there() == before


@pytest.mark.parametrize("command", ["list", "size", "prune"])
@pytest.mark.parametrize(("store", "says"), [("missing", "no stage store"), ("s3://bucket/x", "stores in folders")])
def test_what_is_no_store_is_refused_in_one_line(
    tmp_path: Path, command: str, store: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["store", command, "--store", store, *(["--yes"] if command == "prune" else [])])
    assert shown.exit_code == 2
    assert len(shown.stderr.strip().splitlines()) == 1 and says in shown.stderr
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_read_stops_it(place: Place) -> None:
    (place.root / "runs" / "first" / "all.search.json").write_text("{")
    before = place.there()
    refused = _store("prune", "--yes", place=place)
    assert refused.exit_code == 2 and "all.search.json" in refused.stderr
    assert place.there() == before
    with pytest.raises(InputError):
        housekeeping.needs(open_store(str(place.root)))
