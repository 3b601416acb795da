"""TensorRT engine files: the header before the engine, and the manifest beside it.

    model.engine               4 bytes length (little-endian), so many bytes of JSON, then TensorRT's own bytes
    model.engine.json          `EngineManifest`: from what, where and how it was built, and its digest
    model.engine.layers.json   what TensorRT's engine inspector tells of it

The header is Ultralytics', so that stock `YOLO("model.engine")` knows classes and sizes. An engine belongs to one GPU
model and one version of TensorRT, and what TensorRT says when it gets another helps nobody; so the manifest is asked
first. Nothing here needs TensorRT or a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from yolov8_nas.errors import InputError
from yolov8_nas.files import atomic_write, file_sha256, read_json, write_json
from yolov8_nas.reading import parse_json

SCHEMA: Final = 1

TENSORRT: Final = "TensorRT"
RTX: Final = "TensorRT for RTX"
"""The compilers: an engine of one is nothing to the other."""

_LENGTH: Final = 4


@dataclass(frozen=True)
class GpuEnvironment:
    """Where an engine was built, or is to run.

    Attributes:
        gpu: The GPU's product name as the driver gives it; a MIG slice has its own.
        compute_capability: For example `8.6`.
        tensorrt: Version of TensorRT, or of TensorRT for RTX.
        cuda: Version of the CUDA runtime in the process.
        driver: Version of the GPU's driver.
        compiler: `TENSORRT` or `RTX`.
    """

    gpu: str
    compute_capability: str
    tensorrt: str
    cuda: str
    driver: str
    compiler: str = TENSORRT


@dataclass(frozen=True)
class EngineManifest:
    """What is known of an engine file.

    Attributes:
        sha256: Digest of the engine file, header included.
        size: Its length in bytes.
        built_on: Where it was built.
        precision: `fp32`, `fp16` or `int8`: the lowest in the network that it was built from.
        inputs: Smallest, best and largest shape of each input by its name; equal where the shape is fixed.
        outputs: Shape of each output by its name, -1 where it depends on the input.
        source: Name of the ONNX file that it was built from.
        source_sha256: Digest of that file.
        options: Options of the build.
        builds_ms: What was measured of each build, in order; the engine is the fastest of them.
        layers: Summary of what TensorRT's inspector tells: layers, fusions, reformats; of an engine built ahead of
            time, what the builder told without a device.
        built_for: Compute capabilities that an engine built ahead of time is for, on any GPU of one of them; empty for
            one that belongs to the GPU that it was built on.
    """

    sha256: str
    size: int
    built_on: GpuEnvironment
    precision: str
    inputs: Mapping[str, Mapping[str, list[int]]]
    outputs: Mapping[str, list[int]]
    source: str
    source_sha256: str
    options: Mapping[str, Any]
    builds_ms: tuple[float, ...]
    layers: Mapping[str, Any]
    built_for: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain values for JSON."""
        return {
            "schema": SCHEMA,
            **asdict(self),
            "builds_ms": list(self.builds_ms),
            "built_for": list(self.built_for),
        }

    def check_runs_on(self, here: GpuEnvironment, engine: Path) -> None:
        """Refuse a machine that the engine was not built for.

        The driver and CUDA may be others: engines outlive their updates.

        Raises:
            InputError: The GPU, its compute capability, the compiler or its version is another.
        """
        versions = [f"{one.compiler} {one.tensorrt}" for one in (self.built_on, here)]
        if self.built_for:
            suits = here.compute_capability in self.built_for
            capabilities = " or ".join(self.built_for)
            device = [("compute capability", capabilities, capabilities if suits else here.compute_capability)]
        else:
            device = [
                ("the GPU", self.built_on.gpu, here.gpu),
                ("compute capability", self.built_on.compute_capability, here.compute_capability),
            ]
        differences = [
            f"{what} {then} (here: {now})".lstrip() for what, then, now in (*device, ("", *versions)) if then != now
        ]
        if differences:
            raise InputError(
                f"{engine}: this engine was built for {', '.join(differences)} and runs nowhere else; "
                f"build it here from {self.source}"
            )


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine stands."""
    return engine.with_name(f"{engine.name}.json")


def layers_path(engine: Path) -> Path:
    """Where the inspector's account of an engine stands."""
    return engine.with_name(f"{engine.name}.layers.json")


def kernels_path(engine: Path) -> Path:
    """Where the kernels of an engine are kept that were compiled just in time."""
    return engine.with_name(f"{engine.name}.kernels")


def kernels_record_path(engine: Path) -> Path:
    """Where it stands how long compiling them took."""
    return engine.with_name(f"{engine.name}.kernels.json")


def compiled_seconds(engine: Path) -> float | None:
    """Seconds that compiling an engine's kernels just in time took, where none were kept before; else nothing."""
    path = kernels_record_path(engine)
    return float(read_json(path)["seconds"]) if path.is_file() else None


def with_header(plan: bytes, metadata: Mapping[str, Any]) -> bytes:
    """The bytes of an engine file: Ultralytics' metadata, and what TensorRT has built."""
    header = json.dumps(metadata).encode()
    return len(header).to_bytes(_LENGTH, "little") + header + plan


def split_header(engine: Path) -> tuple[dict[str, Any], bytes]:
    """Metadata of an engine file, and the bytes for TensorRT.

    Raises:
        InputError: The file cannot be read, or has no header.
    """
    data = _read(engine)
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    try:
        metadata = parse_json(data[_LENGTH:end], str(engine))
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or end >= len(data):
        raise InputError(f"{engine}: no engine of ours: it does not begin with Ultralytics' metadata; build it anew")
    return metadata, data[end:]


def write_engine(engine: Path, data: bytes, manifest: EngineManifest, layers: Any) -> None:
    """Write an engine, what is known of it, and last its manifest, each atomically.

    Args:
        engine: The file.
        data: Its bytes, header included.
        manifest: What is known of it.
        layers: The inspector's account, as JSON.
    """
    atomic_write(engine, data)
    write_json(layers_path(engine), layers)
    write_json(manifest_path(engine), manifest.to_dict())


def read_manifest(engine: Path) -> EngineManifest:
    """The manifest of an engine that is as it was written.

    Raises:
        InputError: The engine or its manifest is missing, the engine is truncated or changed, or the manifest is of
            another kind.
    """
    size = len(_read(engine))
    path = manifest_path(engine)
    if not path.is_file():
        raise InputError(f"{engine}: no engine of ours: {path.name} is not beside it; copy both, or build it anew")
    try:
        row = read_json(path)
        if row.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        row["built_on"] = GpuEnvironment(**row["built_on"])
        row["builds_ms"] = tuple(row["builds_ms"])
        row["built_for"] = tuple(row.get("built_for", ()))
        manifest = EngineManifest(**row)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        known = ", ".join(field.name for field in fields(EngineManifest))
        raise InputError(
            f"{path}: no manifest of this version (keys: {known}): {error}; build the engine anew"
        ) from None
    if size < manifest.size:
        raise InputError(f"{engine}: truncated: {size:,} of {manifest.size:,} bytes are there; copy it again")
    if file_sha256(engine) != manifest.sha256:
        raise InputError(f"{engine}: not the file that {path.name} describes (other SHA-256); copy both, or build anew")
    return manifest


def told_of(file: Path) -> dict[str, Any] | None:
    """What a compiler told of an engine when it built it, with its name and version; nothing of a file of another kind.

    Of an engine built ahead of time that is what shows without a device (`export.tensorrt_rtx.Revealed`), else what the
    inspector counts.

    Raises:
        InputError: The engine is damaged, or none of ours.
    """
    if file.suffix != ".engine":
        return None
    manifest = read_manifest(file)
    return {"name": manifest.built_on.compiler, "version": manifest.built_on.tensorrt, **manifest.layers}


def digest(data: bytes) -> str:
    """SHA-256 of an engine's or a network's bytes."""
    return hashlib.sha256(data).hexdigest()


def _read(engine: Path) -> bytes:
    try:
        return engine.read_bytes()
    except OSError as error:
        raise InputError(f"{engine}: cannot be read ({error.strerror}); give the path of an engine file") from None
