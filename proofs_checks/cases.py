"""Cases for the searches, biased to corners: zeros, ties, Hadamard, near-singular, huge ratios."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from proofs_checks.algebra import ONE, ZERO, gauge_of, identity, inverse, ones, rational, root_above, solved
from verideq.testing.exact import exact, relu
from verideq.testing.strategies import fusions

NUMBERS = (*(Fraction(k, 2) for k in range(-8, 9)), ZERO, ZERO, ONE, -ONE, Fraction(1, 3), Fraction(-2, 7))
RATES = (Fraction(1, 2), Fraction(9, 10), Fraction(99, 100), 1 - Fraction(1, 2**20), ZERO)
"""Of contraction."""
MARGINS = (Fraction(1, 10), Fraction(1, 2), ONE, Fraction(1, 2**20), Fraction(20))
"""Of monotonicity."""
HADAMARD = (
    rational([[1]]),
    rational([[1, 1], [1, -1]]),
    rational([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]),
)


def vectors(size: int, low: int = -8) -> st.SearchStrategy[np.ndarray]:
    """Fractions from ``low / 2`` to 4."""
    values = st.lists(st.integers(low, 8).map(lambda k: Fraction(k, 2)), min_size=size, max_size=size)
    return values.map(lambda drawn: np.array(drawn, dtype=object))


def scales(size: int, power: int = 8) -> st.SearchStrategy[np.ndarray]:
    """Powers of two, most of them small, some with a huge ratio."""
    exponents = st.lists(st.integers(-power, power), min_size=size, max_size=size)
    return exponents.map(lambda drawn: np.array([Fraction(2) ** k for k in drawn], dtype=object))


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int | None = None) -> np.ndarray:
    """Any matrix: signed or not, with rows and columns of zeros, of ones, of rank one, Hadamard, badly scaled."""
    columns = rows if columns is None else columns
    drawn = draw(st.lists(st.sampled_from(NUMBERS), min_size=rows * columns, max_size=rows * columns))
    A = np.array(drawn, dtype=object).reshape(rows, columns)
    kind = draw(st.sampled_from(("any", "any", "any", "nonnegative", "zeros", "scaled", "signs", "rank", "tiny")))
    if kind == "nonnegative":
        A = abs(A)
    elif kind == "zeros":
        A[draw(st.integers(0, rows - 1))] = ZERO
        A[:, draw(st.integers(0, columns - 1))] = ZERO
    elif kind == "scaled":
        A = A * draw(scales(rows))[:, None]
    elif kind == "signs":
        A = np.where(A > 0, ONE, -ONE)
    elif kind == "rank":
        A = np.outer(A[:, 0], A[0])
    elif kind == "tiny":
        A = A / 2**20
    return A


@st.composite
def gauged(draw: st.DrawFn, least: int = 1, most: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """``W = diag(u) N diag(u)⁻¹`` with rows of ``|N|`` that sum to one of `RATES`, and its gauge ``u``."""
    units = draw(st.integers(least, most))
    N, u = draw(matrices(units)), draw(scales(units, 4))
    sums = abs(N) @ ones(units)
    rates = draw(st.lists(st.sampled_from(RATES), min_size=units, max_size=units))
    N = N * np.array([rate / (total or ONE) for rate, total in zip(rates, sums, strict=True)], dtype=object)[:, None]
    return N * u[:, None] / u, u


@st.composite
def balanced(draw: st.DrawFn, least: int = 1, most: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """``M`` and ``e > 0`` with ``e² > (|M|1 + |M|ᵀ1) / 2``, often by very little: ``D = diag(e²)`` of Theorem 3.1."""
    M = draw(matrices(draw(st.integers(least, most))))
    floor = (abs(M) + abs(M).T) @ ones(len(M)) / 2
    room = draw(st.sampled_from((Fraction(1, 2**20), Fraction(1, 10), ONE)))
    e = np.array([root_above(f) * (1 + room) for f in floor], dtype=object)
    return M, e


@st.composite
def monotone(draw: st.DrawFn, least: int = 1, most: int = 4) -> tuple[np.ndarray, Fraction]:
    """``W = (1-m) I - AᵀA + B - Bᵀ`` of a MonDEQ, and ``m``."""
    units = draw(st.integers(least, most))
    A, B, m = draw(matrices(draw(st.integers(1, units)), units)), draw(matrices(units)), draw(st.sampled_from(MARGINS))
    return (1 - m) * identity(units) - A.T @ A + B - B.T, m


@st.composite
def injections(draw: st.DrawFn, W: np.ndarray) -> np.ndarray:
    """Any ``v``; or one whose equilibrium has ties, ``W z + v`` exactly 0 where ``z`` is."""
    z = draw(vectors(len(W)))
    return z if draw(st.booleans()) else relu(z) - W @ relu(z)


@st.composite
def boxes(draw: st.DrawFn, size: int) -> tuple[np.ndarray, np.ndarray]:
    """``l <= h``: of a few units of width, a point, or in between."""
    middle = draw(vectors(size))
    radius = abs(draw(vectors(size))) * draw(st.sampled_from((ONE, ZERO, Fraction(1, 16))))
    return middle - radius, middle + radius


@st.composite
def orthogonal(draw: st.DrawFn, size: int) -> np.ndarray:
    """A rational orthogonal matrix: a permutation with signs, or Cayley's ``(I - S)(I + S)⁻¹`` of a skew ``S``."""
    order = draw(st.permutations(range(size)))
    signs = draw(st.lists(st.sampled_from((ONE, -ONE)), min_size=size, max_size=size))
    Q = identity(size)[list(order)] * np.array(signs, dtype=object)
    if draw(st.booleans()):
        B = draw(matrices(size))
        S = B - B.T
        back = inverse(identity(size) + S)
        assert back is not None  # I + S is positive definite
        Q = Q @ (identity(size) - S) @ back
    return Q


@st.composite
def equal_rows(draw: st.DrawFn, most: int = 4) -> tuple[np.ndarray, Fraction]:
    """``K`` (m, n), m <= n, with ``K Kᵀ = c I``, and ``c``: a rational stand-in for ``√c`` times orthonormal rows."""
    if draw(st.booleans()):
        H = draw(st.sampled_from(HADAMARD))
        size = len(H)
        K, c = H[list(draw(st.permutations(range(size))))] * draw(scales(1))[0], Fraction(size)
        c = c * (K[0, 0] / H[0, 0]) ** 2
    else:
        size = draw(st.integers(1, most))
        K, c = draw(orthogonal(size)), ONE
    return K[: draw(st.integers(1, size))], c


@st.composite
def stored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A stored float64 matrix with a gauge, signed or not, and that gauge; every other time an arbitrary slack."""
    units = draw(st.integers(1, 5))
    W = exact(draw(fusions(units, units)))
    if gauge_of(W) is None:
        W, _ = solved(W)  # a large negative diagonal
    u = gauge_of(W)
    assume(u is not None)
    assert u is not None
    if draw(st.booleans()):  # any u > 0 with u - |W| u > 0 will do: push the one of slack 1 towards the others
        u = u + draw(vectors(units, 0)) / 8
        assume(bool((u - abs(W) @ u > 0).all()))
    return W, u


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """``W, u``, the two ends of a box of injections, and two more points."""
    W, u = draw(stored())
    a, b = draw(vectors(len(u))), draw(vectors(len(u)))
    return W, u, np.minimum(a, b), np.maximum(a, b), draw(vectors(len(u))), draw(vectors(len(u)))
