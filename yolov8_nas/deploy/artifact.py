"""The file of a network that a runtime opens, written the same way wherever one is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.deploy.onnx import export_int8_ptq, export_onnx
from yolov8_nas.hardware.runtime import Runtime
from yolov8_nas.supernet.derive import save_checkpoint


def write_network(
    model: DetectionModel,
    file: Path,
    *,
    runtime: Runtime,
    imgsz: int,
    batch: int = 1,
    calibration: Sequence[Tensor] = (),
) -> Path:
    """Write a network in the form and precision that a runtime runs: ONNX, a checkpoint, or an engine.

    Args:
        model: A network in evaluation mode, without fake quantization; it is left as it is.
        file: File to write, with the runtime's suffix; missing parents are made.
        runtime: What will open it.
        imgsz: Side of the square input in pixels.
        batch: Images per run; a checkpoint leaves them open.
        calibration: Batches BCHW, RGB in 0..1, from which the ranges of INT8 come.

    Returns:
        `file`.

    Raises:
        InputError: An engine is asked for where there is no TensorRT.
        StageError: TensorRT cannot build the engine.
    """
    assert file.suffix == runtime.suffix, f"{file}: {runtime.name} opens {runtime.suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    if runtime.suffix == ".pt":
        save_checkpoint(model, file, names=list(model.names.values()), imgsz=imgsz)
        return file
    if runtime.suffix == ".onnx":
        return _write_onnx(model, file, runtime, imgsz, batch, calibration)
    from yolov8_nas.deploy.tensorrt import build_engine

    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        onnx = _write_onnx(model, Path(folder) / f"{file.stem}.onnx", runtime, imgsz, batch, calibration)
        # One build: how much builds of one network differ is part of what the latency model has to live with.
        build_engine(onnx, file, measure=lambda _: 0.0, timing_cache=file.parent / "timing.cache", builds=1)
    return file


def _write_onnx(
    model: DetectionModel, file: Path, runtime: Runtime, imgsz: int, batch: int, calibration: Sequence[Tensor]
) -> Path:
    if runtime.precision != "int8":
        return export_onnx(model, file, imgsz=imgsz, batch=batch, half=runtime.precision == "fp16")
    export_int8_ptq(model, file, imgsz=imgsz, batch=batch, calibration=calibration)
    if runtime.kind == "gpu":
        from yolov8_nas.deploy.gpu_int8 import int8_for_gpu

        int8_for_gpu(file, file)
    return file
