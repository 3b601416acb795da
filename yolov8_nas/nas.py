"""The Python API: `NAS` trains a supernet and searches it, a `Subnet` is what it finds.

    from yolov8_nas import NAS

    nas = NAS("yolov8-nas-supernet.yaml", device="cuda:0")
    nas.train(data="coco.yaml", epochs=300, imgsz=640, batch=64)
    best = nas.search(metric="mAP", constraint_type="latency", constraint_value=2.0, hardware="NVIDIA_A100")
    best.finetune(epochs=100)
    best.export(format="engine", dynamic=True, half=True)

The work is done by the stages of the pipeline, with the keys and the store of the command line: a script that is run
again finds what it did before, and goes on where it was interrupted. Everything that computes does so in a process of
its own; in the caller's nothing changes, neither threads nor signals, logging or settings of Ultralytics.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.console import Console

from yolov8_nas.config import Precision, RunConfig, TargetConfig
from yolov8_nas.errors import InputError
from yolov8_nas.export.packaging import SUFFIXES, Score
from yolov8_nas.files import copy_file
from yolov8_nas.run.local import run_stages, with_absolute_paths
from yolov8_nas.runner import process
from yolov8_nas.runner.results import CandidateResult, DatasetResult, FrontNetwork, ScoredNetwork, SupernetEpoch
from yolov8_nas.runner.stage import find_target, target_labels
from yolov8_nas.space import BLOCKS, CONVS, Architecture, SearchSpace
from yolov8_nas.space.cost import Cost, cost
from yolov8_nas.space.limits import UNITS, Constraint
from yolov8_nas.terminal import Terminal

if TYPE_CHECKING:
    from ultralytics import YOLO

METRICS: Final = ("map", "map50-95", "map50_95")
"""What a search can be asked to maximise, as people write it: it is one and the same."""

_NO_TARGET: Final = {"hardware": "auto", "constraints": ["latency<=100%stock"]}
"""Stands in a configuration as long as no search has named a target; what is trained does not depend on it."""


class NAS:
    """A search space with a supernet that is trained once and searched for any number of targets.

    Args:
        space: A built-in space (`tiny`, `yolov8n`, `yolov8s`, `yolov8m`, `yolov8l`; `yolov8-nas-supernet.yaml` is that
            of YOLOv8n and `yolov8s-nas-supernet.yaml` that of YOLOv8s) or the path of a YAML file, which goes first.
        device: What trains: `cpu`, or `cuda:0` for the first GPU; the GPU unless given, where there is one.
        workdir: Folder for the stage store, logs and exported files.
        seed: Seed of everything that is random.

    Raises:
        SpaceError: There is no such space, or its file does not describe one.
        InputError: The device is not here.
    """

    def __init__(
        self,
        space: str | Path = "yolov8-nas-supernet.yaml",
        device: str | None = None,
        workdir: str | Path = "runs/nas",
        seed: int = 0,
    ) -> None:
        self.space = SearchSpace.load(space)
        settings = {"name": "nas", "space": str(space), "seed": seed, "targets": [_NO_TARGET]}
        config = RunConfig.parse(with_absolute_paths(settings), "NAS")
        self._session = Session(config, Path(workdir).absolute(), _visible(device))
        self._trained: Path | None = None
        self._dataset: DatasetResult | None = None
        self._found: Path | None = None
        self.candidates: list[Subnet] = []

    def train(
        self,
        data: str | Path | None = None,
        epochs: int = 300,
        imgsz: int = 640,
        batch: int | Literal["auto"] = "auto",
        weights: str | Path | None = None,
        **settings: Any,
    ) -> NAS:
        """Check the dataset, cut its splits and train the supernet; what is done already is taken from the store.

        Args:
            data: A folder, a data.yaml or an archive, in YOLO's layout or COCO's; the built-in demo data unless given.
            epochs: Passes over the train split.
            imgsz: Side of the square input in pixels.
            batch: Images per step.
            weights: A stock YOLOv8 checkpoint to start from.
            settings: Further settings of `supernet` in a run configuration, for example `lr`.

        Returns:
            This object.

        Raises:
            InputError: The dataset or a setting cannot be used.
            StageError: The training diverged.
        """
        supernet = {"epochs": epochs, "batch": batch, "weights": weights and str(weights), **settings}
        session = self._session.changed(data=data and str(data), imgsz=imgsz, supernet=supernet)
        folders = session.run("supernet-train")
        self._session, self._trained = session, folders["supernet-train"]
        self._dataset = DatasetResult.read(folders["data-prep"])
        self._found, self.candidates = None, []
        return self

    def search(
        self,
        metric: str = "mAP",
        constraint_type: str = "latency",
        constraint_value: float | str | None = None,
        hardware: str | None = None,
        constraints: Sequence[str] = (),
        precision: Precision = "fp32",
        runtime: str | None = None,
        batch: int = 1,
        keep_float: Sequence[str] = (),
        probe: Mapping[str, Any] | None = None,
        nms_free: bool = False,
        **settings: Any,
    ) -> Subnet:
        """Measure the device, then search the networks that keep the limits on it.

        Args:
            metric: What to maximise: `mAP`, which is mAP50-95.
            constraint_type: What is limited: a metric of `Constraint`, for example `latency`, `latency_p99`, `memory`.
            constraint_value: The limit: ms, img/s, MiB, millions of parameters or GFLOPs; or a text such as `80%stock`.
            hardware: The target device, as in a run configuration; this machine's CPU unless given.
            constraints: Further limits, for example `["memory<=200MiB"]`.
            precision: `fp32`, `fp16`, `int8` or `best`: what is to ship.
            runtime: What runs the network on the device; the configuration's default unless given.
            batch: Images per inference.
            keep_float: Parts of a network that stay in floating point in INT8, see `quantization` in a run
                configuration.
            probe: Settings of `probe` in a run configuration, for example `{"networks": 48}`.
            nms_free: Whether networks are measured with an NMS-free head, which `finetune` then trains, see `finetune`
                in a run configuration.
            settings: Settings of `search`, for example `generations` and `population`.

        Returns:
            The best network: the first of `candidates`, exported and measured, with the supernet's weights.

        Raises:
            InputError: Nothing is trained yet, or the device, a limit or a setting cannot be used.
            StageError: No network keeps the limits, as measured.
        """
        if metric.lower() not in METRICS:
            raise InputError(f'metric {metric!r}: networks are compared by "mAP", which is mAP50-95')
        if self._trained is None:
            raise InputError("there is no supernet to search: call train(data=..., epochs=...) first")
        limits = _limits(constraint_type, constraint_value, constraints)
        target = {"hardware": hardware or "auto", "precision": precision, "constraints": limits, "batch": batch}
        target |= {"runtime": runtime} if runtime else {}
        # How many candidates are fine-tuned is asked later, and may not be more than are searched for now.
        session = self._session.changed(
            targets=[target],
            search=settings,
            probe=dict(probe or {}),
            finetune={"candidates": 1, "nms_free": nms_free},
            quantization={"keep_float": list(keep_float)},
        )
        self.candidates = search(session, target_labels(session.config)[0])
        self._found = self.candidates[0].folders["search"]
        return self.candidates[0]

    @property
    def curves(self) -> list[dict[str, Any]]:
        """Losses and scores of the supernet's training, a mapping per epoch."""
        return [point.plain() for point in SupernetEpoch.read_all(self._trained)] if self._trained else []

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every network that the last search scored: score, predicted and, where there is one, measured latency."""
        if self._found is None:
            return []
        return [row.plain() for row in ScoredNetwork.read_all(self._found)]

    @property
    def front(self) -> list[dict[str, Any]]:
        """The networks of the history that no other one beats in both score and latency, from fast to slow."""
        return [row.plain() for row in FrontNetwork.read_all(self._found)] if self._found else []

    def __repr__(self) -> str:
        parts = [f"space {self.space.name} ({self.space.size:.3g} networks)"]
        if self._dataset:
            config = self._session.config
            parts.append(
                f"supernet trained for {config.supernet.epochs} epochs at {config.imgsz} px on "
                f"{self._dataset.images['train']} images of {self._dataset.source}"
            )
        else:
            parts.append("not trained")
        if self._found:
            parts.append(f"{len(self.history)} networks scored, {len(self.front)} of them on the front")
        return f"NAS({'; '.join(parts)})"

    def _repr_markdown_(self) -> str:
        lines = [f"**{self!r}**"]
        if self._found:
            rows = [
                (row["source"], f"{row['map50_95']:.3f}", f"{row['latency_ms']:.3g}", _or_dash(row["measured_ms"]))
                for row in self.front
            ]
            lines += ["", *_markdown(("front", "mAP50-95", "predicted, ms", "measured, ms"), rows)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Session:
    """Where work is done: a configuration, a folder and a device.

    Attributes:
        config: What was asked so far.
        workdir: Absolute path of the folder for store, logs and files.
        environment: Environment variables of what trains, which choose the device.
        console: Where progress is shown; standard error unless given.
    """

    config: RunConfig
    workdir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    console: Console | None = None

    def changed(self, **settings: Any) -> Session:
        """The same with other settings of the configuration.

        Raises:
            InputError: A setting is unknown or not of its form.
        """
        merged = with_absolute_paths({**self.config.model_dump(mode="json"), **settings})
        return replace(self, config=RunConfig.parse(merged, "settings"))

    def run(self, last: str, target: str | None = None) -> dict[str, Path]:
        """`local.run_stages` of this session."""
        console = self.console or Terminal(stderr=True)
        return run_stages(self.config, self.workdir, last, target, console, self.environment)

    def call(self, function: str, **arguments: Any) -> Any:
        """`process.call` of a function of `export.packaging`."""
        log = self.workdir / "logs" / f"{function}.log"
        name = f"yolov8_nas.export.packaging:{function}"
        return process.call(name, log=log, environment=self.environment, **arguments)


def search(session: Session, label: str) -> list[Subnet]:
    """Search for one target of a session's configuration, after whatever the search needs and is not done yet.

    Returns:
        The candidates, the best first: there is at least one.

    Raises:
        InputError: Something that was asked cannot be used.
        StageError: No network keeps the limits, as measured.
    """
    folders = session.run("search", label)
    rows = CandidateResult.read_all(folders["search"])
    return [Subnet(session, label, folders, index, row) for index, row in enumerate(rows)]


class Subnet:
    """A network that a search found, with the supernet's weights or, after `finetune`, with its own.

    Attributes:
        architecture: The network.
        map50_95: Its score on the search split, with the supernet's weights, from 0 to 1.
        predicted_ms: Median latency in ms that the search expected.
        latency_ms: Latency in ms as exported and measured on the target: `p50`, `p90`, `p99`.
        memory_mb: Memory in MiB while it ran.
        slack: Share of the tightest limit that it leaves unused.
        folders: The folder of each stage's result, by stage.
    """

    def __init__(
        self, session: Session, label: str, folders: Mapping[str, Path], index: int, row: CandidateResult
    ) -> None:
        self._session = session
        self._label = label
        self._index = index
        self.folders = dict(folders)
        self.architecture = row.architecture
        self.map50_95 = row.map50_95_search
        self.predicted_ms = row.predicted.latency_ms
        self.latency_ms: dict[str, float] = dict(row.measured.latency_ms)
        self.memory_mb = row.measured.memory_mb
        self.slack = row.slack

    @property
    def name(self) -> str:
        """Short name: the architecture's digest, and whether it was fine-tuned."""
        return f"{self.architecture.digest}{'-tuned' if self.tuned else ''}"

    @property
    def tuned(self) -> bool:
        """Whether it has weights of its own."""
        return "qat-finetune" in self.folders

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The limits that it keeps, as they were asked for."""
        return self._target.limits

    @cached_property
    def cost(self) -> Cost:
        """Parameters, GFLOPs and the like, on paper."""
        classes = DatasetResult.read(self.folders["data-prep"]).classes
        return cost(self.architecture, len(classes), self._session.config.imgsz)

    @property
    def checkpoint(self) -> Path:
        """A plain Ultralytics checkpoint of it, in the work folder; not to be changed."""
        if self.tuned:
            return self._tuned_folder / "best.pt"
        config = self._session.config
        file = self._session.workdir / "subnets" / f"{self.folders['supernet-train'].parent.name[:12]}-{self.name}.pt"
        if not file.exists():
            self._session.call(
                "write_subnet",
                supernet=self.folders["supernet-train"],
                dataset=self.folders["data-prep"],
                architecture=self.architecture.to_dict(),
                path=file,
                imgsz=config.imgsz,
                batch=config.finetune.batch,
                seed=config.seed,
            )
        return file

    def finetune(self, epochs: int = 100, **settings: Any) -> Subnet:
        """Train the network to the end, and for INT8 where the search was for that.

        It begins as `finetune.start` of a run configuration says: unless given, sliced from the checkpoint that the
        supernet began with, or with the supernet's weights.

        Candidates before this one are trained, too, since the stage takes them in their order.

        Args:
            epochs: Passes over the train split.
            settings: Further settings of `finetune` in a run configuration, for example `lr`. The stock baseline is
                left out unless `baseline=True`.

        Returns:
            This object, now with weights of its own.

        Raises:
            InputError: A setting cannot be used.
            StageError: The training diverged.
        """
        nms_free = self._session.config.finetune.nms_free
        if settings.get("nms_free", nms_free) != nms_free:
            raise InputError(
                f"finetune(nms_free={settings['nms_free']}): the network was searched and measured with another head; "
                "ask for it in search(nms_free=...)"
            )
        # Without rungs the first so many are trained, this one among them.
        chosen = {"candidates": self._index + 1, "rungs": []}
        asked = {"epochs": epochs, **chosen, "baseline": False, "nms_free": nms_free, **settings}
        session = self._session.changed(finetune=asked)
        folders = session.run("qat-finetune", self._label)
        self._session, self.folders = session, folders
        return self

    def val(self, split: Literal["search", "val"] = "val") -> Score:
        """Score the network on a split of the dataset, by the one protocol of this package."""
        score: Score = self._session.call(
            "score",
            checkpoint=self.checkpoint,
            dataset=self.folders["data-prep"],
            imgsz=self._session.config.imgsz,
            split=split,
        )
        return score

    def save(self, path: str | Path) -> Path:
        """Write the checkpoint to a file, which stock Ultralytics loads without this package."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_file(self.checkpoint, file)
        return file

    def yolo(self) -> YOLO:
        """The network as a stock `ultralytics.YOLO`, in this process.

        Ultralytics reads a file that is written here from what the checkpoint was read as.
        """
        from ultralytics import YOLO

        from yolov8_nas.train.quantization import rewrite

        with tempfile.TemporaryDirectory() as folder:
            return YOLO(str(rewrite(self.checkpoint, Path(folder) / self.checkpoint.name)))

    def export(
        self,
        format: str = "onnx",
        dynamic: bool = False,
        half: bool = False,
        int8: bool | None = None,
        imgsz: int | None = None,
        batch: int = 1,
        path: str | Path | None = None,
        nms: bool = False,
    ) -> Path:
        """Write the network as a file that needs no PyTorch.

        Args:
            format: `onnx`, or `engine` for TensorRT.
            dynamic: Whether the file takes other numbers of images, heights and widths.
            half: Whether it computes in FP16.
            int8: Whether it is the quantized network that `finetune` has trained; as the search asked unless given.
            imgsz: Side of the square input in pixels; that of the training unless given.
            batch: Images per inference.
            nms: Whether it suppresses overlapping boxes itself.
            path: The file; in `exports` of the work folder unless given.

        Returns:
            The file.

        Raises:
            EngineUnavailable: An engine is asked for and there is no TensorRT here; the message says what is missing.
            InputError: What is asked does not go together.
            StageError: The file does not compute what the network computes.
        """
        if format not in SUFFIXES:
            raise InputError(f"format {format!r} is unknown; use one of {', '.join(SUFFIXES)}")
        if int8 is None:
            # In an engine, FP16 is for the layers that are not quantized; an ONNX file is the one or the other.
            int8 = self._target.precision == "int8" and (format != "onnx" or not half)
        kind = "-int8" * int8 + "-fp16" * half + "-dynamic" * dynamic + "-nms" * nms
        default = self._session.workdir / "exports" / f"{self.name}{kind}{SUFFIXES[format]}"
        exported: Path = self._session.call(
            "export",
            checkpoint=self._quantized_checkpoint if int8 else self.checkpoint,
            path=Path(path).absolute() if path else default,
            format=format,
            imgsz=imgsz,
            batch=batch,
            dynamic=dynamic,
            half=half,
            nms=nms,
        )
        return exported

    @property
    def _target(self) -> TargetConfig:
        return find_target(self._session.config, self._label)

    @property
    def _tuned_folder(self) -> Path:
        return self.folders["qat-finetune"] / "candidates" / str(self._index)

    @property
    def _quantized_checkpoint(self) -> Path:
        if not self.tuned or not (self._tuned_folder / "qat.pt").exists():
            raise InputError(
                'there is no INT8 network yet: search with precision="int8" or "best", call finetune(epochs=...), '
                "and export then; or export with int8=False"
            )
        return self._tuned_folder / "qat.pt"

    def __repr__(self) -> str:
        limits = " and ".join(map(str, self.limits))
        return (
            f"Subnet({self.name}: supernet mAP50-95 {self.map50_95:.3f}, {self.latency_ms['p50']:.3g} ms measured "
            f"({limits}), {self.cost.params / 1e6:.2f} M parameters, {self.cost.gflops:.3g} GFLOPs)"
        )

    def __str__(self) -> str:
        rows = [PARTS, *_parts(self.architecture)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(PARTS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([repr(self), *lines])

    def _repr_markdown_(self) -> str:
        return "\n".join([f"**{self!r}**", "", *_markdown(PARTS, _parts(self.architecture))])


PARTS: Final = ("part", "channels", "depth", "expansion", "operator")


def _parts(architecture: Architecture) -> list[tuple[str, ...]]:
    """The rows of an architecture's table, in the order of the network's description."""
    rows: list[tuple[str, ...]] = [
        (name, str(width), "", "", "") for name, width in zip(CONVS, architecture.convs, strict=True)
    ]
    rows += [
        (name, str(block.width), str(block.depth), f"{block.expansion:g}", block.operator)
        for name, block in zip(BLOCKS, architecture.blocks, strict=True)
    ]
    rows.append(("sppf", str(architecture.sppf_width), "", "", f"k={architecture.sppf_kernel}"))
    if architecture.attention:
        rows.append(("attention", str(architecture.sppf_width), str(architecture.attention), "", "C2PSA"))
    head = architecture.head
    rows.append(("detect", "", "", "", f"boxes reg_max={head.reg_max}, classes {head.classes}"))
    return rows


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _limits(kind: str, value: float | str | None, further: Sequence[str]) -> list[str]:
    """The limits of a search, in a run configuration's form.

    Raises:
        InputError: There is none.
    """
    limits = [*([] if value is None else [_limit(kind, value)]), *further]
    if not limits:
        raise InputError(
            'search without a limit: give constraint_value, for example constraint_type="latency", '
            'constraint_value=8.0 (ms), or constraints=["latency<=80%stock"]'
        )
    return limits


def _limit(kind: str, value: float | str) -> str:
    """A limit in the form of `Constraint`, from a metric and a number in the metric's unit.

    Raises:
        InputError: There is no such metric.
    """
    metric = re.split(r"[_(]", kind.strip())[0]
    if metric not in UNITS:
        raise InputError(f"constraint_type {kind!r} is unknown; use one of {', '.join(UNITS)}")
    relation = ">=" if metric == "throughput" else "<="
    return f"{kind.strip()}{relation}{value}" + ("" if isinstance(value, str) else UNITS[metric][0])


def _visible(device: str | None) -> dict[str, str]:
    """Environment variables under which PyTorch sees the device that is meant, and no other.

    Raises:
        InputError: The device is not here, or is none.
    """
    if device is None:
        return {}
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise InputError(f'device {device!r} is unknown; use "cpu", "cuda:0" or leave it out')
    import torch

    number, found = int(match[1] or 0), torch.cuda.device_count()
    if number >= found:
        raise InputError(f'device {device!r}: PyTorch sees {found} GPUs on this machine; use device="cpu"')
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(found)]
    return {"CUDA_VISIBLE_DEVICES": names[number]}
