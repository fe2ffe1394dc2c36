"""Spectral normalisation, a baseline of Table 5 of CerDEQ (Li, Wang & Lin, ICML 2022), made rigorous."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verideq.errors import ParametrizationError
from verideq.parametrizations.base import Contraction, check_fusion, install, positive, tolerance, unit_sums


class SpectralNorm(Contraction):
    """``W = (1-m) V / σ⁺`` with a free ``V`` and ``σ⁺ >= ‖|V|‖₂``.

    ``‖|W|‖₂ <= 1-m`` gives ``ρ(|W|) <= 1-m`` and with it a gauge, which the formula does not name. The absolute value
    is needed: intervals move by ``|W|``, and ``‖|W|‖₂`` may be ``√n`` times ``‖W‖₂`` (CerDEQ, Proposition 3.2, read as
    ``max(‖W‖₂, ‖|W|‖₂)``).

    A power iteration estimates a norm from *below*. But for ``K = |V|`` and **any** ``x > 0``, ``‖K‖₂² = ρ(KᵀK) <=
    max_i (KᵀK x)_i / x_i`` (Collatz, Wielandt): the iterate's quotient is the bound, and a better iterate only tightens
    it. For a convolution ``K`` sums over the taps, which bounds the operator under zero and circular padding, and
    ``ρ(|W|)`` under every padding.

    Args:
        iterations: of ``x <- x + KᵀK x / max(KᵀK x)``, from 1.
        m: in (0, 1). A buffer: a schedule may assign it.

    Raises:
        ParametrizationError: `m` outside (0, 1), or `iterations` below 1.
    """

    def __init__(self, iterations: int = 10, m: float = 0.1) -> None:
        super().__init__(m)
        if iterations < 1:
            raise ParametrizationError(f"iterations = {iterations}: give 1 or more")
        self.iterations = iterations

    @staticmethod
    def register(layer: nn.Module, iterations: int = 10, m: float = 0.1) -> nn.Module:
        """Register on the weight of `layer`, which becomes the free ``V``.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            iterations: see the class.
            m: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, a number out of range, or a weight that is parametrized
                already.

        >>> fusion = SpectralNorm.apply(nn.Linear(4, 4, bias=False), m=0.1)
        >>> bool(torch.linalg.matrix_norm(fusion.weight.detach().abs(), 2) <= 0.9)
        True
        """
        check_fusion(layer, "SpectralNorm")
        return install(layer, SpectralNorm(iterations, m))

    def forward(self, V: Tensor) -> Tensor:
        return V * (self.rate(V) / self._bound(V))

    def _bound(self, V: Tensor) -> Tensor:
        """``σ⁺``; 1 for a ``V`` of zeros."""
        sums = unit_sums(V)
        size = positive(sums.amax())
        sums = (sums / size).to(torch.float64)  # the largest is 1, and so is the least of what follows
        x = torch.ones_like(sums[0])
        for _ in range(self.iterations):
            y = sums.T @ (sums @ x)
            x = x + y / positive(y.amax())
            x = x / x.amax()
        return (size * (sums.T @ (sums @ x) / x).amax().clamp(min=1).sqrt()).to(V.dtype)

    def inverse(self, W: Tensor) -> Tensor:
        """``V = W``, where ``σ⁺`` of ``W`` is ``1-m``.

        Raises:
            ParametrizationError: it is something else; the message says which `m` would fit.
        """
        bound, target = float(self._bound(W)), 1 - float(self.m)
        if bool(W.any()) and not abs(bound / target - 1) <= tolerance(W):
            fitting = f"use m = {1 - bound:.6g}, or " if 0 < bound < 1 else "no m in (0, 1) fits: use "
            raise ParametrizationError(
                f"W is not in SpectralNorm at m = {float(self.m):.6g}: the bound of the spectral norm of |W| is "
                f"{bound:.6g}, and has to be 1 - m = {target:.6g}; {fitting}SpectralNorm.apply on a fresh layer"
            )
        return W
