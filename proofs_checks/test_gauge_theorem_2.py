"""Gauge theorem, part 2 (docs/theory.md): any ``ẑ`` is within ``t u`` of the equilibrium, ``t = max |ẑ -
F(ẑ)|_i / s_i`` with the slack ``s = u - |W| u``. Sharp."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import ONE, identity, rational
from proofs_checks.cases import problems, stored
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium, relu, solve_linear


@st.composite
def tight(draw: st.DrawFn, attained: bool = False) -> tuple:
    """Signs ``σ``, ``W = σ|W|σ``, ``ẑ = z* + δσe`` on the active side; attained for ``e = u``."""
    W, u = draw(stored())
    signs = np.array(draw(st.lists(st.sampled_from((1, -1)), min_size=len(u), max_size=len(u))), dtype=object)
    delta = draw(st.sampled_from((ONE, Fraction(1, 2**20))))
    error = u
    if not attained and draw(st.booleans()):  # residuals in the proportion of another slack
        W = W / max(ONE, 2 * max(abs(W).T @ u / u))
        error = solve_linear(identity(len(u)) - abs(W), relu(u - abs(W).T @ u))
    W = abs(W) * np.outer(signs, signs)
    truth = u + error
    v = (identity(len(u)) - W) @ truth
    return W, u, v, v, truth + delta * signs * error, truth


CASES = st.one_of(problems(), tight())


def attained(case: tuple) -> bool:
    W, u, v, _, guess, truth = case
    t = max(abs(guess - relu(W @ guess + v)) / (u - abs(W) @ u))
    return bool((abs(truth - guess) == t * u).all())


def bound(case: tuple, absolute: bool = True, transposed: bool = False, slack: bool = True) -> bool:
    W, u, v, _, guess, _ = case
    operator = (abs(W) if absolute else W).T if transposed else (abs(W) if absolute else W)
    s = u - operator @ u if slack else u
    if not bool((s > 0).all()):
        return True
    t = max(abs(guess - relu(W @ guess + v)) / s)
    return bool((abs(equilibrium(W, v) - guess) <= t * u).all())


def test_any_point_is_within_t_u_of_the_equilibrium() -> None:
    holds(bound, CASES)


def test_it_is_sharp() -> None:
    holds(attained, tight(attained=True))


def test_it_is_sharp_by_hand() -> None:
    W, v = rational([["9/10"]]), np.array([ONE], dtype=object)
    assert equilibrium(W, v)[0] == 10  # from 0: residual 1, slack 1/10, and the error is 10


TWINS = {
    "W for |W|": lambda case: bound(case, absolute=False),
    "|W|ᵀ for |W|": lambda case: bound(case, transposed=True),
    "u for the slack": lambda case: bound(case, slack=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], CASES)
