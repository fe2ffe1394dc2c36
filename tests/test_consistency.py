"""What is certified stays unbroken under every kind of attack: benchmarks/consistency.py in small, and its alarm."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from verideq.attacks import APGD, FAB, PGD, SUITES, Attack, Found, Problem, Square, Stage, Suite
from verideq.equilibrium import Phantom
from verideq.equilibrium.surrogates import Final, Simultaneous, Unrolled

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "consistency.py"


def harness() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("consistency", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


consistency = harness()
ATTACKS = (PGD(6, 1), APGD("ce", 6), APGD("t", 3), FAB(3), Square(12))
SURROGATES = (Final(Phantom(2, 0.5)), Unrolled((2,), 2, 0.5), Simultaneous((1, 3)))
SMALL = Suite("small", (*map(Stage, ATTACKS), *(Stage(PGD(4, 1), surrogate) for surrogate in SURROGATES)))
CRAFTED = Suite("crafted", (Stage(PGD(2, 1)),), prune=False)


@pytest.mark.parametrize(
    ("kind", "seed", "norm", "eps"),
    [("row-gauge", 1, "linf", "0.02"), ("nemon", 0, "l2", "0.05"), ("mondeq", 0, "linf", "0.01")],
    ids=str,
)
def test_no_certified_sample_is_broken(kind: str, seed: int, norm: str, eps: str) -> None:
    case = consistency.random_case(kind, seed, 2)
    # Without a gauge each look at a radius takes a search of its own.
    claims = consistency.claims_of(replace(case, eps={norm: (eps,)}), norm, radius=kind != "mondeq")
    assert claims and (kind == "mondeq" or {claim.sample for claim in claims} == {0, 1})
    figures = consistency.contradictions(case, norm, claims, [SMALL], CRAFTED)
    assert (figures["wrong"], figures["outside"], figures["claims"]) == ([], 0, len(claims))
    assert figures["attacks"] == len(SMALL.stages) + 3
    assert 0 < figures["least above claim"] <= figures["least margin"]


def test_false_claims_are_noticed() -> None:
    case = consistency.random_case("row-gauge", 0, 2)
    claims = [consistency.Claim(k, Fraction(1, 10**6)) for k in range(2)]
    # Another label than the model's; and a margin that is larger than it is at the input itself.
    other = replace(case, labels=(case.labels + torch.tensor([1, 0])) % 4)
    higher = [replace(claims[0], margin=100.0), claims[1]]
    for asked, said in ((other, claims), (case, higher)):
        figures = consistency.contradictions(asked, "linf", said, [SMALL], CRAFTED)
        assert [wrong["sample"] for wrong in figures["wrong"]] == [0]


@dataclass(frozen=True)
class Liar(Attack):
    """Says that points beyond the ball are broken."""

    name = "liar"

    def search(self, problem: Problem) -> Found:
        center = problem.region.center
        return Found(center + 0.3, torch.full((len(center),), -1.0, dtype=center.dtype))


def test_a_point_outside_its_ball_is_counted() -> None:
    case = consistency.random_case("row-gauge", 0, 2)
    claims = [consistency.Claim(k, Fraction(1, 10**6)) for k in range(2)]
    liars = Suite("liars", (Stage(Liar()),))
    assert consistency.contradictions(case, "linf", claims, [liars], CRAFTED)["outside"] == 2


def test_all_that_is_run_is_there() -> None:
    named = {name for name, _ in consistency.cases(1, {})}
    assert {"bundled", "digits-standard", "quick convolution", "random mondeq 0", "random cerdeq 1"} <= named
    kinds = {stage.attack.name.partition("-")[0] for stage in consistency.THIN.stages}
    assert kinds == {stage.attack.name.partition("-")[0] for stage in SUITES["full"].stages}
