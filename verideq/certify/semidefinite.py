"""The semidefinite program for a Lipschitz bound of one equilibrium: what a solver proposes, made to hold.

With ``N = I - W``, ``T = diag τ``, ``S = diag s`` and a row ``c``, every ``τ >= 0``, ``s > 0`` and ``g`` with

    [ ½ (T N + Nᵀ T)   -½ T U    ½ c ]
    [  -½ Uᵀ T            S       0  ]   ⪰  0
    [   ½ cᵀ              0       g  ]

show that ``|c·(z - z')| <= g + Σ s_j r_j²`` for ``|x - x'| <= r`` (LipSDP for equilibria: Fazlyab et al. 2019, Revay et
al. 2020). The shape ``b`` of ``s = σ b`` is given, so that only ``U B⁻¹ Uᵀ`` counts, and the program does not grow with
the inputs. Its answer is a suggestion: it is moved until the matrix is positive, and then the checker looks.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNITS = 128
"""The most units for which it is sensible, seconds a row: the matrix has twice as many rows, and a step takes their
cube."""
ROUNDS = 2
"""How often the shape of ``s`` is taken from the last answer, where there is more than one ``s``."""
SETTINGS = {"eps_abs": 1e-3, "eps_rel": 1e-3, "max_iters": 500}
"""Of the solver: a hundred times as exact takes twice as long, and gains less than a part in two hundred."""

Array = NDArray[np.float64]
Multipliers = tuple[Array, Array]
"""``τ``, (units,), and ``s``, (inputs,) or (1,)."""


def seconds(units: int, shapes: int) -> float:
    """About how long a row takes, before any has been timed; `shapes`: how many numbers ``s`` has."""
    loaded = "cvxpy" in sys.modules
    return 2e-4 * units**2 * (ROUNDS if shapes > 1 else 1) + (0 if loaded else 1)


def proposed(W: Tensor, U: Tensor, c: Tensor, tau: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers of one row for unit radii, no worse than the given ones.

    Args:
        W: (units, units), the solved rows.
        U: (units, inputs).
        c: (units,).
        tau, s: (units,) and (inputs,) or (1,): a closed form, for which the quadratic is convex.

    Returns:
        ``τ`` and ``s`` of the same shapes.
    """
    N = np.eye(len(W)) - W.cpu().numpy()
    u, row, t, shape = (x.cpu().numpy().astype(np.float64) for x in (U, c, tau, s))
    size = float(np.abs(row).max())
    if size == 0:
        return tau, s
    row = row / size
    best, first = (t, shape), t
    with np.errstate(all="ignore"):  # the scale of a layer may be any; what is no number is not taken
        least = _length(N, u, row, *best)
        for _ in range(ROUNDS if len(shape) > 1 else 1):
            if not (np.isfinite(u).all() and np.isfinite(shape).all() and np.isfinite(least)):
                break
            answer = _solved(N, u, row, shape)
            if answer is None:
                break
            found = _positive(N, u, row, answer, first, shape)
            length = _length(N, u, row, *found)
            if length < least:
                best, least = found, length
            shape = _shape(N, u, row, *found)
    return torch.from_numpy(best[0]).to(tau), torch.from_numpy(best[1]).to(s)


def _solved(N: Array, U: Array, c: Array, shape: Array) -> tuple[Array, float] | None:
    """``τ`` and ``σ`` as the solver has them; ``None`` where it has none."""
    cp: Any = import_module("cvxpy")  # takes a second, and only this needs it
    gram = (U / shape) @ U.T
    if not np.isfinite(gram).all():
        return None
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * 1e-12
    # All of one size, whatever the scale of the injection.
    scale = max(float(values[-1]), 1e-300)
    R = vectors[:, kept] * np.sqrt(values[kept] / scale)
    t, sigma, g = cp.Variable(len(N), nonneg=True), cp.Variable(), cp.Variable()
    T = cp.diag(t)
    curved, right, column = T @ N, -0.5 * (T @ R), 0.5 * c[:, None]
    zero = np.zeros((R.shape[1], 1))
    matrix = cp.bmat([
        [0.5 * (curved + curved.T), right, column],
        [right.T, sigma * np.eye(R.shape[1]), zero],
        [column.T, zero.T, cp.reshape(g, (1, 1), order="C")],
    ])  # fmt: skip
    problem = cp.Problem(cp.Minimize(g + sigma), [matrix >> 0])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an answer may be inaccurate: it is not believed
            problem.solve(solver=cp.SCS, **SETTINGS)
    except cp.SolverError:
        return None
    if t.value is None or not (np.isfinite(t.value).all() and np.isfinite(sigma.value)):
        return None
    return np.maximum(t.value, 0.0), float(sigma.value) * scale


def _positive(N: Array, U: Array, c: Array, answer: tuple[Array, float], safe: Array, shape: Array) -> Multipliers:
    """The best of answers that were moved: ``τ`` towards `safe`, for which ``T N`` is positive, and ``σ`` upwards."""
    t, sigma = answer
    safe = safe * (float(t.max()) or 1.0) / safe.max()
    tried = [(safe, shape)]
    for share in (1e-5, 1e-4, 1e-2, 1.0):
        mixed = (1 - share) * t + share * safe
        half = mixed[:, None] * N
        values, vectors = np.linalg.eigh(0.5 * (half + half.T))
        if values[0] > 1e-7 * values[-1]:
            pushed = (vectors / np.sqrt(values)).T @ (mixed[:, None] * U) / np.sqrt(shape)
            least = float(np.linalg.eigvalsh(pushed @ pushed.T)[-1]) / 4
            tried += [(mixed, max(sigma, least * room) * shape) for room in (1 + 1e-5, 1 + 1e-4, 1.01)]
    return min(tried, key=lambda found: _length(N, U, c, *found))


def _length(N: Array, U: Array, c: Array, t: Array, s: Array) -> float:
    """About how far the row moves for unit radii: ``√(cᵀ Q⁻¹ c Σ s)``; infinite where ``Q`` is not positive."""
    y = _minimiser(N, U, c, t, s)
    return np.inf if y is None else float(np.sqrt(c @ y * s.sum()))


def _minimiser(N: Array, U: Array, c: Array, t: Array, s: Array) -> Array | None:
    """``Q⁻¹ c``."""
    half, TU = t[:, None] * N, t[:, None] * U
    try:
        L = np.linalg.cholesky(0.5 * (half + half.T) - 0.25 * (TU / s) @ TU.T)
    except np.linalg.LinAlgError:
        return None
    found: Array = np.linalg.solve(L.T, np.linalg.solve(L, c))
    return found


def _shape(N: Array, U: Array, c: Array, t: Array, s: Array) -> Array:
    """The ``s`` that would be best if the quadratic were least where it is now."""
    y = _minimiser(N, U, c, t, s)
    seen = s if y is None else np.abs(U.T @ (t * y))
    found: Array = seen + 0.1 * seen.mean() + 1e-300
    return found
