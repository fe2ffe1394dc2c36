"""Error bounds of a layer without a gauge (docs/theory.md): with ``I - sym W ⪰ m I``, ``m > 0``, the
equilibrium is unique and any ``ẑ`` satisfies ``‖z* - ẑ‖₂ <= (1 + ‖W‖₂/m) ‖ẑ - F(ẑ)‖₂``; for ``ẑ >= 0`` also
``<= ‖δ‖₂/m`` with ``δ_i = ẑ_i - (Wẑ+v)_i`` where ``ẑ_i > 0``, else ``-((Wẑ+v)_i)⁺``. And ``‖z*(v) - z*(v')‖₂ <=
‖v - v'‖₂ / m``, so that a box ``x_c ± r`` moves the equilibrium by at most ``‖|U| r‖₂ / m``. All squared, so
that no root is taken."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import ONE, corners, definite, identity, norm_below, rational
from proofs_checks.cases import boxes, injections, matrices, monotone, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import ZERO, equilibrium, relu, select


def square(x: np.ndarray) -> Fraction:
    return (x**2).sum()


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """``W, m, v`` and a ``ẑ``: anywhere, next to the equilibrium, or where a rotation hides the error."""
    if draw(st.integers(0, 7)) == 0:
        k = draw(st.sampled_from((2, 10, 2**20)))
        return rational([[0, k], [-k, 0]]), ONE, rational([1, -(k**2)]), np.array([Fraction(2), Fraction(1, k)])
    W, m = draw(monotone())
    v, guess = draw(injections(W)), draw(vectors(len(W)))
    near = draw(st.sampled_from((0, 1, Fraction(1, 2**20))))
    return W, m, v, guess if not near else equilibrium(W, v) + near * guess


def norm_above(W: np.ndarray) -> Fraction:
    """A rational ``t >= ‖W‖₂``, verified, and above it by 2⁻³⁰ or so."""
    t = Fraction(float(np.linalg.norm(W.astype(float), 2))) * (1 + Fraction(1, 2**30)) + Fraction(1, 2**30)
    while not norm_below(W, t**2, strict=False):
        t *= 2
    return t


def by_residual(case: tuple, one: int = 1, norm: bool = True) -> bool:
    W, m, v, guess = case
    if not definite((1 - m) * identity(len(v)) - W, strict=False):
        return False
    residual = guess - relu(W @ guess + v)
    factor = one * m + (norm_above(W) if norm else 0)
    return m**2 * square(equilibrium(W, v) - guess) <= factor**2 * square(residual)


def by_delta(case: tuple, cut: bool = True, zeros: bool = True) -> bool:
    W, m, v, guess = case
    guess = relu(guess)
    p = W @ guess + v
    delta = select(guess > 0, guess - p, -relu(p) if zeros else 0 * p) if cut else guess - relu(p)
    return m**2 * square(equilibrium(W, v) - guess) <= square(delta)


@st.composite
def pairs(draw: st.DrawFn) -> tuple:
    W, m = draw(monotone(most=3))
    inputs = draw(st.integers(1, 2))
    U, b = draw(matrices(len(W), inputs)), draw(vectors(len(W)))
    if draw(st.booleans()):  # attained: z = v / m, all units on
        W, b, U = (1 - m) * identity(len(W)), b + 100, 0 * U + np.array([1, -1][:inputs], dtype=object)
    return W, m, U, b, *draw(boxes(inputs))


def moved(case: tuple, absolute: bool = True, power: int = 2) -> bool:
    """The equilibrium at every corner against that of the centre."""
    W, m, U, b, low, high = case
    centre, radius = (low + high) / 2, (high - low) / 2
    reach = square((abs(U) if absolute else U) @ radius)
    truth = equilibrium(W, U @ centre + b)
    return all(m**power * square(equilibrium(W, U @ x + b) - truth) <= reach for x in corners(low, high))


def test_by_the_residual() -> None:
    holds(by_residual, cases())


def test_by_delta() -> None:
    holds(by_delta, cases())


def test_how_far_a_box_of_inputs_moves_the_equilibrium() -> None:
    holds(moved, pairs())


TWINS = {
    "residual / m, which is false": (lambda case: by_residual(case, norm=False), cases()),
    "‖W‖ / m without the 1": (lambda case: by_residual(case, one=0), cases()),
    "δ: the residual in its place": (lambda case: by_delta(case, cut=False), cases()),
    "δ: 0 where ẑ is": (lambda case: by_delta(case, zeros=False), cases()),
    "moved: U for |U|": (lambda case: moved(case, absolute=False), pairs()),
    "moved: m forgotten": (lambda case: moved(case, power=0), pairs()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])


def test_a_point_on_the_equilibrium_has_no_error() -> None:
    assert by_residual((np.array([[ZERO]]), Fraction(1), np.array([ZERO]), np.array([ZERO])))
