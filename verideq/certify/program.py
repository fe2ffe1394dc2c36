"""A network over a region as a mixed-integer linear program, and its relaxation as a linear one, for SciPy's HiGHS.

The columns are the inputs and what every ReLU and equilibrium gives; all affine operations between them are multiplied
out. With ``z = relu(P)``, ``P = (W z + v) / δ`` in ``[l, h]``, and ``r = z - W z - v``, which is ``δ (z - P)``,

    r >= 0,   r <= max(0, -δ l) (1 - a),   z <= h a,   a in {0, 1}

is the unit itself; ``a`` is there only where ``l < 0 < h``. With ``a`` anywhere in ``[0, 1]`` it is the triangle of
the linear dual (`verideq.certify.backward`), and the shadow prices of ``r`` are the multipliers ``g`` for which that
dual is best. A part of the region in which no unit is unstable needs no ``a``: there the relaxation is exact.

The sphere of an l2 ball is cut by tangents, coordinate by coordinate: with columns ``t_j >= y_j²`` and ``Σ t_j <= 1``,
every solution adds the parabolas' tangents at its own ``y`` (Vielma et al., *Extended formulations in mixed
integer conic quadratic programming*, 2017), until it is in the ball.

What HiGHS says is true to its tolerances, about 1e-6 of what a row can do, and only if HiGHS has no bug. **It is no
proof**; nothing here is believed by what certifies.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds as Ends
from scipy.optimize import LinearConstraint, linprog, milp
from torch import Tensor, nn

from verideq.certify.backward import PULLS, Scene
from verideq.errors import InputError
from verideq.graph import INPUT

Numbers = NDArray[np.float64]

CELLS = 2**24
"""Coefficients of one value that are held at a time: what bounds the memory."""
TANGENTS = 30
"""Rounds of tangents of a sphere."""
OUTSIDE = 2e-6
"""How far a solution may be below a parabola: what HiGHS does not see any more."""
FINEST = 1e-12
"""A row's largest coefficient is not taken for its scale where it is smaller than this share of what cancels in it."""


class Outcome(StrEnum):
    """How a program ended."""

    OPTIMAL = "solved to optimality"
    LATE = "not solved in the time that there was"
    EMPTY = "no input satisfies it"
    FAILED = "HiGHS ended without an answer"
    TOO_LARGE = "too large to be solved"


@dataclass(frozen=True)
class Answer:
    """What HiGHS says about the least value of a row.

    Args:
        outcome: how it ended.
        least: below this it is not, says HiGHS; ``-inf`` where it says nothing.
        point: (*features) where the row is least, as far as it knows.
        multipliers: of a relaxation, by node, (*state).
    """

    outcome: Outcome
    least: float = -math.inf
    point: Tensor | None = None
    multipliers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Affine:
    """``matrix @ columns + constant``: what an affine operation gives, flattened; `matrix` (size, columns)."""

    matrix: Any
    constant: Numbers


@dataclass(frozen=True)
class Encoding:
    """What stands in the program of a network whatever the region.

    Args:
        columns: of the inputs and of every node that is not affine, by name; of what a deployed solver adds to an
            equilibrium, by name and ``+``.
        residuals: ``r = z - W z - v`` of every ReLU and equilibrium.
        pools: of every maximum, what it is taken of, and which of that each output sees, (outputs, inputs).
        output: of the network.
    """

    columns: Mapping[str, slice]
    residuals: Mapping[str, Affine]
    pools: Mapping[str, tuple[Affine, Any]]
    output: Affine

    @property
    def size(self) -> int:
        """The number of columns."""
        return _stop(self.columns)


def _stop(columns: Mapping[str, slice]) -> int:
    return max(int(place.stop) for place in columns.values())


def columns_of(scene: Scene) -> dict[str, slice]:
    """A place for every number that a program has to find."""
    names = [INPUT]
    for node in scene.graph.nodes:
        if node.name in scene.relaxed:
            names += [node.name] + ([f"{node.name}+"] if scene.relaxed[node.name].drift is not None else [])
        elif node.operation.kind == "max_pool2d":
            names.append(node.name)
    places, stop = {}, 0
    for name in names:
        start, stop = stop, stop + scene.values[name.removesuffix("+")].lower[0].numel()
        places[name] = slice(start, stop)
    return places


def cells(scene: Scene) -> int:
    """The coefficients of the largest value."""
    return _stop(columns_of(scene)) * max(box.lower[0].numel() for box in scene.values.values())


def fits(scene: Scene) -> bool:
    """Whether the coefficients of every value can be held at once."""
    return cells(scene) <= CELLS


@torch.no_grad()
def encode(scene: Scene) -> Encoding:
    """Multiply out what is affine between the inputs and every node that is not.

    Raises:
        InputError: an operation that is neither affine nor made of maxima, or another activation than ReLU.
    """
    for name, relaxed in scene.relaxed.items():
        if relaxed.ceiling < math.inf:
            raise InputError(f"{name}: the integer program is for ReLU; use --method adjoint-refined")
    columns = columns_of(scene)
    count = _stop(columns)
    device = scene.values[INPUT].lower.device

    def own(name: str, shape: torch.Size) -> Tensor:
        matrix = torch.zeros(count, shape.numel(), dtype=torch.float64, device=device)
        matrix[columns[name]].fill_diagonal_(1)
        return matrix.view(count, *shape)

    def frozen(matrix: Tensor, constant: Tensor) -> Affine:
        return Affine(sparse.csr_array(matrix.flatten(1).T.cpu().numpy()), constant.flatten().cpu().numpy())

    shapes = {name: box.lower.shape[1:] for name, box in scene.values.items()}
    known = {INPUT: (own(INPUT, shapes[INPUT]), torch.zeros(1, *shapes[INPUT], dtype=torch.float64, device=device))}
    residuals, pools = {}, {}
    for node in scene.graph.nodes:
        name, module, (matrix, constant) = node.name, node.module, known[node.inputs[0]]
        kind, shape = node.operation.kind, shapes[node.name]
        nothing = torch.zeros(1, *shape, dtype=torch.float64, device=device)
        if name in scene.relaxed:
            operator, z = scene.relaxed[name].operator, own(name, shape)
            residuals[name] = frozen(z - (0 if operator is None else operator.apply(z)) - matrix, -constant)
            known[name] = (z if f"{name}+" not in columns else z + own(f"{name}+", shape)), nothing
        elif kind == "max_pool2d":
            size = math.prod(matrix.shape[1:])
            seen = module(torch.eye(size, dtype=torch.float64, device=device).view(size, *matrix.shape[1:])) > 0
            pools[name] = frozen(matrix, constant), seen.flatten(1).T.cpu().numpy()
            known[name] = own(name, shape), nothing
        elif kind == "add":
            other = known[node.inputs[1]]
            known[name] = matrix + other[0], constant + other[1]
        elif kind in PULLS:
            known[name] = linear_part(module, matrix), module(constant)
        else:
            raise InputError(
                f"{name}: no integer program is known for a {kind}; use --method branch-and-bound, which bounds it"
            )
    return Encoding(columns, residuals, pools, frozen(*known[scene.output]))


def linear_part(module: nn.Module, x: Tensor) -> Tensor:
    """``A x`` of an affine map ``A x + b``: its derivative, without the rounding of a difference."""
    with torch.enable_grad():
        start = torch.zeros_like(x, requires_grad=True)
        y = module(start)
        row = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, start, row, create_graph=True)
        return torch.autograd.grad(pulled, row, x)[0]


@dataclass(frozen=True)
class Rows:
    """Inequalities ``matrix @ columns >= least``.

    Args:
        node: whose residuals they are about; empty for none.
        units: of the node, one a row.
        share: of the residual in each row.
    """

    matrix: Any
    least: Numbers
    node: str
    units: NDArray[np.intp]
    share: Numbers


class Program:
    """The program of one sample.

    Every column is a share, from 0 to 1, of the range of what it stands for: tolerances are in these units.

    Args:
        encoding: of the network.
        scene: what is known of its values.
        place: of the sample in it.
        integer: whether units are exact, or triangles; without, a maximum is anything in its box, as for the dual.
    """

    def __init__(self, encoding: Encoding, scene: Scene, place: int, *, integer: bool) -> None:
        self.encoding, self.scene, self.place, self.integer = encoding, scene, place, integer
        self.offset, upper = np.zeros(encoding.size), np.zeros(encoding.size)
        for name, columns in encoding.columns.items():
            self.offset[columns], upper[columns] = self._ends(name)
        self.scale = np.maximum(upper - self.offset, 0.0)
        self.options = {name: self._options(name) for name in encoding.pools} if integer else {}
        self.unstable = {name: self._flat(scene.relaxed[name].unstable).nonzero()[0] for name in encoding.residuals}
        counts = [len(units) for units in self.unstable.values()] + [len(seen) for seen, _ in self.options.values()]
        self.binaries = sum(counts)
        region = scene.region
        self.ball = region is not None and region.norm == "l2" and region.radii[place] > 0
        self.inputs = encoding.columns[INPUT].stop
        self.width = encoding.size + self.binaries + (self.inputs if self.ball else 0)
        firsts = iter(encoding.size + np.concatenate(([0], np.cumsum(counts, dtype=np.intp))))
        self.rows: list[Rows] = []
        for name in encoding.residuals:
            self._add_units(name, next(firsts))
        for name in self.options:
            self._add_maxima(name, next(firsts))
        if self.ball:
            self._add_ball()

    def _flat(self, x: Tensor) -> NDArray[Any]:
        """A sample's own numbers."""
        flat: NDArray[Any] = x[min(self.place, len(x) - 1)].flatten().cpu().numpy()
        return flat

    def _ends(self, name: str) -> tuple[Numbers, Numbers]:
        """Lower and upper ends of what some columns stand for."""
        relaxed = self.scene.relaxed.get(name.removesuffix("+"))
        if relaxed is None:
            box = self.scene.values[name]
        elif name.endswith("+") and relaxed.drift is not None:
            return self._flat(-relaxed.drift), self._flat(relaxed.drift)
        else:
            box = relaxed.z
        return self._flat(box.lower), self._flat(box.upper)

    def _scaled(self, value: Affine) -> tuple[Any, Numbers]:
        """A value in the units of the columns: a matrix (size, width), and what it is where all of them are 0."""
        matrix = value.matrix @ sparse.diags_array(self.scale)
        wide = sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(len(value.constant), self.width))
        return wide, value.matrix @ self.offset + value.constant

    def _at(self, columns: NDArray[np.intp], values: Numbers | float) -> Any:
        """A matrix with one entry a row."""
        count = len(columns)
        data = np.broadcast_to(np.asarray(values, dtype=np.float64), (count,))
        return sparse.csr_array((data, (np.arange(count), columns)), shape=(count, self.width))

    def _add(
        self, matrix: Any, least: Numbers, node: str = "", units: NDArray[np.intp] | None = None, sign: int = 0
    ) -> None:
        """Add rows, each divided by its largest coefficient; see `Rows`."""
        size = abs(matrix).max(axis=1).toarray() if matrix.shape[0] else np.zeros(0)
        size = np.maximum(size, FINEST * np.abs(least))
        size = np.where(size > 0, size, 1.0)
        units = np.zeros(0, dtype=np.intp) if units is None else units
        scaled = sparse.csr_array(sparse.diags_array(1 / size) @ matrix)
        self.rows.append(Rows(scaled, least / size, node, units, sign / size))

    def _add_units(self, name: str, first: int) -> None:
        """The ReLUs of a node."""
        matrix, constant = self._scaled(self.encoding.residuals[name])
        known, units = self.scene.relaxed[name], np.arange(len(constant))
        self._add(matrix, -constant, name, units, 1)
        on, unstable = self._flat(known.pre.upper > 0).nonzero()[0], self.unstable[name]
        divisor = known.divisor().expand(1, *known.pre.lower.shape[1:])
        room = np.zeros(len(constant))
        room[unstable] = (self._flat(divisor) * -self._flat(known.pre.lower))[unstable]
        own = np.zeros(len(constant), dtype=np.intp)
        own[unstable] = first + np.arange(len(unstable))
        self._add(self._at(own, -room)[on] - matrix[on], (constant - room)[on], name, on, -1)
        # At most what P can be, and nothing where the unit is off.
        columns = self.encoding.columns[name].start + unstable
        most = np.minimum(self._flat(known.pre.upper)[unstable], (self.offset + self.scale)[columns])
        self._add(self._at(own[unstable], most) - self._at(columns, self.scale[columns]), self.offset[columns])

    def _options(self, name: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Which inputs each output of a maximum may be: the places of both, in pairs."""
        _, seen = self.encoding.pools[name]
        (source,) = next(node for node in self.scene.graph.nodes if node.name == name).inputs
        box = self.scene.values[source]
        lower, upper = self._flat(box.lower), self._flat(box.upper)
        best = np.where(seen, lower, -np.inf).max(1, keepdims=True)
        outputs, inputs = (seen & (upper >= best)).nonzero()
        return outputs, inputs

    def _add_maxima(self, name: str, first: int) -> None:
        """The maxima of a node: at least each of what it may be, and equal to one of it."""
        (outputs, inputs), columns = self.options[name], self.encoding.columns[name]
        operand, constant = self._scaled(self.encoding.pools[name][0])
        own = columns.start + outputs
        above = self._at(own, self.scale[own]) - operand[inputs]
        self._add(above, constant[inputs] - self.offset[own])
        (source,) = next(node for node in self.scene.graph.nodes if node.name == name).inputs
        room = (self.offset + self.scale)[own] - self._flat(self.scene.values[source].lower)[inputs]
        chosen = first + np.arange(len(own))
        self._add(self._at(chosen, -room) - above, self.offset[own] - constant[inputs] - room)
        one = sparse.csr_array((np.ones(len(own)), (outputs, chosen)), shape=(columns.stop - columns.start, self.width))
        self._add(one, np.ones(one.shape[0]))
        self._add(-one, -np.ones(one.shape[0]))

    def _add_ball(self) -> None:
        """``Σ t_j <= 1``, and first tangents of ``t_j >= y_j²``."""
        columns = self.width - self.inputs + np.arange(self.inputs)
        total = sparse.csr_array(
            (-np.ones(self.inputs), (np.zeros(self.inputs, dtype=np.intp), columns)), shape=(1, self.width)
        )
        self._add(total, -np.ones(1))
        for y in (0.0, 1 / math.sqrt(self.inputs), 1.0):
            for sign in (1, -1) if y else (1,):
                self._touch(np.full(self.inputs, sign * y))

    def _sphere(self) -> tuple[Numbers, Numbers]:
        """How far inputs are from the centre, in units of how far they may be: slope and start by column."""
        region = self.scene.region
        center = self._flat(region.center) if region is not None else np.zeros(self.inputs)
        weights = np.ones(self.inputs)
        if region is not None and region.weights is not None:
            weights = region.weights.flatten().cpu().numpy()
        with np.errstate(over="ignore"):  # what may move infinitely far is not held
            reach = weights * (float(region.radii_up()[self.place]) if region is not None else 1.0)
        moves = reach > 0
        reach = np.where(moves, reach, 1.0)
        scale, offset = self.scale[: self.inputs], self.offset[: self.inputs]
        return np.where(moves, scale / reach, 0.0), np.where(moves, (offset - center) / reach, 0.0)

    def _touch(self, y: Numbers) -> None:
        """Add the tangents ``t >= 2 y_0 y - y_0²`` at some places."""
        slope, start = self._sphere()
        columns = np.arange(self.inputs)
        squares = self._at(self.width - self.inputs + columns, 1.0)
        self._add(squares - self._at(columns, 2 * y * slope), 2 * y * start - y * y)

    def least(self, row: Tensor, until: float = math.inf) -> Answer:
        """The least value of a row of the outputs, (outputs,), as HiGHS finds it.

        Args:
            until: `time.monotonic` at which to give up.
        """
        c, output = row.cpu().numpy(), self.encoding.output
        matrix = sparse.csr_array(c[None] @ output.matrix)
        objective, constant = self._scaled(Affine(matrix, np.atleast_1d(c @ output.constant)))
        cost = objective.toarray()[0]
        size = float(np.abs(cost).max()) or 1.0
        numbers = [constant, cost, *(x for rows in self.rows for x in (rows.matrix.data, rows.least))]
        if not all(np.isfinite(x).all() for x in numbers):
            return Answer(Outcome.FAILED)
        outcome, low, columns, prices = self._solve(cost / size, until)
        slope, start = self._sphere() if self.ball else (np.zeros(0), np.zeros(0))
        for _ in range(TANGENTS if self.ball else 0):
            if columns is None or outcome is not Outcome.OPTIMAL:
                break
            y = slope * columns[: self.inputs] + start
            if float((y * y - columns[-self.inputs :]).max()) <= OUTSIDE:
                break
            self._touch(y)
            outcome, low, columns, prices = self._solve(cost / size, until)
        least = float(constant[0] + size * low)
        if columns is None:
            return Answer(outcome, least)
        x = self.offset[: self.inputs] + self.scale[: self.inputs] * columns[: self.inputs]
        point = torch.from_numpy(x).view(self.scene.values[INPUT].lower.shape[1:])
        return Answer(outcome, least, point, self._multipliers(prices * size))

    def empty(self, until: float = math.inf) -> Answer:
        """How far, in its own units, every choice of columns breaks some row: multipliers that show it to be empty."""
        matrix, least = self._stacked()
        ones = sparse.csr_array(np.ones((len(least), 1)))
        cost = np.zeros(self.width + 1)
        cost[-1] = 1.0
        outcome, low, _, prices = _relaxation(cost, sparse.hstack([matrix, ones]), least, until, math.inf)
        return Answer(outcome, low, None, self._multipliers(prices))

    def _stacked(self) -> tuple[Any, Numbers]:
        none = sparse.csr_array((0, self.width))  # an affine network has no rows
        matrix = sparse.vstack([none, *(rows.matrix for rows in self.rows)], format="csr")
        return matrix, np.concatenate([np.zeros(0), *(rows.least for rows in self.rows)])

    def _solve(self, cost: Numbers, until: float) -> tuple[Outcome, float, Numbers | None, Numbers]:
        """Outcome, lower bound, columns and shadow prices."""
        matrix, least = self._stacked()
        if not self.integer or not self.binaries:
            return _relaxation(cost, matrix, least, until)
        whole = np.zeros(self.width)
        whole[self.encoding.size : self.encoding.size + self.binaries] = 1
        with _silence():
            found = milp(
                cost, integrality=whole, bounds=Ends(0, 1), constraints=LinearConstraint(matrix, least, np.inf),
                options={"mip_rel_gap": 0.0, **_limit(until)},
            )  # fmt: skip
        outcome = _OUTCOMES.get(found.status, Outcome.FAILED)
        low = found.mip_dual_bound
        return outcome, -math.inf if low is None else float(low), found.x, np.zeros(len(least))

    def _multipliers(self, prices: Numbers) -> dict[str, Tensor]:
        """The multipliers ``g`` of every node: what raising a residual costs."""
        lower = self.scene.values[INPUT].lower
        found = {name: np.zeros(len(value.constant)) for name, value in self.encoding.residuals.items()}
        start = 0
        for rows in self.rows:
            stop = start + len(rows.least)
            if rows.node:
                found[rows.node][rows.units] += rows.share * prices[start:stop]
            start = stop
        return {
            name: torch.from_numpy(g).to(lower).view(self.scene.relaxed[name].z.lower.shape[1:])
            for name, g in found.items()
        }


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard output: HiGHS prints a line there, asked or not, where its presolve was not exact.

    That line comes from C, so it is the descriptor that is turned away, and C's buffer that is emptied on both ends.
    """
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _limit(until: float) -> dict[str, float]:
    return {} if until == math.inf else {"time_limit": max(0.01, until - time.monotonic())}


_OUTCOMES = {0: Outcome.OPTIMAL, 1: Outcome.LATE, 2: Outcome.EMPTY}


def _relaxation(
    cost: Numbers, matrix: Any, least: Numbers, until: float, last: float = 1.0
) -> tuple[Outcome, float, Numbers | None, Numbers]:
    """A linear program: outcome, optimum, columns and shadow prices; the last column is at most `last`."""
    ends = np.column_stack((np.zeros(len(cost)), np.ones(len(cost))))
    ends[-1, 1] = last
    found = linprog(cost, -matrix, -least, bounds=ends, method="highs", options=_limit(until))
    outcome = _OUTCOMES.get(found.status, Outcome.FAILED)
    if outcome is not Outcome.OPTIMAL:
        return outcome, -math.inf, None, np.zeros(len(least))
    return outcome, float(found.fun), found.x, -found.ineqlin.marginals
