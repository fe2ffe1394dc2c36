"""The transformed layer (docs/theory.md): for ``W_ii < 1`` the rows solved for their own unknowns, ``W̃ = (I -
diag W)⁻¹ offdiag W``, ``ṽ = (I - diag W)⁻¹ v``, have the same equilibria; the gauge theorem holds for them; a
gauge of ``W`` is one of ``W̃``. And the false shortcut: ``diag W + |offdiag W|`` for ``|W|`` in the error
bound."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from proofs_checks.algebra import ONE, equilibria, gauge_of, identity, rational, solved
from proofs_checks.cases import problems, stored
from proofs_checks.search import holds, rejects
from verideq import Equilibrium, gauge
from verideq.testing.exact import equilibrium, exact, is_equilibrium, relu


@st.composite
def layers(draw: st.DrawFn) -> tuple:
    """``W`` with any diagonal below 1, often far below; ``v``; a point; and a gauge of ``W̃``."""
    W, _, v, _, guess, _ = draw(problems())
    drawn = draw(st.lists(st.integers(-160, 3), min_size=len(v), max_size=len(v)))
    W = W - np.diag(np.diag(W)) + identity(len(v)) * np.array([Fraction(d, 4) for d in drawn], dtype=object)
    u = gauge_of(solved(W)[0])
    assume(u is not None)
    return W, v, guess, u


def same_equilibria(case: tuple, scaled: bool = True, sign: int = 1) -> bool:
    """The equilibrium of ``(W̃, ṽ)`` is the only one of ``(W, v)``."""
    W, v, _, _ = case
    tilde = solved(W)[0] if sign > 0 else (W - np.diag(np.diag(W))) / (1 + np.diag(W))[:, None]
    truth = equilibrium(tilde, v * solved(W)[1] if scaled else v)
    return is_equilibrium(W, v, truth) and [tuple(z) for z in equilibria(W, v)] == [tuple(truth)]


def error_bound(case: tuple, shortcut: bool = False) -> bool:
    """Part 2 with the residual and the slack of the transformed layer."""
    W, v, guess, u = case
    tilde, factor = solved(W)
    operator, right, s = tilde, v * factor, u - abs(tilde) @ u
    if shortcut:
        operator, right = W, v
        s = u - (np.diag(np.diag(W)) + abs(W - np.diag(np.diag(W)))) @ u
    t = max(abs(guess - relu(operator @ guess + right)) / s)
    return bool((abs(equilibrium(tilde, v * factor) - guess) <= t * u).all())


def inherited(case: tuple, reverse: bool = False) -> bool:
    """A gauge of ``W`` is one of ``W̃``; the reverse is false."""
    W, u = case
    if reverse:
        W = W - 3 * identity(len(W))
        u = gauge_of(solved(W)[0])
        return u is None or bool((abs(W) @ u < u).all())
    return bool((abs(solved(W)[0]) @ u < u).all())


def found_by_the_package(case: tuple) -> bool:
    """`verideq.gauge` finds a gauge of ``W̃`` for the stored float64 weights; its slack is no more than the true one."""
    W, _, _, _ = case
    linear = nn.Linear(len(W), len(W), bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(W.astype(float)))
    layer = Equilibrium(linear, nn.Identity())
    found = gauge(layer)
    kept, u = exact(linear.weight), exact(found.u)
    truth = u - abs(solved(kept)[0] if found.transformed else kept) @ u
    claimed = exact(found.slack(layer))
    return bool((claimed > 0).all() and (claimed <= truth).all())


def test_the_equilibria_are_the_same() -> None:
    holds(same_equilibria, layers())


def test_the_error_bound_of_the_transformed_layer() -> None:
    holds(error_bound, layers())


def test_a_gauge_of_the_layer_is_one_of_the_transformed_layer() -> None:
    holds(inherited, stored())


def test_the_package_finds_it() -> None:
    holds(found_by_the_package, layers())


TWINS = {
    "v for ṽ": (lambda case: same_equilibria(case, scaled=False), layers()),
    "the false shortcut": (lambda case: error_bound(case, shortcut=True), layers()),
    "a gauge of W̃ is one of W": (lambda case: inherited(case, reverse=True), stored()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])


def test_the_false_shortcut_by_hand() -> None:
    # W = -10, v = 1, ẑ = 1: with diag(W) + |offdiag W| the slack would be 11, and the bound 1/11; the error is 10/11.
    W, v = rational([[-10]]), np.array([ONE], dtype=object)
    residual = abs(1 - relu(W @ v + v)[0])
    assert residual / (1 - W[0, 0]) == Fraction(1, 11) < abs(equilibrium(W, v)[0] - 1) == Fraction(10, 11)
    assert [int(z[0]) for z in (relu(W @ x + v) for x in (0 * v, v))] == [1, 0]  # and Picard on W oscillates
