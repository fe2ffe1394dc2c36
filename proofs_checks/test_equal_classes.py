"""Four descriptions of one set of matrices (docs/theory.md): (a) ``Λ - Λ|W|`` is positive definite for some
diagonal ``Λ > 0``, (b) ``ρ(|W|) < 1``, (c) ``W = diag(u) N diag(u)⁻¹`` with all rows of ``|N|`` summing to less
than 1, (d) some ``u > 0`` has ``u - |W| u > 0``. Each is decided on its own, and where it holds its witness is
built."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import definite, diagonal, gauge_of, identity, ones, radius_below_one
from proofs_checks.cases import balanced, gauged, matrices, scales
from proofs_checks.search import holds, rejects


@st.composite
def systems(draw: st.DrawFn) -> np.ndarray:
    """Inside, outside, and at a distance of 2⁻²⁰ of the boundary on either side."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(matrices(draw(st.integers(1, 4)))) / draw(st.sampled_from((1, 4)))
    if kind == 1:
        M, e = draw(balanced())
        g = draw(scales(len(M), 4))
        return M / np.outer(e, e) * g[:, None] / g
    W, _ = draw(gauged())
    return W * draw(st.sampled_from((1, 1, 1 + Fraction(1, 2**19), Fraction(3, 2), -1)))


def by_gauge(W: np.ndarray) -> bool:
    """(d), by ``u = (I - |W|)⁻¹ 1``: if any gauge exists, the Neumann series converges and this one is positive."""
    u = gauge_of(W)
    return u is not None and bool((u - abs(W) @ u > 0).all())


def by_rows(W: np.ndarray) -> bool:
    """(c), with the ``u`` of (d)."""
    u = gauge_of(W)
    return u is not None and bool(((abs(W / u[:, None] * u) @ ones(len(W))) < 1).all())


def by_definiteness(W: np.ndarray, adjoint: bool = True, power: int = 1) -> bool:
    """(a), with ``Λ = y / u`` from ``(I - |W|) u = 1`` and ``(I - |W|)ᵀ y = 1``."""
    u, y = gauge_of(W), gauge_of(W.T if adjoint else W)
    if u is None or y is None:
        return False
    return definite(diagonal((y / u) ** power) @ (identity(len(W)) - abs(W)))


def necessary(W: np.ndarray) -> bool:
    """Any ``Λ`` of (a) makes ``ρ(|W|) < 1``: tried with several, found or not."""
    tried = [ones(len(W)), 1 / (abs(W) @ ones(len(W)) + 1), abs(W).T @ ones(len(W)) + 1]
    u, y = gauge_of(W), gauge_of(W.T)
    if u is not None and y is not None:
        tried.append(y / u)
    return radius_below_one(W) or not any(definite(diagonal(Λ) @ (identity(len(W)) - abs(W))) for Λ in tried)


def equal(W: np.ndarray, **options: object) -> bool:
    verdict = radius_below_one(W)
    rest = (by_gauge(W), by_rows(W), by_definiteness(W, **options))
    return all(other == verdict for other in rest) and necessary(W)


def signed(W: np.ndarray) -> bool:
    """Twin: ``W`` for ``|W|`` in (b), through the inverse of ``I - W``."""
    return gauge_of(W) is not None or not definite(identity(len(W)) - W)


def test_the_four_agree() -> None:
    holds(equal, systems())


TWINS = {
    "Λ without the transpose": lambda W: equal(W, adjoint=False),
    "Λ = u / y": lambda W: equal(W, power=-1),
    "W for |W|": signed,
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], systems())
