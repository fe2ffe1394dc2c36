"""The row-gauge parametrization: all of LBEN as a row normalisation (docs/theory.md, one family)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verideq.equilibrium import Gauge
from verideq.errors import ParametrizationError
from verideq.parametrizations.base import (
    Contraction,
    check_fusion,
    estimate_radius,
    fitting_m,
    install,
    positive,
    resolvent,
    row_sums,
    scaled,
    strength,
    unit_sums,
)

LIMIT = 8.0
"""Scales stay within ``exp(±LIMIT)``: beyond, a gauge could no longer be found in float64."""


class RowGauge(Contraction):
    """``W = diag(u) N diag(u)⁻¹``: rows of the free ``N`` cut to ``Σ_j |N_ij| <= 1-m``, ``u`` one free scale a row.

    ``|W| u = diag(u) |N| 1 <= (1-m) u``: ``u`` *is* a gauge. Conversely a gauge ``u`` of ``W`` gives ``N = diag(u)⁻¹ W
    diag(u)``, so that these are all ``W`` with ``ρ(|W|) < 1-m`` (Wei & Kolter's Theorem 3.3, "LBEN", over all ``m`` and
    ``γ``), as far as ``u`` has ratios below ``exp(16)``, nine million: ``u = exp(8 tanh(log_scale / 8))``.

    A convolution has one scale a channel, and sums a row over (in, kernel height, kernel width): the row of an interior
    pixel, the largest under every padding.

    Args:
        units: rows of ``W``.
        m: in (0, 1); the gauge contracts at the rate ``1-m`` or better. A buffer: a schedule may assign it.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    def __init__(self, units: int, m: float = 0.1) -> None:
        super().__init__(m)
        self.log_scale = nn.Parameter(torch.zeros(units))

    @staticmethod
    def register(layer: nn.Module, m: float = 0.1) -> nn.Module:
        """Register on the weight of `layer`: rows at their largest sum, as in IBP-MonDEQ, and ``u = 1``.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            m: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, an `m` out of range, or a weight that is parametrized already.

        >>> fusion = RowGauge.apply(nn.Linear(4, 4, bias=False), m=0.1)
        >>> bool((fusion.weight.abs().sum(1) <= 0.9).all())
        True
        """
        weight = check_fusion(layer, "RowGauge")
        return install(layer, RowGauge(len(weight), m))

    @staticmethod
    def adopt(layer: nn.Module) -> nn.Module:
        """Register on the weight of `layer` and keep it as ``W``, for the largest `m` that the gauge
        ``(I - |W|)⁻¹ 1`` allows.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: as `register`; or the weight has no gauge.
        """
        weight = check_fusion(layer, "RowGauge").detach()
        m = strength(unit_sums(weight), weight)
        return install(layer, RowGauge(len(weight), m), keep=True)

    def scale(self) -> Tensor:
        """``u``, (units,)."""
        return (LIMIT * torch.tanh(self.log_scale / LIMIT)).exp()

    def gauge(self) -> Gauge:
        return Gauge(self.scale().detach())

    def draw(self, weight: Tensor) -> Tensor:
        return scaled(weight, positive(row_sums(weight)).reciprocal())

    def forward(self, N: Tensor) -> Tensor:
        rate, u = self.rate(N), self.scale()
        shrink = rate / torch.maximum(row_sums(N), rate)
        return scaled(scaled(N, shrink), u, u.reciprocal())

    def inverse(self, W: Tensor) -> Tensor:
        """``N = diag(u)⁻¹ W diag(u)``: the scales as they are where they fit, else ``(I - |W| / (1-m))⁻¹ 1``.

        Raises:
            ParametrizationError: ``ρ(|W|)`` is above ``1-m``, or its gauges need larger ratios than `LIMIT` allows.
        """
        self._fit_scale(unit_sums(W), W)
        u = self.scale()
        return scaled(W, u.reciprocal(), u)

    @torch.no_grad()
    def _fit_scale(self, sums: Tensor, W: Tensor) -> None:
        """Change the scales, if need be, to a ``u`` with ``K u <= (1-m) u``."""
        sums, u = sums.to(torch.float64), self.scale().to(torch.float64)
        rate = (1 - float(self.m)) * (1 + 8 * torch.finfo(W.dtype).eps)
        if bool((sums @ u <= rate * u).all()):
            return
        found = resolvent(sums, rate)
        if found is None:
            radius = estimate_radius(sums)
            raise ParametrizationError(
                f"W is not in {type(self).__name__} at m = {float(self.m):.6g}: the spectral radius is about "
                f"{radius:.6g}, and has to be below 1 - m = {rate:.6g}; {fitting_m(radius, W)}"
            )
        log = found.log()
        log = log - (log.max() + log.min()) / 2
        if not float(log.max()) < LIMIT * (1 - 1e-6):
            raise ParametrizationError(
                f"W is not in {type(self).__name__}: its gauge has a ratio of exp({2 * float(log.max()):.3g}) between "
                f"units, and exp({2 * LIMIT:g}) is the largest; rescale the units of the layer"
            )
        self.log_scale.copy_(LIMIT * torch.atanh(log / LIMIT))
