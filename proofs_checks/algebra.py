"""Linear algebra over the rationals: what the statements speak of, decided without rounding.

Matrices are NumPy arrays of `fractions.Fraction`, of a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from math import isqrt

import numpy as np

from verideq.testing.exact import ZERO, equilibrium, is_equilibrium, relu, select, solve_linear, zeros

ONE = Fraction(1)
HALF = Fraction(1, 2)


def rational(values: object) -> np.ndarray:
    """Nested lists of numbers as an array of fractions."""
    array = np.asarray(values, dtype=object)
    return np.vectorize(Fraction, otypes=[object])(array) if array.size else array


def ones(size: int) -> np.ndarray:
    """The vector of ones."""
    return np.full(size, ONE, dtype=object)


def identity(size: int) -> np.ndarray:
    """The identity matrix."""
    return select(np.eye(size, dtype=bool), ONE, ZERO)


def diagonal(entries: np.ndarray) -> np.ndarray:
    """The diagonal matrix of a vector."""
    return identity(len(entries)) * entries


def symmetric(A: np.ndarray) -> np.ndarray:
    """``(A + Aᵀ) / 2``."""
    return (A + A.T) * HALF


def root_above(value: Fraction, bits: int = 40) -> Fraction:
    """A rational not below ``√value``, and above it by less than ``2^-bits``."""
    scaled = value.numerator * 4**bits // value.denominator
    return Fraction(isqrt(scaled) + 1, 2**bits)


def inverse(A: np.ndarray) -> np.ndarray | None:
    """``A⁻¹``, or ``None`` for a singular matrix."""
    columns = [solve_linear(A, column) for column in identity(len(A))]
    return None if any(column is None for column in columns) else np.array(columns, dtype=object).T


def definite(A: np.ndarray, strict: bool = True) -> bool:
    """Whether ``xᵀAx > 0`` for all ``x ≠ 0``; with `strict` false, ``>= 0``. `A` need not be symmetric.

    By elimination with pivots from the diagonal.
    """
    rest = symmetric(A)
    while len(rest):
        pivots = np.diag(rest)
        if bool((pivots < 0).any()) or (strict and bool((pivots == 0).any())):
            return False
        place = int(np.argmax(pivots > 0))
        if pivots[place] == 0:
            return not bool(rest.astype(bool).any())
        keep = [i for i in range(len(rest)) if i != place]
        column = rest[keep, place]
        rest = rest[np.ix_(keep, keep)] - np.outer(column, column) / pivots[place]
    return True


def norm_below(A: np.ndarray, square: Fraction, strict: bool = True) -> bool:
    """Whether ``‖A‖₂² < square``, or ``<=``."""
    return definite(square * identity(A.shape[1]) - A.T @ A, strict)


def characteristic(A: np.ndarray) -> list[Fraction]:
    """The coefficients of ``det(t I - A)``, the leading one first (Faddeev and LeVerrier)."""
    size, coefficients, power = len(A), [ONE], zeros(*A.shape)
    for k in range(1, size + 1):
        power = A @ power + coefficients[-1] * identity(size)
        coefficients.append(-sum(np.diag(A @ power), start=ZERO) / k)
    return coefficients


def multiply(p: list[Fraction], q: list[Fraction]) -> list[Fraction]:
    """The product of two polynomials."""
    product = [ZERO] * (len(p) + len(q) - 1)
    for i, a in enumerate(p):
        for j, b in enumerate(q):
            product[i + j] += a * b
    return product


def evaluate(p: list[Fraction], t: Fraction) -> Fraction:
    """``p(t)``."""
    value = ZERO
    for coefficient in p:
        value = value * t + coefficient
    return value


def _remainder(p: list[Fraction], q: list[Fraction]) -> list[Fraction]:
    rest = list(p)
    while len(rest) >= len(q):
        factor = rest[0] / q[0]
        rest = [a - factor * b for a, b in zip(rest, q + [ZERO] * (len(rest) - len(q)), strict=True)][1:]
    while rest and rest[0] == 0:
        rest = rest[1:]
    return rest


def roots_above(p: list[Fraction], t: Fraction) -> int:
    """The number of distinct real roots greater than `t`, itself no root, by Sturm's theorem."""
    degree = len(p) - 1
    chain = [p, [a * (degree - k) for k, a in enumerate(p[:-1])]]
    while chain[-1]:
        chain.append([-a for a in _remainder(chain[-2], chain[-1])])

    def changes(values: list[Fraction]) -> int:
        signs = [value > 0 for value in values if value]
        return sum(a != b for a, b in pairwise(signs))

    return changes([evaluate(q, t) for q in chain[:-1]]) - changes([q[0] for q in chain[:-1]])


def radius_below_one(W: np.ndarray) -> bool:
    """Whether ``ρ(|W|) < 1``: by Perron and Frobenius ``ρ`` is the largest real eigenvalue of ``|W|``."""
    p = characteristic(abs(W))
    return evaluate(p, ONE) != 0 and roots_above(p, ONE) == 0


def gauge_of(W: np.ndarray) -> np.ndarray | None:
    """``u`` with ``(I - |W|) u = 1`` if it is positive: a gauge of slack 1."""
    u = solve_linear(identity(len(W)) - abs(W), ones(len(W)))
    return u if u is not None and bool((u > 0).all()) else None


def solved(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``W̃ = (I - diag W)⁻¹ offdiag W`` and the factor ``1 / (1 - diag W)``."""
    factor = 1 / (ONE - np.diag(W))
    return (W - np.diag(np.diag(W))) * factor[:, None], factor


def halves(W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``W⁺`` and ``W⁻``."""
    return relu(W), -relu(-W)


def interval_matrix(W: np.ndarray) -> np.ndarray:
    """``Ŵ = [[W⁺, W⁻], [W⁻, W⁺]]``."""
    plus, minus = halves(W)
    return np.block([[plus, minus], [minus, plus]])


def interval_map(W: np.ndarray, lower: np.ndarray, upper: np.ndarray, v: tuple[np.ndarray, np.ndarray]) -> tuple:
    """``G(l, h)``."""
    plus, minus = halves(W)
    return relu(plus @ lower + minus @ upper + v[0]), relu(plus @ upper + minus @ lower + v[1])


def interval_equilibrium(W: np.ndarray, v: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The fixed point of ``G``, as ``(l, h)``."""
    both = equilibrium(interval_matrix(W), np.concatenate([v[1], v[0]]))
    return both[len(W) :], both[: len(W)]


def within(lower: np.ndarray, x: np.ndarray, upper: np.ndarray) -> bool:
    """Whether ``l <= x <= h``."""
    return bool((lower <= x).all() and (x <= upper).all())


def corners(lower: np.ndarray, upper: np.ndarray) -> Iterator[np.ndarray]:
    """Every corner of a box, and its middle."""
    for bits in range(2 ** len(lower)):
        yield select(np.array([bool(bits >> i & 1) for i in range(len(lower))], dtype=bool), upper, lower)
    yield (lower + upper) * HALF


def equilibria(W: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Every isolated ``z = relu(W z + v)``, by trying all active sets; whether ``W`` has a gauge does not matter."""
    size = len(v)
    found: dict[tuple[Fraction, ...], np.ndarray] = {}
    for bits in range(2**size):
        active = [i for i in range(size) if bits >> i & 1]
        candidate = zeros(size)
        if active:
            part = solve_linear(identity(len(active)) - W[np.ix_(active, active)], v[active])
            if part is None or bool((part < 0).any()):
                continue
            candidate[active] = part
        if is_equilibrium(W, v, candidate):
            found[tuple(candidate)] = candidate
    return list(found.values())
