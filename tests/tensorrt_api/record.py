"""Records what TensorRT's Python bindings offer: every class, method, property and enum member, with signatures.

The bindings are a wheel of their own (`tensorrt-cu13-bindings`); the libraries that they need come from elsewhere and
want a GPU's driver. To look at the bindings the libraries need not work, only be there: three stubs are compiled that
export the nine functions which the bindings import, each returning nothing. So this tells what can be called and how,
and nothing of what a call would do.

    python tests/tensorrt_api/record.py tensorrt_cu13_bindings-11.4.0.106-cp311-none-manylinux_2_28_x86_64.whl

writes `11.4.0.106.json` beside this file. Without a wheel the installed bindings are recorded. It needs gcc, and the
Python that the wheel is for.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)


def record(wheel: Path | None = None) -> dict[str, Any]:
    """The API of a wheel of the bindings, or of the installed ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wheel:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "wheel")
        # In a process of its own: two versions of the bindings do not go into one.
        command = [sys.executable, __file__, "--dump", str(folder), *([str(folder / "wheel")] if wheel else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the bindings cannot be imported: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    origin = {"wheel": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()} if wheel else {}
    return {"version": found["version"], "python": found["python"], **origin, "api": found["api"]}


def dump(folder: Path, wheel: str | None) -> None:
    """Print the API as JSON."""
    if wheel:
        sys.path.insert(0, wheel)
    source = importlib.util.find_spec("tensorrt_bindings")
    if source is None or source.origin is None:
        raise SystemExit("tensorrt_bindings is not installed")
    text = (Path(source.origin)).read_text()
    version = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)
    assert version
    for library in LIBRARIES:
        path = stub(folder, library, version[1].split(".")[0])
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    trt = importlib.import_module("tensorrt_bindings")
    api = {name: _described(getattr(trt, name)) for name in dir(trt) if not name.startswith("_")}
    api = {name: described for name, described in sorted(api.items()) if described is not None}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(json.dumps({"version": trt.__version__, "python": python, "api": api}))


def stub(folder: Path, library: str, major: str) -> Path:
    """Compile a library that exports what the bindings import."""
    source, path = folder / "stub.c", folder / f"lib{library}.so.{major}"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, source], check=True)
    return path


def _described(thing: Any) -> Any:
    """A class as a mapping, a function as its signatures, an enum member (`trt.float32`) as `Class.MEMBER`."""
    if isinstance(thing, type):
        if hasattr(thing, "__members__"):
            return {"members": {name: int(value) for name, value in thing.__members__.items()}}
        members = {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}
        return {
            "init": _signatures(thing.__init__),
            "methods": {name: _signatures(m) for name, m in members.items() if callable(m) and not isinstance(m, type)},
            "properties": {name: m.fset is not None for name, m in members.items() if isinstance(m, property)},
            "values": {name: str(m) for name, m in members.items() if hasattr(type(m), "__members__")},
        }
    if hasattr(type(thing), "__members__"):
        return f"{type(thing).__name__}.{thing.name}"
    return _signatures(thing) if type(thing).__module__ == "builtins" and callable(thing) else None


def _signatures(function: Any) -> list[str]:
    """Signatures from a docstring, one per overload, without the module's name and without `self`."""
    found = re.findall(r"^(?:\d+\. )?\w+(\(.*\) -> .*)$", function.__doc__ or "", re.MULTILINE)
    plain = (
        re.sub(r"\b(tensorrt_bindings\.tensorrt|typing|typing_extensions|collections\.abc)\.", "", s) for s in found
    )
    return [re.sub(r"^\(self: [\w.]+(, )?", "(", signature) for signature in plain if "*args" not in signature]


def main() -> None:
    if sys.argv[1:2] == ["--dump"]:
        dump(Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
        return
    recorded = record(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    path = Path(__file__).with_name(f"{recorded['version']}.json")
    head = json.dumps({key: value for key, value in recorded.items() if key != "api"}, indent=1)
    rows = (f"  {json.dumps(name)}: {json.dumps(described)}" for name, described in recorded["api"].items())
    path.write_text(head[:-2] + ',\n "api": {\n' + ",\n".join(rows) + "\n }\n}\n")
    print(f"{path}: {len(recorded['api'])} names")


if __name__ == "__main__":
    main()
