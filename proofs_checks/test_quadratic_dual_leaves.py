"""Leaves of branch and bound in the quadratic dual (docs/theory.md): where ``p_i >= 0``, ``λ_i`` is free; where
``p_i <= 0``, unit i is deleted (``z_i = 0``) and ``λ_i >= 0`` kept. ``c = 0`` and a bound above 0 say that the
leaf is empty."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proofs_checks.algebra import HALF
from proofs_checks.quadratic import Dual, bound, duals, solved, strengthened, truths
from proofs_checks.search import holds, rejects
from verideq.testing.exact import relu, zeros


def sound(d: Dual, everywhere: bool = False) -> bool:
    """No equilibrium in the leaf is below the bound."""
    value = bound(d)
    return all(value <= truth for truth in truths(d, everywhere))


def free_everywhere(d: Dual) -> bool:
    """Twin: ``λ_i`` free on the leaf ``p_i <= 0`` too."""
    assert d.leaf is not None
    unit = d.leaf[0]
    point = d.point.copy()
    point[unit] = 0
    idle = zeros(len(d.c))
    idle[unit] = -HALF
    return sound(strengthened(solved(replace(d, leaf=(unit, False), lam=relu(d.lam), point=point), idle)))


def deleted_everywhere(d: Dual) -> bool:
    """Twin: the unit deleted, and its bound claimed for the leaf ``p_i >= 0``."""
    assert d.leaf is not None
    unit, positive = d.leaf
    point = d.point.copy()
    point[unit] = 0
    value = bound(replace(d, lam=relu(d.lam), leaf=(unit, False), point=point))
    return not positive or all(value <= truth for truth in truths(d))


def test_it_is_below_every_equilibrium_of_the_leaf() -> None:
    holds(sound, duals(leaves=True), 300)


TWINS = {
    "a leaf's bound for the whole": lambda d: sound(d, everywhere=True),
    "λ free where p <= 0": free_everywhere,
    "deleted where p >= 0": deleted_everywhere,
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], duals(leaves=True), 300)
