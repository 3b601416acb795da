"""`run_stage`: one way to run a stage, with state, retry, failure as data and an end that is always recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_settings import Plain

from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import InputError, StageError, WaitingError
from yolov8_nas.files import read_json, write_json
from yolov8_nas.runner import stage as stages
from yolov8_nas.runner.stage import Outcome, Stage, StageContext, find_target, open_store, run_stage, target_labels

CONFIG = RunConfig(targets=(TargetConfig(hardware="cpu", constraints=("latency<=80%stock",)),))
TARGET = "cpu-fp32"


class Bench:
    """A store, and stages that are run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0

    def stage(self, body: Callable[[StageContext], None] | None = None, name: str = "search", **changes: Any) -> Stage:
        def run(ctx: StageContext) -> None:
            self.calls += 1
            (body or _write)(ctx)

        return Stage(**{"name": name, "version": 1, "settings": lambda c, t: Plain(seed=c.seed), "run": run, **changes})

    def run(self, stage: Stage, target: str | None = TARGET, config: RunConfig = CONFIG, **given: Any) -> Outcome:
        given = {"inputs": {}, "run_id": "run-1", "output": self.tar(stage.name), **given}
        return run_stage(stage, config=config, target=target, store=self.folder / "store", **given)

    def tar(self, name: str) -> Path:
        return self.folder / f"{name}.tar"

    def read(self, name: str, member: str) -> str:
        with tarfile.open(self.tar(name)) as tar:
            file = tar.extractfile(member)
            assert file is not None
            return file.read().decode()

    def record(self, stage: str, run_id: str = "run-1", target: str = TARGET) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self.folder / "store" / "runs" / run_id / f"{target}.{stage}.json")
        return content


def _write(ctx: StageContext) -> None:
    (ctx.out / "result.txt").write_text(f"seed {ctx.settings.seed}")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(stages, "RETRY_DELAYS", (0.0, 0.0))
    return Bench(tmp_path)


def test_a_finished_stage_is_not_run_again(bench: Bench) -> None:
    first = bench.run(bench.stage())
    second = bench.run(bench.stage(), run_id="run-2")
    assert (first.status, second.status, bench.calls) == ("done", "cached", 1)
    assert first.digest == second.digest
    assert (first.key, bench.record("search", "run-2")["status"]) == (second.key, "cached")
    manifest = open_store(bench.folder / "store").entry("search", first.key).manifest
    assert manifest is not None
    assert (manifest.seed, manifest.digest) == (0, first.digest)
    assert manifest.peak_rss_mib > 10
    assert "torch" in manifest.tools


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"settings": lambda c, t: Plain(seed=c.seed, more=1)},
    ],
)
def test_what_the_result_depends_on_is_in_the_key(bench: Bench, change: dict[str, Any]) -> None:
    bench.run(bench.stage())
    bench.run(bench.stage(**change))
    assert bench.calls == 2


def test_parameters_and_inputs_are_in_the_key(bench: Bench) -> None:
    prep = bench.stage(name="data-prep")
    bench.run(prep, target=None)
    inputs = {"data-prep": bench.tar("data-prep")}
    keys = {
        bench.run(bench.stage()).key,
        bench.run(bench.stage(complete=Plain), parameters={"num_classes": 3}).key,
        bench.run(bench.stage(), inputs=inputs).key,
    }
    bench.run(prep, target=None, config=CONFIG.model_copy(update={"seed": 1}))
    keys.add(bench.run(bench.stage(), inputs=inputs).key)
    assert len(keys) == 4


def test_a_stage_sees_its_inputs_unpacked(bench: Bench) -> None:
    seen = []
    bench.run(bench.stage(name="data-prep"), target=None)
    bench.run(
        bench.stage(lambda ctx: seen.append((ctx.inputs["data-prep"] / "result.txt").read_text())),
        inputs={"data-prep": bench.tar("data-prep")},
    )
    assert seen == ["seed 0"]


def test_a_damaged_result_is_computed_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    first = bench.run(bench.stage())
    entry = open_store(bench.folder / "store").entry("search", first.key)
    (entry.outputs / "result.txt").write_text("tampered")
    again = bench.run(bench.stage())
    assert (again.status, again.digest, bench.calls) == ("done", first.digest, 2)
    assert "result.txt has changed" in capsys.readouterr().out


def test_an_input_that_changed_on_its_way_is_refused(bench: Bench) -> None:
    sent = bench.run(bench.stage(name="data-prep"), target=None)
    inputs = {"data-prep": bench.tar("data-prep")}
    assert bench.run(bench.stage(), inputs=inputs, digests={"data-prep": sent.digest}).status == "done"
    arrived = bench.run(bench.stage(), inputs=inputs, digests={"data-prep": "0" * 64})
    assert arrived.status == "failed"
    assert "arrived with SHA-256" in (arrived.error or "")


@pytest.mark.parametrize("error", [StageError("no network keeps it"), InputError("no network keeps it")])
def test_the_failure_of_a_target_travels_on(bench: Bench, error: Exception) -> None:
    def fail(ctx: StageContext) -> None:
        (ctx.out / "tried.txt").write_text("all of them")
        (ctx.partial / "checkpoint").write_text("useless")
        raise error

    failed = bench.run(bench.stage(fail))
    assert (failed.status, failed.error) == ("failed", "no network keeps it")
    assert bench.read("search", "tried.txt") == "all of them"
    assert json.loads(bench.read("search", "status.json"))["kind"] == type(error).__name__
    after = bench.stage(name="qat-finetune")
    passed = bench.run(after, inputs={"search": bench.tar("search")})
    assert (passed.status, passed.error) == ("failed", "not run, because search failed")
    last = bench.run(bench.stage(name="register"), inputs={"qat-finetune": bench.tar("qat-finetune")})
    assert last.error == "not run, because search failed"
    assert bench.calls == 1
    assert bench.record("register")["status"] == "failed"


def test_a_stage_that_waits_goes_on_where_it_was_in_a_new_run(bench: Bench) -> None:
    def wait(ctx: StageContext) -> None:
        if (ctx.partial / "scores").exists():
            return
        (ctx.partial / "scores").write_text("so far")
        raise WaitingError("measure it there")

    assert bench.run(bench.stage(wait)).error == "measure it there"
    assert bench.run(bench.stage(wait), run_id="run-2").status == "done"


def test_a_failure_is_not_tried_again_in_its_run_but_in_a_new_one(bench: Bench) -> None:
    def fail(ctx: StageContext) -> None:
        assert not list(ctx.partial.iterdir()), "a new run starts afresh"
        (ctx.partial / "checkpoint").write_text("useless")
        raise StageError("the fit is poor")

    for _ in range(2):
        assert bench.run(bench.stage(fail)).error == "the fit is poor"
    assert bench.calls == 1
    assert bench.run(bench.stage(fail), run_id="run-2").error == "the fit is poor"
    assert bench.calls == 2


def test_a_shared_stage_raises(bench: Bench) -> None:
    def fail(_: StageContext) -> None:
        raise InputError("data.yaml: missing")

    with pytest.raises(InputError, match=r"data.yaml: missing"):
        bench.run(bench.stage(fail, name="data-prep"), target=None)
    assert bench.record("data-prep", target="all")["error"] == "data.yaml: missing"


def test_nothing_is_done_for_targets_that_are_all_lost(bench: Bench) -> None:
    def fail(ctx: StageContext) -> None:
        raise StageError("nothing keeps the limit")

    bench.run(bench.stage(fail, "hw-probe"))
    with pytest.raises(StageError, match=f"every target has failed already: {TARGET} in hw-probe"):
        bench.run(bench.stage(name="supernet-train"), target=None)
    assert bench.calls == 1
    bench.run(bench.stage(name="supernet-train"), target=None, run_id="run-2")
    assert bench.calls == 2


def test_a_bug_keeps_the_checkpoints(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def fail(ctx: StageContext) -> None:
        seen.append([path.name for path in ctx.partial.iterdir()])
        (ctx.partial / "checkpoint").write_text("epoch 3")
        raise ZeroDivisionError("oops")

    outcome = bench.run(bench.stage(fail))
    assert outcome.error == "ZeroDivisionError: oops"
    assert "Traceback" in capfd.readouterr().err
    bench.run(bench.stage(fail), run_id="run-2")
    assert seen == [[], ["checkpoint"]]


class _MlflowError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__("server said no")
        self.status = status

    def get_http_status_code(self) -> int:
        return self.status


@pytest.mark.parametrize(
    ("error", "calls"),
    [(ConnectionResetError("reset"), 3), (TimeoutError("slow"), 3), (_MlflowError(503), 3), (_MlflowError(400), 1)],
)
def test_only_what_is_transient_is_retried(bench: Bench, error: Exception, calls: int) -> None:
    def fail(ctx: StageContext) -> None:
        (ctx.out / f"leftover-{bench.calls}").write_text("x")
        raise error

    assert bench.run(bench.stage(fail)).status == "failed"
    assert bench.calls == calls


def test_a_retry_that_helps(bench: Bench) -> None:
    def flaky(ctx: StageContext) -> None:
        (ctx.out / f"try-{bench.calls}").write_text("x")
        if bench.calls < 3:
            raise ConnectionError("not yet")

    assert bench.run(bench.stage(flaky)).status == "done"
    with tarfile.open(bench.tar("search")) as tar:
        assert tar.getnames() == ["try-3"], "what earlier tries wrote is gone"


def test_a_stage_with_outside_effects_always_runs(bench: Bench) -> None:
    for _ in range(2):
        assert bench.run(bench.stage(name="register", always_run=True)).status == "done"
    assert bench.calls == 2


def test_a_record_of_work_is_not_replaced_by_finding_it_done(bench: Bench) -> None:
    bench.run(bench.stage())
    assert bench.run(bench.stage()).status == "cached"
    assert bench.record("search")["status"] == "done"


def test_log_files_catch_child_processes_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(stages.LOGS_VARIABLE, str(bench.folder / "logs"))

    def chatter(ctx: StageContext) -> None:
        os.write(1, b"from this process\n")
        subprocess.run(["echo", "from a child"], check=True)

    bench.run(bench.stage(chatter))
    os.write(1, b"after\n")
    log = (bench.folder / "logs" / f"{TARGET}.search.log").read_text()
    assert "from this process" in log
    assert "from a child" in log
    assert capfd.readouterr().out.endswith("after\n")


def test_targets_have_distinct_labels() -> None:
    def target(**settings: Any) -> TargetConfig:
        return TargetConfig(**{"constraints": ("latency<=8ms",), **settings})

    config = RunConfig(
        targets=(
            target(hardware="cpu-2t", precision="int8"),
            target(hardware="cpu-2t", precision="int8", constraints=("latency<=9ms",)),
            target(hardware="NVIDIA_T4", precision="fp16"),
        )
    )
    assert target_labels(config) == ["cpu-2t-int8-1", "cpu-2t-int8-2", "nvidia-t4-fp16"]
    assert find_target(config, "cpu-2t-int8-2").constraints == ("latency<=9ms",)
    with pytest.raises(InputError, match="nvidia-t4-fp16"):
        find_target(config, "gpu")


def test_a_store_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="gs://bucket/store"):
        open_store("gs://bucket/store")


WORKER = """
    import os, signal, sys, time
    from pathlib import Path
    from yolov8_nas.config import RunConfig, TargetConfig
    from yolov8_nas.files import atomic_write
    from yolov8_nas.runner.settings import StageSettings
    from yolov8_nas.runner.stage import Stage, run_stage

    folder, kill = Path(sys.argv[1]), sys.argv[2] == "kill"

    def run(ctx):
        file = ctx.partial / "epochs"
        done = len(file.read_text()) if file.exists() else 0
        for epoch in range(done, 4):
            with (folder / "trained").open("a") as log:
                log.write(f"{epoch}\\n")
            atomic_write(file, "x" * (epoch + 1))
            if kill and epoch == 1:
                (ctx.out / "half").write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)
        (ctx.out / "weights").write_text("trained")

    target = TargetConfig(hardware="cpu", constraints=("latency<=8ms",))
    stage = Stage("supernet-train", 1, lambda c, t: StageSettings(), run)
    outcome = run_stage(stage, config=RunConfig(targets=(target,)), target=None, inputs={}, output=folder / "out.tar",
                        store=folder / "store", run_id="r")
    print(outcome.status)
"""


def test_a_killed_stage_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path)]
    killed = subprocess.run([*command, "kill"], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    again = subprocess.run([*command, "go on"], check=True, capture_output=True, text=True)
    assert again.stdout.splitlines()[-1] == "done"
    assert (tmp_path / "trained").read_text().split() == ["0", "1", "2", "3"]
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert tar.getnames() == ["weights"]


CHILD = (
    "import os, time; from yolov8_nas.runner.stage import die_with_parent; die_with_parent();"
    "print(os.getpid(), flush=True); time.sleep(60)"
)
PARENT = f"""
    import os, subprocess, sys
    environment = {{**os.environ, "YOLOV8_NAS_PARENT": str(os.getpid())}}
    subprocess.run(["sh", "-c", 'exec 3>&1; "$0" -c "$1"; true', sys.executable, {CHILD!r}], env=environment)
"""


def test_a_stage_ends_with_the_command_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not _alive(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the stage outlived its parent")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Part:
    """A stage whose result has a part that it shares, and what making that part does."""

    def __init__(self, body: Callable[[StageContext], None] | None = None) -> None:
        self.body = body
        self.made = 0

    def __call__(self, ctx: StageContext) -> None:
        ctx.share("tables", 1, Plain(device="a"), self.make)
        (ctx.out / "own.txt").write_text(f"seed {ctx.settings.seed}")

    def make(self, ctx: StageContext) -> None:
        assert ctx.settings == Plain(device="a")
        self.made += 1
        (ctx.out / "table.txt").write_text("rows")
        if self.body:
            self.body(ctx)


def other_seed(number: int) -> RunConfig:
    return CONFIG.model_copy(update={"seed": number})


def test_a_shared_part_is_made_once_whatever_else_changes(bench: Bench) -> None:
    part = Part()
    for number in range(3):
        bench.run(bench.stage(part), config=other_seed(number))
        assert (bench.read("search", "table.txt"), bench.read("search", "own.txt")) == ("rows", f"seed {number}")
    assert (bench.calls, part.made) == (3, 1)


def test_what_finding_a_shared_part_spared_is_recorded(bench: Bench) -> None:
    part = Part()
    bench.run(bench.stage(part))
    assert bench.record("search")["seconds_spared"] == 0
    (manifest,) = (bench.folder / "store" / "tables").glob("*/manifest.json")
    write_json(manifest, {**read_json(manifest), "seconds": 1e6})
    bench.run(bench.stage(part), config=other_seed(1))
    assert bench.record("search")["seconds_spared"] == pytest.approx(1e6, rel=0.01)


def test_a_damaged_shared_part_is_made_again(bench: Bench) -> None:
    part = Part()
    bench.run(bench.stage(part))
    (table,) = (bench.folder / "store" / "tables").glob("*/outputs/table.txt")
    table.write_text("other rows")
    bench.run(bench.stage(part), config=other_seed(1))
    assert (bench.read("search", "table.txt"), part.made) == ("rows", 2)


@pytest.mark.parametrize(
    ("error", "kept"), [(StageError("a poor fit"), False), (KeyError("killed"), True)], ids=["failed", "interrupted"]
)
def test_a_shared_part_that_was_not_finished_is_no_result(bench: Bench, error: Exception, kept: bool) -> None:
    found: list[bool] = []

    def fail_once(ctx: StageContext) -> None:
        found.append((ctx.partial / "checkpoint").exists())
        (ctx.partial / "checkpoint").write_text("so far")
        if len(found) == 1:
            raise error

    part = Part(fail_once)
    assert bench.run(bench.stage(part)).status == "failed"
    assert bench.run(bench.stage(part), run_id="run-2").status == "done"
    assert found == [False, kept]
    assert bench.run(bench.stage(part), run_id="run-3", config=other_seed(1)).status == "done"
    assert part.made == 2


def test_what_a_failed_shared_part_had_written_is_evidence(bench: Bench) -> None:
    def fail(_: StageContext) -> None:
        raise StageError("a poor fit")

    assert bench.run(bench.stage(Part(fail))).error == "a poor fit"
    assert bench.read("search", "table.txt") == "rows"
