"""The summary of a run, `summary.json`.

Keys may be added; those that are there keep name, unit and meaning, because people's scripts read them. Latencies are
in milliseconds, memory in MiB, mAP between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict, Field

from yolov8_nas.runner.results.advice import Advice
from yolov8_nas.runner.results.export import (
    AgainstStock,
    ClassEvidence,
    EngineResult,
    Quantized,
    StockFile,
    TrainingCost,
)
from yolov8_nas.runner.results.form import Latency, Network, Result, ResultFile
from yolov8_nas.runner.results.probe import LimitRow
from yolov8_nas.runner.results.register import RegisteredChoice


class Part(Result):
    """A part of a summary, to which later versions may add."""

    model_config = ConfigDict(extra="allow")


class News(Part):
    """What a retraining found.

    Attributes:
        new: Whether there is anything to do.
        says: The same in words.
        origin: The registered version to start from.
    """

    new: bool
    says: str
    origin: str


class Run(Part):
    """The run as a whole. Of one that was never opened only the first four are known.

    Attributes:
        id: Name of the run.
        name: Name of the model.
        status: `failed` where any stage or target failed.
        error: Why it failed.
        space: Name of the search space.
        imgsz: Side of the square input in pixels.
        seed: Seed of everything random.
        config: Digest of the configuration.
        seconds: What its stages took.
        peak_memory_mb: Largest of the stages that computed something.
        tools: Versions of what computed the results.
        tracking_uri: The tracking server, without credentials.
        mlflow_run: MLflow's id of the run.
        retraining: What a retraining found; nothing of other runs.
    """

    id: str
    name: str
    status: Literal["done", "failed"]
    error: str | None
    space: str | None = None
    imgsz: int | None = None
    seed: int | None = None
    config: str | None = None
    seconds: float = 0.0
    peak_memory_mb: float | None = None
    tools: Mapping[str, str] = Field(default_factory=dict)
    tracking_uri: str | None = None
    mlflow_run: str | None = None
    retraining: News | None = None


class Images(Part):
    """Images per split."""

    train: int
    search: int
    val: int


class Dataset(Part):
    """The dataset as data-prep checked it."""

    digest: str
    images: Images
    classes: tuple[str, ...]


class StageRow(Part):
    """One call of one stage; `target` is nothing for a stage that serves all of them."""

    name: str
    target: str | None
    status: Literal["done", "cached", "failed"]
    seconds: float
    error: str | None
    peak_memory_mb: float | None


class Hardware(Part):
    """The device, as hw-probe described it; only the configured name where it did not come so far."""

    name: str
    threads: int | None = None
    model: str | None = None
    kind: Literal["cpu", "gpu"] | None = None


class Runtime(Part):
    """What ran the network."""

    name: str
    version: str | None = None


class Limit(LimitRow):
    """A limit and what was measured of the file that ships.

    A limit that was asked for as a `share` of stock's value is held against `stock` as measured in the same rounds.

    Attributes:
        measured: The file's value; nothing where it was not measured.
        met: Whether the limit is kept; nothing where that is not known.
        text: The limit as it was asked for, where nothing was held against it.
    """

    model_config = ConfigDict(extra="allow")

    measured: float | None = None
    met: bool | None = None
    text: str | None = None


class Model(Part):
    """The exported file that ships, as measured and scored on the device; `files` are relative to the summary.

    `energy_mj` is per image; it and `power_w` are missing where the device has no counter.
    """

    map50_95: float
    map50: float
    latency_ms: Latency
    latency_with_nms_ms: Latency | None = None
    memory_mb: float | None
    energy_mj: float | None = None
    power_w: float | None = None
    params: float
    gflops: float
    training: TrainingCost | None = None
    files: Mapping[str, str]


class Baseline(Part):
    """A stock network that was measured and not trained."""

    name: str
    map50_95: float | None = None
    latency_ms: Latency
    training: TrainingCost | None = None


class LatencyModel(Part):
    """Error of the latency model, fitted to `networks` measured ones, on `holdout` others.

    `coverage` is the share of them that were no slower than the model's upper bound.
    """

    mape: float
    spearman: float
    networks: int
    holdout: int
    coverage: float


class Registry(Part):
    """The registered version, and those to choose from beside it."""

    model: str
    version: int
    aliases: tuple[str, ...]
    choices: tuple[RegisteredChoice, ...] = ()


class Gate(Part):
    """What the promotion gate said of a new version; see `registry.promote.promote` for what else there is.

    Attributes:
        promoted: Whether it is champion.
        reasons: Why, or why not: one sentence each.
        version: The version; nothing where none was registered.
    """

    promoted: bool
    reasons: tuple[str, ...]
    version: str | None = None


class Target(Part):
    """One target.

    Attributes:
        id: Label of the target.
        status: `met` where a network ships that keeps every limit and is registered.
        error: Why nothing ships.
        hardware: The device.
        runtime: What ran the network.
        precision_requested: The precision that was asked for.
        precision_shipped: That of the file that ships.
        constraints: The limits, and what the file that ships has of them, or else the one that came closest.
        architecture: The network that ships.
        model: The file that ships.
        baselines: Stock's files under the same measurement.
        latency_model: Error of the latency model.
        registry: The registered version.
        comparison: What ships against stock in its own precision.
        classes: What the validation images tell of each class.
        quantization: FP32 and INT8 side by side.
        engine: The TensorRT engine of what ships.
        gate: What the promotion gate said, in a retraining.
        advice: What was told before anything was trained.
    """

    id: str
    status: Literal["met", "failed"]
    error: str | None
    hardware: Hardware
    runtime: Runtime
    precision_requested: str
    precision_shipped: str | None
    constraints: tuple[Limit, ...]
    architecture: Network | None
    model: Model | None
    baselines: tuple[StockFile | Baseline, ...]
    latency_model: LatencyModel | None
    registry: Registry | None
    comparison: AgainstStock | None
    quantization: Quantized | None
    engine: EngineResult | None
    classes: tuple[ClassEvidence, ...] = ()
    gate: Gate | None = None
    advice: Advice | None = None


class Summary(ResultFile, Part):
    """The content of `summary.json`."""

    FILE = "summary.json"

    schema_: Literal[1] = Field(1, alias="schema")
    run: Run
    dataset: Dataset | None
    stages: tuple[StageRow, ...]
    targets: tuple[Target, ...]
