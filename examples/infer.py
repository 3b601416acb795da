"""Run an exported detector on pictures, a batch at a time: `python examples/infer.py model.onnx PICTURE...`.

Needs onnxruntime (onnxruntime-gpu for a GPU), torch and ultralytics, not this package. Where there is a GPU, batches
are put together in pinned memory, copied from there without the CPU, and read by ONNX Runtime where they then lie.
"""

import ast
import sys
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import onnxruntime
import torch
from ultralytics.data.augment import LetterBox
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes


def detect(
    model: str, pictures: Sequence[str], batch: int = 8, confidence: float = 0.25
) -> Iterator[tuple[str, str, float, list[float]]]:
    """Picture, class, score and corners (left, top, right, bottom in pixels) of each detection."""
    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and torch.cuda.is_available()
    device, providers = ("cuda", ["CUDAExecutionProvider"]) if gpu else ("cpu", ["CPUExecutionProvider"])
    session = onnxruntime.InferenceSession(model, providers=providers)
    metadata = session.get_modelmeta().custom_metadata_map
    names, sides = ast.literal_eval(metadata["names"]), tuple(ast.literal_eval(metadata["imgsz"]))
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    batch = taken.shape[0] if isinstance(taken.shape[0], int) else batch
    host = torch.zeros(batch, 3, *sides, pin_memory=gpu)
    square, binding = LetterBox(sides, auto=False), session.io_binding()
    for start in range(0, len(pictures), batch):
        frames = [cv2.imread(picture) for picture in pictures[start : start + batch]]
        for slot, frame in zip(host, frames, strict=False):  # in the last batch, some slots keep what they held
            slot.copy_(torch.from_numpy(square(image=frame)[..., ::-1].copy()).permute(2, 0, 1)).div_(255)
        images = host.to(device, non_blocking=True)
        if gpu:
            torch.cuda.synchronize()  # ONNX Runtime has a stream of its own
        binding.bind_input(taken.name, device, 0, np.float32, tuple(images.shape), images.data_ptr())
        binding.bind_output(given.name)  # in the host's memory
        session.run_with_iobinding(binding)
        output = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
        found = non_max_suppression(output, conf_thres=confidence, iou_thres=0.7, max_det=300)
        for picture, frame, rows in zip(pictures[start:], frames, found, strict=False):
            for *corners, score, index in scale_boxes(sides, rows, frame.shape).tolist():
                yield picture, names[int(index)], score, corners


if __name__ == "__main__":
    for picture, name, score, (left, top, right, bottom) in detect(sys.argv[1], sys.argv[2:]):
        print(f"{picture}: {name} {score:.2f} at {left:.0f}, {top:.0f}, {right:.0f}, {bottom:.0f}")
