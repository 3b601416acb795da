"""Stages of a target that are killed or crash: the target is lost, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components import step
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.files import read_json
from yolov8_nas.runner import guarded
from yolov8_nas.runner.guarded import EndedError, call, used_memory
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import Stage, StageContext

CONFIG = RunConfig.parse(
    {"space": "tiny", "imgsz": 64, "targets": [{"hardware": "cpu-1t", "constraints": ["latency<=9ms"]}]}, "test"
)
LABEL = "cpu-1t-fp32"


def _raise(error: Exception) -> Any:
    raise error


def test_what_comes_back_is_what_came_out() -> None:
    assert call(lambda: {"pid": os.getpid()})["pid"] != os.getpid()
    with pytest.raises(InputError, match="no images"):
        call(lambda: _raise(InputError("no images")))

    class OfThisTest(Exception):
        pass

    with pytest.raises(RuntimeError, match="OfThisTest: cannot travel"):
        call(lambda: _raise(OfThisTest("cannot travel")))


@pytest.mark.parametrize(
    ("by", "told"), [(signal.SIGKILL, "want of memory"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGABRT, "SIGABRT")]
)
def test_a_violent_end_is_an_answer(by: signal.Signals, told: str) -> None:
    with pytest.raises(EndedError, match=told):
        call(lambda: os.kill(os.getpid(), by))


def test_what_fills_its_memory_is_ended_and_its_children_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "LOOK_EVERY", 0.01)

    def work() -> None:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
            (tmp_path / "child.tmp").write_text(str(process.pid))
            (tmp_path / "child.tmp").replace(tmp_path / "child")

    def memory() -> tuple[int, int]:
        return (99 if (tmp_path / "child").exists() else 1) * 2**20, 100 * 2**20

    with pytest.raises(EndedError, match=r"out of memory: ended at 99 of 100 MiB .*target_pools"):
        call(work, memory)
    left = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    while left.exists() and left.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # the tests' own time limit ends this


def test_a_pod_that_is_deleted_ends_as_it_does_without_a_fork() -> None:
    code = (
        "import os, signal; from yolov8_nas.runner.guarded import call; "
        "call(lambda: os.kill(os.getpid(), signal.SIGTERM)); print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGTERM and "went on" not in done.stdout


def test_memory_is_what_no_file_backs(tmp_path: Path) -> None:
    assert used_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 9000\nkernel 60\nshmem 40\nslab_reclaimable 20\n")
    assert used_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert used_memory(tmp_path) == (580, 1000)


def _step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, target: str | None) -> tuple[Any, Any]:
    monkeypatch.setattr(step, "find_stage", lambda name: stage)
    output, metrics = dsl.Artifact(uri=str(tmp_path / "out.tar")), dsl.Metrics(uri=str(tmp_path / "metrics"))
    step.run_step(
        stage.name,
        config=CONFIG.to_json(),
        target=target,
        store=str(tmp_path / "store"),
        run_id="run",
        output=output,
        metrics=metrics,
        report=dsl.Markdown(uri=str(tmp_path / "report.md")),
    )
    return read_json(tmp_path / "store" / "runs" / "run" / f"{target or 'all'}.{stage.name}.json"), output


def test_a_target_whose_stage_is_killed_is_lost_and_its_step_ends_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(ctx: StageContext) -> None:
        kept = ctx.partial / "epoch"
        if kept.exists():
            (ctx.out / "done").write_text(kept.read_text())
            return
        kept.write_text("1")
        os.kill(os.getpid(), signal.SIGKILL)

    stage = Stage("search", 1, lambda config, target: StageSettings(), body)
    record, output = _step(tmp_path, monkeypatch, stage, LABEL)
    assert record["status"] == "failed" and "most likely by the kernel for want of memory" in record["error"]
    assert output.metadata["sha256"] == record["digest"]
    assert "**Failed**" in (tmp_path / "report.md").read_text()
    (entry,) = (tmp_path / "store" / "search").glob("*/partial/epoch")
    assert entry.read_text() == "1", "what it had done is there for the next run"


def test_a_stage_for_all_targets_fails_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage("data-prep", 1, lambda config, target: StageSettings(), lambda ctx: _raise(StageError("no images")))
    with pytest.raises(StageError, match="no images"):
        _step(tmp_path, monkeypatch, stage, None)
