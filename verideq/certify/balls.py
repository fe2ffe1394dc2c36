"""Euclidean balls on their way through a graph: how far a value moves as a whole, and not entry by entry.

Let ``y_c`` be a value at the centre of an l2 ball of inputs, and ``‖(y - y_c) / d‖₂ <= t`` at all of its points (an
entry with ``d_i = 0`` does not move). Then ``A y + b`` moves by at most ``t ‖A_i∘d‖₂`` in entry i and by
``t min(max d ‖A‖₂, ‖A∘d‖_F)`` as a whole; a ReLU, a maximum over windows that do not overlap and a sum move no further
than what they are made of; and an equilibrium with ``I - sym W ⪰ m I`` by at most ``t max d / m`` (docs/theory.md).

Norms are proved, not estimated: ``‖A‖₂² <= ‖A‖₁ ‖A‖_∞``, and ``c I - A Aᵀ`` has a factor for a ``c`` just above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from verideq.box import TINY, Box, gamma, outward
from verideq.equilibrium.monotonicity import proved_m
from verideq.graph import INPUT, Node
from verideq.region import Region

UP = 1 + 2.0**-40
"""A factor that covers the few roundings of a product of numbers that are not negative."""
FLOOR = 2.0**-450
"""Added where such products may underflow."""
LARGE = 2048
"""Matrices with more rows and columns than this have their norm bounded by sums alone."""

Image = Callable[[Node, list[Box]], Box]
"""The rigorous interval rule of a node."""


@dataclass(frozen=True)
class Ball:
    """Where a value is for all inputs of l2 balls: ``‖(y - y_c) / d‖₂ <= t``.

    Args:
        center: (samples, *state), holds ``y_c``.
        scale: ``d``, 0 or more, (samples, *state).
        length: ``t``, (samples,).
    """

    center: Box
    scale: Tensor
    length: Tensor

    def by_sample(self, x: Tensor) -> Tensor:
        """(samples,) shaped to broadcast over states."""
        return x.view(-1, *[1] * (self.scale.dim() - 1))

    @property
    def reach(self) -> Tensor:
        """How far each entry may be from the centre."""
        return self.scale * self.by_sample(self.length) * UP + FLOOR

    def select(self, part: Tensor) -> Ball:
        """Those of some of the samples."""
        return Ball(self.center.select(part), self.scale[part], self.length[part])

    def lowest(self, q: Tensor, off: Tensor | None = None, *, rigorous: bool = True) -> Tensor:
        """The least ``q · y`` of rows (samples, rows, size), from below: (samples, rows).

        Args:
            off: what the rows may be off by, entry by entry.
            rigorous: count what is lost to rounding.
        """
        center, wide = (x.flatten(1)[:, None] for x in self.center.ball())
        size = q.abs() if off is None else q.abs() + off
        value = (q * center).sum(2)
        moved = (size * self.scale.flatten(1)[:, None]).square().sum(2).sqrt() * self.length[:, None]
        if not rigorous:
            return value - moved
        g, away = gamma(q.shape[2] + 4), center.abs() + wide
        lost = (size * wide).sum(2) + g * (size * away).sum(2)
        lost = lost if off is None else lost + (off * away).sum(2)
        lost = (moved + lost) * (1 + 4 * g + 2.0**-40)
        lost = lost + FLOOR * (1 + away.amax(2) + size.amax(2) + self.length[:, None])
        return (value - lost) - (value.abs() + lost) * 2.0**-50


@dataclass
class Balls:
    """The balls of the values of a graph, as they become known.

    Args:
        image: of a node, for the centres.
        norms: by node name, kept from one use to the next.
        known: by node name.
    """

    image: Image
    norms: dict[str, float] = field(default_factory=dict)
    known: dict[str, Ball] = field(default_factory=dict)

    def begin(self, region: Region | None, box: Box, norms: dict[str, float]) -> None:
        """Start from inputs, if these are in l2 balls."""
        self.norms = norms
        if region is not None and region.norm == "l2":
            center = region.center.to(box.lower)
            weights = torch.ones_like(center) if region.weights is None else region.weights.to(center)
            self.known[INPUT] = Ball(Box(center, center), weights.expand_as(center), region.radii_up().to(center))

    def meet(self, node: Node, box: Box) -> Box:
        """The box of a value, cut by what is known of the balls of its inputs."""
        rule = RULES.get(node.operation.kind)
        if rule is None or not set(node.inputs) <= set(self.known):
            return box
        moved = rule(self, node, [self.known[name] for name in node.inputs], box)
        if moved is None:
            return box
        self.known[node.name], reach = moved
        return self._cut(box, self.known[node.name], reach)

    @staticmethod
    def _cut(box: Box, ball: Ball, reach: Tensor) -> Box:
        around = Box(outward(ball.center.lower, reach).lower, outward(ball.center.upper, reach).upper)
        # Where something overflowed on the way the ball says nothing.
        return Box(torch.fmax(around.lower, box.lower), torch.fmin(around.upper, box.upper))

    def settled(self, node: Node, m: float, center: Box) -> Box:
        """The equilibria of a monotone layer: `center` holds those at the centre of the ball."""
        before = self.known[node.inputs[0]]
        length = before.length * _most(before.scale) / m * UP + FLOOR
        ball = self.known[node.name] = Ball(center, torch.ones_like(center.lower), length)
        return self._cut(Box(center.lower * 0, center.upper + torch.inf), ball, ball.reach)

    def norm(self, node: Node) -> float:
        """An upper bound of ``‖A‖₂`` of an affine node with zeros around its images, once a node."""
        if node.name not in self.norms:
            module: Any = node.module
            weight = module.weight
            self.norms[node.name] = spectral(weight) if node.operation.kind == "linear" else _convolved(module, weight)
        return self.norms[node.name]


Moved = tuple[Ball, Tensor]
"""A ball, and how far each entry may be from the one at the centre."""


def _scaled(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    module: Any = node.module
    (ball,) = inputs
    if node.operation.kind == "normalize":
        size = module.std.reciprocal().expand(ball.scale.shape[1])
    else:
        size = (module.running_var + module.eps).rsqrt()
        size = size if module.weight is None else size * module.weight.abs()
    scale = ball.scale * size.view(1, -1, *[1] * (ball.scale.dim() - 2)) * UP
    # A feature that does not move stays where it is.
    scale = torch.where(ball.scale > 0, scale + FLOOR, ball.scale)
    found = Ball(balls.image(node, [ball.center]), scale, ball.length)
    return found, found.reach


def _kept(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    """Another shape."""
    module: Any = node.module
    found = Ball(balls.image(node, [inputs[0].center]), module(inputs[0].scale), inputs[0].length)
    return found, found.reach


def _embed(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    module: Any = node.module
    scale = F.pad(inputs[0].scale.flatten(1), (0, len(module.rest)))
    found = Ball(balls.image(node, [inputs[0].center]), scale, inputs[0].length)
    return found, found.reach


def _relu(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    center = balls.image(node, [inputs[0].center])
    # The centre itself may lie outside the part of the ball that the box is about.
    off = (box.upper <= 0) & (center.upper <= 0)
    found = Ball(center, torch.where(off, 0.0, inputs[0].scale), inputs[0].length)
    return found, inputs[0].reach


def _sum(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    a, b = inputs
    center = balls.image(node, [a.center, b.center])
    found = Ball(center, torch.maximum(a.scale, b.scale), (a.length + b.length) * UP)
    return found, (a.reach + b.reach) * UP


def _weighted(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved | None:
    """A matrix or a convolution; none where a border repeats pixels, which then count several times."""
    module: Any = node.module
    (ball,) = inputs
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    squares, weights, dense = ball.scale.square(), module.weight.square(), node.operation.kind == "linear"
    rows = F.linear(squares, weights) if dense else module._conv_forward(squares, weights, None)
    # In units of the length; sums of squares are known to a relative error, apart from underflow.
    terms = 1 + 8 * gamma(weights[0].numel() + 8)
    rows = rows.clamp(min=0).sqrt() * terms + FLOOR * (1 + module.weight.abs().max() + ball.scale.max())
    stretch = _lengths(rows).minimum(_most(ball.scale) * balls.norm(node) * UP)
    found = _whole(balls.image(node, [ball.center]), ball.length * stretch * UP + FLOOR)
    return found, rows * ball.by_sample(ball.length) * UP + FLOOR


def _averaged(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    module: Any = node.module
    (ball,) = inputs
    ones = torch.ones_like(ball.scale[:1])
    with torch.enable_grad():
        point = ones.clone().requires_grad_()
        out = module(point)
        (columns,) = torch.autograd.grad(out.sum(), point)
    # ‖A‖₂² <= ‖A‖_∞ ‖A‖₁: the weights have one sign.
    out, columns = out.detach().abs(), columns.abs()
    norm = float((out.amax() * columns.amax()).sqrt()) * (1 + 8 * gamma(ones[0, 0].numel() + 8))
    found = _whole(balls.image(node, [ball.center]), ball.length * _most(ball.scale) * norm * UP + FLOOR)
    return found, found.reach


def _maxima(balls: Balls, node: Node, inputs: list[Ball], box: Box) -> Moved:
    module: Any = node.module
    (ball,) = inputs
    stride = module.stride if module.stride is not None else module.kernel_size
    covered = _covered(module, stride)
    center, scale = balls.image(node, [ball.center]), module(ball.scale)
    found = Ball(center, scale, ball.length * covered * UP)
    return found, Ball(center, scale, ball.length).reach


Rule = Callable[[Balls, Node, list[Ball], Box], Moved | None]
RULES: dict[str, Rule] = {
    "normalize": _scaled,
    "batch_norm1d": _scaled,
    "batch_norm2d": _scaled,
    "flatten": _kept,
    "embed": _embed,
    "linear": _weighted,
    "conv2d": _weighted,
    "avg_pool2d": _averaged,
    "adaptive_avg_pool2d": _averaged,
    "max_pool2d": _maxima,
    "relu": _relu,
    "add": _sum,
}
"""What a ball becomes behind every operation but an equilibrium."""


def _whole(center: Box, length: Tensor) -> Ball:
    return Ball(center, torch.ones_like(center.lower), length)


def _most(x: Tensor) -> Tensor:
    return x.flatten(1).amax(1)


def _lengths(x: Tensor) -> Tensor:
    """The Euclidean length of each sample, rounded up."""
    flat = x.flatten(1)
    scale = flat.amax(1, keepdim=True).clamp(min=TINY)
    return (flat / scale).square().sum(1).sqrt() * scale[:, 0] * (1 + gamma(flat.shape[1] + 8))


# --- norms ----------------------------------------------------------------------------------------------------------


def _convolved(module: Any, weight: Tensor) -> float:
    """A convolution is its kernel as a matrix on patches; its transpose, on patches of outputs."""
    parts = weight.chunk(module.groups)
    direct = max(spectral(part.flatten(1)) for part in parts) * _covered(module, module.stride)
    # An output is in as many patches as there are taps, whatever the stride.
    turned = max(spectral(part.transpose(0, 1).flatten(1)) for part in parts) * _covered(module, 1)
    return min(direct, turned)


def _covered(module: Any, stride: int | tuple[int, int]) -> float:
    """The root of how many windows an entry is in, at most."""
    pairs = [(x, x) if isinstance(x, int) else x for x in (module.kernel_size, module.dilation, stride)]
    counts = [-(-k // s) if d == 1 else k for k, d, s in zip(*pairs, strict=True)]
    return math.sqrt(math.prod(counts)) * UP


def spectral(matrix: Tensor) -> float:
    """A proved upper bound of the largest singular value of a float64 matrix."""
    A = matrix.detach().to("cpu", torch.float64)
    peak = float(A.abs().max())
    if not 0 < peak < math.inf:
        return 0.0 if peak == 0 else math.nan
    unit = 2.0 ** math.frexp(peak)[1]
    A = A / unit
    g = gamma(sum(A.shape) + 8)
    crude = float(A.abs().sum(0).max() * A.abs().sum(1).max()) * (1 + 4 * g)
    small = A if len(A) <= A.shape[1] else A.T
    best = crude
    if len(small) <= LARGE:
        gram = small @ small.T
        off = float((small.abs() @ small.abs().T).sum(1).max()) * g * (1 + g) + 1e-300
        # I - sym(I + G) = -G, and no eigenvalue of that is below the bound. Adding I rounds each entry once.
        rounded = float(gram.abs().diagonal().max()) * 2.0**-52 + 2.0**-52
        best = min(best, -proved_m(torch.eye(len(gram), dtype=torch.float64) + (gram + gram.T) / 2)[0] + off + rounded)
    # A little more than was proved: the checker stops its own search there, and what it finds has to fit into a box.
    return math.sqrt(best) * unit * (1 + 2.0**-23) + 2.0**-1022
