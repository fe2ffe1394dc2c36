"""Ascent on the slopes: above what it starts from, below the linear program and every exact output, checked."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from verideq import Equilibrium
from verideq.certify import Prepared, prepare
from verideq.certify.adjoint import adjoint_refined, first, rows_of
from verideq.certify.ascent import Climb, adjoint_ascent, ascended
from verideq.certify.backward import Scene
from verideq.certify.bound import margin_rows, run_method
from verideq.certify.certificate import record
from verideq.certify.method import Query
from verideq.certify.paths import AdjointEquilibrium
from verideq.checker import Checker
from verideq.graph import INPUT
from verideq.region import Region
from verideq.testing.conformance import BoundMethodSuite


class TestAdjointAscent(BoundMethodSuite):
    method = "adjoint-ascent"
    examples = 25


def contraction(units: int) -> nn.Linear:
    """A random ``W`` with rows of absolute sum 0.8."""
    fusion = nn.Linear(units, units, bias=False)
    with torch.no_grad():
        fusion.weight.div_(fusion.weight.abs().sum(1, keepdim=True)).mul_(0.8)
    return fusion


def model(kind: str) -> nn.Module:
    """A random net on 3x3 images, large enough that intervals and triangles leave a lot open."""
    torch.manual_seed(5)
    if kind == "equilibrium":
        layers = [nn.Flatten(), Equilibrium(contraction(12), nn.Linear(9, 12)), nn.Linear(12, 4)]
    elif kind == "two":
        first, second = Equilibrium(contraction(8), nn.Linear(9, 8)), Equilibrium(contraction(8), nn.Linear(8, 8))
        layers = [nn.Flatten(), first, second, nn.Linear(8, 4)]
    elif kind == "explicit":
        layers = [nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)]
    else:
        fusion = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        with torch.no_grad():
            fusion.weight.div_(fusion.weight.abs().sum((1, 2, 3), keepdim=True)).mul_(0.8)
        layers = [Equilibrium(fusion, nn.Conv2d(1, 2, 3, padding=1)), nn.Flatten(), nn.Linear(18, 4)]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "fusion" not in name and parameter.dim() > 1:
                parameter.mul_(4)
    return net


KINDS = ("equilibrium", "two", "explicit", "convolution")


def question(prepared: Prepared, eps: float, count: int = 4, norm: str = "linf") -> tuple[Query, torch.Tensor]:
    """Margins of the predicted labels on balls around random images."""
    centers = torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = prepared.graph(centers).argmax(1)
    region, C = Region(centers, eps, norm), margin_rows(labels, 4)
    return Query(region.box(), region, C, torch.zeros(C.shape[:2], dtype=torch.float64), upper=False), labels


def triangles(scene: Scene, i: int, C: torch.Tensor) -> np.ndarray:
    """The least of every row over the triangle relaxation of a sample, by linear programming.

    Every value is an affine function of the input and of the states of all relaxed nodes.
    """
    sizes = {INPUT: scene.values[INPUT].lower[i].numel()}
    sizes |= {name: known.z.lower[i].numel() for name, known in scene.relaxed.items()}
    total, places, start = sum(sizes.values()), {}, 0
    for name, size in sizes.items():
        places[name] = slice(start, start + size)
        start += size
    boxes = [scene.values[INPUT], *(known.z for known in scene.relaxed.values())]
    ends = [(box.lower[i].flatten(), box.upper[i].flatten()) for box in boxes]
    below, most, same, equal = [], [], [], []
    values = {INPUT: _unknowns(places[INPUT], total, scene.values[INPUT].lower.shape[1:])}
    for node in scene.graph.nodes:
        x, known = values[node.inputs[0]], scene.relaxed.get(node.name)
        if known is None:
            zero = node.module(torch.zeros_like(x[:1]))
            values[node.name] = torch.cat((node.module(x[:-1]) - zero, node.module(x[-1:])))
            continue
        z = values[node.name] = _unknowns(places[node.name], total, known.z.lower.shape[1:])
        divisor = known.divisor().expand(known.z.lower.shape[1:])
        p = x if known.operator is None else x + known.operator.apply(z) - (1 - divisor) * z
        low, slope = known.pre.lower[i], known.slope[i]
        over, line = (p - divisor * z).flatten(1), (divisor * z - slope * p).flatten(1)
        on, unstable = (low >= 0).flatten(), known.unstable[i].flatten()
        same.append(over[:-1, on].T), equal.append(-over[-1, on])
        below.append(over[:-1, ~on].T), most.append(-over[-1, ~on])
        (
            below.append(line[:-1, unstable].T),
            most.append((-slope * divisor * low).flatten()[unstable] - line[-1, unstable]),
        )
    last = values[scene.output]
    found = []
    for row in (last @ C.T).T.detach():
        A, b, E, e = (torch.cat(parts).detach().numpy() for parts in (below, most, same, equal))
        solved = linprog(
            row[:-1].numpy(),
            A_ub=A,
            b_ub=b,
            A_eq=E,
            b_eq=e,
            bounds=torch.cat([torch.stack(end, 1) for end in ends]).numpy(),
        )
        assert solved.status == 0
        found.append(solved.fun + float(row[-1]))
    return np.array(found)


def _unknowns(place: slice, total: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The columns of some of the unknowns, a constant last: (total + 1, *shape)."""
    columns = torch.zeros(total + 1, place.stop - place.start, dtype=torch.float64)
    columns[place] = torch.eye(place.stop - place.start, dtype=torch.float64)
    return columns.view(-1, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_close_to_the_linear_program_and_never_above_it(kind: str) -> None:
    prepared = prepare(model(kind))
    query, _ = question(prepared, 0.1)
    with torch.no_grad():
        stage = first(prepared, replace(query, rhs=None), tightened=True)
        better, plain = ascended(stage).best.lower, ascended(stage, Climb(steps=0)).best.lower
    truth = torch.tensor(np.stack([triangles(stage.scene, i, query.C[i]) for i in range(len(query))]))
    size = 1 + truth.abs()
    assert bool((better <= truth + 1e-6 * size).all())
    assert torch.equal(plain, stage.best.lower) and bool((better >= plain).all())
    print(
        "RATIO",
        float((truth - better).sum() / (truth - plain).sum()),
        float((truth - better).amax()) / float(size.amax()),
    )
    assert float((truth - better).sum() / (truth - plain).sum()) < 0.1
    assert float((truth - better).amax()) < 0.01 * float(size.amax())


@pytest.mark.parametrize("fusion", [contraction(6), nn.Conv2d(2, 2, 3, padding=1, bias=False)])
def test_the_adjoint_equilibrium_is_differentiated_exactly(fusion: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verideq.certify.paths.SETTLED", 1e-15)
    monkeypatch.setattr("verideq.certify.paths.SETTLING", 500)
    state = (6,) if isinstance(fusion, nn.Linear) else (2, 3, 3)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        scale = fusion.weight.abs().flatten(1).sum(1).view(-1, *[1] * (fusion.weight.dim() - 1))
        fusion.weight.div_(scale).mul_(0.7)
    operator = Equilibrium(fusion.double(), nn.Identity()).operator()
    q = torch.randn(3, 1, *state, generator=draw, dtype=torch.float64)
    knobs = [torch.rand(3, 1, *state, generator=draw, dtype=torch.float64) for _ in range(3)]

    def settled(*arguments: torch.Tensor) -> torch.Tensor:
        return AdjointEquilibrium.apply(*arguments, operator, [torch.zeros_like(q), torch.zeros_like(q)])  # type: ignore[no-any-return, no-untyped-call]  # torch leaves it untyped

    def unrolled(q: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        t, back = torch.zeros_like(q), operator.solved()[0].transpose()
        for _ in range(300):
            y = q + back.apply(t.flatten(0, 1)).view_as(q)
            t = torch.relu(y) * lower + y.clamp(max=0) * upper + shift
        return t

    arguments = [x.requires_grad_() for x in (q, *knobs)]
    assert torch.allclose(settled(*arguments), unrolled(*arguments), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(q.shape, generator=draw, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(settled(*arguments), arguments, upstream),
        torch.autograd.grad(unrolled(*arguments), arguments, upstream),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_proves_the_checker_accepts(kind: str, norm: str) -> None:
    prepared = prepare(model(kind))
    query, _ = question(prepared, 0.1 if norm == "linf" else 0.2, norm=norm)
    # A specification that ascent proves and that the bounds it starts from do not.
    refined = adjoint_refined(prepared, replace(query, rhs=None)).box.lower
    best = adjoint_ascent(prepared, replace(query, rhs=None)).box.lower
    rhs = torch.where(best > refined + 1e-4, (refined + best) / 2, refined - 0.1)
    assert bool((rhs > refined).any())
    bounds = run_method(prepared, query.region, query.C, "adjoint-ascent", rhs=rhs, upper=False)
    assert bool((bounds.box.lower > rhs).all())
    checkers = [Checker(prepared.file, prepared.certificate, exact=exact) for exact in (False, True)]
    for i in range(len(query)):
        margin = float((bounds.box.lower[i] - rhs[i]).min())
        C, right = query.C[i].numpy(), rhs[i].numpy()
        payload = record(
            checkers[0].hash, i, query.region, i, bounds.proof(i), label=None, C=C, rhs=right, margin=margin
        )
        for checker in checkers[: 2 if i == 0 else 1]:
            accepted, reason, proved = checker.decide([payload])[0]
            assert accepted, reason
            assert proved is not None and proved >= margin * (1 - 2.0**-18)
        # The next larger claim is refused: the margin is not just any.
        right = right + 1.01 * margin + 1e-6
        more = record(checkers[0].hash, i, query.region, i, bounds.proof(i), label=None, C=C, rhs=right, margin=0.0)
        assert not checkers[0].decide([more])[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_see_its_batch_mates(kind: str) -> None:
    prepared = prepare(model(kind))
    query, _ = question(prepared, 0.1)
    for asked in (query, replace(query, rhs=None), replace(query, rhs=None, upper=True)):
        whole = adjoint_ascent(prepared, asked).box
        for i in range(len(query)):
            alone = adjoint_ascent(prepared, asked.select(torch.tensor([i]))).box
            assert torch.allclose(alone.lower[0], whole.lower[i], rtol=1e-7, atol=1e-7)
            assert torch.allclose(alone.upper[0], whole.upper[i], rtol=1e-7, atol=1e-7)


def test_it_stops_where_nothing_is_open_and_when_time_is_up() -> None:
    prepared = prepare(model("equilibrium"))
    query, _ = question(prepared, 0.1)
    stage = first(prepared, query, tightened=True)
    for asked in (replace(query, rhs=stage.best.lower - 1), replace(query, deadline=time.monotonic() - 1)):
        assert torch.equal(ascended(replace(stage, query=asked)).best.lower, stage.best.lower)
    # A row that is closed keeps the bound that closed it.
    rhs = stage.best.lower - 1
    rhs[:, 0] = stage.best.lower[:, 0]
    better = ascended(replace(stage, query=replace(query, rhs=rhs))).best.lower
    C = rows_of(query, stage.scene)
    best = torch.tensor([triangles(stage.scene, i, C[i, :1])[0] for i in range(len(query))])
    room = best - rhs[:, 0]
    assert int((room > 1e-3).sum()) >= 3
    assert bool((better[:, 0] >= rhs[:, 0] + 0.1 * room - 1e-5).all())
    assert torch.equal(better[:, 1:], stage.best.lower[:, 1:])


def test_a_network_without_a_relaxed_node_has_nothing_to_climb() -> None:
    prepared = prepare(nn.Sequential(nn.Flatten(), nn.Linear(9, 4)))
    query, _ = question(prepared, 0.1)
    assert torch.equal(adjoint_ascent(prepared, query).box.lower, adjoint_refined(prepared, query).box.lower)
