"""Nothing false is certified: exact comparison with rationals over generated models, the solver stopped anywhere."""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given, settings

from verideq import Box, Status
from verideq.certify import Prepared, certify, prepare
from verideq.certify.bound import elide
from verideq.certify.interval import Arithmetic, propagate
from verideq.equilibrium import Auto
from verideq.testing.conformance import BoundMethodSuite
from verideq.testing.exact import ExactModel, exact, outside
from verideq.testing.strategies import Case, cases, convolution_cases, linear_cases

STEPS = (1, 2, 5, 20, 100)


def violations(case: Case, steps: tuple[int, ...] = STEPS) -> list[str]:
    """Where exact equilibria and margins leave their bounds, the solver stopped after each of `steps`."""
    prepared, truth = prepare(case.model), ExactModel(case.model)
    (name, _), last = next(prepared.graph.equilibria()), prepared.graph.nodes[-1]
    values = [[truth.values(point) for point in points] for points in case.points]
    C = exact(case.C)
    found = []
    for count in steps:
        equilibria, margins = both_boxes(prepared, case, name, count)
        for i, sample in enumerate(values):
            for value in sample:
                row = C @ value[last.name]
                found += [f"z{k} after {count}" for k in outside(value[name], equilibria.lower[i], equilibria.upper[i])]
                found += [f"margin {k} after {count}" for k in outside(row, margins.lower[i], margins.upper[i])]
    return found


def both_boxes(prepared: Prepared, case: Case, name: str, steps: int) -> tuple[Box, Box]:
    """The box of the equilibrium `name` and that of ``C @ model(x)``."""
    arithmetic = Arithmetic(prepared.gauges, Auto(tol=1e-13, max_steps=steps))
    last = prepared.graph.nodes[-1]
    seen: dict[str, Box] = {}
    inner = arithmetic.equilibrium
    arithmetic.equilibrium = lambda node, layer, box: seen.setdefault(node.name, inner(node, layer, box))  # type: ignore[method-assign]  # a spy
    features = propagate(prepared.graph, case.region.box(), arithmetic, until=last)
    C = case.C.expand(len(case.region), *case.C.shape)
    return seen[name], elide(features, C, last.module.weight, last.module.bias)


@settings(max_examples=850)
@given(linear_cases())
def test_no_linear_equilibrium_leaves_its_box(case: Case) -> None:
    assert violations(case) == []


@settings(max_examples=170)
@given(convolution_cases())
def test_no_convolutional_equilibrium_leaves_its_box(case: Case) -> None:
    assert violations(case) == []


class TestInterval(BoundMethodSuite):
    method = "interval"


def check_verdicts(case: Case, attack: str) -> None:
    """Hold verdicts against exact values, at thresholds on both sides of what the worst of the points gives."""
    truth, C = ExactModel(case.model), case.C[:1]
    values = [[(exact(C) @ truth(point))[0] for point in points] for points in case.points]
    for share in (-0.5, 0.5):
        bars = [float(min(v)) + share * float(v[0] - min(v)) - 0.01 * abs(float(min(v))) for v in values]
        rhs = torch.tensor(bars, dtype=torch.float64)[:, None]
        verdicts = certify(case.model, case.region.center, None, case.region.eps, C=C, rhs=rhs, attack=attack)
        for i, verdict in enumerate(verdicts):
            threshold = Fraction(bars[i])
            if verdict.status is Status.CERTIFIED:
                assert verdict.margin is not None and min(values[i]) - threshold >= Fraction(verdict.margin) > 0
            if verdict.status is Status.MISCLASSIFIED:
                assert values[i][0] <= threshold
            if verdict.status is Status.FALSIFIED:
                assert verdict.witness is not None
                witness = torch.from_numpy(verdict.witness)
                assert bool(case.region[i : i + 1].contains(witness[None]).all())
                assert (exact(C) @ truth(exact(witness)))[0] <= threshold


@settings(max_examples=100)
@given(cases())
def test_no_verdict_is_false_at_a_corner(case: Case) -> None:
    check_verdicts(case, "none")


@settings(max_examples=10)
@given(linear_cases())
def test_no_witness_is_false(case: Case) -> None:
    check_verdicts(case, "pgd")
