"""Stock YOLOv8 with its width rescaled to the latency of what a search has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from yolov8_nas.measure.benchmark import Measurement
from yolov8_nas.runner.results import RescaledStock
from yolov8_nas.search.baseline import TOLERANCE, rescaled_stock
from yolov8_nas.search.candidates import Candidate
from yolov8_nas.space import Architecture

RESCALINGS: Final = 4
"""Rescaled stock networks that are measured at most until one is as fast as a candidate."""


@dataclass(frozen=True)
class Rescaled:
    """Stock with its width rescaled to the latency of a candidate, both measured in the same rounds.

    Attributes:
        architecture: The rescaled network.
        candidate: The candidate that it is as fast as.
        latency_ms: Its median latency.
        candidate_ms: The candidate's, in the same rounds.
    """

    architecture: Architecture
    candidate: Architecture
    latency_ms: float
    candidate_ms: float

    def to_result(self) -> RescaledStock:
        """The network as a part of the stage's result."""
        return RescaledStock(
            architecture=self.architecture,
            candidate=self.candidate.digest,
            latency_ms=self.latency_ms,
            candidate_ms=self.candidate_ms,
        )


@dataclass(frozen=True)
class Rescaling:
    """Finds rescaled stock networks.

    Attributes:
        scale: Size of stock.
        price: Median latency of a network in milliseconds, as predicted.
        measure: Measures networks in the same rounds, and remembers what it found under the name.
    """

    scale: str
    price: Callable[[Architecture], float]
    measure: Callable[[Sequence[Architecture], str], list[Measurement]]

    def to_each(self, met: Sequence[Candidate]) -> list[Rescaled]:
        """Stock rescaled to the latency of each candidate.

        The latency model knows the space's networks, and rescaled ones need not be among them. So what its prediction
        was wrong by is taken off, and a few networks are tried until one is near. One network serves all candidates
        within `TOLERANCE` of its latency.
        """
        levels: list[tuple[float, Rescaled]] = []  # latency in the rounds in which candidates were measured
        rescaled: list[Rescaled] = []
        for number, candidate in enumerate(met):
            own_ms = candidate.measurement.latency_ms.p50
            like = [(ms, known) for ms, known in levels if abs(ms / own_ms - 1) <= TOLERANCE]
            if like:
                ms, known = like[0]
                architecture = candidate.trial.architecture
                rescaled.append(replace(known, candidate=architecture, latency_ms=ms, candidate_ms=own_ms))
            else:
                made = self.to(candidate.trial.architecture, own_ms, f"rescaled-{number}")
                levels.append((own_ms * made.latency_ms / made.candidate_ms, made))
                rescaled.append(made)
        return rescaled

    def to(self, candidate: Architecture, own_ms: float, name: str) -> Rescaled:
        """Stock rescaled to the latency of one candidate, both measured in the same rounds.

        Args:
            candidate: The candidate.
            own_ms: Its median latency in milliseconds, as measured before.
            name: Of the measurements, under which they are kept.
        """
        tried: dict[Architecture, tuple[float, float]] = {}  # its latency and the candidate's
        correction = self.price(candidate) / own_ms
        for attempt in range(RESCALINGS):
            network = rescaled_stock(self.scale, self.price, correction * own_ms)
            if network in tried:
                break
            if network == candidate:  # it is rescaled stock itself
                return Rescaled(network, candidate, own_ms, own_ms)
            rival, own = self.measure([network, candidate], f"{name}-{attempt}")
            tried[network] = rival.latency_ms.p50, own.latency_ms.p50
            if abs(tried[network][0] / tried[network][1] - 1) <= TOLERANCE:
                break
            correction = self.price(network) / tried[network][0]
        nearest = min(tried, key=lambda network: abs(tried[network][0] / tried[network][1] - 1))
        return Rescaled(nearest, candidate, *tried[nearest])
