"""Wei & Kolter, Proposition 2.1 (Winston & Kolter, 2020): if ``I - W`` is positive definite, which says that the
symmetric part is, then ``z = relu(W z + v)`` has one solution, for every ``v``."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import HALF, characteristic, definite, equilibria, evaluate, identity, rational, roots_above
from proofs_checks.cases import MARGINS, injections, matrices
from proofs_checks.search import holds, rejects


@st.composite
def factors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Fraction, np.ndarray]:
    """``A, B, m`` of ``W = (1-m) I - AᵀA + B - Bᵀ``, and a ``v``, often with ties at the equilibrium."""
    units = draw(st.integers(1, 4))
    A, B, m = draw(matrices(units)), draw(matrices(units)), draw(st.sampled_from(MARGINS))
    return A, B, m, draw(injections((1 - m) * identity(units) - A.T @ A + B - B.T))


def one_solution(case: tuple, sign: int = 1, transposed: bool = True) -> bool:
    """The equilibrium is unique; `sign` and `transposed` belong to the twins."""
    A, B, m, v = case
    W = (1 - m) * identity(len(v)) - (A.T if transposed else A) @ A + B - sign * B.T
    return len(equilibria(W, v)) == 1


def definite_and_one_solution(case: tuple) -> bool:
    """The statement, with its hypothesis checked for the parametrization."""
    A, B, m, v = case
    W = (1 - m) * identity(len(v)) - A.T @ A + B - B.T
    return definite(identity(len(v)) - W - m * identity(len(v)), strict=False) and one_solution(case)


def by_eigenvalues(case: tuple) -> bool:
    """Twin: no real eigenvalue of ``W`` from 1/2 on, in place of its symmetric part below 1."""
    A, B, _, v = case
    p = characteristic(A - B)
    below = evaluate(p, HALF) != 0 and roots_above(p, HALF) == 0
    return not below or len(equilibria(A - B, v)) == 1


def test_a_positive_definite_layer_has_one_equilibrium() -> None:
    holds(definite_and_one_solution, factors())


TWINS = {
    "A A for AᵀA": lambda case: one_solution(case, transposed=False),
    "B + Bᵀ for B - Bᵀ": lambda case: one_solution(case, sign=-1),
    "eigenvalues of W itself": by_eigenvalues,
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], factors())


def test_eigenvalues_below_1_are_not_enough() -> None:
    W, v = rational([[2, -10], [1, -3]]), rational([-1, -1])
    p = characteristic(W)
    assert evaluate(p, HALF) != 0 and roots_above(p, HALF) == 0
    assert len(equilibria(W, v)) == 2 and not definite(identity(2) - W)
