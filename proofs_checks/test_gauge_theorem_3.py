"""Gauge theorem, part 3 (docs/theory.md): a box moved out by ``t u``, ``t = max (0, G_h - h, l - G_l)_i /
s_i``, maps into itself; and a box ``l <= h`` that maps into itself holds the equilibrium of every injection of
the box of injections."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from proofs_checks.algebra import corners, interval_map, within
from proofs_checks.cases import problems
from proofs_checks.search import holds, rejects
from verideq.testing.exact import ZERO, equilibrium, relu


def moved_out(case: tuple, share: Fraction = Fraction(1), sides: str = "both", absolute: bool = True) -> bool:
    W, u, low, high, z, other = case
    lower, upper = relu(np.minimum(z, other)), relu(np.maximum(z, other))
    below, above = interval_map(W, lower, upper, (low, high))
    out = np.maximum(above - upper, lower - below) if sides == "both" else above - upper
    s = u - (abs(W) if absolute else W) @ u
    if not bool((s > 0).all()):
        return True
    t = max(ZERO, max(out / s)) * share
    lower, upper = relu(lower - t * u), upper + t * u
    below, above = interval_map(W, lower, upper, (low, high))
    if not bool((below >= lower).all() and (above <= upper).all()):
        return False
    return all(within(lower, equilibrium(W, v), upper) for v in corners(low, high))


def invariant(case: tuple, plain: bool = False) -> bool:
    """The other half alone: whatever box maps into itself. Boxes around the interval equilibrium, and random ones."""
    W, _, low, high, z, other = case
    lower, upper = relu(np.minimum(z, other)), relu(np.maximum(z, other))
    for _ in range(4):
        below, above = interval_map(W, lower, upper, (low, high))
        if plain:  # twin: F at the two ends
            below, above = relu(W @ lower + low), relu(W @ upper + high)
        if bool((below >= lower).all() and (above <= upper).all()):
            return all(within(lower, equilibrium(W, v), upper) for v in corners(low, high))
        lower, upper = np.minimum(lower, below), np.maximum(upper, above)
    return True


def test_a_box_moved_out_maps_into_itself_and_holds_every_equilibrium() -> None:
    holds(moved_out, problems())


def test_a_box_that_maps_into_itself_holds_every_equilibrium() -> None:
    holds(invariant, problems())


TWINS = {
    "moved out by t / 2": lambda case: moved_out(case, share=Fraction(1, 2)),
    "the upper ends alone": lambda case: moved_out(case, sides="upper"),
    "slack of W for |W|": lambda case: moved_out(case, absolute=False),
    "F at the two ends for G": lambda case: invariant(case, plain=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], problems())
