"""The ledger of a dataset: every file, label and box, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from yolov8_nas.runner.results import Tallied, Tallies

Kind = Literal["files", "labels", "boxes"]
_KINDS: Final[tuple[Kind, ...]] = ("files", "labels", "boxes")

WITH_BOXES: Final = "used, with boxes"
BACKGROUND: Final = "used as background: labelled, without boxes"
UNLABELLED: Final = "used as background: without a label file"
COPY: Final = "skipped: copies of another image"
IN_VAL: Final = "skipped: copies of an image of val"
IN_TRAIN: Final = "skipped: without boxes, and copies of an image of train that has some"
HIDDEN: Final = "skipped: hidden files and folders"

NAMED: Final = 10
"""How many are named of what there is more of."""


@dataclass
class Tally:
    """How many ended alike, and the first of them.

    Attributes:
        count: How many.
        examples: Names of the first.
        alarm: Whether a person is to be warned, and of what to do.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)
    alarm: str = ""


class Ledger:
    """What became of every file, label and box, for each split."""

    def __init__(self) -> None:
        self._tallies: dict[str, dict[Kind, dict[str, Tally]]] = {}
        self._seen: dict[str, int] = {}

    def see(self, split: str, count: int) -> None:
        """Note that so many files were seen, each of which has to have an outcome in the end."""
        self._seen[split] = self._seen.get(split, 0) + count

    def add(self, split: str, kind: Kind, outcome: str, name: str = "", count: int = 1, alarm: str = "") -> None:
        """Note what became of something.

        Args:
            split: The split that it belongs to.
            kind: What it is.
            outcome: What became of it.
            name: How messages call it.
            count: How many, where it is several.
            alarm: What to do about it, where a person is to be warned.
        """
        if not count:
            return
        tally = self._tallies.setdefault(split, {}).setdefault(kind, {}).setdefault(outcome, Tally())
        tally.count += count
        tally.alarm = tally.alarm or alarm
        if name and len(tally.examples) < NAMED:
            tally.examples.append(name)

    def count(self, split: str, kind: Kind, outcome: str = "") -> int:
        """How many of a kind there are, or ended so."""
        tallies = self._tallies.get(split, {}).get(kind, {})
        return sum(tally.count for name, tally in tallies.items() if outcome in ("", name))

    def balance(self) -> None:
        """Hold the files that were seen against those that have an outcome."""
        for split, seen in self._seen.items():
            if (counted := self.count(split, "files")) != seen:
                raise AssertionError(f"{split}: {seen} files seen, but {counted} accounted for")

    def warnings(self) -> list[str]:
        """What a person is to be warned of."""
        return [
            f"{split}: {tally.count} of {self.count(split, kind)} {kind} {outcome}{named(tally, ': ')}; {tally.alarm}"
            for split, kinds in self._tallies.items()
            for kind, tallies in kinds.items()
            for outcome, tally in tallies.items()
            if tally.alarm
        ]

    def told(self) -> Tallies:
        """What became of everything, and the names of the first where something was skipped."""
        return {
            split: {
                kind: {
                    outcome: Tallied(count=tally.count, examples=tuple(tally.examples))
                    for outcome, tally in sorted(tallies.items(), key=lambda item: _order(item[0]))
                }
                for kind in _KINDS
                if (tallies := kinds.get(kind))
            }
            for split, kinds in self._tallies.items()
        }


def listed(items: Sequence[str]) -> str:
    """The first of several names, and how many there are more."""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def named(tally: Tally, before: str = "") -> str:
    """The names of what was counted, as far as they are kept."""
    if not tally.examples:
        return ""
    more = f" and {tally.count - len(tally.examples)} more" if tally.count > len(tally.examples) else ""
    return before + ", ".join(tally.examples) + more


def _order(outcome: str) -> tuple[bool, bool, str]:
    return not outcome.startswith("used"), outcome != WITH_BOXES, outcome
