"""Types reach from door to door, and nothing is too long to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from test_imports import LIBRARY, ROOT

LINES_OF_FUNCTIONS: Final = 60
LINES_OF_CLASSES: Final = 250
LOOK_UPS: Final = 10
"""String look-ups in all stages together at most: of what a mapping has by precision or split, not of JSON."""

CODE = [*LIBRARY, *(path for path in sorted((ROOT / "components").rglob("*.py")) if "tests" not in path.parts)]


def _look_ups(path: Path) -> Iterator[str]:
    """Where something is looked up by a name in the source, but for the folders of a stage's inputs."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Subscript(value=looked, slice=ast.Constant(value=str(name))):
                place = ast.unparse(looked)
                if place not in ("Literal", "os.environ") and not place.endswith("inputs"):
                    yield f"{path}:{node.lineno}: {place}[{name!r}]"
            case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str()), *_]):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_stages_hardly_look_anything_up_by_name() -> None:
    found = [one for path in sorted((ROOT / "yolov8_nas" / "stages").rglob("*.py")) for one in _look_ups(path)]
    assert len(found) <= LOOK_UPS, "\n".join(found)


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function; of Kubeflow's, whose parameters and their descriptions are its interface, those it runs."""
    if any(ast.unparse(decorator).startswith("dsl.") for decorator in function.decorator_list):
        first = function.body[1] if ast.get_docstring(function) else function.body[0]
    else:
        first = function
    assert function.end_lineno is not None
    return function.end_lineno - first.lineno + 1


def test_no_function_and_no_class_is_long() -> None:
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert _lines(node) <= LINES_OF_FUNCTIONS, f"{path}: {node.name} has {_lines(node)} lines"
            elif isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LINES_OF_CLASSES, f"{path}: {node.name} has {lines} lines"
