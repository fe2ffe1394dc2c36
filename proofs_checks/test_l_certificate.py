"""The ``L`` certificate (docs/theory.md): for a symmetric ``A``, any ``L`` and any ``c``,
``A ⪰ (c - ‖A - cI - LLᵀ‖_∞) I``. Whoever made ``L`` need not be believed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import definite, identity, symmetric
from proofs_checks.cases import MARGINS, matrices, monotone
from proofs_checks.search import holds, rejects


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """``A, L, c``: a rounded Cholesky factor of ``I - sym W``; ``LLᵀ`` plus noise or a constant; a skew ``L``."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        W, m = draw(monotone())
        A = identity(len(W)) - symmetric(W)
        c = m * draw(st.sampled_from((Fraction(9, 10), 1 - Fraction(1, 2**16))))
        try:
            factor = np.linalg.cholesky((A - c * identity(len(A))).astype(float))
        except np.linalg.LinAlgError:
            factor = np.eye(len(A))
        L = np.vectorize(lambda x: Fraction(round(x * 2**12), 2**12), otypes=[object])(factor)
        return A, L, c
    units = draw(st.integers(1, 4))
    L, c = draw(matrices(units)), draw(st.sampled_from(MARGINS)) * draw(st.sampled_from((1, -1)))
    if kind == 3:
        skew = L - L.T
        return skew @ skew + c * identity(units), skew, c
    noise = symmetric(draw(matrices(units)))
    if kind == 2:
        L, noise = L / 8, 0 * noise + draw(st.sampled_from((1, -1)))
    return L @ L.T + c * identity(units) + noise, L, c


def certified(case: tuple, absolute: bool = True, rows: bool = True, transposed: bool = True) -> bool:
    A, L, c = case
    rest = A - c * identity(len(A)) - L @ (L.T if transposed else L)
    rest = abs(rest) if absolute else rest
    loss = rest.sum(1).max() if rows else rest.max()
    return definite(A - (c - loss) * identity(len(A)), strict=False)


def test_it_bounds_the_smallest_eigenvalue() -> None:
    holds(certified, cases())


TWINS = {
    "row sums without absolute values": lambda case: certified(case, absolute=False),
    "the largest entry for the row sums": lambda case: certified(case, rows=False),
    "L L for L Lᵀ": lambda case: certified(case, transposed=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], cases())
