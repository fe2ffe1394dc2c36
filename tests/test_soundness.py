"""Nothing false is certified: exact comparison with rationals, over generated models and over cases that others get wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from verideq import Box, Equilibrium, Region, bound
from verideq.certify import Prepared, prepare
from verideq.certify.bound import elide
from verideq.certify.interval import Arithmetic, propagate
from verideq.equilibrium import Auto
from verideq.graph import trace
from verideq.testing.exact import ExactModel, exact, outside
from verideq.testing.strategies import Case, convolution_cases, linear_cases

STEPS = (1, 2, 5, 20, 100)


def violations(case: Case, steps: tuple[int, ...] = STEPS) -> list[str]:
    """Where exact equilibria and margins leave their bounds, the solver stopped after each of `steps`."""
    prepared, truth = prepare(case.model), ExactModel(trace(case.model))
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


@settings(max_examples=800)
@given(linear_cases())
def test_no_linear_equilibrium_leaves_its_box(case: Case) -> None:
    assert violations(case) == []


@settings(max_examples=300)
@given(convolution_cases())
def test_no_convolutional_equilibrium_leaves_its_box(case: Case) -> None:
    assert violations(case) == []
