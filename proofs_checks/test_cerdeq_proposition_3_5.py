"""CerDEQ, Proposition 3.5: ``E[Δ_out] / E[Δ_in] <= n_u E|U| / (2 - √n ‖W‖₂)`` for symmetric random ``U``.

Its proof takes ``E[σ(g_u) - σ(g_l)] = ½ E[g_u - g_l]`` (26) at *every* iterate. That is exact for the first,
where ``U`` and ``-U`` are equally likely, and an assumption from the second on. What is exact is checked
exactly; the statement itself is false (``n = 1, W = 9/10``: the gain is 5, the bound 10/11), holds on the
average of random orthogonal matrices of some size, and is provable without the ½: ``max Δ_out <= max Δ_h / (1 -
√n ‖W‖₂)``.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import HALF, ONE, halves, identity, interval_equilibrium, norm_below, rational
from proofs_checks.cases import boxes, equal_rows, matrices
from proofs_checks.search import holds, rejects
from verideq.testing.exact import ZERO, relu

RATES = (HALF, Fraction(9, 10), Fraction(99, 100), ZERO)


@st.composite
def extractors(draw: st.DrawFn) -> tuple:
    """``U`` and a box of inputs."""
    inputs = draw(st.integers(1, 3))
    return draw(matrices(draw(st.integers(1, 3)), inputs)), *draw(boxes(inputs))


def ends(U: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of ``U x``."""
    plus, minus = halves(U)
    return plus @ low + minus @ high, plus @ high + minus @ low


def first_iterate(case: tuple, symmetric: bool = True) -> bool:
    """(26) and (27): over ``U`` and ``-U`` the mean of ``relu(h_u) - relu(h_l)`` is half that of ``h_u - h_l``."""
    U, low, high = case
    total = wide = 0 * U[:, 0]
    for sign in (1, -1) if symmetric else (1,):
        bottom, top = ends(sign * U, low, high)
        total, wide = total + relu(top) - relu(bottom), wide + top - bottom
    return bool((total == wide / 2).all())


def row_sums(A: np.ndarray, factor: bool = True) -> bool:
    """(32): ``‖A‖_∞ <= √n ‖A‖₂``, through ``(A Aᵀ)_ii <= ‖A‖₂²``."""
    n = A.shape[1] if factor else 1
    return bool((abs(A).sum(1) ** 2 <= n * np.diag(A @ A.T)).all())


def series(case: tuple, half: bool = True) -> bool:
    """(33) to (38): ``d ← q d / 2 + D / 2`` from 0 stays at or below ``D / (2 - q) <= D`` for ``0 <= q <= 1``."""
    q, D = case
    d = ZERO
    for _ in range(8):
        d = q * d / 2 + D / 2
        if d > D / ((2 if half else 3) - q) or d > D:
            return False
    return True


SERIES = st.tuples(st.fractions(0, 1, max_denominator=64), st.fractions(0, 8, max_denominator=8))


@st.composite
def layers(draw: st.DrawFn) -> tuple:
    """``W`` of orthogonal rows with ``√n ‖W‖₂ = q < 1``, that ``q``, and a box of injections."""
    K, c = draw(equal_rows(4).filter(lambda pair: pair[0].shape[0] == pair[0].shape[1]))
    n, q = len(K), draw(st.sampled_from(RATES))
    # ‖K‖₂ = √c; the stored scale rounds 1/√(n c) down, so that q is an upper bound.
    scale = q * Fraction(int(Fraction(2**40) / Fraction(float(n * c) ** 0.5).limit_denominator(2**40)) - 1, 2**40)
    return K * scale, q, *draw(boxes(n))


def provable(case: tuple, denominator: int = 1) -> bool:
    """``max Δ_out <= max Δ_h / (1 - q)``."""
    W, q, low, high = case
    if q and not norm_below(W, q**2 / len(W), strict=False):
        return False
    lower, upper = interval_equilibrium(W, (low, high))
    return max(upper - lower) * (denominator - q) <= max(high - low)


def test_the_first_iterate_is_halved() -> None:
    holds(first_iterate, extractors())


def test_row_sums() -> None:
    holds(lambda case: row_sums(case[0]), extractors())


def test_the_series() -> None:
    holds(series, SERIES)


def test_what_is_provable_without_the_assumption() -> None:
    holds(provable, layers())


TWINS = {
    "(26) without symmetry": (lambda case: first_iterate(case, symmetric=False), extractors()),
    "(32) without √n": (lambda case: row_sums(case[0], factor=False), extractors()),
    "series: 3 - q": (lambda case: series(case, half=False), SERIES),
    "the printed bound, for every draw": (lambda case: provable(case, denominator=2), layers()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])


def test_the_statement_itself_is_false() -> None:
    # n = n_u = 1, W = 9/10, x in [9/10, 11/10]. Every normal U is ±|U| with equal chances, and both scale with |U|.
    W, low, high = rational([["9/10"]]), rational(["9/10"]), rational(["11/10"])
    assert bool((identity(1) >= W @ W.T).all())
    widths = []
    for U in (rational([[1]]), rational([[-1]])):
        lower, upper = interval_equilibrium(W, ends(U, low, high))
        widths.append((upper - lower)[0])
    gain = sum(widths) / 2 / (high - low)[0]
    assert gain == 5 > 1 / (2 - W[0, 0]) == Fraction(10, 11)


@pytest.mark.parametrize("inputs", [1, 4, 9, 27])
def test_the_initialisation_that_makes_the_gain_1(inputs: int) -> None:
    # n_u E|U| = n_u √(2/π) σ, squared and with π taken out.
    def gain(variance_over_pi: Fraction) -> Fraction:
        return inputs**2 * 2 * variance_over_pi

    assert gain(Fraction(1, 2 * inputs**2)) == ONE  # σ = √(π/2) / n_u
    assert gain(Fraction(1, 2 * inputs)) == inputs  # σ = √π / √(2 n_u), as it is printed


def test_it_holds_on_the_average_of_random_orthogonal_matrices() -> None:
    generator, n, inputs, rate = np.random.default_rng(0), 16, 3, 0.9
    gains = []
    for _ in range(200):
        W = np.linalg.qr(generator.normal(size=(n, n)))[0] * rate / np.sqrt(n)
        U, x = generator.normal(size=(n, inputs, 50)), generator.normal(size=(inputs, 50))
        middle, radius = (U * x).sum(1), abs(U).sum(1) * 0.5
        lower = upper = np.zeros_like(middle)
        for _ in range(60):
            below, above = np.maximum(W, 0), np.minimum(W, 0)
            lower, upper = (
                np.maximum(below @ lower + above @ upper + middle - radius, 0),
                np.maximum(below @ upper + above @ lower + middle + radius, 0),
            )
        gains.append((upper - lower).mean() / (inputs * abs(U).mean()))
    assert 0.5 < np.mean(gains) < 1 / (2 - rate)
