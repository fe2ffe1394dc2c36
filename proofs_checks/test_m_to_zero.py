"""``m → 0`` (docs/theory.md): Theorem 3.1 speaks of the formula, and float32 weights are the formula rounded.
With ``m = 1e-9`` about half of the stored matrices of a symmetric ``|M|``, for which ``ρ(|W|) = 1 - m``, have
``ρ(|W|) >= 1``; from ``m = 2⁻¹⁸`` on rounding does not reach 1 for a few units. Decided exactly for the stored
numbers: of the formula in NumPy's float32, whose roots are rounded correctly, and of the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from proofs_checks.algebra import gauge_of, rational
from proofs_checks.cases import matrices
from proofs_checks.search import holds, rejects
from verideq.parametrizations import IBPMonDEQ
from verideq.testing.exact import exact


@st.composite
def free(draw: st.DrawFn) -> np.ndarray:
    """A free float32 ``M``, symmetric every other time."""
    M = draw(matrices(draw(st.integers(2, 5)))).astype(np.float32) / np.float32(3)
    return M + M.T if draw(st.booleans()) else M


def formula(M: np.ndarray, m: float) -> np.ndarray:
    """``D^-½ M D^-½`` in float32."""
    sums = (abs(M).sum(0) + abs(M).sum(1)) / np.float32(2 * (1 - m))
    root = np.sqrt(np.where(sums > 0, sums, np.float32(1)))
    return M / root[:, None] / root


def has_gauge(M: np.ndarray, m: float) -> bool:
    """The formula's stored weights have one, and the package's."""
    stored = exact(IBPMonDEQ(m)(torch.tensor(M)))
    return gauge_of(rational(formula(M, m).tolist())) is not None and gauge_of(stored) is not None


@pytest.mark.parametrize("m", [2.0**-18, 1e-3, 0.1, 0.99])
def test_it_survives_rounding(m: float) -> None:
    holds(lambda M: has_gauge(M, m), free())


def test_broken_twin() -> None:
    rejects(lambda M: has_gauge(M, 1e-9), free())


def test_about_half_of_the_draws_break_at_m_near_zero() -> None:
    draws = np.random.default_rng(0).normal(size=(200, 8, 8)).astype(np.float32)
    broken = sum(gauge_of(rational(formula(M + M.T, 1e-9).tolist())) is None for M in draws)
    assert 50 < broken < 150
