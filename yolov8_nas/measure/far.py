"""Measures a bundle on the device that it was made for; this is the program of `measure.pyz`.

    python measure.pyz

It needs Python 3.10 or later, NumPy and ONNX Runtime, and times networks by the very code that times them elsewhere.
A measurement that was stopped goes on where it was. The result is one file, `results.json`, with a digest of itself.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from yolov8_nas.device.counters import why_not
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import Profile, available_cores, cpu_profile, regime, slug
from yolov8_nas.errors import InputError
from yolov8_nas.files import canonical_digest, read_json, write_json
from yolov8_nas.measure.benchmark import Measurement, energy_counter, measure_what_can_be
from yolov8_nas.measure.protocol import Protocol
from yolov8_nas.measure.runtime import Runtime, find

FORMAT: Final = 1
"""Version of bundles and results; raised when either changes so that older ones mean something else."""

MANIFEST: Final = "bundle.json"
RESULTS: Final = "results.json"

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with the digest of itself."""
    return {**content, "digest": canonical_digest(content)}


def unsealed(source: Path) -> dict[str, Any]:
    """Read a file of sealed data.

    Raises:
        InputError: It is missing, damaged or changed, or of another format.
    """
    try:
        content = read_json(source)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    except InputError as error:
        raise InputError(f"{source}: damaged, {str(error).removeprefix(f'{source}: ')}; copy it again") from None
    return check_seal(content, source)


def check_seal(content: Any, source: Path) -> dict[str, Any]:
    """The content, if it is whole and of this format.

    Raises:
        InputError: It is not.
    """
    if not isinstance(content, dict) or "digest" not in content:
        raise InputError(f"{source}: has no digest of itself, so it is no such file, or a damaged one; copy it again")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{source}: format {content.get('format')!r}, and this version reads {FORMAT}; "
            "pack a bundle and measure it with the same version (yolov8-nas probe CONFIG --bundle FILE)"
        )
    body = {key: value for key, value in content.items() if key != "digest"}
    try:
        whole = canonical_digest(body) == content["digest"]
    except ValueError:  # a number that is too large for any
        whole = False
    if not whole:
        raise InputError(f"{source}: has changed since it was written, or is damaged; copy it again, or measure again")
    return content


def measure_bundle(folder: Path) -> Path:
    """Measure the networks of an unpacked bundle.

    Args:
        folder: Where it was unpacked; the result is written there.

    Returns:
        The file with the results.

    Raises:
        InputError: The bundle is damaged, or this device cannot measure it.
    """
    order = unsealed(folder / MANIFEST)
    files = [folder / "networks" / name for name in order["networks"]]
    hashes = {file.name: _sha256(file) for file in files}
    for name, expected in order["networks"].items():
        if hashes[name] != expected:
            raise InputError(f"{folder / 'networks' / name}: has changed since it was packed; unpack the bundle again")
    runtime = find(order["runtime"], order["kind"], order["precision"])
    if reason := runtime.why_not():
        raise InputError(f"this device cannot measure the bundle with {runtime.name}: {reason}")
    profile = _profile(order, runtime)
    print(f"{len(files)} networks on {profile.model} with {runtime.name} {runtime.version}", file=sys.stderr)
    counter = energy_counter(order["kind"])
    with HostLock(note=lambda text: print(text, file=sys.stderr)).measuring():
        before = regime()
        found = measure_what_can_be(
            files,
            threads=profile.threads,
            runtime=runtime,
            batch=order["batch"],
            protocol=Protocol(**order["protocol"]),
            reference=folder / "networks" / order["reference"],
            progress=_tell,
            checkpoint=folder / f"legs-{order['digest'][:12]}.jsonl",
        )
        after = regime()
    content = {
        "format": FORMAT,
        "bundle": order,
        "profile": profile.to_dict(),
        "key": profile.key,
        "counter": counter.name if counter else None,
        "no_counter": why_not(order["kind"]),
        "regime": {"before": before, "after": after},
        "networks": hashes,
        "measured": {
            file.name: one.to_dict() if isinstance(one, Measurement) else {"failed": one.reason}
            for file, one in zip(files, found, strict=True)
        },
    }
    write_json(folder / RESULTS, sealed(content))
    return folder / RESULTS


def _profile(order: Mapping[str, Any], runtime: Runtime) -> Profile:
    """What this device is, in the words that a configuration has for it."""
    if order["kind"] == "gpu":
        return _gpu_profile(runtime)
    threads = order["threads"] or available_cores()
    if threads > available_cores():
        raise InputError(
            f"the bundle is for {threads} threads, and this process may use {available_cores()} cores; "
            f"pack it for hardware cpu-{available_cores()}t"
        )
    found = cpu_profile(f"cpu-{threads}t", threads)
    return Profile(**{**vars(found), "runtime": runtime.to_dict()})


def _gpu_profile(runtime: Runtime) -> Profile:
    """The GPU that CUDA numbers 0, as its driver tells it: NVML tells little of a Jetson, and is a package more."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    memory, version = ctypes.c_size_t(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    for status in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetName(name, len(name), device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    ):
        if status:
            raise InputError(f"NVIDIA's driver does not tell what the GPU is (error {status}); check nvidia-smi")
    model = _board() or name.value.decode()
    identity = slug(model)
    return Profile(
        name=identity,
        id=identity,
        kind="gpu",
        model=model,
        cores=available_cores(),
        threads=1,
        instructions=(),
        caches={},
        memory_gb=round(memory.value / 2**30, 1),
        runtime=runtime.to_dict(),
        system=f"{platform.system()} {platform.release()}",
        gpu={"compute_capability": f"{major.value}.{minor.value}", "cuda_driver": version.value},
    )


def _board(device_tree: Path = Path("/proc/device-tree/model")) -> str | None:
    """Name of a Jetson's board; its driver calls the GPU by the name of the chip's family."""
    try:
        model = device_tree.read_text().strip("\0\n ")
    except OSError:
        return None
    return model if "jetson" in model.lower() else None


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); unpack the bundle again") from None


def _tell(done: float, total: float) -> None:
    end = "" if sys.stderr.isatty() and done < total else "\n"
    print(f"\rtimed {done / total:4.0%}", end=end, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `measure.pyz`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="measure.pyz", description="Measure the networks of a bundle on this device.")
    parser.add_argument("folder", type=Path, nargs="?", help="where the bundle was unpacked")
    asked = parser.parse_args(arguments)
    program = Path(sys.argv[0]).absolute()
    try:
        results = measure_bundle(asked.folder or program.parent)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {results}; take it back and give it to: yolov8-nas probe CONFIG --import {results.name}")
    return 0
