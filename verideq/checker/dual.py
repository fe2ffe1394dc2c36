"""The linear dual: a bound for every multiplier.

**Theorem.** Let ``z = relu(P)`` with ``P = p / δ`` (a ReLU: ``p`` its input, ``δ = 1``; an equilibrium: ``p_i =
Σ_{j≠i} W_ij z_j + v_i``, ``δ_i = 1 - W_ii``), and let ``P`` lie in ``[l, h]``. Then

    δ z >= p,        δ z <= a (p - δ l)  where l < 0 < h, for any a >= h / (h - l),        δ z = p  where l >= 0.

Take the first with a multiplier ``g > 0``, the second with ``-g / a`` for ``g < 0``, the third with any ``g``: then ``q
· z`` is at least

    (q - δ g / (a where the second was taken) + Wᵀ g) · z  +  g · v  -  Σ δ g l  (where the second was taken)

with ``z`` anywhere in its box, and the row ``g`` on ``v`` goes on to the operation before. Where no ``g`` is given the
row ends: ``q · z`` is bounded over the box of ``z``, which is interval arithmetic, or over its ball. (Wei & Kolter's
interval bound is ``g = 0``; CROWN for an equilibrium layer is `multipliers`; the best ``g`` is the triangle
relaxation's.)

**With a ceiling** ``κ``, ``z = min(max(P, 0), κ)``, the second has ``min(h, κ)`` for ``h``; the first holds where
``h <= κ``, the third where ``0 <= l`` and ``h <= κ``. For the others there are

    δ z >= δ κ - e (δ h - p)  where l < κ < h, for any e >= (κ - l⁺) / (h - l⁺),        δ z <= p  where l >= 0,

the one with ``g / e`` for ``g > 0``, which leaves ``q - δ g / e`` on ``z`` and gains ``δ g (κ / e - h)``; the other
with any ``g <= 0``. Where ``l >= κ`` a positive ``g`` has no line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from verideq.checker.adjoint import PULLS, inner, pull
from verideq.checker.arithmetic import (
    Arithmetic,
    Array,
    Interval,
    constant,
    require,
    total,
)  # fmt: skip
from verideq.checker.balls import Ball, lowest
from verideq.checker.claim import Bounding, Case, Claim
from verideq.checker.layers import Layer
from verideq.checker.network import Node


@dataclass(frozen=True)
class Relaxation:
    """What is known of ``z = relu(P)`` for every case: arrays (cases, *state), `divisor` broadcastable.

    Args:
        pre: ``[l, h]``.
        z: its box.
        slope: ``a``, 1 where ``P`` has one sign.
        divisor: ``δ``.
        layer: of an equilibrium, or ``None``.
        drift: how far what is computed may be from ``z``, by unit; ``None`` for not at all.
        cap: ``e``, 1 where no ceiling lies within ``[l, h]``; ``None`` without a ceiling.
    """

    pre: Interval
    z: Interval
    slope: Array
    divisor: Interval
    layer: Layer | None
    drift: Array | None
    cap: Array | None = None

    @property
    def ceiling(self) -> Any:
        """``κ``, or ``None``."""
        return None if self.layer is None else self.layer.ceiling

    @property
    def unstable(self) -> Array:
        return (self.pre[0] < 0) & (self.pre[1] > 0)

    def computed(self, calc: Arithmetic) -> Interval:
        """The box of what is handed on."""
        return self.z if self.drift is None else calc.add(self.z, (-self.drift, self.drift))


def relax(
    calc: Arithmetic, pre: Interval, z: Interval, divisor: Interval, layer: Layer | None, drift: Array | None
) -> Relaxation:
    """The relaxation over a box of pre-activations, its slopes rounded up once.

    ``P`` is at least ``z`` where that is positive, and at most ``z`` where that is below its ceiling.
    """
    ceiling = None if layer is None else layer.ceiling
    lo: Array = np.where(z[0] > 0, np.maximum(pre[0], z[0]), pre[0])
    hi: Array = np.minimum(pre[1], z[1])
    low, top, cap = lo, hi, None
    one = constant(calc, calc.one, *lo.shape)[0]
    if ceiling is not None:
        hi = np.where(z[1] < ceiling, hi, pre[1])
        low, top = np.minimum(lo, ceiling), np.minimum(hi, ceiling)
        bottom, capped = np.maximum(low, calc.zero), (lo < ceiling) & (hi > ceiling)
        rise, reach = (
            calc.subtract((ceiling, ceiling), (bottom, bottom))[1],
            calc.subtract((hi, hi), (bottom, bottom))[0],
        )
        reach = np.where(capped, reach, one)
        cap = np.where(capped, calc.divide((rise, rise), (reach, reach))[1], one)
    unstable = (lo < 0) & (hi > 0)
    width = np.where(unstable, calc.subtract((top, top), (lo, lo))[0], one)
    slope = calc.divide((np.where(unstable, top, one),) * 2, (width, width))[1]
    inside = np.maximum(z[0], np.maximum(low, calc.zero)), np.minimum(z[1], np.maximum(top, calc.zero))
    return Relaxation((lo, hi), inside, np.where(unstable, slope, one), divisor, layer, drift, cap)


@dataclass(frozen=True)
class Scene:
    """A network, and all that is known of it so far for a batch of cases."""

    calc: Arithmetic
    nodes: Sequence[Node]
    cases: Sequence[Case]
    values: dict[str, Interval]
    relaxations: dict[str, Relaxation]
    balls: dict[str, Ball] = field(default_factory=dict)

    def least(self, start: Mapping[str, Interval], steps: Sequence[Bounding], rows: int) -> Array:
        """A lower bound of every row, (cases, rows).

        Args:
            start: the coefficients of the rows by node, (cases * rows, *state).
            steps: of every case: where the multipliers come from.
        """
        calc, step = self.calc, steps[0]
        require(set(step.multipliers) <= set(self.relaxations), "multipliers of a node that is not relaxed here")
        coefficients, bounds = dict(start), constant(calc, calc.zero, len(self.cases) * rows)

        def collect(name: str, q: Interval) -> None:
            coefficients[name] = calc.add(coefficients[name], q) if name in coefficients else q

        for node in reversed(self.nodes):
            given = [step.multipliers[node.name] for step in steps] if node.name in step.multipliers else None
            q = coefficients.pop(node.name, None)
            if q is None and given is not None:
                q = constant(calc, calc.zero, len(self.cases) * rows, *self.relaxations[node.name].slope.shape[1:])
            if q is None:
                continue
            if node.kind == "add":
                for name in node.inputs:
                    collect(name, q)
            elif node.kind in PULLS:
                q, shift = pull(calc, node, q, self.values[node.inputs[0]][0].shape[1:])
                bounds = calc.add(bounds, shift)
                collect(node.inputs[0], q)
            else:
                q, part = self._relaxed(node, q, given, step, rows)
                bounds = calc.add(bounds, part)
                if q is not None:
                    collect(node.inputs[0], q)
        if "input" in coefficients:
            bounds = calc.add(bounds, self._over_inputs(coefficients["input"], rows))
        return bounds[0].reshape(len(self.cases), rows)

    def _by_row(self, x: Interval, rows: int) -> Interval:
        """(cases, *state) repeated for every row, flat."""
        return np.repeat(x[0], rows, 0), np.repeat(x[1], rows, 0)

    def _relaxed(
        self, node: Node, q: Interval, given: list[Array] | None, step: Bounding, rows: int
    ) -> tuple[Interval | None, Interval]:
        """What a row leaves on the input of a node that is not affine, and what it gains or loses there."""
        calc, known = self.calc, self.relaxations.get(node.name)
        if known is None:
            return None, self._ended(node, q, self.values[node.name], rows)
        # The tightened node itself is the true equilibrium; what is handed on may have drifted from it.
        drift = None if node.name == step.node else known.drift
        away = constant(calc, calc.zero, 1) if drift is None else inner(calc, q, (-drift, drift))
        if given is None and step.slopes is None:
            return None, calc.add(self._ended(node, q, known.z, rows), away)
        known = replace(
            known,
            pre=self._by_row(known.pre, rows),
            z=self._by_row(known.z, rows),
            slope=np.repeat(known.slope, rows, 0),
            cap=None if known.cap is None else np.repeat(known.cap, rows, 0),
        )
        lo, hi = known.pre
        if given is None:
            g = calc.exactly(multipliers(calc, known, q, step))
        else:
            g = np.stack(given)
            require(g.shape[1:] == (rows, *lo.shape[1:]), f"{node.name}: multipliers of the shape {g.shape[1:]}")
            g = g.reshape(lo.shape)
        g = np.where(hi <= 0, np.maximum(g, calc.zero), g)
        if known.cap is not None:
            g = np.where(lo >= known.ceiling, np.minimum(g, calc.zero), g)
        # δ g, and with the upper line δ g / a
        flat = calc.multiply((g, g), known.divisor)
        steep, upper = calc.divide(flat, (known.slope, known.slope)), (g < 0) & known.unstable
        on_z = tuple(np.where(upper, a, b) for a, b in zip(steep, flat, strict=True))
        charged = tuple(np.where(upper, side, calc.zero) for side in flat)
        if known.cap is not None:
            above = (g > 0) & (lo < known.ceiling) & (hi > known.ceiling)
            level = calc.divide(flat, (known.cap, known.cap))
            on_z = tuple(np.where(above, a, b) for a, b in zip(level, on_z, strict=True))
            reach, level = (tuple(np.where(above, side, calc.zero) for side in x) for x in (flat, level))
            top = constant(calc, known.ceiling, *lo.shape)
            gained = calc.subtract(inner(calc, (level[0], level[1]), top), inner(calc, (reach[0], reach[1]), (hi, hi)))
            away = calc.add(away, gained)
        rest = calc.subtract(q, (on_z[0], on_z[1]))
        if known.layer is not None:
            rest = calc.add(rest, known.layer.fusion.pull(calc, (g, g)))
        bound = calc.subtract(inner(calc, rest, known.z), inner(calc, (charged[0], charged[1]), (lo, lo)))
        return (g, g), calc.add(bound, away)

    def _ended(self, node: Node, q: Interval, box: Interval, rows: int) -> Interval:
        """Rows on a value over its box, or over its ball if that is better."""
        bounds = inner(self.calc, q, self._by_row(box, rows))
        if node.name not in self.balls:
            return bounds
        return np.fmax(bounds[0], lowest(self.calc, q, self.balls[node.name], rows)), bounds[1]

    def _over_inputs(self, q: Interval, rows: int) -> Interval:
        """The least ``q · x`` over the ball, (cases * rows,)."""
        calc = self.calc
        over_box = inner(calc, q, self._by_row(self.values["input"], rows))
        if self.cases[0].claim.norm == "linf":
            return over_box
        over_ball = ball(calc, q, self._by_row(self.values["input"], rows), [case.claim for case in self.cases], rows)
        return np.maximum(over_box[0], over_ball), over_box[1]


def multipliers(calc: Arithmetic, known: Relaxation, q: Interval, step: Bounding) -> Array:
    """Multipliers by the rule of CROWN: ``g = D(q) q``, for an equilibrium of ``q = c + Wᵀ g``, iterated from zero.

    Plain float64: whatever comes out is a multiplier.
    """
    lo, hi, own = (np.broadcast_to(calc.nearly((side, side)), known.slope.shape) for side in (*known.pre, known.slope))
    divisor, c = calc.nearly(known.divisor), calc.nearly(q)
    lower = {"zero": 0.0 * hi, "one": 0.0 * hi + 1.0, "adaptive": (hi > -lo).astype(np.float64)}[str(step.slopes)]
    lower = np.where(lo >= 0, 1.0, np.where(hi <= 0, 0.0, lower)) / divisor
    upper = np.where(lo >= 0, 1.0, np.where(hi <= 0, 0.0, own)) / divisor
    if known.cap is not None:
        cap = np.broadcast_to(calc.nearly((known.cap, known.cap)), known.slope.shape)
        near = {"zero": 0.0 * hi, "one": 0.0 * hi + 1.0, "adaptive": (1.0 - lo > hi - 1.0).astype(np.float64)}
        lower, upper = lower * cap * (lo < 1), upper * np.where(hi > 1, near[str(step.slopes)], 1.0) * (lo < 1)
    g = np.where(c > 0, lower, upper) * c
    if known.layer is not None:
        for _ in range(step.iterations):
            point = calc.exactly(g)
            seen = c + calc.nearly(known.layer.fusion.pull(calc, (point, point)))
            g = np.where(seen > 0, lower, upper) * seen
    return np.where(np.isfinite(g), g, 0.0)


def ball(calc: Arithmetic, q: Interval, box: Interval, claims: Sequence[Claim], rows: int) -> Array:
    """The least ``q · x`` over the part of a box in ``Σ ((x - c) / w)² <= eps²``, from below, (rows,).

    For every ``s >= 0`` it is at least the minimum over the box of the convex ``q·x + s (Σ ((x - c) / w)² - eps²)``,
    and that at least its tangent's, at any point. A feature of weight zero has no term: the box holds it in place.
    """
    flat = [side.reshape(len(side), -1) for side in (*q, *box)]
    q, box = (flat[0], flat[1]), (flat[2], flat[3])
    stored = [np.stack([claim.center[k].reshape(-1) for claim in claims]).repeat(rows, 0) for k in (0, 1)]
    center = stored[0], stored[1]
    one = constant(calc, calc.one, 1, *claims[0].center[0].reshape(-1).shape)[0]
    weights = np.stack([one[0] if claim.weights is None else claim.weights.reshape(-1) for claim in claims])
    weights = weights.repeat(rows, 0)
    moves = weights > 0
    weights = np.where(moves, weights, calc.one)
    eps = [claim.eps for claim in claims for _ in range(rows)]
    near = [calc.nearly(x) for x in (q, center, (box[0],) * 2, (box[1],) * 2, (weights, weights))]
    s, point = _tangent(near[0], near[1], near[2], near[3], np.where(moves, near[4], 0.0), np.array(eps, dtype=float))
    s, point = calc.exactly(s)[:, None], np.minimum(np.maximum(calc.exactly(point), box[0]), box[1])
    off = calc.divide(calc.subtract((point, point), center), (weights, weights))
    off = np.where(moves, off[0], calc.zero), np.where(moves, off[1], calc.zero)
    inward = calc.multiply((s + s, s + s), calc.divide(off, (weights, weights)))
    slope = calc.add(q, inward)
    beside = calc.subtract(box, (point, point))
    squares = calc.multiply((s, s), calc.multiply(off, off))
    value = total(calc, calc.add(calc.add(calc.multiply(q, (point, point)), squares), calc.multiply(slope, beside)))
    most: Array = np.array([calc.rational(radius * radius)[1] for radius in eps], dtype=calc.kind)
    return calc.subtract(value, calc.multiply((s[:, 0], s[:, 0]), (most, most)))[0]


def _tangent(q: Array, c: Array, lo: Array, hi: Array, w: Array, eps: Array) -> tuple[Array, Array]:
    """A good ``s`` for every row, and the minimiser for it: plain float64, any would do."""

    def minimiser(s: Array) -> Array:
        return np.clip(np.where(w > 0, c - q * w * w / (2 * s[:, None]), c), lo, hi)

    largest = np.sqrt(((q * w) ** 2).sum(1)) / (2 * np.where(eps > 0, eps, 1.0))
    usable = np.isfinite(largest) & (largest > 0) & (eps > 0)
    largest = np.where(usable, largest, 1.0)
    few, many = np.full(len(q), -40.0), np.zeros(len(q))
    for _ in range(20):
        middle = 0.5 * (few + many)
        off = np.where(w > 0, (minimiser(largest * 2.0**middle) - c) / np.where(w > 0, w, 1.0), 0.0)
        inside = (off * off).sum(1) <= eps * eps
        few, many = np.where(inside, few, middle), np.where(inside, middle, many)
    s = largest * 2.0**many
    point = minimiser(s)
    return np.where(usable, s, 0.0), np.where(np.isfinite(point), point, lo)
