"""Linear bounds that travel backwards through a graph: rows ``q`` with ``q · y >= ...``, rounding included.

For an affine node ``y = A x + b`` the row on ``x`` is ``Aᵀ q`` and ``q · b`` is gained. At a ReLU, and at an
equilibrium, a row is bounded by the linear dual (docs/theory.md): with ``z = relu(P)``, ``P = p / δ`` in ``[l, h]``,
``a >= h / (h - l)``,

    δ z >= p,        δ z <= a (p - δ l)  where l < 0 < h,        δ z = p  where l >= 0,

so that *every* multiplier ``g`` (0 or more where ``h <= 0``) gives

    q · z  >=  min over the box of (q + Wᵀ g - g + δ g (1 - 1/a)) · z  +  g · v  -  Σ δ g l,

the terms with ``a`` and ``l`` only where ``g < 0`` and ``l < 0 < h``. ``W = 0`` and ``δ = 1`` for a ReLU. Where a row
has no multiplier it ends, and is bounded over the box of ``z``: that is interval arithmetic.

An activation with a ceiling ``κ``, ``z = min(max(P, 0), κ)``, has the same kink upside down. The upper line of the
first one ends at ``min(h, κ)`` in place of ``h``, and the lower line is below ``z`` only as far as ``h <= κ``. Where
``l < κ < h`` it is ``δ z >= δ κ - e (δ h - p)``, ``e >= (κ - l⁺) / (h - l⁺)``, and ``g > 0`` has its own terms,

    ... + δ g (1 - 1/e) · z  -  Σ δ g (h - κ/e);

and where ``l >= κ`` multipliers are 0 or less, because ``z <= P`` is all that holds there.

Counting rounding costs no product of rows. A row is exactly what is stored of it. A node leaves ``q̂ = fl(Aᵀ q)``, and
``|Aᵀ q - q̂| <= γ |A|ᵀ|q|``, so that at most ``|q| · γ |A||x|`` is lost: a vector a *sample*, with which all its rows
are charged (`Charge`). Boxes are taken by centre and radius, where such a vector joins the radius.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from verideq.box import TINY, Box, gamma, underflow
from verideq.certify.balls import Ball
from verideq.certify.interval import RULES, Arithmetic
from verideq.clock import tick
from verideq.equilibrium import Operator
from verideq.graph import INPUT, Graph, Node
from verideq.region import Region

SYNC = 2
"""Steps of the adjoint equilibrium between two looks at whether it has arrived."""

Map = Callable[[Tensor], Tensor]
Rule = Callable[["Relaxed", Tensor], Tensor]
"""Multipliers for rows: ``(relaxed, q) -> g``, (samples, rows, *state) both."""


def dot(q: Tensor, v: Tensor) -> Tensor:
    """``q · v`` of every row, (samples, rows): q (samples, rows, size), v (samples or 1, size)."""
    return (q * v[:, None]).sum(2)


def inner(q: Tensor, box: Box, rigorous: bool = True) -> Tensor:
    """The least ``q · x`` over a box of every sample, from below: (samples, rows).

    Every ``q_j`` may be ten roundings away from what is meant.

    Args:
        q: (samples, rows, size).
        box: (samples or 1, *shape), of as many numbers.
        rigorous: count what is lost to rounding.
    """
    if not rigorous:
        return dot(q, box.center.flatten(1)) - dot(q.abs(), box.radius.flatten(1))
    center, radius = (x.flatten(1) for x in box.ball())
    size, terms = center.abs() + radius, q.shape[2]
    # Twice what the sums of both lines need; a product loses TINY of either factor where these are flushed.
    moved = radius + (gamma(terms + 8) * size + 16 * TINY)
    least = dot(q, center) - dot(q.abs(), moved) - 16 * TINY * (terms + size.sum(1, keepdim=True))
    # A sum that overflowed on its way says nothing.
    return least.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


class Charge(NamedTuple):
    """What rows lose where they pass an affine map: ``|q| · by + apart``, (samples, size) and (samples, 1)."""

    by: Tensor
    apart: Tensor

    @staticmethod
    def of(moved: Tensor, size: Tensor, terms: int, *factors: Tensor) -> Charge:
        """The map ``A``, of which ``|A| size`` is `moved`.

        Args:
            moved: (samples, *state).
            size: the largest magnitudes of what ``A`` is applied to, (samples, *shape).
            terms: that are summed for an entry of ``Aᵀ q``.
            factors: whose largest entries bound those of ``A``.
        """
        whole = size.flatten(1).sum(1, keepdim=True) * (16 * TINY)
        peak = sum((f.abs().amax() for f in factors if f.numel()), start=torch.ones_like(whole[:1]))
        return Charge(moved.flatten(1) * gamma(terms + 8) + whole, whole * (terms + 8) * peak)

    def on(self, q: Tensor) -> Tensor:
        """What rows, (samples, rows, size), lose: (samples, rows)."""
        return dot(q.abs(), self.by) + self.apart


class _Sizes(Arithmetic):
    """``|A| r`` of affine nodes, by the rules of intervals."""

    def affine(
        self, box: Box, apply: Map, absolute: Map, constants: Tensor | None, terms: int, *factors: Tensor
    ) -> Box:
        moved = absolute(box.upper) * (1 + gamma(terms)) + underflow(terms, box.upper, box.upper, *factors)
        return Box(-moved, moved)


def magnitude(box: Box) -> Tensor:
    """The largest magnitude of every entry."""
    return torch.maximum(box.lower.abs(), box.upper.abs())


class Lines(NamedTuple):
    """What the lines at a kink add, for one sign of ``g``; 0 for units without.

    Args:
        steep: ``δ (1 - 1/a)``, times ``g`` on ``z``: (samples, *state).
        apart: ``δ l``, or at a ceiling ``δ (h - κ/e)``, times ``g`` lost: (samples, size).
        off: times ``|g|``, for the rounding of both: (samples, size).
    """

    steep: Tensor
    apart: Tensor
    off: Tensor


@dataclass(frozen=True)
class Relaxed:
    """What is known of ``z = σ(P)`` at a node: boxes (samples, *state).

    Args:
        node: of the graph.
        pre: of ``P``.
        z: of ``z``.
        operator: ``W``, and ``None`` for a ReLU.
        drift: (1, *state) how far what is computed may be from ``z``; ``None`` for not at all.
        ceiling: ``κ``; infinite for none.
        settles: whether a gauge shows that its adjoint equilibria settle, whatever the slopes.
    """

    node: Node
    pre: Box
    z: Box
    operator: Operator | None = None
    drift: Tensor | None = None
    ceiling: float = math.inf
    settles: bool = True

    @property
    def unstable(self) -> Tensor:
        """Where a kink of ``σ`` lies within the box of ``P``."""
        return self.crossing | self.capped

    @property
    def crossing(self) -> Tensor:
        """Where ``P`` may have either sign."""
        return (self.pre.lower < 0) & (self.pre.upper > 0)

    @property
    def capped(self) -> Tensor:
        """Where ``P`` may be on either side of the ceiling."""
        return (self.pre.lower < self.ceiling) & (self.pre.upper > self.ceiling)

    @property
    def slope(self) -> Tensor:
        """``a``: the slope of the chord from ``l`` to ``min(h, κ)``; 1 where ``P`` has one sign."""
        top = self.pre.upper.clamp(max=self.ceiling)
        return self._chord(top, top - self.pre.lower, self.crossing)

    @property
    def flat(self) -> Tensor:
        """``e``: the slope of the chord from ``l⁺`` to ``h``; 1 where no ceiling lies between."""
        bottom = self.pre.lower.clamp(min=0)
        return self._chord(self.ceiling - bottom, self.pre.upper - bottom, self.capped)

    @staticmethod
    def _chord(rise: Tensor, width: Tensor, kinked: Tensor) -> Tensor:
        """A slope, rounded up; 1 where there is no kink."""
        return torch.where(kinked, rise / width * (1 + 2.0**-50) + TINY, torch.ones_like(rise))

    def slopes(self, kind: str) -> tuple[Tensor, Tensor]:
        """Slopes of a line below ``σ`` and of one above.

        Args:
            kind: of the lines at a kink that is not bridged by a chord, 0 or as steep as the other side: ``zero``,
                ``one``, or ``adaptive``, whichever leaves less between.
        """
        low, high, ceiling = self.pre.lower, self.pre.upper, self.ceiling
        steep = {
            "adaptive": ((high > -low).to(low), (ceiling - low > high - ceiling).to(low)),
            "zero": (torch.zeros_like(low),) * 2, "one": (torch.ones_like(low),) * 2,
        }[kind]  # fmt: skip
        moving = (((high > 0) | (low >= 0)) & (low < ceiling)).to(low)
        lower, upper = torch.where(low < 0, steep[0], moving), torch.where(low < 0, self.slope, moving)
        if ceiling < math.inf:
            lower, upper = lower * self.flat, torch.where(high > ceiling, steep[1], moving) * upper
        return moving * lower, moving * upper

    def divisor(self) -> Tensor:
        """``δ``, rounded to nearest, shaped to broadcast over (samples, *state)."""
        if self.operator is None:
            return torch.ones((), dtype=self.z.lower.dtype, device=self.z.lower.device)
        return 1 - self.operator.diagonal()

    def doubt(self) -> Tensor:
        """How far ``δ`` may be from the exact one, relatively."""
        divisor = self.divisor()
        if self.operator is None:
            return torch.zeros_like(divisor)
        return self.operator.absolute().diagonal() * gamma(self.operator.terms) / divisor.abs() + 2.0**-51

    @property
    def computed(self) -> Box:
        """The box of what is handed on."""
        return self.z if self.drift is None else Box(self.z.lower - self.drift, self.z.upper + self.drift)

    def off(self, q: Tensor) -> Tensor:
        """``Wᵀ q`` without what each row was solved for, (rows, *state)."""
        if self.operator is None:
            return torch.zeros_like(q)
        return self.operator.transpose().apply(q) - self.operator.diagonal() * q

    @cached_property
    def charge(self) -> Charge:
        """What ``Wᵀ q`` loses, and any ``q`` of a few roundings besides."""
        size = magnitude(self.z)
        if self.operator is None:
            return Charge.of(size, size, 1)
        moved = self.operator.absolute().apply(size) + size
        return Charge.of(moved, size, self.operator.transpose().terms + 2, self.operator.absolute_units())

    @cached_property
    def lines(self) -> Lines:
        """What the upper lines at 0 add."""
        low = self.pre.lower
        return self._lines(self.slope, self.crossing, low, low.abs())

    @cached_property
    def caps(self) -> Lines | None:
        """What the lower lines at the ceiling add; ``None`` without one."""
        if self.ceiling == math.inf:
            return None
        high, flat = self.pre.upper, self.flat
        start = self.ceiling / flat
        return self._lines(flat, self.capped, high - start, high.abs() + start)

    def _lines(self, slope: Tensor, kinked: Tensor, apart: Tensor, size: Tensor) -> Lines:
        """Of chords.

        Args:
            apart: what is lost of a multiplier, over ``δ``.
            size: the sum of the magnitudes that it is the sum of.
        """
        divisor, doubt = self.divisor(), self.doubt()
        steep = torch.where(kinked, divisor * (1 - 1 / slope), 0.0)
        lost, most = (torch.where(kinked, factor * x, 0.0) for factor, x in ((divisor, apart), (divisor.abs(), size)))
        # δ, its product, the quotient and the difference round; (1/a - 1) may be large. Then there is the sum.
        reach = torch.where(kinked, divisor.abs() * (1 + 1 / slope), 0.0)
        off = reach * magnitude(self.z) * (2.0**-48 + doubt) + most * (gamma(lost[0].numel() + 8) + doubt)
        return Lines(steep, lost.flatten(1), off.flatten(1) + 16 * TINY * (1 + most.flatten(1)))

    @cached_property
    def floor(self) -> Tensor:
        """The least multipliers that are sound: 0 where a unit is off."""
        return torch.where(self.pre.upper <= 0, 0.0, -torch.inf)

    @cached_property
    def roof(self) -> Tensor:
        """The largest ones: 0 where a unit is at its ceiling."""
        return torch.where(self.pre.lower >= self.ceiling, 0.0, torch.inf)

    def where(self, chosen: Tensor, other: Relaxed) -> Relaxed:
        """These for the samples `chosen`, (samples,), and another's for the rest."""
        pre, z = (
            Box(*(torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(*sides, strict=True)))
            for sides in (
                ((self.pre.lower, self.pre.upper), (other.pre.lower, other.pre.upper)),
                ((self.z.lower, self.z.upper), (other.z.lower, other.z.upper)),
            )
        )
        return replace(self, pre=pre, z=z)

    def with_pre(self, pre: Box) -> Relaxed:
        """The same with other pre-activations, what they say of ``z``, and what ``z`` says of them.

        ``P >= z`` where ``z > 0``, and ``P <= z`` where it is below its ceiling.
        """
        lower = torch.where(self.z.lower > 0, torch.maximum(pre.lower, self.z.lower), pre.lower)
        upper = torch.where(self.z.upper < self.ceiling, torch.minimum(pre.upper, self.z.upper), pre.upper)
        pre = Box(lower, upper)
        z = self.z.intersect(Box(*(side.clamp(0, self.ceiling) for side in (lower, upper))))
        return replace(self, pre=pre, z=z)


@dataclass(frozen=True)
class Scene:
    """A graph with all that is known of its values.

    Args:
        graph: float64.
        values: the box of every value by node, and of the input.
        relaxed: the ReLUs and equilibria by node.
        region: the balls that the inputs are in, where they are in balls.
        rigorous: count what is lost to rounding.
        smooth: gradients see the corner that a row picks of a box move over while its coefficient is within this share
            of the row's largest one; values do not change.
        charges: of affine nodes by name, as they are asked for.
        balls: of values as a whole by node, where the inputs are in l2 balls.
    """

    graph: Graph
    values: Mapping[str, Box]
    relaxed: dict[str, Relaxed]
    region: Region | None = None
    rigorous: bool = True
    smooth: float = 0.0
    charges: dict[str, Charge] = field(default_factory=dict)
    balls: Mapping[str, Ball] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return len(self.values[INPUT].lower)

    @property
    def output(self) -> str:
        """The name of the last node."""
        return self.graph.nodes[-1].name

    def select(self, part: Tensor) -> Scene:
        """Some of the samples, in this order; one may be there several times."""
        values = {name: box.select(part) for name, box in self.values.items()}
        relaxed = {
            name: replace(known, pre=known.pre.select(part), z=known.z.select(part))
            for name, known in self.relaxed.items()
        }
        region = None if self.region is None else self.region[part]
        charges = {name: Charge(*(x[part] for x in charge)) for name, charge in self.charges.items()}
        balls = {name: ball.select(part) for name, ball in self.balls.items()}
        return replace(self, values=values, relaxed=relaxed, region=region, charges=charges, balls=balls)

    def ended(self, name: str, rows: Tensor, box: Box) -> Tensor:
        """The least value of rows that go no further, over a box and a ball: (samples, rows)."""
        least, ball = self.over_box(rows, box), self.balls.get(name)
        if ball is None or rows.requires_grad:
            return least
        return torch.fmax(least, ball.lowest(self.by_sample(rows), rigorous=self.rigorous))

    def charge(self, node: Node, terms: int, factors: tuple[Tensor, ...]) -> Charge:
        """What rows lose at an affine node."""
        if node.name not in self.charges:
            size = magnitude(self.values[node.inputs[0]])
            moved = RULES[node.operation.kind](_Sizes({}), node, [Box(-size, size)]).upper
            self.charges[node.name] = Charge.of(moved, size, terms, *factors)
        return self.charges[node.name]

    def by_sample(self, rows: Tensor) -> Tensor:
        """Rows (samples * rows, *shape) as (samples, rows, size)."""
        return rows.reshape(self.samples, -1, rows[0].numel())

    def over_box(self, rows: Tensor, box: Box) -> Tensor:
        """`inner`, smooth for gradients: that of ``q · z`` with ``z`` where smoothing puts it."""
        q = self.by_sample(rows)
        least = inner(q.detach(), box, self.rigorous)
        if not rows.requires_grad:
            return least
        linear = (q * self._corner(q, box)).sum(2)
        return least + linear - linear.detach()

    @torch.no_grad()
    def _corner(self, q: Tensor, box: Box) -> Tensor:
        """The corner of a box where rows, (samples, rows, size), are least, moved over the small ones by `smooth`."""
        kink = self.smooth * q.abs().amax(2, keepdim=True) + TINY
        center, radius = (x.flatten(1)[:, None] for x in (box.center, box.radius))
        return center - radius * (q / kink).clamp(-1, 1)

    def over_inputs(self, rows: Tensor) -> Tensor:
        """The least value of rows on the input over the region, (samples, rows)."""
        box = self.values[INPUT]
        least = self.over_box(rows, box)
        if self.region is None or self.region.norm == "linf":
            return least
        return torch.maximum(least, ball(self.by_sample(rows), self.region, box, self.rigorous))

    def worst(self, rows: Tensor) -> Tensor:
        """Where rows on the input are about least over the region, see `smooth`: (samples * rows, *features)."""
        box = self.values[INPUT]
        q = self.by_sample(rows)
        if self.region is None or self.region.norm == "linf":
            x = self._corner(q, box)
        else:
            x = _nearest(q, self.region, box).x
        return x.view_as(rows)

    def least(
        self, start: Mapping[str, Tensor], multipliers: Mapping[str, Rule], tightened: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Lower bounds of rows, (samples, rows), and the multipliers that give them, (samples, rows, *state).

        Args:
            start: coefficients by node, (samples * rows, *shape), exactly.
            multipliers: a rule for every node that is not to be bounded by its box.
            tightened: the node whose own rows these are: they speak of its exact equilibrium.
        """
        total, on_input, used = self.back(start, multipliers, tightened)
        return total if on_input is None else self._gain(total, self.over_inputs(on_input)), used

    def _gain(self, total: Tensor, part: Tensor) -> Tensor:
        result = total + part
        return result - (total.abs() + part.abs()) * 2.0**-51 if self.rigorous else result

    def back(
        self, start: Mapping[str, Tensor], multipliers: Mapping[str, Rule], tightened: str | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """`least` up to the input: what was gained so far, the rows that arrive there, and the multipliers."""
        rows = dict(start)
        used: dict[str, Tensor] = {}
        first = next(iter(start.values()))
        count = len(first) // self.samples
        total = first.new_zeros(self.samples, count)

        def collect(name: str, q: Tensor) -> Tensor:
            """Rows on a value join those that are there; returns what that loses."""
            if name not in rows:
                rows[name] = q
                return torch.zeros_like(total)
            rows[name] = rows[name] + q
            size = magnitude(self.values[name])
            return Charge.of(size, size, 1).on(self.by_sample(rows[name])) if self.rigorous else torch.zeros_like(total)

        for node in reversed(self.graph.nodes):
            q = rows.pop(node.name, None)
            if q is None:
                continue
            known = self.relaxed.get(node.name)
            if node.operation.kind in PULLS:
                pulled = PULLS[node.operation.kind](node.module, q, self.values[node.inputs[0]].lower.shape[1:])
                for part, constants in pulled.gained:
                    box = Box(constants[None], constants[None])
                    total = self._gain(total, inner(self.by_sample(part), box, self.rigorous))
                if self.rigorous and pulled.terms:
                    charge = self.charge(node, pulled.terms, pulled.factors)
                    total = self._gain(total, -charge.on(self.by_sample(q)))
                total = self._gain(total, -collect(node.inputs[0], pulled.rows))
            elif node.operation.kind == "add":
                for name in node.inputs:
                    total = self._gain(total, -collect(name, q))
            elif known is None:
                total = self._gain(total, self.ended(node.name, q, self.values[node.name]))
            else:
                if known.drift is not None and node.name != tightened:
                    total = self._gain(total, self.over_box(q, Box(-known.drift, known.drift)))
                if node.name not in multipliers:
                    total = self._gain(total, self.ended(node.name, q, known.z))
                    continue
                g = multipliers[node.name](known, q.view(self.samples, count, *q.shape[1:]))
                used[node.name] = g = allowed(known, g)
                total = self._gain(total, self._relaxed(known, q, g))
                total = self._gain(total, -collect(node.inputs[0], g.flatten(0, 1)))
        return total, rows.get(INPUT), used

    def _relaxed(self, known: Relaxed, q: Tensor, g: Tensor) -> Tensor:
        """What rows gain at a ReLU or an equilibrium with these multipliers, apart from what goes on as ``g · v``."""
        flat, lines = g.flatten(0, 1), known.lines
        rest = q - flat if known.operator is None else known.operator.transpose().apply(flat) + q - flat
        below = torch.relu(-g)
        rest = torch.addcmul(rest.view_as(g), lines.steep[:, None], below, value=-1)
        gained, off = dot(below.flatten(2), lines.apart), lines.off
        if known.caps is not None:
            above, caps = torch.relu(g), known.caps
            rest = torch.addcmul(rest, caps.steep[:, None], above)
            gained, off = gained - dot(above.flatten(2), caps.apart), off + caps.off
        gained = self.over_box(rest.view_as(q), known.z) + gained
        if not self.rigorous:
            return gained
        # q is no larger than the rest, Wᵀ g, g and what the lines add are together.
        lost = known.charge.on(g.flatten(2)) + dot(g.abs().flatten(2), off)
        return (gained - lost) - (gained.abs() + lost) * 2.0**-50


def most(x: Tensor) -> Tensor:
    """The largest magnitude of each row, (samples, rows)."""
    return x.abs().flatten(2).amax(2)


def allowed(known: Relaxed, g: Tensor) -> Tensor:
    """Multipliers cut to what is sound: 0 or more where a unit is off, 0 or less at its ceiling, and finite."""
    return torch.clamp(g, known.floor[:, None], known.roof[:, None]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def crown(slopes: str, tol: float = 1e-5, max_steps: int = 60) -> Rule:
    """The multipliers of CROWN: ``g = D(q) q``, for an equilibrium the fixed point with ``q + Wᵀ g`` for ``q``.

    Args:
        slopes: see `Relaxed.slopes`.
        tol: of the fixed point, relative to each row's largest entry; any iterate is a multiplier.
        max_steps: of the fixed point.
    """

    def rule(known: Relaxed, q: Tensor) -> Tensor:
        lower, upper = (side[:, None] for side in known.slopes(slopes))
        if known.operator is None:
            return sloped(q, lower, upper)
        g = _fixed_point(known.operator.solved()[0].transpose().apply, q, lower, upper, tol, max_steps)
        return g / known.divisor()

    return rule


def sloped(q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``D(q) q``."""
    # Two products take an eighth of the time of choosing a slope, and are as exact.
    return torch.relu(q).mul_(lower).addcmul_(q.clamp(max=0), upper)


def _fixed_point(apply: Map, q: Tensor, lower: Tensor, upper: Tensor, tol: float, max_steps: int) -> Tensor:
    """``t = D(q + W̃ᵀ t) (q + W̃ᵀ t)``, (samples, rows, *state), every row for as long as it needs.

    Which steps a row is looked at after does not depend on the rows beside it.
    """
    shape, rows = q.shape, q.shape[1]
    t, found = sloped(q, lower, upper), None
    places = torch.arange(shape[0] * rows, device=q.device)
    for step in range(1, max_steps + 1):
        tick()
        before, t = t, sloped((apply(t.flatten(0, 1)) + q.flatten(0, 1)).view_as(q), lower, upper)
        if step % SYNC:
            continue
        moving = (most(t - before) > tol * most(t)).flatten()
        left = moving.nonzero().flatten()
        if not len(left):
            break
        if len(left) < len(moving):
            flat = t.flatten(0, 1)
            found = flat.clone() if found is None else found.index_copy(0, places, flat)
            places = places[left]
            t, q = flat[left][:, None], q.flatten(0, 1)[left][:, None]
            lower, upper, rows = lower[left // rows], upper[left // rows], 1
    whole = t if found is None else found.index_copy(0, places, t.flatten(0, 1))
    return whole.view(shape)


def given(g: Tensor) -> Rule:
    """These multipliers, (samples, rows, *state)."""
    return lambda known, q: g


class _Ball(NamedTuple):
    """Region and box in the shape of rows, (samples, 1 or rows, features), with a good ``s`` and its minimiser."""

    center: Tensor
    weights: Tensor
    moves: Tensor
    lower: Tensor
    upper: Tensor
    eps: Tensor
    s: Tensor
    x: Tensor


@torch.no_grad()
def _nearest(q: Tensor, region: Region, box: Box) -> _Ball:
    """Where ``q · x`` is about least over an l2 ball cut to its box; q: (samples, rows, features)."""
    c, lower, upper = (side.to(q).flatten(1)[:, None] for side in (region.center, box.lower, box.upper))
    w = torch.ones_like(c[:1]) if region.weights is None else region.weights.to(q).flatten()[None, None]
    moves, eps = w > 0, region.radii_up().to(q)[:, None, None]
    w = torch.where(moves, w, 1.0)
    span = torch.where(moves, (q * w) ** 2, 0.0).sum(2, keepdim=True).sqrt()
    largest = torch.where(span > 0, span / (2 * eps.clamp(min=TINY)), 1.0)

    def minimiser(s: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(torch.where(moves, c - q * w * w / (2 * s), c), lower), upper)

    few, many = torch.full_like(largest, -40.0), torch.zeros_like(largest)
    for _ in range(20):
        middle = (few + many) / 2
        away = torch.where(moves, (minimiser(largest * 2**middle) - c) / w, 0.0)
        inside = (away * away).sum(2, keepdim=True) <= eps * eps
        few, many = torch.where(inside, few, middle), torch.where(inside, middle, many)
    s = largest * 2**many
    return _Ball(c, w, moves, lower, upper, eps, s, minimiser(s))


def ball(q: Tensor, region: Region, box: Box, rigorous: bool = True) -> Tensor:
    """The least ``q · x`` over an l2 ball cut to its box, from below: (samples, rows).

    For every ``s >= 0`` it is at least the minimum over the box of the convex ``q·x + s (‖(x - c) / w‖² - eps²)``, and
    that at least its tangent's at any point.

    Args:
        q: (samples, rows, size).
    """
    c, w, moves, lower, upper, eps, s, x = _nearest(q, region, box)
    t = torch.where(moves, (x - c) / w, 0.0)
    bent = 2 * s * t / w
    slope, low, high = q + bent, lower - x, upper - x
    tangent = torch.minimum(slope * low, slope * high)
    whole = (q * x + s * t * t + tangent).sum(2) - (s * eps * eps)[:, :, 0]
    if not rigorous:
        # As `x` is the minimiser, it is the gradient; that of the tangent would jump.
        linear = (q * x).sum(2)
        return whole.detach() + linear - linear.detach()
    size = torch.maximum(low.abs(), high.abs())
    parts = 2.0**-48 * (q.abs() + bent.abs()) * size
    parts = parts + 2.0**-48 * (q.abs() * x.abs() + s * t * t + tangent.abs())
    g = gamma(q.shape[2] + 4)
    lost = parts.sum(2) * (1 + g) + g * (q.abs() * x.abs() + s * t * t + tangent.abs()).sum(2)
    lost = lost + 2.0**-48 * (s * eps * eps)[:, :, 0]
    lost = lost + TINY * 64 * q.shape[2] * (2 + q.abs().amax(2) + s[:, :, 0] + size.amax(2) + x.abs().amax(2))
    return (whole - lost) - (whole.abs() + lost) * 2.0**-50


# --- affine nodes -----------------------------------------------------------------------------------------------------


class Pulled(NamedTuple):
    """What an affine node ``y = A x + b`` makes of rows ``q``.

    Args:
        rows: ``Aᵀ q``, (rows, *shape of x).
        gained: coefficients and constants whose products are ``q · b``.
        terms: that are summed for an entry of `rows`; 0 where nothing is rounded.
        factors: tensors whose largest entries bound those of ``A``.
    """

    rows: Tensor
    gained: tuple[tuple[Tensor, Tensor], ...] = ()
    terms: int = 0
    factors: tuple[Tensor, ...] = ()


Pull = Callable[[Any, Tensor, tuple[int, ...]], Pulled]
"""``(module, q, shape of x) -> ...``."""


def _by_channel(values: Tensor, q: Tensor) -> Tensor:
    """(channels,) as one value, of the shape of those that rows are on."""
    return values.view(-1, *[1] * (q.dim() - 2)).expand(q.shape[1:])


def _bias(module: Any, q: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return () if module.bias is None else ((q, _by_channel(module.bias, q)),)


def _linear(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    return Pulled(q @ module.weight, _bias(module, q), len(module.weight) + 1, (module.weight,))


def _conv2d(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    pads, zeros = tuple(module._reversed_padding_repeated_twice), module.padding_mode == "zeros"
    mode = "constant" if zeros else module.padding_mode
    left, right, top, bottom = pads
    size, weight = (len(q), shape[0], shape[1] + top + bottom, shape[2] + left + right), module.weight
    wide: Tensor = conv2d_input(size, weight, q, module.stride, 0, module.dilation, module.groups)  # type: ignore[no-untyped-call]  # torch's
    copies = 1 if zeros else (1 + left + right) * (1 + top + bottom)
    terms = (weight[:, 0].numel() // module.groups) * copies + 1
    return Pulled(fold(wide, pads, mode, shape), _bias(module, q), terms, (weight,))


def fold(wide: Tensor, pads: tuple[int, ...], mode: str, shape: tuple[int, ...]) -> Tensor:
    """What is on a padded image, back on the image: each pixel takes what its copies have."""
    if not any(pads):
        return wide
    if mode == "constant":
        return wide[..., pads[2] : pads[2] + shape[1], pads[0] : pads[0] + shape[2]]
    return adjoint_of(lambda x: F.pad(x, pads, mode), wide, shape)


def adjoint_of(apply: Map, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The adjoint of a linear map, by differentiating it."""
    with torch.enable_grad():
        x = torch.zeros((len(rows), *shape), dtype=rows.dtype, device=rows.device, requires_grad=True)
        (pulled,) = torch.autograd.grad(apply(x), x, rows, create_graph=rows.requires_grad)
    return pulled


def _average(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    # Weights of one sign, none above 1: what an output gives to a pixel.
    return Pulled(adjoint_of(module, q, shape), (), q[0, 0].numel() + 4, (q.new_ones(1),))


def _batch_norm(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    deviation = (module.running_var + module.eps).sqrt()
    scale = deviation.reciprocal() if module.weight is None else module.weight / deviation
    shift = torch.zeros_like(scale) if module.bias is None else module.bias
    return _scaled(q, module.running_mean, scale, shift)


def _normalize(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    mean, scale = module.mean.expand(shape[0]), module.std.reciprocal().expand(shape[0])
    return _scaled(q, mean, scale, torch.zeros_like(mean))


def _scaled(q: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Pulled:
    """``(x - mean) scale + shift`` by channel."""
    pulled = q * _by_channel(scale, q)
    gained = (q, _by_channel(shift, q)), (pulled, _by_channel(-mean, q))
    return Pulled(pulled, gained, 8, (scale,))


def _flatten(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    return Pulled(q.view(-1, *shape))


def _embed(module: Any, q: Tensor, shape: tuple[int, ...]) -> Pulled:
    units = q.shape[1] - len(module.rest)
    return Pulled(q[:, :units].reshape(-1, *shape), ((q[:, units:], module.rest),))


PULLS: dict[str, Pull] = {
    "normalize": _normalize,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm1d": _batch_norm,
    "batch_norm2d": _batch_norm,
    "avg_pool2d": _average,
    "adaptive_avg_pool2d": _average,
    "flatten": _flatten,
    "embed": _embed,
}
"""Every affine operation, by kind."""
