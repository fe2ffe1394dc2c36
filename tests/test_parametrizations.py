"""Every parametrization through the conformance suite, and what is particular to each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from verideq import Equilibrium, gauge
from verideq.errors import ModelError, ParametrizationError
from verideq.parametrizations import IBPMonDEQ, Parametrization
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
