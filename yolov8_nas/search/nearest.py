"""The network of a space that misses the limits least."""

from __future__ import annotations

from collections.abc import Iterator

from yolov8_nas.search.objective import CostModel
from yolov8_nas.space import Architecture, SearchSpace


def closest_predicted(costs: CostModel, space: SearchSpace, start: Architecture) -> Architecture:
    """The network of a space that misses the limits least by prediction, as far as coordinate descent finds it.

    Args:
        costs: Predicts costs and holds the limits.
        space: The space.
        start: The network to start from.
    """
    best, missed = start, float(costs([start]).worst[0])
    while True:
        neighbours = list(_neighbours(space, best))
        worst = costs(neighbours).worst
        if worst.min() >= missed:
            return best
        best, missed = neighbours[int(worst.argmin())], float(worst.min())


def _neighbours(space: SearchSpace, architecture: Architecture) -> Iterator[Architecture]:
    """The networks with one gene changed."""
    genes = list(space.encode(architecture))
    for i, dimension in enumerate(space.dimensions):
        for option in range(len(dimension.options)):
            if option != genes[i]:
                yield space.decode([*genes[:i], option, *genes[i + 1 :]])
