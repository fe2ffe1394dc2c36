"""``‖ẑ - F(ẑ)‖₂ / m`` bounds no error of a MonDEQ (docs/theory.md): ``W = [[0, 10], [-10, 0]]``, ``m = 1``, ``v
= (1, -100)``, ``ẑ = (2, 1/10)`` is off by ten times of it. So is every larger rotation: there is no constant."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import definite, identity, rational
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium, relu

ROTATIONS = st.tuples(
    st.fractions(2, 2**20, max_denominator=2**10), st.fractions(0, 1, max_denominator=2**10).filter(bool)
)


def parts(k: Fraction, share: Fraction, skew: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``W, v, ẑ`` of the family: ``ẑ_2 = share / k`` lifts the first unit by ``share`` and shows only as ``ẑ_2``."""
    W = rational([[0, k], [skew * k, 0]])
    return W, rational([1, -(k**2)]), rational([1 + share, share / k])


def off(case: tuple, factor: Fraction = Fraction(1), skew: int = -1) -> bool:
    """``m = 1`` for every ``k``; the equilibrium is ``(1, 0)``; the error is at least ``k`` times the residual."""
    k, share = case
    W, v, guess = parts(k, share, skew)
    if not definite(identity(2) - W) or [*equilibrium(W, v)] != [1, 0]:
        return False
    residual, error = guess - relu(W @ guess + v), guess - rational([1, 0])
    return (error**2).sum() >= (factor * k) ** 2 * (residual**2).sum() > 0


def test_the_family() -> None:
    holds(off, ROTATIONS)


TWINS = {
    "off by 2k": lambda case: off(case, Fraction(2)),
    "off by less than the residual": lambda case: not off(case),
    "B + Bᵀ for B - Bᵀ": lambda case: off(case, skew=1),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], ROTATIONS)


def test_the_example() -> None:
    W, v, guess = rational([[0, 10], [-10, 0]]), rational([1, -100]), rational([2, "1/10"])
    residual, error = guess - relu(W @ guess + v), guess - equilibrium(W, v)
    assert [*equilibrium(W, v)] == [1, 0] and [*residual] == [0, Fraction(1, 10)]
    assert (error**2).sum() > 100 * (residual**2).sum()
