"""Wei & Kolter, Example 3.6: ``W = [[0, 1.9], [.05, 0]]`` is in the class of Theorem 3.1 with ``D = I`` and has
the spectral norm 1.9. Its family ``[[0, a], [b, 0]]``, ``|a| + |b| < 2``, and how far the norm can go: ``‖|W|‖₂
<= 2(1-m)`` where ``1-m`` is the largest eigenvalue of the symmetric part of ``|W|``."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import definite, identity, interval_matrix, norm_below, ones, rational
from proofs_checks.cases import balanced
from proofs_checks.search import holds, rejects

PAIR = st.tuples(*[st.fractions(-1, 1, max_denominator=2**20)] * 2, st.sampled_from((1, 2, 2 - Fraction(1, 2**20))))


def test_the_example() -> None:
    W = rational([[0, "1.9"], ["0.05", 0]])
    assert bool(((abs(W) + abs(W).T) @ ones(2) / 2 < 1).all())
    assert definite(identity(4) - interval_matrix(W))
    assert norm_below(W, Fraction("1.9") ** 2, strict=False) and not norm_below(W, Fraction("1.9") ** 2)


def family(case: tuple, reach: Fraction = Fraction(2)) -> bool:
    """``|a| + |b| < 2`` puts it into the class, and its norm is the greater of the two."""
    a, b, scale = case
    a, b = a * scale, b * scale
    W, top = rational([[0, a], [b, 0]]), max(abs(a), abs(b))
    inside = definite(identity(4) - interval_matrix(W)) == (abs(a) + abs(b) < reach)
    return inside and norm_below(W, top**2, strict=False) and not (top and norm_below(W, top**2))


@st.composite
def members(draw: st.DrawFn) -> np.ndarray:
    """Of the class of Theorem 3.1, scaled to be close to its boundary, often lopsided."""
    M, e = draw(balanced())
    return M / np.outer(e, e)


def norm_at_most(W: np.ndarray, factor: Fraction = Fraction(2), absolute: bool = True) -> bool:
    """``λ_max(sym|W|) < 1`` gives ``‖|W|‖₂ < 2``, and so does every scaled bound in place of 1."""
    for bound in (Fraction(1), Fraction(1, 2), Fraction(3, 4)):
        below = definite(bound * identity(len(W)) - (abs(W) if absolute else W))
        if below and not norm_below(abs(W), (factor * bound) ** 2, strict=False):
            return False
    return True


def test_its_family() -> None:
    holds(family, PAIR)


def test_the_norm_is_below_2_minus_2m() -> None:
    holds(norm_at_most, members())


TWINS = {
    "the norm is at most 1": (lambda W: norm_at_most(W, Fraction(1)), members()),
    "W for |W|": (lambda W: norm_at_most(10 * W, absolute=False), members()),
    "|a| + |b| < 1": (lambda case: family(case, Fraction(1)), PAIR),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])
