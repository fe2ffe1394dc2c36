"""Wei & Kolter, Lemma A.1: where ``Λ - ΛW`` is positive definite, ``z ← relu((I - αΛ) z + αΛ(Wz + v))``
converges to the equilibrium for some ``0 < α <= 1``. With ``B = Λ(I - W)``, ``sym B ⪰ μI``, ``‖B‖₂ <= L`` and
``α <= μ / L²`` every step takes the squared distance to at most ``1 - αμ`` times what it was."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import ONE, definite, diagonal, identity, symmetric
from proofs_checks.cases import injections, monotone, scales, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium, relu


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """``W`` similar to a MonDEQ's, so that ``Λ = Γ⁻²`` makes ``Λ - ΛW`` definite; ``v`` with ties; a start."""
    inner, _ = draw(monotone(most=3))
    g = draw(scales(len(inner), 3))
    W = inner * g[:, None] / g
    return W, 1 / g**2, draw(injections(W)), draw(vectors(len(W), 0))


def strength(B: np.ndarray) -> Fraction:
    """A rational ``μ > 0`` with ``sym B ⪰ μI``."""
    mu = ONE
    while not definite(symmetric(B) - mu * identity(len(B)), strict=False):
        mu /= 2
    return mu


def converges(case: tuple, step: Fraction | None = None, order: str = "Λ", sign: int = 1) -> bool:
    W, Λ, v, z = case
    B = diagonal(Λ) @ (identity(len(W)) - W)
    mu = strength(B)
    alpha = min(ONE, mu / (B**2).sum()) if step is None else step  # ‖B‖₂ is at most the Frobenius norm
    truth = equilibrium(W, v)
    outer = Λ if order == "Λ" else ONE

    def F(z: np.ndarray) -> np.ndarray:
        return relu((1 - alpha * outer) * z + sign * alpha * Λ * (W @ z + v))

    if bool((F(truth) != truth).any()):
        return False
    for _ in range(3):
        after = F(z)
        if ((after - truth) ** 2).sum() > (1 - alpha * mu) * ((z - truth) ** 2).sum():
            return False
        z = after
    return True


def test_the_damped_iteration_converges() -> None:
    holds(converges, cases())


TWINS = {
    "α = 1 always": lambda case: converges(case, step=ONE),
    "(1 - α) z for (I - αΛ) z": lambda case: converges(case, order="I"),
    "wrong sign of the step": lambda case: converges(case, sign=-1),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], cases())
