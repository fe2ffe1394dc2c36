"""Factored monotone layers: the operator and its rounding, solvers, gradients, the model file, the class MonDEQ."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import verideq
from verideq import Equilibrium, gauge, load_model, save_model, solve
from verideq.box import gamma
from verideq.equilibrium import (
    Auto,
    ForwardBackward,
    Implicit,
    MonotoneDense,
    MonotoneFusion,
    PeacemanRachford,
    Phantom,
    Picard,
    Solver,
    monotonicity,
    operator_of,
)
from verideq.equilibrium.layer import SOLVERS
from verideq.equilibrium.monotone import _symbol_norm
from verideq.equilibrium.monotonicity import proved_m
from verideq.equilibrium.operators import exactly
from verideq.errors import ConvergenceError, InputError, ModelError, ParametrizationError
from verideq.graph import model_hash, trace
from verideq.parametrizations import MonDEQ
from verideq.region import Region
from verideq.testing.exact import equilibrium, exact, matrix

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
LAYERS = {
    "square": ((9,), (9, 9), "zeros"),
    "wide": ((9,), (3, 9), "zeros"),
    "tall": ((5,), (8, 5), "zeros"),
    "circular": ((3, 5, 4), (3, 3, 3, 3), "circular"),
    "zeros": ((3, 5, 4), (3, 3, 3, 3), "zeros"),
    "oblong": ((2, 4, 6), (2, 2, 1, 5), "zeros"),
}


def draw(name: str, m: float = 0.5, dtype: torch.dtype = torch.float64, seed: int = 0) -> MonotoneFusion:
    shape, kernel, mode = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    units = (shape[0], shape[0]) if len(kernel) == 2 else kernel
    A, B = (
        torch.randn(size, generator=generator, dtype=dtype) / math.prod(size[1:]) ** 0.5 for size in (kernel, units)
    )
    return MonDEQ.from_weights(A, B, m, mode)


def inject(shape: tuple[int, ...], batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(operator: verideq.equilibrium.Operator, shape: tuple[int, ...]) -> Tensor:
    """The matrix of an operator."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return operator.map(exactly).apply(units).flatten(1).T


def least(W: Tensor) -> float:
    return float(torch.linalg.eigvalsh(torch.eye(len(W)) - (W + W.T) / 2)[0])


def big(units: int, m: float = 20.0, inputs: int = 784) -> tuple[MonotoneFusion, nn.Linear]:
    """A layer with the sizes of the public MNIST models."""
    torch.manual_seed(units)
    fusion = MonDEQ.apply(nn.Linear(units, units, bias=False), m)
    with torch.no_grad():
        fusion.A.mul_(6)
        fusion.B.mul_(12)
    return fusion.double(), nn.Linear(inputs, units).double()


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("kernel", "dilation", "groups", "padding"),
    [((3, 3), 1, 1, 1), ((3, 5), 1, 2, "same"), ((2, 4), 1, 1, "same"), ((3, 3), 2, 4, "same"), ((2, 3), 1, 1, "same")],
)
def test_the_transposed_operator_is_the_adjoint(
    mode: str, kernel: tuple[int, int], dilation: int, groups: int, padding: object
) -> None:
    torch.manual_seed(0)
    options = {"padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode, "bias": False}
    operator = operator_of(nn.Conv2d(4, 4, kernel, **options).double())  # type: ignore[arg-type]  # by name
    W = dense(operator, (4, 6, 5)).detach()
    adjoint = operator.transpose()
    assert torch.allclose(dense(adjoint, (4, 6, 5)).detach(), W.T, atol=1e-14)
    assert torch.allclose(dense(adjoint.transpose(), (4, 6, 5)).detach(), W, atol=1e-14)
    # Several taps may meet in one entry where the padding copies pixels; their absolute values add up there.
    absolute = dense(operator.absolute(), (4, 6, 5)).detach()
    assert bool((absolute >= W.abs() - 1e-14).all())
    for other in (operator.absolute().transpose(), adjoint.absolute()):
        assert torch.allclose(dense(other, (4, 6, 5)).detach(), absolute.T, atol=1e-14)
    y, z = inject((4, 6, 5)), inject((4, 6, 5), seed=2)
    products = (operator.apply(z) * y).sum(), (z * operator.transpose().apply(y)).sum()
    assert torch.allclose(*products, rtol=1e-12)
    inner = W.view(4, 6, 5, 4, 6, 5)[:, 3, 2, :, 3, 2].diagonal()
    assert torch.equal(operator.diagonal().flatten().detach(), inner)


@pytest.mark.parametrize("name", ["square", "circular"])
def test_a_snapshot_that_is_first_used_without_gradients_still_has_them(name: str) -> None:
    fusion, z = draw(name), inject(LAYERS[name][0])
    operator = fusion.operator()
    with torch.no_grad():
        operator.apply(z)
        operator.norms()
    operator.apply(z).square().sum().backward()
    mine = [p.grad for p in fusion.parameters()]
    fusion.zero_grad()
    fusion(z).square().sum().backward()
    for gradient, p in zip(mine, fusion.parameters(), strict=True):
        assert gradient is not None and p.grad is not None and torch.equal(gradient, p.grad) and bool(p.grad.any())


def test_dense_operators_transpose_and_have_a_diagonal() -> None:
    W = torch.arange(9.0).view(3, 3)
    operator = verideq.equilibrium.Dense(W)
    assert torch.equal(operator.transpose().weight, W.T)
    assert torch.equal(operator.diagonal(), torch.tensor([0.0, 4.0, 8.0]))


@pytest.mark.parametrize("name", LAYERS)
def test_the_operator_is_the_formula(name: str) -> None:
    shape, kernel, mode = LAYERS[name]
    fusion, m = draw(name, dtype=torch.float32), 0.5
    operator = fusion.operator()
    W = dense(operator, shape).detach()
    if len(kernel) == 2:
        A, B = fusion.A.detach().double(), fusion.B.detach().double()
    else:
        options = {"padding": "same", "padding_mode": mode, "bias": False}
        A, B = (
            dense(operator_of(_convolution(weight, options)), shape)
            for weight in (fusion.A.detach(), fusion.B.detach())
        )
    wanted = (1 - m) * torch.eye(len(W)) - A.T @ A + B - B.T
    assert torch.allclose(W, wanted, atol=1e-14)
    truth = matrix(operator, shape)
    assert np.abs(truth.astype(np.float64) - wanted.numpy()).max() < 1e-14
    size = exact(dense(operator.absolute(), shape))
    assert bool((np.abs(exact(W) - truth) <= Fraction(gamma(operator.terms)) * size).all())
    assert torch.allclose(dense(operator.transpose(), shape).detach(), wanted.T, atol=1e-14)
    assert least(W) >= m - 1e-12
    assert bool((dense(operator.absolute(), shape).detach() >= W.abs()).all())
    z = inject(shape).float()
    assert torch.allclose(fusion(z).double().flatten(1), z.double().flatten(1) @ W.T, atol=1e-5)
    symmetric, skew = operator.norms()
    parts = torch.eye(len(W)) - (W + W.T) / 2, (W - W.T) / 2
    for bound, part in zip((symmetric, skew), parts, strict=True):
        assert bound >= (1 - 1e-5) * float(torch.linalg.matrix_norm(part, 2))
    # The step of forward-backward contracts.
    step = torch.eye(len(W)) * (1 - operator.damping()) + operator.damping() * W
    assert float(torch.linalg.matrix_norm(step, 2)) < 1


def _convolution(weight: Tensor, options: dict[str, object]) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), **options)  # type: ignore[arg-type]  # by name
    layer.weight = nn.Parameter(weight.double(), requires_grad=False)
    return layer


@pytest.mark.parametrize("seed", range(5))
def test_the_norm_of_a_symbol_bounds_that_of_the_convolution_on_every_image(seed: int) -> None:
    kernel = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bound = _symbol_norm(kernel)
    for mode in ("zeros", "circular"):
        layer = _convolution(kernel, {"padding": "same", "padding_mode": mode, "bias": False})
        for size in ((2, 5, 5), (2, 7, 9)):
            assert float(torch.linalg.matrix_norm(dense(operator_of(layer), size), 2)) <= bound
    assert bound <= 2 * float(torch.linalg.matrix_norm(dense(operator_of(layer), (2, 9, 11)), 2))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e8])
def test_the_rounding_of_a_product_of_factors_is_charged(scale: float) -> None:
    """``W`` cancels from large products: what its rounding loses has to be inside of what the bounds allow for."""
    torch.manual_seed(0)
    A = (scale * torch.randn(7, 6)).double()
    fusion = MonDEQ.from_weights(A, scale * scale * torch.randn(6, 6).double(), 0.3)
    operator = fusion.operator().map(exactly)
    W = matrix(fusion.operator(), (6,))
    lost = np.abs(exact(operator.apply(torch.eye(6, dtype=torch.float64)).T) - W)
    bound = exact(operator.absolute_units())
    assert bool((np.abs(W) <= bound).all())
    assert bool((lost <= Fraction(gamma(operator.terms)) * bound).all()) and bool((lost > 0).any())
    rows, factor = operator.solved()
    moved = np.abs(
        exact(rows.apply(torch.eye(6, dtype=torch.float64)).T) - (W - np.diag(_own(operator))) * _column(factor)
    )
    allowed = Fraction(gamma(rows.terms)) * exact(rows.absolute_units())
    assert bool((moved <= allowed).all())


def _own(operator: MonotoneDense) -> np.ndarray:
    return exact(operator.diagonal().contiguous())


def _column(factor: Tensor) -> np.ndarray:
    return exact(factor)[:, None]


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_a_factored_layer_with_a_gauge_hold_the_exact_equilibria(seed: int) -> None:
    torch.manual_seed(seed)
    fusion = MonDEQ.from_weights(0.3 * torch.randn(5, 5), 0.05 * torch.randn(5, 5), 0.8)
    layer = Equilibrium(fusion, nn.Linear(3, 5))
    assert gauge(layer).rate(layer) < 1
    center = torch.rand(2, 3, dtype=torch.float64)
    box = verideq.bound(layer, Region(center, "0.05"))
    W = matrix(fusion.operator(), (5,))
    U, bias = (
        exact(layer.injection.get_parameter("weight").detach()),
        exact(layer.injection.get_parameter("bias").detach()),
    )
    region = Region(center, "0.05").box()
    for i in range(2):
        for x in (center[i], region.lower[i], region.upper[i]):
            z = equilibrium(W, U @ exact(x) + bias)
            assert bool((exact(box.lower[i]) <= z).all()) and bool((z <= exact(box.upper[i])).all())
    assert bool((box.width < 0.5).all())


TIGHT = {"tol": 1e-13, "max_steps": 20_000}


@pytest.mark.parametrize("units", [40, 100, 200])
def test_the_solvers_agree_on_the_sizes_of_the_public_models(units: int) -> None:
    fusion, injection = big(units)
    x = torch.rand(8, 784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = {}
    for name in ("auto", "peaceman-rachford", "forward-backward"):
        layer = Equilibrium(fusion, injection, solver=replace(SOLVERS[name], **TIGHT))
        answers[name] = solve(layer, x).value
    W = fusion.operator().weight.detach()
    assert float(torch.linalg.eigvals(W.abs()).abs().max()) > 5  # no gauge, by far
    z = answers["auto"]
    assert float(torch.relu(z @ W.T + injection(x).detach()).sub(z).abs().max()) < 1e-10
    assert all(torch.allclose(z, other, rtol=0, atol=1e-10) for other in answers.values())
    assert float(z.max()) > 1e-3


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("solver", [Auto(), PeacemanRachford(), PeacemanRachford(alpha=3.0), ForwardBackward()])
def test_every_solver_reaches_the_equilibrium(name: str, solver: Solver) -> None:
    shape, fusion = LAYERS[name][0], draw(name)
    layer, v = Equilibrium(fusion, nn.Identity(), solver=replace(solver, **TIGHT)), inject(shape)
    z = solve(layer, v).value
    assert torch.allclose(z, torch.relu(fusion(z) + v).detach(), atol=1e-11)
    once = Equilibrium(fusion.float(), nn.Identity(), solver=replace(solver, max_steps=20_000))(v.float()).detach()
    assert torch.allclose(once.double(), z, atol=1e-3)


def test_picard_alone_would_not_do() -> None:
    fusion, injection = big(40)
    x = torch.rand(2, 784, dtype=torch.float64)
    with pytest.raises(ConvergenceError):
        Equilibrium(fusion, injection, solver=Picard())(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("solver", [Auto(**TIGHT), ForwardBackward(**TIGHT)])
def test_the_gradient_is_that_of_the_linear_system(name: str, solver: Solver) -> None:
    shape, fusion = LAYERS[name][0], draw(name, m=1.0)
    layer = Equilibrium(fusion, nn.Identity(), solver=solver, gradient=Implicit(Auto(**TIGHT)))
    v, upstream = inject(shape).requires_grad_(), inject(shape, seed=5)
    z = layer(v)
    (z * upstream).sum().backward()
    W = dense(fusion.operator(), shape).detach()
    active = (z.detach() > 0).double().flatten(1)
    wanted = torch.stack(
        [
            d * torch.linalg.solve(torch.eye(len(W)) - W.T * d, g)
            for d, g in zip(active, upstream.flatten(1), strict=True)
        ]
    )
    assert v.grad is not None and torch.allclose(v.grad.flatten(1), wanted, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_the_factors_is_that_of_finite_differences(name: str) -> None:
    shape, fusion = LAYERS[name][0], draw(name, m=1.0)
    v = inject(shape, batch=2)

    def run(A: Tensor, B: Tensor, v: Tensor) -> Tensor:
        layer = Equilibrium(fusion, nn.Identity(), solver=Auto(**TIGHT), gradient=Implicit(Auto(**TIGHT)))
        swapped = {"fusion.A": A, "fusion.B": B}
        result: Tensor = torch.func.functional_call(layer, swapped, (v,))
        return result

    free = tuple(t.detach().clone().requires_grad_() for t in (fusion.A, fusion.B, v))
    torch.manual_seed(0)  # for the directions of the fast mode
    assert torch.autograd.gradcheck(run, free, eps=1e-6, atol=1e-6, fast_mode=True)


def test_a_zero_padded_image_that_is_too_large_to_invert_is_solved_by_damped_steps() -> None:
    torch.manual_seed(0)
    fusion = MonDEQ.apply(nn.Conv2d(4, 4, 3, padding=1, bias=False), m=1.0).double()
    v = inject((4, 18, 18), batch=2).requires_grad_()
    layer = Equilibrium(fusion, nn.Identity(), solver=Auto(tol=1e-11), gradient=Implicit(Auto(tol=1e-11)))
    z = layer(v)
    assert torch.allclose(z, torch.relu(fusion(z) + v), atol=1e-8)
    upstream = inject((4, 18, 18), batch=2, seed=3)
    (z * upstream).sum().backward()
    assert v.grad is not None
    active = (z.detach() > 0).double()
    # v.grad = D y with y = g + Wᵀ D y
    y = upstream + fusion.operator().map(exactly).transpose().apply(v.grad)
    assert torch.allclose(v.grad, active * y, atol=1e-7)
    with pytest.raises(ModelError, match="small image"):
        Equilibrium(fusion, nn.Identity(), solver="peaceman-rachford")(v)


def test_a_phantom_gradient_of_a_monotone_layer_stays_of_its_size() -> None:
    fusion, injection = big(40)
    layer = Equilibrium(fusion, injection, gradient=Phantom(steps=20, damping=1.0))
    layer(torch.rand(4, 784, dtype=torch.float64)).sum().backward()
    gradient = injection.weight.grad
    assert gradient is not None and 0 < float(gradient.abs().max()) < 1e3


def test_a_dense_w_that_is_monotone_and_not_contracting_is_solved_all_the_same() -> None:
    """What a checkpoint with ``W`` alone becomes: nothing says that it is monotone, and Picard does not converge."""
    torch.manual_seed(0)
    skew = torch.randn(30, 30, dtype=torch.float64)
    W = -0.5 * torch.eye(30, dtype=torch.float64) + 2 * (skew - skew.T)
    layer = Equilibrium.from_matrices(W, torch.eye(30, dtype=torch.float64), gradient=Implicit(Auto(**TIGHT)))
    layer.solver = Auto(tol=1e-12, max_steps=2000)
    with pytest.raises(ConvergenceError):
        Equilibrium.from_matrices(W, torch.eye(30, dtype=torch.float64), solver=Picard())(inject((30,)))
    v = inject((30,)).requires_grad_()
    z = layer(v)
    assert torch.allclose(z, torch.relu(z @ W.T + v), atol=1e-9)
    z.sum().backward()
    d = (z.detach() > 0).double()
    wanted = torch.stack([row * torch.linalg.solve(torch.eye(30) - W.T * row, torch.ones(30).double()) for row in d])
    assert v.grad is not None and torch.allclose(v.grad, wanted, atol=1e-8)


def test_peaceman_rachford_wants_a_monotone_layer() -> None:
    layer = Equilibrium(nn.Linear(2, 2, bias=False), nn.Identity(), solver="peaceman-rachford")
    with torch.no_grad():
        layer.fusion.get_parameter("weight").copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ModelError, match="the smallest eigenvalue of I - sym W is -2"):
        layer(torch.ones(1, 2))
    with pytest.raises(ModelError, match="small image"):
        Equilibrium(nn.Conv2d(2, 2, 1, bias=False), nn.Identity(), solver="peaceman-rachford")(torch.ones(1, 2, 3, 3))
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="positive"):
            PeacemanRachford(alpha=alpha)


@pytest.mark.parametrize("name", ["square", "circular", "zeros"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_do_not_converge(name: str, bad: float) -> None:
    fusion = draw(name)
    with torch.no_grad():
        fusion.A.view(-1)[0] = bad
    with pytest.raises(ConvergenceError):
        Equilibrium(fusion, nn.Identity(), solver=Auto(max_steps=10))(inject(LAYERS[name][0]))


def test_an_interval_pair_of_a_contracting_member_encloses_its_points() -> None:
    torch.manual_seed(0)
    fusion = MonDEQ.from_weights(0.3 * torch.randn(5, 5).double(), 0.05 * torch.randn(5, 5).double(), 0.8)
    for solver in (Auto(tol=1e-12), PeacemanRachford(tol=1e-12)):
        layer = Equilibrium(fusion, nn.Identity(), solver=solver)
        v = inject((5,))
        center, radius = layer.equilibrate_ball(v, torch.full_like(v, 0.1))
        for shift in (-0.1, 0.0, 0.1):
            assert bool(((layer(v + shift) - center).abs() <= radius + 1e-9).all())


# ---- the class


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["square", "circular"])
def test_no_optimiser_leaves_the_class(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape, fusion = LAYERS[name][0], draw(name, m=0.1, dtype=dtype)
    optimiser = torch.optim.Adam(fusion.parameters(), lr=1.0)
    for step in range(1000):
        z = torch.randn(4, *shape, dtype=dtype)
        (fusion(z) * torch.randn_like(z)).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 99:
            W = dense(fusion.operator(), shape).detach()
            size = float(torch.linalg.matrix_norm(W, 2))
            assert math.isfinite(size) and least(W) >= 0.1 - 1e-13 * len(W) * size
    assert size > 100
    layer = Equilibrium(fusion.double(), nn.Identity(), solver=Auto(max_steps=100_000))
    assert bool(layer(inject(shape)).isfinite().all())


def test_a_w_that_is_multiplied_out_in_float32_leaves_the_class_and_the_factors_do_not() -> None:
    torch.manual_seed(0)
    fusion = MonDEQ.from_weights(1e4 * torch.randn(4, 8), torch.randn(8, 8), 0.1)
    assert least(fusion.operator().weight.detach().double()) < 0
    a, b = exact(fusion.A.detach()), exact(fusion.B.detach())
    symmetric = a.T @ a + exact(fusion.m) * exact(torch.eye(8))  # I - sym W
    assert bool(((b - b.T) == -(b - b.T).T).all())
    assert all(pivot > 0 for pivot in pivots(symmetric - Fraction(99, 100) * exact(fusion.m) * exact(torch.eye(8))))


def pivots(matrix: np.ndarray) -> list[Fraction]:
    """Of an exact LDLᵀ factorisation without pivoting, up to the first that is not positive."""
    rest, result = matrix.copy(), []
    for k in range(len(rest)):
        pivot = Fraction(rest[k, k])
        result.append(pivot)
        if pivot <= 0:
            break
        rest[k + 1 :, k + 1 :] -= np.outer(rest[k + 1 :, k], rest[k, k + 1 :]) / pivot
    return result


def test_apply_takes_the_layer_that_it_is_given() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 6, bias=False)
    fusion = MonDEQ.apply(linear, m=2.0)
    assert torch.equal(fusion.A, linear.weight) and fusion.B.shape == (6, 6) and float(fusion.m) == 2
    assert not torch.equal(fusion.B, fusion.A) and {name for name, _ in fusion.named_parameters()} == {"A", "B"}
    conv = MonDEQ.apply(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False))
    assert conv.padding_mode == "circular" and float(conv.A.detach().norm()) == pytest.approx(1) == float(
        conv.B.detach().norm()
    )
    for module in (fusion, conv):
        assert (
            least(dense(module.operator(), (6,) if module is fusion else (3, 4, 4)).detach()) >= float(module.m) - 1e-6
        )
        copy = MonDEQ.from_weights(module.A, module.B, 0.7, module.padding_mode)
        copy.load_state_dict(module.state_dict())
        assert float(copy.m) == float(module.m)
    seen: list[nn.Module] = []
    assert nn.Sequential(fusion).apply(seen.append)[0] is fusion and fusion in seen


@pytest.mark.parametrize("m", [0.0, -1.0, math.nan, math.inf])
def test_an_m_that_is_not_positive_is_refused(m: float) -> None:
    with pytest.raises(ParametrizationError, match="outside"):
        MonDEQ.apply(nn.Linear(2, 2, bias=False), m=m)
    with pytest.raises(ModelError, match="positive"):
        MonDEQ.from_weights(torch.eye(2), torch.eye(2), m)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 2, padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
        MonDEQ.apply(nn.Linear(2, 2, bias=False)),
    ],
)
def test_layers_that_the_class_cannot_take_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ParametrizationError):
        MonDEQ.apply(layer)


@pytest.mark.parametrize(
    ("A", "B"), [((3, 3), (3, 4)), ((3, 3), (2, 2)), ((3,), (3, 3)), ((3, 3, 2, 2), (3, 3, 2, 2)), ((2, 3, 3, 3),) * 2]
)
def test_factors_that_do_not_fit_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="a factored W takes"):
        MonDEQ.from_weights(torch.zeros(A), torch.zeros(B), 1.0)


def test_a_w_comes_back_from_its_factors() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for m in (0.1, 1.0, 20.0):
            W = MonDEQ(m)(torch.randn(3, 7, dtype=dtype), torch.randn(7, 7, dtype=dtype))
            again = MonDEQ(m)(*MonDEQ(m).right_inverse(W))
            assert torch.allclose(again, W, atol=tolerance * float(W.abs().max()))
    with pytest.raises(
        ParametrizationError, match=r"the smallest eigenvalue of I - sym W is 0\.25; use an m of at most"
    ):
        MonDEQ(0.5).right_inverse(0.75 * torch.eye(3))
    with pytest.raises(ParametrizationError, match=r"is -1; no m > 0 fits"):
        MonDEQ(0.5).right_inverse(2 * torch.eye(3))
    for bad in (torch.ones(2, 3), torch.ones(2, 2, 3, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(ParametrizationError):
            MonDEQ(0.5).right_inverse(bad)


# ---- what is proved of a W alone


@pytest.mark.parametrize("seed", range(20))
def test_the_proved_m_is_a_bound_and_a_close_one(seed: int) -> None:
    torch.manual_seed(seed)
    size = 1 + seed % 6
    skew, root = torch.randn(size, size), torch.randn(size, size)
    own = (0.5, 1e-6, 1.0, -0.3, 20.0)[seed % 5]
    W = (1 - own) * torch.eye(size) - (root.T @ root) * 10.0 ** (seed % 4) + skew - skew.T
    proved, measured = proved_m(W)
    shifted = exact(torch.eye(size)) * (1 - Fraction(proved)) - (exact(W) + exact(W).T) / 2
    found = pivots(shifted)
    assert len(found) == size and all(pivot >= 0 for pivot in found)
    assert measured - 1e-11 * float(W.abs().sum()) <= proved <= measured + 1e-12 * (1 + float(W.abs().sum()))


@pytest.mark.parametrize("seed", range(30))
def test_no_factorisation_is_believed(seed: int) -> None:
    """Whatever ``c`` and ``L`` are: what comes out is below the spectrum. A good pair is off by its rounding alone."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    A = torch.eye(4) - (W + W.T) / 2
    c = (-3.0, 0.0, 2.0, 1e3, least(W))[seed % 5]
    if seed % 2:
        L = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    else:
        values, vectors = torch.linalg.eigh(A - c * torch.eye(4))
        L = vectors * values.clamp(min=0).sqrt()
    bound = monotonicity._bound(W, A, c, L)
    shifted = exact(torch.eye(4)) * (1 - Fraction(bound)) - (exact(W) + exact(W).T) / 2
    assert all(pivot >= 0 for pivot in pivots(shifted))


def test_what_is_no_square_matrix_is_refused() -> None:
    for W in (torch.ones(2, 3), torch.full((2, 2), math.nan), torch.ones(2, 2, 1)):
        with pytest.raises(ModelError):
            proved_m(W)


# ---- graph and file


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_file_keeps_the_factors(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape, kernel, mode = LAYERS[name]
    layer = Equilibrium(draw(name, m=0.1, dtype=dtype), nn.Identity())
    path = tmp_path / "model.safetensors"
    digest = save_model(layer, path)
    with safe_open(path, framework="pt") as file:
        architecture = json.loads(file.metadata()["verideq"])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    (node,) = architecture["nodes"]
    if len(kernel) == 2:
        inner = {"operation": "linear", "attributes": {"in_features": kernel[1], "out_features": kernel[0]}}
    else:
        inner = {"operation": "conv2d", "attributes": {
            "in_channels": kernel[1], "out_channels": kernel[0], "kernel_size": list(kernel[2:]), "stride": [1, 1],
            "padding": "same", "dilation": [1, 1], "groups": 1, "padding_mode": mode,
        }}  # fmt: skip
    assert node["attributes"] == {
        "activation": "relu",
        "fusion": {"operation": "mondeq", "attributes": {"m": 0.1, **inner}},
    }
    assert node["parametrizations"] == ["MonDEQ"]
    assert torch.equal(stored[f"{node['name']}/fusion.A"], layer.fusion.A)
    assert set(stored) == {f"{node['name']}/fusion.A", f"{node['name']}/fusion.B"}
    loaded = load_model(path)
    assert model_hash(loaded) == digest == save_model(loaded, tmp_path / "again.safetensors")
    ((_, again),) = loaded.equilibria()
    assert not any(p.requires_grad for p in loaded.parameters())
    v = inject(shape).to(dtype)
    with torch.no_grad():
        assert torch.equal(again(v), layer(v))
    wide = trace(layer).frozen(solver=Auto(tol=1e-13))
    z = wide(v.double())
    W = dense(layer.fusion.operator(), shape).detach()
    assert torch.allclose(z.flatten(1), torch.relu(z.flatten(1) @ W.T + v.double().flatten(1)), atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["attributes"].update(m=-1.0), "m = -1.0"),
        (lambda f: f["attributes"].update(m="20"), "floating-point number"),
        (lambda f: f["attributes"].update(m=20), "floating-point number"),
        (lambda f: f["attributes"].update(operation="conv2d"), "the description says"),
        (lambda f: f["attributes"]["attributes"].update(in_features=8), "the description says"),
        (lambda f: f["attributes"].update(more=1), "the description says"),
        (lambda f: f["attributes"].pop("m"), "mondeq|m"),
        (lambda f: f.update(operation="linear"), "tensors"),
        (lambda f: f.update(operation="bilinear"), "unknown fusion"),
    ],
)
def test_a_damaged_description_is_refused(change: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(Equilibrium(draw("square"), nn.Identity()), path)
    with safe_open(path, framework="pt") as file:
        architecture = json.loads(file.metadata()["verideq"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    assert callable(change)
    change(architecture["nodes"][0]["attributes"]["fusion"])
    save_file(tensors, path, metadata={"verideq": json.dumps(architecture)})
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_an_m_that_is_not_a_float32_survives_the_file(tmp_path: Path) -> None:
    save_model(Equilibrium(draw("square", m=0.1, dtype=torch.float32), nn.Identity()), tmp_path / "m.safetensors")
    ((_, layer),) = load_model(tmp_path / "m.safetensors").equilibria()
    assert isinstance(layer.fusion, MonotoneFusion) and float(layer.fusion.m) == 0.1


def test_from_matrices_is_the_layer_with_these_matrices() -> None:
    W, U, b = (np.random.default_rng(0).normal(size=size) for size in ((4, 4), (4, 3), (4,)))
    W /= 2 * np.abs(W).sum(1, keepdims=True)
    layer = Equilibrium.from_matrices(W, U, b, solver="picard")
    x = inject((3,))
    z = layer(x).detach()
    assert z.dtype is torch.float64 and isinstance(layer.solver, Picard)
    assert torch.allclose(z, torch.relu(z @ torch.from_numpy(W).T + x @ torch.from_numpy(U).T + torch.from_numpy(b)))
    W[0, 0] = 7  # a copy was taken
    assert torch.equal(layer(x), z)
    assert Equilibrium.from_matrices(W, U).injection.bias is None
    for bad in ((W[:3], U, b), (W, U[:3], b), (W, U, b[:3]), (W[0], U, b), (W, U[0], b)):
        with pytest.raises(ModelError, match="takes W"):
            Equilibrium.from_matrices(*bad)
    for bad in ((W.astype(np.float32), U, b), (W.astype(int), U.astype(int), b.astype(int))):
        with pytest.raises(ModelError, match="float32 or all float64"):
            Equilibrium.from_matrices(*bad)
