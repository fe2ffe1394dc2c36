"""Euclidean balls on their way through a network: how far a value moves as a whole, and not entry by entry.

**Theorem.** Let ``y_c`` be the value at the centre of an l2 ball of inputs, and ``‖(y - y_c) / d‖₂ <= t`` for the value
``y`` at any of its points, where an entry with ``d_i = 0`` does not move. Then, beside what the boxes say,

* ``A y + b``: entry i moves at most ``t ‖A_i∘d‖₂``, and all together ``t min(max d ‖A‖₂, ‖A∘d‖_F)``;
* ``relu(y)``, a reshaped ``y``: as far as ``y``; a maximum over windows: ``√k`` times that, if no entry is in more than
  ``k`` windows; a sum: as far as both;
* an equilibrium with ``I - sym W ⪰ m I``, injection ``y``: ``t max d / m``.

``‖A‖₂² <= ‖A‖₁ ‖A‖_∞``, and is no eigenvalue of ``A Aᵀ`` but the largest. A convolution is ``R`` times all patches, no
pixel of which is in more patches than the kernel has taps: ``‖A‖₂ <= √taps ‖R‖₂``; the transpose says the same of the
kernel turned round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from verideq.checker.adjoint import inner, pull
from verideq.checker.arithmetic import Arithmetic, Array, Interval, Rejected, constant, product, total
from verideq.checker.claim import Claim
from verideq.checker.layers import Layer, least_eigenvalue, near
from verideq.checker.network import RULES, Node, by_channel, pair, scaling

LARGE = 2048
"""Matrices with more rows and columns than this have their norm bounded by sums alone."""


@dataclass(frozen=True)
class Ball:
    """Where a value is for all inputs of an l2 ball: ``‖(y - y_c) / d‖₂ <= t``, arrays (cases, *state).

    Args:
        center: holds ``y_c``.
        scale: ``d``, 0 or more.
        length: ``t``, (cases,).
    """

    center: Interval
    scale: Array
    length: Array

    def of(self, places: Sequence[int]) -> Ball:
        """That of some of the cases."""
        chosen = list(places)
        return Ball((self.center[0][chosen], self.center[1][chosen]), self.scale[chosen], self.length[chosen])


def joined(balls: Sequence[Ball]) -> Ball:
    """One for all cases of several."""
    center = [np.concatenate([ball.center[side] for ball in balls]) for side in (0, 1)]
    scale, length = (np.concatenate(parts) for parts in zip(*((b.scale, b.length) for b in balls), strict=True))
    return Ball((center[0], center[1]), scale, length)


Moved = tuple[Ball, Array]
"""A ball, and how far each entry may be from the one at the centre, (cases, *state)."""


def start(calc: Arithmetic, claims: Sequence[Claim]) -> Ball:
    """The inputs of claims, all of them of l2 balls."""
    lo, hi = (np.stack([claim.center[side] for claim in claims]) for side in (0, 1))
    one = constant(calc, calc.one, *lo.shape[1:])[0]
    scale = np.stack([one if claim.weights is None else claim.weights for claim in claims])
    length: Array = np.array([calc.rational(claim.eps)[1] for claim in claims], dtype=calc.kind)
    return Ball((lo, hi), scale, length)


def around(calc: Arithmetic, ball: Ball, reach: Array) -> Interval:
    """What a ball says of each entry."""
    return calc.add(ball.center, (-reach, reach))


def lowest(calc: Arithmetic, q: Interval, ball: Ball, rows: int) -> Array:
    """The least ``q · y`` for rows (cases * rows, *state), from below."""
    center = np.repeat(ball.center[0], rows, 0), np.repeat(ball.center[1], rows, 0)
    size = np.maximum(np.abs(q[0]), np.abs(q[1]))
    moved = _times(
        calc, _lengths(calc, _times(calc, size, np.repeat(ball.scale, rows, 0))), np.repeat(ball.length, rows)
    )
    bound: Array = calc.subtract(inner(calc, q, center), (moved, moved))[0]
    return bound


def settled(calc: Arithmetic, layer: Layer, ball: Ball, state: Array) -> Moved:
    """The equilibria of a monotone layer, around an approximate one at the centre."""
    if layer.m is None:
        raise Rejected(f"{layer.name}: it is not monotone")
    center = near(calc, layer, ball.center, state)
    strength: Array = np.array([calc.rational(layer.m)[0]], dtype=calc.kind)
    moved = _times(calc, ball.length, _most(ball.scale))
    found = _whole(calc, center, calc.divide((moved, moved), (strength, strength))[1])
    return found, _reach(calc, found)


def rectified(calc: Arithmetic, ball: Ball, z: Interval) -> Ball:
    """After a ReLU, or what is left of one: `z` is the box of the outputs, and what is zero there does not move."""
    center = np.maximum(ball.center[0], calc.zero), np.maximum(ball.center[1], calc.zero)
    # The centre itself may lie outside the part that `z` is about.
    off = (z[1] <= 0) & (center[1] <= 0)
    return Ball(center, np.where(off, calc.zero, ball.scale), ball.length)


def summed(calc: Arithmetic, a: Ball, b: Ball) -> Moved:
    """The sum of two values."""
    length = calc.add((a.length, a.length), (b.length, b.length))[1]
    found = Ball(calc.add(a.center, b.center), np.maximum(a.scale, b.scale), length)
    reach = calc.add((_reach(calc, a),) * 2, (_reach(calc, b),) * 2)[1]
    return found, reach


# --- one rule an operation ------------------------------------------------------------------------------------------


def _scaled(calc: Arithmetic, node: Node, ball: Ball) -> Moved:
    how, axes = scaling(calc, node, ball.scale.shape[1]), ball.scale.ndim
    size = by_channel(np.maximum(np.abs(how.scale[0]), np.abs(how.scale[1])), axes)
    found = Ball(RULES[node.kind](calc, node, ball.center), _times(calc, ball.scale, size), ball.length)
    return found, _reach(calc, found)


def _flat(calc: Arithmetic, node: Node, ball: Ball) -> Moved:
    found = Ball(RULES["flatten"](calc, node, ball.center), ball.scale.reshape(len(ball.scale), -1), ball.length)
    return found, _reach(calc, found)


def _embed(calc: Arithmetic, node: Node, ball: Ball) -> Moved:
    still = replace(node, tensors={"rest": node.tensors["rest"] * calc.zero})
    scale = RULES["embed"](calc, still, (ball.scale, ball.scale))[0]
    found = Ball(RULES["embed"](calc, node, ball.center), scale, ball.length)
    return found, _reach(calc, found)


def _weighted(calc: Arithmetic, node: Node, ball: Ball) -> Moved | None:
    """A matrix or a convolution; none where a border repeats pixels, which then count several times."""
    if node.arguments.get("padding_mode", "zeros") != "zeros":
        return None
    center, weight = RULES[node.kind](calc, node, ball.center), node.tensors["weight"]
    squares = replace(node, tensors={"weight": _times(calc, weight, weight)})
    rows = RULES[node.kind](calc, squares, (_times(calc, ball.scale, ball.scale),) * 2)[1]
    found = _whole(calc, center, _times(calc, ball.length, _fewer(calc, node, ball, rows)))
    return found, _spread(calc, ball.length, rows)


def _fewer(calc: Arithmetic, node: Node, ball: Ball, rows: Array) -> Array:
    """The smaller of the two bounds of how much an affine map stretches balls; `rows` are squares."""
    flat = rows.reshape(len(rows), -1)
    whole = _root(calc, total(calc, (flat, flat))[1])
    return np.minimum(whole, _times(calc, _most(ball.scale), norm(calc, node)))


def _averaged(calc: Arithmetic, node: Node, ball: Ball) -> Moved:
    shape = ball.scale.shape[1:]
    out = RULES[node.kind](calc, node, constant(calc, calc.one, 1, *shape))
    one = constant(calc, calc.one, *out[0].shape)
    # ‖A‖₂² <= ‖A‖_∞ ‖A‖₁: the weights have one sign.
    sums = [_most(np.maximum(np.abs(lo), np.abs(hi))) for lo, hi in (out, pull(calc, node, one, shape)[0])]
    stretch = _times(calc, _root(calc, _times(calc, *sums)), _most(ball.scale))
    found = _whole(calc, RULES[node.kind](calc, node, ball.center), _times(calc, ball.length, stretch))
    return found, _reach(calc, found)


def _maxima(calc: Arithmetic, node: Node, ball: Ball) -> Moved:
    center, scale = (RULES[node.kind](calc, node, x) for x in (ball.center, (ball.scale, ball.scale)))
    stride = pair(node, "stride" if node.arguments.get("stride") is not None else "kernel_size")
    length = _times(calc, ball.length, _covered(calc, node, stride))
    return Ball(center, scale[1], length), _reach(calc, Ball(center, scale[1], ball.length))


RULE = Callable[[Arithmetic, Node, Ball], Moved | None]
MOVES: dict[str, RULE] = {
    "normalize": _scaled,
    "batch_norm1d": _scaled,
    "batch_norm2d": _scaled,
    "flatten": _flat,
    "embed": _embed,
    "linear": _weighted,
    "conv2d": _weighted,
    "avg_pool2d": _averaged,
    "adaptive_avg_pool2d": _averaged,
    "max_pool2d": _maxima,
}
"""What a ball becomes behind every operation of one input; a sum, a ReLU and an equilibrium have their own."""


# --- norms ----------------------------------------------------------------------------------------------------------


def norm(calc: Arithmetic, node: Node) -> Array:
    """An upper bound of ``‖A‖₂`` of a matrix or of a convolution with zeros around its images, (1,); once a node."""
    if "norm" not in node.kept:
        weight = node.tensors["weight"]
        node.kept["norm"] = spectral(calc, weight) if node.kind == "linear" else _convolved(calc, node, weight)
    found: Array = node.kept["norm"]
    return found


def _convolved(calc: Arithmetic, node: Node, weight: Array) -> Array:
    """By the kernels of all groups as matrices on patches of inputs, and on patches of outputs."""
    found = []
    # A stride leaves out patches of inputs; an output is in as many patches as there are taps all the same.
    for axis, stride in ((0, pair(node, "stride", 1)), (1, (1, 1))):
        kernels = [np.moveaxis(part, axis, 0) for part in np.split(weight, pair(node, "groups", 1)[0])]
        most = np.max([spectral(calc, kernel.reshape(len(kernel), -1)) for kernel in kernels], 0)
        found.append(_times(calc, most, _covered(calc, node, stride)))
    smaller: Array = np.minimum(*found)
    return smaller


def _covered(calc: Arithmetic, node: Node, stride: tuple[int, int]) -> Array:
    """The root of how many windows an entry is in, at most: (1,)."""
    count = 1
    for k, d, s in zip(pair(node, "kernel_size"), pair(node, "dilation", 1), stride, strict=True):
        count *= -(-k // s) if d == 1 else k
    return _root(calc, calc.exactly(np.array([float(count)])))


def spectral(calc: Arithmetic, matrix: Array) -> Array:
    """An upper bound of ``‖A‖₂``, (1,)."""
    size = np.abs(matrix)
    sums = total(calc, (size, size))[1].max(), total(calc, (size.T, size.T))[1].max()
    crude = _root(calc, _times(calc, np.array([sums[0]], dtype=calc.kind), np.array([sums[1]], dtype=calc.kind)))
    small = matrix if len(matrix) <= len(matrix.T) else matrix.T
    if len(small) > LARGE:
        return crude
    gram = product(calc, (small, small), (small.T, small.T))
    middle = calc.nearly(gram)
    largest = float(np.linalg.eigvalsh(middle)[-1]) if np.isfinite(middle).all() else np.inf
    if not TINY < largest < np.inf:
        return crude
    # A little above the largest eigenvalue, or there is no factor.
    above = -least_eigenvalue(calc, (-gram[1], -gram[0]), near=-largest * (1 + 2.0**-24))
    return np.minimum(crude, _root(calc, np.array([above], dtype=calc.kind)))


TINY = 2.0**-900


# --- upper bounds of numbers that are not negative --------------------------------------------------------------------


def _times(calc: Arithmetic, a: Array, b: Array) -> Array:
    found: Array = calc.multiply((a, a), (b, b))[1]
    return found


def _root(calc: Arithmetic, x: Array) -> Array:
    """``√x``, upwards; of 0 too, and NaN of NaN."""
    known = x > 0
    some = np.where(known, np.maximum(x, calc.exactly(np.array([TINY]))), calc.one)
    found: Array = np.where(known, calc.root((some, some))[1], x)
    return found


def _lengths(calc: Arithmetic, x: Array) -> Array:
    """The Euclidean length of every row, (rows,)."""
    flat = x.reshape(len(x), -1)
    squares = _times(calc, flat, flat)
    return _root(calc, total(calc, (squares, squares))[1])


def _most(scale: Array) -> Array:
    found: Array = scale.reshape(len(scale), -1).max(1)
    return found


def _spread(calc: Arithmetic, length: Array, squares: Array) -> Array:
    return _times(calc, _root(calc, squares), length.reshape(-1, *[1] * (squares.ndim - 1)))


def _reach(calc: Arithmetic, ball: Ball) -> Array:
    return _times(calc, ball.scale, ball.length.reshape(-1, *[1] * (ball.scale.ndim - 1)))


def _whole(calc: Arithmetic, center: Interval, length: Array) -> Ball:
    """A ball that is as wide in every direction."""
    return Ball(center, constant(calc, calc.one, *center[0].shape)[0], length)
