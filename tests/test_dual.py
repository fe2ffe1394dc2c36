"""The duals of the checker against exact equilibria: whatever the multipliers, splits and tightenings, bounds hold."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from verideq import Equilibrium
from verideq.certify import prepare
from verideq.certify.bound import run_method
from verideq.certify.certificate import Proof, Split, Step, Then, gauge_file, record
from verideq.checker import Checker
from verideq.checker.arithmetic import Exact, Rejected, guarded
from verideq.checker.claim import Case as CheckerCase
from verideq.checker.claim import read_claim
from verideq.checker.claim import region as box_of
from verideq.checker.files import parse_blob
from verideq.checker.proof import least_margins
from verideq.graph import INPUT, Graph, Node
from verideq.graph.operations import Add
from verideq.testing.exact import ExactModel, exact, matrix
from verideq.testing.strategies import Case, cases, fusions, regions

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def deep_cases(draw: st.DrawFn) -> Case:
    """ReLUs and equilibria one after another, with a residual sum."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    region, points = draw(regions((2,), dtype))
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def linear(inputs: int, outputs: int) -> nn.Linear:
        module = nn.Linear(inputs, outputs).to(dtype)
        with torch.no_grad():
            for tensor in (module.weight, module.bias):
                tensor.copy_(torch.randint(-8, 9, tensor.shape, generator=generator) / 8)
        return module

    def equilibrium() -> Equilibrium:
        fusion = nn.Linear(3, 3, bias=False).to(dtype)
        with torch.no_grad():
            fusion.weight.copy_(draw(fusions(3, 3)))
        return Equilibrium(fusion, nn.Identity())

    nodes = [
        Node("a", linear(2, 3), (INPUT,)), Node("r", nn.ReLU(), ("a",)), Node("e", equilibrium(), ("r",)),
        Node("b", linear(3, 3), ("e",)), Node("sum", Add(), ("b", "r")), Node("f", equilibrium(), ("sum",)),
        Node("last", linear(3, 2), ("f",)),
    ]  # fmt: skip
    graph = Graph(nodes, input_shape=(2,), pixel_range=region.clip)
    C = torch.randint(-8, 9, (2, 2), generator=generator).to(torch.float64)
    return Case(graph, region, points, C)


def shapes(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The state of every node that is relaxed."""
    relaxed = [node.name for node in graph.nodes if node.operation.kind in ("relu", "equilibrium")]
    return {name: values[name].shape for name in relaxed}


def multipliers(draw: random.Random, states: dict[str, tuple[int, ...]], rows: int) -> dict[str, np.ndarray]:
    """Random ones of every size and sign, for some of the nodes."""
    chosen = {}
    for name, state in states.items():
        if draw.random() < 0.8:
            size = draw.choice([0.0, 1e-300, 1e-3, 1.0, 1.0, 10.0, 1e30])
            generator = np.random.default_rng(draw.randrange(2**32))
            g = generator.integers(-8, 9, (rows, *state)) * size / 4
            chosen[name] = g.astype(draw.choice([np.float32, np.float64])) if size < 1e20 else g
    return chosen


def step(draw: random.Random, states: dict[str, tuple[int, ...]], rows: int, node: str | None = None) -> Step:
    """A bounding with random multipliers, recomputed ones, or none."""
    upto = dict(states)
    if node is not None:  # nothing behind the node can say anything of it
        names = list(states)
        upto = {name: states[name] for name in names[: names.index(node) + 1]}
    units = None
    if node is not None:
        size = int(np.prod(states[node]))
        units = np.array([draw.randrange(-size, size) for _ in range(rows)], dtype=np.int64)
    kind = draw.choice(["given", "given", "slopes", "none"])
    if kind == "slopes":
        return Step(node, draw.choice(["adaptive", "zero", "one"]), draw.randrange(5), units=units)
    return Step(node, units=units, multipliers=multipliers(draw, upto, rows) if kind == "given" else {})


def proof(
    draw: random.Random, boxes: Any, states: dict[str, tuple[int, ...]], shape: tuple[int, ...], rows: int
) -> Proof:
    """Random steps under random splits."""
    built: list[tuple[Step, ...]] = []

    def leaf() -> int:
        names = [draw.choice(list(states)) for _ in range(draw.randrange(3))]
        # in the order in which the network is gone through
        steps = [step(draw, states, draw.randint(1, 3), name) for name in sorted(names, key=list(states).index)]
        built.append((*steps, step(draw, states, rows)))
        return len(built) - 1

    def tree(depth: int) -> Any:
        if draw.randrange(3) == 0:  # tightenings for all that is below
            steps = [step(draw, states, draw.randint(1, 3), name) for name in states if draw.randrange(2)]
            if steps:
                built.append(tuple(steps))
                place = len(built) - 1
                return Then(place, tree(depth))
        if depth == 0:
            return leaf()
        name = draw.choice([*states, "input"])
        size = int(np.prod(shape if name == "input" else states[name]))
        at = Fraction(draw.randrange(0, 9), 8) if name == "input" else Fraction(0)
        return Split(name, draw.randrange(size), at, tree(depth - 1), tree(depth - 1))

    whole = tree(draw.randrange(3))
    return Proof(boxes=boxes, cases=tuple(built), trees=((None, whole),))


def signs(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Numbers of the sign of the pre-activations of every node that is relaxed."""
    found = {}
    for node in graph.nodes:
        if node.operation.kind == "relu":
            found[node.name] = values[node.inputs[0]].reshape(-1)
        if isinstance(node.module, Equilibrium):
            z, v = values[node.name], values[node.inputs[0]].reshape(-1)
            W = matrix(node.module.operator(), z.shape)
            found[node.name] = np.where(z.reshape(-1) > 0, z.reshape(-1), W @ z.reshape(-1) + v)
    return found


def satisfied(case: CheckerCase, x: np.ndarray, pre: dict[str, np.ndarray]) -> bool:
    """Whether a point is in the part of the ball that a case is about."""
    for split in case.splits:
        value = x.reshape(-1)[split.unit] if split.node == "input" else pre[split.node][split.unit]
        if not (value >= split.at if split.above else value <= split.at):
            return False
    return True


def violations(case: Case, seed: int, *, exactly: bool) -> list[str]:
    """Points of the region at which a proved margin does not hold."""
    draw, prepared = random.Random(seed), prepare(case.model)
    rows, region = case.C.shape[0], case.region
    bounds = run_method(prepared, region, case.C, "interval", 1000)
    truth = ExactModel(prepared.graph)
    states = shapes(prepared.graph, truth.values(case.points[0][0]))
    C, rhs = case.C.numpy(), np.zeros(rows)
    checker = Checker(prepared.file, gauge_file(prepared.file, prepared.gauges), exact=exactly)
    wrong = []
    for i, points in enumerate(case.points):
        made = proof(draw, bounds.proof(i).boxes, states, tuple(region.center.shape[1:]), rows)
        payload = record(checker.hash, i, region, i, made, label=None, C=C, rhs=rhs, margin=0.0)
        claim = read_claim(parse_blob(payload), checker.hash, checker.pixels, checker.arithmetic)
        # A centre whose values are 255ths is stored as bytes, and then it is the 255ths that are meant.
        lower, upper = box_of(read_claim(parse_blob(payload), checker.hash, checker.pixels, Exact()), Exact())
        known = [(x, truth.values(x)) for x in points if bool(((lower <= x) & (x <= upper)).all())]
        for part in claim.cases(rows):
            try:
                with guarded():
                    margin = least_margins(checker.arithmetic, checker.nodes, checker.layer, [part])[0]
            except Rejected:  # tightenings that cross, on a part that is empty
                continue
            for x, values in known:
                if satisfied(part, x, signs(prepared.graph, values)):
                    least = min(exact(case.C) @ values[prepared.graph.nodes[-1].name])
                    if np.isfinite(float(margin)) and least < Fraction(margin):
                        wrong.append(f"{float(least)} < {float(margin)} at {x}")
    return wrong


@pytest.mark.parametrize("exactly", [False, True])
@settings(max_examples=60)
@given(case=cases(), seed=SEEDS)
def test_every_multiplier_gives_a_bound(exactly: bool, case: Case, seed: int) -> None:
    assert violations(case, seed, exactly=exactly) == []


@pytest.mark.parametrize("exactly", [False, True])
@settings(max_examples=60)
@given(case=deep_cases(), seed=SEEDS)
def test_every_multiplier_gives_a_bound_in_deep_networks(exactly: bool, case: Case, seed: int) -> None:
    assert violations(case, seed, exactly=exactly) == []
