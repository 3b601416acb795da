"""`make test-gpu`, rehearsed where there is no GPU: every part says why it is skipped, and none crashes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))  # a script, not a package

import ten_minutes

from yolov8_nas.files import file_sha256, read_json, write_json

FOLDER = Path(__file__).parent / "gpu"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: make test-gpu is the test")
TRAINING = next(part for part in ten_minutes.PARTS if part.name == "training")


@without_gpu
def test_without_a_gpu_every_part_says_why_it_is_skipped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "ten_minutes.py"), "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, "nothing was measured, and that is no success"
    assert "Traceback" not in done.stdout + done.stderr
    for part in ten_minutes.PARTS:
        assert f"{part.name}: skipped: this machine has no NVIDIA GPU" in done.stdout
        assert read_json(tmp_path / f"{part.name}.json")["status"] == "skipped"
    table = (tmp_path / "table.md").read_text()
    assert table.count("*not measured*") == len(ten_minutes.PARTS)
    assert "TensorRT is not installed here" in table or "TensorRT 1" in table


def test_what_a_machine_without_network_needs_is_listed_with_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ten_minutes.py", "--needs"])
    assert ten_minutes.main() == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) == len(ten_minutes.WHEELS)
    lock = (Path(__file__).parents[1] / "requirements" / "rtx.txt").read_text()
    assert "tensorrt-rtx-cu13-libs" in lock and "tensorrt-rtx-cu13-libs" in told and "95.2 MB" in told


def test_parts_fit_into_what_a_loan_lasts_as_far_as_their_worth_goes() -> None:
    names = [part.name for part in ten_minutes.PARTS]
    assert len(set(names)) == len(names)
    assert names[:3] == ["profile", "probe", "rtx-engines"] and names[-1] == "tensorrt"
    assert sum(part.limit_s for part in ten_minutes.PARTS[:5]) <= 600


@without_gpu
def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ten_minutes, "no_gpu", list)  # as if one were here: its process finds none
    other = replace(TRAINING, name="nccl", lacks=lambda: ["a second card"])
    results = ten_minutes.run([TRAINING, other], tmp_path, seconds=120, on_cpu=False)
    assert results["training"]["status"] == "failed"
    assert "training.log" in results["training"]["why"]
    assert (results["nccl"]["status"], results["nccl"]["why"]) == ("skipped", "a second card")
    assert "*not measured* (failed)" in ten_minutes.tell([TRAINING, other], results, on_cpu=False)


def test_a_part_that_takes_too_long_is_ended_and_what_it_told_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ten_minutes, "LEAST_S", 0.0)
    slow = replace(TRAINING, limit_s=0)
    result = ten_minutes.run([slow], tmp_path, seconds=120, on_cpu=True)["training"]
    assert result["status"] == "out of time" and "start it again" in result["why"]
    late = ten_minutes.run([TRAINING], tmp_path, seconds=-1, on_cpu=True)["training"]
    assert late["status"] in ("skipped", "out of time")


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("it ran again")

    monkeypatch.setattr(ten_minutes, "_run", refuse)
    kept = {"status": "done", "why": "", "rows": [["its memory", "1 GiB"]], "seconds": 3.0, "on_cpu": True,
            "machine": ten_minutes.machine(), "script": file_sha256(Path(ten_minutes.__file__))}  # fmt: skip
    write_json(tmp_path / "training.json", kept)
    results = ten_minutes.run([TRAINING], tmp_path, seconds=60, on_cpu=True)
    assert "| its memory | 1 GiB |" in ten_minutes.tell([TRAINING], results, on_cpu=True)
    for change in ({"machine": "another card"}, {"script": "another"}, {"status": "failed"}, {"on_cpu": False}):
        write_json(tmp_path / "training.json", {**kept, **change})
        with pytest.raises(AssertionError, match="ran again"):
            ten_minutes.run([TRAINING], tmp_path, seconds=60, on_cpu=True)
