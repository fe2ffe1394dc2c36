"""Exact answers of small networks: every method held against them, and what has to be noticed if they are wrong."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_branching import network as classifier
from test_branching import question
from test_quadratic import monotone
from torch import nn

from verideq import Equilibrium, Status
from verideq.certify import bound, certify, prepare
from verideq.certify import exact as module
from verideq.certify.exact import GAP, Minimum, exact, minimum
from verideq.certify.method import Prepared, Query
from verideq.certify.program import Encoding, Outcome, Program, encode
from verideq.region import Region
from verideq.testing.conformance import BoundMethodSuite
from verideq.testing.truth import complaints, network


class TestExact(BoundMethodSuite):
    method = "exact"
    examples = 2


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["linf", "linf", "linf", "l2"]))
@example(14105, "linf")  # a ReLU before a layer without a gauge
def test_every_method_agrees_with_the_exact_answer(seed: int, norm: str) -> None:
    assert complaints(network(seed, norm=norm)) == []


# --- twins that are wrong, and have to be noticed ---------------------------------------------------------------------


def dropped(keep: Callable[[Any], bool]) -> Callable[[pytest.MonkeyPatch], None]:
    """Programs without some of their rows."""

    def twin(patch: pytest.MonkeyPatch) -> None:
        made = Program.__init__

        def init(self: Program, *args: Any, **options: Any) -> None:
            made(self, *args, **options)
            self.rows = [rows for rows in self.rows if keep(rows)]

        patch.setattr(Program, "__init__", init)

    return twin


def encoded(change: Callable[[Encoding], Encoding]) -> Callable[[pytest.MonkeyPatch], None]:
    """Another network in the program than the one that was asked about."""

    def twin(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(module, "encode", lambda scene: change(encode(scene)))

    return twin


def small_m(patch: pytest.MonkeyPatch) -> None:
    """Every big-M half of what it has to be."""
    made = Program._add_units

    def add(self: Program, name: str, first: int) -> None:
        known = self.scene.relaxed[name]
        self.scene.relaxed[name] = replace(known, pre=type(known.pre)(known.pre.lower / 2, known.pre.upper / 2))
        made(self, name, first)
        self.scene.relaxed[name] = known

    patch.setattr(Program, "_add_units", add)


def without_first_residual(encoding: Encoding) -> Encoding:
    """One equilibrium or ReLU may be anything in its box."""
    return replace(encoding, residuals=dict(list(encoding.residuals.items())[1:]))


def without_constants(encoding: Encoding) -> Encoding:
    """Injections without their biases."""
    changed = {name: replace(r, constant=0 * r.constant) for name, r in encoding.residuals.items()}
    return replace(encoding, residuals=changed)


def not_quite_fused(encoding: Encoding) -> Encoding:
    """A residual whose last row has lost a tenth of what it adds up."""
    changed = {}
    for name, residual in encoding.residuals.items():
        matrix = residual.matrix.tolil()
        matrix[-1] = 0.9 * matrix[-1]
        matrix[-1, encoding.columns[name].stop - 1] /= 0.9
        changed[name] = replace(residual, matrix=matrix.tocsr())
    return replace(encoding, residuals=changed)


def whole_units(patch: pytest.MonkeyPatch) -> None:
    """Triangles instead of units."""
    solve = Program._solve

    def relaxed(self: Program, *args: Any) -> Any:
        self.integer = False
        return solve(self, *args)

    patch.setattr(Program, "_solve", relaxed)


TWINS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a big-M that is too small": small_m,
    "no z >= p": dropped(lambda rows: not (rows.node and (rows.share > 0).all() and len(rows.share))),
    "no z = p where it is on": dropped(lambda rows: not (rows.node and (rows.share < 0).all() and len(rows.share))),
    "a unit may be on at no price": dropped(lambda rows: bool(rows.node)),
    "one layer may be anything": encoded(without_first_residual),
    "injections without biases": encoded(without_constants),
    "a row that is not quite W's": encoded(not_quite_fused),
    "triangles": whole_units,
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_program_is_noticed(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from verideq.testing.truth import _of_truth, _size

    def noticed(seed: int) -> bool:
        net = network(seed)
        truth = minimum(net.prepared, net.query)
        return bool(_of_truth(net, truth, _size(net, truth.points)))

    seeds = range(40)
    with monkeypatch.context() as patch:
        TWINS[twin](patch)
        found = next((seed for seed in seeds if noticed(seed)), None)
    assert found is not None and not noticed(found)


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["equilibrium", "two", "explicit"])
def test_every_sample_is_certified_or_falsified(kind: str, norm: str) -> None:
    net, found = classifier(kind, 0), Counter[Status]()
    prepared = prepare(net)
    for eps in ("1/20", "1/5"):
        centers = question(prepared, 0.1, count=4).box.center
        labels = prepared.graph(centers).argmax(1)
        for verdict in certify(net, centers, labels, eps, norm=norm, method="exact"):
            found[verdict.status] += 1
            assert verdict.method == "exact" and verdict.attacked is None
            assert verdict.checked is verdict.certified and (verdict.witness is None) is verdict.certified
    assert set(found) == {Status.CERTIFIED, Status.FALSIFIED}


def test_monotone_samples_are_decided_too() -> None:
    found = Counter[Status]()
    for seed in range(3):
        prepared = prepare(monotone(seed, units=4))
        centers = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        labels = prepared.graph(centers).argmax(1)
        found.update(v.status for v in certify(prepared, centers, labels, "3/20", method="exact"))
    assert set(found) == {Status.CERTIFIED, Status.FALSIFIED}


def test_without_a_goal_it_comes_to_the_exact_minimum() -> None:
    for seed in range(6):
        net = network(seed)
        assert net.prepared.graph.nodes  # of every kind
        truth, box = minimum(net.prepared, net.query), exact(net.prepared, net.query).box
        size = (
            1 + (net.C.abs() @ net.prepared.graph(truth.points[:, 0])[:, :, None].abs())[:, :, 0] + truth.values.abs()
        )
        assert bool((box.lower <= truth.values + 1e-10 * size).all())
        assert bool((box.lower >= truth.values - 4 * GAP * size).all())


def claiming(margin: float) -> Callable[..., Minimum]:
    """An integer program that claims this of every row."""

    def said(prepared: Prepared, query: Query, limit: int) -> Minimum:
        truth = minimum(prepared, query, limit)
        return replace(
            truth, claims=torch.full_like(truth.claims, margin), values=torch.full_like(truth.values, margin)
        )

    return said


def test_what_highs_says_is_never_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(classifier("two", 0))
    query = question(prepared, 0.2, count=6)
    assert query.region is not None
    arguments: Any = prepared, query.region.center, prepared.graph(query.region.center).argmax(1), "1/5"
    truth = [verdict.status for verdict in certify(*arguments, method="exact")]
    assert Status.FALSIFIED in truth
    for margin in (-1.0, 1.0, math.inf):
        monkeypatch.setattr(module, "minimum", claiming(margin))
        for before, after in zip(truth, certify(*arguments, method="exact"), strict=True):
            # A lie may cost the answer, or time; it never turns it round.
            assert after.status in (before, Status.UNKNOWN)
            assert margin < 0 or after.status is before  # branch and bound finds out by itself


def test_what_is_not_proved_is_not_certified_and_the_reason_says_who_claims_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = classifier("equilibrium", 0)
    prepared = prepare(net)
    centers = question(prepared, 0.2).box.center
    arguments: Any = net, centers, prepared.graph(centers).argmax(1), "1/5"
    hard = [i for i, v in enumerate(certify(*arguments, method="adjoint-refined")) if not v.certified]
    wanted = [i for i, v in enumerate(certify(*arguments, method="exact")) if v.certified and i in hard]
    assert wanted
    monkeypatch.setattr(module, "branch_and_bound", module.adjoint_refined)
    verdicts = certify(*arguments, method="exact")
    for i in wanted:
        assert verdicts[i].status is Status.UNKNOWN
        assert "HiGHS finds no margin below 0." in verdicts[i].reason and "no proof" in verdicts[i].reason
    late = certify(*arguments, method="exact", timeout=1e-6)
    assert all(late[i].status is Status.TIMEOUT and not late[i].checked for i in wanted)


def test_a_sample_that_is_too_large_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 2)
    prepared = prepare(classifier("two", 0))
    query = question(prepared, 0.2, count=6)
    sizes = minimum(prepared, query, limit=0).binaries
    truth = minimum(prepared, query, limit=2)
    centers = query.box.center
    verdicts = certify(prepared, centers, prepared.graph(centers).argmax(1), "1/5", method="exact")
    refused = 0
    assert {v.status for v in verdicts} <= {Status.CERTIFIED, Status.FALSIFIED, Status.UNKNOWN}
    for verdict, size, ends in zip(verdicts, sizes, truth.outcomes, strict=True):
        assert (Outcome.TOO_LARGE in ends) is (size > 2)
        # Where what is tried without a program already finds a proof or a counterexample, none is needed.
        if size > 2 and verdict.status is Status.UNKNOWN:
            assert f"has {size} binary variables, and more than 2" in verdict.reason
            assert "branch-and-bound" in verdict.reason
            refused += 1
    assert refused >= 2


def test_the_clock_is_kept() -> None:
    torch.manual_seed(0)
    fusion = nn.Linear(60, 60, bias=False)
    with torch.no_grad():
        fusion.weight.div_(fusion.weight.abs().sum(1, keepdim=True)).mul_(0.95)
    net = nn.Sequential(Equilibrium(fusion, nn.Linear(30, 60)), nn.Linear(60, 3))
    with torch.no_grad():
        net[1].weight.mul_(8)
    prepared = prepare(net)
    query = replace(question(prepared, 0.4, count=2, inputs=30), deadline=time.monotonic() + 2)
    started = time.monotonic()
    truth = minimum(prepared, query, limit=1000)
    assert time.monotonic() - started < 60  # it would go on for hours
    assert min(truth.binaries) > 40 and any(end is Outcome.LATE for ends in truth.outcomes for end in ends)
    # What there is by then is on the right side, and points are points.
    assert bool((truth.claims <= truth.values + 1e-6).all())
    assert query.region is not None and bool(query.region.contains(truth.points[:, 0]).all())


def test_a_batch_is_solved_sample_by_sample() -> None:
    prepared = prepare(classifier("explicit", 1))
    query = question(prepared, 0.2, count=3)
    whole = minimum(prepared, query)
    for i in range(3):
        alone = minimum(prepared, query.select(torch.tensor([i])))
        assert torch.equal(alone.values[0], whole.values[i]) and torch.equal(alone.claims[0], whole.claims[i])


def test_a_deployed_tolerance_moves_the_minimum_by_what_it_allows() -> None:
    prepared = prepare(classifier("equilibrium", 0))
    query = question(prepared, 0.1, count=3)
    exactly, loosely = minimum(prepared, query), minimum(prepared, replace(query, tolerance=1e-2))
    (u,) = (gauge.u for gauge in prepared.gauges.values())
    assert query.C is not None
    (last,) = (
        node.module
        for node in prepared.graph.nodes
        if isinstance(node.module, nn.Linear) and node is prepared.graph.nodes[-1]
    )
    charge = 1e-2 * ((query.C @ last.weight).abs() @ u)
    assert torch.allclose(exactly.claims - loosely.claims, charge, atol=1e-5)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    # HiGHS prints from C where its presolve was not exact: with balls it is often so.
    for seed in range(4):
        net = network(seed, norm="l2")
        minimum(net.prepared, net.query)
    print("and afterwards it works")
    assert capfd.readouterr().out == "and afterwards it works\n"


def test_both_ends_are_bounded() -> None:
    net = classifier("equilibrium", 0)
    region = Region(torch.full((2, 3), 0.5), 0.2)
    box, other = bound(net, region, method="exact"), bound(net, region, method="adjoint-refined")
    assert bool((box.lower >= other.lower - 1e-9).all()) and bool((box.upper <= other.upper + 1e-9).all())
    assert bool((box.width < other.width - 1e-3).any())
