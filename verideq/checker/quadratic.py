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

from collections.abc import Mapping
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
    case: Case,
    above: Array,
    below: Array,
    c: Interval,
    state: tuple[int, ...],
) -> Array:
    """A lower bound of ``c · z*`` for every row, (rows,).

    Args:
        U, b: the injection as an affine map of the input, (units, inputs) and (units,).
        region: the box of inputs, (inputs,).
        above, below: (units,), where the splits of the case fix the sign of ``p``.
        c: (rows, units).
        state: the shape of a state, of as many units.
    """
    given = case.steps[-1].quadratic
    rows, units = c[0].shape
    inputs = U[0].shape[1]
    expected = {name: (rows, units) for name in ("lambda", "nu", "tau", "z")} | {"s": (rows, inputs), "eta": (rows,)}
    ballshaped = case.claim.norm == "l2"
    if ballshaped:
        expected["s"] = (rows, 1)
    for name, shape in expected.items():
        require(given[name].shape == shape, f"{name} of the quadratic dual has shape {given[name].shape}")
    require((given["s"] > calc.zero).all(), "s of the quadratic dual is not positive")
    require((given["nu"] >= calc.zero).all(), "nu of the quadratic dual is negative")
    require(((given["lambda"] >= calc.zero) | above).all(), "lambda of the quadratic dual is negative")
    require(((given["z"] == calc.zero) | ~below).all(), "the point of the quadratic dual is not zero where z is")
    center, reach = _around(calc, case, region, ballshaped)
    W = _matrix(calc, layer, state)
    p0 = calc.add(_times(calc, U, (center, center)), b)
    found = [
        _row(calc, W, U, p0, reach, {name: array[k] for name, array in given.items()}, ~below, (c[0][k], c[1][k]))
        for k in range(rows)
    ]
    return np.array(found, dtype=calc.kind)


def _around(calc: Arithmetic, case: Case, region: Interval, ballshaped: bool) -> tuple[Array, Interval]:
    """A point, and the squares of how far ``x`` may be from it: by feature, or of the length."""
    if not ballshaped:
        middle = calc.exactly(calc.nearly(region))
        away = np.maximum(calc.subtract(region, (middle,) * 2)[1], calc.subtract((middle,) * 2, region)[1])
        return middle, calc.multiply((away, away), (away, away))
    require(case.claim.weights is None, "the quadratic dual takes an l2 ball without weights")
    center = (case.claim.center[0].reshape(-1), case.claim.center[1].reshape(-1))
    middle = calc.exactly(calc.nearly(center))
    away = np.maximum(calc.subtract(center, (middle,) * 2)[1], calc.subtract((middle,) * 2, center)[1])
    # Each feature of the stored centre is within `away` of the point; the lengths add up to at most this.
    shift = total(calc, (away, away))
    radius = calc.add(number(calc, case.claim.eps), shift)
    return middle, calc.multiply(radius, radius)


def _matrix(calc: Arithmetic, layer: Layer, state: tuple[int, ...]) -> Interval:
    """``I - W``, an interval matrix."""
    units = int(np.prod(state))
    identity = calc.exactly(np.eye(units))
    pushed = layer.fusion.push(calc, (identity.reshape(units, *state),) * 2)
    off = -pushed[1].reshape(units, units).T, -pushed[0].reshape(units, units).T
    divisor = tuple(np.broadcast_to(side, (1, *state)).reshape(-1) for side in layer.divisor)
    own = calc.multiply((identity, identity), (divisor[0][:, None], divisor[1][:, None]))
    return calc.add(off, own)


def _times(calc: Arithmetic, matrix: Interval, x: Interval) -> Interval:
    """``A x``, both intervals: (rows,)."""
    lo, hi = product(calc, matrix, (x[0][:, None], x[1][:, None]))
    return lo[:, 0], hi[:, 0]


def _dot(calc: Arithmetic, a: Interval, b: Interval) -> Interval:
    """``a · b``, both intervals: a scalar."""
    return total(calc, calc.multiply(a, b))


def _transposed(matrix: Interval) -> Interval:
    return matrix[0].T, matrix[1].T


def _row(
    calc: Arithmetic,
    rest: Interval,
    U: Interval,
    p0: Interval,
    reach: Interval,
    given: Mapping[str, Array],
    kept: Array,
    c: Interval,
) -> Array:
    """The bound of one row; `rest` is ``I - W``, `reach` squares of radii, `kept` the units that may not be zero."""
    lam, nu, tau, z = ((given[name], given[name]) for name in ("lambda", "nu", "tau", "z"))
    s = np.broadcast_to(given["s"], U[0].shape[1:])
    weights, half, quarter = (s, s), number(calc, HALF), number(calc, HALF * HALF)
    column = tau[0][:, None], tau[1][:, None]
    TR, TU = calc.multiply(column, rest), calc.multiply(column, U)
    curved = calc.multiply(product(calc, calc.divide(TU, weights), _transposed(TU)), quarter)
    Q = calc.subtract(calc.multiply(calc.add(TR, _transposed(TR)), half), curved)
    block, eta = np.ix_(kept, kept), calc.one
    if kept.any():
        eta = least_eigenvalue(calc, (Q[0][block], Q[1][block]), near=float(given["eta"]))
    require(eta > calc.zero, "the quadratic dual is not convex")

    p = calc.add(calc.subtract(z, _times(calc, rest, z)), p0)
    bent = calc.multiply(tau, z)
    w = calc.subtract(lam, bent)
    seen = _times(calc, _transposed(U), w)
    cost = calc.subtract(calc.subtract(c, lam), nu)
    gap = calc.multiply(tau, calc.subtract(z, p))
    squares = calc.divide(calc.multiply(seen, seen), weights)
    radii = (s[: len(reach[0])],) * 2
    f = calc.add(calc.add(_dot(calc, cost, z), _dot(calc, lam, p)), _dot(calc, gap, z))
    f = calc.subtract(calc.subtract(f, calc.multiply(total(calc, squares), quarter)), _dot(calc, radii, reach))
    # Wᵀ w = w - (I - W)ᵀ w
    back = calc.subtract(w, _times(calc, _transposed(rest), w))
    x = calc.multiply(calc.divide(seen, weights), number(calc, -HALF))
    moved = calc.multiply(tau, _times(calc, U, x))
    gradient = calc.subtract(calc.add(calc.add(cost, gap), calc.add(bent, back)), moved)
    size = np.where(kept, np.maximum(np.abs(gradient[0]), np.abs(gradient[1])), calc.zero)
    least: Array = np.array([eta], dtype=calc.kind)
    lost = calc.multiply(calc.divide(_dot(calc, (size, size), (size, size)), (least, least)), quarter)
    return calc.subtract(f, lost)[0].reshape(-1)[0]
