"""Defences against references of their own: entropy reduction, the choice of an early state, transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from verideq.attacks import Attack, Found, Problem
from verideq.attacks.defences import Defence, EarlyState, EntropyReduction, FinalState, choose_early, transfer
from verideq.attacks.suites import Stage, Suite
from verideq.certify.bound import margin_rows
from verideq.equilibrium import DEQ, Broyden, Dynamics, Gradient, Picard, Solver
from verideq.region import Region

# Entropy reduction


class Cell(nn.Module):
    """``tanh(A z + U x)``: what is injected is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(4)
        A = torch.randn(6, 6, generator=draw, dtype=torch.float64)
        self.A = nn.Parameter(1.5 * A / torch.linalg.matrix_norm(A, 2))
        self.U = nn.Parameter(torch.randn(6, 5, generator=draw, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.A.T + x @ self.U.T)


def restless() -> DEQ:
    """A dense DEQ that eight states do not bring to rest."""
    torch.manual_seed(0)
    model = DEQ(nn.Identity(), Cell(), nn.Linear(6, 4).double(), lambda x: (6,))
    return model.eval().requires_grad_(False)


def algorithm_one(model: DEQ, x: Tensor, reduction: EntropyReduction, quasi: bool) -> tuple[Tensor, Tensor]:
    """One sample's states and its last input: plain loops, the inverse as a matrix."""
    A, U, W, b = model.cell.A, model.cell.U, model.classifier.weight, model.classifier.bias  # type: ignore[union-attr]  # modules
    low, high = reduction.clip or (-torch.inf, torch.inf)
    now, z, B, states = x, torch.zeros(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64), []

    def g(z: Tensor) -> Tensor:
        return torch.tanh(A @ z + U @ now) - z

    for n in range(1, reduction.states + 1):
        new = z - B @ g(z)
        if n % reduction.every == 0:
            for _ in range(reduction.updates):
                at = now.clone().requires_grad_()
                p = torch.softmax(W @ torch.tanh(A @ new + U @ at) + b, 0)  # type: ignore[operator]  # tensors
                (slope,) = torch.autograd.grad(-(p * p.log()).sum(), at)
                assert float(slope.abs().min()) > 1e-9  # no sign is a matter of rounding
                now = now - reduction.beta * slope.sign()
                now = torch.clamp(now, x - reduction.radius, x + reduction.radius).clamp(low, high)
            new = z - B @ g(z)
        dz, dg = new - z, g(new) - g(z)
        if quasi:
            B = B + torch.outer(dz - B @ dg, dz @ B) / (dz @ B @ dg)
        z = new
        states.append(z)
    return torch.stack(states), now


@pytest.mark.parametrize("track", [Broyden(max_steps=8), Picard(max_steps=8)], ids=["broyden", "picard"])
@pytest.mark.parametrize(
    "reduction",
    [
        EntropyReduction(beta=0.01, updates=3, every=2, radius=0.3, states=7, clip=None),
        EntropyReduction(beta=0.03, updates=2, every=3, radius=0.05, states=6),
        EntropyReduction(beta=0.02, updates=4, every=1, radius=0.2, states=3),
    ],
    ids=["free", "bounded", "every state"],
)
def test_entropy_reduction_is_algorithm_one(reduction: EntropyReduction, track: Solver) -> None:
    model, reduction = restless(), replace(reduction, track=track)
    x = torch.rand(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states, injected = reduction.states_of(model, x)
    outputs = reduction.outputs(model, x)
    for i in range(len(x)):
        wanted, moved = algorithm_one(model, x[i], reduction, isinstance(track, Broyden))
        torch.testing.assert_close(states[:, i], wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(injected["v"][i], moved, rtol=0, atol=1e-10)
        torch.testing.assert_close(outputs[i], model.classifier(wanted[-1]), rtol=0, atol=1e-10)
    shift = (injected["v"] - x).abs()
    blocks = reduction.states // reduction.every
    farthest = min(reduction.radius, reduction.beta * reduction.updates * blocks)
    assert float(shift.max()) == pytest.approx(farthest)  # some pixel goes the same way every time


# States that disagree


class Counting(Dynamics):
    """The state ``z_n`` is ``n``, and each has a threshold of its own: class 0 below it.

    Args:
        thresholds: of the states ``z_1, z_2, ...``.
        final: of the state that the model hands to its head.
        lower: where a state is right only above it, by state, with the same numbers.
    """

    def __init__(self, thresholds: list[float], final: float, lower: list[float] | None = None) -> None:
        lower = [-9.0] * len(thresholds) if lower is None else lower
        self.upper = torch.tensor([final, *thresholds], dtype=torch.float64)
        self.lower = torch.tensor([-9.0, *lower], dtype=torch.float64)

    def inject(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"x": x}

    def start(self, injected: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(injected["x"])

    def step(self, z: Tensor, injected: Mapping[str, Tensor]) -> Tensor:
        return z + 1

    def head(self, z: Tensor, injected: Mapping[str, Tensor]) -> Tensor:
        x, state = injected["x"], z.round().long()
        margin = torch.minimum(self.upper[state] - x, x - self.lower[state])
        return torch.cat((margin, torch.zeros_like(margin)), 1)

    def settle(self, injected: Mapping[str, Tensor]) -> Tensor:
        return self.start(injected)

    def final(self, injected: Mapping[str, Tensor], gradient: Gradient | None = None) -> Tensor:
        return self.start(injected)


COUNTED = Picard(max_steps=8)


def disagreement(dynamics: Dynamics, x: list[float], eps: str = "0.1") -> Problem:
    center = torch.tensor(x, dtype=torch.float64)[:, None]
    C = margin_rows(torch.zeros(len(x), dtype=torch.long), 2)
    return Problem(dynamics, Region(center, eps), C, torch.zeros(C.shape[:2]).double(), torch.arange(len(x)))


def right(dynamics: Dynamics, state: int, x: Tensor) -> int:
    return int((EarlyState(state, COUNTED).outputs(dynamics, x).argmax(1) == 0).sum())


def test_the_early_state_is_chosen_by_what_the_attack_on_the_final_state_finds() -> None:
    """An attack moves every input up by eps; on clean inputs the first state is as good as any."""
    dynamics = Counting([0.55, 0.45, 0.65, 0.25, 0.65, 0.35], final=0.7)
    problem, labels = disagreement(dynamics, [0.2, 0.3, 0.4, 0.5]), torch.zeros(4, dtype=torch.long)
    clean, attacked = problem.region.center, problem.region.center + 0.1
    assert [right(dynamics, n, clean) for n in range(1, 7)] == [4, 3, 4, 1, 4, 2]
    assert [right(dynamics, n, attacked) for n in range(1, 7)] == [3, 2, 4, 0, 4, 1]
    assert choose_early(problem, labels, 6, COUNTED) == EarlyState(3, COUNTED)
    assert choose_early(problem, labels, 2, COUNTED) == EarlyState(1, COUNTED)
    # What a defence has decided before is not asked: this one would have the inputs moved down.
    backwards = replace(problem, decide=lambda x: -dynamics.outputs(x))
    assert choose_early(backwards, labels, 6, COUNTED) == EarlyState(3, COUNTED)


@dataclass(frozen=True)
class Shift(Attack):
    """The centre, moved: of several points the one with the smallest margin."""

    by: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"Shift {self.by}"

    def search(self, problem: Problem) -> Found:
        found = Found.nothing(problem)
        for by in self.by:
            points = problem.region.project(problem.region.center + by)
            found.note(points, problem.judge(points))
        return found


def opposed() -> tuple[Problem, list[Defence]]:
    """The final state breaks on the way up, the first on the way down, the second nowhere."""
    problem = disagreement(Counting([9.0, 9.0], final=0.58, lower=[0.32, -9.0]), [0.5, 0.4, 0.45])
    return problem, [FinalState(), EarlyState(1, COUNTED), EarlyState(2, COUNTED)]


UNHARMED = [True, True, True]
BROKEN = {"final": [False, True, True], "early:1": [True, False, True], "early:2": UNHARMED}
"""Which samples of `opposed` survive the worst that there is."""


@pytest.mark.parametrize("order", [(0.1, -0.1, 0.0), (-0.1, 0.0, 0.1), (0.0, 0.1, -0.1)], ids=str)
@pytest.mark.parametrize("prune", [True, False])
def test_transfer_hands_on_the_points_of_every_stage(order: tuple[float, ...], prune: bool) -> None:
    """Those too that are not the worst against their source, and of samples that a stage before has broken."""
    problem, defences = opposed()
    table = transfer(problem, defences, Suite("by hand", tuple(Stage(Shift((by,))) for by in order), prune))
    for target, row in table.items():
        assert {source: kept.tolist() for source, kept in row.items()} == dict.fromkeys(
            [*BROKEN, "ALL"], BROKEN[target]
        )


def test_an_attack_is_crafted_against_its_source() -> None:
    problem, defences = opposed()
    table = transfer(problem, defences, Suite("by hand", (Stage(Shift((0.1, -0.1))),)))
    for target in ("final", "early:1"):
        for source in ("final", "early:1"):
            assert table[target][source].tolist() == (BROKEN[target] if source == target else UNHARMED)
        assert table[target]["ALL"].tolist() == BROKEN[target]
