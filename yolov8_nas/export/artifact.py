"""The file of a network that a runtime opens, written the same way wherever one is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.export import tensorrt, tensorrt_rtx
from yolov8_nas.export.gpu_int8 import int8_for_gpu
from yolov8_nas.export.onnx import export_onnx
from yolov8_nas.measure.runtime import Runtime, TensorRTForRTX
from yolov8_nas.measure.tensorrt_rtx import capability_here
from yolov8_nas.supernet.derive import add_one_to_one, save_checkpoint
from yolov8_nas.train.quantization import quantize


def write_network(
    model: DetectionModel,
    file: Path,
    *,
    runtime: Runtime,
    imgsz: int,
    batch: int = 1,
    calibration: Sequence[Tensor] = (),
    keep_float: Sequence[str] = (),
    nms_free: bool = False,
) -> Path:
    """Write a network in the form and precision that a runtime runs: ONNX, a checkpoint, or an engine.

    Args:
        model: A network in evaluation mode, without fake quantization; it is left as it is.
        file: File to write, with the runtime's suffix; missing parents are made.
        runtime: What will open it.
        imgsz: Side of the square input in pixels.
        batch: Images per run; a checkpoint leaves them open.
        calibration: Batches BCHW, RGB in 0..1, from which the ranges of INT8 come.
        keep_float: Parts that stay in floating point in INT8, see `quantize`.
        nms_free: Whether it gets an NMS-free head, see `add_one_to_one`, where what ships will have one: it finds
            nothing yet that YOLOv8's would not, and takes as long.

    Returns:
        `file`.

    Raises:
        InputError: An engine is asked for where there is no TensorRT.
        StageError: TensorRT cannot build the engine.
    """
    assert file.suffix == runtime.suffix, f"{file}: {runtime.name} opens {runtime.suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    if nms_free:
        model = add_one_to_one(deepcopy(model))
    if runtime.suffix == ".pt":
        save_checkpoint(model, file, names=list(model.names.values()), imgsz=imgsz)
        return file
    if runtime.precision == "int8":
        model = quantize(deepcopy(model), calibration, keep_float)
    if runtime.suffix == ".onnx":
        return write_onnx(model, file, runtime=runtime, imgsz=imgsz, batch=batch)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        onnx = write_onnx(model, Path(folder) / f"{file.stem}.onnx", runtime=runtime, imgsz=imgsz, batch=batch)
        return build_engine(onnx, file, runtime)


def write_onnx(model: DetectionModel, file: Path, *, runtime: Runtime, imgsz: int, batch: int = 1) -> Path:
    """Write a network as the ONNX file that is run, or that an engine is built of.

    Args:
        model: A network in evaluation mode, with fake quantization where the runtime's precision is INT8.
        file: File to write.
        runtime: What will run it.
        imgsz: Side of the square input in pixels.
        batch: Images per run.
    """
    export_onnx(model, file, imgsz=imgsz, batch=batch, half=runtime.precision == "fp16")
    if runtime.kind == "gpu" and runtime.precision == "int8":
        int8_for_gpu(file, file)
    return file


def build_engine(onnx: Path, engine: Path, runtime: Runtime) -> Path:
    """Build the engine of an ONNX file for the GPU that is here; networks measured together share a timing cache.

    One build: how much builds of one network differ is part of what the latency model has to live with.

    Args:
        onnx: The file.
        engine: The engine to write.
        runtime: What will run it.

    Raises:
        InputError: The runtime's compiler is not here, or no GPU that it is for.
        StageError: It cannot build it.
    """
    if isinstance(runtime, TensorRTForRTX):
        tensorrt_rtx.build_ahead(onnx, engine, capabilities=[capability_here()])
        return engine
    tensorrt.build_engine(onnx, engine, measure=lambda _: 0.0, timing_cache=engine.parent / "timing.cache", builds=1)
    return engine
