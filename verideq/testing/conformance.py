"""Suites of tests that a new bound method or parametrization inherits: subclass, say what it is, get every test.

::

    class TestAdjoint(BoundMethodSuite):
        method = "adjoint"

    class TestRowGauge(ParametrizationSuite):
        def make(self, layer):
            return RowGauge.apply(layer)
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from verideq.box import Box
from verideq.certify import bound, prepare
from verideq.equilibrium import Equilibrium, gauge
from verideq.errors import InputError, NoGaugeError, ParametrizationError, RegionError
from verideq.region import Region
from verideq.testing.exact import ExactModel, exact, outside
from verideq.testing.strategies import Case, cases

# The same test runs for every subclass, each of which is an executor of its own to hypothesis.
_SUITE = settings(suppress_health_check=[HealthCheck.differing_executors])


class BoundMethodSuite:
    """What every bound method has to do. A subclass sets `method`, and lowers `examples` if it is slow."""

    method: str
    examples: int = 40

    def bound(self, case: Case, steps: int = 1000, C: Tensor | None = None) -> Box:
        """The bounds of a case by this method."""
        return bound(case.model, case.region, C=C, method=self.method, max_steps=steps)

    @_SUITE
    @given(cases())
    def test_no_exact_output_leaves_its_bound(self, case: Case) -> None:
        prepared, truth = prepare(case.model), ExactModel(case.model)
        outputs = [[truth(point) for point in points] for points in case.points]
        for C in (None, case.C):
            rows = [[y if C is None else exact(C) @ y for y in sample] for sample in outputs]
            for steps in (1, 5, 1000):
                box = bound(prepared, case.region, C=C, method=self.method, max_steps=steps)
                assert bool(box.sound().all())
                for i, sample in enumerate(rows):
                    assert [outside(y, box.lower[i], box.upper[i]) for y in sample] == [[]] * len(sample)

    @_SUITE
    @given(cases())
    def test_no_bound_depends_on_batch_mates(self, case: Case) -> None:
        whole = self.bound(case, C=case.C)
        for i in range(len(case.region)):
            alone = bound(case.model, case.region[i : i + 1], C=case.C, method=self.method)
            scale = 1 + whole.upper[i].abs() + whole.lower[i].abs()
            assert bool(((alone.lower[0] - whole.lower[i]).abs() <= 1e-9 * scale).all())
            assert bool(((alone.upper[0] - whole.upper[i]).abs() <= 1e-9 * scale).all())

    @_SUITE
    @given(cases())
    def test_a_point_is_bounded_closely(self, case: Case) -> None:
        truth = ExactModel(case.model)
        center = case.region.center
        box = bound(case.model, Box(center, center), method=self.method)
        for i in range(len(center)):
            exactly = truth.values(exact(center[i]))
            size = max([abs(float(y)) for value in exactly.values() for y in value.reshape(-1)])
            # 2^-20 is the smallest slack among the cases, and 2^16 the largest ratio of their gauges.
            assert bool((box.width[i] <= 1e-3 * size + 1e-290).all())

    def test_a_larger_specification_is_bounded_row_by_row(self) -> None:
        model, region = _net(), Region(torch.full((2, 2), 0.5), 0.1)
        C = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
        whole = bound(model, region, C=C, method=self.method)
        for k in range(3):
            row = bound(model, region, C=C[None, k : k + 1].expand(2, 1, 3), method=self.method)
            assert torch.allclose(row.lower[:, 0], whole.lower[:, k], atol=1e-9)
        elided, plain = whole.width[:, 2], bound(model, region, method=self.method).width.sum(1)
        assert bool((elided <= plain + 1e-9).all())

    def test_a_layer_without_a_gauge_is_refused_or_unbounded_and_never_finite_by_chance(self) -> None:
        fusion, injection = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        for tensor, value in ((fusion.weight, 2.0), (injection.weight, 0.0), (injection.bias, -1.0)):
            nn.init.constant_(tensor, value)
        layer = Equilibrium(fusion, injection)
        try:
            box = bound(layer, Region(torch.zeros(1, 1), 0), method=self.method)
        except NoGaugeError:
            return
        # Both 0 and 1 are equilibria.
        assert float(box.lower) <= 0 and float(box.upper) >= 1

    def test_boxes_and_specifications_that_make_no_sense_are_refused(self) -> None:
        model, ones = _net(), torch.ones(1, 2)
        for lower, upper in ((ones, 0 * ones), (ones, ones * torch.nan), (ones * torch.nan, ones)):
            with pytest.raises(RegionError):
                bound(model, Box(lower, upper), method=self.method)
        for C in (torch.ones(1, 2), torch.ones(2, 1, 3), torch.full((1, 3), torch.nan), torch.ones(3)):
            with pytest.raises(InputError):
                bound(model, Region(ones, 0), C=C, method=self.method)

    def test_an_overflow_bounds_nothing(self) -> None:
        model = _net().double()
        nn.init.constant_(model.get_parameter("1.weight"), 1e308)
        box = bound(model, Box(torch.zeros(1, 2), torch.full((1, 2), 1e10)), method=self.method)
        assert not bool(box.lower.isnan().any()) and not bool(box.upper.isnan().any())
        assert bool((box.upper == torch.inf).all())


def _net() -> nn.Sequential:
    """A small net with a gauge."""
    torch.manual_seed(0)
    fusion = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        fusion.weight.mul_(0.8 / fusion.weight.abs().sum(1, keepdim=True))
    return nn.Sequential(Equilibrium(fusion, nn.Linear(2, 4)), nn.Linear(4, 3))


class ParametrizationSuite(ABC):
    """What every class of ``W`` has to do. A subclass says how it is registered on a fresh layer."""

    tolerance: float = 1e-5
    """Relative, of a round trip in float32."""
    convolutions: bool = True
    """Whether the class takes convolutions."""

    @abstractmethod
    def make(self, layer: nn.Module) -> nn.Module:
        """Register the parametrization on the weight of `layer` and return it."""

    def layers(self) -> list[nn.Module]:
        """Fresh layers, parametrized: dense of several sizes, and convolutions with every padding."""
        torch.manual_seed(0)
        fresh: list[nn.Module] = [nn.Linear(size, size, bias=False) for size in (1, 2, 7, 64)]
        if self.convolutions:
            for mode in ("zeros", "circular", "reflect", "replicate"):
                fresh.append(nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode, bias=False))
            fresh += [nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(1, 1, 5, padding="same", bias=False)]
        return [self.make(layer) for layer in fresh]

    @staticmethod
    def weight(layer: nn.Module) -> Tensor:
        """``W``, without its gradient."""
        weight: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
        return weight.detach()

    def test_a_fresh_layer_has_a_gauge(self) -> None:
        for layer in self.layers():
            assert is_parametrized(layer, "weight")
            for dtype in (torch.float32, torch.float64):
                module = Equilibrium(layer.to(dtype), nn.Identity())
                found = gauge(module)
                assert bool((found.slack(module) > 0).all())
                assert found.rate(module) < 1

    def test_an_equilibrium_is_found(self) -> None:
        for layer in self.layers():
            units = len(self.weight(layer))
            module = Equilibrium(layer, nn.Identity())
            v = torch.randn((5, units) if isinstance(layer, nn.Linear) else (5, units, 6, 6))
            z = module(v).detach()
            assert torch.allclose(z, torch.relu(module.operator().apply(z) + v), atol=1e-3 * float(z.max()) + 1e-6)

    def test_an_assigned_weight_comes_back(self) -> None:
        for layer, other in zip(self.layers(), self.layers(), strict=True):
            W = self.weight(layer).clone()
            other.weight = W
            assert torch.allclose(
                self.weight(other), W, rtol=self.tolerance, atol=self.tolerance * float(W.abs().max())
            )

    def test_a_weight_outside_the_class_is_refused(self) -> None:
        for layer in self.layers():
            before = self.weight(layer).clone()
            with pytest.raises(ParametrizationError):
                layer.weight = 3 * before + torch.ones_like(before)
            assert torch.equal(self.weight(layer), before)

    def test_a_copy_is_independent_and_equal(self) -> None:
        for layer in self.layers():
            before, twin = self.weight(layer).clone(), copy.deepcopy(layer)
            assert torch.equal(self.weight(twin), before)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            assert torch.equal(self.weight(layer), before)

    def test_the_state_dict_carries_everything(self) -> None:
        for layer, other in zip(self.layers(), self.layers(), strict=True):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.copy_(torch.randn_like(parameter))
            other.load_state_dict(layer.state_dict())
            assert torch.equal(self.weight(other), self.weight(layer))

    def test_double_precision_and_back(self) -> None:
        for layer in self.layers():
            before = self.weight(layer).clone()
            assert self.weight(layer.double()).dtype is torch.float64
            assert torch.allclose(self.weight(layer).float(), before, atol=1e-6)
            assert self.weight(layer.float()).dtype is torch.float32

    def test_apply_on_a_model_still_recurses(self) -> None:
        for layer in self.layers():
            seen: list[nn.Module] = []
            model = nn.Sequential(layer)
            assert model.apply(seen.append) is model
            assert layer in seen and set(model.modules()) == set(seen)

    def test_the_gradient_reaches_every_free_tensor(self) -> None:
        for layer in self.layers():
            torch.manual_seed(1)
            W: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
            free = list(layer.parameters())
            gradients = torch.autograd.grad((W * torch.randn_like(W)).sum(), free)
            assert all(bool(gradient.isfinite().all()) for gradient in gradients)
            # The weight of a single number may be a constant of its class: nothing there can move.
            assert W.numel() == 1 or any(bool((gradient != 0).any()) for gradient in gradients)

    def test_the_schedule_is_a_buffer(self) -> None:
        for layer in self.layers():
            names = [name.rpartition(".")[2] for name, _ in layer.named_buffers()]
            assert "m" in names and "m" not in [name for name, _ in layer.named_parameters()]
            (m,) = (tensor for name, tensor in layer.named_buffers() if name.endswith(".m"))
            before = self.weight(layer).clone()
            m.fill_(0.5 * float(m) + 0.45)
            module = Equilibrium(layer, nn.Identity())
            assert bool((gauge(module).slack(module) > 0).all())
            assert not torch.equal(self.weight(layer), before)
            assert any(name.endswith(".m") for name in layer.state_dict())

    def test_registering_twice_is_refused(self) -> None:
        for layer in self.layers():
            with pytest.raises(ParametrizationError):
                self.make(layer)
