"""TensorRT engines from exactly one ONNX file.

There is one route for TensorRT 10 and 11: strongly typed networks. Types stand in the ONNX file and nowhere else, so no
precision is asked of the builder, and what ONNX Runtime scores is what the engine computes. Each engine is built more
than once and each build is measured, because the builder chooses by timings of its own, which scatter: two builds of
one network may differ by a fifth (ultralytics #26223). What the best one has timed is kept as the timing cache; with it
the next build makes the same choices.

None of this has run on a device yet, see docs/tensorrt.md.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export.nms_in_graph import NmsOptions, add_efficient_nms
from yolov8_nas.export.onnx_file import check_zero_points, dimensions, precision, read_metadata, read_onnx
from yolov8_nas.files import atomic_write
from yolov8_nas.measure.engine_file import (
    EngineManifest,
    GpuEnvironment,
    compiled_seconds,
    digest,
    read_manifest,
    with_header,
    write_engine,
)
from yolov8_nas.measure.tensorrt import bindings, environment, load_engine, major, missing, open_log, product, told
from yolov8_nas.runner.results import EngineResult

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, int, int]
"""Images, height and width in pixels."""

_NO_MEMORY: Final = re.compile(r"out ?of ?memory|could not be allocated|insufficient (memory|workspace)", re.IGNORECASE)

_NEEDS: Final = {TensorProto.BFLOAT16: ("BF16", (8, 0)), TensorProto.FLOAT8E4M3FN: ("FP8", (8, 9))}
"""Types that not every GPU of TensorRT 10 and 11 has, and the compute capability from which on they have them."""


@dataclass(frozen=True)
class Profile:
    """Shapes that an engine with dynamic shapes takes.

    Attributes:
        min: Smallest.
        opt: The one that it is tuned for.
        max: Largest.
    """

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        workspace_gib: Most GPU memory in GiB for the scratch space of a layer; all that there is unless given.
        tactic_sources: Names of `trt.TacticSource`, alone to be used; TensorRT's choice unless given.
        level: Optimization level, 0 (fast to build) to 5 (all tactics are tried); 3 is TensorRT's default.
        tf32: Whether FP32 convolutions may use TF32 tensor cores, as they do by TensorRT's default.
        profile: Shapes, where the ONNX file leaves them open.
        nms: Non-maximum suppression inside the engine.
    """

    workspace_gib: float | None = None
    tactic_sources: tuple[str, ...] | None = None
    level: int = 3
    tf32: bool = True
    profile: Profile | None = None
    nms: NmsOptions | None = None


def status(engine: Path | None = None) -> EngineResult:
    """What was built, by which compiler, or the reason why nothing was.

    Nothing is imitated: without an engine there is no claim about one.

    Args:
        engine: The engine that the target runs; nothing where it runs something else.
    """
    if engine is None:
        reason = " and ".join(missing()) or "this target runs ONNX; build_engine makes an engine of the file"
        return EngineResult(built=False, reason=reason)
    manifest = read_manifest(engine)
    return EngineResult(
        built=True,
        compiler=manifest.built_on.compiler,
        version=manifest.built_on.tensorrt,
        built_on=manifest.built_on.gpu,
        built_for=manifest.built_for,
        precision=manifest.precision,
        layers=manifest.layers,
        compiled_just_in_time_s=compiled_seconds(engine),
    )


def build_engine(
    source: Path,
    engine: Path,
    *,
    measure: Callable[[Path], float],
    options: EngineOptions = EngineOptions(),
    timing_cache: Path | None = None,
    builds: int = 2,
) -> EngineManifest:
    """Build an engine from an ONNX file, more than once, and keep the fastest.

    Each build starts from the timing cache as it was found, not from what the build before has added: else it would
    make the same choices. A build that had nothing to time is not repeated. The cache of the kept build is written back
    and holds all that it held before.

    Args:
        source: A file of `export_onnx`, in the precision that the engine is to have.
        engine: The engine file to write, with Ultralytics' metadata; two JSON files come beside it (see
            `engine_file`).
        measure: Gives the latency in ms of an engine file; it is called with each build.
        options: How to build.
        timing_cache: File of the timing cache. It belongs to one GPU, one TensorRT and one set of options.
        builds: Most builds.

    Raises:
        InputError: This machine has no TensorRT or no GPU; the file is no such ONNX file, has weights that are not
            numbers, an operator that TensorRT lacks or a type that the GPU lacks; options do not fit it; the timing
            cache is of another machine.
        StageError: TensorRT cannot build it, for example because memory is short.
        ValueError: `builds` is less than one.
    """
    if builds < 1:
        raise ValueError(f"builds = {builds}: an engine is built at least once")
    trt = bindings()
    here = environment(trt)
    network = read_network(source, options, [here.compute_capability], here.gpu)
    found = timing_cache.read_bytes() if timing_cache and timing_cache.exists() else b""
    measured: list[float] = []
    plan = cache = b""
    engine.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=engine.parent, prefix=f".{engine.name}.") as folder:
        trial = Path(folder) / engine.name
        for _ in range(builds):
            built, timed = _build(trt, network, options, found, timing_cache)
            _write(trt, trial, built, network, options, here, measured)
            measured.append(float(measure(trial)))
            if measured[-1] == min(measured):
                plan, cache = built, timed
            if timed == found:
                break
    manifest = _write(trt, engine, plan, network, options, here, measured)
    if timing_cache:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(timing_cache, cache)
    return manifest


@dataclass(frozen=True)
class Network:
    """An ONNX file, checked, as a compiler gets it; `read_network` gives it.

    Attributes:
        source: The file.
        sha256: Its digest.
        data: What is parsed: its bytes, or those of the graph with suppression appended.
        opset: Its opset.
        precision: The lowest in the graph.
        input: Name of the input.
        shapes: Smallest, best and largest shape of the input.
        dynamic: Whether they differ.
        outputs: Shape of each output.
        metadata: Ultralytics' metadata, for the engine's header.
    """

    source: Path
    sha256: str
    data: bytes
    opset: int
    precision: str
    input: str
    shapes: Mapping[str, list[int]]
    dynamic: bool
    outputs: Mapping[str, list[int]]
    metadata: Mapping[str, Any]


def read_network(source: Path, options: EngineOptions, capabilities: Sequence[str], gpu: str) -> Network:
    """Read and check an ONNX file that is to become an engine.

    Args:
        source: A file of `export_onnx`, or of `int8_for_gpu`.
        options: How it is to be built.
        capabilities: Compute capabilities that the engine is for.
        gpu: What has them, for messages.

    Raises:
        InputError: It cannot become an engine on these, or options do not fit it.
    """
    data, model = read_onnx(source)
    _check_weights(source, model, capabilities, gpu)
    check_zero_points(source, model)
    metadata = read_metadata(source, model)
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        names = [value.name for value in (*model.graph.input, *model.graph.output)]
        raise InputError(f"{source}: one input and one output are expected, it has {', '.join(names)}; export it again")
    (value,) = model.graph.input
    open_shape = dimensions(value)
    shapes = _shapes(source, open_shape, options.profile, int(metadata["stride"]))
    if options.nms:
        _check_has_no_nms(source, model, metadata)
        model = add_efficient_nms(model, options.nms)
    metadata["batch"], metadata["imgsz"] = shapes["max"][0], shapes["opt"][2:]
    arguments = metadata.get("args", {})
    metadata["args"] = {
        **arguments,
        "batch": shapes["max"][0],
        "dynamic": -1 in open_shape,
        "nms": bool(options.nms) or arguments.get("nms"),
    }
    return Network(
        source=source,
        sha256=digest(data),
        data=model.SerializeToString() if options.nms else data,
        opset=max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        precision=precision(model),
        input=value.name,
        shapes=shapes,
        dynamic=-1 in open_shape,
        outputs={output.name: dimensions(output) for output in model.graph.output},
        metadata=metadata,
    )


def _check_weights(source: Path, model: onnx.ModelProto, capabilities: Sequence[str], gpu: str) -> None:
    """Refuse weights that are not numbers, and types that the GPU lacks."""
    lowest = min(capabilities, key=_numbers)
    for tensor in model.graph.initializer:
        name, needed = _NEEDS.get(tensor.data_type, ("", (0, 0)))
        if _numbers(lowest) < needed:
            raise InputError(
                f"{source}: {tensor.name!r} is {name}, which needs compute capability {needed[0]}.{needed[1]}, and "
                f"{gpu} has {lowest}; export it in FP16"
            )
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            bad = int(np.isnan(numpy_helper.to_array(tensor)).sum())
            if bad:
                raise InputError(
                    f"{source}: {bad} weights of {tensor.name!r} are NaN; export a network that has learnt"
                )


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _check_has_no_nms(source: Path, model: onnx.ModelProto, metadata: Mapping[str, Any]) -> None:
    if metadata.get("end2end"):
        raise InputError(f"{source}: its head is NMS-free, so there are no boxes to suppress; leave options.nms out")
    shape = dimensions(model.graph.output[0])
    if len(shape) != 3 or shape[1] != 4 + len(metadata["names"]):
        raise InputError(
            f"{source}: its output is {shape}, and NMS takes (batch, {4 + len(metadata['names'])}, anchors) for "
            f"{len(metadata['names'])} classes; export it without NMS"
        )


def _shapes(source: Path, open_shape: list[int], profile: Profile | None, stride: int) -> dict[str, list[int]]:
    """Smallest, best and largest shape of the input."""
    if profile is None:
        if -1 in open_shape:
            raise InputError(f"{source}: its input {open_shape} is dynamic; give options.profile")
        return dict.fromkeys(("min", "opt", "max"), open_shape)
    shapes = {name: [images, open_shape[1], height, width] for name, (images, height, width) in asdict(profile).items()}
    for name, shape in shapes.items():
        if any(size not in (-1, wanted) for size, wanted in zip(open_shape, shape, strict=True)):
            raise InputError(
                f"{source}: its input is {open_shape}, and options.profile.{name} is {shape}; make them fit"
            )
        if shape[0] < 1 or any(side < stride or side % stride for side in shape[2:]):
            raise InputError(
                f"options.profile.{name} = {getattr(profile, name)}: give at least one image, and sides that are "
                f"multiples of {stride}"
            )
    if not all(low <= best <= high for low, best, high in zip(*shapes.values(), strict=True)):
        raise InputError(f"options.profile = {asdict(profile)}: min, opt and max must rise, in each size")
    return shapes


def _build(
    trt: Any, network: Network, options: EngineOptions, found: bytes, timing_cache: Path | None
) -> tuple[bytes, bytes]:
    """One build: the engine's bytes, and the timing cache after it."""
    log = open_log(trt)
    builder = start_builder(trt, log)
    # From 11 on every network is strongly typed: the flag is ignored there, and its number is another.
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(strongly_typed if major(trt.__version__) < 11 else 0)
    parse(trt, definition, network, log)
    config = configure(trt, builder, network, options, log)
    cache = config.create_timing_cache(found)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"{timing_cache}: this timing cache is damaged, or of another GPU or TensorRT (here: "
            f"{trt.__version__}); give another path, or delete it"
        )
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise build_error(trt, network, options, log)
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def start_builder(trt: Any, log: Any) -> trt.Builder:
    """A builder of TensorRT, or of TensorRT for RTX.

    Raises:
        StageError: The library does not start.
    """
    trt.init_libnvinfer_plugins(log, "")
    try:
        return trt.Builder(log)
    except TypeError:  # what the bindings raise where the library gives them nothing
        raise StageError(f"{product(trt)} {trt.__version__} does not start: {told(log)}") from None


def parse(trt: Any, definition: trt.INetworkDefinition, network: Network, log: Any) -> None:
    """Read an ONNX file into a network definition.

    Raises:
        InputError: The parser refuses it; its layers are named.
    """
    parser = trt.OnnxParser(definition, log)
    if not parser.parse(network.data, str(network.source)):
        raise _parser_error(trt, parser, network, log)


def configure(trt: Any, builder: trt.Builder, network: Network, options: EngineOptions, log: Any) -> trt.IBuilderConfig:
    """The configuration of a build: options, and the shapes of a dynamic network.

    Raises:
        InputError: A tactic source is unknown, or shapes are refused.
    """
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector would know names only
    if options.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.tactic_sources is not None:
        known = trt.TacticSource.__members__
        if unknown := [name for name in options.tactic_sources if name not in known]:
            raise InputError(
                f"options.tactic_sources: {', '.join(unknown)}: {product(trt)} {trt.__version__} has {', '.join(known)}"
            )
        # By name: the numbers are others in 11.
        config.set_tactic_sources(sum(1 << int(known[name]) for name in set(options.tactic_sources)))
    if network.dynamic:
        profile = builder.create_optimization_profile()
        low, best, high = (tuple(network.shapes[name]) for name in ("min", "opt", "max"))
        profile.set_shape(network.input, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise InputError(
                f"{network.source}: {product(trt)} refuses options.profile = {options.profile}: {told(log)}"
            )
    return config


def _parser_error(trt: Any, parser: trt.OnnxParser, network: Network, log: Any) -> InputError:
    """What the parser complains of, with the operators that it lacks by name."""
    lacking = (
        trt.ErrorCode.UNSUPPORTED_NODE,
        trt.ErrorCode.UNSUPPORTED_NODE_ATTR,
        trt.ErrorCode.UNSUPPORTED_NODE_INPUT,
        trt.ErrorCode.UNSUPPORTED_NODE_DATATYPE,
        trt.ErrorCode.UNSUPPORTED_NODE_DYNAMIC,
        trt.ErrorCode.UNSUPPORTED_NODE_SHAPE,
    )
    faults = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"operator {error.node_operator()} ({error.node_name()})" if error.node_operator() else "the graph"
        described = error.desc()
        # An operator that it does not know is looked for among plugins, and that is what TensorRT for RTX 1.7 tells.
        unknown = error.code() in lacking or "Plugin not found" in described
        verdict = "is not supported" if unknown else "cannot be read"
        faults.append(f"{where} {verdict}: {described}")
    return InputError(
        f"{network.source}: {product(trt)} {trt.__version__} cannot build it (opset {network.opset}): "
        f"{'; '.join(dict.fromkeys(faults)) or told(log)}; "
        "export it with a lower opset or without that operator, or use runtime: onnxruntime"
    )


def build_error(trt: Any, network: Network, options: EngineOptions, log: Any) -> StageError:
    """What is told of a build that gave nothing; TensorRT's own messages name the layer."""
    if any(_NO_MEMORY.search(message) for message in log.errors):
        limit = "no limit" if options.workspace_gib is None else f"{options.workspace_gib} GiB"
        return StageError(
            f"{network.source}: memory ran out while {product(trt)} built it (workspace: {limit}, largest input: "
            f"{network.shapes['max']}): {told(log)}; free memory of the GPU, raise options.workspace_gib, or lower "
            "options.profile.max"
        )
    return StageError(f"{network.source}: {product(trt)} cannot build it: {told(log)}")


def _write(
    trt: Any,
    engine: Path,
    plan: bytes,
    network: Network,
    options: EngineOptions,
    here: GpuEnvironment,
    measured: list[float],
) -> EngineManifest:
    """Write an engine file and what is known of it."""
    data = with_header(plan, network.metadata)
    layers = _inspect(trt, plan, engine.name)
    manifest = EngineManifest(
        sha256=digest(data),
        size=len(data),
        built_on=here,
        precision=network.precision,
        inputs={network.input: network.shapes},
        outputs=network.outputs,
        source=network.source.name,
        source_sha256=network.sha256,
        options=asdict(options),
        builds_ms=tuple(measured),
        layers=summarize_layers(layers),
    )
    write_engine(engine, data, manifest, layers)
    return manifest


def _inspect(trt: Any, plan: bytes, name: str) -> dict[str, Any]:
    """The engine inspector's account of an engine."""
    cuda_engine = load_engine(trt, plan, open_log(trt), name)
    inspector = cuda_engine.create_engine_inspector()
    account: dict[str, Any] = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return account


def summarize_layers(account: Mapping[str, Any]) -> dict[str, Any]:
    """What of the inspector's account is compared between builds.

    Args:
        account: Its JSON. TensorRT 10 and 11 write layers alike, and their inputs and outputs differently.

    Returns:
        `layers`: how many; `types`: how many of each type; `fused`: how many do the work of several nodes; `reformats`:
        names of those that do nothing but change a tensor's layout or type, which is what an INT8 engine that is slower
        than FP16 spends its time on (ultralytics #26159).
    """
    layers = [layer for layer in account.get("Layers", []) if isinstance(layer, dict)]
    names = [str(layer.get("Name", "")) for layer in layers]
    types = [str(layer.get("LayerType", "unknown")) for layer in layers]
    return {
        "layers": len(account.get("Layers", [])),
        "types": dict(sorted(Counter(types).items())),
        "fused": sum(" + " in name for name in names),
        "reformats": [
            name
            for name, kind in zip(names, types, strict=True)
            if kind == "Reformat" or name.startswith("Reformatting")
        ],
    }
