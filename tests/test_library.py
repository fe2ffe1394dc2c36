"""AutoAttack's own library against ours; and a clear word where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from verideq.attacks import APGD, Problem, open_model
from verideq.attacks.library import AutoAttack
from verideq.certify.bound import margin_rows
from verideq.data import load
from verideq.errors import InputError
from verideq.graph import load_model
from verideq.region import Region


def problem_of(path: Path, count: int, eps: str = "0.05", norm: str = "linf") -> Problem:
    data = load("digits", "test")
    C = margin_rows(data.labels[:count], 10)
    region = Region(data.scaled(range(count)), eps, norm)
    return Problem(open_model(load_model(path)), region, C, torch.zeros(C.shape[:2]).double(), torch.arange(count))


def test_the_missing_library_is_named(digits_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(InputError, match=r"pip install 'verideq\[attacks\]'"):
        AutoAttack().search(problem_of(digits_model, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_library_finds_what_ours_finds(digits_model: Path, norm: str) -> None:
    pytest.importorskip("pyautoattack")
    problem = problem_of(digits_model, 12, "0.05" if norm == "linf" else "0.4", norm)
    before = torch.random.get_rng_state()
    theirs = AutoAttack(("apgd-ce",)).search(problem)
    assert torch.equal(before, torch.random.get_rng_state())
    ours = APGD("ce").search(problem)
    assert bool(problem.region.contains(theirs.points).all())
    broken, own = theirs.margins < 0, ours.margins < 0
    assert 0 < int(broken.sum()) < 12
    assert int((broken & ~own).sum()) <= 1
    assert int((own & ~broken).sum()) <= 1
    alone = AutoAttack(("apgd-ce",)).search(problem[torch.tensor([7, 3])])
    torch.testing.assert_close(alone.margins, theirs.margins[[7, 3]], rtol=1e-4, atol=1e-4)


def test_what_it_cannot_attack_is_refused(digits_model: Path) -> None:
    pytest.importorskip("pyautoattack")
    problem = problem_of(digits_model, 1)
    weighted = Region(problem.region.center, "0.05", weights=torch.ones(problem.region.center.shape[1:]))
    with pytest.raises(InputError, match="one radius"):
        AutoAttack().search(Problem(problem.dynamics, weighted, problem.C, problem.rhs, problem.indices))
