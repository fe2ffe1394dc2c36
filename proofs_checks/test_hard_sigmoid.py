"""The hard sigmoid (docs/theory.md): rows solved for their own unknowns; boxes cut to its range; and the lines for
``z = clip(P, 0, 1)``, ``P = p / δ`` in ``[l, h]``,

    δ z <= a (p - δ l)            where l < 0 < h, a >= min(h, 1) / (min(h, 1) - l)
    δ z >= δ - c (δ h - p)        where l < 1 < h, c >= (1 - l⁺) / (h - l⁺)

so that for every ``g`` of the right sign ``q·z >= min over z of (q - e + Wᵀg)·z + g·v + Σ (...)``.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import corners, halves, rational
from proofs_checks.cases import boxes, gauged, matrices, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import ZERO, clip, equilibrium, is_equilibrium, relu, select

ONE, HALF = Fraction(1), Fraction(1, 2)
SLOPES = (ONE, ONE, 1 + Fraction(1, 2**10), Fraction(2))
ENDS = tuple(Fraction(n, 4) for n in range(-12, 17))


@st.composite
def intervals(draw: st.DrawFn) -> tuple:
    """``l <= h`` around the kinks, a point between, a divisor, and how far slopes are above their chords."""
    low, high = sorted((draw(st.sampled_from(ENDS)), draw(st.sampled_from(ENDS))))
    share = Fraction(draw(st.integers(0, 8)), 8)
    return (
        low,
        high,
        low + share * (high - low),
        draw(st.sampled_from((ONE, Fraction(3), HALF))),
        draw(st.sampled_from(SLOPES)),
    )


def chords(low: Fraction, high: Fraction) -> tuple[Fraction, Fraction]:
    """``a`` and ``c``; 1 where there is no kink."""
    top, bottom = min(high, ONE), max(low, ZERO)
    a = top / (top - low) if low < 0 < high else ONE
    return a, (1 - bottom) / (high - bottom) if low < 1 < high else ONE


def lines(case: tuple, below: Fraction = ONE, above: Fraction = ONE, kinks: bool = True, mixed: bool = False) -> bool:
    """Neither line is crossed at the point."""
    low, high, P, δ, more = case
    z, p = min(max(P, ZERO), ONE), δ * P
    a, c = chords(low, high)
    a, c = a * more * below, (a if mixed else c) * more * above
    upper = δ * z <= a * (p - δ * low) if low < 0 < high else low < 0 or δ * z <= p
    if not kinks or high <= 1:
        return bool(upper and δ * z >= p)
    return bool(upper and (low >= 1 or δ * z >= δ - c * (δ * high - p)))


def test_the_lines_are_not_crossed() -> None:
    holds(lines, intervals(), 300)


@st.composite
def layers(draw: st.DrawFn) -> dict:
    """A layer with a gauge, some of whose units are driven beyond their ceiling, and multipliers."""
    W, _ = draw(gauged(most=3))
    n, inputs = len(W), draw(st.integers(1, 2))
    low, high = draw(boxes(inputs))
    case = {"W": W, "U": draw(matrices(n, inputs)), "b": draw(vectors(n)) * draw(st.sampled_from((1, 4)))}
    case |= {
        "low": low, "high": high, "c": draw(vectors(n)), "g": draw(vectors(n)), "slope": draw(st.sampled_from(SLOPES)),
        "follow": draw(st.booleans()),
    }  # fmt: skip
    kind = draw(st.integers(0, 3))
    if kind == 0:  # one unit, which its lines bound as well as can be
        case |= {"W": 0 * W[:1, :1], "U": rational([[draw(st.sampled_from((1, 3)))]]), "slope": ONE, "follow": True}
        case |= {"b": rational([HALF]), "c": rational([draw(st.sampled_from((-1, 1)))]), "g": rational([1])}
    if kind == 1:  # two units of one input, in a row in which it would cancel if there were no kinks
        a, b = (Fraction(draw(st.integers(1, 6)), 2) for _ in range(2))
        row = rational([b, -a]) * draw(st.sampled_from((-1, 1)))
        case |= {"W": rational([[0, 0], [0, 0]]), "U": rational([[a], [b]]), "b": rational([0, 0]), "slope": ONE}
        case |= {"c": row, "g": row, "follow": False}
    if kind < 2:
        case |= {"low": rational([0]), "high": rational([1])}
    return case


def ranges(case: dict) -> tuple[np.ndarray, ...]:
    """``p_l, p_u, z_l, z_u`` over the whole range of the activation, refined a few times; and ``v``."""
    plus, minus = halves(case["U"])
    v = plus @ case["low"] + minus @ case["high"] + case["b"], plus @ case["high"] + minus @ case["low"] + case["b"]
    plus, minus = halves(case["W"])
    lower, upper = 0 * v[0], 0 * v[0] + 1
    for _ in range(3):
        p = plus @ lower + minus @ upper + v[0], plus @ upper + minus @ lower + v[1]
        lower, upper = np.maximum(lower, clip(p[0], ONE)), np.minimum(upper, clip(p[1], ONE))
    return p[0], p[1], lower, upper


def bound(case: dict, *, full: bool = False, gain: int = 1, relus: bool = False) -> Fraction:
    """The right-hand side; the options are the twins'."""
    W, U, b, c = case["W"], case["U"], case["b"], case["c"]
    low, high, z_low, z_high = ranges(case)
    a, e = (np.array(side, dtype=object) * case["slope"] for side in zip(*map(chords, low, high), strict=True))
    g = case["g"]
    if case["follow"]:  # the multipliers of CROWN, for layers that are not connected the best
        g = select(c > 0, e, a) * c
    g = select(high <= 0, relu(g), g)
    g = g if full else select(low >= 1, -relu(-g), g)
    below, above = (g < 0) & (low < 0) & (high > 0), (g > 0) & (low < 1) & (high > 1) & (not relus)
    taken = select(below, g / a, select(above, g / e, g))
    constant = g @ b - select(below, g * low, ZERO).sum() + gain * select(above, g / e - g * high, ZERO).sum()
    on_z, on_x = c - taken + W.T @ g, U.T @ g
    least = relu(on_x) @ case["low"] - relu(-on_x) @ case["high"]
    return relu(on_z) @ z_low - relu(-on_z) @ z_high + least + constant


def sound(case: dict, **options: object) -> bool:
    """No equilibrium of the box is below the bound."""
    value = bound(case, **options)
    points = [*corners(case["low"], case["high"]), (case["low"] + case["high"]) * HALF]
    return all(value <= case["c"] @ equilibrium(case["W"], case["U"] @ x + case["b"], ONE) for x in points)


def test_the_dual_is_below_every_equilibrium() -> None:
    holds(sound, layers())


@st.composite
def rows(draw: st.DrawFn) -> tuple:
    """A unit's own weight below 1, what else it reads, and some other state."""
    own = draw(st.sampled_from((Fraction(-10), -ONE, ZERO, HALF, 1 - Fraction(1, 2**20))))
    return own, draw(st.sampled_from(ENDS)), Fraction(draw(st.integers(-16, 48)), 32)


def same(case: tuple, ceiling: Fraction = ONE) -> bool:
    """``z = clip(d z + r)`` just where ``z = clip(r / (1 - d))``, for ``z`` in the range and beyond."""
    d, r, other = case
    W, v = np.array([[d]], dtype=object), np.array([r], dtype=object)
    solved = clip(v / (1 - d), ceiling)
    z = np.array([other], dtype=object)
    return is_equilibrium(W, v, solved, ONE) and bool((z == solved).all() or not is_equilibrium(W, v, z, ONE))


def test_rows_may_be_solved_for_their_own_unknowns() -> None:
    holds(same, rows())


def stays(case: dict, top: Fraction = ONE) -> bool:
    """The part of a mapped box that lies in the range is mapped into itself, and holds the equilibria."""
    plus, minus = halves(case["U"])
    v = plus @ case["low"] + minus @ case["high"] + case["b"], plus @ case["high"] + minus @ case["low"] + case["b"]
    plus, minus = halves(case["W"])
    lower, upper = 0 * v[0], 0 * v[0] + top
    image = clip(plus @ lower + minus @ upper + v[0], ONE), clip(plus @ upper + minus @ lower + v[1], ONE)
    return bool((lower <= image[0]).all() and (image[1] <= upper).all())


def test_the_range_maps_into_itself() -> None:
    holds(stays, layers())


TWINS = {
    "an upper slope below its chord": lambda case: lines(case, below=1 - Fraction(1, 2**6)),
    "a lower slope below its chord": lambda case: lines(case, above=1 - Fraction(1, 2**6)),
    "ReLU's lines": lambda case: lines(case, kinks=False),
    "the slope of the other kink": lambda case: lines(case, mixed=True),
}
DUALS = {
    "a multiplier of a full unit": lambda case: sound(case, full=True),
    "twice the gain at the ceiling": lambda case: sound(case, gain=2),
    "ReLU's dual": lambda case: sound(case, relus=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_line(twin: str) -> None:
    rejects(TWINS[twin], intervals(), 300)


@pytest.mark.parametrize("twin", DUALS)
def test_broken_dual(twin: str) -> None:
    rejects(DUALS[twin], layers())


def test_broken_rows_and_ranges() -> None:
    rejects(lambda case: same(case, ceiling=HALF), rows())
    rejects(lambda case: same((2 - case[0], *case[1:])), rows())
    rejects(lambda case: stays(case, top=HALF), layers())
