"""Branch and bound: complete on small networks, never above an exact output, and every tree read by the checker."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from verideq import Box, Equilibrium
from verideq.certify import Prepared, branching, certify, prepare
from verideq.certify.adjoint import first
from verideq.certify.ascent import Trial, adjoint_ascent
from verideq.certify.bound import margin_rows, run_method
from verideq.certify.branching import FEATURES, Branching, branch_and_bound
from verideq.certify.certificate import Proof, record
from verideq.certify.method import Bounds, Query
from verideq.checker import Checker
from verideq.checker.files import parse_blob
from verideq.graph import INPUT
from verideq.region import Region
from verideq.status import Status
from verideq.testing.conformance import BoundMethodSuite


@pytest.fixture(scope="module", autouse=True)
def few_nodes() -> Iterator[None]:
    """Smaller trees where no goal ends the search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branching, "FREE_NODES", 40)
        yield


class TestBranchAndBound(BoundMethodSuite):
    method = "branch-and-bound"
    examples = 5


def contraction(units: int) -> nn.Linear:
    """A random ``W`` with rows of absolute sum 0.8."""
    fusion = nn.Linear(units, units, bias=False)
    with torch.no_grad():
        fusion.weight.div_(fusion.weight.abs().sum(1, keepdim=True)).mul_(0.8)
    return fusion


def network(kind: str, seed: int, inputs: int = 3) -> nn.Module:
    """A random network with large weights."""
    torch.manual_seed(seed)
    if kind == "equilibrium":
        layers: list[nn.Module] = [Equilibrium(contraction(8), nn.Linear(inputs, 8)), nn.Linear(8, 3)]
    elif kind == "two":
        one, two = Equilibrium(contraction(5), nn.Linear(inputs, 5)), Equilibrium(contraction(5), nn.Linear(5, 5))
        layers = [one, two, nn.Linear(5, 3)]
    else:
        layers = [nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "fusion" not in name and parameter.dim() > 1:
                parameter.mul_(3)
        # No class is ahead in the middle, so that it is close everywhere.
        net[-1].bias.sub_(net(torch.full((1, inputs), 0.5))[0])  # type: ignore[union-attr, operator]  # a Linear
    return net


KINDS = ("equilibrium", "two", "explicit")


def question(prepared: Prepared, eps: float, count: int = 8, inputs: int = 3, norm: str = "linf") -> Query:
    """Margins of the predicted labels on balls around random inputs."""
    centers = torch.rand(count, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    region, C = Region(centers, eps, norm), margin_rows(prepared.graph(centers).argmax(1), 3)
    return Query(region.box(), region, C, torch.zeros(count, 2, dtype=torch.float64), upper=False)


def sampled(prepared: Prepared, query: Query, points: int = 9) -> Tensor:
    """(samples, rows) the least of every row on a grid of the box, its corners included."""
    steps = torch.linspace(0, 1, points, dtype=torch.float64)
    grid = torch.tensor(list(itertools.product(steps.tolist(), repeat=query.box.lower.shape[1])), dtype=torch.float64)
    least = []
    for i in range(len(query)):
        x = query.box.lower[i] + grid * query.box.width[i]
        assert query.region is not None and query.C is not None
        x = query.region[torch.full((len(x),), i)].project(x)
        least.append((prepared.graph(x) @ query.C[i].T).amin(0))
    return torch.stack(least)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_certified_or_falsified(kind: str, seed: int) -> None:
    prepared = prepare(network(kind, seed))
    outcomes = set()
    for eps in (0.05, 0.2):
        query = question(prepared, eps)
        found, least = branch_and_bound(prepared, query), sampled(prepared, query)
        proved = query.closed(found.box.lower)
        for i in range(len(query)):
            outcomes.add(bool(proved[i]))
            assert bool(proved[i]) != (i in found.witnesses)
            if proved[i]:
                assert bool((found.box.lower[i] <= least[i] + 1e-9).all()) and bool((least[i] > 0).all())
            else:
                x = found.witnesses[i][None]
                assert query.region is not None and bool(query.region[i : i + 1].contains(x))
                assert query.C is not None and bool((query.C[i] @ prepared.graph(x)[0] < 0).any())
    assert outcomes == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_goal_it_comes_to_the_exact_minimum(kind: str) -> None:
    prepared = prepare(network(kind, 0))
    query = replace(question(prepared, 0.25, count=4), rhs=None)
    before, after, least = adjoint_ascent(prepared, query), branch_and_bound(prepared, query), sampled(prepared, query)
    assert bool((after.box.lower >= before.box.lower).all()) and bool((after.box.lower <= least + 1e-9).all())
    # What is left is the mesh of the grid, and much less than what there was.
    assert float((least - before.box.lower).sum()) > 2 * float((least - after.box.lower).sum())


def accepted(prepared: Prepared, query: Query, bounds: Bounds, i: int, rhs: Any, exact: bool = False) -> Any:
    """What the checker says of the rows of a sample being above `rhs`."""
    checker = Checker(prepared.file, prepared.certificate, exact=exact)
    return checker.decide([payload(prepared, query, bounds.proof(i), i, rhs)])[0]


def payload(prepared: Prepared, query: Query, proof: Proof, i: int, rhs: Any) -> bytes:
    assert query.region is not None and query.C is not None
    C = query.C[i].numpy()
    return record(prepared.checker.hash, i, query.region, i, proof, label=None, C=C, rhs=rhs, margin=0.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_checker_reads_every_tree(kind: str, norm: str) -> None:
    prepared = prepare(network(kind, 0))
    query = replace(question(prepared, 0.25, count=2, norm=norm), rhs=None)
    assert query.region is not None
    before = adjoint_ascent(prepared, query).box.lower
    bounds = run_method(prepared, query.region, query.C, "branch-and-bound", upper=False)
    assert bool((bounds.box.lower > before + 1e-3).any())
    for i in range(len(query)):
        proved = bounds.box.lower[i].numpy()
        assert any(not isinstance(tree, int) for _, tree in bounds.proof(i).trees)
        for exact in (False, True) if i == 0 else (False,):
            good, reason, margin = accepted(prepared, query, bounds, i, proved - 1e-5 * (1 + abs(proved)), exact)
            assert good, reason
            assert margin is not None and margin < 1e-4 * (1 + abs(proved)).max()
        assert not accepted(prepared, query, bounds, i, proved + 1e-5 * (1 + abs(proved)))[0]


def edited(data: bytes, change: Any) -> bytes:
    """A record with another tree."""
    blob = parse_blob(data)
    head = json.loads(json.dumps(blob.head))
    for entry in head["trees"]:
        entry["tree"] = change(entry["tree"])
    return save({k: np.ascontiguousarray(v) for k, v in blob.arrays.items()}, metadata={"verideq": json.dumps(head)})


def leaves(tree: Any) -> list[Any]:
    """Every case of a tree that ends it."""
    if "then" in tree:
        return leaves(tree["then"])
    return leaves(tree["below"]) + leaves(tree["above"]) if "below" in tree else [tree["case"]]


def swapped(tree: Any) -> Any:
    """The same with the halves of every split exchanged."""
    if "then" in tree:
        return {**tree, "then": swapped(tree["then"])}
    return {**tree, "below": swapped(tree["above"]), "above": swapped(tree["below"])} if "below" in tree else tree


def test_no_other_tree_passes_for_the_same() -> None:
    prepared = prepare(network("two", 0))
    query = replace(question(prepared, 0.25, count=2), rhs=None)
    bounds = branch_and_bound(prepared, query)
    for i in range(len(query)):
        lower = bounds.box.lower[i].numpy()
        data = payload(prepared, query, bounds.proof(i), i, lower - 1e-5 * (1 + abs(lower)))
        place = leaves(parse_blob(data).head["trees"][0]["tree"])[0]
        forgeries: dict[str, Any] = {
            "halves exchanged": swapped,
            "without the tightenings": lambda tree: tree.get("then", tree),
            "one leaf for all": lambda tree, leaf=place: {**tree, "then": {"case": leaf}},
            "tightenings of what is not there": lambda tree: {**tree, "case": 10**6},
            "rows where tightenings belong": lambda tree, leaf=place: {"case": leaf, "then": tree},
            "tightenings where rows belong": lambda tree: {"case": tree["case"]},
            "a field more": lambda tree: {**tree, "rows": None},
        }
        assert prepared.checker.decide([edited(data, lambda tree: tree)])[0][0]
        for what, change in forgeries.items():
            assert not prepared.checker.decide([edited(data, change)])[0][0], what


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_see_its_batch_mates(kind: str) -> None:
    prepared = prepare(network(kind, 1))
    query = question(prepared, 0.2, count=2)
    for asked in (query, replace(query, rhs=None, upper=True)):
        whole = branch_and_bound(prepared, asked)
        for i in range(len(query)):
            alone = branch_and_bound(prepared, asked.select(torch.tensor([i])))
            assert torch.allclose(alone.box.lower[0], whole.box.lower[i], rtol=1e-6, atol=1e-6)
            assert torch.allclose(alone.box.upper[0], whole.box.upper[i], rtol=1e-6, atol=1e-6)
            assert (0 in alone.witnesses) == (i in whole.witnesses)


@pytest.mark.parametrize("kind", KINDS)
def test_highs_is_asked_for_points_half_way_through_the_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(network(kind, 0))
    query = replace(question(prepared, 0.2, count=12), deadline=time.monotonic() + 600)
    truth = branch_and_bound(prepared, query)
    # Neither the ascent nor the tree may find what HiGHS is to find.
    monkeypatch.setattr(branching, "NODES", 1)
    monkeypatch.setattr(Trial, "worst", lambda self, scene, C, *_: (scene.values[INPUT].center, C[:, 0] * 0 + 1e9))
    assert not branch_and_bound(prepared, query).witnesses
    monkeypatch.setattr(branching, "HALF", 0.0)
    found = branch_and_bound(prepared, query)
    assert query.C is not None and truth.witnesses and set(found.witnesses) == set(truth.witnesses)
    for i, x in found.witnesses.items():
        assert query.region is not None and bool(query.region[i : i + 1].contains(x[None]))
        assert bool((query.C[i] @ prepared.graph(x[None])[0] < 0).any())
    assert bool((query.closed(truth.box.lower) | ~query.closed(found.box.lower)).all())


def test_it_hands_back_what_it_has_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branching, "FREE_NODES", 10**6)
    monkeypatch.setattr("time.monotonic", time.process_time)  # a second of work, however busy the machine is
    torch.manual_seed(3)
    net = nn.Sequential(Equilibrium(contraction(150), nn.Linear(20, 150)), nn.Linear(150, 3))
    with torch.no_grad():
        net[1].weight.mul_(8)
    prepared = prepare(net)
    query = replace(question(prepared, 0.4, count=6, inputs=20), rhs=None)
    branch_and_bound(prepared, replace(query, deadline=time.monotonic()))  # imports, and the first use of everything
    started = time.monotonic()
    bounds = branch_and_bound(prepared, replace(query, deadline=started + 1))
    assert time.monotonic() - started < 30  # it would go on for hours
    assert bool((bounds.box.lower >= first(prepared, query, tightened=True).best.lower).any())
    lower = bounds.box.lower[0].detach().numpy()
    assert accepted(prepared, query, bounds, 0, lower - 1e-5 * (1 + abs(lower)))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_where_the_time_was_up_long_before(kind: str) -> None:
    prepared = prepare(network(kind, 0))
    stage = first(prepared, question(prepared, 0.2, count=12), tightened=True)
    late = replace(stage, query=replace(stage.query, deadline=time.monotonic() - 60))
    assert bool((~stage.query.closed(stage.best.lower)).any())
    bounds = Branching(late).run()
    assert not bounds.witnesses and torch.equal(bounds.box.lower, stage.best.lower)


def test_inputs_are_cut_only_where_there_are_few() -> None:
    # For maxima: what is left open where no unit is unstable is otherwise solved as a linear program.
    for inputs, wanted in ((3, True), (FEATURES + 1, False)):
        torch.manual_seed(1)
        convolution = nn.Conv2d(1, 4, (1, 3), padding=(0, 1))
        layers = [convolution, nn.MaxPool2d((1, 2), stride=1), nn.Flatten(), nn.Linear(4 * (inputs - 1), 3)]
        prepared = prepare(nn.Sequential(*layers))
        box = Box(torch.full((2, 1, 1, inputs), 0.2), torch.full((2, 1, 1, inputs), 0.8))
        C = margin_rows(torch.tensor([0, 1]), 3)
        query = Query(Box(box.lower.double(), box.upper.double()), None, C, None, upper=False)
        with torch.no_grad():
            search = Branching(first(prepared, query, tightened=True))
            search.run()
        cuts = {cut[0] for tree in search.searches for part in tree.root.leaves() for cut, _ in part.cuts}
        assert "input" in cuts if wanted else "input" not in cuts


def test_auto_names_the_first_method_that_is_enough() -> None:
    methods = ("interval", "adjoint", "adjoint-refined", "adjoint-ascent", "branch-and-bound")
    seen = set()
    for kind, seed, eps in itertools.product(KINDS, range(4), (0.05, 0.15)):
        prepared = prepare(network(kind, seed, inputs=6))
        region = question(prepared, eps, inputs=6).region
        assert region is not None
        arguments = prepared, region.center, prepared.graph(region.center).argmax(1), str(eps)
        verdicts = certify(*arguments, timeout=60)
        each = {m: [v.certified for v in certify(*arguments, method=m, timeout=60)] for m in methods}
        for i, verdict in enumerate(verdicts):
            if verdict.certified:
                assert verdict.method == next(m for m in methods if each[m][i])
                seen.add(verdict.method)
        # A method that was asked for is named itself, whatever was enough on the way.
        assert {v.method for v in certify(*arguments, method="branch-and-bound", timeout=60)} == {"branch-and-bound"}
    assert seen == set(methods)


def test_certify_uses_its_proofs_and_its_counterexamples() -> None:
    net = network("equilibrium", 0)
    query = question(prepare(net), 0.1)
    assert query.region is not None
    centers = query.region.center
    labels = prepare(net).graph(centers).argmax(1)
    verdicts = certify(net, centers, labels, 0.1, method="branch-and-bound", attack="pgd", timeout=30)
    assert {verdict.status for verdict in verdicts} == {Status.CERTIFIED, Status.FALSIFIED}
    assert all(verdict.checked for verdict in verdicts if verdict.certified)
    assert all(verdict.witness is not None for verdict in verdicts if not verdict.certified)
