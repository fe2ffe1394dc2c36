"""The quadratic dual bound (docs/theory.md): for any ``λ >= 0``, ``ν >= 0``, ``s > 0``, ``τ`` of any sign and
any ``ẑ``, if ``Q ⪰ ηI`` with ``η > 0``, then ``cᵀz* >= f(ẑ) - ‖∇f(ẑ)‖²/(4η)`` for every equilibrium of every
``x`` of the box or ball. No box of ``z``, no gauge, no uniqueness: layers with many equilibria are among the
cases."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import HALF
from proofs_checks.cases import vectors
from proofs_checks.quadratic import Dual, bound, duals, quadratic_form, solved, strengthened, truths
from proofs_checks.search import holds, rejects


def sound(d: Dual, four: int = 4, sign: int = 1) -> bool:
    """No equilibrium is below the bound."""
    value = bound(d, four, sign)
    return all(value <= truth for truth in truths(d))


def near_with_the_wrong_sign(d: Dual) -> bool:
    """Twin: ``+ ν·ẑ``, a little off the stationary point, where ``ν·ẑ`` is of the first order and the rest is not."""
    d = strengthened(solved(d))
    return sound(replace(d, point=d.point + Fraction(1, 2**10)), sign=-1)


@st.composite
def forms(draw: st.DrawFn) -> tuple:
    d = draw(duals(leaves=draw(st.booleans())))
    return d, draw(vectors(len(d.c)))


def test_it_is_below_every_equilibrium() -> None:
    holds(sound, duals(), 300)


def test_f_is_the_minimum_over_x_and_Q_and_the_gradient_are_its_own() -> None:
    holds(lambda case: quadratic_form(*case), forms())


TWINS = {
    "λ of the wrong sign": lambda d: sound(strengthened(solved(d, idle=-HALF))),
    "ν of the wrong sign": near_with_the_wrong_sign,
    "‖∇f‖² / 16η": lambda d: sound(d, four=16),
    "the radius forgotten": lambda d: all(bound(replace(d, r=0 * d.r)) <= truth for truth in truths(d)),
}
FORMS = {
    "form: + ν": {"sign": -1},
    "form: W for Wᵀ": {"transposed": False},
    "form: Q without U": {"inputs": False},
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], duals(), 300)


@pytest.mark.parametrize("twin", FORMS)
def test_broken_form(twin: str) -> None:
    rejects(lambda case: quadratic_form(*case, **FORMS[twin]), forms())
