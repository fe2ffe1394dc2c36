"""Wei & Kolter, Proposition 3.7: a feed-forward ReLU network ``relu(A_L ... relu(A_1 x))`` is one equilibrium
layer of the class of Theorem 3.3, and its output the last block of the equilibrium. The proof's ``Γ, D, M`` are
checked too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import definite, diagonal, gauge_of, identity, ones, root_above
from proofs_checks.cases import matrices, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium, is_equilibrium, relu, zeros


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[np.ndarray], np.ndarray]:
    """``A_1`` (h, d), ``A_2 ... A_L`` (h, h), and an input."""
    layers, h, d = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return [draw(matrices(h, d))] + [draw(matrices(h)) for _ in range(layers - 1)], draw(vectors(d))


def stacked(A: list[np.ndarray]) -> np.ndarray:
    """``A_i`` in block row i, block column i - 1."""
    h = len(A[0])
    W = zeros(h * len(A), h * len(A))
    for i in range(1, len(A)):
        W[i * h : (i + 1) * h, (i - 1) * h : i * h] = A[i]
    return W


def explicit(A: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """Every hidden layer."""
    values = [relu(A[0] @ x)]
    for matrix in A[1:]:
        values.append(relu(matrix @ values[-1]))
    return values


def same_output(case: tuple, transposed: bool = False, last: int = -1) -> bool:
    """The equilibrium is the hidden layers one after the other, and unique: ``|W|`` is nilpotent."""
    A, x = case
    h = len(A[0])
    v = zeros(h * len(A))
    v[:h] = A[0] @ x
    W = stacked(A)
    z = equilibrium(W.T if transposed else W, v)
    truth = explicit(A, x)
    blocks = [z[i * h : (i + 1) * h] for i in range(len(A))]
    same = bool((blocks[last] == truth[-1]).all())
    return same and is_equilibrium(W, v, np.concatenate(truth)) and gauge_of(W) is not None


def in_the_class(case: tuple, misprint: bool = False, transposed: bool = True) -> bool:
    """``D = diag(β)``, ``Γ = diag(γ)`` by block as in the proof give ``W = M``, and ``Λ = Γ⁻²`` is definite.

    The recursion is ``γ_i = γ_{i-1} √(β_i β_{i-1})``; the proof prints ``β_{i-1}⁻¹`` for ``β_{i-1}^-½``.
    """
    A, _ = case
    h, M = len(A[0]), stacked(A)
    floor = (abs(M) + (abs(M).T if transposed else 0)) @ ones(len(M)) / 2
    root = [root_above(max(floor[i * h : (i + 1) * h])) for i in range(len(A))]
    gamma = [root[0] / root[0]]
    for i in range(1, len(A)):
        gamma.append(gamma[-1] * root[i] * root[i - 1] ** (2 if misprint else 1))
    e, g = np.repeat(np.array(root, dtype=object), h), np.repeat(np.array(gamma, dtype=object), h)
    W = M / np.outer(e, e) * g[:, None] / g
    enough = bool((e**2 > (abs(M) + abs(M).T) @ ones(len(M)) / 2).all())
    return enough and bool((W == M).all()) and definite(diagonal(g**-2) @ (identity(len(W)) - abs(W)))


def test_the_equilibrium_is_the_network() -> None:
    holds(same_output, networks())


def test_it_is_in_the_class() -> None:
    holds(in_the_class, networks())


TWINS = {
    "blocks above the diagonal": lambda case: same_output(case, transposed=True),
    "the first block as output": lambda case: same_output(case, last=0),
    "the misprint β_{i-1}⁻¹": lambda case: in_the_class(case, misprint=True),
    "β without the next layer's columns": lambda case: in_the_class(case, transposed=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], networks())
