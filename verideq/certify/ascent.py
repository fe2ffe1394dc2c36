"""Ascent on the slopes of the linear dual: towards the bound of the triangle relaxation.

The dual (`verideq.certify.backward`) is concave and piecewise linear in the multipliers ``g`` of all ReLUs and
equilibria together, and its best value is that of the triangle relaxation, a linear program. Moved on its own, a
multiplier leaves a rest on ``z`` that costs more than it gains: the ridge on which no rest is left is where CROWN's
multipliers are, whatever its slopes. So what climbs are the slopes, and the multipliers of the cuts of branch and
bound (Xu et al., *Fast and complete*, 2021; Wang et al., *Beta-CROWN*, 2021), and through an equilibrium the adjoint
equilibrium follows them: its derivative is one more equilibrium. Steps are Adam's (Kingma and Ba, 2015). Whatever
comes out is sound: the bound is that of the best ``g``, rounded to float32 as the certificate has it, with its rest and
all rounding counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verideq.certify.adjoint import ELEMENTS, Stage, opened, refined, rows_of, rules
from verideq.certify.backward import Relaxed, Rule, Scene, given
from verideq.certify.footprint import Footprint
from verideq.certify.method import Bounds, Prepared, Query
from verideq.certify.paths import Free, Path, Slopes
from verideq.clock import OutOfTime
from verideq.equilibrium import Auto
from verideq.graph import INPUT
from verideq.memory import fitting

Multipliers = dict[str, Tensor]
"""By node, (rows, 1, *state): every row is a sample of its own."""

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
        rate: of the first step, in units of the largest slope; it falls to 0 with this `power` of what is left.
        smooth: see `Scene.smooth`, at the first step; it falls quadratically, to a hundredth.
    """

    steps: int = 25
    rate: float = 0.2
    power: int = 1
    smooth: float = 0.0


FREE = Climb(steps=15, rate=0.03, power=2, smooth=0.02)
"""Of multipliers on their own, at least so long. Hundreds of their coefficients are zero up to rounding, and which
corner of the box a plain subgradient takes there is noise (Nesterov, *Smooth minimization of non-smooth functions*)."""


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
    return replace(stage, best=best, witnesses=witnesses).named("adjoint-ascent")


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
    scene, goal = replace(scene, rigorous=False), goal + spare(scene, C)
    settled = all(known.settles for known in scene.relaxed.values())
    climb = climb if settled or not climb.steps else replace(FREE, steps=max(FREE.steps, climb.steps))
    top, paths = _begun(scene, C, start, Slopes if settled else Free)
    found, alive = dict(start), torch.arange(len(C), device=C.device)
    for step in range(climb.steps if paths else 0):
        if time.monotonic() > deadline:
            break
        if step % LOOK == 0:
            left = (~(top[alive] > goal)).nonzero().flatten()
            if not len(left):
                break
            if len(left) < len(alive):
                alive, scene, C, goal = alive[left], scene.select(left), C[left], goal[left]
                paths = {name: path.select(left) for name, path in paths.items()}
        rest = 1 - step / climb.steps
        low, used, slopes = _slopes(replace(scene, smooth=climb.smooth * max(rest**2, 0.01)), C, paths)
        better = low > top[alive]
        top[alive] = torch.where(better, low, top[alive])
        for name, g in used.items():
            found[name] = found[name].index_put((alive[better],), g[better])
        for name, path in paths.items():
            path.on(slopes[name], step, climb.rate * rest**climb.power)
    return found


def _begun(
    scene: Scene, C: Tensor, start: Mapping[str, Tensor], kind: type[Slopes] | type[Free]
) -> tuple[Tensor, dict[str, Path]]:
    """The bounds of rows by multipliers, (rows,), and the paths on which these lie, or nearly."""
    rows: dict[str, Tensor] = {}

    def rule(known: Relaxed, q: Tensor) -> Tensor:
        rows[known.node.name] = q
        return start[known.node.name].to(q)

    top, _ = scene.least({scene.output: C}, dict.fromkeys(start, rule))
    return top[:, 0], {name: kind(scene.relaxed[name], q, start[name].to(q)) for name, q in rows.items()}


def _slopes(
    scene: Scene, C: Tensor, paths: Mapping[str, Path]
) -> tuple[Tensor, Mapping[str, Tensor], dict[str, list[Tensor]]]:
    """The bounds of rows, (rows,), the multipliers, and the gradients of all knobs, by node."""
    with torch.enable_grad():
        knobs = {name: [knob.at.requires_grad_() for knob in path.knobs] for name, path in paths.items()}
        low, used = scene.least({scene.output: C}, {name: path.rule for name, path in paths.items()})
        slopes = iter(torch.autograd.grad(low.sum(), [at for own in knobs.values() for at in own]))
    return (
        low.detach()[:, 0],
        {name: g.detach() for name, g in used.items()},
        {name: [next(slopes) for _ in own] for name, own in knobs.items()},
    )
