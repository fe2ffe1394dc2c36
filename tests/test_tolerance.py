"""What a deployed solver may be off by is charged to every margin: in the bounds, in the checker, and in a run."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from verideq import Equilibrium, save_model
from verideq.certify import certify, margin_rows, prepare
from verideq.certify.bound import run_method
from verideq.checker import Checker
from verideq.checker.files import parse_blob
from verideq.cli.main import run
from verideq.errors import RegionError
from verideq.parametrizations import IBPMonDEQ
from verideq.testing.exact import ExactModel, exact, outside, relu
from verideq.testing.strategies import Case, linear_cases


def small() -> nn.Sequential:
    """Two inputs, four units, three classes."""
    torch.manual_seed(0)
    fusion = IBPMonDEQ.apply(nn.Linear(4, 4, bias=False), m=0.3)
    return nn.Sequential(Equilibrium(fusion, nn.Linear(2, 4)), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("method", ["interval", "adjoint", "adjoint-refined"])
@settings(max_examples=40)
@given(case=linear_cases(), tolerance=st.sampled_from([0.0, 2.0**-10, 0.25, 4.0]), signs=st.integers(0, 31))
def test_whatever_a_solver_stops_at_is_within_the_bound(method: str, case: Case, tolerance: float, signs: int) -> None:
    prepared, truth = prepare(case.model), ExactModel(case.model)
    box = run_method(prepared, case.region, None, method, tolerance=tolerance).box
    u = exact(prepared.gauges["equilibrium"].u)
    weight, bias = (exact(t.double()) for t in (case.model.nodes[-1].module.weight, case.model.nodes[-1].module.bias))
    push = np.array([Fraction(1 if signs >> k & 1 else -1) for k in range(len(u))], dtype=object)
    for i, points in enumerate(case.points):
        for x in points:
            z = truth.values(x)["equilibrium"] + Fraction(tolerance) * u * push
            assert outside(weight @ z + bias, box.lower[i], box.upper[i]) == []


@settings(max_examples=40)
@given(case=linear_cases(), seed=st.integers(0, 2**32 - 1))
def test_a_residual_below_the_tolerance_is_that_near(case: Case, seed: int) -> None:
    """The theorem that the charge stands on, in exact arithmetic and for the rows that are solved."""
    prepared, truth = prepare(case.model), ExactModel(case.model)
    layer = prepared.layer("equilibrium")
    W, u = exact(layer.operator().apply(torch.eye(len(layer.fusion.weight), dtype=torch.float64)).T), None
    u = exact(prepared.gauges["equilibrium"].u)
    own = np.diag(W)
    off = W - np.diag(own)
    slack = u - abs(off / (1 - own)[:, None]) @ u
    draw = np.random.default_rng(seed)
    for x in case.points[0]:
        values = truth.values(x)
        v = values["injection"]
        z = values["equilibrium"] + np.array([Fraction(int(k), 8) for k in draw.integers(-8, 9, len(u))], dtype=object)
        residual = abs(z - relu((off @ z + v) / (1 - own)))
        tolerance = max(residual / slack)
        assert (abs(z - values["equilibrium"]) <= tolerance * u).all()


def test_the_margin_falls_by_what_the_rows_make_of_it() -> None:
    model, images = small(), torch.full((1, 2), 0.5, dtype=torch.float64)
    prepared = prepare(model)
    labels = prepared.graph(images).argmax(1)
    plain, charged = (
        certify(model, images, labels, "1/1000", method="interval", deployed_tolerance=t)[0] for t in (0, "1/100")
    )
    rows = margin_rows(labels, 3)[0] @ prepared.graph.nodes[-1].module.weight
    lost = float((rows.abs() @ prepared.gauges["0"].u).max()) / 100
    assert plain.margin is not None and charged.margin is not None
    assert plain.margin - lost - 1e-9 <= charged.margin < plain.margin
    assert charged.checked and charged.certificate is not None
    assert parse_blob(charged.certificate).head["tolerance"] == "1/100"
    for exactly in (False, True):
        decisions = Checker(prepared.file, prepared.certificate, exact=exactly).decide([charged.certificate])
        assert decisions[0][0]
    # Enough of it, and nothing is proved.
    assert not certify(model, images, labels, "1/1000", deployed_tolerance=1000)[0].certified


def test_a_tolerance_that_is_none_is_refused() -> None:
    images = torch.full((1, 2), 0.5)
    for value in (-1, float("nan"), "much"):
        with pytest.raises(RegionError, match="deployed tolerance"):
            certify(small(), images, torch.tensor([0]), 0.1, deployed_tolerance=value)


def test_a_run_records_it_and_is_resumed_with_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    fusion = IBPMonDEQ.apply(nn.Linear(8, 8, bias=False), m=0.3)
    model = nn.Sequential(nn.Flatten(), Equilibrium(fusion, nn.Linear(64, 8)), nn.Linear(8, 10))
    save_model(model, tmp_path / "m.safetensors")
    call = ["certify", str(tmp_path / "m.safetensors"), "--limit", "5", "--eps", "0.001", "--attack", "none", "--json"]
    out = ["--threads", "1", "--out", str(tmp_path / "run")]
    assert run([*call, *out, "--deployed-tolerance", "1e-3"]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["tolerances"]["deployed"] == "1/1000"
    capsys.readouterr()
    assert run([*call, *out, "--resume", "--deployed-tolerance", "1e-2"]) == 2
    assert "tolerances differ" in capsys.readouterr().err
    assert run([*call, *out, "--deployed-tolerance=-1"]) == 2
    assert "--deployed-tolerance '-1' is negative" in capsys.readouterr().err
