"""What servers need to serve an exported detector, as files.

    triton/<name>/config.pbtxt         a model repository of Triton Inference Server
                  labels.txt
                  1/model.onnx         or model.plan: the engine without Ultralytics' header
    kserve/inferenceservice.yaml       serves that repository, once it lies at the address in it
    deepstream/config_infer_primary.txt, labels.txt, model.onnx

Boxes are decoded in the graph. Non-maximum suppression, unless the head is NMS-free, is the client's: docs/serving.md
tells what goes in and comes out. None of these servers has served anything here. What they read is held against
Triton's own protobuf, and follows what the sources of KServe and DeepStream say.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from onnx import TensorProto

from yolov8_nas.errors import InputError
from yolov8_nas.export.deepstream import LIBRARY, OLDEST_OPSET, PARSER, parsed_by_deepstream
from yolov8_nas.export.onnx_file import check_zero_points, read_metadata
from yolov8_nas.export.servable import Servable, Tensor, nms_free, nms_inside, read_servable

CONFIDENCE: Final = 0.25
IOU: Final = 0.7
MAX_DETECTIONS: Final = 300
"""The thresholds of Ultralytics' `predict`, with which latency including NMS is measured, too."""

MAX_BATCH: Final = 8
"""Most images at once where the file takes any number and nobody says how many."""

QUEUE_DELAY_US: Final = 1000
"""How long Triton waits for more images to fill a batch: about what the network itself takes."""

GPU_MEMORY: Final = "4Gi"
CPU_MEMORY: Final = "2Gi"
"""Memory of the pod: libraries of CUDA fill two GiB before the first image."""

_NAME: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME: Final = 53  # KServe's names of what it makes of it are longer by up to ten, and a label ends at 63

_STORAGES: Final = ("gs", "s3", "pvc", "file", "https", "http", "hdfs", "webhdfs", "oci", "hf")
"""What KServe fetches models from (kserve/kserve, SupportedStorageURIPrefixList)."""

_TRITON_USER: Final = 1000  # triton-server in NVIDIA's images


@dataclass(frozen=True)
class Place:
    """Where a detector is to be served.

    Attributes:
        kind: `cpu` or `gpu`.
        threads: Threads of ONNX Runtime on a CPU, per instance.
        product: The GPU as its driver names it, where it is to be that one.
        runtime: Name of what measured it there; with `onnxruntime-tensorrt`, ONNX Runtime hands it to TensorRT.
    """

    kind: str = "cpu"
    threads: int = 1
    product: str | None = None
    runtime: str = "onnxruntime"


@dataclass(frozen=True)
class Package:
    """What was written.

    Attributes:
        parts: Folders in it.
        notes: What was left out, and what has to be known, in sentences.
    """

    parts: tuple[str, ...]
    notes: tuple[str, ...]


def package(
    file: Path,
    folder: Path,
    *,
    name: str,
    storage_uri: str | None = None,
    max_batch: int | None = None,
    instances: int = 1,
    place: Place = Place(),
) -> Package:
    """Write what Triton, KServe and DeepStream need to serve a detector; all of it or nothing.

    Args:
        file: The exported detector, see `read_servable`.
        folder: Where to; it must not exist or be empty.
        name: Name of the model on the servers; `legal_name` makes one of any text.
        storage_uri: Where the folder `triton` will lie for KServe; without it nothing is written for KServe.
        max_batch: Most images at once, where the file leaves that open.
        instances: Copies of the network on a server.
        place: Where it is served; an engine runs on the GPU that it was built on.

    Raises:
        InputError: The file is no such detector, the folder is not empty, or an option cannot be used.
    """
    _check_folder(folder)
    _check_name(name)
    if storage_uri is not None and not re.fullmatch(rf"({'|'.join(_STORAGES)})://\S+", storage_uri):
        raise InputError(f"--storage-uri {storage_uri}: KServe reads {', '.join(f'{s}://' for s in _STORAGES)} only")
    model = read_servable(file)
    if model.engine:
        place = Place(kind="gpu", product=model.engine.built_on.gpu, runtime="tensorrt")
    batch = _max_batch(model, max_batch)

    labels = "".join(f"{' '.join(label.split())}\n" for label in model.names)
    binary = "model.plan" if model.engine else "model.onnx"
    files: dict[str, str | bytes] = {
        f"triton/{name}/config.pbtxt": triton_config(model, name, batch, instances, place),
        f"triton/{name}/labels.txt": labels,
        f"triton/{name}/1/{binary}": model.data,
    }
    notes = []
    if model.engine:
        built = model.engine.built_on
        notes.append(
            f"the engine runs on {built.gpu} with TensorRT {built.tensorrt} only: take the image of Triton for it"
        )
    if storage_uri is None:
        notes.append("kserve: not written; give --storage-uri, where the folder triton will lie")
    else:
        files["kserve/inferenceservice.yaml"] = inference_service(name, storage_uri, instances, place)
    if why_not := _why_no_deepstream(model):
        notes.append(f"deepstream: not written; {why_not}")
    else:
        files["deepstream/config_infer_primary.txt"] = deepstream_config(model, batch)
        files["deepstream/labels.txt"] = labels.replace(";", ",")  # there it stands between the labels of one object
        files["deepstream/model.onnx"] = _for_deepstream(model)
    _write(folder, files)
    return Package(tuple(dict.fromkeys(path.split("/")[0] for path in files)), tuple(notes))


def legal_name(text: str) -> str:
    """A name that Triton and KServe take, made of a text that has some letters or digits."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def triton_config(model: Servable, name: str, max_batch: int, instances: int, place: Place) -> str:
    """The content of `config.pbtxt`, in protobuf's text format (triton-inference-server/common, model_config.proto).

    The metadata stand in it where stock `YOLO("http://host:8000/<name>", task="detect")` looks for them.

    Args:
        model: The detector.
        name: Its name.
        max_batch: Most images at once; 0 where the file has a fixed batch, which then is part of its shapes.
        instances: Copies of it on a server.
        place: Where it is served.
    """
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted('tensorrt' if model.engine else 'onnxruntime')}",
        f"max_batch_size: {max_batch}",
        *_tensor("input", model.images, max_batch),
        *_tensor("output", model.output, max_batch),
        "instance_group [",
        "  {",
        f"    count: {instances}",
        f"    kind: KIND_{place.kind.upper()}",
        "  }",
        "]",
    ]
    if max_batch > 1:
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: [ {max_batch} ]",
            f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}",
            "}",
        ]
    if place.runtime == "onnxruntime-tensorrt":
        lines += [
            "optimization {",
            "  execution_accelerators {",
            "    gpu_execution_accelerator [",
            "      {",
            '        name: "tensorrt"',
            f'        parameters {{ key: "precision_mode" value: "{model.precision.upper()}" }}',
            "      }",
            "    ]",
            "  }",
            "}",
        ]
    if place.kind == "cpu":
        # Unless it is told, ONNX Runtime takes every core of the node, those that the pod may not use as well.
        lines += _parameter("intra_op_thread_count", str(place.threads))
    metadata = {**model.metadata, "names": dict(enumerate(model.names))}
    lines += _parameter("metadata", str(metadata))
    return "\n".join(lines) + "\n"


def inference_service(name: str, storage_uri: str, instances: int, place: Place) -> str:
    """The content of `inferenceservice.yaml`: KServe's v1beta1 with Triton, over protocol v2.

    Args:
        name: Name of the service.
        storage_uri: Where the model repository lies.
        instances: Copies of the network on a server.
        place: Where it is served.
    """
    resources = {"cpu": str(instances * place.threads), "memory": CPU_MEMORY}
    pod: dict[str, Any] = {}
    if place.kind == "gpu":
        resources = {"cpu": "2", "memory": GPU_MEMORY, "nvidia.com/gpu": "1"}
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if place.product:
            pod["nodeSelector"] = {"nvidia.com/gpu.product": place.product.replace(" ", "-")}
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                **pod,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": _TRITON_USER,
                    "fsGroup": _TRITON_USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "model": {
                    "modelFormat": {"name": "triton"},
                    "protocolVersion": "v2",
                    "storageUri": storage_uri,
                    "resources": {"requests": resources, "limits": dict(resources)},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                },
            }
        },
    }
    return yaml.safe_dump(service, sort_keys=False)


def deepstream_config(model: Servable, max_batch: int) -> str:
    """The content of nvinfer's configuration.

    Precision lies in the file. So nvinfer asks TensorRT for none (`network-mode=0`), and for a network whose types are
    those of the file; asked for INT8, it would want a calibration table and fall back to FP16.

    Args:
        model: The detector.
        max_batch: Most images at once; 0 where the file has a fixed batch.
    """
    height, width = model.sides
    batch = max_batch or model.batch
    properties = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": 0,
        "onnx-file": "model.onnx",
        "model-engine-file": f"model.onnx_b{batch}_gpu0_fp32.engine",
        "batch-size": batch,
        "infer-dims": f"3;{height};{width}",
        "network-mode": 0,
        **({} if model.precision == "fp32" else {"strongly-typed": 1}),
        "model-color-format": 0,
        "net-scale-factor": f"{1 / 255:.10f}",
        "maintain-aspect-ratio": 1,
        "symmetric-padding": 1,
        "scaling-filter": 1,
        "labelfile-path": "labels.txt",
        "num-detected-classes": len(model.names),
        "parse-bbox-func-name": PARSER,
        "custom-lib-path": LIBRARY,
        "cluster-mode": 4 if nms_free(model.metadata) else 2,
    }
    overlap = {} if nms_free(model.metadata) else {"nms-iou-threshold": IOU}
    classes = {"pre-cluster-threshold": CONFIDENCE, **overlap, "topk": MAX_DETECTIONS}
    sections: dict[str, dict[str, Any]] = {"property": properties, "class-attrs-all": classes}
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key}={value}\n" for key, value in content.items())
        for section, content in sections.items()
    )


def _for_deepstream(model: Servable) -> bytes:
    assert model.graph is not None
    changed = parsed_by_deepstream(
        model.graph, *model.sides, classes=len(model.names), nms_free=nms_free(model.metadata)
    )
    return bytes(changed.SerializeToString(deterministic=True))


def _why_no_deepstream(model: Servable) -> str | None:
    """Why DeepStream cannot be given a detector; nothing where it can."""
    if model.graph is None:
        assert model.engine is not None
        return (
            f"its output has another form there, which is made from the ONNX file: put {model.engine.source}, of which "
            "the engine was built, beside it"
        )
    opset = max(entry.version for entry in model.graph.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        return f"it has opset {opset}; export it with {OLDEST_OPSET} or later"
    if model.graph.graph.input[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        return "it takes images in FP16; export it with yolov8-nas export --half, whose images and outputs are FP32"
    if nms_inside(read_metadata(model.file, model.graph)):
        return "non-maximum suppression is inside, and nvinfer has its own; export it without"
    try:
        check_zero_points(model.file, model.graph)
    except InputError:
        return "its activations are quantized for ONNX Runtime on a CPU, which TensorRT does not take"
    return None


def _max_batch(model: Servable, asked: int | None) -> int:
    """Most images at once, as Triton counts: 0 where the batch is fixed."""
    if model.batch is not None:
        if asked not in (None, model.batch):
            raise InputError(
                f"--max-batch {asked}: {model.file} takes exactly {model.batch} at once; export it with --dynamic"
            )
        return 0
    if asked and model.largest and asked > model.largest:
        raise InputError(f"--max-batch {asked}: {model.file} takes {model.largest} at most; build an engine for more")
    return asked or model.largest or MAX_BATCH


def _check_folder(folder: Path) -> None:
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder}: there is no folder {folder.parent}; make it first")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: not an empty folder; give a new one")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise InputError(
            f"--name {name!r}: give at most {_LONGEST_NAME} of a-z, 0-9 and '-', the first a letter, the last no '-'"
        )


def _tensor(field: str, tensor: Tensor, max_batch: int) -> Sequence[str]:
    dims = tensor.shape[1:] if max_batch else tensor.shape
    return (
        f"{field} [",
        "  {",
        f"    name: {_quoted(tensor.name)}",
        f"    data_type: TYPE_{tensor.type}",
        f"    dims: [ {', '.join(map(str, dims))} ]",
        "  }",
        "]",
    )


def _parameter(key: str, value: str) -> Sequence[str]:
    return (
        "parameters {",
        f"  key: {_quoted(key)}",
        f"  value {{ string_value: {_quoted(value)} }}",
        "}",
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # protobuf's text format escapes quotes and backslashes as JSON does


def _write(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write files to a folder that is there with all of them or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as work:
        ready = Path(work) / "ready"  # a folder of its own: the temporary one is for its owner's eyes only
        for path, content in files.items():
            file = ready / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        ready.replace(folder)
