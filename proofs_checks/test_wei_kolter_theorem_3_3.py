"""Wei & Kolter, Theorem 3.3: some diagonal ``Λ > 0`` makes ``Λ - Λ|W|`` positive definite if and only if ``W =
Γ D^-½ M D^-½ Γ⁻¹`` with diagonal ``Γ, D > 0`` and ``D_ii > (|M|1 + |M|ᵀ1)_i / 2``. Then the layer and its
interval extension have one equilibrium, and the second encloses the first."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st

from proofs_checks.algebra import (
    ONE,
    corners,
    definite,
    diagonal,
    equilibria,
    gauge_of,
    identity,
    interval_equilibrium,
    interval_matrix,
    ones,
    radius_below_one,
    root_above,
    symmetric,
    within,
)
from proofs_checks.cases import balanced, boxes, gauged, matrices, scales
from proofs_checks.search import holds, rejects
from verideq.testing.exact import solve_linear

Entries = Callable[[np.ndarray], np.ndarray]


@st.composite
def factors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``M``, ``√D`` and ``Γ``."""
    M, e = draw(balanced())
    return M, e, draw(scales(len(M)))


def forward(case: tuple, power: int = -2, room: Fraction = ONE) -> bool:
    """``Λ = Γ⁻²`` does it."""
    M, e, g = case
    W = M / np.outer(e, e) * g[:, None] / g * room
    return definite(diagonal(g**power) @ (identity(len(W)) - abs(W)))


@st.composite
def systems(draw: st.DrawFn) -> np.ndarray:
    """Members of the class, matrices outside, and matrices with ``ρ(|W|)`` at 1 or just above."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(matrices(draw(st.integers(1, 4))))
    W, _ = draw(gauged())
    if kind == 1:
        M, e = draw(balanced())
        g = draw(scales(len(M)))
        return M / np.outer(e, e) * g[:, None] / g
    return W * draw(st.sampled_from((ONE, Fraction(2), 1 / Fraction(99, 100), 1 + Fraction(1, 2**19))))


def lyapunov(W: np.ndarray) -> np.ndarray | None:
    """The diagonal ``Λ = y / u`` from ``(I - |W|) u = 1`` and ``(I - |W|)ᵀ y = 1``, if both are positive."""
    u, y = gauge_of(W), gauge_of(W.T)
    return None if u is None or y is None else y / u


def factored(W: np.ndarray, part: Entries = symmetric, misprint: bool = False) -> bool:
    """Whether the proof gives ``Γ, D, M`` of the theorem, by way of ``Λ``, and they give ``W`` back."""
    Λ = lyapunov(W)
    if Λ is None:
        return False
    # Γ = Λ^-½ has to be rational; what is near enough serves as well, because definiteness is open.
    g = np.array([1 / root_above(entry, 200) for entry in Λ], dtype=object)
    inner = W / g[:, None] * g
    e = solve_linear(identity(len(W)) - part(abs(inner)), ones(len(W)))
    if e is None or not bool((e > 0).all()):
        return False
    M = inner * np.outer(e, e)
    floor = (abs(M) + abs(M).T) @ ones(len(W)) / 2
    back = (M * np.outer(e, e) if misprint else M / np.outer(e, e)) * g[:, None] / g
    return bool((e**2 > floor).all() and (back == W).all())


def backward(W: np.ndarray, part: Entries = symmetric, misprint: bool = False) -> bool:
    """The factors can be made exactly where ``ρ(|W|) < 1``, decided by Sturm's theorem; elsewhere no ``Λ`` exists."""
    inside = radius_below_one(W)
    if not inside:
        # No Λ can do; three are tried.
        tried = [ones(len(W)), abs(W) @ ones(len(W)) + 1, 1 / (abs(W).T @ ones(len(W)) + 1)]
        if any(definite(diagonal(Λ) @ (identity(len(W)) - abs(W))) for Λ in tried):
            return False
    return factored(W, part, misprint) == inside


@st.composite
def layers(draw: st.DrawFn) -> tuple:
    M, e = draw(balanced(most=2))
    g = draw(scales(len(M), 3))
    return M / np.outer(e, e) * g[:, None] / g, *draw(boxes(len(M)))


def encloses(case: tuple, scale: int = 1, swapped: bool = False) -> bool:
    """Both equilibria are unique, and the interval one encloses the other at every corner."""
    W, low, high = case
    W = scale * W
    if len(equilibria(interval_matrix(W), np.concatenate([high, low]))) != 1:
        return False
    lower, upper = interval_equilibrium(W if not swapped else W.T, (low, high))
    found = [equilibria(W, v) for v in corners(low, high)]
    return all(len(z) == 1 and within(lower, z[0], upper) for z in found)


def test_forward() -> None:
    holds(forward, factors())


def test_backward() -> None:
    holds(backward, systems())


def test_the_interval_equilibrium_is_unique_and_encloses() -> None:
    holds(encloses, layers())


TWINS = {
    "forward: Λ = I": (lambda case: forward(case, power=0), factors()),
    "forward: Λ = Γ²": (lambda case: forward(case, power=2), factors()),
    "forward: D smaller by 1 - 2⁻¹⁰": (lambda case: forward(case, room=1 + Fraction(1, 2**10)), factors()),
    "backward: the misprint D^½ M D^½": (lambda W: backward(W, misprint=True), systems()),
    "backward: |W| without its transpose": (lambda W: backward(W, part=lambda S: S.T), systems()),
    "enclosure: four times W": (lambda case: encloses(case, scale=4), layers()),
    "enclosure: Wᵀ": (lambda case: encloses(case, swapped=True), layers()),
}


@pytest.mark.parametrize("twin", TWINS)
def test_broken_twin(twin: str) -> None:
    rejects(*TWINS[twin])
