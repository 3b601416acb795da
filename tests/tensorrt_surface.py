"""TensorRT's Python bindings as recorded from the real wheels (`tensorrt_api/`), and doubles made from them.

A double has the names and the signatures of the real class and does nothing: with it the order of calls can be looked
at, and not what they would do.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parent / "tensorrt_api"
RECORDED = sorted(FOLDER.glob("*.json"))
VERSIONS = [path.stem for path in RECORDED]

CPP_NAMES = {"nvonnxparser::IParserError": "ParserError", "nvonnxparser::OnnxParserFlag": "OnnxParserFlag"}
"""Names of C++ that the docstrings have where the Python class was bound later."""

DOUBLED = (
    "Builder",
    "IBuilderConfig",
    "IOptimizationProfile",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "EngineInspector",
)
"""Classes whose objects the code asks for anything."""


@functools.cache
def load(version: str) -> dict[str, Any]:
    """The recorded names of a version."""
    api: dict[str, Any] = json.loads((FOLDER / f"{version}.json").read_text())["api"]
    return api


def signature(text: str) -> inspect.Signature:
    """A signature of a docstring, such as `(flags: SupportsInt = 0) -> INetworkDefinition`."""
    inside, returns = re.fullmatch(r"\((.*)\) -> (.*)", text).groups()  # type: ignore[union-attr]
    parameters = []
    for part in _split(inside):
        declared, equals, _ = part.partition(" = ")
        name, _, kind = declared.partition(": ")
        default = None if equals else inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        )
    return inspect.Signature(parameters, return_annotation=CPP_NAMES.get(returns, returns))


def _split(inside: str) -> Iterator[str]:
    """Parts between commas that stand in no bracket."""
    depth, part = 0, ""
    for letter in inside:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += letter
    if part.strip():
        yield part.strip()


def fits(signatures: list[str], arguments: int, keywords: list[str]) -> bool:
    """Whether one of the overloads takes so many positional arguments and these keywords."""
    for text in signatures:
        try:
            signature(text).bind(*[None] * arguments, **dict.fromkeys(keywords))
        except TypeError:
            continue
        return True
    return False


def double(version: str) -> Any:
    """A module with the enums of a version, and for each class of `DOUBLED` an autospecced double of an instance.

    `trt.Builder(log)` gives `trt.doubles["Builder"]`, whose methods check their arguments; where a method gives an
    object of a class, it gives that class's double. `trt.calls.mock_calls` has all calls in their order.
    """
    api = load(version)
    trt = SimpleNamespace(__version__=version, calls=mock.Mock(), doubles={})
    classes = {name: described for name, described in api.items() if isinstance(described, dict)}
    for name, described in classes.items():
        if "members" in described:
            setattr(trt, name, enum.IntEnum(name, described["members"]))
        elif name in DOUBLED:
            instance = mock.create_autospec(_class(name, described), instance=True, spec_set=True)
            trt.doubles[name] = instance
            trt.calls.attach_mock(instance, name)
            setattr(trt, name, _constructor(instance, described["init"]))
    severities = api["ILogger"]["values"]  # derived from, so a real class
    trt.ILogger = type("ILogger", (), {"__init__": lambda self: None, **{name: name for name in severities}})
    for name, instance in trt.doubles.items():
        for method, signatures in classes[name]["methods"].items():
            given = signature(signatures[0]).return_annotation if signatures else None
            if given in trt.doubles:
                getattr(instance, method).return_value = trt.doubles[given]
            elif given == "bool":
                getattr(instance, method).return_value = True
            elif given == "int":
                getattr(instance, method).return_value = 0
    trt.init_libnvinfer_plugins = mock.Mock(return_value=True)
    trt.calls.attach_mock(trt.init_libnvinfer_plugins, "init_libnvinfer_plugins")
    return trt


def _constructor(instance: Any, init: list[str]) -> Any:
    def construct(*arguments: Any, **keywords: Any) -> Any:
        assert fits(init, len(arguments), list(keywords)), f"{instance}: no constructor takes {arguments} {keywords}"
        return instance

    return construct


def _class(name: str, described: dict[str, Any]) -> type:
    members: dict[str, Any] = {method: _method(s) for method, s in described["methods"].items()}
    for name_, writable in described["properties"].items():
        members[name_] = property(lambda self: None, (lambda self, value: None) if writable else None)
    return type(name, (), members)


def _method(signatures: list[str]) -> Any:
    def method(self: Any, *arguments: Any, **keywords: Any) -> None:
        """Does nothing."""

    if len(signatures) == 1:
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        plain = [
            parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for parameter in signature(signatures[0]).parameters.values()
        ]
        method.__signature__ = inspect.Signature([this, *plain])  # type: ignore[attr-defined]
    return method
