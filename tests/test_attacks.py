"""The attacks: against models whose worst point is known, and the same for a sample whatever its batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize_scalar
from torch import Tensor, nn

from verideq.attacks import APGD, FAB, PGD, Attack, Problem, Square
from verideq.attacks.apgd import checkpoints
from verideq.attacks.fab import lengths, onto_plane
from verideq.attacks.opened import PlainDynamics, open_model
from verideq.attacks.problem import cross_entropy, ratio_loss, targeted_ratio_loss
from verideq.certify.bound import margin_rows
from verideq.equilibrium import Dynamics
from verideq.equilibrium.surrogates import Final, Loss, Simultaneous, Slope, Surrogate, Unrolled
from verideq.errors import InputError, UnknownName
from verideq.models.zoo import linear_deq
from verideq.parametrizations import RowGauge
from verideq.region import Region

ATTACKS: list[Attack] = [
    PGD(20, 2),
    PGD(10, 1, 0.25, decay=False, plain=True),
    APGD("ce", 20),
    APGD("dlr", 20),
    APGD("t", 20),
    FAB(20),
    Square(60),
]
BY_GRADIENT = [attack for attack in ATTACKS if not isinstance(attack, Square)]


def problem_of(
    model: nn.Module, x: Tensor, labels: Tensor, eps: str, norm: str = "linf", weights: Tensor | None = None
) -> Problem:
    classes = model(x[:1].to(next(model.parameters()).dtype)).shape[1]
    C = margin_rows(labels, classes)
    region = Region(x, eps, norm, weights=weights)
    return Problem(open_model(model), region, C, torch.zeros(C.shape[:2], dtype=torch.float64), torch.arange(len(x)))


def linear(classes: int, shape: tuple[int, ...] = (1, 3, 4)) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.tensor(shape).prod()), classes)).double()
    x = 0.4 + 0.2 * torch.rand(12, *shape, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def deq(count: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = linear_deq((1, 3, 4), 4, RowGauge.apply, width=9).double().eval()
    x = torch.rand(count, 1, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", BY_GRADIENT, ids=lambda a: a.name)
def test_of_a_linear_model_every_gradient_attack_breaks_all_that_can_be_broken(
    attack: Attack, norm: str, classes: int
) -> None:
    """The smallest margin within eps is ``row - eps ‖w‖``, away from the ends of the pixel range."""
    model, x, labels = linear(classes)
    normals = torch.einsum("brc,cf->brf", margin_rows(labels, classes), model[1].weight.detach())
    size = normals.abs().sum(2) if norm == "linf" else normals.norm(dim=2)
    rows = (margin_rows(labels, classes) @ model(x).detach()[:, :, None])[:, :, 0]
    radii = (rows / size).amin(1)
    eps = float(radii.median()) + 1e-4  # half of the samples can be broken
    problem = problem_of(model, x, labels, str(eps), norm)
    found = attack.search(problem)
    best = (rows - float(problem.region.eps) * size).amin(1)
    assert bool(problem.region.contains(found.points).all())
    torch.testing.assert_close(problem.judge(found.points), found.margins, rtol=1e-12, atol=1e-12)
    assert bool((found.margins >= best - 1e-9).all())
    clear = (radii / eps - 1).abs() > 0.01
    assert 3 <= int((best < 0)[clear].sum()) < int(clear.sum())
    missed = (best < 0) & ~(found.margins < 0) & clear
    # Attacks on the nearest class at every step may end at the wrong one of several.
    sure = classes == 2 or attack.name.endswith("-T")
    assert int(missed.sum()) <= (0 if sure else 3)
    assert found.vanished is not None and not bool(found.vanished.any())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 12, 12), (2, 8, 8), (20,)])
def test_square_needs_no_gradient(norm: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(torch.tensor(shape).prod()), 3)).double()
    x = 0.4 + 0.2 * torch.rand(12, *shape, dtype=torch.float64)
    problem = problem_of(model, x, model(x).argmax(1), "0.15" if norm == "linf" else "1.5", norm)

    def forbidden(*_: object) -> Tensor:
        raise AssertionError("a gradient was asked for")

    blind = replace(problem, surrogate=type("Blind", (), {"slope": forbidden, "exact": True})())  # type: ignore[arg-type]  # a stand-in
    found = Square(200).search(blind)
    known = PGD(20, 2).search(problem)
    assert bool(problem.region.contains(found.points).all())
    torch.testing.assert_close(problem.judge(found.points), found.margins)
    broken, could = found.margins < 0, known.margins < 0
    assert not bool((broken & ~could).any())
    assert int(broken.sum()) >= 0.7 * int(could.sum()) > 0
    assert found.vanished is None


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_no_sample_sees_another(attack: Attack, norm: str) -> None:
    model, x, labels = deq()
    problem = problem_of(model, x, labels, "0.1" if norm == "linf" else "0.25", norm)
    together = attack.search(problem)
    order = torch.tensor([5, 2, 7])
    part = attack.search(problem[order])
    torch.testing.assert_close(part.margins, together.margins[order], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(part.points, together.points[order], rtol=1e-6, atol=1e-7)
    other = attack.search(replace(problem, indices=problem.indices + 100))
    noisy = not isinstance(attack, FAB) and not (isinstance(attack, PGD) and not attack.plain)
    assert torch.equal(other.points, together.points) != noisy or not noisy


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
@pytest.mark.parametrize("surrogate", [Unrolled((2,), 2, 0.5), Simultaneous((1, 2, 3))], ids=lambda s: s.name)
def test_attacks_climb_any_surrogate_and_are_judged_by_the_model(attack: Attack, surrogate: Unrolled) -> None:
    model, x, labels = deq()
    problem = replace(problem_of(model, x, labels, "0.1"), surrogate=surrogate)
    found = attack.search(problem)
    assert bool(problem.region.contains(found.points).all())
    torch.testing.assert_close(problem.judge(found.points), found.margins, rtol=1e-9, atol=1e-9)
    assert bool((found.margins <= problem.judge(x) + 1e-12).all()) or isinstance(attack, (APGD, FAB, PGD))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_a_radius_of_zero_is_the_centre_and_a_frozen_feature_stays(attack: Attack) -> None:
    model, x, labels = deq(3)
    found = attack.search(problem_of(model, x, labels, "0"))
    assert torch.equal(found.points, x)
    weights = torch.ones(1, 3, 4, dtype=torch.float64)
    weights[0, 1] = 0.0
    for norm in ("linf", "l2"):
        problem = problem_of(model, x, labels, "0.2", norm, weights)
        found = attack.search(problem)
        assert bool(problem.region.contains(found.points).all())
        assert torch.equal(found.points[:, 0, 1], x[:, 0, 1])


def test_a_gradient_that_vanishes_is_noted() -> None:
    class Steps(nn.Module):
        """Outputs that do not move with small changes of the input."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            outputs = ((x.flatten(1) * 4).floor() * self.scale)[:, :3]
            return torch.where(x.flatten(1)[:, :1] > 0.5, outputs, x.flatten(1)[:, :3])

    x = torch.tensor([[0.7, 0.2, 0.2], [0.3, 0.2, 0.1]], dtype=torch.float64)
    C = margin_rows(torch.tensor([0, 0]), 3)
    problem = Problem(PlainDynamics(Steps()), Region(x, "0.05"), C, torch.zeros(2, 2).double(), torch.arange(2))
    for attack in (PGD(5, 1), APGD("ce", 5), FAB(5)):
        vanished = attack.search(problem).vanished
        assert vanished is not None
        assert vanished.tolist() == [True, False], attack.name


def test_losses_are_those_of_the_outputs() -> None:
    outputs = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    rows = (margin_rows(labels, 5) @ outputs[:, :, None])[:, :, 0]
    torch.testing.assert_close(cross_entropy(rows), nn.functional.cross_entropy(outputs, labels, reduction="none"))
    ranked = outputs.sort(1, descending=True).values
    for k in range(6):
        y = int(labels[k])
        others = [float(outputs[k, (y + 1 + j) % 5]) for j in range(4)]  # as `margin_rows` has them
        wanted = -(float(outputs[k, y]) - max(others)) / float(ranked[k, 0] - ranked[k, 2])
        assert float(ratio_loss(rows)[k]) == pytest.approx(wanted)
        target = 2
        wanted = -(float(outputs[k, y]) - others[target]) / float(ranked[k, 0] - (ranked[k, 2] + ranked[k, 3]) / 2)
        assert float(targeted_ratio_loss(torch.full((6,), target))(rows)[k]) == pytest.approx(wanted)
    two = rows[:, :1]
    torch.testing.assert_close(ratio_loss(two), -two[:, 0])
    torch.testing.assert_close(targeted_ratio_loss(torch.zeros(6, dtype=torch.long))(two), -two[:, 0])


numbers = st.floats(-2, 2, allow_subnormal=False).map(lambda v: round(v, 3))


@given(
    w=st.lists(numbers, min_size=4, max_size=4),
    x=st.lists(st.floats(0, 1).map(lambda v: round(v, 3)), min_size=4, max_size=4),
    b=numbers,
    norm=st.sampled_from(["linf", "l2"]),
)
def test_the_projection_onto_a_plane_is_the_nearest_point(w: list[float], x: list[float], b: float, norm: str) -> None:
    at, normal = torch.tensor([x], dtype=torch.float64), torch.tensor([w], dtype=torch.float64)
    region = Region(at, "0.1", norm)
    problem = Problem(None, region, torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.arange(1))  # type: ignore[arg-type]  # no model is asked
    shift = onto_plane(problem, at, normal, torch.tensor([b], dtype=torch.float64))
    assert bool(((at + shift >= -1e-12) & (at + shift <= 1 + 1e-12)).all())
    ends = [(-v, 1 - v) for v in x]
    most = sum(max(c * e for e in end) for c, end in zip([v * (1 if b >= 0 else -1) for v in w], ends, strict=True))
    reached = float((normal * shift).sum())
    if abs(b) > most - 1e-9:
        assert abs(reached) >= min(abs(b), most) - 1e-7
        return
    assert reached == pytest.approx(b, abs=1e-7)
    size = float(lengths(problem, shift)[0])
    if norm == "linf":
        # min t with |d| <= t.
        A = [[*(s * float(i == j) for j in range(4)), -1.0] for i in range(4) for s in (1, -1)]
        best = linprog([0, 0, 0, 0, 1], A, [0.0] * 8, [[*w, 0.0]], [b], bounds=[*ends, (0, None)]).fun
    else:
        # The dual of min ‖d‖²/2: a concave function of one multiplier.
        def dual(m: float) -> float:
            d = [min(max(m * c, low), high) for c, (low, high) in zip(w, ends, strict=True)]
            return -(sum(v * v / 2 for v in d) - m * (sum(c * v for c, v in zip(w, d, strict=True)) - b))

        best = (2 * max(-minimize_scalar(dual, bounds=(-1e4, 1e4), method="bounded").fun, 0)) ** 0.5
        best = max(best, 0.0)
        assert size <= max(best * (1 + 1e-3), size if best == 0 else 0) + 1e-3
        return
    assert size == pytest.approx(best, abs=1e-6)


def test_checkpoints_end_with_the_run() -> None:
    assert max(checkpoints(7)) <= 7
    assert checkpoints(1) == {1}


class Hill(nn.Module):
    """One output, to be brought below zero: a bent ridge, upside down."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (x - torch.tensor([0.45, 0.6, 0.5], dtype=x.dtype)).unbind(1)
        return (3 * a**2 + 0.4 * b**2 + 1.1 * c**2 + 1.5 * a * b - 0.05 * torch.sin(9 * c + 4 * a) + 1)[:, None]


class Seen(Surrogate):
    """Writes down every point whose gradient is asked for."""

    exact, name = True, "seen"

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def slope(self, dynamics: Dynamics, x: Tensor, loss: Loss) -> Slope:
        self.points.append(x.detach().clone())
        return Final().slope(dynamics, x, loss)


def auto_pgd(center: Tensor, start: Tensor, eps: float) -> tuple[Tensor, list[float]]:
    """Croce & Hein's Algorithm 1, one sample, 40 steps: the iterates, and the step sizes after every checkpoint."""

    def project(x: Tensor) -> Tensor:
        return torch.clamp(x, center - eps, center + eps).clamp(0, 1)

    def climbs(x: Tensor, other: Tensor) -> bool:
        rise = float(f(x) - f(other))
        assert torch.equal(x, other) or abs(rise) > 1e-11  # no comparison is a matter of rounding
        return rise > 0 and not torch.equal(x, other)

    def f(x: Tensor) -> Tensor:
        return -Hill()(x[None])[0, 0]

    x = last = best = best_at_check = start
    size = size_at_check = 2 * eps
    paid, since, trace, sizes = 0, 0, [start], []
    for k in range(1, 41):
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(at), at)
        assert float(slope.abs().min()) > 1e-6
        ahead = project(x + size * slope.sign())
        alpha = 1.0 if k == 1 else 0.75
        last, x = x, project(x + alpha * (ahead - x) + (1 - alpha) * (x - last))
        trace.append(x)
        paid += climbs(x, last)
        best = x if climbs(x, best) else best
        if k in (9, 17, 23, 28, 32, 35, 38, 40):
            stuck = size == size_at_check and not climbs(best, best_at_check)
            size_at_check, best_at_check = size, best
            if paid < 0.75 * (k - since) or stuck:
                size, x = size / 2, best
            paid, since = 0, k
            sizes.append(size)
    return torch.stack(trace), sizes


def test_auto_pgd_takes_the_steps_of_its_algorithm() -> None:
    x = torch.rand(24, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ones, seen = torch.ones(24, 1, 1, dtype=torch.float64), Seen()
    problem = Problem(PlainDynamics(Hill()), Region(x, "0.25"), ones, 0 * ones[:, 0], torch.arange(24), seen)
    APGD("dlr", 40).search(problem)
    trace = torch.stack(seen.points, 1)
    plans = []
    for i in range(24):
        wanted, sizes = auto_pgd(x[i], trace[i, 0], 0.25)
        torch.testing.assert_close(trace[i], wanted, rtol=0, atol=1e-10)
        plans.append(tuple(sizes))
    assert len(set(plans)) > 3  # some halve their step where others go on


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: PGD(0), InputError),
        (lambda: PGD(step_size=0), InputError),
        (lambda: APGD("kl"), UnknownName),
        (lambda: APGD(steps=0), InputError),
        (lambda: FAB(targets=0), InputError),
        (lambda: Square(0), InputError),
        (lambda: Square(share=0), InputError),
    ],
)
def test_impossible_attacks_are_refused(build: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        build()  # type: ignore[operator]  # a function


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_every_sample_has_a_radius_of_its_own(attack: Attack, norm: str) -> None:
    model, x, labels = deq(4)
    wide, narrow = (problem_of(model, x, labels, eps, norm) for eps in ("0.2", "0.05"))
    mixed = replace(wide, region=wide.region.with_eps(["0.2", "0.05", "0", "0.2"]))
    found, alone, other = attack.search(mixed), attack.search(wide), attack.search(narrow)
    assert bool(mixed.region.contains(found.points).all())
    torch.testing.assert_close(found.margins[[0, 3]], alone.margins[[0, 3]], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.margins[1], other.margins[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(found.points[2], x[2])
