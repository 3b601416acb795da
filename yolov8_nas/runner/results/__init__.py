"""Results of stages: frozen models, written by the stage and read by everything after it.

A file that is not of its model is a fault of whoever wrote it, and is told with its name. Other modules import models
from here.
"""

from __future__ import annotations

from yolov8_nas.runner.results.advice import (
    Advice,
    MeasuredSize,
    MeasuredSizes,
    Rate,
    Recorded,
    StageCost,
    StockSize,
    TrainingRates,
)
from yolov8_nas.runner.results.data import DatasetResult, Tallied, Tallies
from yolov8_nas.runner.results.export import (
    Accuracy,
    AgainstStock,
    AheadResult,
    BuiltAhead,
    CandidateFile,
    Choice,
    ClassEvidence,
    Confidence,
    Confidences,
    ConfidenceSpread,
    DecidedBy,
    Difference,
    Drawn,
    DrawnBox,
    EngineResult,
    FileFigures,
    HeldLimit,
    Picture,
    PicturesResult,
    Quantized,
    Shipped,
    Spread,
    StockFile,
    Suppression,
    Threshold,
    TrainingCost,
    Tried,
    VerdictResult,
)
from yolov8_nas.runner.results.finetune import (
    Budget,
    CandidatesHalving,
    EqualLatency,
    FinetuneResult,
    Halving,
    Ranked,
    Rival,
    Rung,
    ShortTraining,
    TrainingRecipe,
    Tuned,
    TunedCandidate,
    TuningResult,
    WholeTraining,
)
from yolov8_nas.runner.results.form import (
    Latency,
    Network,
    Result,
    ResultFile,
    ResultRow,
)
from yolov8_nas.runner.results.probe import (
    AsExported,
    Conditions,
    FailedNetwork,
    FittedModel,
    LatencyFit,
    LatencyTable,
    LimitRow,
    Measured,
    NmsResult,
    PredictionErrors,
    ProbedNetwork,
    Regime,
    ResolvedLimit,
    Smoothness,
    StockResult,
    SuppressionSettings,
    SuppressionTimed,
    Timed,
    TimedLoad,
)
from yolov8_nas.runner.results.record import StageRecord
from yolov8_nas.runner.results.register import RegisteredChoice, RegisterResult
from yolov8_nas.runner.results.search import (
    CandidateResult,
    Choices,
    Compared,
    Compiled,
    FrontNetwork,
    Larger,
    LimitUsed,
    Objective,
    OptionCounts,
    Predicted,
    PriorResult,
    PriorStep,
    RescaledStock,
    RuleApplied,
    RuleEvidence,
    RulesResult,
    ScoredNetwork,
    ScoredStock,
    SearchResult,
    Source,
)
from yolov8_nas.runner.results.supernet import SupernetEpoch, SupernetNetwork, SupernetResult, SupernetTraining
