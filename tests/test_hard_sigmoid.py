"""Equilibria of the hard sigmoid ``clip(a, 0, 1)``: solvers, gradients, pairs, and who refuses it by name."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq import Box, Region, bound, gauge
from verideq.attacks.opened import open_model
from verideq.certify import certify, prepare
from verideq.certify.budget import Budget
from verideq.certify.constants import lipschitz_constants
from verideq.certify.exact import minimum
from verideq.certify.lirpa.recording import record
from verideq.certify.method import Query
from verideq.equilibrium import (
    ACTIVATIONS,
    HARD_SIGMOID,
    RELU,
    Anderson,
    Auto,
    Broyden,
    Equilibrium,
    ForwardBackward,
    Gradient,
    Implicit,
    PeacemanRachford,
    Phantom,
    Picard,
    Solver,
    solve,
)
from verideq.equilibrium.activations import activation_of
from verideq.errors import InputError, ModelError, NoGaugeError, UnsupportedOperation
from verideq.graph import trace
from verideq.parametrizations import MonDEQ
from verideq.status import Status
from verideq.testing.exact import equilibrium, exact
from verideq.training.adjoint import adjoint_margins
from verideq.training.loss import Pass
from verideq.training.penalties import bound_penalty, jacobian_penalty

SOLVERS: list[Solver] = [
    Auto(tol=1e-13),
    Picard(tol=1e-13),
    Anderson(tol=1e-13),
    Broyden(tol=1e-13, max_steps=100),
    ForwardBackward(tol=1e-10, max_steps=5000),
    PeacemanRachford(tol=1e-13),
]
GRADIENTS: list[Gradient] = [Implicit(Auto(tol=1e-13)), Implicit(PeacemanRachford(tol=1e-13)), Phantom(60, 0.9)]


def dense(monotone: bool = False, solver: Solver = SOLVERS[0], gradient: Gradient = GRADIENTS[0]) -> Equilibrium:
    """Six units, some of each kind; by a gauge, or with factors and none. float64."""
    torch.manual_seed(3)
    fusion: nn.Module
    if monotone:
        fusion = MonDEQ.from_weights(torch.randn(6, 6), torch.randn(6, 6), 0.5)
    else:
        fusion = nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            fusion.weight.mul_(0.8 / fusion.weight.abs().sum(1, keepdim=True)).fill_diagonal_(-0.7)
    layer = Equilibrium(fusion, nn.Linear(3, 6), nn.Hardtanh(0, 1), solver, gradient=gradient).double()
    with torch.no_grad():
        layer.injection.weight.mul_(3)  # type: ignore[operator, union-attr]  # a tensor
        layer.injection.bias.copy_(torch.tensor([-1.0, 0.3, 0.6, 0.8, 2.5, 6.0]))  # type: ignore[operator, union-attr]  # likewise
    return layer


X = torch.rand(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def kinds(z: Tensor) -> set[float]:
    """Which of the two ends, and .5 for the inside, occur."""
    return {0.0 if v <= 0 else 1.0 if v >= 1 else 0.5 for v in z.flatten().tolist()}


def test_the_names_of_activations() -> None:
    assert set(ACTIVATIONS) == {"relu", "hard-sigmoid"}
    for spelling in (F.relu, torch.relu, torch.relu_, nn.ReLU, nn.ReLU(inplace=True), "relu", RELU):
        assert activation_of(spelling) == RELU
    for spelling in ("hard-sigmoid", nn.Hardtanh(0, 1), nn.Hardtanh(0.0, 1.0), HARD_SIGMOID):
        assert activation_of(spelling) == HARD_SIGMOID
    for other in (nn.Hardtanh(), nn.ReLU6(), nn.Tanh(), "tanh", F.gelu, None, nn.Sequential(nn.ReLU())):
        with pytest.raises(ModelError, match="one of relu, hard-sigmoid"):
            activation_of(other)
    for torchs in (nn.Hardsigmoid(), F.hardsigmoid):
        with pytest.raises(ModelError, match=r"clip\(a/6 \+ 1/2, 0, 1\)"):
            activation_of(torchs)
    assert "activation=hard-sigmoid" in repr(dense())


def test_nan_stays_nan() -> None:
    x = torch.tensor([torch.nan, -torch.inf, torch.inf])
    for activation in ACTIVATIONS.values():
        assert activation(x).isnan().tolist() == [True, False, False]
        assert activation.pair(x[:1], torch.zeros(1)).isnan().all()
        assert bool(activation.box(Box(x[:1], x[:1])).lower.isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=str)
def test_a_pair_is_the_image_of_its_interval(activation: object) -> None:
    σ = activation_of(activation)
    center, radius = 3 * torch.randn(500, dtype=torch.float64), torch.rand(500, dtype=torch.float64)
    for size in (2.0, 0.5, 0.0):
        c, r = σ.pair(center, size * radius)
        assert bool((r >= 0).all())
        for end, sign in ((c - r, -1), (c + r, 1)):
            assert torch.allclose(end, σ(center + sign * size * radius), rtol=0, atol=1e-15)
    # A radius far below the rounding of its centre is kept where the unit is inside, and only there.
    c, r = σ.pair(torch.tensor([0.5, 2.0, -1.0]), torch.full((3,), 1e-30))
    assert r.tolist() == [pytest.approx(1e-30), 0.0 if σ is HARD_SIGMOID else pytest.approx(1e-30), 0.0]
    assert c.tolist() == [0.5, 1.0 if σ is HARD_SIGMOID else 2.0, 0.0]


@pytest.mark.parametrize("monotone", [False, True], ids=["gauge", "monotone"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_every_solver_finds_the_exact_equilibrium(solver: Solver, monotone: bool) -> None:
    layer = dense(monotone, solver)
    if monotone and isinstance(solver, Picard | Anderson | Broyden):
        solver = Auto(tol=1e-13)  # the others need a gauge
        layer.solver = solver
    z = solve(layer, X).value
    assert kinds(z) == {0.0, 0.5, 1.0}
    v = layer.injection(X)
    W = torch.stack([layer.operator().apply(row[None])[0] for row in torch.eye(6).double()], 1).detach()
    for i in range(4):
        truth = equilibrium(exact(W), exact(v[i]), Fraction(1))
        assert torch.allclose(z[i], torch.tensor([float(t) for t in truth]).double(), atol=1e-9)


@pytest.mark.parametrize(
    ("gradient", "monotone"),
    [(GRADIENTS[0], False), (GRADIENTS[1], False), (GRADIENTS[2], False), (GRADIENTS[0], True)],
    ids=["implicit", "split", "phantom", "monotone"],
)
def test_gradients_are_those_of_differences(gradient: Gradient, monotone: bool) -> None:
    layer = dense(monotone, Auto(tol=1e-14), gradient)
    name = "fusion.A" if monotone else "fusion.weight"
    value = dict(layer.named_parameters())[name].detach().clone().requires_grad_()

    def run(weight: Tensor, x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {name: weight}, (x,))
        return result

    assert torch.autograd.gradcheck(run, (value, X[:3].clone().requires_grad_()), atol=1e-5, fast_mode=True)


def test_gradients_of_a_pair() -> None:
    layer = dense()
    layer.injection = nn.Identity()
    layer.solver = Auto(tol=1e-14)
    weight = layer.fusion.weight.detach().clone().requires_grad_()  # type: ignore[union-attr, operator]  # a tensor
    center = torch.tensor([[-1.0, 0.2, 0.5, 0.9, 2.2, 3.0]]).double().requires_grad_()
    radius = torch.tensor([[0.1, 0.4, 0.1, 0.7, 0.3, 0.5]]).double().requires_grad_()

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, c: Tensor, r: Tensor) -> Tensor:
            return torch.stack(self.layer.equilibrate_ball(c, r))

    def run(W: Tensor, c: Tensor, r: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(Called(), {"layer.fusion.weight": W}, (c, r))
        return result

    c, r = run(weight, center, radius)
    inside = (c - r > 0) & (c + r < 1)
    assert inside.any() and ((c - r <= 0) & (c + r > 0)).any() and ((c - r < 1) & (c + r >= 1 - 1e-12)).any()
    assert torch.autograd.gradcheck(run, (weight, center, radius), atol=1e-5)


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(dense(), nn.Linear(6, 3).double()).eval()


RELU_ONLY = ("quadratic", "branch-and-bound", "exact", "lipschitz")


@pytest.mark.parametrize("method", RELU_ONLY)
def test_methods_for_relu_say_so(method: str) -> None:
    reason = f"method {method} is for ReLU equilibria; 0 is hard-sigmoid: use adjoint-refined"
    with pytest.raises(ModelError, match=reason):
        bound(net(), Region(X[:1], 0.01), method=method)
    with pytest.raises(ModelError, match=reason):
        certify(net(), X[:1], torch.zeros(1, dtype=torch.long), "1/100", method=method)


def test_auto_never_leaves_the_methods_that_know_it() -> None:
    prepared = prepare(net())
    assert Budget(timeout=5.0).methods(prepared) == ("interval", "adjoint", "adjoint-ascent")
    # With a monotone layer behind it, too, for which the quadratic bound would be.
    torch.manual_seed(5)
    monotone = Equilibrium(MonDEQ.from_weights(torch.randn(4, 4), 2 * torch.randn(4, 4), 1.0), nn.Linear(6, 4))
    mixed = prepare(nn.Sequential(dense(), monotone, nn.Linear(4, 3)).double().eval())
    assert mixed.monotone and Budget(timeout=5.0).methods(mixed) == ("interval", "adjoint", "adjoint-ascent")
    labels = mixed.graph(X).argmax(1)
    verdicts = certify(mixed, X, labels, "1/1000", timeout=5.0)
    assert all(v.status is not Status.ERROR for v in verdicts) and any(v.certified for v in verdicts)
    labels = prepared.graph(X).argmax(1)
    verdicts = certify(prepared, X, labels, "1/100", attack="pgd", timeout=20.0)
    assert {v.status for v in verdicts} <= {Status.CERTIFIED, Status.FALSIFIED, Status.UNKNOWN}
    assert all(v.checked for v in verdicts if v.certified) and sum(v.certified for v in verdicts) >= 4


def test_without_a_gauge_nothing_is_certified() -> None:
    layer = dense(monotone=True)
    with torch.no_grad():
        layer.fusion.B.mul_(50)  # type: ignore[operator, union-attr]  # a tensor
    with pytest.raises(NoGaugeError):
        gauge(layer)
    model = nn.Sequential(layer, nn.Linear(6, 3).double()).eval()
    prepared = prepare(model)
    assert list(prepared.missing) == ["0"] and not prepared.monotone
    verdicts = certify(prepared, X[:2], prepared.graph(X[:2]).argmax(1), "1/1000")
    assert [v.status for v in verdicts] == [Status.UNKNOWN] * 2


def refused() -> dict[str, Callable[[], object]]:
    model = net()
    graph, region = prepare(model), Region(X[:1], 0.01)
    one = Pass(trace(model.train()))
    one.run(X)
    boxes = one.enclosed(Box(X - 0.1, X + 0.1))
    C = torch.ones(1, 1, 3).double()
    return {
        "penalty": lambda: bound_penalty(one, boxes, 0.5),
        "auto_LiRPA": lambda: record(dense(), torch.zeros(1, 6).double(), split=False),
        "integer program": lambda: minimum(graph, Query(region.box(), region, C, upper=False)),
    }


@pytest.mark.parametrize("name", ["penalty", "auto_LiRPA", "integer program"])
def test_what_is_for_relu_only_refuses(name: str) -> None:
    with pytest.raises((InputError, UnsupportedOperation), match="ReLU"):
        refused()[name]()


def test_a_lipschitz_constant_holds_by_the_gauge_alone() -> None:
    model = net()
    constant = lipschitz_constants(model, shape=(3,)).flatten()
    moved = (X - X.roll(1, 0)).abs().amax(1, keepdim=True)
    with torch.no_grad():
        change = (model(X) - model(X.roll(1, 0))).abs()
    assert bool((change <= moved * constant.max() * (1 + 1e-9)).all())


def test_the_adjoint_bound_of_a_training_pass_is_below_the_margins() -> None:
    one = Pass(trace(net().train()))
    one.run(X)
    box = Box((X - 0.05).clamp(0, 1), (X + 0.05).clamp(0, 1))
    boxes = one.enclosed(box)
    labels = one.clean[one.graph.nodes[-1].name].argmax(1)
    least = adjoint_margins(one, boxes, labels, 5)
    ways = torch.rand(50, *X.shape, generator=torch.Generator().manual_seed(1)).double().round()
    with torch.no_grad():
        outputs = one.graph((box.lower + ways * box.width).flatten(0, 1)).view(50, len(X), -1)
    margins = outputs.gather(2, labels.expand(50, -1)[:, :, None]) - outputs
    assert bool((least <= margins.amin(0) + 1e-9).all()) and bool((least < 0).any() | (least > 0).any())
    least.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in one.graph.parameters() if p.grad is not None)


def test_the_jacobian_is_that_of_units_inside() -> None:
    model = net()
    one = Pass(trace(model.train()))
    one.run(X)
    layer = model[0]
    with torch.no_grad():
        z = layer(X)
        penalty = jacobian_penalty(one, torch.Generator().manual_seed(0))
        v = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
        expected = (torch.where((z > 0) & (z < 1), v, 0.0) @ layer.fusion.weight).square().mean()
    assert torch.allclose(penalty.double(), expected)


def test_an_opened_model_steps_as_the_layer() -> None:
    model = net()
    dynamics = open_model(model)
    injected = dynamics.inject(X)
    z = dynamics.settle(injected)
    assert torch.allclose(dynamics.step(z, injected), z, atol=1e-5) and kinds(z) == {0.0, 0.5, 1.0}
    assert torch.allclose(dynamics.head(z, injected), model(X), atol=1e-5)
