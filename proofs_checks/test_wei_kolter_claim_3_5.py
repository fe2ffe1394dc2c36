"""Wei & Kolter, Claim 3.5: the eigenvalues of ``[[A, B], [B, A]]`` are those of ``A + B`` and of ``A - B``.
Checked as an identity of characteristic polynomials, which counts multiplicities too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import characteristic, multiply
from proofs_checks.cases import matrices
from proofs_checks.search import holds, rejects


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    units = draw(st.integers(1, 4))
    return draw(matrices(units)), draw(matrices(units))


def claim(case: tuple, lower: Callable[[np.ndarray], np.ndarray] = lambda B: B, twice: bool = False) -> bool:
    A, B = case
    whole = characteristic(np.block([[A, B], [lower(B), A]]))
    return whole == multiply(characteristic(A + B), characteristic(A + B if twice else A - B))


def test_the_spectrum_is_that_of_the_sum_and_of_the_difference() -> None:
    holds(claim, blocks())


TWINS = {
    "Bᵀ below": lambda case: claim(case, lambda B: B.T),
    "-B below": lambda case: claim(case, lambda B: -B),
    "A + B twice": lambda case: claim(case, twice=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], blocks())
