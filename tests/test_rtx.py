"""TensorRT for RTX: every kind of file that is exported is really built by it, and what it refuses is named.

Nothing here has a GPU, and no engine is run: that is `make test-gpu`'s. Without the compiler (the extra `rtx`) tests
that need it are skipped, and say so. One test has a double, `_Context`: the order in which an engine that is opened
gets its kernels. Cards are here in name only where a test says so.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exports import KINDS, SIDE, Exports, Kind
from onnx import TensorProto, helper, numpy_helper
from ultralytics.nn.backends.base import BaseBackend
from ultralytics.nn.backends.tensorrt import TensorRTBackend

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import compiler_features

from components.placement import branches
from yolov8_nas.commands import doctor
from yolov8_nas.config import RunConfig
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.artifact import write_network
from yolov8_nas.export.nms_in_graph import NmsOptions, add_efficient_nms, add_nms
from yolov8_nas.export.packaging import export
from yolov8_nas.export.servable import read_servable
from yolov8_nas.export.tensorrt import EngineOptions, Profile, configure, read_network, start_builder, status
from yolov8_nas.export.tensorrt_rtx import NOWHERE, build_ahead, reveal
from yolov8_nas.files import file_sha256
from yolov8_nas.measure import tensorrt_rtx as rtx
from yolov8_nas.measure.engine_file import (
    RTX,
    GpuEnvironment,
    kernels_path,
    kernels_record_path,
    read_manifest,
    split_header,
    told_of,
)
from yolov8_nas.measure.runtime import find
from yolov8_nas.measure.target import resolve
from yolov8_nas.measure.tensorrt import load_engine, open_log
from yolov8_nas.space import OPERATORS, SearchSpace
from yolov8_nas.supernet.derive import save_checkpoint

ROOT = Path(__file__).parents[1]
LACKING = rtx.missing_to_build()
compiled = pytest.mark.skipif(bool(LACKING), reason=" and ".join(LACKING) or "the compiler is here")
"""Marks tests that need the compiler."""

DYNAMIC = Profile(min=(1, 32, 32), opt=(1, SIDE, SIDE), max=(4, 96, SIDE))
SIZES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0}
"""Bytes of a weight."""


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


def weights(file: Path) -> tuple[int, int]:
    """How many weights a file has, and how many bytes they take."""
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    return sum(array.size for array in arrays), sum(array.nbytes for array in arrays)


def quantized_convolutions(file: Path) -> int:
    """Convolutions of a file whose images and weights are integers."""
    graph = onnx.load(file).graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type == "Conv" and dequantized >= set(node.input[:2]) for node in graph.node)


@compiled
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_file_is_built(kind: Kind, exports: Exports, tmp_path: Path) -> None:
    """A file that is refused fails this test, and the message names the layer."""
    file, engine = exports.file(kind), tmp_path / "model.engine"
    manifest = build_ahead(file, engine, options=EngineOptions(profile=DYNAMIC if kind.dynamic else None))
    assert manifest.precision == kind.precision
    assert read_manifest(engine).to_dict() == json.loads(json.dumps(manifest.to_dict()))
    told = manifest.layers
    assert told["plan_bytes"] == len(split_header(engine)[1])
    # What it holds is what the file holds, in its precision: weights that were dropped or widened would show.
    elements, size = weights(file)
    assert told["weight_bytes"] == pytest.approx(size, rel=0.25)
    if not kind.keep_float:
        assert size == pytest.approx(elements * SIZES[kind.precision], rel=0.25)
    assert told["quantized_convolutions"] == (quantized_convolutions(file) if kind.precision == "int8" else 0)
    assert told["activation_bytes"] > 0
    assert told["parsed_layers"] > told["fused_layers"]


def test_the_kinds_are_all_operators_and_precisions_of_all_spaces() -> None:
    spaces = sorted(path.stem for path in (ROOT / "yolov8_nas" / "space" / "spaces").glob("*.yaml"))
    assert spaces
    for space in spaces:
        kinds = [kind for kind in KINDS if kind.space == space]
        options = {d.name: set(d.options) for d in SearchSpace.load(space).dimensions}
        wanted = set().union(*(found for name, found in options.items() if name.endswith(".operator")))
        assert {block.operator for kind in kinds for block in kind.architecture.blocks} == wanted
        assert {kind.architecture.attention for kind in kinds} == {max(options["attention"])}
        assert {kind.architecture.head.classes for kind in kinds} == options["detect.classes"]
        assert {kind.precision for kind in kinds} >= {"fp32", "fp16"}
    assert {b.operator for k in KINDS for b in k.architecture.blocks if k.precision == "int8"} == set(OPERATORS)
    heads = {(kind.precision, kind.architecture.head.classes) for kind in KINDS}
    assert len(heads) == 6 and {kind.architecture.head.reg_max for kind in KINDS} == {8, 12, 16}
    assert {kind.architecture.head.classes for kind in KINDS if kind.nms_free} == {"dwsep3", "conv3"}
    assert {kind.classes for kind in KINDS} >= {1, 80, 300}


@compiled
def test_an_engine_says_what_it_is_for(exports: Exports, tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    file = exports.file(Kind(precision="fp16"))
    manifest = build_ahead(file, engine, capabilities=("7.5",))
    assert manifest.built_for == ("7.5",)
    assert manifest.built_on.compiler == RTX
    assert manifest.built_on.gpu == NOWHERE
    assert manifest.built_on.tensorrt == rtx.compiler().__version__
    assert (manifest.source, manifest.source_sha256) == (file.name, file_sha256(file))
    t4 = GpuEnvironment("Tesla T4", "7.5", manifest.built_on.tensorrt, "13.0", "580.1", RTX)
    manifest.check_runs_on(t4, engine)
    for other, words in (
        (replace(t4, gpu="NVIDIA A10", compute_capability="8.6"), r"capability 7\.5 \(here: 8\.6\)"),
        (replace(t4, tensorrt="1.8.0"), r"TensorRT for RTX 1\.7.* \(here: TensorRT for RTX 1\.8\.0\)"),
        (replace(t4, compiler="TensorRT", tensorrt="11.4"), r"TensorRT for RTX .* \(here: TensorRT 11\.4\)"),
    ):
        with pytest.raises(InputError, match=words):
            manifest.check_runs_on(other, engine)
    metadata, _ = split_header(engine)
    assert (metadata["task"], metadata["imgsz"], metadata["batch"]) == ("detect", [SIDE, SIDE], 1)


@compiled
def test_the_same_file_gives_an_engine_of_the_same_size(exports: Exports, tmp_path: Path) -> None:
    file = exports.file(Kind(precision="fp16"))
    first, second = (build_ahead(file, tmp_path / f"{name}.engine").layers for name in "ab")
    steady = [{key: value for key, value in told.items() if key != "seconds"} for told in (first, second)]
    assert steady[0] == steady[1]


@compiled
def test_a_dynamic_engine_says_which_shapes_it_takes(exports: Exports, tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    manifest = build_ahead(exports.file(Kind(dynamic=True)), engine, options=EngineOptions(profile=DYNAMIC))
    low, best, high = ([images, 3, height, width] for images, height, width in (DYNAMIC.min, DYNAMIC.opt, DYNAMIC.max))
    assert manifest.inputs == {"images": {"min": low, "opt": best, "max": high}}
    assert manifest.outputs == {"output0": [-1, 7, -1]}
    metadata, _ = split_header(engine)
    assert (metadata["args"]["dynamic"], metadata["batch"], metadata["imgsz"]) == (True, 4, [SIDE, SIDE])
    with pytest.raises(InputError, match=r"dynamic; give options\.profile"):
        build_ahead(exports.file(Kind(dynamic=True)), engine)


@compiled
def test_stock_ultralytics_reads_the_header(exports: Exports, tmp_path: Path) -> None:
    engine = tmp_path / "model.engine"
    build_ahead(exports.file(Kind()), engine)
    offset, metadata = BaseBackend.engine_header(engine)
    assert engine.read_bytes()[offset:] == split_header(engine)[1]
    assert BaseBackend.read_metadata(engine) == metadata
    backend = TensorRTBackend.__new__(TensorRTBackend)
    backend.dynamic = True
    backend.apply_metadata(metadata)
    assert (backend.stride, backend.batch, backend.channels, backend.imgsz) == (32, 1, 3, [SIDE, SIDE])
    assert (backend.end2end, backend.dynamic, backend.task) == (False, False, "detect")
    assert len(backend.names) == 3


def configured(file: Path, options: EngineOptions, **changes: Any) -> Any:
    """The real compiler's configuration of a build, and the compiler."""
    trt = rtx.compiler()
    log = open_log(trt)
    network = replace(read_network(file, options, ["8.6"], "a GPU"), **changes)
    builder = start_builder(trt, log)
    return configure(trt, builder, network, options, log), trt


@compiled
def test_options_reach_the_builder(exports: Exports) -> None:
    file = exports.file(Kind())
    plain, trt = configured(file, EngineOptions())
    sources = ("JIT_CONVOLUTIONS",)
    asked, _ = configured(file, EngineOptions(workspace_gib=0.5, tactic_sources=sources, level=5, tf32=False))
    assert (plain.builder_optimization_level, asked.builder_optimization_level) == (3, 5)
    assert asked.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**29
    assert plain.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) > 2**29
    assert plain.get_flag(trt.BuilderFlag.TF32) and not asked.get_flag(trt.BuilderFlag.TF32)
    assert asked.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert asked.get_tactic_sources() == 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)
    with pytest.raises(InputError, match=r"options\.tactic_sources: WINOGRAD: .*JIT_CONVOLUTIONS"):
        configured(file, EngineOptions(tactic_sources=("WINOGRAD",)))


@compiled
def test_shapes_that_the_compiler_refuses_are_told(exports: Exports) -> None:
    file = exports.file(Kind(dynamic=True))
    assert configured(file, EngineOptions(profile=DYNAMIC))[0].num_optimization_profiles == 1
    falling = dict(zip(("min", "opt", "max"), ([2, 3, 64, 64], [1, 3, 64, 64], [4, 3, 64, 64]), strict=True))
    with pytest.raises(InputError, match=r"TensorRT for RTX refuses options\.profile = .*: IOpt.*MIN<=OPT<=MAX"):
        configured(file, EngineOptions(profile=DYNAMIC), shapes=falling)


# Refusals ------------------------------------------------------------------------------------------------------------


def changed(source: Path, path: Path, *nodes: onnx.NodeProto, domain: str = "ours") -> Path:
    """A copy of a file with nodes at its end, the last of which gives its output."""
    model = onnx.load(source)
    model.graph.node.extend(nodes)
    model.graph.output[0].name = nodes[-1].output[0]
    model.opset_import.append(helper.make_opsetid(domain, 1))
    path.write_bytes(model.SerializeToString())
    return path


@compiled
def test_an_operator_that_it_lacks_is_named_with_its_layer(exports: Exports, tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["output0"], ["beyond"], name="/last/one", domain="ours")
    file = changed(exports.file(Kind()), tmp_path / "beyond.onnx", node)
    with pytest.raises(
        InputError,
        match=r"beyond\.onnx.*TensorRT for RTX 1\..*\(opset 18\): operator NoSuchOperator \(/last/one\) is not",
    ):
        build_ahead(file, tmp_path / "beyond.engine")
    assert not (tmp_path / "beyond.engine").exists()


@compiled
@pytest.mark.parametrize(
    ("append", "layer"), [(add_efficient_nms, "EfficientNMS_TRT"), (add_nms, "nms_found_N3")], ids=["plugin", "ONNX"]
)
def test_suppression_in_the_file_is_refused_by_name(append: Any, layer: str, exports: Exports, tmp_path: Path) -> None:
    file = tmp_path / "nms.onnx"
    file.write_bytes(append(onnx.load(exports.file(Kind())), NmsOptions()).SerializeToString())
    with pytest.raises((InputError, StageError), match=rf"nms\.onnx.*{layer}"):
        build_ahead(file, tmp_path / "nms.engine")


@compiled
def test_suppression_as_an_option_is_refused_with_what_would_do(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no kernel that suppresses.*on the host.*finetune\.nms_free"):
        build_ahead(exports.file(Kind()), tmp_path / "a.engine", options=EngineOptions(nms=NmsOptions()))


@compiled
def test_scales_that_fp16_has_not_are_none_of_a_file_for_gpus(exports: Exports, tmp_path: Path) -> None:
    """A tensor that is all but zero has a scale below FP16's smallest: unraised, this compiler refuses the file."""
    file = exports.file(Kind(precision="int8"))
    model = onnx.load(file)
    (first, *_) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == first.input[1])
    scale.CopyFrom(helper.make_tensor(scale.name, TensorProto.FLOAT16, list(scale.dims), [0.0]))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=rf"operator QuantizeLinear \({re.escape(first.name)}\)"):
        build_ahead(broken, tmp_path / "broken.engine")


@compiled
@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        (("8.0",), r"does not support .*8\.0; it supports 7\.5, 8\.6.*runtime: tensorrt"),
        (("8.6", "9.0"), r"capability 9\.0"),
        (("7.5",), r"no INT8 .*7\.5.*fp32 or fp16"),
        ((), "at least one compute capability"),
    ],
)
def test_gpus_that_it_has_not_are_refused(
    capabilities: tuple[str, ...], words: str, exports: Exports, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        build_ahead(exports.file(Kind(precision="int8")), tmp_path / "a.engine", capabilities=capabilities)


@compiled
def test_the_table_of_gpus_is_within_what_the_installed_version_compiles_for() -> None:
    trt = rtx.compiler()
    for capability in rtx.SUPPORTED:
        assert rtx.of_capability(trt, capability).value == int(capability.replace(".", ""))
    with pytest.raises(InputError, match=r"compiles for .*SM86.* not for compute capability 9\.0"):
        rtx.of_capability(trt, "9.0")


def test_the_table_of_gpus_is_that_of_the_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "missing_to_build", list)
    for version, table, words in (
        ("1.4.0.76", ["7.5", "8.6", "8.9", "12.0"], "12.0"),
        ("1.5.0.1", [*rtx.SUPPORTED], "12.1"),
        ("1.7.1.116", [*rtx.SUPPORTED], "by the support matrix of 1.5, the newest that is known here"),
    ):
        monkeypatch.setattr(rtx, "compiler", lambda v=version: SimpleNamespace(__version__=v))
        assert list(rtx.supported()) == table
        assert rtx.told_of_table().endswith(words)
        assert ("12.1" in str(rtx.refusal("NVIDIA GB10", "12.1"))) == ("12.1" not in table)
    monkeypatch.setattr(rtx, "missing_to_build", lambda: ["it is not installed here"])
    assert list(rtx.supported()) == list(rtx.SUPPORTED)


@pytest.mark.parametrize(
    ("hardware", "given"),
    [
        (None, ("8.6", "8.9", "12.0")),
        ("8.9", ("8.9",)),
        ("NVIDIA_T4", ("7.5",)),
        ("a10", ("8.6",)),
        ("L4", ("8.9",)),
        ("NVIDIA_A100", r"A100.*8\.0"),
        ("h100-pcie", r"H100 PCIe.*9\.0"),
        ("V100", r"7\.0"),
        ("nonsuch", "unknown"),
    ],
)
def test_gpus_are_known_by_name(hardware: str | None, given: Any) -> None:
    if isinstance(given, tuple):
        assert rtx.capabilities(hardware) == given
        return
    with pytest.raises(InputError, match=given):
        rtx.capabilities(hardware)


# What is told --------------------------------------------------------------------------------------------------------


def test_what_a_version_does_not_tell_is_not_invented() -> None:
    told = reveal(["nothing of use"], b"plan", parsed_layers=7, seconds=0.5)
    assert (told.parsed_layers, told.plan_bytes, told.seconds) == (7, 4, 0.5)
    assert told.fused_layers is told.activation_bytes is told.scratch_bytes is told.weight_bytes is None


def test_what_is_missing_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "MODULES", ("no_such_compiler",))
    (why,) = rtx.missing_to_build()
    assert "not installed here (pip install 'yolov8-nas[rtx]')" in why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rtx.missing() == [why, "this machine has no NVIDIA GPU that PyTorch can use"]
    with pytest.raises(InputError, match="use runtime: onnxruntime"):
        rtx.compiler()


# Set-up --------------------------------------------------------------------------------------------------------------


def test_the_lock_has_the_extras_versions_and_no_address() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["rtx"]
    pins = {line.partition(";")[0].strip() for line in extra}
    lock = (ROOT / "requirements" / "rtx.txt").read_text()
    assert set(re.findall(r"^(\S+==\S+) \\$", lock, re.MULTILINE)) == pins
    assert "://" not in lock and "index" not in lock
    assert lock.count("--hash=sha256:") >= len(pins)


def test_the_demo_does_without_it_and_tests_ask_for_it() -> None:
    rules = dict(re.findall(r"^([\w-]+|\$\(\w+\)): (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert "$(RTX)" in rules["test"].split() and "$(RTX)" in rules["test-fast"].split()
    assert "$(RTX)" not in rules["demo"].split() and "rtx" not in rules["$(READY)"]
    assert "rtx" not in (ROOT / "requirements" / "dev.txt").read_text()
    assert json.dumps(rules["$(RTX)"]).count("requirements/rtx.txt") == 1


# Where it is used -----------------------------------------------------------------------------------------------------


def test_a_target_that_it_does_not_support_is_refused_before_anyone_looks_for_it() -> None:
    for hardware, precision, words in (
        ("NVIDIA_A100", "fp16", "does not support NVIDIA A100"),
        ("h100-pcie", "int8", "does not support NVIDIA H100"),
        ("NVIDIA_T4", "int8", "no INT8 on Tesla T4"),
    ):
        config = RunConfig.parse(
            {"targets": [{"hardware": hardware, "runtime": "tensorrt-rtx", "precision": precision,
                          "constraints": ["latency<=8ms"]}]}, "run.yaml")  # fmt: skip
        for ask in (lambda c=config: branches(c, {}, []), lambda h=hardware, p=precision: resolve(h, rtx.RUNTIME, p)):
            with pytest.raises(InputError, match=words):
                ask()
    # One that it supports is looked for; nothing here has it.
    with pytest.raises(InputError, match="this machine has none"):
        resolve("NVIDIA_L4", rtx.RUNTIME, "int8")


def test_the_runtime_says_why_it_is_not_usable_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU" in str(find("tensorrt-rtx", "gpu", "fp16").why_not())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rtx, "_gpu", lambda: ("NVIDIA A100-PCIE-40GB", "8.0"))
    assert "does not support NVIDIA A100-PCIE-40GB" in str(find("tensorrt-rtx", "gpu", "fp16").why_not())
    with pytest.raises(InputError, match="NVIDIA A100-PCIE-40GB"):
        rtx.capability_here()
    monkeypatch.setattr(rtx, "_gpu", lambda: ("Tesla T4", "7.5"))
    assert "no INT8 on Tesla T4" in str(find("tensorrt-rtx", "gpu", "int8").why_not())


@compiled
def test_a_measured_network_is_built_for_the_gpu_that_is_here(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How hw-probe, the search and the export write a network: here with a card's name only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rtx, "_gpu", lambda: ("NVIDIA L4", "8.9"))
    runtime = find("tensorrt-rtx", "gpu", "fp16")
    engine = write_network(exports.network(Kind()), tmp_path / "a.engine", runtime=runtime, imgsz=SIDE)
    manifest = read_manifest(engine)
    assert (manifest.precision, manifest.built_for) == ("fp16", ("8.9",))


@compiled
def test_export_builds_for_a_gpu_that_is_elsewhere(exports: Exports, tmp_path: Path) -> None:
    checkpoint = tmp_path / "best.pt"
    save_checkpoint(exports.network(Kind()), checkpoint, names=["a", "b", "c"], imgsz=SIDE)
    engine = export(checkpoint, tmp_path / "best.engine", format="rtx", half=True, gpu="NVIDIA_T4")
    manifest = read_manifest(engine)
    assert (manifest.precision, manifest.built_for, manifest.source) == ("fp16", ("7.5",), "best.onnx")
    assert (tmp_path / "best.onnx").is_file()
    with pytest.raises(InputError, match=r"best\.engine.*neither Triton.*best\.onnx"):
        read_servable(engine)
    for asked, words in (({"gpu": "A100"}, "does not support"), ({"nms": True}, "suppress")):
        with pytest.raises(InputError, match=words):
            export(checkpoint, tmp_path / "other.engine", format="rtx", **asked)
    with pytest.raises(InputError, match='only format "rtx"'):
        export(checkpoint, tmp_path / "other.onnx", gpu="NVIDIA_T4")


@compiled
def test_doctor_tells_whether_it_is_usable_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor._tensorrt_rtx()
    assert found.ok and re.search(r"^1\.\d.*engines can be built here.*none can be run: .*no NVIDIA GPU", found.found)
    assert "compute capability 7.5, 8.6, 8.9" in found.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rtx, "_gpu", lambda: ("NVIDIA H100 PCIe", "9.0"))
    assert "none can be run: TensorRT for RTX does not support NVIDIA H100 PCIe" in doctor._tensorrt_rtx().found
    monkeypatch.setattr(rtx, "MODULES", ())
    assert "pip install" in doctor._tensorrt_rtx().found


# Names that only a GPU would reach -----------------------------------------------------------------------------------


@compiled
def test_every_name_that_the_runner_asks_for_is_one_of_the_installed_bindings() -> None:
    """The runner needs a GPU; that what it calls is there, and takes what it is given, does not."""
    trt = rtx.compiler()
    for owner, names in {
        "ICudaEngine": ("create_runtime_config", "create_execution_context", "get_tensor_name", "num_io_tensors",
                        "get_tensor_mode", "get_tensor_shape", "get_tensor_profile_shape", "get_tensor_dtype",
                        "device_memory_size_v2"),
        "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache"),
        "IRuntimeCache": ("deserialize", "serialize"),
        "IExecutionContext": ("set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"),
        "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    }.items():  # fmt: skip
        assert [name for name in names if not hasattr(getattr(trt, owner), name)] == [], owner
    assert "runtime_config: tensorrt_rtx" in trt.ICudaEngine.create_execution_context.__doc__


@compiled
def test_what_was_built_is_told_in_the_verdict(exports: Exports, tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    build_ahead(exports.file(Kind(precision="fp16")), engine, capabilities=["8.9"])
    told = status(engine).plain()
    assert (told["built"], told["compiler"], told["built_on"], told["built_for"]) == (True, RTX, NOWHERE, ["8.9"])
    assert told["version"] == rtx.compiler().__version__
    assert told["compiled_just_in_time_s"] is None, "no device has opened it"
    kernels_record_path(engine).write_text('{"seconds": 2.5}')
    assert status(engine).compiled_just_in_time_s == 2.5
    json.dumps(told)


class _Context:
    """What a runner is given where there is no GPU: it notes what it was asked."""

    def __init__(self, asked: list[str], takes: bool = True) -> None:
        self.asked, self.takes = asked, takes

    def create_runtime_config(self) -> _Context:
        return self

    def create_runtime_cache(self) -> _Context:
        return self

    def deserialize(self, data: bytes) -> bool:
        self.asked.append(f"deserialize {data!r}")
        return True

    def set_runtime_cache(self, cache: _Context) -> bool:
        self.asked.append("set")
        return self.takes

    def create_execution_context(self, *, runtime_config: _Context) -> _Context:
        self.asked.append("context")
        return self


def test_kernels_that_were_kept_are_given_to_the_engine(tmp_path: Path) -> None:
    """The order of calls only; names are held against the bindings below, and no kernel was compiled here."""
    asked: list[str] = []
    runner = object.__new__(rtx.RtxRunner)
    runner._engine = _Context(asked)  # type: ignore[assignment]
    runner._open_context(tmp_path / "a.engine")
    kernels_path(tmp_path / "a.engine").write_bytes(b"kept")
    runner._open_context(tmp_path / "a.engine")
    assert asked == ["set", "context", "deserialize b'kept'", "set", "context"]
    runner._engine = _Context(asked, takes=False)  # type: ignore[assignment]
    with pytest.raises(InputError, match="takes no runtime cache"):
        runner._open_context(tmp_path / "a.engine")


@compiled
def test_an_engine_is_refused_where_there_is_no_gpu(exports: Exports, tmp_path: Path) -> None:
    """What the library itself says: it opens no engine without a driver. So nothing was timed."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: make test-gpu runs engines")
    build_ahead(exports.file(Kind()), tmp_path / "a.engine")
    trt = rtx.compiler()
    with pytest.raises(InputError, match=r"a\.engine: TensorRT for RTX 1\..* cannot open it: .*CUDA"):
        load_engine(trt, split_header(tmp_path / "a.engine")[1], open_log(trt), "a.engine")


# What a benchmark makes of it ----------------------------------------------------------------------------------------


def test_what_is_told_of_a_candidate_is_stored_with_it(exports: Exports, tmp_path: Path) -> None:
    assert told_of(exports.file(Kind())) is None, "an ONNX file has no compiler"
    if LACKING:
        pytest.skip(" and ".join(LACKING))
    build_ahead(exports.file(Kind()), tmp_path / "a.engine")
    told = told_of(tmp_path / "a.engine")
    assert told is not None
    assert (told["name"], told["version"]) == (RTX, rtx.compiler().__version__)
    assert told["weight_bytes"] > 0 and told["plan_bytes"] > told["weight_bytes"]


def test_a_feature_that_tells_latency_is_found_to() -> None:
    rng = np.random.default_rng(0)
    work, fused = rng.uniform(1, 10, (60, 1)), rng.uniform(1, 10, (60, 1))
    latency = 0.2 + 0.1 * work[:, 0] + 0.3 * fused[:, 0]
    errors = [
        np.abs(compiler_features.held_out(features, latency) / latency - 1).mean()
        for features in (work, np.concatenate([work, fused], axis=1))
    ]
    assert errors[1] < 1e-6 < 0.1 < errors[0]
    with pytest.raises(InputError, match="fewer than the 10 folds"):
        compiler_features.held_out(work[:5], latency[:5])


@compiled
def test_the_benchmark_says_what_was_not_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["compiler_features.py", "--space", "tiny", "--imgsz", "64", "--networks", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    compiler_features.main()
    told = capsys.readouterr().out
    assert "latency: *not measured*: this machine has no NVIDIA GPU" in told
    assert "MAPE" not in told
    assert "fused_layers: the same for all (1)" in told
    assert re.search(r"weight_bytes: .* Spearman with multiply-accumulates", told)
