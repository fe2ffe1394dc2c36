"""Solvers: they reach the equilibrium of a materialised float64 iteration, every sample on its own, or say that not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import verideq
from verideq.equilibrium import (
    Anderson,
    Auto,
    Dense,
    Equilibrium,
    ForwardBackward,
    Operator,
    Picard,
    Solver,
    System,
    fixed_point,
    operator_of,
    solvers,
)
from verideq.errors import ConvergenceError, InputError
from verideq.status import Convergence

# torch's own remark on convolutions that it pads itself; ours are padded beforehand.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

SOLVERS = [
    Auto(tol=1e-12),
    Picard(tol=1e-12),
    Anderson(tol=1e-12),
    Anderson(tol=1e-12, window=1),
    Anderson(tol=1e-12, window=5),
    ForwardBackward(tol=1e-12, alpha=0.5),
]


def contractive(fusion: nn.Module, rate: float, seed: int = 0) -> nn.Module:
    """Random weights in float64 whose absolute rows add up to `rate`."""
    fusion = fusion.double()
    weight = fusion.get_parameter("weight")
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sums = drawn.abs().flatten(1).sum(1).view(-1, *[1] * (drawn.dim() - 1))
    weight.data = rate * drawn / sums
    return fusion


def convolution(kernel: int | tuple[int, int] = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel, bias=False, **({"padding": "same"} | options))  # type: ignore[arg-type]  # by name


LAYERS = {
    "linear": (lambda: nn.Linear(12, 12, bias=False), (12,)),
    "zeros": (lambda: convolution(padding=1), (4, 5, 6)),
    "circular": (lambda: convolution(padding=1, padding_mode="circular"), (4, 5, 6)),
    "reflect": (lambda: convolution(padding=1, padding_mode="reflect"), (4, 5, 6)),
    "replicate": (lambda: convolution(padding=1, padding_mode="replicate"), (4, 5, 6)),
    "even kernel": (lambda: convolution((2, 4)), (4, 5, 6)),
    "even kernel, reflect": (lambda: convolution((4, 2), padding_mode="reflect"), (4, 6, 5)),
    "dilated": (lambda: convolution(3, dilation=2), (4, 6, 7)),
    "dilated, even": (lambda: convolution(2, dilation=(2, 1)), (4, 6, 7)),
    "groups": (lambda: convolution(3, groups=2), (4, 5, 6)),
    "depthwise": (lambda: convolution(3, groups=4), (4, 5, 6)),
}


def matrix_of(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The linear map of a torch module, column by column, with nothing of ours in between."""
    with torch.no_grad():
        units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        return module(units).flatten(1).T


def iterate(matrix: Tensor, v: Tensor) -> Tensor:
    """``z <- relu(W z + v)``, long enough for a rate of 0.9."""
    z = torch.zeros_like(v)
    for _ in range(350):
        z = F.relu(z @ matrix.T + v)
    return z


def inject(shape: tuple[int, ...], batch: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", LAYERS)
def test_every_solver_finds_the_equilibrium(name: str, solver: Solver) -> None:
    build, shape = LAYERS[name]
    fusion, v = contractive(build(), 0.9), inject(shape)
    with torch.no_grad():
        z = Equilibrium(fusion, nn.Identity(), solver=solver)(v)
    exact = iterate(matrix_of(fusion, shape), v.flatten(1))
    torch.testing.assert_close(z.flatten(1), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", ["linear", "zeros", "even kernel", "groups"])
def test_the_interval_pair_is_that_of_the_four_products(name: str, solver: Solver) -> None:
    build, shape = LAYERS[name]
    fusion, center = contractive(build(), 0.9), inject(shape)
    radius = 0.2 * inject(shape, seed=2).abs()
    layer = Equilibrium(fusion, nn.Identity(), solver=solver)
    with torch.no_grad():
        c, r = layer.equilibrate_ball(center, radius)
    matrix, scale = matrix_of(fusion, shape), torch.ones(math.prod(shape), dtype=torch.float64)
    if isinstance(solver, Auto):
        # Auto solves the rows first; which part of the diagonal that moves is a convolution's own affair.
        operator, factor = operator_of(fusion).solved()
        scale = factor.detach().expand(shape).reshape(-1)
        matrix = matrix_of(_Applied(operator), shape)
    positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
    top, bottom = (scale * (center + sign * radius).flatten(1) for sign in (1, -1))
    upper, lower = torch.zeros_like(top), torch.zeros_like(top)
    for _ in range(350):
        upper, lower = (
            F.relu(upper @ positive.T + lower @ negative.T + top),
            F.relu(lower @ positive.T + upper @ negative.T + bottom),
        )
    torch.testing.assert_close((c + r).flatten(1), upper, rtol=0, atol=1e-9)
    torch.testing.assert_close((c - r).flatten(1), lower, rtol=0, atol=1e-9)
    assert bool((r >= 0).all())


class _Applied(nn.Module):
    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, z: Tensor) -> Tensor:
        return self.operator.apply(z)


@pytest.mark.parametrize("name", LAYERS)
def test_solving_the_rows_keeps_the_equilibria(name: str) -> None:
    build, shape = LAYERS[name]
    fusion = contractive(build(), 0.9)
    system = System(operator_of(fusion).map(Tensor.detach), inject(shape)[None])
    solved = system.solved()
    values = [fixed_point(s.stepper(), s.start(), Picard(tol=1e-14)).check().value for s in (system, solved)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "zeros", "groups", "dilated", "even kernel"])
def test_solved_rows_no_longer_read_their_own_unknown(name: str) -> None:
    build, shape = LAYERS[name]
    fusion = contractive(build(), 0.9)
    matrix = matrix_of(fusion, shape)
    own = matrix.diagonal()
    operator, factor = operator_of(fusion).solved()
    solved = matrix_of(_Applied(operator), shape)
    assert float(own.abs().max()) > 0.01
    assert float(solved.diagonal().abs().max()) == 0
    expected = (matrix - own.diag()) / (1 - own)[:, None]
    torch.testing.assert_close(solved, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(factor.detach().expand(shape).reshape(-1), 1 / (1 - own), rtol=1e-14, atol=0)


def test_rows_that_cannot_be_solved_are_left() -> None:
    fusion = nn.Linear(2, 2, bias=False).double()
    fusion.weight.data = torch.tensor([[1.5, 0.25], [0.5, -3.0]], dtype=torch.float64)
    operator, factor = operator_of(fusion).solved()
    assert factor.tolist() == [1, 0.25]
    assert operator.absolute_units().tolist() == [[1.5, 0.25], [0.125, 0]]


def test_a_large_negative_diagonal_converges_with_auto_only() -> None:
    fusion = nn.Linear(1, 1, bias=False).double()
    fusion.weight.data.fill_(-10.0)
    v = torch.ones(1, 1, dtype=torch.float64)
    with torch.no_grad():
        assert float(Equilibrium(fusion, nn.Identity())(v)) == pytest.approx(1 / 11, rel=1e-12)
        with pytest.raises(ConvergenceError):
            Equilibrium(fusion, nn.Identity(), solver=Picard(max_steps=200))(v)


def spectrum_of_difficulty() -> tuple[System, Tensor]:
    """A positive layer near the edge, on which samples differ: 64 pairs, from dead (one step) to slow (many)."""
    fusion = contractive(nn.Linear(20, 20, bias=False), 0.97)
    fusion.get_parameter("weight").data.abs_()
    center = inject((20,), 64)
    center -= torch.linspace(-2, 6, 64, dtype=torch.float64)[:, None]
    radius = 0.3 * inject((20,), 64, seed=3).abs()
    return System(operator_of(fusion).map(Tensor.detach), torch.stack((center, radius))), torch.arange(64)


@pytest.mark.parametrize("solver", [Auto(), Picard(max_steps=5000), Anderson(), Anderson(window=1)], ids=repr)
def test_a_sample_does_not_depend_on_its_batch(solver: Solver) -> None:
    system, samples = spectrum_of_difficulty()
    system = system.solved()

    def run(chosen: Tensor) -> tuple[Tensor, Tensor]:
        part = System(system.operator, system.injection[:, chosen])
        solution = fixed_point(part.stepper(), part.start(), solver).check()
        return solution.value, solution.steps

    together, steps = run(samples)
    assert int(steps.min()) <= 3
    assert int(steps.max()) >= 3 * int(steps.min())
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    groups = [samples[i : i + 1] for i in range(64)] + [samples[i : i + 7] for i in range(0, 64, 7)]
    for chosen in [*groups, shuffled, shuffled[:7]]:
        value, taken = run(chosen)
        torch.testing.assert_close(value, together[:, chosen], rtol=1e-9, atol=1e-11)
        assert taken.tolist() == steps[chosen].tolist()


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.997])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_takes_less_than_half_the_steps_of_picard_up_to_the_edge(rate: float, dtype: torch.dtype) -> None:
    fusion = contractive(nn.Linear(40, 40, bias=False), rate)
    fusion.get_parameter("weight").data.abs_()
    fusion = fusion.to(dtype)
    v = inject((40,), 16).to(dtype)
    system = System(operator_of(fusion).map(Tensor.detach), torch.stack((v, 0.1 * v.abs()))).solved()
    steps = [
        int(fixed_point(system.stepper(), system.start(), solver).check().steps.max())
        for solver in (Auto(tol=1e-5, max_steps=20_000), Picard(tol=1e-5, max_steps=20_000))
    ]
    assert steps[0] < steps[1] / 2


def test_an_easy_layer_stays_with_picard() -> None:
    fusion = contractive(nn.Linear(12, 12, bias=False), 0.01)
    system = System(operator_of(fusion).map(Tensor.detach), inject((12,))[None]).solved()
    auto = fixed_point(system.stepper(), system.start(), Auto(tol=1e-8))
    picard = fixed_point(system.stepper(), system.start(), Picard(tol=1e-8))
    assert bool((auto.value == picard.value).all())
    assert auto.steps.tolist() == picard.steps.tolist()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("pair", [False, True], ids=["point", "pair"])
def test_nan_is_nonfinite_and_its_mates_converge(solver: Solver, pair: bool) -> None:
    fusion, v = contractive(nn.Linear(12, 12, bias=False), 0.5), inject((12,))
    v[2, 3] = math.nan
    system = System(operator_of(fusion).map(Tensor.detach), torch.stack((v, 0.1 * v.abs())) if pair else v[None])
    solution = fixed_point(system.stepper(), system.start(), solver)
    assert solution.convergence is Convergence.NONFINITE
    assert solution.converged.tolist() == [True, True, False, True, True]
    assert bool(solution.residual[2].isnan())
    with pytest.raises(ConvergenceError, match=r"did not converge for 1 of 5 samples .* NaN or infinity"):
        solution.check()


def test_an_infinite_start_is_nonfinite() -> None:
    fusion, v = contractive(nn.Linear(12, 12, bias=False), 0.5), inject((12,))
    v[0, 0] = math.inf
    system = System(operator_of(fusion).map(Tensor.detach), v[None])
    solution = fixed_point(system.stepper(), system.start(), Auto(max_steps=50))
    assert solution.convergence is Convergence.NONFINITE
    assert solution.converged.tolist() == [False, True, True, True, True]


def test_an_expanding_layer_is_refused_or_returned() -> None:
    fusion = nn.Linear(1, 1, bias=False).double()
    fusion.weight.data.fill_(1.0)  # z = relu(z + 1): no equilibrium
    v = torch.ones(3, 1, dtype=torch.float64)
    layer = Equilibrium(fusion, nn.Identity(), solver=Picard(max_steps=10))
    message = r"3 of 3 samples after 10 steps .* raise max_steps"
    with torch.no_grad(), pytest.raises(ConvergenceError, match=message) as caught:
        layer(v)
    assert caught.value.steps == 10
    assert caught.value.worst == pytest.approx(1 / 11)
    layer.throw = False
    with torch.no_grad():
        assert layer(v).tolist() == [[11.0]] * 3


def test_solve_overrides_the_layer_and_reports() -> None:
    fusion, v = contractive(nn.Linear(12, 12, bias=False), 0.9), inject((12,))
    layer = Equilibrium(fusion, nn.Identity(), solver=Picard())
    with pytest.raises(ConvergenceError, match="5 of 5 samples after 2 steps"):
        verideq.solve(layer, v, max_steps=2)
    stopped = verideq.solve(layer, v, max_steps=2, throw=False)
    assert stopped.convergence is Convergence.MAX_STEPS
    assert stopped.steps.tolist() == [2] * 5
    loose, tight = verideq.solve(layer, v, tol=1e-3), verideq.solve(layer, v, tol=1e-9)
    assert bool((loose.steps < tight.steps).all())
    for solution, tol in ((loose, 1e-3), (tight, 1e-9)):
        assert solution.convergence is Convergence.CONVERGED
        assert bool(solution.converged.all())
        assert solution.value.shape == (5, 12)
        assert bool((solution.residual <= tol).all())
        assert not solution.value.requires_grad
        moved = (F.relu(solution.value @ fusion.get_parameter("weight").T + v) - solution.value).norm(dim=1)
        assert bool((moved <= tol * solution.value.norm(dim=1)).all())


@pytest.mark.parametrize("max_steps", [1, 2, 5])
@pytest.mark.parametrize("solver", [Auto, Picard, Anderson, ForwardBackward])
def test_the_step_limit_counts_applications_of_the_layer(solver: type[Solver], max_steps: int) -> None:
    fusion, v = contractive(nn.Linear(12, 12, bias=False), 0.9), inject((12,))
    system = System(operator_of(fusion).map(Tensor.detach), v[None])
    applied, calls = system.stepper(), itertools.count(1)

    def step(x: Tensor) -> Tensor:
        next(calls)
        return applied(x)

    solution = fixed_point(step, system.start(), solver(max_steps=max_steps))
    assert next(calls) == max_steps + 1
    assert solution.steps.tolist() == [max_steps] * 5
    assert not bool(solution.converged.any())


def test_the_answer_is_fixed_once_a_sample_has_converged() -> None:
    system, _ = spectrum_of_difficulty()
    applied, images = system.stepper(), []

    def step(x: Tensor) -> Tensor:
        images.append(applied(x).clone())
        return images[-1].clone()

    solution = fixed_point(step, system.start(), Auto()).check()
    for sample, count in enumerate(solution.steps.tolist()):
        assert bool((solution.value[:, sample] == images[count - 1][:, sample]).all())


def test_a_state_of_zeros_converges() -> None:
    fusion = contractive(nn.Linear(12, 12, bias=False), 0.9)
    with torch.no_grad():
        assert not bool(Equilibrium(fusion, nn.Identity())(torch.full((2, 12), -9.0, dtype=torch.float64)).any())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Auto(tol=-1.0), "tol -1.0 is no tolerance"),
        (lambda: Auto(tol=math.nan), "tol nan is no tolerance"),
        (lambda: Picard(max_steps=0), "max_steps 0 is too few"),
        (lambda: Anderson(window=0), "window 0 is too small"),
        (lambda: ForwardBackward(alpha=0.0), "alpha 0.0 is no damping"),
        (lambda: ForwardBackward(alpha=1.5), "alpha 1.5 is no damping"),
    ],
)
def test_bad_settings_are_named(build: type[Solver], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def test_acceleration_that_does_not_serve_gives_way_to_picard(monkeypatch: pytest.MonkeyPatch) -> None:
    """With useless coefficients nothing but the return to Picard can converge, and it has to."""
    generator = torch.Generator().manual_seed(0)

    def useless(self: solvers._Acceleration) -> torch.Tensor:
        drawn = torch.randn(self.right.shape, generator=generator, dtype=self.right.dtype)
        return 5 * drawn * self.usable[:, None].clamp(max=1)

    monkeypatch.setattr(solvers._Acceleration, "_coefficients", useless)
    weight = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    weight *= 0.9 / weight.abs().sum(1, keepdim=True)
    injection = torch.randn(2, 8, 30, generator=generator, dtype=torch.float64).abs()
    system = System(Dense(weight), injection).solved()
    solution = fixed_point(system.stepper(), system.start(), Auto(tol=1e-10, max_steps=600))
    assert bool(solution.converged.all())
    monkeypatch.setattr(solvers, "PATIENCE", 10**9)
    stuck = fixed_point(system.stepper(), system.start(), Auto(tol=1e-10, max_steps=600))
    assert not bool(stuck.converged.any())
