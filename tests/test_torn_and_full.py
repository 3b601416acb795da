"""Files that a kill or a power cut has torn, and disks that are full."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_disk
import torch
from typer.testing import CliRunner

from yolov8_nas import files
from yolov8_nas.commands import main as cli
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.errors import NoRoomError, StageError
from yolov8_nas.evaluation import Evaluation
from yolov8_nas.files import read_json, read_lines, write_json
from yolov8_nas.paths import check_writable
from yolov8_nas.registry import spool, tracking
from yolov8_nas.run import local
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import Stage, StageContext, run_stage
from yolov8_nas.store.archive import pack
from yolov8_nas.store.store import Store

CONFIG = RunConfig(targets=(TargetConfig(hardware="cpu-1t", constraints=("params<=9M",)),))
CUTS: dict[str, Callable[[bytes], bytes]] = {
    "at 0 bytes": lambda data: b"",
    "at 1,000 bytes": lambda data: data[:1000],
    "at half": lambda data: data[: len(data) // 2],
    "in blocks of zeros": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "from a block on": lambda data: data[:4096] + bytes(len(data) - 4096),
}
"""What a power cut leaves of a file whose name was on the disk before its bytes were."""


def _save(file: Path, epoch: int) -> None:
    torch.manual_seed(epoch)
    files.keep(file, functools.partial(torch.save, {"epoch": epoch, "weights": torch.randn(10_000)}))


def _load(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("cut", CUTS)
def test_of_two_checkpoints_the_whole_one_is_taken(cut: str, tmp_path: Path) -> None:
    file, told = tmp_path / "checkpoint.pt", list[str]()
    for epoch in (1, 2, 3):
        _save(file, epoch)
    assert files.read_kept(file, _load, told.append)["epoch"] == 3  # type: ignore[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]

    file.write_bytes(CUTS[cut](file.read_bytes()))
    found = files.read_kept(file, _load, told.append)
    assert found is not None and found["epoch"] == 2
    assert re.search(r"checkpoint\.pt: torn or damaged .* set aside .*; the one before it is taken", told[-1])
    assert (tmp_path / ".checkpoint.pt.torn").is_file() and not file.exists()

    _save(file, 4)  # the next epoch is written beside, and nothing is asked for twice
    assert files.read_kept(file, _load, told.append)["epoch"] == 4  # type: ignore[index]
    for path in (file, files.previous_of(file)):
        path.write_bytes(CUTS[cut](path.read_bytes()))
    assert files.read_kept(file, _load, told.append) is None
    assert "beginning anew" in told[-1] and not file.exists() and not files.previous_of(file).exists()


def test_a_checkpoint_that_cannot_be_read_for_other_reasons_stays(tmp_path: Path) -> None:
    _save(tmp_path / "checkpoint.pt", 1)
    for error in (OSError(errno.EIO, "the disk"), MemoryError(), torch.OutOfMemoryError("the GPU")):

        def fail(_: Path, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            files.read_kept(tmp_path / "checkpoint.pt", fail)
    assert files.read_kept(tmp_path / "checkpoint.pt", _load) is not None


@pytest.mark.parametrize("cut", CUTS)
def test_a_torn_entry_of_the_spool_blocks_nothing(cut: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    for run in ("a" * 9000, "b"):  # one that is longer than a block
        spool.keep_killed(store, "http://127.0.0.1:9", "e", run, 1, ConnectionError("away"))
    torn = next(one.folder / "entry.json" for one in spool.waiting(store) if "aaa" in one.what)
    torn.write_bytes(CUTS[cut](torn.read_bytes()))
    assert [one.what for one in spool.waiting(store)] == ["the end of run b, which was killed"]
    assert "torn or damaged" in "".join(capsys.readouterr())
    spool.keep_killed(store, "http://127.0.0.1:9", "e", "a" * 9000, 1, ConnectionError("away"))
    assert len(spool.waiting(store)) == 2


@pytest.mark.parametrize("cut", CUTS)
def test_a_torn_run_json_begins_a_new_run(cut: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = local._run_id(CONFIG, tmp_path)
    assert local._run_id(CONFIG, tmp_path) == first, "a run that was cut short goes on"
    file = tmp_path / local.LAST_RUN
    write_json(file, {**read_json(file), "more": "x" * 9000})
    file.write_bytes(CUTS[cut](file.read_bytes()))
    assert local._run_id(CONFIG, tmp_path) != first
    assert "beginning anew" in "".join(capsys.readouterr())
    assert read_json(file)["finished"] is False


def test_lines_are_cut_off_from_the_first_that_is_torn_on(tmp_path: Path) -> None:
    file = tmp_path / "memo.jsonl"
    for number in range(4):
        files.append_line(file, {"number": number})
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1] + bytes(len(lines[2])) + lines[3])
    assert read_lines(file) == [{"number": 0}, {"number": 1}]
    files.append_line(file, {"number": 9})
    assert read_lines(file) == [{"number": 0}, {"number": 1}, {"number": 9}]


def test_a_torn_evaluation_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.npz"
    from registering import made_up_scores

    made_up_scores(0.5).save(file)
    data = file.read_bytes()
    for cut in ("at 0 bytes", "at 1,000 bytes", "at half"):
        file.write_bytes(CUTS[cut](data))
        assert files.read_kept(file, Evaluation.load) is None and not file.exists()


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112 - of a handle
        fsync(handle)

    def note_replace(*names: Any) -> None:
        done.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    in_order = ["file", "name", "folder"]
    files.atomic_write(tmp_path / "a", b"x")
    assert done == in_order
    done.clear()
    (tmp_path / "b").write_bytes(b"x")
    files.replace(tmp_path / "b", tmp_path / "c")
    assert done == in_order
    done.clear()
    files.append_line(tmp_path / "new", 1)
    files.append_line(tmp_path / "new", 2)
    assert done == ["file", "folder", "file"]
    done.clear()
    spool.keep_killed(Store(tmp_path), "http://x", "e", "r", 1, ConnectionError())
    assert done[-1] == "folder" and done.count("file") >= 2


# A full disk: the kernel itself refuses, by the largest file that a process may write, or on a small disk in memory. --


def _stage(size: int) -> Stage:
    def work(ctx: StageContext) -> None:
        kept = ctx.partial / "checkpoint"
        epoch = int(kept.read_text()) if kept.exists() else 0
        files.atomic_write(kept, str(epoch + 1))
        files.atomic_write(ctx.out / "result", f"epoch {epoch + 1}".encode() + bytes(size))

    return Stage("search", 1, lambda config, target: StageSettings(), work)


@pytest.fixture
def at_most() -> Any:
    """Sets the largest file that this process may write; writing a larger one fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_stage_goes_on_when_there_is_room(tmp_path: Path, at_most: Callable[[int], None]) -> None:
    asked: dict[str, Any] = {"config": CONFIG, "target": "cpu-1t-fp32", "inputs": {}, "store": tmp_path / "store"}
    asked |= {"output": tmp_path / "out.tar", "run_id": "the same"}
    at_most(200_000)
    full = run_stage(_stage(1_000_000), **asked)
    assert full.status == "failed" and full.error is not None
    assert re.search(
        r"/outputs/result: .* no room for 1,000,007 bytes \(.* bytes are free\); free some space", full.error
    )
    assert "\n" not in full.error
    at_most(resource.RLIM_INFINITY)
    done = run_stage(_stage(1_000_000), **asked)
    assert done.status == "done", done.error
    result = (tmp_path / "store" / "search" / done.key / "outputs" / "result").read_bytes()
    assert result.startswith(b"epoch 2"), "its checkpoint was kept, and the same run does not take the failure for good"


def test_the_command_line_says_it_in_one_line(tmp_path: Path, at_most: Callable[[int], None]) -> None:
    at_most(10_000)
    result = CliRunner().invoke(
        cli.app, ["data", "make-demo", str(tmp_path / "demo"), "--images", "8", "--size", "320"]
    )
    assert result.exit_code == 1, result.output
    assert re.search(r"failed: .*part_0000\.png: .* leaves no room for [\d,]+ bytes", " ".join(result.stderr.split()))
    at_most(resource.RLIM_INFINITY)
    shutil.rmtree(tmp_path / "demo")
    result = CliRunner().invoke(
        cli.app, ["data", "make-demo", str(tmp_path / "demo"), "--images", "8", "--size", "320"]
    )
    assert result.exit_code == 0, result.output


def test_a_run_that_could_not_even_write_down_why_it_ended_says_so(
    tmp_path: Path, at_most: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that ended without a summary, as none could be written: its parent finds out why."""
    from yolov8_nas.terminal import Terminal

    ended = SimpleNamespace(poll=lambda: 1)
    monkeypatch.setattr(local.process, "running", lambda *_: nullcontext(ended))
    for most, told in ((500_000, "leaves no room for 1,048,576 bytes"), (resource.RLIM_INFINITY, "without a summary")):
        at_most(most)
        with pytest.raises(StageError, match=told):
            local.run_pipeline(CONFIG, tmp_path, Terminal())
    assert not list(tmp_path.rglob(".room*"))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a checkpoint": lambda folder: files.keep(folder / "x", lambda file: file.write(bytes(300_000))),
    "JSON": lambda folder: write_json(folder / "x", "x" * 300_000),
    "a line": lambda folder: files.append_line(folder / "x", "x" * 300_000),
    "a file of a result": lambda folder: files.write_file(folder / "x", bytes(300_000)),
    "a copy": lambda folder: files.copy_file(folder / "large" / "y", folder / "x"),
    "a tar": lambda folder: pack(folder / "large", folder / "x"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writes_names_path_and_bytes_and_leaves_what_was_there(
    writer: str, tmp_path: Path, at_most: Callable[[int], None]
) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "y").write_bytes(bytes(300_000))
    at_most(100_000)
    with pytest.raises(NoRoomError, match=r"/x: .* no room for 3\d\d,\d{3} bytes") as caught:
        WRITERS[writer](tmp_path)
    assert "\n" not in str(caught.value)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert left == [], "half a file is left beside"


OTHERS: dict[str, BaseException] = {
    "the kernel": OSError(errno.ENOSPC, "No space left on device", "/data/x"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"),
    "PyTorch": RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    "safetensors": ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "SQLite": RuntimeError("(sqlite3.OperationalError) database or disk is full"),
}


@pytest.mark.parametrize("who", OTHERS)
def test_what_libraries_say_of_a_full_disk_is_understood(who: str, tmp_path: Path) -> None:
    told = r"/x: .* for 7 bytes \(.*\); free some space, and the same command goes on"
    with pytest.raises(NoRoomError, match=told), files.room(tmp_path / "x", 7):
        raise OTHERS[who]
    wrapped = RuntimeError("something else")
    wrapped.__cause__ = OTHERS[who]
    assert files.no_room(wrapped) is not None
    assert files.no_room(RuntimeError("out of memory")) is None
    with pytest.raises(KeyError), files.room(tmp_path / "x"):
        raise KeyError("x")


SMALL_DISK = """
import json, sys
from pathlib import Path
from test_torn_and_full import CONFIG, _stage, run_stage
folder = Path(sys.argv[1])
asked = {"config": CONFIG, "target": "cpu-1t-fp32", "inputs": {}, "store": folder / "store", "run_id": "r"}
told = []
for ballast in (True, False):
    if ballast:
        (folder / "ballast").write_bytes(bytes(2_000_000))
    else:
        (folder / "ballast").unlink()
    try:
        done = run_stage(_stage(700_000), output=folder / "out.tar", **asked)
        told.append([done.status, done.error])
    except Exception as error:
        told.append([type(error).__name__, str(error)])
print("TOLD", json.dumps(told))
"""


def test_a_work_folder_on_a_disk_without_a_byte_left(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_torn_and_full import full_from_the_start as f; f(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [*small_disk.command(tmp_path / "disk", "3m"), sys.executable, "-c", code, tmp_path / "disk"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout.strip().endswith("told"), done.stderr


def full_from_the_start(disk: str) -> None:
    """A preflight that finds no room."""
    small_disk.fill(Path(disk), 0)
    with pytest.raises(NoRoomError, match=r"no room on the disk for 1 byte \(0 bytes are free\); free some space"):
        check_writable(Path(disk) / "store", "store", "choose another folder")
    print("told")


def test_a_database_that_was_not_made_to_the_end_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow can neither use nor complete half of its tables."""
    import mlflow

    uri = tracking.resolve_uri(None, tmp_path / "store")
    (file,) = [tracking.database(uri)]
    assert file is not None

    def cut_off(tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).write_bytes(b"SQLite format 3\0 and no more")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(mlflow, "MlflowClient", cut_off)
        with pytest.raises(NoRoomError, match=r"mlflow\.db: no room on the disk"):
            tracking.connect(uri)
    assert [path.name for path in file.parent.iterdir()] == ["mlflow.lock"]
    assert tracking.experiment_id(tracking.connect(uri), "e")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a disk of 3 MB in memory, which needs no rights beyond a namespace of its own."""
    disk = tmp_path / "disk"
    command = small_disk.command(disk, "3m")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [*command, sys.executable, "-c", SMALL_DISK, str(disk)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("TOLD"))
    (full, error), (after, _) = json.loads(line.removeprefix("TOLD"))
    assert full in ("failed", "NoRoomError")
    assert re.search(r"no room on the disk for [\d,]+ bytes \([\d,]+ bytes are free\)", error)
    assert after == "done"
