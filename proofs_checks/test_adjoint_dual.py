"""The adjoint dual bound (docs/theory.md). On a verified box let ``p = Wz + Ux + b ∈ [p_l, p_u]``, ``z ∈ [z_l,
z_u]``. For unstable units let ``a`` be at or above ``p_u / (p_u - p_l)``, elsewhere 0. *Every* ``λ`` (``>= 0``
unless the unit is active) and ``μ >= 0`` (0 unless unstable) give, with ``g = λ - μ∘a``,

    cᵀz* >= min over z ∈ [z_l, z_u], x ∈ X of (c - λ + μ + Wᵀg)·z + (Uᵀg)·x  +  g·b + Σ μ a p_l

for a box ``X``, or a ball cut to a box (one dual scalar, sound for any value ``>= 0``). A leaf of branch and
bound is the same with ``p_l`` or ``p_u`` set to 0; ``c = 0`` and a bound above 0 say that it is empty.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import HALF, corners, halves, identity, interval_equilibrium, rational
from proofs_checks.cases import boxes, gauged, matrices, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import ZERO, equilibrium, relu, select, solve_linear, zeros

SLOPES = (Fraction(1), Fraction(1), 1 + Fraction(1, 2**10), Fraction(2))


@st.composite
def leaves(draw: st.DrawFn) -> dict:
    """A leaf of any case; every other time ``c = 0`` and multipliers that look for a proof that it is empty."""
    case = draw(cases())
    case["leaf"] = (draw(st.integers(0, len(case["c"]) - 1)), draw(st.booleans()))
    if draw(st.booleans()):
        sign = -1 if case["leaf"][1] else 1
        case |= {"c": 0 * case["c"], "random": None, "radius": None, "seed": sign * Fraction(1), "slope": Fraction(1)}
    return case


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """A layer with a gauge, ``X``, ``c`` (often 0), a leaf or none, and multipliers: random, or nearly optimal ones."""
    W, _ = draw(gauged(most=3))
    n, inputs = len(W), draw(st.integers(1, 2))
    low, high = draw(boxes(inputs))
    ball = draw(st.sampled_from((None, None, HALF, Fraction(1), Fraction(4))))
    case = {"W": W, "U": draw(matrices(n, inputs)), "b": draw(vectors(n)), "low": low, "high": high}
    case |= {"radius": ball, "scalar": draw(st.sampled_from((ZERO, HALF, Fraction(3)))), "leaf": None}
    case["c"] = draw(vectors(n)) * draw(st.sampled_from((1, 1, 0)))
    if draw(st.booleans()):
        case["leaf"] = (draw(st.integers(0, n - 1)), draw(st.booleans()))
    case["slope"], case["alpha"] = draw(st.sampled_from(SLOPES)), draw(st.sampled_from((0, 1, HALF)))
    case["random"] = (draw(vectors(n)), draw(vectors(n, 0))) if draw(st.booleans()) else None
    case["seed"] = draw(vectors(1))[0]
    if draw(st.integers(0, 3)) == 0:  # the triangle itself: unstable units that are not connected, each at its chord
        flat = {"W": 0 * W, "b": -case["U"] @ (low + high) * HALF, "c": 0 * case["c"] - 1}
        case |= flat | {"leaf": None, "random": None, "radius": None, "slope": Fraction(1)}
    return case


def ranges(case: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``p_l, p_u, z_l, z_u`` of the leaf, from the interval equilibrium."""
    W, plus, minus = case["W"], *halves(case["U"])
    v = (plus @ case["low"] + minus @ case["high"] + case["b"], plus @ case["high"] + minus @ case["low"] + case["b"])
    lower, upper = interval_equilibrium(W, v)
    plus, minus = halves(W)
    p_low, p_high = plus @ lower + minus @ upper + v[0], plus @ upper + minus @ lower + v[1]
    if case["leaf"] is not None:
        unit, positive = case["leaf"]
        if positive:
            p_low[unit] = max(p_low[unit], ZERO)
        else:
            p_high[unit] = min(p_high[unit], ZERO)
            upper[unit] = ZERO
            lower[unit] = ZERO
    return p_low, p_high, lower, upper


def multipliers(case: dict, p_low: np.ndarray, p_high: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``λ, μ`` within their signs: drawn, or of ``g = D q``, ``q = c + Wᵀg``, with ``g`` given at the leaf's unit."""
    active, unstable = p_low >= 0, (p_low < 0) & (p_high > 0)
    if case["random"] is not None:
        free, mu = case["random"]
        return select(active, free, relu(free)), select(unstable, mu, ZERO)
    W, n = case["W"], len(a)
    fixed = zeros(n)
    if case["leaf"] is not None:
        fixed[case["leaf"][0]] = case["seed"]
    c, q = case["c"] + W.T @ fixed, case["c"]
    for _ in range(3):
        D = select(active, Fraction(1), select(unstable, select(q >= 0, case["alpha"] + 0 * q, a), ZERO))
        D = select(fixed != 0, ZERO, D)
        found = solve_linear(identity(n) - W.T * D, c)
        q = q if found is None else found
    free = select(active, q, select(unstable, relu(case["alpha"] * q), ZERO)) * (fixed == 0) + fixed
    return select(active, free, relu(free)), select(unstable & (fixed == 0), relu(-q), ZERO)


def points(case: dict) -> list[np.ndarray]:
    """Points of ``X``: the corners and the middle; for a ball, points on it, pushed into the box."""
    low, high, radius = case["low"], case["high"], case["radius"]
    if radius is None:
        return list(corners(low, high))
    middle, unit = (low + high) * HALF, identity(len(low))
    steps = [sign * radius * row for row in unit for sign in (1, -1)] + [0 * unit[0]]
    if len(low) == 2:
        steps += [radius * np.array([Fraction(3, 5) * i, Fraction(4, 5) * j]) for i in (1, -1) for j in (1, -1)]
    return [np.minimum(np.maximum(middle + step, low), high) for step in steps]


def least(case: dict, w: np.ndarray) -> Fraction:
    """A lower bound of ``w·x`` on ``X``; for a ball that of ``w·x + s (‖x - c‖² - r²)`` on the box."""
    low, high, radius, s = case["low"], case["high"], case["radius"], case["scalar"]
    if radius is None or s == 0:
        return relu(w) @ low - relu(-w) @ high
    middle = (low + high) * HALF
    best = np.minimum(np.maximum(middle - w / (2 * s), low), high)
    return w @ best + s * (((best - middle) ** 2).sum() - radius**2)


def bound(
    case: dict, slope: Fraction | None = None, transposed: bool = True, sign: int = 1, flip: bool = False
) -> Fraction | None:
    """The right-hand side, ``None`` for a leaf that the intervals show to be empty; the options are the twins'."""
    W, U, b, c = case["W"], case["U"], case["b"], case["c"]
    p_low, p_high, z_low, z_high = ranges(case)
    if not bool((p_low <= p_high).all() and (z_low <= z_high).all()):
        return None
    unstable = (p_low < 0) & (p_high > 0)
    width = select(unstable, p_high - p_low, Fraction(1))
    a = select(unstable, p_high / width, ZERO) * (case["slope"] if slope is None else slope)
    lam, mu = multipliers(case, p_low, p_high, a)
    if flip:
        lam = -lam
    g = lam - mu * a
    on_z = c - lam + mu + (W.T if transposed else W) @ g
    constant = g @ b + sign * (mu * a * p_low).sum()
    return relu(on_z) @ z_low - relu(-on_z) @ z_high + least(case, U.T @ g) + constant


def sound(case: dict, everywhere: bool = False, **options: object) -> bool:
    """No equilibrium of the leaf is below the bound."""
    value = bound(case, **options)
    for x in points(case):
        v = case["U"] @ x + case["b"]
        z = equilibrium(case["W"], v)
        if case["leaf"] is not None and not everywhere:
            unit, positive = case["leaf"]
            p = (case["W"] @ z + v)[unit]
            if p < 0 if positive else p > 0:
                continue
        if value is None or case["c"] @ z < value:
            return False
    return True


def zero_multipliers(case: dict) -> bool:
    """``λ = μ = 0`` is interval propagation."""
    _, _, z_low, z_high = ranges(case)
    plain = case | {"random": (zeros(len(z_low)), zeros(len(z_low)))}
    value = bound(plain)
    return value is None or value == relu(case["c"]) @ z_low - relu(-case["c"]) @ z_high + least(case, 0 * case["low"])


def tight(case: dict) -> bool:
    """For one ``x`` and the solved multipliers the bound is attained: the check is not idle."""
    plain = case | {"leaf": None, "random": None, "radius": None, "high": case["low"], "slope": Fraction(1)}
    z = equilibrium(case["W"], case["U"] @ case["low"] + case["b"])
    return bound(plain) == case["c"] @ z


def test_it_is_below_every_equilibrium() -> None:
    holds(sound, cases(), 300)


def test_it_is_below_every_equilibrium_of_a_leaf() -> None:
    holds(sound, leaves(), 300)


def test_without_multipliers_it_is_the_interval() -> None:
    holds(zero_multipliers, cases())


def test_for_one_input_it_is_attained() -> None:
    holds(tight, cases())


@pytest.mark.parametrize("gap", [Fraction(1, 4), Fraction(1, 2**20)])
def test_an_empty_leaf_that_the_intervals_do_not_show(gap: Fraction) -> None:
    # z_1 = relu(x), p_2 = x - z_1 - gap: never positive, and up to 1 - gap by intervals.
    case = {"W": rational([[0, 0], [-1, 0]]), "U": rational([[1], [1]]), "b": np.array([ZERO, -gap])}
    case |= {"low": rational([-1]), "high": rational([1]), "radius": None, "scalar": ZERO, "c": zeros(2)}
    case |= {"leaf": (1, True), "slope": Fraction(1), "alpha": 1, "random": None, "seed": Fraction(-1)}
    assert ranges(case)[1][1] == 1 - gap and bound(case) == gap


TWINS = {
    "a slope below the chord": lambda case: sound(case, slope=1 - Fraction(1, 2**6)),
    "W g for Wᵀ g": lambda case: sound(case, transposed=False),
    "- Σ μ a p_l": lambda case: sound(case, sign=-1),
    "λ of the wrong sign": lambda case: sound(case, flip=True),
    "a leaf's bound for the whole": lambda case: sound(case, everywhere=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], leaves() if "leaf" in twin else cases(), 300)
