"""Ceilings and coupled blocks in the checker: no multiplier proves what is not so, forged files are refused, and every
line of it that is broken on purpose proves something false."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from test_forgeries import Change, Folder, edit_model, node, pack, rewrite, unpack
from torch import nn

from verideq import Equilibrium, Region
from verideq.certify import Prepared, certify, prepare
from verideq.certify.certificate import Proof, Step, record
from verideq.checker import Checker, dual, files, layers, proof
from verideq.equilibrium import FeedbackFusion
from verideq.graph import Embed
from verideq.parametrizations import FeedbackGauge
from verideq.testing.exact import ExactModel, exact
from verideq.testing.strategies import points_of

Patch = pytest.MonkeyPatch
SEEDS = (0, 1, 2, 3, 4, 9, 15)


def filled(module: nn.Module, draw: torch.Generator, size: float) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape, generator=draw).double() / 8 * size
    return module


def net(seed: int) -> nn.Sequential:
    """A hard sigmoid of coupled blocks, or of a matrix with a diagonal, its units spread over all three parts."""
    draw = torch.Generator().manual_seed(seed)
    if seed % 3 == 0:
        fusion: nn.Module = filled(nn.Linear(3, 3, bias=False), draw, 0.25)
        with torch.no_grad():
            # Of units that are not connected the right multipliers prove what is true and not a digit less.
            fusion.weight.fill_diagonal_(-0.5).mul_(seed % 2 == 0)  # type: ignore[operator, union-attr]  # a tensor
        layer = Equilibrium(fusion, filled(nn.Linear(2, 3), draw, 2.0), "hard-sigmoid")
        units = 3
    else:
        conv = nn.Conv2d(1, 2, (2, 1), (2, 1), (1, 0), bias=False)
        if seed % 3 == 1:
            fusion = FeedbackFusion([(1, 2, 1), (2, 2, 1), (2,)], [conv, nn.Linear(4, 2, bias=False)])
        else:
            fusion = FeedbackFusion([(1, 2, 1), (4,)], [nn.Linear(2, 4, bias=False)])
        FeedbackGauge.apply(filled(fusion, draw, 1.0), 0.05)
        units = fusion.operator().shape[0] or 0
        rest = torch.randint(-8, 9, (units - 2,), generator=draw).double() / 4
        first = nn.Sequential(filled(nn.Conv2d(1, 1, 1), draw, 2.0), Embed(rest))
        layer = Equilibrium(fusion, first, "hard-sigmoid")
    return nn.Sequential(layer, filled(nn.Linear(units, 2), draw, 1.0)).double().eval()


Made = tuple[Prepared, list[bytes], list[np.ndarray]]


@cache
def made(seed: int) -> Made:
    """Records with arbitrary multipliers over the box of the gauge, and the rows at the centre and at corners."""
    prepared, random = prepare(net(seed)), np.random.default_rng(seed)
    shape = (2,) if seed % 3 == 0 else (1, 2, 1)
    x = torch.from_numpy(random.integers(0, 9, (1, *shape)) / 8)
    region, C = Region(x, "1/4"), random.integers(-8, 9, (4, 2)) / 8
    truth = ExactModel(prepared.graph)
    points = [p for which in range(4) for p in points_of(x[0], Fraction(1, 4), (0.0, 1.0), which)]
    rows = [exact(torch.from_numpy(C)) @ truth(point) for point in points]
    units = prepared.graph.shapes(x)["0"][0]
    payloads = []
    for scale in (0.0, 0.5, 1.0, 1.0, 2.0):
        g = (scale * random.integers(-4, 5, (4, units)) / 4).astype(np.float32)
        given = Proof(cases=((Step(multipliers={"0": g}),),))
        payloads.append(record("", 0, region, 0, given, label=None, C=C, rhs=np.zeros(4), margin=0.0))
    for slopes in ("adaptive", "zero", "one"):
        made_again = Proof(cases=((Step(slopes=slopes, iterations=20),),))
        payloads.append(record("", 0, region, 0, made_again, label=None, C=C, rhs=np.zeros(4), margin=0.0))
    place = np.array([0, -1, units - 1, -units])
    g = random.integers(-4, 5, (4, units)).astype(np.float32) / 4
    tightened = Step("0", units=place, multipliers={"0": g})
    again = Step(slopes="adaptive", iterations=20)
    payloads.append(
        record("", 0, region, 0, Proof(cases=((tightened, again),)), label=None, C=C, rhs=np.zeros(4), margin=0.0)
    )
    mark = {"model": prepared.checker.hash, "refinements": 3}
    return prepared, [pack({**unpack(p)[0], **mark}, unpack(p)[1]) for p in payloads], rows


def above(seed: int, *, precisely: bool) -> Iterator[str]:
    """Bounds that the checker gives and the truth does not."""
    prepared, payloads, rows = made(seed)
    checker = Checker(prepared.file, prepared.certificate, exact=precisely)
    for place, payload in enumerate(payloads):
        bounds = checker.rows(payload)
        for row in rows:
            # A rational bound is handed over as the nearest float64.
            spare = [abs(r) / 2**52 if precisely else 0 for r in row]
            yield from (f"{seed}, {place}: {b} > {r}" for b, r, s in zip(bounds, row, spare, strict=True) if b > r + s)


@pytest.mark.parametrize("precisely", [False, True], ids=["float", "exact"])
def test_no_multiplier_proves_what_is_not_so(precisely: bool) -> None:
    seeds = SEEDS[::3] if precisely else SEEDS
    assert [line for seed in seeds for line in above(seed, precisely=precisely)] == []
    kinds = set()
    for seed in seeds:
        prepared, payloads, _ = made(seed)
        bounds = [Checker(prepared.file, prepared.certificate).rows(payload) for payload in payloads[5:8]]
        kinds |= {bool(np.isfinite(b).all()) for b in bounds}
        assert (np.max(bounds, 0) >= Checker(prepared.file, prepared.certificate).rows(payloads[0]) - 1e-9).any()
    assert kinds == {True}


TWINS: dict[str, tuple[Any, str, str, str]] = {
    "no ceiling for lines": (dual, "relax", "None if layer is None else layer.ceiling", "None"),
    "a lower line above the chord": (dual, "relax", "calc.divide((rise, rise), (reach, reach))[1]",
        "calc.divide((rise, rise), (reach, reach))[1] / 2"),
    "an upper line that ends below": (dual, "relax", "np.minimum(hi, ceiling)", "np.minimum(hi, ceiling / 2)"),
    "pre-activations below the ceiling": (dual, "relax", "np.where(z[1] < ceiling, hi, pre[1])", "hi"),
    "a box cut below its ceiling": (dual, "relax", "np.minimum(z[1], np.maximum(top, calc.zero))",
        "np.minimum(z[1], np.maximum(top, calc.zero)) / 2"),
    "a multiplier of a full unit": (dual.Scene, "_relaxed", "np.minimum(g, calc.zero), g)", "g, g)"),
    "twice the gain at the ceiling": (dual.Scene, "_relaxed", "away = calc.add(away, gained)",
        "away = calc.add(calc.add(away, gained), gained)"),
    "a gain at the other end": (dual.Scene, "_relaxed", "(reach[0], reach[1]), (hi, hi)",
        "(reach[0], reach[1]), (lo, lo)"),
    "what the ceiling took is kept": (dual.Scene, "_relaxed",
        "on_z = tuple(np.where(above, a, b) for a, b in zip(level, on_z, strict=True))", "pass"),
    "a lower ceiling": (layers.Layer, "cut", "np.minimum(x, self.ceiling)", "np.minimum(x, self.ceiling / 2)"),
    "no block from below": (layers.Coupled, "push",
        "sums[place + 1] = calc.add(sums[place + 1], self._up(calc, place, node, parts[place]))", "pass"),
    "no block from above": (layers.Coupled, "push",
        "sums[place] = calc.add(sums[place], self._down(calc, place, node, parts[place + 1]))", "pass"),
    "blocks the other way round": (layers.Coupled, "push", "np.concatenate([lo for lo, _ in sums], 1)",
        "np.concatenate([lo for lo, _ in sums[::-1]], 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_twin_proves_something_false(monkeypatch: Patch, name: str) -> None:
    rewrite(monkeypatch, *TWINS[name])
    assert any(True for seed in SEEDS for _ in above(seed, precisely=False))


# --- files ------------------------------------------------------------------------------------------------------------


@cache
def honest() -> Folder:
    """Valid certificates of a network of three blocks."""
    prepared = prepare(net(1))
    images = torch.rand(3, 1, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = prepared.graph(images).argmax(1)
    verdicts = certify(prepared, images, labels, "1/1000", method="adjoint-refined")
    records = tuple(v.certificate for v in verdicts if v.certificate is not None)
    assert len(records) == 3
    return Folder(prepared.file, prepared.certificate, records)


def test_what_is_forged_was_valid() -> None:
    assert honest().accepted() and honest().accepted(exact=True)


@pytest.mark.parametrize("options", [{"norm": "l2"}, {"deployed_tolerance": "1/1000"}], ids=str)
def test_balls_and_deployed_solvers(options: dict[str, Any]) -> None:
    prepared = prepare(net(1))
    images = torch.rand(3, 1, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = prepared.graph(images).argmax(1)
    verdicts = certify(prepared, images, labels, "1/500", method="adjoint", **options)
    records = tuple(v.certificate for v in verdicts if v.certificate is not None)
    assert len(records) >= 2
    folder = Folder(prepared.file, prepared.certificate, records)
    assert folder.accepted() and folder.accepted(exact=True)


def fused(head: Any) -> Any:
    return node(head, "equilibrium")["attributes"]["fusion"]["attributes"]


def layer(change: Callable[[Any], object]) -> Change:
    """The equilibrium's entry changed."""
    return lambda head, arrays: change(node(head, "equilibrium"))


def blocks(change: Callable[[Any], object]) -> Change:
    """The description of its blocks changed."""
    return lambda head, arrays: change(fused(head))


FORGED: dict[str, tuple[Change, str]] = {
    "another activation": (layer(lambda e: e["attributes"].update(activation="tanh")), "known activation"),
    "an activation that is no name": (layer(lambda e: e["attributes"].update(activation=["relu"])), "known activation"),
    "shapes of more units": (blocks(lambda a: a.update(shapes=[[1, 2, 1], [2, 2, 1], [3]])), ""),
    "a block that is turned": (blocks(lambda a: a.update(shapes=[[1, 1, 2], [2, 2, 1], [2]])), ""),
    "units moved from block to block": (blocks(lambda a: a.update(shapes=[[1, 2, 1], [2, 1, 2], [2]])), "next block"),
    "a block of two axes": (blocks(lambda a: a.update(shapes=[[1, 2], [2, 2, 1], [2]])), "shape of no block"),
    "a block without units": (blocks(lambda a: a.update(shapes=[[1, 2, 1], [2, 2, 1], [0]])), "shape of no block"),
    "shapes that are none": (blocks(lambda a: a.update(shapes="x")), "not described"),
    "attributes that are none": (layer(lambda e: e["attributes"]["fusion"].update(attributes=[])), ""),
    "couplings that are none": (blocks(lambda a: a.update(couplings=None)), ""),
    "no couplings": (blocks(lambda a: a.update(couplings=[])), ""),
    "one block": (blocks(lambda a: a.update(shapes=[[8]], couplings=[])), ""),
    "a further field": (blocks(lambda a: a.update(m=1)), "not described"),
    "a coupling that is no layer": (blocks(lambda a: a["couplings"][0].update(operation="relu")), "no affine layer"),
    "a coupling with a field": (blocks(lambda a: a["couplings"][0].update(bias=True)), "no affine layer"),
    "a coupling without arguments": (blocks(lambda a: a["couplings"][0].update(attributes=1)), "no sense"),
    "another stride": (blocks(lambda a: a["couplings"][0]["attributes"].update(stride=[1, 1])), "next block"),
    "another padding": (blocks(lambda a: a["couplings"][0]["attributes"].update(padding=[0, 0])), "next block"),
    "features": (blocks(lambda a: a["couplings"][1]["attributes"].update(in_features=3)), ""),
    "two blocks": (blocks(lambda a: a.update(shapes=a["shapes"][:2])), "2 couplings of 2 blocks"),
    "a tensor of nothing": (
        lambda head, arrays: (
            arrays.update({"0/fusion.weight": np.zeros((1, 1))}),
            node(head, "equilibrium")["tensors"].append("fusion.weight"),
        ),
        "other tensors",
    ),
    "weights of nothing": (lambda head, arrays: arrays.update({"0/fusion.couplings.7.weight": np.zeros(1)}), ""),
    "large weights": (
        lambda head, arrays: arrays.update({"0/fusion.couplings.1.weight": 20 * arrays["0/fusion.couplings.1.weight"]}),
        "slack",
    ),
    "constants of another size": (
        lambda head, arrays: arrays.update({"0.injection.1/rest": np.zeros(3)}), "gauge of shape",
    ),
    "constants with an axis": (
        lambda head, arrays: arrays.update({"0.injection.1/rest": arrays["0.injection.1/rest"][None]}),
        "rest has shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_model_is_refused_even_if_signed(name: str) -> None:
    change, reason = FORGED[name]
    for sign in (False, True):
        decided = edit_model(honest(), change, sign=sign).decide()
        assert not any(accepted for accepted, _ in decided)
    assert all(reason in why for _, why in decided), decided


def test_a_gauge_is_by_unit_and_has_to_be_there() -> None:
    head, arrays = unpack(honest().gauges)
    for change in (arrays["gauge/0"][:5], arrays["gauge/0"] * 0, None):
        kept = {} if change is None else {"gauge/0": change}
        forged = Folder(honest().model, pack(head, kept), honest().records)
        assert not any(accepted for accepted, _ in forged.decide())


def test_relu_for_clip_is_another_claim() -> None:
    # z = clip(3): 1, and 3 as a ReLU. That it is below 2 is true of the one, and of the other nobody proves it.
    fusion = nn.Linear(1, 1, bias=False)
    first, last = nn.Linear(1, 1), nn.Linear(1, 1)
    for tensor, value in (
        (fusion.weight, 0.0), (first.weight, 0.0), (first.bias, 3.0), (last.weight, -1.0), (last.bias, 2.0),
    ):  # fmt: skip
        nn.init.constant_(tensor, value)
    prepared = prepare(nn.Sequential(Equilibrium(fusion, first, "hard-sigmoid"), last).double())
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    (verdict,) = certify(prepared, x, None, "1/10", C=torch.ones(1, 1), rhs=torch.zeros(1))
    assert verdict.certified and verdict.checked and verdict.certificate is not None
    folder = Folder(prepared.file, prepared.certificate, (verdict.certificate,))
    assert folder.accepted() and folder.accepted(exact=True)
    forged = edit_model(folder, layer(lambda e: e["attributes"].update(activation="relu")), sign=True)
    assert not forged.accepted() and not forged.accepted(exact=True)


def test_a_monotone_layer_with_a_ceiling_needs_a_gauge() -> None:
    folder = honest()
    head, arrays = unpack(folder.model)
    entry = node(head, "equilibrium")
    units = len(unpack(folder.gauges)[1]["gauge/0"])
    entry["attributes"]["fusion"] = {
        "operation": "linear", "attributes": {"in_features": units, "out_features": units},
    }  # fmt: skip
    entry["tensors"] = ["fusion.weight"]
    arrays = {k: v for k, v in arrays.items() if "coupling" not in k} | {"0/fusion.weight": -np.eye(units)}
    model = pack(head, arrays)
    mark = {"model": files.model_hash(files.parse_blob(model))}
    gauges = pack({**unpack(folder.gauges)[0], **mark}, {"m/0": np.array(1.0)})
    records = tuple(pack({**unpack(r)[0], **mark}, unpack(r)[1]) for r in folder.records)
    decided = Folder(model, gauges, records).decide()
    assert all("there is no gauge" in reason for _, reason in decided)


def test_the_quadratic_dual_is_for_relu(monkeypatch: Patch) -> None:
    # z = relu(3) is above 2, and clip(3) is not: complementarity says the same of both.
    fusion, first, last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1), nn.Linear(1, 1)
    for tensor, value in (
        (fusion.weight, -0.1), (first.weight, 0.1), (first.bias, 3.0), (last.weight, 1.0), (last.bias, -2.0),
    ):  # fmt: skip
        nn.init.constant_(tensor, value)
    prepared = prepare(nn.Sequential(Equilibrium(fusion, first), last).double())
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    (verdict,) = certify(prepared, x, None, "1/10", C=torch.ones(1, 1), rhs=torch.zeros(1), method="quadratic")
    assert verdict.certified and verdict.certificate is not None
    head, arrays = unpack(verdict.certificate)
    arrays = {name: array for name, array in arrays.items() if not name.startswith("box/")}
    folder = Folder(prepared.file, prepared.certificate, (pack(head, arrays),))
    assert "case/0/0/q/z" in arrays and folder.accepted()
    forged = edit_model(folder, layer(lambda e: e["attributes"].update(activation="hard-sigmoid")), sign=True)
    for exactly in (False, True):
        ((accepted, reason),) = forged.decide(exact=exactly)
        assert not accepted and "is for relu" in reason
    rewrite(monkeypatch, proof._Proof, "_quadratic", "self.proved[node.name].ceiling is None", "True")
    assert forged.accepted()
