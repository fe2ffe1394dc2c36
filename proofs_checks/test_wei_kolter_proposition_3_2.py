"""Wei & Kolter, Proposition 3.2: for ``W`` of Theorem 3.1 the interval equilibrium encloses the equilibrium of
every ``v`` of the box of injections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import corners, interval_matrix, within
from proofs_checks.cases import balanced, boxes
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium, select

Hat = Callable[[np.ndarray], np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``W``, a box of injections, and a point of it."""
    M, e = draw(balanced(most=3))
    low, high = draw(boxes(len(M)))
    parts = draw(st.lists(st.integers(0, 7), min_size=len(M), max_size=len(M)))
    return M / np.outer(e, e), low, high, low + (high - low) * np.array(parts, dtype=object) / 7


def encloses(case: tuple, hat: Hat = interval_matrix, crossed: bool = False) -> bool:
    W, low, high, inside = case
    ends = np.concatenate([low, high] if crossed else [high, low])
    both = equilibrium(hat(W), ends)
    upper, lower = both[: len(W)], both[len(W) :]
    return all(within(lower, equilibrium(W, v), upper) for v in [*corners(low, high), inside])


def unswapped(W: np.ndarray) -> np.ndarray:
    """Twin: each end sees itself only."""
    return np.block([[W, 0 * W], [0 * W, W]])


def without_negatives(W: np.ndarray) -> np.ndarray:
    """Twin: ``W⁻`` is forgotten."""
    plus = select(W > 0, W, 0 * W)
    return np.block([[plus, 0 * W], [0 * W, plus]])


def test_the_interval_equilibrium_encloses_every_equilibrium() -> None:
    holds(encloses, cases())


TWINS = {
    "W⁻ applied to its own end": lambda case: encloses(case, unswapped),
    "W⁻ dropped": lambda case: encloses(case, without_negatives),
    "ends of v exchanged": lambda case: encloses(case, crossed=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], cases())
