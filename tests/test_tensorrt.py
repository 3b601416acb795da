"""TensorRT without TensorRT: what is asked of it and in which order, the files, and the refusals.

No engine is built here and none is pretended: the doubles know names and signatures of the real bindings
(`tensorrt_surface`) and give bytes that are no engine. What TensorRT for RTX shows as well (parsing, building, options,
shapes, headers, refused layers) is in `test_rtx.py`, with the real compiler. What an engine does is checked on a device
by `make test-gpu`. Only doubles, and so nothing real, show here:

* timing caches, which TensorRT for RTX keeps without using them, and the choice among builds by their timings;
* the numbers of flags and tactic sources in TensorRT 10 and 11, which are not those of 1;
* memory that runs out in a build, and a library that does not start;
* the inspector, which takes a loaded engine: its accounts are written from NVIDIA's description;
* EfficientNMS_TRT, which TensorRT for RTX lacks, inside an engine;
* running: shapes of a context, addresses, launches, and what is refused there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_surface as surface
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from yolov8_nas.commands import doctor
from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export import gpu_int8, tensorrt
from yolov8_nas.export.gpu_int8 import int8_for_gpu
from yolov8_nas.export.nms_in_graph import DOMAIN, NmsOptions, add_efficient_nms
from yolov8_nas.export.tensorrt import EngineOptions, Profile, build_engine, read_network, summarize_layers
from yolov8_nas.measure import engine_file, runtime
from yolov8_nas.measure import tensorrt as runner
from yolov8_nas.measure.engine_file import EngineManifest, GpuEnvironment, read_manifest, split_header

ROOT = Path(__file__).parents[1]

NOT_AN_ENGINE = b"what the double of build_serialized_network gives; no engine"

T4 = GpuEnvironment(gpu="Tesla T4", compute_capability="7.5", tensorrt="11.4.0.106", cuda="13.0", driver="580.65.06")

CLASSES = {0: "scratch", 1: "dent"}

DYNAMIC = Profile(min=(1, 32, 32), opt=(4, 64, 64), max=(8, 128, 96))

ACCOUNTS = {
    "10": {
        "Layers": [
            {"Name": "Reformatting CopyNode for Input Tensor 0 to /conv", "LayerType": "Reformat"},
            {
                "Name": "/conv + /act",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "images", "Format/Datatype": "Row major linear FP32"}],
            },
        ],
        "Bindings": ["images", "output0"],
    },
    "11": {
        "Layers": [
            {"Name": "Reformatting CopyNode for Input Tensor 0 to /conv", "LayerType": "Reformat"},
            {
                "Name": "/conv + /act",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "images", "Format": "Row major linear FP32", "DataType": "Float"}],
            },
        ],
        "I/O Tensors": [{"Name": "images", "IOMode": "Input"}, {"Name": "output0", "IOMode": "Output"}],
    },
}
"""What the inspector gives for an engine of two layers, in the two forms that NVIDIA documents."""


def network(
    path: Path,
    *,
    shape: tuple[int | str, ...] = (1, 3, 64, 64),
    weights: NDArray[Any] | None = None,
    kind: int = TensorProto.FLOAT,
    metadata: dict[str, Any] | None = None,
    output: tuple[int | str, ...] = (1, 6, 12288),
) -> Path:
    """A file with the inputs, outputs and metadata of a detector: (1, 6, 12288) of one multiplication."""
    values = np.full(1, 0.5, dtype=np.float32) if weights is None else weights
    weight = helper.make_tensor("weight", kind, values.shape, values) if weights is None else None
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["weight"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["images", "factor"], ["scaled"]),
            helper.make_node("Reshape", ["scaled", "row"], ["flat"]),
            helper.make_node("Concat", ["flat"] * 6, ["output0"], name="last", axis=1),
        ],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, output)],
        [weight or numpy_helper.from_array(values, "weight"), numpy_helper.from_array(np.array([0, 1, -1]), "row")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    defaults = {"task": "detect", "stride": 32, "batch": 1, "imgsz": [64, 64], "names": CLASSES, "channels": 3,
                "end2end": False, "args": {"batch": 1, "dynamic": False, "nms": None}}  # fmt: skip
    for key, value in (defaults if metadata is None else metadata).items():
        model.metadata_props.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(params=surface.VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Doubles of one version's bindings, as if TensorRT and a T4 were here."""
    trt = surface.double(request.param)
    trt.doubles["Builder"].build_serialized_network.return_value = NOT_AN_ENGINE
    trt.doubles["ITimingCache"].serialize.return_value = b"timings"
    trt.doubles["EngineInspector"].get_engine_information.return_value = json.dumps(ACCOUNTS[request.param[:2]])
    here = replace(T4, tensorrt=request.param)
    for module in (tensorrt, runner):
        monkeypatch.setattr(module, "bindings", lambda: trt)
        monkeypatch.setattr(module, "environment", lambda trt: here)
    return trt


def build(
    folder: Path, source: Path | None = None, *, latencies: tuple[float, ...] = (2.0, 1.0), **options: Any
) -> Any:
    """Build with doubles; `latencies` are what the builds are said to take."""
    times = iter(latencies)
    options.setdefault("measure", lambda engine: next(times))
    return build_engine(source or network(folder / "model.onnx"), folder / "model.engine", **options)


def calls(trt: Any) -> list[str]:
    return [name for name, *_ in trt.calls.mock_calls]


def test_order_of_calls(trt: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "t4.cache"
    build(tmp_path, builds=1, timing_cache=cache)
    wanted = [
        "init_libnvinfer_plugins",
        "Builder.create_network",
        "OnnxParser.parse",
        "Builder.create_builder_config",
        "IBuilderConfig.create_timing_cache",
        "IBuilderConfig.set_timing_cache",
        "Builder.build_serialized_network",
        "IBuilderConfig.get_timing_cache",
        "ITimingCache.serialize",
        "init_libnvinfer_plugins",
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_engine_inspector",
        "EngineInspector.get_engine_information",
    ]
    assert calls(trt)[: len(wanted)] == wanted
    assert cache.read_bytes() == b"timings"


def test_the_network_is_strongly_typed(trt: Any, tmp_path: Path) -> None:
    build(tmp_path, builds=1)
    # 10 needs the flag, which has the number 1 there; 11 has nothing else.
    flag = {"10": 1 << 1, "11": 0}[trt.__version__[:2]]
    assert trt.doubles["Builder"].create_network.call_args == mock.call(flag)


def test_the_fastest_build_is_kept_and_nothing_else(trt: Any, tmp_path: Path) -> None:
    trt.doubles["Builder"].build_serialized_network.side_effect = [b"first", b"second", b"third"]
    trt.doubles["ITimingCache"].serialize.side_effect = [b"timings 1", b"timings 2", b"timings 3"]
    cache = tmp_path / "t4.cache"
    manifest = build(tmp_path, builds=3, latencies=(3.0, 1.5, 2.0), timing_cache=cache)
    engine = tmp_path / "model.engine"
    assert split_header(engine)[1] == b"second"
    assert cache.read_bytes() == b"timings 2"
    assert manifest.builds_ms == (3.0, 1.5, 2.0)
    assert read_manifest(engine) == manifest
    names = {"model.onnx", "model.engine", "model.engine.json", "model.engine.layers.json", "t4.cache"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_is_measured_is_an_engine_file_with_its_manifest(trt: Any, tmp_path: Path) -> None:
    measured = []

    def measure(engine: Path) -> float:
        read_manifest(engine).check_runs_on(replace(T4, tensorrt=trt.__version__), engine)
        measured.append(engine.name)
        return 1.0

    build(tmp_path, measure=measure)
    assert measured == ["model.engine"] * 2


def test_each_build_starts_from_the_cache_as_found(trt: Any, tmp_path: Path) -> None:
    cache = tmp_path / "t4.cache"
    cache.write_bytes(b"older timings")
    build(tmp_path, timing_cache=cache)
    started = trt.doubles["IBuilderConfig"].create_timing_cache.call_args_list
    assert started == [mock.call(b"older timings")] * 2
    assert trt.doubles["IBuilderConfig"].set_timing_cache.call_args.args[1] is False
    # Where the cache answers everything, a second build would choose the same again.
    build(tmp_path, timing_cache=cache)
    assert len(trt.doubles["IBuilderConfig"].create_timing_cache.call_args_list) == 3


@pytest.mark.parametrize("refusal", ["create_timing_cache", "set_timing_cache"])
def test_a_timing_cache_of_another_machine_is_refused_and_left_alone(trt: Any, tmp_path: Path, refusal: str) -> None:
    cache = tmp_path / "a100.cache"
    cache.write_bytes(b"of an A100")
    config = trt.doubles["IBuilderConfig"]
    getattr(config, refusal).return_value = None if refusal == "create_timing_cache" else False
    with pytest.raises(InputError, match=r"a100\.cache.*another GPU or TensorRT"):
        build(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"of an A100"
    assert not (tmp_path / "model.engine").exists()


def test_tactic_sources_are_asked_for_by_the_numbers_of_the_version(trt: Any, tmp_path: Path) -> None:
    """The other options are held against a real compiler in `test_rtx.py`."""
    build(tmp_path, builds=1, options=EngineOptions(tactic_sources=("JIT_CONVOLUTIONS",)))
    number = {"10": 1 << 4, "11": 1 << 1}[trt.__version__[:2]]
    assert trt.doubles["IBuilderConfig"].set_tactic_sources.call_args == mock.call(number)


@pytest.mark.parametrize(
    ("shape", "profile", "words"),
    [
        (("b", 3, "h", "w"), None, ["model.onnx", "dynamic", "options.profile"]),
        ((1, 3, 64, 64), DYNAMIC, ["options.profile.min", "[1, 3, 64, 64]"]),
        (("b", 3, "h", "w"), replace(DYNAMIC, opt=(4, 70, 64)), ["options.profile.opt", "multiples of 32"]),
        (("b", 3, "h", "w"), replace(DYNAMIC, min=(0, 32, 32)), ["options.profile.min", "at least one image"]),
        (("b", 3, "h", "w"), replace(DYNAMIC, max=(2, 128, 128)), ["options.profile", "must rise"]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    tmp_path: Path, shape: tuple[int | str, ...], profile: Profile | None, words: list[str]
) -> None:
    source = network(tmp_path / "model.onnx", shape=shape, output=("b", 6, "n"))
    with pytest.raises(InputError) as caught:
        read_network(source, EngineOptions(profile=profile), ["7.5"], "Tesla T4")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Error Code 1: Cuda Runtime (out of memory)", ["memory ran out", "workspace: 0.25 GiB", "[1, 3, 64, 64]"]),
        ("Requested amount of GPU memory (8 bytes) could not be allocated.", ["memory ran out"]),
    ],
)
def test_a_failed_build_says_why(trt: Any, tmp_path: Path, message: str, words: list[str]) -> None:
    def fail(definition: Any, config: Any) -> None:
        log = opened[-1]
        log.log(trt.ILogger.WARNING, "something else")
        log.log(trt.ILogger.ERROR, message)

    opened: list[Any] = []
    trt.Builder = lambda log: (opened.append(log), trt.doubles["Builder"])[1]
    trt.doubles["Builder"].build_serialized_network.side_effect = fail
    with pytest.raises(StageError) as caught:
        build(tmp_path, options=EngineOptions(workspace_gib=0.25))
    assert all(word in str(caught.value) for word in [*words, message]), caught.value
    assert "something else" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_library_that_does_not_start_is_told(trt: Any, tmp_path: Path) -> None:
    # What the real bindings raise over a library that gives them nothing, seen with the stubs of `record.py`.
    trt.Builder = mock.Mock(side_effect=TypeError("pybind11::init(): factory function returned nullptr"))
    with pytest.raises(StageError, match="does not start"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "give the path"]),
        (b"no protobuf", ["no valid ONNX file"]),
        ({"weights": np.array([np.nan], dtype=np.float32)}, ["1 weights of 'weight' are NaN"]),
        ({"kind": TensorProto.BFLOAT16}, ["BF16", "8.0", "Tesla T4 has 7.5"]),
        ({"metadata": {"task": "detect"}}, ["stride, names", "export_onnx"]),
    ],
    ids=["missing", "not ONNX", "NaN", "a type the GPU lacks", "no metadata"],
)
def test_files_that_cannot_become_an_engine_are_refused(
    tmp_path: Path, content: bytes | dict[str, Any] | None, words: list[str]
) -> None:
    source = tmp_path / "model.onnx"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        network(source, **content)
    with pytest.raises(InputError) as caught:
        read_network(source, EngineOptions(), ["8.6", "7.5"], "Tesla T4")
    assert all(word in str(caught.value) for word in ["model.onnx", *words]), caught.value


def test_at_least_one_build(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="builds = 0"):
        build(tmp_path, builds=0)


# --- files ---


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A file in the form of an engine, of bytes that are none."""
    path = tmp_path / "model.engine"
    data = engine_file.with_header(NOT_AN_ENGINE, {"task": "detect", "stride": 32})
    manifest = EngineManifest(
        sha256=engine_file.digest(data), size=len(data), built_on=T4, precision="fp16",
        inputs={"images": {name: [1, 3, 64, 64] for name in ("min", "opt", "max")}}, outputs={"output0": [1, 6, 84]},
        source="model.onnx", source_sha256="0" * 64, options={"level": 3}, builds_ms=(1.5, 1.25), layers={"layers": 2},
    )  # fmt: skip
    engine_file.write_engine(path, data, manifest, ACCOUNTS["11"])
    return path


def test_a_manifest_survives_its_file(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert (manifest.built_on, manifest.builds_ms, manifest.precision) == (T4, (1.5, 1.25), "fp16")
    assert split_header(engine) == ({"task": "detect", "stride": 32}, NOT_AN_ENGINE)


def test_the_manifest_is_written_last(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, written = read_manifest(engine), []
    monkeypatch.setattr(engine_file, "atomic_write", lambda path, data: written.append(path.name))
    monkeypatch.setattr(engine_file, "write_json", lambda path, content: written.append(path.name))
    engine_file.write_engine(engine, b"", manifest, {})
    assert written == ["model.engine", "model.engine.layers.json", "model.engine.json"]


def _truncate(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-10])


def _change(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")


def _rewrite(engine: Path, **changes: Any) -> None:
    path = engine_file.manifest_path(engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Path.unlink, ["cannot be read"]),
        (lambda engine: engine_file.manifest_path(engine).unlink(), ["model.engine.json is not beside it"]),
        (_truncate, ["truncated", "copy it again"]),
        (_change, ["SHA-256"]),
        (lambda engine: _rewrite(engine, schema=2), ["another schema", "build the engine anew"]),
        (lambda engine: _rewrite(engine, colour="red"), ["colour"]),
        (lambda engine: engine_file.manifest_path(engine).write_text("[]"), ["no manifest of this version"]),
        (lambda engine: engine_file.manifest_path(engine).write_text("{"), ["not JSON"]),
    ],
)
def test_a_damaged_engine_is_refused(engine: Path, harm: Any, words: list[str]) -> None:
    harm(engine)
    with pytest.raises(InputError) as caught:
        read_manifest(engine)
    assert all(word in str(caught.value) for word in ["model.engine", *words]), caught.value


@pytest.mark.parametrize("content", [b"", b"\x10", b"ftrt not ours at all", b"\x02\x00\x00\x00[]rest"])
def test_a_file_without_our_header_is_no_engine(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.engine").write_bytes(content)
    with pytest.raises(InputError, match=r"other\.engine.*no engine of ours"):
        split_header(tmp_path / "other.engine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA A10"}, ["the GPU Tesla T4 (here: NVIDIA A10)"]),
        ({"compute_capability": "8.6"}, ["compute capability 7.5 (here: 8.6)"]),
        ({"tensorrt": "10.16.1.11"}, ["TensorRT 11.4.0.106 (here: TensorRT 10.16.1.11)"]),
        ({"gpu": "NVIDIA A10", "tensorrt": "11.5.0"}, ["NVIDIA A10), TensorRT 11.4"]),
        ({"compiler": "TensorRT for RTX", "tensorrt": "1.7"}, ["TensorRT 11.4.0.106 (here: TensorRT for RTX 1.7)"]),
        ({"driver": "590.1", "cuda": "13.1"}, []),
    ],
)
def test_an_engine_of_another_machine_is_refused_before_tensorrt_is_asked(
    engine: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: list[str]
) -> None:
    monkeypatch.setattr(runner, "environment", lambda trt: replace(T4, **change))
    if not words:
        assert runner.check_engine(engine, None).built_on == T4
        return
    with pytest.raises(InputError) as caught:
        runner.check_engine(engine, None)
    assert all(word in str(caught.value) for word in ["model.engine", "build it here from model.onnx", *words])


# --- INT8 for GPUs ---


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 file as ONNX Runtime on a CPU likes it."""
    import detection

    from yolov8_nas.export.onnx import export_int8_ptq
    from yolov8_nas.space import SearchSpace
    from yolov8_nas.supernet.derive import build as build_network

    torch.manual_seed(0)
    detector = build_network(SearchSpace.load("tiny").smallest(), 2, detection.CLASSES).eval()
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    return export_int8_ptq(detector, path, imgsz=64, calibration=[torch.rand(2, 3, 64, 64)])


def _plainly(model: onnx.ModelProto, *outputs: str) -> list[NDArray[Any]]:
    """Outputs of a file, computed node by node as it stands."""
    names = {value.name for value in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs if name not in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    return [np.asarray(output, dtype=np.float32) for output in session.run(list(outputs), {"images": images})]


def test_signed_integers_around_zero_compute_the_same(quantized: Path, tmp_path: Path) -> None:
    signed = onnx.load(int8_for_gpu(quantized, tmp_path / "signed.onnx", half=False))
    constants = {tensor.name: tensor for tensor in signed.graph.initializer}
    zeros = [constants[node.input[2]] for node in signed.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros
    assert all(z.data_type == TensorProto.INT8 and not numpy_helper.to_array(z).any() for z in zeros)
    np.testing.assert_array_equal(*(_plainly(m, "output0")[0] for m in (onnx.load(quantized), signed)))


def test_what_is_not_quantized_becomes_fp16(quantized: Path, tmp_path: Path) -> None:
    path = int8_for_gpu(quantized, tmp_path / "half.onnx")
    before, half = onnx.load(quantized), onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in half.graph.value_info}
    convolutions = {node.name: kinds[node.output[0]] for node in half.graph.node if node.op_type == "Conv"}
    whole = [name for name, kind in convolutions.items() if kind != TensorProto.FLOAT16]
    assert [name.partition("/dfl/")[1:] for name in whole] == [("/dfl/", "conv/Conv")]
    for value in (*half.graph.input, *half.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert before.metadata_props == half.metadata_props
    # Early layers only: a network that has not learnt makes noise of each rounding.
    early = "/model.4/cv1/conv/Conv_output_0"
    wanted, got = (_plainly(model, early)[0] for model in (before, half))
    assert np.abs(got - wanted).mean() <= 0.02 * wanted.std()


def test_a_file_for_cpus_is_refused(quantized: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx.*activation_zero.*int8_for_gpu"):
        read_network(quantized, EngineOptions(), ["8.6"], "NVIDIA A10")


def test_scales_that_fp16_cannot_hold_are_raised_with_their_weights() -> None:
    weights = np.array([[100], [100]], dtype=np.int8)
    scales = np.array([1e-6, 1e-2], dtype=np.float32)
    constants = [numpy_helper.from_array(weights, "weight"), numpy_helper.from_array(scales, "scale")]
    node = helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["out"], axis=0)
    graph = helper.make_graph([node], "part", [], [], constants)
    gpu_int8._raise_scales(graph)
    raised, scale = (numpy_helper.to_array(tensor) for tensor in graph.initializer)
    assert scale[0] == np.finfo(np.float16).smallest_normal
    assert scale[1] == scales[1]
    np.testing.assert_allclose(raised[:, 0] * scale, weights[:, 0] * scales, atol=scale[0] / 2)


def test_files_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx: it is not quantized"):
        int8_for_gpu(network(tmp_path / "model.onnx"), tmp_path / "half.onnx")
    with pytest.raises(StageError, match=r"'weight' goes up to 7e\+04, beyond FP16"):
        gpu_int8._to_half(np.array([7e4], dtype=np.float32), "weight", tmp_path / "model.onnx")


# --- NMS ---


def test_efficient_nms_takes_boxes_and_scores_and_gives_rows(tmp_path: Path) -> None:
    before = onnx.load(network(tmp_path / "model.onnx", output=(1, 6, 12288)))
    model = add_efficient_nms(before, NmsOptions(score=0.3, iou=0.6, boxes=7))
    assert "output0" in {name for node in before.graph.node for name in node.output}
    (plugin,) = (node for node in model.graph.node if node.op_type == "EfficientNMS_TRT")
    attributes = {a.name: helper.get_attribute_value(a) for a in plugin.attribute}
    assert attributes.pop("score_threshold") == pytest.approx(0.3)
    assert attributes.pop("iou_threshold") == pytest.approx(0.6)
    assert attributes == {"plugin_version": b"1", "max_output_boxes": 7, "background_class": -1, "score_activation": 0,
                          "class_agnostic": 0, "box_coding": 1}  # fmt: skip
    assert plugin.domain == DOMAIN
    onnx.checker.check_model(model)
    images = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    raw = _run(before, {"images": images}, "output0")
    # ONNX Runtime has no such operator: it runs what comes before it, and what comes after it.
    boxes, scores = (_run(model, {"images": images}, name, stop=plugin.name) for name in plugin.input)
    np.testing.assert_array_equal(boxes, raw.transpose(0, 2, 1)[..., :4])
    np.testing.assert_array_equal(scores, raw.transpose(0, 2, 1)[..., 4:])
    found = {
        "nms/boxes": np.arange(28, dtype=np.float32).reshape(1, 7, 4),
        "nms/scores": np.linspace(0.9, 0.3, 7, dtype=np.float32)[None],
        "nms/classes": np.array([[0, 1, 1, 0, 0, 1, 0]], dtype=np.int32),
    }
    rows = _run(model, found, "output0", start=plugin.name)
    np.testing.assert_array_equal(rows[..., :4], found["nms/boxes"])
    np.testing.assert_array_equal(rows[..., 4], found["nms/scores"])
    np.testing.assert_array_equal(rows[..., 5], found["nms/classes"])


def _run(
    model: onnx.ModelProto, feed: dict[str, NDArray[Any]], output: str, *, start: str = "", stop: str = ""
) -> NDArray[Any]:
    """Run the nodes after `start` and before `stop` with ONNX Runtime."""
    nodes = list(model.graph.node)
    names = [node.name for node in nodes]
    chosen = nodes[names.index(start) + 1 if start else 0 : names.index(stop) if stop else None]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feed.items()
    ]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(chosen, "part", inputs, outputs, model.graph.initializer)
    part = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run([output], feed)
    return np.asarray(result)


def test_stock_ultralytics_takes_an_engine_with_nms_as_end_to_end(trt: Any, tmp_path: Path) -> None:
    from ultralytics.nn.backends.tensorrt import TensorRTBackend

    manifest = build(tmp_path, builds=1, options=EngineOptions(nms=NmsOptions()))
    assert manifest.outputs == {"output0": [1, 300, 6]}
    assert manifest.options["nms"] == {"score": 0.25, "iou": 0.7, "boxes": 300}
    parsed = onnx.load_from_string(trt.doubles["OnnxParser"].parse.call_args.args[0])
    assert "EfficientNMS_TRT" in {node.op_type for node in parsed.graph.node}
    backend = TensorRTBackend.__new__(TensorRTBackend)
    backend.dynamic = False
    backend.apply_metadata(TensorRTBackend.engine_header(tmp_path / "model.engine")[1])
    assert backend.end2end is True


def test_nms_on_top_of_nms_is_refused(tmp_path: Path) -> None:
    source = network(tmp_path / "model.onnx", output=(1, 300, 6))
    with pytest.raises(InputError, match=r"model\.onnx.*\[1, 300, 6\].*without NMS"):
        read_network(source, EngineOptions(nms=NmsOptions()), ["8.6"], "NVIDIA A10")


# --- what the inspector tells ---


@pytest.mark.parametrize("version", ACCOUNTS)
def test_layers_fusions_and_reformats_are_counted(version: str) -> None:
    assert summarize_layers(ACCOUNTS[version]) == {
        "layers": 2,
        "types": {"CaskConvolution": 1, "Reformat": 1},
        "fused": 1,
        "reformats": ["Reformatting CopyNode for Input Tensor 0 to /conv"],
    }
    assert summarize_layers({"Layers": ["names", "only"]})["layers"] == 2


# --- running ---


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's CUDA calls made harmless: tensors lie in the host's memory, streams do nothing."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, **where: zeros(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: mock.Mock(cuda_stream=42))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def opened(trt: Any, engine: Path, shape: tuple[int, ...] = (1, 3, 64, 64)) -> None:
    """Let the doubles describe an engine with one input and one output."""
    cuda_engine, context = trt.doubles["ICudaEngine"], trt.doubles["IExecutionContext"]
    cuda_engine.num_io_tensors = 2
    cuda_engine.get_tensor_name.side_effect = lambda index: ["images", "output0"][index]
    modes = {"images": trt.TensorIOMode.INPUT, "output0": trt.TensorIOMode.OUTPUT}
    cuda_engine.get_tensor_mode.side_effect = lambda name: modes[name]
    cuda_engine.get_tensor_dtype.side_effect = lambda name: trt.DataType.FLOAT
    cuda_engine.get_tensor_shape.side_effect = lambda name: {"images": shape, "output0": (shape[0], 6, 84)}[name]
    cuda_engine.get_tensor_profile_shape.side_effect = lambda name, index: [
        (1, 3, 32, 32),
        (2, 3, 64, 64),
        (4, 3, 96, 96),
    ]
    cuda_engine.device_memory_size_v2 = 3 * 2**20
    chosen = {}
    context.set_input_shape.side_effect = lambda name, shape: chosen.setdefault(name, shape)[0] <= 4
    context.get_tensor_shape.side_effect = lambda name: (
        chosen[name] if name == "images" else (chosen["images"][0], 6, 84)
    )
    _rewrite(engine, built_on={**json.loads(engine_file.manifest_path(engine).read_text())["built_on"],
                               "tensorrt": trt.__version__})  # fmt: skip


def test_a_runner_has_what_measuring_takes_of_a_session(trt: Any, engine: Path, cuda: None) -> None:
    opened(trt, engine)
    session = runner.TensorRTRunner(engine, graph=False)
    feed = runtime.random_feed(session)
    assert {name: array.shape for name, array in feed.items()} == {"images": (1, 3, 64, 64)}
    (output,) = session.run(None, feed)
    assert output.shape == (1, 6, 84)
    assert session.memory_mb == 3.0
    order = [name for name in calls(trt) if name.startswith("IExecutionContext")]
    assert order == [
        "IExecutionContext.set_input_shape",
        "IExecutionContext.get_tensor_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.get_tensor_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.execute_async_v3",
    ]
    assert trt.doubles["IExecutionContext"].execute_async_v3.call_args == mock.call(42)
    assert trt.doubles["Runtime"].deserialize_cuda_engine.call_args == mock.call(NOT_AN_ENGINE)


def test_dynamic_engines_run_in_the_shape_asked_for(trt: Any, engine: Path, cuda: None) -> None:
    opened(trt, engine, shape=(-1, 3, -1, -1))
    assert runner.TensorRTRunner(engine, graph=False).get_inputs()[0].shape == [2, 3, 64, 64]
    opened(trt, engine, shape=(-1, 3, -1, -1))
    asked = runner.TensorRTRunner(engine, shapes={"images": (4, 3, 96, 96)}, graph=False)
    assert asked.get_inputs()[0] == runner.TensorSpec("images", [4, 3, 96, 96], "tensor(float)")
    opened(trt, engine, shape=(-1, 3, -1, -1))
    with pytest.raises(InputError, match=r"input 'images' cannot be \(9, 3, 64, 64\)"):
        runner.TensorRTRunner(engine, shapes={"images": (9, 3, 64, 64)}, graph=False)


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({}, "'images' is missing"),
        ({"images": np.zeros((1, 3, 32, 32), np.float32)}, r"\(1, 3, 32, 32\); give float32 \(1, 3, 64, 64\)"),
        ({"images": np.zeros((1, 3, 64, 64), np.float16)}, "float16"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(
    trt: Any, engine: Path, cuda: None, feed: dict[str, NDArray[Any]], words: str
) -> None:
    opened(trt, engine)
    with pytest.raises(InputError, match=words):
        runner.TensorRTRunner(engine, graph=False).run(None, feed)


def test_what_tensorrt_refuses_is_told(trt: Any, engine: Path, cuda: None) -> None:
    opened(trt, engine)
    trt.doubles["IExecutionContext"].execute_async_v3.return_value = False
    with pytest.raises(InputError, match="refuses to run it"):
        runner.TensorRTRunner(engine)
    trt.doubles["Runtime"].deserialize_cuda_engine.return_value = None
    with pytest.raises(InputError, match="cannot open it"):
        runner.TensorRTRunner(engine)
    trt.Runtime = mock.Mock(side_effect=TypeError("pybind11::init(): factory function returned nullptr"))
    with pytest.raises(InputError, match="does not start"):
        runner.TensorRTRunner(engine)


# --- what is here ---


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ([], "TensorRT is not installed here and"),
        (["tensorrt_bindings"], "its Python bindings are, its libraries are missing"),
        (["tensorrt", "tensorrt_bindings"], "its libraries cannot be loaded (libnvinfer.so.11: cannot open"),
        (["8.6.1"], "TensorRT 8.6.1 is installed, and TensorRT 10 or 11 is needed"),
    ],
)
def test_status_says_precisely_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], words: str
) -> None:
    def no_tensorrt(name: str) -> Any:
        if installed and installed[0][0].isdigit():
            return mock.Mock(__version__=installed[0])
        raise ImportError("libnvinfer.so.11: cannot open shared object file" if name in installed else f"No {name}")

    monkeypatch.setattr(runner, "importlib", mock.Mock(wraps=importlib, import_module=no_tensorrt))
    runner.importlib.util.find_spec = lambda name: name if name in installed else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = tensorrt.status()
    assert status.built is False
    assert words in str(status.reason)
    assert "no NVIDIA GPU" in str(status.reason)
    assert words in doctor._tensorrt().found
    with pytest.raises(InputError, match="use runtime: onnxruntime"):
        runner.bindings()
