"""CerDEQ, Proposition 3.4: ``O Oᵀ = I`` with m rows and n >= m columns gives ``1 <= ‖Ô‖₂ <= √m <= √n``; and
when the upper bound is attained: for a square ``O`` exactly if ``√n O`` is a Hadamard matrix. Hence ``O / √n``
alone leaves a layer without contraction, and the channel scale has to stay below 1.

Irrational rows are avoided by ``K = √c O``, ``K Kᵀ = c I``.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import gauge_of, identity, interval_matrix, norm_below
from proofs_checks.cases import HADAMARD, equal_rows, orthogonal
from proofs_checks.search import holds, rejects

Case = tuple[np.ndarray, Fraction]


@st.composite
def padded(draw: st.DrawFn) -> Case:
    """Orthonormal rows, the columns often more than the rows."""
    K, c = draw(equal_rows())
    if draw(st.booleans()):
        K = np.concatenate([K, 0 * K[:, : draw(st.integers(0, 2))]], axis=1)
    return K, c


def bounds(case: Case, most: Callable[[int, int], Fraction] = lambda m, n: Fraction(m), strict: bool = False) -> bool:
    K, c = case
    hat, (m, n) = interval_matrix(K), K.shape
    orthonormal = bool((c * identity(m) == K @ K.T).all()) and m <= n
    return orthonormal and norm_below(hat, c * most(m, n), strict) and not norm_below(hat, c)


@st.composite
def squares(draw: st.DrawFn) -> Case:
    """Square; every other time Hadamard, its rows permuted and signed."""
    if draw(st.booleans()):
        H = draw(st.sampled_from(HADAMARD))
        return H[list(draw(st.permutations(range(len(H)))))] * draw(st.sampled_from((1, -1, 3))), Fraction(len(H))
    size = draw(st.integers(1, 4))
    return draw(orthogonal(size)), Fraction(1)


def hadamard(K: np.ndarray) -> bool:
    """Whether all entries have one absolute value."""
    return bool((abs(K) == abs(K[0, 0])).all())


def equality(case: Case, test: Callable[[np.ndarray], bool] = hadamard) -> bool:
    K, _ = case
    c = (K @ K.T)[0, 0]
    attained = not norm_below(abs(K), c * len(K))
    return attained == test(K)


def scaled(case: Case, channel: Fraction = 1 - Fraction(1, 2**20)) -> bool:
    """With a channel scale below 1 by a margin ``O / √n`` has a contraction: ``‖|W|‖₂ < 1``, and so ``ρ(|W|) < 1``."""
    K, c = case
    return norm_below(channel * abs(K), c * K.shape[1])


def test_bounds() -> None:
    holds(bounds, padded())


def test_equality_is_hadamard() -> None:
    holds(equality, squares())


def test_a_channel_scale_below_1_is_enough() -> None:
    holds(scaled, padded())


def test_the_scaled_hadamard_matrix_has_no_gauge() -> None:
    for W in (HADAMARD[1] / 2, HADAMARD[2] / 4):  # O / √n with O = H / √n
        assert gauge_of(W) is None and gauge_of(W * Fraction(99, 100)) is not None


TWINS = {
    "at most 1: ‖O‖ for ‖|O|‖": (lambda case: bounds(case, lambda m, n: Fraction(1)), padded()),
    "strictly less than √m": (lambda case: bounds(case, strict=True), padded()),
    "equality for every full matrix": (lambda case: equality(case, lambda K: bool((K != 0).all())), squares()),
    "a channel scale of 1": (lambda case: scaled(case, Fraction(1)), padded()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])
