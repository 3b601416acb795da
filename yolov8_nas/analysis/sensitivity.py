"""Which parts of a network are worth leaving in floating point: what INT8 costs, and what each part gives back of it.

The network is quantized once, with ranges from real images, and scored under fake quantization: with everything
quantized, and with each part alone left in floating point. That is what a recipe does, in the company in which it does
it. The other way round, one part alone quantized in a network of floats, tells differences too small for an interval,
and leaves out that errors add up.

A part that is left in floating point may give back nothing as long as another one spoils its input. So larger sets are
scored as sets: the parts that give back most together, one more each time, until the drop is within the tolerance, and
then without each of them.

What a part in floating point costs in latency is measured on the target, on the files that would ship: on a CPU the
stem may be as fast in floats, and a late block twice as slow. So a second row of sets grows by the parts that give back
most for a millisecond, and of all that keep the tolerance the fastest is suggested. What no other variant beats in
both is the Pareto front.

Training for INT8 (qat-finetune) gives back more. What stays in floating point is decided before it all the same, since
the networks that hw-probe measures and that the search scores are quantized by the same recipe.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from ultralytics.nn.modules import C2f
from ultralytics.nn.tasks import DetectionModel

from yolov8_nas.checkpoint.network import load
from yolov8_nas.data import dataset
from yolov8_nas.data.check import CheckedDataset, CheckedImage, checked
from yolov8_nas.device.host import HostLock
from yolov8_nas.device.profile import computing_threads
from yolov8_nas.errors import InputError
from yolov8_nas.evaluation import Comparison, Evaluation, Evaluator, compare
from yolov8_nas.export.artifact import build_engine, write_onnx
from yolov8_nas.measure.benchmark import measure as measure_files
from yolov8_nas.measure.runtime import Runtime, find
from yolov8_nas.measure.target import Target, resolve
from yolov8_nas.space import PARTS
from yolov8_nas.supernet.batchnorm import calibration_batches
from yolov8_nas.supernet.derive import unroll
from yolov8_nas.train.quantization import float_parts, fold, leave_float, parts_by_row, quantize

CALIBRATION_IMAGES: Final = 256
"""Training images from which the ranges come, as in qat-finetune."""

BATCH: Final = 16

SEED: Final = 0
"""Of the choice of images: the same command gives the same table."""

Split = Literal["search", "val"]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Speed:
    """Latency of a variant's file on the target, as `measure.benchmark` measures it.

    Attributes:
        p50: Its median in ms.
        low: Lower end of the median's 95% interval.
        high: Upper end.
        disturbed: Whether something else computed meanwhile, and too few rounds were without it.
    """

    p50: float
    low: float
    high: float
    disturbed: bool = False


@dataclass(frozen=True)
class Variant:
    """The network in INT8 with some parts in floating point.

    Attributes:
        keep_float: These parts, in the order of the network.
        map50_95: Its score.
        drop: Against the network in floating point.
        regained: Against the network with everything quantized.
        latency: Its latency, where that was measured.
    """

    keep_float: tuple[str, ...]
    map50_95: float
    drop: Comparison
    regained: Comparison
    latency: Speed | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a network.

    Attributes:
        images: Images that it was scored on.
        split: Their split.
        imgsz: Side of the square input in pixels.
        tolerance: Drop in AP (hundredths of mAP50-95) that is accepted.
        map50_95: Score in floating point.
        quantized: With everything quantized.
        parts: With each part alone in floating point, from the one that gives back most on.
        sets: Larger sets, in the order in which they were tried.
        suggested: The smallest set that was found to keep the tolerance, or the fastest where latency was measured;
            nothing where none does.
        target: Hardware and runtime on which latency was measured; nothing where it was not.
        float_latency: Latency in floating point.
        front: Sets of parts that no other variant beats in latency and accuracy together, from the fastest on. Floating
            point is a variant, too, and none of these names it.
    """

    images: int
    split: Split
    imgsz: int
    tolerance: float
    map50_95: float
    quantized: Variant
    parts: tuple[Variant, ...]
    sets: tuple[Variant, ...]
    suggested: Variant | None
    target: str | None = None
    float_latency: Speed | None = None
    front: tuple[tuple[str, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure(
    checkpoint: Path,
    data: str,
    *,
    split: Split,
    imgsz: int | None,
    images: int,
    tolerance: float,
    progress: Path,
    hardware: str | None = None,
    runtime: str = "onnxruntime",
) -> Sensitivity:
    """Measure which parts of a network INT8 hurts.

    Args:
        checkpoint: An Ultralytics checkpoint of stock YOLOv8, or of a network of a search space, in floating point.
        data: The dataset that it was trained for: a folder, a data.yaml, an archive or the address of one.
        split: What it is scored on; `search` is cut from the training images as in a run.
        imgsz: Side of the square input in pixels; that of the training unless given.
        images: Images to score on at most.
        tolerance: Drop in AP that is accepted.
        progress: File that always holds, in one line, what is being done.
        hardware: Where latency is measured, a name of a run configuration; nowhere unless given.
        runtime: What runs the files there.

    Raises:
        InputError: The hardware or the runtime is not usable here, the checkpoint holds no such network, it was not
            trained for these classes, or the dataset cannot be used.
    """

    def note(text: str) -> None:
        progress.write_text(text)

    target = resolve(hardware, runtime, "int8") if hardware is not None else None
    network, side = _read(checkpoint, imgsz)
    torch.set_num_threads(computing_threads())
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    note("reading the dataset")
    with tempfile.TemporaryDirectory(prefix="yolov8-nas-sensitivity-") as folder:
        work, host = Path(folder), HostLock(note=note)
        with host.computing():
            try:
                with checked(data, scratch=work) as found:
                    _require_classes(checkpoint, network, data, found.names)
                    dataset.write(_drawn(found, split, images), work)
            except ConnectionError as error:  # nobody tries again here
                raise InputError(str(error)) from None
            view = dataset.data_yaml(work, work, validate_on=split)
            calibration = calibration_batches(view, side, CALIBRATION_IMAGES, BATCH, SEED)
            evaluator = Evaluator(view, imgsz=side, batch=BATCH, work=work / "work", device=device)
        clock = Clock(target, work / "files", side) if target else None
        return _measure(network.to(device), calibration, evaluator, split, tolerance, note, host, clock)


class Clock:
    """Times variants on the target, by the files that would ship.

    Args:
        target: The target.
        folder: Where the files lie.
        imgsz: Side of the square input in pixels.
    """

    def __init__(self, target: Target, folder: Path, imgsz: int) -> None:
        self.target, self.folder, self.imgsz = target, folder, imgsz
        self.files: dict[tuple[str, ...] | None, Path] = {}

    @property
    def name(self) -> str:
        """Hardware and runtime, for people."""
        return f"{self.target.id}, {self.target.runtime}"

    def add(self, network: DetectionModel, kept: tuple[str, ...] | None) -> None:
        """Write the file of a variant; nothing for `kept` is the network in floating point."""
        runtime = self._runtime(kept)
        file = self.folder / f"{len(self.files)}.onnx"
        write_onnx(network, file, runtime=runtime, imgsz=self.imgsz)
        self.files[kept] = file
        if runtime.suffix == ".engine":
            self.files[kept] = build_engine(file, file.with_suffix(runtime.suffix), runtime)

    def times(self) -> dict[tuple[str, ...] | None, Speed]:
        """Measure all of them in the same alternating rounds; the caller holds the host for measuring."""
        files = list(self.files.values())
        measured = measure_files(files, threads=self.target.threads, runtime=self._runtime(()), reference=files[0])
        return {
            kept: Speed(one.latency_ms.p50, *one.interval_ms, one.disturbed)
            for kept, one in zip(self.files, measured, strict=True)
        }

    def _runtime(self, kept: tuple[str, ...] | None) -> Runtime:
        floats = "fp32" if self.target.kind == "cpu" else "fp16"
        return find(self.target.runtime, self.target.kind, floats if kept is None else "int8")


class _Scores:
    """Scores a network with parts of it in floating point, each set of parts once.

    Args:
        network: The network in floating point.
        calibration: Images from which the ranges of INT8 come.
        evaluator: Scores networks.
        note: Is told what is being done.
        clock: Gets the files of all variants; nothing where latency is not asked for.

    Attributes:
        known: What was scored.
        exact: The network in floating point.
    """

    def __init__(
        self,
        network: DetectionModel,
        calibration: Sequence[Tensor],
        evaluator: Evaluator,
        note: Note,
        clock: Clock | None,
    ) -> None:
        self.evaluator, self.note, self.clock = evaluator, note, clock
        self.known: dict[tuple[str, ...], Variant] = {}
        note("scoring the network in floating point")
        if clock:
            clock.add(network, None)
        self.exact = evaluator.evaluate(fold(deepcopy(network)))
        note("quantizing the network")
        self._observed = quantize(deepcopy(network), calibration)
        self._quantized: Evaluation | None = None  # with nothing in floating point: the first that is scored
        self(())

    def __call__(self, names: Sequence[str]) -> Variant:
        """Score the network with these parts in floating point."""
        kept = tuple(part for part in PARTS if part in names)
        if kept not in self.known:
            self.note(f"scoring the network in INT8 with {', '.join(kept) or 'nothing more'} in floating point")
            variant = deepcopy(self._observed)
            leave_float(variant, kept)
            assert tuple(float_parts(variant)) == kept
            if self.clock:
                self.clock.add(variant, kept)
            evaluation = self.evaluator.evaluate(fold(variant))
            self._quantized = self._quantized or evaluation
            drop, regained = compare(evaluation, self.exact), compare(evaluation, self._quantized)
            self.known[kept] = Variant(kept, evaluation.map50_95, drop, regained)
        return self.known[kept]


def _measure(
    network: DetectionModel,
    calibration: Sequence[Tensor],
    evaluator: Evaluator,
    split: Split,
    tolerance: float,
    note: Note,
    host: HostLock,
    clock: Clock | None,
) -> Sensitivity:
    def timed() -> dict[tuple[str, ...] | None, Speed]:
        if clock is None:
            return {}
        note(f"measuring {len(clock.files)} files on {clock.name}")
        with host.measuring():
            return clock.times()

    with host.computing():
        score = _Scores(network, calibration, evaluator, note, clock)
        quantized = score(())
        rows = {*parts_by_row(network), "detect_boxes", "detect_classes"}
        alone = [score((part,)) for part in PARTS if part in rows]
        alone.sort(key=lambda variant: -variant.map50_95)
    first = timed()
    with host.computing():
        suggested = smallest_set(quantized, alone, score, tolerance)
        if first:
            cheapest = sorted(alone, key=lambda variant: -worth(variant, first[variant.keep_float], first[()]))
            smallest_set(quantized, cheapest, score, tolerance)
    times = timed() if len(score.known) > len(alone) + 1 else first  # all in the same rounds

    def with_latency(variant: Variant) -> Variant:
        return replace(variant, latency=times.get(variant.keep_float))

    variants = [with_latency(variant) for variant in score.known.values()]
    if times:
        suggested = fastest(variants, tolerance)
    return Sensitivity(
        images=len(score.exact.images),
        split=split,
        imgsz=evaluator.imgsz,
        tolerance=tolerance,
        map50_95=score.exact.map50_95,
        quantized=with_latency(quantized),
        parts=tuple(map(with_latency, alone)),
        sets=tuple(variant for variant in variants if len(variant.keep_float) > 1),
        suggested=suggested,
        target=clock.name if clock else None,
        float_latency=times.get(None),
        front=pareto_front(variants, score.exact.map50_95, times.get(None)),
    )


def worth(variant: Variant, latency: Speed, quantized: Speed) -> float:
    """What a part gives back for a millisecond in floating point; more than anything for one that costs nothing.

    Args:
        variant: With the part in floating point.
        latency: Its latency.
        quantized: Latency with everything quantized.
    """
    gained, cost = variant.regained.difference, latency.p50 - quantized.p50
    if gained <= 0:
        return -math.inf
    return gained / cost if cost > 0 else math.inf


def fastest(variants: Sequence[Variant], tolerance: float) -> Variant | None:
    """Of the variants that keep the tolerance the fastest, and of those that cannot be told apart the most accurate.

    No other variant beats it in both: among equally accurate ones it is the faster, so it stands on their Pareto front.

    Args:
        variants: With their latency.
        tolerance: Drop in AP that is accepted.
    """
    kept = [v for v in variants if v.latency and -100 * v.drop.difference <= tolerance]
    if not kept:
        return None
    limit = min((v.latency for v in kept if v.latency), key=lambda speed: speed.p50).high
    alike = [(v.map50_95, -v.latency.p50, -len(v.keep_float), v) for v in kept if v.latency and v.latency.p50 <= limit]
    return max(alike, key=lambda row: row[:3])[-1]


def pareto_front(
    variants: Sequence[Variant], float_map50_95: float, float_latency: Speed | None
) -> tuple[tuple[str, ...], ...]:
    """The variants that none beats in latency and accuracy together, from the fastest on.

    Args:
        variants: With their latency.
        float_map50_95: Score in floating point.
        float_latency: Latency in floating point, which may beat a variant as well.
    """
    points = [(v.latency.p50, -v.map50_95, v.keep_float) for v in variants if v.latency]
    rivals = [(latency, loss) for latency, loss, _ in points]
    if float_latency:
        rivals.append((float_latency.p50, -float_map50_95))
    return tuple(
        kept
        for latency, loss, kept in sorted(points)
        if not any(r <= latency and other <= loss and (r, other) != (latency, loss) for r, other in rivals)
    )


def smallest_set(
    quantized: Variant, alone: Sequence[Variant], score: Callable[[Sequence[str]], Variant], tolerance: float
) -> Variant | None:
    """The smallest set of parts that keeps the tolerance, as far as it is found without trying all sets.

    Of sets of one part it is the best; larger ones grow by the parts in the order of what they give back alone, and are
    then tried without each of their parts.

    Args:
        quantized: The network with everything quantized.
        alone: With each part alone in floating point, from the one that gives back most on.
        score: Scores the network with a set of parts in floating point.
        tolerance: Drop in AP that is accepted.

    Returns:
        Nothing where all parts that give back something do not suffice.
    """

    def kept(variant: Variant) -> bool:
        return -100 * variant.drop.difference <= tolerance

    if kept(quantized):
        return quantized
    names: list[str] = []
    for part in alone:
        if part.regained.difference <= 0:
            break
        names += part.keep_float
        found = score(names)
        if kept(found):
            for name in names[-2::-1]:  # that of least use first; without the last one it was not enough
                fewer = [other for other in found.keep_float if other != name]
                if kept(smaller := score(fewer)):
                    found = smaller
            return found
    return None


def _read(checkpoint: Path, imgsz: int | None) -> tuple[DetectionModel, int]:
    """The network of a checkpoint, unrolled as those that are searched, and the side of its input in pixels."""
    found = load(checkpoint, quantized=False)
    network = found.network
    remedy = "give a checkpoint of stock YOLOv8 for detection, trained on the dataset and not quantized"
    if found.quantized:
        raise InputError(f"{checkpoint}: a quantized network; {remedy}")
    try:
        parts_by_row(network)
        if any(type(row) is C2f for row in network.model):
            network = unroll(network)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f"{checkpoint}: not YOLOv8 ({str(error).splitlines()[0]}); {remedy}") from None
    side = (found.imgsz or 640) if imgsz is None else imgsz
    if not isinstance(side, int) or side < 32 or side % 32:
        raise InputError(f"{checkpoint}: imgsz = {side!r}; give the side of a square in pixels, a multiple of 32")
    return network.float().eval(), side


def _require_classes(checkpoint: Path, network: DetectionModel, data: str, names: Sequence[str]) -> None:
    known = list(network.names.values())
    if known != list(names):
        raise InputError(
            f"{checkpoint}: knows {len(known)} classes ({_shown(known)}), and {data} has {len(names)} "
            f"({_shown(names)}); train stock YOLOv8 on this dataset first (yolo train model=yolov8n.pt data=...)"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _drawn(found: CheckedDataset, split: Split, images: int) -> CheckedDataset:
    """The images that are needed: those for the ranges, and those to score on."""
    rng = np.random.default_rng(SEED)

    def draw(name: str, count: int) -> list[CheckedImage]:
        everything = found.splits[name]
        return [everything[i] for i in sorted(rng.permutation(len(everything))[:count])]

    chosen: dict[str, list[CheckedImage]] = {"train": draw("train", CALIBRATION_IMAGES), "search": [], "val": []}
    chosen[split] = draw(split, images)
    if not any(image.boxes for image in chosen[split]):
        raise InputError(f"{found.source}: no boxes in the {split} split, so nothing can be scored there")
    return replace(found, splits=chosen)
