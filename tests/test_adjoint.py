"""The adjoint bounds through the suite that every method has to pass, and what is particular to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from verideq import Equilibrium
from verideq.certify import Prepared, margin_rows, prepare
from verideq.certify.adjoint import PROBE, first
from verideq.certify.certificate import record
from verideq.certify.method import Query
from verideq.region import Region
from verideq.testing.conformance import BoundMethodSuite


class TestAdjoint(BoundMethodSuite):
    method = "adjoint"


class TestAdjointRefined(BoundMethodSuite):
    method = "adjoint-refined"


def deep() -> Prepared:
    """A ReLU behind one affine map of the input; an equilibrium, and a ReLU, behind more."""
    torch.manual_seed(1)
    fusion = nn.Linear(30, 30, bias=False)
    with torch.no_grad():
        fusion.weight.div_(fusion.weight.abs().sum(1, keepdim=True)).mul_(0.8)
    layers = [nn.Linear(6, 30), nn.ReLU(), Equilibrium(fusion, nn.Linear(30, 30)), nn.Linear(30, 30), nn.ReLU()]
    return prepare(nn.Sequential(*layers, nn.Linear(30, 4)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_only_what_moves_is_tightened_and_a_checker_comes_to_the_same(norm: str) -> None:
    prepared, center = deep(), torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    region, C = Region(center, "1/2", norm, clip=None), margin_rows(torch.tensor([0, 1, 2]), 4)
    query = Query(region.box(), region, C, None, upper=False)
    with torch.no_grad():
        plain, stage = first(prepared, query), first(prepared, query, tightened=True)
    bounds = stage.bounds()
    for i in range(len(center)):
        rows = {node: [len(s.units) for s in stage.before[i] if s.node == node and s.units is not None]
                for node in stage.scene.relaxed}  # fmt: skip
        unstable = {node: int(known.unstable[i].sum()) for node, known in plain.scene.relaxed.items()}
        assert norm == "l2" or min(unstable.values()) > 2 * PROBE
        # Boxes of l_inf are exact behind one affine map.
        assert norm == "l2" or not rows["1"]
        assert rows["2"] and rows["4"] and all(n <= 2 * unstable[node] for node, own in rows.items() for n in own)
        assert sum(n == 2 * PROBE for own in rows.values() for n in own) == 0
        # What was left out of the record was left out of the boxes: the checker proves as much.
        lower = bounds.box.lower[i].numpy()
        payload = record(
            prepared.checker.hash, i, region, i, bounds.proof(i), label=None, C=C[i].numpy(),
            rhs=lower - 1e-6 * (1 + np.abs(lower)), margin=0.0,
        )  # fmt: skip
        assert [accepted for accepted, _, _ in prepared.checker.decide([payload])] == [True]
    for node, known in stage.scene.relaxed.items():
        before = plain.scene.relaxed[node].pre.width
        assert bool((known.pre.width <= before).all()), node
