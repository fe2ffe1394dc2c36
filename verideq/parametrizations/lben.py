"""LBEN: the IBP-MonDEQ parametrization with a trainable diagonal scaling; Wei & Kolter, ICLR 2022, Theorem 3.3 and
equation (3.7), after Revay, Wang & Manchester, "Lipschitz bounded equilibrium networks", 2020."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from verideq.errors import ParametrizationError
from verideq.parametrizations.base import (
    check_fusion,
    estimate_radius,
    fitting_m,
    install,
    resolvent,
    scaled,
    tolerance,
    unit_sums,
)
from verideq.parametrizations.ibp_mondeq import IBPMonDEQ, largest_eigenvalue


class LBEN(IBPMonDEQ):
    """``W = Γ D^-½ M D^-½ Γ⁻¹``, ``Γ = diag((γ-1)/γ sigmoid(β) + 1/γ)``, ``D`` as in `IBPMonDEQ`; free ``M`` and ``β``.

    **Theorem 3.3.** ``Λ - Λ|W|`` is positive definite for some positive diagonal ``Λ`` (here ``Γ⁻²``) exactly for ``W``
    of this form, if ``D`` may be larger than `IBPMonDEQ` takes it and ``Γ`` is not bounded. That set is
    ``ρ(|W|) < 1``: the layer has a gauge. `RowGauge` reaches all of it; here ``γ`` bounds the ratios of ``Γ``, and
    blocks of units that nothing connects all have the rate ``1-m``.

    ``β`` has one entry a unit, for a convolution one a channel.

    Args:
        units: rows of ``W``.
        m: the strength of monotonicity, in (0, 1). A buffer: a schedule may assign it.
        gamma: the largest ratio of ``Γ``, above 1; a buffer.

    Raises:
        ParametrizationError: `m` outside (0, 1), or `gamma` not above 1.
    """

    gamma: Tensor

    def __init__(self, units: int, m: float = 0.1, gamma: float = 3.0) -> None:
        super().__init__(m)
        if not 1 < gamma < math.inf:
            raise ParametrizationError(f"gamma = {gamma}: the largest ratio of the scaling is a number above 1")
        self.register_buffer("gamma", torch.tensor(float(gamma), dtype=torch.float64))
        self.beta = nn.Parameter(torch.zeros(units))

    @staticmethod
    def register(layer: nn.Module, m: float = 0.1, gamma: float = 3.0) -> nn.Module:
        """Register on the weight of `layer`, which becomes the free ``M``; ``β = 0`` as in the paper's code.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            m: see the class.
            gamma: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, an `m` or `gamma` out of range, or a weight that is
                parametrized already.

        >>> fusion = LBEN.apply(nn.Linear(4, 4, bias=False), m=0.1, gamma=3.0)
        >>> bool(torch.linalg.eigvals(fusion.weight.detach().abs()).abs().max() <= 0.9 + 1e-6)
        True
        """
        weight = check_fusion(layer, "LBEN")
        return install(layer, LBEN(len(weight), m, gamma))

    @staticmethod
    def adopt(layer: nn.Module) -> nn.Module:
        """Register on the weight of `layer` and keep it as ``W``, for an `m` and a `gamma` that fit.

        With ``u = (I - |W|)⁻¹ 1``, ``l = (I - |W|ᵀ)⁻¹ 1`` and ``Γ = diag(√(u/l))`` the vector ``√(u l)`` is decreased
        by ``Γ⁻¹|W|Γ`` and by its transpose, hence the largest eigenvalue of its symmetric part is below 1: it is
        ``1-m``.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: as `register`; or the weight has no gauge, or blocks of different rates.
        """
        weight = check_fusion(layer, "LBEN").detach()
        sums = unit_sums(weight).to(torch.float64)
        u, v = resolvent(sums, 1.0), resolvent(sums.T, 1.0)
        if u is None or v is None:
            raise ParametrizationError(
                f"the weight has no gauge: the spectral radius is about {estimate_radius(sums):.6g}, and has to "
                "be below 1; use LBEN.apply, which scales it"
            )
        log = (u / v).log() / 2
        parametrization = LBEN(len(weight), gamma=1.1 * math.exp(float(log.max() - log.min()))).to(weight)
        parametrization._set_scale(log)
        stored = parametrization.scale().detach().to(torch.float64)
        m = 1 - largest_eigenvalue(scaled(sums, stored.reciprocal(), stored))
        if not 0 < m < 1:
            raise ParametrizationError("all of W is zero or next to it: use LBEN.apply with an m of your choice")
        parametrization.m.fill_(m)
        return install(layer, parametrization, keep=True)

    def scale(self) -> Tensor:
        """The diagonal of ``Γ``, (units,)."""
        return (self.gamma - 1) / self.gamma * torch.sigmoid(self.beta) + 1 / self.gamma

    def forward(self, M: Tensor) -> Tensor:
        scale = self.scale()
        return scaled(super().forward(M), scale, scale.reciprocal())

    @torch.no_grad()
    def inverse(self, W: Tensor) -> Tensor:
        """The ``M`` for ``W``: with ``β`` as it is where that fits, else with a ``β`` that fits `m` and `gamma`.

        Raises:
            ParametrizationError: none is found; the message says why. `adopt` chooses `m` and `gamma` to fit.
        """
        before = self.beta.clone()
        try:
            return self._inverse_as_is(W)
        except ParametrizationError:
            self._set_scale(self._search(unit_sums(W), W))
        try:
            return self._inverse_as_is(W)
        except ParametrizationError:
            self.beta.copy_(before)
            raise

    def _inverse_as_is(self, W: Tensor) -> Tensor:
        scale = self.scale()
        return super().inverse(scaled(W, scale.reciprocal(), scale))

    @torch.no_grad()
    def _set_scale(self, log: Tensor) -> None:
        """Choose ``β`` so that ``Γ`` has the ratios ``exp(log)``."""
        log, gamma = log - (log.max() + log.min()) / 2, float(self.gamma)
        # Centred between 1/γ and 1; at the ends β would be infinite.
        share = ((log - math.log(gamma) / 2).exp() - 1 / gamma) * gamma / (gamma - 1)
        self.beta.copy_(torch.logit(share, eps=1e-7))

    def _search(self, sums: Tensor, W: Tensor) -> Tensor:
        """``log Γ`` for which the largest eigenvalue of the symmetric part of ``Γ⁻¹|W|Γ`` is ``1-m``.

        Along ``Γ = exp(t g)`` that eigenvalue is convex in ``t`` (Kingman), and with ``g = log(u/l) / 2`` as in `adopt`
        it is at most ``1-m`` at ``t = 1``: bisection between a point below and one above.
        """
        sums, target = sums.to(torch.float64), 1 - float(self.m)
        above = target * (1 + tolerance(W))
        u, v = resolvent(sums, above), resolvent(sums.T, above)
        if u is None or v is None:
            radius = estimate_radius(sums)
            raise ParametrizationError(
                f"W is not in LBEN at m = {float(self.m):.6g}: the spectral radius of |W| is about {radius:.6g}, and "
                f"may be at most 1 - m = {target:.6g}; {fitting_m(radius, W)}"
            )
        log = (u / v).log() / 2
        width = float(log.max() - log.min())
        reach = math.log(float(self.gamma)) / max(width, 1e-9)

        def excess(t: float) -> float:
            ratios = (t * log).exp()
            return largest_eigenvalue(scaled(sums, ratios.reciprocal(), ratios)) - target

        values = {t: excess(t) for t in (0.0, min(1.0, reach), reach, -reach)} if width > 1e-9 else {0.0: excess(0.0)}
        low, high = min(values, key=lambda t: values[t]), max(values, key=lambda t: values[t])
        if values[low] > tolerance(W) or values[high] < -tolerance(W):
            raise ParametrizationError(
                f"W is not found in LBEN at m = {float(self.m):.6g} and gamma = {float(self.gamma):.6g}: the scalings "
                f"tried give an m from {1 - target - values[high]:.6g} to {1 - target - values[low]:.6g}; "
                "use one of these, or LBEN.adopt, which chooses m and gamma"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return high * log
