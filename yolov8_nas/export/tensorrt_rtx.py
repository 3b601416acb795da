"""Engines of TensorRT for RTX, built ahead of time from exactly one ONNX file on any machine.

The route is TensorRT's (`export/tensorrt.py`): types stand in the ONNX file and nowhere else. What differs is told in
`measure/tensorrt_rtx.py`. What the builder tells without a device is kept in the manifest, see `Revealed`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yolov8_nas.errors import InputError
from yolov8_nas.export.tensorrt import (
    EngineOptions,
    Network,
    build_error,
    configure,
    parse,
    read_network,
    start_builder,
)
from yolov8_nas.measure.engine_file import RTX, EngineManifest, GpuEnvironment, digest, with_header, write_engine
from yolov8_nas.measure.tensorrt import open_log, told
from yolov8_nas.measure.tensorrt_rtx import PORTABLE, compiler, of_capability, refusal

if TYPE_CHECKING:
    import tensorrt_rtx as rtx

NOWHERE: Final = "none: built ahead of time"
"""The GPU that an engine was built on, where there was none."""

DEFAULT: Final = EngineOptions()

_NODE: Final = re.compile(r"Layer: (\S+) Host Persistent")
_BYTES: Final = {
    "activation_bytes": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "scratch_bytes": re.compile(r"Max Scratch Memory: (\d+) bytes"),
    "weight_bytes": re.compile(r"Total Weights Memory: (\d+) bytes"),
}
_WIDENED: Final = re.compile(r"Converting conv activation scales to fp32")


@dataclass(frozen=True)
class Revealed:
    """What a build tells of an engine without a device; nothing where this version is silent.

    Kernels are chosen just in time, on the GPU: what a layer becomes, and how long it takes, is not among it. The
    inspector, which would tell of layers, takes a loaded engine and so a GPU.

    Attributes:
        parsed_layers: Layers of the network as the parser made it.
        fused_layers: What they become; as a rule one node that holds the whole network.
        quantized_convolutions: Convolutions whose quantized inputs it reports to have taken up.
        activation_bytes: Memory for activations.
        scratch_bytes: The most that one node wants for itself.
        weight_bytes: Size of the weights.
        plan_bytes: Size of the engine.
        seconds: What the build took on the machine that did it.
    """

    parsed_layers: int
    fused_layers: int | None
    quantized_convolutions: int
    activation_bytes: int | None
    scratch_bytes: int | None
    weight_bytes: int | None
    plan_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def build_ahead(
    source: Path,
    engine: Path,
    *,
    options: EngineOptions = DEFAULT,
    capabilities: Sequence[str] = PORTABLE,
) -> EngineManifest:
    """Build an engine from an ONNX file, for GPUs that need not be here.

    Args:
        source: A file of `export_onnx`, or of `int8_for_gpu`.
        engine: The engine file to write, with Ultralytics' metadata; its manifest comes beside it (see `engine_file`).
        options: How to build; `nms` is not among what this compiler can do.
        capabilities: Compute capabilities that it is for.

    Raises:
        InputError: The compiler is not here; the file is no such ONNX file, or the compiler refuses a layer of it; a
            compute capability is not supported, in its precision or at all.
        StageError: It cannot be built; the compiler's message names the layer.
    """
    trt = compiler()
    network = _read(source, options, capabilities)
    start = time.monotonic()
    plan, log, layers = _build(trt, network, options, capabilities)
    revealed = reveal(log.notes + log.warnings, plan, layers, time.monotonic() - start)
    data = with_header(plan, network.metadata)
    manifest = EngineManifest(
        sha256=digest(data),
        size=len(data),
        built_on=GpuEnvironment(NOWHERE, "none", trt.__version__, "none", "none", RTX),
        precision=network.precision,
        inputs={network.input: network.shapes},
        outputs=network.outputs,
        source=network.source.name,
        source_sha256=network.sha256,
        options=asdict(options),
        builds_ms=(),
        layers=revealed.to_dict(),
        built_for=tuple(capabilities),
    )
    engine.parent.mkdir(parents=True, exist_ok=True)
    write_engine(engine, data, manifest, revealed.to_dict())
    return manifest


def reveal(messages: Sequence[str], plan: bytes, parsed_layers: int, seconds: float) -> Revealed:
    """What of a builder's messages says something of the engine.

    Args:
        messages: All that it has told, errors apart.
        plan: What it has built.
        parsed_layers: Layers of the network.
        seconds: What it took.
    """
    text = "\n".join(messages)
    nodes = set(_NODE.findall(text))
    found = {name: pattern.search(text) for name, pattern in _BYTES.items()}
    return Revealed(
        parsed_layers=parsed_layers,
        fused_layers=len(nodes) or None,
        quantized_convolutions=len(_WIDENED.findall(text)),
        plan_bytes=len(plan),
        seconds=seconds,
        **{name: int(match[1]) if match else None for name, match in found.items()},
    )


def _read(source: Path, options: EngineOptions, capabilities: Sequence[str]) -> Network:
    if options.nms:
        raise InputError(
            f"{source}: TensorRT for RTX has no kernel that suppresses boxes; leave options.nms out and suppress them "
            "on the host, or train an NMS-free head (finetune.nms_free)"
        )
    if not capabilities:
        raise InputError(f"{source}: give at least one compute capability, for example {PORTABLE[0]}")
    network = read_network(source, options, capabilities, "the lowest")
    for capability in capabilities:
        if why_not := refusal("a GPU", capability, network.precision):
            raise InputError(f"{source}: {why_not}")
    return network


def _build(trt: Any, network: Network, options: EngineOptions, capabilities: Sequence[str]) -> tuple[bytes, Any, int]:
    """One build: the engine's bytes, the log, and how many layers were parsed."""
    log = open_log(trt, notes=True)
    builder: rtx.Builder = start_builder(trt, log)
    definition = builder.create_network(0)  # every network is strongly typed
    parse(trt, definition, network, log)
    config = configure(trt, builder, network, options, log)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(of_capability(trt, capability), index):
            raise InputError(
                f"{network.source}: TensorRT for RTX {trt.__version__} refuses compute capability {capability}: "
                f"{told(log)}; leave it out"
            )
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise build_error(trt, network, options, log)
    return bytes(plan), log, int(definition.num_layers)
