"""The best architecture within hard limits, by an integer program.

Every option of every dimension has a utility, what it is expected to be worth; the utility of a network is the sum over
its options. The network that has the most of it within all limits is a knapsack problem with tables, since each cost
is a sum of tables (`search.linear_cost`). An indicator x says which option a dimension has, an indicator y which entry
a table has; each y is tied to the x of its dimensions by its margins (the local polytope of Wainwright and Jordan,
Graphical Models, Exponential Families, and Variational Inference, 2008). HiGHS (Huangfu and Hall, Parallelizing the
Dual Revised Simplex Method, 2018) solves the program.

Parameters, FLOPs and memory are exact in this form. A predicted latency or energy is a physical part P, which has this
form, times a correction, which has not:

    log(prediction / limit) = log P(x) + A(x) + S(x) - log(limit)       P, A: sums of tables; |S| <= `curvature`

Such a limit has a row that no network within it breaks: log P is replaced by its chord, which lies below it, and S by
its lower end. The optimum of this relaxed program is an upper bound, and the solution where the full model agrees.
Where it does not, the network is excluded (a no-good cut), and the program is solved with the logarithm to first order
at that network as a further row, again and again from where the last solution lies, as long as utility grows: this
finds good networks in a few steps. Then the relaxed program is asked once more, for the next bound.

What is guaranteed: every answer keeps all limits under the full model. It is proven to be the best (to a millionth of
the utilities' range) where the relaxed program has nothing better left, which it has in the end, when it has enumerated
all that is better. With a strong correction this can take long, so after some cuts the best network so far is given
without a proof, but with the bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from yolov8_nas.errors import StageError
from yolov8_nas.measure.latency_model import LatencyModel
from yolov8_nas.search.linear_cost import Floats, LinearCost, interactions
from yolov8_nas.search.objective import CostModel
from yolov8_nas.space import Architecture, SearchSpace
from yolov8_nas.space.cost import Cost, cost
from yolov8_nas.space.limits import Constraint

CUTS: Final = 10
"""Networks that are excluded at most for each solution, before it is given without a proof."""

_TOLERANCE: Final = 1e-6
"""Share of the utilities' range by which a network must be better to count as better; HiGHS' own precision."""

_OPTIMAL, _INFEASIBLE = 0, 2  # of scipy's `milp`


@dataclass(frozen=True)
class Solution:
    """The best architecture that was found.

    Attributes:
        architecture: It keeps all limits under the full cost model.
        utility: The sum of its options' utilities.
        bound: What no network within the limits exceeds.
        cuts: Networks that were excluded on the way, because the full cost model found them to miss a limit.
        proven: Whether no network within the limits has a higher utility.
    """

    architecture: Architecture
    utility: float
    bound: float
    cuts: int
    proven: bool


def solve(
    space: SearchSpace,
    utility: Sequence[Sequence[float]],
    costs: CostModel,
    linear: LinearCost,
    *,
    solutions: int = 1,
    distance: int = 1,
    cuts: int = CUTS,
) -> list[Solution]:
    """The architectures with the highest utility among those that keep all limits.

    Args:
        space: The search space.
        utility: For each dimension the utilities of its options, all finite.
        costs: What networks cost, and the limits.
        linear: `LinearCost.of_latency(costs.latency)`.
        solutions: How many architectures are wanted; there are fewer where fewer were found.
        distance: In how many dimensions they differ from each other at least.
        cuts: Networks that are excluded at most for each solution, before it is given without a proof.

    Returns:
        The best one first; of those after it, `bound` and `proven` speak of what is left at this distance.

    Raises:
        StageError: No architecture was found that keeps the limits; the message names the limit, or the pair, that
            binds.
    """
    program = _Program(space, utility)
    rows = list(_rows(program, costs, linear))
    found: list[Solution] = []
    while len(found) < solutions:
        solution = _solve(program, rows, costs, cuts)
        if solution is None:
            break
        found.append(solution)
        program.exclude(solution.architecture, distance)
    if not found:
        raise StageError(_conflict(program, rows, costs))
    return found


@dataclass(frozen=True, eq=False)
class _Form:
    """A linear form of the program's variables: `weights @ variables + constant`."""

    weights: Floats
    constant: float

    def __add__(self, other: _Form) -> _Form:
        return _Form(self.weights + other.weights, self.constant + other.constant)

    def affine(self, slope: float, shift: float) -> _Form:
        """`slope * self + shift`."""
        return _Form(slope * self.weights, slope * self.constant + shift)


@dataclass(frozen=True, eq=False)
class _Row:
    """A limit in the program.

    Attributes:
        index: Which of the cost model's limits it is.
        limit: The limit.
        form: At most 0 for every network that keeps the limit.
        near: The same to first order at a network; nothing where the form is exact.
    """

    index: int
    limit: Constraint
    form: _Form
    near: Callable[[Architecture], _Form] | None = None


def _solve(program: _Program, rows: Sequence[_Row], costs: CostModel, cuts: int) -> Solution | None:
    """The best architecture that is not excluded yet; see the module."""
    relaxed = [row.form for row in rows]
    near: list[_Form] = []
    best: Architecture | None = None
    bound, excluded, proven = program.most, 0, False
    while not proven and excluded <= cuts:
        found = program.best([*relaxed, *near])
        if found is None or (best and program.utility(found) <= program.utility(best) + program.tolerance):
            proven, near = not near, []  # nothing better near the last network, or nowhere
            continue
        if not near:
            bound = program.utility(found)
        if costs([found]).feasible[0]:
            best, proven, near = found, not near, []
        else:
            program.exclude(found)
            excluded += 1
        near = near + [row.near(found) for row in rows if row.near]
    if best is None:  # in the time given, nothing good keeps the limits: then whatever misses one of them by least
        nearest = (_nearest(program, row, rows) for row in rows)
        best = next((network for network in nearest if network and costs([network]).feasible[0]), None)
    if best is None:
        return None
    return Solution(best, program.utility(best), program.utility(best) if proven else bound, excluded, proven)


class _Program:
    """The integer program of a space.

    Variables are the indicators of all options, and then those of all entries of all tables.

    Args:
        space: The space.
        utility: For each dimension the utilities of its options.
    """

    def __init__(self, space: SearchSpace, utility: Sequence[Sequence[float]]) -> None:
        self.space = space
        self.utilities = [np.array(values, dtype=float) for values in utility]
        self.most = float(sum(values.max() for values in self.utilities))
        options = [len(dimension.options) for dimension in space.dimensions]
        self._tables = [(table, [options[d] for d in table]) for table in interactions(space)]
        self._first = np.cumsum([0, *options, *(math.prod(shape) for _, shape in self._tables)])
        self._indicators = sum(options)
        self._margins = self._equations()
        span = float(sum(np.ptp(values) for values in self.utilities)) or 1.0
        self.tolerance = _TOLERANCE * span
        loss = np.concatenate([values.max() - values for values in self.utilities]) / span
        self._loss = _Form(np.pad(loss, (0, self._first[-1] - self._indicators)), 0.0)
        self._cuts: list[_Form] = []

    def form(self, cost: LinearCost) -> _Form:
        """A cost of the space."""
        entries = [table.values.ravel() for table in cost.tables]
        return _Form(np.concatenate([np.zeros(self._indicators), *entries]), cost.constant)

    def value(self, form: _Form, architecture: Architecture) -> float:
        """The form for an architecture."""
        return float(form.weights @ self._point(architecture)) + form.constant

    def utility(self, architecture: Architecture) -> float:
        """The sum of an architecture's utilities."""
        genes = self.space.encode(architecture)
        return float(sum(values[gene] for values, gene in zip(self.utilities, genes, strict=True)))

    def exclude(self, architecture: Architecture, distance: int = 1) -> None:
        """Allow only architectures that differ from this one in so many dimensions."""
        same = self._point(architecture)
        same[self._indicators :] = 0
        self._cuts.append(_Form(same, float(distance - len(self.utilities))))

    def best(self, at_most_zero: Sequence[_Form]) -> Architecture | None:
        """The architecture of the highest utility for which no form is above 0."""
        return self.least(self._loss, at_most_zero)

    def least(self, form: _Form, at_most_zero: Sequence[_Form] = ()) -> Architecture | None:
        """The architecture for which `form` is least and no other form is above 0."""
        variables = self._minimise(form, [*at_most_zero, *self._cuts], integral=True)
        if variables is None:
            return None
        ends = itertools.pairwise(self._first[: len(self.utilities) + 1])
        return self.space.decode([int(variables[start:end].argmax()) for start, end in ends])

    def extent(self, form: _Form) -> tuple[float, float]:
        """Bounds of a form over the space, by linear programs."""
        ends = []
        for sign in (1.0, -1.0):
            variables = self._minimise(form.affine(sign, 0.0), (), integral=False)
            assert variables is not None
            ends.append(float(form.weights @ variables) + form.constant)
        return ends[0], ends[1]

    def _minimise(self, form: _Form, at_most_zero: Sequence[_Form], *, integral: bool) -> Floats | None:
        constraints = [self._margins]
        if at_most_zero:
            matrix = csr_array(np.stack([row.weights for row in at_most_zero]))
            constraints.append(LinearConstraint(matrix, ub=[-row.constant for row in at_most_zero]))
        result = milp(
            form.weights,
            integrality=np.arange(len(form.weights)) < self._indicators * integral,  # the y follow the x
            bounds=Bounds(0, 1),
            constraints=constraints,
            # HiGHS 1.14 can lose the optimum in presolve (its issues 3073 and 3094); here presolve saves no time.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.status not in (_OPTIMAL, _INFEASIBLE):
            raise RuntimeError(f"HiGHS gave up: {result.message}")
        return result.x  # type: ignore[no-any-return]

    def _equations(self) -> LinearConstraint:
        """One option per dimension; and the entries of a table that have an option add up to the option's indicator."""
        columns, values, right = [], [], []
        dimensions = len(self.utilities)
        for start, end in itertools.pairwise(self._first[: dimensions + 1]):
            columns.append(np.arange(start, end))
            values.append(np.ones(end - start))
            right.append(1.0)
        for start, (table, shape) in zip(self._first[dimensions:], self._tables, strict=False):
            entries = start + np.arange(math.prod(shape)).reshape(shape)
            for axis, dimension in enumerate(table):
                for option in range(shape[axis]):
                    summed = entries.take(option, axis).ravel()
                    columns.append(np.append(summed, self._first[dimension] + option))
                    values.append(np.append(np.ones(len(summed)), -1.0))
                    right.append(0.0)
        lengths = np.cumsum([0, *map(len, columns)])
        matrix = csr_array((np.concatenate(values), np.concatenate(columns), lengths), (len(right), self._first[-1]))
        return LinearConstraint(matrix, right, right)

    def _point(self, architecture: Architecture) -> Floats:
        """All variables of an architecture."""
        genes = self.space.encode(architecture)
        entries = [np.ravel_multi_index([genes[d] for d in table], shape) for table, shape in self._tables]
        point = np.zeros(self._first[-1])
        point[self._first[:-1] + np.array([*genes, *entries])] = 1
        return point


def _rows(program: _Program, costs: CostModel, linear: LinearCost) -> Iterator[_Row]:
    """The rows of those limits whose values can be predicted."""
    latency = _Prediction(program, costs.latency, linear)
    energy = costs.energy and _Prediction(program, costs.energy, LinearCost.of_latency(costs.energy))

    def paper(price: Callable[[Sequence[Cost]], Floats], limit: Constraint) -> _Form:
        def of(architectures: Sequence[Architecture]) -> Floats:
            return price([cost(a, costs.num_classes, costs.imgsz) for a in architectures])

        return program.form(LinearCost.tabulate(program.space, of)).affine(1 / limit.limit, -1.0)

    for index, limit in enumerate(costs.limits):
        match limit.metric:
            case "latency" | "throughput":
                allowed = limit.limit if limit.metric == "latency" else 1000 * costs.batch / limit.limit
                allowed -= costs.nms_ms[limit.statistic] if limit.scope == "with_nms" else 0.0
                if not math.isnan(allowed):
                    yield latency.row(index, limit, allowed / costs.tail[limit.statistic])
            case "energy" if energy:
                yield energy.row(index, limit, limit.limit)
            case "power" if energy:
                yield _power(index, limit, energy, latency, costs.batch)
            case "memory" if costs.memory:
                yield _Row(index, limit, paper(costs.memory.upper, limit))
            case "params":
                yield _Row(index, limit, paper(lambda known: np.array([c.params / 1e6 for c in known]), limit))
            case "flops":
                yield _Row(index, limit, paper(lambda known: np.array([c.gflops for c in known]), limit))


class _Prediction:
    """A predicted latency or energy in the program.

    Args:
        program: The program.
        model: What predicts.
        physical: Tables of its physical part.
    """

    def __init__(self, program: _Program, model: LatencyModel, physical: LinearCost) -> None:
        self.program = program
        self.model = model
        self.physical = program.form(physical)
        self.linear = program.form(LinearCost.tabulate(model.space, model.linear_correction))
        self.sizes = program.extent(self.physical)
        lowest, highest = program.extent(self.linear)
        self.corrections = lowest - model.curvature, highest + model.curvature

    def row(self, index: int, limit: Constraint, allowed: float) -> _Row:
        """The row of a limit on the prediction.

        The chord of log P spans those P for which the correction decides. Networks below them keep the limit in any
        case, and those above never; the chord, which there lies above log P, judges both so.
        """
        allowed = max(allowed, 1e-9)  # beside a constant nothing can be left of a limit
        lowest, highest = self.corrections
        low, high = np.clip([allowed * math.exp(-highest), allowed * math.exp(-lowest)], *self.sizes)
        slope = math.log(high / low) / (high - low) if high > low else 1 / low
        chord = self.physical.affine(slope, math.log(low) - slope * low)
        form = (chord + self.linear).affine(1.0, -math.log(allowed) - self.model.curvature)
        return _Row(index, limit, form, lambda at: self.tangent(at).affine(1.0, -math.log(allowed)))

    def tangent(self, at: Architecture) -> _Form:
        """The logarithm of the prediction to first order at a network."""
        return self.program.form(
            LinearCost.tabulate(self.model.space, lambda networks: self.model.tangent(at, networks))
        )


def _power(index: int, limit: Constraint, energy: _Prediction, latency: _Prediction, batch: int) -> _Row:
    """The row of a limit on power, energy over latency: to first order only, and left open in the relaxed program."""
    allowed = limit.limit / batch  # in mJ per image and ms

    def near(at: Architecture) -> _Form:
        return energy.tangent(at).affine(1.0, -math.log(allowed)) + latency.tangent(at).affine(-1.0, 0.0)

    return _Row(index, limit, energy.physical.affine(0.0, 0.0), near)


def _nearest(program: _Program, row: _Row, others: Sequence[_Row]) -> Architecture | None:
    """A network that misses a limit by least, or keeps it by most, among those that may keep others."""
    network: Architecture | None = program.space.stock
    for _ in range(3):
        form = row.near(network) if network and row.near else row.form
        network = program.least(form, [other.form for other in others])
    return network


def _conflict(program: _Program, rows: Sequence[_Row], costs: CostModel) -> str:
    """Which limit, or which pair, no network keeps; otherwise that none was found that keeps all of them."""
    missed = f"no network of space {program.space.name!r} was found that is predicted to keep"
    remedy = "loosen a limit, or take a smaller space or input size"
    for row in rows:
        network = _nearest(program, row, ())
        estimate = network and costs([network])
        if estimate and estimate.violation[0, row.index] > 0:
            return f"{missed} {row.limit} (nearest: {estimate.values[0, row.index]:.4g} {row.limit.unit}): {remedy}"
    for row, other in itertools.permutations(rows, 2):
        network = _nearest(program, row, [other])
        estimate = network and costs([network])
        if estimate and estimate.violation[0, row.index] > 0:
            return (
                f"{missed} both {row.limit} and {other.limit} (nearest to the first, of those that may keep the "
                f"second: {estimate.values[0, row.index]:.4g} {row.limit.unit}): {remedy}"
            )
    return f"{missed} {' and '.join(str(limit) for limit in costs.limits)}: {remedy}"
