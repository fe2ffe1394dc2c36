"""Wei & Kolter, Lemma 3.4: the eigenvalues of the symmetric part of ``Ŵ = [[W⁺, W⁻], [W⁻, W⁺]]`` are those of the
symmetric parts of ``W`` and of ``|W|``; and ``I - Ŵ`` is positive definite if and only if ``I - |W|`` is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import characteristic, definite, identity, interval_matrix, multiply, symmetric
from proofs_checks.cases import MARGINS, balanced, gauged, matrices, monotone
from proofs_checks.search import holds, rejects


@st.composite
def systems(draw: st.DrawFn) -> np.ndarray:
    """Any ``W``, or one on either side of the boundary of the class of Theorem 3.1."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(matrices(draw(st.integers(1, 4))))
    if kind == 1:
        return draw(gauged())[0]
    if kind == 2:
        return draw(monotone())[0]
    M, e = draw(balanced())
    return M / np.outer(e, e) * (1 + draw(st.sampled_from((0, *MARGINS))))


def spectrum(W: np.ndarray, absolute: bool = True, whole: bool = False) -> bool:
    """The statement on eigenvalues, as an identity of characteristic polynomials."""
    hat = interval_matrix(W) if not whole else np.block([[W, 0 * W], [0 * W, W]])
    second = abs(W) if absolute else W
    return characteristic(symmetric(hat)) == multiply(characteristic(symmetric(W)), characteristic(symmetric(second)))


def equivalence(W: np.ndarray, absolute: bool = True) -> bool:
    """Equation (3.8); and that ``I - |W|`` positive definite makes ``I - W`` so."""
    hat, smaller = identity(2 * len(W)) - interval_matrix(W), identity(len(W)) - (abs(W) if absolute else W)
    return definite(hat) == definite(smaller) and (not definite(smaller) or definite(identity(len(W)) - W))


def test_the_spectrum() -> None:
    holds(spectrum, systems())


def test_the_equivalence() -> None:
    holds(equivalence, systems())


TWINS = {
    "spectrum: W for |W|": lambda W: spectrum(W, absolute=False),
    "spectrum: W for Ŵ": lambda W: spectrum(W, whole=True),
    "equivalence: W for |W|": lambda W: equivalence(W, absolute=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], systems())
