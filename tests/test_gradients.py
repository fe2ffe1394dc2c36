"""Gradients of an equilibrium: right in float64, for a point and a pair, at a memory that no step count moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from verideq.equilibrium import Anderson, Auto, Equilibrium, Gradient, Implicit, Phantom, Picard, operator_of
from verideq.errors import ConvergenceError, InputError

GRADIENTS = [Implicit(Auto(tol=1e-13)), Implicit(Picard(tol=1e-13)), Implicit(Anderson(tol=1e-13)), Phantom(40, 0.9)]
FUSIONS = {
    "linear": (lambda: nn.Linear(5, 5, bias=False), (5,)),
    "convolution": (lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False), (2, 3, 3)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False, padding_mode="circular"), (2, 3, 3)),
}


def layer_of(name: str, gradient: Gradient, tol: float = 1e-14) -> tuple[Equilibrium, Tensor, Tensor, Tensor]:
    """A layer, the weight to give it, and centre and radius of an injection; all in float64."""
    build, shape = FUSIONS[name]
    generator = torch.Generator().manual_seed(7)
    fusion = build().double()
    weight = torch.randn(fusion.weight.shape, generator=generator, dtype=torch.float64)
    weight = 0.5 * weight / weight.abs().flatten(1).sum(1).amax()
    center = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    radius = 0.05 + torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    layer = Equilibrium(fusion, nn.Identity(), solver=Auto(tol=tol), gradient=gradient)
    return layer, weight.requires_grad_(), center.requires_grad_(), radius.requires_grad_()


class Called(nn.Module):
    """The layer's point or pair as one tensor, so that `functional_call` can swap the weight."""

    def __init__(self, layer: Equilibrium, pair: bool) -> None:
        super().__init__()
        self.layer, self.pair = layer, pair

    def forward(self, center: Tensor, radius: Tensor) -> Tensor:
        return torch.stack(self.layer.equilibrate_ball(center, radius)) if self.pair else self.layer(center)

    def at(self, weight: Tensor, center: Tensor, radius: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(self, {"layer.fusion.weight": weight}, (center, radius))
        return result


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, (2, 3), padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, bias=False, padding_mode="reflect"),
        nn.Conv2d(4, 4, (4, 1), padding="same", bias=False, padding_mode="circular"),
    ],
    ids=repr,
)
def test_the_gradient_of_a_product_for_its_weight(conv: nn.Conv2d) -> None:
    conv = conv.double()
    z, y = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    operator = operator_of(conv)
    with torch.no_grad():
        found = operator.weight_gradient(z, y)  # type: ignore[attr-defined]  # a convolution's
    (expected,) = torch.autograd.grad((y * operator.apply(z)).sum(), conv.weight)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("pair", [False, True], ids=["point", "pair"])
def test_a_fixed_number_of_adjoint_steps_is_a_truncated_series(pair: bool) -> None:
    """Each step takes one more term, no step is checked, and enough of them are the exact gradient."""

    def gradient(steps: int) -> Tensor:
        layer, weight, center, radius = layer_of("convolution", Implicit(Auto(tol=1e-13), steps))
        out = Called(layer, pair).at(weight, center, radius)
        (found,) = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), weight)
        return found.flatten()

    exact = gradient(0)
    errors = [float((gradient(steps) - exact).norm() / exact.norm()) for steps in (1, 2, 4, 60)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5 and errors[-1] < 1e-9
    with pytest.raises(InputError, match="0 or more steps; got -1"):
        Implicit(steps=-1)


@pytest.mark.parametrize("pair", [False, True], ids=["point", "pair"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("name", FUSIONS)
def test_gradients_agree_with_finite_differences(name: str, gradient: Gradient, pair: bool) -> None:
    layer, weight, center, radius = layer_of(name, gradient)
    called = Called(layer, pair)
    fast = name != "linear"  # random directions instead of every entry
    if pair:
        assert torch.autograd.gradcheck(called.at, (weight, center, radius), fast_mode=fast)
    else:
        assert torch.autograd.gradcheck(lambda w, c: called.at(w, c, radius.detach()), (weight, center), fast_mode=fast)


@pytest.mark.parametrize("pair", [False, True], ids=["point", "pair"])
def test_the_implicit_gradient_is_that_of_a_long_unrolling(pair: bool) -> None:
    layer, weight, center, radius = layer_of("linear", Implicit(Auto(tol=1e-13)))
    loss = torch.cos(Called(layer, pair).at(weight, center, radius)).sum()
    c, r = torch.zeros_like(center), torch.zeros_like(radius)
    # Auto solves every row for its own unknown; the same is done here by hand.
    own = weight.diagonal()
    solved = (weight - own.diag()) / (1 - own)[:, None]
    for _ in range(200):
        p = F.linear(c, solved) + center / (1 - own)
        q = F.linear(r, solved.abs()) + radius / (1 - own) if pair else torch.zeros_like(p)
        upper, lower = F.relu(p + q), F.relu(p - q)
        c, r = (upper + lower) / 2, (upper - lower) / 2
    unrolled = torch.cos(torch.stack((c, r)) if pair else c).sum()
    inputs = (weight, center, radius)[: 3 if pair else 2]
    torch.testing.assert_close(loss, unrolled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(unrolled, inputs), rtol=1e-9, atol=1e-11
    )


def test_a_short_phantom_points_the_same_way() -> None:
    def weight_gradient(gradient: Gradient) -> Tensor:
        layer, weight, center, radius = layer_of("linear", gradient)
        return torch.autograd.grad(Called(layer, True).at(weight, center, radius).square().sum(), weight)[0]

    exact, short = weight_gradient(Implicit(Auto(tol=1e-13))), weight_gradient(Phantom(5, 1.0))
    assert float(F.cosine_similarity(exact.flatten(), short.flatten(), dim=0)) > 0.99
    assert not torch.allclose(exact, short, rtol=1e-6)


def test_differentiating_twice_is_refused() -> None:
    layer, weight, center, radius = layer_of("linear", Implicit())
    z = Called(layer, False).at(weight, center, radius)
    with pytest.raises(RuntimeError, match=r"twice|create_graph"):
        (first,) = torch.autograd.grad(z.square().sum(), center, create_graph=True)
        torch.autograd.grad(first.square().sum(), weight)


def test_an_adjoint_that_does_not_converge_is_reported() -> None:
    layer, weight, center, radius = layer_of("linear", Implicit(Picard(tol=1e-13, max_steps=2)))
    z = Called(layer, False).at(weight, center, radius)
    with pytest.raises(ConvergenceError, match=r"the adjoint \(backward pass\) did not converge for 2 of 2 samples"):
        z.sum().backward()


def test_nothing_is_tracked_when_nothing_asks() -> None:
    layer, _, center, radius = layer_of("linear", Implicit())
    with torch.no_grad():
        assert not layer(center).requires_grad
    layer.requires_grad_(False)
    assert not layer(center.detach()).requires_grad
    assert layer(center).requires_grad
    assert layer.equilibrate_ball(center.detach(), radius)[1].requires_grad


@pytest.mark.parametrize(("steps", "damping"), [(0, 0.5), (5, 0.0), (5, 1.5)])
def test_a_phantom_that_cannot_be_is_refused(steps: int, damping: float) -> None:
    with pytest.raises(InputError, match=f"got {steps} and {damping}"):
        Phantom(steps, damping)


def saved_bytes(layer: Equilibrium, center: Tensor, radius: Tensor) -> int:
    """Bytes that the forward and the backward pass of one training step keep for differentiation."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        c, r = layer.equilibrate_ball(center, radius)
        (c.square().sum() + r.sum()).backward()
    return total


def slow_layer() -> tuple[Equilibrium, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    fusion = nn.Linear(30, 30, bias=False).double()
    weight = torch.rand(30, 30, generator=generator, dtype=torch.float64)
    fusion.weight.data = 0.98 * weight / weight.sum(1, keepdim=True)
    v = torch.randn(8, 30, generator=generator, dtype=torch.float64)
    return Equilibrium(fusion, nn.Identity()), v, v.abs()


def test_the_memory_of_a_training_step_does_not_grow_with_the_steps() -> None:
    layer, center, radius = slow_layer()
    held, steps = [], []
    for tol in (1e-1, 1e-4, 1e-10):
        layer.solver, layer.gradient = Picard(tol=tol, max_steps=5000), Implicit(Picard(tol=tol, max_steps=5000))
        steps.append(count_steps(layer, center, radius))
        held.append(saved_bytes(layer, center, radius))
    assert steps[0] < 20
    assert steps[2] > 200
    assert held[0] == held[1] == held[2] > 0
    layer.solver = Picard(tol=1e-2)
    grown = []
    for tracked in (2, 20):
        layer.gradient = Phantom(tracked)
        grown.append(saved_bytes(layer, center, radius))
    assert grown[1] > 5 * grown[0]  # the count does see what an unrolling keeps


def count_steps(layer: Equilibrium, center: Tensor, radius: Tensor) -> int:
    from verideq.equilibrium import fixed_point

    with torch.no_grad():
        system = layer.system(torch.stack((center, radius)))
        return int(fixed_point(system.stepper(), system.start(), layer.solver).steps.max())
