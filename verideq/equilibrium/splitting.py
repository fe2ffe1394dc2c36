"""Peaceman-Rachford splitting: the solver for monotone layers, where Picard iteration need not converge.

The equilibrium of ``z = σ(W z + v)`` is the zero of the sum of two monotone operators, of ``(I - W) z - v`` and of the
normal cone of the interval that ``σ`` projects onto. With ``V = (I + α (I - W))⁻¹``, factorised once a snapshot, and
any ``α > 0``

    u <- 2 V (2 z - u + α v) - (2 z - u),      z = σ(u)

contracts in the Euclidean norm where ``I - W`` is strongly monotone (Winston & Kolter, NeurIPS 2020, section 3.2). The
adjoint equation ``y = g + Wᵀ D y``, D the 0/1 slopes of ``σ``, is a problem of the same kind: ``w = D y`` is the
equilibrium of ``w = D (Wᵀ w + g)``, and ``Vᵀ`` is there already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verideq.equilibrium.activations import RELU, Activation
from verideq.equilibrium.monotone import Map, Monotone, dense_inverse
from verideq.equilibrium.operators import Dense, Operator
from verideq.equilibrium.solvers import Solution, Solver, fixed_point
from verideq.errors import ModelError


@dataclass(frozen=True)
class Splitting:
    """One snapshot of ``W``, factorised.

    Args:
        operator: ``W``, detached.
        alpha: the step, positive; any serves.
        inverse: ``V``, on (batch, *features).
        adjoint: ``Vᵀ``.
        activation: ``σ``.
    """

    operator: Operator
    alpha: float
    inverse: Map
    adjoint: Map
    activation: Activation = RELU

    @staticmethod
    def of(
        operator: Operator, shape: tuple[int, ...], alpha: float | None = None, activation: Activation = RELU
    ) -> Splitting | None:
        """The splitting for states of a shape (*features), or ``None`` where ``V`` cannot be cached.

        Args:
            operator: a `Monotone` one, or any `Dense` one, which is not looked at for being monotone.
            alpha: ``None``: from the norms of ``I - W``.
            activation: ``σ``.

        Raises:
            ModelError: a dense ``I - W`` that is not monotone, and no `alpha` is given.
        """
        if isinstance(operator, Monotone):
            alpha = alpha or _balanced(operator.m, *operator.norms())
            maps = operator.inverse(alpha, shape)
        elif isinstance(operator, Dense):
            alpha = alpha or _balanced(*_measure(operator.weight))
            maps = dense_inverse(operator.weight, alpha)
        else:
            return None
        return None if maps is None else Splitting(operator, alpha, *maps, activation)

    @torch.no_grad()
    def solve(self, injection: Tensor, solver: Solver) -> Solution:
        """The equilibrium for an injection, (1, batch, *features).

        The residual is that of ``u``, and bounds the error of ``z`` up to the rate of contraction.
        """
        return self._iterate(self.inverse, self.activation, injection, solver)

    @torch.no_grad()
    def pull(self, value: Tensor, upstream: Tensor, solver: Solver) -> Solution:
        """The solution ``y`` of ``y = g + Wᵀ D y``.

        Args:
            value: the equilibrium that ``D`` is of, (1, batch, *features).
            upstream: ``g``, likewise.
        """
        active = self.activation.active(value)
        solution = self._iterate(self.adjoint, lambda u: u * active, upstream, solver)
        pulled = upstream[0] + self.operator.transpose().apply(solution.value[0])
        return replace(solution, value=pulled[None])

    def _iterate(self, inverse: Map, project: Map, source: Tensor, solver: Solver) -> Solution:
        shift = self.alpha * source

        def step(u: Tensor) -> Tensor:
            reflected = 2 * project(u) - u
            return 2 * inverse((reflected + shift)[0])[None] - reflected

        solution = fixed_point(step, torch.zeros_like(source), solver)
        return replace(solution, value=project(solution.value))


def _balanced(m: float, symmetric: float, skew: float) -> float:
    """A step between the best ones of a symmetric ``I - W``, ``1 / √(m L)``, and of a skew one, ``1 / √(m² + s²)``."""
    return 1 / math.sqrt(m * symmetric + skew**2)


def _measure(weight: Tensor) -> tuple[float, float, float]:
    """The ends of the spectrum of ``I - sym W``, and the norm of the skew part."""
    ends = _spectrum(weight)
    if not ends[0] > 0:
        raise ModelError(
            f"the smallest eigenvalue of I - sym W is {ends[0]:.4g}: Peaceman-Rachford splitting needs a monotone "
            "layer, where it is positive; use another solver"
        )
    return *ends, float(torch.linalg.matrix_norm((weight - weight.T) / 2, 2))


def _spectrum(weight: Tensor) -> tuple[float, float]:
    """The ends of the spectrum of ``I - sym W``; NaN where ``W`` is not finite."""
    if not bool(weight.isfinite().all()):
        return math.nan, math.nan
    values = 1 - torch.linalg.eigvalsh((weight + weight.T) / 2)
    return float(values.min()), float(values.max())


def is_monotone(operator: Operator) -> bool:
    """Whether ``I - sym W`` of a dense operator is numerically positive definite: a solver's word, no proof."""
    return isinstance(operator, Dense) and _spectrum(operator.weight.detach())[0] > 0
