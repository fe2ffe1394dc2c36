"""A feed-forward network as one equilibrium (Proposition 3.7 of Wei & Kolter)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from verideq import Equilibrium, Normalize, Region, bound, gauge, solve
from verideq.certify import certify
from verideq.equilibrium import Picard
from verideq.errors import ModelError
from verideq.models.explicit import from_feedforward
from verideq.parametrizations import LBEN
from verideq.status import Status


def network(*sizes: int, bias: bool = True, relu_last: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for before, after in pairwise(sizes):
        modules += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[: None if relu_last else -1])


def equilibrium(model: nn.Sequential) -> Equilibrium:
    (layer,) = (module for module in model if isinstance(module, Equilibrium))
    return layer


@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4, 2), (3, 7, 4, 2), (2, 5, 9, 3, 6, 4)])
def test_the_outputs_are_the_same_and_so_are_the_hidden_layers(
    sizes: tuple[int, ...], bias: bool, relu_last: bool
) -> None:
    net = network(*sizes, bias=bias, relu_last=relu_last).double()
    model, x = from_feedforward(net), 3 * torch.randn(50, sizes[0], dtype=torch.float64)
    assert torch.allclose(model(x), net(x), rtol=1e-12, atol=1e-12)
    hidden, values = [], x
    for module in net:
        values = module(values)
        if isinstance(module, nn.ReLU):
            hidden.append(values)
    layer = equilibrium(model)
    layer.solver = Picard()
    solution = solve(layer, x, tol=1e-13)
    assert torch.allclose(solution.value, torch.cat(hidden, 1), atol=1e-12)
    assert int(solution.steps.max()) <= len(hidden) + 1


def test_the_weights_are_the_stored_ones() -> None:
    net = network(3, 4, 5, 2)
    model = from_feedforward(net)
    W = equilibrium(model).fusion.weight
    assert torch.equal(W[4:, :4], net[2].weight)
    assert int((W != 0).sum()) == 20
    assert torch.equal(model[-1].weight[:, 4:], net[4].weight) and not bool(model[-1].weight[:, :4].any())
    x = torch.rand(9, 3)
    assert torch.allclose(model(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_it_has_a_gauge_and_is_in_the_class_of_theorem_3_3(scale: float) -> None:
    net = network(6, 8, 8, 8, 3).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    layer = equilibrium(from_feedforward(net))
    assert bool((gauge(layer).slack(layer) > 0).all())
    W = layer.fusion.weight.detach().clone()
    LBEN.adopt(layer.fusion)
    assert torch.allclose(layer.fusion.weight, W, rtol=1e-9, atol=1e-9 * float(W.abs().max()))


def test_bounds_contain_the_network_and_certificates_hold() -> None:
    net = nn.Sequential(nn.Flatten(), Normalize([0.5], [0.3]), *network(9, 12, 10, 3, seed=3))
    model = from_feedforward(net)
    torch.manual_seed(0)
    images = torch.rand(20, 1, 3, 3)
    for eps in (0.0, 0.01, 0.1):
        box = bound(model, Region(images, eps))
        for _ in range(20):
            points = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
            outputs = net(points).double()
            assert bool(((box.lower - 1e-5 <= outputs) & (outputs <= box.upper + 1e-5)).all())
    labels = net(images).argmax(1)
    verdicts = certify(model, images, labels, eps=0.002)
    assert sum(verdict.status is Status.CERTIFIED for verdict in verdicts) >= 10
    wrong = certify(model, images, (labels + 1) % 3, eps=0.002)
    assert all(verdict.status is Status.MISCLASSIFIED for verdict in wrong)


def test_the_original_is_left_alone_and_gradients_flow() -> None:
    net = network(3, 4, 2)
    before = [p.detach().clone() for p in net.parameters()]
    model = from_feedforward(net)
    loss: Tensor = model(torch.rand(5, 3)).sum()
    loss.backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    gradient = model[0].injection.weight.grad
    assert gradient is not None and bool(gradient.any())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "no hidden layer"),
        (nn.Sequential(), "no hidden layer"),
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "ReLU, and Linear is needed"),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), "Tanh, and ReLU is needed"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()), "Linear, and ReLU is needed"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU()), "Conv2d, and Linear is needed"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)), "Flatten, and Linear is needed"),
        (nn.Linear(2, 2), "given as a Sequential"),
    ],
)
def test_other_networks_are_refused(model: nn.Sequential, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_feedforward(model)
