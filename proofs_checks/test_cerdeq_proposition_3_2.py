"""CerDEQ, Proposition 3.2, as its proof means it: ``‖Ŵ‖₂ = max(‖W‖₂, ‖|W|‖₂)``, which is ``‖|W|‖₂``. The
statement prints ``max(‖W‖₂, ‖Wᵀ‖₂)``, which is ``‖W‖₂`` and false."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import characteristic, interval_matrix, multiply, norm_below
from proofs_checks.cases import equal_rows, matrices
from proofs_checks.search import holds, rejects


@st.composite
def systems(draw: st.DrawFn) -> np.ndarray:
    """Any square matrix, or one with orthogonal rows."""
    if draw(st.booleans()):
        return draw(matrices(draw(st.integers(1, 3))))
    K, _ = draw(equal_rows(3))
    return K if K.shape[0] == K.shape[1] else K.T @ K


def singular_values(W: np.ndarray, absolute: bool = True) -> bool:
    """``Ŵ`` has the singular values of ``W`` and those of ``|W|``: an identity of characteristic polynomials."""
    hat, second = interval_matrix(W), abs(W) if absolute else W
    return characteristic(hat.T @ hat) == multiply(characteristic(W.T @ W), characteristic(second.T @ second))


def norm(W: np.ndarray, printed: bool = False) -> bool:
    """What bounds ``‖|W|‖₂`` bounds ``‖Ŵ‖₂`` and ``‖W‖₂``, and nothing less does: compared at either side of it."""
    scale = max(abs(W).max(), Fraction(1, 2**40))
    top = Fraction(float(np.linalg.norm((abs(W) / scale).astype(float), 2))) ** 2 * scale**2
    for square in (top * (1 + Fraction(1, 2**30)) + Fraction(1, 2**80), top * (1 - Fraction(1, 2**30))):
        right = norm_below(W, square) and (norm_below(W.T, square) if printed else norm_below(abs(W), square))
        if norm_below(interval_matrix(W), square) != right:
            return False
        if norm_below(abs(W), square) and not norm_below(W, square):
            return False
    return True


def test_singular_values() -> None:
    holds(singular_values, systems())


def test_norm() -> None:
    holds(norm, systems())


TWINS = {
    "singular values: W twice": lambda W: singular_values(W, absolute=False),
    "norm: the misprint max(‖W‖₂, ‖Wᵀ‖₂)": lambda W: norm(W, printed=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], systems())
