"""The inclusion principle, in two arithmetics.

**Principle.** If ``x`` lies in ``[lo, hi]`` then ``f(x)`` lies in what `f`'s rule returns. Everything that the
checker says follows from that, rule by rule. `Float` keeps it with outward-rounded float64; `Exact` with rational
numbers, for audits. An interval is a pair of arrays ``(lo, hi)`` of one shape, whose first axis is the batch.

`Float` uses the standard bound for a sum of ``n`` products in any order, with or without fused multiply-add,

    |fl(aᵀb) - aᵀb|  <=  γ |a|ᵀ|b| + underflow,      γ = (n + k) u / (1 - (n + k) u),   u = 2⁻⁵³

(Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1), where ``k`` covers the few roundings around
the sum. An operand or a result below ``2⁻¹⁰²²`` may be flushed to zero, so each product may lose ``2⁻¹⁰²² (1 + |a| +
|b|)`` more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, reduce
from math import isqrt
from typing import Any

import numpy as np

Array = Any
"""A numpy array of float64, or of `Fraction` objects: numpy's types cannot say so."""
Interval = tuple[Array, Array]
Bilinear = Callable[[Array, Array], Array]

TINY = 2.0**-1022
CHUNK = 2**19
"""Numbers that are worked on at a time where samples come in parts: as many as a cache holds."""
SLACK = 16
"""Roundings around a sum that are covered without counting them one by one."""


def gamma(terms: int) -> float:
    """An upper bound of ``γ`` for sums of `terms` products, twice what the theorem asks for."""
    if terms > 2**30:
        raise ValueError(f"a sum of {terms} terms is too long to bound")
    return (terms + SLACK) * 2.0**-52


class Float:
    """Outward-rounded float64."""

    kind: type = np.float64
    zero: Any = 0.0
    one: Any = 1.0

    @staticmethod
    def exactly(stored: Array) -> Array:
        """Stored numbers as they are: float32 is float64 exactly."""
        return stored.astype(np.float64)

    @staticmethod
    def nearly(x: Interval) -> Array:
        """A float64 somewhere near: for guesses, never for a bound."""
        return 0.5 * x[0] + 0.5 * x[1]

    @staticmethod
    @lru_cache(4096)
    def rational(value: Fraction) -> tuple[Any, Any]:
        """The nearest float64 on either side of a rational."""
        try:
            near = float(value)
        except OverflowError as error:
            raise Rejected("a number is too large for float64") from error
        return (
            near if Fraction(near) <= value else float(np.nextafter(near, -np.inf)),
            near if Fraction(near) >= value else float(np.nextafter(near, np.inf)),
        )

    @staticmethod
    def down(x: Array) -> Array:
        """A number below the exact result that rounded to `x`: some last digits, and what flushing loses."""
        return x - (np.abs(x) * 2.0**-51 + TINY)

    @staticmethod
    def up(x: Array) -> Array:
        """A number above it."""
        return x + (np.abs(x) * 2.0**-51 + TINY)

    def add(self, a: Interval, b: Interval) -> Interval:
        """``a + b``."""
        return self.down(a[0] + b[0]), self.up(a[1] + b[1])

    def subtract(self, a: Interval, b: Interval) -> Interval:
        """``a - b``."""
        return self.down(a[0] - b[1]), self.up(a[1] - b[0])

    def multiply(self, a: Interval, b: Interval) -> Interval:
        """``a * b`` for intervals of any sign; an operand that was flushed to zero loses `TINY` times the other one."""
        products = [x * y for x in _ends(a) for y in _ends(b)]
        lost = 4 * TINY * (_size(a) + _size(b))
        return self.down(reduce(np.minimum, products) - lost), self.up(reduce(np.maximum, products) + lost)

    def divide(self, a: Interval, b: Interval) -> Interval:
        """``a / b`` for a positive ``b``."""
        require((b[0] > 0).all(), "a divisor is not positive")
        quotients = [x / y for x in _ends(a) for y in _ends(b)]
        lost = 4 * TINY / b[0]
        return self.down(reduce(np.minimum, quotients) - lost), self.up(reduce(np.maximum, quotients) + lost)

    def root(self, a: Interval) -> Interval:
        """``√a`` for a positive ``a``; the square root is correctly rounded."""
        require((a[0] > 0).all(), "a variance plus eps is not positive")
        return np.maximum(self.down(np.sqrt(a[0])), 0.0), self.up(np.sqrt(a[1]))

    def affine(self, x: Interval, matrix: Array, shift: Interval, error: Array | None = None) -> Interval:
        """``A x + b``: ``x`` (..., n), the matrix (n, m) or one a sample (batch, n, m), the shift broadcastable to
        (..., m).

        The true ``A`` may differ from the matrix by `error`, entry by entry. With centre ``c`` and radius ``r`` of
        ``x``: ``|A x - fl(A c)| <= |A| (r + γ (|c| + r)) + underflow``.
        """
        n = matrix.shape[-2]
        g = gamma(n)
        center, radius = self._ball(x)
        size = np.abs(matrix)
        reach = np.abs(center) + radius
        moved = (radius * (1 + g) + g * np.abs(center)) @ size
        if error is not None:
            moved = moved + reach * (1 + g) @ error
            size = np.maximum(size, error)
        # By row of x, and by sample of the matrix: a sample's huge numbers, or NaN, charge no other.
        largest = size.max((-2, -1), keepdims=True, initial=0.0) + reach.max(-1, keepdims=True, initial=0.0)
        return self._around(center @ matrix, moved, n, largest, shift)

    def bilinear(self, apply: Bilinear, matrix: Array, x: Interval, shift: Interval, terms: int, room: int) -> Interval:
        """``apply(matrix, x) + shift``: every entry a sum of at most `terms` products of an entry of either.

        Args:
            apply: of a matrix and samples, each sample on its own; rounded in any order.
            room: numbers that it makes of a sample on its way: samples come in parts.
        """
        g = gamma(terms)
        center, radius = self._ball(x)
        moved = radius * (1 + g) + g * np.abs(center)
        size = np.abs(matrix)
        step = max(1, CHUNK // max(1, room))
        parts = [slice(start, start + step) for start in range(0, max(1, len(center)), step)]
        image = np.concatenate([apply(matrix, center[part]) for part in parts])
        away = np.concatenate([apply(size, moved[part]) for part in parts])
        largest = size.max(initial=0.0) + (np.abs(center) + radius).reshape(len(center), -1).max(1, initial=0.0)
        return self._around(image, away, terms, largest.reshape(-1, *[1] * (image.ndim - 1)), shift)

    def _around(self, image: Array, moved: Array, terms: int, largest: Array, shift: Interval) -> Interval:
        """What products are a centre and a radius of; `largest`: at least the sum of their largest factors."""
        moved = moved * (1 + gamma(terms)) + 8 * TINY * (terms + SLACK) * (2 + largest)
        image = np.where(np.isfinite(image), image, np.nan)  # an overflow on the way says nothing about the sum
        return self.add((self.down(image - moved), self.up(image + moved)), shift)

    def inner(self, a: Interval, b: Interval) -> Interval:
        """``a · b`` over the last axis, (rows, n) both: the bound of `affine`, one row of a matrix for each row."""
        n = a[0].shape[1]
        g = gamma(n)
        (c, e), (x, r) = self._ball(a), self._ball(b)
        size = np.abs(c)
        reach = np.abs(x) + r
        moved = np.einsum("ij,ij->i", size, r * (1 + g) + g * np.abs(x)) + np.einsum("ij,ij->i", e, reach) * (1 + g)
        largest = 2 + (size + e).max(1, initial=0.0) + reach.max(1, initial=0.0)
        moved = moved * (1 + g) + 8 * TINY * (n + SLACK) * largest
        value = np.einsum("ij,ij->i", c, x)
        value = np.where(np.isfinite(value), value, np.nan)
        return self.down(value - moved), self.up(value + moved)

    @staticmethod
    def _ball(x: Interval) -> tuple[Array, Array]:
        """A centre, and a radius that reaches both ends."""
        lo, hi = x
        center = 0.5 * lo + 0.5 * hi
        return center, np.maximum(hi - center, center - lo) * (1 + 2.0**-50) + 4 * TINY


def _size(x: Interval) -> Array:
    """The largest magnitude of each entry."""
    return reduce(np.maximum, [np.abs(end) for end in _ends(x)])


def _ends(x: Interval) -> tuple[Array, ...]:
    """Both ends, or the one of an interval that is a single array: half of the work."""
    return x[:1] if x[0] is x[1] else x


class Exact:
    """Rational numbers: nothing is rounded but square roots, which are bracketed to 200 bits of their own size."""

    BITS = 200
    kind: type = object
    zero: Any = Fraction(0)
    one: Any = Fraction(1)

    @staticmethod
    def exactly(stored: Array) -> Array:
        """Stored numbers as fractions."""
        flat = [Fraction(float(value)) for value in stored.ravel()]
        out = np.empty(len(flat), dtype=object)
        out[:] = flat
        return out.reshape(stored.shape)

    @staticmethod
    def nearly(x: Interval) -> Array:
        """A float64 near, see `Float.nearly`."""
        middle: Array = ((x[0] + x[1]) / 2).astype(np.float64)
        return middle

    @staticmethod
    def rational(value: Fraction) -> tuple[Any, Any]:
        """The value, twice."""
        return value, value

    def add(self, a: Interval, b: Interval) -> Interval:
        """``a + b``."""
        return a[0] + b[0], a[1] + b[1]

    def subtract(self, a: Interval, b: Interval) -> Interval:
        """``a - b``."""
        return a[0] - b[1], a[1] - b[0]

    def multiply(self, a: Interval, b: Interval) -> Interval:
        """``a * b``."""
        products = [x * y for x in _ends(a) for y in _ends(b)]
        return reduce(np.minimum, products), reduce(np.maximum, products)

    def divide(self, a: Interval, b: Interval) -> Interval:
        """``a / b`` for a positive ``b``."""
        require(bool((b[0] > 0).all()), "a divisor is not positive")
        quotients = [x / y for x in _ends(a) for y in _ends(b)]
        return reduce(np.minimum, quotients), reduce(np.maximum, quotients)

    def root(self, a: Interval) -> Interval:
        """``√a`` for a positive ``a``."""
        require(bool((a[0] > 0).all()), "a variance plus eps is not positive")

        def near(value: Fraction, more: int) -> Fraction:
            whole = isqrt(value.numerator * value.denominator << 2 * self.BITS)
            return Fraction(whole + more, value.denominator << self.BITS)

        bracket = np.frompyfunc(near, 2, 1)
        return bracket(a[0], 0), bracket(a[1], 1)

    def inner(self, a: Interval, b: Interval) -> Interval:
        """``a · b`` over the last axis, (rows, n) both."""
        lo, hi = self.multiply(a, b)
        return lo.sum(1), hi.sum(1)

    def affine(self, x: Interval, matrix: Array, shift: Interval, error: Array | None = None) -> Interval:
        """``A x + b``, see `Float.affine`: ``U⁺ lo + U⁻ hi + b`` below, ``U⁺ hi + U⁻ lo + b`` above."""
        plus, minus = np.maximum(matrix, self.zero), np.minimum(matrix, self.zero)
        lo, hi = x
        moved = self.zero if error is None else _size(x) @ error
        return self.add((lo @ plus + hi @ minus - moved, hi @ plus + lo @ minus + moved), shift)

    def bilinear(self, apply: Bilinear, matrix: Array, x: Interval, shift: Interval, terms: int, room: int) -> Interval:
        """``apply(matrix, x) + shift``, see `Float.bilinear`."""
        plus, minus = np.maximum(matrix, self.zero), np.minimum(matrix, self.zero)
        lo, hi = x
        return self.add((apply(plus, lo) + apply(minus, hi), apply(plus, hi) + apply(minus, lo)), shift)


Arithmetic = Float | Exact


def constant(calc: Arithmetic, value: Any, *shape: int) -> Interval:
    """One number everywhere, as an interval of no width."""
    array: Array = np.full(shape, value, dtype=calc.kind)
    return array, array


def number(calc: Arithmetic, value: Fraction) -> Interval:
    """A rational, as an interval of shape (1,)."""
    low, high = calc.rational(value)
    return np.array([low], dtype=calc.kind), np.array([high], dtype=calc.kind)


def total(calc: Arithmetic, x: Interval) -> Interval:
    """The sum over the last axis."""
    ones = np.full((x[0].shape[-1], 1), calc.one, dtype=calc.kind)
    lo, hi = calc.affine(x, ones, constant(calc, calc.zero, 1))
    return lo[..., 0], hi[..., 0]


def product(calc: Arithmetic, a: Interval, b: Interval) -> Interval:
    """``a @ b`` for interval matrices: ``b`` as a matrix and what it may be off by."""
    matrix, error = centred(calc, b)
    return calc.affine(a, matrix, constant(calc, calc.zero, 1), error)


def centred(calc: Arithmetic, x: Interval) -> tuple[Array, Array]:
    """An array, and how far the interval reaches from it, entry by entry."""
    middle = calc.exactly(calc.nearly(x))
    return middle, np.maximum(calc.subtract(x, (middle, middle))[1], calc.subtract((middle, middle), x)[1])


class Rejected(Exception):
    """A certificate, or a claim in it, that does not hold; the message is the reason."""


@contextmanager
def guarded() -> Iterator[None]:
    """Whatever Python or numpy cannot digest is a rejection. Overflows are not worth a warning: they prove nothing."""
    with np.errstate(all="ignore"):
        try:
            yield
        except Rejected:
            raise
        except Exception as error:
            raise Rejected(f"it makes no sense: {type(error).__name__}: {error}") from error


def require(holds: object, reason: str) -> None:
    """Reject with a reason unless `holds`. NaN compares false, so that no NaN passes."""
    if not bool(holds):
        raise Rejected(reason)
