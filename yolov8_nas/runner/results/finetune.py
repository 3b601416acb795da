"""Results of qat-finetune: trained networks, and how they were chosen."""

from __future__ import annotations

from collections.abc import Mapping

from yolov8_nas.config import Start
from yolov8_nas.runner.results.form import Network, Result, ResultFile


class Rung(Result):
    """Trainings that were compared with each other.

    Attributes:
        networks: How many networks were trained.
        epochs: How long.
        folds: Folds of the train split, of which each training left one out; nothing for whole trainings.
    """

    networks: int
    epochs: int
    folds: int | None = None


class Ranked(Result):
    """How far a network came in a halving.

    Attributes:
        index: Which of the entrants it is.
        seed: Seed of its whole training.
        architecture: What it is.
        scores: What each rung told, as far as it came.
        lead: By how much it lies above the mean of its last rung.
        expected: mAP50-95 that is expected of it.
        seconds: What its trainings took.
    """

    index: int
    seed: int
    architecture: Network
    scores: tuple[float, ...]
    lead: float
    expected: float
    seconds: float


class Halving(Result):
    """A successive halving, the best network first.

    Attributes:
        rungs: Its rungs; the last one is whole trainings.
        ranking: The networks.
    """

    rungs: tuple[Rung, ...]
    ranking: tuple[Ranked, ...]


class Budget(Result):
    """The largest cost of a choice.

    Attributes:
        epochs: Epochs of all trainings.
        stock_trainings: Its computing as a multiple of a training of stock.
        taught_by_stock: Trainings of stock for the sake of teaching.
    """

    epochs: float
    stock_trainings: float
    taught_by_stock: float


class CandidatesHalving(Halving):
    """The halving of the candidates.

    Attributes:
        budget: What it takes at most.
    """

    budget: Budget


class TrainingRecipe(Result):
    """How a network was trained; see `train.finetune.Recipe`."""

    epochs: int
    batch: int
    lr: float
    imgsz: int
    seed: int
    mosaic: bool
    options: tuple[tuple[str, str | float | bool], ...] = ()


class Tuned(Result):
    """A network that was trained to the end.

    Attributes:
        architecture: What it is.
        map50_95: Its score on the search split, by precision.
        average: Mean score of its last epochs.
        best_epoch: The epoch whose weights were kept, by precision.
        start: What it began with.
        begun_with: The same in words.
        computing: Multiply-accumulates of its trainings, by their kind.
        distilled: Whether stock taught it.
        epochs: Epochs of its training in floating point.
        recipe: How it was trained.
        seconds: What that took.
    """

    architecture: Network
    map50_95: Mapping[str, float]
    average: float
    best_epoch: Mapping[str, int]
    start: Start
    begun_with: str
    computing: Mapping[str, float]
    distilled: bool
    epochs: int
    recipe: TrainingRecipe
    seconds: float


class TunedCandidate(Tuned):
    """A candidate that was trained to the end.

    Attributes:
        index: Its index in the search's `candidates.json`.
        expected: mAP50-95 that all of its trainings let expect of it.
    """

    index: int
    expected: float


Curves = tuple[Mapping[str, int | float], ...]
"""Figures of a training, one row per epoch; see `train.finetune.Trained`."""


class TuningResult(Tuned, ResultFile):
    """A network that was trained to the end, with the curves of its trainings.

    Attributes:
        curves: Of the training in floating point.
        qat_curves: Of the quantization-aware training; empty where there was none.
    """

    FILE = "tuning.json"

    curves: Curves
    qat_curves: Curves = ()


class ShortTraining(ResultFile):
    """The outcome of a short training, of a candidate or of rescaled stock.

    Attributes:
        index: Which of the entrants it is.
        architecture: What it is.
        start: What it began with.
        begun_with: The same in words.
        recipe: How it was trained.
        score: Mean mAP50-95 of its last epochs.
        seconds: What the training took.
        curves: Of the training.
    """

    FILE = "scored.json"

    index: int
    architecture: Network
    start: Start
    begun_with: str
    recipe: TrainingRecipe
    score: float
    seconds: float
    curves: Curves


class WholeTraining(ResultFile):
    """The outcome of a whole training that targets and runs share.

    Attributes:
        epoch: The epoch whose weights were kept, from 1.
        curves: Of the training.
    """

    FILE = "training.json"

    epoch: int
    curves: Curves


class EqualLatency(Result):
    """The latency that stock was rescaled to.

    Attributes:
        latency_ms: Median latencies of the rescaled networks.
        candidate: Digest of the candidate.
        candidate_ms: Its median latency; nothing where it was not measured.
    """

    latency_ms: tuple[float, ...]
    candidate: str
    candidate_ms: float | None


class Rival(Tuned):
    """Stock, or rescaled stock, trained to the end.

    Attributes:
        name: What it is called.
        form: Form in which it ships.
        halving: How it was chosen among its trainings.
        equal_latency: What it was rescaled to; nothing for stock.
    """

    name: str
    form: str
    halving: Halving
    equal_latency: EqualLatency | None = None


class FinetuneResult(ResultFile):
    """The result of qat-finetune.

    Attributes:
        candidates: The candidates that were trained to the end, the most promising first.
        baseline: Stock; nothing where it was not asked for.
        rescaled: Stock at the best candidate's latency; likewise.
        qat: How networks were trained for INT8, where they were.
        halving: How the candidates were chosen.
    """

    FILE = "finetune.json"

    candidates: tuple[TunedCandidate, ...]
    baseline: Rival | None
    rescaled: Rival | None
    qat: TrainingRecipe
    halving: CandidatesHalving
