"""Results of the search: the scored networks, the comparisons, and the candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict, Field, JsonValue

from yolov8_nas.config import SearchConfig
from yolov8_nas.runner.results.form import Network, Result, ResultFile, ResultRow
from yolov8_nas.runner.results.probe import Measured

Source = Literal["seed", "rescaled", "prior", "exact", "evolution", "filled", "random", "macs"]
"""Where a scored network came from; see `search.evolution.Trial`."""

Option = bool | int | float | str
"""One of the options of a dimension of a space."""


class Predicted(Result):
    """The predicted median latency of a network in ms, and its upper confidence bound."""

    latency_ms: float
    upper_ms: float


class Compiled(Result):
    """A compiler's account of an engine; see `measure.engine_file.told_of`. Further fields depend on the compiler.

    Attributes:
        name: The compiler.
        version: Its version.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    name: str
    version: str


class CandidateResult(ResultRow):
    """A network that was exported and measured.

    Attributes:
        architecture: What it is.
        map50_95_search: Its mAP50-95 on the search split with the supernet's weights.
        source: Where it came from.
        predicted: What was expected of its latency.
        measured: What was measured.
        met: Whether it keeps every limit.
        slack: Share of the tightest limit that is left unused; below 0 it was missed.
        tightest: That limit.
        compiler: What the compiler told of its engine, where one was built.
    """

    FILE = "candidates.json"

    architecture: Network
    map50_95_search: float
    source: Source
    predicted: Predicted
    measured: Measured
    met: bool
    slack: float
    tightest: str
    compiler: Compiled | None = None


class ScoredNetwork(ResultRow):
    """A network that was scored with the supernet's weights.

    Attributes:
        architecture: What it is.
        genes: Its genes in the supernet's space.
        map50_95: Its mAP50-95 on the search split.
        latency_ms: Its median latency in ms, as predicted in the end.
        upper_ms: Upper confidence bound of that.
        generation: Its generation, from 0; nothing for one that is no part of the search.
        source: Where it came from.
        repetition: The comparison that it belongs to, from 0; nothing for a network of the search.
        measured_ms: Its median latency in ms, where it was measured.
    """

    FILE = "history.jsonl"

    architecture: Network
    genes: tuple[int, ...]
    map50_95: float
    latency_ms: float
    upper_ms: float
    generation: int | None
    source: Source
    repetition: int | None
    measured_ms: float | None = None


class FrontNetwork(ScoredNetwork):
    """A scored network within the limits that no other one beats in both accuracy and latency."""

    FILE = "front.json"


class RescaledStock(ResultRow):
    """Stock with its width rescaled to the latency of a candidate, both measured in the same rounds.

    Attributes:
        architecture: The rescaled network.
        candidate: Digest of the candidate.
        latency_ms: Its median latency in ms.
        candidate_ms: The candidate's.
    """

    FILE = "rescaled.json"

    model_config = ConfigDict(populate_by_name=True)

    architecture: Network
    candidate: str = Field(alias="for")
    latency_ms: float
    candidate_ms: float


class Objective(Result):
    """Weights of accuracy and latency; see `search.preference.Preference`."""

    accuracy: float
    latency: float
    stock_ms: float


class Compared(Result):
    """The best networks within the limits of the search, and of what it is compared with.

    Attributes:
        search: mAP50-95 of the search's best; nothing where none is within the limits.
        search_evaluations: Networks that the search scored.
        best: The best of each repetition; likewise.
        evaluations: Networks that each repetition scored.
        mean: Mean of `best`.
        interval: Its 95% interval over repetitions; nothing for a single one.
    """

    search: float | None
    search_evaluations: int
    best: tuple[float | None, ...]
    evaluations: tuple[int, ...]
    mean: float | None
    interval: tuple[float, float] | None


class Larger(Result):
    """Networks within the limits that use more than the best candidate: how many were scored, and the best of them."""

    scored: int
    best_map50_95: float | None


class LimitUsed(Result):
    """How much of its tightest limit the best candidate uses.

    Attributes:
        map50_95: Its mAP50-95 on the search split.
        limit: The limit.
        used: What it uses as measured, as a share.
        used_predicted: The same as predicted.
        reserve: By how much its upper bound of latency exceeds the expectation, as a share.
        largest_keeps_it: Whether the largest network of the space keeps the limit.
        larger: What is known of networks that use more.
    """

    map50_95: float
    limit: str
    used: float
    used_predicted: float
    reserve: float
    largest_keeps_it: bool
    larger: Larger


class ScoredStock(Result):
    """Stock with the supernet's weights, and what is predicted of it."""

    map50_95: float
    latency_ms: float
    upper_ms: float
    feasible: bool


class SearchResult(ResultFile):
    """The search as a whole.

    Attributes:
        asked: How much was searched, and for what.
        limits: The limits.
        objective: What was wanted; nothing for the most accurate network.
        counts: Scored networks by source, those on the front, and those measured.
        best_map50_95: The best score within the limits by source; nothing where none is within them.
        comparisons: The search against what it is compared with, by source.
        stock: Stock.
        slack: Of each candidate, the share of its tightest limit that is left unused.
        budget: How much of its limit the best candidate uses.
        missed: Networks that were measured and missed a limit.
        tail: Ratio of each percentile of latency to the median.
        seconds: What the search took.
        seconds_comparing: What of that went to networks that are there for comparison only.
    """

    FILE = "search.json"

    asked: SearchConfig
    limits: tuple[str, ...]
    objective: Objective | None
    counts: Mapping[str, int]
    best_map50_95: Mapping[str, float | None]
    comparisons: Mapping[str, Compared]
    stock: ScoredStock
    slack: tuple[float, ...]
    budget: LimitUsed
    missed: tuple[CandidateResult, ...]
    tail: Mapping[str, float]
    seconds: float
    seconds_comparing: float


class RuleEvidence(Result):
    """The evidence of a latency table for or against a hardware rule.

    Attributes:
        networks: Networks of the table.
        with_option: Those of them that have an option that the rule takes out.
        extra: By how much an option makes a network slower at equal multiply-accumulates, as a share.
        interval: The 95% interval of that.
        verdict: Whether the options were measured to be slow.
    """

    networks: int
    with_option: int
    extra: float
    interval: tuple[float, float]
    verdict: Literal["supports", "undecided", "contradicts"]


class RuleApplied(Result):
    """A hardware rule held against a device and a space; see `search.rules.Applied`.

    Attributes:
        says: The rule in words.
    """

    rule: str
    on: bool
    reason: str
    removed: Mapping[str, tuple[Option, ...]]
    evidence: RuleEvidence | None
    says: str


class OptionCounts(Result):
    """Options of the supernet's space, and of the part that was searched."""

    space: int
    searched: int


class RulesResult(ResultFile):
    """The hardware rules.

    Attributes:
        options: How many options they left.
        rules: The rules; none for a CPU.
    """

    FILE = "rules.json"

    options: OptionCounts
    rules: tuple[RuleApplied, ...]


class Choices(Result):
    """One choice of a space; see `space.space.Dimension`."""

    name: str
    options: tuple[Option, ...]


class PriorStep(Result):
    """The state of the prior after a step.

    Attributes:
        step: Number of the step, from 1.
        loss: Detection loss per image of the network that was drawn.
        expected_ms: Expected latency in ms by the linear part of the latency model.
        penalty: Multiplier of the limit: the share of the loss that a share of latency is worth; 0 while it is kept.
        probabilities: For each dimension those of its options.
    """

    step: int
    loss: float
    expected_ms: float
    penalty: float
    probabilities: tuple[tuple[float, ...], ...]


class PriorResult(ResultFile):
    """The prior that architecture parameters learned before the evolution; see `search.differentiable.Prior`.

    Attributes:
        limit_ms: What the linear part of the latency model could come to; nothing where no limit speaks of latency.
        dimensions: The choices of the space that was searched.
        most_likely: The architecture of the likeliest options.
    """

    FILE = "prior.json"

    limit_ms: float | None
    dimensions: tuple[Choices, ...]
    worth: tuple[tuple[float, ...], ...]
    trajectory: tuple[PriorStep, ...]
    most_likely: Network
