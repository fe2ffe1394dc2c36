"""Theorem 3.1 of Wei & Kolter (ICLR 2022) as docs/theory.md states it, for the weights that `IBPMonDEQ` gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from verideq import Equilibrium, gauge
from verideq.equilibrium import operator_of
from verideq.parametrizations import IBPMonDEQ
from verideq.testing.exact import matrix
from verideq.testing.strategies import PADDINGS

checked = settings(max_examples=150, deadline=None, derandomize=True)
LOOSE = 1e-9


@st.composite
def free(draw: st.DrawFn) -> Tensor:
    """A free ``M`` of 1 to 6 units: signs and scales mixed, rows and columns of zeros often."""
    units = draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(-5, 5), min_size=units * units, max_size=units * units))
    M = torch.tensor(values, dtype=torch.float64).view(units, units)
    scales = torch.tensor(draw(st.lists(st.integers(-8, 8), min_size=units, max_size=units)), dtype=torch.float64)
    M = M * 2 ** scales[:, None]
    for kill in draw(st.lists(st.integers(0, units - 1), max_size=2)):
        M[kill] = 0
        if draw(st.booleans()):
            M[:, kill] = 0
    return M


def largest(W: Tensor) -> float:
    """The largest eigenvalue of the symmetric part of ``|W|``."""
    absolute = W.abs()
    return float(torch.linalg.eigvalsh((absolute + absolute.T) / 2)[-1])


def radius(W: Tensor) -> float:
    """The spectral radius of ``|W|``."""
    return float(torch.linalg.eigvals(W.abs()).abs().max())


@checked
@given(free(), st.sampled_from([0.01, 0.1, 0.5, 0.99]))
def test_the_largest_eigenvalue_of_the_symmetric_part_is_1_minus_m(M: Tensor, m: float) -> None:
    W = IBPMonDEQ(m).double()(M)
    m = float(IBPMonDEQ(m).m)  # as it is stored
    assert bool(W.isfinite().all())
    if bool(M.any()):
        assert largest(W) == pytest.approx(1 - m, abs=LOOSE)
    else:
        assert not bool(W.any())
    assert radius(W) <= 1 - m + 1e-6  # eigenvalues of a matrix that is not normal are known less well
    assert bool(((W == 0) == (M == 0)).all()) and bool((W.sign() == M.sign()).all())


@checked
@given(free(), st.sampled_from([0.01, 0.1, 0.5]))
def test_the_square_root_of_D_is_the_eigenvector(M: Tensor, m: float) -> None:
    parametrization = IBPMonDEQ(m).double()
    m = float(parametrization.m)
    W = parametrization(M).abs()
    d = (M.abs().sum(0) + M.abs().sum(1)) / (2 * (1 - m))
    root = d.sqrt()
    assert torch.allclose((W + W.T) @ root / 2, (1 - m) * root, rtol=1e-9, atol=1e-9 * float(root.max()))


@checked
@given(free())
def test_a_gauge_is_found(M: Tensor) -> None:
    layer = nn.Linear(len(M), len(M), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(M)
    module = Equilibrium(IBPMonDEQ.apply(layer, m=0.1), nn.Identity())
    assert bool((gauge(module).slack(module) > 0).all())


@checked
@given(free(), st.floats(0.05, 0.95))
def test_the_inverse_gives_the_weight_back(M: Tensor, m: float) -> None:
    parametrization = IBPMonDEQ(m).double()
    W = parametrization(M)
    assert torch.allclose(parametrization(parametrization.right_inverse(W)), W, atol=1e-9)


def test_the_square_root_of_D_is_a_gauge_only_for_symmetric_M() -> None:
    for M, expected in (
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), True),
        (torch.tensor([[0.0, 9.0], [0.1, 0.0]]), False),
    ):
        M = M.double()
        parametrization = IBPMonDEQ(0.1).double()
        u = ((M.abs().sum(0) + M.abs().sum(1)) / (2 * (1 - parametrization.m))).sqrt()
        assert bool((parametrization(M).abs() @ u < u).all()) is expected


def test_the_spectral_norm_may_exceed_one() -> None:
    # Not claimed: ‖|W|‖₂ goes up to 2 (1 - m).
    M = torch.zeros(40, 40, dtype=torch.float64)
    M[0, 1:] = 1
    norm = float(torch.linalg.matrix_norm(IBPMonDEQ(0.1).double()(M), 2))
    assert 1 < norm <= 2 * 0.9 + LOOSE
    M = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(IBPMonDEQ(0.1).double()(M), 2)) == pytest.approx(1.8)


def convolution(mode: str, seed: int, channels: int = 2, m: float = 0.1) -> nn.Conv2d:
    """A float64 fusion with a few taps and channels at zero."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=mode, bias=False).double()  # type: ignore[arg-type]  # one of PADDINGS
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.7)
        if seed % 3 == 0:
            layer.weight[0] = 0
    IBPMonDEQ.apply(layer, m=m)
    return layer


@pytest.mark.parametrize("mode", PADDINGS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (4, 4)])
def test_a_convolution_has_the_spectral_radius_under_every_padding(mode: str, seed: int, size: tuple[int, int]) -> None:
    layer = convolution(mode, seed)
    W = torch.from_numpy(matrix(operator_of(layer), (2, *size)).astype(np.float64))
    assert radius(W) <= 0.9 + 1e-7
    if mode in ("zeros", "circular"):
        assert largest(W) <= 0.9 + 1e-7


def test_copies_of_a_border_pixel_break_the_symmetric_part_and_not_the_radius() -> None:
    # A border pixel is read more often than D, taken from the interior, accounts for: Theorem 3.1 itself fails there.
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate", bias=False).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 0, 1] = 1  # each pixel reads the one above; the first row reads itself
    IBPMonDEQ.apply(layer, m=0.1)
    W = torch.from_numpy(matrix(operator_of(layer), (1, 3, 1)).astype(np.float64))
    assert largest(W) > 1 > radius(W)
    module = Equilibrium(layer, nn.Identity())
    assert bool((gauge(module).slack(module) > 0).all())


def test_a_schedule_of_m_moves_the_eigenvalue() -> None:
    layer = IBPMonDEQ.apply(nn.Linear(8, 8, bias=False).double(), m=0.1)
    for m in (0.1, 0.25, 0.6):
        layer.parametrizations.weight[0].m.fill_(m)
        assert largest(layer.weight.detach()) == pytest.approx(1 - m, abs=1e-9)
