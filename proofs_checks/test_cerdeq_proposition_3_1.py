"""CerDEQ, Proposition 3.1: if ``‖Ŵ‖₂ < 1``, the adjoint DEQ (equation 5, its lower bias row read as
``U⁺x_l + U⁻x_u + b``) has one fixed point, and it encloses the equilibrium of every ``x`` of the box."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import HALF, corners, equilibria, halves, interval_matrix, norm_below, within
from proofs_checks.cases import MARGINS, boxes, matrices, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """``W`` with ``‖Ŵ‖₂ < 1``, scaled down from any matrix; ``U, b`` and a box of inputs."""
    units, inputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    W = draw(matrices(units))
    scale = 1 - draw(st.sampled_from(MARGINS[:2]))
    W = W * scale / max(1, (abs(W).sum(0).max() + abs(W).sum(1).max()) * HALF)  # ‖|W|‖₂² <= ‖W‖₁ ‖W‖_∞
    return W, draw(matrices(units, inputs)), draw(vectors(units)), *draw(boxes(inputs))


def encloses(case: tuple, misprint: bool = False, absolute: bool = False) -> bool:
    W, U, b, low, high = case
    if not norm_below(interval_matrix(W), HALF * 2):
        return False
    plus, minus = halves(U)
    top = (abs(U) if absolute else plus) @ high + (0 * U if absolute else minus) @ low + b
    bottom = top if misprint else plus @ low + minus @ high + b
    both = equilibrium(interval_matrix(W), np.concatenate([top, bottom]))
    upper, lower = both[: len(W)], both[len(W) :]
    truths = [equilibria(W, U @ x + b) for x in corners(low, high)]
    return all(len(z) == 1 and within(lower, z[0], upper) for z in truths)


def test_the_adjoint_equilibrium_encloses() -> None:
    holds(encloses, cases())


TWINS = {
    "the misprint: both bias rows alike": lambda case: encloses(case, misprint=True),
    "|U| for U⁺ and U⁻": lambda case: encloses(case, absolute=True),
    "three times W": lambda case: encloses((3 * case[0], *case[1:])),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], cases())
