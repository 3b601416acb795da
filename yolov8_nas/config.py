"""The run configuration: what a run is asked to do, read from YAML and checked before any work starts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from yolov8_nas import credentials
from yolov8_nas.errors import InputError
from yolov8_nas.space import PARTS
from yolov8_nas.space.limits import Constraint
from yolov8_nas.yaml_text import parse_yaml, read_yaml

Precision = Literal["fp32", "fp16", "int8", "best"]
Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
"""Text that is there: an empty one, as of a variable that was not set, must not stand for a default."""

_BUDGETED: Final = {"supernet": ("epochs",), "search": ("generations",), "finetune": ("epochs", "qat_epochs")}
"""What `lay_over` scales by the budget: what a run takes the longest for."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SupernetConfig(_Section):
    """Training of the weight-sharing supernet.

    Attributes:
        epochs: Passes over the train split.
        batch: Images per step, of all processes together, or `auto`: chosen by memory on GPUs, 16 on a CPU.
        weights: What to start from: a stock YOLOv8 checkpoint (`.pt`) of any classes that is nowhere narrower or
            shallower than the stock network of the space, the folder of an earlier supernet, or nothing to start from
            scratch. A checkpoint can be named (`yolov8s.pt`) or have an address (`s3://`, `https://`), see
            `data/weights.py`.
        weights_folder: Folder where named checkpoints are looked for and downloads are kept. Unless given, that of the
            environment's YOLOV8_NAS_WEIGHTS, else `~/.cache/yolov8-nas/weights`.
        download: Whether a named checkpoint that is not there may be downloaded from Ultralytics' release assets; the
            environment's YOLOV8_NAS_DOWNLOAD=1 allows it, too.
        lr: Peak learning rate of AdamW.
        random_networks: Random networks per step beside those that are trained in every step.
        anchor: Which networks are trained in every step: the `largest` and the smallest (sandwich rule), or `stock`,
            which then teaches the others. `auto`: stock where there are weights to start from.
        near: Share of stock's multiply-accumulates near which every other random network lies: about the share of
            stock's latency that limits ask for. Without it, all are drawn uniformly: any limit is served alike.
        largest_first: Share of the epochs in which the network that teaches trains alone, before the others join;
            `auto` for 0.4, and for none of them where there are weights to start from.
        processes: Processes that train together, each on a GPU of its own, or `auto`: as many as there are GPUs, one on
            a CPU. A run that torchrun started has torchrun's number.
        accumulate: Parts of a batch that a process works through one after the other, where memory is short.
        amp: Whether networks compute in half precision; `auto` for on GPUs, not on a CPU.
    """

    epochs: Positive = 300
    batch: Positive | Literal["auto"] = "auto"
    weights: Text | None = None
    weights_folder: Text | None = None
    download: bool = False
    lr: float = Field(2e-3, gt=0)
    random_networks: int = Field(2, ge=0)
    anchor: Literal["auto", "largest", "stock"] = "auto"
    near: float | None = Field(None, gt=0, le=2)
    largest_first: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    processes: Positive | Literal["auto"] = "auto"
    accumulate: Positive = 1
    amp: bool | Literal["auto"] = "auto"

    @property
    def anchored(self) -> Literal["largest", "stock"]:
        """Which networks are trained in every step."""
        if self.anchor == "auto":
            return "stock" if self.weights else "largest"
        return self.anchor

    @property
    def alone(self) -> float:
        """Share of the epochs in which the network that teaches trains alone."""
        if self.largest_first == "auto":
            return 0.0 if self.weights else 0.4
        return self.largest_first


class ProbeConfig(_Section):
    """Measurement of the target device.

    Attributes:
        networks: Networks built and measured to fit the latency model: whole networks and block swaps.
        holdout: Further whole networks on which the model's error is told.
        max_mape: Largest mean absolute percentage error on the held-out networks with which the search may go on.
    """

    networks: int = Field(150, ge=12)
    holdout: int = Field(30, ge=5)
    max_mape: float = Field(0.10, gt=0)


class ObjectiveConfig(_Section):
    """What is wanted of the networks within the limits: a small `accuracy * (1 - mAP) + latency * (ms / stock's ms)`.

    Attributes:
        accuracy: Weight of 1 - mAP50-95.
        latency: Weight of the median latency as a share of stock YOLOv8's; with 0 the most accurate network is wanted.
    """

    accuracy: float = Field(1.0, gt=0)
    latency: float = Field(0.0, ge=0)


class RulesConfig(_Section):
    """Which hardware rules may take options out of the space before it is searched (`search.rules`).

    Attributes:
        tensor_core_types: Count on tensor cores only for the data types that the chip's have.
        tensor_core_channels: Channels in the multiples that tensor cores work in.
        large_kernels_not_attention: No attention where memory is slow.
    """

    tensor_core_types: bool = True
    tensor_core_channels: bool = True
    large_kernels_not_attention: bool = True


class SearchConfig(_Section):
    """The search on one target.

    Attributes:
        generations: Generations of the evolution.
        population: Networks per generation.
        candidates: Networks handed on, each exported and measured.
        measure_every: Generations between two measurements of the front on the device; the last one is always measured.
        bn_images: Images on which BatchNorm statistics are recalibrated before a network is scored.
        prior_steps: Steps in which the architecture parameters learn where to look; 0 for no such prior.
        exact: Whether an exact solver proposes networks beside the evolution.
        objective: What is wanted of the networks that keep the limits.
        rules: Which hardware rules are on.
        int8_aware: Whether the networks of an INT8 target are scored under fake quantization, calibrated for each; in
            floating point otherwise.
        random: Networks drawn at random within the limits and scored beside the search, for comparison; `equal` for as
            many as the search scores.
        mac_ranking: Networks with the most multiply-accumulates within the limits, scored for comparison.
        random_seeds: How often these comparisons are made, each time with another seed.
    """

    generations: Positive = 40
    population: int = Field(64, ge=4)
    candidates: Positive = 12
    measure_every: Positive = 10
    bn_images: int = Field(1024, ge=16)
    prior_steps: int = Field(200, ge=0)
    exact: bool = True
    objective: ObjectiveConfig = ObjectiveConfig()
    rules: RulesConfig = RulesConfig()
    int8_aware: bool = True
    random: Annotated[int, Field(ge=0)] | Literal["equal"] = 0
    mac_ranking: int = Field(0, ge=0)
    random_seeds: Positive = 1


Start: TypeAlias = Literal["weights", "supernet", "scratch"]
"""What a training begins with; see `FinetuneConfig.start`."""


class RungConfig(_Section):
    """Short trainings among which the best networks are chosen.

    Attributes:
        networks: How many networks are trained.
        epochs: How long.
    """

    networks: Positive
    epochs: Positive


Share = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(_Section):
    """Ultralytics' own settings of a training, under their names; what is not given is as this software has it.

    They hold for every training of candidates, stock and rescaled stock, short and whole ones. What decides how long a
    training is, on what and from what, is not among them: all arms have that in common already.

    Attributes:
        optimizer: Name of the optimizer; `auto` is none, since it changes with the number of images.
        lr0: Peak learning rate, in the place of `finetune.lr` and, where a training is as long as the supernet's, of
            `supernet.lr`.
        lrf: Share of it that is left in the end.
        momentum: Momentum of SGD, first beta of Adam's kind.
        weight_decay: Decay of the kernels.
        warmup_epochs: Epochs in which the rate rises.
        warmup_momentum: Momentum at their beginning.
        warmup_bias_lr: Learning rate of biases at their beginning.
        cos_lr: Whether the rate falls by a cosine.
        box: Weight of the box loss.
        cls: Weight of the class loss.
        dfl: Weight of the loss of box distributions.
        hsv_h: Share of hue that is varied.
        hsv_s: Share of saturation.
        hsv_v: Share of brightness.
        degrees: Degrees of rotation.
        translate: Share of the side that is translated.
        scale: Share by which size is varied.
        shear: Degrees of shear.
        perspective: Share of perspective.
        flipud: Share of images upside down.
        fliplr: Share of mirrored images.
        bgr: Share of images with red and blue exchanged.
        mosaic: Share of images that are four joined to one; quantization-aware training and the last epochs have none.
        mixup: Share of images mixed with another.
        cutmix: Share of images with a part of another.
    """

    optimizer: Literal["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSProp"] | None = None
    lr0: Annotated[float, Field(gt=0, le=1)] | None = None
    lrf: Share | None = None
    momentum: Share | None = None
    weight_decay: Share | None = None
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    warmup_momentum: Share | None = None
    warmup_bias_lr: Share | None = None
    cos_lr: bool | None = None
    box: Annotated[float, Field(ge=0)] | None = None
    cls: Annotated[float, Field(ge=0)] | None = None
    dfl: Annotated[float, Field(ge=0)] | None = None
    hsv_h: Share | None = None
    hsv_s: Share | None = None
    hsv_v: Share | None = None
    degrees: Annotated[float, Field(ge=0, le=180)] | None = None
    translate: Share | None = None
    scale: Share | None = None
    shear: Annotated[float, Field(ge=0, le=180)] | None = None
    perspective: Share | None = None
    flipud: Share | None = None
    fliplr: Share | None = None
    bgr: Share | None = None
    mosaic: Share | None = None
    mixup: Share | None = None
    cutmix: Share | None = None

    @property
    def given(self) -> tuple[tuple[str, str | float | bool], ...]:
        """The settings that were given, but for the learning rate, which is a part of every recipe."""
        return tuple((name, value) for name, value in self.model_dump().items() if value is not None and name != "lr0")


class FinetuneConfig(_Section):
    """Fine-tuning of the candidates and training of the stock baseline.

    Attributes:
        epochs: Epochs of floating-point fine-tuning, from the supernet's weights.
        candidates: How many networks are trained to the end.
        rungs: Short trainings that choose them among the search's candidates (successive halving), such as
            `[{networks: 12, epochs: 3}, {networks: 4, epochs: 10}]`. `auto` lets all candidates enter, and from rung to
            rung a third of them stays and is trained three times as long. Without any, the search's order decides.
        qat_epochs: Epochs of quantization-aware training after that, where the precision asks for INT8.
        batch: Images per step.
        lr: Peak learning rate of AdamW.
        start: What trainings begin with, of candidates, stock and rescaled stock alike. `weights`: each is sliced from
            the stock checkpoint that `supernet.weights` names, and learns for `epochs`. `supernet`: the candidates
            begin with the supernet's weights, stock with what the supernet itself began with, or at random. `scratch`:
            all begin at random. What begins otherwise than from weights or from the supernet learns for as many epochs
            as the supernet and the fine-tuning together. Unless given, `weights` where `supernet.weights` names a
            checkpoint (`.pt`), else `supernet`.
        baseline: What is trained beside the candidates for comparison: `stock` (YOLOv8 of the size), `rescaled` (the
            same with its width rescaled to the best candidate's measured latency), `both` or `none`. True stands for
            `stock`, false for `none`. Each gets as many trainings as the candidates: stock as many whole ones,
            rescaled stock the same rungs.
        distill: Whether the candidates, and rescaled stock as well, learn from trained stock beside the labels, where
            they are trained to the end. Stock is trained first, with `baseline: none` for this alone.
        nms_free: Whether all of them learn Ultralytics' NMS-free head and ship with it: a branch beside YOLOv8's head
            that finds each object once (one-to-one), so that nothing has to suppress overlapping boxes.
        train: Augmentation, optimizer and the like, under Ultralytics' names.
    """

    epochs: Positive = 100
    candidates: Positive = 2
    rungs: tuple[RungConfig, ...] | Literal["auto"] = "auto"
    qat_epochs: Positive = 10
    batch: Positive = 16
    lr: float = Field(1e-3, gt=0)
    start: Start | None = None
    baseline: Literal["none", "stock", "rescaled", "both"] = "stock"
    distill: bool = False
    nms_free: bool = False
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, given: Any) -> Any:
        if isinstance(given, dict) and "from_scratch" in given:
            raise ValueError(
                "from_scratch is no setting: write start: scratch in place of from_scratch: true, and leave out "
                "from_scratch: false"
            )
        return given

    @field_validator("baseline", mode="before")
    @classmethod
    def _named(cls, baseline: Any) -> Any:
        return {True: "stock", False: "none"}[baseline] if isinstance(baseline, bool) else baseline

    @model_validator(mode="after")
    def _narrowing(self) -> FinetuneConfig:
        rungs = [] if self.rungs == "auto" else [*self.rungs]
        for before, after in itertools.pairwise(rungs):
            if after.networks > before.networks or after.epochs <= before.epochs:
                raise ValueError(
                    f"rungs: {after.networks} networks for {after.epochs} epochs after {before.networks} for "
                    f"{before.epochs}; from rung to rung there are fewer networks and more epochs"
                )
        for rung in rungs:
            if rung.networks < self.candidates or rung.epochs >= self.epochs:
                raise ValueError(
                    f"rungs: {rung.networks} networks for {rung.epochs} epochs; a rung has more networks than are "
                    f"trained to the end (candidates = {self.candidates}) and fewer epochs (epochs = {self.epochs})"
                )
        return self


class QuantizationConfig(_Section):
    """How networks are quantized where a target asks for INT8.

    Attributes:
        keep_float: Parts of a network (`space.PARTS`) that stay in floating point, beside the head's output
            convolutions and DFL, which always do. `yolov8-nas sensitivity` measures which are worth it.
    """

    keep_float: tuple[str, ...] = ()

    @field_validator("keep_float")
    @classmethod
    def _in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PARTS:
                raise ValueError(f"no part of a network is called {name!r}; the parts are {', '.join(PARTS)}")
        if {*names, "attention"} == {*PARTS}:
            raise ValueError("these are all parts, and nothing is left to quantize; ask for precision fp32 or fp16")
        return tuple(part for part in PARTS if part in names)

    def floats(self, *, int8: bool) -> tuple[str, ...]:
        """The parts that stay in floating point where something is quantized; none where nothing is.

        Args:
            int8: Whether anything is quantized.
        """
        return self.keep_float if int8 else ()


class TargetConfig(_Section):
    """One device to search for.

    Attributes:
        hardware: A catalogue name (`NVIDIA_T4`), `cpu`, `cpu-1t`, `cpu-2t`, or `auto`.
        runtime: What runs the exported network there.
        precision: `best` ships floating point or INT8, whichever keeps the limits and scores best.
        constraints: Hard limits, in the form of `Constraint.parse`.
        batch: Images per inference.
        far: The device is elsewhere and is measured through bundles: the file in which `probe --import` keeps what was
            measured there.
    """

    hardware: Text = "auto"
    runtime: Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt", "torch"] = "onnxruntime"
    precision: Precision = "fp32"
    constraints: tuple[str, ...] = Field(min_length=1)
    batch: int = Field(1, ge=1, le=1024)
    far: Text | None = None

    @field_validator("constraints", mode="before")
    @classmethod
    def _several(cls, constraints: Any) -> Any:
        return (constraints,) if isinstance(constraints, str) else constraints

    @field_validator("constraints")
    @classmethod
    def _parse(cls, constraints: tuple[str, ...]) -> tuple[str, ...]:
        for text in constraints:
            Constraint.parse(text)
        return constraints

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """The hard limits."""
        return tuple(Constraint.parse(text) for text in self.constraints)


class TrackingConfig(_Section):
    """Where runs and models are recorded.

    Attributes:
        uri: MLflow tracking server; nothing for SQLite and a folder beside the store.
        experiment: MLflow experiment.
    """

    uri: Text | None = None
    experiment: str = Field("yolov8-nas", min_length=1, max_length=500)  # what MLflow takes


class SigningConfig(_Section):
    """Keys of signatures (`signing`): files of this machine, never keys themselves. The environment's go before them.

    Attributes:
        key: File of the private key, to sign what the run makes.
        trusted: File or folder of public keys; what none of them has signed is refused.
    """

    key: str | None = None
    trusted: str | None = None


class RetrainConfig(_Section):
    """A run that only begins where the dataset is a new one, and starts from the supernet of the registered champion.

    Attributes:
        share: Share of `supernet.epochs` that is trained.
        tolerance: By how much mAP50-95 of a challenger may be below the champion's, at the promotion gate.
    """

    share: float = Field(0.3, gt=0, le=1)
    tolerance: float = Field(0.005, ge=0, lt=1)


class ReportConfig(_Section):
    """The report of a run.

    Attributes:
        images: Whether the report holds pictures: images of the val split, made smaller, with the boxes of what ships
            and of stock. Set it to false where images must not leave the store; the report says then that they are
            left out.
    """

    images: bool = True


class RunConfig(_Section):
    """Everything that a run is asked to do.

    Attributes:
        name: Name of the run and of the registered model.
        data: Dataset: a folder, an archive, the address of one (`s3://`, `https://`), or nothing for the built-in demo
            data.
        data_license: Licence of the dataset, as it is to stand beside every model that was trained on it.
        space: A built-in search space or the path of a YAML file.
        imgsz: Side of the square network input in pixels, a multiple of 32.
        store: Folder of the stage store, or `s3://BUCKET/PREFIX`; nothing for `store` in the work folder.
        advice: Whether each target is advised on after its probe. What advice needs is measured for it: stock sizes,
            and training steps for about a minute.
        retrain: The run is a retraining of the registered model of this name; nothing for one from the start.
        signing: Keys of signatures; nothing for those that the environment names, if any.
        seed: Seed of everything that is random.
    """

    name: str = Field("inspection-demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")
    data: Text | None = None
    data_license: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    space: Text = "yolov8n"
    imgsz: int = Field(640, ge=32, le=8192, multiple_of=32)
    supernet: SupernetConfig = SupernetConfig()
    probe: ProbeConfig = ProbeConfig()
    search: SearchConfig = SearchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    targets: tuple[TargetConfig, ...] = Field(min_length=1)
    tracking: TrackingConfig = TrackingConfig()
    report: ReportConfig = ReportConfig()
    store: Text | None = None
    advice: bool = True
    retrain: RetrainConfig | None = None
    signing: SigningConfig | None = None
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        """However a configuration comes in: from here on, its addresses show no user, password or query."""
        return credentials.hide_all(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.finetune.candidates > self.search.candidates:
            raise ValueError(
                f"finetune.candidates = {self.finetune.candidates} is more than "
                f"search.candidates = {self.search.candidates}"
            )
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets: the same target stands there twice")
        if self.retrain is not None and self.supernet.weights is not None:
            raise ValueError("retrain starts from the registered supernet: leave supernet.weights or retrain out")
        if self.finetune.start == "weights" and not self._from_checkpoint:
            raise ValueError(
                "finetune.start = 'weights' begins with the stock checkpoint of supernet.weights, which names none: "
                "give one, such as yolov8s.pt, or another start"
            )
        return self

    @property
    def start(self) -> Start:
        """What trainings begin with; see `FinetuneConfig.start`."""
        return self.finetune.start or ("weights" if self._from_checkpoint else "supernet")

    @property
    def _from_checkpoint(self) -> bool:
        """Whether `supernet.weights` names a stock checkpoint, not an earlier supernet."""
        return str(self.supernet.weights or "").partition("?")[0].endswith(".pt")

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file, with `key=value` overrides such as `supernet.epochs=5` laid over it.

        Raises:
            InputError: The file is missing or not YAML, a key is unknown, a value is not of its form.
        """
        data = read_yaml(path, "a run configuration")
        if not isinstance(data, dict):
            raise InputError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
        for override in overrides:
            _override(data, override)
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: Any, source: str) -> RunConfig:
        """Check plain data; `source` names it in errors.

        Raises:
            InputError: A key is unknown or a value is not of its form; every fault is named.
        """
        if (unusable := _unusable(data)) is not None:
            raise InputError(f"{source}: {unusable}")
        try:
            bare = credentials.hide_all(data)  # here, too, since faults are told with what is wrong
        except ValueError as error:
            raise InputError(f"{source}: {error}") from None
        try:
            return cls.model_validate(bare)
        except ValidationError as error:
            faults = []
            for fault in error.errors():
                where = ".".join(
                    str(part)
                    for part in fault["loc"]
                    if not str(part).startswith(("function-", "literal[", "constrained-"))
                )
                if fault["type"] == "extra_forbidden":
                    faults.append(f"unknown key {where}{_known_keys(fault['loc'])}")
                else:
                    faults.append(f"{where or 'configuration'} = {fault['input']!r:.200}: {fault['msg']}")
            raise InputError(f"{source}: " + "; ".join(faults)) from None

    def retrained_from(self, weights: str | None) -> RunConfig:
        """The run that a retraining comes to: a shorter one, with the champion in the place of the stock baseline.

        All networks of the supernet have been trained before, so no epochs go to the largest alone.

        Args:
            weights: What the supernet starts from.
        """
        if self.retrain is None:
            return self
        epochs = max(1, round(self.supernet.epochs * self.retrain.share))
        anchor = "largest" if self.supernet.anchor == "auto" else self.supernet.anchor  # as the champion's was
        shorter = {"epochs": epochs, "largest_first": 0.0, "weights": weights, "anchor": anchor}
        changes = {
            "supernet": self.supernet.model_copy(update=shorter),
            "finetune": self.finetune.model_copy(update={"baseline": "none", "distill": False}),
            "retrain": None,
        }
        return self.model_copy(update=changes)

    def to_json(self) -> str:
        """The configuration as canonical JSON, which `parse(json.loads(...))` reads."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this configuration."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


def lay_over(
    settings: dict[str, Any],
    *,
    data: str | None = None,
    targets: Sequence[str | dict[str, Any]] = (),
    constraints: Sequence[str] = (),
    precision: str | None = None,
    budget: float = 1.0,
) -> dict[str, Any]:
    """A run configuration, as plain data, with what was asked for laid over it.

    Args:
        settings: The configuration.
        data: Dataset instead of its own.
        targets: Targets instead of its own. A name is a device, with the rest as its first target has it.
        constraints: Limits for every target.
        precision: Precision for every target.
        budget: Factor on its epochs and generations, so that 0.1 is a cheap trial; each stays at least 1.

    Raises:
        InputError: The budget is no positive number.
    """
    if not 0 < budget < float("inf"):
        raise InputError(f"budget {budget}: give a positive number, for example 0.1 for a tenth of the epochs")
    changed = {**settings}
    if data:
        changed["data"] = data
    given = settings.get("targets") or []
    if not isinstance(given, list | tuple) or not all(isinstance(target, dict) for target in given):
        raise InputError(
            f"targets = {given!r}: give a list of mappings, for example [{{hardware: cpu, constraints: [...]}}]"
        )
    if not all(isinstance(target, str | dict) for target in targets):
        raise InputError(f"targets = {targets!r}: give a list of names of devices, or of mappings")
    first = given[0] if given else {}
    asked = [{**first, "hardware": target} if isinstance(target, str) else target for target in targets]
    changes: dict[str, Any] = {"constraints": list(constraints)} if constraints else {}
    changes |= {"precision": precision} if precision else {}
    changed["targets"] = [{**target, **changes} for target in asked or given]
    for section, keys in _BUDGETED.items() if budget != 1 else ():
        asked_for = changed.get(section) or {}
        if not isinstance(asked_for, dict):
            continue  # what is not of its form, `parse` tells
        effort = RunConfig.model_fields[section].default.model_dump(include=set(keys)) | asked_for
        numbers = {key: effort[key] for key in keys if isinstance(effort[key], int | float)}
        changed[section] = effort | {key: max(1, round(number * budget)) for key, number in numbers.items()}
    return changed


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text!r} does not parse: write KEY=VALUE, for example --set supernet.epochs=5")
    *parents, last = key.split(".")
    for parent in parents:
        below: Any = data.setdefault(parent, {}) if isinstance(data, dict) else None
        if isinstance(below, dict):
            data = below
        else:
            raise InputError(f"--set {text!r}: {parent} has no keys of its own")
    if not isinstance(data, dict):
        raise InputError(f"--set {text!r}: {'.'.join(parents)} has no keys of its own")
    data[last] = parse_yaml(value, f"--set {key}")


def _unusable(data: Any, where: str = "") -> str | None:
    """What no setting can hold, wherever it stands: keys that are no names, and text that no path or name may have."""
    if isinstance(data, str):
        bad = next((letter for letter in data if letter == "\0" or 0xD800 <= ord(letter) < 0xE000), None)
        return None if bad is None else f"{where} = {data!r}: holds {bad!r}, which no text may; remove it"
    if isinstance(data, dict):
        for key in data:
            if not isinstance(key, str):
                place = f"{where}.{key}" if where else str(key)
                return f"{place}: the key is {key!r}, not a name; put quotes around it or correct it"
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    faults = (_unusable(value, f"{where}.{key}" if where else str(key)) for key, value in items)
    return next((fault for fault in faults if fault is not None), None)


def _known_keys(location: tuple[int | str, ...]) -> str:
    """The keys that stand at the place of an unknown one, for the message."""
    model: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = {"targets": TargetConfig, "retrain": RetrainConfig, "signing": SigningConfig}.get(part, annotation)
    return f" (known: {', '.join(model.model_fields)})"
