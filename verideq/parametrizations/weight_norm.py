"""Weight normalisation (Salimans & Kingma, 2016), a baseline of Table 5 of CerDEQ, scaled so that a gauge exists."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verideq.equilibrium import Gauge
from verideq.errors import ParametrizationError
from verideq.parametrizations.base import Contraction, check_fusion, install, positive, scaled, tolerance

START = 2.2
"""``sigmoid(START)`` is about .9."""


class WeightNorm(Contraction):
    """``W_i = (1-m) sigmoid(g_i) / √n · V_i / ‖V_i‖₂`` for every row, ``n`` its number of entries; ``V``, ``g`` free.

    ``Σ_j |W_ij| <= √n ‖W_i‖₂ <= 1-m`` (Cauchy, Schwarz): ``u = 1`` is a gauge. For a convolution a row is (in, kernel
    height, kernel width), that of an interior pixel. A row of zeros stays zero.

    Args:
        units: rows of ``W``.
        m: in (0, 1). A buffer: a schedule may assign it.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    def __init__(self, units: int, m: float = 0.1) -> None:
        super().__init__(m)
        self.g = nn.Parameter(torch.full((units,), START))

    @staticmethod
    def register(layer: nn.Module, m: float = 0.1) -> nn.Module:
        """Register on the weight of `layer`, which becomes the free ``V``.

        Args:
            layer: a square `Linear` or a stride-1 "same" `Conv2d` (groups 1) without bias.
            m: see the class.

        Returns:
            the layer itself.

        Raises:
            ModelError: the layer is no fusion of an equilibrium.
            ParametrizationError: a grouped convolution, an `m` out of range, or a weight that is parametrized already.

        >>> fusion = WeightNorm.apply(nn.Linear(4, 4, bias=False), m=0.1)
        >>> bool((fusion.weight.abs().sum(1) <= 0.9).all())
        True
        """
        weight = check_fusion(layer, "WeightNorm")
        return install(layer, WeightNorm(len(weight), m))

    def gauge(self) -> Gauge:
        return Gauge(torch.ones_like(self.g.detach()))

    def forward(self, V: Tensor) -> Tensor:
        length = self.rate(V) * torch.sigmoid(self.g) / V[0].numel() ** 0.5
        # Squares of the entries themselves would overflow long before the entries do.
        unit = scaled(V, positive(V.abs().flatten(1).amax(1)).reciprocal())
        return scaled(unit, length / positive(unit.flatten(1).norm(dim=1, dtype=torch.float64).to(V.dtype)))

    @torch.no_grad()
    def inverse(self, W: Tensor) -> Tensor:
        """``V = W``, and ``g`` from the lengths of its rows.

        Raises:
            ParametrizationError: a row is longer than ``(1-m) / √n``.
        """
        norms = W.flatten(1).norm(dim=1)
        share = norms * W[0].numel() ** 0.5 / self.rate(W)
        if not bool((share <= 1 + tolerance(W)).all()):
            raise ParametrizationError(
                f"W is not in WeightNorm at m = {float(self.m):.6g}: the longest row has the norm "
                f"{float(norms.max()):.6g}, and (1 - m) / sqrt(n) = {(1 - float(self.m)) / W[0].numel() ** 0.5:.6g} is "
                "the most; use a smaller m, or RowGauge, which takes every W with a gauge"
            )
        # sigmoid reaches 1 only in the limit, and 0 only for rows of zeros, which stay zero whatever g is.
        finfo = torch.finfo(W.dtype)
        share = share.clamp(finfo.tiny, 1 - finfo.eps)
        self.g.copy_(share.log() - torch.log1p(-share))
        return W
