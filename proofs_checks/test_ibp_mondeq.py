"""Theorem 3.1 of Wei & Kolter (ICLR 2022) as docs/theory.md states it, for the weights that `IBPMonDEQ` gives:
``D`` as small as the theorem allows, ``D = diag((|M|1 + |M|ᵀ1) / (2(1-m)))``, makes the largest eigenvalue of
the symmetric part of ``|W|`` equal to ``1-m``, with the eigenvector ``√diag D``; and ``W`` has a gauge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from proofs_checks.search import holds, rejects
from verideq import Equilibrium, gauge
from verideq.equilibrium import operator_of
from verideq.errors import NoGaugeError
from verideq.parametrizations import IBPMonDEQ
from verideq.testing.exact import matrix
from verideq.testing.strategies import PADDINGS

LOOSE = 1e-9
Weight = Callable[[Tensor, float], Tensor]


@st.composite
def free(draw: st.DrawFn) -> tuple[Tensor, float]:
    """A free ``M`` of 1 to 6 units: signs and scales mixed, rows and columns of zeros often; and an ``m``."""
    units = draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(-5, 5), min_size=units * units, max_size=units * units))
    M = torch.tensor(values, dtype=torch.float64).view(units, units)
    scales = torch.tensor(draw(st.lists(st.integers(-8, 8), min_size=units, max_size=units)), dtype=torch.float64)
    M = M * 2 ** scales[:, None]
    for kill in draw(st.lists(st.integers(0, units - 1), max_size=2)):
        M[kill] = 0
        if draw(st.booleans()):
            M[:, kill] = 0
    return M, draw(st.sampled_from([0.01, 0.1, 0.5, 0.99]))


def stored(m: float) -> float:
    """``m`` as the parametrization keeps it."""
    return float(IBPMonDEQ(m).m)


def package(M: Tensor, m: float) -> Tensor:
    return IBPMonDEQ(m).double()(M)


def formula(sums: Callable[[Tensor], Tensor]) -> Weight:
    """A twin's ``D^-½ M D^-½``, with `sums` for ``(|M|1 + |M|ᵀ1) / 2``."""

    def weight(M: Tensor, m: float) -> Tensor:
        d = sums(M) / (1 - stored(m))
        root = torch.where(d > 0, d, torch.ones_like(d)).sqrt()
        return M / root[:, None] / root

    return weight


def largest(W: Tensor) -> float:
    """The largest eigenvalue of the symmetric part of ``|W|``."""
    absolute = W.abs()
    return float(torch.linalg.eigvalsh((absolute + absolute.T) / 2)[-1])


def radius(W: Tensor) -> float:
    """The spectral radius of ``|W|``."""
    return float(torch.linalg.eigvals(W.abs()).abs().max())


def eigenvalue(case: tuple[Tensor, float], weight: Weight = package) -> bool:
    """``1-m``; signs and zeros are those of ``M``; the spectral radius is no larger."""
    M, m = case
    W = weight(M, m)
    if not bool(W.isfinite().all()) or not bool((W.sign() == M.sign()).all()):
        return False
    exact = abs(largest(W) - (1 - stored(m))) <= LOOSE if bool(M.any()) else not bool(W.any())
    return exact and radius(W) <= 1 - stored(m) + 1e-6  # eigenvalues of a matrix that is not normal are known less well


def eigenvector(case: tuple[Tensor, float], rows_only: bool = False) -> bool:
    M, m = case
    W = package(M, m).abs()
    sums = M.abs().sum(1) if rows_only else (M.abs().sum(0) + M.abs().sum(1)) / 2
    root = (sums / (1 - stored(m))).sqrt()
    return torch.allclose((W + W.T) @ root / 2, (1 - stored(m)) * root, rtol=1e-9, atol=1e-9 * float(root.max()))


def gauged(case: tuple[Tensor, float], factor: float = 1) -> bool:
    M, m = case
    layer = nn.Linear(len(M), len(M), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(M)
        if factor == 1:
            IBPMonDEQ.apply(layer, m=m)
        else:
            layer.weight.copy_((package(M, m) * factor).abs())
    module = Equilibrium(layer, nn.Identity())
    try:
        return bool((gauge(module).slack(module) > 0).all())
    except NoGaugeError:
        return False


def inverse(case: tuple[Tensor, float], transposed: bool = False) -> bool:
    M, m = case
    parametrization = IBPMonDEQ(m).double()
    W = parametrization(M)
    back = parametrization(parametrization.right_inverse(W.T if transposed else W))
    return torch.allclose(back, W, atol=1e-9)


def test_the_largest_eigenvalue_of_the_symmetric_part_is_1_minus_m() -> None:
    holds(eigenvalue, free())


def test_the_square_root_of_D_is_the_eigenvector() -> None:
    holds(eigenvector, free())


def test_a_gauge_is_found() -> None:
    holds(gauged, free())


def test_the_inverse_gives_the_weight_back() -> None:
    holds(inverse, free())


TWINS = {
    "D from the rows": lambda case: eigenvalue(case, formula(lambda M: M.abs().sum(1))),
    "D from M for |M|": lambda case: eigenvalue(case, formula(lambda M: (M.sum(0) + M.sum(1)) / 2)),
    "eigenvector from the rows": lambda case: eigenvector(case, rows_only=True),
    "gauge of W / (1 - m)²": lambda case: gauged(case, (1 - stored(case[1])) ** -2),
    "inverse of Wᵀ": lambda case: inverse(case, transposed=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], free())


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
