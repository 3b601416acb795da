"""Imports never point upward."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from yolov8_nas.runner.stage import STAGES

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("credentials", "foreign", "home", "quiet"),
    ("errors",),
    ("paths", "reading"),
    ("files", "names", "signing", "terminal", "yaml_text"),
    ("space",),
    ("config", "device"),
    ("store",),
    ("checkpoint",),
    ("evaluation",),
    ("runner",),
    ("measure", "power"),
    ("data", "supernet"),
    ("train",),
    ("export",),
    ("search",),
    ("deploy",),
    ("advice",),
    ("registry",),
    ("report",),
    ("analysis",),
    ("stages",),
    ("run",),
    ("nas",),
    ("commands",),
    ("__main__",),
)
"""The folders of the library, and the modules beside them, from the bottom up. What stands in a line imports from the
lines above it here: nothing from below, and nothing from its neighbours."""


def _layer(module: str) -> int:
    """The layer of a module (`search.searcher`)."""
    folder = module.split(".")[0]
    for number, layer in enumerate(LAYERS):
        if folder in layer:
            return number
    raise AssertionError(f"yolov8_nas.{folder} stands in no layer: give it a place in LAYERS")


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports when it runs, wherever in the file; not what only type checkers see."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT / "yolov8_nas").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _known(name: str) -> str:
    """The module of the library that an imported name (`yolov8_nas.space.SearchSpace`) belongs to."""
    parts = name.split(".")[1:]
    while parts:
        path = ROOT.joinpath("yolov8_nas", *parts)
        if path.with_suffix(".py").is_file() or path.is_dir():
            return ".".join(parts)
        parts.pop()
    return ""


LIBRARY = sorted((ROOT / "yolov8_nas").rglob("*.py"))


def test_no_import_points_upward_or_sideways() -> None:
    for path in LIBRARY:
        module = _module(path)
        for name in _imports(path):
            top = name.split(".")[0]
            assert top not in ("components", "pipelines", "kfp"), (
                f"{path} imports {name}: the library knows no Kubeflow"
            )
            if top != "yolov8_nas" or not module:
                continue
            imported = _known(name)
            if imported.split(".")[0] != module.split(".")[0]:
                assert imported and _layer(imported) < _layer(module), f"{path} imports {name}, which is not below it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {_module(path): {_known(name) for name in _imports(path) if name.startswith("yolov8_nas.")}
             for path in LIBRARY}  # fmt: skip
    graph = {module: imported - {module, module.rpartition(".")[0]} for module, imported in graph.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' imports '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("folder", ["components", "pipelines"])
def test_wrappers_import_the_library_and_each_other_only(folder: str) -> None:
    allowed = {"components", "yolov8_nas", "kfp", *sys.stdlib_module_names}
    if folder == "components":  # a step on several nodes speaks with the cluster
        allowed |= {"kubernetes", "urllib3"}
    if folder == "pipelines":  # it speaks with servers and people, too
        allowed |= {"pipelines", "kfp_server_api", "kubernetes", "rich", "typer", "urllib3", "yaml"}
    for path in (ROOT / folder).rglob("*.py"):
        for name in _imports(path):
            assert name.split(".")[0] in allowed, f"{path} imports {name}"


SETTINGS = ", ".join(f"yolov8_nas.stages.{stage.replace('-', '_')}" for stage in STAGES)


@pytest.mark.parametrize(
    "module", ["yolov8_nas.commands.main", "yolov8_nas.runner.stage", "yolov8_nas.store.store", SETTINGS]
)
def test_what_must_start_in_a_blink_imports_nothing_heavy(module: str) -> None:
    heavy = ("torch", "ultralytics", "mlflow", "onnxruntime", "onnx", "plotly", "kfp", "scipy", "cv2")
    code = f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
