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
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verideq.box import TINY
from verideq.certify.adjoint import ELEMENTS, Stage, opened, refined, rows_of, rules
from verideq.certify.backward import SYNC, Relaxed, Rule, Scene, given, most, sloped
from verideq.certify.footprint import Footprint
from verideq.certify.method import Bounds, Prepared, Query
from verideq.clock import OutOfTime
from verideq.equilibrium import Auto, Operator
from verideq.graph import INPUT
from verideq.memory import fitting

Multipliers = dict[str, Tensor]
"""By node, (rows, 1, *state): every row is a sample of its own."""

FIRST, SECOND = 0.9, 0.98
"""Adam's averages of the gradient and of its square."""
FLOOR = 1e-2
"""What is added to the root of the latter, of its largest entry: directions that hardly matter hardly move."""
SETTLED = 1e-4
"""Where the adjoint equilibrium of a step has settled, relative to each row's largest entry."""
SETTLING = 40
"""Steps that it has for that."""
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
    return replace(stage, best=best, witnesses=witnesses).closed("adjoint-ascent")


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
    top, paths = _begun(scene, C, start, _Path if settled else _Free)
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
        left_over = 1 - step / climb.steps
        low, used, slopes = _slopes(replace(scene, smooth=climb.smooth * max(left_over**2, 0.01)), C, paths)
        better = low > top[alive]
        top[alive] = torch.where(better, low, top[alive])
        for name, g in used.items():
            found[name] = found[name].index_put((alive[better],), g[better])
        for name, path in paths.items():
            path.on(slopes[name], step, climb.rate * left_over**climb.power)
    return found


def _begun(
    scene: Scene, C: Tensor, start: Mapping[str, Tensor], kind: type[_Path] | type[_Free]
) -> tuple[Tensor, dict[str, _Path | _Free]]:
    """The bounds of rows by multipliers, (rows,), and the paths on which these lie, or nearly."""
    rows: dict[str, Tensor] = {}

    def rule(known: Relaxed, q: Tensor) -> Tensor:
        rows[known.node.name] = q
        return start[known.node.name].to(q)

    top, _ = scene.least({scene.output: C}, dict.fromkeys(start, rule))
    return top[:, 0], {name: kind(scene.relaxed[name], q, start[name].to(q)) for name, q in rows.items()}


def _slopes(
    scene: Scene, C: Tensor, paths: Mapping[str, _Path | _Free]
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


class _Knob(NamedTuple):
    """What is turned at a node, (rows, 1, *state), and Adam's averages.

    Args:
        at: where it stands.
        mean: of the gradients.
        square: of their squares.
        unit: of its steps, and `grid`: (rows, 1, ...). Gradients are rounded to multiples of that: without it the last
            bits of a product, which differ with the size of the batch, would grow from step to step.
        start: the least that it goes to, and `end`: the most.
    """

    at: Tensor
    mean: Tensor
    square: Tensor
    unit: Tensor
    grid: Tensor
    start: Tensor
    end: Tensor

    @staticmethod
    def begin(at: Tensor, unit: Tensor, size: Tensor, start: Tensor, end: Tensor) -> _Knob:
        """Before the first step; `size` and `unit`: (rows, 1), of the largest gradient and of the steps."""
        shape = (-1, *[1] * (at.dim() - 1))
        grid = torch.exp2(torch.frexp(size + TINY).exponent.to(at) - 20)
        return _Knob(at, torch.zeros_like(at), torch.zeros_like(at), unit.view(shape), grid.view(shape), start, end)

    def on(self, slope: Tensor, step: int, rate: float) -> _Knob:
        """One step upwards."""
        slope = (slope / self.grid).round() * self.grid
        mean = FIRST * self.mean + (1 - FIRST) * slope
        square = SECOND * self.square + (1 - SECOND) * slope * slope
        size = (square / (1 - SECOND ** (step + 1))).sqrt()
        size = size + FLOOR * most(size).view(self.unit.shape) + self.grid
        at = self.at.detach() + rate * self.unit * (mean / (1 - FIRST ** (step + 1)) / size)
        at = torch.clamp(torch.where(at.isfinite(), at, 0.0), self.start, self.end)
        return self._replace(at=at, mean=mean, square=square)


class _Path:
    """The multipliers of a node that leave nothing on ``z`` of a unit but what a line or a cut takes.

    ``δ g = D(y) y + s β``, ``y = q + W̃ᵀ δ g``, with any slopes ``D`` between the least and the largest and ``β >= 0``:
    ``s`` is -1 for a unit that was cut to ``P >= 0``, 1 for one cut to ``P <= 0``, and 0 for the others.

    Args:
        known: of (rows,) samples.
        q: rows on the node, (rows, 1, *state), and `g`: multipliers where the path begins. Where these are not of this
            form the slopes nearest to theirs are; where there are none, CROWN's.
    """

    def __init__(self, known: Relaxed, q: Tensor, g: Tensor) -> None:
        q = q.view_as(g)
        t, pre = g * known.divisor(), known.pre
        y = t if known.operator is None else _over(known.operator.solved()[0].transpose(), t)
        y = q if known.operator is None else q + y
        ends = [[side[:, None] for side in known.slopes(kind)] for kind in ("zero", "one", "adaptive")]
        self.ends = [ends[0][0], ends[1][0], ends[0][1], ends[1][1]]
        below, above = pre.upper == 0, (pre.lower == 0) & (pre.upper > 0)
        self.sign = (below.to(q) - above.to(q))[:, None]
        size = torch.maximum(most(pre.lower[:, None]), most(pre.upper[:, None]))
        none, self.settled = (most(g) == 0).view(-1, *[1] * (g.dim() - 1)), [t, torch.zeros_like(t)]
        self.knobs = []
        for first, last, usual, side in zip(ends[0], ends[1], ends[2], (y > 0, y < 0), strict=True):
            slope = torch.where(side & ~none, t / torch.where(side, y, 1.0), usual)
            reach = torch.where(last > first, last - first, 1.0)
            end = (last > first).to(q).expand_as(t)
            at = torch.minimum(((slope - first) / reach).clamp(min=0), end)
            self.knobs.append(_Knob.begin(at, torch.ones_like(size), size * most(y), torch.zeros_like(end), end))
        at = (self.sign * (t - torch.where(above[:, None], y, 0.0))).clamp(min=0)
        end = torch.where(self.sign == 0, 0.0, torch.inf)
        self.knobs.append(_Knob.begin(at, most(y), size, torch.zeros_like(end), end))

    def rule(self, known: Relaxed, q: Tensor) -> Tensor:
        """The multipliers of rows."""
        low, high, cut = (knob.at for knob in self.knobs)
        slopes = torch.lerp(self.ends[0], self.ends[1], low), torch.lerp(self.ends[2], self.ends[3], high)
        if known.operator is None:
            return torch.relu(q) * slopes[0] + q.clamp(max=0) * slopes[1] + self.sign * cut
        t: Tensor = _Settled.apply(q, *slopes, self.sign * cut, known.operator, self.settled)  # type: ignore[no-untyped-call]  # torch's
        return t / known.divisor()

    def on(self, slopes: list[Tensor], step: int, rate: float) -> None:
        """One step upwards."""
        self.knobs = [knob.on(slope, step, rate) for knob, slope in zip(self.knobs, slopes, strict=True)]

    def select(self, part: Tensor) -> _Path:
        """The paths of some rows."""
        own = copy(self)
        own.ends, own.settled = [end[part] for end in self.ends], [x[part] for x in self.settled]
        own.sign, own.knobs = self.sign[part], [_Knob(*(x[part] for x in knob)) for knob in self.knobs]
        return own


class _Free:
    """Multipliers that move on their own, where no gauge says that adjoint equilibria settle.

    Args:
        known, q, g: see `_Path`.
    """

    def __init__(self, known: Relaxed, q: Tensor, g: Tensor) -> None:
        size = torch.maximum(most(known.pre.lower[:, None]), most(known.pre.upper[:, None]))
        # Steps need a length also where there are no multipliers yet: that of the first step towards CROWN's.
        usual = sloped(q.view_as(g), *(side[:, None] for side in known.slopes("adaptive"))) / known.divisor()
        unit = torch.maximum(most(g), most(usual))
        floor, roof = (side[:, None].to(g) for side in (known.floor, known.roof))
        self.knobs = [_Knob.begin(g, unit, size, floor, roof)]

    def rule(self, known: Relaxed, q: Tensor) -> Tensor:
        """The multipliers of rows."""
        return self.knobs[0].at

    def on(self, slopes: list[Tensor], step: int, rate: float) -> None:
        """One step upwards."""
        self.knobs = [knob.on(slope, step, rate) for knob, slope in zip(self.knobs, slopes, strict=True)]

    def select(self, part: Tensor) -> _Free:
        """The multipliers of some rows."""
        own = copy(self)
        own.knobs = [_Knob(*(x[part] for x in knob)) for knob in self.knobs]
        return own


class _Settled(torch.autograd.Function):
    """``t = D(y) y + shift``, ``y = q + W̃ᵀ t``: differentiated where it has settled, see `_Path`.

    `settled` holds the last ``t``, and the last gradient of ``q``: where the search for the next ones begins.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, lower: Tensor, upper: Tensor, shift: Tensor, operator: Operator, settled: list[Tensor]
    ) -> Tensor:
        back = operator.solved()[0].transpose()
        t, y = _settled(lambda t: q + _over(back, t), lambda y: sloped(y, lower, upper) + shift, settled[0])
        settled[0] = t
        ctx.save_for_backward(y, lower, upper)
        ctx.operator, ctx.settled = operator, settled
        return t

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        y, lower, upper = ctx.saved_tensors
        slope, forth = torch.where(y > 0, lower, upper), ctx.operator.solved()[0]
        m, whole = _settled(lambda m: upstream + _over(forth, m), lambda whole: slope * whole, ctx.settled[1])
        ctx.settled[1] = m
        return m, whole * torch.relu(y), whole * y.clamp(max=0), whole, None, None


def _settled(forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``x = back(y)``, ``y = forth(x)`` from a good guess on, (rows, 1, *state): each row for as long as it needs."""
    y = x
    moving = torch.ones_like(x[:, :1].flatten(1)[:, :1], dtype=torch.bool).view(-1, *[1] * (x.dim() - 1))
    for step in range(1, SETTLING + 1):
        y = torch.where(moving, forth(x), y)
        new = back(y)
        gap, size = most(new - x), most(new)
        x = torch.where(moving, new, x)
        moving = moving & (gap > SETTLED * size).view(moving.shape)
        if step % SYNC == 0 and not bool(moving.any()):
            break
    return x, y


def _over(operator: Operator, rows: Tensor) -> Tensor:
    """An operator on rows, (rows, 1, *state)."""
    return operator.apply(rows.flatten(0, 1)).view_as(rows)
