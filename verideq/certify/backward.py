"""Linear bounds that travel backwards through a graph: rows ``q`` with ``q · y >= ...``, rounding included.

For an affine node ``y = A x + b`` the row on ``x`` is ``Aᵀ q`` and ``q · b`` is gained. At a ReLU, and at an
equilibrium, a row is bounded by the linear dual (docs/theory.md): with ``z = relu(P)``, ``P = p / δ`` in ``[l, h]``,
``a >= h / (h - l)``,

    δ z >= p,        δ z <= a (p - δ l)  where l < 0 < h,        δ z = p  where l >= 0,

so that *every* multiplier ``g`` (0 or more where ``h <= 0``) gives

    q · z  >=  min over the box of (q + Wᵀ g - g + δ g (1 - 1/a)) · z  +  g · v  -  Σ δ g l,

the terms with ``a`` and ``l`` only where ``g < 0`` and ``l < 0 < h``. ``W = 0`` and ``δ = 1`` for a ReLU. Where a row
has no multiplier it ends, and is bounded over the box of ``z``: that is interval arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from verideq.box import TINY, Box, gamma, spread, underflow
from verideq.equilibrium import Operator
from verideq.graph import INPUT, Graph, Node
from verideq.region import Region, round_up

SYNC = 4
"""Steps of the adjoint equilibrium between two looks at whether it has arrived."""

Map = Callable[[Tensor], Tensor]
Rule = Callable[["Relaxed", Tensor], Tensor]
"""Multipliers for rows: ``(relaxed, q) -> g``, (samples, rows, *state) both."""


class Rows(NamedTuple):
    """Coefficients (rows, *shape), and how far each may be from the exact one; ``None``: nobody asks."""

    center: Tensor
    radius: Tensor | None

    def plus(self, other: Rows) -> Rows:
        """The sum of two."""
        center = self.center + other.center
        if self.radius is None or other.radius is None:
            return Rows(center, None)
        return Rows(center, (self.radius + other.radius) * (1 + 2.0**-51) + center.abs() * 2.0**-52 + 8 * TINY)

    def affine(self, apply: Map, absolute: Map, terms: int, *factors: Tensor) -> Rows:
        """``A q``, see `verideq.certify.interval.Arithmetic.affine`."""
        if self.radius is None:
            return Rows(apply(self.center), None)
        moved = absolute(spread(self.center, self.radius, terms)) + underflow(terms, self.center, self.radius, *factors)
        return Rows(apply(self.center), moved)


def inner(rows: Rows, box: Box, samples: int) -> Tensor:
    """The least ``q · x`` over a box of every sample, from below: (samples, rows).

    Args:
        rows: (samples * rows, *shape).
        box: (samples or 1, *shape).
    """
    q = rows.center.reshape(samples, -1, *[rows.center[0].numel()])
    lower, upper = (side.flatten(1)[:, None] for side in (box.lower, box.upper))
    least = (torch.where(q > 0, lower, upper) * q).sum(2)
    if rows.radius is None:
        return least
    g = gamma(q.shape[2] + 2)
    size = torch.maximum(lower.abs(), upper.abs())
    off = rows.radius.reshape(q.shape) * (1 + g) + g * q.abs()
    lost = (off * size).sum(2) * (1 + g) + 8 * TINY * (q.shape[2] + 8) * (2 + size.amax(2) + q.abs().amax(2))
    return (least - lost) - (least.abs() + lost) * 2.0**-51


@dataclass(frozen=True)
class Relaxed:
    """What is known of ``z = relu(P)`` at a node: boxes (samples, *state).

    Args:
        node: of the graph.
        pre: of ``P``.
        z: of ``z``.
        operator: ``W``, and ``None`` for a ReLU.
        drift: (1, *state) how far what is computed may be from ``z``; ``None`` for not at all.
    """

    node: Node
    pre: Box
    z: Box
    operator: Operator | None = None
    drift: Tensor | None = None

    @property
    def unstable(self) -> Tensor:
        """Where ``P`` may have either sign."""
        return (self.pre.lower < 0) & (self.pre.upper > 0)

    @property
    def slope(self) -> Tensor:
        """``a``: the chord's slope, rounded up; 1 where ``P`` has one sign."""
        low, high = self.pre.lower, self.pre.upper
        return torch.where(self.unstable, high / (high - low) * (1 + 2.0**-50) + TINY, torch.ones_like(low))

    def divisor(self) -> Tensor:
        """``δ``, rounded to nearest, shaped to broadcast over (samples, *state)."""
        if self.operator is None:
            return torch.ones((), dtype=self.z.lower.dtype, device=self.z.lower.device)
        return 1 - self.operator.diagonal()

    @property
    def computed(self) -> Box:
        """The box of what is handed on."""
        return self.z if self.drift is None else Box(self.z.lower - self.drift, self.z.upper + self.drift)

    def pull_off(self, rows: Rows) -> Rows:
        """``Wᵀ q`` without what each row was solved for."""
        if self.operator is None:
            return Rows(torch.zeros_like(rows.center), rows.radius)
        transposed, own = self.operator.transpose(), self.operator.diagonal()
        sums = self.operator.absolute_units()

        def absolute(r: Tensor) -> Tensor:
            return transposed.absolute().apply(r) + own.abs() * r

        return rows.affine(lambda c: transposed.apply(c) - own * c, absolute, transposed.terms + 2, sums)

    def with_pre(self, pre: Box) -> Relaxed:
        """The same with other pre-activations, and what they say of ``z``."""
        z = self.z.intersect(Box(pre.lower.clamp(min=0), pre.upper.clamp(min=0)))
        return Relaxed(self.node, pre, z, self.operator, self.drift)


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
    """

    graph: Graph
    values: Mapping[str, Box]
    relaxed: dict[str, Relaxed]
    region: Region | None = None
    rigorous: bool = True
    smooth: float = 0.0

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
        return replace(self, values=values, relaxed=relaxed, region=None if self.region is None else self.region[part])

    def over_box(self, rows: Rows, box: Box) -> Tensor:
        """`inner`, smooth for gradients: that of ``q · z`` with ``z`` where smoothing puts it."""
        least = inner(rows, box, self.samples)
        if not rows.center.requires_grad:
            return least
        q = rows.center.reshape(*least.shape, -1)
        z = self._corner(q, box)
        linear = (q * z).sum(2)
        return least.detach() + linear - linear.detach()

    @torch.no_grad()
    def _corner(self, q: Tensor, box: Box) -> Tensor:
        """The corner of a box where rows, (samples, rows, size), are least, moved over the small ones by `smooth`."""
        kink = self.smooth * q.abs().amax(2, keepdim=True) + TINY
        center, radius = (x.flatten(1)[:, None] for x in (box.center, box.radius))
        return center - radius * (q / kink).clamp(-1, 1)

    def over_inputs(self, rows: Rows) -> Tensor:
        """The least value of rows on the input over the region, (samples, rows)."""
        box = self.values[INPUT]
        least = self.over_box(rows, box)
        if self.region is None or self.region.norm == "linf":
            return least
        return torch.maximum(least, ball(rows, self.region, box))

    def worst(self, rows: Rows) -> Tensor:
        """Where rows on the input are about least over the region, see `smooth`: (samples * rows, *features)."""
        box = self.values[INPUT]
        q = rows.center.reshape(self.samples, -1, rows.center[0].numel())
        if self.region is None or self.region.norm == "linf":
            x = self._corner(q, box)
        else:
            x = _nearest(q, self.region, box).x
        return x.view_as(rows.center)

    def start(self, center: Tensor) -> Rows:
        """Rows that are exactly these numbers."""
        return Rows(center, torch.zeros_like(center) if self.rigorous else None)

    def least(
        self, start: Mapping[str, Rows], multipliers: Mapping[str, Rule], tightened: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Lower bounds of rows, (samples, rows), and the multipliers that give them, (samples, rows, *state).

        Args:
            start: coefficients by node, (samples * rows, *shape).
            multipliers: a rule for every node that is not to be bounded by its box.
            tightened: the node whose own rows these are: they speak of its exact equilibrium.
        """
        total, on_input, used = self.back(start, multipliers, tightened)
        return total if on_input is None else self._gain(total, self.over_inputs(on_input)), used

    def _gain(self, total: Tensor, part: Tensor) -> Tensor:
        result = total + part
        return result - (total.abs() + part.abs()) * 2.0**-51 if self.rigorous else result

    def back(
        self, start: Mapping[str, Rows], multipliers: Mapping[str, Rule], tightened: str | None = None
    ) -> tuple[Tensor, Rows | None, dict[str, Tensor]]:
        """`least` up to the input: what was gained so far, the rows that arrive there, and the multipliers."""
        rows = dict(start)
        used: dict[str, Tensor] = {}
        count = len(next(iter(start.values())).center) // self.samples
        total = next(iter(start.values())).center.new_zeros(self.samples, count)

        def collect(name: str, q: Rows) -> None:
            rows[name] = rows[name].plus(q) if name in rows else q

        for node in reversed(self.graph.nodes):
            q = rows.pop(node.name, None)
            if q is None:
                continue
            known = self.relaxed.get(node.name)
            if node.operation.kind in PULLS:
                shape = self.values[node.inputs[0]].lower.shape[1:]
                q, shift = PULLS[node.operation.kind](node.module, q, shape, self.samples)
                collect(node.inputs[0], q)
                total = self._gain(total, shift) if shift is not None else total
            elif node.operation.kind == "add":
                for name in node.inputs:
                    collect(name, q)
            elif known is None:
                total = self._gain(total, self.over_box(q, self.values[node.name]))
            else:
                if known.drift is not None and node.name != tightened:
                    total = self._gain(total, self.over_box(q, Box(-known.drift, known.drift)))
                if node.name not in multipliers:
                    total = self._gain(total, self.over_box(q, known.z))
                    continue
                g = multipliers[node.name](known, q.center.view(self.samples, count, *q.center.shape[1:]))
                used[node.name] = g = allowed(known, g)
                total = self._gain(total, self._relaxed(known, q, g))
                collect(node.inputs[0], self.start(g.flatten(0, 1)))
        return total, rows.get(INPUT), used

    def _relaxed(self, known: Relaxed, q: Rows, g: Tensor) -> Tensor:
        """What rows gain at a ReLU or an equilibrium with these multipliers, apart from what goes on as ``g · v``."""
        flat = g.flatten(0, 1)
        rest = q
        if known.operator is not None:
            transposed = known.operator.transpose()
            sums = known.operator.absolute_units()
            pulled = self.start(flat).affine(transposed.apply, transposed.absolute().apply, transposed.terms + 1, sums)
            rest = rest.plus(pulled)
        rest = rest.plus(self.start(-flat))
        low, divisor, slope = known.pre.lower[:, None], known.divisor(), known.slope[:, None]
        charged = torch.where((g < 0) & known.unstable[:, None], g * divisor, 0.0)
        steep = (charged * (1 - 1 / slope)).flatten(0, 1)
        # δ, its product, the quotient, the difference and the last product round; (1/a - 1) may be large.
        error = (charged.abs() * (1 + 1 / slope)).flatten(0, 1) * 2.0**-49 + 8 * TINY if self.rigorous else None
        rest = rest.plus(Rows(steep, error))
        gained = self.over_box(rest, known.z)
        charge = (charged * low).flatten(2).sum(2)
        if not self.rigorous:
            return gained - charge
        size = charged[0, 0].numel()
        lost = charge.abs() * gamma(size + 4) + 8 * TINY * (size + 8) * (2 + most(charged) + most(low))
        return (gained - charge) - (lost + (gained.abs() + charge.abs()) * 2.0**-51)


def most(x: Tensor) -> Tensor:
    """The largest magnitude of each row, (samples, rows)."""
    return x.abs().flatten(2).amax(2)


def allowed(known: Relaxed, g: Tensor) -> Tensor:
    """Multipliers cut to what is sound: 0 or more where a unit is off, and finite."""
    off = (known.pre.upper <= 0)[:, None]
    g = torch.where(off, g.clamp(min=0), g)
    return torch.where(g.isfinite(), g, 0.0)


def crown(slopes: str, tol: float = 1e-5, max_steps: int = 60) -> Rule:
    """The multipliers of CROWN: ``g = D(q) q``, for an equilibrium the fixed point with ``q + Wᵀ g`` for ``q``.

    Args:
        slopes: of the lower line of an unstable unit: ``adaptive`` (0 or 1, whichever is nearer), ``zero`` or ``one``.
        tol: of the fixed point, relative to each row's largest entry; any iterate is a multiplier.
        max_steps: of the fixed point.
    """

    def rule(known: Relaxed, q: Tensor) -> Tensor:
        low, high = known.pre.lower, known.pre.upper
        chosen = {
            "adaptive": (high > -low).to(q), "zero": torch.zeros_like(high), "one": torch.ones_like(high),
        }[slopes]  # fmt: skip
        divisor = known.divisor()
        off, on = high <= 0, low >= 0
        lower = torch.where(on, 1.0, torch.where(off, 0.0, chosen)) / divisor
        upper = torch.where(on, 1.0, torch.where(off, 0.0, known.slope)) / divisor
        lower, upper = lower[:, None], upper[:, None]

        def relaxed(q: Tensor) -> Tensor:
            return torch.where(q > 0, lower, upper) * q

        g = relaxed(q)
        if known.operator is None:
            return g
        # Solved for its own unknown, as everywhere: Wᵀ g without what a row adds to itself.
        transposed, own = known.operator.transpose(), known.operator.diagonal()
        moving = torch.ones(g.shape[:2], dtype=torch.bool, device=g.device)
        for step in range(max_steps):
            new = relaxed(q + (transposed.apply(g.flatten(0, 1)).view_as(g) - own * g))
            # A row that has arrived stays, whatever the rows beside it do.
            new = torch.where(moving.view(*moving.shape, *[1] * (g.dim() - 2)), new, g)
            moving, g = moving & (most(new - g) > tol * most(new)), new
            if step % SYNC == SYNC - 1 and not bool(moving.any()):
                break
        return g

    return rule


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
    eps: float
    s: Tensor
    x: Tensor


@torch.no_grad()
def _nearest(q: Tensor, region: Region, box: Box) -> _Ball:
    """Where ``q · x`` is about least over an l2 ball cut to its box; q: (samples, rows, features)."""
    c, lower, upper = (side.to(q).flatten(1)[:, None] for side in (region.center, box.lower, box.upper))
    w = torch.ones_like(c[:1]) if region.weights is None else region.weights.to(q).flatten()[None, None]
    moves, eps = w > 0, round_up(region.eps)
    w = torch.where(moves, w, 1.0)
    span = torch.where(moves, (q * w) ** 2, 0.0).sum(2, keepdim=True).sqrt()
    largest = torch.where(span > 0, span / (2 * max(eps, TINY)), 1.0)

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


def ball(rows: Rows, region: Region, box: Box) -> Tensor:
    """The least ``q · x`` over an l2 ball cut to its box, from below: (samples, rows).

    For every ``s >= 0`` it is at least the minimum over the box of the convex ``q·x + s (‖(x - c) / w‖² - eps²)``, and
    that at least its tangent's at any point.
    """
    q = rows.center.reshape(len(region), -1, rows.center[0].numel())
    c, w, moves, lower, upper, eps, s, x = _nearest(q, region, box)
    t = torch.where(moves, (x - c) / w, 0.0)
    bent = 2 * s * t / w
    slope, low, high = q + bent, lower - x, upper - x
    tangent = torch.minimum(slope * low, slope * high)
    whole = (q * x + s * t * t + tangent).sum(2) - s[:, :, 0] * eps * eps
    if rows.radius is None:
        # As `x` is the minimiser, it is the gradient; that of the tangent would jump.
        linear = (q * x).sum(2)
        return whole.detach() + linear - linear.detach()
    off = rows.radius.reshape(q.shape)
    size = torch.maximum(low.abs(), high.abs())
    parts = (off + 2.0**-48 * (q.abs() + bent.abs())) * size + off * x.abs()
    parts = parts + 2.0**-48 * (q.abs() * x.abs() + s * t * t + tangent.abs())
    g = gamma(q.shape[2] + 4)
    lost = parts.sum(2) * (1 + g) + g * (q.abs() * x.abs() + s * t * t + tangent.abs()).sum(2)
    lost = lost + 2.0**-48 * s[:, :, 0] * eps * eps
    lost = lost + TINY * 64 * q.shape[2] * (2 + q.abs().amax(2) + s[:, :, 0] + size.amax(2) + x.abs().amax(2))
    return (whole - lost) - (whole.abs() + lost) * 2.0**-50


# --- affine nodes -----------------------------------------------------------------------------------------------------

Pull = Callable[[Any, Rows, tuple[int, ...], int], tuple[Rows, Tensor | None]]
"""``(module, q, shape of x, samples) -> (Aᵀ q, q · b)``, the second (samples, rows) or ``None``."""


def _bias(module: Any, q: Rows, samples: int) -> Tensor | None:
    if module.bias is None:
        return None
    bias = module.bias.view(1, -1, *[1] * (q.center.dim() - 2)).expand(1, *q.center.shape[1:])
    return inner(q, Box(bias, bias), samples)


def _linear(module: Any, q: Rows, shape: tuple[int, ...], samples: int) -> tuple[Rows, Tensor | None]:
    weight = module.weight
    pulled = q.affine(lambda c: c @ weight, lambda r: r @ weight.abs(), len(weight) + 1, weight)
    return pulled, _bias(module, q, samples)


def _conv2d(module: Any, q: Rows, shape: tuple[int, ...], samples: int) -> tuple[Rows, Tensor | None]:
    pads, zeros = tuple(module._reversed_padding_repeated_twice), module.padding_mode == "zeros"
    mode = "constant" if zeros else module.padding_mode
    left, right, top, bottom = pads
    padded = (shape[0], shape[1] + top + bottom, shape[2] + left + right)

    def pull(weight: Tensor) -> Map:
        def apply(rows: Tensor) -> Tensor:
            size = (len(rows), *padded)
            stride, dilation = module.stride, module.dilation
            wide: Tensor = conv2d_input(size, weight, rows, stride, 0, dilation, module.groups)  # type: ignore[no-untyped-call]  # torch's
            return fold(wide, pads, mode, shape)

        return apply

    weight = module.weight
    copies = 1 if zeros else (1 + left + right) * (1 + top + bottom)
    terms = (weight[:, 0].numel() // module.groups) * copies + 1
    return q.affine(pull(weight), pull(weight.abs()), terms, weight), _bias(module, q, samples)


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


def _average(module: Any, q: Rows, shape: tuple[int, ...], samples: int) -> tuple[Rows, Tensor | None]:
    def apply(rows: Tensor) -> Tensor:
        return adjoint_of(module, rows, shape)

    # Weights of one sign, none above 1: what an output gives to a pixel.
    def absolute(rows: Tensor) -> Tensor:
        return apply(rows).abs()

    return q.affine(apply, absolute, q.center[0, 0].numel() + 4), None


def _batch_norm(module: Any, q: Rows, shape: tuple[int, ...], samples: int) -> tuple[Rows, Tensor | None]:
    deviation = (module.running_var + module.eps).sqrt()
    scale = deviation.reciprocal() if module.weight is None else module.weight / deviation
    shift = torch.zeros_like(scale) if module.bias is None else module.bias
    return _scaled(q, module.running_mean, scale, shift, samples)


def _normalize(module: Any, q: Rows, shape: tuple[int, ...], samples: int) -> tuple[Rows, Tensor | None]:
    size = shape[0]
    mean, scale = module.mean.expand(size), module.std.reciprocal().expand(size)
    return _scaled(q, mean, scale, torch.zeros_like(mean), samples)


def _scaled(q: Rows, mean: Tensor, scale: Tensor, shift: Tensor, samples: int) -> tuple[Rows, Tensor]:
    """``(x - mean) scale + shift`` by channel."""
    view = (1, -1, *[1] * (q.center.dim() - 2))
    scale, state = scale.view(view), q.center.shape[1:]
    pulled = q.affine(lambda c: c * scale, lambda r: r * scale.abs(), 8, scale)
    constants = shift.view(view).expand(1, *state), (-mean).view(view).expand(1, *state)
    parts = [inner(rows, Box(b, b), samples) for rows, b in zip((q, pulled), constants, strict=True)]
    total = parts[0] + parts[1]
    return pulled, total if q.radius is None else total - (parts[0].abs() + parts[1].abs()) * 2.0**-51


def _flatten(module: Any, q: Rows, shape: tuple[int, ...], samples: int) -> tuple[Rows, Tensor | None]:
    return Rows(q.center.view(-1, *shape), None if q.radius is None else q.radius.view(-1, *shape)), None


PULLS: dict[str, Pull] = {
    "normalize": _normalize,
    "linear": _linear,
    "conv2d": _conv2d,
    "batch_norm1d": _batch_norm,
    "batch_norm2d": _batch_norm,
    "avg_pool2d": _average,
    "adaptive_avg_pool2d": _average,
    "flatten": _flatten,
}
"""Every affine operation, by kind."""
