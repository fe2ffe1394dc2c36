"""Gauge theorem, part 4 (docs/theory.md): ``B₀ = [0, t u]`` with ``t = max (v_u)_i⁺ / s_i`` maps into itself,
and so does every ``B ∩ G(B)`` from there: a solver that starts there is sound whenever it is stopped."""

from __future__ import annotations

import numpy as np
import pytest

from proofs_checks.algebra import HALF, corners, interval_map, within
from proofs_checks.cases import problems
from proofs_checks.search import holds, rejects
from verideq.testing.exact import equilibrium, relu, zeros


def anytime(case: tuple, end: str = "upper", slack: bool = True, swapped: bool = False) -> bool:
    W, u, low, high, _, _ = case
    s = u - abs(W) @ u if slack else u
    t = max(relu({"upper": high, "lower": low, "middle": (low + high) * HALF}[end]) / s)
    lower, upper = zeros(len(u)), t * u
    truths = [equilibrium(W, v) for v in corners(low, high)]
    for _ in range(4):
        below, above = interval_map(W, *((upper, lower) if swapped else (lower, upper)), (low, high))
        if not bool((below >= lower).all() and (above <= upper).all()):
            return False
        if not all(within(lower, truth, upper) for truth in truths):
            return False
        lower, upper = np.maximum(lower, below), np.minimum(upper, above)
    return True


def test_the_solver_is_sound_after_every_step() -> None:
    holds(anytime, problems())


TWINS = {
    "v_l for v_u": lambda case: anytime(case, end="lower"),
    "the middle of v for v_u": lambda case: anytime(case, end="middle"),
    "u for the slack": lambda case: anytime(case, slack=False),
    "the ends of the box exchanged": lambda case: anytime(case, swapped=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], problems())
