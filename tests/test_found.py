"""What is in the store before a step begins, so that a step that only reads asks for no device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import pytest

from components.placement import Pod, branches, trained_by
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import write_json
from yolov8_nas.measure import target as targets
from yolov8_nas.run import found
from yolov8_nas.run.found import BRANCH, branch_keys, pick_up, probe_keys, stage_key
from yolov8_nas.run.lifecycle import IN_CLUSTER
from yolov8_nas.run.summary import RUN_FILE
from yolov8_nas.runner.stage import Outcome, StageContext, open_store, run_stage
from yolov8_nas.stages import find_stage
from yolov8_nas.store.archive import extract

LABEL = "cpu-1t-fp32"
TARGET = {"hardware": "cpu-1t", "precision": "fp32", "constraints": ["latency<=60s"]}
CONFIG = RunConfig.parse({"space": "tiny", "imgsz": 64, "targets": [TARGET]}, "test")
TAKES = {"data-prep": (), "supernet-train": ("data-prep",), "hw-probe": (), **BRANCH}
CLASSES = {"num_classes": 2}


class Played:
    """A run whose stages have their own settings, and whose work is played."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(folder / "store")
        self.digests: dict[str, str] = {}
        self.store.record("run", RUN_FILE, {"config": CONFIG.model_dump(mode="json")})

    def play(self, name: str, body: Callable[[StageContext[Any]], None] | None = None, **more: Any) -> Outcome:
        def write(ctx: StageContext[Any]) -> None:
            (ctx.out / "result.txt").write_text(name)

        outcome = run_stage(
            replace(find_stage(name), run=body or write, watched=False),
            config=CONFIG,
            target=None if name in ("data-prep", "supernet-train") else LABEL,
            inputs={one: self.folder / f"{one}.tar" for one in TAKES[name]},
            output=self.folder / f"{name}.tar",
            store=self.folder / "store",
            run_id="run",
            parameters=CLASSES if name == "hw-probe" else None,
            **more,
        )
        self.digests[name] = outcome.digest
        return outcome

    def lose(self, name: str, outcome: Outcome) -> None:
        self.store.entry(name, outcome.key).clear(partial=True)


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setenv(IN_CLUSTER, "10.0.0.1")
    return Played(tmp_path)


def test_what_is_found_ends_with_the_first_result_that_is_not_there(played: Played) -> None:
    done = {name: played.play(name) for name in TAKES}
    assert stage_key("supernet-train", CONFIG, {"data-prep": played.digests["data-prep"]}, played.store) == (
        done["supernet-train"].key,
        played.digests["supernet-train"],
    )
    keys = branch_keys(CONFIG, LABEL, played.digests, played.store)
    assert keys == {name: done[name].key for name in BRANCH}
    played.lose("trt-export", done["trt-export"])
    assert branch_keys(CONFIG, LABEL, played.digests, played.store).keys() == {"search", "qat-finetune"}
    played.lose("search", done["search"])
    assert branch_keys(CONFIG, LABEL, played.digests, played.store) == {}
    other = CONFIG.model_copy(update={"seed": 7})
    assert stage_key("supernet-train", other, {"data-prep": played.digests["data-prep"]}, played.store) is None


def test_a_device_is_looked_at_where_anything_is_left_to_compute(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {name: played.play(name) for name in TAKES}

    def elsewhere(*_: Any) -> Any:
        raise AssertionError("the device is not here")

    monkeypatch.setattr(targets, "resolve", elsewhere)
    assert probe_keys(CONFIG, 2, played.store) == {LABEL: done["hw-probe"].key}
    assert probe_keys(CONFIG, 3, played.store) == {}, "of other classes nothing was measured"
    played.lose("trt-export", done["trt-export"])
    assert probe_keys(CONFIG, 2, played.store) == {}


@pytest.mark.parametrize("settings", [{}, {"device": "an older form"}, None, "{"])
def test_a_record_that_tells_no_device_is_passed_over(played: Played, settings: Any) -> None:
    done = {name: played.play(name) for name in TAKES}
    newer = played.store.run_folder("newer")
    played.store.record("newer", RUN_FILE, {"config": CONFIG.model_dump(mode="json")})
    record = fabricated.stage_record("hw-probe", LABEL)
    if settings == "{":
        (newer / f"{LABEL}.hw-probe.json").write_text(settings)
    else:
        played.store.record("newer", f"{LABEL}.hw-probe.json", record | {"settings": settings})
    os.utime(newer, (4e9, 4e9))
    assert played.store.runs()[0] == "newer"
    assert probe_keys(CONFIG, 2, played.store) == {LABEL: done["hw-probe"].key}


def test_settings_that_a_stage_refuses_are_left_to_the_stage(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TAKES:
        played.play(name)

    def refuse(*_: Any) -> Any:
        raise InputError("search: not so")

    monkeypatch.setattr(found, "find_stage", lambda name: replace(find_stage(name), settings=refuse))
    assert branch_keys(CONFIG, LABEL, played.digests, played.store) == {}
    assert stage_key("supernet-train", CONFIG, {"data-prep": played.digests["data-prep"]}, played.store) is None


def test_on_one_machine_nothing_is_looked_up(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TAKES:
        played.play(name)
    monkeypatch.delenv(IN_CLUSTER)
    monkeypatch.setattr(found, "find_stage", lambda name: pytest.fail(f"the settings of {name} are put together"))
    assert probe_keys(CONFIG, 2, played.store) == {}
    assert branch_keys(CONFIG, LABEL, played.digests, played.store) == {}


def test_a_probe_is_picked_up_with_what_comes_after_it(played: Played) -> None:
    for name in TAKES:
        played.play(name)
    picked = played.folder / "picked.tar"
    digest, keys = pick_up(CONFIG, LABEL, store=str(played.folder / "store"), run_id="run", output=picked)
    assert digest == played.digests["hw-probe"] and keys.keys() == BRANCH.keys()
    extract(picked, played.folder / "picked")
    assert (played.folder / "picked" / "result.txt").read_text() == "hw-probe"


def test_a_probe_that_failed_is_passed_on(played: Played) -> None:
    def fail(ctx: StageContext[Any]) -> None:
        raise StageError("nothing keeps the limit")

    for name in ("data-prep", "supernet-train"):
        played.play(name)
    played.play("hw-probe", fail)
    _, keys = pick_up(
        CONFIG, LABEL, store=str(played.folder / "store"), run_id="run", output=played.folder / "hw-probe.tar"
    )
    assert keys == {}
    after = played.play("search")
    assert (after.status, after.error) == ("failed", "not run, because hw-probe failed")


def test_without_a_record_there_is_nothing_to_pick_up(played: Played) -> None:
    with pytest.raises(StageError, match="data-prep has left no record in this run; start the run again"):
        pick_up(CONFIG, LABEL, store=str(played.folder / "store"), run_id="run", output=played.folder / "x.tar")


@pytest.mark.parametrize("gone", ["lost", "damaged", "of other inputs"])
def test_a_step_with_room_to_read_computes_nothing(played: Played, gone: str) -> None:
    done = {name: played.play(name) for name in TAKES}
    key = done["search"].key
    assert played.play("search", found=key).status == "cached"
    entry = played.store.entry("search", key)
    if gone == "lost":
        played.lose("search", done["search"])
    elif gone == "damaged":
        (entry.outputs / "result.txt").write_text("something else")
    else:
        manifest = entry.manifest
        assert manifest is not None
        write_json(entry.manifest_file, {**vars(manifest), "inputs": {}})
    computed = []
    failed = played.play("search", lambda ctx: computed.append(ctx), found=key)
    assert failed.status == "failed" and "is no longer there, or damaged; start the run again" in str(failed.error)
    assert not computed
    if gone != "of other inputs":
        assert branch_keys(CONFIG, LABEL, {**played.digests, "hw-probe": done["hw-probe"].digest}, played.store) == {}
        assert played.play("search").status == "done", "the next run computes it"


def test_a_step_that_reads_goes_to_any_node() -> None:
    t4 = {"hardware": "NVIDIA_T4", "precision": "fp16", "constraints": ["latency<=2ms"]}
    config = RunConfig.parse({"space": "tiny", "imgsz": 64, "targets": [t4]}, "test")
    (branch,) = branches(config, {}, [{"key": "nvidia.com/gpu", "operator": "Exists"}])
    computes, reads = branch.plain(), branch.plain("a" * 64)
    assert computes["gpus"] == "1" and computes["node_affinity"] and computes["tolerations"] and not computes["found"]
    assert (reads["gpus"], reads["node_affinity"], reads["tolerations"]) == ("0", {}, [])
    assert reads["found"] == "a" * 64 and reads.keys() == computes.keys()
    training = Pod("8", "64", "512Gi", {"pool": "a100"}, [])
    assert training.outputs("tuning", "labels", "")["tuning_memory"] == "512Gi"
    assert training.outputs("tuning", "labels", "b" * 64) == {
        "tuning_found": "b" * 64,
        "tuning_gpus": "0",
        "tuning_cpu": "500m",
        "tuning_memory": "2Gi",
        "tuning_labels": {},
        "tuning_tolerations": [],
    }


def test_a_supernet_is_looked_for_as_the_nodes_that_train_see_it() -> None:
    assert trained_by(CONFIG, 1, 4).supernet.processes == 4
    assert trained_by(CONFIG, 2, 4).supernet.processes == 8
    two = CONFIG.model_copy(update={"supernet": CONFIG.supernet.model_copy(update={"processes": 2})})
    assert trained_by(two, 1, 8).supernet.processes == 2
