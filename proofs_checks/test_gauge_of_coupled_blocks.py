"""The gauge of coupled blocks (docs/theory.md): ``u`` by channel with ``K u < u``, ``K`` the sums of ``|kernel|`` over
all taps forwards and over the worst phase of the stride backwards, is a gauge of ``W``; kernels times ``1 - m`` over
``√(D_o D_i)``, ``D = K 1``, have ``u = √D`` by construction."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.cases import matrices
from proofs_checks.search import holds, rejects
from verideq.testing.exact import convolution_matrix, zeros

FORMS = (
    ((1, 4, 3), (2, 2), (2, 2), (1, 0)),
    ((2, 5, 1), (3, 1), (2, 1), (1, 0)),
    ((1, 3, 3), (2, 3), (1, 2), (0, 1)),
    ((1, 4, 2), (1, 2), (3, 1), (0, 0)),
    ((2, 3, 1), (3, 1), (1, 1), (1, 0)),
)
"""Shape of the lower block, kernel, stride, padding."""


@st.composite
def couplings(draw: st.DrawFn) -> tuple:
    """A kernel between two blocks, and a positive number for each of their channels."""
    shape, kernel, stride, padding = draw(st.sampled_from(FORMS))
    outputs = draw(st.integers(1, 2))
    weight = draw(matrices(outputs, shape[0] * kernel[0] * kernel[1])).reshape(outputs, shape[0], *kernel)
    u = np.array([Fraction(draw(st.integers(1, 8))) for _ in range(outputs + shape[0])], dtype=object)
    return weight, shape, stride, padding, u


def phases(weight: np.ndarray, stride: tuple[int, int]) -> list[np.ndarray]:
    """Sums of absolute taps of every phase, (out, in) each."""
    return [abs(weight)[:, :, r :: stride[0], c :: stride[1]].sum((2, 3)) for r, c in product(*map(range, stride))]


def worst(weight: np.ndarray, stride: tuple[int, int]) -> np.ndarray:
    return np.maximum.reduce(phases(weight, stride))


def operator(weight: np.ndarray, shape: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]) -> tuple:
    """``|W|`` of both blocks, and the channel of every unit."""
    pads = (padding[1], padding[1], padding[0], padding[0])
    full = abs(convolution_matrix(weight, shape, pads, stride))
    upper, lower = int(np.prod(full.shape[:3])), int(np.prod(shape))
    A = full.reshape(upper, lower)
    W = zeros(lower + upper, lower + upper)
    W[lower:, :lower], W[:lower, lower:] = A, A.T
    channels = np.repeat(np.arange(shape[0]), shape[1] * shape[2])
    return W, np.concatenate((channels, shape[0] + np.repeat(np.arange(len(weight)), upper // len(weight))))


Sums = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def rows(weight: np.ndarray, stride: tuple[int, int], u: np.ndarray, back: Sums = worst, signed: bool = False) -> tuple:
    """``K u`` of both blocks."""
    inputs = weight.shape[1]
    forwards = (weight if signed else abs(weight)).sum((2, 3))
    return np.concatenate((back(weight, stride).T @ u[inputs:], forwards @ u[:inputs]))


def bounded(case: tuple, back: Sums = worst, signed: bool = False) -> bool:
    """No row of ``|W| u`` is above that of its channel in ``K u``: a slack of the latter is one of the former."""
    weight, shape, stride, padding, u = case
    W, channels = operator(weight, shape, stride, padding)
    return bool((W @ u[channels] <= rows(weight, stride, u, back, signed)[channels]).all())


def contracts(case: tuple, back: Sums = worst, root: bool = True) -> bool:
    """``|W| u <= (1-m) u`` for ``u = √D`` and the weights ``(1-m) A / √(D_o D_i)``."""
    weight, shape, stride, padding, _ = case
    ones = np.array([Fraction(1)] * (len(weight) + weight.shape[1]), dtype=object)
    D = rows(weight, stride, ones, back)
    D = np.where(D == 0, Fraction(1), D)
    W, channels = operator(weight, shape, stride, padding)
    # (|W'| u)_j / u_j = (1-m) Σ_k |W_jk| / D_j with roots; without them Σ_k |W_jk| / (D_j D_k) √D_k / √D_j, at most 1.
    if root:
        return bool((W.sum(1) <= D[channels]).all())
    scaled = W / D[channels][:, None] / D[channels][None]
    return bool((scaled @ D[channels] <= Fraction(9, 10) * D[channels]).all())


def test_sums_by_the_worst_phase_bound_every_row() -> None:
    holds(bounded, couplings())


def test_scaled_kernels_have_a_gauge() -> None:
    holds(contracts, couplings())


def mean(weight: np.ndarray, stride: tuple[int, int]) -> np.ndarray:
    return sum(phases(weight, stride)) / Fraction(stride[0] * stride[1])


TWINS = {
    "the mean over phases": lambda case: bounded(case, mean),
    "the first phase": lambda case: bounded(case, lambda weight, stride: phases(weight, stride)[0]),
    "no absolute values": lambda case: bounded(case, signed=True),
    "one direction only": lambda case: contracts(case, lambda weight, stride: 0 * worst(weight, stride)),
    "scales without a root": lambda case: contracts(case, root=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], couplings())


def test_it_is_not_necessary() -> None:
    # Two output channels whose worst phases differ: no pixel reads both.
    weight = zeros(2, 1, 2, 1)
    weight[0, 0, 0, 0] = weight[1, 0, 1, 0] = Fraction(1)
    case = (weight, (1, 4, 1), (2, 1), (0, 0), np.array([Fraction(1)] * 3, dtype=object))
    W, _ = operator(*case[:4])
    assert (W.sum(1) == 1).all() and rows(weight, (2, 1), case[4])[0] == 2
