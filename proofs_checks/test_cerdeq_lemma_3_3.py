"""CerDEQ, Lemma 3.3 (Björck & Bowie, 1971): from ``A_0 = Wᵀ`` with ``‖I - WWᵀ‖₂ < 1`` the iteration

    A ← 15/8 A - 5/4 A(AᵀA) + 3/8 A(AᵀA)²

converges to the nearest matrix with orthonormal columns. In exact arithmetic: one step takes ``t = ‖I - AᵀA‖₂ <
1`` to at most ``t³``, and keeps the singular vectors; the nearest matrix is the polar factor.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import ONE, definite, diagonal, identity
from proofs_checks.cases import matrices, orthogonal
from proofs_checks.search import holds, rejects

Coefficients = tuple[Fraction, Fraction, Fraction]
BJORCK = (Fraction(15, 8), Fraction(-5, 4), Fraction(3, 8))


def step(A: np.ndarray, coefficients: Coefficients = BJORCK) -> np.ndarray:
    square = A.T @ A
    first, second, third = coefficients
    return first * A + second * A @ square + third * A @ square @ square


def bounded(E: np.ndarray, t: Fraction) -> bool:
    """``‖E‖₂ <= t`` of a symmetric matrix."""
    return definite(t * identity(len(E)) - E, strict=False) and definite(t * identity(len(E)) + E, strict=False)


@st.composite
def starts(draw: st.DrawFn) -> np.ndarray:
    """``Wᵀ`` (n, m), m <= n, with ``‖I - WWᵀ‖₂ < 1``: singular values from near 0 up to near ``√2``."""
    m = draw(st.integers(1, 3))
    n = draw(st.integers(m, 4))
    values = draw(st.lists(st.sampled_from(SIGMA), min_size=m, max_size=m))
    left, right = draw(orthogonal(n)), draw(orthogonal(m))
    if draw(st.booleans()):
        return left[:, :m] @ diagonal(np.array(values, dtype=object)) @ right
    A = draw(matrices(n, m)) / 16 + left[:, :m]
    total = (A**2).sum()
    return A if total < 2 else A / (total + 1)


SIGMA = tuple(Fraction(s) for s in ("1", "0.5", "1.414", "0.001", "1.2", "0.9", "1.0000001", "0.25"))


def cubes(A: np.ndarray, coefficients: Coefficients = BJORCK, square: Callable = lambda A: A.T @ A) -> bool:
    """``t³`` after one step, for several bounds ``t`` of the residual, as tight as a power of 31/32 gets."""
    E, after = identity(A.shape[1]) - A.T @ A, step(A, coefficients)
    t = ONE
    while bounded(E, t * Fraction(31, 32)) and t > Fraction(1, 1000):
        t *= Fraction(31, 32)
    return not bounded(E, t) or bounded(identity(A.shape[1]) - square(after), t**3)


@st.composite
def decompositions(draw: st.DrawFn) -> tuple:
    """``Q₁, Σ, Q₂`` of ``Wᵀ``, and another matrix with orthonormal columns."""
    m = draw(st.integers(1, 3))
    n = draw(st.integers(m, 4))
    values = draw(st.lists(st.sampled_from(SIGMA), min_size=m, max_size=m))
    return draw(orthogonal(n))[:, :m], np.array(values, dtype=object), draw(orthogonal(m)), draw(orthogonal(n))[:, :m]


def nearest(case: tuple, coefficients: Coefficients = BJORCK, reverse: bool = False) -> bool:
    """The polar factor ``P = Q₁Q₂`` is the nearest, and ``‖P - A_k‖`` shrinks: ``p(σ)`` is nearer to 1 than ``σ``."""
    left, values, right, other = case
    A, P = left @ diagonal(values) @ right, left @ (right.T if reverse else right)
    if ((other - A) ** 2).sum() < ((P - A) ** 2).sum():
        return False
    first, second, third = coefficients
    expected = values * first + values**3 * second + values**5 * third
    after = step(A, coefficients)
    shrinks = all((1 - b**2) ** 2 <= (1 - a**2) ** 2 and b > 0 for a, b in zip(values, expected, strict=True))
    return bool((after == left @ diagonal(expected) @ right).all()) and shrinks


@st.composite
def unscaled(draw: st.DrawFn) -> np.ndarray:
    return draw(matrices(draw(st.integers(1, 4)), draw(st.integers(1, 4))))


def scaling(W: np.ndarray, both: bool = True) -> bool:
    """``σ_max <= √(mn) max|W|``."""
    m, n = W.shape
    square = (m * n if both else max(m, n)) * abs(W).max() ** 2
    return definite(square * identity(n) - W.T @ W, strict=False)


def test_one_step_cubes_the_residual() -> None:
    holds(cubes, starts())


def test_the_limit_is_the_nearest() -> None:
    holds(nearest, decompositions())


def test_the_scaling_before_it() -> None:
    holds(scaling, unscaled())


TWINS = {
    "cubes: + 5/4": (lambda A: cubes(A, (BJORCK[0], -BJORCK[1], BJORCK[2])), starts()),
    "cubes: order 1": (lambda A: cubes(A, (Fraction(3, 2), Fraction(-1, 2), 0 * ONE)), starts()),
    "nearest: - 3/8": (lambda case: nearest(case, (BJORCK[0], BJORCK[1], -BJORCK[2])), decompositions()),
    "nearest: Q₁Q₂ᵀ": (lambda case: nearest(case, reverse=True), decompositions()),
    "scaling: √max(m,n)": (lambda W: scaling(W, both=False), unscaled()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])


@pytest.mark.parametrize("shape", [(64, 576), (128, 1152)])
def test_five_steps_from_the_papers_scaling_are_far_from_orthonormal(shape: tuple[int, int]) -> None:
    A = np.random.default_rng(0).normal(size=shape).T
    A = A / (np.sqrt(A.size) * abs(A).max())
    for _ in range(5):
        square = A.T @ A
        A = 15 / 8 * A - 5 / 4 * A @ square + 3 / 8 * A @ square @ square
    values = np.linalg.svd(A, compute_uv=False)
    assert values[-1] > 0.2 and values[0] < 0.8
