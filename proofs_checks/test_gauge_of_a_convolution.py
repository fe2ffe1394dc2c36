"""The gauge of a convolution (docs/theory.md): ``u`` by channel with ``K u < u``, ``K`` the sums of
``|kernel|`` over its taps, is a gauge of the operator for every padding and every size of image; for zero
padding it is not necessary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from proofs_checks.algebra import gauge_of
from proofs_checks.search import holds, rejects
from verideq.equilibrium import Convolution
from verideq.testing.exact import exact, matrix
from verideq.testing.strategies import PADDINGS, fusions

SHAPES = ((2, 2), (2, 3), (3, 2))


@st.composite
def kernels(draw: st.DrawFn) -> tuple:
    channels, kernel = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3]))
    weight = draw(fusions(channels, channels, kernel, kernel))
    assume(gauge_of(abs(exact(weight)).sum((2, 3))) is not None)
    return weight, draw(st.sampled_from(PADDINGS)), draw(st.sampled_from(SHAPES))


def serves(case: tuple, sums: Callable[[np.ndarray], np.ndarray] = lambda K: abs(K).sum((2, 3))) -> bool:
    weight, mode, shape = case
    u = gauge_of(sums(exact(weight)))
    if u is None:
        return True
    operator = Convolution(weight, (weight.shape[-1] // 2,) * 4, mode=mode)
    W = abs(matrix(operator, (len(weight), *shape)))  # of the merged entries: |a + b| <= |a| + |b|
    spread = np.repeat(u, shape[0] * shape[1])
    return bool((W @ spread < spread).all())


def test_a_gauge_by_channel_serves_every_padding_and_size() -> None:
    holds(serves, kernels())


TWINS = {
    "sums without absolute values": lambda case: serves(case, lambda K: K.sum((2, 3))),
    "the middle tap alone": lambda case: serves(case, lambda K: K[:, :, K.shape[2] // 2, K.shape[3] // 2]),
    "input and output channels exchanged": lambda case: serves(case, lambda K: abs(K).sum((2, 3)).T),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], kernels())


def test_it_is_not_necessary_for_zero_padding() -> None:
    # The taps sum to 1.2, but on an image of 2x1 only two of the three are ever read at once.
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weight[0, 0, :, 1] = 0.4
    assert gauge_of(abs(exact(weight)).sum((2, 3))) is None
    assert gauge_of(matrix(Convolution(weight, (1, 1, 1, 1)), (1, 2, 1))) is not None
