"""ONNX Runtime on a CPU: how a network is opened here, everywhere the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from yolov8_nas.errors import InputError

_ERRORS_ONLY = 3


def open_session(file: Path, threads: int) -> Any:
    """Open an ONNX file as an `onnxruntime.InferenceSession` on the CPU.

    Everything is ONNX Runtime's default except two settings. The number of threads is the target's. And a session's
    threads stop spinning when a run ends: by default they go on for some 20 ms, which is right for a process that runs
    one network, and takes a core from the next network where several are timed in turn (with two threads on two cores
    medians rise two- to threefold). Within a run they spin as they do by default, so a network that runs alone is as
    fast as in a default session.

    Raises:
        InputError: ONNX Runtime cannot open the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of onnxruntime's errors have no common base of their own
        raise InputError(f"{file}: ONNX Runtime {ort.__version__} cannot open it: {error}") from None


def random_feed(session: Any, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The session's inputs filled with the same random numbers in 0..1 on every call.

    Raises:
        InputError: An input has a dimension that is not fixed, or is not of 32-bit floats.
    """
    rng = np.random.default_rng(seed)
    feed = {}
    for value in session.get_inputs():
        if value.type != "tensor(float)" or not all(isinstance(size, int) for size in value.shape):
            raise InputError(
                f"input {value.name!r} is {value.type} {value.shape}: "
                "only networks with fixed float32 inputs can be measured; export with a static shape"
            )
        feed[value.name] = rng.random(value.shape, dtype=np.float32)
    return feed
