"""The quadratic dual of docs/theory.md in exact arithmetic, for the two files that check it.

Over all ``z`` and ``y = x - x_c``, with ``p = Wz + Uy + p₀``, the Lagrangian is

    c·z + λ·(p - z) - ν·z + τ·(z∘(z - p)) + Σ s_j (y_j² - r_j²)

and ``f(z)`` its minimum over ``y``, a quadratic with the matrix ``Q``. Multipliers are drawn at random, or
solved for so that the bound is attained for ``r = 0`` up to ``Σ ŵ²/4s``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from proofs_checks.algebra import HALF, corners, definite, diagonal, equilibria, identity, symmetric
from proofs_checks.cases import matrices, monotone, vectors
from verideq.testing.exact import ZERO, relu, solve_linear, zeros

RADII = (ZERO, ZERO, Fraction(1, 16), HALF, Fraction(2))


@dataclass(frozen=True)
class Dual:
    """A layer, ``c``, a box or a ball around ``x_c``, multipliers and a point ``ẑ``.

    `ball`: ``s`` has one value and ``r²`` counts once. `leaf`: a unit, and whether ``p >= 0`` there. `keep`: the units
    that are left; the others have ``z = 0``.
    """

    W: np.ndarray
    U: np.ndarray
    p0: np.ndarray
    r: np.ndarray
    ball: bool
    c: np.ndarray
    lam: np.ndarray
    nu: np.ndarray
    tau: np.ndarray
    s: np.ndarray
    point: np.ndarray
    leaf: tuple[int, bool] | None = None

    @property
    def keep(self) -> list[int]:
        gone = self.leaf[0] if self.leaf is not None and not self.leaf[1] else None
        return [i for i in range(len(self.c)) if i != gone]

    @property
    def charge(self) -> Fraction:
        """``Σ s_j r_j²``, or ``s r²``."""
        return self.s[0] * self.r[0] ** 2 if self.ball else (self.s * self.r**2).sum()

    def offsets(self) -> list[np.ndarray]:
        """Points ``y`` of the box or ball."""
        if not self.ball:
            return list(corners(-self.r, self.r))
        rows = identity(len(self.r)) * self.r[0]
        steps = [sign * row for row in rows for sign in (1, -1)] + [0 * self.r]
        if len(self.r) == 2:
            steps += [self.r[0] * np.array([Fraction(3, 5) * i, Fraction(4, 5) * j]) for i in (1, -1) for j in (1, -1)]
        return steps


def lagrangian(d: Dual, z: np.ndarray, y: np.ndarray) -> Fraction:
    p = d.W @ z + d.U @ y + d.p0
    return d.c @ z + d.lam @ (p - z) - d.nu @ z + d.tau @ (z * (z - p)) + d.s @ y**2 - d.charge


def matrix_q(d: Dual, inputs: bool = True) -> np.ndarray:
    """``½(T(I-W) + (I-W)ᵀT) - ¼ T U S⁻¹ Uᵀ T`` on the units that are left."""
    T, rest = diagonal(d.tau), identity(len(d.c)) - d.W
    Q = symmetric(T @ rest)
    if inputs:
        Q = Q - T @ d.U @ diagonal(1 / d.s) @ d.U.T @ T / 4
    return Q[np.ix_(d.keep, d.keep)]


def value(d: Dual, z: np.ndarray, sign: int = 1) -> Fraction:
    """``f(ẑ)``."""
    p, w = d.W @ z + d.p0, d.U.T @ (d.lam - d.tau * z)
    linear = (d.c - d.lam - sign * d.nu) @ z + d.lam @ p
    return linear + d.tau @ (z * (z - p)) - (w**2 / (4 * d.s)).sum() - d.charge


def gradient(d: Dual, z: np.ndarray, transposed: bool = True) -> np.ndarray:
    """``∇f(ẑ)`` on the units that are left."""
    p, x = d.W @ z + d.p0, -d.U.T @ (d.lam - d.tau * z) / (2 * d.s)
    back = d.W.T if transposed else d.W
    full = d.c - d.lam - d.nu + back @ d.lam + d.tau * (z - p) + d.tau * z - back @ (d.tau * z) - d.tau * (d.U @ x)
    return full[d.keep]


def strength(Q: np.ndarray) -> Fraction | None:
    """A rational ``η > 0`` with ``Q ⪰ η I``, near the largest; ``None`` if there is none."""
    if not len(Q):
        return Fraction(1)
    if not definite(Q):
        return None
    eta = Fraction(float(np.linalg.eigvalsh(Q.astype(float))[0])) * Fraction(999, 1000)
    if eta > 0 and definite(Q - eta * identity(len(Q)), strict=False):
        return eta
    eta = max(np.diag(Q))
    while not definite(Q - eta * identity(len(Q)), strict=False):
        eta /= 2
    return eta


def bound(d: Dual, four: int = 4, sign: int = 1) -> Fraction:
    """``f(ẑ) - ‖∇f(ẑ)‖² / (4 η)``; `assume` sets aside what has no ``Q ≻ 0``. Twins change `four` and `sign`."""
    eta = strength(matrix_q(d))
    assume(eta is not None)
    return value(d, d.point, sign) - (gradient(d, d.point) ** 2).sum() / (four * eta)


def truths(d: Dual, everywhere: bool = False) -> list[Fraction]:
    """``c·z*`` of every equilibrium, of every tried input, that lies in the leaf."""
    found = []
    for y in d.offsets():
        v = d.U @ y + d.p0
        for z in equilibria(d.W, v):
            if d.leaf is not None and not everywhere:
                p = (d.W @ z + v)[d.leaf[0]]
                if p < 0 if d.leaf[1] else p > 0:
                    continue
            found.append(d.c @ z)
    return found


@st.composite
def duals(draw: st.DrawFn, leaves: bool = False) -> Dual:
    """A MonDEQ, or ``W = 2I - W'`` of one, which has no, one or many equilibria; corners: r = 0, c = 0, ties."""
    W, _ = draw(monotone(most=3))
    flipped = draw(st.integers(0, 3)) == 0
    if flipped:
        W = 2 * identity(len(W)) - W
    n, inputs = len(W), draw(st.integers(1, 2))
    r = draw(st.lists(st.sampled_from(RADII), min_size=inputs, max_size=inputs))
    ball = draw(st.booleans())
    c = draw(vectors(n)) * draw(st.sampled_from((1, 1, 1, 0)))
    leaf = (draw(st.integers(0, n - 1)), draw(st.booleans())) if leaves else None
    d = Dual(
        W=W,
        U=draw(matrices(n, inputs)),
        p0=draw(vectors(n)),
        r=np.array([r[0]] * inputs if ball else r, dtype=object),
        ball=ball,
        c=c,
        lam=draw(vectors(n)),
        nu=draw(vectors(n, 0)),
        tau=(zeros(n) + (-1 if flipped else 1)) * draw(st.sampled_from((HALF, Fraction(1), Fraction(6)))),
        s=zeros(inputs) + 1,
        point=draw(vectors(n)),
        leaf=leaf,
    )
    idle = draw(st.sampled_from((ZERO, ZERO, HALF)))
    d = solved(d, idle) if draw(st.booleans()) else replace(d, tau=d.tau + draw(vectors(n)) / 16)
    # What every multiplier has to satisfy, and nothing more.
    free = leaf[0] if leaf is not None and leaf[1] else None
    d = replace(d, lam=np.array([x if i == free else max(x, ZERO) for i, x in enumerate(d.lam)]), nu=relu(d.nu))
    point = d.point + draw(st.sampled_from((ZERO, Fraction(1, 2**10))))
    return strengthened(replace(d, point=np.array([x if i in d.keep else ZERO for i, x in enumerate(point)])))


def strengthened(d: Dual) -> Dual:
    """The same with ``s`` large enough for ``Q ≻ 0``, where ``τ`` allows it."""
    for _ in range(24):
        if strength(matrix_q(d)) is not None:
            break
        d = replace(d, s=4 * d.s)
    return d


def solved(d: Dual, idle: Fraction | np.ndarray = ZERO) -> Dual:
    """Multipliers and point of the stationary system at an equilibrium of ``y = 0`` in the leaf, if there is one.

    `idle` is ``λ`` of the units that are off: 0 makes the bound tight, a positive value looser, a negative one false.
    """
    n = len(d.c)
    for z in equilibria(d.W, d.p0):
        p = d.W @ z + d.p0
        if d.leaf is not None and (p[d.leaf[0]] < 0 if d.leaf[1] else p[d.leaf[0]] > 0):
            continue
        on = [i for i in range(n) if z[i] > 0]
        y = idle * (z == 0)
        c = d.c + d.W.T @ y
        part = solve_linear(identity(len(on)) - d.W[np.ix_(on, on)].T, c[on]) if on else None
        if part is not None:
            y[on] = part
        tau = d.tau
        for _ in range(10):
            lam, nu = y + tau * z, (d.c + d.W.T @ y - y - tau * p) * (z == 0)
            if bool((lam[on] >= 0).all() and (nu >= 0).all()):
                break
            tau = 2 * tau
        return replace(d, lam=lam, nu=nu, tau=tau, point=z, s=d.s * 2**16)
    return d


def quadratic_form(d: Dual, step: np.ndarray, sign: int = 1, transposed: bool = True, inputs: bool = True) -> bool:
    """``f(ẑ + d) = f(ẑ) + ∇f(ẑ)·d + dᵀQd`` exactly, and ``f(ẑ)`` is the Lagrangian's minimum over ``y``."""
    kept = np.array([x if i in d.keep else ZERO for i, x in enumerate(step)], dtype=object)
    f, moved = value(d, d.point, sign), value(d, d.point + kept, sign)
    slope, Q = gradient(d, d.point, transposed), matrix_q(d, inputs)
    expanded = f + slope @ kept[d.keep] + kept[d.keep] @ Q @ kept[d.keep]
    best = -d.U.T @ (d.lam - d.tau * d.point) / (2 * d.s)
    least = all(lagrangian(d, d.point, y) >= f for y in d.offsets())
    return moved == expanded and lagrangian(d, d.point, best) == f and least
