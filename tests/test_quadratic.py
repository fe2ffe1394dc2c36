"""The quadratic bound against exact equilibria of small monotone networks, and what it proves of a trained one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from verideq import Equilibrium, Normalize, Status
from verideq.certify import bound, certify, prepare
from verideq.certify.bound import run_method
from verideq.certify.method import Query
from verideq.certify.quadratic import ascend, form_of, pose, start
from verideq.checker import Checker
from verideq.errors import NoGaugeError
from verideq.parametrizations import IBPMonDEQ, MonDEQ
from verideq.region import Region
from verideq.testing.exact import ExactModel, exact, outside
from verideq.testing.strategies import points_of

SEEDS = st.integers(0, 2**32 - 1)


def monotone(seed: int, units: int = 3, inputs: int = 2, m: float = 1.0, size: float = 1.0) -> nn.Sequential:
    """A small network of float32 whose ``W`` has no gauge as a rule."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    fusion = MonDEQ.from_weights(size * draw(units, units), 4 * size * draw(units, units), m)
    layer, last = Equilibrium(fusion, nn.Linear(inputs, units)), nn.Linear(units, 3)
    with torch.no_grad():
        for module in (layer.injection, last):
            module.weight.copy_(draw(*module.weight.shape))
            module.bias.copy_(draw(*module.bias.shape))
    return nn.Sequential(Normalize(0.25, 0.5), layer, last)


@settings(max_examples=60)
@given(
    seed=SEEDS, units=st.integers(1, 5), m=st.sampled_from([0.125, 1.0, 20.0]), size=st.sampled_from([0.0, 0.5, 3.0]),
    eps=st.sampled_from(["0", "1/20", "1/2"]), which=st.integers(0, 3),
)  # fmt: skip
def test_no_exact_output_leaves_its_bound(seed: int, units: int, m: float, size: float, eps: str, which: int) -> None:
    model, center = monotone(seed, units, 2, m, size), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    box = bound(model, Region(center, eps), method="quadratic")
    assert bool(box.sound().all())
    truth = ExactModel(prepare(model).graph)
    for i, middle in enumerate(center):
        for x in points_of(middle, Fraction(eps), (0.0, 1.0), which):
            assert outside(truth(x), box.lower[i], box.upper[i]) == []


@settings(max_examples=30)
@given(seed=SEEDS, angle=st.integers(0, 11))
def test_no_exact_output_of_an_l2_ball_leaves_its_bound(seed: int, angle: int) -> None:
    model, center = monotone(seed), torch.tensor([[0.5, 0.5]])
    region = Region(center, "1/4", "l2")
    box = bound(model, region, method="quadratic")
    # On the circle, by a rational parametrization.
    t = Fraction(angle - 5, 3)
    x = exact(center[0]) + np.array([(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)], dtype=object) / 4
    assert outside(ExactModel(prepare(model).graph)(x), box.lower[0], box.upper[0]) == []


def test_it_is_tighter_than_the_box_of_a_monotone_layer() -> None:
    region = Region(torch.full((1, 2), 0.5), "1/10")
    wide, close = (
        [bound(monotone(seed), region, method=method).width for seed in range(8)]
        for method in ("interval", "quadratic")
    )
    assert all(bool((a > b).all()) for a, b in zip(wide, close, strict=True))


def test_certificates_are_accepted_by_both_arithmetics() -> None:
    images = torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for norm in ("linf", "l2"):
        certified = 0
        for seed in range(6):
            prepared = prepare(monotone(seed))
            labels = prepared.graph(images).argmax(1)
            verdicts = certify(prepared, images, labels, "1/50", norm=norm, method="quadratic")
            assert all(v.status in (Status.CERTIFIED, Status.UNKNOWN) for v in verdicts)
            records = [v.certificate for v in verdicts if v.certificate is not None]
            certified += len(records)
            for exactly in (False, True):
                decisions = Checker(prepared.file, prepared.certificate, exact=exactly).decide(records)
                assert [reason for accepted, reason, _ in decisions if not accepted] == []
        assert certified >= 12


def test_a_dense_monotone_matrix_is_proved_by_its_eigenvalues() -> None:
    W = torch.tensor([[-1.0, 3.0], [-3.0, -1.0]])
    layer = Equilibrium.from_matrices(W, torch.eye(2), torch.ones(2))
    model = nn.Sequential(layer, nn.Linear(2, 2))
    prepared = prepare(model)
    assert not prepared.gauges and prepared.monotone["0"] == pytest.approx(2, rel=1e-3)
    images = torch.full((1, 2), 0.5, dtype=torch.float64)
    verdict = certify(prepared, images, prepared.graph(images).argmax(1), "1/1000", method="quadratic")[0]
    assert verdict.certified and verdict.checked


def test_a_layer_with_a_gauge_takes_it_too() -> None:
    torch.manual_seed(0)
    fusion = IBPMonDEQ.apply(nn.Linear(4, 4, bias=False), m=0.3)
    model = nn.Sequential(Equilibrium(fusion, nn.Linear(2, 4)), nn.Linear(4, 3)).double()
    region = Region(torch.full((2, 2), 0.5), "1/10")
    ours, theirs = (run_method(prepare(model), region, None, method).box for method in ("quadratic", "interval"))
    truth = ExactModel(prepare(model).graph)
    for x in points_of(torch.full((2,), 0.5), Fraction(1, 10), (0.0, 1.0), 2):
        assert outside(truth(x), ours.lower[0], ours.upper[0]) == []
    assert bool((ours.width < 2 * theirs.width).all())


def test_other_networks_are_refused_by_name() -> None:
    region = Region(torch.full((1, 2), 0.5), "1/10")
    with pytest.raises(NoGaugeError, match=r"one equilibrium between affine maps; here: 0 \(relu\)"):
        bound(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), region, method="quadratic")
    wild = nn.Sequential(Equilibrium.from_matrices(2 * torch.eye(2), torch.eye(2)), nn.Linear(2, 2))
    with pytest.raises(NoGaugeError):
        bound(wild, region, method="quadratic")
    with pytest.raises(NoGaugeError, match="tolerance"):
        run_method(prepare(monotone(0)), region, None, "quadratic", tolerance=0.1)


def test_a_step_is_paid_by_the_samples_whose_rows_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(monotone(3, units=5, m=0.125, size=3.0))
    center = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    region, C = Region(center, "1/5"), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    query = Query(region.box(), region, C, None, upper=False)
    problem, _, _ = pose(prepared, query, form_of(prepared, query.box.lower), C)
    # The rows of the first sample are closed from the first step on, those of the second never.
    problem = replace(problem, shift=torch.where(problem.sample == 0, 1e6, -1e6).double())
    clock = itertools.count()
    monkeypatch.setattr("verideq.certify.quadratic.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    for deadline, steps in ((math.inf, 30), (40.0, 10)):
        clock = itertools.count()
        spent = torch.zeros(2, dtype=torch.float64)
        ascend(problem, start(problem), 30, 0.0, deadline, spent)
        first, second = spent.tolist()
        assert 0 < first <= 2 and second > steps
        # Each has half of the time, and no more than one step beyond.
        assert deadline == math.inf or second <= deadline / 2 + 2
