"""Paths along which the multipliers of a node climb: what is turned, and what multipliers that makes of a row.

With a gauge slopes are turned, and an adjoint equilibrium follows them; without one the multipliers themselves. See
`verideq.certify.ascent`, which climbs, and docs/theory.md, "The linear dual".
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verideq.box import TINY
from verideq.certify.backward import SYNC, Relaxed, most, sloped
from verideq.equilibrium import Operator

FIRST, SECOND = 0.9, 0.98
"""Adam's averages of the gradient and of its square."""
FLOOR = 1e-2
"""What is added to the root of the latter, of its largest entry: directions that hardly matter hardly move."""
SETTLED = 1e-4
"""Where the adjoint equilibrium of a step has settled, relative to each row's largest entry."""
SETTLING = 40
"""Steps that it has for that."""


class Knob(NamedTuple):
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
    def begin(at: Tensor, unit: Tensor, size: Tensor, start: Tensor, end: Tensor) -> Knob:
        """Before the first step; `size` and `unit`: (rows, 1), of the largest gradient and of the steps."""
        shape = (-1, *[1] * (at.dim() - 1))
        grid = torch.exp2(torch.frexp(size + TINY).exponent.to(at) - 20)
        return Knob(at, torch.zeros_like(at), torch.zeros_like(at), unit.view(shape), grid.view(shape), start, end)

    def on(self, slope: Tensor, step: int, rate: float) -> Knob:
        """One step upwards."""
        slope = (slope / self.grid).round() * self.grid
        mean = FIRST * self.mean + (1 - FIRST) * slope
        square = SECOND * self.square + (1 - SECOND) * slope * slope
        size = (square / (1 - SECOND ** (step + 1))).sqrt()
        size = size + FLOOR * most(size).view(self.unit.shape) + self.grid
        at = self.at.detach() + rate * self.unit * (mean / (1 - FIRST ** (step + 1)) / size)
        at = torch.clamp(torch.where(at.isfinite(), at, 0.0), self.start, self.end)
        return self._replace(at=at, mean=mean, square=square)


class Path:
    """The knobs of a node, and the multipliers that they make of rows.

    Args:
        knobs: of (rows,) samples, each (rows, 1, *state).
        held: what else there is of every row, (rows, ...).
    """

    def __init__(self, knobs: list[Knob], held: list[Tensor]) -> None:
        self.knobs, self.held = knobs, held

    def rule(self, known: Relaxed, q: Tensor) -> Tensor:
        """Multipliers, (rows, 1, *state), of rows `q` on the node: a `Rule`."""
        return self.knobs[0].at

    def on(self, slopes: list[Tensor], step: int, rate: float) -> None:
        """One step upwards; `slopes`: gradients of the knobs, in their order."""
        self.knobs = [knob.on(slope, step, rate) for knob, slope in zip(self.knobs, slopes, strict=True)]

    def select(self, part: Tensor) -> Path:
        """The same for some rows."""
        own = copy(self)
        own.knobs, own.held = [Knob(*(x[part] for x in knob)) for knob in self.knobs], [x[part] for x in self.held]
        return own


class Free(Path):
    """Multipliers that move on their own, where no gauge says that adjoint equilibria settle.

    Args:
        known: of (rows,) samples.
        q: rows on the node, (rows, 1, *state), and `g`: multipliers where the path begins.
    """

    def __init__(self, known: Relaxed, q: Tensor, g: Tensor) -> None:
        size = torch.maximum(most(known.pre.lower[:, None]), most(known.pre.upper[:, None]))
        # Steps need a length also where there are no multipliers yet: that of the first step towards CROWN's.
        usual = sloped(q.view_as(g), *(side[:, None] for side in known.slopes("adaptive"))) / known.divisor()
        floor, roof = (side[:, None].to(g) for side in (known.floor, known.roof))
        super().__init__([Knob.begin(g, torch.maximum(most(g), most(usual)), size, floor, roof)], [])


class Slopes(Path):
    """Multipliers that leave nothing on ``z`` of a unit but what a line or a cut takes.

    ``δ g = D(y) y + s β``, ``y = q + W̃ᵀ δ g``, with any slopes ``D`` between the least and the largest and ``β >= 0``:
    ``s`` is -1 for a unit that was cut to ``P >= 0``, 1 for one cut to ``P <= 0``, and 0 for the others.

    Args:
        known, q, g: see `Free`. Where `g` is not of this form the slopes nearest to it begin, and where there
            is none CROWN's.
    """

    def __init__(self, known: Relaxed, q: Tensor, g: Tensor) -> None:
        q = q.view_as(g)
        t, pre = g * known.divisor(), known.pre
        y = q if known.operator is None else q + _over(known.operator.solved()[0].transpose(), t)
        zero, one, adaptive = ([side[:, None] for side in known.slopes(kind)] for kind in ("zero", "one", "adaptive"))
        below, above = pre.upper == 0, (pre.lower == 0) & (pre.upper > 0)
        sign = (below.to(q) - above.to(q))[:, None]
        size = torch.maximum(most(pre.lower[:, None]), most(pre.upper[:, None]))
        none = (most(g) == 0).view(-1, *[1] * (g.dim() - 1))
        nothing, knobs = torch.zeros_like(t), []
        for least, largest, usual, side in zip(zero, one, adaptive, (y > 0, y < 0), strict=True):
            slope = torch.where(side & ~none, t / torch.where(side, y, 1.0), usual)
            end = (largest > least).to(q).expand_as(t)
            at = ((slope - least) / torch.where(largest > least, largest - least, 1.0)).clamp(min=0)
            knobs.append(Knob.begin(torch.minimum(at, end), torch.ones_like(size), size * most(y), nothing, end))
        at = (sign * (t - torch.where(above[:, None], y, 0.0))).clamp(min=0)
        end = torch.where(sign == 0, 0.0, torch.inf).expand_as(t)
        knobs.append(Knob.begin(at, most(y), size, nothing, end))
        # Last, where the next adjoint equilibrium and that of its gradient begin.
        super().__init__(knobs, [zero[0], one[0], zero[1], one[1], sign, t, nothing])

    def rule(self, known: Relaxed, q: Tensor) -> Tensor:
        """See `Path.rule`."""
        low, high, cut = (knob.at for knob in self.knobs)
        least, steepest, lowest, highest, sign = self.held[:5]
        slopes = torch.lerp(least, steepest, low), torch.lerp(lowest, highest, high)
        if known.operator is None:
            return torch.relu(q) * slopes[0] + q.clamp(max=0) * slopes[1] + sign * cut
        t: Tensor = AdjointEquilibrium.apply(q, *slopes, sign * cut, known.operator, self.held)  # type: ignore[no-untyped-call]  # torch's
        return t / known.divisor()


class AdjointEquilibrium(torch.autograd.Function):
    """``t = D(y) y + shift``, ``y = q + W̃ᵀ t``: differentiated where it has settled, see `Slopes`.

    The last two of `held` are the last ``t`` and the last gradient of ``q``: where the search for the next ones begins.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, lower: Tensor, upper: Tensor, shift: Tensor, operator: Operator, held: list[Tensor]
    ) -> Tensor:
        back = operator.solved()[0].transpose()
        t, y = _settled(lambda t: q + _over(back, t), lambda y: sloped(y, lower, upper) + shift, held[-2])
        held[-2] = t
        ctx.save_for_backward(y, lower, upper)
        ctx.operator, ctx.held = operator, held
        return t

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        y, lower, upper = ctx.saved_tensors
        slope, forth = torch.where(y > 0, lower, upper), ctx.operator.solved()[0]
        m, whole = _settled(lambda m: upstream + _over(forth, m), lambda whole: slope * whole, ctx.held[-1])
        ctx.held[-1] = m
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
