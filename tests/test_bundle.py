"""Devices elsewhere: the CPU plays one, in an interpreter that has nothing but NumPy and ONNX Runtime."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from yolov8_nas.commands.main import app
from yolov8_nas.config import RunConfig, TargetConfig
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError, WaitingError
from yolov8_nas.files import file_sha256, read_json, write_json
from yolov8_nas.measure import bundle, far, protocol
from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.measure.bundle import MODULES, PROGRAM, TABLE
from yolov8_nas.measure.far import sealed
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.stages.hw_probe import STAGE, bench, elsewhere
from yolov8_nas.stages.hw_probe import table as tables
from yolov8_nas.stages.hw_probe.run import run as run_probe
from yolov8_nas.stages.hw_probe.settings import ProbeSettings, recipe
from yolov8_nas.store.store import Store

SPACE = SearchSpace.load("tiny")
QUICK = Protocol(warmup=1, repetitions=2, min_rounds=2, max_rounds=2, leg=20)
LABEL = "cpu-1t-fp32"


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a device that has NumPy and ONNX Runtime, and nothing else of what this package needs."""
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder, symlinks=True)
    packages = Path(np.__file__).parents[1]
    (site,) = folder.glob("lib/python*/site-packages")
    for pattern in ("numpy*", "onnxruntime*", "flatbuffers*", "google", "protobuf*", "packaging*"):
        for found in packages.glob(pattern):
            (site / found.name).symlink_to(found)
    return folder / "bin" / "python"


def network(file: Path, channels: int) -> Path:
    """A network of one convolution."""
    weight = np.ones((channels, 3, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["output0"])],
        "one convolution",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 32, 32))],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, (1, channels, 30, 30))],
        [numpy_helper.from_array(weight, "weight")],
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    return file


def config(folder: Path, **changes: Any) -> RunConfig:
    target = {"hardware": "cpu-1t", "constraints": ["latency<=10s"], "far": str(folder / "line-3.json")}
    target |= {name: changes.pop(name) for name in list(changes) if name in TargetConfig.model_fields}
    probe = {"networks": 12, "holdout": 5, "max_mape": 100.0}
    return RunConfig.parse({"space": "tiny", "imgsz": 64, "probe": probe, **changes, "targets": [target]}, "test")


def context(
    folder: Path, asked: RunConfig, store: Store | None = None, num_classes: int = 3
) -> StageContext[ProbeSettings]:
    for name in ("out", "partial"):
        (folder / name).mkdir(parents=True)
    settings = STAGE.whole(asked, asked.targets[0], {"num_classes": num_classes})
    lock = HostLock(folder / "host.lock")
    return StageContext(settings, {}, folder / "out", folder / "partial", Progress.silent(), lock, store)


def measure(device: Path, packed: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Unpack a bundle and measure it on the device."""
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    return subprocess.run([device, folder / PROGRAM], capture_output=True, text=True, check=False, cwd="/")


def pack(folder: Path, **changes: Any) -> Path:
    """A bundle of two networks."""
    files = [network(folder / "networks" / f"{channels}.onnx", channels) for channels in (4, 8)]
    options: dict[str, Any] = {"purpose": TABLE, "protocol": QUICK, "reference": files[0], "recipe": {}} | changes
    bundle.write_bundle(folder / "bundle.tar", files, target=config(folder).targets[0], **options)
    return folder / "bundle.tar"


@pytest.fixture(scope="module")
def results(device: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the device makes of a bundle of two networks."""
    folder = tmp_path_factory.mktemp("results")
    done = measure(device, pack(folder), folder / "there")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = read_json(folder / "there" / far.RESULTS)
    return found


# The program ---------------------------------------------------------------------------------------------------------


def test_the_device_has_nothing_else(device: Path) -> None:
    code = "import importlib.util as u; print([m for m in ('torch', 'yaml', 'onnx', 'pydantic') if u.find_spec(m)])"
    done = subprocess.run([device, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_packed_runs_on_python_3_10_and_imports_only_what_is_there(module: str) -> None:
    source = (Path(bundle.__file__).parents[1] / f"{module}.py").read_text()
    tree = ast.parse(source, feature_version=(3, 10))
    own = {f"yolov8_nas.{name.replace('/', '.').removesuffix('.__init__')}" for name in MODULES}
    for node in tree.body:  # what is imported when the module is; functions may ask for more where there is more
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"numpy", "onnxruntime"} or name in own, f"{module} imports {name}"
    newer = ("tomllib", "datetime import UTC", "StrEnum", "import Self", "assert_never", "ExceptionGroup")
    assert not [name for name in newer if name in source]


def test_the_same_modules_make_the_same_program(tmp_path: Path) -> None:
    for name in ("a", "b"):
        bundle.write_program(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_networks_are_measured_on_the_device(results: dict[str, Any]) -> None:
    assert set(results["measured"]) == {"4.onnx", "8.onnx"}
    for row in results["measured"].values():
        measured = Measurement.from_dict(row)
        assert measured.latency_ms.p50 > 0 and measured.repetitions == QUICK.repetitions * len(measured.rounds)
    assert results["profile"]["threads"] == 1 and results["profile"]["runtime"]["name"] == "onnxruntime"
    assert set(results["regime"]["before"]) >= {"governor", "mhz"}
    assert sealed({key: value for key, value in results.items() if key != "digest"}) == results


def test_a_network_that_fails_there_is_told_and_the_others_are_measured(device: Path, tmp_path: Path) -> None:
    good, broken = network(tmp_path / "4.onnx", 4), tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    target = config(tmp_path).targets[0]
    bundle.write_bundle(
        tmp_path / "b.tar", [good, broken], target=target, purpose=TABLE, protocol=QUICK, reference=good, recipe={}
    )
    assert measure(device, tmp_path / "b.tar", tmp_path / "there").returncode == 0
    measured = read_json(tmp_path / "there" / far.RESULTS)["measured"]
    assert "cannot open it" in measured["broken.onnx"]["failed"] and "latency_ms" in measured["4.onnx"]


def _change_network(folder: Path) -> None:
    with (folder / "networks" / "8.onnx").open("ab") as file:
        file.write(b"0")


def _change_order(folder: Path) -> None:
    file = folder / far.MANIFEST
    file.write_text(file.read_text().replace('"batch": 1', '"batch": 2'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_change_network, "8.onnx: has changed since it was packed; unpack the bundle again"),
        (lambda folder: (folder / "networks" / "8.onnx").unlink(), "8.onnx: cannot be read"),
        (_change_order, "bundle.json: has changed since it was written"),
        (lambda folder: (folder / far.MANIFEST).write_text("{"), "bundle.json: damaged, not JSON"),
        (lambda folder: (folder / far.MANIFEST).unlink(), "bundle.json: cannot be read"),
    ],
)
def test_a_damaged_bundle_is_not_measured(
    damage: Callable[[Path], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(pack(tmp_path)) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    damage(tmp_path / "there")
    assert far.main([str(tmp_path / "there")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "there" / far.RESULTS).exists()


def test_more_threads_than_the_device_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(pack(tmp_path)) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    order = read_json(tmp_path / "there" / far.MANIFEST)
    del order["digest"]
    write_json(tmp_path / "there" / far.MANIFEST, sealed({**order, "threads": 4096}))
    assert far.main([str(tmp_path / "there")]) == 2
    assert "the bundle is for 4096 threads" in capsys.readouterr().err


# Results -------------------------------------------------------------------------------------------------------------


def _changed(results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Results with other content and the digest that goes with it."""
    return sealed({key: value for key, value in {**results, **changes}.items() if key != "digest"})


def _without_seal(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "digest"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {**r, "counter": "a better one"}, "has changed since it was written, or is damaged"),
        (_without_seal, "has no digest of itself"),
        (lambda r: _changed(r, format=99), "format 99, and this version reads 1; pack a bundle"),
        (lambda r: _changed(r, measured={"4.onnx": r["measured"]["4.onnx"]}), "1 networks were not measured"),
        (lambda r: _changed(r, networks={**r["networks"], "4.onnx": "0" * 64}), "other networks were measured than"),
        (lambda r: _changed(r, bundle={**r["bundle"], "batch": 2}), "has changed since it was written"),
        (lambda r: _changed(r, profile={**r["profile"], "threads": 2}), "with 2 threads, and the target is cpu-1t"),
        (lambda r: _changed(r, profile={**r["profile"], "kind": "gpu"}), "a gpu is no cpu"),
        (lambda r: r["bundle"], "holds no measurements"),
    ],
)
def test_results_that_cannot_be_trusted_are_refused(
    change: Callable[[dict[str, Any]], Any], words: str, results: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "results.json", change(results))
    with pytest.raises(InputError, match=words):
        bundle.read_results(tmp_path / "results.json", config(tmp_path).targets[0])


def test_results_of_another_gpu_are_refused(results: dict[str, Any], tmp_path: Path) -> None:
    order = {key: value for key, value in results["bundle"].items() if key != "digest"}
    changed = {
        "bundle": sealed({**order, "kind": "gpu", "hardware": "NVIDIA_L4", "precision": "fp16"}),
        "profile": {**results["profile"], "kind": "gpu", "model": "NVIDIA L4"},
        "key": {**results["key"], "model": "NVIDIA L4"},
    }
    write_json(tmp_path / "results.json", _changed(results, **changed))
    asked = {name: config(tmp_path, hardware=name, precision="fp16").targets[0] for name in ("NVIDIA_L4", "NVIDIA_T4")}
    bundle.read_results(tmp_path / "results.json", asked["NVIDIA_L4"])
    with pytest.raises(InputError, match=r"measured on NVIDIA L4 .* the target is NVIDIA_T4: it is another GPU"):
        bundle.read_results(tmp_path / "results.json", asked["NVIDIA_T4"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtime": "torch"}, "with ONNX Runtime only; use runtime: onnxruntime"),
        ({"hardware": "line-3"}, "'line-3' of a target elsewhere: use cpu, cpu-<n>t or a name of the catalogue"),
        ({"hardware": "cpu-0t"}, "'cpu-0t' of a target elsewhere"),
    ],
)
def test_what_no_bundle_can_measure_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        bundle.runtime_there(config(tmp_path, **changes).targets[0])


def test_single_results_join_a_table_of_the_same_software_only(results: dict[str, Any], tmp_path: Path) -> None:
    target = config(tmp_path).targets[0]
    order = {key: value for key, value in results["bundle"].items() if key != "digest"}
    single = _changed(results, bundle=sealed({**order, "purpose": "search"}))
    with pytest.raises(InputError, match=r"there are no results in .*line-3\.json yet. Pack a bundle"):
        bundle.keep(single, target)
    bundle.keep(results, target)
    bundle.keep(single, target)
    digest = results["networks"]["4.onnx"]
    kept = bundle.read_kept(target)
    assert kept.measured("search")[digest] == results["measured"]["4.onnx"]
    assert not kept.measured("trt-export")
    newer = {**results["key"], "runtime": {"name": "onnxruntime", "version": "99"}}
    with pytest.raises(InputError, match=r"another runtime than the table in .*: measure the table anew"):
        bundle.keep(_changed(single, key=newer), target)
    bundle.keep(results, target)  # a new table begins anew
    assert not bundle.read_kept(target).measured("search")


def test_what_a_stage_lacks_travels_to_the_device_and_back(
    device: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    target = config(tmp_path).targets[0]
    bundle.keep(results, target)
    files = [network(tmp_path / "candidates" / f"{channels}.onnx", channels) for channels in (5, 6)]
    request: dict[str, Any] = {
        "target": target,
        "stage": "search",
        "protocol": QUICK,
        "reference": files[0],
        "bundle": tmp_path / "candidates.tar",
    }
    with pytest.raises(WaitingError, match=r"2 networks have to be measured on cpu-1t first: .*candidates\.tar"):
        bundle.measured_there(files, **request)
    done = measure(device, tmp_path / "candidates.tar", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    bundle.keep(bundle.read_results(tmp_path / "there" / far.RESULTS, target), target)
    known = bundle.read_kept(target).measured("search")
    measured = bundle.measured_there(files, **request)
    assert [one.to_dict() for one in measured] == [known[file_sha256(file)] for file in files]


# The stage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are one convolution each, and timed in a moment."""

    def build(architecture: Architecture, num_classes: int) -> int:
        return sum(architecture.convs) // 8

    def write(here: bench.Bench, model: int, file: Path) -> None:
        network(file, model)

    monkeypatch.setattr("yolov8_nas.supernet.derive.build", build)
    monkeypatch.setattr("ultralytics.nn.tasks.DetectionModel", lambda *_, **__: 8)
    monkeypatch.setattr(bench.Bench, "write", write)
    monkeypatch.setattr(protocol, "PROBE", QUICK)


@pytest.mark.usefixtures("made_up")
def test_a_device_elsewhere_is_probed_through_a_bundle(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, store = config(tmp_path), Store(tmp_path / "store")
    with pytest.raises(InputError, match=r"there are no results in .* yet"):
        STAGE.settings(asked, asked.targets[0])
    (tmp_path / "work").mkdir()
    elsewhere.write_bundle(asked, LABEL, 3, tmp_path / "bundle.tar", tmp_path / "work")
    done = measure(device, tmp_path / "bundle.tar", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    elsewhere.import_results(asked, LABEL, tmp_path / "there" / far.RESULTS, str(store.root))

    def again(*_: Any) -> None:
        raise AssertionError("the table is in the store")

    run = tables.Table.run
    monkeypatch.setattr(tables.Table, "run", again)
    ctx = context(tmp_path / "run", asked, store)
    run_probe(ctx)
    results = read_json(tmp_path / "there" / far.RESULTS)
    table = read_json(ctx.out / "latency_table.json")
    assert len(table["rows"]) == 17 and table["conditions"]["bundle"] == results["bundle"]["digest"]
    for row in table["rows"]:
        name = f"{Architecture.from_dict(row['architecture']).digest}.onnx"
        assert row["latency_ms"] == results["measured"][name]["latency_ms"]
    assert read_json(ctx.out / "profile.json") == results["profile"]
    assert read_json(ctx.out / "nms.json")["latency_ms"] is None
    assert read_json(ctx.out / "constraints.json")[0]["limit"] == 10_000

    monkeypatch.setattr(tables.Table, "run", run)
    with pytest.raises(InputError, match="networks of 3 classes, and the dataset has 4"):
        run_probe(context(tmp_path / "other", asked, store, num_classes=4))


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"imgsz": 96}, "measured with another imgsz than the configuration has"),
        ({"seed": 1, "imgsz": 96}, "another imgsz and seed"),
        ({"constraints": ["energy<=4mJ"]}, "energy cannot be measured here"),
        ({"constraints": ["latency(with_nms)<=4ms"]}, "non-maximum suppression is not measured there"),
        ({"batch": 2}, "measured with batch 1, the target has 2"),
        ({"hardware": "NVIDIA_T4", "precision": "best"}, "'best' on NVIDIA_T4, a GPU: name one; use fp16 or int8"),
    ],
)
def test_results_of_another_recipe_are_refused(
    changes: dict[str, Any], words: str, results: dict[str, Any], tmp_path: Path
) -> None:
    asked = config(tmp_path)
    order = {key: value for key, value in results["bundle"].items() if key != "digest"}
    packed = recipe(asked, asked.targets[0]).plain()
    changed = _changed(results, bundle=sealed({**order, "recipe": packed}), counter=None)
    bundle.keep(changed, asked.targets[0])
    STAGE.settings(asked, asked.targets[0])
    other = config(tmp_path, **changes)
    with pytest.raises(InputError, match=words):
        STAGE.settings(other, other.targets[0])


@pytest.mark.slow
def test_bundle_and_import_are_commands(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = config(Path(), store=str(tmp_path / "store"))
    Path("run.yaml").write_text(asked.to_json())
    invoke = CliRunner().invoke
    assert "there are no results in" in invoke(app, ["run", "run.yaml"]).output
    packed = invoke(app, ["probe", "run.yaml", "--bundle", "line-3.tar"])
    assert packed.exit_code == 0, packed.output
    done = measure(device, tmp_path / "line-3.tar", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    taken = invoke(app, ["probe", "run.yaml", "--import", "there/results.json"])
    assert taken.exit_code == 0, taken.output
    (entry,) = (tmp_path / "store" / "tables").glob("*/outputs/latency_table.json")
    assert len(read_json(entry)["rows"]) == 17


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run.yaml", "--bundle", "a.tar", "--import", "b.json"], "one of --bundle FILE and --import FILE"),
        (["--bundle", "a.tar"], "give a run configuration"),
        (["run.yaml", "--bundle", "no/such/a.tar"], "there is no folder no/such"),
        (["run.yaml", "--bundle", "a.tar", "--target", "t4"], "with --target (there are cpu-1t-fp32)"),
        (["here.yaml", "--bundle", "a.tar"], "there are none: give one of them `far: FILE`"),
        (["run.yaml", "--import", "no.json"], "no.json: cannot be read"),
    ],
)
def test_what_the_command_cannot_do_is_told(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(config(tmp_path).to_json())
    Path("here.yaml").write_text(config(tmp_path, far=None).to_json())
    told = CliRunner().invoke(app, ["probe", *options])
    assert told.exit_code == 2 and words in told.output
