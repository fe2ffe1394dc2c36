"""Lipschitz bounds: never below a difference quotient, exact where they can be, and refused where multipliers lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_balls import NETS
from test_quadratic import monotone
from torch import Tensor, nn

from verideq import Equilibrium, Region, Status
from verideq.certify import Prepared, bound, certify, constants, lipschitz_constants, margin_rows, prepare, semidefinite
from verideq.certify.bound import run_method
from verideq.certify.certificate import record
from verideq.certify.lipschitz import Slopes, _by_gauge, _by_strength, _form, closed, slopes_of, unit
from verideq.certify.method import Query
from verideq.certify.quadratic import form_of
from verideq.checker import Checker
from verideq.errors import InputError, NoGaugeError
from verideq.parametrizations import IBPMonDEQ
from verideq.region import NORMS
from verideq.testing.conformance import BoundMethodSuite
from verideq.testing.exact import ExactModel, exact, outside

SEEDS = st.integers(0, 2**32 - 1)
SIZES = {"l2": 2, "linf": math.inf}


def gauged(seed: int = 0, units: int = 4, inputs: int = 3) -> nn.Sequential:
    """A small net with a gauge."""
    torch.manual_seed(seed)
    fusion = IBPMonDEQ.apply(nn.Linear(units, units, bias=False), m=0.3)
    return nn.Sequential(Equilibrium(fusion, nn.Linear(inputs, units)), nn.Linear(units, 3)).double()


def quotients(model: nn.Module, C: Tensor, points: Tensor, others: Tensor, norm: str) -> Tensor:
    """How fast rows change between points, (pairs, rows)."""
    change = ((model(points) - model(others)).detach() @ C.T).abs()
    return change / torch.linalg.vector_norm((points - others).flatten(1), SIZES[norm], 1)[:, None]


def gradients(model: nn.Module, C: Tensor, points: Tensor, norm: str) -> Tensor:
    """The largest quotients around points: (points, rows)."""
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x) for x in points])
    rows = torch.einsum("ko,bon->bkn", C, jacobian.flatten(2))
    return rows.norm(dim=2) if norm == "l2" else rows.abs().sum(2)


class TestLipschitz(BoundMethodSuite):
    method = "lipschitz"
    examples = 8


# --- constants --------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=SEEDS, kind=st.sampled_from(["gauge", "monotone"]), norm=st.sampled_from(NORMS), units=st.integers(1, 5))
def test_no_quotient_is_above_its_constant(seed: int, kind: str, norm: str, units: int) -> None:
    model = gauged(seed % 1000, units, 2) if kind == "gauge" else monotone(seed, units, 2, 0.5)
    prepared = prepare(model)
    C = torch.randint(-2, 3, (3, 3), generator=torch.Generator().manual_seed(seed % 2**31)).double()
    constant = lipschitz_constants(prepared, C, norm=norm, shape=(2,))
    draw = torch.Generator().manual_seed(seed % 2**31)
    points = 4 * torch.randn(200, 2, dtype=torch.float64, generator=draw)
    others = points + torch.randn(200, 2, dtype=torch.float64, generator=draw) * torch.logspace(-3, 1, 200)[:, None]
    seen = quotients(prepared.graph, C, points, others, norm)
    assert bool((seen <= constant * (1 + 1e-6) + 1e-6).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_no_gradient_is_above_its_constant(name: str, norm: str) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    prepared = prepare(make().eval())
    points = torch.randn(8, *shape, dtype=torch.float64)
    outputs = prepared.graph(points).shape[1]
    C = torch.randn(2, outputs, dtype=torch.float64)
    constant = lipschitz_constants(prepared, C, norm=norm, shape=shape)
    seen = gradients(prepared.graph, C, points, norm)
    assert bool((seen <= constant + 1e-9).all()) and bool((constant < 1e3 * seen.amax(0) + 100).all())


def test_a_linear_model_has_its_own_constant() -> None:
    torch.manual_seed(0)
    last = nn.Linear(5, 3).double()
    still = Equilibrium.from_matrices(torch.zeros(3, 3), torch.eye(3), 100 * torch.ones(3)).double()
    C = torch.randn(2, 3, dtype=torch.float64)
    rows = (C @ last.weight).detach()
    for norm, truth in (("l2", rows.norm(dim=1)), ("linf", rows.abs().sum(1))):
        found = lipschitz_constants(last, C, norm=norm, shape=(5,))
        assert bool((truth <= found).all()) and torch.allclose(found, truth, rtol=2e-12, atol=0)
        # With a ReLU for every row, none of which is ever off.
        found = lipschitz_constants(nn.Sequential(last, still, nn.Linear(3, 2).double()), norm=norm, shape=(5,))
        assert bool(found.isfinite().all())


def test_one_unit_is_bounded_exactly() -> None:
    """``z = relu(w z + u·x)`` moves by ``u / (1 - w)``, whatever the sign of ``w``, and below -1 too."""
    u = torch.tensor([[3.0, -4.0]])
    for w in (0.5, -0.5, -10.0):
        model = nn.Sequential(Equilibrium.from_matrices(torch.tensor([[w]]), u), nn.Linear(1, 1, bias=False))
        nn.init.constant_(model[1].weight, 2.0)
        for norm, size in (("l2", 5), ("linf", 7)):
            assert float(lipschitz_constants(model, norm=norm, shape=(2,))) == pytest.approx(
                2 * size / (1 - w), rel=1e-5
            )


def test_a_rotation_is_bounded_nearly_exactly() -> None:
    """``(mI - K)⁻¹`` for a skew ``K``: neither ``1 / m`` nor ``|W|`` sees what cancels; the semidefinite bound does."""
    W = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    last = nn.Linear(2, 1, bias=False)
    nn.init.constant_(last.weight, 1.0)
    model = nn.Sequential(Equilibrium.from_matrices(W, torch.eye(2), torch.zeros(2)), last)
    prepared = prepare(model)
    truth = float((torch.ones(1, 2) @ torch.linalg.inv(torch.eye(2) - W)).norm())
    problem = unit(form_of(prepared, torch.zeros(1, 2)), torch.ones(1, 2).double(), True)
    found, crude = (
        float(lipschitz_constants(prepared, shape=(2,))), float(_by_strength(problem).constants(problem)[0]),
    )  # fmt: skip
    assert truth <= found <= 1.5 * truth and found < crude * 0.95 + 1e-9


@pytest.mark.parametrize("ball", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_are_what_they_are_called(seed: int, ball: bool) -> None:
    form = form_of(prepare(gauged(seed)), torch.zeros(1, 3))
    c = torch.randn(4, 4, dtype=torch.float64)
    problem = unit(form, c, ball)
    passed = torch.linalg.solve(torch.eye(4) - form.W.abs(), form.U.abs())
    a = c.abs() @ passed
    truth = a.norm(dim=1) if ball else a.sum(1)
    assert bool((_by_gauge(problem).constants(problem) <= truth * (1 + 1e-4)).all())
    # Without a sign nothing cancels.
    positive = unit(replace(form, W=form.W.abs(), U=form.U.abs()), c.abs(), ball)
    assert torch.allclose(_by_gauge(positive).constants(positive), truth, rtol=1e-4)
    U = form.divisor[:, None] * form.U
    norm = torch.linalg.matrix_norm(U, 2) if ball else math.inf
    crude = _by_strength(problem).constants(problem)
    assert bool((crude <= c.norm(dim=1) * norm / form.m * (1 + 1e-4)).all()) and bool(crude.isfinite().all())


@pytest.mark.parametrize("ball", [True, False])
@pytest.mark.parametrize("make", [lambda seed: gauged(seed, 4, 4), lambda seed: monotone(seed, 6, 4)])
def test_the_solver_is_never_worse_than_the_closed_forms(make: Callable[[int], nn.Module], ball: bool) -> None:
    gained = []
    for seed in range(3):
        prepared = prepare(make(seed))
        form = form_of(prepared, torch.zeros(1, 4), monotone=False)
        problem = unit(form, form.C, ball)
        before = closed(problem).constants(problem)
        wanted = torch.ones(len(form.C), dtype=torch.bool)
        after = slopes_of(prepared, problem, wanted, math.inf).constants(problem)
        assert bool((after <= before * (1 + 1e-9)).all())
        gained.append(float((after / before).min()))
        # Asked once.
        assert len(prepared.slopes) == len(form.C)
        again = slopes_of(prepared, problem, wanted, -math.inf).constants(problem)
        assert torch.equal(again, after)
    assert min(gained) < 0.95


def test_a_row_and_its_negative_are_asked_once() -> None:
    prepared = prepare(gauged())
    form = form_of(prepared, torch.zeros(1, 3))
    c = torch.randn(1, 4, dtype=torch.float64)
    problem = unit(form, torch.cat((c, -c, 0 * c)), True)
    slopes_of(prepared, problem, torch.ones(3, dtype=torch.bool), math.inf)
    assert len(prepared.slopes) == 2


def test_a_solver_that_fails_costs_nothing_but_its_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    C = torch.eye(3, dtype=torch.float64)
    whole = lipschitz_constants(gauged(), C, shape=(3,))
    monkeypatch.setattr(semidefinite, "SETTINGS", {"max_iters": 1})
    hasty = lipschitz_constants(gauged(), C, shape=(3,))
    monkeypatch.setattr(semidefinite, "_solved", lambda *_: None)
    crude = lipschitz_constants(gauged(), C, shape=(3,))
    assert bool((whole <= crude).all() and (hasty <= crude * (1 + 1e-9)).all()) and bool(crude.isfinite().all())
    for lie in ((np.zeros(4), 0.0), (np.full(4, 1e9), 1e-9), (np.array([1.0, 0.0, 0.0, 0.0]), 1.0)):
        monkeypatch.setattr(semidefinite, "_solved", lambda *_, lie=lie: lie)
        found = lipschitz_constants(gauged(), C, shape=(3,))
        assert bool((whole * 0.99 <= found).all()) and bool((found <= crude * (1 + 1e-9)).all())


def test_no_row_is_begun_that_the_time_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, now, asked = prepare(gauged()), [0.0], [0]
    problem = unit(form_of(prepared, torch.zeros(1, 3).double(), monotone=False), torch.eye(4).double(), False)

    def slow(W: Tensor, U: Tensor, c: Tensor, tau: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        now[0], asked[0] = now[0] + 3, asked[0] + 1
        return tau, s

    monkeypatch.setattr("verideq.certify.lipschitz.proposed", slow)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    every = torch.ones(4, dtype=torch.bool)
    for deadline, rows in ((0.0, 0), (11.9, 3), (12.1, 4), (12.1, 4)):
        now[0], asked[0] = 0.0, 0
        slopes_of(replace(prepared, slopes={}), problem, every, deadline)
        assert asked[0] == rows


def test_what_is_too_large_for_the_quadratic_dual_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    close = lipschitz_constants(gauged(), shape=(3,))
    monkeypatch.setattr(constants, "LARGEST", 1)
    wide = lipschitz_constants(gauged(), shape=(3,))
    assert bool((close < wide).all()) and bool(wide.isfinite().all())


@pytest.mark.parametrize("norm", NORMS)
def test_calls_that_make_no_sense_are_refused(norm: str) -> None:
    model = gauged()
    with pytest.raises(InputError, match="give shape"):
        lipschitz_constants(model, norm=norm)
    for C in (torch.ones(1, 2), torch.ones(3), torch.full((1, 3), torch.nan)):
        with pytest.raises(InputError, match="expected finite"):
            lipschitz_constants(model, C, norm=norm, shape=(3,))
    with pytest.raises(InputError, match="needs a vector"):
        lipschitz_constants(nn.Conv2d(1, 1, 1), norm=norm, shape=(1, 2, 2))
    with pytest.raises(NoGaugeError):
        lipschitz_constants(Equilibrium.from_matrices(2 * torch.eye(2), torch.eye(2)), norm=norm, shape=(2,))


# --- bounds over balls ------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=SEEDS, angle=st.integers(0, 11), size=st.sampled_from(["1/100", "1/4", "2"]))
def test_no_exact_output_of_an_l2_ball_leaves_its_bound(seed: int, angle: int, size: str) -> None:
    eps, t = Fraction(size), Fraction(angle - 5, 3)
    for model in (monotone(seed), gauged(seed % 1000, 3, 2)):
        region = Region(torch.tensor([[0.5, 0.5]]), eps, "l2", None)
        box = bound(model, region, method="lipschitz")
        x = exact(region.center[0]) + np.array([(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)], dtype=object) * eps
        assert outside(ExactModel(prepare(model).graph)(x), box.lower[0], box.upper[0]) == []


def test_the_bound_is_the_centre_less_the_constant() -> None:
    model = monotone(3, 5, 4)
    prepared, center = prepare(model), torch.full((2, 4), 0.5, dtype=torch.float64)
    C = torch.eye(3, dtype=torch.float64)
    for norm in NORMS:
        constant = lipschitz_constants(prepared, C, norm=norm, shape=(4,))
        box = bound(prepared, Region(center, "1/20", norm, None), C=C, method="lipschitz")
        middle = prepared.graph(center)
        assert bool((box.lower >= middle - constant / 20 - 1e-4).all())
        assert bool((box.upper <= middle + constant / 20 + 1e-4).all())


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_never_below_intervals_and_its_records_are_accepted(norm: str) -> None:
    images = torch.rand(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    certified = 0
    for seed in range(4):
        for model in (monotone(seed), gauged(seed, 4, 2)):
            prepared = prepare(model)
            labels = prepared.graph(images).argmax(1)
            C = margin_rows(labels, 3)
            region = Region(images, "1/40", norm)
            ours, theirs = (run_method(prepared, region, C, method).box for method in ("lipschitz", "interval"))
            assert bool((ours.lower >= theirs.lower - 1e-9).all()) and bool((ours.upper <= theirs.upper + 1e-9).all())
            verdicts = certify(prepared, images, labels, "1/40", norm=norm, method="lipschitz")
            assert {v.status for v in verdicts} <= {Status.CERTIFIED, Status.UNKNOWN}
            assert not any("refused" in v.reason for v in verdicts)
            records = [v.certificate for v in verdicts if v.certificate is not None]
            certified += len(records)
            for exactly in (False, True):
                checker = Checker(prepared.file, prepared.certificate, exact=exactly)
                assert [why for accepted, why, _ in checker.decide(records) if not accepted] == []
    assert certified >= 20


def test_a_batch_and_its_order_change_nothing() -> None:
    images = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prepared = prepare(monotone(1))
    labels = prepared.graph(images).argmax(1)
    whole = certify(prepared, images, labels, "1/10", norm="l2", method="lipschitz")
    alone = [
        certify(prepare(monotone(1)), images[i : i + 1], labels[i : i + 1], "1/10", norm="l2", method="lipschitz")[0]
        for i in (4, 2, 0, 1, 3)
    ]
    for i, verdict in zip((4, 2, 0, 1, 3), alone, strict=True):
        assert verdict.status is whole[i].status
        assert verdict.margin == pytest.approx(whole[i].margin, rel=1e-6, abs=1e-9)


def test_where_the_quadratic_dual_does_not_fit_intervals_are_left() -> None:
    prepared, center = prepare(gauged()), torch.full((1, 3), 0.5, dtype=torch.float64)
    weighted = Region(center, "1/10", "l2", None, weights=torch.tensor([1.0, 0.5, 0.0]))
    plain = Region(center, "1/10", "l2", None)
    for region, tolerance in ((weighted, 0.0), (plain, 0.01)):
        ours, theirs = (
            run_method(prepared, region, None, method, tolerance=tolerance).box for method in ("lipschitz", "interval")
        )
        assert torch.allclose(ours.lower, theirs.lower) and torch.allclose(ours.upper, theirs.upper)
    late = run_method(prepared, plain, None, "lipschitz", deadline=-math.inf).box
    assert bool((late.lower <= run_method(prepared, plain, None, "lipschitz").box.lower + 1e-9).all())
    two = nn.Sequential(gauged(), nn.ReLU(), nn.Linear(3, 2)).double()
    query = Query(plain.box(), plain, None)
    assert _form(prepare(two), query) is None and _form(prepared, query) is not None


# --- forged -----------------------------------------------------------------------------------------------------------


def proposal() -> tuple[Prepared, Region, Any, Tensor]:
    """A row, and the record of its bound."""
    prepared = prepare(monotone(3, 5, 4))
    region = Region(torch.full((1, 4), 0.5), "1/20", "l2", None)
    C = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    bounds = run_method(prepared, region, C[None], "lipschitz", upper=False)
    return prepared, region, bounds.proof(0), bounds.box.lower[0]


def claimed(prepared: Prepared, region: Region, made: Any, margin: float) -> tuple[bool, str]:
    """What the checker says of a claim that the row is above 0 by so much."""
    lower = float(proposal_lower()) - 1
    payload = record(
        prepared.checker.hash, 0, region, 0, made, label=None, C=np.array([[1.0, -1.0, 0.0]]),
        rhs=np.array([lower]), margin=margin,
    )  # fmt: skip
    return prepared.checker.decide([payload])[0][:2]


def proposal_lower() -> float:
    return float(proposal()[3])


def changed(made: Any, **factors: float) -> Any:
    """The proof with some arrays multiplied."""
    (steps,) = made.cases
    own = {name: array * np.float32(factors.get(name, 1.0)) for name, array in steps[-1].quadratic.items()}
    return replace(made, cases=((replace(steps[-1], quadratic=own),),))


FORGED: dict[str, tuple[dict[str, float], float, bool]] = {
    "as it is": ({}, 1.0, True),
    "a constant that is a thousandth smaller": ({}, 1.001, False),
    "a tau that is not convex": ({"tau": 50.0}, 1.0, False),
    "an s that is smaller": ({"s": 0.5}, 1.0, False),
    "a negative lambda": ({"lambda": -1.0}, 1.0, False),
    "a tau of the other sign": ({"tau": -1.0}, 1.0, False),
    "less": ({}, 0.999, True),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_multipliers_are_refused(name: str) -> None:
    factors, margin, accepted = FORGED[name]
    prepared, region, made, _ = proposal()
    assert claimed(prepared, region, changed(made, **factors), margin)[0] is accepted


def test_an_overstated_m_is_refused_by_what_follows_from_it() -> None:
    prepared = prepare(monotone(3, 5, 4))
    region = Region(torch.full((1, 4), 0.5), "1/20", "l2", None)
    form = form_of(prepared, region.center)
    c = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64) @ form.C
    honest = _by_strength(unit(form, c, True))
    lied = _by_strength(unit(replace(form, m=form.m * 100), c, True))
    problem = unit(form, c, True)
    assert bool(honest.constants(problem).isfinite().all())
    # The quadratic is not convex, or the constant is as large as it is.
    assert float(lied.constants(problem)) >= float(
        gradients(prepared.graph, torch.tensor([[1.0, -1.0, 0.0]]).double(), region.center, "l2")
    )


def test_a_constant_is_what_the_checker_says_and_not_what_the_solver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = monotone(3, 5, 4)
    truth = lipschitz_constants(model, shape=(4,))

    class Liar(Slopes):
        def constants(self, problem: Any) -> Tensor:
            return super().constants(problem) * 1e-3

    def lied(prepared: Prepared, problem: Any, wanted: Tensor, deadline: float) -> Slopes:
        honest = closed(problem)
        return Liar(honest.tau * 40, honest.s * 0.01)

    monkeypatch.setattr(constants, "slopes_of", lied)
    found = lipschitz_constants(model, shape=(4,))
    assert bool((found >= truth * (1 - 1e-9)).all())
