"""Branch and bound over the quadratic bound: the sign of one unit's ``p`` at a time, best first.

Where ``p_i >= 0`` the multiplier ``λ_i`` may have any sign, because ``z_i = p_i``; where ``p_i <= 0`` the unit is zero
and leaves the quadratic. Each half is bounded from the multipliers of its parent, halves of many rows at once. The unit
that is split is the one whose complementarity the minimiser of the dual violates most: the largest ``min(z_i, z_i -
p_i)``. A leaf in which no unit is left is a linear program (`verideq.certify.leaf`), so that the search is complete.
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
from functools import cached_property

import torch
from torch import Tensor

from verideq.box import Box
from verideq.certify.adjoint import scene_of
from verideq.certify.ascent import Multipliers
from verideq.certify.backward import Scene
from verideq.certify.certificate import Proof, Split, Step, Tree
from verideq.certify.footprint import NUMBER
from verideq.certify.leaf import Leaves
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
    rounded,
    spare,
)  # fmt: skip
from verideq.clock import OutOfTime, share, until
from verideq.memory import fitting

LEAF_STEPS = 60
"""Of Adam, for a half that starts from its parent's multipliers."""
NODES = 400
"""Halves of one sample, where no time limit is given."""
BATCH = 32
"""Leaves of one sample that are split at a time."""


@dataclass
class Leaf:
    """A part of the ball and one row: its splits, the best multipliers and where the dual has its minimum.

    `linear` are multipliers of the linear dual, where no unit was left to be split.
    """

    row: int
    above: Tensor
    below: Tensor
    point: Point
    value: float
    z: Tensor
    p: Tensor
    x: Tensor
    children: tuple[int, Leaf, Leaf] | None = None
    linear: Multipliers | None = None

    def worst(self, stable: Tensor) -> int:
        """The unit that is farthest from being decided, or -1 if all are, or are `stable`."""
        score = torch.minimum(self.z.abs(), (self.z - self.p).abs())
        score = torch.where(self.above | self.below | stable, -1.0, score)
        unit = int(score.argmax())
        return unit if float(score[unit]) >= 0 else -1


@dataclass
class Search:
    """The trees of one sample.

    Args:
        problem: its rows, thresholds taken off.
        reach: how far its inputs may move, see `pose`.
        stable: (units,) whose sign a box shows already: a checker refuses the half that is empty by its own box.
        until: `time.monotonic` at which to give up.
        nodes: how many halves may be bounded.
        look: inputs (leaves, inputs) in units of their reach, and rows, to a point that breaks one, if any does.
        solve: a leaf in which every unit is split, as a linear program: its multipliers, or a point that breaks the
            row, or neither.

    Afterwards `witness` is such a point, if one was met.
    """

    problem: Problem
    reach: Tensor
    stable: Tensor
    until: float
    nodes: int
    look: Callable[[Tensor, Tensor], Tensor | None]
    solve: Callable[[Leaf], Multipliers | Tensor | None]
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
            if self.witness is not None:
                return False
            ended = [leaf for leaf in taken if leaf.worst(self.stable) < 0]
            for leaf in ended:
                solved = self.solve(leaf)
                if not isinstance(solved, dict):
                    self.witness = solved
                    for left in taken:
                        self._add(left)
                    return False
                leaf.linear = solved
            taken = [leaf for leaf in taken if leaf.linear is None]
            if not taken:
                continue
            units = [leaf.worst(self.stable) for leaf in taken]
            halves = self._bounded(taken, units)
            for k, (leaf, unit) in enumerate(zip(taken, units, strict=True)):
                below, above = halves[2 * k], halves[2 * k + 1]
                leaf.children = unit, below, above
                self._add(below)
                self._add(above)
        return True

    @property
    def rows(self) -> list[int]:
        """Those that are open, the worst first."""
        return list(dict.fromkeys(leaf.row for _, _, leaf in sorted(self.open, key=lambda entry: entry[:2])))

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
            _, points = ascend(own, joined.select(some), LEAF_STEPS, 0.0, self.until)
            found += leaves(own, points, self.reach, rows[some].tolist())
        return found


def rows_at_once(problem: Problem) -> int:
    """How many leaves fit at a time."""
    units, count = problem.U.shape[1:]
    return fitting(NUMBER * (10 * units**2 + 4 * units * count), problem.U.device, "a leaf of the quadratic bound")


def leaves(problem: Problem, points: Point, reach: Tensor, rows: list[int]) -> list[Leaf]:
    """Rows that were bounded, one by one, by multipliers as a certificate holds them."""
    points = rounded(problem, points, reach)
    seen = evaluate(problem, points)
    values = seen.value.nan_to_num(nan=-math.inf)
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
    starts = leaves(problem, root.point, reach, list(range(len(root.values))))

    def look(x: Tensor, rows: Tensor) -> Tensor | None:
        points = inputs(problem, x, query, reach)
        broken = (prepared.graph(points) @ C.T).gather(1, rows[:, None].to(C.device))[:, 0] < rhs[rows]
        return points[int(broken.nonzero()[0])] if bool(broken.any()) else None

    ends = Ends(prepared, query, problem.form.name, root.goal[0], deadline)
    stable = ~ends.scene.relaxed[problem.form.name].unstable.flatten()
    nodes = NODES if deadline == math.inf else 10**9
    search = Search(problem, reach, stable, share(deadline, 2), nodes, look, ends.solve)
    if not search.run(starts):
        if search.witness is None and deadline < math.inf:
            search.witness = ends.broken(search.rows, deadline)
        search.until = deadline
        if search.witness is not None or not search.run([]):
            return search.witness
    closed: list[Leaf] = []
    trees = tuple(((leaf.row,), _tree(leaf, problem.form.name, closed)) for leaf in starts)
    rows = torch.tensor([leaf.row for leaf in closed])
    whole = replace(
        problem.select(rows), above=torch.stack([leaf.above for leaf in closed]),
        below=torch.stack([leaf.below for leaf in closed]),
    )  # fmt: skip
    joined = Point(*(torch.cat(ts) for ts in zip(*(leaf.point.tensors() for leaf in closed), strict=True)))
    steps: list[Step] = []
    for some in torch.split(torch.arange(len(rows)), rows_at_once(whole)):
        steps += quadratic_steps(whole.select(some), joined.select(some), reach, 1)[0]
    steps = [
        step if leaf.linear is None else Step(multipliers={name: g.cpu().numpy() for name, g in leaf.linear.items()})
        for leaf, step in zip(closed, steps, strict=True)
    ]
    proof = Proof(states=states_of(root.state, 0), cases=tuple((step,) for step in steps), trees=trees)
    if query.unproved:
        values = rhs.new_tensor([leaf.value for leaf in closed])
        least = torch.full_like(rhs, math.inf).scatter_reduce(0, rows.to(rhs.device), values, "amin")
        lower = least[None] + root.goal - spare(root.goal) / 2
    else:
        lower = checked_rows(prepared, query, query.C, [proof])
    return Bounds(Box(lower, torch.full_like(lower, math.inf)), torch.zeros(1, dtype=torch.long), lambda i: proof)


class Ends:
    """Leaves of one sample's trees in which every unit is split: linear programs (`verideq.certify.leaf`).

    Args:
        node: the equilibrium.
        goal: (rows,) what each row has to exceed, a checker's rounding included.
        deadline: `time.monotonic` at which to give up.
    """

    def __init__(self, prepared: Prepared, query: Query, node: str, goal: Tensor, deadline: float) -> None:
        self.prepared, self.query, self.node, self.goal, self.deadline = prepared, query, node, goal, deadline

    @cached_property
    def scene(self) -> Scene:
        """The boxes of everything, in which the linear dual is at home."""
        return scene_of(self.prepared, self.query)[0]

    @cached_property
    def leaves(self) -> Leaves:
        """The network, multiplied out."""
        return Leaves(self.scene)

    def solve(self, leaf: Leaf) -> Multipliers | Tensor | None:
        """See `Search`."""
        if self.query.C is None or self.query.rhs is None or not self.leaves.decide:
            return None
        row, goal = self.query.C[0, leaf.row], float(self.goal[leaf.row])
        known = self.scene.relaxed[self.node]
        low, high = known.pre.lower, known.pre.upper
        below, above = leaf.below.view_as(low), leaf.above.view_as(low)
        pre = Box(torch.where(above, low.clamp(min=0), low), torch.where(below, high.clamp(max=0), high))
        scene = replace(self.scene, relaxed={self.node: known.with_pre(pre)})
        solved = self.leaves.solve(scene, 0, row, goal, self.deadline)
        if solved.bound > goal:
            leaf.value = solved.bound - goal
            return {name: g[0].float() for name, g in solved.multipliers.items()}
        if solved.point is None:
            return None
        point = solved.point[None].to(low)
        point = point if self.query.region is None else self.query.region.project(point)
        return point[0] if self._breaks(point[0], leaf.row) else None

    def broken(self, rows: list[int], deadline: float) -> Tensor | None:
        """A point that breaks one of some rows, if HiGHS finds one in time."""
        if self.query.C is None:
            return None
        scene, _ = scene_of(self.prepared, self.query, [[]])  # tightened: HiGHS gains more by it than it costs
        for k, row in enumerate(rows):
            point = self.leaves.lowest(scene, 0, self.query.C[0, row], share(deadline, min(2, len(rows) - k)))
            if point is not None and self._breaks(point, row):
                return point
        return None

    def _breaks(self, point: Tensor, row: int) -> bool:
        if self.query.C is None or self.query.rhs is None:
            return False
        return float((self.prepared.graph(point[None])[0] * self.query.C[0, row]).sum()) < float(self.query.rhs[0, row])


def _tree(leaf: Leaf, node: str, ends: list[Leaf]) -> Tree:
    """The tree below a leaf; its ends are numbered as they come."""
    if leaf.children is None:
        ends.append(leaf)
        return len(ends) - 1
    unit, below, above = leaf.children
    return Split(node, unit, Fraction(0), _tree(below, node, ends), _tree(above, node, ends))
