"""A package index that stands in for NVIDIA's: TensorRT's own packages, with stubs for its libraries.

The libraries are on NVIDIA's index alone, under NVIDIA's licence. The bindings, and the package that holds both
together, are on the public one, too: an image can be built to its end, and TensorRT be imported in it. It does nothing.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from tensorrt_api import record

LIBS = "tensorrt-cu13-libs"
OPEN = """import ctypes, pathlib
for path in pathlib.Path(__file__).parent.glob("lib*.so.*"):
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
"""


def make(folder: Path, version: str, packages: tuple[str, ...]) -> str:
    """Write the index; the lock file of what is in it.

    Args:
        folder: Where it goes.
        version: TensorRT's.
        packages: Names of its packages.
    """
    lock = ""
    for package in packages:
        place = folder / package
        place.mkdir(parents=True)
        if package == LIBS:
            _write_stubs(place, version)
        else:
            _download(place, f"{package}=={version}")
        (file,) = place.iterdir()
        lock += f"{package}=={version} --hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        (place / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>\n')
    return lock


def _download(folder: Path, asked: str) -> None:
    form = ["--no-build-isolation"]
    if "bindings" in asked:  # of the images' Python, which need not be this one
        form = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", folder, asked]
    subprocess.run(pip, check=True)


def _write_stubs(folder: Path, version: str) -> None:
    name = f"{LIBS.replace('-', '_')}-{version}"
    stubs = folder / "stubs"
    stubs.mkdir()
    libraries = [record.stub(stubs, library, version.partition(".")[0]) for library in record.LIBRARIES]
    files: dict[str, str | bytes] = {
        "tensorrt_libs/__init__.py": OPEN,
        **{f"tensorrt_libs/{path.name}": path.read_bytes() for path in libraries},
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {LIBS}\nVersion: {version}\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
        f"{name}.dist-info/RECORD": "",
    }
    for path in stubs.iterdir():
        path.unlink()
    stubs.rmdir()
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        for member, content in files.items():
            wheel.writestr(zipfile.ZipInfo(member), content)  # without the time of day: the same file each time
