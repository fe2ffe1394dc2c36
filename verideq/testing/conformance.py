"""Suites of tests that a new bound method or parametrization inherits: subclass, say what it is, get every test.

::

    class TestAdjoint(BoundMethodSuite):
        method = "adjoint"

    class TestMine(ParametrizationSuite):
        def make(self, layer):
            return Mine.apply(layer)

        def outside(self, W):  # only where the default is in the class
            return W + 2
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from verideq.box import Box
from verideq.certify import bound, prepare
from verideq.certify.method import LINEAR
from verideq.equilibrium import HARD_SIGMOID, Equilibrium, gauge
from verideq.equilibrium.operators import exactly
from verideq.errors import InputError, ModelError, NoGaugeError, ParametrizationError, RegionError
from verideq.graph import load_model, model_hash, save_model
from verideq.parametrizations import Contraction, Parametrization
from verideq.parametrizations.base import resolvent
from verideq.region import Region
from verideq.testing.exact import ExactModel, exact, matrix, outside
from verideq.testing.strategies import Case, bounded_cases, cases

# The same test runs for every subclass, each of which is an executor of its own to hypothesis.
_SUITE = settings(suppress_health_check=[HealthCheck.differing_executors])


class BoundMethodSuite:
    """What every bound method has to do. A subclass sets `method`, and lowers `examples` if it is slow."""

    method: str
    examples: int = 50

    def __init_subclass__(cls) -> None:
        # A test of hypothesis has its settings once and for all: with others it is another test.
        for name, test in list(vars(BoundMethodSuite).items()):
            if cls.examples != BoundMethodSuite.examples and hasattr(test, "hypothesis"):
                own = given(cases())(test.hypothesis.inner_test)
                setattr(cls, name, settings(_SUITE, max_examples=cls.examples)(own))

    def bound(self, case: Case, steps: int = 1000, C: Tensor | None = None) -> Box:
        """The bounds of a case by this method."""
        return bound(case.model, case.region, C=C, method=self.method, max_steps=steps)

    @_SUITE
    @given(cases())
    def test_no_exact_output_leaves_its_bound(self, case: Case) -> None:
        self.check(case)

    def test_no_exact_output_of_a_hard_sigmoid_leaves_its_bound(self) -> None:
        if self.method in LINEAR:

            @settings(_SUITE, max_examples=max(1, self.examples // 3))
            @given(bounded_cases())
            def search(case: Case) -> None:
                self.check(case)

            search()
            return
        layer = Equilibrium(nn.Linear(2, 2, bias=False), nn.Linear(1, 2), HARD_SIGMOID)
        with pytest.raises(ModelError, match=f"method {self.method} is for ReLU equilibria; .* is hard-sigmoid"):
            bound(layer, Region(torch.zeros(1, 1), 0), method=self.method)

    def check(self, case: Case) -> None:
        """No exact output of a case leaves its bound, however early the solver is stopped."""
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
    assignable: bool = True
    """Whether a ``W`` can be assigned; otherwise every assignment is refused."""

    @abstractmethod
    def make(self, layer: nn.Module) -> nn.Module:
        """Register the parametrization on the weight of `layer` and return it."""

    def outside(self, W: Tensor) -> Tensor:
        """A weight that is refused, made from one of the class."""
        return 3 * W + torch.ones_like(W)

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

    def small(self) -> list[nn.Module]:
        """A few fresh layers, parametrized, for tests that take their time: dense, and convolutions."""
        torch.manual_seed(2)
        fresh: list[nn.Module] = [nn.Linear(12, 12, bias=False)]
        if self.convolutions:
            fresh.append(nn.Conv2d(3, 3, 3, padding=1, bias=False))
        return [self.make(layer) for layer in fresh]

    def holds(self, layer: nn.Module) -> Equilibrium:
        """The layer as an equilibrium, after a look at its stored weight: finite, with a gauge; and if the class names
        a gauge of its own, that one is a gauge too. A `Contraction` is as fast as its `m` says.
        """
        module = Equilibrium(layer, nn.Identity())
        assert bool(self.weight(layer).isfinite().all())
        assert bool((gauge(module).slack(module) > 0).all())
        parametrization = parametrization_of(layer)
        named = parametrization.gauge()
        if named is not None:
            assert bool((named.slack(module) > 0).all())
        if isinstance(parametrization, Contraction):
            rate = 1 - float(parametrization.m) + 1e-6
            if named is None:
                assert resolvent(module.operator().map(exactly).absolute_units(), rate) is not None
            else:
                assert named.rate(module) <= rate
        return module

    @pytest.mark.parametrize(("dtype", "optimiser"), [(torch.float32, "adam"), (torch.float64, "sgd")])
    def test_no_optimiser_leaves_the_class(self, dtype: torch.dtype, optimiser: str) -> None:
        # 1,000 steps that pull W in random directions, at rates that no training uses.
        for layer in self.small():
            layer.to(dtype)
            parameters = list(layer.parameters())
            steps: torch.optim.Optimizer
            if optimiser == "adam":
                steps = torch.optim.Adam(parameters, lr=0.3)
            else:
                steps = torch.optim.SGD(parameters, lr=100.0)
            for step in range(1000):
                W: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
                (W * torch.randn_like(W)).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
                steps.step()
                steps.zero_grad()
                if step % 50 == 49:
                    self.holds(layer)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_random_free_tensors_are_in_the_class(self, dtype: torch.dtype) -> None:
        for layer in self.small():
            layer.to(dtype)
            for scale in (1e-42, 1e-30, 1e-3, 1.0, 1e3, 1e15):
                for draw in range(5):
                    with torch.no_grad():
                        for parameter in layer.parameters():
                            parameter.normal_().mul_(scale)
                            if draw % 2:  # magnitudes apart
                                parameter.mul_(10 ** (4 * torch.randn_like(parameter)).clamp(-9, 9))
                    self.holds(layer)

    def test_zeros_are_in_the_class_and_have_gradients(self) -> None:
        for layer in self.small():
            original: Tensor = layer.parametrizations.weight.original  # type: ignore[union-attr,assignment]  # torch's own
            fresh = original.detach().clone()
            for kind in ("everything", "a row", "a column", "both", "all but one"):
                with torch.no_grad():
                    original.copy_(fresh if kind != "everything" else 0 * fresh)
                    if kind in ("a row", "both"):
                        original[1] = 0
                    if kind in ("a column", "both"):
                        original[:, 1] = 0
                    if kind == "all but one":
                        original.zero_()[0, 1] = 7.0
                self.holds(layer)
                layer.zero_grad()
                W: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
                W.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
                assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())

    def test_the_class_is_not_left_where_m_goes_to_zero(self) -> None:
        torch.manual_seed(3)
        for size in (4, 32):
            for draw in range(25):
                layer = self.make(nn.Linear(size, size, bias=False))
                if draw % 2:
                    with torch.no_grad():
                        for parameter in layer.parameters():
                            parameter.normal_()
                            if draw % 4 == 1 and parameter.dim() == 2:  # where ρ(|W|) comes closest to a norm
                                parameter.add_(parameter.T.clone())
                for m in (1e-4, 1e-8, 0.0):
                    parametrization_of(layer).get_buffer("m").fill_(m)
                    self.holds(layer)
        # Equal entries, and scales at their ends: all the roundings of a row go the same way.
        for size in range(1, 33):
            layer = self.make(nn.Linear(size, size, bias=False))
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.fill_(1.0 if parameter.dim() == 2 else 50.0)
            parametrization_of(layer).get_buffer("m").fill_(0.0)
            self.holds(layer)

    def test_a_trained_weight_comes_back(self) -> None:
        if not self.assignable:
            return
        torch.manual_seed(4)
        for layer in self.small():
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            W = self.weight(layer).clone()
            layer.weight = W
            near = self.tolerance * float(W.abs().max())
            assert torch.allclose(self.weight(layer), W, rtol=self.tolerance, atol=near)

    def test_gradients_are_those_of_the_formula(self) -> None:
        torch.manual_seed(5)
        fresh: list[nn.Module] = [nn.Linear(3, 3, bias=False)]
        if self.convolutions:
            fresh.append(nn.Conv2d(2, 2, 3, padding=1, bias=False))
        for layer in fresh:
            self.make(layer.double())
            names = [f"layer.{name}" for name, _ in layer.named_parameters()]
            free = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())

            def weight(*values: Tensor, names: list[str] = names, layer: nn.Module = layer) -> Tensor:
                result: Tensor = functional_call(_Weight(layer), dict(zip(names, values, strict=True)), ())
                return result

            assert torch.autograd.gradcheck(weight, free)

    def test_the_model_file_holds_the_weight_and_a_gauge(self, tmp_path: Path) -> None:
        for layer in self.layers():
            units, dense = len(self.weight(layer)), isinstance(layer, nn.Linear)
            injection = nn.Linear(2, units) if dense else nn.Conv2d(2, units, 1)
            model = nn.Sequential(Equilibrium(layer, injection))
            path = tmp_path / "model.safetensors"
            identity = save_model(model, path)
            loaded = load_model(path)
            assert model_hash(loaded) == identity
            ((_, stored),) = loaded.equilibria()
            assert torch.equal(self.weight(stored.fusion), self.weight(layer))
            assert bool((gauge(stored).slack(stored) > 0).all())
            x = torch.randn((3, 2) if dense else (3, 2, 5, 5))
            assert torch.allclose(loaded(x), model(x), atol=1e-4)

    def test_a_convolution_is_its_dense_matrix(self) -> None:
        if not self.convolutions:
            return
        torch.manual_seed(6)
        shape = (2, 3, 4)
        for mode in ("zeros", "circular", "reflect", "replicate"):
            layer = self.make(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode, bias=False).double())
            module = self.holds(layer)
            W = matrix(module.operator(), shape)
            z = torch.randn(5, *shape, dtype=torch.float64)
            rows = torch.from_numpy(W.astype(np.float64))
            applied = module.operator().map(exactly).apply(z)
            assert torch.allclose(applied.flatten(1), z.flatten(1) @ rows.T, atol=1e-12 * float(rows.abs().max()))
            # The gauge by channel is one of the whole matrix, exactly; of W̃ every row for its own unknown first.
            found = gauge(module)
            u = exact(found.u[:, None].expand(2, 12).flatten())
            if found.transformed:
                kernel: Tensor = exactly(self.weight(layer))
                own = exact(kernel[(0, 1), (0, 1), 1, 1][:, None].expand(2, 12).flatten())
                others = W - np.diag(own)
                assert bool((np.abs(others) @ u < (1 - own) * u).all())
            else:
                assert bool((np.abs(W) @ u < u).all())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    def test_a_cuda_device_gives_the_same(self) -> None:
        for layer in self.layers():
            before = self.weight(layer).clone()
            self.holds(layer.cuda())
            assert torch.allclose(self.weight(layer).cpu(), before, rtol=1e-4, atol=1e-5)

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
            if not self.assignable:
                with pytest.raises(ParametrizationError):
                    other.weight = W
                continue
            other.weight = W
            assert torch.allclose(
                self.weight(other), W, rtol=self.tolerance, atol=self.tolerance * float(W.abs().max())
            )

    def test_a_weight_outside_the_class_is_refused(self) -> None:
        for layer in self.layers():
            before = self.weight(layer).clone()
            with pytest.raises(ParametrizationError):
                layer.weight = self.outside(before)
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


class _Weight(nn.Module):
    """A module whose output is the weight of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]  # nn.Module attributes are typed as a union
        return weight


def parametrization_of(layer: nn.Module) -> Parametrization:
    """The parametrization on the weight of a layer."""
    found: Parametrization = layer.get_submodule("parametrizations.weight.0")  # type: ignore[assignment]  # the first in the chain
    return found
