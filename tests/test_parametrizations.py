"""Every parametrization through the conformance suite, and what is particular to each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from verideq import Equilibrium, gauge
from verideq.errors import InputError, ModelError, ParametrizationError
from verideq.parametrizations import (
    LBEN,
    NEMON,
    CerDEQ,
    IBPMonDEQ,
    Parametrization,
    RowGauge,
    SpectralNorm,
    WeightNorm,
    annealed_m,
    initialise_extractor,
    set_m,
)
from verideq.testing.conformance import ParametrizationSuite


class TestIBPMonDEQ(ParametrizationSuite):
    def make(self, layer: nn.Module) -> nn.Module:
        return IBPMonDEQ.apply(layer, m=0.1)

    def test_zero_units_do_not_divide_by_zero(self) -> None:
        layer = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            layer.weight[1], layer.weight[:, 1] = 0, 0
        self.make(layer)
        assert bool(layer.weight.isfinite().all()) and not bool(layer.weight[1].any() or layer.weight[:, 1].any())
        layer.weight.sum().backward()
        gradient = layer.parametrizations.weight.original.grad
        assert gradient is not None and bool(gradient.isfinite().all())

    def test_an_all_zero_weight_stays_zero(self) -> None:
        layer = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(layer.weight)
        self.make(layer)
        assert not bool(layer.weight.any())
        assert bool((gauge(Equilibrium(layer, nn.Identity())).u == 1).all())


class TestRowGauge(ParametrizationSuite):
    def make(self, layer: nn.Module) -> nn.Module:
        return RowGauge.apply(layer, m=0.1)


class TestLBEN(ParametrizationSuite):
    def make(self, layer: nn.Module) -> nn.Module:
        return LBEN.apply(layer, m=0.1, gamma=3.0)


class TestNEMON(ParametrizationSuite):
    def make(self, layer: nn.Module) -> nn.Module:
        return NEMON.apply(layer, m=0.1)

    def outside(self, W: Tensor) -> Tensor:
        return W.abs() + 1


class TestCerDEQ(ParametrizationSuite):
    assignable = False

    def make(self, layer: nn.Module) -> nn.Module:
        return CerDEQ.apply(layer)


class TestSpectralNorm(ParametrizationSuite):
    def make(self, layer: nn.Module) -> nn.Module:
        return SpectralNorm.apply(layer, iterations=4, m=0.1)


class TestWeightNorm(ParametrizationSuite):
    def make(self, layer: nn.Module) -> nn.Module:
        return WeightNorm.apply(layer, m=0.1)


@pytest.mark.parametrize("m", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_an_m_outside_its_range_is_refused(m: float) -> None:
    with pytest.raises(ParametrizationError, match="outside"):
        IBPMonDEQ.apply(nn.Linear(2, 2, bias=False), m=m)


def test_layers_that_are_no_fusion_are_refused_and_left_alone() -> None:
    for layer in (nn.Linear(2, 3, bias=False), nn.Linear(2, 2), nn.Conv2d(2, 2, 3, bias=False), nn.ReLU()):
        with pytest.raises(ModelError):
            IBPMonDEQ.apply(layer)
        assert not hasattr(layer, "parametrizations")
    with pytest.raises(ParametrizationError, match="groups"):
        IBPMonDEQ.apply(nn.Conv2d(2, 2, 1, groups=2, bias=False))


def test_a_refused_weight_is_told_the_m_that_fits() -> None:
    layer = IBPMonDEQ.apply(nn.Linear(2, 2, bias=False), m=0.1)
    with pytest.raises(ParametrizationError, match=r"use m = 0\.5\b"):
        layer.weight = torch.tensor([[0.25, 0.25], [0.25, 0.25]])
    layer.parametrizations.weight[0].m.fill_(0.5)
    layer.weight = torch.tensor([[0.25, 0.25], [0.25, 0.25]])
    assert torch.allclose(layer.weight, torch.full((2, 2), 0.25))


def test_separate_blocks_of_units_come_back_too() -> None:
    layer = nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        layer.weight[:2, 2:], layer.weight[2:, :2] = 0, 0
        layer.weight[4], layer.weight[:, 4] = 0, 0
    IBPMonDEQ.apply(layer, m=0.3)
    W = layer.weight.detach().clone()
    layer.weight = W
    assert torch.allclose(layer.weight, W, atol=1e-6)


def test_apply_means_register_on_the_class_and_recursion_on_an_instance() -> None:
    parametrization = IBPMonDEQ(0.2)
    seen: list[nn.Module] = []
    assert parametrization.apply(seen.append) is parametrization and seen == [parametrization]
    assert isinstance(IBPMonDEQ.apply(nn.Linear(1, 1, bias=False)).parametrizations.weight[0], Parametrization)


# --- the family -------------------------------------------------------------------------------------------------------


def stored(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight
    return weight.detach().clone()


def layer_of(W: Tensor) -> nn.Module:
    """A fresh fusion with the weight `W`."""
    layer: nn.Module
    if W.dim() == 2:
        layer = nn.Linear(*W.shape, bias=False)
    else:
        layer = nn.Conv2d(*W.shape[:2], W.shape[2], padding="same", bias=False)
    layer.to(W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


def members(kind: type[Parametrization], dtype: torch.dtype) -> list[Tensor]:
    """Random members of a class: dense and convolutions, their further free tensors drawn too."""
    torch.manual_seed(7)
    found = []
    for size in (1, 2, 5, 30):
        for fresh in (nn.Linear(size, size, bias=False), nn.Conv2d(size, size, 3, padding=1, bias=False)):
            layer = kind.apply(fresh).to(dtype)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(torch.randn_like(parameter))
            found.append(stored(layer))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("source", "target"),
    [(LBEN, RowGauge), (RowGauge, LBEN), (RowGauge, NEMON), (LBEN, NEMON), (NEMON, NEMON), (WeightNorm, RowGauge)],
)
def test_every_member_of_one_class_is_one_of_the_other(
    source: type[Parametrization], target: type[Any], dtype: torch.dtype
) -> None:
    for W in members(source, dtype):
        layer = target.adopt(layer_of(W))
        error = 64 * torch.finfo(dtype).eps * len(W) ** 0.5
        assert torch.allclose(stored(layer), W, rtol=error, atol=error * float(W.abs().max()))
        parametrization = layer.parametrizations.weight[0]
        assert type(parametrization) is target and 0 < float(parametrization.m) < 1
        # The weight is a member and no frozen number: all of it can be trained on.
        layer.weight.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_a_row_gauge_reaches_what_LBEN_with_a_tight_D_does_not() -> None:
    # Blocks that nothing connects: each has the rate 1 - m in LBEN, and any below it in RowGauge.
    W = torch.diag(torch.tensor([0.5, 0.3]))
    assert torch.allclose(stored(RowGauge.adopt(layer_of(W))), W)
    with pytest.raises(ParametrizationError, match="in one block of units"):
        LBEN.adopt(layer_of(W))


@pytest.mark.parametrize("kind", [RowGauge, LBEN, NEMON])
def test_a_weight_without_a_gauge_is_not_adopted(kind: type[Any]) -> None:
    layer = layer_of(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    with pytest.raises(ParametrizationError, match=r"no gauge: the spectral radius is about 1\.41421"):
        kind.adopt(layer)
    assert not hasattr(layer, "parametrizations")


def test_only_NEMON_adopts_large_negative_diagonals() -> None:
    W = torch.tensor([[-10.0, 4.0], [3.0, -5.0]])
    assert torch.allclose(stored(NEMON.adopt(layer_of(W))), W, atol=1e-5)
    with pytest.raises(ParametrizationError, match="no gauge"):
        RowGauge.adopt(layer_of(W))
    with pytest.raises(ParametrizationError, match=r"feeds 1\.5 of itself back"):
        NEMON.adopt(layer_of(torch.diag(torch.tensor([1.5, 0.0]))))


def test_a_gauge_with_large_ratios_is_found_by_the_inverse() -> None:
    u = torch.tensor([1.0, 1e3, 1e-3])
    W = 0.25 * torch.tensor([[1.0, -1, 1], [-1, 1, 1], [1, 1, -1]]) * u[:, None] / u
    layer = RowGauge.apply(layer_of(torch.zeros(3, 3)), m=0.1)
    layer.weight = W
    assert torch.allclose(stored(layer), W, rtol=1e-5)
    found = layer.parametrizations.weight[0].gauge().u
    assert bool(((found / found[0] / u).log().abs() < 1).all())
    W[1, 0] *= 1e5  # a path of ratios that leads nowhere back
    W[0, 1] = W[2, 1] = 0
    W[1, 2] *= 1e5
    with pytest.raises(ParametrizationError, match="ratio of exp"):
        layer.weight = W


def test_a_refused_row_gauge_is_told_the_m_that_fits() -> None:
    layer = RowGauge.apply(layer_of(torch.zeros(2, 2)), m=0.5)
    W = torch.full((2, 2), 0.35)
    with pytest.raises(ParametrizationError, match=r"about 0\.7, .* 1 - m = 0\.5; use an m of at most 0\.299"):
        layer.weight = W
    set_m(layer, 0.29)
    layer.weight = W
    assert torch.allclose(stored(layer), W)


def test_LBEN_finds_a_scaling_for_a_weight_that_needs_one() -> None:
    torch.manual_seed(1)
    one = LBEN.apply(nn.Linear(9, 9, bias=False), m=0.2, gamma=4.0)
    other = LBEN.apply(nn.Linear(9, 9, bias=False), m=0.2, gamma=4.0)
    with torch.no_grad():
        one.parametrizations.weight[0].beta.normal_(std=2.0)
    other.weight = stored(one)
    assert torch.allclose(stored(other), stored(one), atol=1e-5)
    assert float(other.parametrizations.weight[0].beta.detach().std()) > 0.1
    scale = other.parametrizations.weight[0].scale().detach()
    assert float(scale.max() / scale.min()) <= 4.0
    beta = other.parametrizations.weight[0].beta.detach().clone()
    with pytest.raises(ParametrizationError, match=r"LBEN\.adopt"):
        other.weight = torch.ones(9, 9) / 100
    assert torch.equal(other.parametrizations.weight[0].beta, beta)


@pytest.mark.parametrize("gamma", [1.0, 0.5, float("nan"), float("inf")])
def test_a_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ParametrizationError, match="gamma"):
        LBEN.apply(nn.Linear(2, 2, bias=False), gamma=gamma)


# --- NEMON ------------------------------------------------------------------------------------------------------------


def test_the_matrix_measure_of_NEMON_is_below_one() -> None:
    for W in members(NEMON, torch.float64):
        layer = NEMON.adopt(layer_of(W))
        parametrization = layer.parametrizations.weight[0]
        u = parametrization.gauge().u
        tap = [(size - 1) // 2 for size in W.shape[2:]]
        units = torch.arange(len(W))
        own = W[(units, units, *tap)]
        sums = W.abs().flatten(2).sum(2) if W.dim() > 2 else W.abs()
        measure = own - own.abs() + (sums @ u) / u
        assert float(measure.max()) <= 1 - float(parametrization.m) ** 2 + 1e-9


def test_the_tap_of_NEMON_is_the_one_that_reads_the_pixel_itself() -> None:
    for kernel, tap in ((1, (0, 0)), (2, (0, 0)), (3, (1, 1)), (4, (1, 1)), (5, (2, 2))):
        layer = NEMON.apply(nn.Conv2d(2, 2, kernel, padding="same", bias=False))
        assert layer.parametrizations.weight[0].tap == tap
        module = Equilibrium(layer, nn.Identity())
        assert bool((layer.parametrizations.weight[0].gauge().slack(module) > 0).all())
    with pytest.raises(ParametrizationError, match="use an odd kernel"):
        NEMON.apply(nn.Conv2d(2, 2, 2, dilation=3, padding="same", bias=False))


# --- CerDEQ and the baselines -----------------------------------------------------------------------------------------


def test_five_steps_of_CerDEQ_leave_singular_values_far_from_one() -> None:
    torch.manual_seed(0)
    layer = CerDEQ.apply(nn.Conv2d(64, 64, 3, padding=1, bias=False))
    nn.init.normal_(layer.parametrizations.weight.original)
    values = layer.parametrizations.weight[0].singular_values(layer.weight)
    assert len(values) == 64 and 0.25 < float(values.min()) < 0.55 and 0.5 < float(values.max()) < 0.8
    layer.parametrizations.weight[0].iterations = 12
    values = layer.parametrizations.weight[0].singular_values(layer.weight)
    assert float((values - 1).abs().max()) < 1e-3


def test_the_gauge_of_CerDEQ_survives_the_weights_that_reach_its_bound() -> None:
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    hadamard = torch.kron(hadamard, torch.kron(hadamard, hadamard))
    for fresh, V in (
        (nn.Linear(8, 8, bias=False), hadamard),
        (nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.full((1, 1, 3, 3), 1.0)),
    ):
        layer = CerDEQ.apply(fresh, iterations=30)
        parametrization = layer.parametrizations.weight[0]
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(V)
            parametrization.beta.fill_(100)  # the channel scale as close to 1 - m as float32 has it
        sums = stored(layer).abs().flatten(1).sum(1)
        assert torch.allclose(sums, torch.full_like(sums, 0.99), atol=1e-5)
        assert bool((parametrization.gauge().slack(Equilibrium(layer, nn.Identity())) > 0).all())


def test_the_spectral_norm_is_bounded_and_nearly_reached() -> None:
    torch.manual_seed(2)
    for size in (2, 10, 50):
        W = stored(SpectralNorm.apply(nn.Linear(size, size, bias=False), m=0.1)).abs().double()
        assert 0.85 < float(torch.linalg.matrix_norm(W, 2)) <= 0.9
    # One step of the iteration is as sound, only looser.
    W = stored(SpectralNorm.apply(nn.Linear(50, 50, bias=False), iterations=1, m=0.1)).abs().double()
    assert float(torch.linalg.matrix_norm(W, 2)) <= 0.9
    with pytest.raises(ParametrizationError, match="iterations"):
        SpectralNorm.apply(nn.Linear(2, 2, bias=False), iterations=0)
    with pytest.raises(ParametrizationError, match="iterations"):
        CerDEQ.apply(nn.Linear(2, 2, bias=False), iterations=-1)


def test_weight_norm_has_rows_of_the_length_that_its_scale_says() -> None:
    layer = WeightNorm.apply(nn.Linear(16, 16, bias=False), m=0.2)
    g = layer.parametrizations.weight[0].g
    with torch.no_grad():
        g.normal_()
    assert torch.allclose(stored(layer).norm(dim=1), 0.8 * torch.sigmoid(g.detach()) / 4, rtol=1e-4)


def test_the_extractor_keeps_the_width_of_its_bounds() -> None:
    torch.manual_seed(0)
    injection = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64))
    initialise_extractor(injection)
    assert float(injection[0].weight.detach().abs().flatten(1).sum(1).mean()) == pytest.approx(1, rel=0.05)
    assert not bool(injection[0].bias.any())
    with pytest.raises(ModelError, match="Identity has no linear"):
        initialise_extractor(nn.Identity())


# --- the schedule of m ------------------------------------------------------------------------------------------------


def test_the_schedule_of_m_falls_from_its_start_to_m() -> None:
    assert annealed_m(0.5, 0.0, 0.3) == pytest.approx(0.99)
    assert annealed_m(0.5, 0.3, 0.3) == 0.5
    assert annealed_m(0.1, 0.1, 0.4, start=0.9) == pytest.approx(0.7)
    for eps, final in ((-0.1, 0.3), (0.4, 0.3), (0.0, 0.0), (float("nan"), 0.3)):
        with pytest.raises(InputError, match="radius"):
            annealed_m(0.5, eps, final)


def test_m_is_set_for_every_class_in_a_model() -> None:
    kinds = (IBPMonDEQ, RowGauge, LBEN, NEMON, CerDEQ, SpectralNorm, WeightNorm)
    model = nn.Sequential(*(kind.apply(nn.Linear(3, 3, bias=False)) for kind in kinds))
    set_m(model, 0.75)
    assert [float(b) for name, b in model.named_buffers() if name.endswith(".m")] == [0.75] * len(kinds)
    for layer in model:
        module = Equilibrium(layer, nn.Identity())
        assert gauge(module).rate(module) < 1
    with pytest.raises(ParametrizationError, match="outside"):
        set_m(model, 1.0)
