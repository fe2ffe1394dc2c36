"""Models opened up: the forward path, and the gradients at its states against long unrollings."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.attacks.opened import GraphDynamics, PlainDynamics, open_model
from verideq.equilibrium import DEQ, Anderson, Auto, Broyden, Dynamics, Equilibrium, Implicit, Phantom, Picard, path
from verideq.equilibrium.broyden import broyden
from verideq.equilibrium.dynamics import TRACK
from verideq.equilibrium.surrogates import Final, Simultaneous, Slope, Surrogate, Through, Unrolled
from verideq.errors import InputError
from verideq.models.zoo import conv_deq, linear_deq
from verideq.parametrizations import RowGauge

LABELS = torch.tensor([0, 2, 1])


def inputs(*shape: int) -> Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Cell(nn.Module):
    """``tanh(A z + v)`` with a contraction that no verideq layer is."""

    def __init__(self, units: int = 6, gain: float = 0.7) -> None:
        super().__init__()
        A = torch.randn(units, units, generator=torch.Generator().manual_seed(3))
        self.A = nn.Parameter(gain * A / torch.linalg.matrix_norm(A, 2))

    def forward(self, z: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(z @ self.A.T + v)


def general(gradient: Implicit | Phantom = Implicit(Auto(tol=1e-12)), steps: int = 40, gain: float = 0.7) -> DEQ:
    torch.manual_seed(0)
    model = DEQ(
        nn.Linear(5, 6), Cell(gain=gain), nn.Linear(6, 4), solver=Broyden(tol=1e-13, max_steps=steps), gradient=gradient
    )
    return model.double().eval()


def gauged(kind: str) -> Dynamics:
    torch.manual_seed(0)
    if kind == "dense":
        return open_model(linear_deq((5,), 4, RowGauge.apply, width=7), tol=1e-14, backward_tol=1e-13)
    model = conv_deq((2, 4, 4), 4, RowGauge.apply, width=3, stride=1).eval()
    return open_model(model, tol=1e-14, backward_tol=1e-13)


OPENED = {
    "dense": (lambda: gauged("dense"), (5,)),
    "convolution": (lambda: gauged("convolution"), (2, 4, 4)),
    "general": (general, (5,)),
}


def entropy(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, LABELS, reduction="none")


def unrolled_gradient(dynamics: Dynamics, x: Tensor, steps: int = 400) -> Slope:
    """By autograd through plain iteration from zero."""
    at = x.clone().requires_grad_()
    injected = dynamics.inject(at)
    z = dynamics.start(injected)
    for _ in range(steps):
        z = dynamics.step(z, injected)
    outputs = dynamics.head(z, injected)
    losses = entropy(outputs)
    (gradient,) = torch.autograd.grad(losses.sum(), at)
    return Slope(losses, gradient, outputs)


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize(
    "surrogate",
    [
        Final(Implicit(Auto(tol=1e-13))),
        Final(Implicit(Broyden(tol=1e-13, max_steps=60))),
        Final(Phantom(120, 0.9)),
        Unrolled((3,), 400, 1.0),
        Unrolled((8,), 400, 0.8, Picard(max_steps=8)),
        Simultaneous((60,), 1.0),
        Simultaneous((120,), 0.5),
        Simultaneous((250,), 1.0),
        Through((40,)),
    ],
    ids=lambda s: s.name,
)
def test_every_surrogate_converges_to_the_exact_gradient(kind: str, surrogate: Surrogate) -> None:
    build, shape = OPENED[kind]
    dynamics, x = build(), inputs(*shape)
    wanted, found = unrolled_gradient(dynamics, x), surrogate.slope(dynamics, x, entropy)
    torch.testing.assert_close(found.gradient, wanted.gradient, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.outputs, wanted.outputs, rtol=1e-8, atol=1e-8)


def test_the_simultaneous_adjoint_comes_closer_with_every_state() -> None:
    dynamics, x = general(), inputs(5)
    exact = unrolled_gradient(dynamics, x).gradient
    errors = [
        float((Simultaneous((n,)).slope(dynamics, x, entropy).gradient - exact).norm() / exact.norm())
        for n in (1, 4, 8, 16)
    ]
    assert errors[0] > 1e-2 > 1e-5 > errors[2] > 1e-9 > errors[3]
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_the_first_adjoint_is_the_gradient_at_zero() -> None:
    """u_1 = β ∇L(z_0), so z_1 with lag 0 is attacked through f(z_1) with it (facts of the paper's equations)."""
    dynamics, x = general(), inputs(5)
    injected = dynamics.inject(x)
    z0 = dynamics.start(injected).requires_grad_()
    (u1,) = torch.autograd.grad(entropy(dynamics.head(z0, injected)).sum(), z0)
    at = x.clone().requires_grad_()
    tracked = dynamics.inject(at)
    z1 = path(dynamics, tracked, TRACK, 1).states[0]
    (wanted,) = torch.autograd.grad((dynamics.step(z1, tracked) * 0.5 * u1).sum(), at)
    found = Simultaneous((1,), beta=0.5, lag=0).slope(dynamics, x, entropy).gradient
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_a_state_is_attacked_with_the_adjoint_of_the_step_after_it(beta: float) -> None:
    """``z_n`` with ``u_{n+1}``, sample by sample, Broyden's inverse and the Jacobians as matrices."""
    dynamics, x = general(gain=2.5), inputs(5)
    for lag in (0, 1, None):
        found = {n: Simultaneous((n,), beta, *([] if lag is None else [lag])) for n in (1, 2, 3, 5)}
        gradients = {n: surrogate.slope(dynamics, x, entropy).gradient for n, surrogate in found.items()}
        for i in range(3):
            v = dynamics.stem(x[i])
            weight: Tensor = dynamics.classifier.weight  # type: ignore[assignment]  # a Linear's

            def f(z: Tensor, v: Tensor = v) -> Tensor:
                return dynamics.cell(z[None], v[None])[0]

            z, u, B = torch.zeros(6).double(), torch.zeros(6).double(), -torch.eye(6).double()
            states, adjoints = [z], [u]
            for _ in range(6):
                J = torch.autograd.functional.jacobian(f, z)
                wrong = torch.softmax(dynamics.classifier(z), 0) - F.one_hot(LABELS[i], 4)
                u = u - beta * B.T @ (J.T @ u + weight.T @ wrong - u)
                new = z - B @ (f(z) - z)
                dz, dg = new - z, f(new) - new - f(z) + z
                B = B + torch.outer(dz - B @ dg, dz @ B) / (dz @ B @ dg)
                z = new
                states.append(z)
                adjoints.append(u)
            for n, gradient in gradients.items():
                by_v = 1 - f(states[n]) ** 2  # the derivative of tanh
                wanted = (by_v * adjoints[n + (1 if lag is None else lag)]) @ dynamics.stem.weight
                torch.testing.assert_close(gradient[i], wanted, rtol=1e-9, atol=1e-10)


def test_an_ensemble_is_the_sum_of_its_states() -> None:
    dynamics, x = general(), inputs(5)
    for of in (lambda n: Unrolled(n, 2, 0.5), Simultaneous):
        together = of((1, 2, 3)).slope(dynamics, x, entropy)
        apart = [of((n,)).slope(dynamics, x, entropy) for n in (1, 2, 3)]
        torch.testing.assert_close(together.gradient, sum(s.gradient for s in apart))
        torch.testing.assert_close(together.losses, sum(s.losses for s in apart))
        torch.testing.assert_close(together.outputs, sum(s.outputs for s in apart) / 3)


def test_one_unrolled_step_is_what_the_formula_says() -> None:
    dynamics, x = general(), inputs(5)
    at = x.clone().requires_grad_()
    injected = dynamics.inject(at)
    z = path(dynamics, injected, TRACK, 2).states[1]
    z = 0.5 * z + 0.5 * dynamics.step(z, injected)
    z = 0.5 * z + 0.5 * dynamics.step(z, injected)
    losses = entropy(dynamics.head(z, injected))
    (wanted,) = torch.autograd.grad(losses.sum(), at)
    torch.testing.assert_close(Unrolled((2,), 2, 0.5).slope(dynamics, x, entropy).gradient, wanted)


def test_the_path_of_broyden_is_that_of_the_dense_formula() -> None:
    """Equations 7 and 8 with matrices, sample by sample."""
    dynamics, x = general(), inputs(5)
    injected = dynamics.inject(x)
    found = path(dynamics, injected, Broyden(max_steps=6))
    for sample in range(len(x)):
        own = dynamics.inject(x[sample : sample + 1])

        def g(z: Tensor, own: object = own) -> Tensor:
            return (dynamics.step(z[None], own) - z[None])[0].detach()  # type: ignore[arg-type]  # a mapping

        z, B = torch.zeros(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)
        for n in range(6):
            new = z - B @ g(z)
            dz, dg = new - z, g(new) - g(z)
            B = B + torch.outer(dz - B @ dg, dz @ B) / (dz @ B @ dg)
            z = new
            torch.testing.assert_close(found.states[n, sample], z)
            torch.testing.assert_close(found.residuals[n, sample], g(z).norm() / (g(z) + z).norm())
    first = dynamics.step(dynamics.start(injected), injected)
    torch.testing.assert_close(found.states[0], first)


def test_the_inverse_and_its_transpose_are_one_matrix() -> None:
    dynamics, x = general(), inputs(5)
    injected = dynamics.inject(x)
    iterates = broyden(lambda z: dynamics.step(z, injected), dynamics.start(injected))
    for _ in range(5):
        inverse = next(iterates).inverse
    eye = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    matrix = torch.stack([inverse.apply(eye[:, i]) for i in range(6)], 2)
    other = torch.stack([inverse.transpose(eye[:, i]) for i in range(6)], 1)
    torch.testing.assert_close(matrix, other)


def test_picard_states_are_plain_iterates_and_other_solvers_have_none() -> None:
    dynamics, x = general(), inputs(5)
    injected = dynamics.inject(x)
    z = dynamics.start(injected)
    for state in path(dynamics, injected, Picard(max_steps=4)).states:
        z = dynamics.step(z, injected)
        torch.testing.assert_close(state, z)
    with pytest.raises(InputError, match="Broyden or Picard"):
        path(dynamics, injected, Anderson())


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_broyden_stops_at_the_iterate_of_lowest_residual(steps: int) -> None:
    model, x = general(steps=steps, gain=2.5), inputs(5)
    injected = model.inject(x)
    track = path(model, injected, Broyden(max_steps=steps))
    solution = model.solve(injected)
    torch.testing.assert_close(solution.residual, track.residuals.amin(0))
    best = track.residuals.argmin(0)
    torch.testing.assert_close(solution.value[0], track.states[best, torch.arange(3)])


def test_a_broyden_equilibrium_is_the_equilibrium() -> None:
    torch.manual_seed(0)
    fusion = RowGauge.apply(nn.Linear(6, 6, bias=False))
    layer = Equilibrium(fusion, nn.Linear(4, 6)).double()
    again = Equilibrium(layer.fusion, layer.injection, solver=Broyden(tol=1e-12, max_steps=60))
    torch.testing.assert_close(layer(inputs(4)), again(inputs(4)), rtol=1e-8, atol=1e-9)
    center, radius = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    layer.solver = Picard(tol=1e-13)  # `Auto` solves the rows for their own unknowns, which makes narrower pairs
    for plain, quick in zip(
        layer.equilibrate_ball(center, radius), again.equilibrate_ball(center, radius), strict=True
    ):
        torch.testing.assert_close(plain, quick, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(3, 0.5)], ids=repr)
def test_a_general_deq_hands_on_one_more_application(gradient: Implicit | Phantom) -> None:
    model, x = general(gradient, steps=3), inputs(5)
    injected = model.inject(x)
    z = model.settle(injected)
    if isinstance(gradient, Implicit):
        z = model.step(z, injected)
    else:
        for _ in range(3):
            z = 0.5 * z + 0.5 * model.step(z, injected)
    torch.testing.assert_close(model(x), model.classifier(z))
    torch.testing.assert_close(model.outputs(x), model.classifier(z))


def test_an_unconverged_exact_gradient_is_not_that_of_the_outputs() -> None:
    """What obfuscates: few steps, a map that does not contract."""
    model, x = general(Implicit(Broyden(max_steps=7)), steps=4, gain=4.0), inputs(5)
    found = Final().slope(model, x, entropy).gradient
    at = x.clone()
    differences = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for sign in (1, -1):
            at = x.clone()
            at[:, i] += sign * 1e-6
            differences[:, i] += sign * entropy(model.outputs(at)) / 2e-6
    assert float(F.cosine_similarity(found.flatten(), differences.flatten(), dim=0)) < 0.9
    converged = general(steps=60)
    exact = Final().slope(converged, x, entropy).gradient
    torch.testing.assert_close(exact, unrolled_gradient(converged, x).gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gradient", [Implicit(Broyden(max_steps=7)), Phantom(5, 0.5)], ids=["implicit", "phantom"])
@pytest.mark.parametrize("states", [(), (1,), (4,), (1, 2, 3, 4)])
def test_through_the_solver_it_is_the_gradient_of_an_unconverged_state(
    states: tuple[int, ...], gradient: Implicit | Phantom
) -> None:
    model, x = general(gradient, steps=5, gain=4.0), inputs(5)

    def losses(at: Tensor) -> Tensor:
        injected = model.inject(at)
        if not states:
            return entropy(model.outputs(at))
        every = path(model, injected, steps=max(states))
        return entropy(model.head(every.states[[n - 1 for n in states]].mean(0), injected))

    with torch.no_grad():
        residual = path(model, model.inject(x), steps=5).residuals.min(0).values
        shift = 1e-6 * torch.eye(5).double()
        differences = torch.stack([(losses(x + d) - losses(x - d)) / 2e-6 for d in shift], 1)
    found = Through(states).slope(model, x, entropy)
    assert float(residual.min()) > 0.02
    torch.testing.assert_close(found.losses, losses(x).detach())
    torch.testing.assert_close(found.gradient, differences, rtol=1e-5, atol=1e-6)


def test_through_the_solver_stops_where_the_model_stops() -> None:
    """At a tolerance, by sample; and before iterates that are no numbers."""
    torch.manual_seed(0)
    W, x = torch.randn(5, 5).double(), 2 * inputs(5)
    for cell, solver in (
        (lambda z, v: torch.tanh(0.3 * z @ W + v), Broyden(tol=0.05, max_steps=20)),
        (lambda z, v: v + 100 * (z @ W) ** 3, Broyden(max_steps=30)),
    ):
        model = DEQ(nn.Linear(5, 5), cell, nn.Linear(5, 3), solver=solver, gradient=Phantom(1, 0.1)).double()
        found = Through().slope(model, x, entropy)
        torch.testing.assert_close(found.outputs, model.outputs(x), rtol=1e-9, atol=1e-9)
        assert bool(found.gradient.isfinite().all())


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize(
    "surrogate", [Final(), Unrolled((3,), 2), Simultaneous((3,)), Through((2, 3))], ids=lambda s: s.name
)
def test_no_sample_sees_another(kind: str, surrogate: Surrogate) -> None:
    build, shape = OPENED[kind]
    dynamics, x = build(), inputs(*shape)
    together = surrogate.slope(dynamics, x, entropy).gradient
    for i in range(3):
        alone = surrogate.slope(
            dynamics, x[i : i + 1], lambda f, i=i: F.cross_entropy(f, LABELS[i : i + 1], reduction="none")
        )
        torch.testing.assert_close(alone.gradient[0], together[i], rtol=1e-9, atol=1e-11)


def test_opening_is_the_model() -> None:
    torch.manual_seed(0)
    model, x = conv_deq((1, 6, 6), 3, RowGauge.apply, width=2).double().eval(), inputs(1, 6, 6)
    opened = open_model(model, tol=1e-12)
    assert isinstance(opened, GraphDynamics)
    torch.testing.assert_close(opened.outputs(x), model(x).detach(), rtol=1e-9, atol=1e-9)
    injected = opened.inject(x)
    torch.testing.assert_close(opened.step(opened.settle(injected), injected), opened.settle(injected))
    plain = open_model(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double())
    assert isinstance(plain, PlainDynamics)
    slopes = [s.slope(plain, x, entropy).gradient for s in (Final(), Unrolled((2,), 3), Simultaneous((2,)))]
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(slopes[0], slopes[2])
    # Of what cannot be traced the outputs alone are looked at.
    opaque = open_model(nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(36, 3)))
    assert isinstance(opaque, PlainDynamics)
    assert Final().slope(opaque, x, entropy).outputs.dtype == torch.float64


@pytest.mark.parametrize(
    "build",
    [
        lambda: Unrolled(()),
        lambda: Unrolled((-1,)),
        lambda: Unrolled((1,), 0),
        lambda: Unrolled((1,), 1, 0.0),
        lambda: Simultaneous((0,)),
        lambda: Simultaneous((1,), 2.0),
        lambda: Through((0,)),
    ],
)
def test_impossible_surrogates_are_refused(build: object) -> None:
    with pytest.raises(InputError):
        build()  # type: ignore[operator]  # a function
