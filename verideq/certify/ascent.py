"""Ascent on the multipliers of the linear dual: towards the bound of the triangle relaxation.

The dual (`verideq.certify.backward`) is concave and piecewise linear in the multipliers ``g`` of all ReLUs and
equilibria together, and its best value is that of the triangle relaxation, a linear program. CROWN's ``g`` is where the
search starts. There hundreds of coefficients are zero up to rounding, so that which corner of the box a plain
subgradient takes is noise; a smoothed one (Nesterov, *Smooth minimization of non-smooth functions*, 2005), less and
less so, moves every coefficient in proportion. Steps are Adam's (Kingma and Ba, 2015), in units of each row's largest
multiplier. Whatever comes out is sound: the bound is that of the best ``g``, rounded to float32 as the certificate has
it, with all rounding counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from verideq.box import TINY
from verideq.certify.adjoint import ELEMENTS, Stage, opened, refined, rows_of, rules
from verideq.certify.backward import Rule, Scene, given, most
from verideq.certify.footprint import Footprint
from verideq.certify.method import Bounds, Prepared, Query
from verideq.clock import OutOfTime
from verideq.equilibrium import Auto
from verideq.graph import INPUT
from verideq.memory import fitting

Multipliers = dict[str, Tensor]
"""By node, (rows, 1, *state): every row is a sample of its own."""

FIRST, SECOND = 0.9, 0.98
"""Adam's averages of the gradient and of its square."""
FLOOR = 1e-2
"""What is added to the root of the latter, of its largest entry: directions that hardly matter hardly move."""
LOOK = 5
"""Steps between two looks at which rows are closed."""
SPARE = 2.0**-20
"""What is not told from rounding, of the size of the outputs."""
BETWEEN = 0.1
"""See `Scene.smooth`, for the second point that is tried."""


@dataclass(frozen=True)
class Climb:
    """How long to climb.

    Args:
        steps: at most.
        rate: of the first step, in units of a row's largest multiplier; it falls quadratically to 0.
        smooth: see `Scene.smooth`, at the first step; it falls quadratically, to a hundredth.
    """

    steps: int = 80
    rate: float = 0.06
    smooth: float = 0.05


@torch.no_grad()
def adjoint_ascent(prepared: Prepared, query: Query) -> Bounds:
    """The refined adjoint bound, its multipliers improved by ascent where it leaves a sample open."""
    return refined(prepared, query, lambda stage: ascended(stage).bounds())


def ascended(stage: Stage, climb: Climb = Climb()) -> Stage:
    """The same with better multipliers for the rows that are open.

    Not for those that their worst point attains, and of no sample of which a point breaks a row.
    """
    query, best, C, witnesses = stage.query, stage.best, rows_of(stage.query, stage.scene), dict(stage.witnesses)
    samples, rows = opened(query, best.lower).nonzero().unbind(1)
    size = sum(known.z.lower[0].numel() for known in stage.scene.relaxed.values())
    shape = Footprint.of(stage.prepared, query.box.lower, 1)
    room = fitting(shape.climb, shape.device, "a row whose multipliers climb")
    together = max(1, min(ELEMENTS // (8 * size + 1), room))
    trial = Trial(stage.prepared)
    with suppress(OutOfTime):  # what was found before that stays
        for i, k in zip(torch.split(samples, together), torch.split(rows, together), strict=True):
            if not len(i) or time.monotonic() > query.deadline:
                break
            scene = stage.scene.select(i)
            points, values = trial.worst(scene, C[i, k])
            goal = torch.full_like(values, torch.inf)
            if query.rhs is not None and not query.upper:
                goal = query.rhs[i, k]
                for place in (values < goal).nonzero().flatten().tolist():
                    witnesses.setdefault(int(i[place]), points[place])
            broken = torch.tensor([int(sample) in witnesses for sample in i], device=i.device)
            left = (~broken & ~(values <= best.lower[i, k] + spare(scene, C[i, k]))).nonzero().flatten()
            i, k, scene, goal = i[left], k[left], scene.select(left), goal[left]
            if not len(i):
                continue
            start = {name: g[i, k][:, None] for name, g in best.multipliers.items()}
            found = climbed(scene, C[i, k], start, goal, climb, query.deadline)
            lower, found = proved(scene, C[i, k], found)
            best = best.improved(i, k, lower, {name: g[:, 0] for name, g in found.items()})
    return replace(stage, best=best, witnesses=witnesses)


def spare(scene: Scene, C: Tensor) -> Tensor:
    """(rows,) a difference that only rounding makes, of rows each of which is a sample of its own."""
    outputs = scene.values[scene.output]
    return SPARE * (C.abs() * torch.maximum(outputs.lower.abs(), outputs.upper.abs())).sum(1)


class Trial:
    """A model to try points on: what it says is measured, not proved."""

    def __init__(self, prepared: Prepared) -> None:
        self.graph = prepared.graph.frozen(device=prepared.device, solver=Auto(tol=1e-9), throw=False)

    def worst(self, scene: Scene, C: Tensor, multipliers: Mapping[str, Rule] | None = None) -> tuple[Tensor, Tensor]:
        """Where a row, each a sample of its own, seems least, (rows, *features), and what it is there, (rows,).

        A corner of the box; or, better where the row has next to no coefficient, between two.

        Args:
            multipliers: that show where; ``None``: those of CROWN.
        """
        scene = replace(scene, rigorous=False)
        shown = rules(scene, "adaptive") if multipliers is None else multipliers
        _, on_input, _ = scene.back({scene.output: C}, shown)
        points, values = scene.values[INPUT].center, torch.full_like(C[:, 0], torch.inf)
        for smooth in (0.0, BETWEEN):
            x = points if on_input is None else replace(scene, smooth=smooth).worst(on_input)
            x = x if scene.region is None else scene.region.project(x)
            new = self.values(x, C)
            points = torch.where((new < values).view(-1, *[1] * (x.dim() - 1)), x, points)
            values = torch.minimum(new, values)
        return points, values

    def values(self, points: Tensor, C: Tensor) -> Tensor:
        """Rows at points, (rows,)."""
        values: Tensor = (C * self.graph(points)).sum(1)
        return values

    def slopes(self, points: Tensor, C: Tensor) -> Tensor:
        """The gradients of rows at points, (rows, *features)."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            return torch.autograd.grad(self.values(points, C).sum(), points)[0]


def proved(scene: Scene, C: Tensor, multipliers: Multipliers) -> tuple[Tensor, Multipliers]:
    """Lower bounds, (rows,), by multipliers rounded to float32, and those."""
    stored = {name: given(g.float().to(g)) for name, g in multipliers.items()}
    lower, used = replace(scene, rigorous=True).least({scene.output: C}, stored)
    return lower[:, 0], used


def climbed(
    scene: Scene, C: Tensor, start: Mapping[str, Tensor], goal: Tensor, climb: Climb, deadline: float = math.inf
) -> Multipliers:
    """Better multipliers for rows each of which is a sample of its own.

    Args:
        scene: of (rows,) samples.
        C: (rows, outputs).
        start: multipliers by node, (rows, 1, *state).
        goal: (rows,) a row above it is left alone.
        climb: how long.
        deadline: `time.monotonic` at which to stop.
    """
    scene, found, top = replace(scene, rigorous=False), dict(start), torch.full_like(goal, -torch.inf)
    goal = goal + spare(scene, C)
    # Steps need a length also where the best bound so far has no multipliers.
    _, usual = scene.least({scene.output: C}, rules(scene, "adaptive"))
    walks = {name: _Walk.begin(scene, name, start[name], usual[name]) for name in usual}
    alive = torch.arange(len(C), device=C.device)
    for step in range(climb.steps if walks else 0):
        left = 1 - step / climb.steps
        low, slopes = _slopes(replace(scene, smooth=climb.smooth * max(left**2, 0.01)), C, walks)
        better = low > top[alive]
        top[alive] = torch.where(better, low, top[alive])
        for name, walk in walks.items():
            found[name] = found[name].index_put((alive[better],), walk.g[better])
        walks = {name: walk.on(slopes[name], step, climb.rate * left**2) for name, walk in walks.items()}
        if step % LOOK == LOOK - 1:
            open_ = (~(low > goal)).nonzero().flatten()
            if time.monotonic() > deadline or not len(open_):
                break
            if len(open_) < len(alive):
                alive, scene, C, goal = alive[open_], scene.select(open_), C[open_], goal[open_]
                walks = {name: _Walk(*(x[open_] for x in walk)) for name, walk in walks.items()}
    return found


def _slopes(scene: Scene, C: Tensor, walks: Mapping[str, _Walk]) -> tuple[Tensor, Multipliers]:
    """The bounds of rows, (rows,), and their smoothed gradients by node."""
    with torch.enable_grad():
        own = {name: walk.g.requires_grad_() for name, walk in walks.items()}
        low, _ = scene.least({scene.output: C}, {name: given(g) for name, g in own.items()})
        slopes = torch.autograd.grad(low.sum(), list(own.values()))
    return low.detach()[:, 0], dict(zip(own, slopes, strict=True))


class _Walk(NamedTuple):
    """Where the multipliers of one node are, (rows, 1, *state), and Adam's averages; the others broadcast.

    Args:
        g: the multipliers.
        mean: of the gradients.
        square: of their squares.
        scale: of each row's multipliers.
        grid: gradients are rounded to multiples of it. Without that the last bits of a product, which differ with the
            size of the batch, would grow from step to step.
        floor: below which none may be.
        roof: above which.
    """

    g: Tensor
    mean: Tensor
    square: Tensor
    scale: Tensor
    grid: Tensor
    floor: Tensor
    roof: Tensor

    @staticmethod
    def begin(scene: Scene, name: str, g: Tensor, usual: Tensor) -> _Walk:
        """Before the first step; `usual`: what CROWN's multipliers are like."""
        known, shape = scene.relaxed[name], (-1, *[1] * (g.dim() - 1))
        largest = torch.maximum(most(known.pre.lower[:, None]), most(known.pre.upper[:, None]))
        return _Walk(
            g,
            torch.zeros_like(g),
            torch.zeros_like(g),
            torch.maximum(most(g), most(usual)).view(shape),
            torch.exp2(torch.frexp(largest + TINY).exponent.to(g) - 20).view(shape),
            known.floor[:, None].to(g),
            known.roof[:, None].to(g),
        )

    def on(self, slope: Tensor, step: int, rate: float) -> _Walk:
        """One step upwards."""
        slope = (slope / self.grid).round() * self.grid
        mean = FIRST * self.mean + (1 - FIRST) * slope
        square = SECOND * self.square + (1 - SECOND) * slope * slope
        size = (square / (1 - SECOND ** (step + 1))).sqrt()
        size = size + FLOOR * most(size).view(self.scale.shape) + self.grid
        g = self.g.detach() + rate * self.scale * (mean / (1 - FIRST ** (step + 1)) / size)
        g = torch.clamp(g, self.floor, self.roof)
        return self._replace(g=torch.where(g.isfinite(), g, 0.0), mean=mean, square=square)
