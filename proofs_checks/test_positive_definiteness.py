"""The class as a semidefinite program (Wei & Kolter, Theorems 3.1 and 3.3): cvxpy looks for a diagonal ``Λ``
with ``Λ - Λ|W| ≻ 0``, and for the nearest member of the class of Theorem 3.1, which is convex. What it returns
is rounded to rationals and decided exactly; the verdict has to agree with `verideq.gauge` for the stored
weights."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from proofs_checks.algebra import definite, diagonal, identity, radius_below_one, rational
from proofs_checks.cases import gauged, matrices
from proofs_checks.search import holds, rejects
from verideq import Equilibrium, gauge
from verideq.errors import NoGaugeError

M = 0.05
"""The margin of the nearest member."""


@st.composite
def systems(draw: st.DrawFn) -> np.ndarray:
    """float64, inside or outside by a hundredth or more, or exactly on the boundary: a mean of permutations; skew."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        size = draw(st.integers(1, 4))
        W = sum(identity(size)[list(draw(st.permutations(range(size))))] for _ in range(2)) / 2
        return W.astype(float)
    W = (draw(matrices(draw(st.integers(2, 4)))) if kind < 3 else draw(gauged(2))[0]).astype(float)
    W = W - W.T if kind == 1 else W
    radius = max(abs(np.linalg.eigvals(abs(W))))
    target = draw(st.sampled_from((0.5, 0.9, 0.99, 1.01, 1.5)))
    return W * (target / radius) if radius > 1e-3 else W


def has_gauge(W: np.ndarray) -> bool:
    """The verdict of the package."""
    linear = nn.Linear(len(W), len(W), bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(W))
    layer = Equilibrium(linear, nn.Identity())
    try:
        return bool((gauge(layer).slack(layer) > 0).all()) and not gauge(layer).transformed
    except NoGaugeError:
        return False


@cache
def search_program(size: int) -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    """Maximise ``t``: ``Λ - Λ|W| ⪰ t I`` in its symmetric part, ``Λ`` between 0 and 1."""
    weights, entries, t = cp.Parameter((size, size)), cp.Variable(size), cp.Variable()
    product = cp.diag(entries) @ weights
    constraints = [product + product.T >> 2 * t * np.eye(size), entries <= 1, entries >= 0]
    return cp.Problem(cp.Maximize(t), constraints), weights, entries


def finds(W: np.ndarray, absolute: bool = True) -> bool:
    """Whether the ``Λ`` that cvxpy returns is one, exactly."""
    problem, weights, entries = search_program(len(W))
    weights.value = np.eye(len(W)) - (abs(W) if absolute else W)
    problem.solve(solver=cp.CLARABEL)
    found = rational(entries.value.tolist())
    kept = rational(W.tolist())
    inside = abs(kept) if absolute else kept
    return bool((found > 0).all()) and definite(diagonal(found) @ (identity(len(W)) - inside))


def agrees(W: np.ndarray, absolute: bool = True) -> bool:
    """cvxpy, the gauge and Sturm's theorem."""
    verdict = finds(W, absolute)
    return verdict == has_gauge_of_W(W) == radius_below_one(rational(W.tolist()))


def has_gauge_of_W(W: np.ndarray) -> bool:
    """A gauge of ``W`` itself: on ``|W|``, which has no negative diagonal that the transformed layer could use."""
    return has_gauge(abs(W))


@cache
def nearest_program(size: int, absolute: bool) -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    """The nearest ``V`` with ``(1-m) I - sym|V| ⪰ 0``."""
    target, V, N = cp.Parameter((size, size)), cp.Variable((size, size)), cp.Variable((size, size))
    above = [N >= V, -V <= N] if absolute else [N == V]
    constraints = [*above, (N + N.T) << 2 * (1 - M) * np.eye(size)]
    return cp.Problem(cp.Minimize(cp.norm(V - target, "fro")), constraints), target, V


def nearest(W: np.ndarray, absolute: bool = True) -> bool:
    """It is a member with a gauge; ``W`` itself if that is one; and no farther than ``W`` scaled into the class."""
    problem, target, V = nearest_program(len(W), absolute)
    target.value = W
    problem.solve(solver=cp.CLARABEL)
    top = float(np.linalg.eigvalsh((abs(W) + abs(W).T) / 2)[-1])
    scaled = W * min(1, (1 - M) / top) if top > 0 else W
    distance, reach = np.linalg.norm(V.value - W), np.linalg.norm(scaled - W)
    kept = abs(rational(V.value.tolist()))
    member = definite((1 - Fraction(M) / 2) * identity(len(W)) - kept)
    return member and has_gauge(V.value) and bool(distance <= reach + 1e-5)


def test_cvxpy_and_the_gauge_agree() -> None:
    holds(agrees, systems())


def test_the_nearest_member_has_a_gauge() -> None:
    holds(nearest, systems())


TWINS = {
    "Λ - ΛW": lambda W: agrees(W, absolute=False),
    "nearest by sym W": lambda W: nearest(W, absolute=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], systems())
