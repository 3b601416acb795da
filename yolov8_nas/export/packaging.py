"""Checkpoints and what is made of them: a network of the supernet as a `.pt`, a `.pt` as ONNX or engine, its score.

What the Python API and the command line have in common; either calls these in a process of their own.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from yolov8_nas.errors import InputError
from yolov8_nas.files import replace
from yolov8_nas.space import Architecture

if TYPE_CHECKING:
    from ultralytics.nn.tasks import DetectionModel

    from yolov8_nas.export.tensorrt import Profile

SUFFIXES: Final = {"onnx": ".onnx", "engine": ".engine", "rtx": ".engine"}
"""Formats, and the suffixes of their files."""

BATCH: Final = 16
"""Images at once when a checkpoint is scored."""

CALIBRATION_IMAGES: Final = 256
"""Training images from which the BatchNorm statistics of a network of the supernet come."""

WARM_UP: Final = 50
REPETITIONS: Final = 200
"""How often an engine runs, before and while it is timed to choose among builds."""


class EngineUnavailable(InputError):
    """A TensorRT engine is asked for on a machine that cannot build one; the message says what is missing."""


@dataclass(frozen=True)
class Score:
    """How well a detector does on one split, by the protocol of `evaluation`.

    Attributes:
        split: `search` or `val`.
        images: Images in it.
        map50_95: Mean average precision over IoU 0.50 to 0.95, from 0 to 1.
        map50: Mean average precision at IoU 0.50.
        per_class: `map50_95` by class name.
    """

    split: str
    images: int
    map50_95: float
    map50: float
    per_class: dict[str, float]


def export(
    checkpoint: Path,
    path: Path,
    *,
    format: str = "onnx",
    imgsz: int | None = None,
    batch: int = 1,
    dynamic: bool = False,
    half: bool = False,
    nms: bool = False,
    gpu: str | None = None,
) -> Path:
    """Write the detector of a checkpoint as an ONNX file, as a TensorRT engine, or as one of TensorRT for RTX.

    The ONNX file is compared with the network before it gets its name, unless it is quantized. A quantized network's
    engine is built from INT8 as TensorRT reads it; `half` then is about its other layers.

    Args:
        checkpoint: An Ultralytics checkpoint of a detector.
        path: The file to write. An engine has its ONNX file beside it.
        format: A key of `SUFFIXES`.
        imgsz: Side of the square input in pixels; that of the training unless given.
        batch: Images per inference; the most of them, if `dynamic`.
        dynamic: Whether the file takes other numbers of images, heights and widths.
        half: Whether it computes in FP16.
        nms: Whether it suppresses overlapping boxes itself: ONNX's operator in an ONNX file, TensorRT's plugin in an
            engine. A network with an NMS-free head has none.
        gpu: What an engine of TensorRT for RTX is for, which needs no GPU to be built: a name of the catalogue or a
            compute capability; the portable ones unless given.

    Raises:
        InputError: The checkpoint is no detector, or what is asked does not go together.
        EngineUnavailable: There is no TensorRT here.
        StageError: The file does not compute what the network computes.
    """
    from ultralytics.utils.torch_utils import is_qat

    _require_builder(format, path, nms=nms, gpu=gpu)
    network = _read(checkpoint)
    if nms and network.end2end:
        raise InputError(
            f"{path.name}: the network's head is NMS-free, so what it gives are detections and no boxes to suppress; "
            "export it without nms"
        )
    size = side_of(network.args.get("imgsz"), checkpoint, imgsz)
    quantized = is_qat(network)
    for_gpu = quantized and format != "onnx"
    shape: dict[str, Any] = {"imgsz": size, "batch": batch, "dynamic": dynamic, "half": half and not for_gpu}
    onnx = path if format == "onnx" else path.with_suffix(SUFFIXES["onnx"])
    onnx.parent.mkdir(parents=True, exist_ok=True)
    _write_onnx(
        network, onnx, shape, int8=(half if for_gpu else None), verify=not quantized, nms=nms and format == "onnx"
    )
    if format == "onnx":
        return onnx
    if format == "rtx":
        return _build_ahead(onnx, path, size, batch, dynamic, gpu)
    return _build_engine(onnx, path, size, batch, dynamic, nms)


def score(checkpoint: Path, dataset: Path, *, imgsz: int, split: Literal["search", "val"]) -> Score:
    """Score one of our own checkpoints on a split of the folder that data-prep wrote."""
    import torch

    from yolov8_nas.data.dataset import data_yaml
    from yolov8_nas.device.profile import computing_threads
    from yolov8_nas.evaluation import evaluate
    from yolov8_nas.train.quantization import fold

    torch.set_num_threads(computing_threads())
    with tempfile.TemporaryDirectory() as work:
        data = data_yaml(dataset, Path(work), validate_on=split)
        found = evaluate(fold(_read(checkpoint)), data, imgsz=imgsz, batch=BATCH, work=Path(work))
    return Score(split, len(found.images), found.map50_95, found.map50, found.per_class)


def write_subnet(
    supernet: Path, dataset: Path, architecture: dict[str, Any], path: Path, *, imgsz: int, batch: int, seed: int
) -> Path:
    """Write a network of a supernet as a plain Ultralytics checkpoint, as fine-tuning starts from it.

    Args:
        supernet: The folder that supernet-train wrote.
        dataset: The folder that data-prep wrote.
        architecture: The network, as `Architecture.to_dict` gives it.
        path: The checkpoint to write.
        imgsz: Side of the square input in pixels.
        batch: Images at once while BatchNorm is recalibrated.
        seed: Seed of the draw of images for that.
    """
    import torch

    from yolov8_nas.data.dataset import data_yaml
    from yolov8_nas.device.profile import computing_threads
    from yolov8_nas.supernet.batchnorm import calibration_batches, recalibrate
    from yolov8_nas.supernet.derive import derive, save_checkpoint
    from yolov8_nas.supernet.supernet import Supernet

    torch.set_num_threads(computing_threads())
    weights = Supernet.load(supernet)
    network = derive(weights, Architecture.from_dict(architecture))
    with tempfile.TemporaryDirectory() as work:
        data = data_yaml(dataset, Path(work), validate_on="search")
        recalibrate(network, calibration_batches(data, imgsz, CALIBRATION_IMAGES, batch, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(network, path, names=weights.names, imgsz=imgsz)
    return path


def _require_builder(format: str, path: Path, *, nms: bool, gpu: str | None) -> None:
    """Check that files of a format can be written here.

    Raises:
        InputError: What is asked does not go together.
        EngineUnavailable: There is no TensorRT here.
    """
    if format not in SUFFIXES:
        raise InputError(f"format {format!r} is unknown; use one of {', '.join(SUFFIXES)}")
    if gpu is not None and format != "rtx":
        raise InputError(f'gpu {gpu!r}: only format "rtx" builds for a GPU that is elsewhere; leave gpu out')
    if format == "engine":
        _require_tensorrt()
    elif format == "rtx":
        _require_rtx(path, nms)


def _write_onnx(
    network: DetectionModel, onnx: Path, shape: dict[str, Any], *, int8: bool | None, verify: bool, nms: bool
) -> None:
    """Write a network's ONNX file, all of it or nothing.

    Args:
        network: The network.
        onnx: The file.
        shape: Its input, and whether it computes in FP16.
        int8: Whether layers that are not in INT8 compute in FP16, where the file is for TensorRT; else nothing.
        verify: Whether it is compared with the network.
        nms: Whether it suppresses overlapping boxes itself.
    """
    from yolov8_nas.export.gpu_int8 import int8_for_gpu
    from yolov8_nas.export.nms_in_graph import NmsOptions
    from yolov8_nas.export.onnx import export_onnx, put_nms
    from yolov8_nas.export.verification import verify_onnx

    with tempfile.TemporaryDirectory(dir=onnx.parent, prefix=f".{onnx.name}.") as folder:
        written = export_onnx(network, Path(folder) / onnx.name, **shape)
        if int8 is not None:
            int8_for_gpu(written, written, half=int8)
        elif verify:
            verify_onnx(network, written, **shape)
        if nms:  # now, since what can be compared is boxes and scores
            put_nms(written, NmsOptions())
        replace(written, onnx)


def _read(checkpoint: Path) -> DetectionModel:
    """The network of an Ultralytics checkpoint in full precision and evaluation mode, quantized where it was.

    Raises:
        InputError: There is no such file, or it holds no detector with YOLOv8's head.
    """
    from ultralytics.nn.modules import Detect

    from yolov8_nas.checkpoint.network import load

    found = load(checkpoint)
    network = found.network
    head = network.model[-1]
    if type(head) is not Detect:
        raise InputError(
            f"{checkpoint}: a {type(network).__name__} with the head {type(head).__name__}, and only detectors with "
            f"YOLOv8's head are exported here; use Ultralytics: yolo export model={checkpoint}"
        )
    network.args = {"imgsz": found.imgsz} if found.imgsz else {}
    return network


def side_of(trained: Any, checkpoint: Path, imgsz: int | None) -> int:
    """The side of the square input that a checkpoint is exported or looked at with.

    Args:
        trained: The size that it was trained at, as the checkpoint says; nothing where it doesn't.
        checkpoint: The checkpoint.
        imgsz: What was asked for instead.

    Raises:
        InputError: It is no side of a square that the network takes.
    """
    if imgsz is not None:
        if imgsz < 32 or imgsz % 32:
            raise InputError(f"{checkpoint}: imgsz = {imgsz}; give the side of a square in pixels, a multiple of 32")
        return imgsz
    sides = list(trained) if isinstance(trained, list | tuple) else [640 if trained is None else trained]
    numbers = [side for side in sides if isinstance(side, int | float) and math.isfinite(side) and side >= 1]
    if len(set(sides)) == 1 and numbers == sides and sides[0] % 32 == 0:
        return int(sides[0])
    near = 32 * math.ceil(max(numbers) / 32) if numbers else 640
    raise InputError(
        f"{checkpoint}: was trained at {trained!r}, and the input has to be a square with a multiple of 32 pixels as "
        f"its side; choose one, for example --imgsz {near}"
    )


def _require_tensorrt() -> None:
    from yolov8_nas.measure.tensorrt import missing

    if lacking := missing():
        raise EngineUnavailable(
            f'format "engine": {" and ".join(lacking)}. Engines are built on the device that they run on, with '
            'TensorRT 10 or 11; here use format "onnx", from which an engine can be built there'
        )


def _require_rtx(path: Path, nms: bool) -> None:
    from yolov8_nas.measure.tensorrt_rtx import missing_to_build

    if lacking := missing_to_build():
        raise EngineUnavailable(f'format "rtx": {" and ".join(lacking)}; or use format "onnx"')
    if nms:
        raise InputError(
            f"{path.name}: TensorRT for RTX has no kernel that suppresses boxes; export it without nms, and suppress "
            "them on the host or train an NMS-free head (finetune.nms_free)"
        )


def _profile(imgsz: int, batch: int, dynamic: bool) -> Profile | None:
    from yolov8_nas.export.tensorrt import Profile

    largest = (batch, imgsz, imgsz)
    return Profile(min=(1, 32, 32), opt=largest, max=largest) if dynamic else None


def _build_ahead(onnx: Path, engine: Path, imgsz: int, batch: int, dynamic: bool, gpu: str | None) -> Path:
    """Build an engine of an ONNX file for GPUs that need not be here."""
    from yolov8_nas.export.tensorrt import EngineOptions
    from yolov8_nas.export.tensorrt_rtx import build_ahead
    from yolov8_nas.measure.tensorrt_rtx import capabilities

    options = EngineOptions(profile=_profile(imgsz, batch, dynamic))
    build_ahead(onnx, engine, options=options, capabilities=capabilities(gpu))
    return engine


def _build_engine(onnx: Path, engine: Path, imgsz: int, batch: int, dynamic: bool, nms: bool) -> Path:
    """Build an engine of an ONNX file, the fastest of a few builds."""
    from yolov8_nas.device.host import HostLock
    from yolov8_nas.export.nms_in_graph import NmsOptions
    from yolov8_nas.export.tensorrt import EngineOptions, build_engine
    from yolov8_nas.measure.tensorrt import TensorRTRunner

    def median_ms(built: Path) -> float:
        runner = TensorRTRunner(built)
        runner.gpu_times(WARM_UP)
        return statistics.median(runner.gpu_times(REPETITIONS))

    with HostLock().measuring():  # TensorRT chooses by timings of its own, too
        options = EngineOptions(profile=_profile(imgsz, batch, dynamic), nms=NmsOptions() if nms else None)
        build_engine(onnx, engine, measure=median_ms, options=options)
    return engine
