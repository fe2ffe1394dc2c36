"""Why an equilibrium is unique, and where it lies.

**Theorem** (gauge). Let ``z = σ(W z + v)``, ``σ`` the projection onto ``[0, κ]``: ReLU (``κ = ∞``) or the hard sigmoid
(``κ = 1``); and ``u > 0`` with ``|W| u < u``. If an ordered, finite box is mapped into itself by the interval extension
of the layer, for a box of ``v``, then it holds the one equilibrium of every ``v`` of that box. The same is true after
every row is solved for its own unknown: ``z_i = σ((Σ_{j≠i} W_ij z_j + v_i) / (1 - W_ii))`` with ``W_ii < 1`` and
``Σ_{j≠i} |W_ij| u_j < (1 - W_ii) u_i``; that is the form checked here, and a gauge of ``W`` is one of it.

**Theorem** (monotone, ReLU). If ``I - sym W ⪰ m I`` with ``m > 0``, the equilibrium ``z*(v)`` is unique, and ``‖z*(v) -
z*(v')‖₂ <= ‖v - v'‖₂ / m``. For any ``ẑ >= 0`` it is within ``‖δ‖₂ / m`` of ``ẑ``, where ``δ_i`` is ``ẑ_i - p_i`` if
``ẑ_i > 0`` and ``-max(p_i, 0)`` otherwise, ``p = W ẑ + v``. ``W = (1 - m) I - AᵀA + B - Bᵀ`` is monotone by algebra.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from verideq.checker.adjoint import PULLS
from verideq.checker.arithmetic import (
    Arithmetic,
    Array,
    Interval,
    Rejected,
    centred,
    constant,
    number,
    product,
    require,
    total,
)  # fmt: skip
from verideq.checker.network import RULES, Node, pads_of, pair, tensor


class Fusion(Protocol):
    """``W`` without what each row was solved for, on states (batch, *state)."""

    def push(self, calc: Arithmetic, z: Interval) -> Interval:
        """``W z``."""

    def pull(self, calc: Arithmetic, q: Interval) -> Interval:
        """``Wᵀ q``."""


@dataclass(frozen=True)
class Dense:
    """A matrix, and what each entry may be off by."""

    matrix: Array
    error: Array

    def push(self, calc: Arithmetic, z: Interval) -> Interval:
        units = len(self.matrix)
        require(z[0].shape[1:] == (units,), f"W of {units} units does not keep the shape {z[0].shape[1:]}")
        return calc.affine(z, self.matrix.T, constant(calc, calc.zero, 1), self.error.T)

    def pull(self, calc: Arithmetic, q: Interval) -> Interval:
        return calc.affine(q, self.matrix, constant(calc, calc.zero, 1), self.error)


@dataclass(frozen=True)
class Convolved:
    """A convolution that keeps the shape of a state."""

    node: Node

    def push(self, calc: Arithmetic, z: Interval) -> Interval:
        out = RULES["conv2d"](calc, self.node, z)
        require(out[0].shape == z[0].shape, f"{self.node.name}: W does not keep the shape {z[0].shape[1:]}")
        return out

    def pull(self, calc: Arithmetic, q: Interval) -> Interval:
        return PULLS["conv2d"](calc, self.node, q, q[0].shape[1:])[0]


@dataclass(frozen=True)
class Factored:
    """``(1 - m) I - AᵀA + B - Bᵀ`` for convolutions ``A`` and ``B``."""

    m: Fraction
    A: Convolved
    B: Convolved

    def _sum(self, calc: Arithmetic, x: Interval, plus: Interval, minus: Interval) -> Interval:
        share = calc.multiply(x, number(calc, 1 - self.m))
        kept = calc.subtract(share, self.A.pull(calc, self.A.push(calc, x)))
        return calc.add(kept, calc.subtract(plus, minus))

    def push(self, calc: Arithmetic, z: Interval) -> Interval:
        return self._sum(calc, z, self.B.push(calc, z), self.B.pull(calc, z))

    def pull(self, calc: Arithmetic, q: Interval) -> Interval:
        return self._sum(calc, q, self.B.pull(calc, q), self.B.push(calc, q))


@dataclass(frozen=True)
class Coupled:
    """Blocks of a flat state, each coupled to the next one and back by the transpose: ``W = Wᵀ``, its diagonal zero.

    Args:
        name: of the node.
        shapes: of the blocks.
        couplings: a `linear` or a `conv2d` from each block to the next.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    couplings: tuple[Node, ...]

    def push(self, calc: Arithmetic, z: Interval) -> Interval:
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in self.shapes)])
        require(z[0].shape[1:] == (ends[-1],), f"{self.name}: blocks of {ends[-1]} units do not keep {z[0].shape[1:]}")
        parts = [(z[0][:, a:b], z[1][:, a:b]) for a, b in pairwise(ends)]
        sums = [constant(calc, calc.zero, *part[0].shape) for part in parts]
        for place, node in enumerate(self.couplings):
            sums[place + 1] = calc.add(sums[place + 1], self._up(calc, place, node, parts[place]))
            sums[place] = calc.add(sums[place], self._down(calc, place, node, parts[place + 1]))
        return np.concatenate([lo for lo, _ in sums], 1), np.concatenate([hi for _, hi in sums], 1)

    def pull(self, calc: Arithmetic, q: Interval) -> Interval:
        return self.push(calc, q)

    def _up(self, calc: Arithmetic, place: int, node: Node, x: Interval) -> Interval:
        """``A x``; the result has just the shape of the next block."""
        below, above = self._formed(place, node)
        out = RULES[node.kind](calc, node, (x[0].reshape(-1, *below), x[1].reshape(-1, *below)))
        shape = out[0].shape[1:]
        require(shape == above, f"{self.name}: coupling {place} gives {shape}, and the next block is {above}")
        return out[0].reshape(len(x[0]), -1), out[1].reshape(len(x[0]), -1)

    def _down(self, calc: Arithmetic, place: int, node: Node, q: Interval) -> Interval:
        """``Aᵀ q``."""
        below, above = self._formed(place, node)
        lo, hi = PULLS[node.kind](calc, node, (q[0].reshape(-1, *above), q[1].reshape(-1, *above)), below)[0]
        return lo.reshape(len(q[0]), -1), hi.reshape(len(q[0]), -1)

    def _formed(self, place: int, node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The blocks that a coupling leads from and to, as it sees them: a matrix flattens."""
        below, above = self.shapes[place : place + 2]
        return (below, above) if node.kind == "conv2d" else ((int(np.prod(below)),), (int(np.prod(above)),))


@dataclass(frozen=True)
class Layer:
    """An equilibrium that has been proved unique: every row solved for its own unknown.

    Args:
        name: of the node.
        fusion: what is left of ``W``.
        divisor: ``1 - W_ii``, an interval, shaped to broadcast over states.
        u: a gauge, (1, *state), or ``None``.
        room: a lower bound of ``(1 - W_ii) u_i - Σ |W_ij| u_j``, (1, *state), with the gauge.
        m: the strength of monotonicity, if that is how it was proved.
        ceiling: ``κ``, or ``None`` for none.
    """

    name: str
    fusion: Fusion
    divisor: Interval
    u: Array | None = None
    room: Array | None = None
    m: Fraction | None = None
    ceiling: Any = None

    def rows(self, calc: Arithmetic, box: Interval, v: Interval) -> Interval:
        """The pre-activations ``(Σ_{j≠i} W_ij z_j + v_i) / (1 - W_ii)`` over boxes."""
        return calc.divide(calc.add(self.fusion.push(calc, box), v), self.divisor)

    def image(self, calc: Arithmetic, rows: Interval) -> Interval:
        """The interval extension of the layer, from its pre-activations."""
        return self.cut(np.maximum(rows[0], calc.zero)), self.cut(np.maximum(rows[1], calc.zero))

    def cut(self, x: Array) -> Array:
        """Numbers cut to the ceiling."""
        return x if self.ceiling is None else np.minimum(x, self.ceiling)


def layer(calc: Arithmetic, node: Node, certificate: Mapping[str, Array], state: tuple[int, ...]) -> Layer:
    """Check what the model certificate says of an equilibrium, for states of this shape.

    Args:
        certificate: its arrays: ``gauge``, or ``m`` and perhaps ``L``; none for a fusion that is monotone by algebra.
    """
    fusion, activation = node.arguments.get("fusion"), node.arguments.get("activation")
    ceilings = {"relu": None, "hard-sigmoid": calc.one}
    if not isinstance(activation, str) or activation not in ceilings or not isinstance(fusion, dict):
        raise Rejected(f"{node.name}: it is no equilibrium of a known activation: {activation!r}")
    ceiling = ceilings[activation]
    kind, arguments = fusion.get("operation"), fusion.get("attributes")
    require(isinstance(arguments, dict), f"{node.name}: its fusion is not described")
    shape = (1, -1, *[1] * (len(state) - 1))
    m: Fraction | None = None
    if kind == "mondeq":
        made, own, m = _mondeq(calc, node, dict(arguments or {}))
    elif kind in ("linear", "conv2d"):
        require("fusion.weight" in node.tensors and len(node.tensors) == 1, f"{node.name}: it has other tensors")
        fused = Node(node.name, str(kind), (), dict(arguments or {}), {"weight": node.tensors["fusion.weight"]})
        if "m" in certificate:
            m = monotone(calc, fused, certificate)
        made, own = _own(calc, fused)
    elif kind == "feedback":
        made, own = _coupled(calc, node, dict(arguments or {}))
    else:
        raise Rejected(f"{node.name}: its fusion is not known")
    require((own[1] < calc.one).all(), f"{node.name}: a row has W_ii >= 1")
    divisor = calc.subtract(constant(calc, calc.one, *own[0].shape), own)
    if ceiling is not None:  # what follows from being monotone is shown for relu
        m = None
    found = Layer(node.name, made, (divisor[0].reshape(shape), divisor[1].reshape(shape)), m=m, ceiling=ceiling)
    if "gauge" in certificate:
        return contraction(calc, found, certificate["gauge"], state)
    require(m is not None, f"{node.name}: there is no gauge, so nothing says that its equilibrium is unique")
    found.fusion.push(calc, constant(calc, calc.zero, 1, *state))  # W keeps the shape, or it is rejected
    return found


def contraction(calc: Arithmetic, found: Layer, u: Array, state: tuple[int, ...]) -> Layer:
    """The layer with a gauge, (units,) or (channels,) or the shape of a state, if it is one."""
    require(u.shape in ((state[0],), state), f"{found.name}: a gauge of shape {u.shape} for states of shape {state}")
    require((u > calc.zero).all(), f"{found.name}: the gauge is not positive")
    shape = (1, -1, *[1] * (len(state) - 1))
    full = np.broadcast_to(u.reshape(shape) if u.ndim == 1 else u[None], (1, *state))
    pushed = _absolute(found).push(calc, (full, full))
    room = calc.subtract(calc.multiply((full, full), found.divisor), pushed)[0]
    require((room > calc.zero).all(), f"{found.name}: the slack of the gauge is not positive")
    return replace(found, u=full, room=room)


def _absolute(found: Layer) -> Fusion:
    """``|W|``, entry by entry."""
    fusion = found.fusion
    if isinstance(fusion, Dense):
        return Dense(np.abs(fusion.matrix), fusion.error)
    if isinstance(fusion, Convolved):
        return Convolved(_magnitudes(fusion.node))
    if isinstance(fusion, Coupled):
        return replace(fusion, couplings=tuple(_magnitudes(node) for node in fusion.couplings))
    raise Rejected(f"{found.name}: a gauge of a factored convolution cannot be checked")


def _magnitudes(node: Node) -> Node:
    """A layer of the absolute weights."""
    return replace(node, tensors={"weight": np.abs(node.tensors["weight"])})


def _coupled(calc: Arithmetic, node: Node, arguments: Mapping[str, Any]) -> tuple[Fusion, Interval]:
    """Blocks coupled to each other, and their own entries, which are zero."""
    shapes, described = arguments.get("shapes"), arguments.get("couplings")
    if set(arguments) != {"shapes", "couplings"} or not isinstance(shapes, list) or not isinstance(described, list):
        raise Rejected(f"{node.name}: its blocks are not described")
    for shape in shapes:
        whole = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**24 for size in shape)
        require(whole and len(shape) in (1, 3), f"{node.name}: {shape!r} is the shape of no block")
    require(len(shapes) == len(described) + 1 > 1, f"{node.name}: {len(described)} couplings of {len(shapes)} blocks")
    names = [f"fusion.couplings.{place}.weight" for place in range(len(described))]
    require(set(node.tensors) == set(names), f"{node.name}: it has other tensors than a weight a coupling")
    couplings = []
    for name, coupling in zip(names, described, strict=True):
        fits = isinstance(coupling, dict) and set(coupling) == {"operation", "attributes"}
        require(fits and coupling["operation"] in ("linear", "conv2d"), f"{node.name}: a coupling is no affine layer")
        inside = dict(coupling["attributes"])
        couplings.append(Node(node.name, coupling["operation"], (), inside, {"weight": node.tensors[name]}))
    return Coupled(node.name, tuple(map(tuple, shapes)), tuple(couplings)), constant(calc, calc.zero, 1)


def _own(calc: Arithmetic, fused: Node) -> tuple[Fusion, Interval]:
    """The fusion without the entries ``W_ii``, and these, (units,)."""
    weight = fused.tensors["weight"].copy()
    units = np.arange(len(weight))
    if fused.kind == "linear":
        require(weight.ndim == 2 and weight.shape[0] == weight.shape[1], f"{fused.name}: W is not square")
        features = (fused.arguments.get("in_features"), fused.arguments.get("out_features"))
        require(features == weight.shape, f"{fused.name}: W has another shape than it is described with")
        place: tuple[Any, ...] = (units, units)
    else:
        tensor(fused, "weight", None, None, None, None)
        require(pair(fused, "stride", 1) == (1, 1), f"{fused.name}: W has a stride, so it is no map of states")
        dilation = pair(fused, "dilation", 1)
        pads = pads_of(fused, (weight.shape[2], weight.shape[3]), dilation)
        if pads[0] % dilation[0] or pads[2] % dilation[1]:  # no tap reads its own position
            return Convolved(fused), constant(calc, calc.zero, len(weight))
        place = (units, units % weight.shape[1], pads[0] // dilation[0], pads[2] // dilation[1])
    own = weight[place].copy()
    weight[place] = calc.zero
    made = Convolved(replace(fused, tensors={"weight": weight}))
    zero = np.full(weight.shape, calc.zero, dtype=calc.kind)
    return (Dense(weight, zero) if fused.kind == "linear" else made), (own, own)


def _mondeq(calc: Arithmetic, node: Node, arguments: Mapping[str, Any]) -> tuple[Fusion, Interval, Fraction]:
    """The factored monotone fusion, its own entries (zero where rows are not solved), and ``m``."""
    m, inside = arguments.get("m"), arguments.get("attributes")
    if not isinstance(m, int | float) or not 0 < m < np.inf or not isinstance(inside, dict):
        raise Rejected(f"{node.name}: m = {m!r} is no strength of monotonicity")
    require(set(node.tensors) == {"fusion.A", "fusion.B"}, f"{node.name}: it has other tensors than A and B")
    A, B = node.tensors["fusion.A"], node.tensors["fusion.B"]
    if arguments.get("operation") == "conv2d":
        factors = [Convolved(Node(node.name, "conv2d", (), inside, {"weight": factor})) for factor in (A, B)]
        for factor in factors:
            require(pair(factor.node, "stride", 1) == (1, 1), f"{node.name}: W has a stride")
        return Factored(Fraction(m), *factors), constant(calc, calc.zero, len(B)), Fraction(m)
    require(arguments.get("operation") == "linear", f"{node.name}: its factors are not known")
    square = A.ndim == B.ndim == 2 and B.shape[0] == B.shape[1] == A.shape[1]
    require(square, f"{node.name}: A has shape {A.shape}, B {B.shape}")
    zero = constant(calc, calc.zero, 1)
    gram = calc.affine((A.T, A.T), A, zero)
    skew = calc.subtract((B, B), (B.T, B.T))
    share = number(calc, 1 - Fraction(m))
    identity = calc.exactly(np.eye(len(B)))
    own = calc.multiply((identity, identity), share)
    W = calc.add(calc.subtract(own, gram), skew)
    units = np.arange(len(B))
    diagonal = W[0][units, units].copy(), W[1][units, units].copy()
    matrix, error = centred(calc, W)
    matrix[units, units], error[units, units] = calc.zero, calc.zero
    return Dense(matrix, error), diagonal, Fraction(m)


def monotone(calc: Arithmetic, fused: Node, certificate: Mapping[str, Array]) -> Fraction:
    """The ``m`` of the model certificate, if ``I - sym W ⪰ m I``."""
    W = fused.tensors["weight"]
    require(certificate["m"].size == 1, f"{fused.name}: m is no number")
    stated = certificate["m"].reshape(-1)[0]
    require(stated > 0, f"{fused.name}: m is not positive")
    require(fused.kind == "linear" and W.ndim == 2 and W.shape[0] == W.shape[1], f"{fused.name}: W is no square matrix")
    identity, half = calc.exactly(np.eye(len(W))), number(calc, Fraction(1, 2))
    symmetric = calc.multiply(calc.add((W, W), (W.T, W.T)), half)
    # The factor that is made here is rounded, so it is made for a little more than what it has to show.
    above = float(stated) * (1 + 2.0**-20)
    least = least_eigenvalue(calc, calc.subtract((identity, identity), symmetric), certificate.get("L"), above)
    require(least >= stated, f"{fused.name}: I - sym W has not been shown to be at least m = {float(stated):.6g}")
    return Fraction(stated)


def least_eigenvalue(calc: Arithmetic, Q: Interval, L: Array | None = None, near: Array | float = 0.0) -> Array:
    """A lower bound of the least eigenvalue of every symmetric matrix in an interval, or in each of some.

    ``Q ⪰ Q - L Lᵀ``, whose eigenvalues are at least its diagonal less the rest of a row (Gershgorin). Any ``L`` will
    do; the Cholesky factor of ``Q - c I`` for a ``c`` a little below the least eigenvalue leaves ``c``.

    Args:
        L: a factor, or ``None`` to take the one for `near`.
    """
    if L is None:
        middle = calc.nearly(Q)
        shifted = middle - np.asarray(near)[..., None, None] * np.eye(middle.shape[-1])
        try:
            L = calc.exactly(np.linalg.cholesky(0.5 * (shifted + np.swapaxes(shifted, -1, -2))))
        except np.linalg.LinAlgError as error:
            raise Rejected("a matrix has no Cholesky factor, so it is not as positive as claimed") from error
    require(L.shape == Q[0].shape, f"a factor of shape {L.shape} for a matrix of shape {Q[0].shape}")
    turned = np.swapaxes(L, -1, -2)
    rest = calc.subtract(Q, product(calc, (L, L), (turned, turned)))
    size = np.maximum(np.abs(rest[0]), np.abs(rest[1]))
    units = np.arange(size.shape[-1])
    size[..., units, units] = calc.zero
    least: Array = calc.subtract((rest[0][..., units, units],) * 2, total(calc, (size, size)))[0].min(-1)
    return least


def enclosed(
    calc: Arithmetic, layer: Layer, v: Interval, suggested: Interval | None, refinements: int
) -> tuple[Interval, Interval, Array]:
    """A box that holds every equilibrium (suggested, or from the gauge alone), and for which samples it does.

    Returns:
        the box; the pre-activations over it; (batch,) whether the box holds.
    """
    if suggested is not None:
        lo, hi = suggested
        require(lo.shape == v[0].shape, f"{layer.name}: the box has shape {lo.shape[1:]}, the state {v[0].shape[1:]}")
        rows = layer.rows(calc, suggested, v)
        image = layer.image(calc, rows)
        inside = (lo <= hi) & (lo <= image[0]) & (image[1] <= hi)
        return suggested, rows, inside.reshape(len(lo), -1).all(1)
    if layer.u is None or layer.room is None:
        raise Rejected(f"{layer.name}: a box needs a gauge")
    # [0, t u] maps into itself for t s >= max(v, 0), and so does all that is cut from it by its own image.
    top = np.maximum(v[1], calc.zero)
    reach = calc.divide((top, top), (layer.room, layer.room))[1]
    t = reach.reshape(len(reach), -1).max(1).reshape(-1, *[1] * (top.ndim - 1))
    hi = layer.cut(calc.multiply((t, t), (layer.u, layer.u))[1])
    lo = constant(calc, calc.zero, *hi.shape)[0]
    for _ in range(refinements):
        image = layer.image(calc, layer.rows(calc, (lo, hi), v))
        lo, hi = np.maximum(lo, image[0]), np.minimum(hi, image[1])
    return (lo, hi), layer.rows(calc, (lo, hi), v), (lo <= hi).reshape(len(lo), -1).all(1)


def near(calc: Arithmetic, layer: Layer, v: Interval, state: Array) -> Interval:
    """A box around an approximate equilibrium at the middle of `v` that holds every equilibrium of a monotone layer.

    Args:
        state: (batch, *state), 0 or more.
    """
    require(state.shape == v[0].shape, f"{layer.name}: the state has shape {state.shape[1:]}, v {v[0].shape[1:]}")
    require((state >= calc.zero).all(), f"{layer.name}: the state is negative somewhere")
    middle = calc.exactly(calc.nearly(v))
    point = (middle, middle)
    radius = np.maximum(calc.subtract(v, point)[1], calc.subtract(point, v)[1])
    # δ_i (1 - W_ii + W_ii) needs no division: p is that of W itself, ẑ - p = (1 - W_ii) ẑ - (Σ_{j≠i} W_ij ẑ_j + v_i).
    pushed = calc.add(layer.fusion.push(calc, (state, state)), point)
    rest = calc.subtract(calc.multiply((state, state), layer.divisor), pushed)
    off = np.where(state > calc.zero, np.maximum(np.abs(rest[0]), np.abs(rest[1])), np.maximum(-rest[0], calc.zero))
    reach = calc.add(length(calc, off), length(calc, radius))
    if layer.m is None:
        raise Rejected(f"{layer.name}: it is not monotone")
    reach = calc.divide(reach, number(calc, layer.m))
    wide = (reach[1].reshape(-1, *[1] * (state.ndim - 1)),) * 2
    lo, hi = calc.subtract((state, state), wide)[0], calc.add((state, state), wide)[1]
    return np.maximum(lo, calc.zero), hi


def length(calc: Arithmetic, x: Array) -> Interval:
    """The Euclidean length of each sample, (batch,)."""
    flat = x.reshape(len(x), -1)
    lo, hi = total(calc, calc.multiply((flat, flat), (flat, flat)))
    tiny = calc.exactly(np.array([2.0**-900]))
    return calc.root((np.maximum(lo, calc.zero) + tiny, hi + tiny))
