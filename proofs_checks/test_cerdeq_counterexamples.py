"""Where CerDEQ's bound ``‖|W|‖₂ <= 1`` is not strict, and where it is not there. Linear: ``W = [[1, 1], [1,
-1]] / 2`` has, for ``v = 10 ± ε``, an interval fixed point for *every* ``ε >= 0`` that does not shrink to the
equilibrium with it. Convolution: ``‖|W|‖₂`` of the operator may be ``k`` times that of the reshaped kernel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from proofs_checks.algebra import (
    equilibria,
    gauge_of,
    identity,
    interval_map,
    interval_matrix,
    norm_below,
    ones,
    radius_below_one,
    rational,
)
from proofs_checks.cases import matrices
from proofs_checks.search import holds, rejects
from verideq.equilibrium import Convolution
from verideq.testing.exact import convolution_matrix, exact, matrix, relu

HADAMARD = rational([[1, 1], [1, -1]]) / 2
RADII = st.fractions(0, 40, max_denominator=2**30)


def fixed_point(eps: Fraction, scale: Fraction = Fraction(1), second: int = 1) -> bool:
    """``([(20 - 2ε)⁺, 60 + 6ε], [0, 40 + 4ε])`` is one; ``z* = (40, 20)`` is the only equilibrium for ``v = 10``."""
    v = 10 * ones(2)
    lower, upper = relu(np.array([20 - 2 * eps, 0 * eps])), np.array([60 + 6 * eps, 40 + second * 4 * eps])
    below, above = interval_map(scale * HADAMARD, lower, upper, (v - eps, v + eps))
    unique = [tuple(z) for z in equilibria(scale * HADAMARD, v)] == [(40, 20)]
    return bool((below == lower).all() and (above == upper).all()) and unique


def no_gauge(case: np.ndarray) -> bool:
    """A nonnegative matrix with all row and column sums 1 has ``‖|W|‖₂ = ρ(|W|) = 1``: no gauge, not strict."""
    return norm_below(case, Fraction(1), strict=False) and not norm_below(case, Fraction(1)) and gauge_of(case) is None


@st.composite
def doubly_stochastic(draw: st.DrawFn) -> np.ndarray:
    """A mean of permutations; ``|H| / n`` of a Hadamard matrix is one."""
    size = draw(st.integers(1, 4))
    drawn = [identity(size)[list(draw(st.permutations(range(size))))] for _ in range(draw(st.integers(1, 4)))]
    return sum(drawn[1:], start=drawn[0]) / len(drawn)


@st.composite
def kernels(draw: st.DrawFn) -> np.ndarray:
    """(1, 1, 3, 3) or (2, 2, 3, 3): orthogonal rows of one norm, as integers."""
    base = draw(matrices(1, 9))[0]
    if draw(st.integers(0, 4)):
        return base.reshape(1, 1, 3, 3)
    return np.array([np.concatenate([base, base]), np.concatenate([base, -base])]).reshape(2, 2, 3, 3)


def convolved(kernel: np.ndarray, taps: bool = True) -> bool:
    """``‖|W|‖₂ <= k √m ‖row‖`` for circular padding on 3×3, ``k²`` the taps: CerDEQ divides by ``k √m = √n``."""
    m = len(kernel)
    square = (kernel[0] ** 2).sum()
    W = convolution_matrix(abs(kernel), (m, 3, 3), (1, 1, 1, 1), mode="circular").reshape(9 * m, 9 * m)
    return norm_below(W, (9 if taps else 1) * m * square, strict=False)


def test_the_interval_fixed_point_does_not_shrink_with_eps() -> None:
    holds(fixed_point, RADII)


def test_a_doubly_stochastic_matrix_is_on_the_boundary() -> None:
    holds(no_gauge, doubly_stochastic())


def test_the_bound_of_a_convolution_needs_k() -> None:
    holds(convolved, kernels())


TWINS = {
    "fixed point: 40 - 4ε": (lambda eps: fixed_point(eps, second=-1), RADII),
    "fixed point: 99/100 of the matrix": (lambda eps: fixed_point(eps, Fraction(99, 100)), RADII),
    "boundary: scaled by 1 - 2⁻²⁰": (lambda W: no_gauge(W * (1 - Fraction(1, 2**20))), doubly_stochastic()),
    "convolution: √m alone": (lambda kernel: convolved(kernel, taps=False), kernels()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])


def test_the_linear_example() -> None:
    assert not norm_below(interval_matrix(HADAMARD), Fraction(1))
    assert norm_below(abs(HADAMARD), Fraction(1), strict=False)
    assert norm_below(HADAMARD, Fraction(1))  # contractive without intervals
    assert not radius_below_one(HADAMARD)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_one_channel_of_ninths_reaches_norm_1_in_circular_padding(mode: str) -> None:
    # O = 1/3 nine times is one orthonormal row; divided by √n = 3 it is 1/9.
    weight = torch.full((1, 1, 3, 3), 1.0, dtype=torch.float64)
    W = matrix(Convolution(weight, (1, 1, 1, 1), mode=mode), (1, 3, 3)) / 9
    assert norm_below(W, Fraction(1)) is (mode == "zeros")
    assert gauge_of(exact(weight).sum((2, 3)) / 9) is None


def test_sixteen_channels_scaled_by_the_root_of_m_have_a_norm_of_about_2_4() -> None:
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(144, 16)))[0].T  # orthonormal, (16, 16 * 9)
    kernel = rows.reshape(16, 16, 3, 3) / np.sqrt(16)
    norm = np.linalg.norm(abs(kernel).sum((2, 3)), 2)  # of the operator, circular: the all-ones image attains it
    assert 2.2 < norm < 3
    assert np.linalg.norm(abs(rows), 2) / np.sqrt(16) <= 1
    assert norm / 3 < 1
