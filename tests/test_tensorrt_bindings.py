"""Every name of TensorRT that the code uses is one of the real bindings, of TensorRT 10 and of 11.

TensorRT's libraries cannot be had without its licence and a GPU, its Python bindings can: what they offer is recorded
in `tensorrt_api/`. The code is read, not run: from the signatures follows which class each object is of, and so each
method, property, enum member and call is held against the record.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tensorrt_surface as surface
from tensorrt_api import record

ROOT = Path(__file__).parents[1]
MODULES = [path for path in (ROOT / "yolov8_nas").rglob("*.py") if "import tensorrt as trt" in path.read_text()]


@dataclass
class Reader:
    """Reads modules and notes what they ask of TensorRT.

    Attributes:
        api: What a version of the bindings has.
        used: Names that are there, as `Class.name`.
        faults: What is not there, or is called in another way than it can be.
    """

    api: dict[str, Any]
    used: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    returns: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def read(self, modules: list[ast.Module]) -> None:
        for module in modules:
            for node in ast.walk(module):
                if isinstance(node, ast.FunctionDef) and (kind := _annotated(node.returns)):
                    self.returns[node.name] = kind
                elif isinstance(node, ast.AnnAssign) and (kind := _annotated(node.annotation)):
                    self.attributes[ast.unparse(node.target)] = kind
        for module in modules:
            for node in ast.walk(module):
                if isinstance(node, ast.FunctionDef):
                    self._read_function(node)

    def _read_function(self, function: ast.FunctionDef) -> None:
        self.names = {
            argument.arg: kind
            for argument in (*function.args.args, *function.args.kwonlyargs)
            if (kind := _annotated(argument.annotation))
        }
        nodes = sorted(
            (node for node in ast.walk(function) if hasattr(node, "lineno")), key=lambda n: (n.lineno, n.col_offset)
        )
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.names[node.targets[0].id] = self.kind(node.value)
        for node in nodes:
            if isinstance(node, ast.Attribute | ast.Call):
                self.kind(node)
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Attribute):
                owner = self.kind(target.value)
                properties = self.api.get(owner, {}).get("properties", {}) if owner else {}
                if owner in self.api and not properties.get(target.attr):
                    self.faults.append(f"line {node.lineno}: {owner}.{target.attr} cannot be set")

    def kind(self, node: ast.expr) -> str:
        """What an expression is: a class's name for an instance, `class X`, `method X.y`, `trt`, or nothing known."""
        if isinstance(node, ast.Name):
            return "trt" if node.id == "trt" else self.names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.attributes.get(node.attr, "")
            return self._member(self.kind(node.value), node)
        if isinstance(node, ast.Call):
            return self._called(node)
        return ""

    def _member(self, owner: str, node: ast.Attribute) -> str:
        name = node.attr
        if not owner or owner.startswith("method"):
            return ""
        if owner == "trt":
            if name == "__version__":
                return ""
            if name not in self.api:
                self.faults.append(f"line {node.lineno}: trt.{name} is not there")
                return ""
            self.used.add(name)
            described = self.api[name]
            return f"class {name}" if isinstance(described, dict) else f"method {name}"
        of_class = owner.removeprefix("class ")
        described = self.api[of_class]
        if owner.startswith("class "):
            known = {*described.get("members", {}), *described.get("values", {}), "__init__"}
            known |= {"__members__"} if "members" in described else set()
        else:
            known = {*described.get("methods", {}), *described.get("properties", {})}
        if name not in known:
            self.faults.append(f"line {node.lineno}: {of_class}.{name} is not there")
            return ""
        self.used.add(f"{of_class}.{name}")
        return f"method {of_class}.{name}" if name in described.get("methods", {}) else ""

    def _called(self, node: ast.Call) -> str:
        if isinstance(node.func, ast.Name) and node.func.id in self.returns:
            return self.returns[node.func.id]
        called = self.kind(node.func)
        if called.startswith("class "):
            name = called.removeprefix("class ")
            signatures, given = self.api[name].get("init", []), name
        elif called.startswith("method "):
            owner, _, method = called.removeprefix("method ").rpartition(".")
            signatures = self.api[owner]["methods"][method] if owner else self.api[method]
            given = surface.signature(signatures[0]).return_annotation
        else:
            return ""
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        keywords = [keyword.arg or "**" for keyword in node.keywords]
        if starred or not surface.fits(signatures, len(node.args), keywords):
            self.faults.append(f"line {node.lineno}: {ast.unparse(node)} does not fit {' or '.join(signatures)}")
        return given if given in self.api else ""


def _annotated(annotation: ast.expr | None) -> str:
    """`Builder` of an annotation `trt.Builder`."""
    text = ast.unparse(annotation) if annotation else ""
    return text.removeprefix("trt.") if text.startswith("trt.") else ""


def _read(version: str, sources: list[str]) -> Reader:
    reader = Reader(surface.load(version))
    reader.read([ast.parse(source) for source in sources])
    return reader


def test_two_major_versions_are_recorded() -> None:
    assert {version.split(".")[0] for version in surface.VERSIONS} == {"10", "11"}


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_every_name_and_call_is_one_of_the_real_bindings(version: str) -> None:
    assert len(MODULES) == 2
    reader = _read(version, [path.read_text() for path in MODULES])
    assert reader.faults == []
    # What the route stands on: were one of these not seen, the reading would have lost its way.
    assert {
        "Builder.create_network",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse",
        "OnnxParser.get_error",
        "ParserError.node_operator",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.builder_optimization_level",
        "IOptimizationProfile.set_shape",
        "IBuilderConfig.set_timing_cache",
        "ITimingCache.serialize",
        "Builder.build_serialized_network",
        "Runtime.deserialize_cuda_engine",
        "EngineInspector.get_engine_information",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.execute_async_v3",
    } <= reader.used


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_no_use_of_tensorrt_escapes_the_reading(version: str) -> None:
    """An attribute whose owner is not known, and which only TensorRT's classes have, would not have been checked."""
    api = surface.load(version)
    members = {
        name
        for described in api.values()
        if isinstance(described, dict)
        for part in ("methods", "properties")
        for name in described.get(part, {})
    }
    sources = [path.read_text() for path in MODULES]
    checked = {name.split(".")[1] for name in _read(version, sources).used if "." in name}
    own = {"input", "node", "type", "dtype", "shape", "numpy", "major", "minor"}  # of ONNX, NumPy, PyTorch
    own |= {*dir(list), *dir(dict), *dir(Path)}
    for path in (*MODULES, ROOT / "yolov8_nas" / "measure" / "engine_file.py"):
        fields = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.AnnAssign))
        own |= {ast.unparse(node.target) for node in fields if not _annotated(node.annotation)}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and node.attr in members - own:
                assert node.attr in checked, f"line {node.lineno}: {ast.unparse(node)}: annotate what it is taken from"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("trt.BuilderFlag.INT8", "BuilderFlag.INT8 is not there"),
        ("trt.IInt8Calibrator()", "trt.IInt8Calibrator is not there"),
        ("trt.Builder(log).create_network(0, 1)", "does not fit"),
        ("trt.Builder(log).create_builder_config().int8_calibrator", "int8_calibrator is not there"),
        ("config.set_timing_cache(cache)", "does not fit"),
        ("config.num_optimization_profiles = 1", "cannot be set"),
        ("trt.Runtime(log).deserialize_cuda_engine(b'').num_bindings", "num_bindings is not there"),
    ],
)
def test_the_reading_finds_what_the_bindings_lack(line: str, fault: str) -> None:
    version = next(version for version in surface.VERSIONS if version.startswith("11."))
    source = f"def build(trt, log, cache, config: trt.IBuilderConfig):\n    {line}\n"
    assert any(fault in found for found in _read(version, [source]).faults)


def test_traps_between_the_versions() -> None:
    """Why flags and sources are named and never numbered."""
    ten, eleven = (surface.load(version) for version in surface.VERSIONS)
    assert ten["NetworkDefinitionCreationFlag"]["members"]["STRONGLY_TYPED"] == 1
    assert eleven["NetworkDefinitionCreationFlag"]["members"]["STRONGLY_TYPED"] == 0
    assert ten["TacticSource"]["members"]["JIT_CONVOLUTIONS"] != eleven["TacticSource"]["members"]["JIT_CONVOLUTIONS"]
    assert "FP16" in ten["BuilderFlag"]["members"]
    assert not {"FP16", "INT8", "BF16"} & set(eleven["BuilderFlag"]["members"])


@pytest.mark.parametrize("version", surface.VERSIONS)
def test_doubles_have_the_names_and_signatures_of_the_real_classes_only(version: str) -> None:
    builder = surface.double(version).doubles["Builder"]
    with pytest.raises(TypeError):
        builder.create_network(0, 1)
    with pytest.raises(TypeError):
        builder.create_builder_config(level=3)
    with pytest.raises(AttributeError):
        builder.build_cuda_engine  # noqa: B018
    with pytest.raises(AttributeError):
        builder.max_batch_size = 1


def _at_hand() -> list[Path | None]:
    """Bindings to record anew: wheels in the folder `TENSORRT_WHEELS`, and those installed without libraries."""
    wheels: list[Path | None] = sorted(Path(os.environ.get("TENSORRT_WHEELS", "/nonexistent")).glob("tensorrt_*.whl"))
    alone = importlib.util.find_spec("tensorrt_bindings") and not importlib.util.find_spec("tensorrt_libs")
    return [*wheels, None] if alone else wheels


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not here, and the stub libraries need it")
@pytest.mark.skipif(not _at_hand(), reason="no bindings at hand: install them, or name wheels with TENSORRT_WHEELS")
@pytest.mark.parametrize("wheel", _at_hand(), ids=lambda wheel: wheel.name if wheel else "installed")
def test_the_record_is_what_the_real_bindings_have(wheel: Path | None) -> None:
    found = record.record(wheel)
    if found["version"] not in surface.VERSIONS:
        pytest.skip(f"version {found['version']} is not recorded; python tests/tensorrt_api/record.py records it")
    recorded = json.loads((surface.FOLDER / f"{found['version']}.json").read_text())
    if found["python"] != recorded["python"]:
        pytest.skip(f"recorded with Python {recorded['python']}: docstrings of {found['python']} are worded otherwise")
    assert found["api"] == recorded["api"]
