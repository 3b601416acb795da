"""Cost as a sum of small tables over the choices of a space.

What a part of a network costs is settled by a few choices: a convolution's by its own width and that of its source; a
C2f block's by its own depth, width, expansion and operator, and, at its entrance, by its hidden width and each source's
width; a branch of the head by its own form, P3's width and that of its level. So every cost that adds up over the
layers of a network (the physical part of its latency, parameters, multiply-accumulates, bytes) is exactly a sum of
tables, each over two to four dimensions:

    cost(x) = constant + sum over t of table_t[x_i, x_j, ...]        with (i, j, ...) the dimensions of table t

Nothing needs to be known of the cost but which choices interact. The tables are its anchored decomposition (Kuo, Sloan,
Wasilkowski & Wozniakowski, On decompositions of multivariate functions, Mathematics of Computation 79, 2010): each one
holds what the cost adds to the tables before it when only its own dimensions leave stock YOLOv8. A few thousand
evaluations tell the cost of all the networks of a space, 1e23 of them for the large ones.

In this form a cost has an exact expectation under independent random choices, which can be differentiated
(`search.differentiable`), and is linear in the indicators of its tables' entries (`search.exact`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from yolov8_nas.measure.latency_model import SOURCES, LatencyModel
from yolov8_nas.space import BLOCKS, Architecture, SearchSpace

if TYPE_CHECKING:
    from torch import Tensor

Floats: TypeAlias = NDArray[np.float64]

_CHECKED: Final = 16
"""Random networks on which new tables are held against the cost itself."""


@dataclass(frozen=True, eq=False)
class Table:
    """Cost by the options of a few dimensions.

    Attributes:
        dimensions: Their indices in the space.
        values: One axis per dimension.
    """

    dimensions: tuple[int, ...]
    values: Floats


@dataclass(frozen=True, eq=False)
class LinearCost:
    """A cost that is a sum of tables; call it with architectures for their costs.

    Attributes:
        space: The space.
        constant: What the tables add to; the cost of the stock network.
        tables: One for each of `interactions(space)`, in their order.
    """

    space: SearchSpace
    constant: float
    tables: tuple[Table, ...]

    @classmethod
    def tabulate(cls, space: SearchSpace, price: Callable[[Sequence[Architecture]], Floats]) -> LinearCost:
        """Tables of any cost that adds up over the layers of a network.

        Args:
            space: The space.
            price: The costs of n networks: (n,).

        Raises:
            ValueError: The cost is not of this form.
        """
        stock = np.array(space.encode(space.stock))
        known = cls(space, float(price([space.stock])[0]), ())
        for dimensions in interactions(space):
            shape = [len(space.dimensions[d].options) for d in dimensions]
            genes = np.tile(stock, (math.prod(shape), 1))
            genes[:, dimensions] = np.indices(shape).reshape(len(shape), -1).T
            networks = [space.decode(row) for row in genes.tolist()]
            values = (price(networks) - known(networks)).reshape(shape)
            known = cls(space, known.constant, (*known.tables, Table(dimensions, values)))
        rng = np.random.default_rng(0)
        networks = [space.sample(rng) for _ in range(_CHECKED)]
        truth = price(networks)
        if np.abs(known(networks) - truth).max() > 1e-6 * np.abs(truth).max():
            raise ValueError("the cost is no sum over the interactions of the space: complete `interactions`")
        return known

    @classmethod
    def of_latency(cls, model: LatencyModel) -> LinearCost:
        """The physical part of a latency model, in ms: its prediction but for the correction, a factor close to one."""
        return cls.tabulate(model.space, model.physical)

    def __call__(self, architectures: Sequence[Architecture]) -> Floats:
        """Costs of n networks: (n,)."""
        genes = np.array([self.space.encode(a) for a in architectures], dtype=np.intp)
        genes = genes.reshape(-1, len(self.space.dimensions))
        total = np.full(len(genes), self.constant)
        for table in self.tables:
            total += table.values[tuple(genes[:, table.dimensions].T)]
        return total

    def expected(self, probabilities: Sequence[Tensor]) -> Tensor:
        """The expectation if the option of every dimension is drawn independently of the others.

        Args:
            probabilities: For each dimension of the space the probabilities of its options: (options,).

        Returns:
            A scalar, exact and differentiable by the probabilities.
        """
        total = probabilities[0].new_tensor(self.constant)
        for table in self.tables:
            value = total.new_tensor(table.values)
            for dimension in reversed(table.dimensions):
                value = value @ probabilities[dimension]
            total = total + value
        return total


def interactions(space: SearchSpace) -> list[tuple[int, ...]]:
    """The sets of dimensions that settle a cost together, none within another; dimensions without a choice left out.

    Every cost that adds up over layers is a sum of functions of these sets.
    """
    index = {dimension.name: i for i, dimension in enumerate(space.dimensions)}
    choice = {i for i, dimension in enumerate(space.dimensions) if len(dimension.options) > 1}
    groups = [tuple(index[name] for name in names if index[name] in choice) for names in _groups()]
    return [group for group in dict.fromkeys(groups) if group and not any(set(group) < set(other) for other in groups)]


def _groups() -> Iterator[tuple[str, ...]]:
    """The same by name, for each part of a network, whether or not there is a choice."""
    for part, sources in SOURCES.items():
        widths = [f"{source}.width" if source in (*BLOCKS, "sppf") else source for source in sources]
        if part in BLOCKS:
            width, expansion = f"{part}.width", f"{part}.expansion"
            yield f"{part}.depth", width, expansion, f"{part}.operator"
            # The entrance: two 1x1 convolutions of the hidden width, linear in the channels of each source.
            yield from ((width, expansion, source) for source in widths)
        elif part == "sppf":
            # Its hidden width, on which it pools, is half of its input.
            yield from (("sppf.width", *widths), ("sppf.kernel", *widths))
        elif part == "detect":
            # Its hidden widths follow P3, that of the box branch its bins as well.
            yield from (("detect.reg_max", widths[0], level) for level in widths[1:])
            yield from (("detect.classes", widths[0], level) for level in widths[1:])
        else:
            yield part, *widths
