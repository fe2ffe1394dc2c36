"""Gauge theorem, part 1 (docs/theory.md): if ``u > 0`` has slack ``u - |W| u > 0``, the layer and its interval
extension contract in ``max |x_i| / u_i`` at the rate ``q = max (|W|u)_i / u_i``, and the equilibrium is unique."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from proofs_checks.algebra import equilibria, interval_map
from proofs_checks.cases import problems
from proofs_checks.search import holds, rejects
from verideq.testing.exact import relu, zeros


def norm(x: np.ndarray, u: np.ndarray) -> Fraction:
    """``max |x_i| / u_i``."""
    return max(abs(x) / u)


def layer(case: tuple, absolute: bool = True, weighted: bool = True, scale: int = 1) -> bool:
    """Contraction between any two points, the rate of the iteration, and uniqueness among all active sets."""
    W, u, v, _, z, other = case
    W = scale * W
    q = max(((abs(W) if absolute else W) @ u) / u) / scale
    metric = u if weighted else u**0

    def F(x: np.ndarray) -> np.ndarray:
        return relu(W @ x + v)

    if q >= 1 or norm(F(z) - F(other), metric) > q * norm(z - other, metric):
        return False
    found = equilibria(W, v)
    if len(found) != 1:
        return False
    truth, iterate = found[0], zeros(len(u))
    start = norm(truth, metric)
    for step in range(1, 5):
        iterate = F(iterate)
        if norm(iterate - truth, metric) > q**step * start:
            return False
    return True


def interval_extension(case: tuple, absolute: bool = True, swapped: bool = False) -> bool:
    """``G`` contracts at the same rate, in the larger of the distances of the two ends."""
    W, u, low, high, z, other = case
    q = max(((abs(W) if absolute else W) @ u) / u)
    one, two = (np.minimum(z, other), np.maximum(z, other)), (low, high)
    a, b = interval_map(W, *one, (low, high)), interval_map(W, *two[:: -1 if swapped else 1], (low, high))
    distance = max(norm(one[k] - two[k], u) for k in (0, 1))
    return max(norm(a[k] - b[k], u) for k in (0, 1)) <= q * distance


def test_the_layer_contracts_and_its_equilibrium_is_unique() -> None:
    holds(layer, problems())


def test_the_interval_extension_contracts_at_the_same_rate() -> None:
    holds(interval_extension, problems())


TWINS = {
    "layer: W for |W|": lambda case: layer(case, absolute=False),
    "layer: the norm without u": lambda case: layer(case, weighted=False),
    "layer: q of W / 2": lambda case: layer(case, scale=2),
    "interval: W for |W|": lambda case: interval_extension(case, absolute=False),
    "interval: the ends of one exchanged": lambda case: interval_extension(case, swapped=True),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(TWINS[twin], problems())
