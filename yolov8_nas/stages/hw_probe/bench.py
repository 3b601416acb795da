"""Networks with fresh weights, exported and measured on the device.

Latency depends on a network's shapes and not on its weights, so neither a dataset nor a supernet is needed. (Fresh
weights do shrink activations from layer to layer, to some 1e-17 in the deepest networks; that is far from the denormal
numbers below 1e-38 which would be slow.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from ultralytics.nn import tasks

from yolov8_nas.errors import InputError, StageError
from yolov8_nas.export import artifact
from yolov8_nas.measure import benchmark
from yolov8_nas.measure.benchmark import Failed, Measurement
from yolov8_nas.measure.runtime import Runtime, find
from yolov8_nas.measure.sampling import Sample
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.results import ProbedNetwork
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.space import Architecture
from yolov8_nas.stages.hw_probe.settings import ProbeSettings, Recipe, TableSettings
from yolov8_nas.supernet import derive

_TIMING: Final = 2.0
"""What timing a network counts in progress; exporting one counts 1."""


class Bench:
    """Exports networks with fresh weights and measures them on the device.

    Args:
        recipe: What is measured, and how.
        num_classes: Classes of the networks.
        runtime: What runs them.
        threads: Threads of each on a CPU.
        folder: Where files and measurements are kept.
        progress: How far it has come.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, runtime: Runtime, threads: int, folder: Path, progress: Progress
    ) -> None:
        self.recipe = recipe
        self.space = recipe.space
        self.num_classes = num_classes
        self.runtime = runtime
        self.threads = threads
        self.folder = folder
        self.progress = progress

    @classmethod
    def of(cls, ctx: StageContext[TableSettings] | StageContext[ProbeSettings]) -> Bench:
        """The bench of a running stage."""
        asked = ctx.settings
        runtime = find(asked.device.runtime.name, asked.kind, asked.precision)
        return cls(asked, asked.num_classes, runtime, asked.device.threads, ctx.partial, ctx.progress)

    def export(self, architecture: Architecture) -> Path:
        """The network's file, written where it is missing."""
        file = self.file(architecture.digest)
        if not file.exists():
            self.write(derive.build(architecture, self.num_classes), file)
        return file

    def export_as_c2f(self) -> Path:
        """Stock in the form that Ultralytics exports it."""
        file = self.file("stock-as-c2f")
        if not file.exists():
            self.write(tasks.DetectionModel(f"yolov8{self.space.scale}.yaml", nc=self.num_classes, verbose=False), file)
        return file

    def file(self, name: str) -> Path:
        """Where the file of a network lies."""
        return self.folder / "networks" / f"{name}{self.runtime.suffix}"

    def write(self, model: tasks.DetectionModel, file: Path) -> None:
        """Write a network in the form and precision that is measured."""

        images = [torch.rand(2, 3, self.recipe.imgsz, self.recipe.imgsz)]  # ranges have no influence on speed
        artifact.write_network(
            model.eval(),
            file,
            runtime=self.runtime,
            imgsz=self.recipe.imgsz,
            batch=self.recipe.batch,
            calibration=images,
            keep_float=self.recipe.keep_float,
            nms_free=self.recipe.nms_free,
        )

    def measure(self, files: Sequence[Path], checkpoint: str) -> list[Measurement | Failed]:
        """Measure files in the same rounds, with stock as the reference network."""
        count = len(files)

        def progress(done: float, total: float) -> None:
            self.progress.update(
                count * (1 + _TIMING * done / total), count * (1 + _TIMING), f"timing {count} networks"
            )

        return benchmark.measure_what_can_be(
            files,
            threads=self.threads,
            runtime=self.runtime,
            batch=self.recipe.batch,
            protocol=self.recipe.protocol,
            reference=self.export(self.space.stock),
            progress=progress,
            checkpoint=self.folder / checkpoint,
        )

    def row(self, sample: Sample, measurement: Measurement) -> ProbedNetwork:
        """A network as it stands in the table."""
        return ProbedNetwork(
            **measurement.to_dict(),
            architecture=sample.architecture,
            genes=self.space.encode(sample.architecture),
            role=sample.role,
        )

    def export_all(self, samples: Sequence[Sample]) -> tuple[dict[Architecture, Path], dict[Architecture, str]]:
        """Export networks.

        Returns:
            The files, in the order of the networks; and those that cannot be built, with the reason.

        Raises:
            StageError: Stock cannot be built.
        """
        torch.set_num_threads(1)  # tracing computes next to nothing, and threads would only wait for each other
        torch.manual_seed(self.recipe.seed)
        total = (1 + _TIMING) * (len(samples) + 1)
        files, failed = {}, {}
        for i, one in enumerate(samples, 1):
            try:
                files[one.architecture] = self.export(one.architecture)
            except (InputError, StageError, MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
                if one.role == "stock":
                    raise StageError(f"stock YOLOv8 cannot be built: {error}") from None
                failed[one.architecture] = str(error)
            self.progress.update(i, total, f"exporting network {i} of {len(samples)}")
        return files, failed
