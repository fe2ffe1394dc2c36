"""Two traps (docs/theory.md). Without a gauge a box that maps into itself proves nothing; and a crossed box,
``l <= h`` given up, passes the containment test."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import ONE, equilibria, gauge_of, interval_map, rational
from proofs_checks.search import holds, rejects
from verideq.testing.exact import ZERO, equilibrium, zeros

WEIGHTS = st.fractions(0, 40, max_denominator=2**10)
QUARTERS = tuple(Fraction(k, 4) for k in range(17))
SCALARS = st.one_of(
    st.tuples(
        st.sampled_from([Fraction(k, 4) for k in range(-48, 13)]),
        st.sampled_from([Fraction(k, 2) for k in range(-8, 9)]),
        st.sampled_from(QUARTERS),
        st.sampled_from(QUARTERS),
    ),
    st.tuples(*[st.sampled_from(few) for few in ((-10, 2), (1, -1), (0, 1), (0, 1))]).map(
        lambda few: tuple(Fraction(k) for k in few)
    ),
)
"""``w, v, l, h``; the second kind are the two traps and their neighbours."""


def scalar(value: Fraction) -> np.ndarray:
    return np.array([value], dtype=object)


def no_gauge(extra: Fraction) -> bool:
    """``W = 2 + extra``, ``v = -1``: ``[0, 0]`` maps into itself, and ``1 / (W - 1)`` is an equilibrium too."""
    W, v = np.array([[2 + extra]], dtype=object), scalar(-ONE)
    below, above = interval_map(W, zeros(1), zeros(1), (v, v))
    both = {z[0] for z in equilibria(W, v)} == {ZERO, 1 / (1 + extra)}
    return below[0] == above[0] == 0 and both and gauge_of(W) is None


def crossed(extra: Fraction) -> bool:
    """``W = -10 - extra``, ``v = 1``: ``l = 1, h = 0`` passes, and ``z* = 1 / (11 + extra)`` is not in it."""
    W, v = np.array([[-10 - extra]], dtype=object), scalar(ONE)
    below, above = interval_map(W, scalar(ONE), zeros(1), (v, v))
    return below[0] >= 1 and above[0] <= 0 and equilibrium(W, v)[0] == 1 / (11 + extra)


def accepted(case: tuple, unique: bool = True, ordered: bool = True) -> bool:
    """A check that asks for uniqueness, here ``w < 1``, and for ``l <= h`` is sound; a twin asks for less."""
    w, v, lower, upper = case
    W, v = np.array([[w]], dtype=object), scalar(v)
    below, above = interval_map(W, scalar(lower), scalar(upper), (v, v))
    if (unique and w >= 1) or (ordered and lower > upper) or below[0] < lower or above[0] > upper:
        return True
    return all(lower <= z[0] <= upper for z in equilibria(W, v))


def test_a_self_map_without_a_gauge_proves_nothing() -> None:
    holds(no_gauge, WEIGHTS)


def test_a_crossed_box_passes_the_containment_test() -> None:
    holds(crossed, WEIGHTS)


def test_with_both_conditions_the_check_is_sound() -> None:
    holds(accepted, SCALARS)


TWINS = {
    "uniqueness not asked for": (lambda case: accepted(case, unique=False), SCALARS),
    "crossed boxes accepted": (lambda case: accepted(case, ordered=False), SCALARS),
    "a weight below 1": (lambda extra: no_gauge(extra - Fraction(3, 2)), WEIGHTS),
    "a positive weight": (lambda extra: crossed(-extra), WEIGHTS),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])


def test_the_two_by_hand() -> None:
    assert no_gauge(ZERO) and crossed(ZERO)
    assert gauge_of(rational([[-10]])) is None
