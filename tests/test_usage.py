"""What is recorded of the machine while a stage runs: as often as told, bounded, and nothing that nobody tells."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import pynvml
import pytest

from yolov8_nas.config import RunConfig
from yolov8_nas.device import usage
from yolov8_nas.files import read_json
from yolov8_nas.runner.settings import StageSettings
from yolov8_nas.runner.stage import Stage, open_store, run_stage

HOST = {"time", "cpu_utilization_percentage", "system_memory_usage_megabytes"}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """NVML's functions with their true signatures, of a machine with two GPUs."""
    module = create_autospec(pynvml)
    module.NVMLError = pynvml.NVMLError
    module.nvmlDeviceGetCount.return_value = 2
    module.nvmlDeviceGetHandleByIndex.side_effect = ["first", "second"]
    module.nvmlDeviceGetMemoryInfo.return_value = SimpleNamespace(used=3_000_000_000)
    module.nvmlDeviceGetUtilizationRates.side_effect = lambda gpu: SimpleNamespace(gpu={"first": 97, "second": 0}[gpu])
    module.nvmlDeviceGetPowerUsage.return_value = 70_500
    monkeypatch.setattr(usage, "pynvml", module)
    return module


def test_gpus_are_recorded_by_the_names_that_mlflow_shows(nvml: Mock, tmp_path: Path) -> None:
    with usage.recorded(tmp_path, tmp_path):
        nvml.nvmlDeviceGetPowerUsage.side_effect = [70_500, nvml.NVMLError(3)]
    (row,) = read_json(tmp_path / "usage.json")["rows"]
    assert (row["gpu_0_utilization_percentage"], row["gpu_1_utilization_percentage"]) == (97.0, 0.0)
    assert (row["gpu_0_memory_usage_megabytes"], row["gpu_0_power_usage_watts"]) == (3000.0, 70.5)
    assert "gpu_1_power_usage_watts" not in row


def test_without_a_driver_there_is_no_gpu(nvml: Mock, tmp_path: Path) -> None:
    nvml.nvmlInit.side_effect = nvml.NVMLError(12)
    with usage.recorded(tmp_path, tmp_path):
        pass
    (row,) = read_json(tmp_path / "usage.json")["rows"]
    assert set(row) == HOST
    assert row["system_memory_usage_megabytes"] > 0


def test_a_long_stage_is_recorded_more_coarsely(nvml: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.nvmlDeviceGetCount.return_value = 0
    monkeypatch.setattr(usage, "EVERY", 0.01)
    monkeypatch.setattr(usage, "MOST", 8)
    with usage.recorded(tmp_path, tmp_path):
        while not (kept := tmp_path / ".usage.json").is_file() or read_json(kept)["every_s"] == 0.01:
            time.sleep(0.01)
    record = read_json(tmp_path / "usage.json")
    assert record["every_s"] >= 0.02
    times = [row["time"] for row in record["rows"]]
    assert 4 <= len(times) < 8 and times == sorted(times)
    # A later try goes on with it.
    with usage.recorded(tmp_path, tmp_path):
        pass
    assert read_json(tmp_path / "usage.json")["rows"][0] == record["rows"][0]


def test_it_is_part_of_the_result_of_a_stage_that_is_watched(tmp_path: Path) -> None:
    target = {"hardware": "cpu-1t", "constraints": ["params<=9M"]}
    stage = Stage("supernet-train", 1, lambda config, target: StageSettings(), lambda ctx: None, watched=True)
    given = {"target": None, "inputs": {}, "output": tmp_path / "out.tar", "store": tmp_path / "store", "run_id": "r"}
    outcome = run_stage(stage, config=RunConfig.parse({"targets": [target]}, "test"), **given)
    folder = open_store(tmp_path / "store").result("supernet-train", outcome.key).outputs
    assert set(read_json(folder / "usage.json")["rows"][0]) >= HOST
