"""How much a search may spend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

MEASURING: Final = 5
"""What measuring a candidate counts in progress; scoring a network counts 1."""

LEARNING: Final = 0.7
"""What a step of the prior counts in progress."""


@dataclass(frozen=True)
class Plan:
    """How much a search may spend.

    Attributes:
        generations: Generations of the evolution.
        population: Networks per generation.
        candidates: Networks handed on, each exported and measured.
        measure_every: Generations between two measurements of the best on the device; 0 where the device is elsewhere
            and each question is a journey: then nothing but the candidates is measured, and they only once.
        prior_steps: Steps in which the architecture parameters learn; 0 for no prior.
        exact: Whether an exact solver proposes networks.
        rescaled: Whether stock is rescaled to the candidates' latencies.
        random: Networks drawn at random within the limits and scored for comparison; `equal` for as many as the search
            scores.
        mac_ranking: Networks with the most multiply-accumulates within the limits, scored for comparison.
        random_seeds: How often these comparisons are made.
        seed: Seed of everything random.
    """

    generations: int = 40
    population: int = 64
    candidates: int = 12
    measure_every: int = 10
    prior_steps: int = 200
    exact: bool = True
    rescaled: bool = True
    random: int | Literal["equal"] = 0
    mac_ranking: int = 0
    random_seeds: int = 1
    seed: int = 0

    @property
    def to_score(self) -> int:
        """Networks that are scored at most."""
        searched = self.generations * self.population
        drawn = searched if self.random == "equal" else self.random
        return int(searched + self.random_seeds * (drawn + self.mac_ranking))

    @property
    def work(self) -> float:
        """All work, in the unit of progress: scoring one network."""
        return LEARNING * self.prior_steps + self.to_score + MEASURING * self.candidates
