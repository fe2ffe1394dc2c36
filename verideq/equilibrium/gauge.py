"""The gauge of an equilibrium layer: one positive vector that proves it well-posed.

**Gauge theorem** (docs/theory.md).
Let ``z = σ(W z + v)`` with ``σ`` nondecreasing and 1-Lipschitz, and let ``u > 0`` have
slack ``s = u - |W| u > 0``. Then, with ``q = max_i (|W|u)_i / u_i < 1``:

1. for every ``v`` the equilibrium exists, is unique, and Picard iteration reaches it at rate ``q`` in
   ``‖x‖_u = max_i |x_i| / u_i``; so does its interval extension;
2. any ``ẑ`` is within ``t u`` of it, ``t = max_i |ẑ - σ(Wẑ + v)|_i / s_i``;
3. any box that its interval extension maps into itself contains it, for all ``v`` of the box of injections.

All of this holds as well with ``(W̃, ṽ)``, every row solved for its own unknown, in place of ``(W, v)``; a
gauge of ``W̃`` is the non-Euclidean condition ``μ_{∞,u}(W) < 1`` (Jafarpour et al., NeurIPS 2021). A gauge of ``W`` is
one of ``W̃`` too: from ``|d| u + o < u`` follows ``o / (1 - d) < u``.

(``σ`` has to be the projection onto an interval for that, as all of `verideq.equilibrium.activations` are.)

For a convolution ``u`` is one number a channel, and ``|W|`` is summed over the taps of the kernel: the interior pixel
is the worst one, whatever the padding and the size of the image, because every padding reads each tap at most once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verideq.box import TINY, gamma
from verideq.equilibrium.feedback import Feedback
from verideq.equilibrium.operators import Operator, exactly
from verideq.errors import ModelError, NoGaugeError

if TYPE_CHECKING:
    from verideq.equilibrium.layer import Equilibrium


@dataclass(frozen=True)
class Gauge:
    """A candidate ``u``; it *is* a gauge where every entry of `slack` is positive.

    Args:
        u: (units,) or (channels,), positive.
        transformed: it belongs to ``W̃`` (every row solved for its own unknown) and not to ``W``.
    """

    u: Tensor
    transformed: bool = False

    def _operator(self, layer: Equilibrium) -> Operator:
        operator = layer.operator().map(exactly)
        return operator.solved()[0] if self.transformed else operator

    def slack(self, layer: Equilibrium) -> Tensor:
        """A float64 lower bound of ``u - |W| u``, (units,): the gauge theorem needs all of it positive.

        Raises:
            ModelError: `u` does not have one entry a unit.
        """
        return slack(self._operator(layer), self.u)

    def rate(self, layer: Equilibrium) -> float:
        """An upper bound of the contraction rate ``q = max_i (|W| u)_i / u_i``."""
        u = self.u.to(torch.float64)
        return float((1 - self.slack(layer) / u).max()) * (1 + 2.0**-50)


def slack(operator: Operator, u: Tensor) -> Tensor:
    """A float64 lower bound of ``u - |W| u`` for every unit, rounding included; NaN where it cannot be told."""
    sums = operator.absolute_units().to(torch.float64)
    u = u.detach().to(sums)
    if u.shape != sums.shape[:1]:
        raise ModelError(
            f"a gauge has one entry a unit: this layer has {sums.shape[0]} units, u has shape {tuple(u.shape)}"
        )
    # Two roundings in the rows of W̃, the sum over the taps, the sum over the units.
    g = gamma(operator.terms + len(u))
    # What a sum or a row of W̃ loses to underflow is multiplied by u.
    pushed = (sums @ u).mul_(1 + g).add_(4 * TINY * (operator.terms + len(u)) * (1 + float(u.max())))
    value = u - pushed
    value = value - (value.abs() + u) * 2.0**-52
    return torch.where(u > 0, value, torch.full_like(value, -torch.inf))


def gauge(layer: Equilibrium) -> Gauge:
    """Find a gauge of ``W``, or else one of ``W̃``.

    Solves ``(I - K) u = 1`` in float64, ``K`` the matrix of absolute sums, and believes the answer only after `slack`.

    Returns:
        a gauge whose slack is positive everywhere, its largest entry 1.

    Raises:
        NoGaugeError: there is none to be found; `rate` estimates the spectral radius of ``|W|``.
    """
    operator = layer.operator().map(exactly)
    for transformed in (False, True):
        candidate = operator.solved()[0] if transformed else operator
        u = _solve(candidate.absolute_units())
        if u is not None and bool((slack(candidate, u) > 0).all()):
            return Gauge(u, transformed)
    if not bool(operator.absolute_units().isfinite().all()):
        raise NoGaugeError("no gauge: the weights hold NaN or infinity", float("nan"))
    rate = min(estimate_rate(operator), estimate_rate(operator.solved()[0]))
    giving = "FeedbackGauge" if isinstance(operator, Feedback) else "IBPMonDEQ"
    raise NoGaugeError(
        f"no gauge: the spectral radius of |W| is about {rate:.4g}, and intervals need less than 1. "
        f"Train the layer with a parametrization that gives one (verideq.parametrizations.{giving})",
        rate,
    )


def _solve(sums: Tensor) -> Tensor | None:
    """``(I - K)⁻¹ 1``, scaled to a largest entry of 1, if it is finite and positive."""
    identity = torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
    u, info = torch.linalg.solve_ex(identity - sums, sums.new_ones(len(sums)))
    if bool(info) or not bool((u.isfinite() & (u > 0)).all()):
        return None
    scaled: Tensor = u / u.max()
    return scaled


def estimate_rate(operator: Operator, steps: int = 100) -> float:
    """An estimate of ``ρ(|W|)`` by power iteration from 1: no bound in either direction."""
    sums = operator.absolute_units()
    u, rate = sums.new_ones(len(sums)), 0.0
    for _ in range(steps):
        # Averaging with the last iterate keeps a periodic |W| (a permutation, say) from oscillating.
        u = 0.5 * (u + sums @ u)
        size = float(u.max())
        if not 0 < size < float("inf"):
            return size
        u, rate = u / size, 2 * size - 1
    return rate
