"""Imports never point upward."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("credentials", "foreign", "home", "quiet"),
    ("errors",),
    ("paths", "reading"),
    ("yaml_text",),
    ("files", "names", "signing", "space", "store", "terminal"),
    ("search.constraint", "config", "host", "progress", "remote_store", "s3", "web"),
    ("checkpoint", "supernet.derive"),
    ("data", "hardware"),
    ("evaluation", "supernet"),
    ("deploy",),
    ("search",),
    ("stages.stage",),
    ("registry", "report", "summary"),
    ("stages",),
    ("lifecycle", "preflight", "doctor", "display", "apart", "analysis", "retraining"),
    ("local", "nas"),
    ("cli_analyze", "cli_data", "cli_models", "cli_sensitivity"),
    ("cli",),
)
"""The modules of the library from the bottom up. A module may import from its own line and from those above it here,
except that those of the first line import none of the library."""


def _layer(module: str) -> int:
    """The layer of a module (`search.constraint`); the longest name that fits counts."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, layer in enumerate(LAYERS):
            if name in layer:
                return number
    raise AssertionError(f"yolov8_nas.{module} stands in no layer: give it a place in LAYERS")


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


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_upward(path: Path) -> None:
    module = _module(path)
    for name in _imports(path):
        top = name.split(".")[0]
        assert top not in ("components", "pipelines", "kfp"), f"{path} imports {name}: the library knows no Kubeflow"
        if top != "yolov8_nas" or not module:
            continue
        imported = _known(name)
        own, other = _layer(module), _layer(imported) if imported else 0
        assert own > 0, f"{path} imports {name}: it belongs to the first line, which imports none of its siblings"
        assert other <= own, f"{path} imports {name}, which lies above it"


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


@pytest.mark.parametrize("module", ["yolov8_nas.cli", "yolov8_nas.stages.stage", "yolov8_nas.store"])
def test_what_must_start_in_a_blink_imports_nothing_heavy(module: str) -> None:
    heavy = ("torch", "ultralytics", "mlflow", "onnxruntime", "onnx", "plotly", "kfp", "scipy", "cv2")
    code = f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
