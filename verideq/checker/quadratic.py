"""The quadratic dual: a bound for an equilibrium without any box of its states.

**Theorem.** Let ``z = relu(p)``, ``p = W z + U x + b``, and ``x`` within ``x_c ± r`` (or ``‖x - x_c‖₂ <= r``). For
``λ, ν >= 0``, ``s > 0`` (one an input), ``τ`` of any sign, ``T = diag τ``:

    c·z  >=  min over all z and x of   c·z + λ·(p - z) - ν·z + τ·(z∘(z - p)) + Σ s_j ((x_j - x_cj)² - r_j²)

because ``p <= z``, ``z >= 0`` and ``z∘(z - p) = 0`` at every equilibrium. With ``x`` minimised out the right-hand side
is a quadratic ``f`` in ``z`` with half its second derivative ``Q = ½(T(I - W) + (I - W)ᵀT) - ¼ T U S⁻¹ Uᵀ T``, and if
``Q ⪰ η I`` with ``η > 0`` then for every ``ẑ``

    c·z  >=  f(ẑ) - ‖∇f(ẑ)‖₂² / (4 η).

On a half of the inputs with ``p_i >= 0``, ``λ_i`` may have any sign (``z_i = p_i``); with ``p_i <= 0``, ``z_i = 0`` and
the unit leaves the quadratic. Neither a box, nor uniqueness, nor the prover's factorisation is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from verideq.checker.adjoint import pull
from verideq.checker.arithmetic import (
    Arithmetic,
    Array,
    Interval,
    Rejected,
    constant,
    number,
    product,
    require,
    total,
)  # fmt: skip
from verideq.checker.claim import Case
from verideq.checker.layers import Layer, least_eigenvalue
from verideq.checker.network import Node

HALF = Fraction(1, 2)


def chain(
    calc: Arithmetic, nodes: list[Node], q: Interval, shapes: Mapping[str, tuple[int, ...]], start: str, stop: str
) -> tuple[Interval, Interval]:
    """Rows on the output of `start` as rows on the output of `stop`, all between affine."""
    by_name = {node.name: node for node in nodes}
    bounds = constant(calc, calc.zero, len(q[0]))
    while start != stop:
        node = by_name.get(start)
        if node is None or len(node.inputs) != 1:
            raise Rejected("the quadratic dual takes a chain of affine maps around one equilibrium")
        q, shift = pull(calc, node, q, shapes[node.inputs[0]])
        bounds, start = calc.add(bounds, shift), node.inputs[0]
    return q, bounds


def quadratic(
    calc: Arithmetic,
    layer: Layer,
    U: Interval,
    b: Interval,
    region: Interval,
    cases: Sequence[Case],
    fixed: tuple[Array, Array],
    c: Interval,
    state: tuple[int, ...],
) -> Array:
    """A lower bound of ``c · z*`` for every row, (cases, rows).

    Args:
        U, b: the injection as an affine map of the input, (units, inputs) and (units,).
        region: the boxes of inputs, (cases, inputs).
        cases: of one form.
        fixed: (cases, units), where the splits of a case say ``p <= 0``, and where ``p >= 0``.
        c: (cases, rows, units).
        state: the shape of a state, of as many units.
    """
    rows, units = c[0].shape[1:]
    inputs = U[0].shape[1]
    ballshaped = cases[0].claim.norm == "l2"
    expected = {name: (rows, units) for name in ("lambda", "nu", "tau", "z")} | {"s": (rows, inputs), "eta": (rows,)}
    if ballshaped:
        expected["s"] = (rows, 1)
    given = {}
    for name, shape in expected.items():
        arrays = [case.steps[-1].quadratic[name] for case in cases]
        for array in arrays:
            require(array.shape == shape, f"{name} of the quadratic dual has shape {array.shape}")
        given[name] = np.concatenate(arrays)
    below, above = (side.repeat(rows, 0) for side in fixed)
    require((given["s"] > calc.zero).all(), "s of the quadratic dual is not positive")
    require((given["nu"] >= calc.zero).all(), "nu of the quadratic dual is negative")
    require(((given["lambda"] >= calc.zero) | above).all(), "lambda of the quadratic dual is negative")
    require(((given["z"] == calc.zero) | ~below).all(), "the point of the quadratic dual is not zero where z is")
    center, reach = _around(calc, cases, region, ballshaped)
    rest = _matrix(calc, layer, state)
    p0 = calc.add(product(calc, (center, center), _transposed(U)), b)
    around = [side.repeat(rows, 0) for side in (*p0, *reach)]
    flat = c[0].reshape(-1, units), c[1].reshape(-1, units)
    size, found = max(1, NUMBERS // (units * inputs)), []
    for start in range(0, len(flat[0]), size):
        part = slice(start, start + size)
        own = {name: array[part] for name, array in given.items()}
        p0, reach = (around[0][part], around[1][part]), (around[2][part], around[3][part])
        found.append(_rows(calc, rest, U, p0, reach, own, ~below[part], (flat[0][part], flat[1][part])))
    bounds: Array = np.concatenate(found).reshape(len(cases), rows)
    return bounds


NUMBERS = 2**18
"""Coefficients of inputs that are worked out together: what a processor's cache holds."""


def _around(calc: Arithmetic, cases: Sequence[Case], region: Interval, ballshaped: bool) -> tuple[Array, Interval]:
    """A point of every case, (cases, inputs), and the squares of how far ``x`` may be from it: by feature, or of the
    length, (cases, 1).
    """
    if not ballshaped:
        middle = calc.exactly(calc.nearly(region))
        away = np.maximum(calc.subtract(region, (middle,) * 2)[1], calc.subtract((middle,) * 2, region)[1])
        return middle, calc.multiply((away, away), (away, away))
    claims = [case.claim for case in cases]
    require(all(claim.weights is None for claim in claims), "the quadratic dual takes an l2 ball without weights")
    stored = [np.stack([claim.center[k].reshape(-1) for claim in claims]) for k in (0, 1)]
    center = stored[0], stored[1]
    middle = calc.exactly(calc.nearly(center))
    away = np.maximum(calc.subtract(center, (middle,) * 2)[1], calc.subtract((middle,) * 2, center)[1])
    # Each feature of the stored centre is within `away` of the point; the lengths add up to at most this.
    shift = total(calc, (away, away))
    ends = [number(calc, claim.eps) for claim in claims]
    eps = np.concatenate([low for low, _ in ends]), np.concatenate([high for _, high in ends])
    radius = calc.add(eps, shift)
    low, high = calc.multiply(radius, radius)
    return middle, (low[:, None], high[:, None])


def _matrix(calc: Arithmetic, layer: Layer, state: tuple[int, ...]) -> Interval:
    """``I - W``, an interval matrix."""
    units = int(np.prod(state))
    identity = calc.exactly(np.eye(units))
    pushed = layer.fusion.push(calc, (identity.reshape(units, *state),) * 2)
    off = -pushed[1].reshape(units, units).T, -pushed[0].reshape(units, units).T
    divisor = tuple(np.broadcast_to(side, (1, *state)).reshape(-1) for side in layer.divisor)
    own = calc.multiply((identity, identity), (divisor[0][:, None], divisor[1][:, None]))
    return calc.add(off, own)


def _dot(calc: Arithmetic, a: Interval, b: Interval) -> Interval:
    """``a · b`` of every row: (rows,)."""
    return total(calc, calc.multiply(a, b))


def _transposed(matrix: Interval) -> Interval:
    return np.swapaxes(matrix[0], -1, -2), np.swapaxes(matrix[1], -1, -2)


def _rows(
    calc: Arithmetic,
    rest: Interval,
    U: Interval,
    p0: Interval,
    reach: Interval,
    given: Mapping[str, Array],
    kept: Array,
    c: Interval,
) -> Array:
    """The bounds of rows; `rest` is ``I - W``, `reach` squares of radii, `kept` the units that may not be zero."""
    lam, nu, tau, z = ((given[name], given[name]) for name in ("lambda", "nu", "tau", "z"))
    s, quarter = (given["s"], given["s"]), number(calc, HALF * HALF)
    eta = _convexity(calc, rest, U, tau[0], s[0], kept, given["eta"])
    require((eta > calc.zero).all(), "the quadratic dual is not convex")

    p = calc.add(calc.subtract(z, product(calc, z, _transposed(rest))), p0)
    bent = calc.multiply(tau, z)
    w = calc.subtract(lam, bent)
    seen = product(calc, w, U)
    cost = calc.subtract(calc.subtract(c, lam), nu)
    gap = calc.multiply(tau, calc.subtract(z, p))
    squares = calc.divide(calc.multiply(seen, seen), s)
    f = calc.add(calc.add(_dot(calc, cost, z), _dot(calc, lam, p)), _dot(calc, gap, z))
    f = calc.subtract(calc.subtract(f, calc.multiply(total(calc, squares), quarter)), _dot(calc, s, reach))
    # Wᵀ w = w - (I - W)ᵀ w
    back = calc.subtract(w, product(calc, w, rest))
    x = calc.multiply(calc.divide(seen, s), number(calc, -HALF))
    moved = calc.multiply(tau, product(calc, x, _transposed(U)))
    gradient = calc.subtract(calc.add(calc.add(cost, gap), calc.add(bent, back)), moved)
    size = np.where(kept, np.maximum(np.abs(gradient[0]), np.abs(gradient[1])), calc.zero)
    lost = calc.multiply(calc.divide(_dot(calc, (size, size), (size, size)), (eta, eta)), quarter)
    return calc.subtract(f, lost)[0]


def _convexity(calc: Arithmetic, rest: Interval, U: Interval, tau: Array, s: Array, kept: Array, near: Array) -> Array:
    """``η`` of every row: a lower bound of the least eigenvalue of ``Q`` on the units that are kept."""
    column, row = (tau[:, :, None],) * 2, (tau[:, None, :],) * 2
    half, quarter = number(calc, HALF), number(calc, HALF * HALF)
    TR = calc.multiply(column, rest)
    scaled = calc.divide(U, (s[:, None, :],) * 2)
    curved = calc.multiply(calc.multiply(product(calc, scaled, _transposed(U)), calc.multiply(column, row)), quarter)
    Q = calc.subtract(calc.multiply(calc.add(TR, _transposed(TR)), half), curved)
    # A unit that is left out gets a row of its own, on a diagonal no smaller than another: no eigenvalue is below it.
    units = np.arange(tau.shape[1])
    own = np.where(kept, Q[1][:, units, units], calc.zero)
    most = np.where(kept.any(1), own.max(1), calc.one)
    both = kept[:, :, None] & kept[:, None, :]
    lo, hi = (np.where(both, side, calc.zero) for side in Q)
    for side in (lo, hi):
        side[:, units, units] = np.where(kept, side[:, units, units], most[:, None])
    return least_eigenvalue(calc, (lo, hi), near=calc.nearly((near, near)))
