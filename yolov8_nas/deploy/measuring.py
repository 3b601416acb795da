"""Measurements of the exported files on the device, stock among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from yolov8_nas.config import TargetConfig
from yolov8_nas.deploy.files import Exported, Timed
from yolov8_nas.deploy.job import Job
from yolov8_nas.deploy.sources import STOCK
from yolov8_nas.export import artifact
from yolov8_nas.measure import benchmark, bundle, nms
from yolov8_nas.measure.benchmark import Measurement, Timing
from yolov8_nas.measure.protocol import PROBE, VERIFY
from yolov8_nas.runner.results import Suppression
from yolov8_nas.search.objective import figures, with_nms
from yolov8_nas.space import stock_architecture
from yolov8_nas.space.cost import cost
from yolov8_nas.supernet.derive import build

PROBED: Final = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "best": "fp32"}
"""Precision in which the device was probed, and so that of the stock network whose shares limits are."""


class Measuring:
    """Measures files in the same rounds, and holds limits that are shares of stock against stock among them.

    Args:
        job: The export.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stock: Path | None = None

    def run(self, files: Sequence[Exported]) -> tuple[list[Timed], Suppression]:
        """Measure each file, on this machine or elsewhere; returns how NMS was timed as well."""
        self.stock, extra = self._stock_beside(files)
        runs = [file.runs for file in files]
        reference = self.stock or next((f.runs for f in files if f.candidate is None), runs[0])
        pictures = sorted((self.job.data / "dataset" / "images" / "search").iterdir())
        images = nms.frames(pictures, imgsz=self.job.form.imgsz, batch=self.job.form.batch)
        how = nms.NMS_FREE if self.job.form.nms_free else nms.SETTINGS
        told = Suppression(**dict(how), images=len(images) * self.job.form.batch, split="search")
        limited = any(limit.scope == "with_nms" for limit in self.job.limits)

        def progress(done: float, total: float) -> None:
            share = len(files) * done / total
            self.job.progress.update(self.job.steps + share, self.job.total, "measuring on the target")

        if self.job.elsewhere:
            target = self.job.elsewhere
            return self._measured_elsewhere(files, extra, reference, images, target), told

        with self.job.host.measuring():
            measurements = benchmark.measure(
                [*runs, *extra],
                threads=self.job.threads,
                runtime=self.job.runtime,
                batch=self.job.form.batch,
                protocol=VERIFY,
                reference=reference,
                progress=progress,
                checkpoint=self.job.work / "measurements.jsonl",
            )
            self.job.step("measured", len(files))
            timings = nms.measure_with_nms(
                runs,
                images,
                threads=self.job.threads,
                runtime=self.job.runtime,
                protocol=VERIFY if limited else PROBE,
                reference=reference,
                progress=progress,
                checkpoint=self.job.work / "frames.jsonl",
            )
            self.job.step("measured with non-maximum suppression", len(files))
        self._hold_beside_stock([*runs, *extra], measurements, timings)
        timed = [
            Timed(
                **vars(file),
                measurement=measurement,
                frame=timing,
                found=nms.boxes(file.runs, images, threads=self.job.threads, runtime=self.job.runtime),
            )
            for file, measurement, timing in zip(files, measurements[: len(files)], timings, strict=True)
        ]
        return timed, told

    def _stock_beside(self, files: Sequence[Exported]) -> tuple[Path | None, list[Path]]:
        """Stock's file, where a limit is a share of it, and what has to be measured beside the exported files for it.

        It is in the precision in which the device was probed. Stock that was trained for comparison is that network;
        without it one with random weights takes as long.
        """

        if all(limit.share is None for limit in self.job.limits):
            return None, []
        precision = PROBED[self.job.precision]
        runtime = self.job.runtimes[precision]
        trained = next((f.runs for f in files if f.name == f"{STOCK}-{precision}"), None)
        if trained is None:
            trained = self.job.work / f"beside-{precision}{runtime.suffix}"
            if not trained.exists():
                artifact.write_network(
                    build(stock_architecture(self.job.scale), len(self.job.classes)).eval(),
                    trained,
                    runtime=runtime,
                    imgsz=self.job.form.imgsz,
                    batch=self.job.form.batch,
                    calibration=[
                        torch.rand(2, 3, self.job.form.imgsz, self.job.form.imgsz)
                    ],  # ranges have no influence on speed
                    keep_float=self.job.form.keep_float,
                    nms_free=self.job.form.nms_free,
                )
            return trained, [trained]
        return trained, []

    def _hold_beside_stock(
        self, runs: Sequence[Path], measurements: Sequence[Measurement], timings: Sequence[Timing | None]
    ) -> None:
        """Hold limits that are shares of stock against what stock took in the same rounds."""

        at = next((i for i, file in enumerate(runs) if file == self.stock), None)
        if at is None:
            return
        own = timings[at] if at < len(timings) else None
        latency_ms = asdict(measurements[at].latency_ms)
        both: Mapping[str, float] | None = asdict(own.latency_ms) if own else None
        if own is None and self.job.nms_ms:  # with random weights there is nothing to suppress: as the probe has it
            both = with_nms(latency_ms, self.job.nms_ms)
        paper = cost(stock_architecture(self.job.scale), len(self.job.classes), self.job.form.imgsz)
        stock = figures(measurements[at], paper, batch=self.job.form.batch, with_nms_ms=both)
        self.job.limits = [limit.beside(stock.value(limit)) for limit in self.job.limits]

    def _measured_elsewhere(
        self,
        files: Sequence[Exported],
        extra: Sequence[Path],
        reference: Path,
        images: Sequence[nms.Images],
        target: TargetConfig,
    ) -> list[Timed]:
        """The measurements of a device elsewhere; detections in images need no device.

        Raises:
            WaitingError: The files have to be measured there first.
        """

        runs = [*(file.runs for file in files), *extra]
        measurements = bundle.measured_there(
            runs,
            target=target,
            stage="trt-export",
            protocol=VERIFY,
            reference=reference,
            bundle=self.job.work / "bundle.tar",
        )
        self.job.step("measured elsewhere", 2 * len(files))
        self._hold_beside_stock(runs, measurements, [None] * len(runs))
        return [
            Timed(**vars(file), measurement=measurement, frame=None, found=nms.boxes(file.onnx, images, threads=1))
            for file, measurement in zip(files, measurements[: len(files)], strict=True)
        ]
