"""Wei & Kolter, Theorem 3.1: ``I - Ŵ`` is positive definite if and only if ``W = D^-½ M D^-½`` with a diagonal
``D`` whose entries are greater than ``(|M|1 + |M|ᵀ1) / 2``. Then the layer and its interval extension have one
equilibrium.

``D = diag(e²)`` with a rational ``e``, so that nothing here rounds. What the parametrization of the package
gives is checked in test_ibp_mondeq.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import definite, equilibria, identity, interval_matrix, ones, rational, root_above, symmetric
from proofs_checks.cases import MARGINS, balanced, gauged, injections, matrices, vectors
from proofs_checks.search import holds, rejects
from verideq.testing.exact import solve_linear

Sums = Callable[[np.ndarray], np.ndarray]


def floor(M: np.ndarray) -> np.ndarray:
    """What every ``D_ii`` has to exceed."""
    return (abs(M) + abs(M).T) @ ones(len(M)) / 2


@st.composite
def forwards(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """``M``, and how much room ``D`` has, relative to its floor."""
    M = draw(matrices(draw(st.integers(1, 4))))
    return M, draw(st.sampled_from(MARGINS))


def forward(case: tuple, sums: Sums = floor) -> bool:
    """``D`` above `sums` makes ``I - Ŵ`` positive definite."""
    M, room = case
    e = np.array([root_above(max(d, room)) * (1 + room) for d in sums(M)], dtype=object)
    return definite(identity(2 * len(M)) - interval_matrix(M / np.outer(e, e)))


@st.composite
def candidates(draw: st.DrawFn) -> np.ndarray:
    """Members of the class, matrices just outside, members of the larger class of Theorem 3.3, any matrix."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(matrices(draw(st.integers(1, 4)))) / 8
    if kind == 1:
        return draw(gauged())[0]
    M, e = draw(balanced())
    return M / np.outer(e, e) * draw(st.sampled_from((1, 1 + MARGINS[3], 2, -1)))


def factored(W: np.ndarray, part: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether the proof's ``E`` gives an ``M`` and a ``D = E²`` of the theorem: rows of ``E (I - S) E`` dominant."""
    e = solve_linear(identity(len(W)) - part(abs(W)), ones(len(W)))
    if e is None or not bool((e > 0).all()):
        return False
    M = W * np.outer(e, e)
    return bool((e**2 > floor(M)).all())


def backward(W: np.ndarray, part: Callable[[np.ndarray], np.ndarray] = symmetric) -> bool:
    """``I - Ŵ`` is positive definite if and only if the factors can be made."""
    return factored(W, part) == definite(identity(2 * len(W)) - interval_matrix(W))


@st.composite
def layers(draw: st.DrawFn) -> tuple:
    M, e = draw(balanced(most=2))
    W = M / np.outer(e, e)
    return W, draw(injections(W)), draw(injections(interval_matrix(W))), draw(vectors(2 * len(W)))


def well_posed(case: tuple) -> bool:
    """One equilibrium of the layer, one of the interval extension; the ends need not even be ordered."""
    W, v, ends, other = case
    hat = interval_matrix(W)
    return len(equilibria(W, v)) == len(equilibria(hat, ends)) == len(equilibria(hat, other)) == 1


def without_room(case: tuple) -> bool:
    """Twin: the same layer with ``D`` at a quarter of its floor."""
    W, v, ends, other = case
    return well_posed((4 * W, v, ends, other))


def test_forward() -> None:
    holds(forward, forwards())


def test_D_at_its_floor_is_not_enough() -> None:
    M = rational([[0, 4], [4, 0]])
    e = rational([2, 2])
    assert bool((e**2 == floor(M)).all()) and not definite(identity(4) - interval_matrix(M / np.outer(e, e)))


def test_backward() -> None:
    holds(backward, candidates())


def test_both_equilibria_are_unique() -> None:
    holds(well_posed, layers())


TWINS = {
    "forward: rows only": (lambda case: forward(case, lambda M: abs(M) @ ones(len(M))), forwards()),
    "forward: columns only": (lambda case: forward(case, lambda M: abs(M).T @ ones(len(M))), forwards()),
    "forward: M for |M|": (lambda case: forward(case, lambda M: (M + M.T) @ ones(len(M)) / 2), forwards()),
    "backward: |W| without its transpose": (lambda W: backward(W, lambda S: S), candidates()),
    "unique: D a quarter of its floor": (without_room, layers()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])
