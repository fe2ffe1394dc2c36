"""Branch and bound over the quadratic bound: the sign of one unit's ``p`` at a time, best first.

Where ``p_i >= 0`` the multiplier ``λ_i`` may have any sign, because ``z_i = p_i``; where ``p_i <= 0`` the unit is zero
and leaves the quadratic. Each half is bounded from the multipliers of its parent, halves of many rows at once. The unit
that is split is the one whose complementarity the minimiser of the dual violates most: the largest ``min(z_i, z_i -
p_i)``.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.certificate import Proof, Split, Tree
from verideq.certify.footprint import NUMBER
from verideq.certify.method import Bounds, Prepared, Query, states_of
from verideq.certify.quadratic import (
    Point,
    Problem,
    Root,
    ascend,
    checked_rows,
    evaluate,
    inputs,
    quadratic,
    quadratic_steps,
    roots,
    spare,
)  # fmt: skip
from verideq.clock import OutOfTime, until
from verideq.memory import fitting

LEAF_STEPS = 60
"""Of Adam, for a half that starts from its parent's multipliers."""
NODES = 400
"""Halves of one sample, where no time limit is given."""
BATCH = 32
"""Leaves of one sample that are split at a time."""


@dataclass
class Leaf:
    """A part of the ball and one row: its splits, the best multipliers and where the dual has its minimum."""

    row: int
    above: Tensor
    below: Tensor
    point: Point
    value: float
    z: Tensor
    p: Tensor
    x: Tensor
    children: tuple[int, Leaf, Leaf] | None = None

    def worst(self) -> int:
        """The unit that is farthest from being decided, or -1 if all are."""
        score = torch.minimum(self.z.abs(), (self.z - self.p).abs())
        score = torch.where(self.above | self.below, -1.0, score)
        unit = int(score.argmax())
        return unit if float(score[unit]) >= 0 else -1


@dataclass
class Search:
    """The trees of one sample.

    Args:
        problem: its rows, thresholds taken off.
        until: `time.monotonic` at which to give up.
        nodes: how many halves may be bounded.
        look: inputs (leaves, inputs) in units of their reach, and rows, to a point that breaks one, if any does.

    Afterwards `witness` is such a point, if one was met.
    """

    problem: Problem
    until: float
    nodes: int
    look: Callable[[Tensor, Tensor], Tensor | None]
    witness: Tensor | None = None
    open: list[tuple[float, int, Leaf]] = field(default_factory=list)
    count: Iterator[int] = field(default_factory=itertools.count)

    def run(self, roots: list[Leaf]) -> bool:
        """Whether every row is proved."""
        for leaf in roots:
            self._add(leaf)
        while self.open:
            if time.monotonic() > self.until or self.nodes <= 0:
                return False
            taken = [heapq.heappop(self.open)[2] for _ in range(min(BATCH, len(self.open)))]
            rows = torch.tensor([leaf.row for leaf in taken])
            self.witness = self.look(torch.stack([leaf.x for leaf in taken]), rows)
            units = [leaf.worst() for leaf in taken]
            if self.witness is not None or min(units) < 0:
                return False
            halves = self._bounded(taken, units)
            for k, (leaf, unit) in enumerate(zip(taken, units, strict=True)):
                below, above = halves[2 * k], halves[2 * k + 1]
                leaf.children = unit, below, above
                self._add(below)
                self._add(above)
        return True

    def _add(self, leaf: Leaf) -> None:
        if not leaf.value > 0:
            heapq.heappush(self.open, (leaf.value, next(self.count), leaf))

    def _bounded(self, taken: list[Leaf], units: list[int]) -> list[Leaf]:
        """Both halves of leaves: the one with ``p <= 0`` first."""
        self.nodes -= 2 * len(taken)
        rows = torch.tensor([leaf.row for leaf in taken for _ in range(2)])
        above, below = (
            torch.stack([getattr(leaf, side) for leaf in taken for _ in range(2)]) for side in ("above", "below")
        )
        for k, unit in enumerate(units):
            below[2 * k, unit] = True
            above[2 * k + 1, unit] = True
        problem = replace(self.problem.select(rows), above=above, below=below)
        joined = Point(
            *(torch.cat(ts) for ts in zip(*(leaf.point.tensors() for leaf in taken for _ in range(2)), strict=True))
        )
        found = []
        for some in torch.split(torch.arange(len(rows)), rows_at_once(problem)):
            own = problem.select(some)
            found += leaves(own, *ascend(own, joined.select(some), LEAF_STEPS, 0.0, self.until), rows[some].tolist())
        return found


def rows_at_once(problem: Problem) -> int:
    """How many leaves fit at a time."""
    units, count = problem.U.shape[1:]
    return fitting(NUMBER * (10 * units**2 + 4 * units * count), problem.U.device, "a leaf of the quadratic bound")


def leaves(problem: Problem, values: Tensor, points: Point, rows: list[int]) -> list[Leaf]:
    """Rows that were bounded, one by one."""
    seen = evaluate(problem, points)
    return [
        Leaf(
            row, problem.above[k], problem.below[k], points.select(torch.tensor([k])), value,
            seen.z[k].nan_to_num(), seen.p[k].nan_to_num(), seen.x[k].nan_to_num(),
        )
        for k, (row, value) in enumerate(zip(rows, values.tolist(), strict=True))
    ]  # fmt: skip


@torch.no_grad()
def quadratic_branching(prepared: Prepared, query: Query) -> Bounds:
    """The quadratic bound, and branch and bound for the samples that it leaves open.

    Without thresholds (`Query.rhs`) there is nothing to close, and it is the quadratic bound.
    """
    if query.rhs is None or query.upper or query.C is None:
        return quadratic(prepared, query)
    parts = []
    for root in roots(prepared, query):
        found = root.bounds()
        for i, own in root.query.parts((~root.query.closed(found.box.lower)).nonzero().flatten(), 1):
            decided = None
            with suppress(OutOfTime), until(own.deadline):
                decided = _one(root.select(int(i)), own.deadline)
            if isinstance(decided, Bounds):
                found = found.replaced(i, decided)
            elif decided is not None:
                found = replace(found, witnesses={**found.witnesses, int(i): decided})
        parts.append(found)
    return Bounds.joined(parts)


def _one(root: Root, deadline: float) -> Bounds | Tensor | None:
    """The proof of one sample, or a point at which it was measured to be broken, if either is found in time."""
    prepared, query, problem, reach = root.prepared, root.query, root.problem, root.reach
    if query.C is None or query.rhs is None:
        return None
    C, rhs = query.C[0], query.rhs[0]
    starts = leaves(problem, root.values, root.point, list(range(len(root.values))))

    def look(x: Tensor, rows: Tensor) -> Tensor | None:
        points = inputs(problem, x, query, reach)
        broken = (prepared.graph(points) @ C.T).gather(1, rows[:, None].to(C.device))[:, 0] < rhs[rows]
        return points[int(broken.nonzero()[0])] if bool(broken.any()) else None

    search = Search(problem, deadline, NODES if deadline == math.inf else 10**9, look)
    if not search.run(starts):
        return search.witness
    ends: list[Leaf] = []
    trees = tuple(((leaf.row,), _tree(leaf, problem.form.name, ends)) for leaf in starts)
    rows = torch.tensor([leaf.row for leaf in ends])
    whole = replace(
        problem.select(rows), above=torch.stack([leaf.above for leaf in ends]),
        below=torch.stack([leaf.below for leaf in ends]),
    )  # fmt: skip
    joined = Point(*(torch.cat(ts) for ts in zip(*(leaf.point.tensors() for leaf in ends), strict=True)))
    steps, values = [], []
    for some in torch.split(torch.arange(len(rows)), rows_at_once(whole)):
        own, seen = quadratic_steps(whole.select(some), joined.select(some), reach, 1)
        steps += own
        values.append(seen.value)
    proof = Proof(states=states_of(root.state, 0), cases=tuple((step,) for step in steps), trees=trees)
    if query.unproved:
        least = torch.full_like(rhs, math.inf).scatter_reduce(0, rows.to(rhs.device), torch.cat(values), "amin")
        lower = least[None] + root.goal - spare(root.goal) / 2
    else:
        lower = checked_rows(prepared, query, query.C, [proof])
    return Bounds(Box(lower, torch.full_like(lower, math.inf)), torch.zeros(1, dtype=torch.long), lambda i: proof)


def _tree(leaf: Leaf, node: str, ends: list[Leaf]) -> Tree:
    """The tree below a leaf; its ends are numbered as they come."""
    if leaf.children is None:
        ends.append(leaf)
        return len(ends) - 1
    unit, below, above = leaf.children
    return Split(node, unit, Fraction(0), _tree(below, node, ends), _tree(above, node, ends))
