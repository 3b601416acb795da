"""The Python API: what it asks of the stages, what it shows, and how it fails; once the whole way, in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fabricated
import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
import yaml
from measured import Tables
from typer.testing import CliRunner

import yolov8_nas
from yolov8_nas import NAS, Subnet, nas
from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig
from yolov8_nas.data.demo import make_demo
from yolov8_nas.device import gpu
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export import packaging
from yolov8_nas.files import write_json
from yolov8_nas.measure import tensorrt
from yolov8_nas.run import preflight
from yolov8_nas.runner import process
from yolov8_nas.runner.results import CandidateResult, FrontNetwork, Predicted, ScoredNetwork
from yolov8_nas.space import SearchSpace, SpaceError
from yolov8_nas.stages import find_stage
from yolov8_nas.supernet.derive import build, save_checkpoint
from yolov8_nas.train.quantization import quantize, save_qat_checkpoint

STOCK = SearchSpace.load("tiny").stock


class Stages:
    """Stands for the stages: remembers what was asked, and gives folders with what they write."""

    def __init__(self, root: Path) -> None:
        self.asked: list[tuple[RunConfig, str, str | None, dict[str, str]]] = []
        names = ("data-prep", "supernet-train", "hw-probe", "search", "qat-finetune")
        self.folders = {name: root / name / (f"{i}" * 64) / "outputs" for i, name in enumerate(names)}
        dataset = fabricated.dataset(source="line-3")
        write_json(self.folders["data-prep"] / dataset.FILE, dataset.plain())
        write_json(self.folders["supernet-train"] / "curves.json", [{"epoch": 1, "box": 1.5}])
        measured = fabricated.measured(1.84, latency_ms=fabricated.latency(1.84, 1.9, 2.2), memory_mb=31.0)
        predicted = Predicted(latency_ms=1.8, upper_ms=1.9)
        rows = [
            fabricated.candidate(STOCK, map50_95_search=0.312, predicted=predicted, measured=measured, slack=slack)
            for slack in (0.08, 0.2)
        ]
        scored = FrontNetwork(
            architecture=STOCK, genes=(), map50_95=0.312, latency_ms=1.8, upper_ms=1.9, generation=0,
            source="evolution", repetition=None,
        )  # fmt: skip
        found = self.folders["search"]
        found.mkdir(parents=True)
        CandidateResult.write_all(found, rows)
        FrontNetwork.write_all(found, [scored])
        ScoredNetwork.write_all(found, [scored, scored])

    def __call__(
        self, config: RunConfig, workdir: Path, last: str, label: str | None, console: Any,
        environment: Mapping[str, str],
    ) -> dict[str, Path]:  # fmt: skip
        self.asked.append((config, last, label, dict(environment)))
        order = {"supernet-train": 2, "search": 4, "qat-finetune": 5}
        return dict(list(self.folders.items())[: order[last]])


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages(tmp_path / "store")
    monkeypatch.setattr(nas, "run_stages", fake)
    return fake


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was to be called in a process of its own, instead of being called."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def call(function: str, **arguments: Any) -> Any:
        calls.append((function, arguments))
        return arguments.get("path")

    monkeypatch.setattr(process, "call", call)
    return calls


def test_the_articles_example(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    search = NAS("yolov8-nas-supernet.yaml", device="cuda:0")
    search.train(data="coco.yaml", epochs=300, imgsz=640, batch=64)
    best = search.search(metric="mAP", constraint_type="latency", constraint_value=2.0, hardware="NVIDIA_A100")
    file = best.export(format="engine", dynamic=True, half=True)

    (trained, last, label, environment), (searched, *rest) = stages.asked
    assert (last, label, environment) == ("supernet-train", None, {"CUDA_VISIBLE_DEVICES": "0"})
    assert (trained.space, trained.data, trained.imgsz) == (
        "yolov8-nas-supernet.yaml",
        str(tmp_path / "coco.yaml"),
        640,
    )
    assert (trained.supernet.epochs, trained.supernet.batch) == (300, 64)
    assert rest[:2] == ["search", "nvidia-a100-fp32"]
    assert [(t.hardware, t.constraints) for t in searched.targets] == [("NVIDIA_A100", ("latency<=2.0ms",))]
    shared = find_stage("supernet-train").settings
    assert shared(trained, None) == shared(searched, None), "the search takes the supernet that was trained"
    (_, written), (_, exported) = called
    assert written["path"] == exported["checkpoint"]
    assert (exported["format"], exported["dynamic"], exported["half"]) == ("engine", True, True)
    assert file == tmp_path / "runs" / "nas" / "exports" / f"{best.name}-fp16-dynamic.engine"


def test_limits_settings_and_fine_tuning_reach_the_stages(stages: Stages, tmp_path: Path, called: Any) -> None:
    search = NAS("tiny", workdir=tmp_path, seed=3).train(epochs=2, imgsz=64, lr=1e-3)
    best = search.search(
        constraint_type="throughput", constraint_value=200, constraints=["memory<=90%stock"], hardware="cpu-1t",
        precision="int8", keep_float=["stem"], generations=3, candidates=2, probe={"networks": 20},
    )  # fmt: skip
    config, _, label, _ = stages.asked[-1]
    assert (config.seed, config.supernet.lr, config.search.generations, config.probe.networks) == (3, 1e-3, 3, 20)
    assert config.targets[0].constraints == ("throughput>=200img/s", "memory<=90%stock")
    assert label == "cpu-1t-int8" and config.quantization.keep_float == ("stem",)
    with pytest.raises(InputError, match="no INT8 network yet"):
        best.export()

    second = search.candidates[1]
    assert second.finetune(epochs=7, lr=1e-4) is second
    tuned, last, _, _ = stages.asked[-1]
    assert (last, tuned.finetune.epochs, tuned.finetune.lr, tuned.finetune.candidates) == ("qat-finetune", 7, 1e-4, 2)
    stage = find_stage("search")
    assert stage.settings(tuned, tuned.targets[0]) == stage.settings(config, config.targets[0]), "found, not repeated"
    folder = stages.folders["qat-finetune"] / "candidates" / "1"
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(b"weights")
    (folder / "qat.pt").write_bytes(b"integers")
    assert second.save(tmp_path / "out" / "best.pt").read_bytes() == b"weights"
    assert second.export().name == f"{STOCK.digest}-tuned-int8.onnx"
    assert called[-1][1]["checkpoint"] == folder / "qat.pt"
    second.export(int8=False, half=True)
    assert called[-1][1]["checkpoint"] == folder / "best.pt"


def test_the_head_is_asked_for_before_anything_is_measured(stages: Stages, tmp_path: Path) -> None:
    best = NAS("tiny", workdir=tmp_path).train(epochs=2).search(constraint_value=8.0, hardware="cpu-1t", nms_free=True)
    searched = stages.asked[-1][0]
    assert searched.finetune.nms_free
    with pytest.raises(InputError, match=r"finetune\(nms_free=False\): .* search\(nms_free=\.\.\.\)"):
        best.finetune(nms_free=False)
    tuned = best.finetune(epochs=7)._session.config
    stage = find_stage("search")
    assert stage.settings(tuned, tuned.targets[0]) == stage.settings(searched, searched.targets[0])


def test_objects_show_what_they_are(stages: Stages, tmp_path: Path) -> None:
    search = NAS("tiny", workdir=tmp_path)
    assert "not trained" in repr(search)
    assert (search.curves, search.history, search.front) == ([], [], [])
    best = search.train(epochs=2, imgsz=64).search(constraint_value="80%stock")
    assert "2 epochs at 64 px on 12 images of line-3" in repr(search)
    assert "2 networks scored, 1 of them on the front" in repr(search)
    assert len(search.history) == 2
    assert "| evolution | 0.312 | 1.8 | – |" in search._repr_markdown_()
    assert "\n" not in repr(best)
    for told in ("mAP50-95 0.312", "1.84 ms", "latency_p50<=80%stock", "3.01 M parameters"):
        assert told in repr(best)
    rows = [line.split() for line in str(best).splitlines()]
    assert ["backbone_p3", "64", "2", "0.5", "conv3"] in rows
    assert "| backbone_p3 | 64 | 2 | 0.5 | conv3 |" in best._repr_markdown_()
    assert isinstance(best, Subnet)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"metric": "F1", "constraint_value": 2.0}, 'by "mAP"'),
        ({}, 'constraint_value=8.0 (ms)'),
        ({"constraint_type": "speed", "constraint_value": 2.0}, "one of latency, throughput, memory"),
        ({"constraint_value": -2.0}, "must be a positive number"),
        ({"constraint_value": 2.0, "generatoins": 3}, "unknown key search.generatoins"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_for(stages: Stages, tmp_path: Path, asked: dict[str, Any], told: str) -> None:
    search = NAS("tiny", workdir=tmp_path).train(epochs=1)
    with pytest.raises(InputError) as error:
        search.search(**asked)
    assert told in str(error.value)
    assert len(stages.asked) == 1


def test_a_search_needs_a_supernet(stages: Stages, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="call train"):
        NAS("tiny", workdir=tmp_path).search(constraint_value=2.0)


def test_hardware_that_is_not_here(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = NAS("tiny", workdir=tmp_path).train(epochs=1)
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "gpu_names", list)
    with pytest.raises(InputError, match="'NVIDIA_A100': this machine has none"):
        search.search(constraint_value=2.0, hardware="NVIDIA_A100")
    assert not (tmp_path / "logs").exists(), "nothing was started"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match='device="cpu"'):
        NAS("tiny", device="cuda:0")
    with pytest.raises(InputError, match="unknown"):
        NAS("tiny", device="tpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert nas._visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "5"}, "counted among those that are visible here"
    assert nas._visible("cpu") == {"CUDA_VISIBLE_DEVICES": "-1"}
    assert nas._visible(None) == {}


def test_names_of_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert NAS().space == NAS("yolov8n").space == NAS("yolov8-nas-supernet.yaml").space
    assert NAS("yolov8m-nas-supernet.yaml").space == NAS("yolov8m").space
    Path("yolov8-nas-supernet.yaml").write_text(yaml.safe_dump(SearchSpace.load("tiny").to_dict()))
    assert NAS("yolov8-nas-supernet.yaml").space == SearchSpace.load("tiny"), "a file of that name goes first"
    with pytest.raises(SpaceError, match="no space 'yolov9'"):
        NAS("yolov9")


def test_importing_it_is_cheap_and_changes_nothing() -> None:
    code = """
import os, sys
before = dict(os.environ)
import yolov8_nas
imported = {name for name in sys.modules if name.startswith("yolov8_nas.")}
assert imported == {"yolov8_nas.home", "yolov8_nas.quiet"}, "nothing else is imported before it is needed"
from yolov8_nas import NAS
assert not {"torch", "ultralytics", "onnxruntime", "mlflow"} & set(sys.modules)
from yolov8_nas.quiet import ENVIRONMENT
assert dict(os.environ) == {**ENVIRONMENT, **before}, "libraries are kept quiet, and nothing else is changed"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"NAS", "Subnet"} <= set(dir(yolov8_nas))
    with pytest.raises(AttributeError, match="no attribute 'Nas'"):
        yolov8_nas.Nas  # noqa: B018


def test_the_command_search_tells_what_each_target_got(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = {"constraints": ["latency<=80%stock"]}
    targets = [{"hardware": "cpu", **limit}, {"hardware": "cpu-1t", **limit}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "x", "space": "tiny", "imgsz": 64, "targets": targets}))
    monkeypatch.setattr(preflight, "check_limits_apart", lambda config, names: [])

    def one_fails(config: RunConfig, workdir: Path, last: str, label: str | None, *rest: Any) -> dict[str, Path]:
        if label == "cpu-fp32":
            raise StageError("none keeps it")
        return stages(config, workdir, last, label, *rest)

    monkeypatch.setattr(nas, "run_stages", one_fails)
    command = ["search", str(tmp_path / "run.yaml"), "--workdir", str(tmp_path / "work"), "--set", "seed=4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "failed: cpu-fp32: none keeps it" in result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    (first, _) = (row for row in rows if row[:1] == [STOCK.digest])
    assert first[1:7] == ["0.312", "1.84", "1.9", "2.2", "31", "3.01"] and first[-1] == "8%"
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    file = tmp_path / "work" / "candidates" / "cpu-1t-fp32.json"
    assert str(file) in result.stdout
    assert len(json.loads(file.read_text())) == 2
    ((config, *_),) = stages.asked
    assert config.seed == 4


# A process of its own ------------------------------------------------------------------------------------------------


def test_a_call_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "logs" / "call.log"
    assert process.call("os:getenv", log=log, environment={"GREETING": "hello"}, key="GREETING") == "hello"
    with pytest.raises(SpaceError, match="no space 'x'"):
        process.call("yolov8_nas.nas:NAS", log=log, space="x")
    with pytest.raises(InputError, match=r"missing: no such file or directory"):
        process.call("os:listdir", log=log, path=str(tmp_path / "missing"))
    with pytest.raises(StageError, match=r"TypeError: .*call.log"):
        process.call("os:fspath", log=log, path=5)
    assert "Traceback" in log.read_text()
    with pytest.raises(StageError, match="killed by signal 9"):
        process.call("subprocess:call", log=log, args=["sh", "-c", "kill -9 $PPID"])


def test_an_interrupted_call_leaves_nothing_running(tmp_path: Path) -> None:
    started: list[psutil.Process] = []

    def interrupt() -> None:
        started[:] = psutil.Process().children(recursive=True)
        if len(started) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.call("subprocess:call", log=tmp_path / "log", wait=interrupt, args=["sleep", "60"])
    assert not psutil.wait_procs(started, timeout=10)[1], "neither the process nor what it had started"


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(build(SearchSpace.load("tiny").smallest(), 2), file, names=["scratch", "dent"], imgsz=64)
    return file


def test_export_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    file = packaging.export(checkpoint, tmp_path / "small.onnx", imgsz=96, batch=2)
    metadata = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    assert metadata["imgsz"] == "[96, 96]"
    assert metadata["names"] == "{0: 'scratch', 1: 'dent'}"
    assert list(tmp_path.iterdir()) == [file]
    wrong = StageError("differs")

    def refuse(*_: Any, **__: Any) -> float:
        raise wrong

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StageError):
        patch.setattr("yolov8_nas.export.verification.verify_onnx", refuse)
        packaging.export(checkpoint, tmp_path / "other.onnx")
    assert list(tmp_path.iterdir()) == [file], "a file that is refused never gets its name"


def test_suppression_is_put_into_the_file_that_was_compared(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, exported = torch.onnx.export, []

    def count(*args: Any, **rest: Any) -> Any:
        exported.append(args)
        return export(*args, **rest)

    monkeypatch.setattr(torch.onnx, "export", count)
    plain, whole = (
        onnx.load(packaging.export(checkpoint, tmp_path / f"nms-{nms}.onnx", dynamic=True, nms=nms))
        for nms in (False, True)
    )
    assert len(exported) == 2, "once each"
    assert list(whole.graph.initializer) == list(plain.graph.initializer)
    told, before = ({prop.key: prop.value for prop in model.metadata_props} for model in (whole, plain))
    assert told.pop("args") == before.pop("args").replace("'nms': None", "'nms': True")
    assert told == before


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": Malicious(f"touch {mark}"), "ema": None}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: not a checkpoint of Ultralytics that can be read safely"):
        packaging.export(tmp_path / "evil.pt", tmp_path / "evil.onnx")
    assert not mark.exists()


def test_what_cannot_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(InputError, match="no such file"):
        packaging.export(tmp_path / "missing.pt", out)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(InputError, match=r"text\.pt: not a checkpoint"):
        packaging.export(tmp_path / "text.pt", out)
    torch.save({"model": torch.nn.Conv2d(3, 3, 1), "ema": None}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not a checkpoint.*no detection network in it"):
        packaging.export(tmp_path / "other.pt", out)
    with pytest.raises(InputError, match="imgsz = 100"):
        packaging.export(checkpoint, out, imgsz=100)
    with pytest.raises(InputError, match="use one of onnx, engine"):
        packaging.export(checkpoint, out, format="tflite")
    assert not out.exists()


def test_an_engine_without_tensorrt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "missing", lambda: ["TensorRT is not installed here", "this machine has no GPU"])
    with pytest.raises(packaging.EngineUnavailable) as error:
        packaging.export(checkpoint, tmp_path / "model.engine", format="engine", dynamic=True, half=True)
    assert isinstance(error.value, InputError)
    for told in ("TensorRT is not installed here and this machine has no GPU", 'use format "onnx"'):
        assert told in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_int8_engine_is_built_from_what_tensorrt_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = quantize(build(SearchSpace.load("tiny").smallest(), 2).eval(), [torch.rand(2, 3, 64, 64)])
    save_qat_checkpoint(network, tmp_path / "qat.pt", names=["scratch", "dent"], imgsz=64)
    monkeypatch.setattr(tensorrt, "missing", list)
    monkeypatch.setattr(packaging, "_build_engine", lambda source, engine, *shape: engine)
    engine = packaging.export(tmp_path / "qat.pt", tmp_path / "model.engine", format="engine", half=True)
    assert engine == tmp_path / "model.engine"
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16} <= kinds
    assert onnx.TensorProto.UINT8 not in kinds
    with pytest.raises(InputError, match="choose one"):
        packaging.export(tmp_path / "qat.pt", tmp_path / "half.onnx", half=True)


# The whole way -------------------------------------------------------------------------------------------------------

SETTINGS = """
name: nas
data: {data}
space: tiny
imgsz: 64
supernet: {{epochs: 1, batch: 4, random_networks: 1}}
probe: {{networks: 12, holdout: 5, max_mape: 10}}
search: {{generations: 2, population: 4, candidates: 1, bn_images: 16, prior_steps: 2}}
finetune: {{candidates: 1}}
targets: [{{hardware: cpu-1t, constraints: ["latency<=150%stock"]}}]
"""


@pytest.mark.slow
def test_the_whole_way_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str], tables: Tables) -> None:
    data, work = tmp_path / "data", tmp_path / "work"
    tables.take(work / "store")
    make_demo(data, images=16, size=64)
    threads, environment = torch.get_num_threads(), dict(os.environ)
    search = NAS("tiny", device="cpu", workdir=work)
    search.train(data=data, epochs=1, imgsz=64, batch=4, random_networks=1)
    best = search.search(
        constraint_value="150%stock", hardware="cpu-1t", probe={"networks": 12, "holdout": 5, "max_mape": 10},
        generations=2, population=4, candidates=1, bn_images=16, prior_steps=2,
    )  # fmt: skip
    tables.give(work / "store")
    assert len(search.history) == 8
    assert best.latency_ms["p50"] > 0 and best.slack >= 0
    assert "supernet-train: done" in capsys.readouterr().err

    assert best.finetune(epochs=1) is best and best.tuned
    score = best.val()
    assert score.images > 0 and set(score.per_class) <= {"scratch", "dent", "hole", "stain"}
    file = best.export(dynamic=True, half=True)
    images = np.zeros((3, 3, 64, 96), np.float32)
    assert onnxruntime.InferenceSession(str(file)).run(None, {"images": images})[0].shape[0] == 3
    assert (torch.get_num_threads(), dict(os.environ)) == (threads, environment), "nothing changed for the caller"
    assert len(best.yolo().predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)) == 1

    (tmp_path / "same.yaml").write_text(SETTINGS.format(data=data))
    again = CliRunner().invoke(app, ["search", str(tmp_path / "same.yaml"), "--workdir", str(work)])
    assert again.exit_code == 0, again.output
    for stage in ("data-prep", "supernet-train", "hw-probe (cpu-1t-fp32)", "search (cpu-1t-fp32)"):
        assert f"{stage}: cached" in again.output, "the command line finds what the API did"
    assert best.architecture.digest in again.output
    (row,) = json.loads((work / "candidates" / "cpu-1t-fp32.json").read_text())
    assert row["architecture"] == best.architecture.to_dict()
