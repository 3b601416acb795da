"""What ships against stock."""

from __future__ import annotations

from collections.abc import Sequence

from yolov8_nas.deploy.files import Scored
from yolov8_nas.evaluation import TYPICAL_SPREAD, TrainingSpread, compare
from yolov8_nas.power import power_of
from yolov8_nas.runner.results import (
    AgainstStock,
    Difference,
    FinetuneResult,
    Rival,
    Spread,
)


def against_stock(
    shipped: Scored,
    stock: Sequence[Scored],
    ours: Sequence[Scored],
    tuned: FinetuneResult,
    subject: str = "The shipped network",
) -> tuple[AgainstStock, ...]:
    """The shipped file against stock: in its own precision first, then FP32 against FP32.

    Args:
        shipped: The file that ships.
        stock: Stock's files.
        ours: The candidates' files.
        tuned: What qat-finetune tells, of repeated trainings among it.
        subject: The file that ships, in words.
    """
    pairs = [(shipped, file) for file in stock]
    if shipped.precision != "fp32":
        own = [f for f in ours if f.candidate == shipped.candidate and f.precision == "fp32"]
        pairs += [(fp32, file) for fp32 in own for file in stock if file.precision == "fp32"]
    spread = _spread(tuned)
    return tuple(
        _against(first, second, spread, subject if first is shipped else f"In {first.precision.upper()} the network")
        for first, second in pairs
    )


def _against(first: Scored, second: Scored, spread: TrainingSpread, subject: str) -> AgainstStock:
    assert isinstance(second.row, Rival)
    told = Difference.of(compare(first.val, second.val, spread=spread))
    undecided = told.word == "undecided"
    return AgainstStock(
        **dict(told),
        trainings=Spread.of(spread),
        subject=subject,
        what=f"mAP50-95 on val, {first.precision.upper()} against {second.precision.upper()}, "
        f"as exported; 95% interval over images and trainings, whose standard deviation from seed to seed is "
        f"taken as {100 * spread.sd:.1f} points, from {spread.source}",
        against=f"{second.row.name} ({second.precision.upper()})",
        decided_by=power_of(first.val, second.val, spread=spread) if undecided else None,
    )


def _spread(summary: FinetuneResult) -> TrainingSpread:
    """How far apart trainings of one network lie: what is typical, and what this run's own repeated ones tell."""
    groups: dict[str, list[float]] = {}
    for rival in (summary.baseline, summary.rescaled):
        for row in rival.halving.ranking if rival else ():
            if rival and len(row.scores) == len(rival.halving.rungs):
                groups.setdefault(row.architecture.digest, []).append(row.scores[-1])
    return TYPICAL_SPREAD.updated(list(groups.values()), "this run's own repeated trainings of stock")
