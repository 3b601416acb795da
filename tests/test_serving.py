"""What is written for Triton, KServe and DeepStream: golden files, the real schema, and numbers where there are any."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import detection
import fabricated
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner
from ultralytics import YOLO
from ultralytics.utils.ops import xywh2xyxy

from yolov8_nas.commands.main import app
from yolov8_nas.export import serving
from yolov8_nas.export.deepstream import parsed_by_deepstream
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.export.serving import Place
from yolov8_nas.measure import engine_file
from yolov8_nas.measure.engine_file import EngineManifest, GpuEnvironment

SIDE = 64
GOLDEN = Path(__file__).parent / "golden" / "serving"
PLAN = b"not an engine"
T4 = GpuEnvironment(gpu="Tesla T4", compute_capability="7.5", tensorrt="11.4.0", cuda="13.0", driver="580.1")
URI = "s3://models/parts/triton"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `fixed.onnx` (one image), `dynamic.onnx` (FP16) and `tuned.engine`, which is said to be of it."""
    folder = tmp_path_factory.mktemp("exported")
    network = detection.lively(SIDE)
    export_onnx(network, folder / "fixed.onnx", imgsz=SIDE)
    dynamic = export_onnx(network, folder / "dynamic.onnx", imgsz=SIDE, dynamic=True, half=True)
    metadata = {"task": "detect", "stride": 32, "imgsz": [SIDE, SIDE], "names": dict(enumerate(detection.CLASSES))}
    data = engine_file.with_header(PLAN, metadata)
    manifest = EngineManifest(
        sha256=engine_file.digest(data), size=len(data), built_on=T4, precision="fp16",
        inputs={"images": {"min": [1, 3, SIDE, SIDE], "opt": [4, 3, SIDE, SIDE], "max": [4, 3, SIDE, SIDE]}},
        outputs={"output0": [-1, 6, -1]}, source=dynamic.name, source_sha256=engine_file.digest(dynamic.read_bytes()),
        options={}, builds_ms=(1.0,), layers={},
    )  # fmt: skip
    engine_file.write_engine(folder / "tuned.engine", data, manifest, {})
    return folder


CASES: dict[str, dict[str, Any]] = {
    "fixed": {"file": "fixed.onnx", "place": Place(threads=2), "instances": 3},
    "dynamic": {"file": "dynamic.onnx", "place": Place(kind="gpu", runtime="onnxruntime-tensorrt"), "max_batch": 16},
    "engine": {"file": "tuned.engine", "place": Place()},
}


@pytest.fixture(scope="module", params=CASES)
def written(
    request: pytest.FixtureRequest, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Each case's name, and the folder that was written for it."""
    case = {**CASES[request.param]}
    folder = tmp_path_factory.mktemp("written") / "served"
    done = serving.package(exported / case.pop("file"), folder, name="parts", storage_uri=URI, **case)
    assert done.parts == ("triton", "kserve", "deepstream")
    return request.param, folder


def golden(name: str, text: str) -> None:
    expected = GOLDEN / name
    assert text == expected.read_text(), f"{expected} differs; if the change is meant, write it anew"


def model_config(text: str) -> Any:
    """A `config.pbtxt` as Triton reads it."""
    pytest.importorskip("tritonclient.grpc", reason="Triton's protobuf comes with tritonclient and grpcio")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_files_are_those_that_were_reviewed(written: tuple[str, Path]) -> None:
    case, folder = written
    golden(f"{case}/config.pbtxt", (folder / "triton" / "parts" / "config.pbtxt").read_text())
    golden(f"{case}/inferenceservice.yaml", (folder / "kserve" / "inferenceservice.yaml").read_text())
    golden(f"{case}/config_infer_primary.txt", (folder / "deepstream" / "config_infer_primary.txt").read_text())
    for labels in (folder / "triton" / "parts" / "labels.txt", folder / "deepstream" / "labels.txt"):
        assert labels.read_text() == "square\ndisc\n"


def test_triton_is_told_what_the_file_takes_and_gives(written: tuple[str, Path], exported: Path) -> None:
    case, folder = written
    repository = folder / "triton" / "parts"
    config = model_config((repository / "config.pbtxt").read_text())
    (taken,), (given,), (group,) = config.input, config.output, config.instance_group
    kinds = {"fixed": group.KIND_CPU, "dynamic": group.KIND_GPU, "engine": group.KIND_GPU}
    batches = {"fixed": 0, "dynamic": 16, "engine": 4}
    assert (config.name, config.max_batch_size, group.kind) == ("parts", batches[case], kinds[case])
    assert config.HasField("dynamic_batching") == (case != "fixed")
    assert group.count == CASES[case].get("instances", 1)
    if case == "engine":
        assert config.backend == "tensorrt"
        assert (repository / "1" / "model.plan").read_bytes() == PLAN, "TensorRT knows no header of Ultralytics"
        assert (list(taken.dims), list(given.dims)) == ([3, SIDE, SIDE], [6, -1])
        return
    assert config.backend == "onnxruntime"
    session = onnxruntime.InferenceSession(str(repository / "1" / "model.onnx"))
    for tensor, value in ((taken, session.get_inputs()[0]), (given, session.get_outputs()[0])):
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        assert (tensor.name, list(tensor.dims)) == (value.name, shape[1:] if config.max_batch_size else shape)
        assert (
            tensor.data_type == tensor.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name["TYPE_FP32"].number
        )


def test_stock_ultralytics_finds_the_classes_on_triton(
    written: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = written
    config = model_config((folder / "triton" / "parts" / "config.pbtxt").read_text())
    import tritonclient.grpc
    from google.protobuf.json_format import MessageToDict
    from ultralytics.utils.triton import TritonRemoteModel

    class Client:
        def __init__(self, **options: Any) -> None: ...

        def get_model_config(self, name: str, as_json: bool) -> dict[str, Any]:
            return {"config": MessageToDict(config, preserving_proto_field_name=True)}

    monkeypatch.setattr(tritonclient.grpc, "InferenceServerClient", Client)
    remote = TritonRemoteModel("grpc://localhost:8001/parts")
    assert remote.metadata["names"] == dict(enumerate(detection.CLASSES))
    assert (remote.metadata["task"], remote.metadata["stride"]) == ("detect", 32)
    assert (remote.input_names, remote.output_names) == (["images"], ["output0"])


def test_kserve_serves_the_repository_as_nobody_in_particular(written: tuple[str, Path]) -> None:
    case, folder = written
    service = yaml.safe_load((folder / "kserve" / "inferenceservice.yaml").read_text())
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert (service["apiVersion"], service["metadata"]["name"]) == ("serving.kserve.io/v1beta1", "parts")
    assert (model["storageUri"], model["protocolVersion"]) == (URI, "v2")
    assert predictor["securityContext"]["runAsNonRoot"] is True
    assert predictor["securityContext"]["runAsUser"] > 0
    assert model["resources"]["requests"] == model["resources"]["limits"]
    assert ("nvidia.com/gpu" in model["resources"]["limits"]) == (case != "fixed")
    assert predictor.get("nodeSelector") == ({"nvidia.com/gpu.product": "Tesla-T4"} if case == "engine" else None)
    if case == "fixed":
        assert model["resources"]["limits"]["cpu"] == "6", "three instances of two threads"


@pytest.mark.parametrize("name", ["fixed.onnx", "dynamic.onnx"])
def test_deepstream_gets_the_same_detections(exported: Path, name: str) -> None:
    graph = onnx.load(exported / name)
    images = np.random.default_rng(0).random((1, 3, SIDE, 2 * SIDE if name == "dynamic.onnx" else SIDE), np.float32)
    height, width = images.shape[2:]
    (raw,) = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"images": images})
    changed = parsed_by_deepstream(graph, height, width, classes=2)
    session = onnxruntime.InferenceSession(changed.SerializeToString())
    assert session.get_inputs()[0].shape[2:] == [height, width]
    assert {value.type for value in session.get_outputs()} == {"tensor(float)"}, "the parser takes no other"
    boxes, scores, classes = session.run(
        ["detection_boxes", "detection_scores", "detection_classes"], {"images": images}
    )
    top, left, bottom, right = np.moveaxis(boxes, 2, 0)
    corners = np.stack([left * width, top * height, right * width, bottom * height], axis=-1)
    np.testing.assert_allclose(corners, xywh2xyxy(raw[:, :4].transpose(0, 2, 1)), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(scores, raw[:, 4:].max(axis=1))
    np.testing.assert_array_equal(classes, raw[:, 4:].argmax(axis=1))
    assert set(np.unique(classes)) == {0.0, 1.0}


def test_deepstream_gets_the_graph_that_an_engine_was_built_from(written: tuple[str, Path]) -> None:
    case, folder = written
    graph = onnx.load(folder / "deepstream" / "model.onnx")
    halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    assert halves == (case != "fixed")
    assert [size.dim_value for size in graph.graph.input[0].type.tensor_type.shape.dim[2:]] == [SIDE, SIDE]


def test_the_example_finds_what_stock_ultralytics_finds(exported: Path, tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "examples" / "infer.py"
    spec = importlib.util.spec_from_file_location("infer", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    pictures = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, picture in enumerate(pictures):
        cv2.imwrite(picture, np.random.default_rng(number).integers(0, 255, (40, 100, 3)).astype(np.uint8))
    stock = YOLO(str(exported / "fixed.onnx"), task="detect")
    results = [stock.predict(picture, imgsz=SIDE, conf=0.001, iou=0.7, verbose=False)[0] for picture in pictures]
    expected = [
        (picture, result.names[int(row[5])], row[4], row[:4])
        for picture, result in zip(pictures, results, strict=True)
        for row in result.boxes.data.tolist()
    ]
    assert len(expected) > 3
    found = list(example.detect(str(exported / "fixed.onnx"), pictures, confidence=0.001))
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose([ours[2], *ours[3]], [theirs[2], *theirs[3]], rtol=1e-4, atol=1e-2)
    batches = list(example.detect(str(exported / "dynamic.onnx"), pictures, batch=2, confidence=0.001))
    assert {row[0] for row in batches} == set(pictures)


# --- what is told, and what is refused ---


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["package", *map(str, arguments)])


def test_what_is_left_out_is_told(exported: Path, tmp_path: Path) -> None:
    for name in ("tuned.engine", "tuned.engine.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    out = tmp_path / "served"
    out.mkdir()
    result = invoke(tmp_path / "tuned.engine", "-o", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out} (triton): model tuned" in result.output
    assert "TensorRT 11.4.0" in result.output
    assert "give --storage-uri" in result.output
    assert "put dynamic.onnx" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served", "tuned.engine", "tuned.engine.json"]


def test_a_run_is_served_where_it_was_measured(exported: Path, tmp_path: Path) -> None:
    files = {name: str(exported / file) for name, file in {"model.onnx": "dynamic.onnx", "best.pt": "best.pt"}.items()}
    target = fabricated.target(
        model={**fabricated.figures(2.0), "files": files},
        precision_shipped="fp16",
        hardware={"name": "t4", "kind": "gpu", "threads": 1, "model": "Tesla T4"},
    )
    run = tmp_path / "line-3"
    run.mkdir()
    fabricated.summary(target).write(run)
    result = invoke(run, "-o", tmp_path / "served", "--storage-uri", URI)
    assert result.exit_code == 0, result.output
    config = model_config((tmp_path / "served" / "triton" / "line-3" / "config.pbtxt").read_text())
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert not config.HasField("optimization")
    service = (tmp_path / "served" / "kserve" / "inferenceservice.yaml").read_text()
    assert "nvidia.com/gpu.product: Tesla-T4" in service


def altered(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path, Path], Path]:
    def write(exported: Path, folder: Path) -> Path:
        graph = onnx.load(exported / "fixed.onnx")
        change(graph)
        onnx.save(graph, folder / "model.onnx")
        return folder / "model.onnx"

    return write


def copied(name: str, *, manifest: bool = True, cut: int = 0) -> Callable[[Path, Path], Path]:
    def write(exported: Path, folder: Path) -> Path:
        data = (exported / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) - cut])
        if manifest and name.endswith(".engine"):
            (folder / f"{name}.json").write_bytes((exported / f"{name}.json").read_bytes())
        return folder / name

    return write


def _without_metadata(graph: onnx.ModelProto) -> None:
    del graph.metadata_props[:]


def _of_another_task(graph: onnx.ModelProto) -> None:
    for entry in graph.metadata_props:
        entry.value = "segment" if entry.key == "task" else entry.value


def _with_three_classes(graph: onnx.ModelProto) -> None:
    for entry in graph.metadata_props:
        entry.value = str({0: "a", 1: "b", 2: "c"}) if entry.key == "names" else entry.value


def _quantized_for_a_cpu(graph: onnx.ModelProto) -> None:
    graph.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
    graph.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), "zero"))
    graph.graph.node.append(helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["unused"]))


FIXED = copied("fixed.onnx")


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (altered(_without_metadata), [], ["metadata have no task"]),
        (altered(_of_another_task), [], ["'segment'", "only detectors"]),
        (altered(_with_three_classes), [], ["(1, 6, 84)", "(batch, 7, anchors)"]),
        (copied("fixed.onnx", cut=1000), [], ["no valid ONNX file"]),
        (copied("tuned.engine", cut=5), [], ["truncated", "copy it again"]),
        (copied("tuned.engine", manifest=False), [], ["tuned.engine.json is not beside it"]),
        (copied("tuned.engine"), ["--max-batch", "8"], ["--max-batch 8", "takes 4 at most"]),
        (FIXED, ["--max-batch", "8"], ["--max-batch 8", "exactly 1", "--dynamic"]),
        (FIXED, ["--name", "Parts_1"], ["--name 'Parts_1'", "a-z"]),
        (FIXED, ["--name", ""], ["--name ''"]),
        (FIXED, ["--name", "a" * 54], ["at most 53"]),
        (FIXED, ["--storage-uri", "models/parts"], ["--storage-uri models/parts", "s3://"]),
        (lambda exported, folder: exported / "tuned.engine.json", [], ["give an .onnx or .engine file"]),
        (lambda exported, folder: exported, [], ["no finished run", ".onnx"]),
        (lambda exported, folder: folder / "none.onnx", [], ["none.onnx", "cannot be read"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    exported: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], Path],
    options: list[str],
    words: list[str],
) -> None:
    file = make(exported, tmp_path)
    before = sorted(tmp_path.iterdir())
    result = invoke(file, "-o", tmp_path / "served", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("inside", ["notes.txt", ""])
def test_a_folder_that_is_in_use_stays_as_it_is(exported: Path, tmp_path: Path, inside: str) -> None:
    out = tmp_path / "served"
    if inside:
        out.mkdir()
    (out / inside if inside else out).write_text("mine")
    result = invoke(exported / "fixed.onnx", "-o", out)
    assert result.exit_code == 2
    assert "not an empty folder" in result.stderr
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_a_failure_half_way_leaves_nothing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fail(file: Path, data: bytes) -> None:
        written.append(file.name)
        if len(written) == 3:
            raise OSError("no space left")
        file.touch()

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        serving.package(exported / "fixed.onnx", tmp_path / "served", name="parts")
    assert list(tmp_path.iterdir()) == []


def test_what_deepstream_cannot_take_is_told(exported: Path, tmp_path: Path) -> None:
    file = altered(_quantized_for_a_cpu)(exported, tmp_path)
    done = serving.package(file, tmp_path / "served", name="parts")
    assert done.parts == ("triton",)
    assert any("quantized for ONNX Runtime on a CPU" in note for note in done.notes)


def test_exports_of_ultralytics_leave_their_channels_open(exported: Path, tmp_path: Path) -> None:
    graph = onnx.load(exported / "dynamic.onnx")
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "Concatoutput0_dim_1"
    onnx.save(graph, tmp_path / "model.onnx")
    done = serving.package(tmp_path / "model.onnx", tmp_path / "served", name="parts", storage_uri=URI)
    assert done.parts == ("triton", "kserve", "deepstream")
    config = model_config((tmp_path / "served" / "triton" / "parts" / "config.pbtxt").read_text())
    assert config.max_batch_size == serving.MAX_BATCH
    names = config.parameters["metadata"].string_value
    assert ast.literal_eval(names)["names"] == dict(enumerate(detection.CLASSES))
